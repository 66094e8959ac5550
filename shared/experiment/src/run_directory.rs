//! `runs/<name>/`: everything that one run leaves behind.
//!
//! ```text
//! runs/<name>/experiment.toml   the resolved experiment
//!             metrics.jsonl     one row per line, appended
//!             status.json       how things stand now, replaced as a whole
//!             rounds/0001/…     what round 1 left; `complete` in it is written last
//! ```
//!
//! This file owns the names and what survives a crash: a file is either its old or its new self, and a round is complete
//! or does not count. It does not know what is in a round's directory. Start from [`RunDirectory::create`].

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{Error, Experiment, MetricsLog, Row, hex, read_rows};

#[derive(Debug, Clone)]
pub struct RunDirectory {
    path: PathBuf,
    experiment: Experiment,
}

impl RunDirectory {
    /// Makes `<root>/<name>/` for a new run, or returns to the one that is there, if the same experiment began it;
    /// [`RunDirectory::finished_rounds`] tells which. Where the experiment is the same but `[device]` or `model.path`
    /// has changed, the new ones are kept.
    pub fn create(root: &Path, experiment: &Experiment) -> Result<Self, Error> {
        let path = root.join(&experiment.name);
        create_directories(&path.join(ROUNDS))?;
        let resolved = path.join(EXPERIMENT);
        if resolved.try_exists().map_err(Error::file("look for", &resolved))? {
            let found = Experiment::from_file(&resolved)?;
            if found.digest() != experiment.digest() {
                return Err(Error::OtherExperiment {
                    found: hex(&found.digest()),
                    expected: hex(&experiment.digest()),
                    difference: first_difference(&found, experiment),
                    path,
                });
            }
        }
        write_atomically(&resolved, experiment.resolved_toml().as_bytes())?;
        Ok(Self { path, experiment: experiment.clone() })
    }

    /// Opens the directory of a run that has begun, to look at it. Nothing is changed.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let experiment = Experiment::from_file(&path.join(EXPERIMENT))?;
        Ok(Self { path: path.to_path_buf(), experiment })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn experiment(&self) -> &Experiment {
        &self.experiment
    }

    pub fn metrics_path(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// The writer of the run's metrics: one at a time.
    pub fn metrics_log(&self) -> Result<MetricsLog, Error> {
        MetricsLog::open(&self.metrics_path())
    }

    /// The rows written so far, also while another process writes more. None if nothing was ever written.
    pub fn rows(&self) -> Result<Vec<Row>, Error> {
        match read_rows(&self.metrics_path()) {
            Err(Error::File { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            rows => rows,
        }
    }

    pub fn status_path(&self) -> PathBuf {
        self.path.join("status.json")
    }

    /// Replaces `status.json`.
    pub fn write_status(&self, status: &impl Serialize) -> Result<(), Error> {
        let path = self.status_path();
        let json = serde_json::to_vec_pretty(status)
            .map_err(|source| Error::file("write", &path)(io::Error::new(ErrorKind::InvalidInput, source)))?;
        write_atomically(&path, &json)
    }

    /// Where round `round` leaves its files, whether it has begun or not.
    pub fn round_path(&self, round: u32) -> PathBuf {
        self.path.join(ROUNDS).join(format!("{round:04}"))
    }

    /// An empty directory for a round. What a crash left of an earlier attempt at it is deleted, so that no update of
    /// that attempt is taken for one of this.
    pub fn begin_round(&self, round: u32) -> Result<PathBuf, Error> {
        let path = self.round_path(round);
        if is_complete(&path)? {
            return Err(Error::RoundComplete { round, path });
        }
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::file("delete", &path)(error))?,
            _ => create_directories(&path)?,
        }
        Ok(path)
    }

    /// Marks a round as complete. Its files are on disk by then if [`write_atomically`] wrote them.
    pub fn finish_round(&self, round: u32) -> Result<(), Error> {
        write_atomically(&self.round_path(round).join(COMPLETE), b"")
    }

    /// The newest complete round, or 0. Rounds count from 1, so this is also how many are finished.
    pub fn finished_rounds(&self) -> Result<u32, Error> {
        let rounds = self.path.join(ROUNDS);
        let list = || Error::file("list", &rounds);
        let entries = match fs::read_dir(&rounds) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
            entries => entries.map_err(list())?,
        };
        let mut newest = 0;
        for entry in entries {
            let name = entry.map_err(list())?.file_name();
            let Some(round) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            // Only the spelling that this program writes counts.
            if round > newest && name.to_str() == Some(&format!("{round:04}")) && is_complete(&rounds.join(&name))? {
                newest = round;
            }
        }
        Ok(newest)
    }
}

const EXPERIMENT: &str = "experiment.toml";
const ROUNDS: &str = "rounds";
const COMPLETE: &str = "complete";

fn is_complete(round: &Path) -> Result<bool, Error> {
    round.join(COMPLETE).try_exists().map_err(Error::file("look into", round))
}

fn first_difference(found: &Experiment, expected: &Experiment) -> String {
    let [found, expected] = [found, expected].map(|experiment| experiment.without_machine().resolved_toml());
    let mut lines = found.lines().zip(expected.lines());
    // Only where one text goes on after the other has ended do all pairs of lines agree.
    lines.find(|(found, expected)| found != expected).map_or_else(
        || String::from("a section that only one of them has"),
        |(found, expected)| format!("`{found}` there, `{expected}` here"),
    )
}

/// Replaces the file at `path`, or makes it: after a crash it has its old content or all of `bytes`, never a part.
///
/// The bytes go to a temporary file beside it, which is then renamed. A path has one writer at a time.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let fail = || Error::file("write", path);
    let Some(name) = path.file_name() else {
        return Err(fail()(io::Error::new(ErrorKind::IsADirectory, "the path does not end with a file's name")));
    };
    let mut temporary_name = name.to_os_string();
    temporary_name.push(".tmp");
    let temporary = path.with_file_name(temporary_name);

    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        // Without this, some file systems make the rename durable before the bytes.
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    if let Err(error) = write() {
        // The temporary file may take the last of a full disk; that it cannot be deleted is not worth another error.
        let _ = fs::remove_file(&temporary);
        return Err(fail()(error));
    }
    sync_parent(path).map_err(fail())
}

fn create_directories(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).and_then(|()| sync_parent(path)).map_err(Error::file("make the directory", path))
}

/// Makes the name `path` durable: a new file or a rename is only on disk when its directory is.
fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Other systems do not open directories as files.
    if cfg!(unix) { File::open(parent)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use tempfile::{TempDir, tempdir};

    use super::*;
    use crate::parse::tests::{SMOKE, smoke};

    fn new_run() -> (TempDir, RunDirectory) {
        let root = tempdir().unwrap();
        let run = RunDirectory::create(root.path(), &smoke()).unwrap();
        (root, run)
    }

    #[test]
    fn a_new_run_holds_its_resolved_experiment() {
        let (root, run) = new_run();
        assert_eq!(run.path(), root.path().join("smoke"));
        assert_eq!(fs::read_to_string(run.path().join("experiment.toml")).unwrap(), smoke().resolved_toml());
        assert_eq!(RunDirectory::open(run.path()).unwrap().experiment(), &smoke());
        assert_eq!(run.finished_rounds().unwrap(), 0);
        assert_eq!(run.rows().unwrap(), []);
    }

    #[test]
    fn the_same_experiment_returns_to_its_run_on_another_device() {
        let (root, run) = new_run();
        run.begin_round(1).unwrap();
        run.finish_round(1).unwrap();
        let mut moved = smoke();
        moved.device.threads = 7;
        assert_eq!(RunDirectory::create(root.path(), &moved).unwrap().finished_rounds().unwrap(), 1);
        assert_eq!(RunDirectory::open(run.path()).unwrap().experiment().device.threads, 7);
    }

    #[test]
    fn another_experiment_is_refused_and_changes_nothing() {
        let (root, run) = new_run();
        let other = Experiment::from_toml(&SMOKE.replace("rank = 4", "rank = 5"), "other").unwrap();
        let error = RunDirectory::create(root.path(), &other).unwrap_err().to_string();
        assert!(error.starts_with(&format!("continue the run in {}: it belongs to another", run.path().display())));
        assert!(error.contains("first difference: `rank = 4` there, `rank = 5` here"), "{error}");
        assert_eq!(RunDirectory::open(run.path()).unwrap().experiment(), &smoke());
    }

    #[test]
    fn a_directory_that_is_no_run_is_not_opened() {
        let root = tempdir().unwrap();
        let error = RunDirectory::open(root.path()).unwrap_err().to_string();
        let expected = format!("read the experiment {}: ", root.path().join("experiment.toml").display());
        assert!(error.starts_with(&expected), "{error}");
    }

    #[test]
    fn only_complete_rounds_are_finished() {
        let (_root, run) = new_run();
        for round in [1, 2, 10_000] {
            let path = run.begin_round(round).unwrap();
            write_atomically(&path.join("adapter.safetensors"), b"weights").unwrap();
            run.finish_round(round).unwrap();
            assert_eq!(run.finished_rounds().unwrap(), round);
        }
        run.begin_round(10_001).unwrap();
        for stray in ["20000.bak", "+20000", "00020000", "notes"] {
            let path = run.path().join("rounds").join(stray);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("complete"), "").unwrap();
        }
        fs::write(run.path().join("rounds/.DS_Store"), "").unwrap();
        assert_eq!(run.finished_rounds().unwrap(), 10_000);
    }

    #[test]
    fn a_round_that_crashed_begins_empty() {
        let (_root, run) = new_run();
        let path = run.begin_round(1).unwrap();
        assert_eq!(path, run.path().join("rounds/0001"));
        fs::write(path.join("stale"), "update").unwrap();
        assert_eq!(run.begin_round(1).unwrap(), path);
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    }

    #[test]
    fn a_complete_round_is_not_begun_again() {
        let (_root, run) = new_run();
        let path = run.begin_round(1).unwrap();
        fs::write(path.join("adapter"), "weights").unwrap();
        run.finish_round(1).unwrap();
        assert!(matches!(run.begin_round(1), Err(Error::RoundComplete { round: 1, .. })));
        assert!(path.join("adapter").exists());
    }

    #[test]
    fn a_round_that_never_began_cannot_finish() {
        let (_root, run) = new_run();
        assert!(matches!(run.finish_round(1), Err(Error::File { .. })));
    }

    #[test]
    fn metrics_of_a_run_are_read_while_they_are_written() {
        let (_root, run) = new_run();
        let mut log = run.metrics_log().unwrap();
        let row = Row::Finished { rounds: 2, reason: String::from("done"), duration_ms: 1.0, energy_j: None };
        log.append(&row).unwrap();
        assert_eq!(RunDirectory::open(run.path()).unwrap().rows().unwrap(), [row]);
    }

    #[test]
    fn status_is_replaced_as_a_whole() {
        let (_root, run) = new_run();
        for status in [vec!["a longer first status"], vec!["short"]] {
            run.write_status(&status).unwrap();
            let found: Vec<String> = serde_json::from_slice(&fs::read(run.status_path()).unwrap()).unwrap();
            assert_eq!(found, status);
        }
    }

    #[test]
    fn a_failed_write_keeps_the_old_file_and_leaves_no_other() {
        let directory = tempdir().unwrap();
        let path = directory.path().join("status.json");
        write_atomically(&path, b"old").unwrap();
        // A temporary file cannot be made where a directory has its name.
        fs::create_dir(directory.path().join("status.json.tmp")).unwrap();
        let error = write_atomically(&path, b"new").unwrap_err().to_string();
        assert!(error.starts_with(&format!("write {}: ", path.display())), "{error}");
        assert!(error.ends_with("move it away"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");

        let target = directory.path().join("a directory");
        fs::create_dir_all(target.join("full")).unwrap();
        assert!(write_atomically(&target, b"new").is_err());
        assert!(!directory.path().join("a directory.tmp").exists());
    }

    #[test]
    fn a_full_disk_is_named_with_a_way_out() {
        let error = Error::file("write", Path::new("runs/lab/status.json"))(ErrorKind::StorageFull.into()).to_string();
        assert_eq!(error, "write runs/lab/status.json: no storage space; free space on that disk, then start again");
    }
}

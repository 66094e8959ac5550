//! `runs/<name>/`: everything that one run leaves behind.
//!
//! ```text
//! runs/<name>/experiment.toml   the resolved experiment
//!             metrics.jsonl     one row per line, appended
//!             status.json       how things stand now, replaced as a whole; on a full disk, overwritten
//!             rounds/0001/…     what round 1 left; `complete` in it is written last, and lists the SHA-256 of the rest
//!             imatrix/NAME.gguf   a device's importance matrix: channel sums that it sent, or that its owner put here
//!             journal/…         what has happened since, for a coordinator that is started again
//!             reserve           a few pages, so that there is room for `status.json` when the disk is full
//! ```
//!
//! This file owns the names and what survives a crash: a file is either its old or its new self, and a round is complete
//! or does not count. It does not know what is in a round's directory. Start from [`RunDirectory::create`].

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};
use storage::Disk;

use crate::metrics::Rows;
use crate::{Error, Experiment, MetricsLog, Row, hex};

#[derive(Debug, Clone)]
pub struct RunDirectory {
    path: PathBuf,
    experiment: Experiment,
    disk: Disk,
}

impl RunDirectory {
    /// Makes `<root>/<name>/` for a new run, or returns to the one that is there, if the same experiment began it;
    /// [`RunDirectory::finished_rounds`] tells which. Where the experiment is the same but `[device]` or `model.path`
    /// has changed, the new ones are kept.
    pub fn create(root: &Path, experiment: &Experiment) -> Result<Self, Error> {
        Self::create_on(&Disk::default(), root, experiment)
    }

    /// As [`create`](Self::create), on a disk that may fail.
    pub fn create_on(disk: &Disk, root: &Path, experiment: &Experiment) -> Result<Self, Error> {
        let path = root.join(&experiment.name);
        create_directories(disk, &path.join(ROUNDS))?;
        // For whoever puts files there by hand.
        create_directories(disk, &path.join(IMATRIX))?;
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
        replace(disk, &resolved, experiment.resolved_toml().as_bytes())?;
        Ok(Self { path, experiment: experiment.clone(), disk: disk.clone() })
    }

    /// Opens the directory of a run that has begun, to look at it. Nothing is changed.
    pub fn open(path: &Path) -> Result<Self, Error> {
        // A coordinator's home holds an experiment that never ran.
        for lacks in [EXPERIMENT, ROUNDS] {
            if path.join(lacks).try_exists().is_ok_and(|is_there| !is_there) {
                return Err(Error::NotARun { path: path.to_path_buf(), lacks });
            }
        }
        let experiment = Experiment::from_file(&path.join(EXPERIMENT))?;
        Ok(Self { path: path.to_path_buf(), experiment, disk: Disk::default() })
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
        MetricsLog::open_on(&self.disk, &self.metrics_path())
    }

    /// The rows written so far, also while another process writes more. None if nothing was ever written.
    pub fn rows(&self) -> Result<impl Iterator<Item = Result<Row, Error>> + use<>, Error> {
        let rows = match Rows::open(&self.metrics_path()) {
            Err(Error::File { source, .. }) if source.kind() == ErrorKind::NotFound => None,
            rows => Some(rows?),
        };
        Ok(rows.into_iter().flatten())
    }

    pub fn status_path(&self) -> PathBuf {
        self.path.join("status.json")
    }

    /// Replaces `status.json`. Where a full disk has no room for another, the one that is there is overwritten.
    pub fn write_status(&self, status: &impl Serialize) -> Result<(), Error> {
        let path = self.status_path();
        let invalid = |source| Error::file("write", &path)(io::Error::new(ErrorKind::InvalidInput, source));
        match self.write(&path, &serde_json::to_vec_pretty(status).map_err(invalid)?) {
            // Without its blanks it is shorter than the last one, unless much has come to it.
            Err(error) if error.may_pass() => {
                self.overwrite(&path, serde_json::to_vec(status).map_err(invalid)?).map_err(|_| error)
            }
            written => written,
        }
    }

    /// In the pages that the file has, with blanks up to its end.
    fn overwrite(&self, path: &Path, mut json: Vec<u8>) -> io::Result<()> {
        let (mut file, found) = self.disk.open(path)?;
        if json.len() > found.len() {
            return Err(ErrorKind::StorageFull.into());
        }
        json.resize(found.len(), b' ');
        self.disk.write_at(&mut file, path, 0, &json)
    }

    /// As [`write_atomically`], for a file of this run.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        replace(&self.disk, path, bytes)
    }

    /// Where importance matrices lie.
    pub fn imatrix_directory(&self) -> PathBuf {
        self.path.join(IMATRIX)
    }

    /// Of one device.
    pub fn imatrix_path(&self, participant: &str) -> PathBuf {
        self.imatrix_directory().join(format!("{participant}.gguf"))
    }

    /// Writes the importance matrix of a device; one that is there is replaced.
    pub fn write_imatrix(&self, participant: &str, bytes: &[u8]) -> Result<(), Error> {
        create_directories(&self.disk, &self.imatrix_directory())?;
        self.write(&self.imatrix_path(participant), bytes)
    }

    /// Keeps a few pages for bad times. There is no harm where the disk has none left.
    pub fn hold_reserve(&self) {
        let path = self.path.join(RESERVE);
        if fs::metadata(&path).is_ok_and(|found| found.len() == RESERVE_BYTES as u64) {
            return;
        }
        if fs::write(&path, [0; RESERVE_BYTES]).is_err() {
            let _ = fs::remove_file(&path);
        }
    }

    /// Gives them to whatever is written next.
    pub fn release_reserve(&self) {
        // Without a reserve the next write fails as it would have.
        let _ = fs::remove_file(self.path.join(RESERVE));
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
        self.disk.remove_tree(&path).map_err(Error::file("delete", &path))?;
        create_directories(&self.disk, &path)?;
        Ok(path)
    }

    /// Marks a round as complete, by the digests of its files. They are on disk by then if [`write_atomically`] wrote them.
    pub fn finish_round(&self, round: u32) -> Result<(), Error> {
        let path = self.round_path(round);
        let manifest = manifest_of(&path)?;
        self.write(&path.join(COMPLETE), manifest.as_bytes())
    }

    /// Whether a complete round's files are still those that it was finished with.
    pub fn verify_round(&self, round: u32) -> Result<(), Error> {
        let path = self.round_path(round);
        let marker = path.join(COMPLETE);
        let listed = fs::read(&marker).map_err(Error::file("read", &marker))?;
        let found = manifest_of(&path)?;
        if listed == found.as_bytes() {
            return Ok(());
        }
        let listed = String::from_utf8_lossy(&listed).into_owned();
        let differs = found.lines().find(|line| !listed.lines().any(|listed| listed == *line));
        let what = match differs.and_then(|line| line.split_once("  ")) {
            Some((_, file)) => format!("{file} is not what was written"),
            None => "a file of it is missing, or `complete` is damaged".to_owned(),
        };
        Err(Error::Damaged { path, what })
    }

    /// Takes a damaged round out of the way, keeping it to be looked at.
    pub fn set_round_aside(&self, round: u32) -> Result<PathBuf, Error> {
        let path = self.round_path(round);
        let aside = path.with_extension("damaged");
        self.disk.remove_tree(&aside).map_err(Error::file("delete", &aside))?;
        self.disk.rename(&path, &aside).map_err(Error::file("move away", &path))?;
        self.disk.sync_directory(&aside).map_err(unsynced(&aside))?;
        Ok(aside)
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
const IMATRIX: &str = "imatrix";
const RESERVE: &str = "reserve";
const RESERVE_BYTES: usize = 16 << 10;

/// A line for each file below `round`, but for the marker: its SHA-256, two spaces, its path. As `sha256sum` prints it.
fn manifest_of(round: &Path) -> Result<String, Error> {
    let mut files = Vec::new();
    let mut directories = vec![round.to_owned()];
    while let Some(directory) = directories.pop() {
        let list = || Error::file("list", &directory);
        for entry in fs::read_dir(&directory).map_err(list())? {
            let path = entry.map_err(list())?.path();
            match path.is_dir() {
                true => directories.push(path),
                false => files.push(path),
            }
        }
    }
    files.sort();
    let mut manifest = String::new();
    for path in files.iter().filter(|path| **path != round.join(COMPLETE)) {
        let bytes = fs::read(path).map_err(Error::file("read", path))?;
        let name = path.strip_prefix(round).unwrap_or(path).display();
        manifest += &format!("{}  {name}\n", hex(&Sha256::digest(&bytes)));
    }
    Ok(manifest)
}

fn unsynced(path: &Path) -> impl Fn(io::Error) -> Error {
    |source| Error::Unsynced { path: path.to_owned(), source }
}

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
/// The bytes go to a temporary file beside it, which is then renamed. A path has one writer at a time. A link is followed;
/// a device or a pipe is not replaced.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let target = storage::replaceable(path).map_err(Error::file("write", path))?;
    replace(&Disk::default(), &target, bytes)
}

fn replace(disk: &Disk, path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let fail = || Error::file("write", path);
    let Some(name) = path.file_name() else {
        return Err(fail()(io::Error::new(
            ErrorKind::IsADirectory,
            "the path does not end with a file's name; add one",
        )));
    };
    let mut temporary_name = name.to_os_string();
    temporary_name.push(".tmp");
    let temporary = path.with_file_name(temporary_name);

    let write = || -> Result<(), Error> {
        let mut file = disk.create(&temporary).map_err(fail())?;
        disk.write_at(&mut file, &temporary, 0, bytes).map_err(fail())?;
        // Without this, some file systems make the rename durable before the bytes.
        disk.sync(&file, &temporary).map_err(unsynced(path))?;
        disk.rename(&temporary, path).map_err(fail())
    };
    if let Err(error) = write() {
        // The temporary file may take the last of a full disk; that it cannot be deleted is not worth another error.
        let _ = disk.remove(&temporary);
        return Err(error);
    }
    disk.sync_directory(path).map_err(unsynced(path))
}

fn create_directories(disk: &Disk, path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).and_then(|()| disk.sync_directory(path)).map_err(Error::file("make the directory", path))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use storage::{Fault, Operation};
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
        assert_eq!(run.rows().unwrap().count(), 0);
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
        let check_lacks = |lacks: &str| {
            let error = RunDirectory::open(root.path()).unwrap_err().to_string();
            let expected = format!("look at a run in {}: it has no {lacks}, ", root.path().display());
            assert!(error.starts_with(&expected), "{error}");
        };
        check_lacks("experiment.toml");
        // As a coordinator's home is.
        fs::write(root.path().join("experiment.toml"), SMOKE).unwrap();
        check_lacks("rounds");
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
    fn a_finished_round_is_verified_and_a_damaged_one_set_aside() {
        let (_root, run) = new_run();
        let path = run.begin_round(1).unwrap();
        let files = ["adapter/weights", "state"].map(|name| path.join(name));
        fs::create_dir(path.join("adapter")).unwrap();
        for file in &files {
            fs::write(file, "numbers").unwrap();
        }
        run.finish_round(1).unwrap();
        run.verify_round(1).unwrap();
        let check_damaged = |path: &Path, bytes: Option<&[u8]>, expected: &str| {
            let before = fs::read(path).unwrap();
            bytes.map_or_else(|| fs::remove_file(path), |bytes| fs::write(path, bytes)).unwrap();
            let error = run.verify_round(1).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            fs::write(path, before).unwrap();
        };
        check_damaged(&files[0], Some(b"numberz"), "adapter/weights is not what was written");
        check_damaged(&files[0], None, "a file of it is missing");
        check_damaged(&path.join("complete"), Some(b""), "adapter/weights is not what was written");
        check_damaged(&path.join("complete"), None, "read ");
        run.verify_round(1).unwrap();
        let aside = run.set_round_aside(1).unwrap();
        assert!(aside.ends_with("rounds/0001.damaged") && aside.join("state").exists());
        assert_eq!(run.finished_rounds().unwrap(), 0);
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
        let rows = RunDirectory::open(run.path()).unwrap().rows().unwrap();
        assert_eq!(rows.collect::<Result<Vec<_>, _>>().unwrap(), [row]);
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
    fn a_full_disk_shows_its_status_in_the_pages_of_the_last() {
        const ENOSPC: i32 = 28;
        let root = tempdir().unwrap();
        let full = Arc::new(AtomicBool::new(false));
        let is_full = full.clone();
        let disk = Disk::with_faults(Arc::new(move |operation, path: &Path| {
            let makes = operation == Operation::Create && path.ends_with("status.json.tmp");
            if makes && is_full.load(Ordering::Relaxed) { Fault::Fails { errno: ENOSPC } } else { Fault::None }
        }));
        let run = RunDirectory::create_on(&disk, root.path(), &smoke()).unwrap();
        let shown = || serde_json::from_slice::<Vec<String>>(&fs::read(run.status_path()).unwrap()).unwrap();
        run.write_status(&["training"]).unwrap();
        full.store(true, Ordering::Relaxed);
        run.write_status(&["degraded"]).unwrap();
        assert_eq!(shown(), ["degraded"]);
        let longer = run.write_status(&["much longer than what the last one said"]).unwrap_err();
        assert!(longer.may_pass(), "{longer}");
        assert_eq!(shown(), ["degraded"]);
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

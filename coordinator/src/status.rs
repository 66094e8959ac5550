//! Where a run stands: `status.json`, which the run loop replaces as it goes and anybody may read meanwhile.
//!
//! This file owns the status, how it is read back, and how it is shown. It never reads the clock: a status is stamped
//! by who writes it, and its age is computed from a time that is passed in. Start from [`Status`].

use std::fmt::Write;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use experiment::RunDirectory;
use serde::{Deserialize, Serialize};

use crate::report::units::{duration, loss, printable};

/// What the run loop last did. It is written atomically, so that a reader finds the old one or the new one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// In a word or two: `waiting for the cohort`, `training`, `aggregating`, `finished`, …
    pub state: String,
    /// The round that is running, or the last one; 0 before the first.
    pub round: u32,
    pub rounds: u32,
    /// Optimizer steps that the slowest member of the round has done, of `steps`.
    pub step: u64,
    pub steps: u64,
    pub participants: Vec<ParticipantStatus>,
    /// Connections that are served, whoever they are of.
    #[serde(default)]
    pub connections: usize,
    /// Tasks of the program that have not ended.
    #[serde(default)]
    pub tasks: usize,
    pub updated_unix_ms: u64,
}

/// A participant that the run knows, connected or not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParticipantStatus {
    pub name: String,
    /// In a word or two: `connected`, `training`, `departed`, …
    pub state: String,
    pub round: u32,
    pub step: u64,
    /// Of its last step. A loss that is not finite is written as `null`, as is one that is not known yet.
    #[serde(default)]
    pub loss_nats: Option<f64>,
}

impl Status {
    pub fn write(&self, run: &RunDirectory) -> Result<(), experiment::Error> {
        run.write_status(self)
    }

    /// None where the run has not written one yet.
    pub fn read(path: &Path) -> Result<Option<Self>, StatusError> {
        let json = match fs::read(path) {
            Ok(json) => json,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StatusError::Unreadable { path: path.into(), source }),
        };
        serde_json::from_slice(&json).map(Some).map_err(|source| StatusError::Foreign { path: path.into(), source })
    }
}

/// What is known about a run from its directory alone, while it runs and afterwards.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Standing {
    pub experiment: String,
    pub cohort: u32,
    pub quorum: u32,
    pub rounds: u32,
    /// Rounds whose aggregate is on disk.
    pub rounds_finished: u32,
    pub status: Option<Status>,
}

pub fn status(run: &Path) -> Result<Standing, StatusError> {
    let run = RunDirectory::open(run)?;
    let federation = &run.experiment().federation;
    Ok(Standing {
        experiment: run.experiment().name.clone(),
        cohort: federation.cohort,
        quorum: federation.quorum,
        rounds: federation.rounds,
        rounds_finished: run.finished_rounds()?,
        status: Status::read(&run.status_path())?,
    })
}

impl Standing {
    /// For a terminal, at the time `now_unix_ms`.
    pub fn to_text(&self, now_unix_ms: u64) -> String {
        let Self { experiment, cohort, quorum, rounds, rounds_finished, status } = self;
        let mut text = String::new();
        // Writing into a string cannot fail; neither here nor below.
        let _ = writeln!(text, "{}: {rounds_finished} of {rounds} rounds finished", printable(experiment));
        let _ = writeln!(text, "cohort of {cohort}, quorum of {quorum}");
        let Some(status) = status else {
            text.push_str(match rounds_finished {
                0 => "no status yet: the run has not started\n",
                _ => "its status.json is gone: `coordinator run` goes on and writes it anew\n",
            });
            return text;
        };
        let _ = writeln!(
            text,
            "{} (round {} of {}, step {} of {})",
            printable(&status.state),
            status.round,
            status.rounds,
            status.step,
            status.steps
        );
        let age_ms = now_unix_ms.saturating_sub(status.updated_unix_ms);
        let _ = writeln!(text, "updated {} ago", duration(age_ms as f64));
        let mut table = crate::report::table::new(&["participant", "state", "round", "step", "loss (nats/token)"]);
        for participant in &status.participants {
            let loss = participant.loss_nats.map_or(String::from("-"), loss);
            let [round, step] = [participant.round.to_string(), participant.step.to_string()];
            table.add_row([printable(&participant.name), printable(&participant.state), round, step, loss]);
        }
        if !status.participants.is_empty() {
            let _ = writeln!(text, "\n{table}");
        }
        text
    }
}

/// Why a run's status could not be told.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    #[error(transparent)]
    Run(#[from] experiment::Error),
    #[error("read the status {}: {source}; check who may read it", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("parse the status {}: {source}; it is damaged, or another version has written it: use that one, or let \
        `coordinator run` replace it", path.display())]
    Foreign { path: PathBuf, source: serde_json::Error },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn training() -> Status {
        let participant = |name: &str, loss_nats| ParticipantStatus {
            name: name.to_owned(),
            state: String::from("training"),
            round: 2,
            step: 7,
            loss_nats,
        };
        Status {
            state: String::from("training"),
            round: 2,
            rounds: 5,
            step: 7,
            steps: 20,
            participants: vec![participant("clinic-a", Some(2.5)), participant("clinic\u{1b}[2J-b", None)],
            connections: 2,
            tasks: 9,
            updated_unix_ms: 1_000,
        }
    }

    #[test]
    fn status_is_read_back_as_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("status.json");
        assert_eq!(Status::read(&path).unwrap(), None);
        fs::write(&path, serde_json::to_vec(&training()).unwrap()).unwrap();
        assert_eq!(Status::read(&path).unwrap(), Some(training()));
    }

    #[test]
    fn a_loss_that_diverged_is_read_back_as_unknown() {
        let mut status = training();
        status.participants[0].loss_nats = Some(f64::NAN);
        let json = serde_json::to_string(&status).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&json).unwrap().participants[0].loss_nats, None);
    }

    #[test]
    fn torn_and_foreign_statuses_are_errors_and_not_panics() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("status.json");
        let json = serde_json::to_string(&training()).unwrap();
        for bytes in ["", &json[..json.len() / 2], "[]", &json.replace("\"step\"", "\"stop\"")] {
            fs::write(&path, bytes).unwrap();
            assert!(matches!(Status::read(&path), Err(StatusError::Foreign { .. })), "{bytes}");
        }
    }

    #[test]
    fn text_says_where_the_run_stands_and_obeys_no_control_character() {
        let standing = Standing {
            experiment: String::from("lab"),
            cohort: 2,
            quorum: 1,
            rounds: 5,
            rounds_finished: 1,
            status: Some(training()),
        };
        let text = standing.to_text(4_000);
        for expected in
            ["1 of 5 rounds finished", "round 2 of 5, step 7 of 20", "updated 3.00 s ago", "clinic-a", "2.5000"]
        {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        assert!(!text.contains('\u{1b}'));
        let begun = Standing { status: None, ..standing };
        assert!(begun.to_text(0).contains("status.json is gone"));
        assert!(Standing { rounds_finished: 0, ..begun }.to_text(0).contains("has not started"));
    }
}

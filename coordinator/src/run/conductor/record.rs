//! What the conductor writes into the run directory as it goes: rows, and the status.

use std::time::Duration;

use experiment::Row;
use tokio::time::Instant;

use super::super::{RunError, ledger};
use super::Conductor;
use crate::journal::Health;
use crate::round::ParticipantName;
use crate::status::{ParticipantStatus, Status};

const STATUS_EVERY: Duration = Duration::from_secs(1);

const STORAGE_DEGRADED: &str = "storage degraded";

/// Rows that wait for a full disk at most.
const UNWRITTEN_ROWS_MAX: usize = 65_536;

impl Conductor {
    pub(super) fn record(&mut self, row: &Row) -> Result<(), RunError> {
        self.watcher.row(row);
        self.unwritten.push_back(row.clone());
        self.write_rows()
    }

    /// Writes the rows that wait. Where the disk is full they wait on.
    pub(super) fn write_rows(&mut self) -> Result<(), RunError> {
        while let Some(row) = self.unwritten.front() {
            match self.metrics.append(row) {
                Ok(()) => drop(self.unwritten.pop_front()),
                Err(error) if error.may_pass() && self.unwritten.len() < UNWRITTEN_ROWS_MAX => {
                    self.trouble = Some(error.to_string());
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.trouble = None;
        Ok(())
    }

    /// Says, once, that nothing can be written, or that it can again.
    pub(super) fn note_storage(&mut self) -> Result<(), RunError> {
        let trouble = match &*self.health.borrow_and_update() {
            Health::Failed(reason) => return Err(RunError::JournalFailed(reason.clone())),
            Health::Degraded(reason) => Some(format!("failed to {reason}")),
            Health::Good => self.trouble.as_ref().map(|reason| format!("failed to {reason}")),
        };
        match trouble {
            Some(reason) if !self.degraded => {
                self.degraded = true;
                self.directory.release_reserve();
                self.watcher.note(&format!("storage degraded: {reason}; nothing is lost, the run waits for the disk"));
                self.write_status(true)
            }
            None if self.degraded => {
                self.degraded = false;
                self.directory.hold_reserve();
                self.watcher.note("the storage is good again; the run goes on");
                self.write_status(true)
            }
            _ => Ok(()),
        }
    }

    pub(super) fn record_bytes(&mut self, participant: &ParticipantName) -> Result<(), RunError> {
        let Some(connected) = self.connections.get(participant) else { return Ok(()) };
        let row = ledger::bytes_row(self.finished, participant, &connected.connection);
        self.record(&row)
    }

    pub(super) fn set_state(&mut self, participant: &ParticipantName, state: &str) {
        let status = self.participants.entry(participant.clone()).or_insert_with(|| ParticipantStatus {
            name: participant.to_string(),
            state: String::new(),
            round: 0,
            step: 0,
            loss_nats: None,
        });
        status.state = state.into();
        self.status_is_stale = true;
    }

    /// When a status that was left unwritten is due.
    pub(super) fn status_due(&self) -> Option<Instant> {
        self.status_is_stale.then(|| self.status_written.map_or_else(Instant::now, |written| written + STATUS_EVERY))
    }

    /// At most once a second, unless something has changed that a reader waits for.
    pub(super) fn write_status(&mut self, now: bool) -> Result<(), RunError> {
        if !now && self.status_written.is_some_and(|written| written.elapsed() < STATUS_EVERY) {
            self.status_is_stale = true;
            return Ok(());
        }
        (self.status_written, self.status_is_stale) = (Some(Instant::now()), false);
        let federation = &self.shared.experiment.federation;
        let slowest = self.open.as_ref().map_or(0, |open| {
            let steps = open.cohort.iter().filter_map(|name| self.participants.get(name));
            let done =
                steps.map(|status| if status.round == open.key.round { status.step + 1 - open.first_step } else { 0 });
            done.min().unwrap_or(0)
        });
        let status = Status {
            state: if self.degraded { STORAGE_DEGRADED.into() } else { self.state.clone() },
            round: self.rounds.round().min(federation.rounds),
            rounds: federation.rounds,
            step: slowest,
            steps: federation.local_steps,
            participants: self.participants.values().cloned().collect(),
            connections: self.served,
            tasks: tokio::runtime::Handle::current().metrics().num_alive_tasks(),
            updated_unix_ms: self.shared.journal.unix_ms(),
        };
        match status.write(&self.directory) {
            // What cannot be shown is no reason to stop; it is tried again.
            Err(error) if error.may_pass() => {
                if !self.status_missed {
                    tracing::warn!(%error, "the status cannot be written");
                }
                (self.status_is_stale, self.status_missed) = (true, true);
                Ok(())
            }
            written => {
                self.status_missed = false;
                Ok(written?)
            }
        }
    }
}

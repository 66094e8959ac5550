//! How a round, and the run, end: aggregation, the finished round's files, and what everybody is told.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use experiment::Row;
use model::Adapter;
use tokio::task::JoinSet;
use wire::{FromCoordinator, Outcome, RefusalReason};

use super::super::{COMPLETED, Ended, RunError};
use super::recovery::rough;
use super::{Conductor, STORAGE_RETRY, milliseconds};
use crate::aggregate::{AggregateError, Member};
use crate::body::Closed;
use crate::checkpoint::{Checkpoint, save_row};
use crate::report::units::counted;
use crate::round::{Contribution, FinishReason, ParticipantName};

impl Conductor {
    pub(super) async fn aggregate(&mut self, round: u32, contributions: Vec<Contribution>) -> Result<(), RunError> {
        self.state = "aggregating".into();
        let Some(mut open) = self.open.take() else { return Ok(()) };
        let closed = match &self.shared.body {
            Some(body) => body.close().await.ok_or(RunError::BodyFailed(self.finished))?,
            None => Closed { shared: None, own: BTreeMap::new(), computing: Duration::ZERO, idle: Duration::ZERO },
        };
        let Closed { shared: shared_body, mut own, computing, idle } = closed;
        let (mut names, mut members, mut nats, mut tokens) = (Vec::new(), Vec::new(), 0.0, 0);
        for contribution in &contributions {
            let Some(update) = open.updates.remove(&contribution.participant) else { continue };
            nats += update.loss_nats * contribution.tokens as f64;
            tokens += contribution.tokens;
            let adapter = match own.remove(&contribution.participant) {
                Some(body) => Adapter::join([update.adapter, body])?,
                None => update.adapter,
            };
            names.push(&contribution.participant);
            members.push(Member { weight: contribution.tokens as f64, adapter });
        }
        let aggregated = offload::in_place(|| self.aggregator.aggregate(&self.adapter, &members, shared_body));
        let aggregated = aggregated.map_err(|error| match (error, with_largest_value(&names, &members)) {
            (source @ AggregateError::TooLarge, Some(participant)) => {
                let journal = crate::journal::directory(self.directory.path());
                RunError::TooLarge { source: Box::new(source), participant, journal }
            }
            (error, _) => error.into(),
        })?;
        self.adapter = Arc::new(aggregated.adapter);

        // Before the round is kept, so that the two are finished together.
        let row = Row::Round {
            round,
            members: contributions.iter().map(|contribution| contribution.participant.to_string()).collect(),
            loss_nats: nats / tokens as f64,
            tokens,
            duration_ms: milliseconds(open.begun.elapsed()),
            aggregation_error: Some(aggregated.error),
            body_compute_ms: milliseconds(computing),
            body_idle_ms: milliseconds(idle),
            energy_j: None,
        };
        let recorded = self.remade.take().filter(|recorded| is_same_round(recorded, &row));
        self.keep_until_written(round, recorded.as_ref().unwrap_or(&row)).await?;
        self.finished = round;
        self.trained.retain(|(of, ..)| *of > round);
        match recorded {
            // What it has cost was counted when it was trained.
            Some(_) => {
                let updates = counted(contributions.len() as u64, "update");
                self.watcher.note(&format!("round {round} is made again of its {updates}, as it is on record"));
            }
            None => self.record(&row)?,
        }
        for participant in self.connections.keys().cloned().collect::<Vec<_>>() {
            self.record_bytes(&participant)?;
        }
        for participant in open.cohort {
            let counted = contributions.iter().any(|contribution| contribution.participant == participant);
            let outcome = match counted {
                true => Outcome::Aggregated,
                false => {
                    let text = "the round was closed without its update".to_owned();
                    Outcome::Refused { reason: RefusalReason::Late, text }
                }
            };
            self.set_state(&participant, "connected");
            self.send(&participant, FromCoordinator::RoundClosed { round, outcome }).await;
        }
        self.write_status(true)
    }

    /// Keeps the round, as soon as the disk takes it.
    async fn keep_until_written(&mut self, round: u32, row: &Row) -> Result<(), RunError> {
        loop {
            match self.keep(round, row).await {
                // Nothing is lost where the run is stopped: the journal has what the round is made of.
                Err(error) if error.may_pass() => self.wait_for_disk(error).await?,
                kept => {
                    kept?;
                    self.trouble = None;
                    return self.note_storage();
                }
            }
        }
    }

    /// Says that the disk has not taken something, and waits before it is tried again; gives the error back where the run is
    /// to stop first.
    pub(super) async fn wait_for_disk(&mut self, error: RunError) -> Result<(), RunError> {
        let mut stop = self.stop.clone();
        self.trouble = Some(error.to_string());
        self.note_storage()?;
        tokio::select! {
            biased;
            () = tokio::time::sleep(STORAGE_RETRY) => Ok(()),
            Ok(_) = stop.wait_for(|stop| *stop) => Err(error),
        }
    }

    /// Writes the finished round, its row included; its marker comes last.
    async fn keep(&mut self, round: u32, row: &Row) -> Result<(), RunError> {
        let optimizers = match &self.shared.body {
            Some(body) => body.optimizers().await,
            None => Vec::new(),
        };
        let state = self.aggregator.strategy().state();
        let strategy = state.into_iter().map(|(name, vector)| (name.to_owned(), vector.to_vec())).collect();
        let checkpoint = Checkpoint { adapter: Adapter::clone(&self.adapter), optimizers, strategy };
        let base = self.shared.source.origin().display().to_string();
        let directory = self.directory.begin_round(round)?;
        offload::in_place(|| -> Result<(), RunError> {
            checkpoint.save(&self.directory, &directory, &base)?;
            save_row(&self.directory, round, row)?;
            Ok(self.directory.finish_round(round)?)
        })
    }

    pub(super) async fn end(mut self, reason: FinishReason, mut peers: JoinSet<()>) -> Result<Ended, RunError> {
        let (rounds, of) = (self.finished, self.shared.experiment.federation.rounds);
        self.note_measured();
        let text = match reason {
            FinishReason::Completed => COMPLETED.to_owned(),
            FinishReason::Stopped => format!("stopped after round {rounds} of {of}"),
            FinishReason::Failed { round, attempts } => format!("round {round} was abandoned {attempts} times"),
        };
        for participant in self.connections.keys().cloned().collect::<Vec<_>>() {
            self.record_bytes(&participant)?;
            self.set_state(&participant, "dismissed");
            self.send(&participant, FromCoordinator::Finish { reason: text.clone() }).await;
        }
        let duration_ms = milliseconds(self.begun.elapsed());
        self.record(&Row::Finished { rounds, reason: text.clone(), duration_ms, energy_j: None })?;
        self.state = if reason == FinishReason::Completed { "finished".into() } else { text.clone() };
        self.write_status(true)?;
        // Everybody is told; whoever does not answer is not waited for.
        let told = async { while peers.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(Duration::from_secs(10), told).await;
        // What could not be written before, for want of room.
        if !self.unwritten.is_empty() {
            self.directory.release_reserve();
            self.write_rows()?;
        }
        let directory = self.directory.path().to_owned();
        match reason {
            FinishReason::Failed { round, attempts } => Err(RunError::Abandoned { round, attempts }),
            _ if !self.unwritten.is_empty() => {
                Err(RunError::RowsLost { rows: self.unwritten.len(), path: self.directory.metrics_path() })
            }
            reason => Ok(Ended { directory, rounds, of, stopped: reason == FinishReason::Stopped }),
        }
    }
}

/// Whether a round that was made again is the one whose row is on record.
fn is_same_round(recorded: &Row, made: &Row) -> bool {
    let figures = |row: &Row| match row {
        Row::Round { round, members, loss_nats, tokens, .. } => {
            Some((*round, members.clone(), rough(*loss_nats), *tokens))
        }
        _ => None,
    };
    figures(recorded) == figures(made)
}

/// Whose update has the largest value.
fn with_largest_value(names: &[&ParticipantName], members: &[Member]) -> Option<ParticipantName> {
    let largest = |member: &Member| member.adapter.flat().iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let all = names.iter().zip(members).map(|(name, member)| (*name, largest(member)));
    all.max_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(name, _)| name.clone())
}

//! How what was interrupted goes on: behind a restart the metrics and a run's open round, and a member that is back.

use std::collections::{BTreeMap, BTreeSet};

use experiment::Row;
use tokio::time::Instant;
use wire::FromCoordinator;

use super::super::RunError;
use super::{Conductor, OpenRound, ToParticipant, Update};
use crate::body::{RoundKey, Standing};
use crate::checkpoint::load_row;
use crate::journal::{self, OpenAttempt};
use crate::round::ParticipantName;

/// The first minor version that can go on within a round.
const RESUMING_MINOR: u16 = 1;

/// Round, attempt, participant, step, trained tokens, and the loss, [`rough`]ly.
pub(super) type TrainedStep = (u32, u32, String, u64, u64, u32);

/// Of a loss what is the same when it is read from its row: that may be the neighbour of what was written, and is NaN where
/// it was not finite.
pub(super) fn rough(loss_nats: f64) -> u32 {
    if loss_nats.is_finite() { (loss_nats as f32).to_bits() } else { f32::NAN.to_bits() }
}

impl Conductor {
    /// Remembers what is on record already: of evaluations those that may still come, of steps and updates those of rounds
    /// that are not over. These may be more than the one that is open: behind a damaged round the next one is begun anew,
    /// too. Rows of finished rounds that are not on record are taken from the rounds' directories.
    pub(in crate::run) fn remember(&mut self, open_attempt: u32) -> Result<(), RunError> {
        let open = (self.finished + 1, open_attempt);
        let mut missing: BTreeSet<u32> = (1..=self.finished).collect();
        for row in self.directory.rows()? {
            let row = row?;
            if matches!(row, Row::Round { round, .. } if round == self.finished + 1) {
                self.remade = Some(row);
                continue;
            }
            match row {
                Row::Evaluation { round, participant, .. } if round >= self.finished => {
                    self.evaluated.insert((round, participant));
                }
                Row::Step { round, attempt, step, participant, loss_nats, tokens, .. } if round > self.finished => {
                    if (round, attempt) == open {
                        let next = self.reported.entry(ParticipantName::new(&participant)).or_insert(0);
                        *next = (*next).max(step + 1);
                    }
                    self.trained.insert((round, attempt, participant, step, tokens, rough(loss_nats)));
                }
                Row::Update { round, attempt, participant, accepted: true, .. } if round > self.finished => {
                    self.delivered.insert((round, attempt, participant));
                }
                Row::Round { round, .. } => {
                    missing.remove(&round);
                }
                _ => {}
            }
        }
        // The watcher is not told again: it may have seen a row that was lost on its way to the disk.
        for round in missing {
            let lost = match load_row(&self.directory, round) {
                Ok(Some(row)) => {
                    self.unwritten.push_back(row);
                    continue;
                }
                Ok(None) => "there is none in its directory".to_owned(),
                // It is looked for again at the next start.
                Err(error) => format!("failed to {error}"),
            };
            self.watcher.note(&format!("the row of round {round} is missing in the metrics: {lost}"));
        }
        self.write_rows()
    }

    /// Takes up a round that was open when the coordinator ended.
    pub(in crate::run) async fn recover(&mut self, recovered: OpenAttempt) -> Result<(), RunError> {
        let OpenAttempt { interrupted, first_step, work, updates } = recovered;
        let key = RoundKey { round: interrupted.round, attempt: interrupted.attempt };
        let cohort: Vec<ParticipantName> = interrupted.members.keys().cloned().collect();
        self.publish(key, cohort.clone(), first_step).await;
        let steps_done = self.reported.values().map(|next| next.saturating_sub(first_step)).sum();
        if let Some(body) = &self.shared.body {
            body.replay(work).await;
        }
        let like = self.shared.trained_share(&self.adapter);
        let mut accepted = BTreeMap::new();
        for (participant, update) in updates {
            let journal::Update { tokens, loss_nats, tensors } = update;
            self.set_state(&participant, "delivered");
            accepted.insert(participant, Update { adapter: like.with_tensors(tensors)?, tokens, loss_nats });
        }
        let round = key.round;
        let delivered = accepted.len();
        self.watcher.note(&format!("round {round} goes on; {delivered} of {} members have delivered", cohort.len()));
        self.open = Some(OpenRound { key, begun: Instant::now(), cohort, first_step, updates: accepted, steps_done });
        self.state = "training".into();
        self.write_status(true)
    }

    /// Lets a member that is back go on; false where it cannot.
    pub(super) async fn resume(
        &mut self,
        participant: &ParticipantName,
        RoundKey { round, attempt }: RoundKey,
        first_step: u64,
        evaluate: bool,
    ) -> Result<bool, RunError> {
        let Some(connected) = self.connections.get(participant) else { return Ok(true) };
        if connected.minor < RESUMING_MINOR {
            return Ok(false);
        }
        let standing = match &self.shared.body {
            Some(body) => body.resume(participant.clone(), connected.session).await,
            None => Some(Standing { step: first_step, tokens: BTreeMap::new() }),
        };
        let Some(Standing { step, tokens: committed }) = standing else { return Ok(false) };
        let local_steps = self.shared.experiment.federation.local_steps;
        let evaluate = evaluate && !self.evaluated.contains(&(round - 1, participant.to_string()));
        let reported = self.reported.get(participant).copied().unwrap_or(0).max(first_step);
        let message =
            FromCoordinator::ResumeRound { round, attempt, first_step, local_steps, evaluate, step, reported };
        self.set_state(participant, "training");
        self.watcher.note(&format!("{participant} goes on with round {round} at step {}", step - first_step));
        self.send_all(participant, ToParticipant { message, committed });
        Ok(true)
    }
}

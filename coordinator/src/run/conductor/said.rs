//! What participants say on the control stream: steps and evaluations go on record, each once.

use experiment::Row;
use wire::FromParticipant;

use super::super::RunError;
use super::Conductor;
use super::recovery::rough;
use crate::body::RoundKey;
use crate::round::{Event, ParticipantName};

impl Conductor {
    /// `of` is the attempt whose step is reported: one that was abandoned may be heard of behind the next one's start.
    pub(super) fn said(
        &mut self,
        participant: ParticipantName,
        message: FromParticipant,
        of: Option<RoundKey>,
    ) -> Result<Option<Event>, RunError> {
        match message {
            FromParticipant::StepFinished { round, step, loss_nats, tokens, compute_ms, wait_ms } => {
                let is_open = self.open.as_ref().is_some_and(|open| Some(open.key) == of);
                let next = self.reported.entry(participant.clone()).or_insert(0);
                // A step that was repeated is on record already.
                if is_open && step < *next {
                    return Ok(None);
                }
                if is_open {
                    *next = step + 1;
                }
                let (name, attempt) = (participant.to_string(), of.map_or(1, |key| key.attempt));
                // The same step may have been trained, and recorded, before a damaged round was set aside.
                if !self.trained.remove(&(round, attempt, name.clone(), step, tokens, rough(loss_nats))) {
                    self.record(&Row::Step {
                        round,
                        attempt,
                        step,
                        participant: name,
                        loss_nats,
                        tokens,
                        compute_ms,
                        wait_ms,
                        energy_j: None,
                    })?;
                }
                if let Some(status) = self.participants.get_mut(&participant) {
                    (status.round, status.step, status.loss_nats) = (round, step, Some(loss_nats));
                }
                if let Some(open) = self.open.as_mut().filter(|_| is_open) {
                    open.steps_done += 1;
                    let all = open.cohort.len() as u64 * self.shared.experiment.federation.local_steps;
                    self.watcher.step(open.steps_done, all, loss_nats);
                }
                self.write_status(false)?;
                Ok(is_open.then_some(Event::StepFinished { participant, round, step }))
            }
            FromParticipant::Evaluated { round, loss_nats, tokens } => {
                let is_new = self.evaluated.insert((round, participant.to_string()));
                if tokens > 0 && is_new {
                    let name = participant.to_string();
                    self.record(&Row::Evaluation { round, participant: name, loss_nats, tokens, energy_j: None })?;
                }
                Ok(Some(Event::Evaluated { participant, round }))
            }
            FromParticipant::CannotResume { round, attempt } => {
                self.watcher.note(&format!("{participant} has not kept what it needs to go on with round {round}"));
                Ok(Some(Event::CannotResume { participant, round, attempt }))
            }
            FromParticipant::CannotMeasure { reason, .. } => Ok(self.cannot_measure(participant, &reason)),
            FromParticipant::Hello { .. } | FromParticipant::Ready { .. } | FromParticipant::Leaving { .. } => Ok(None),
        }
    }
}

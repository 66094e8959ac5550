//! How a member goes on after it has lost its connection, and a round after its coordinator was started again.

use std::collections::BTreeMap;

use model::stage::Lora;
use model::{Gradients, Stage};
use planted::Bug;
use sha2::{Digest, Sha256};

use super::{BodyError, Member, OpenRound, Place, Worker};
use crate::journal::Work;
use crate::round::ParticipantName;

/// Where a member stands within its round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The step that it has to commit next; the one after the round's last when it has committed all.
    pub step: u64,
    /// Trained tokens of the steps it has committed.
    pub tokens: BTreeMap<u64, u64>,
}

/// A step that was committed, and that its member goes through once more because it may not have had the answer.
pub(super) struct Again {
    pub(super) step: u64,
    pub(super) micros_done: u32,
    pub(super) sum: Option<Gradients>,
    pub(super) owes_commit: bool,
    /// The adapter that the step was computed with, where that is not the body's present one.
    lora: Option<Lora>,
    prepared: bool,
}

impl Worker {
    /// Commits and removals have the effect that they had: they are plain arithmetic on the same numbers.
    pub(super) fn replay(&mut self, work: Vec<Work>) {
        for work in work {
            match work {
                Work::Committed { participant, step, tokens, gradients } => {
                    let gradients = (!gradients.is_empty()).then(|| Gradients::new(gradients));
                    if let Err(error) = self.settle(&participant, step, tokens, gradients) {
                        tracing::error!(%participant, step, %error, "a commit in the journal does not fit its round");
                    }
                }
                Work::Removed { participant } => self.remove(&participant),
                Work::Restored { state, tensors } => {
                    if let Err(error) = self.restore(state, tensors) {
                        tracing::error!(%error, "the body's snapshot in the journal does not fit its round");
                    }
                }
            }
        }
    }

    pub(super) fn resume(&mut self, participant: &ParticipantName, session: u64) -> Option<Standing> {
        let round = self.round.as_mut()?;
        let first_step = round.first_step;
        let member = round.members.get_mut(participant)?;
        member.session = session;
        if !planted::is(Bug::KeepsHalfSteps) {
            (member.micros_done, member.sum, member.owes_commit) = (0, None, false);
        }
        // The round's first step has none before it.
        member.again = (member.step > first_step).then(|| Again {
            step: member.step - 1,
            micros_done: 0,
            sum: None,
            owes_commit: false,
            lora: None,
            prepared: false,
        });
        let standing = Standing { step: member.step, tokens: member.tokens.clone() };
        round.pending.retain(|(name, ..), _| name != participant);
        round.waiting.retain(|job| job.place.participant != *participant);
        Some(standing)
    }
}

impl OpenRound {
    /// Who is no member any more has nothing to be stale.
    pub(super) fn check_session(&self, place: &Place) -> Result<(), BodyError> {
        self.members.get(&place.participant).map_or(Ok(()), |member| member.check_session(place))
    }

    /// Gets the adapter ready that a repeated step was computed with. Whoever has gone on repeats nothing any more.
    pub(super) fn prepare_again(&mut self, place: &Place, stage: &Stage) -> Result<(), BodyError> {
        let Some(member) = self.members.get_mut(&place.participant) else { return Ok(()) };
        if member.again.as_ref().is_some_and(|again| again.step != place.step) {
            member.again = None;
        }
        let Some(again) = member.again.as_mut().filter(|again| !again.prepared) else { return Ok(()) };
        let before = match &self.shared {
            // The barrier has not opened behind it yet, but may at any time.
            Some(shared) if shared.barrier.open_step() == again.step => Some(&shared.adapter),
            Some(shared) => shared.before.as_ref(),
            None => member.before.as_ref(),
        };
        let before = before.filter(|_| !planted::is(Bug::RepeatsWithNewAdapter));
        again.lora = before.map(|adapter| stage.attach(adapter)).transpose()?;
        again.prepared = true;
        Ok(())
    }
}

impl Again {
    pub(super) fn lora_for(&self, step: u64) -> Option<&Lora> {
        self.lora.as_ref().filter(|_| self.step == step)
    }
}

impl Member {
    pub(super) fn check_session(&self, place: &Place) -> Result<(), BodyError> {
        if place.session < self.session { Err(BodyError::Stale) } else { Ok(()) }
    }
}

/// Two commits under the same key are the same if this is.
pub(super) fn digest_of(step: u64, tokens: u64, gradients: Option<&Gradients>) -> [u8; 32] {
    let mut digest = Sha256::new();
    digest.update(step.to_le_bytes());
    digest.update(tokens.to_le_bytes());
    for tensor in gradients.map_or(&[][..], Gradients::tensors) {
        digest.update((tensor.len() as u64).to_le_bytes());
        digest.update(bytemuck::cast_slice::<f32, u8>(tensor));
    }
    digest.finalize().into()
}

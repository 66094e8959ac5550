//! How an update is answered, whether it was accepted before or the machine has decided.

use experiment::Row;
use model::Adapter;
use tokio::sync::oneshot;
use wire::{RefusalReason, UpdateReply};

use super::super::RunError;
use super::{Conductor, Update};
use crate::body::RoundKey;
use crate::journal::{Entry, Record};
use crate::round::{ParticipantName, Refusal};

/// An update whose fate the round machine is deciding.
pub(super) struct JudgedUpdate {
    pub(super) participant: ParticipantName,
    pub(super) attempt: u32,
    pub(super) adapter: Option<Adapter>,
    /// Why the content is refused, where it is.
    pub(super) reason: Option<(RefusalReason, String)>,
    pub(super) tokens: u64,
    pub(super) loss_nats: f64,
    pub(super) answer: oneshot::Sender<UpdateReply>,
}

/// Of one participant, before a round is finished: who goes on is answered, and fills neither the disk nor the terminal.
const REFUSALS_RECORDED_MAX: u32 = 16;

impl Conductor {
    /// Whether this very update was accepted before, and its sender may not know.
    pub(super) fn is_accepted(
        &self,
        participant: &ParticipantName,
        key: RoundKey,
        (tokens, loss_nats): (u64, f64),
        adapter: &Adapter,
    ) -> bool {
        let open = self.open.as_ref().filter(|open| open.key == key);
        open.and_then(|open| open.updates.get(participant)).is_some_and(|accepted| {
            let figures = (accepted.tokens, accepted.loss_nats.to_bits());
            figures == (tokens, loss_nats.to_bits()) && accepted.adapter == *adapter
        })
    }

    pub(super) async fn accept(&mut self, judged: JudgedUpdate) -> Result<(), RunError> {
        let JudgedUpdate { participant, adapter, tokens, loss_nats, answer, .. } = judged;
        let (Some(open), Some(adapter)) = (&mut self.open, adapter) else { return Ok(()) };
        let (RoundKey { round, attempt }, name) = (open.key, participant.to_string());
        let tensors = adapter.tensors().iter().map(|tensor| tensor.values.clone()).collect();
        let record = Record::Accepted { participant: name.clone(), tokens, loss_nats_bits: loss_nats.to_bits() };
        open.updates.insert(participant.clone(), Update { adapter, tokens, loss_nats });
        // The participant may be gone; its update counts all the same.
        let answered = move || drop(answer.send(UpdateReply::Accepted));
        self.shared.journal.append(Entry { record, tensors }, answered).await;
        self.set_state(&participant, "delivered");
        // A coordinator that was killed before the update was on disk has recorded it already.
        if self.delivered.remove(&(round, attempt, name.clone())) {
            return Ok(());
        }
        let row =
            Row::Update { round, attempt, participant: name, tokens, accepted: true, reason: None, energy_j: None };
        self.record(&row)
    }

    pub(super) fn refuse(&mut self, judged: JudgedUpdate, round: u32, refusal: Refusal) -> Result<(), RunError> {
        let JudgedUpdate { participant, attempt, reason, tokens, answer, .. } = judged;
        let said = |reason: RefusalReason| (reason, refusal.to_string());
        let (reason, text) = match refusal {
            Refusal::WrongRound { .. } | Refusal::Late | Refusal::Abandoned => said(RefusalReason::Late),
            Refusal::NotInCohort | Refusal::Removed => said(RefusalReason::NotInCohort),
            Refusal::Duplicate => said(RefusalReason::Duplicate),
            Refusal::NoTokens => said(RefusalReason::WrongCount),
            Refusal::Content => reason.unwrap_or_else(|| said(RefusalReason::WrongTensors)),
        };
        let _ = answer.send(UpdateReply::Refused { reason, text: text.clone() });
        let (after, count) = self.refused.entry(participant.clone()).or_default();
        if *after != self.finished {
            (*after, *count) = (self.finished, 0);
        }
        *count = count.saturating_add(1);
        if *count > REFUSALS_RECORDED_MAX {
            return Ok(());
        }
        self.watcher.note(&format!("an update of {participant} for round {round} is refused: {text}"));
        let (participant, reason) = (participant.to_string(), Some(text));
        self.record(&Row::Update { round, attempt, participant, tokens, accepted: false, reason, energy_j: None })
    }
}

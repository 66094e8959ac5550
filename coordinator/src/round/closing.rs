//! What everybody does who is connected behind the last round: the final evaluation, and sums for an importance matrix.

use std::collections::{BTreeMap, BTreeSet};

use experiment::Federation;

use super::{Action, FinishReason, Owed, ParticipantName, Rounds, State, SumsRefusal};

/// The round that measures for an importance matrix: behind the one of the final evaluation, which has no steps either.
pub fn measuring_round(federation: &Federation) -> u32 {
    federation.rounds.saturating_add(2)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Closing {
    Evaluation,
    /// Channel sums for an importance matrix, behind the evaluation.
    Measuring,
}

impl Rounds {
    /// The final evaluation is everybody's who is connected: no cohort has to be spared for training any more.
    pub(super) fn evaluate(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        if self.federation.evaluate_every == 0 || self.connected.is_empty() {
            return self.measure(now_ms, actions);
        }
        let participants = self.close_with(Closing::Evaluation, BTreeMap::new(), now_ms);
        actions.push(Action::Evaluate { round: self.federation.rounds, participants });
    }

    /// So are the records to be measured, where the experiment wants that.
    pub(super) fn measure(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let lost = match &mut self.state {
            State::Closing { lost, .. } => std::mem::take(lost),
            _ => BTreeMap::new(),
        };
        if self.federation.imatrix_tokens == 0 || (self.connected.is_empty() && lost.is_empty()) {
            return self.finish(FinishReason::Completed, actions);
        }
        let participants = self.close_with(Closing::Measuring, lost, now_ms);
        if !participants.is_empty() {
            actions.push(Action::Measure { participants });
        }
    }

    /// Those who are here; who is lost is waited for too.
    fn close_with(&mut self, task: Closing, lost: BTreeMap<ParticipantName, u64>, now_ms: u64) -> Vec<ParticipantName> {
        let participants = self.connected.keys().cloned().collect();
        let awaited: BTreeSet<ParticipantName> = self.connected.keys().chain(lost.keys()).cloned().collect();
        let closes_ms = self.deadline_after(now_ms);
        let owed = match task {
            Closing::Evaluation => Owed::Evaluation,
            Closing::Measuring => Owed::Measurement,
        };
        self.pace.begin(&awaited, Some(owed), now_ms);
        self.state = State::Closing { task, awaited, lost, closes_ms };
        participants
    }

    pub(super) fn note_evaluation(&mut self, participant: &ParticipantName, round: u32) {
        if round == self.federation.rounds {
            self.settle(Closing::Evaluation, participant);
        }
    }

    /// Waits no longer for the participant's part in this task; says whether it did.
    pub(super) fn settle(&mut self, settled: Closing, participant: &ParticipantName) -> bool {
        match &mut self.state {
            State::Closing { task, awaited, .. } if *task == settled => awaited.remove(participant),
            _ => false,
        }
    }

    /// `content` is what is wrong with the sums themselves. As with updates, nobody is waited for who sent bad ones.
    pub(super) fn judge_sums(
        &mut self,
        participant: ParticipantName,
        content: Result<(), SumsRefusal>,
        actions: &mut Vec<Action>,
    ) {
        // Who is lost is waited for, and asked when it is back.
        let is_here = self.connected.contains_key(&participant);
        let awaited = is_here && self.settle(Closing::Measuring, &participant);
        match if awaited { content } else { content.and(Err(SumsRefusal::NotAwaited)) } {
            Ok(()) => actions.push(Action::AcceptSums { participant }),
            Err(reason) => actions.push(Action::RefuseSums { participant, reason }),
        }
    }
}

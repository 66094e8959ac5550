//! The step barrier of a shared body: step s is applied once every member has committed it, and not before.
//!
//! A [`Barrier`] lives for one attempt of one round. It owns who has committed what and decides when a step is applied
//! and which forward may run; the gradients themselves, and the streams that wait, belong to the caller. Since nobody
//! runs ahead of an unapplied step, there is never more than one step to remember.

use std::collections::BTreeMap;

use planted::Bug;

use crate::round::{Contribution, ParticipantName};

/// The barrier of one round. Steps are counted over the whole run.
///
/// A member that is removed takes its contribution to the unapplied step with it: the mean is then over exactly those
/// whom the body goes on with, whether the removal came before or after the last commit of the others.
#[derive(Debug)]
pub struct Barrier {
    /// Tokens of the open step's commit; `None` while the member still works on it.
    members: BTreeMap<ParticipantName, Option<u64>>,
    /// The step that is applied next; `end` when the round's last one was applied.
    step: u64,
    end: u64,
}

/// Move the shared body by the token-weighted mean of these members' gradients, which stand in name order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApplyStep {
    pub step: u64,
    pub contributions: Vec<Contribution>,
}

/// What to do with a forward that a member asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    Now,
    /// The member has committed the step before, which somebody else has not: ask again after the next [`ApplyStep`].
    Wait,
}

/// The member broke the protocol; all of these end its stream, none of them the round.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BarrierError {
    #[error("{participant} is no member of this round")]
    NotAMember { participant: ParticipantName },
    #[error("{participant} is at step {found} where step {expected} is open")]
    WrongStep { participant: ParticipantName, expected: u64, found: u64 },
    #[error("{participant} has committed step {step} already")]
    AlreadyCommitted { participant: ParticipantName, step: u64 },
    #[error("{participant} has finished its {steps_end} steps of the run up to this round")]
    RoundIsOver { participant: ParticipantName, steps_end: u64 },
    #[error("{participant} committed step {step} without a trained token, so that its loss is undefined")]
    NoTokens { participant: ParticipantName, step: u64 },
}

impl Barrier {
    pub fn new(members: impl IntoIterator<Item = ParticipantName>, first_step: u64, local_steps: u64) -> Self {
        Self {
            members: members.into_iter().map(|participant| (participant, None)).collect(),
            step: first_step,
            end: first_step.saturating_add(local_steps),
        }
    }

    /// As it was: `members` with the tokens of those who have committed `step` already.
    pub fn restored(members: BTreeMap<ParticipantName, Option<u64>>, step: u64, end: u64) -> Self {
        Self { members, step, end }
    }

    /// The tokens of a member's commit of the open step.
    pub fn commit_of(&self, participant: &ParticipantName) -> Option<u64> {
        self.members.get(participant).copied().flatten()
    }

    /// The member's gradient of `step`, taken from `tokens` trained tokens, is complete.
    pub fn committed(
        &mut self,
        participant: &ParticipantName,
        step: u64,
        tokens: u64,
    ) -> Result<Option<ApplyStep>, BarrierError> {
        match self.forward(participant, step)? {
            Turn::Now if tokens > 0 => {}
            Turn::Now => return Err(BarrierError::NoTokens { participant: participant.clone(), step }),
            Turn::Wait => {
                return Err(BarrierError::WrongStep {
                    participant: participant.clone(),
                    expected: self.step,
                    found: step,
                });
            }
        }
        self.members.insert(participant.clone(), Some(tokens));
        Ok(self.apply_if_complete())
    }

    /// The member has left the round. To remove one twice, or a stranger, changes nothing.
    pub fn removed(&mut self, participant: &ParticipantName) -> Option<ApplyStep> {
        self.members.remove(participant)?;
        self.apply_if_complete()
    }

    /// The step that is applied next.
    pub fn open_step(&self) -> u64 {
        self.step
    }

    /// Whether a training forward of `step` may run now. Evaluation does not pass the barrier.
    pub fn forward(&self, participant: &ParticipantName, step: u64) -> Result<Turn, BarrierError> {
        let Some(commit) = self.members.get(participant) else {
            return Err(BarrierError::NotAMember { participant: participant.clone() });
        };
        // The step that the member itself has to do next.
        let expected = if commit.is_some() { self.step + 1 } else { self.step };
        if commit.is_some() && step == self.step {
            return Err(BarrierError::AlreadyCommitted { participant: participant.clone(), step });
        }
        if expected >= self.end {
            return Err(BarrierError::RoundIsOver { participant: participant.clone(), steps_end: self.end });
        }
        if step != expected {
            return Err(BarrierError::WrongStep { participant: participant.clone(), expected, found: step });
        }
        Ok(if commit.is_some() { Turn::Wait } else { Turn::Now })
    }

    fn apply_if_complete(&mut self) -> Option<ApplyStep> {
        let mut contributions = Vec::with_capacity(self.members.len());
        for (participant, commit) in &self.members {
            match *commit {
                Some(tokens) => contributions.push(Contribution { participant: participant.clone(), tokens }),
                None if planted::is(Bug::OpensBarrierEarly) && contributions.len() + 1 == self.members.len() => {}
                None => return None,
            }
        }
        if contributions.is_empty() {
            return None;
        }
        let step = self.step;
        self.step += 1;
        self.members.values_mut().for_each(|commit| *commit = None);
        Some(ApplyStep { step, contributions })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn name(name: &str) -> ParticipantName {
        ParticipantName::new(name)
    }

    fn barrier(members: &[&str], first_step: u64, local_steps: u64) -> Barrier {
        Barrier::new(members.iter().copied().map(name), first_step, local_steps)
    }

    fn apply(step: u64, contributions: &[(&str, u64)]) -> Option<ApplyStep> {
        let contributions =
            contributions.iter().map(|&(participant, tokens)| Contribution { participant: name(participant), tokens });
        Some(ApplyStep { step, contributions: contributions.collect() })
    }

    #[test]
    fn a_step_is_applied_once_all_have_committed_it_in_name_order() {
        let mut barrier = barrier(&["cleo", "anna", "bert"], 40, 2);
        assert_eq!(barrier.committed(&name("cleo"), 40, 3), Ok(None));
        assert_eq!(barrier.committed(&name("anna"), 40, 1), Ok(None));
        assert_eq!(barrier.committed(&name("bert"), 40, 2), Ok(apply(40, &[("anna", 1), ("bert", 2), ("cleo", 3)])));
        assert_eq!(barrier.committed(&name("bert"), 41, 5), Ok(None), "step 40 is not applied again");
    }

    #[test]
    fn the_forward_of_the_next_step_waits_for_the_others() {
        let mut barrier = barrier(&["anna", "bert"], 0, 2);
        assert_eq!(barrier.forward(&name("anna"), 0), Ok(Turn::Now));
        barrier.committed(&name("anna"), 0, 1).unwrap();
        assert_eq!(barrier.forward(&name("anna"), 1), Ok(Turn::Wait));
        assert_eq!(barrier.forward(&name("bert"), 0), Ok(Turn::Now));
        barrier.committed(&name("bert"), 0, 1).unwrap();
        assert_eq!(barrier.forward(&name("anna"), 1), Ok(Turn::Now));
    }

    #[test]
    fn a_removal_completes_the_step_that_only_the_removed_member_had_not_committed() {
        let mut barrier = barrier(&["anna", "bert"], 0, 2);
        barrier.committed(&name("anna"), 0, 7).unwrap();
        assert_eq!(barrier.removed(&name("bert")), apply(0, &[("anna", 7)]));
        assert_eq!(barrier.removed(&name("bert")), None);
        assert_eq!(barrier.committed(&name("anna"), 1, 7), Ok(apply(1, &[("anna", 7)])));
    }

    #[test]
    fn a_removed_member_takes_its_unapplied_contribution_with_it() {
        let mut barrier = barrier(&["anna", "bert"], 0, 2);
        barrier.committed(&name("anna"), 0, 7).unwrap();
        assert_eq!(barrier.removed(&name("anna")), None);
        assert_eq!(barrier.committed(&name("bert"), 0, 9), Ok(apply(0, &[("bert", 9)])));
        assert_eq!(barrier.committed(&name("anna"), 1, 7), Err(BarrierError::NotAMember { participant: name("anna") }));
    }

    #[test]
    fn removing_everybody_applies_nothing() {
        let mut barrier = barrier(&["anna"], 0, 2);
        barrier.committed(&name("anna"), 0, 7).unwrap();
        assert_eq!(barrier.removed(&name("anna")), None);
    }

    #[test]
    fn steps_out_of_turn_are_refused() {
        let mut barrier = barrier(&["anna", "bert"], 5, 3);
        let anna = name("anna");
        let wrong = |expected, found| BarrierError::WrongStep { participant: name("anna"), expected, found };
        assert_eq!(barrier.committed(&anna, 4, 1), Err(wrong(5, 4)));
        assert_eq!(barrier.committed(&anna, 6, 1), Err(wrong(5, 6)));
        assert_eq!(barrier.forward(&anna, u64::MAX), Err(wrong(5, u64::MAX)));
        assert_eq!(barrier.committed(&anna, 5, 0), Err(BarrierError::NoTokens { participant: anna.clone(), step: 5 }));
        assert_eq!(barrier.committed(&anna, 5, 1), Ok(None));
        let twice = BarrierError::AlreadyCommitted { participant: anna.clone(), step: 5 };
        assert_eq!(barrier.committed(&anna, 5, 1), Err(twice.clone()));
        assert_eq!(barrier.forward(&anna, 5), Err(twice));
        assert_eq!(barrier.committed(&anna, 6, 1), Err(wrong(5, 6)), "step 5 is not applied yet");
        assert_eq!(barrier.forward(&anna, 7), Err(wrong(6, 7)));
    }

    #[test]
    fn members_finish_after_the_rounds_last_step() {
        let mut barrier = barrier(&["anna", "bert"], 0, 1);
        let over = |participant| BarrierError::RoundIsOver { participant: name(participant), steps_end: 1 };
        barrier.committed(&name("anna"), 0, 1).unwrap();
        assert_eq!(barrier.forward(&name("anna"), 1), Err(over("anna")));
        barrier.committed(&name("bert"), 0, 1).unwrap();
        assert_eq!(barrier.committed(&name("bert"), 1, 1), Err(over("bert")));
        assert_eq!(barrier.removed(&name("anna")), None, "nothing is left to apply");
    }

    #[test]
    fn a_round_without_steps_is_over_from_the_start() {
        let barrier = barrier(&["anna"], 3, 0);
        assert!(matches!(barrier.forward(&name("anna"), 3), Err(BarrierError::RoundIsOver { .. })));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Commit(usize),
        CommitOutOfTurn(usize, u64),
        Remove(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            8 => (0..4usize).prop_map(Op::Commit),
            2 => (0..4usize, 0..8u64).prop_map(|(member, step)| Op::CommitOutOfTurn(member, step)),
            1 => (0..4usize).prop_map(Op::Remove),
        ]
    }

    proptest! {
        #[test]
        fn steps_are_applied_in_order_by_exactly_the_remaining_members(ops in prop::collection::vec(op(), 0..80)) {
            let names = ["anna", "bert", "cleo", "dora"].map(name);
            let mut barrier = Barrier::new(names.clone(), 0, 6);
            let mut remaining: BTreeSet<_> = names.iter().cloned().collect();
            let mut applied = 0;
            for op in ops {
                let applies = match op {
                    Op::Commit(member) => barrier.committed(&names[member], applied, 1).ok().flatten(),
                    Op::CommitOutOfTurn(member, step) => barrier.committed(&names[member], step, 1).ok().flatten(),
                    Op::Remove(member) => {
                        remaining.remove(&names[member]);
                        barrier.removed(&names[member])
                    }
                };
                if let Some(ApplyStep { step, contributions }) = applies {
                    prop_assert_eq!(step, applied);
                    prop_assert!(contributions.iter().map(|contribution| &contribution.participant).eq(&remaining));
                    applied += 1;
                }
            }
            prop_assert!(applied <= 6);
            while applied < 6 && !remaining.is_empty() {
                let before = applied;
                for participant in &remaining {
                    if barrier.forward(participant, applied) == Ok(Turn::Now)
                        && barrier.committed(participant, applied, 1).unwrap().is_some() {
                        applied += 1;
                        break;
                    }
                }
                prop_assert_eq!(applied, before + 1, "members that behave always get on");
            }
        }
    }
}

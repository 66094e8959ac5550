//! What a journal says about the round that was open.

use std::collections::BTreeMap;

use planted::Bug;

use super::{BodyState, Entry, Record};
use crate::round::{Interrupted, Member, ParticipantName};

/// A round as its journal leaves it.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Absent where no attempt is open.
    pub open: Option<OpenAttempt>,
    /// The attempt that comes next where none is open.
    pub next_attempt: u32,
}

#[derive(Debug)]
pub struct OpenAttempt {
    pub interrupted: Interrupted,
    pub first_step: u64,
    /// In the order in which the body has done it.
    pub work: Vec<Work>,
    pub updates: BTreeMap<ParticipantName, Update>,
}

/// What the body has done for a member.
#[derive(Debug)]
pub enum Work {
    Committed {
        participant: ParticipantName,
        step: u64,
        tokens: u64,
        gradients: Vec<Vec<f32>>,
    },
    Removed {
        participant: ParticipantName,
    },
    /// All that it had done until then.
    Restored {
        state: BodyState,
        tensors: Vec<Vec<f32>>,
    },
}

#[derive(Debug)]
pub struct Update {
    pub tokens: u64,
    pub loss_nats: f64,
    pub tensors: Vec<Vec<f32>>,
}

impl Recovered {
    pub fn of(round: u32, entries: Vec<Entry>) -> Self {
        let mut recovered = Self { open: None, next_attempt: 1 };
        for Entry { record, tensors } in entries {
            if let Record::Started { attempt, cohort, first_step, evaluate } = record {
                let members = cohort.into_iter().map(|name| (ParticipantName::new(name), Member::Training)).collect();
                let interrupted = Interrupted { round, attempt, evaluate, members };
                recovered.open =
                    Some(OpenAttempt { interrupted, first_step, work: Vec::new(), updates: BTreeMap::new() });
                continue;
            }
            if let Record::Abandoned { attempt } = record {
                recovered = Self { open: None, next_attempt: attempt.saturating_add(1) };
                continue;
            }
            let Some(open) = &mut recovered.open else { continue };
            open.note(record, tensors);
        }
        recovered
    }
}

impl OpenAttempt {
    fn note(&mut self, record: Record, tensors: Vec<Vec<f32>>) {
        let members = &mut self.interrupted.members;
        match record {
            Record::Started { .. } | Record::Abandoned { .. } => {}
            Record::Body { state } => self.work = vec![Work::Restored { state, tensors }],
            Record::Committed { participant, step, tokens } => {
                let participant = ParticipantName::new(participant);
                self.work.push(Work::Committed { participant, step, tokens, gradients: tensors });
            }
            Record::Removed { participant } => {
                let participant = ParticipantName::new(participant);
                // Who has delivered is not removed by a departure.
                if let Some(member @ Member::Training) = members.get_mut(&participant) {
                    *member = Member::Removed;
                }
                self.work.push(Work::Removed { participant });
            }
            Record::Accepted { participant, tokens, loss_nats_bits } => {
                let participant = ParticipantName::new(participant);
                if let Some(member) = members.get_mut(&participant) {
                    *member = Member::Delivered { tokens };
                    let loss_nats = f64::from_bits(loss_nats_bits);
                    // The first one counts; the same is never accepted twice.
                    if planted::is(Bug::ForgetsUpdates) {
                        return;
                    }
                    self.updates.entry(participant).or_insert(Update { tokens, loss_nats, tensors });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(attempt: u32) -> Entry {
        let cohort = vec!["anna".into(), "bert".into()];
        Entry::new(Record::Started { attempt, cohort, first_step: 10, evaluate: true })
    }

    fn committed(participant: &str, step: u64) -> Entry {
        let record = Record::Committed { participant: participant.into(), step, tokens: 7 };
        Entry { record, tensors: vec![vec![step as f32]] }
    }

    fn accepted(participant: &str) -> Entry {
        let record = Record::Accepted { participant: participant.into(), tokens: 7, loss_nats_bits: 2.5f64.to_bits() };
        Entry { record, tensors: vec![vec![1.0]] }
    }

    #[test]
    fn the_last_attempt_counts_with_all_that_was_done_for_it() {
        let removed = Entry::new(Record::Removed { participant: "bert".into() });
        let entries = vec![
            started(1),
            committed("anna", 10),
            accepted("anna"),
            Entry::new(Record::Abandoned { attempt: 1 }),
            started(2),
            committed("bert", 10),
            removed,
            committed("anna", 10),
            accepted("anna"),
        ];
        let open = Recovered::of(3, entries).open.unwrap();
        let members: Vec<Member> = open.interrupted.members.values().copied().collect();
        assert_eq!(members, [Member::Delivered { tokens: 7 }, Member::Removed]);
        assert_eq!((open.interrupted.round, open.interrupted.attempt, open.first_step), (3, 2, 10));
        assert_eq!(open.work.len(), 3);
        assert_eq!(open.updates.values().next().unwrap().loss_nats, 2.5);
    }

    #[test]
    fn an_attempt_that_was_abandoned_is_followed_by_the_next() {
        let entries = vec![started(1), Entry::new(Record::Abandoned { attempt: 1 })];
        let recovered = Recovered::of(1, entries);
        assert!(recovered.open.is_none() && recovered.next_attempt == 2);
        assert_eq!(Recovered::of(1, Vec::new()).next_attempt, 1);
    }
}

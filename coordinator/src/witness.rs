//! What a session may report of its own work, judged by what the coordinator has seen of it.
//!
//! A loss is its participant's word. The rest of a report can be checked: which rounds the session was given, which steps
//! have gone through the body, with how many trained tokens, and how often a step may be reported at all. A [`Witness`]
//! remembers that for one session, and only for the newest rounds. It reads no socket and no clock; the caller tells it of
//! a step before the participant can know that the step is over, so that no honest report comes too early.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use experiment::{Experiment, SplitMode};

use crate::body::RoundKey;

#[derive(Debug)]
pub struct Witness {
    /// Whether steps go through this side at all.
    sees_steps: bool,
    /// What a step has at most where it is not seen.
    step_tokens_max: u64,
    /// In the order in which they were given.
    rounds: Vec<Given>,
    /// The newest round that something was reported of. Reports come in order, and may lag behind what goes over streams of
    /// its own.
    reported: u32,
}

/// How many rounds a session's reports may lag behind.
const LAG_ROUNDS_MAX: u32 = 16;

/// What a member's update may rest on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Steps are missing, or the round is another.
    Unfinished,
    /// All steps are committed; they had this many trained tokens.
    Finished { tokens: u64 },
    /// Steps do not train through the body, and are not counted.
    Uncounted,
}

/// A report of a step that is in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reported {
    /// The attempt whose step it is.
    pub key: RoundKey,
    /// False of a step that an earlier session has reported.
    pub is_new: bool,
}

/// A step's micro-batch, as its request describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Micro {
    pub step: u64,
    pub micro: u32,
    pub micros: u32,
    pub trained_tokens: u32,
    pub step_tokens: u32,
}

/// One attempt of a round.
#[derive(Debug)]
struct Given {
    key: RoundKey,
    steps: Range<u64>,
    /// Whether an evaluation is still to be reported.
    owes_evaluation: bool,
    evaluated_tokens: u64,
    /// Whether its member was asked to go on with it, and has not said that it cannot.
    may_give_up: bool,
    work: BTreeMap<u64, Step>,
}

#[derive(Debug, Default)]
struct Step {
    micros: BTreeSet<u32>,
    /// Of the micro-batches that are here.
    trained_tokens: u64,
    /// Of the whole step, as each of them says.
    step_tokens: u64,
    complete: bool,
    /// In an earlier session, of which the participant may not have had the answer: it may come once more.
    before: bool,
    /// On record, whichever session reported it.
    reported: bool,
    /// Reported in this session.
    heard: bool,
}

impl Witness {
    pub fn new(experiment: &Experiment) -> Self {
        let experiment::Training { batch_tokens, accumulate, .. } = experiment.training;
        Self {
            sees_steps: experiment.split.mode != SplitMode::Whole,
            step_tokens_max: u64::from(batch_tokens) * u64::from(accumulate),
            rounds: Vec::new(),
            reported: 0,
        }
    }

    /// The session is about to be told to start this round. Reports of earlier rounds may still be under way.
    pub fn gave(&mut self, key: RoundKey, steps: Range<u64>, evaluate: bool) {
        let oldest = key.round.saturating_sub(LAG_ROUNDS_MAX).max(self.reported.min(key.round.saturating_sub(1)));
        self.rounds.retain(|given| given.key.round >= oldest);
        let (evaluated_tokens, work) = (0, BTreeMap::new());
        self.rounds.push(Given { key, steps, owes_evaluation: evaluate, evaluated_tokens, may_give_up: false, work });
    }

    /// As [`gave`](Self::gave), to a member that is back: `committed` are the trained tokens of the steps it has committed,
    /// and those before `reported` are on record.
    pub fn gave_again(
        &mut self,
        key: RoundKey,
        steps: Range<u64>,
        evaluate: bool,
        committed: BTreeMap<u64, u64>,
        reported: u64,
    ) {
        self.gave(key, steps, evaluate);
        let Some(given) = self.given(key) else { return };
        given.may_give_up = true;
        for (step, step_tokens) in committed {
            let work = Step { step_tokens, complete: true, before: true, reported: step < reported, ..Step::default() };
            given.work.insert(step, work);
        }
    }

    pub fn has_given(&self, key: RoundKey) -> bool {
        self.rounds.iter().any(|given| given.key == key)
    }

    /// Whether an evaluation was asked for with this round, and is not reported yet.
    pub fn owes_evaluation(&self, key: RoundKey) -> bool {
        self.rounds.iter().any(|given| given.key == key && given.owes_evaluation)
    }

    /// A micro-batch of the held-out records has gone through the body.
    pub fn evaluated(&mut self, key: RoundKey, tokens: u32) {
        if let Some(given) = self.given(key) {
            given.evaluated_tokens += u64::from(tokens);
        }
    }

    /// A micro-batch of a step has gone forward through the body. True of the last to do so, whichever it is: by then their
    /// tokens must add up.
    pub fn trained(&mut self, key: RoundKey, micro: Micro) -> Result<bool, String> {
        let Micro { step, micro, micros, trained_tokens, step_tokens } = micro;
        let Some(given) = self.given(key).filter(|given| given.steps.contains(&step)) else {
            return Err(format!("step {step} in round {}", key.round));
        };
        let work = given.work.entry(step).or_default();
        if work.before && work.step_tokens == u64::from(step_tokens) {
            *work = Step { reported: work.reported, heard: work.heard, ..Step::default() };
        }
        if work.complete || !work.micros.insert(micro) {
            return Err(format!("micro-batch {micro} of step {step}, which came before"));
        }
        if work.micros.len() == 1 {
            work.step_tokens = u64::from(step_tokens);
        } else if work.step_tokens != u64::from(step_tokens) {
            return Err(format!("{step_tokens} trained tokens in step {step}, which had {} before", work.step_tokens));
        }
        work.trained_tokens += u64::from(trained_tokens);
        let is_last = work.micros.len() == micros as usize;
        if work.trained_tokens > work.step_tokens || (is_last && work.trained_tokens != work.step_tokens) {
            let (found, expected) = (work.trained_tokens, work.step_tokens);
            return Err(format!("micro-batches of {found} trained tokens in step {step}, which has {expected}"));
        }
        Ok(is_last)
    }

    /// The participant is about to learn that its part of the step is done: with the step's last micro-batch the step is.
    pub fn finished(&mut self, key: RoundKey, Micro { step, micros, .. }: Micro) {
        if let Some(work) = self.given(key).and_then(|given| given.work.get_mut(&step))
            && work.micros.len() == micros as usize
        {
            work.complete = true;
            work.micros.clear();
        }
    }

    /// A step is reported once for every time that it was trained, and once more where an earlier session has trained it.
    pub fn check_step(&mut self, round: u32, step: u64, tokens: u64) -> Result<Reported, String> {
        let (sees_steps, step_tokens_max) = (self.sees_steps, self.step_tokens_max);
        let is_asked = |given: &&mut Given| given.key.round == round && given.steps.contains(&step);
        let mut complaint = format!("step {step} in a report of round {round}");
        for given in self.rounds.iter_mut().filter(is_asked) {
            let work = match sees_steps {
                true => given.work.get_mut(&step).filter(|work| work.complete),
                false => Some(given.work.entry(step).or_default()),
            };
            let Some(work) = work else {
                complaint = format!("a report of step {step}, which is not complete");
                continue;
            };
            if work.heard {
                complaint = format!("a second report of step {step}");
            } else if sees_steps && work.step_tokens != tokens {
                complaint =
                    format!("a report of {tokens} trained tokens in step {step}, which had {}", work.step_tokens);
            } else if !(1..=step_tokens_max).contains(&tokens) {
                complaint = format!("a report of {tokens} trained tokens in a step; it has 1 to {step_tokens_max}");
            } else {
                let is_new = !work.reported;
                (work.reported, work.heard) = (true, true);
                self.reported = self.reported.max(round);
                return Ok(Reported { key: given.key, is_new });
            }
        }
        Err(complaint)
    }

    /// An evaluation is reported once for every round that asked for one. `after` is the round whose adapter it is of.
    pub fn check_evaluation(&mut self, after: u32, tokens: u64) -> Result<(), String> {
        let sees_steps = self.sees_steps;
        let mut complaint = format!("an evaluation after round {after}");
        for given in self.rounds.iter_mut().filter(|given| given.key.round.checked_sub(1) == Some(after)) {
            if !given.owes_evaluation {
                continue;
            }
            if sees_steps && given.evaluated_tokens != tokens {
                complaint = format!("an evaluation on {tokens} tokens, of which {} have come", given.evaluated_tokens);
                continue;
            }
            given.owes_evaluation = false;
            self.reported = self.reported.max(given.key.round);
            return Ok(());
        }
        Err(complaint)
    }

    /// That a member cannot go on with a round is said once, where it was asked to.
    pub fn check_giving_up(&mut self, key: RoundKey) -> Result<(), String> {
        if self.given(key).is_some_and(|given| std::mem::take(&mut given.may_give_up)) {
            return Ok(());
        }
        let RoundKey { round, attempt } = key;
        Err(format!("giving up round {round}, attempt {attempt}, which was not resumed or is given up already"))
    }

    /// What an update for this attempt may rest on.
    pub fn work_of(&self, key: RoundKey) -> Work {
        match self.rounds.iter().find(|given| given.key == key) {
            None => Work::Unfinished,
            Some(_) if !self.sees_steps => Work::Uncounted,
            Some(Given { steps, work, .. }) => {
                let complete = work.values().filter(|step| step.complete);
                match complete.clone().count() as u64 == steps.end - steps.start {
                    true => Work::Finished { tokens: complete.map(|step| step.step_tokens).sum() },
                    false => Work::Unfinished,
                }
            }
        }
    }

    fn given(&mut self, key: RoundKey) -> Option<&mut Given> {
        self.rounds.iter_mut().find(|given| given.key == key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: RoundKey = RoundKey { round: 1, attempt: 1 };
    const AGAIN: RoundKey = RoundKey { round: 1, attempt: 2 };

    /// Of a run with steps of at most 2 · 100 tokens, that has given round 1 with steps 0 and 1.
    fn witness(sees_steps: bool) -> Witness {
        let mut witness = Witness { sees_steps, step_tokens_max: 200, rounds: Vec::new(), reported: 0 };
        witness.gave(FIRST, 0..2, true);
        witness
    }

    fn micro(step: u64, micro: u32, trained_tokens: u32, step_tokens: u32) -> Micro {
        Micro { step, micro, micros: 2, trained_tokens, step_tokens }
    }

    /// A whole step of 30 and 40 trained tokens.
    fn train(witness: &mut Witness, key: RoundKey, step: u64) {
        for micro in [micro(step, 0, 30, 70), micro(step, 1, 40, 70)] {
            assert!(witness.trained(key, micro).is_ok());
            witness.finished(key, micro);
        }
    }

    #[track_caller]
    fn check_refused<T: std::fmt::Debug>(judged: Result<T, String>, complaint: &str) {
        let found = judged.unwrap_err();
        assert!(found.contains(complaint), "{found}");
    }

    #[test]
    fn a_step_is_reported_once_it_is_complete_with_its_tokens_and_once() {
        let mut witness = witness(true);
        check_refused(witness.check_step(1, 0, 70), "step 0, which is not complete");
        assert_eq!(witness.trained(FIRST, micro(0, 0, 30, 70)), Ok(false));
        witness.finished(FIRST, micro(0, 0, 30, 70));
        check_refused(witness.check_step(1, 0, 70), "step 0, which is not complete");
        assert_eq!(witness.trained(FIRST, micro(0, 1, 40, 70)), Ok(true));
        check_refused(witness.check_step(1, 0, 70), "step 0, which is not complete");
        witness.finished(FIRST, micro(0, 1, 40, 70));
        check_refused(witness.check_step(1, 0, 71), "71 trained tokens in step 0, which had 70");
        assert!(witness.check_step(1, 0, 70).is_ok());
        check_refused(witness.check_step(1, 0, 70), "a second report of step 0");
        check_refused(witness.check_step(1, 2, 70), "step 2 in a report of round 1");
        check_refused(witness.check_step(2, 2, 70), "step 2 in a report of round 2");
    }

    /// Reports come in order over one stream, and may cross a round's abandonment.
    #[test]
    fn a_report_is_of_the_attempt_whose_step_it_has() {
        let mut witness = witness(true);
        train(&mut witness, FIRST, 0);
        witness.gave(AGAIN, 0..2, true);
        assert_eq!(witness.check_step(1, 0, 70), Ok(Reported { key: FIRST, is_new: true }));
        train(&mut witness, AGAIN, 0);
        assert_eq!(witness.check_step(1, 0, 70), Ok(Reported { key: AGAIN, is_new: true }));
    }

    #[test]
    fn what_an_earlier_session_reported_is_heard_once_more_and_is_not_new() {
        let mut witness = Witness { sees_steps: true, step_tokens_max: 200, rounds: Vec::new(), reported: 0 };
        witness.gave_again(FIRST, 0..2, false, [(0, 70), (1, 60)].into(), 1);
        check_refused(witness.check_step(1, 0, 71), "71 trained tokens in step 0, which had 70");
        assert_eq!(witness.check_step(1, 0, 70), Ok(Reported { key: FIRST, is_new: false }));
        check_refused(witness.check_step(1, 0, 70), "a second report of step 0");
        assert_eq!(witness.check_step(1, 1, 60), Ok(Reported { key: FIRST, is_new: true }));
        check_refused(witness.check_step(1, 1, 60), "a second report of step 1");
    }

    #[test]
    fn micro_batches_add_up_to_their_step_in_any_order() {
        let check = |micros: [Micro; 2], complaint: &str| {
            let mut witness = witness(true);
            assert_eq!(witness.trained(FIRST, micros[0]), Ok(false));
            check_refused(witness.trained(FIRST, micros[1]), complaint);
        };
        check([micro(0, 0, 30, 70), micro(0, 1, 41, 70)], "71 trained tokens in step 0, which has 70");
        check([micro(0, 1, 30, 70), micro(0, 0, 39, 70)], "69 trained tokens in step 0, which has 70");
        check([micro(0, 0, 30, 70), micro(0, 1, 40, 71)], "71 trained tokens in step 0, which had 70 before");
        check([micro(0, 0, 30, 70), micro(0, 0, 40, 70)], "micro-batch 0 of step 0, which came before");
        check([micro(0, 0, 30, 70), micro(2, 0, 30, 70)], "step 2 in round 1");
        check_refused(witness(true).trained(FIRST, micro(0, 0, 71, 70)), "71 trained tokens in step 0");
        check_refused(witness(true).trained(AGAIN, micro(0, 0, 30, 70)), "step 0 in round 1");
        let mut done = witness(true);
        train(&mut done, FIRST, 0);
        check_refused(done.trained(FIRST, micro(0, 0, 30, 70)), "which came before");
    }

    #[test]
    fn a_step_is_whole_with_whichever_micro_batch_comes_last() {
        let mut witness = witness(true);
        assert_eq!(witness.trained(FIRST, micro(0, 1, 40, 70)), Ok(false));
        assert_eq!(witness.trained(FIRST, micro(0, 0, 30, 70)), Ok(true));
        // What an earlier session has committed is repeated as a whole, too.
        witness.gave_again(AGAIN, 0..2, false, [(0, 70)].into(), 0);
        assert_eq!(witness.trained(AGAIN, micro(0, 1, 40, 70)), Ok(false));
        check_refused(witness.check_step(1, 0, 70), "step 0, which is not complete");
        assert_eq!(witness.trained(AGAIN, micro(0, 0, 30, 70)), Ok(true));
    }

    #[test]
    fn a_round_is_given_up_once_and_only_where_it_was_given_again() {
        let mut witness = witness(true);
        check_refused(witness.check_giving_up(FIRST), "giving up round 1, attempt 1");
        witness.gave_again(AGAIN, 0..2, false, BTreeMap::new(), 0);
        check_refused(witness.check_giving_up(FIRST), "giving up round 1, attempt 1");
        assert_eq!(witness.check_giving_up(AGAIN), Ok(()));
        check_refused(witness.check_giving_up(AGAIN), "giving up round 1, attempt 2");
    }

    #[test]
    fn a_round_that_was_abandoned_is_reported_again_and_may_be_reported_late() {
        let mut witness = witness(true);
        train(&mut witness, FIRST, 0);
        witness.gave(AGAIN, 0..2, true);
        train(&mut witness, AGAIN, 0);
        assert!(witness.check_step(1, 0, 70).is_ok());
        assert!(witness.check_step(1, 0, 70).is_ok());
        check_refused(witness.check_step(1, 0, 70), "a second report");
        train(&mut witness, AGAIN, 1);
        witness.gave(RoundKey { round: 2, attempt: 1 }, 2..4, false);
        assert!(witness.check_step(1, 1, 70).is_ok());
        witness.gave(RoundKey { round: 3, attempt: 1 }, 4..6, false);
        check_refused(witness.check_step(1, 1, 70), "a second report of step 1");
    }

    #[test]
    fn reports_may_lag_behind_rounds_but_not_behind_each_other() {
        let mut witness = witness(false);
        for round in 2..=4 {
            let steps = 2 * u64::from(round - 1)..2 * u64::from(round);
            witness.gave(RoundKey { round, attempt: 1 }, steps, false);
        }
        assert!(witness.check_step(1, 0, 200).is_ok());
        assert!(witness.check_step(3, 4, 200).is_ok());
        witness.gave(RoundKey { round: 5, attempt: 1 }, 8..10, false);
        check_refused(witness.check_step(1, 1, 200), "step 1 in a report of round 1");
        witness.gave(RoundKey { round: 40, attempt: 1 }, 78..80, false);
        assert_eq!(witness.rounds.len(), 1, "nobody who reports nothing takes memory without end");
    }

    #[test]
    fn an_evaluation_is_reported_once_with_the_tokens_that_came() {
        let mut witness = witness(true);
        witness.evaluated(FIRST, 50);
        check_refused(witness.check_evaluation(0, 90), "on 90 tokens, of which 50 have come");
        witness.evaluated(FIRST, 40);
        check_refused(witness.check_evaluation(1, 90), "an evaluation after round 1");
        assert!(witness.owes_evaluation(FIRST) && !witness.owes_evaluation(AGAIN));
        assert_eq!(witness.check_evaluation(0, 90), Ok(()));
        assert!(!witness.owes_evaluation(FIRST));
        check_refused(witness.check_evaluation(0, 90), "an evaluation after round 0");
        // Who has nothing to evaluate says so.
        witness.gave(RoundKey { round: 2, attempt: 1 }, 2..4, true);
        assert_eq!(witness.check_evaluation(1, 0), Ok(()));
        witness.gave(RoundKey { round: 3, attempt: 1 }, 4..6, false);
        check_refused(witness.check_evaluation(2, 0), "an evaluation after round 2");
        check_refused(witness.check_evaluation(u32::MAX, 0), "an evaluation after round 4294967295");
    }

    #[test]
    fn an_update_rests_on_every_step_of_its_attempt() {
        let mut witness = witness(true);
        train(&mut witness, FIRST, 1);
        assert_eq!(witness.work_of(FIRST), Work::Unfinished);
        train(&mut witness, FIRST, 0);
        assert_eq!(witness.work_of(FIRST), Work::Finished { tokens: 140 });
        assert_eq!(witness.work_of(AGAIN), Work::Unfinished);
    }

    #[test]
    fn steps_that_are_not_seen_are_bounded_and_counted_all_the_same() {
        let mut witness = witness(false);
        for tokens in [0, 201, u64::MAX] {
            check_refused(witness.check_step(1, 0, tokens), "it has 1 to 200");
        }
        assert!(witness.check_step(1, 0, 200).is_ok());
        check_refused(witness.check_step(1, 0, 200), "a second report of step 0");
        check_refused(witness.check_step(1, 2, 1), "step 2 in a report of round 1");
        assert_eq!(witness.check_evaluation(0, 1_000_000), Ok(()));
        check_refused(witness.check_evaluation(0, 1_000_000), "an evaluation after round 0");
        assert_eq!(witness.work_of(FIRST), Work::Uncounted);
    }
}

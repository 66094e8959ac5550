//! The rounds of a run, decided: when a round starts and with whom, whose update counts, when it closes.
//!
//! [`Rounds`] turns what has happened ([`Event`]) and the time at which it happened into what to do ([`Action`]). It owns
//! no tensor, no socket and no timer, never reads the clock, and draws a cohort from the experiment's seed alone, so that
//! the same events at the same times always lead to the same actions. Whether an update is well formed is the caller's
//! question; whether it counts is answered here. Actions are to be performed in their order: an [`Action::Aggregate`] may
//! be followed in the same list by the start of the next round.

mod closing;
mod events;
mod pace;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use experiment::{Federation, Seed};
use planted::Bug;

use closing::Closing;
pub use closing::measuring_round;
pub use events::{Abandonment, Action, Contribution, Event, FinishReason, JoinRefusal, Refusal, SumsRefusal};
pub use pace::Sizes;
use pace::{Owed, Pace};

/// A round is abandoned at most this many times; then the run fails rather than repeat itself for ever.
pub const ATTEMPTS_MAX: u32 = 5;

/// Whoever has lost its connection has this long to come back before the next round starts without it.
const REJOIN_MS: u64 = 10_000;

/// A member that has lost its connection within a round keeps its place for this long: a device that was killed starts,
/// loads its parts of the model and goes on where it was.
const RETURN_MS: u64 = 30_000;

/// A run that was started again with nothing left to train waits this long for somebody to evaluate what it has learned.
const LAST_CALL_MS: u64 = 60_000;

/// The round machine. Rounds are numbered from 1; round 0 is the adapter nobody has trained yet.
///
/// A round closes when every member that is still in it has delivered, or at its deadline, where the experiment sets one.
/// A member that departs, is late ([`Pace`]), or whose update is refused for what it contains, is removed from the round:
/// it may join again, but trains again only from the next start. An update that was accepted stays, even if its sender
/// departs afterwards. A member that is lost keeps its place for a while, and so does one that was stopped where the round
/// cannot go on without it, and so does one that joins while it is connected:
/// the same device has lost its earlier connection, whether that is known yet or not. When it is back it goes on where it
/// was.
#[derive(Debug)]
pub struct Rounds {
    federation: Federation,
    seed: Seed,
    round: u32,
    attempt: u32,
    /// Rounds abandoned in a row since this machine was made.
    abandoned: u32,
    connected: BTreeMap<ParticipantName, DeviceId>,
    pace: Pace,
    state: State,
    /// What the last [`Action::WaitFor`] said, so that a tick does not say it again.
    missing: Option<usize>,
}

/// A participant, as its certificate names it. Names order members, cohorts and contributions everywhere.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParticipantName(String);

/// The digest of the key that a participant has proved to hold: a name may be given to another device, a key is one's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceId(pub [u8; 32]);

#[derive(Debug)]
enum State {
    /// Waiting for participants; `since_ms` is unknown until the first event tells the time.
    Gathering {
        since_ms: Option<u64>,
    },
    Training {
        members: BTreeMap<ParticipantName, Member>,
        evaluate: bool,
        /// Members that are lost, and until when their places are kept.
        lost: BTreeMap<ParticipantName, u64>,
        /// None where the experiment sets no deadline.
        closes_ms: Option<u64>,
    },
    /// What everybody does who is connected behind the last round.
    Closing {
        task: Closing,
        awaited: BTreeSet<ParticipantName>,
        lost: BTreeMap<ParticipantName, u64>,
        closes_ms: Option<u64>,
    },
    Finished,
}

/// A place in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Member {
    Training,
    Delivered { tokens: u64 },
    Removed,
}

/// A round that was open when its coordinator ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interrupted {
    pub round: u32,
    pub attempt: u32,
    pub evaluate: bool,
    pub members: BTreeMap<ParticipantName, Member>,
}

impl Rounds {
    /// `first_round` is 1, or the number after the last finished round of the run that is continued. A run of which all
    /// rounds are finished still does its final evaluation.
    pub fn new(federation: Federation, first_round: u32, seed: Seed) -> Self {
        let local_steps = federation.local_steps;
        Self {
            federation,
            seed,
            round: first_round.max(1),
            attempt: 1,
            abandoned: 0,
            connected: BTreeMap::new(),
            pace: Pace::new(Sizes { local_steps, ..Sizes::default() }),
            state: State::Gathering { since_ms: None },
            missing: None,
        }
    }

    /// Says how much a round is. Until then steps are nobody's but the member's that does them, and bytes no progress.
    pub fn with_sizes(mut self, sizes: Sizes) -> Self {
        self.pace.sizes = sizes;
        self
    }

    /// As [`new`](Self::new), where attempts at the first round were abandoned before.
    pub fn with_attempt(mut self, attempt: u32) -> Self {
        self.attempt = attempt;
        self
    }

    /// Goes on with a round that was open: its members are lost until they join. Its deadline is counted from `now_ms`.
    pub fn resume(federation: Federation, seed: Seed, interrupted: Interrupted, now_ms: u64) -> Self {
        let Interrupted { round, attempt, evaluate, members } = interrupted;
        let mut rounds = Self::new(federation, round, seed).with_attempt(attempt);
        let training = members.iter().filter(|(_, member)| **member == Member::Training);
        let lost = training.map(|(name, _)| (name.clone(), now_ms.saturating_add(RETURN_MS))).collect();
        let owing = members.iter().filter(|(_, member)| **member == Member::Training).map(|(name, _)| name);
        rounds.pace.begin(owing, evaluate.then_some(Owed::Evaluation), now_ms);
        rounds.state = State::Training { members, evaluate, lost, closes_ms: rounds.deadline_after(now_ms) };
        rounds
    }

    /// `now_ms` is the time of the event on any clock that never goes back.
    #[must_use = "the machine assumes that its actions are performed"]
    pub fn handle(&mut self, event: Event, now_ms: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        if let State::Gathering { since_ms } = &mut self.state {
            since_ms.get_or_insert(now_ms);
        }
        match &event {
            // What is known of a member's progress by now counts before it is judged.
            Event::Moved { participant, bytes } => self.pace.moved(participant, *bytes, now_ms),
            Event::Held => self.pace.hold(),
            Event::Released => self.pace.release(now_ms),
            _ => {}
        }
        // A deadline holds from its own time on, not from the tick that happens to notice it.
        self.give_up_lost(now_ms, &mut actions);
        self.give_up_late(now_ms, &mut actions);
        self.close_if_settled(now_ms, &mut actions);
        match event {
            Event::Joined { participant, device } => self.join(participant, device, now_ms, &mut actions),
            Event::Departed { participant } => self.depart(&participant, now_ms, &mut actions),
            Event::Lost { participant } => self.lose(&participant, now_ms),
            Event::Left { participant } if self.needs(&participant) => self.lose(&participant, now_ms),
            Event::Left { participant } => self.depart(&participant, now_ms, &mut actions),
            Event::CannotResume { participant, round, attempt } => {
                if (round, attempt) == (self.round, self.attempt) {
                    self.remove(&participant, now_ms, &mut actions);
                }
            }
            Event::Evaluated { participant, round } => {
                // Of the adapter that the open round began with.
                if round + 1 == self.round {
                    self.pace.evaluated(&participant, now_ms);
                }
                self.note_evaluation(&participant, round);
            }
            Event::StepFinished { participant, round, step } => {
                if round == self.round {
                    let steps = step.saturating_add(1).saturating_sub(self.first_step());
                    self.pace.stepped(&participant, steps, now_ms);
                }
            }
            Event::SumsArrived { participant } => self.judge_sums(participant, Ok(()), &mut actions),
            Event::SumsRejected { participant } => {
                self.judge_sums(participant, Err(SumsRefusal::Content), &mut actions)
            }
            Event::NothingToMeasure { participant } => {
                self.settle(Closing::Measuring, &participant);
            }
            Event::UpdateArrived { participant, round, attempt, tokens } => {
                let content = if tokens == 0 { Err(Refusal::NoTokens) } else { Ok(tokens) };
                self.judge_update(participant, (round, attempt), content, now_ms, &mut actions);
            }
            Event::UpdateRejected { participant, round, attempt } => {
                self.judge_update(participant, (round, attempt), Err(Refusal::Content), now_ms, &mut actions);
            }
            Event::Ticked | Event::Moved { .. } | Event::Held | Event::Released => {}
            Event::StopRequested => self.finish(FinishReason::Stopped, &mut actions),
        }
        self.close_if_settled(now_ms, &mut actions);
        self.start_if_gathered(now_ms, &mut actions);
        actions
    }

    /// The round that is open or comes next; one more than the experiment has when all are finished.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// When a [`Event::Ticked`] is due if nothing else happens; until then the passing of time changes nothing.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        match &self.state {
            State::Training { closes_ms, lost, .. } | State::Closing { closes_ms, lost, .. } => {
                let late = self.owing().into_iter().filter_map(|name| self.pace.late_from_ms(name));
                lost.values().copied().chain(*closes_ms).chain(late).min()
            }
            State::Gathering { since_ms: Some(since_ms) } if !self.is_unstarted() => {
                let quorum_is_here = self.connected.len() >= self.quorum();
                let last_call_ms = self.is_trained().then(|| since_ms.saturating_add(LAST_CALL_MS));
                if quorum_is_here { Some(self.gathered_by(*since_ms)) } else { last_call_ms }
            }
            State::Gathering { .. } | State::Finished => None,
        }
    }

    fn join(&mut self, participant: ParticipantName, device: DeviceId, now_ms: u64, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Finished) {
            return actions.push(Action::RefuseJoin { participant, reason: JoinRefusal::Finished });
        }
        match self.connected.get(&participant) {
            Some(connected) if *connected != device => {
                return actions.push(Action::RefuseJoin { participant, reason: JoinRefusal::NameTaken });
            }
            Some(_) => actions.push(Action::Supersede { participant: participant.clone() }),
            None => {}
        }
        self.connected.insert(participant.clone(), device);
        self.pace.returned(&participant, now_ms);
        self.take_back(participant, actions);
    }

    /// Gives a member that has joined its place back.
    fn take_back(&mut self, participant: ParticipantName, actions: &mut Vec<Action>) {
        let (round, attempt, first_step) = (self.round, self.attempt, self.first_step());
        match &mut self.state {
            State::Training { members, evaluate, lost, .. } => {
                lost.remove(&participant);
                if members.get(&participant).is_some_and(|member| *member != Member::Removed) {
                    let evaluate = *evaluate;
                    actions.push(Action::ResumeMember { participant, round, attempt, first_step, evaluate });
                }
            }
            State::Closing { task, awaited, lost, .. } => {
                lost.remove(&participant);
                if awaited.contains(&participant) {
                    let (round, participants) = (self.federation.rounds, vec![participant]);
                    actions.push(match task {
                        Closing::Evaluation => Action::Evaluate { round, participants },
                        Closing::Measuring => Action::Measure { participants },
                    });
                }
            }
            State::Gathering { .. } | State::Finished => {}
        }
    }

    fn lose(&mut self, participant: &ParticipantName, now_ms: u64) {
        let was_here = self.connected.remove(participant).is_some();
        let kept_ms = if planted::is(Bug::RemovesLostMembers) { 0 } else { RETURN_MS };
        let until_ms = now_ms.saturating_add(kept_ms).saturating_add(self.pace.return_ms(participant));
        match &mut self.state {
            State::Training { members, lost, .. } if members.get(participant) == Some(&Member::Training) => {
                lost.insert(participant.clone(), until_ms);
            }
            // Who has evaluated may still have to measure.
            State::Closing { task, awaited, lost, .. }
                if awaited.contains(participant)
                    || (was_here && *task == Closing::Evaluation && self.federation.imatrix_tokens > 0) =>
            {
                lost.insert(participant.clone(), until_ms);
            }
            _ => {}
        }
    }

    /// Whether the open round would have to be abandoned without this member.
    fn needs(&self, participant: &ParticipantName) -> bool {
        let State::Training { members, .. } = &self.state else { return false };
        let remaining = members.values().filter(|member| **member != Member::Removed).count();
        members.get(participant) == Some(&Member::Training) && remaining <= self.quorum()
    }

    /// Takes the places of those who have not come back in time.
    fn give_up_lost(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let (State::Training { lost, .. } | State::Closing { lost, .. }) = &self.state else { return };
        let late = lost.iter().filter(|(_, until_ms)| now_ms >= **until_ms);
        for participant in late.map(|(participant, _)| participant.clone()).collect::<Vec<_>>() {
            self.remove(&participant, now_ms, actions);
        }
    }

    /// Takes the places of those who are connected and get nowhere.
    fn give_up_late(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let is_late = |name: &&ParticipantName| self.pace.late_from_ms(name).is_some_and(|late_ms| now_ms >= late_ms);
        let late: Vec<ParticipantName> = self.owing().into_iter().filter(is_late).cloned().collect();
        for participant in late {
            actions.push(Action::NoteLate { participant: participant.clone() });
            self.remove(&participant, now_ms, actions);
        }
    }

    /// Those who are here and owe something.
    fn owing(&self) -> Vec<&ParticipantName> {
        let is_here = |lost: &BTreeMap<ParticipantName, u64>, name: &ParticipantName| !lost.contains_key(name);
        match &self.state {
            State::Training { members, lost, .. } => {
                let training = members.iter().filter(|(_, member)| **member == Member::Training).map(|(name, _)| name);
                training.filter(|name| is_here(lost, name)).collect()
            }
            State::Closing { awaited, lost, .. } => awaited.iter().filter(|name| is_here(lost, name)).collect(),
            State::Gathering { .. } | State::Finished => Vec::new(),
        }
    }

    fn depart(&mut self, participant: &ParticipantName, now_ms: u64, actions: &mut Vec<Action>) {
        self.connected.remove(participant);
        self.remove(participant, now_ms, actions);
    }

    /// Waits for the participant no longer.
    fn remove(&mut self, participant: &ParticipantName, now_ms: u64, actions: &mut Vec<Action>) {
        self.pace.leave(participant, now_ms);
        match &mut self.state {
            State::Training { members, lost, .. } => {
                lost.remove(participant);
                if let Some(member @ Member::Training) = members.get_mut(participant) {
                    *member = Member::Removed;
                    actions.push(Action::RemoveMember { participant: participant.clone() });
                }
            }
            State::Closing { awaited, lost, .. } => {
                lost.remove(participant);
                awaited.remove(participant);
            }
            State::Gathering { .. } | State::Finished => {}
        }
    }

    /// `content` is the update's tokens, or what is wrong with the update itself.
    fn judge_update(
        &mut self,
        participant: ParticipantName,
        (round, attempt): (u32, u32),
        content: Result<u64, Refusal>,
        now_ms: u64,
        actions: &mut Vec<Action>,
    ) {
        let member = match self.member_training(&participant, round, attempt) {
            Ok(member) => member,
            Err(reason) => return actions.push(Action::RefuseUpdate { participant, round, reason }),
        };
        match content {
            Ok(tokens) => {
                *member = Member::Delivered { tokens };
                self.pace.leave(&participant, now_ms);
                actions.push(Action::AcceptUpdate { participant, round });
            }
            Err(reason) => {
                // To wait for a better update would hold up the round for somebody who sent a bad one.
                *member = Member::Removed;
                self.pace.leave(&participant, now_ms);
                actions.push(Action::RefuseUpdate { participant: participant.clone(), round, reason });
                actions.push(Action::RemoveMember { participant });
            }
        }
    }

    /// The member whose update is awaited, or why none of this participant is.
    fn member_training(
        &mut self,
        participant: &ParticipantName,
        round: u32,
        attempt: u32,
    ) -> Result<&mut Member, Refusal> {
        let expected = self.round;
        if round < expected {
            return Err(Refusal::Late);
        }
        if round > expected || attempt > self.attempt {
            return Err(Refusal::WrongRound { expected });
        }
        if attempt < self.attempt {
            return Err(Refusal::Abandoned);
        }
        match &mut self.state {
            State::Training { members, .. } => match members.get_mut(participant) {
                Some(member @ Member::Training) => Ok(member),
                Some(Member::Delivered { .. }) => Err(Refusal::Duplicate),
                Some(Member::Removed) => Err(Refusal::Removed),
                None => Err(Refusal::NotInCohort),
            },
            State::Gathering { .. } => Err(Refusal::WrongRound { expected }),
            State::Closing { .. } | State::Finished => Err(Refusal::Late),
        }
    }

    fn close_if_settled(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let quorum = self.quorum();
        match &self.state {
            State::Training { members, closes_ms, .. } => {
                let remaining = members.values().filter(|member| **member != Member::Removed).count();
                let updates = members.values().filter(|member| matches!(member, Member::Delivered { .. })).count();
                let is_due = closes_ms.is_some_and(|closes_ms| now_ms >= closes_ms);
                if remaining < quorum {
                    self.abandon(Abandonment::TooFewMembers { remaining, quorum }, now_ms, actions);
                } else if updates == remaining || (is_due && updates >= quorum) {
                    self.aggregate(now_ms, actions);
                } else if is_due {
                    self.abandon(Abandonment::TooFewUpdates { updates, quorum }, now_ms, actions);
                }
            }
            State::Closing { task, awaited, closes_ms, .. }
                if awaited.is_empty() || closes_ms.is_some_and(|closes_ms| now_ms >= closes_ms) =>
            {
                match task {
                    Closing::Evaluation => self.measure(now_ms, actions),
                    Closing::Measuring => self.finish(FinishReason::Completed, actions),
                }
            }
            State::Closing { .. } | State::Gathering { .. } | State::Finished => {}
        }
    }

    fn aggregate(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let State::Training { members, .. } =
            std::mem::replace(&mut self.state, State::Gathering { since_ms: Some(now_ms) })
        else {
            unreachable!("only a round that is open is aggregated");
        };
        let mut contributions = Vec::new();
        for (participant, member) in members {
            match member {
                Member::Delivered { tokens } => contributions.push(Contribution { participant, tokens }),
                Member::Training => actions.push(Action::RemoveMember { participant }),
                Member::Removed => {}
            }
        }
        let are_here = contributions.iter().all(|member| self.connected.contains_key(&member.participant));
        actions.push(Action::Aggregate { round: self.round, members: contributions });
        self.round += 1;
        (self.attempt, self.abandoned) = (1, 0);
        // Whoever has delivered and is not here has just lost its connection, or has not found a coordinator again that
        // was just started: where something is left to do, it is waited for a while.
        let nothing_is_left = self.federation.evaluate_every == 0 && self.federation.imatrix_tokens == 0;
        if self.is_trained() && (are_here || nothing_is_left) && !self.connected.is_empty() {
            self.evaluate(now_ms, actions);
        }
    }

    fn abandon(&mut self, why: Abandonment, now_ms: u64, actions: &mut Vec<Action>) {
        let (round, attempt) = (self.round, self.attempt);
        actions.push(Action::AbandonRound { round, attempt, why });
        self.abandoned += 1;
        if self.abandoned == ATTEMPTS_MAX {
            return self.finish(FinishReason::Failed { round, attempts: attempt }, actions);
        }
        self.attempt += 1;
        self.state = State::Gathering { since_ms: Some(now_ms) };
    }

    fn finish(&mut self, reason: FinishReason, actions: &mut Vec<Action>) {
        if !matches!(self.state, State::Finished) {
            self.state = State::Finished;
            actions.push(Action::Finish { reason });
        }
    }

    fn start_if_gathered(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let State::Gathering { since_ms } = self.state else { return };
        if self.is_trained() && now_ms >= since_ms.unwrap_or(now_ms).saturating_add(LAST_CALL_MS) {
            return self.evaluate(now_ms, actions);
        }
        let patience_is_over = now_ms >= self.gathered_by(since_ms.unwrap_or(now_ms));
        // A run begins complete; what has begun goes on with a quorum when a full cohort is long in coming.
        let needed = if self.is_unstarted() || !patience_is_over { self.cohort() } else { self.quorum() };
        let missing = needed.saturating_sub(self.connected.len());
        if missing > 0 {
            if self.missing.replace(missing) != Some(missing) {
                actions.push(Action::WaitFor { round: self.round, missing });
            }
            return;
        }
        self.missing = None;
        if self.is_trained() {
            self.evaluate(now_ms, actions);
        } else {
            self.start_round(now_ms, actions);
        }
    }

    fn start_round(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let (round, attempt) = (self.round, self.attempt);
        let rounds_finished = round - 1;
        let cohort = self.draw_cohort();
        let members = cohort.iter().map(|participant| (participant.clone(), Member::Training)).collect();
        // After every so many rounds, and that includes none at all; checked_rem is None when it is never.
        let evaluate = rounds_finished.checked_rem(self.federation.evaluate_every) == Some(0);
        let closes_ms = self.deadline_after(now_ms);
        self.pace.begin(&cohort, evaluate.then_some(Owed::Evaluation), now_ms);
        self.state = State::Training { members, evaluate, lost: BTreeMap::new(), closes_ms };
        let first_step = self.first_step();
        actions.push(Action::StartRound { round, attempt, cohort, first_step, evaluate });
    }

    /// The optimizer step, counted over the whole run, with which the round begins.
    fn first_step(&self) -> u64 {
        u64::from(self.round - 1).saturating_mul(self.federation.local_steps)
    }

    /// Depends on who is connected, never on the order in which they came. Another attempt draws another cohort, since
    /// the member that spoiled the first may be connected still.
    fn draw_cohort(&self) -> Vec<ParticipantName> {
        let names: Vec<&ParticipantName> = self.connected.keys().collect();
        let label = format!("round/{}/attempt/{}/cohort", self.round, self.attempt);
        let mut generator = self.seed.generator(&label);
        let drawn_count = self.cohort().min(names.len());
        let mut drawn = rand::seq::index::sample(&mut generator, names.len(), drawn_count).into_vec();
        drawn.sort_unstable();
        drawn.into_iter().map(|index| names[index].clone()).collect()
    }

    fn is_trained(&self) -> bool {
        self.round > self.federation.rounds
    }

    fn is_unstarted(&self) -> bool {
        self.round == 1 && self.attempt == 1
    }

    fn cohort(&self) -> usize {
        self.federation.cohort as usize
    }

    fn quorum(&self) -> usize {
        self.federation.quorum as usize
    }

    /// When a round that is not the run's first starts with a quorum, if its cohort is still not complete.
    fn gathered_by(&self, since_ms: u64) -> u64 {
        let rejoined_ms = since_ms.saturating_add(REJOIN_MS);
        self.deadline_after(since_ms).map_or(rejoined_ms, |deadline_ms| rejoined_ms.min(deadline_ms))
    }

    fn deadline_after(&self, start_ms: u64) -> Option<u64> {
        let deadline_s = self.federation.deadline_s?;
        Some(start_ms.saturating_add(deadline_s.saturating_mul(1000)))
    }
}

impl ParticipantName {
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ParticipantName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests;

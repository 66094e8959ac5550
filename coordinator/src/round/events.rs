//! What the round machine is told, and what it answers: inputs in the past tense, outputs in the imperative.

use super::{DeviceId, ParticipantName};

/// What has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Joined {
        participant: ParticipantName,
        device: DeviceId,
    },
    /// It was stopped, and may be started again.
    Left {
        participant: ParticipantName,
    },
    /// It has been sent away.
    Departed {
        participant: ParticipantName,
    },
    /// Its connection has broken off, and it may come back.
    Lost {
        participant: ParticipantName,
    },
    /// It is back, but has not kept what it needs to go on within this round.
    CannotResume {
        participant: ParticipantName,
        round: u32,
        attempt: u32,
    },
    /// A step of the open round is done: `step` counts over the whole run.
    StepFinished {
        participant: ParticipantName,
        round: u32,
        step: u64,
    },
    /// So many bytes more have crossed its connection, in either direction.
    Moved {
        participant: ParticipantName,
        bytes: u64,
    },
    /// The disk is full: nobody is answered until it has room again, and nobody is late meanwhile.
    Held,
    Released,
    /// The adapter of `round` finished rounds was evaluated. Only the evaluation after the last round is waited for.
    Evaluated {
        participant: ParticipantName,
        round: u32,
    },
    /// Channel sums that the caller has found in order.
    SumsArrived {
        participant: ParticipantName,
    },
    /// Channel sums that the caller will not have, for what they contain.
    SumsRejected {
        participant: ParticipantName,
    },
    /// No sums are to be waited for: they are there already, or the participant has none to give.
    NothingToMeasure {
        participant: ParticipantName,
    },
    /// An update whose shapes and values the caller has found in order.
    UpdateArrived {
        participant: ParticipantName,
        round: u32,
        attempt: u32,
        tokens: u64,
    },
    /// An update that the caller will not have, for what it contains.
    UpdateRejected {
        participant: ParticipantName,
        round: u32,
        attempt: u32,
    },
    /// Time has passed; see [`Rounds::next_deadline_ms`](super::Rounds::next_deadline_ms).
    Ticked,
    StopRequested,
}

/// What to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    RefuseJoin {
        participant: ParticipantName,
        reason: JoinRefusal,
    },
    /// The device that has just joined was connected already: end its earlier connection.
    Supersede {
        participant: ParticipantName,
    },
    /// Status only: this many more participants must join before `round` starts.
    WaitFor {
        round: u32,
        missing: usize,
    },
    /// Let the cohort, in name order, fetch the adapter, evaluate it if `evaluate` is set, and only then train.
    StartRound {
        round: u32,
        attempt: u32,
        cohort: Vec<ParticipantName>,
        /// The optimizer step, counted over the whole run, with which the round begins.
        first_step: u64,
        evaluate: bool,
    },
    /// Let a member that is back go on where it was. It may be owed the answer to an update that was accepted.
    ResumeMember {
        participant: ParticipantName,
        round: u32,
        attempt: u32,
        first_step: u64,
        evaluate: bool,
    },
    AcceptUpdate {
        participant: ParticipantName,
        round: u32,
    },
    RefuseUpdate {
        participant: ParticipantName,
        round: u32,
        reason: Refusal,
    },
    /// Status only: this member has got nowhere for too long, and is removed next.
    NoteLate {
        participant: ParticipantName,
    },
    /// Nobody waits for this member any longer: take it out of the shared body's barrier and end its round.
    RemoveMember {
        participant: ParticipantName,
    },
    /// Make the next adapter of the accepted updates, in name order. When this is done, the round is finished.
    Aggregate {
        round: u32,
        members: Vec<Contribution>,
    },
    /// Throw away all that this attempt has trained, accepted updates and steps of a shared body included.
    AbandonRound {
        round: u32,
        attempt: u32,
        why: Abandonment,
    },
    /// Let these participants evaluate the adapter of the last round, without training.
    Evaluate {
        round: u32,
        participants: Vec<ParticipantName>,
    },
    /// Let these participants measure their training records with the adapter of the last round.
    Measure {
        participants: Vec<ParticipantName>,
    },
    /// Keep the sums that have arrived, and say so when they are on disk.
    AcceptSums {
        participant: ParticipantName,
    },
    RefuseSums {
        participant: ParticipantName,
        reason: SumsRefusal,
    },
    Finish {
        reason: FinishReason,
    },
}

/// A participant's share in a mean, weighted by the tokens it has trained on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contribution {
    pub participant: ParticipantName,
    pub tokens: u64,
}

/// Why a participant may not join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JoinRefusal {
    #[error(
        "a participant of this name is connected already, and its key is another; if that is this device before it was \
         enrolled anew, join again in half a minute"
    )]
    NameTaken,
    #[error("the run has finished")]
    Finished,
}

/// Why an update does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the update is for a round that has not started; round {expected} is next or open")]
    WrongRound { expected: u32 },
    #[error("the round was closed before the update arrived")]
    Late,
    #[error("the attempt that the update belongs to was abandoned")]
    Abandoned,
    #[error("the participant is not in the cohort of this round")]
    NotInCohort,
    #[error("the participant departed, or had an update refused, earlier in this round")]
    Removed,
    #[error("an update of the participant was accepted already")]
    Duplicate,
    #[error("the update was trained on no tokens")]
    NoTokens,
    #[error("the update has a wrong shape or a value that is not finite")]
    Content,
}

/// Why channel sums do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SumsRefusal {
    #[error("no channel sums of this participant are waited for, or no longer")]
    NotAwaited,
    #[error("the channel sums are not those of this participant's blocks and tokens")]
    Content,
}

/// Why a round was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Abandonment {
    #[error("too few members remain: {remaining} of a quorum of {quorum}")]
    TooFewMembers { remaining: usize, quorum: usize },
    #[error("too few updates had arrived at the deadline: {updates} of a quorum of {quorum}")]
    TooFewUpdates { updates: usize, quorum: usize },
}

/// Why the run is over. Every round that was aggregated before stays valid, whatever the reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    Completed,
    Stopped,
    /// `round` was abandoned `attempts` times.
    Failed {
        round: u32,
        attempts: u32,
    },
}

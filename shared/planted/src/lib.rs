//! Bugs to be planted, so that it can be measured whether the simulator finds them.
//!
//! Each is an easy mistake at one place of the two programs, which asks [`is`] for it. Without the feature `armed` the answer is
//! no, and the compiler takes the question away; nothing but a test arms it.

/// What to forget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Bug {
    /// A commit is answered before it is on disk.
    AnswersBeforeSync = 1,
    /// A journal's new segment begins without the updates that were accepted before it.
    DropsCarriedRecords,
    /// A coordinator that was started again counts an update's sender, but not the update.
    ForgetsUpdates,
    /// A removal is not in the journal.
    ForgetsRemovals,
    /// A step that was committed before is no longer accepted when it comes again.
    RefusesRepeatedCommits,
    /// A shared body's step is applied when all but one have committed it.
    OpensBarrierEarly,
    /// The body's snapshot leaves out what was committed to the open step.
    SnapshotsWithoutCommits,
    /// An abandoned attempt's optimizers stay.
    KeepsAbandonedOptimizers,
    /// A member that is back finds its half-finished step counted.
    KeepsHalfSteps,
    /// A repeated step is computed with the adapter that came out of it.
    RepeatsWithNewAdapter,
    /// A member whose connection breaks off loses its place at once.
    RemovesLostMembers,
    /// A device that is not served yet is sent away for good by a coordinator that fails.
    DropsPeersSilently,
    /// A device commits a step before what it has learned is on its disk.
    CommitsBeforeKept,
    /// A device that goes on within a round takes the batches that come next, and not those of its step.
    ResumesElsewhere,
    /// A device that begins a round again keeps the optimizers of its first attempt.
    KeepsSpoiledOptimizers,
    /// A device that was started again knows its weights, but not how its round began.
    ForgetsRoundStart,
}

impl Bug {
    pub const ALL: [Self; 16] = [
        Self::AnswersBeforeSync,
        Self::DropsCarriedRecords,
        Self::ForgetsUpdates,
        Self::ForgetsRemovals,
        Self::RefusesRepeatedCommits,
        Self::OpensBarrierEarly,
        Self::SnapshotsWithoutCommits,
        Self::KeepsAbandonedOptimizers,
        Self::KeepsHalfSteps,
        Self::RepeatsWithNewAdapter,
        Self::RemovesLostMembers,
        Self::DropsPeersSilently,
        Self::CommitsBeforeKept,
        Self::ResumesElsewhere,
        Self::KeepsSpoiledOptimizers,
        Self::ForgetsRoundStart,
    ];
}

#[cfg(feature = "armed")]
static CHOSEN: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

/// Whether this bug is the one that was chosen.
#[cfg(feature = "armed")]
pub fn is(bug: Bug) -> bool {
    CHOSEN.load(std::sync::atomic::Ordering::Relaxed) == bug as usize
}

#[cfg(not(feature = "armed"))]
pub const fn is(_: Bug) -> bool {
    false
}

/// Chooses a bug for the whole process. False where none can be.
pub fn choose(bug: Option<Bug>) -> bool {
    #[cfg(feature = "armed")]
    CHOSEN.store(bug.map_or(0, |bug| bug as usize), std::sync::atomic::Ordering::Relaxed);
    let _ = bug;
    cfg!(feature = "armed")
}

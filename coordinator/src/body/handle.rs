//! The body's queue: what may be asked of its thread, and the end at which connections and the run loop ask.

use std::sync::Arc;

use experiment::Experiment;
use model::{AdamW, Adapter, ChannelSums, Matrix, Segments, Stage};
use tokio::sync::{mpsc, oneshot};

use super::{Backward, BodyError, Closed, Commit, Forward, Place, RoundKey, Standing, Worker};
use crate::journal::{Journal, Work};
use crate::round::ParticipantName;

/// Jobs that wait at most; a participant has one or two.
const QUEUE_JOBS: usize = 64;

pub(super) enum Job {
    Forward(ForwardJob),
    Backward(BackwardJob),
    Change(Change),
}

/// What may change what a pass computes.
pub(super) enum Change {
    Open {
        key: RoundKey,
        members: Vec<ParticipantName>,
        first_step: u64,
        adapter: Adapter,
    },
    Commit {
        place: Place,
        commit: Commit,
        reply: oneshot::Sender<Result<(), BodyError>>,
    },
    Remove {
        participant: ParticipantName,
    },
    /// What the open round had done before its coordinator was started again.
    Replay {
        work: Vec<Work>,
    },
    Resume {
        participant: ParticipantName,
        session: u64,
        reply: oneshot::Sender<Option<Standing>>,
    },
    /// What a participant's session has measured; it is forgotten.
    TakeMeasured {
        participant: ParticipantName,
        session: u64,
        reply: oneshot::Sender<Option<ChannelSums>>,
    },
    Abandon,
    Close {
        reply: oneshot::Sender<Closed>,
    },
    Optimizers {
        reply: oneshot::Sender<Vec<(String, AdamW)>>,
    },
}

pub(super) struct ForwardJob {
    pub place: Place,
    pub forward: Forward,
    pub segments: Segments,
    pub x: Matrix,
    pub reply: oneshot::Sender<Result<Matrix, BodyError>>,
}

pub(super) struct BackwardJob {
    pub place: Place,
    pub gradient: Matrix,
    pub reply: oneshot::Sender<Result<Backward, BodyError>>,
}

/// The queue's other end.
#[derive(Clone)]
pub struct BodyHandle {
    jobs: mpsc::Sender<Job>,
}

impl BodyHandle {
    /// Starts the thread. `optimizers` continue a run; their names are participants', or empty for the shared body.
    pub fn start(
        experiment: Arc<Experiment>,
        stage: Stage,
        optimizers: Vec<(String, AdamW)>,
        journal: Journal,
    ) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel(QUEUE_JOBS);
        let worker = Worker::new(experiment, stage, optimizers, journal);
        offload::start("body", worker.run(queue))?;
        Ok(Self { jobs })
    }

    /// Opens a round with the body's share of the global adapter.
    pub async fn open(&self, key: RoundKey, members: Vec<ParticipantName>, first_step: u64, adapter: Adapter) {
        self.tell(Job::Change(Change::Open { key, members, first_step, adapter })).await;
    }

    pub async fn forward(
        &self,
        place: Place,
        forward: Forward,
        segments: Segments,
        x: Matrix,
    ) -> Result<Matrix, BodyError> {
        self.ask(|reply| Job::Forward(ForwardJob { place, forward, segments, x, reply }))
            .await
            .unwrap_or(Err(BodyError::Stale))
    }

    pub async fn backward(&self, place: Place, gradient: Matrix) -> Result<Backward, BodyError> {
        self.ask(|reply| Job::Backward(BackwardJob { place, gradient, reply })).await.unwrap_or(Err(BodyError::Stale))
    }

    pub async fn commit(&self, place: Place, commit: Commit) -> Result<(), BodyError> {
        self.ask(|reply| Job::Change(Change::Commit { place, commit, reply })).await.unwrap_or(Err(BodyError::Stale))
    }

    pub async fn remove(&self, participant: ParticipantName) {
        self.tell(Job::Change(Change::Remove { participant })).await;
    }

    /// Does again, in the round that has just been opened, what its journal says.
    pub async fn replay(&self, work: Vec<Work>) {
        self.tell(Job::Change(Change::Replay { work })).await;
    }

    /// A member is back, in a new session: forgets what it has not committed, and says where it stands.
    pub async fn resume(&self, participant: ParticipantName, session: u64) -> Option<Standing> {
        self.ask(|reply| Job::Change(Change::Resume { participant, session, reply })).await.flatten()
    }

    /// Sums over what has gone through the body in this session to be measured; nothing where nothing has.
    pub async fn take_measured(&self, participant: ParticipantName, session: u64) -> Option<ChannelSums> {
        self.ask(|reply| Job::Change(Change::TakeMeasured { participant, session, reply })).await.flatten()
    }

    /// Forgets what the open round has trained.
    pub async fn abandon(&self) {
        self.tell(Job::Change(Change::Abandon)).await;
    }

    pub async fn close(&self) -> Option<Closed> {
        self.ask(|reply| Job::Change(Change::Close { reply })).await
    }

    /// Every optimizer, to be kept with the finished round.
    pub async fn optimizers(&self) -> Vec<(String, AdamW)> {
        self.ask(|reply| Job::Change(Change::Optimizers { reply })).await.unwrap_or_default()
    }

    async fn tell(&self, job: Job) {
        // It fails where the thread has ended, which the next question finds out.
        let _ = self.jobs.send(job).await;
    }

    async fn ask<T>(&self, job: impl FnOnce(oneshot::Sender<T>) -> Job) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.tell(job(reply)).await;
        answer.await.ok()
    }
}

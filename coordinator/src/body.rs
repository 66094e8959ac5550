//! The body's compute: one thread that owns the base weights, their adapters and optimizers, behind a bounded queue.
//!
//! Jobs of several participants interleave; the [`Barrier`] and each member's own count of steps say which may run. What
//! is waiting is computed together, in one pass over the base, each micro-batch with its own adapter: nobody waits for
//! others to come, and nobody's result depends on who was there. The thread never sees a socket or a clock that decides
//! anything (it measures how long it computes, no more). A job that belongs to a round that is over is answered
//! [`BodyError::Stale`].
//!
//! A commit is in the [`Journal`] before it is answered. A member that has lost its connection goes on with the step that
//! it has not committed, and may repeat the one before, of which it may not have had the answer: it gets the same again,
//! and nothing is applied twice.

mod handle;
mod measuring;
mod passes;
mod resume;
mod snapshot;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use experiment::{BodyAdapters, Experiment, SplitMode};
use model::adapter::gradients::clip_factor;
use model::stage::{Lora, Pending};
use model::{AdamW, Adapter, ChannelSums, Gradients, Matrix, ModelError, Stage};
use planted::Bug;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::barrier::{ApplyStep, Barrier, BarrierError, Turn};
use crate::journal::{Entry, Journal, Record};
use crate::round::ParticipantName;
pub use handle::BodyHandle;
use handle::{BackwardJob, Change, ForwardJob, Job};
pub use resume::Standing;
use resume::{Again, digest_of};

/// Tokens of a pass over several micro-batches at most: more would save nothing and take more memory at once.
const PASS_TOKENS_MAX: usize = 2048;
/// Of a snapshot's tensors: what is left of a record takes their names.
const SNAPSHOT_BYTES_MAX: usize = storage::RECORD_BYTES_MAX - (64 << 20);

/// One attempt of one round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundKey {
    pub round: u32,
    pub attempt: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// Nobody's fault: the round has moved on. The stream ends, the connection stays.
    #[error("the round is over")]
    Stale,
    /// The participant's fault.
    #[error(transparent)]
    Order(#[from] BarrierError),
    #[error("{0}")]
    Misplaced(String),
    /// Shapes were checked before, so this is ours.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// A micro-batch's place.
#[derive(Debug, Clone)]
pub struct Place {
    pub key: RoundKey,
    /// What an earlier session of the participant still asks for is stale.
    pub session: u64,
    pub participant: ParticipantName,
    pub step: u64,
    pub micro: u32,
    pub micros: u32,
}

pub enum Forward {
    /// Recorded: a backward follows.
    Train,
    /// Through the adapter the round began with.
    Evaluate,
    /// The same, and what the body's layers are multiplied with is summed for the participant.
    Measure,
}

pub struct Backward {
    pub gradient: Matrix,
    /// Of the whole step, by block; on its last micro-batch.
    pub squared_norms: Option<Vec<f64>>,
}

/// The participant's word that its step is complete.
pub struct Commit {
    pub squared_norms_head: Vec<f64>,
    pub squared_norms_tail: Vec<f64>,
    pub tokens: u64,
}

/// What a round's body work amounted to.
pub struct Closed {
    /// The one body that all members trained.
    pub shared: Option<Adapter>,
    /// The body of each member, where everybody has one.
    pub own: BTreeMap<ParticipantName, Adapter>,
    pub computing: Duration,
    pub idle: Duration,
}

struct Worker {
    experiment: Arc<Experiment>,
    stage: Stage,
    journal: Journal,
    /// Since the last snapshot.
    journaled_bytes: usize,
    /// By participant; the shared body's has the empty name.
    optimizers: BTreeMap<String, AdamW>,
    round: Option<OpenRound>,
    ready: Ready,
    computing: Duration,
    idle: Duration,
}

/// Jobs whose turn has come, to be computed together. A pass is over before anything else happens that could change what
/// it computes.
#[derive(Default)]
struct Ready {
    evaluated: Vec<ForwardJob>,
    recorded: Vec<ForwardJob>,
    backward: Vec<(BackwardJob, Pending)>,
    tokens: usize,
}

struct OpenRound {
    key: RoundKey,
    first_step: u64,
    /// The adapter the round began with, and the optimizers: an abandoned round leaves no trace.
    global: Adapter,
    global_lora: Lora,
    optimizers: BTreeMap<String, AdamW>,
    members: BTreeMap<ParticipantName, Member>,
    /// One body for all, with the barrier that keeps them in step; absent where everybody has a body of its own.
    shared: Option<Shared>,
    /// Forward jobs whose turn has not come.
    waiting: Vec<ForwardJob>,
    /// By participant, with the session whose they are.
    measured: BTreeMap<ParticipantName, (u64, ChannelSums)>,
    /// By participant, step and micro-batch; nothing while the forward pass is under way.
    pending: HashMap<(ParticipantName, u64, u32), Option<Pending>>,
}

struct Shared {
    adapter: Adapter,
    lora: Lora,
    /// The adapter before the last applied step, for members that repeat it.
    before: Option<Adapter>,
    barrier: Barrier,
    /// Clipped gradients of the open step.
    committed: BTreeMap<ParticipantName, Gradients>,
}

struct Member {
    /// The step it works on.
    step: u64,
    micros_done: u32,
    sum: Option<Gradients>,
    /// Its backward passes are complete, its commit is not here yet.
    owes_commit: bool,
    /// Its own body.
    own: Option<(Adapter, Lora)>,
    /// Its own body before its last step.
    before: Option<Adapter>,
    session: u64,
    /// Trained tokens of the steps it has committed.
    tokens: BTreeMap<u64, u64>,
    /// Of its last commit.
    digest: Option<[u8; 32]>,
    /// Its last step, where it may repeat it.
    again: Option<Again>,
}

impl Worker {
    fn new(experiment: Arc<Experiment>, stage: Stage, optimizers: Vec<(String, AdamW)>, journal: Journal) -> Self {
        Self {
            experiment,
            stage,
            journal,
            journaled_bytes: 0,
            optimizers: optimizers.into_iter().collect(),
            round: None,
            ready: Ready::default(),
            computing: Duration::ZERO,
            idle: Duration::ZERO,
        }
    }

    async fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        loop {
            let waited = Instant::now();
            let Some(job) = queue.recv().await else { return };
            self.idle += waited.elapsed();
            let computed = Instant::now();
            self.perform(job).await;
            while let Ok(job) = queue.try_recv() {
                self.perform(job).await;
            }
            self.compute();
            self.computing += computed.elapsed();
        }
    }

    /// A reply nobody waits for belongs to a stream that is gone: dropping it is right.
    async fn perform(&mut self, job: Job) {
        match job {
            Job::Forward(job) => self.forward(job),
            Job::Backward(job) => self.backward(job),
            Job::Change(change) => {
                self.compute();
                self.change(change).await;
            }
        }
    }

    async fn change(&mut self, change: Change) {
        match change {
            Change::Open { key, members, first_step, adapter } => {
                if let Err(error) = self.open(key, members, first_step, adapter) {
                    tracing::error!(%error, "the body cannot take the global adapter");
                    self.round = None;
                }
            }
            Change::Commit { place, commit, reply } => {
                match self.commit(&place, commit) {
                    Err(error) => drop(reply.send(Err(error))),
                    Ok(Some(entry)) => {
                        self.journaled_bytes += entry.bytes();
                        self.journal.append(entry, move || drop(reply.send(Ok(())))).await;
                        self.snapshot_if_due().await;
                    }
                    Ok(None) => self.journal.flush(move || drop(reply.send(Ok(())))).await,
                }
                self.retry_waiting();
            }
            Change::Replay { work } => self.replay(work),
            Change::Resume { participant, session, reply } => drop(reply.send(self.resume(&participant, session))),
            Change::TakeMeasured { participant, session, reply } => {
                drop(reply.send(self.take_measured(&participant, session)));
            }
            Change::Remove { participant } => {
                let record = Record::Removed { participant: participant.to_string() };
                if !planted::is(Bug::ForgetsRemovals) {
                    self.journal.append(Entry::new(record), || {}).await;
                }
                self.remove(&participant);
                self.retry_waiting();
            }
            Change::Abandon => {
                if let Some(round) = self.round.take().filter(|_| !planted::is(Bug::KeepsAbandonedOptimizers)) {
                    self.optimizers = round.optimizers;
                }
            }
            Change::Close { reply } => drop(reply.send(self.close())),
            Change::Optimizers { reply } => {
                drop(reply.send(self.optimizers.iter().map(|(name, o)| (name.clone(), o.clone())).collect()));
            }
        }
    }

    async fn snapshot_if_due(&mut self) {
        if self.journaled_bytes > self.journal.snapshot_bytes() {
            // Without one that no record holds, this round's journal grows.
            if let Some(snapshot) = self.snapshot().filter(|snapshot| snapshot.bytes() <= SNAPSHOT_BYTES_MAX) {
                self.journal.append(snapshot, || {}).await;
            }
            self.journaled_bytes = 0;
        }
    }

    fn open(
        &mut self,
        key: RoundKey,
        members: Vec<ParticipantName>,
        first_step: u64,
        global: Adapter,
    ) -> Result<(), BodyError> {
        let mode = self.experiment.split.mode;
        let own = mode == SplitMode::U && self.experiment.body.adapters == BodyAdapters::PerParticipant;
        let mut states = BTreeMap::new();
        for name in &members {
            let own = match own {
                true => Some((global.clone(), self.stage.attach(&global)?)),
                false => None,
            };
            let member = Member {
                step: first_step,
                micros_done: 0,
                sum: None,
                owes_commit: false,
                own,
                before: None,
                session: 0,
                tokens: BTreeMap::new(),
                digest: None,
                again: None,
            };
            states.insert(name.clone(), member);
        }
        let shared = match mode == SplitMode::U && !own {
            true => Some(Shared {
                adapter: global.clone(),
                lora: self.stage.attach(&global)?,
                before: None,
                barrier: Barrier::new(members, first_step, self.experiment.federation.local_steps),
                committed: BTreeMap::new(),
            }),
            false => None,
        };
        self.round = Some(OpenRound {
            key,
            first_step,
            global_lora: self.stage.attach(&global)?,
            global,
            optimizers: self.optimizers.clone(),
            members: states,
            shared,
            waiting: Vec::new(),
            measured: BTreeMap::new(),
            pending: HashMap::new(),
        });
        Ok(())
    }

    /// Finds whether a forward pass may run, and leaves it to [`compute`](Self::compute).
    fn forward(&mut self, job: ForwardJob) {
        // Its participant's gradient may be what it comes behind.
        if self.ready.backward.iter().any(|(backward, _)| backward.place.participant == job.place.participant) {
            self.compute();
        }
        let Some(round) = self.round.as_mut().filter(|round| round.key == job.place.key) else {
            return drop(job.reply.send(Err(BodyError::Stale)));
        };
        if let Err(error) = self.stage.check_activations(&job.x, &job.segments) {
            return drop(job.reply.send(Err(error.into())));
        }
        if matches!(job.forward, Forward::Measure) {
            return self.measure(job);
        }
        let recorded = match (&job.forward, self.experiment.split.mode) {
            (Forward::Evaluate | Forward::Measure, _) | (_, SplitMode::ForwardOnly | SplitMode::Whole) => false,
            (Forward::Train, SplitMode::U) => true,
        };
        if recorded {
            match round.turn(&job.place, self.experiment.federation.local_steps) {
                Err(error) => return drop(job.reply.send(Err(error))),
                Ok(Turn::Wait) => return round.waiting.push(job),
                Ok(Turn::Now) => {}
            }
            if let Err(error) = round.prepare_again(&job.place, &self.stage) {
                return drop(job.reply.send(Err(error)));
            }
            round.pending.insert(job.place.pass(), None);
        }
        self.make_room(job.segments.tokens());
        if recorded { self.ready.recorded.push(job) } else { self.ready.evaluated.push(job) }
    }

    /// Finds whether a backward pass may run, and leaves it to [`compute`](Self::compute).
    fn backward(&mut self, job: BackwardJob) {
        let round = self.round.as_mut().filter(|round| round.key == job.place.key);
        let Some(round) = round.filter(|round| round.members.contains_key(&job.place.participant)) else {
            return drop(job.reply.send(Err(BodyError::Stale)));
        };
        if let Err(error) = round.check_session(&job.place) {
            return drop(job.reply.send(Err(error)));
        }
        let Some(pending) = round.pending.get_mut(&job.place.pass()).and_then(Option::take) else {
            let early = BodyError::Misplaced("a gradient came before its forward pass".into());
            return drop(job.reply.send(Err(early)));
        };
        round.pending.remove(&job.place.pass());
        if let Err(error) = pending.check_gradient(&job.gradient) {
            return drop(job.reply.send(Err(error.into())));
        }
        self.make_room(job.gradient.rows());
        self.ready.backward.push((job, pending));
    }

    /// The record of a commit that counts; none where the step is repeated.
    fn commit(&mut self, place: &Place, commit: Commit) -> Result<Option<Entry>, BodyError> {
        let round = self.round.as_mut().filter(|round| round.key == place.key).ok_or(BodyError::Stale)?;
        let member = round.members.get_mut(&place.participant).ok_or(BodyError::Stale)?;
        member.check_session(place)?;
        let Place { participant, step, .. } = place;
        let is_trained = self.experiment.split.mode == SplitMode::U;
        let again = member.again.take_if(|again| again.step == *step);
        let sum = match &again {
            _ if !is_trained => None,
            Some(again) if again.owes_commit => again.sum.clone(),
            None if member.owes_commit && member.step == *step => member.sum.take(),
            _ => return Err(BodyError::Misplaced(format!("step {step} was committed before its gradients"))),
        };
        let Commit { squared_norms_head, squared_norms_tail, tokens } = commit;
        let gradients = sum.map(|mut gradients| {
            let norms = [squared_norms_head, gradients.squared_norms(&round.global), squared_norms_tail].concat();
            gradients.scale(clip_factor(norms, self.experiment.training.clip_norm));
            gradients
        });
        if (again.is_some() || *step < member.step) && !planted::is(Bug::RefusesRepeatedCommits) {
            return match member.digest == Some(digest_of(*step, tokens, gradients.as_ref())) {
                true => Ok(None),
                false => Err(BodyError::Misplaced(format!("step {step} was committed before, with other gradients"))),
            };
        }
        let tensors = gradients.as_ref().map_or(Vec::new(), |gradients| gradients.tensors().to_vec());
        let record = Record::Committed { participant: participant.to_string(), step: *step, tokens };
        self.settle(participant, *step, tokens, gradients)?;
        Ok(Some(Entry { record, tensors }))
    }

    /// Counts a member's step. `gradients` are clipped, and absent where the body does not train.
    fn settle(
        &mut self,
        participant: &ParticipantName,
        step: u64,
        tokens: u64,
        gradients: Option<Gradients>,
    ) -> Result<(), BodyError> {
        let round = self.round.as_mut().ok_or(BodyError::Stale)?;
        let member = round.members.get_mut(participant).ok_or(BodyError::Stale)?;
        if step != member.step {
            let expected = member.step;
            return Err(BodyError::Misplaced(format!("step {step} was committed where step {expected} was due")));
        }
        member.digest = Some(digest_of(step, tokens, gradients.as_ref()));
        member.tokens.insert(step, tokens);
        (member.step, member.micros_done, member.owes_commit) = (step + 1, 0, false);
        let Some(gradients) = gradients else { return Ok(()) };
        let rate = self.experiment.training.learning_rate_at(step, self.experiment.total_steps());
        let training = &self.experiment.training;
        if let Some((adapter, lora)) = &mut member.own {
            let name = participant.as_str();
            let optimizer = self.optimizers.entry(name.into()).or_insert_with(|| AdamW::new(training, adapter));
            member.before = Some(adapter.clone());
            optimizer.step(adapter, &gradients, rate);
            *lora = self.stage.attach(adapter)?;
            return Ok(());
        }
        let shared = round.shared.as_mut().expect("a body is shared where it is nobody's own");
        shared.committed.insert(participant.clone(), gradients);
        let applied = shared.barrier.committed(participant, step, tokens)?;
        self.apply(applied)
    }

    /// Moves the shared body by the token-weighted mean of the members' gradients.
    fn apply(&mut self, applied: Option<ApplyStep>) -> Result<(), BodyError> {
        let Some(ApplyStep { step, contributions }) = applied else { return Ok(()) };
        let Some(shared) = self.round.as_mut().and_then(|round| round.shared.as_mut()) else { return Ok(()) };
        let total: u64 = contributions.iter().map(|contribution| contribution.tokens).sum();
        let mut committed = std::mem::take(&mut shared.committed);
        let mut mean: Option<Gradients> = None;
        for contribution in contributions {
            let Some(mut gradients) = committed.remove(&contribution.participant) else { continue };
            // With one member the share is 1 and the gradient keeps its bits.
            let share = (contribution.tokens as f64 / total as f64) as f32;
            match &mut mean {
                Some(mean) => mean.add_scaled(&gradients, share),
                none => {
                    gradients.scale(share);
                    *none = Some(gradients);
                }
            }
        }
        let Some(mean) = mean else { return Ok(()) };
        let rate = self.experiment.training.learning_rate_at(step, self.experiment.total_steps());
        let training = &self.experiment.training;
        let optimizer = self.optimizers.entry(String::new()).or_insert_with(|| AdamW::new(training, &shared.adapter));
        shared.before = Some(shared.adapter.clone());
        optimizer.step(&mut shared.adapter, &mean, rate);
        shared.lora = self.stage.attach(&shared.adapter)?;
        Ok(())
    }

    fn remove(&mut self, participant: &ParticipantName) {
        let Some(round) = self.round.as_mut() else { return };
        // What a member that has finished contributed stays, and its own body is still to be aggregated.
        let end = round.first_step + self.experiment.federation.local_steps;
        if round.members.get(participant).is_some_and(|member| member.step == end) {
            return;
        }
        round.members.remove(participant);
        round.pending.retain(|(name, ..), _| name != participant);
        round.waiting.retain(|job| job.place.participant != *participant);
        let applied = round.shared.as_mut().and_then(|shared| {
            shared.committed.remove(participant);
            shared.barrier.removed(participant)
        });
        if let Err(error) = self.apply(applied) {
            tracing::error!(%error, "the body cannot go on without the departed participant");
        }
    }

    fn close(&mut self) -> Closed {
        let (computing, idle) = (std::mem::take(&mut self.computing), std::mem::take(&mut self.idle));
        let Some(round) = self.round.take() else {
            return Closed { shared: None, own: BTreeMap::new(), computing, idle };
        };
        let own = round.members.into_iter().filter_map(|(name, member)| Some((name, member.own?.0))).collect();
        Closed { shared: round.shared.map(|shared| shared.adapter), own, computing, idle }
    }
}

impl Place {
    fn pass(&self) -> (ParticipantName, u64, u32) {
        (self.participant.clone(), self.step, self.micro)
    }
}

impl OpenRound {
    /// Whether a recorded forward may run now. Micro-batches come in order; the next step's first may come before the
    /// commit that frees it, and waits.
    fn turn(&self, place: &Place, local_steps: u64) -> Result<Turn, BodyError> {
        let Place { participant, step, micro, micros, .. } = place;
        let member = self.members.get(participant).ok_or(BodyError::Stale)?;
        member.check_session(place)?;
        if let Some(again) = member.again.as_ref().filter(|again| again.step == *step) {
            let is_due = *micro == again.micros_done && micro < micros && !again.owes_commit;
            return match is_due && !self.pending.contains_key(&place.pass()) {
                true => Ok(Turn::Now),
                false => Err(BodyError::Misplaced(format!("step {step}, micro-batch {micro} came out of order"))),
            };
        }
        let misplaced = || {
            let (expected, done) = (member.step, member.micros_done);
            let what =
                format!("step {step}, micro-batch {micro} came where step {expected}, micro-batch {done} was due");
            Err(BodyError::Misplaced(what))
        };
        if *step == member.step + 1 && *micro == 0 && member.owes_commit {
            return Ok(Turn::Wait);
        }
        let (known, ended) =
            (self.pending.contains_key(&(participant.clone(), *step, *micro)), self.first_step + local_steps);
        if *step != member.step
            || member.owes_commit
            || *micro != member.micros_done
            || micro >= micros
            || known
            || *step >= ended
        {
            return misplaced();
        }
        match &self.shared {
            Some(shared) => Ok(shared.barrier.forward(participant, *step)?),
            None => Ok(Turn::Now),
        }
    }

    fn lora_of(&self, place: &Place) -> &Lora {
        let member = self.members.get(&place.participant);
        if let Some(lora) = member.and_then(|member| member.again.as_ref()?.lora_for(place.step)) {
            return lora;
        }
        let own = member.and_then(|member| member.own.as_ref());
        match (own, &self.shared) {
            (Some((_, lora)), _) => lora,
            (None, Some(shared)) => &shared.lora,
            (None, None) => &self.global_lora,
        }
    }
}

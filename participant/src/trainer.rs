//! One participant's side of training: head and tail, their adapters and optimizers, and the steps through them.
//!
//! [`Trainer::step`] reads like the protocol. It knows neither sockets nor rounds: the body is behind [`BodyLink`], and
//! where the whole model is on this machine there is none.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use experiment::{Experiment, Seed, SplitMode, Strategy};
use model::adapter::gradients::clip_factor;
use model::stage::{Dropout, Input, Lora, Loss};
use model::{AdamW, Adapter, AdapterConfig, ComputeDevice, Cut, Gradients, Matrix, Part, Segments, Source, Stage};
use planted::Bug;
use tokio::time::Instant;

use crate::ParticipantError;
use crate::body_link::BodyLink;
use crate::data::{MicroBatch, Position};
use crate::dataset::Dataset;
use crate::keep::{Found, Keeper};
use crate::stages::LoadedStages;

mod measure;
mod progress;

use progress::Progress;

pub struct Trainer {
    experiment: Arc<Experiment>,
    name: String,
    /// Absent where the whole model is here.
    head: Option<Side>,
    /// The tail, or the whole model.
    tail: Side,
    data: Dataset,
    /// What the round in progress began with.
    start: Option<RoundStart>,
    /// The same of the round before, which a coordinator that has lost it may ask for again.
    start_before: Option<RoundStart>,
    /// How far the round in progress has come.
    progress: Option<Progress>,
    keeper: Option<Keeper>,
}

/// A run of blocks that never leaves this machine.
struct Side {
    stage: Arc<Stage>,
    adapter: Adapter,
    /// `adapter`, on the device.
    lora: Lora,
    /// Absent where the experiment does not train this side.
    optimizer: Option<AdamW>,
}

/// An abandoned round is trained again from here, so that it ends as it would have ended at once.
struct RoundStart {
    round: u32,
    optimizers: [Option<AdamW>; 2],
    position: Position,
    /// The global adapters of head and tail: FedProx pulls towards them.
    global: [Option<Adapter>; 2],
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    pub step: u64,
    /// Mean per trained token.
    pub loss_nats: f64,
    pub tokens: u64,
    pub compute_ms: f64,
    pub wait_ms: f64,
}

impl Trainer {
    /// Loads this participant's parts of the model: head and tail, or all of it where `cut` is absent.
    pub fn new(
        experiment: Arc<Experiment>,
        name: &str,
        source: &dyn Source,
        cut: Option<Cut>,
        device: &ComputeDevice,
        data: Dataset,
        stages: &mut LoadedStages<'_>,
    ) -> Result<Self, ParticipantError> {
        let blocks = source.config().blocks;
        let trains_head = experiment.split.mode == SplitMode::U;
        let mut side = |part: Part, trains: bool| -> Result<Side, ParticipantError> {
            let config = AdapterConfig::new(&experiment.adapter);
            let adapter = Adapter::seeded(config, source.config(), part.blocks.clone(), Seed(experiment.seed))?;
            let stage = stages.load(source, part, device)?;
            let lora = stage.attach(&adapter)?;
            let optimizer = trains.then(|| AdamW::new(&experiment.training, &adapter));
            Ok(Side { stage, adapter, lora, optimizer })
        };
        let (head, tail) = match cut {
            None => (None, side(Part::whole(blocks), true)?),
            Some(cut) => {
                let [head, _, tail] = cut.parts(blocks)?;
                let head = side(head, trains_head)?;
                let tail = side(tail, true)?;
                (Some(head), tail)
            }
        };
        let name = name.to_owned();
        Ok(Self { experiment, name, head, tail, data, start: None, start_before: None, progress: None, keeper: None })
    }

    /// This participant's share of the adapter as it stands, in model order.
    pub fn adapter(&self) -> Adapter {
        let sides = self.head.iter().chain([&self.tail]).map(|side| side.adapter.clone());
        Adapter::join(sides).expect("head and tail are disjoint parts of one adapter")
    }

    /// The share that an update sends: the sides that train.
    pub fn update(&self) -> Adapter {
        let sides = self.head.iter().chain([&self.tail]).filter(|side| side.optimizer.is_some());
        Adapter::join(sides.map(|side| side.adapter.clone())).expect("the tail always trains")
    }

    /// Takes the global adapter of `round`, whose first step is `first_step`. Optimizer moments and the place in the data
    /// go on from the round before, or back to where they were if this very round was begun before.
    pub async fn begin_round(
        &mut self,
        (round, attempt): (u32, u32),
        first_step: u64,
        adapter: &Adapter,
    ) -> Result<(), ParticipantError> {
        let again = self.start.take_if(|start| start.round == round);
        let is_new = again.is_none();
        let again = again.or(self.start_before.take_if(|start| start.round == round));
        if again.is_none() && (round == 1 || self.has_begun(round)) {
            // What is kept is of a run that was here before, or of rounds that the coordinator has lost.
            self.begin_anew()?;
        }
        if let Some(start) = again {
            let [head, tail] = match planted::is(Bug::KeepsSpoiledOptimizers) {
                true => [self.head.as_ref().and_then(|side| side.optimizer.clone()), self.tail.optimizer.clone()],
                false => start.optimizers,
            };
            if let Some(side) = &mut self.head {
                side.optimizer = head;
            }
            self.tail.optimizer = tail;
            self.data.batches.seek(start.position)?;
        }
        for side in self.head.iter_mut().chain([&mut self.tail]) {
            side.adapter = adapter.part(side.stage.part().blocks.clone());
            side.lora = side.stage.attach(&side.adapter)?;
        }
        let head = self.head.as_ref();
        if is_new {
            self.start_before = self.start.take().filter(|start| start.round < round);
        }
        self.start = Some(RoundStart {
            round,
            optimizers: [head.and_then(|side| side.optimizer.clone()), self.tail.optimizer.clone()],
            position: self.data.batches.position(),
            global: [head.map(|side| side.adapter.clone()), Some(self.tail.adapter.clone())],
        });
        self.progress = Some(Progress::at_start((round, attempt), first_step, self.data.batches.position()));
        if is_new {
            // On disk before anything that rests on it.
            self.keep_start().await?;
            self.settled().await?;
        }
        self.keep_step().await
    }

    /// As if nothing had ever been trained.
    fn begin_anew(&mut self) -> Result<(), ParticipantError> {
        for side in self.head.iter_mut().chain([&mut self.tail]) {
            if let Some(optimizer) = &mut side.optimizer {
                *optimizer = AdamW::new(&self.experiment.training, &side.adapter);
            }
        }
        Ok(self.data.batches.seek(Position { epoch: 0, micro_batch: 0 })?)
    }

    /// Loss on the held-out records of the adapter as it stands, summed.
    pub async fn evaluate(&self, body: Option<&BodyLink>) -> Result<Loss, ParticipantError> {
        self.evaluate_with(self.head.as_ref().map(|head| &head.lora), &self.tail.lora, body).await
    }

    /// The same of another adapter, in the middle of a round.
    pub async fn evaluate_adapter(&self, adapter: &Adapter, body: Option<&BodyLink>) -> Result<Loss, ParticipantError> {
        let attach = |side: &Side| side.stage.attach(&adapter.part(side.stage.part().blocks.clone()));
        let (head, tail) = (self.head.as_ref().map(attach).transpose()?, attach(&self.tail)?);
        self.evaluate_with(head.as_ref(), &tail, body).await
    }

    async fn evaluate_with(
        &self,
        head_lora: Option<&Lora>,
        tail_lora: &Lora,
        body: Option<&BodyLink>,
    ) -> Result<Loss, ParticipantError> {
        let mut total = Loss { nats: 0.0, tokens: 0 };
        for (micro, batch) in self.data.held_out.iter().enumerate() {
            let segments = segments_of(batch)?;
            let loss = match (&self.head, head_lora, body) {
                (Some(head), Some(head_lora), Some(body)) => {
                    let x = compute(|| head.stage.forward(Input::Tokens(&batch.tokens), &segments, head_lora))?;
                    let x = body.evaluate(micro as u32, batch, x).await?;
                    compute(|| self.tail.stage.loss(Input::Activations(x), &segments, &batch.targets, tail_lora))?
                }
                _ => compute(|| {
                    self.tail.stage.loss(Input::Tokens(&batch.tokens), &segments, &batch.targets, tail_lora)
                })?,
            };
            total.nats += loss.nats;
            total.tokens += loss.tokens;
        }
        Ok(total)
    }

    /// One optimizer step, number `step` of the run.
    pub async fn step(&mut self, step: u64, body: Option<&BodyLink>) -> Result<StepReport, ParticipantError> {
        let begun = Instant::now();
        let micro_batches = self.data.batches.next().expect("batches never end");
        let tokens: usize = micro_batches.iter().map(|batch| batch.trained_tokens as usize).sum();
        let micros = micro_batches.len() as u32;
        let mut work =
            Work { step, micros, step_tokens: tokens as u32, waited: Duration::ZERO, nats: 0.0, sums: [None, None] };
        for (micro, batch) in micro_batches.iter().enumerate() {
            let micro = micro as u32;
            let label = format!("dropout/{}/{step}/{micro}", self.name);
            let dropout = Dropout { seed: Seed(self.experiment.seed).bytes(&label) };
            match (&self.head, body) {
                (Some(_), Some(body)) => self.split_micro_batch(&mut work, micro, batch, &dropout, body).await?,
                _ => self.whole_micro_batch(&mut work, micro, batch, &dropout)?,
            }
        }
        let report = self.report_of(step, tokens, begun, &work);
        if let Some(progress) = &mut self.progress {
            progress.stepped(report, self.data.batches.position());
        }
        self.keep_step().await?;
        Ok(report)
    }

    fn report_of(&self, step: u64, tokens: usize, begun: Instant, work: &Work) -> StepReport {
        let &Work { nats, waited, .. } = work;
        let milliseconds = |duration: Duration| duration.as_secs_f64() * 1e3;
        StepReport {
            step,
            loss_nats: nats / tokens as f64,
            tokens: tokens as u64,
            compute_ms: milliseconds(begun.elapsed().saturating_sub(waited)),
            wait_ms: milliseconds(waited),
        }
    }

    fn whole_micro_batch(
        &mut self,
        work: &mut Work,
        micro: u32,
        batch: &MicroBatch,
        dropout: &Dropout,
    ) -> Result<(), ParticipantError> {
        let segments = segments_of(batch)?;
        let tokens = Input::Tokens(&batch.tokens);
        let Side { stage, lora, .. } = &self.tail;
        let (loss, backward) = compute(|| {
            stage.loss_backward(tokens, &segments, &batch.targets, work.step_tokens as usize, lora, dropout, false)
        })?;
        work.nats += loss.nats;
        work.add(1, backward.adapter);
        if micro + 1 == work.micros {
            let gradients = self.finished_gradients(work);
            let norms = self.squared_norms(&gradients, 1);
            self.apply(work.step, gradients, clip_factor(norms, self.experiment.training.clip_norm))?;
        }
        Ok(())
    }

    async fn split_micro_batch(
        &mut self,
        work: &mut Work,
        micro: u32,
        batch: &MicroBatch,
        dropout: &Dropout,
        body: &BodyLink,
    ) -> Result<(), ParticipantError> {
        let segments = segments_of(batch)?;
        let head = self.head.as_ref().expect("the caller has matched it");
        let tokens = Input::Tokens(&batch.tokens);
        let trains_head = head.optimizer.is_some();
        let (x, head_pending) = compute(|| match trains_head {
            true => head.stage.forward_recorded(tokens, &segments, &head.lora, dropout).map(|(x, p)| (x, Some(p))),
            false => head.stage.forward(tokens, &segments, &head.lora).map(|x| (x, None)),
        })?;

        let asked = Instant::now();
        let mut exchange = body.train(work.step, micro, work.micros, work.step_tokens, batch, x).await?;
        let y: Matrix = exchange.body_output().await?;
        work.waited += asked.elapsed();

        let Side { stage, lora, .. } = &self.tail;
        let step_tokens = work.step_tokens as usize;
        let (loss, backward) = compute(|| {
            stage.loss_backward(
                Input::Activations(y),
                &segments,
                &batch.targets,
                step_tokens,
                lora,
                dropout,
                trains_head,
            )
        })?;
        work.nats += loss.nats;
        work.add(1, backward.adapter);
        if let (Some(pending), Some(tail_gradient)) = (head_pending, backward.input) {
            let asked = Instant::now();
            let head_gradient = exchange.cut_gradient(tail_gradient).await?;
            work.waited += asked.elapsed();
            work.add(0, compute(|| pending.backward(head_gradient))?.adapter);
        }
        if micro + 1 < work.micros {
            exchange.end().await?;
            return Ok(());
        }

        // Who is behind by more than one step when it is killed could not go on.
        if !planted::is(Bug::CommitsBeforeKept) {
            self.settled().await?;
        }
        let gradients = self.finished_gradients(work);
        let [head_norms, tail_norms] = [0, 1].map(|side| self.squared_norms(&gradients, side));
        let factor = if trains_head {
            let asked = Instant::now();
            let body_norms = exchange.commit(&head_norms, &tail_norms).await?;
            work.waited += asked.elapsed();
            clip_factor([head_norms, body_norms, tail_norms].concat(), self.experiment.training.clip_norm)
        } else {
            exchange.end().await?;
            clip_factor(tail_norms, self.experiment.training.clip_norm)
        };
        self.apply(work.step, gradients, factor)
    }

    /// The step's gradients with FedProx' term, which counts towards the norm like the rest.
    fn finished_gradients(&self, work: &mut Work) -> [Option<Gradients>; 2] {
        let mut gradients = std::mem::take(&mut work.sums);
        if let (Strategy::FedProx { mu }, Some(start)) = (&self.experiment.federation.strategy, &self.start) {
            let sides = [self.head.as_ref(), Some(&self.tail)];
            for ((gradients, side), global) in gradients.iter_mut().zip(sides).zip(&start.global) {
                if let (Some(gradients), Some(side), Some(global)) = (gradients, side, global) {
                    gradients.add_proximal(*mu as f32, &side.adapter, global);
                }
            }
        }
        gradients
    }

    fn squared_norms(&self, gradients: &[Option<Gradients>; 2], side: usize) -> Vec<f64> {
        let adapter = if side == 0 { self.head.as_ref().map(|head| &head.adapter) } else { Some(&self.tail.adapter) };
        match (&gradients[side], adapter) {
            (Some(gradients), Some(adapter)) => gradients.squared_norms(adapter),
            _ => Vec::new(),
        }
    }

    fn apply(&mut self, step: u64, gradients: [Option<Gradients>; 2], factor: f32) -> Result<(), ParticipantError> {
        let rate = self.experiment.training.learning_rate_at(step, self.experiment.total_steps());
        let sides = [self.head.as_mut(), Some(&mut self.tail)];
        for (side, gradients) in sides.into_iter().zip(gradients) {
            let (Some(side), Some(mut gradients)) = (side, gradients) else { continue };
            let Some(optimizer) = &mut side.optimizer else { continue };
            gradients.scale(factor);
            optimizer.step(&mut side.adapter, &gradients, rate);
            side.lora = side.stage.attach(&side.adapter)?;
        }
        Ok(())
    }
}

/// What the micro-batches of one step add up to.
struct Work {
    step: u64,
    micros: u32,
    /// Trained tokens of the whole step.
    step_tokens: u32,
    waited: Duration,
    nats: f64,
    /// Gradients of head and tail.
    sums: [Option<Gradients>; 2],
}

impl Work {
    fn add(&mut self, side: usize, gradients: Gradients) {
        match &mut self.sums[side] {
            Some(sum) => sum.add(&gradients),
            none => *none = Some(gradients),
        }
    }
}

fn segments_of(batch: &MicroBatch) -> Result<Segments, ParticipantError> {
    Ok(Segments::new(batch.segments.iter().map(|&length| length as usize).collect())?)
}

/// Runs tensor work where it does not hold up the network.
fn compute<T>(work: impl FnOnce() -> T) -> T {
    offload::in_place(work)
}

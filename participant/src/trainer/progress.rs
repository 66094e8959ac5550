//! How far a round has come, in memory and on disk, and how a device goes on with it.

use super::{AdamW, Adapter, Found, Keeper, ParticipantError, Path, Position, RoundStart, Side, StepReport, Trainer};
use crate::keep::{KeptReport, StartHeader, StepHeader, payload};
use experiment::SplitMode;
use planted::Bug;
use sha2::{Digest, Sha256};
use storage::{Disk, Identity};

/// Reports that are kept in case the coordinator has not had them; it lacks the newest few at most.
const REPORTS_MAX: usize = 256;

pub(super) struct Progress {
    round: u32,
    attempt: u32,
    next_step: u64,
    /// In the data, behind the last finished step.
    position: Position,
    nats: f64,
    tokens: u64,
    reports: Vec<StepReport>,
}

impl Progress {
    pub(super) fn at_start((round, attempt): (u32, u32), first_step: u64, position: Position) -> Self {
        Self { round, attempt, next_step: first_step, position, nats: 0.0, tokens: 0, reports: Vec::new() }
    }

    pub(super) fn stepped(&mut self, report: StepReport, position: Position) {
        (self.next_step, self.position) = (report.step + 1, position);
        self.nats += report.loss_nats * report.tokens as f64;
        self.tokens += report.tokens;
        if self.reports.len() == REPORTS_MAX {
            self.reports.remove(0);
        }
        self.reports.push(report);
    }
}

impl Trainer {
    /// Keeps what it learns in `directory` from now on, and goes on from what is there already, if it is this training's.
    pub fn keep_in(&mut self, disk: &Disk, directory: &Path, model_digest: [u8; 32]) -> Result<(), ParticipantError> {
        let identity = self.identity(model_digest);
        let (keeper, found) = Keeper::open(disk, directory, identity)?;
        self.keeper = Some(keeper);
        let Found { steps, starts } = found;
        // Newest first; one that does not fit is as good as none.
        let mut starts = starts.into_iter().filter_map(|(header, tensors)| self.start_from(header, tensors));
        let start = starts.next();
        let newest = start.as_ref().map_or(0, |start| start.round);
        // An older run's rounds may be later ones.
        let start_before = starts.next().filter(|start| start.round < newest);
        let is_restored = steps.into_iter().any(|(header, tensors)| self.restore(header, tensors).is_some());
        // Without its last step a device still knows how its round began.
        if start.is_some() && !is_restored {
            tracing::warn!("the state after the last step is damaged or missing; the round is trained again");
        }
        if !planted::is(Bug::ForgetsRoundStart) {
            (self.start, self.start_before) = (start, start_before);
        }
        Ok(())
    }

    /// What a snapshot belongs to: this experiment, model, name and amount of data.
    fn identity(&self, model_digest: [u8; 32]) -> Identity {
        let [sequences, tokens] = self.data.batches.size();
        let mut identity = Sha256::new();
        identity.update(b"headwater training");
        identity.update(self.experiment.digest());
        identity.update(model_digest);
        identity.update(sequences.to_le_bytes());
        identity.update(tokens.to_le_bytes());
        identity.update(self.name.as_bytes());
        identity.finalize().into()
    }

    /// Gets ready to go on with `step` of a round, or with the one before it, of whose commit the answer may be missing.
    /// False where this device is not there.
    pub fn resume(&mut self, (round, attempt): (u32, u32), step: u64) -> Result<bool, ParticipantError> {
        let Some(progress) =
            self.progress.as_ref().filter(|progress| (progress.round, progress.attempt) == (round, attempt))
        else {
            return Ok(false);
        };
        let is_near = progress.next_step == step || progress.next_step + 1 == step;
        // Where nobody else sees the steps, nobody else can say where they are.
        if self.experiment.split.mode != SplitMode::Whole && !is_near {
            return Ok(false);
        }
        // A step that broke off has taken its batches.
        if !planted::is(Bug::ResumesElsewhere) {
            self.data.batches.seek(progress.position)?;
        }
        Ok(true)
    }

    /// Whether `round`, or one behind it, was begun here before.
    pub(super) fn has_begun(&self, round: u32) -> bool {
        self.progress.as_ref().is_some_and(|progress| progress.round >= round)
    }

    /// The step that comes next in the round in progress.
    pub fn next_step(&self) -> u64 {
        self.progress.as_ref().map_or(0, |progress| progress.next_step)
    }

    /// Trained tokens of the round so far, and their mean loss.
    pub fn trained(&self) -> (u64, f64) {
        self.progress
            .as_ref()
            .map_or((0, f64::NAN), |progress| (progress.tokens, progress.nats / progress.tokens as f64))
    }

    /// The reports of the round's steps from `step` on.
    pub fn reports_from(&self, step: u64) -> Vec<StepReport> {
        let reports = self.progress.iter().flat_map(|progress| &progress.reports);
        reports.filter(|report| report.step >= step).copied().collect()
    }

    /// Returns once what this device has learned is on its disk.
    pub async fn settled(&mut self) -> Result<(), ParticipantError> {
        match &mut self.keeper {
            Some(keeper) => keeper.settled().await,
            None => Ok(()),
        }
    }

    pub(super) async fn keep_step(&mut self) -> Result<(), ParticipantError> {
        let payload = self.step_payload();
        match (&mut self.keeper, payload) {
            (Some(keeper), Some(payload)) => keeper.keep_step(payload).await,
            _ => Ok(()),
        }
    }

    pub(super) async fn keep_start(&mut self) -> Result<(), ParticipantError> {
        let payload = self.start_payload();
        match (&mut self.keeper, payload) {
            (Some(keeper), Some(payload)) => keeper.keep_start(payload).await,
            _ => Ok(()),
        }
    }

    fn step_payload(&self) -> Option<Vec<u8>> {
        let progress = self.progress.as_ref().filter(|_| self.keeper.is_some())?;
        let sides = || self.head.iter().chain([&self.tail]);
        let reports = progress.reports.iter().map(|report| KeptReport {
            step: report.step,
            loss_nats_bits: report.loss_nats.to_bits(),
            tokens: report.tokens,
            compute_ms: report.compute_ms,
            wait_ms: report.wait_ms,
        });
        let header = StepHeader {
            round: progress.round,
            attempt: progress.attempt,
            next_step: progress.next_step,
            position: numbers(progress.position),
            loss_nats_bits: progress.nats.to_bits(),
            tokens: progress.tokens,
            optimizer_steps: sides().filter_map(|side| side.optimizer.as_ref()).map(AdamW::steps).collect(),
            reports: reports.collect(),
        };
        let tensors = sides().flat_map(|side| values(&side.adapter).chain(moments(side.optimizer.as_ref())));
        Some(payload(&header, tensors))
    }

    fn start_payload(&self) -> Option<Vec<u8>> {
        let start = self.start.as_ref().filter(|_| self.keeper.is_some())?;
        let header = StartHeader {
            round: start.round,
            position: numbers(start.position),
            optimizer_steps: start.optimizers.iter().flatten().map(AdamW::steps).collect(),
        };
        let sides = start.global.iter().zip(&start.optimizers);
        let tensors =
            sides.flat_map(|(global, optimizer)| global.iter().flat_map(values).chain(moments(optimizer.as_ref())));
        Some(payload(&header, tensors))
    }

    /// None, and nothing changed, where the snapshot does not fit.
    fn restore(&mut self, header: StepHeader, tensors: Vec<Vec<f32>>) -> Option<()> {
        let StepHeader { round, attempt, next_step, position, loss_nats_bits, tokens, optimizer_steps, reports } =
            header;
        let position = Position { epoch: position[0], micro_batch: position[1] };
        let sides: Vec<&Side> = self.head.iter().chain([&self.tail]).collect();
        let restored = restored_sides(&sides, tensors, optimizer_steps)?;
        let loras: Vec<_> = sides
            .iter()
            .zip(&restored)
            .map(|(side, (adapter, _))| side.stage.attach(adapter).ok())
            .collect::<Option<_>>()?;
        // Last of what may fail.
        let here = self.data.batches.position();
        if self.data.batches.seek(position).is_err() {
            let _ = self.data.batches.seek(here);
            return None;
        }
        for ((side, (adapter, optimizer)), lora) in
            self.head.iter_mut().chain([&mut self.tail]).zip(restored).zip(loras)
        {
            (side.adapter, side.optimizer, side.lora) = (adapter, optimizer, lora);
        }
        let reports = reports.into_iter().map(|kept| StepReport {
            step: kept.step,
            loss_nats: f64::from_bits(kept.loss_nats_bits),
            tokens: kept.tokens,
            compute_ms: kept.compute_ms,
            wait_ms: kept.wait_ms,
        });
        let (nats, reports) = (f64::from_bits(loss_nats_bits), reports.collect());
        self.progress = Some(Progress { round, attempt, next_step, position, nats, tokens, reports });
        Some(())
    }

    fn start_from(&self, header: StartHeader, tensors: Vec<Vec<f32>>) -> Option<RoundStart> {
        let StartHeader { round, position, optimizer_steps } = header;
        let sides: Vec<&Side> = self.head.iter().chain([&self.tail]).collect();
        let mut restored = restored_sides(&sides, tensors, optimizer_steps)?;
        let (tail, tail_optimizer) = restored.pop()?;
        let (head, head_optimizer) = restored.pop().map_or((None, None), |(head, optimizer)| (Some(head), optimizer));
        Some(RoundStart {
            round,
            optimizers: [head_optimizer, tail_optimizer],
            position: Position { epoch: position[0], micro_batch: position[1] },
            global: [head, Some(tail)],
        })
    }
}

/// Each side's adapter and optimizer out of their numbers, which must be exactly as many.
fn restored_sides(
    sides: &[&Side],
    tensors: Vec<Vec<f32>>,
    optimizer_steps: Vec<u64>,
) -> Option<Vec<(Adapter, Option<AdamW>)>> {
    let mut tensors = tensors.into_iter();
    let mut steps = optimizer_steps.into_iter();
    let mut restored = Vec::new();
    for side in sides {
        let count = side.adapter.tensors().len();
        let mut take = || tensors.by_ref().take(count).collect::<Vec<_>>();
        let adapter = side.adapter.with_tensors(take()).ok()?;
        let optimizer = match &side.optimizer {
            None => None,
            Some(optimizer) => {
                let mut optimizer = optimizer.clone();
                optimizer.restore(steps.next()?, take(), take()).ok()?;
                Some(optimizer)
            }
        };
        restored.push((adapter, optimizer));
    }
    (tensors.next().is_none() && steps.next().is_none()).then_some(restored)
}

fn values(adapter: &Adapter) -> impl Iterator<Item = &[f32]> + Clone {
    adapter.tensors().iter().map(|tensor| tensor.values.as_slice())
}

fn moments(optimizer: Option<&AdamW>) -> impl Iterator<Item = &[f32]> + Clone {
    optimizer.into_iter().flat_map(|optimizer| {
        let (_, first, second) = optimizer.state();
        first.iter().chain(second).map(Vec::as_slice)
    })
}

fn numbers(position: Position) -> [u64; 2] {
    [position.epoch, position.micro_batch]
}

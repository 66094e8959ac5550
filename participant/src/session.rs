//! One connection's life: hello, the model's parts, and then the rounds, until the coordinator ends the run.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use experiment::{Experiment, SplitMode, WireDtype};
use indicatif::ProgressBar;
use model::source::BlobStore;
use model::{Adapter, ComputeDevice, Cut, ModelError, Part};
use net::{Connection, NetError, RecvStream, SendStream, StreamKind};
use wire::{
    AdapterListing, BlobRef, CODEC_PLAIN, CloseCode, DType, FrameKind, FromCoordinator, FromParticipant, Outcome,
    Request, Shape, TensorHeader, TensorInfo, UpdateReply,
};

use crate::ParticipantError;
use crate::body_link::BodyLink;
use crate::data::Record;
use crate::dataset::Dataset;
use crate::device_choice::DeviceChoice;
use crate::outgoing::Outgoing;
use crate::stages::Stages;
use crate::trainer::Trainer;
use crate::{parts, progress};

pub const SOFTWARE: &str = concat!("headwater participant ", env!("CARGO_PKG_VERSION"));

/// Reads a participant's records.
pub type Records = Box<dyn Fn(&Experiment) -> Result<Vec<Record>, ParticipantError> + Send + Sync>;

/// What a participant brings to every connection, and keeps from one to the next.
pub struct Participant {
    pub name: String,
    /// Gives the participant's records, once the experiment says which columns they lie in.
    pub records: Records,
    pub store: BlobStore,
    /// A local copy of the base model, instead of the coordinator's parts.
    pub model: Option<PathBuf>,
    /// Overrides the experiment's `[device]`.
    pub device: DeviceChoice,
    /// Kept over a lost connection, so that nothing is loaded twice and optimizer moments survive.
    pub prepared: Option<Prepared>,
    /// Base weights, shared with the other participants of this process.
    pub stages: Arc<Stages>,
    pub reporter: Arc<dyn Reporter>,
}

/// Told what happens, for whoever watches.
pub trait Reporter: Send + Sync {
    fn step(&self, round: u32, report: &crate::trainer::StepReport);
    fn evaluated(&self, round: u32, loss_nats: f64, tokens: u64);
    fn round_closed(&self, round: u32, outcome: &str);
}

pub struct Prepared {
    experiment: Arc<Experiment>,
    model_digest: [u8; 32],
    cut: Option<Cut>,
    trainer: Trainer,
    width: usize,
    /// Names and shapes of the adapter tensors this participant takes.
    adapter: Adapter,
}

/// The coordinator's welcome, checked.
struct Session {
    id: u64,
    dtype: DType,
}

impl Participant {
    /// Takes part until the coordinator finishes the run; returns its words.
    pub async fn run(&mut self, connection: &Connection) -> Result<String, ParticipantError> {
        let (mut send, mut receive) = connection.open(StreamKind::Control).await?;
        let session = self.greet(connection, &mut send, &mut receive).await?;
        loop {
            match receive.message().await? {
                FromCoordinator::StartRound { round, attempt, first_step, local_steps, evaluate, train } => {
                    let prepared = self.prepared.as_mut().expect("greeting prepares");
                    check_round(&prepared.experiment, round, first_step, local_steps, train)?;
                    let link = prepared.cut.map(|_| BodyLink {
                        connection: connection.clone(),
                        session: session.id,
                        round,
                        attempt,
                        dtype: session.dtype,
                        width: prepared.width,
                    });
                    let mut work = RoundWork {
                        prepared,
                        connection,
                        link,
                        reporter: &*self.reporter,
                        session: session.id,
                        round,
                        attempt,
                    };
                    let steps = first_step..first_step.saturating_add(if train { local_steps } else { 0 });
                    // A round that the coordinator closes before this participant has finished it is left at once.
                    let ended = tokio::select! {
                        biased;
                        message = receive.message() => Some(message?),
                        done = work.run(&mut send, steps, evaluate) => match done {
                            // The coordinator gives up the round's streams first, and says then what became of it.
                            Err(error) if is_stale(&error) => Some(receive.message().await?),
                            done => { done?; None }
                        },
                    };
                    if let Some(reason) = ended.map_or(Ok(None), |message| self.note(message))? {
                        return Ok(reason);
                    }
                }
                message => {
                    if let Some(reason) = self.note(message)? {
                        return Ok(reason);
                    }
                }
            }
        }
    }

    /// Handles every message but the start of a round; returns the run's end.
    fn note(&self, message: FromCoordinator) -> Result<Option<String>, ParticipantError> {
        match message {
            FromCoordinator::RoundClosed { round, outcome } => {
                let text = match outcome {
                    Outcome::Aggregated => "aggregated".to_owned(),
                    Outcome::Abandoned => "abandoned; it is trained again".to_owned(),
                    Outcome::Refused { text, .. } => format!("closed without this device: {text}"),
                };
                tracing::info!(round, outcome = %text, "round closed");
                self.reporter.round_closed(round, &text);
                Ok(None)
            }
            FromCoordinator::Finish { reason } => Ok(Some(reason)),
            FromCoordinator::Refused { reason, .. } => Err(ParticipantError::Refused(reason)),
            FromCoordinator::StartRound { round, .. } => {
                Err(ParticipantError::Coordinator(format!("it started round {round} within a round")))
            }
            FromCoordinator::Welcome { .. } => Err(ParticipantError::Coordinator("it welcomed us twice".into())),
        }
    }

    async fn greet(
        &mut self,
        connection: &Connection,
        send: &mut SendStream,
        receive: &mut RecvStream,
    ) -> Result<Session, ParticipantError> {
        let dtypes = vec![DType::F32, DType::F16, DType::Bf16];
        let hello =
            FromParticipant::Hello { minor: wire::MINOR, dtypes, codecs: vec![CODEC_PLAIN], software: SOFTWARE.into() };
        send.message(&hello).await?;
        match receive.message().await? {
            FromCoordinator::Welcome {
                session,
                dtype,
                head_blocks,
                tail_blocks,
                experiment_toml,
                experiment_digest,
                manifest,
                ..
            } => {
                let experiment = Experiment::from_toml(&experiment_toml, "the coordinator's experiment")?;
                if experiment.digest() != experiment_digest {
                    let (ours, theirs) = (experiment::hex(&experiment.digest()), experiment::hex(&experiment_digest));
                    let what = format!("its experiment has digest {ours} here and {theirs} there: the versions differ");
                    return Err(ParticipantError::Coordinator(what));
                }
                check_welcome(&experiment, (head_blocks, tail_blocks), dtype)?;
                let cut = (experiment.split.mode != SplitMode::Whole)
                    .then_some(Cut { head_blocks: head_blocks as usize, tail_blocks: tail_blocks as usize });
                self.prepare(connection, experiment, cut, manifest).await?;
                send.message(&FromParticipant::Ready { experiment_digest }).await?;
                Ok(Session { id: session, dtype })
            }
            FromCoordinator::Refused { reason, .. } => Err(ParticipantError::Refused(reason)),
            other => Err(ParticipantError::Coordinator(format!("{other:?} came where a welcome was due"))),
        }
    }

    /// Loads model and data, unless an earlier connection has.
    async fn prepare(
        &mut self,
        connection: &Connection,
        experiment: Experiment,
        cut: Option<Cut>,
        reference: BlobRef,
    ) -> Result<(), ParticipantError> {
        if let Some(prepared) = &self.prepared
            && prepared.experiment.digest() == experiment.digest()
            && prepared.model_digest == reference.sha256
            && prepared.cut == cut
        {
            return Ok(());
        }
        let experiment = Arc::new(experiment);
        let manifest = parts::manifest(connection, &self.store, reference).await?;
        let blocks = manifest.config.blocks;
        let parts = match cut {
            None => vec![Part::whole(blocks)],
            Some(cut) => {
                let [head, _, tail] = cut.parts(blocks)?;
                vec![head, tail]
            }
        };
        let source = match &self.model {
            None => parts::source(connection, &self.store, manifest, &parts).await?,
            Some(path) => local_model(path, reference.sha256)?,
        };
        let device = ComputeDevice::new(&self.device.over(&experiment.device))?;
        let records = (self.records)(&experiment)?;
        let data = Dataset::new(records, &experiment, &self.name, source.tokenizer())?;
        let model_digest = reference.sha256;
        let load = || {
            let mut stages = self.stages.of_model(model_digest);
            Trainer::new(experiment.clone(), &self.name, &*source, cut, &device, data, &mut stages)
        };
        let trainer = tokio::task::block_in_place(load)?;
        let (adapter, width) = (trainer.adapter(), source.config().width);
        self.prepared = Some(Prepared { experiment, model_digest, cut, trainer, width, adapter });
        Ok(())
    }
}

/// What stays on this device is decided by the experiment, of which both sides have the digest, and by nothing else.
fn check_welcome(experiment: &Experiment, cut: (u32, u32), dtype: DType) -> Result<(), ParticipantError> {
    let experiment::Split { head_blocks, tail_blocks, .. } = experiment.split;
    if cut != (head_blocks, tail_blocks) {
        let what = format!("it cuts at {cut:?} blocks; the experiment's cut is at {:?}", (head_blocks, tail_blocks));
        return Err(ParticipantError::Coordinator(what));
    }
    let expected = match experiment.wire.dtype {
        WireDtype::F32 => DType::F32,
        WireDtype::F16 => DType::F16,
        WireDtype::Bf16 => DType::Bf16,
    };
    if dtype != expected {
        return Err(ParticipantError::Coordinator(format!("it asks for {dtype:?}; the experiment's is {expected:?}")));
    }
    Ok(())
}

/// A round has the experiment's steps, or none: the final evaluation is one behind the last.
fn check_round(
    experiment: &Experiment,
    round: u32,
    first_step: u64,
    local_steps: u64,
    train: bool,
) -> Result<(), ParticipantError> {
    let experiment::Federation { rounds, local_steps: expected, .. } = experiment.federation;
    let before = u64::from(round.saturating_sub(1)).saturating_mul(expected);
    let fits = match train {
        true => (1..=rounds).contains(&round) && (first_step, local_steps) == (before, expected),
        false => round > 0 && round - 1 <= rounds,
    };
    if fits {
        return Ok(());
    }
    let what = format!("it starts round {round} with steps from {first_step} on, which the experiment does not have");
    Err(ParticipantError::Coordinator(what))
}

fn is_stale(error: &ParticipantError) -> bool {
    matches!(error, ParticipantError::Net(NetError::Reset { code: Some(CloseCode::Stale), .. }))
}

/// A model the owner has on disk is as good as the coordinator's if it is the same, tensor by tensor.
fn local_model(path: &std::path::Path, expected: [u8; 32]) -> Result<Arc<dyn model::Source>, ParticipantError> {
    let source = model::source::open(path)?;
    let found = model::Manifest::of(&*source)?.digest();
    if found != expected {
        let what = format!(
            "is not the run's model: its digest is {}, the run's is {}; leave --model away to fetch the right parts",
            experiment::hex(&found),
            experiment::hex(&expected)
        );
        return Err(ModelError::File { path: path.to_owned(), what }.into());
    }
    Ok(source)
}

/// One attempt of one round.
struct RoundWork<'a> {
    prepared: &'a mut Prepared,
    connection: &'a Connection,
    link: Option<BodyLink>,
    reporter: &'a dyn Reporter,
    session: u64,
    round: u32,
    attempt: u32,
}

impl RoundWork<'_> {
    async fn run(
        &mut self,
        control: &mut SendStream,
        steps: std::ops::Range<u64>,
        evaluate: bool,
    ) -> Result<(), ParticipantError> {
        let round = self.round;
        let adapter = self.fetch_adapter().await?;
        let trainer = &mut self.prepared.trainer;
        trainer.begin_round(round, &adapter)?;
        if evaluate {
            let loss = trainer.evaluate(self.link.as_ref()).await?;
            if loss.tokens > 0 {
                let (loss_nats, tokens) = (loss.nats / loss.tokens as f64, loss.tokens as u64);
                // What was evaluated is the adapter of the round before.
                control.message(&FromParticipant::Evaluated { round: round - 1, loss_nats, tokens }).await?;
                self.reporter.evaluated(round - 1, loss_nats, tokens);
            } else {
                control.message(&FromParticipant::Evaluated { round: round - 1, loss_nats: 0.0, tokens: 0 }).await?;
            }
        }
        if steps.is_empty() {
            return Ok(());
        }
        let bar: ProgressBar = progress::steps(steps.end - steps.start);
        let (mut nats, mut tokens) = (0.0, 0);
        for step in steps {
            let report = trainer.step(step, self.link.as_ref()).await?;
            nats += report.loss_nats * report.tokens as f64;
            tokens += report.tokens;
            bar.inc(1);
            bar.set_message(format!("round {round} loss {:.4}", report.loss_nats));
            self.reporter.step(round, &report);
            let crate::trainer::StepReport { step, loss_nats, tokens, compute_ms, wait_ms } = report;
            control
                .message(&FromParticipant::StepFinished { round, step, loss_nats, tokens, compute_ms, wait_ms })
                .await?;
        }
        bar.finish_and_clear();
        self.send_update(tokens, nats / tokens as f64).await
    }

    async fn fetch_adapter(&self) -> Result<Adapter, ParticipantError> {
        let (mut send, mut receive) = self.connection.open(StreamKind::Bulk).await?;
        send.message(&Request::FetchAdapter { round: self.round }).await?;
        send.finish();
        let listing: AdapterListing = receive.message().await?;
        let expected = listing_of(&self.prepared.adapter);
        if listing.tensors != expected {
            return Err(ParticipantError::Coordinator(format!(
                "its adapter lists {} tensors that are not the {} of this device's parts",
                listing.tensors.len(),
                expected.len()
            )));
        }
        let mut values = Vec::with_capacity(expected.len());
        for (i, tensor) in expected.iter().enumerate() {
            values.push(receive.tensor(&self.adapter_header(i, tensor)?).await?);
        }
        receive.end().await?;
        Ok(self.prepared.adapter.with_tensors(values)?)
    }

    async fn send_update(&self, tokens: u64, loss_nats: f64) -> Result<(), ParticipantError> {
        let update = self.prepared.trainer.update();
        let (send, mut receive) = self.connection.open(StreamKind::Bulk).await?;
        let mut send = Outgoing::new(send);
        let tensors = listing_of(&update);
        let (round, attempt) = (self.round, self.attempt);
        send.message(&Request::Update { round, attempt, tokens, loss_nats, tensors: tensors.clone() }).await?;
        for (i, (tensor, info)) in update.tensors().iter().zip(&tensors).enumerate() {
            send.tensor(&self.adapter_header(i, info)?, &tensor.values).await?;
        }
        send.finish();
        match receive.message().await? {
            UpdateReply::Accepted => {}
            UpdateReply::Refused { text, .. } => {
                tracing::warn!(round, reason = %text, "the coordinator refused the update")
            }
        }
        Ok(receive.end().await?)
    }

    fn adapter_header(&self, i: usize, tensor: &TensorInfo) -> Result<TensorHeader, ParticipantError> {
        let shape = Shape::new(&tensor.shape).map_err(|error| ParticipantError::Coordinator(error.to_string()))?;
        let (session, round) = (self.session, self.round);
        Ok(TensorHeader {
            kind: FrameKind::Adapter,
            dtype: DType::F32,
            session,
            round,
            step: 0,
            micro: i as u32,
            shape,
        })
    }
}

fn listing_of(adapter: &Adapter) -> Vec<TensorInfo> {
    let info = |tensor: &model::AdapterTensor| TensorInfo {
        name: tensor.name.clone(),
        shape: tensor.shape.iter().map(|&size| size as u32).collect(),
    };
    adapter.tensors().iter().map(info).collect()
}

/// Waits longer after every failure, up to half a minute.
pub struct BackOff {
    next: Duration,
}

impl BackOff {
    pub fn new() -> Self {
        Self { next: Duration::from_secs(1) }
    }

    pub fn next_delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (delay * 2).min(Duration::from_secs(30));
        delay
    }
}

impl Default for BackOff {
    fn default() -> Self {
        Self::new()
    }
}

//! One connection's life: hello, the model's parts, and then the rounds, until the coordinator ends the run.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use experiment::{Experiment, SplitMode, WireDtype};
use indicatif::ProgressBar;
use model::source::BlobStore;
use model::stage::Loss;
use model::{Adapter, ComputeDevice, Cut, ModelError, Part};
use net::{Connection, NetError, RecvStream, SendStream, StreamKind};
use storage::Disk;
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
use crate::trainer::{StepReport, Trainer};
use crate::{parts, progress};

mod measuring;

pub use measuring::Measured;

/// To be told that it has been heard, a device that takes leave waits this long.
const LEAVE_DEADLINE: Duration = Duration::from_secs(1);

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
    /// Kept over a lost connection, so that nothing is loaded twice.
    pub prepared: Option<Prepared>,
    /// Where what it learns is kept, over a kill of this process too.
    pub keep: Option<Keep>,
    /// Kept over a lost connection and, beside `keep`, over a kill, so that no run measures more than it may.
    pub measured: Measured,
    /// How often a coordinator has welcomed it.
    pub welcomes: u64,
    /// Base weights, shared with the other participants of this process.
    pub stages: Arc<Stages>,
    pub reporter: Arc<dyn Reporter>,
}

/// A directory, and the disk it is on; tests let that fail.
#[derive(Clone)]
pub struct Keep {
    pub directory: PathBuf,
    pub disk: Disk,
}

impl Keep {
    /// Beside a device's key and certificate.
    pub fn in_state(state: &std::path::Path) -> Self {
        Self { directory: state.join("training"), disk: Disk::default() }
    }
}

/// Told what happens, for whoever watches.
pub trait Reporter: Send + Sync {
    fn step(&self, round: u32, report: &StepReport);
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
        self.run_until(connection, std::future::pending()).await
    }

    /// The same, unless it is stopped before: then it takes leave.
    pub async fn run_until(
        &mut self,
        connection: &Connection,
        stopped: impl Future<Output = ()>,
    ) -> Result<String, ParticipantError> {
        let (mut send, mut receive) = connection.open(StreamKind::Control).await?;
        tokio::select! {
            biased;
            ended = self.take_part(connection, &mut send, &mut receive) => return ended,
            () = stopped => {}
        }
        // Whoever does not listen any more needs no leave.
        let leaving = async {
            send.message(&FromParticipant::Leaving { reason: "the device was stopped".into() }).await?;
            send.finish();
            Ok::<_, NetError>(connection.closed().await)
        };
        let _ = tokio::time::timeout(LEAVE_DEADLINE, leaving).await;
        Err(ParticipantError::Stopped)
    }

    async fn take_part(
        &mut self,
        connection: &Connection,
        send: &mut SendStream,
        receive: &mut RecvStream,
    ) -> Result<String, ParticipantError> {
        let session = self.greet(connection, send, receive).await?;
        self.welcomes += 1;
        let mut next = None;
        loop {
            let message = match next.take() {
                Some(message) => message,
                None => receive.message().await?,
            };
            let asked = match message {
                FromCoordinator::StartRound { round, attempt, first_step, local_steps, evaluate, train } => {
                    Asked::Round(Start { round, attempt, first_step, local_steps, evaluate, train, resume: None })
                }
                FromCoordinator::ResumeRound { round, attempt, first_step, local_steps, evaluate, step, reported } => {
                    let resume = Some(Resume { step, reported });
                    Asked::Round(Start { round, attempt, first_step, local_steps, evaluate, train: true, resume })
                }
                FromCoordinator::Measure { round } => Asked::Measure { round },
                message => match self.note(message)? {
                    Some(reason) => return Ok(reason),
                    None => continue,
                },
            };
            let prepared = self.prepared.as_mut().expect("greeting prepares");
            let (round, attempt) = match &asked {
                Asked::Round(start) => {
                    check_round(&prepared.experiment, start)?;
                    (start.round, start.attempt)
                }
                Asked::Measure { round } => {
                    measuring::check(&prepared.experiment, *round)?;
                    (*round, 1)
                }
            };
            let link = prepared.cut.map(|_| BodyLink {
                connection: connection.clone(),
                session: session.id,
                round,
                attempt,
                dtype: session.dtype,
                width: prepared.width,
            });
            let reporter = &*self.reporter;
            let is_final = asked.is_final_evaluation(&prepared.experiment);
            let (measured, session) = (&mut self.measured, session.id);
            let mut work = RoundWork { prepared, measured, connection, link, reporter, session, round, attempt };
            let ended = {
                let mut done = std::pin::pin!(work.perform(send, &asked));
                // A round that the coordinator closes before this participant has finished it is left at once.
                tokio::select! {
                    biased;
                    message = receive.message() => {
                        let message = message?;
                        if matches!(message, FromCoordinator::Finish { .. }) {
                            // What it has said of the sums came before, on a stream of its own, and is heard.
                            tokio::select! {
                                biased;
                                _ = done => {}
                                () = std::future::ready(()) => {}
                            }
                        }
                        Some(message)
                    }
                    done = &mut done => match done {
                        // The coordinator gives up the round's streams first, and says then what became of it.
                        Err(error) if is_stale(&error) => Some(receive.message().await?),
                        done => { done?; None }
                    },
                }
            };
            match ended {
                // A final evaluation that is not waited for any longer is told of by what comes behind it.
                Some(message @ FromCoordinator::Measure { .. }) if is_final => next = Some(message),
                Some(message) => {
                    if let Some(reason) = self.note(message)? {
                        return Ok(reason);
                    }
                }
                None => {}
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
            FromCoordinator::StartRound { round, .. } | FromCoordinator::ResumeRound { round, .. } => {
                Err(ParticipantError::Coordinator(format!("it started round {round} within a round")))
            }
            FromCoordinator::Measure { .. } => {
                Err(ParticipantError::Coordinator("it asked for channel sums within a round".into()))
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
                minor,
                head_blocks,
                tail_blocks,
                experiment_toml,
                experiment_digest,
                manifest,
                ..
            } => {
                connection.agree(minor.min(wire::MINOR));
                let experiment = Experiment::from_toml(&experiment_toml, "the coordinator's experiment")?;
                if experiment.digest() != experiment_digest {
                    let (ours, theirs) = (experiment::hex(&experiment.digest()), experiment::hex(&experiment_digest));
                    let what = format!("its experiment has digest {ours} here and {theirs} there: the versions differ");
                    return Err(ParticipantError::Coordinator(what));
                }
                check_welcome(&experiment, (head_blocks, tail_blocks), dtype)?;
                let cut = (experiment.split.mode != SplitMode::Whole)
                    .then_some(Cut { head_blocks: head_blocks as usize, tail_blocks: tail_blocks as usize });
                let (mode, imatrix_tokens) = (experiment.split.mode, experiment.federation.imatrix_tokens);
                self.prepare(connection, experiment, cut, manifest).await?;
                send.message(&FromParticipant::Ready { experiment_digest }).await?;
                tracing::info!(?mode, imatrix_tokens, "joined the run; a round begins once enough devices are there");
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
        // Who has agreed to one experiment has not agreed to whatever may follow it.
        if self.prepared.as_ref().is_some_and(|prepared| prepared.experiment.digest() != experiment.digest()) {
            let what = "it has another experiment than before: join again to take part in that one";
            return Err(ParticipantError::Coordinator(what.into()));
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
        let mut trainer = offload::in_place(load)?;
        if let Some(keep) = &self.keep {
            offload::in_place(|| trainer.keep_in(&keep.disk, &keep.directory, model_digest))?;
            offload::in_place(|| self.measured.keep_in(keep))?;
        }
        let (adapter, width) = (trainer.adapter(), source.config().width);
        // Tokenizer, text and stored weights have done their work, and the device has other uses for their memory.
        drop(source);
        if let Some(kernels) = device.kernels() {
            kernels.trim();
        }
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
fn check_round(experiment: &Experiment, start: &Start) -> Result<(), ParticipantError> {
    let Start { round, first_step, local_steps, train, resume, .. } = *start;
    let experiment::Federation { rounds, local_steps: expected, .. } = experiment.federation;
    let before = u64::from(round.saturating_sub(1)).saturating_mul(expected);
    let fits = match train {
        true => (1..=rounds).contains(&round) && (first_step, local_steps) == (before, expected),
        false => round > 0 && round - 1 <= rounds,
    };
    // Both sums are those of the experiment by now.
    let goes_on = |resume: Resume| (first_step..=first_step + expected).contains(&resume.step);
    if fits && resume.is_none_or(goes_on) {
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

/// What the coordinator asks for.
enum Asked {
    Round(Start),
    Measure { round: u32 },
}

impl Asked {
    /// Whether this is what everybody evaluates behind the last round.
    fn is_final_evaluation(&self, experiment: &Experiment) -> bool {
        let last = experiment.federation.rounds;
        matches!(self, Self::Round(Start { round, train: false, .. }) if round.checked_sub(1) == Some(last))
    }
}

/// To train a round, to evaluate before it, or both.
struct Start {
    round: u32,
    attempt: u32,
    first_step: u64,
    local_steps: u64,
    evaluate: bool,
    train: bool,
    resume: Option<Resume>,
}

/// Where a round goes on.
#[derive(Clone, Copy)]
struct Resume {
    step: u64,
    reported: u64,
}

/// One attempt of one round.
struct RoundWork<'a> {
    prepared: &'a mut Prepared,
    measured: &'a mut Measured,
    connection: &'a Connection,
    link: Option<BodyLink>,
    reporter: &'a dyn Reporter,
    session: u64,
    round: u32,
    attempt: u32,
}

impl RoundWork<'_> {
    async fn perform(&mut self, control: &mut SendStream, asked: &Asked) -> Result<(), ParticipantError> {
        match asked {
            Asked::Round(start) => self.run(control, start).await,
            Asked::Measure { .. } => self.measure(control).await,
        }
    }

    async fn run(&mut self, control: &mut SendStream, start: &Start) -> Result<(), ParticipantError> {
        let Start { round, attempt, first_step, local_steps, evaluate, train, resume } = *start;
        let place = (round, attempt);
        let is_there = match resume {
            Some(Resume { step, .. }) => self.prepared.trainer.resume(place, step)?,
            None => false,
        };
        let is_fresh = resume.is_none_or(|resume| resume.step == first_step);
        if is_there {
            if evaluate {
                let adapter = self.fetch_adapter().await?;
                let loss = self.prepared.trainer.evaluate_adapter(&adapter, self.link.as_ref()).await?;
                self.report_evaluation(control, loss).await?;
            }
        } else if is_fresh {
            let adapter = self.fetch_adapter().await?;
            self.prepared.trainer.begin_round(place, first_step, &adapter).await?;
            if evaluate {
                let loss = self.prepared.trainer.evaluate(self.link.as_ref()).await?;
                self.report_evaluation(control, loss).await?;
            }
        } else {
            tracing::warn!(round, "this device has not kept what it needs to go on within the round");
            return Ok(control.message(&FromParticipant::CannotResume { round, attempt }).await?);
        }
        if !train || local_steps == 0 {
            return Ok(());
        }
        let reported = resume.map_or(first_step, |resume| resume.reported);
        for report in self.prepared.trainer.reports_from(reported) {
            self.report_step(control, report).await?;
        }
        self.train(control, first_step..first_step + local_steps, reported).await
    }

    /// The round's steps that are still to be done, and its update.
    async fn train(
        &mut self,
        control: &mut SendStream,
        steps: std::ops::Range<u64>,
        reported: u64,
    ) -> Result<(), ParticipantError> {
        let round = self.round;
        let bar: ProgressBar = progress::steps(steps.end - steps.start);
        bar.set_position(self.prepared.trainer.next_step().saturating_sub(steps.start));
        for step in self.prepared.trainer.next_step()..steps.end {
            let report = self.prepared.trainer.step(step, self.link.as_ref()).await?;
            bar.inc(1);
            bar.set_message(format!("round {round} loss {:.4}", report.loss_nats));
            self.reporter.step(round, &report);
            if step >= reported {
                self.report_step(control, report).await?;
            }
        }
        bar.finish_and_clear();
        // The update says that the steps are done: they are not done again.
        self.prepared.trainer.settled().await?;
        let (tokens, loss_nats) = self.prepared.trainer.trained();
        self.send_update(tokens, loss_nats).await
    }

    async fn report_step(&self, control: &mut SendStream, report: StepReport) -> Result<(), ParticipantError> {
        let (round, StepReport { step, loss_nats, tokens, compute_ms, wait_ms }) = (self.round, report);
        let finished = FromParticipant::StepFinished { round, step, loss_nats, tokens, compute_ms, wait_ms };
        Ok(control.message(&finished).await?)
    }

    /// What was evaluated is the adapter of the round before.
    async fn report_evaluation(&self, control: &mut SendStream, loss: Loss) -> Result<(), ParticipantError> {
        let round = self.round - 1;
        if loss.tokens == 0 {
            return Ok(control.message(&FromParticipant::Evaluated { round, loss_nats: 0.0, tokens: 0 }).await?);
        }
        let (loss_nats, tokens) = (loss.nats / loss.tokens as f64, loss.tokens as u64);
        control.message(&FromParticipant::Evaluated { round, loss_nats, tokens }).await?;
        self.reporter.evaluated(round, loss_nats, tokens);
        Ok(())
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
            values.push(receive.tensor(&self.header(FrameKind::Adapter, i, tensor)?).await?);
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
            send.tensor(&self.header(FrameKind::Adapter, i, info)?, &tensor.values).await?;
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

    /// Of the `i`th tensor of a listing.
    fn header(&self, kind: FrameKind, i: usize, tensor: &TensorInfo) -> Result<TensorHeader, ParticipantError> {
        let shape = Shape::new(&tensor.shape).map_err(|error| ParticipantError::Coordinator(error.to_string()))?;
        let (session, round) = (self.session, self.round);
        Ok(TensorHeader { kind, dtype: DType::F32, session, round, step: 0, micro: i as u32, shape })
    }
}

fn listing_of(adapter: &Adapter) -> Vec<TensorInfo> {
    let info = |tensor: &model::AdapterTensor| TensorInfo {
        name: tensor.name.clone(),
        shape: tensor.shape.iter().map(|&size| size as u32).collect(),
    };
    adapter.tensors().iter().map(info).collect()
}

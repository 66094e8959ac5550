//! `coordinator run`: what happens becomes events for the round machine, and its actions are performed.
//!
//! The decisions are in [`crate::round`], [`crate::barrier`] and [`crate::strategy`], the streams in [`crate::serve`].
//! This file sets a run up, from nothing or from its newest finished round; its conductor then keeps it going.

mod conductor;
mod ledger;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, RwLock, atomic::AtomicU64};
use std::time::Duration;

use experiment::{BodyAdapters, Experiment, Row, RunDirectory, Seed, SplitMode, hex};
use model::source::Manifest;
use model::{Adapter, AdapterConfig, ComputeDevice, Source, Stage};
use net::{Congestion, Connection, Listener, Transport, TransportLimits};
use time::OffsetDateTime;
use tokio::sync::mpsc::error::SendError;
use tokio::sync::{mpsc, oneshot};
use wire::CloseCode;

use crate::aggregate::Aggregator;
use crate::body::BodyHandle;
use crate::checkpoint::Checkpoint;
use crate::home::audit::Event;
use crate::home::{Home, Keeper};
use crate::journal::{self, Journal, Recovered};
use crate::round::{ParticipantName, Rounds, Sizes};
use crate::serve::{Blobs, Renewals, Shared};
use conductor::Conductor;

pub const SOFTWARE: &str = concat!("headwater coordinator ", env!("CARGO_PKG_VERSION"));

/// How long before the issuing authority expires its owner is told.
const AUTHORITY_WARNING: time::Duration = time::Duration::days(60);

/// The reason in the last row of a run that has nothing left to do.
const COMPLETED: &str = "completed";

/// In f32, the widest type of the wire.
const TENSOR_VALUE_BYTES: u64 = 4;
/// Activations and gradients at both cuts.
const STEP_TENSORS: u64 = 4;

pub struct Run {
    pub experiment: PathBuf,
    pub home: PathBuf,
    pub runs: PathBuf,
    pub init_adapter: Option<PathBuf>,
    pub journal: journal::Settings,
    /// Connections served at a time, unless the cohort asks for more: [`CONNECTIONS_MAX`], or what a test can fill.
    pub connections_max: usize,
}

/// Every connection takes memory before it has said hello.
pub const CONNECTIONS_MAX: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("failed to {0}")]
    Experiment(#[from] experiment::Error),
    #[error(transparent)]
    Model(#[from] model::ModelError),
    #[error("failed to {0}")]
    Home(#[from] crate::home::HomeError),
    #[error(transparent)]
    Net(#[from] net::NetError),
    #[error(transparent)]
    Aggregate(#[from] crate::aggregate::AggregateError),
    /// The rounds before stay as they are; the same command would find the same updates in the journal.
    #[error(
        "{source}. The largest value is that of {participant}. To train the round again, move {} away, and revoke that device \
         if it is to blame", journal.display()
    )]
    TooLarge {
        // Boxed, because it would make every `Result` here large.
        source: Box<crate::aggregate::AggregateError>,
        participant: ParticipantName,
        journal: PathBuf,
    },
    #[error("failed to {0}")]
    Strategy(#[from] crate::strategy::StrategyError),
    #[error("failed to start a thread: {0}")]
    Thread(std::io::Error),
    #[error("failed to {0}")]
    Storage(#[from] storage::StorageError),
    #[error("failed to {0}. Run the same command again to go on from what is on the disk")]
    JournalFailed(String),
    #[error("the body's thread has failed; its log line says why. Run the same command again to go on from round {0}")]
    BodyFailed(u32),
    #[error(
        "the model has digest {found}; the experiment's `model.sha256` is {expected}: correct it, or bring that model"
    )]
    OtherModel { expected: String, found: String },
    #[error(
        "the model has digest {found}, but this run was trained on one of {trained}: bring that model back, or give the \
         experiment another name"
    )]
    ModelChanged { trained: String, found: String },
    #[error(
        "round {round} was abandoned {attempts} times; rounds before it are kept. Run the same command again to go on"
    )]
    Abandoned { round: u32, attempts: u32 },
    #[error(
        "failed to write the last {rows} rows of {}: there was no room on the disk until the end. Free space there; finished \
         rounds are kept, and the same command does what is left", path.display()
    )]
    RowsLost { rows: usize, path: PathBuf },
}

impl RunError {
    /// Whether the same may succeed once there is room, or the disk has recovered.
    fn may_pass(&self) -> bool {
        match self {
            Self::Experiment(error) | Self::Model(model::ModelError::Write(error)) => error.may_pass(),
            Self::Model(model::ModelError::Io { source, .. }) => source.kind() == std::io::ErrorKind::StorageFull,
            Self::Storage(error) => error.may_pass(),
            _ => false,
        }
    }
}

/// How a run ended that did not fail.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    pub directory: PathBuf,
    pub rounds: u32,
    pub of: u32,
    /// Stopped before its last round: the same command goes on.
    pub stopped: bool,
}

/// What a person or a script watches.
pub trait Watcher: Send + Sync {
    fn row(&mut self, row: &Row);
    fn note(&mut self, text: &str);
    /// What is evaluated from now on is of another round, or nothing.
    fn evaluated(&mut self) {}
    fn step(&mut self, done: u64, all: u64, loss_nats: f64);
}

impl Run {
    /// Runs the experiment, or what is left of it, for the devices that connect to the home's address. `shutdown` stops it
    /// between two events; finished rounds stay.
    pub async fn run(
        &self,
        mut watcher: Box<dyn Watcher>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<Ended, RunError> {
        let experiment = Arc::new(Experiment::from_file(&self.experiment)?);
        let home = Home::open(&self.home)?;
        let identity = home.identity(OffsetDateTime::now_utc())?;
        let source = model::source::of_experiment(&experiment)?;
        let (at, transport) = (home.listen_address()?, transport(&experiment, &*source));
        let mut listener = Listener::bind_gated(at, &identity, &transport, home.admission().clone())?;
        let address = listener.local_address();
        let (accepted, connections) = mpsc::channel(16);
        let (close, mut closing) = oneshot::channel::<(CloseCode, String)>();
        let accepting = tokio::spawn(async move {
            let (code, reason) = loop {
                tokio::select! {
                    // Without a word the run has been dropped, and may be run again like one that failed.
                    closing = &mut closing => break closing.unwrap_or((CloseCode::GoingAway, String::new())),
                    Some(connection) = listener.accept() => {
                        // It fails once the run no longer takes any.
                        if let Err(SendError(connection)) = accepted.send(connection).await {
                            turn_away(&connection);
                        }
                    }
                }
            };
            listener.close(code, &reason).await;
        });
        if home.authority_not_after() - OffsetDateTime::now_utc() < AUTHORITY_WARNING {
            let (until, path) = (home.authority_not_after(), home.path().display());
            let next_step = format!("then nobody gets in. Renew it: coordinator renew-ca {path} --root-key ca.key");
            watcher.note(&format!("the issuing authority expires at {until}, {next_step}"));
        }
        let at = (home, Some(address));
        let ended = self.serve_at(experiment, source, at, connections, watcher, shutdown).await;
        // Where the task has ended by itself there is nothing left to close.
        let closing = match &ended {
            Ok(_) => (CloseCode::Done, "the run is over".to_owned()),
            // What it is, and in which path, is for the operator alone; participants try again until it is mended.
            Err(_) => (CloseCode::GoingAway, "the coordinator has failed".to_owned()),
        };
        let _ = close.send(closing);
        let _ = tokio::time::timeout(Duration::from_secs(10), accepting).await;
        ended
    }

    /// As [`run`](Self::run), over connections that somebody else has made.
    pub async fn serve(
        &self,
        experiment: Arc<Experiment>,
        source: Arc<dyn Source>,
        home: Home,
        connections: mpsc::Receiver<Connection>,
        watcher: Box<dyn Watcher>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<Ended, RunError> {
        self.serve_at(experiment, source, (home, None), connections, watcher, shutdown).await
    }

    /// Beside the home stands what is listened on: it is told of once nothing is in the run's way.
    async fn serve_at(
        &self,
        experiment: Arc<Experiment>,
        source: Arc<dyn Source>,
        (home, address): (Home, Option<SocketAddr>),
        connections: mpsc::Receiver<Connection>,
        mut watcher: Box<dyn Watcher>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<Ended, RunError> {
        let connections = Arrivals(connections);
        let device = ComputeDevice::new(&experiment.device)?;
        experiment.check_blocks(source.config().blocks as u32)?;
        experiment.check_context(source.config().context)?;
        let manifest = offload::in_place(|| Manifest::of(&*source))?;
        if let Some(expected) = experiment.model.sha256.clone().filter(|sha256| *sha256 != hex(&manifest.digest())) {
            return Err(RunError::OtherModel { expected, found: hex(&manifest.digest()) });
        }
        let directory = RunDirectory::create_on(&self.journal.disk, &self.runs, &experiment)?;
        // Locks the run: what follows mends what a coordinator that is no more has left.
        let metrics = directory.metrics_log()?;
        let body_blocks = body_blocks(&experiment, source.config().blocks);
        let mut aggregator = Aggregator::new(&experiment);
        // Reads all of the metrics: a broken row is found before anything is changed.
        let is_completed = is_completed(&directory, &hex(&manifest.digest()))?;
        let finished = newest_valid_round(&directory, &mut *watcher)?;
        if is_completed && finished == experiment.federation.rounds {
            watcher.note("the run is completed; to train again, give the experiment another name");
            let of = experiment.federation.rounds;
            return Ok(Ended { directory: directory.path().to_owned(), rounds: finished, of, stopped: false });
        }
        let (adapter, optimizers) =
            self.starting_point(&experiment, &*source, &directory, finished, &body_blocks, &mut aggregator)?;
        let place = journal::Place {
            settings: self.journal.clone(),
            directory: journal::directory(directory.path()),
            experiment_digest: experiment.digest(),
        };
        let (open, recovered) = match place.open(finished + 1)? {
            Some((segment, entries)) => (Some(segment), Recovered::of(finished + 1, entries)),
            None => (None, Recovered::of(finished + 1, Vec::new())),
        };
        let journal = Journal::start(place, open).map_err(RunError::Thread)?;
        let unix_ms = journal.unix_ms();
        let body = match &body_blocks {
            None => None,
            Some(blocks) => {
                let part = model::Part { blocks: blocks.clone(), embedding: false, lm_head: false };
                let stage = offload::in_place(|| Stage::load(&*source, part, &device, None))?;
                let started = BodyHandle::start(experiment.clone(), stage, optimizers, journal.clone());
                Some(started.map_err(RunError::Thread)?)
            }
        };

        let keeper = Keeper::start(&home)?;
        let about = format!("{} {}", experiment.name, hex(&experiment.digest()));
        home.audit(OffsetDateTime::now_utc(), Event::RunStarted, None, &about)?;
        let (incoming, events) = mpsc::channel(64);
        let shared = Arc::new(Shared {
            experiment: experiment.clone(),
            blobs: Blobs::new(&manifest),
            source: source.clone(),
            manifest,
            home,
            body,
            journal,
            published: RwLock::new(None),
            incoming,
            // Sessions of a run that was started again must differ from those before.
            sessions: AtomicU64::new(unix_ms),
            connections_max: self.connections_max,
            served: Mutex::default(),
            renewals: Renewals::default(),
        });
        let (federation, seed) = (experiment.federation.clone(), Seed(experiment.seed));
        let rounds = match &recovered.open {
            Some(open) => Rounds::resume(federation, seed, open.interrupted.clone(), 0),
            None => Rounds::new(federation, finished + 1, seed).with_attempt(recovered.next_attempt),
        };
        let rounds = rounds.with_sizes(sizes(&shared, &adapter));
        let mut conductor =
            Conductor::new(rounds, (directory, metrics), aggregator, adapter, finished, shared.clone(), watcher);
        let attempt = recovered.open.as_ref().map_or(recovered.next_attempt, |open| open.interrupted.attempt);
        conductor.remember(attempt)?;
        conductor.announce(address)?;
        if let Some(open) = recovered.open {
            conductor.recover(open).await?;
        }
        let ended = conductor.conduct(connections, events, shutdown).await;
        keeper.stop().await;
        let outcome = match &ended {
            Ok(Ended { rounds, of, .. }) => format!("{about}: {rounds} of {of} rounds"),
            Err(error) => format!("{about}: {error}"),
        };
        // The run's own end is what counts; on a full disk it is not written down.
        if let Err(error) = shared.home.audit(OffsetDateTime::now_utc(), Event::RunEnded, None, &outcome) {
            tracing::error!(%error, "the audit log cannot be written");
        }
        ended
    }

    /// The adapter and optimizers of the newest finished round, or the experiment's start.
    fn starting_point(
        &self,
        experiment: &Experiment,
        source: &dyn Source,
        directory: &RunDirectory,
        finished: u32,
        body_blocks: &Option<std::ops::Range<usize>>,
        aggregator: &mut Aggregator,
    ) -> Result<(Adapter, Vec<(String, model::AdamW)>), RunError> {
        let config = AdapterConfig::new(&experiment.adapter);
        if finished == 0 {
            let adapter = match &self.init_adapter {
                Some(path) => Adapter::load_for(path, config, source.config())?,
                None => Adapter::seeded(config, source.config(), 0..source.config().blocks, Seed(experiment.seed))?,
            };
            return Ok((adapter, Vec::new()));
        }
        if self.init_adapter.is_some() {
            tracing::info!(finished, "the run goes on; --init-adapter is what a new run begins with");
        }
        let body = |adapter: &Adapter| adapter.part(body_blocks.clone().unwrap_or(0..0));
        let path = directory.round_path(finished);
        let checkpoint = Checkpoint::load(&path, config, source.config(), &experiment.training, body)?;
        aggregator.strategy_mut().restore(checkpoint.strategy)?;
        Ok((checkpoint.adapter, checkpoint.optimizers))
    }
}

/// Connections that nobody serves yet.
struct Arrivals(mpsc::Receiver<Connection>);

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.0.close();
        while let Ok(connection) = self.0.try_recv() {
            turn_away(&connection);
        }
    }
}

/// Dropped without a word it would be closed as if the run were over, and its device would not come again.
fn turn_away(connection: &Connection) {
    connection.close(CloseCode::GoingAway, "the coordinator has ended");
}

/// The newest finished round whose files are whole, and 0 where none is finished. A damaged round is set aside, and
/// trained or aggregated again from the one before it; there is no way back where that is damaged too.
fn newest_valid_round(directory: &RunDirectory, watcher: &mut dyn Watcher) -> Result<u32, RunError> {
    let newest = directory.finished_rounds()?;
    let Some(error) = (newest > 0).then(|| directory.verify_round(newest).err()).flatten() else { return Ok(newest) };
    if newest > 1 {
        // Both at once is no accident that this program can mend.
        directory.verify_round(newest - 1)?;
    }
    let aside = directory.set_round_aside(newest)?;
    watcher.note(&format!(
        "round {newest} is damaged and does not count: failed to {error}; it is now {}, and is made again",
        aside.display()
    ));
    Ok(newest - 1)
}

/// Whether the last that was written of the run is its end: the evaluation after the last round included.
///
/// # Errors
/// If it was on another model than this one.
fn is_completed(directory: &RunDirectory, model: &str) -> Result<bool, RunError> {
    let (mut last, mut begun_on) = (None, None);
    for row in directory.rows()? {
        let row = row?;
        match (&row, &begun_on) {
            (Row::Run { model_digest, .. }, _) => begun_on = Some(model_digest.clone()),
            (Row::Step { .. } | Row::Update { .. } | Row::Round { .. }, Some(trained)) if trained != model => {
                return Err(RunError::ModelChanged { trained: trained.clone(), found: model.to_owned() });
            }
            _ => {}
        }
        last = Some(row);
    }
    Ok(matches!(last, Some(Row::Finished { reason, .. }) if reason == COMPLETED))
}

fn body_blocks(experiment: &Experiment, blocks: usize) -> Option<std::ops::Range<usize>> {
    let experiment::Split { mode, head_blocks, tail_blocks } = experiment.split;
    (mode != SplitMode::Whole).then(|| head_blocks as usize..blocks - tail_blocks as usize)
}

/// What takes a member's time, as far as it is known before the run.
fn sizes(shared: &Shared, adapter: &Adapter) -> Sizes {
    let experiment = &shared.experiment;
    let micro_bytes =
        u64::from(experiment.training.batch_tokens) * shared.manifest.config.width as u64 * TENSOR_VALUE_BYTES;
    let tensors = if shared.body.is_some() { STEP_TENSORS } else { 0 };
    Sizes {
        in_step: experiment.split.mode == SplitMode::U && experiment.body.adapters == BodyAdapters::Shared,
        local_steps: experiment.federation.local_steps,
        step_bytes: micro_bytes * tensors * u64::from(experiment.training.accumulate),
        adapter_bytes: shared
            .trained_share(adapter)
            .tensors()
            .iter()
            .map(|tensor| tensor.values.len() as u64 * 4)
            .sum(),
    }
}

fn transport(experiment: &Experiment, source: &dyn Source) -> Transport {
    let tensor_bytes_max =
        u64::from(experiment.training.batch_tokens) * source.config().width as u64 * TENSOR_VALUE_BYTES;
    Transport { limits: TransportLimits { tensor_bytes_max, in_flight: 2 }, congestion: Congestion::Cubic }
}

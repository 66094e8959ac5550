//! A coordinator and participants in one process, joined by in-memory connections. No sockets, no sleeping.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc as blocking};

use coordinator::home::Home;
use coordinator::journal::Settings;
use coordinator::run::{Ended, Run, RunError, Watcher};
use experiment::{Experiment, Row};
use model::source::BlobStore;
use model::{Adapter, Source};
use net::{Connection, PeerIdentity, PeerName, Tap};
use participant::ParticipantError;
use participant::data::Record;
use participant::device_log::{FactoryDevice, generate};
use participant::session::{Participant, Reporter};
use participant::stages::Stages;
use participant::trainer::StepReport;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

pub const SMOKE: &str = include_str!("../../../configs/smoke.toml");

/// Few enough for a test to fill, and more than any other one needs.
pub const CONNECTIONS_MAX: usize = 200;

/// Directories and the experiment of one test.
pub struct World {
    pub directory: tempfile::TempDir,
    pub experiment: Experiment,
    pub source: Arc<dyn Source>,
    stages: Arc<Stages>,
}

/// A coordinator that is running.
pub struct Coordinator {
    pub rows: Arc<Mutex<Vec<Row>>>,
    connections: mpsc::Sender<Connection>,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<Ended, RunError>>,
    /// Fires whenever a metric row is written.
    written: mpsc::UnboundedReceiver<Row>,
}

/// What a participant's reporter saw.
#[derive(Default)]
pub struct Seen {
    pub steps: Mutex<Vec<StepReport>>,
}

/// Holds its participant up behind a step until the test drops the other ends.
pub struct Holding {
    step: u64,
    reached: mpsc::UnboundedSender<()>,
    released: Mutex<blocking::Receiver<()>>,
}

impl World {
    /// `change` edits the smoke experiment's text, whose deadline is out of reach.
    pub fn new(change: impl Fn(&str) -> String) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // A slow machine must not make a round end otherwise.
        let text = change(&SMOKE.replace("deadline_s = 60", "deadline_s = 3600"));
        let experiment = Experiment::from_toml(&text, "test.toml").unwrap();
        std::fs::write(directory.path().join("test.toml"), &text).unwrap();
        let now = time::OffsetDateTime::now_utc();
        Home::init(&directory.path().join("home"), vec!["127.0.0.1:4433".into()], now).unwrap();
        let source = model::source::of_experiment(&experiment).unwrap();
        Self { directory, experiment, source, stages: Arc::new(Stages::default()) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn coordinator(&self) -> Coordinator {
        self.coordinator_with(Settings::default())
    }

    /// A coordinator whose journal is kept in another way.
    pub fn coordinator_with(&self, journal: Settings) -> Coordinator {
        let run = Run {
            experiment: self.path("test.toml"),
            home: self.path("home"),
            runs: self.path("runs"),
            init_adapter: None,
            connections_max: CONNECTIONS_MAX,
            journal,
        };
        let (experiment, source) = (Arc::new(self.experiment.clone()), self.source.clone());
        let home = Home::open(&run.home).unwrap();
        let (connections, accepted) = mpsc::channel(16);
        let (stop, stopped) = oneshot::channel();
        let rows = Arc::new(Mutex::new(Vec::new()));
        let (tell, written) = mpsc::unbounded_channel();
        let watcher = Box::new(Recorder { rows: rows.clone(), tell });
        let ended = tokio::spawn(async move {
            let shutdown = async {
                if stopped.await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            run.serve(experiment, source, home, accepted, watcher, shutdown).await
        });
        Coordinator { rows, connections, stop, ended, written }
    }

    /// A participant with records of the device log; its name decides which.
    pub fn participant(&self, name: &str) -> (Participant, Arc<Seen>) {
        let device: FactoryDevice = name.parse().unwrap();
        let lines: Vec<String> =
            generate(experiment::Seed(1), device, 40, None).iter().map(|record| record.json_line()).collect();
        self.participant_with(name, &lines)
    }

    pub fn participant_with(&self, name: &str, lines: &[String]) -> (Participant, Arc<Seen>) {
        let path = self.path(&format!("{name}.jsonl"));
        std::fs::write(&path, lines.join("\n")).unwrap();
        let columns = self.experiment.data.columns.clone();
        let records: Vec<Record> = participant::data::read_records(&path, &columns).unwrap();
        let seen = Arc::new(Seen::default());
        let participant = Participant {
            name: name.into(),
            records: Box::new(move |_| Ok(records.clone())),
            store: BlobStore::open(self.path("cache")).unwrap(),
            model: None,
            device: Default::default(),
            prepared: None,
            keep: None,
            measured: Default::default(),
            welcomes: 0,
            stages: self.stages.clone(),
            reporter: seen.clone(),
        };
        (participant, seen)
    }

    /// The global adapter that a finished round left.
    pub fn adapter(&self, round: u32) -> Adapter {
        let run = self.path("runs").join(&self.experiment.name);
        let directory = experiment::RunDirectory::open(&run).unwrap().round_path(round).join("adapter");
        Adapter::load(&directory, self.source.config()).unwrap()
    }
}

impl Coordinator {
    /// Where connections are taken that somebody else has made.
    pub fn connections(&self) -> mpsc::Sender<Connection> {
        self.connections.clone()
    }

    /// The participant's end of a new connection.
    pub async fn connect(&self, name: &str) -> Connection {
        self.connect_tapped(name, Arc::new(|_: &[u8]| ())).await
    }

    pub async fn connect_tapped(&self, name: &str, tap: Tap) -> Connection {
        let name = PeerName::new(name).unwrap();
        let peer = PeerIdentity::Participant { name };
        let (ours, theirs) = Connection::pair_tapped(peer, PeerIdentity::Coordinator, tap);
        self.connections.send(theirs).await.unwrap();
        ours
    }

    /// Starts a participant over a connection of its own.
    pub async fn join(&self, mut participant: Participant) -> JoinHandle<Joined> {
        let connection = self.connect(&participant.name).await;
        tokio::spawn(async move {
            let ended = participant.run(&connection).await;
            connection.close(wire::CloseCode::Done, "the test's participant has ended");
            (participant, ended)
        })
    }

    /// Waits for a metric row that fits.
    pub async fn until(&mut self, fits: impl Fn(&Row) -> bool) -> Row {
        loop {
            let row = self.written.recv().await.expect("the run ended before such a row was written");
            if fits(&row) {
                return row;
            }
        }
    }

    pub async fn end(self) -> Result<Ended, RunError> {
        self.ended.await.unwrap()
    }

    pub async fn stop(self) -> Result<Ended, RunError> {
        // It may have ended by itself.
        let _ = self.stop.send(());
        self.ended.await.unwrap()
    }
}

pub type Joined = (Participant, Result<String, ParticipantError>);

struct Recorder {
    rows: Arc<Mutex<Vec<Row>>>,
    tell: mpsc::UnboundedSender<Row>,
}

impl Watcher for Recorder {
    fn row(&mut self, row: &Row) {
        self.rows.lock().unwrap().push(row.clone());
        let _ = self.tell.send(row.clone());
    }

    fn note(&mut self, _: &str) {}

    fn step(&mut self, _: u64, _: u64, _: f64) {}
}

impl Reporter for Seen {
    fn step(&self, _: u32, report: &StepReport) {
        self.steps.lock().unwrap().push(*report);
    }

    fn evaluated(&self, _: u32, _: f64, _: u64) {}

    fn round_closed(&self, _: u32, _: &str) {}
}

impl Holding {
    pub fn at(step: u64) -> (Self, mpsc::UnboundedReceiver<()>, blocking::Sender<()>) {
        let (tell, reached) = mpsc::unbounded_channel();
        let (release, released) = blocking::channel();
        (Self { step, reached: tell, released: Mutex::new(released) }, reached, release)
    }
}

impl Reporter for Holding {
    fn step(&self, _: u32, report: &StepReport) {
        // Once: the step may be trained again, and then nobody is told any more.
        if report.step == self.step && self.reached.send(()).is_ok() {
            let released = self.released.lock().unwrap();
            assert!(tokio::task::block_in_place(|| released.recv()).is_err(), "it is released by dropping the sender");
        }
    }

    fn evaluated(&self, _: u32, _: f64, _: u64) {}

    fn round_closed(&self, _: u32, _: &str) {}
}

/// Runs the experiment to its end with these participants, each over one connection.
pub async fn run_to_the_end(world: &World, names: &[&str]) -> BTreeMap<String, Vec<StepReport>> {
    let coordinator = world.coordinator();
    let mut joined = Vec::new();
    for name in names {
        let (participant, seen) = world.participant(name);
        joined.push((*name, seen, coordinator.join(participant).await));
    }
    let ended = coordinator.end().await.unwrap();
    assert!(!ended.stopped);
    let mut steps = BTreeMap::new();
    for (name, seen, joined) in joined {
        let (participant, reason) = joined.await.unwrap();
        assert_eq!(reason.unwrap(), "completed", "{name}");
        // Who measures learns that it was not for nothing.
        let is_measuring = world.experiment.federation.imatrix_tokens > 0;
        assert_eq!(participant.measured.is_kept(&world.experiment), is_measuring, "{name}");
        let seen = seen.steps.lock().unwrap().clone();
        steps.insert(name.to_owned(), seen);
    }
    steps
}

/// Step, the loss' bits, and tokens: equal only where the arithmetic is.
pub type StepBits = (u64, u64, u64);

pub fn loss_bits(steps: &[StepReport]) -> Vec<StepBits> {
    steps.iter().map(|report| (report.step, report.loss_nats.to_bits(), report.tokens)).collect()
}

/// One participant is a cohort.
pub fn alone(text: &str) -> String {
    text.replace("cohort = 2", "cohort = 1").replace("quorum = 2", "quorum = 1")
}

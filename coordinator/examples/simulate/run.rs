//! One simulated run: the coordinator's and the devices' own code, on one thread, under a clock that moves when nobody has
//! anything to do.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use coordinator::home::Home;
use coordinator::journal::Settings;
use coordinator::run::{Run, Watcher};
use experiment::{Experiment, Row, RunDirectory, Seed};
use net::{Connection, NetError, PeerIdentity, PeerName, Watched};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use wire::CloseCode;

use crate::machine::{IDLE, Machine};
use crate::network::{Lane, Line};
use crate::plan::Plan;
use crate::site::{Calm, NAMES, ROUNDS, Site, VARIANTS, experiment};
use crate::trace::Trace;
use crate::{device, liar};

/// A run that takes longer, by its own clock, does not end.
const DEADLINE: Duration = Duration::from_secs(3 * 3600);
/// A coordinator that has to be started again more often than this makes no progress.
const LIVES_MAX: u32 = 60;
/// What a disk takes for an fsync, while others go on.
const DISK: Duration = Duration::from_millis(20);
/// A new connection is given up after this long.
const HANDSHAKE: Duration = Duration::from_secs(10);
const UNIX_S: i64 = 1_790_000_000;

pub struct Ended {
    pub trace: u64,
    pub violations: Vec<String>,
    pub adapter: Vec<u8>,
    pub imatrices: BTreeMap<String, Vec<u8>>,
    pub points: Vec<BTreeMap<String, u64>>,
    pub virtual_time: Duration,
}

/// A run's world.
pub struct Sim {
    pub experiment: Arc<Experiment>,
    pub directory: PathBuf,
    pub plan: Plan,
    pub trace: Trace,
    pub devices: Vec<Arc<Machine>>,
    pub seen: Mutex<Seen>,
    coordinator: Arc<Machine>,
    began: Instant,
    /// Where the coordinator takes connections, while there is one.
    door: Watched<Option<mpsc::Sender<Connection>>>,
}

/// What has been seen from outside.
#[derive(Default)]
pub struct Seen {
    /// The last round on record as finished.
    recorded: u32,
    /// The last round that a device was told is part of the model.
    pub told: u32,
    abandoned: u32,
    accepted: BTreeSet<(u32, String)>,
    /// Round, sender, and time of the updates that this life of the coordinator has accepted.
    accepted_at: Vec<(u32, String, Instant)>,
    /// Those of earlier lives that were on disk when these ended.
    kept: BTreeSet<(u32, String)>,
    /// The round that a device was last in, and how many of its steps were acknowledged to it.
    pub acknowledged: BTreeMap<String, (u32, u64)>,
    /// Steps that each device has finished, repeated ones included.
    pub steps: Vec<u64>,
}

/// Runs `plan`; what it must end with is `calm`, where that is known.
pub fn simulate(site: &Site, plan: &Plan, calm: Option<&Calm>, shown: bool) -> Ended {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime without threads can be made");
    let directory = tempfile::tempdir_in(site.path("")).expect("a temporary directory can be made");
    crate::PANIC.take();
    offload::set_disk_time(DISK);
    let mut ended = runtime.block_on(async {
        let trace = Trace::new(&directory.path().display().to_string(), shown);
        let sim = Arc::new(Sim::new(plan, directory.path().into(), trace));
        let ran = timeout(DEADLINE, sim.run(site)).await;
        match ran {
            Ok(Ok(())) => sim.check(calm),
            Ok(Err(what)) => sim.trace.violated(what),
            Err(_) => sim.trace.violated("the run does not end"),
        }
        let points = [&sim.coordinator].into_iter().chain(&sim.devices).map(|machine| machine.points()).collect();
        let adapter = std::fs::read(sim.adapter_path()).unwrap_or_default();
        let virtual_time = sim.began.elapsed();
        let imatrices = sim.imatrices();
        Ended { trace: sim.trace.hash(), violations: sim.trace.violations(), adapter, imatrices, points, virtual_time }
    });
    drop(runtime);
    if let Some(panic) = crate::PANIC.take() {
        ended.violations.push(format!("a panic: {panic}"));
    }
    ended
}

impl Sim {
    fn new(plan: &Plan, directory: PathBuf, trace: Trace) -> Self {
        let machine = |name: &str, faults: &Vec<_>| {
            let random = Seed(plan.seed).generator(&format!("machine/{name}"));
            Machine::new(name, faults.clone(), random, trace.clone())
        };
        let coordinator = machine("coordinator", &plan.coordinator);
        let devices: Vec<_> = plan.devices.iter().zip(NAMES).map(|(faults, name)| machine(name, faults)).collect();
        let seen = Mutex::new(Seen { steps: vec![0; devices.len()], ..Seen::default() });
        let experiment = Arc::new(experiment(plan.variant, usize::from(plan.lies > 0), plan.measures));
        let (plan, began, door) = (plan.clone(), Instant::now(), Watched::new(None));
        Self { experiment, directory, plan, trace, devices, seen, coordinator, began, door }
    }

    async fn run(self: &Arc<Self>, site: &Site) -> Result<(), String> {
        std::fs::write(self.directory.join("experiment.toml"), self.experiment.resolved_toml()).map_err(text)?;
        let mut devices = JoinSet::new();
        for i in 0..self.devices.len() {
            let life = device::live(self.clone(), i, site.records(i), site.stages.clone(), site.path("store"));
            devices.spawn(life);
        }
        for (i, line) in self.plan.lines.iter().enumerate() {
            devices.spawn(self.clone().darken(i, line.clone()));
        }
        if self.plan.lies > 0 {
            devices.spawn(liar::live(self.clone()));
        }
        self.coordinate(site).await?;
        // Who is there is told. Who is not finds nobody any more, as it would after any run.
        let told = async { while devices.join_next().await.is_some() {} };
        let _ = timeout(Duration::from_secs(60), told).await;
        Ok(())
    }

    /// What was on record before a kill may not have been on disk.
    fn forget_unkept(&self) {
        let mut seen = self.seen();
        seen.accepted.clear();
        for (round, name, when) in std::mem::take(&mut seen.accepted_at) {
            if self.coordinator.had_kept(when) {
                seen.kept.insert((round, name));
            }
        }
    }

    /// The coordinator's lives, until the run is over.
    async fn coordinate(self: &Arc<Self>, site: &Site) -> Result<(), String> {
        for life in 0..LIVES_MAX {
            self.check_kept();
            self.forget_unkept();
            let disk = self.coordinator.boot();
            let jump = self.plan.clock_jumps_ms.get(life as usize).copied().unwrap_or(0);
            let began = self.began;
            let clock = move || {
                let milliseconds = UNIX_S * 1000 + began.elapsed().as_millis() as i64 + jump;
                time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(milliseconds) * 1_000_000)
                    .expect("a time of this century")
            };
            let run = Run {
                experiment: self.directory.join("experiment.toml"),
                home: site.path("home"),
                runs: self.directory.join("runs"),
                connections_max: coordinator::run::CONNECTIONS_MAX,
                init_adapter: None,
                journal: Settings { disk, clock: Arc::new(clock), snapshot_bytes: self.plan.snapshot_bytes },
            };
            let home = Home::open(&run.home).map_err(text)?;
            let (connections, accepted) = mpsc::channel(16);
            self.door.set(Some(connections));
            let (experiment, source) = (self.experiment.clone(), site.source(self.plan.variant));
            let watcher = Box::new(Observer(self.clone()));
            let mut process = tokio::spawn(async move {
                run.serve(experiment, source, home, accepted, watcher, std::future::pending()).await
            });
            let ended = tokio::select! {
                biased;
                restart = self.coordinator.killed() => Err(restart),
                ended = &mut process => Ok(ended),
            };
            self.door.set(None);
            match ended {
                Ok(Ok(Ok(ended))) => {
                    self.coordinator.halt();
                    self.trace.say("coordinator", format_args!("is done after {} rounds", ended.rounds));
                    return Ok(());
                }
                Ok(Ok(Err(error))) => {
                    self.trace.say("coordinator", format_args!("has failed: {error}"));
                    self.coordinator.halt();
                    sleep(Duration::from_millis(self.coordinator.draw(50..3000))).await;
                }
                // Its task has unwound: it was killed at a point of its own.
                Ok(Err(_)) => sleep(self.coordinator.killed().await).await,
                Err(restart) => {
                    process.abort();
                    let _ = process.await;
                    sleep(restart).await;
                }
            }
        }
        Err(format!("the coordinator was started {LIVES_MAX} times"))
    }

    /// A connection to the coordinator, as a device gets it.
    pub async fn connect(&self, device: usize, name: &str) -> Result<Connection, NetError> {
        let silent = |_| NetError::Lost { reason: "no answer".into(), retryable: true };
        let door = async {
            let line = self.plan.lines.get(device).cloned();
            let dark = line.as_ref().and_then(|line| line.dark_until(self.began.elapsed()));
            sleep(dark.map_or(Duration::ZERO, |until| until - self.began.elapsed())).await;
            sleep(Duration::from_millis(line.map_or(1, |line| 2 * line.delay_ms))).await;
            self.door.wait_for(Option::clone).await
        };
        let door = timeout(HANDSHAKE, door).await.map_err(silent)?;
        let random = Seed(self.plan.seed).generator(&format!("lane/{name}/{}", self.began.elapsed().as_nanos()));
        let machine = self.devices.get(device).cloned();
        let lane = Lane {
            line: self.plan.lines.get(device).cloned().unwrap_or(Line { delay_ms: 1, lost: 0, blackouts: Vec::new() }),
            device: machine
                .clone()
                .unwrap_or_else(|| Machine::new(name, Vec::new(), random.clone(), self.trace.clone())),
            coordinator: self.coordinator.clone(),
            trace: self.trace.clone(),
            began: self.began,
            random: Mutex::new(random),
        };
        let peer = PeerIdentity::Participant { name: PeerName::new(name).expect("a plain name") };
        let (ours, theirs, cable) = Connection::pair_over(peer, PeerIdentity::Coordinator, Arc::new(lane));
        if let Some(machine) = machine {
            machine.connect(cable.clone());
        }
        self.coordinator.connect(cable);
        if let Err(mpsc::error::SendError(theirs)) = door.send(theirs).await {
            theirs.close(CloseCode::GoingAway, "the coordinator has ended");
        }
        Ok(ours)
    }

    /// Long silence ends connections.
    async fn darken(self: Arc<Self>, device: usize, line: Line) {
        for blackout in line.blackouts {
            sleep((blackout.from + IDLE).saturating_sub(self.began.elapsed())).await;
            if blackout.lasts > IDLE {
                self.trace.say(&self.devices[device].name, "has been silent for too long");
                self.devices[device].cut_cables();
            }
        }
    }

    /// What was finished before is finished still.
    fn check_kept(&self) {
        let Ok(run) = RunDirectory::open(&self.directory.join("runs/simulated")) else { return };
        let finished = run.finished_rounds().unwrap_or(0);
        let seen = self.seen();
        let promised = seen.recorded.max(seen.told);
        drop(seen);
        if finished < promised {
            self.trace.violated(format_args!("round {promised} was finished; now {finished} rounds are"));
        }
    }

    fn check(&self, calm: Option<&Calm>) {
        self.check_kept();
        let run = RunDirectory::open(&self.directory.join("runs/simulated"));
        let recorded = run.and_then(|run| {
            (1..=ROUNDS).try_for_each(|round| run.verify_round(round))?;
            rounds_with_a_row(&run)
        });
        match recorded {
            Ok(rounds) if rounds.iter().copied().eq(1..=ROUNDS) => {}
            Ok(rounds) => self.trace.violated(format_args!("it has ended, with rows of the rounds {rounds:?}")),
            Err(error) => self.trace.violated(format_args!("it has ended, but its rounds are not whole: {error}")),
        }
        let adapter = std::fs::read(self.adapter_path()).unwrap_or_default();
        if calm.is_some_and(|calm| calm.adapter != adapter) {
            self.trace.violated("the adapter is not the calm run's");
        }
        if let Some(calm) = calm.filter(|_| self.plan.measures) {
            self.check_measured(calm);
        }
        let seen = self.seen();
        let (abandoned, steps) = (seen.abandoned, seen.steps.clone());
        drop(seen);
        if !self.plan.is_gentle {
            return;
        }
        if abandoned > 0 {
            self.trace.violated(format_args!("{abandoned} attempts were abandoned for nothing"));
        }
        let due = u64::from(ROUNDS) * experiment::Federation::clone(&self.experiment.federation).local_steps;
        for (device, steps) in self.devices.iter().zip(steps) {
            let allowed = u64::from(device.kills() + self.coordinator.kills());
            self.trace.say(&device.name, format_args!("has done {steps} steps of {due}"));
            if steps > due + allowed {
                let again = steps - due;
                let name = &device.name;
                self.trace.violated(format_args!("{name} has repeated {again} steps after {allowed} kills"));
            }
        }
    }

    /// Whoever has measured has measured what it would have in peace; and everybody has whom nothing kept away.
    fn check_measured(&self, calm: &Calm) {
        let found = self.imatrices();
        for (device, expected) in &calm.imatrices {
            match found.get(device) {
                Some(found) if found == expected => {}
                Some(_) => self.trace.violated(format_args!("the importance matrix of {device} is not the calm run's")),
                None if self.plan.is_gentle => {
                    self.trace.violated(format_args!("{device} has left no importance matrix"));
                }
                None => self.trace.say(device, "has left no importance matrix"),
            }
        }
        if let Some(device) = found.keys().find(|device| !calm.imatrices.contains_key(*device)) {
            self.trace.violated(format_args!("an importance matrix of {device} was believed"));
        }
    }

    /// By the device's name.
    fn imatrices(&self) -> BTreeMap<String, Vec<u8>> {
        let Ok(files) = std::fs::read_dir(self.directory.join("runs/simulated/imatrix")) else {
            return BTreeMap::new();
        };
        let paths = files.filter_map(|file| Some(file.ok()?.path()));
        let paths = paths.filter(|path| path.extension().is_some_and(|extension| extension == "gguf"));
        let named = paths.filter_map(|path| Some((path.file_stem()?.to_str()?.to_owned(), std::fs::read(&path).ok()?)));
        named.collect()
    }

    fn adapter_path(&self) -> PathBuf {
        self.directory.join(format!("runs/simulated/rounds/{ROUNDS:04}/adapter/adapter_model.safetensors"))
    }

    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn rounds_with_a_row(run: &RunDirectory) -> Result<Vec<u32>, experiment::Error> {
    let mut rounds = Vec::new();
    for row in run.rows()? {
        if let Row::Round { round, .. } = row? {
            rounds.push(round);
        }
    }
    Ok(rounds)
}

struct Observer(Arc<Sim>);

impl Watcher for Observer {
    fn row(&mut self, row: &Row) {
        let Self(sim) = self;
        sim.trace.say("row", serde_json::to_string(row).expect("a row is JSON"));
        let mut seen = sim.seen();
        match row {
            Row::Round { round, members, .. } => {
                let is_due = *round > seen.recorded;
                seen.recorded = seen.recorded.max(*round);
                drop(seen);
                if !is_due {
                    sim.trace.violated(format_args!("round {round} is finished again"));
                }
                if members.len() != sim.devices.len() {
                    sim.trace.violated(format_args!("round {round} is made of {} updates", members.len()));
                }
            }
            Row::Update { round, participant, accepted: true, .. } => {
                let is_new = seen.accepted.insert((*round, participant.clone()));
                seen.accepted_at.push((*round, participant.clone(), Instant::now()));
                drop(seen);
                if !is_new {
                    sim.trace.violated(format_args!("an update of {participant} for round {round} is accepted again"));
                }
            }
            _ => {}
        }
    }

    fn note(&mut self, text: &str) {
        let Self(sim) = self;
        sim.trace.say("note", text);
        if text.contains("is abandoned") {
            let mut seen = sim.seen();
            seen.abandoned += 1;
            seen.accepted.clear();
            seen.accepted_at.clear();
            seen.kept.clear();
            seen.acknowledged.clear();
        }
        // What was on its way when an attempt was abandoned counts for no other one.
        if text.contains(" starts with ") {
            sim.seen().acknowledged.clear();
        }
        let is_split = VARIANTS[sim.plan.variant].is_split;
        if let Some(lost) = lost(text, &sim.seen(), is_split) {
            sim.trace.violated(lost);
        }
    }

    fn step(&mut self, _: u64, _: u64, _: f64) {}
}

/// What a coordinator that was started again does not know, though it had been acknowledged. The devices would make up for
/// it, so that nothing else might show it.
fn lost(note: &str, seen: &Seen, is_split: bool) -> Option<String> {
    let mut words = note.split(' ');
    if let Some((who, rest)) = note.split_once(" goes on with round ") {
        let (round, step) = rest.split_once(" at step ")?;
        let (round, step): (u32, u64) = (round.parse().ok()?, step.parse().ok()?);
        // Without a body a coordinator knows nothing of steps.
        let (of, steps) = *seen.acknowledged.get(who)?;
        return (is_split && of == round && step < steps)
            .then(|| format!("{steps} steps of round {round} were acknowledged to {who}; {step} are left"));
    }
    let (Some("round"), Some(round), Some("goes")) = (words.next(), words.next(), words.next()) else { return None };
    let round: u32 = round.parse().ok()?;
    let delivered: usize = note.split_once("; ")?.1.split(' ').next()?.parse().ok()?;
    let kept = seen.kept.iter().filter(|(of, _)| *of == round).count();
    (delivered < kept).then(|| format!("{kept} updates of round {round} were on disk; {delivered} are left"))
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

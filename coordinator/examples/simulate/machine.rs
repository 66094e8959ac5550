//! One machine, over the lives of the process on it: its disk, its cables, its time of day, and what befalls it.
//!
//! Every operation on its disk, every piece of bytes that it sends or receives, and every step that it finishes is a named
//! point, at which a fault may strike. A process that is killed ends in the middle of what it does: its thread of
//! execution unwinds, nothing that it sends arrives, and nothing that it writes reaches the disk. Where the machine loses
//! its power with it, files lose what was never synced, or a part of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use net::Cable;
use rand::Rng;
use rand_chacha::ChaCha20Rng;
use storage::{Disk, Operation};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::trace::Trace;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
/// A silent peer is given up after this long.
pub const IDLE: Duration = Duration::from_secs(20);
/// A journal takes less to bring a record to a good disk, one that is tried again after a full one included.
const KEPT: Duration = Duration::from_millis(500);
/// A device that waits says something this often, and is told then that the coordinator was started again.
const KEEP_ALIVE_MS: u64 = 2000;

pub struct Machine {
    pub name: String,
    pub is_coordinator: bool,
    trace: Trace,
    killed: Notify,
    state: Mutex<State>,
}

struct State {
    /// How many processes there have been.
    life: u32,
    alive: bool,
    /// Points passed so far, by name, and all of them.
    passed: BTreeMap<String, u64>,
    passed_all: u64,
    faults: Vec<Fault>,
    full_until: Option<Instant>,
    /// When its last process ended.
    ended: Option<Instant>,
    /// The end of the last time that its disk was full.
    good_since: Option<Instant>,
    cables: Vec<Cable>,
    restart: Duration,
    loses_power: bool,
    /// What files held when they were last on disk; None where they were not there. Kept for a machine that loses its power.
    unsynced: Option<Unsynced>,
    kills: u32,
    random: ChaCha20Rng,
}

#[derive(Default)]
struct Unsynced {
    contents: BTreeMap<PathBuf, Option<Vec<u8>>>,
    names: BTreeMap<PathBuf, Option<Vec<u8>>>,
}

#[derive(Debug, Clone)]
pub struct Fault {
    pub at: At,
    pub what: What,
}

/// When a fault strikes.
#[derive(Debug, Clone)]
pub enum At {
    /// At the nth passage of a point of this name, counted from 0.
    Point { name: String, nth: u64 },
    /// At the nth passage of any point.
    Any { nth: u64 },
}

#[derive(Debug, Clone)]
pub enum What {
    Kill {
        power: bool,
        restart: Duration,
    },
    /// Whatever writes fails until there is room again.
    Full {
        lasts: Duration,
    },
    /// One operation fails; some of a write's bytes may be there.
    Fails,
    /// The cable of every connection is cut.
    Cut,
}

/// What a killed process unwinds with.
pub struct Killed;

impl Machine {
    pub fn new(name: &str, faults: Vec<Fault>, random: ChaCha20Rng, trace: Trace) -> Arc<Self> {
        let loses_power = faults.iter().any(|fault| matches!(fault.what, What::Kill { power: true, .. }));
        let state = State {
            life: 0,
            alive: false,
            passed: BTreeMap::new(),
            passed_all: 0,
            faults,
            full_until: None,
            ended: None,
            good_since: None,
            cables: Vec::new(),
            restart: Duration::ZERO,
            loses_power: false,
            unsynced: loses_power.then(Unsynced::default),
            kills: 0,
            random,
        };
        let is_coordinator = name == "coordinator";
        Arc::new(Self { name: name.into(), is_coordinator, trace, killed: Notify::new(), state: Mutex::new(state) })
    }

    /// Starts a process: from now on the one before can do nothing any more.
    pub fn boot(self: &Arc<Self>) -> Disk {
        let mut state = self.state();
        if std::mem::take(&mut state.loses_power) {
            self.lose_unsynced(&mut state);
        }
        (state.life, state.alive) = (state.life + 1, true);
        state.cables.clear();
        let (life, machine) = (state.life, self.clone());
        self.trace.say(&self.name, format_args!("starts, life {life}"));
        Disk::with_faults(Arc::new(move |operation, path| machine.operation(life, operation, path)))
    }

    /// The process has ended by itself.
    pub fn halt(&self) {
        let mut state = self.state();
        (state.alive, state.ended) = (false, Some(Instant::now()));
    }

    /// Returns when the process has been killed, and how long it takes until it starts again.
    pub async fn killed(&self) -> Duration {
        self.killed.notified().await;
        self.state().restart
    }

    /// How often its process was killed or its disk made it stop.
    pub fn kills(&self) -> u32 {
        self.state().kills
    }

    /// Whether all that its last process had given to its disk before `when` was on it when that ended.
    pub fn had_kept(&self, when: Instant) -> bool {
        let state = self.state();
        state.ended.is_some_and(|ended| ended > state.good_since.map_or(when, |good| good.max(when)) + KEPT)
    }

    pub fn points(&self) -> BTreeMap<String, u64> {
        self.state().passed.clone()
    }

    pub fn draw(&self, range: std::ops::Range<u64>) -> u64 {
        self.state().random.random_range(range)
    }

    pub fn connect(&self, cable: Cable) {
        self.state().cables.push(cable);
    }

    /// Both ends find out after a while.
    pub fn cut_cables(&self) {
        let mut state = self.state();
        for cable in std::mem::take(&mut state.cables) {
            let mut notices = || Duration::from_millis(state.random.random_range(0..IDLE.as_millis() as u64));
            cable.cut(notices(), notices());
        }
    }

    /// Passes a point that is not an operation of the disk, in the middle of what the process does.
    pub fn pass(&self, name: &str) {
        if let Some(What::Kill { .. }) = self.passed(name) {
            std::panic::resume_unwind(Box::new(Killed));
        }
    }

    /// The same, where another task than one of the process passes it.
    pub fn pass_outside(&self, name: &str) {
        self.passed(name);
    }

    pub fn kill(&self, power: bool, restart: Duration) {
        let mut state = self.state();
        if !std::mem::take(&mut state.alive) {
            return;
        }
        self.trace.say(&self.name, format_args!("is killed{}", if power { ", and loses its power" } else { "" }));
        (state.restart, state.loses_power, state.full_until) = (restart, power, None);
        state.kills += 1;
        state.ended = Some(Instant::now());
        for cable in std::mem::take(&mut state.cables) {
            // A coordinator that is there again says that it knows nothing of the connection.
            let keep_alive = Duration::from_millis(state.random.random_range(0..KEEP_ALIVE_MS));
            match self.is_coordinator {
                true => cable.cut((restart + keep_alive).min(IDLE), Duration::ZERO),
                false => cable.cut(Duration::ZERO, IDLE),
            }
        }
        self.killed.notify_one();
    }

    fn passed(&self, name: &str) -> Option<What> {
        let mut state = self.state();
        if !state.alive {
            return None;
        }
        let nth = *state.passed.entry(name.to_owned()).and_modify(|count| *count += 1).or_insert(1) - 1;
        let nth_of_all = state.passed_all;
        state.passed_all += 1;
        let strikes = |fault: &Fault| match &fault.at {
            At::Point { name: wanted, nth: at } => wanted == name && *at == nth,
            At::Any { nth: at } => *at == nth_of_all,
        };
        let at = state.faults.iter().position(strikes)?;
        let what = state.faults.remove(at).what;
        self.trace.say(&self.name, format_args!("{what:?} at {name} {nth}"));
        match &what {
            What::Kill { power, restart } => {
                drop(state);
                self.kill(*power, *restart);
            }
            What::Full { lasts } => {
                state.full_until = Some(Instant::now() + *lasts);
                state.good_since = state.good_since.max(state.full_until);
            }
            What::Cut => {
                drop(state);
                self.cut_cables();
            }
            What::Fails => {}
        }
        Some(what)
    }

    fn operation(&self, life: u32, operation: Operation, path: &Path) -> storage::Fault {
        let is_dead = {
            let state = self.state();
            state.life != life || !state.alive
        };
        if is_dead {
            std::panic::resume_unwind(Box::new(Killed));
        }
        let name = format!("{}: {operation:?}", kind_of(path));
        let what = self.passed(&name);
        if let Some(What::Kill { .. }) = &what {
            // Half of what is being written may have reached the file.
            self.tear(operation, path);
            std::panic::resume_unwind(Box::new(Killed));
        }
        let mut state = self.state();
        if let Some(What::Fails) = what {
            state.kills += 1;
            return match operation {
                Operation::Write => {
                    let written = state.random.random_range(0..64);
                    storage::Fault::Tears { written, errno: EIO }
                }
                _ => storage::Fault::Fails { errno: EIO },
            };
        }
        let grows = matches!(operation, Operation::Create | Operation::Write);
        if grows && state.full_until.is_some_and(|until| Instant::now() < until) {
            let written = state.random.random_range(0..64);
            return match operation {
                Operation::Write => storage::Fault::Tears { written, errno: ENOSPC },
                _ => storage::Fault::Fails { errno: ENOSPC },
            };
        }
        if let Some(unsynced) = &mut state.unsynced {
            unsynced.note(operation, path);
        }
        storage::Fault::None
    }

    /// A process may be killed within a write: a file has some of what was to come. What it was matters to nobody, since a
    /// reader finds by its length or checksum that it is not whole.
    fn tear(&self, operation: Operation, path: &Path) {
        let count = self.state().random.random_range(0..24usize);
        if operation == Operation::Write
            && let Ok(mut bytes) = std::fs::read(path)
        {
            bytes.extend(std::iter::repeat_n(0xa5, count));
            let _ = std::fs::write(path, bytes);
        }
    }

    fn lose_unsynced(&self, state: &mut State) {
        let Some(unsynced) = &mut state.unsynced else { return };
        let Unsynced { contents, names } = std::mem::take(unsynced);
        for (path, before) in contents {
            let Ok(now) = std::fs::read(&path) else { continue };
            let whole = before.as_ref().map_or(0, Vec::len);
            match state.random.random_range(0..3) {
                0 => {}
                1 => put(&path, before),
                _ if now.len() > whole => {
                    let kept = state.random.random_range(whole..now.len());
                    put(&path, Some(now[..kept].to_vec()));
                }
                _ => put(&path, before),
            }
        }
        for (path, before) in names {
            if state.random.random() {
                put(&path, before);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Unsynced {
    fn note(&mut self, operation: Operation, path: &Path) {
        match operation {
            Operation::Create | Operation::Write | Operation::Truncate => {
                self.contents.entry(path.to_owned()).or_insert_with(|| std::fs::read(path).ok());
            }
            Operation::Sync => drop(self.contents.remove(path)),
            Operation::Rename => {
                self.names.entry(path.to_owned()).or_insert_with(|| std::fs::read(path).ok());
            }
            Operation::Remove => drop(self.contents.remove(path)),
            Operation::SyncDirectory => self.names.retain(|name, _| name.parent() != Some(path)),
        }
    }
}

fn put(path: &Path, bytes: Option<Vec<u8>>) {
    let _ = match bytes {
        Some(bytes) => std::fs::write(path, bytes),
        None => std::fs::remove_file(path),
    };
}

/// What kind of file it is: a name without numbers.
fn kind_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name.ends_with(".journal.tmp") || name.ends_with(".journal") {
        let is_first = !name.contains('-');
        let which = if is_first { "journal" } else { "journal segment" };
        return if name.ends_with(".tmp") { format!("new {which}") } else { which.to_owned() };
    }
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let plain = name.trim_end_matches(".tmp").trim_end_matches(".a").trim_end_matches(".b");
    if is_number(plain) { "a round's directory".into() } else { plain.to_owned() }
}

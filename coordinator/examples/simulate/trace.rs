//! What happens in a simulated run, in order: the same seed gives the same lines, and so the same hash.

use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard};

use sha2::{Digest, Sha256};
use tokio::time::Instant;

#[derive(Clone)]
pub struct Trace(Arc<Mutex<Lines>>);

struct Lines {
    began: Instant,
    hash: Sha256,
    shown: bool,
    /// Paths in it are of a directory that has another name every time.
    directory: String,
    violations: Vec<String>,
}

impl Trace {
    /// From within the run's runtime, whose clock it reads.
    pub fn new(directory: &str, shown: bool) -> Self {
        let (began, hash) = (Instant::now(), Sha256::new());
        Self(Arc::new(Mutex::new(Lines { began, hash, shown, directory: directory.into(), violations: Vec::new() })))
    }

    pub fn say(&self, who: impl Display, what: impl Display) {
        let mut lines = self.lines();
        let text = what.to_string().replace(&lines.directory, "");
        let line = format!("{:>9.3} {who}: {text}\n", lines.began.elapsed().as_secs_f64());
        lines.hash.update(&line);
        if lines.shown {
            print!("{line}");
        }
    }

    /// Something that must never happen.
    pub fn violated(&self, what: impl Display) {
        self.say("VIOLATION", &what);
        self.lines().violations.push(what.to_string());
    }

    pub fn violations(&self) -> Vec<String> {
        self.lines().violations.clone()
    }

    /// The first 8 bytes of the hash of all lines so far.
    pub fn hash(&self) -> u64 {
        let hash: [u8; 32] = self.lines().hash.clone().finalize().into();
        u64::from_be_bytes(std::array::from_fn(|at| hash[at]))
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

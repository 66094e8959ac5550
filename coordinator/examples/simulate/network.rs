//! The network between a device and the coordinator: how long each piece of bytes takes.
//!
//! Streams come over QUIC, which sends again what was lost, drops what came twice, and puts in order what did not: at this
//! height loss is a longer delay, and what is left of reordering is that streams overtake each other.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use net::{Network, Side};
use rand::Rng;
use rand_chacha::ChaCha20Rng;
use tokio::time::Instant;

use crate::machine::Machine;
use crate::trace::Trace;

/// What a seed says of a device's line.
#[derive(Debug, Clone)]
pub struct Line {
    pub delay_ms: u64,
    /// Of a hundred pieces, those that are lost and come later.
    pub lost: u32,
    pub blackouts: Vec<Blackout>,
}

/// Nothing crosses the line, since the run's beginning.
#[derive(Debug, Clone, Copy)]
pub struct Blackout {
    pub from: Duration,
    pub lasts: Duration,
}

pub struct Lane {
    pub line: Line,
    pub device: Arc<Machine>,
    pub coordinator: Arc<Machine>,
    pub trace: Trace,
    pub began: Instant,
    pub random: Mutex<ChaCha20Rng>,
}

impl Line {
    /// Until when nothing crosses, if it is dark now.
    pub fn dark_until(&self, now: Duration) -> Option<Duration> {
        let ends = self.blackouts.iter().filter(|blackout| blackout.from <= now).map(|dark| dark.from + dark.lasts);
        ends.filter(|until| *until > now).max()
    }
}

impl Network for Lane {
    fn delay(&self, from: Side, bytes: usize) -> Duration {
        let (sender, receiver) = match from {
            Side::First => (&self.device, &self.coordinator),
            Side::Second => (&self.coordinator, &self.device),
        };
        sender.pass_outside("network: sent");
        receiver.pass_outside("network: received");
        let mut random = self.random.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut delay_ms = random.random_range(0..=2 * self.line.delay_ms);
        while random.random_range(0..100) < self.line.lost {
            delay_ms += random.random_range(50..500);
        }
        drop(random);
        let now = self.began.elapsed();
        let dark = self.line.dark_until(now).map_or(Duration::ZERO, |until| until - now);
        self.trace.say(&sender.name, format_args!("{bytes} bytes to {} in {delay_ms} ms", receiver.name));
        dark + Duration::from_millis(delay_ms)
    }
}

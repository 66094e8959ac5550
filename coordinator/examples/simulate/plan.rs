//! What befalls a run: everything is drawn from the seed before the run begins.

use std::time::Duration;

use experiment::Seed;
use rand::Rng;
use rand_chacha::ChaCha20Rng;

use crate::machine::{At, Fault, What};
use crate::network::{Blackout, Line};
use crate::site::{Calm, VARIANTS};

#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub variant: usize,
    /// Of each device.
    pub lines: Vec<Line>,
    pub coordinator: Vec<Fault>,
    pub devices: Vec<Vec<Fault>>,
    /// By how much the coordinator's time of day has moved at each of its starts.
    pub clock_jumps_ms: Vec<i64>,
    /// One device more takes part that says what is not so, this many times.
    pub lies: usize,
    /// Devices fetch the model's parts instead of finding them on their disks.
    pub fetches: bool,
    /// Importance matrices are collected behind the last round.
    pub measures: bool,
    /// So small that a round's journal goes on in several files.
    pub snapshot_bytes: usize,
    /// Nothing keeps anybody away for so long that a round goes on without it.
    pub is_gentle: bool,
}

impl Plan {
    /// Delays, and nothing else.
    pub fn calm(variant: usize, seed: u64) -> Self {
        let mut random = Seed(seed).generator("plan");
        let devices = VARIANTS[variant].devices;
        let lines = (0..devices).map(|_| line(&mut random)).collect();
        Self {
            seed,
            variant,
            lines,
            coordinator: Vec::new(),
            devices: vec![Vec::new(); devices],
            clock_jumps_ms: Vec::new(),
            lies: 0,
            fetches: false,
            measures: true,
            snapshot_bytes: 3000,
            is_gentle: true,
        }
    }

    /// One kill of one machine, at one point.
    pub fn kill(variant: usize, seed: u64, machine: usize, name: &str, passages: u64) -> Self {
        let mut plan = Self::calm(variant, seed);
        let mut random = Seed(seed).generator(name);
        let at = At::Point { name: name.into(), nth: random.random_range(0..passages) };
        let what = What::Kill { power: seed % 3 == 2, restart: Duration::from_millis(random.random_range(50..3000)) };
        match machine {
            0 => plan.coordinator.push(Fault { at, what }),
            device => plan.devices[device - 1].push(Fault { at, what }),
        }
        plan
    }

    pub fn of_seed(seed: u64, calm: &[Calm]) -> Self {
        let mut random = Seed(seed).generator("faults");
        let variant = random.random_range(0..VARIANTS.len());
        let mut plan = Self::calm(variant, seed);
        let calm = &calm[variant];
        for _ in 0..random.random_range(1..=5) {
            let machine = if random.random_range(0..2) == 0 { 0 } else { random.random_range(1..=plan.devices.len()) };
            let at = At::Any { nth: random.random_range(0..calm.passages(machine)) };
            let what = plan.fault(&mut random);
            // A device whose disk fails leaves its round.
            plan.is_gentle &= machine == 0 || !matches!(what, What::Fails);
            let fault = Fault { at, what };
            match machine {
                0 => plan.coordinator.push(fault),
                device => plan.devices[device - 1].push(fault),
            }
        }
        // Each end takes up to 20 s to notice a cut: two of them in a row may outlast the 30 s that a place is kept.
        let faults = plan.coordinator.iter().chain(plan.devices.iter().flatten());
        plan.is_gentle &= faults.filter(|fault| matches!(fault.what, What::Cut)).count() < 2;
        if random.random_range(0..4) == 0 {
            plan.black_out(&mut random);
        }
        if random.random_range(0..3) == 0 {
            let day_ms = 86_400_000;
            plan.clock_jumps_ms = (0..8).map(|_| random.random_range(-400 * day_ms..400 * day_ms)).collect();
        }
        // Where nobody else sees the steps, nobody can tell what a device says of them.
        if VARIANTS[variant].is_split && random.random_range(0..4) == 0 {
            plan.lies = random.random_range(1..=8);
            plan.is_gentle = false;
        }
        plan.fetches = random.random_range(0..16) == 0;
        plan.measures = random.random_range(0..2) == 0;
        plan.snapshot_bytes = [400, 1000, 3000][random.random_range(0..3)];
        plan
    }

    fn fault(&mut self, random: &mut ChaCha20Rng) -> What {
        match random.random_range(0..10) {
            0..=4 => {
                let is_long = random.random_range(0..8) == 0;
                self.is_gentle &= !is_long;
                let restart_ms =
                    if is_long { random.random_range(20_000..90_000) } else { random.random_range(50..4000) };
                What::Kill { power: random.random_range(0..3) == 0, restart: Duration::from_millis(restart_ms) }
            }
            5..=6 => What::Cut,
            7 => What::Full { lasts: Duration::from_millis(random.random_range(100..5000)) },
            _ => What::Fails,
        }
    }

    /// For a partition all lines go dark together.
    fn black_out(&mut self, random: &mut ChaCha20Rng) {
        let blackout = Blackout {
            from: Duration::from_millis(random.random_range(0..20_000)),
            lasts: Duration::from_millis(random.random_range(500..60_000)),
        };
        self.is_gentle = false;
        let everybody = random.random();
        let one = random.random_range(0..self.lines.len());
        for (i, line) in self.lines.iter_mut().enumerate() {
            if everybody || i == one {
                line.blackouts.push(blackout);
            }
        }
    }
}

fn line(random: &mut ChaCha20Rng) -> Line {
    let delay_ms = [1, 5, 20, 80, 300][random.random_range(0..5)];
    Line { delay_ms, lost: [0, 0, 1, 5, 20][random.random_range(0..5)], blackouts: Vec::new() }
}

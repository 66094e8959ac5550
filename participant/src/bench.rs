//! `participant bench train`: how fast this device trains, unsplit, and in how much memory.

use std::path::PathBuf;
use std::time::Instant;

use experiment::Device;
use model::bench::{Measured, Shape, Workload, smollm2_135m};
use model::{ComputeDevice, Part};

use crate::ParticipantError;

pub struct BenchTrain {
    /// Absent: SmolLM2-135M's shape with random weights.
    pub model: Option<PathBuf>,
    pub shape: Shape,
    pub device: Device,
    pub steps: usize,
}

pub struct Benched {
    pub measured: Measured,
    /// From opening the model to the first step.
    pub load_ms: f64,
    /// The process' largest resident set.
    pub peak_rss_bytes: Option<u64>,
}

impl BenchTrain {
    pub fn run(self) -> Result<Benched, ParticipantError> {
        let Self { model, shape, device, steps } = self;
        let device = ComputeDevice::new(&device)?.timed();
        let begun = Instant::now();
        let source = match &model {
            Some(path) => model::source::open(path)?,
            None => smollm2_135m()?,
        };
        let part = Part::whole(source.config().blocks);
        let mut workload = Workload::new(&*source, part, &device, shape)?;
        let load_ms = begun.elapsed().as_secs_f64() * 1e3;
        drop(source);
        let measured = workload.measure(steps, || begun.elapsed())?;
        Ok(Benched { measured, load_ms, peak_rss_bytes: peak_rss_bytes() })
    }
}

/// Where the system tells it: Linux.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

//! What a device keeps of its training, beside its key: `<state>/training/`.
//!
//! ```text
//! step.a, step.b     after the newest step and the one before: adapters, optimizers' moments, the place in the data
//! start.a, start.b   the same, as the newest two rounds began
//! measured.a, measured.b   which adapter each run has measured channel sums with, by digests (session/measuring.rs)
//! ```
//!
//! Numbers alone: no text, no token ids, no labels. A snapshot is written while the next step computes, and is on disk
//! before that step is committed, so that a device that is killed repeats one step at most.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use storage::{Disk, Generation, Generations, Identity, StorageError, pack, unpack};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::ParticipantError;

/// Until a disk is tried again.
pub const RETRY: Duration = Duration::from_millis(250);

pub struct Keeper {
    steps: Slot,
    starts: Slot,
}

/// What was found on the disk, newest first.
pub struct Found {
    pub steps: Vec<(StepHeader, Vec<Vec<f32>>)>,
    pub starts: Vec<(StartHeader, Vec<Vec<f32>>)>,
}

/// Of a snapshot after a step. Losses are kept by their bits: JSON's decimals may lose one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepHeader {
    pub round: u32,
    pub attempt: u32,
    /// The step that comes next.
    pub next_step: u64,
    /// Epoch and micro-batch.
    pub position: [u64; 2],
    /// Summed over the round's steps.
    pub loss_nats_bits: u64,
    pub tokens: u64,
    /// Steps taken by each optimizer, head's first.
    pub optimizer_steps: Vec<u64>,
    pub reports: Vec<KeptReport>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptReport {
    pub step: u64,
    pub loss_nats_bits: u64,
    pub tokens: u64,
    pub compute_ms: f64,
    pub wait_ms: f64,
}

/// Of a round's start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartHeader {
    pub round: u32,
    pub position: [u64; 2],
    pub optimizer_steps: Vec<u64>,
}

type Saved = (Generations, Result<(), StorageError>);

/// Generations that a task may be writing just now.
enum Slot {
    Idle(Generations),
    Writing(JoinHandle<Option<Saved>>),
    /// A write has failed for good.
    Broken,
}

impl Keeper {
    /// What is in `directory` of this identity; what is not is passed over.
    pub fn open(disk: &Disk, directory: &Path, identity: Identity) -> Result<(Self, Found), ParticipantError> {
        std::fs::create_dir_all(directory).map_err(ParticipantError::io(directory))?;
        let open = |name: &str| Generations::open(disk, directory, name, identity);
        let (steps, kept_steps) = open("step")?;
        let (starts, kept_starts) = open("start")?;
        let keeper = Self { steps: Slot::Idle(steps), starts: Slot::Idle(starts) };
        Ok((keeper, Found { steps: read(&kept_steps), starts: read(&kept_starts) }))
    }

    /// Begins to write a snapshot of a step; waits only for what was written before.
    pub async fn keep_step(&mut self, payload: Vec<u8>) -> Result<(), ParticipantError> {
        self.steps.write(payload).await
    }

    pub async fn keep_start(&mut self, payload: Vec<u8>) -> Result<(), ParticipantError> {
        self.starts.write(payload).await
    }

    /// Returns once everything that was to be kept is on disk.
    pub async fn settled(&mut self) -> Result<(), ParticipantError> {
        self.starts.settled().await?;
        self.steps.settled().await
    }
}

impl Slot {
    async fn write(&mut self, payload: Vec<u8>) -> Result<(), ParticipantError> {
        self.settled().await?;
        if let Self::Idle(generations) = std::mem::replace(self, Self::Broken) {
            *self = Self::Writing(tokio::spawn(save(generations, payload)));
        }
        Ok(())
    }

    async fn settled(&mut self) -> Result<(), ParticipantError> {
        match self {
            Self::Idle(_) => return Ok(()),
            Self::Broken => {}
            Self::Writing(writing) => match writing.await {
                Ok(Some((generations, Ok(())))) => {
                    *self = Self::Idle(generations);
                    return Ok(());
                }
                Ok(Some((_, Err(error)))) => {
                    *self = Self::Broken;
                    return Err(error.into());
                }
                Ok(None) | Err(_) => *self = Self::Broken,
            },
        }
        Err(ParticipantError::Usage("this device's state could not be written; start again".into()))
    }
}

/// Tries until the disk takes it; nothing is committed meanwhile. A failed fsync is not tried again. None where the write
/// was given up with its process.
async fn save(mut generations: Generations, payload: Vec<u8>) -> Option<Saved> {
    let (mut is_degraded, begun, payload) = (false, Instant::now(), Arc::new(payload));
    loop {
        let again = payload.clone();
        let write = move || {
            let saved = generations.save(&again);
            (generations, saved)
        };
        let saved;
        (generations, saved) = offload::beside(write).await.ok()?;
        match saved {
            Err(error) if error.may_pass() => {
                if !is_degraded {
                    let error = told(&error);
                    tracing::warn!(%error, "storage degraded; nothing is lost, the device waits for its disk");
                }
                is_degraded = true;
                tokio::time::sleep(RETRY).await;
            }
            saved => {
                tracing::debug!(bytes = payload.len(), took_ms = begun.elapsed().as_secs_f64() * 1e3, "kept");
                if is_degraded {
                    tracing::info!("the storage is good again");
                }
                return Some((generations, saved.map(drop)));
            }
        }
    }
}

/// The error, and what to do about it: room on the disk does not help where nobody may write.
pub(crate) fn told(error: &StorageError) -> String {
    match error {
        StorageError::Write { path, source }
            if matches!(source.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) =>
        {
            format!("write {}: {source}{}", path.display(), storage::remedy(source))
        }
        error => error.to_string(),
    }
}

/// What is kept: a [`StepHeader`] or [`StartHeader`], and numbers.
pub fn payload<'a>(header: &impl Serialize, tensors: impl Iterator<Item = &'a [f32]> + Clone) -> Vec<u8> {
    pack(&serde_json::to_vec(header).expect("numbers alone"), tensors)
}

/// A snapshot that is whole but that this version cannot read is passed over like a damaged one.
fn read<H: DeserializeOwned>(kept: &[Generation]) -> Vec<(H, Vec<Vec<f32>>)> {
    let read = |generation: &Generation| {
        let (header, tensors) = unpack(&generation.payload)?;
        Some((serde_json::from_slice(header).ok()?, tensors))
    };
    kept.iter().filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_write_is_not_told_to_free_space() {
        let failed = |kind: ErrorKind| told(&StorageError::Write { path: "state/step.a".into(), source: kind.into() });
        assert!(failed(ErrorKind::PermissionDenied).contains("check who may use it"));
        assert!(failed(ErrorKind::StorageFull).contains("free space on that disk"));
    }
}

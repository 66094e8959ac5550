//! The end of a run: channel sums of this device's training records, for an importance matrix.

use std::collections::BTreeMap;

use experiment::Experiment;
use model::Adapter;
use net::{SendStream, StreamKind};
use sha2::{Digest, Sha256};
use storage::{Generations, Identity};
use wire::{FrameKind, FromParticipant, Request, TensorInfo, UpdateReply};

use super::{Keep, RoundWork};
use crate::ParticipantError;
use crate::keep::{RETRY, told};
use crate::outgoing::Outgoing;

/// What the file holds: pairs of digests, a run's and its adapter's.
const IDENTITY: &Identity = b"headwater: what is measured here";

/// What was measured here, by the digest of the run's experiment.
///
/// Whether a run's rounds are over, only its coordinator knows. But sums of the same records with ever other adapters would
/// tell ever more of these records: a run measures with one, the one that it ends with.
#[derive(Default)]
pub struct Measured {
    sums: BTreeMap<[u8; 32], Sums>,
    /// On disk, where a device keeps anything: it must not forget them when it is started again.
    generations: Option<Generations>,
}

struct Sums {
    /// Digest of the adapter that they were measured with, as far as this device has it.
    adapter: [u8; 32],
    kept: bool,
}

impl Measured {
    /// Whether the coordinator of this run has said that it keeps the sums.
    pub fn is_kept(&self, experiment: &Experiment) -> bool {
        self.sums.get(&experiment.digest()).is_some_and(|sums| sums.kept)
    }

    /// Remembers what was measured before this process, and keeps what it measures.
    pub(super) fn keep_in(&mut self, Keep { directory, disk }: &Keep) -> Result<(), ParticipantError> {
        if self.generations.is_some() {
            return Ok(());
        }
        std::fs::create_dir_all(directory).map_err(ParticipantError::io(directory))?;
        let (generations, found) = Generations::open(disk, directory, "measured", *IDENTITY)?;
        for generation in found {
            for &entry in generation.payload.as_chunks::<64>().0 {
                let (experiment, adapter) = entry.split_at(32);
                let digest = |bytes: &[u8]| bytes.try_into().expect("a half of an entry");
                let sums = Sums { adapter: digest(adapter), kept: false };
                self.sums.entry(digest(experiment)).or_insert(sums);
            }
        }
        self.generations = Some(generations);
        Ok(())
    }

    /// Measuring again with the same adapter gives the same sums, and is what follows a lost connection. Another one is on
    /// disk before it is measured with.
    async fn begin(&mut self, experiment: &Experiment, adapter: &Adapter) -> Result<(), ParticipantError> {
        let (run, adapter) = (experiment.digest(), digest_of(adapter));
        match self.sums.get(&run) {
            Some(sums) if sums.adapter == adapter => return Ok(()),
            Some(_) => {
                let what = "it asks for channel sums with another adapter than before, and a run measures with one; if this \
                            is the same experiment anew, run it with another seed or under another name";
                return Err(ParticipantError::Coordinator(what.into()));
            }
            None => {}
        }
        if let Some(generations) = &mut self.generations {
            let entries = self.sums.iter().map(|(run, sums)| (*run, sums.adapter)).chain([(run, adapter)]);
            let payload = entries.flat_map(|(run, adapter)| [run, adapter]).collect::<Vec<_>>().concat();
            let mut is_degraded = false;
            // Twice, so that damage to one generation forgets nothing.
            while let Err(error) = offload::in_place(|| (0..2).try_for_each(|_| generations.save(&payload).map(drop))) {
                if !error.may_pass() {
                    return Err(error.into());
                }
                if !std::mem::replace(&mut is_degraded, true) {
                    let error = told(&error);
                    tracing::warn!(%error, "storage degraded; nothing is measured before the device's disk takes a note of it");
                }
                tokio::time::sleep(RETRY).await;
            }
        }
        self.sums.insert(run, Sums { adapter, kept: false });
        Ok(())
    }

    fn keep(&mut self, experiment: &Experiment) {
        if let Some(sums) = self.sums.get_mut(&experiment.digest()) {
            sums.kept = true;
        }
    }
}

/// Names and shapes are the experiment's.
fn digest_of(adapter: &Adapter) -> [u8; 32] {
    let mut digest = Sha256::new();
    for value in adapter.tensors().iter().flat_map(|tensor| &tensor.values) {
        digest.update(value.to_le_bytes());
    }
    digest.finalize().into()
}

/// Sums leave this device where the experiment says so, in the round behind all others and the final evaluation.
pub(super) fn check(experiment: &Experiment, round: u32) -> Result<(), ParticipantError> {
    let experiment::Federation { rounds, imatrix_tokens, .. } = experiment.federation;
    if imatrix_tokens > 0 && round.checked_sub(2) == Some(rounds) {
        return Ok(());
    }
    let what = format!("it asks for channel sums in round {round}, which the experiment does not");
    Err(ParticipantError::Coordinator(what))
}

impl RoundWork<'_> {
    pub(super) async fn measure(&mut self, control: &mut SendStream) -> Result<(), ParticipantError> {
        let round = self.round;
        if let Some(reason) = self.prepared.trainer.cannot_measure() {
            tracing::warn!(%reason, "this device cannot measure for an importance matrix");
            return Ok(control.message(&FromParticipant::CannotMeasure { round, reason }).await?);
        }
        let adapter = self.fetch_adapter().await?;
        self.measured.begin(&self.prepared.experiment, &adapter).await?;
        let sums = self.prepared.trainer.measure(&adapter, self.link.as_ref()).await?;
        let tokens = sums.tokens().unwrap_or(0);
        let (names, sums): (Vec<_>, Vec<_>) = sums.named().into_iter().unzip();
        let info = |(name, sums): (String, &Vec<f32>)| TensorInfo { name, shape: vec![sums.len() as u32] };
        let tensors: Vec<TensorInfo> = names.into_iter().zip(&sums).map(info).collect();
        let (send, mut receive) = self.connection.open(StreamKind::Bulk).await?;
        let mut send = Outgoing::new(send);
        send.message(&Request::ChannelSums { round, tokens, tensors: tensors.clone() }).await?;
        for (i, (sums, info)) in sums.iter().zip(&tensors).enumerate() {
            send.tensor(&self.header(FrameKind::ChannelSums, i, info)?, sums).await?;
        }
        send.finish();
        match receive.message().await? {
            UpdateReply::Accepted => {
                self.measured.keep(&self.prepared.experiment);
                tracing::info!(tokens, "sent channel sums for an importance matrix");
            }
            UpdateReply::Refused { text, .. } => {
                tracing::warn!(reason = %text, "the coordinator refused the channel sums")
            }
        }
        Ok(receive.end().await?)
    }
}

//! The end of a run: channel sums of this device's training records, for an importance matrix.

use std::collections::BTreeMap;

use experiment::Experiment;
use model::Adapter;
use net::{SendStream, StreamKind};
use sha2::{Digest, Sha256};
use wire::{FrameKind, FromParticipant, Request, TensorInfo, UpdateReply};

use super::RoundWork;
use crate::ParticipantError;
use crate::outgoing::Outgoing;

/// What was measured here, by the digest of the run's experiment.
///
/// Whether a run's rounds are over, only its coordinator knows. But sums of the same records with ever other adapters would
/// tell ever more of these records: a run measures with one, the one that it ends with.
#[derive(Debug, Default)]
pub struct Measured(BTreeMap<[u8; 32], Sums>);

#[derive(Debug)]
struct Sums {
    /// Digest of the adapter that they were measured with, as far as this device has it.
    adapter: [u8; 32],
    kept: bool,
}

impl Measured {
    /// Whether the coordinator of this run has said that it keeps the sums.
    pub fn is_kept(&self, experiment: &Experiment) -> bool {
        self.0.get(&experiment.digest()).is_some_and(|sums| sums.kept)
    }

    /// Measuring again with the same adapter gives the same sums, and is what follows a lost connection.
    fn begin(&mut self, experiment: &Experiment, adapter: &Adapter) -> Result<(), ParticipantError> {
        let digest = digest_of(adapter);
        let sums = self.0.entry(experiment.digest()).or_insert(Sums { adapter: digest, kept: false });
        if sums.adapter != digest {
            let what = "it asks for channel sums with another adapter than before; a run measures with one".to_owned();
            return Err(ParticipantError::Coordinator(what));
        }
        Ok(())
    }

    fn keep(&mut self, experiment: &Experiment) {
        if let Some(sums) = self.0.get_mut(&experiment.digest()) {
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
        self.measured.begin(&self.prepared.experiment, &adapter)?;
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

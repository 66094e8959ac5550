//! The end of a run: channel sums of this device's training records, for an importance matrix.

use experiment::Experiment;
use net::{SendStream, StreamKind};
use wire::{FrameKind, FromParticipant, Request, TensorInfo, UpdateReply};

use super::RoundWork;
use crate::ParticipantError;
use crate::outgoing::Outgoing;

/// Sums leave this device where the experiment says so, once all rounds and the evaluation behind them are over.
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
            UpdateReply::Accepted => tracing::info!(tokens, "sent channel sums for an importance matrix"),
            UpdateReply::Refused { text, .. } => {
                tracing::warn!(reason = %text, "the coordinator refused the channel sums")
            }
        }
        Ok(receive.end().await?)
    }
}

//! What this device's layers are multiplied with on its own training records, summed channel by channel.

use model::stage::Input;
use model::{Adapter, ChannelSums, Matrix};

use super::{Side, Trainer, compute, segments_of};
use crate::ParticipantError;
use crate::body_link::BodyLink;

impl Trainer {
    /// The sums of no tokens: names and widths of what [`measure`](Self::measure) gives.
    fn unmeasured(side: &Side) -> ChannelSums {
        ChannelSums::new(side.stage.config(), side.stage.part().blocks.clone())
    }

    /// Why this device cannot measure; nothing where it can.
    pub fn cannot_measure(&self) -> Option<String> {
        let device = self.tail.stage.device();
        let backend = device.backend().name();
        device.kernels().is_none().then(|| format!("its backend is `{backend}`; only `native` measures"))
    }

    /// Takes a sample of the training records forward through the model with `adapter`. The coordinator sums what goes
    /// through the body.
    pub async fn measure(&self, adapter: &Adapter, body: Option<&BodyLink>) -> Result<ChannelSums, ParticipantError> {
        let attach = |side: &Side| side.stage.attach(&adapter.part(side.stage.part().blocks.clone()));
        let (head_lora, tail_lora) = (self.head.as_ref().map(attach).transpose()?, attach(&self.tail)?);
        let mut head_sums = self.head.as_ref().map(Self::unmeasured);
        let mut tail_sums = Self::unmeasured(&self.tail);
        let sample = self.data.batches.sample(self.experiment.federation.imatrix_tokens);
        for (micro, batch) in sample.iter().enumerate() {
            let segments = segments_of(batch)?;
            let tokens = Input::Tokens(&batch.tokens);
            let input = match (&self.head, &head_lora, &mut head_sums, body) {
                (Some(head), Some(lora), Some(sums), Some(body)) => {
                    let add = |block, inputs| sums.add(block, &inputs);
                    let x: Matrix = compute(|| head.stage.forward_measured(tokens, &segments, lora, add))?;
                    Input::Activations(body.measure(micro as u32, batch, x).await?)
                }
                _ => tokens,
            };
            let add = |block, inputs| tail_sums.add(block, &inputs);
            compute(|| self.tail.stage.forward_measured(input, &segments, &tail_lora, add))?;
        }
        Ok(ChannelSums::join(head_sums.into_iter().chain([tail_sums]))?)
    }
}

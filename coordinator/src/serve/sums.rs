//! A participant's channel sums, checked against the blocks that it holds and the tokens that went through the body.

use model::ChannelSums;
use tokio::sync::oneshot;
use wire::{CloseCode, FrameKind, RefusalReason, TensorInfo, UpdateReply};

use super::{Incoming, RoundKey, ServeError, Stream, locked};
use crate::round::measuring_round;

impl Stream {
    /// Whether the sums count, the round machine decides; whether they are sums of this device, is answered here.
    pub(super) async fn channel_sums(
        mut self,
        round: u32,
        tokens: u64,
        tensors: Vec<TensorInfo>,
    ) -> Result<(), ServeError> {
        let sums = match self.check_listing(round, &tensors) {
            Err(refusal) => {
                self.receive.stop(CloseCode::Unexpected);
                Err(refusal)
            }
            Ok(like) => {
                let mut values = Vec::with_capacity(tensors.len());
                for (i, info) in tensors.iter().enumerate() {
                    let header = self.header(FrameKind::ChannelSums, round, i, info)?;
                    values.push(self.receive.tensor(&header).await?);
                }
                self.receive.end().await?;
                let own = like.with_sums(tokens, values);
                let wrong = |error: model::ModelError| (RefusalReason::WrongSums, error.to_string());
                match own.map_err(wrong) {
                    Ok(own) => {
                        let joined = self.joined(tokens, &own).await;
                        let source = &*self.shared.source;
                        joined
                            .and_then(|all| offload::in_place(|| own.check_norms(source)).map_err(wrong).map(|()| all))
                    }
                    Err(refusal) => Err(refusal),
                }
            }
        };
        let answering = self.answering.clone();
        let _answering = answering.read().await;
        let (answer, answered) = oneshot::channel();
        let (participant, session) = (self.participant.clone(), self.session);
        if self.shared.incoming.send(Incoming::ChannelSums { participant, session, sums, answer }).await.is_err() {
            return Err(ServeError::Close(CloseCode::GoingAway, "the run is over".into()));
        }
        let over = || UpdateReply::Refused { reason: RefusalReason::Late, text: "the run is over".into() };
        self.send.message(&answered.await.unwrap_or_else(|_| over())).await?;
        self.finish();
        // Whoever does not want the answer has none; and a connection that is lost says so itself.
        let _ = self.send.delivered().await;
        Ok(())
    }

    /// Sums of the blocks that this participant holds, over nothing, if that is what is listed.
    fn check_listing(&self, round: u32, tensors: &[TensorInfo]) -> Result<ChannelSums, (RefusalReason, String)> {
        let is_due = round == measuring_round(&self.shared.experiment.federation);
        if !is_due || !locked(&self.witness).has_given(RoundKey { round, attempt: 1 }) {
            return Err((RefusalReason::Late, format!("no channel sums of round {round} are waited for")));
        }
        let [held, _] = self.shared.blocks();
        let like = ChannelSums::new(&self.shared.manifest.config, held);
        let expected = like.named();
        if tensors.len() != expected.len() {
            let text = format!("sums of {} inputs; this device's blocks have {}", tensors.len(), expected.len());
            return Err((RefusalReason::WrongSums, text));
        }
        for (TensorInfo { name, shape }, (expected, sums)) in tensors.iter().zip(&expected) {
            if name != expected {
                // What it calls them is its own text.
                let text = format!("sums of another input than {expected} of this device's blocks");
                return Err((RefusalReason::WrongSums, text));
            }
            if shape[..] != [sums.len() as u32] {
                let text = format!("sums of shape {shape:?} for {name}; it has {} channels", sums.len());
                return Err((RefusalReason::WrongSums, text));
            }
        }
        Ok(like)
    }

    /// With the body's sums, which are over the same tokens.
    async fn joined(&self, tokens: u64, own: &ChannelSums) -> Result<ChannelSums, (RefusalReason, String)> {
        let allowed = self.shared.experiment.federation.imatrix_tokens;
        if tokens == 0 || tokens > allowed {
            let text = format!("sums over {tokens} tokens; the experiment allows 1 to {allowed}");
            return Err((RefusalReason::WrongCount, text));
        }
        let Some(body) = &self.shared.body else { return Ok(own.clone()) };
        let measured = body.take_measured(self.participant.clone(), self.session).await;
        let seen = measured.as_ref().and_then(ChannelSums::tokens).unwrap_or(0);
        match measured {
            Some(measured) if seen == tokens => ChannelSums::join([own.clone(), measured])
                .map_err(|error| (RefusalReason::WrongSums, error.to_string())),
            _ => {
                let text = format!("sums over {tokens} tokens, of which {seen} have gone through the body");
                Err((RefusalReason::WrongCount, text))
            }
        }
    }
}

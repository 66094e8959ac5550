//! What the body's layers are multiplied with, summed channel by channel for each participant.

use model::ChannelSums;
use model::stage::Input;

use super::{BodyError, ForwardJob, Place, Worker};
use crate::round::{ParticipantName, measuring_round};

impl Worker {
    /// Takes a micro-batch through the adapter the round began with, as an evaluation does, and measures.
    pub(super) fn measure(&mut self, job: ForwardJob) {
        let answer = self.measured_forward(&job.place, &job.segments, job.x);
        drop(job.reply.send(answer));
    }

    fn measured_forward(
        &mut self,
        place: &Place,
        segments: &model::Segments,
        x: model::Matrix,
    ) -> Result<model::Matrix, BodyError> {
        let federation = &self.experiment.federation;
        let round = self.round.as_mut().ok_or(BodyError::Stale)?;
        if round.key.round != measuring_round(federation) {
            let what = format!("a step that measures came in round {}, which does not", place.key.round);
            return Err(BodyError::Misplaced(what));
        }
        let imatrix_tokens = federation.imatrix_tokens;
        let empty = || ChannelSums::new(self.stage.config(), self.stage.part().blocks.clone());
        let measured = round.measured.entry(place.participant.clone()).or_insert_with(|| (place.session, empty()));
        if measured.0 > place.session {
            return Err(BodyError::Stale);
        }
        // Whoever is back begins anew.
        if measured.0 < place.session {
            *measured = (place.session, empty());
        }
        let sums = &mut measured.1;
        let tokens = sums.tokens().unwrap_or(0) + segments.tokens() as u64;
        if tokens > imatrix_tokens {
            let what = format!("{tokens} tokens to measure on; the experiment allows {imatrix_tokens}");
            return Err(BodyError::Misplaced(what));
        }
        let add = |block, inputs| sums.add(block, &inputs);
        Ok(self.stage.forward_measured(Input::Activations(x), segments, &round.global_lora, add)?)
    }

    pub(super) fn take_measured(&mut self, participant: &ParticipantName, session: u64) -> Option<ChannelSums> {
        let measured = &mut self.round.as_mut()?.measured;
        measured
            .get(participant)
            .is_some_and(|(of, _)| *of == session)
            .then(|| measured.remove(participant))?
            .map(|m| m.1)
    }
}

//! One participant's records, encoded: the steps it trains on and the micro-batches it evaluates on.

use experiment::Experiment;
use model::Tokenizer;

use crate::ParticipantError;
use crate::data::{Batches, MicroBatch, Record, encode_records, evaluation_batches, hold_out};
use crate::encoder::Encoder;

pub struct Dataset {
    pub batches: Batches,
    /// Empty where the experiment holds nothing out.
    pub held_out: Vec<MicroBatch>,
}

impl Dataset {
    /// Divides and orders the records by generators of the participant's `name`: the same name sees the same steps in
    /// every mode and on every machine.
    pub fn new(
        records: Vec<Record>,
        experiment: &Experiment,
        name: &str,
        tokenizer: &Tokenizer,
    ) -> Result<Self, ParticipantError> {
        let experiment::Data { sequence_tokens_max, held_out: share, .. } = experiment.data;
        let all = records.len();
        let mut generator = experiment.generator(&format!("participant/{name}/held_out"));
        let (train, held_out) = hold_out(records, share, &mut generator);
        let encode = |records: &[Record]| encode_records(records, &Encoder(tokenizer), sequence_tokens_max);
        let (train, held_out) = (encode(&train)?, encode(&held_out)?);
        let cut = train.cut + held_out.cut;
        if cut > 0 {
            let limit = format_args!("{sequence_tokens_max} tokens (data.sequence_tokens_max)");
            tracing::warn!(participant = name, "{cut} of {all} records are cut to {limit}");
        }
        if share > 0.0 && held_out.sequences.is_empty() {
            tracing::warn!(participant = name, "no record is held out: of {all}, data.held_out = {share} leaves none");
        }
        let experiment::Training { batch_tokens, accumulate, .. } = experiment.training;
        let mut generator = experiment.generator(&format!("participant/{name}/batches"));
        let batches = Batches::new(train.sequences, batch_tokens, accumulate, &mut generator)?;
        let held_out = evaluation_batches(&held_out.sequences, batch_tokens)?;
        Ok(Self { batches, held_out })
    }
}

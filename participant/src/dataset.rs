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
        let experiment::Data { sequence_tokens_max, held_out, .. } = experiment.data;
        let mut generator = experiment.generator(&format!("participant/{name}/held_out"));
        let (train, held_out) = hold_out(records, held_out, &mut generator);
        let encode = |records: &[Record]| encode_records(records, &Encoder(tokenizer), sequence_tokens_max);
        let experiment::Training { batch_tokens, accumulate, .. } = experiment.training;
        let mut generator = experiment.generator(&format!("participant/{name}/batches"));
        let batches = Batches::new(encode(&train)?, batch_tokens, accumulate, &mut generator)?;
        let held_out = evaluation_batches(&encode(&held_out)?, batch_tokens)?;
        Ok(Self { batches, held_out })
    }
}

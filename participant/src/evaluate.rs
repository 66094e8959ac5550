//! What a model makes of a file: loss and perplexity per token, or its raw logits.

use std::collections::BTreeMap;
use std::path::Path;

use experiment::write_atomically;
use model::stage::{Input, Loss};
use model::{Matrix, Segments};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;

use crate::ParticipantError;
use crate::data::{self, evaluation_batches};
use crate::integer;
use crate::runner::{Runner, Sequence};

impl Runner {
    /// Summed loss over every trained token, at least one, of sequences that are no longer than said, with one of the adapters
    /// or none.
    pub fn evaluate(
        &self,
        adapter: Option<usize>,
        sequences: &[data::Sequence],
        sequence_tokens_max: u32,
        mut done: impl FnMut(usize, usize),
    ) -> Result<Loss, ParticipantError> {
        let batches = evaluation_batches(sequences, sequence_tokens_max.max(512))?;
        let mut total = Loss { nats: 0.0, tokens: 0 };
        for (i, batch) in batches.iter().enumerate() {
            let longest = batch.segments.iter().copied().max().unwrap_or(1);
            let loss = match self.sequence(longest as usize, adapter) {
                Sequence::Integer(session) => integer::loss(*session, batch),
                Sequence::Float { stage, lora, .. } => {
                    let segments = Segments::new(batch.segments.iter().map(|&length| length as usize).collect())?;
                    stage.loss(Input::Tokens(&batch.tokens), &segments, &batch.targets, lora)?
                }
            };
            total.nats += loss.nats;
            total.tokens += loss.tokens;
            done(i + 1, batches.len());
        }
        Ok(total)
    }

    /// Logits behind every token of every prompt in a JSONL file of `{"text": …}` or `{"tokens": […]}`, as the tensors
    /// `logits.<i>` `[tokens, vocabulary]` and `tokens.<i>` of a safetensors file: for comparing with other runtimes.
    pub fn write_logits(&self, adapter: Option<usize>, prompts: &Path, out: &Path) -> Result<usize, ParticipantError> {
        let text = std::fs::read_to_string(prompts).map_err(ParticipantError::io(prompts))?;
        let mut tensors: Vec<(Vec<i64>, Matrix)> = Vec::new();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let refused =
                |what: String| ParticipantError::Usage(format!("{}, line {}: {what}", prompts.display(), i + 1));
            let prompt: Value = serde_json::from_str(line).map_err(|error| refused(error.to_string()))?;
            let tokens: Vec<u32> = match (&prompt["tokens"], &prompt["text"]) {
                (Value::Array(tokens), _) => {
                    let id = |token: &Value| token.as_u64().and_then(|id| u32::try_from(id).ok());
                    let tokens: Option<Vec<u32>> = tokens.iter().map(id).collect();
                    tokens.ok_or_else(|| refused("`tokens` is no list of token ids".into()))?
                }
                (_, Value::String(text)) => {
                    let tokenizer = self.source.tokenizer();
                    tokenizer.text_prefix().into_iter().chain(tokenizer.encode(text, true)?).collect()
                }
                _ => return Err(refused("has neither `tokens` nor `text`".into())),
            };
            let vocabulary = self.source.config().vocabulary;
            if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
                return Err(refused(format!("token {token} is none of a vocabulary of {vocabulary}")));
            }
            let context = self.source.config().context;
            if tokens.len() > context {
                let what = format!("has {} tokens, more than the model's context of {context}; cut it", tokens.len());
                return Err(refused(what));
            }
            let segments = Segments::new(vec![tokens.len()]).map_err(|error| refused(error.to_string()))?;
            let logits = match self.sequence(tokens.len(), adapter) {
                Sequence::Integer(session) => integer::logits(*session, &tokens),
                Sequence::Float { stage, lora, .. } => stage.logits(Input::Tokens(&tokens), &segments, lora)?,
            };
            tensors.push((tokens.into_iter().map(i64::from).collect(), logits));
        }
        if tensors.is_empty() {
            return Err(ParticipantError::Usage(format!("{} holds no prompt; put one into it", prompts.display())));
        }
        let mut views = BTreeMap::new();
        for (i, (tokens, logits)) in tensors.iter().enumerate() {
            let view =
                |dtype, shape: Vec<usize>, bytes| TensorView::new(dtype, shape, bytes).expect("shapes of our own");
            let shape = vec![logits.rows(), logits.columns()];
            views.insert(format!("logits.{i}"), view(Dtype::F32, shape, bytemuck::cast_slice(logits.values())));
            views.insert(format!("tokens.{i}"), view(Dtype::I64, vec![tokens.len()], bytemuck::cast_slice(tokens)));
        }
        let bytes = safetensors::serialize(views, None).expect("names of our own");
        write_atomically(out, &bytes)?;
        Ok(tensors.len())
    }
}

//! The model's tokenizer as the data side sees it.

use std::path::Path;

use experiment::{Columns, Experiment};
use model::Tokenizer;
use model::tokenizer::Message as ChatMessage;

use crate::ParticipantError;
use crate::data::{DataError, Encoded, Message, Sequence, TextEncoder, encode_records, read_records};

pub struct Encoder<'a>(pub &'a Tokenizer);

impl TextEncoder for Encoder<'_> {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        self.0.encode(text, true).map_err(|error| error.to_string())
    }

    fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, String> {
        let messages: Vec<ChatMessage> = messages
            .iter()
            .map(|message| ChatMessage { role: message.role.clone(), content: message.content.clone() })
            .collect();
        self.0.chat(&messages, add_generation_prompt).map_err(|error| error.to_string())
    }

    fn bos(&self) -> Option<u32> {
        self.0.text_prefix()
    }

    fn eos(&self) -> Option<u32> {
        self.0.settings().eos.first().copied()
    }
}

/// How `--experiment`, where it is given, names the columns of records.
pub(crate) fn columns(experiment: Option<&Path>) -> Result<Columns, ParticipantError> {
    match experiment {
        Some(path) => Ok(Experiment::from_file(path)?.data.columns),
        None => Ok(Columns::default()),
    }
}

/// Tokens of the longest sequence: what `--sequence-tokens-max` asks for, or 512, of which a shorter context is all.
pub(crate) fn longest_sequence(asked: Option<u32>, context: usize) -> Result<u32, ParticipantError> {
    match asked {
        Some(asked) if asked as usize > context => Err(ParticipantError::Usage(format!(
            "--sequence-tokens-max is {asked}, but the model's context is {context} tokens; give {context} at most"
        ))),
        Some(asked) => Ok(asked),
        None => Ok(context.min(512) as u32),
    }
}

/// All records of a file, to measure something on: at least one sequence.
pub fn encode_file(
    path: &Path,
    columns: &Columns,
    tokenizer: &Tokenizer,
    sequence_tokens_max: u32,
) -> Result<Vec<Sequence>, ParticipantError> {
    let records = read_records(path, columns)?;
    let Encoded { sequences, cut } = encode_records(&records, &Encoder(tokenizer), sequence_tokens_max)?;
    if sequences.is_empty() {
        let reason =
            "no token of it is to be predicted; give it texts, completions, or conversations with an assistant";
        return Err(DataError::File { path: path.to_owned(), reason: reason.into() }.into());
    }
    if cut > 0 {
        let all = records.len();
        tracing::warn!("{cut} of {all} records are cut to {sequence_tokens_max} tokens (--sequence-tokens-max)");
    }
    Ok(sequences)
}

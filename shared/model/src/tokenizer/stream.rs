//! Decoding while a model generates. A token may end in the middle of a character; [`DecodeStream`] holds such bytes
//! back until the character is complete, so what it returns can be printed at once.

use super::{Tokenizer, TokenizerError};

/// Invariant: `pending` is the beginning of a character, at most three bytes.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    pending: Vec<u8>,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, pending: Vec::new() }
    }

    /// The text that this token completes, often empty. Bytes that cannot become a character any more turn into U+FFFD.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.pending.extend(self.tokenizer.token_bytes(id)?);
        let mut text = String::new();
        loop {
            match str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return Ok(text);
                }
                Err(error) => {
                    let valid = self.pending.drain(..error.valid_up_to()).collect();
                    text.push_str(&String::from_utf8(valid).expect("valid_up_to bytes are valid UTF-8"));
                    let Some(invalid_bytes) = error.error_len() else { return Ok(text) };
                    self.pending.drain(..invalid_bytes);
                    text.push(char::REPLACEMENT_CHARACTER);
                }
            }
        }
    }

    /// What is left when generation stops: nothing, or U+FFFD for a character that was never completed.
    pub fn finish(self) -> String {
        if self.pending.is_empty() { String::new() } else { char::REPLACEMENT_CHARACTER.to_string() }
    }
}

//! The model's tokenizer as the data side sees it.

use model::Tokenizer;
use model::tokenizer::Message as ChatMessage;

use crate::data::{Message, TextEncoder};

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

//! Text to token ids and back. [`Tokenizer`] owns a checked vocabulary, the rules that cut text into words, the ids
//! with a special meaning and the chat template, whichever file they came from: tokenizer.json, the metadata of a GGUF
//! file, or [`Tokenizer::bytes`]. It never opens a file and never reaches a network. It refuses what it cannot
//! reproduce exactly: other algorithms than byte-pair encoding, unknown rules for cutting text, and vocabularies that
//! contradict themselves. The third-party engine that does the merging is made in `engine.rs` of what has been
//! checked here, so bytes from outside do not reach it.

mod bytes;
mod chat;
mod document;
mod engine;
mod gguf;
mod huggingface;
mod json;
mod stream;
mod vocabulary;

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use chat::ChatTemplate;
use vocabulary::Vocabulary;

pub use chat::Message;
pub use gguf::GgufTokenizer;
pub use huggingface::HuggingFaceFiles;
pub(crate) use json::JSON_BYTES_MAX;
pub use stream::DecodeStream;

/// Longer texts are refused: the engine keeps about a hundred bytes per byte of input while it works, and its regular
/// expressions panic when they have retried ten million times at one position.
const TEXT_BYTES_MAX: usize = 2 << 20;

/// A tokenizer ready for use. Encoding and decoding take `&self` and may run on several threads.
pub struct Tokenizer {
    vocabulary: Vocabulary,
    settings: TokenizerSettings,
    template: Option<ChatTemplate>,
    /// Reads special tokens inside a text as such.
    engine: tokenizers::Tokenizer,
    /// Takes special tokens inside a text for plain text. Built on first use, because few programs need both.
    plain_engine: OnceLock<tokenizers::Tokenizer>,
}

/// What a tokenizer.json does not say. Travels beside it from the coordinator to the participants.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerSettings {
    /// The id that begins a text.
    pub bos: Option<u32>,
    /// Every id that ends generation. The first one is what exported files name as the end of a text.
    pub eos: Vec<u32>,
    /// Whether plain text starts with `bos`. Chats never do: their template writes it where it belongs.
    pub add_bos: bool,
    /// A Jinja template.
    pub chat_template: Option<String>,
}

/// Why a tokenizer was refused or a text could not be processed. All variants except `TextTooLong`, `UnknownId` and
/// `NoChatTemplate` blame the model's files.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("read {what}: {reason}; copy or fetch the model again")]
    Unreadable { what: &'static str, reason: String },
    #[error("{what} has {found}, more than the limit of {limit}")]
    TooLarge { what: &'static str, found: usize, limit: usize },
    #[error("tokenizer with {what} {found} is not supported: use a model with {known}")]
    Unsupported { what: &'static str, found: String, known: &'static str },
    #[error("tokens {first} and {second} are both {text:?}: every token needs a text of its own")]
    DuplicateToken { text: String, first: u32, second: u32 },
    #[error("token {id} is malformed: {reason}")]
    BadToken { id: u32, reason: String },
    #[error("merge {index} ({left:?}, {right:?}) {reason}")]
    BadMerge { index: usize, left: String, right: String, reason: &'static str },
    #[error("{what} names id {id}, but the vocabulary has {vocabulary} tokens")]
    IdOutOfRange { what: &'static str, id: u32, vocabulary: u32 },
    #[error("{what} names {text:?}, which is no token")]
    NotAToken { what: &'static str, text: String },
    #[error("{field} has {found} entries for {expected} tokens")]
    WrongCount { field: &'static str, found: usize, expected: usize },
    #[error("chat template in {place}: {reason}")]
    ChatTemplate { place: String, reason: String },
    #[error("this model has no chat template: train on plain text, or use a model tuned for chat")]
    NoChatTemplate,
    #[error("token id {id} is not below {vocabulary}, the size of the vocabulary")]
    UnknownId { id: u32, vocabulary: u32 },
    #[error("text of {found} bytes is longer than {limit}: cut it into documents")]
    TextTooLong { found: usize, limit: usize },
    #[error("tokenizer engine: {0}")]
    Engine(String),
}

impl Tokenizer {
    /// Reads a tokenizer.json, as found in a model's folder or as written by [`Tokenizer::json`].
    pub fn from_json(tokenizer_json: &[u8], settings: &TokenizerSettings) -> Result<Self, TokenizerError> {
        Self::new(json::read(tokenizer_json)?, settings.clone(), "the model's manifest")
    }

    /// Reads the files that Hugging Face keeps beside a model's weights. `directory` is only named in errors.
    pub fn from_huggingface_files(files: &HuggingFaceFiles, directory: &Path) -> Result<Self, TokenizerError> {
        let (vocabulary, settings) = files.read()?;
        let place = directory.join(files.template_file());
        Self::new(vocabulary, settings, &place.display().to_string())
    }

    /// Takes the tokenizer out of the metadata of a GGUF file. `file` is only named in errors.
    pub fn from_gguf(metadata: GgufTokenizer, file: &Path) -> Result<Self, TokenizerError> {
        let (vocabulary, settings) = metadata.read()?;
        Self::new(vocabulary, settings, &file.display().to_string())
    }

    /// The tokenizer of a model made from a seed: one token per byte, three special tokens, ChatML.
    pub fn bytes() -> Self {
        let (vocabulary, settings) = bytes::byte_vocabulary();
        let made = Self::new(vocabulary, settings, "the byte tokenizer");
        made.expect("the byte vocabulary is fixed, and a test builds it")
    }

    /// `place` is where the chat template is from.
    fn new(vocabulary: Vocabulary, mut settings: TokenizerSettings, place: &str) -> Result<Self, TokenizerError> {
        let size = vocabulary.size();
        let named = settings.bos.iter().map(|&id| ("bos", id)).chain(settings.eos.iter().map(|&id| ("eos", id)));
        for (what, id) in named {
            if id >= size {
                return Err(TokenizerError::IdOutOfRange { what, id, vocabulary: size });
            }
        }
        if settings.add_bos && settings.bos.is_none() {
            return Err(TokenizerError::Unreadable {
                what: "add_bos",
                reason: "it is set, but there is no bos".into(),
            });
        }
        let mut seen = BTreeSet::new();
        settings.eos.retain(|&id| seen.insert(id));

        let text = |id: Option<u32>| id.and_then(|id| vocabulary.text(id)).map(str::to_owned);
        let bos_text = text(settings.bos);
        let template = match &settings.chat_template {
            Some(source) => {
                let eos_text = text(settings.eos.first().copied());
                Some(ChatTemplate::new(source, place, bos_text.clone(), eos_text)?)
            }
            None => None,
        };
        let engine = engine::build(&vocabulary, bos_text.as_deref().filter(|_| settings.add_bos))?;
        Ok(Self { vocabulary, settings, template, engine, plain_engine: OnceLock::new() })
    }

    /// The ids of a text. With `parse_special`, `<|im_end|>` and the like become the one id they name: right for a
    /// rendered chat, wrong for text from a corpus. Neither `bos` nor `eos` is added; see [`Tokenizer::text_prefix`].
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>, TokenizerError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(TokenizerError::TextTooLong { found: text.len(), limit: TEXT_BYTES_MAX });
        }
        let engine = if parse_special { &self.engine } else { self.plain_engine() };
        let encoding = engine.encode_fast(text, false).map_err(|error| TokenizerError::Engine(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    fn plain_engine(&self) -> &tokenizers::Tokenizer {
        self.plain_engine.get_or_init(|| {
            let mut engine = self.engine.clone();
            engine.set_encode_special_tokens(true);
            engine
        })
    }

    /// The text of some ids, special tokens written out. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        let mut stream = self.decode_stream();
        let mut text = String::new();
        for &id in ids {
            text.push_str(&stream.push(id)?);
        }
        text.push_str(&stream.finish());
        // Encoding put one space in front of the text; it is not part of it.
        if self.vocabulary.scheme().prepends_space() && text.starts_with(' ') {
            text.remove(0);
        }
        Ok(text)
    }

    /// Decodes ids one at a time, as they are generated. In contrast to `decode` a leading space stays, because
    /// generated text continues a prompt.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// Renders a conversation with the model's chat template, ready for `encode(_, true)`. With `add_generation_prompt`
    /// it ends where the assistant begins to answer.
    pub fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TokenizerError> {
        self.template.as_ref().ok_or(TokenizerError::NoChatTemplate)?.render(messages, add_generation_prompt)
    }

    /// The id that goes in front of plain text, for models that were trained with one.
    pub fn text_prefix(&self) -> Option<u32> {
        self.settings.bos.filter(|_| self.settings.add_bos)
    }

    pub fn settings(&self) -> &TokenizerSettings {
        &self.settings
    }

    /// One more than the largest id. A model may have more embedding rows than this, never fewer.
    pub fn vocabulary_size(&self) -> u32 {
        self.vocabulary.size()
    }

    /// A token as the vocabulary spells it, in byte-level letters (`Ġthe`) or with `▁` for a space.
    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.vocabulary.text(id)
    }

    /// The bytes a token stands for; they need not be whole characters.
    pub fn token_bytes(&self, id: u32) -> Result<Vec<u8>, TokenizerError> {
        self.vocabulary.bytes(id).ok_or(TokenizerError::UnknownId { id, vocabulary: self.vocabulary_size() })
    }

    /// Whether a token is a part of texts, and not a sign between them or a gap in the vocabulary.
    pub fn is_text(&self, id: u32) -> bool {
        self.vocabulary.is_text(id)
    }

    /// A tokenizer.json, for export and for participants. The same tokenizer always gives the same bytes.
    pub fn json(&self) -> Vec<u8> {
        document::write(&self.vocabulary, self.text_prefix().and_then(|id| self.token_text(id)))
    }

    /// The tokenizer part of a GGUF file's metadata.
    pub fn gguf(&self) -> Result<GgufTokenizer, TokenizerError> {
        GgufTokenizer::write(&self.vocabulary, &self.settings)
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Tokenizer")
            .field("tokens", &self.vocabulary.size())
            .field("scheme", self.vocabulary.scheme())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

//! The files that Hugging Face keeps in a model's folder, read into a vocabulary and its settings. What ends a text
//! and what begins it is spread over four of them; this file says which one wins. tokenizer.json itself is read in
//! `json.rs`.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::json::{self, parse, unreadable};
use super::vocabulary::Vocabulary;
use super::{TokenizerError, TokenizerSettings};

/// The files of a model's folder, as bytes. Only tokenizer.json must be there.
#[derive(Default)]
pub struct HuggingFaceFiles<'a> {
    pub tokenizer: &'a [u8],
    pub tokenizer_config: Option<&'a [u8]>,
    /// chat_template.jinja; it wins over the template in tokenizer_config.json.
    pub chat_template: Option<&'a [u8]>,
    pub generation_config: Option<&'a [u8]>,
    pub config: Option<&'a [u8]>,
}

impl HuggingFaceFiles<'_> {
    /// The one that the chat template is read from, if there is one.
    pub(super) fn template_file(&self) -> &'static str {
        if self.chat_template.is_some() { "chat_template.jinja" } else { "tokenizer_config.json" }
    }

    pub(super) fn read(&self) -> Result<(Vocabulary, TokenizerSettings), TokenizerError> {
        let vocabulary = json::read(self.tokenizer)?;
        let tokenizer_config: TokenizerConfig = parse_optional("tokenizer_config.json", self.tokenizer_config)?;
        let generation: SpecialIds = parse_optional("generation_config.json", self.generation_config)?;
        let config: SpecialIds = parse_optional("config.json", self.config)?;

        let id = |what, text: &Option<TokenName>| match text {
            None => Ok(None),
            Some(TokenName::Text(text) | TokenName::Token { content: text }) => {
                let position = vocabulary.tokens().iter().position(|token| token.text == *text);
                match position {
                    Some(position) => Ok(Some(position as u32)),
                    None => Err(TokenizerError::NotAToken { what, text: text.clone() }),
                }
            }
        };
        let bos = match &self.tokenizer_config {
            Some(_) => id("bos_token", &tokenizer_config.bos_token)?,
            None => generation.bos_token_id.or(config.bos_token_id),
        };
        let eos_text = id("eos_token", &tokenizer_config.eos_token)?;
        let eos = eos_text.into_iter().chain(generation.eos()).chain(config.eos()).collect();
        let add_bos = match tokenizer_config.add_bos_token {
            Some(add_bos) => add_bos,
            // Newer folders say it only through the template that tokenizer.json applies to a text.
            None => {
                let file: PostProcessorFile = parse("tokenizer.json", self.tokenizer)?;
                let bos_text = bos.and_then(|id| vocabulary.text(id));
                bos_text.is_some() && file.post_processor.and_then(PostProcessor::prefix).as_deref() == bos_text
            }
        };
        let chat_template = match self.chat_template {
            Some(bytes) => {
                Some(str::from_utf8(bytes).map_err(|error| unreadable("chat_template.jinja", error))?.to_owned())
            }
            None => tokenizer_config.chat_template.and_then(ChatTemplates::default_template),
        };
        Ok((vocabulary, TokenizerSettings { bos, eos, add_bos: add_bos && bos.is_some(), chat_template }))
    }
}

// These files are shared by many programs, so unlike our own they may have any other field.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    bos_token: Option<TokenName>,
    eos_token: Option<TokenName>,
    add_bos_token: Option<bool>,
    chat_template: Option<ChatTemplates>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenName {
    Text(String),
    Token { content: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ChatTemplates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl ChatTemplates {
    fn default_template(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(templates) => {
                templates.into_iter().find(|named| named.name == "default").map(|named| named.template)
            }
        }
    }
}

#[derive(Default, Deserialize)]
struct SpecialIds {
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl SpecialIds {
    fn eos(&self) -> Vec<u32> {
        match &self.eos_token_id {
            None => Vec::new(),
            Some(OneOrMany::One(id)) => vec![*id],
            Some(OneOrMany::Many(ids)) => ids.clone(),
        }
    }
}

#[derive(Deserialize)]
struct PostProcessorFile {
    post_processor: Option<PostProcessor>,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PostProcessor {
    Sequence {
        processors: Vec<PostProcessor>,
    },
    TemplateProcessing {
        single: Vec<TemplatePiece>,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
enum TemplatePiece {
    SpecialToken { id: String },
    Sequence {},
}

impl PostProcessor {
    /// The token it puts in front of a text.
    fn prefix(self) -> Option<String> {
        match self {
            Self::Sequence { processors } => processors.into_iter().find_map(Self::prefix),
            Self::TemplateProcessing { single } => match single.into_iter().next()? {
                TemplatePiece::SpecialToken { id } => Some(id),
                TemplatePiece::Sequence {} => None,
            },
            Self::Other => None,
        }
    }
}

fn parse_optional<T: DeserializeOwned + Default>(
    what: &'static str,
    bytes: Option<&[u8]>,
) -> Result<T, TokenizerError> {
    bytes.map_or_else(|| Ok(T::default()), |bytes| parse(what, bytes))
}

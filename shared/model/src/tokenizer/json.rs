//! Reading a tokenizer.json. Recognises the few shapes that Llama and Qwen models have and refuses all others, regular
//! expressions included: an unknown one could run for hours. The opposite direction is in `document.rs`.

use std::fmt;

use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::TokenizerError;
use super::document::{LLAMA_WORDS, QWEN2_WORDS};
use super::vocabulary::{Kind, LeadingSpace, Scheme, Split, Token, Vocabulary, byte_of, check_limit};

/// Longer files are refused before they are read, wherever they come from.
pub(crate) const JSON_BYTES_MAX: usize = 64 << 20;
/// Ids without a token, at most, beside as many as there are tokens.
const GAP_MAX: usize = 4096;

/// Reads a tokenizer.json.
pub(super) fn read(bytes: &[u8]) -> Result<Vocabulary, TokenizerError> {
    check_limit("tokenizer.json", bytes.len(), JSON_BYTES_MAX)?;
    // The algorithm first, because the vocabulary of another one has another shape.
    let ModelTypeFile { model: ModelType { kind } } = parse("tokenizer.json", bytes)?;
    if let Some(found) = kind.filter(|kind| kind != "BPE") {
        return Err(TokenizerError::Unsupported { what: "algorithm", found, known: "byte-pair encoding (BPE)" });
    }
    let file: TokenizerFile = parse("tokenizer.json", bytes)?;
    let scheme = file.scheme()?;
    let model = file.model;
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return Err(unsupported("merge dropout", "some", "none"));
    }
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
        return Err(unsupported("subword affix", "some", "none"));
    }

    let mut tokens = place_tokens(model.vocab.0, &file.added_tokens, model.byte_fallback)?;
    let mut unknown = None;
    if let Some(text) = model.unk_token {
        let Some(id) = tokens.iter().position(|token| token.text == text) else {
            return Err(TokenizerError::NotAToken { what: "unk_token", text });
        };
        if tokens[id].kind == Kind::Control && model.byte_fallback {
            tokens[id].kind = Kind::Unknown;
        }
        unknown = Some(id as u32);
    }
    let merges = model.merges.into_iter().enumerate().map(|(index, merge)| merge.pair(index));
    Vocabulary::new(tokens, merges.collect::<Result<_, _>>()?, scheme, unknown)
}

/// Puts every token at its id. Gaps get a filler, as converters to GGUF do it.
fn place_tokens(
    vocab: Vec<(String, u32)>,
    added_tokens: &[AddedToken],
    byte_fallback: bool,
) -> Result<Vec<Token>, TokenizerError> {
    let largest = vocab.iter().map(|(_, id)| *id).chain(added_tokens.iter().map(|token| token.id)).max();
    let size = largest.map_or(0, |id| id as usize + 1);
    check_limit("vocabulary's range of ids", size, 2 * (vocab.len() + added_tokens.len()) + GAP_MAX)?;
    let mut places: Vec<Option<Token>> = Vec::new();
    places.resize_with(size, || None);

    for (text, id) in vocab {
        let kind = if byte_fallback && byte_of(&text).is_some() { Kind::Byte } else { Kind::Normal };
        if let Some(other) = places[id as usize].replace(Token { text, kind, normalized: false }) {
            return Err(TokenizerError::BadToken {
                id,
                reason: format!("another token, {:?}, has this id", other.text),
            });
        }
    }
    for added in added_tokens {
        if added.single_word || added.lstrip || added.rstrip {
            let reason = "it strips spaces around it or wants to be a whole word, which is not supported".into();
            return Err(TokenizerError::BadToken { id: added.id, reason });
        }
        let kind = if added.special { Kind::Control } else { Kind::UserDefined };
        let token = Token { text: added.content.clone(), kind, normalized: added.normalized };
        if let Some(other) = places[added.id as usize].replace(token)
            && other.text != added.content
        {
            let reason = format!("the vocabulary says {:?}, added_tokens {:?}", other.text, added.content);
            return Err(TokenizerError::BadToken { id: added.id, reason });
        }
    }
    let fill = |(id, place): (usize, Option<Token>)| {
        place.unwrap_or_else(|| Token { text: format!("[PAD{id}]"), kind: Kind::Unused, normalized: false })
    };
    Ok(places.into_iter().enumerate().map(fill).collect())
}

#[derive(Deserialize)]
struct ModelTypeFile {
    model: ModelType,
}

#[derive(Deserialize)]
struct ModelType {
    #[serde(rename = "type")]
    kind: Option<String>,
}

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Normalizer>,
    pre_tokenizer: Option<PreTokenizer>,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    dropout: Option<f64>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    vocab: Entries,
    merges: Vec<Merge>,
}

/// A JSON object as a list, so that a repeated key is seen.
struct Entries(Vec<(String, u32)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;
        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object from tokens to ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(EntriesVisitor)
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    /// How files were written before 2024.
    Text(String),
}

impl Merge {
    fn pair(self, index: usize) -> Result<(String, String), TokenizerError> {
        match self {
            Self::Pair(left, right) => Ok((left, right)),
            Self::Text(text) => split_merge(index, &text),
        }
    }
}

/// Splits "left right" at its only space.
pub(super) fn split_merge(index: usize, text: &str) -> Result<(String, String), TokenizerError> {
    match text.split_once(' ') {
        Some((left, right)) if !right.contains(' ') => Ok((left.to_owned(), right.to_owned())),
        _ => Err(TokenizerError::BadMerge {
            index,
            left: text.to_owned(),
            right: String::new(),
            reason: "is not two tokens with one space between them",
        }),
    }
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type")]
enum Normalizer {
    Sequence {
        normalizers: Vec<Normalizer>,
    },
    #[serde(rename = "NFC")]
    Nfc,
    Prepend {
        prepend: String,
    },
    Replace {
        pattern: Pattern,
        content: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type")]
enum PreTokenizer {
    Sequence {
        pretokenizers: Vec<PreTokenizer>,
    },
    Digits {
        individual_digits: bool,
    },
    Split {
        pattern: Pattern,
        behavior: String,
        invert: bool,
    },
    ByteLevel {
        add_prefix_space: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    Metaspace {
        replacement: String,
        #[serde(default = "always")]
        prepend_scheme: String,
        #[serde(default = "yes")]
        split: bool,
    },
}

fn yes() -> bool {
    true
}

fn always() -> String {
    "always".to_owned()
}

#[derive(Debug, Deserialize)]
enum Pattern {
    String(String),
    Regex(String),
}

impl Normalizer {
    fn steps(&self) -> Vec<&Self> {
        match self {
            Self::Sequence { normalizers } => normalizers.iter().flat_map(Self::steps).collect(),
            step => vec![step],
        }
    }
}

impl PreTokenizer {
    fn steps(&self) -> Vec<&Self> {
        match self {
            Self::Sequence { pretokenizers } => pretokenizers.iter().flat_map(Self::steps).collect(),
            step => vec![step],
        }
    }
}

impl TokenizerFile {
    fn scheme(&self) -> Result<Scheme, TokenizerError> {
        use PreTokenizer::{ByteLevel, Digits, Metaspace, Split as Cut};
        let normalizer = self.normalizer.iter().flat_map(Normalizer::steps).collect::<Vec<_>>();
        let pre_tokenizer = self.pre_tokenizer.iter().flat_map(PreTokenizer::steps).collect::<Vec<_>>();

        if self.model.byte_fallback {
            let marks_spaces = |pattern: &str, content: &str| pattern == " " && content == "▁";
            let space = match (normalizer.as_slice(), pre_tokenizer.as_slice()) {
                ([Normalizer::Replace { pattern: Pattern::String(pattern), content }], [])
                    if marks_spaces(pattern, content) =>
                {
                    LeadingSpace::Never
                }
                (
                    [
                        Normalizer::Prepend { prepend },
                        Normalizer::Replace { pattern: Pattern::String(pattern), content },
                    ],
                    [],
                ) if prepend == "▁" && marks_spaces(pattern, content) => LeadingSpace::EveryPiece,
                ([], [Metaspace { replacement, prepend_scheme, split: false }]) if replacement == "▁" => {
                    match prepend_scheme.as_str() {
                        "never" => LeadingSpace::Never,
                        "first" => LeadingSpace::Start,
                        "always" => LeadingSpace::EveryPieceWithout,
                        other => return Err(unsupported("prepend_scheme", other, "never, first or always")),
                    }
                }
                shape => return Err(unsupported("text rules", shape, "SentencePiece's ▁ for a space")),
            };
            return if self.model.ignore_merges {
                Err(unsupported("ignore_merges", "in a SentencePiece scheme", "merges"))
            } else {
                Ok(Scheme::SentencePiece { space })
            };
        }

        let nfc = match normalizer.as_slice() {
            [] => false,
            [Normalizer::Nfc] => true,
            shape => return Err(unsupported("normalizer", shape, "none, or NFC")),
        };
        let split = match pre_tokenizer.as_slice() {
            [ByteLevel { add_prefix_space: false, use_regex: true }] => Split::Gpt2,
            [Digits { individual_digits: true }, ByteLevel { add_prefix_space: false, use_regex: true }] => {
                Split::SmolLm
            }
            [
                Cut { pattern: Pattern::Regex(words), behavior, invert: false },
                ByteLevel { add_prefix_space: false, use_regex: false },
            ] if behavior == "Isolated" && words == QWEN2_WORDS => Split::Qwen2,
            [
                Cut { pattern: Pattern::Regex(words), behavior, invert: false },
                ByteLevel { add_prefix_space: false, use_regex: false },
            ] if behavior == "Isolated" && words == LLAMA_WORDS => Split::LlamaBpe,
            shape => return Err(unsupported("pre_tokenizer", shape, "that of GPT-2, SmolLM, Qwen 2 or Llama 3")),
        };
        if self.model.ignore_merges != (split == Split::LlamaBpe) {
            return Err(unsupported("ignore_merges", self.model.ignore_merges, "true for Llama 3 and false elsewhere"));
        }
        Ok(Scheme::ByteLevel { split, nfc })
    }
}

pub(super) fn parse<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, TokenizerError> {
    check_limit(what, bytes.len(), JSON_BYTES_MAX)?;
    serde_json::from_slice(bytes).map_err(|error| unreadable(what, error))
}

pub(super) fn unreadable(what: &'static str, error: impl fmt::Display) -> TokenizerError {
    TokenizerError::Unreadable { what, reason: error.to_string() }
}

fn unsupported(what: &'static str, found: impl fmt::Debug, known: &'static str) -> TokenizerError {
    let mut found = format!("{found:?}");
    if let Some((end, _)) = found.char_indices().nth(300) {
        found.truncate(end);
        found.push('…');
    }
    TokenizerError::Unsupported { what, found, known }
}

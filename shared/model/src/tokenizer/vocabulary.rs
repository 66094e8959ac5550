//! The checked content of a tokenizer: tokens in id order, merges by rank, and the scheme that cuts text before
//! merging. Constructing a [`Vocabulary`] is where tokenizers from outside are judged; what it holds is never
//! validated again. It knows no file format.

use std::collections::{HashMap, HashSet};

use super::TokenizerError;
use super::bytes::letter_byte;

const TOKENS_MAX: usize = 1 << 20;
const MERGES_MAX: usize = 1 << 21;
const TOKEN_BYTES_MAX: usize = 2048;
const ALL_TOKEN_BYTES_MAX: usize = 32 << 20;

/// Invariants: token texts are distinct and not empty, both halves and the result of every merge are tokens, no merge
/// occurs twice, a [`Kind::Byte`] token is spelled `<0xXX>`, and a SentencePiece scheme can spell any text.
pub(super) struct Vocabulary {
    tokens: Vec<Token>,
    merges: Vec<(String, String)>,
    scheme: Scheme,
    /// Stands for characters that no token can spell.
    unknown: Option<u32>,
}

pub(super) struct Token {
    pub text: String,
    pub kind: Kind,
    /// An added token that is searched for after normalization, as tokens that users add often are.
    pub normalized: bool,
}

/// GGUF's token types, with its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal = 1,
    Unknown = 2,
    /// Special: found in a text only when the caller asks for that.
    Control = 3,
    /// Always found in a text, whole.
    UserDefined = 4,
    /// Fills a gap between ids.
    Unused = 5,
    Byte = 6,
}

impl Kind {
    /// Whether the token is searched for in the text before the text is cut.
    pub fn is_added(self) -> bool {
        matches!(self, Self::Unknown | Self::Control | Self::UserDefined)
    }

    pub fn is_special(self) -> bool {
        matches!(self, Self::Unknown | Self::Control)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    /// Tokens are spelled in 256 letters that stand for bytes.
    ByteLevel {
        split: Split,
        /// Unicode composition first, as Qwen does.
        nfc: bool,
    },
    /// SentencePiece's merges over characters, `▁` for a space, `<0xXX>` for what has no token.
    SentencePiece { space: LeadingSpace },
}

/// How byte-level schemes cut a text into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Split {
    Gpt2,
    /// Every digit alone, then as GPT-2.
    SmolLm,
    Qwen2,
    /// Up to three digits together; a word that is a token skips the merges.
    LlamaBpe,
}

/// Where SentencePiece's `▁` goes in front of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LeadingSpace {
    Never,
    /// Before every piece of text between added tokens: the original rule, and llama.cpp's.
    EveryPiece,
    /// Only at the start of the whole text, and only if it does not begin with a space.
    Start,
    /// Before every piece that does not begin with a space.
    EveryPieceWithout,
}

impl Scheme {
    pub fn prepends_space(self) -> bool {
        matches!(self, Self::SentencePiece { space } if space != LeadingSpace::Never)
    }
}

impl Vocabulary {
    pub fn new(
        tokens: Vec<Token>,
        merges: Vec<(String, String)>,
        scheme: Scheme,
        unknown: Option<u32>,
    ) -> Result<Self, TokenizerError> {
        let ids = check_tokens(&tokens)?;
        check_merges(&merges, &ids)?;
        let size = u32::try_from(tokens.len()).expect("check_tokens bounds the count by TOKENS_MAX");
        if let Some(id) = unknown.filter(|&id| id >= size) {
            return Err(TokenizerError::IdOutOfRange { what: "unknown token", id, vocabulary: size });
        }
        let byte_tokens = tokens.iter().filter(|token| token.kind == Kind::Byte).count();
        if matches!(scheme, Scheme::SentencePiece { .. }) && unknown.is_none() && byte_tokens < 256 {
            return Err(TokenizerError::Unsupported {
                what: "vocabulary of",
                found: format!("{byte_tokens} byte tokens and no unknown token"),
                known: "all 256 byte tokens <0x00> to <0xFF>, or an unknown token",
            });
        }
        drop(ids);
        Ok(Self { tokens, merges, scheme, unknown })
    }

    pub fn size(&self) -> u32 {
        self.tokens.len() as u32
    }

    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    pub fn merges(&self) -> &[(String, String)] {
        &self.merges
    }

    pub fn scheme(&self) -> &Scheme {
        &self.scheme
    }

    pub fn unknown(&self) -> Option<u32> {
        self.unknown
    }

    pub fn text(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(|token| token.text.as_str())
    }

    pub fn is_text(&self, id: u32) -> bool {
        let kind = self.tokens.get(id as usize).map(|token| token.kind);
        kind.is_some_and(|kind| !kind.is_special() && kind != Kind::Unused)
    }

    /// The bytes of text that a token stands for.
    pub fn bytes(&self, id: u32) -> Option<Vec<u8>> {
        let Token { text, kind, .. } = self.tokens.get(id as usize)?;
        Some(match (kind, self.scheme) {
            (Kind::Normal, Scheme::ByteLevel { .. }) => {
                // A token that is not spelled in byte letters can only stand for itself.
                text.chars().map(letter_byte).collect::<Option<Vec<u8>>>().unwrap_or_else(|| text.clone().into_bytes())
            }
            (Kind::Normal, Scheme::SentencePiece { .. }) => text.replace('▁', " ").into_bytes(),
            (Kind::Byte, _) => vec![byte_of(text)?],
            _ => text.clone().into_bytes(),
        })
    }
}

/// The byte of a token spelled `<0xXX>`.
pub(super) fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let plain = digits.len() == 2 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'A'..=b'F'));
    plain.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

fn check_tokens(tokens: &[Token]) -> Result<HashMap<&str, u32>, TokenizerError> {
    check_limit("vocabulary", tokens.len(), TOKENS_MAX)?;
    check_limit("vocabulary's text", tokens.iter().map(|token| token.text.len()).sum(), ALL_TOKEN_BYTES_MAX)?;
    if tokens.is_empty() {
        return Err(TokenizerError::Unreadable { what: "vocabulary", reason: "it has no tokens".into() });
    }
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in (0u32..).zip(tokens) {
        let reason = match token.kind {
            _ if token.text.is_empty() => "it has no text".to_owned(),
            _ if token.text.len() > TOKEN_BYTES_MAX => {
                format!("its text of {} bytes is longer than {TOKEN_BYTES_MAX}", token.text.len())
            }
            Kind::Byte if byte_of(&token.text).is_none() => {
                format!("{:?} is a byte token, but not of the form <0xXX>", token.text)
            }
            _ => {
                if let Some(first) = ids.insert(token.text.as_str(), id) {
                    return Err(TokenizerError::DuplicateToken { text: token.text.clone(), first, second: id });
                }
                continue;
            }
        };
        return Err(TokenizerError::BadToken { id, reason });
    }
    Ok(ids)
}

fn check_merges(merges: &[(String, String)], ids: &HashMap<&str, u32>) -> Result<(), TokenizerError> {
    check_limit("list of merges", merges.len(), MERGES_MAX)?;
    let mut seen = HashSet::with_capacity(merges.len());
    let mut joined = String::new();
    for (index, (left, right)) in merges.iter().enumerate() {
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        let reason = match (ids.get(left.as_str()), ids.get(right.as_str())) {
            (None, _) => "begins with something that is no token",
            (_, None) => "ends with something that is no token",
            _ if !ids.contains_key(joined.as_str()) => "gives something that is no token",
            (Some(left), Some(right)) if !seen.insert((*left, *right)) => "occurs twice",
            _ => continue,
        };
        return Err(TokenizerError::BadMerge { index, left: left.clone(), right: right.clone(), reason });
    }
    Ok(())
}

pub(super) fn check_limit(what: &'static str, found: usize, limit: usize) -> Result<(), TokenizerError> {
    if found > limit { Err(TokenizerError::TooLarge { what, found, limit }) } else { Ok(()) }
}

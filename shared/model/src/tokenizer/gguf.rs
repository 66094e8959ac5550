//! The tokenizer inside a GGUF file: the `tokenizer.*` keys as a plain struct, read into a vocabulary and written from
//! one. GGUF keeps no rules, only the name of a set of rules (`pre`), so an unknown name is an error. The container
//! itself belongs to the crate `quant`.

use std::collections::HashMap;

use super::json::split_merge;
use super::vocabulary::{Kind, LeadingSpace, Scheme, Split, Token, Vocabulary, check_limit};
use super::{TokenizerError, TokenizerSettings};

/// Cutting a piece in two at every place takes time quadratic in its length.
const PIECE_BYTES_MAX: usize = 256;

/// The values of `tokenizer.ggml.*` and `tokenizer.chat_template`, unchecked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufTokenizer {
    /// "gpt2" is byte-level BPE, "llama" SentencePiece.
    pub model: String,
    /// The rules that cut a text into words; only byte-level vocabularies have them.
    pub pre: Option<String>,
    pub tokens: Vec<String>,
    /// "left right", best first.
    pub merges: Vec<String>,
    pub token_types: Vec<i32>,
    /// SentencePiece's: the pair that gives the token with the highest score merges first.
    pub scores: Option<Vec<f32>>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub eot: Option<u32>,
    pub unknown: Option<u32>,
    pub add_bos: Option<bool>,
    pub add_space_prefix: Option<bool>,
    pub chat_template: Option<String>,
}

impl GgufTokenizer {
    pub(super) fn read(self) -> Result<(Vocabulary, TokenizerSettings), TokenizerError> {
        if self.token_types.len() != self.tokens.len() {
            let found = self.token_types.len();
            return Err(TokenizerError::WrongCount { field: "token_type", found, expected: self.tokens.len() });
        }
        let kinds = (0u32..).zip(&self.token_types).map(|(id, &number)| kind(id, number));
        let kinds = kinds.collect::<Result<Vec<_>, _>>()?;
        let scheme = self.scheme()?;
        let merges = match scheme {
            Scheme::ByteLevel { .. } => {
                self.merges.iter().enumerate().map(|(index, text)| split_merge(index, text)).collect()
            }
            Scheme::SentencePiece { .. } => merges_by_score(&self.tokens, &kinds, self.scores.as_deref()),
        }?;
        let add_bos = self.add_bos.unwrap_or(match scheme {
            Scheme::SentencePiece { .. } => true,
            Scheme::ByteLevel { split, .. } => split == Split::LlamaBpe,
        });
        let ends = ["<|im_end|>", "<|endoftext|>", "<|eot_id|>"].into_iter().filter_map(|end| {
            // llama.cpp ends generation at these, whatever the file says.
            self.tokens.iter().position(|text| text == end).map(|id| id as u32)
        });
        let settings = TokenizerSettings {
            bos: self.bos,
            eos: self.eos.into_iter().chain(self.eot).chain(ends).collect(),
            add_bos: add_bos && self.bos.is_some(),
            chat_template: self.chat_template,
        };
        // Byte-level vocabularies leave out what they cannot spell instead of replacing it.
        let unknown = self.unknown.filter(|_| matches!(scheme, Scheme::SentencePiece { .. }));
        let tokens = self.tokens.into_iter().zip(kinds).map(|(text, kind)| Token { text, kind, normalized: false });
        Ok((Vocabulary::new(tokens.collect(), merges, scheme, unknown)?, settings))
    }

    fn scheme(&self) -> Result<Scheme, TokenizerError> {
        match self.model.as_str() {
            "gpt2" => {
                let split = match self.pre.as_deref() {
                    // Files from before 2024 have no `pre`; transformers reads them by GPT-2's rules.
                    None | Some("default" | "gpt-2") => Split::Gpt2,
                    Some("smollm") => Split::SmolLm,
                    Some("qwen2") => Split::Qwen2,
                    Some("llama-bpe" | "llama3" | "llama-v3") => Split::LlamaBpe,
                    Some(other) => {
                        return Err(TokenizerError::Unsupported {
                            what: "tokenizer.ggml.pre",
                            found: other.to_owned(),
                            known: "gpt-2, smollm, qwen2 or llama-bpe",
                        });
                    }
                };
                // Qwen composes characters first. GGUF has no key for that: llama.cpp leaves it out.
                Ok(Scheme::ByteLevel { split, nfc: split == Split::Qwen2 })
            }
            "llama" => {
                let space =
                    if self.add_space_prefix == Some(false) { LeadingSpace::Never } else { LeadingSpace::EveryPiece };
                Ok(Scheme::SentencePiece { space })
            }
            other => Err(TokenizerError::Unsupported {
                what: "tokenizer.ggml.model",
                found: other.to_owned(),
                known: "gpt2 or llama",
            }),
        }
    }

    pub(super) fn write(vocabulary: &Vocabulary, settings: &TokenizerSettings) -> Result<Self, TokenizerError> {
        let mut eos = settings.eos.iter().copied();
        let mut gguf = Self {
            tokens: vocabulary.tokens().iter().map(|token| token.text.clone()).collect(),
            token_types: vocabulary.tokens().iter().map(|token| token.kind as i32).collect(),
            bos: settings.bos,
            eos: eos.next(),
            eot: eos.next(),
            unknown: vocabulary.unknown(),
            add_bos: Some(settings.add_bos),
            chat_template: settings.chat_template.clone(),
            ..Self::default()
        };
        match *vocabulary.scheme() {
            Scheme::ByteLevel { split, .. } => {
                gguf.model = "gpt2".to_owned();
                let pre = match split {
                    Split::Gpt2 => "gpt-2",
                    Split::SmolLm => "smollm",
                    Split::Qwen2 => "qwen2",
                    Split::LlamaBpe => "llama-bpe",
                };
                gguf.pre = Some(pre.to_owned());
                gguf.merges = written_merges(vocabulary)?;
                gguf.add_space_prefix = Some(false);
            }
            Scheme::SentencePiece { space } => {
                gguf.model = "llama".to_owned();
                gguf.pre = Some("default".to_owned());
                gguf.scores = Some(scores_by_merge(vocabulary));
                gguf.add_space_prefix = Some(space != LeadingSpace::Never);
            }
        }
        Ok(gguf)
    }

    /// Adds unused tokens up to the number of embedding rows, which llama.cpp wants to be equal.
    pub fn pad_to(&mut self, rows: u32) {
        for id in self.tokens.len()..rows as usize {
            self.tokens.push(format!("[PAD{id}]"));
            self.token_types.push(Kind::Unused as i32);
            if let Some(scores) = &mut self.scores {
                scores.push(0.0);
            }
        }
    }
}

fn kind(id: u32, number: i32) -> Result<Kind, TokenizerError> {
    let kinds = [Kind::Normal, Kind::Unknown, Kind::Control, Kind::UserDefined, Kind::Unused, Kind::Byte];
    let found = kinds.into_iter().find(|&kind| kind as i32 == number);
    found.ok_or_else(|| TokenizerError::BadToken { id, reason: format!("its type {number} is not between 1 and 6") })
}

/// Merges that pick pairs in the order in which SentencePiece does: by the score of the token they give. Among equals
/// the longer left half goes first, then the longer right half, as converters to tokenizer.json order them.
fn merges_by_score(
    tokens: &[String],
    kinds: &[Kind],
    scores: Option<&[f32]>,
) -> Result<Vec<(String, String)>, TokenizerError> {
    let scores = scores.unwrap_or_default();
    if scores.len() != tokens.len() {
        return Err(TokenizerError::WrongCount { field: "scores", found: scores.len(), expected: tokens.len() });
    }
    // Only plain pieces take part: text that spells `<s>` or `<0x0A>` must not become that token.
    let pieces: HashMap<&str, u32> = (0u32..)
        .zip(tokens)
        .filter(|(id, _)| kinds[*id as usize] == Kind::Normal)
        .map(|(id, text)| (text.as_str(), id))
        .collect();
    let mut ranked = Vec::new();
    for ((id, text), &score) in (0u32..).zip(tokens).zip(scores) {
        if kinds[id as usize] != Kind::Normal {
            continue;
        }
        if !score.is_finite() {
            return Err(TokenizerError::BadToken { id, reason: format!("its score is {score}") });
        }
        check_limit("token's text", text.len(), PIECE_BYTES_MAX)?;
        let chars = text.chars().count();
        let cuts = text.char_indices().enumerate().skip(1);
        ranked.extend(cuts.filter_map(|(left_chars, (at, _))| {
            let (left, right) = text.split_at(at);
            let pair = (*pieces.get(left)?, *pieces.get(right)?);
            Some((score, (left_chars, chars - left_chars), pair))
        }));
    }
    // A stable sort: among equals the token with the smaller id stays first.
    ranked.sort_by(|(score, chars, _), (other_score, other_chars, _)| {
        other_score.total_cmp(score).then(other_chars.cmp(chars))
    });
    let text = |id: u32| tokens[id as usize].clone();
    Ok(ranked.into_iter().map(|(_, _, (left, right))| (text(left), text(right))).collect())
}

/// The inverse: a token's score is minus the rank of the first merge that gives it. Tokens that no merge gives keep 0,
/// which plays no part because nothing merges into them.
fn scores_by_merge(vocabulary: &Vocabulary) -> Vec<f32> {
    let ids: HashMap<&str, usize> =
        vocabulary.tokens().iter().enumerate().map(|(id, token)| (token.text.as_str(), id)).collect();
    let mut scores = vec![0.0; vocabulary.tokens().len()];
    let mut next = -1.0;
    for (left, right) in vocabulary.merges() {
        let score = &mut scores[ids[format!("{left}{right}").as_str()]];
        if *score == 0.0 {
            *score = next;
            next -= 1.0;
        }
    }
    scores
}

fn written_merges(vocabulary: &Vocabulary) -> Result<Vec<String>, TokenizerError> {
    let write = |(index, (left, right)): (usize, &(String, String))| {
        if left.contains(' ') || right.contains(' ') {
            let reason = "contains a space, which GGUF cannot write";
            return Err(TokenizerError::BadMerge { index, left: left.clone(), right: right.clone(), reason });
        }
        Ok(format!("{left} {right}"))
    };
    vocabulary.merges().iter().enumerate().map(write).collect()
}

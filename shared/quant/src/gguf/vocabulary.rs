//! The tokenizer's metadata as one checked value.
//!
//! Its arrays are parallel and its ids point into them, so a file can lie here without breaking the container. This
//! module does not tokenize; it promises that whoever does will find every index in range and every token distinct.

use super::{Reader, Strings};
use crate::Error;

#[derive(Clone, Debug, PartialEq)]
pub struct Vocabulary {
    /// `gpt2` for byte-level BPE, `llama` for SentencePiece.
    pub model: String,
    /// Names the rule that splits text before merging.
    pub pre: Option<String>,
    /// Distinct, one per row of the embedding.
    pub tokens: Strings,
    /// As long as `tokens`; all normal where the file says nothing.
    pub token_types: Vec<TokenType>,
    /// As long as `tokens` and finite; all zero where the file says nothing.
    pub scores: Vec<f32>,
    /// In order of rank, each two pieces with a space between them.
    pub merges: Strings,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub eot: Option<u32>,
    pub unknown: Option<u32>,
    pub padding: Option<u32>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
    pub chat_template: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum TokenType {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl Vocabulary {
    pub(super) fn read(reader: &Reader) -> Result<Vocabulary, Error> {
        let tokens = reader.required::<&Strings>("tokenizer.ggml.tokens")?;
        check_tokens(reader, tokens)?;
        let special = |name: &str| -> Result<Option<u32>, Error> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            let id = reader.optional::<u32>(&key)?;
            match id {
                Some(id) if id as usize >= tokens.len() => {
                    Err(reader.malformed(format!("`{key}` is {id}, but there are {} tokens", tokens.len())))
                }
                id => Ok(id),
            }
        };
        Ok(Vocabulary {
            model: reader.required("tokenizer.ggml.model")?,
            pre: reader.optional("tokenizer.ggml.pre")?,
            token_types: token_types(reader, tokens.len())?,
            scores: scores(reader, tokens.len())?,
            merges: merges(reader)?,
            bos: special("bos")?,
            eos: special("eos")?,
            eot: special("eot")?,
            unknown: special("unknown")?,
            padding: special("padding")?,
            add_bos: reader.optional("tokenizer.ggml.add_bos_token")?,
            add_eos: reader.optional("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: reader.optional("tokenizer.ggml.add_space_prefix")?,
            chat_template: reader.optional("tokenizer.chat_template")?,
            tokens: tokens.clone(),
        })
    }
}

impl TokenType {
    fn from_id(id: i32) -> Option<TokenType> {
        use TokenType::*;
        [Normal, Unknown, Control, UserDefined, Unused, Byte].into_iter().find(|&ty| ty as i32 == id)
    }
}

fn check_tokens(reader: &Reader, tokens: &Strings) -> Result<(), Error> {
    let mut sorted: Vec<u32> = (0..tokens.len() as u32).collect();
    sorted.sort_unstable_by_key(|&id| (&tokens[id as usize], id));
    let repeats = sorted.windows(2).filter(|pair| tokens[pair[0] as usize] == tokens[pair[1] as usize]);
    if let Some(id) = repeats.map(|pair| pair[1]).min() {
        return Err(reader.malformed(format!("`tokenizer.ggml.tokens` repeats an earlier token at id {id}")));
    }
    match reader.tensor("token_embd.weight") {
        Ok(embedding) if embedding.shape[0] != tokens.len() => {
            let reason = format!("{} tokens but {} embedding rows", tokens.len(), embedding.shape[0]);
            Err(reader.malformed(reason))
        }
        _ => Ok(()), // A file may hold a vocabulary alone.
    }
}

fn token_types(reader: &Reader, tokens: usize) -> Result<Vec<TokenType>, Error> {
    let key = "tokenizer.ggml.token_type";
    let Some(ids) = reader.optional::<&[i32]>(key)? else { return Ok(vec![TokenType::Normal; tokens]) };
    check_parallel(reader, key, ids.len(), tokens)?;
    let unknown = |id| reader.malformed(format!("`{key}` holds the unknown type {id}"));
    ids.iter().map(|&id| TokenType::from_id(id).ok_or_else(|| unknown(id))).collect()
}

fn scores(reader: &Reader, tokens: usize) -> Result<Vec<f32>, Error> {
    let key = "tokenizer.ggml.scores";
    let Some(scores) = reader.optional::<&[f32]>(key)? else { return Ok(vec![0.0; tokens]) };
    check_parallel(reader, key, scores.len(), tokens)?;
    match scores.iter().find(|score| !score.is_finite()) {
        Some(score) => Err(reader.malformed(format!("`{key}` holds {score}"))),
        None => Ok(scores.to_vec()),
    }
}

fn check_parallel(reader: &Reader, key: &str, found: usize, tokens: usize) -> Result<(), Error> {
    if found == tokens {
        return Ok(());
    }
    Err(reader.malformed(format!("`{key}` has {found} elements, but there are {tokens} tokens")))
}

fn merges(reader: &Reader) -> Result<Strings, Error> {
    let key = "tokenizer.ggml.merges";
    let Some(merges) = reader.optional::<&Strings>(key)? else { return Ok(Strings::default()) };
    let sound =
        |merge: &str| merge.split_once(' ').is_some_and(|(a, b)| !a.is_empty() && !b.is_empty() && !b.contains(' '));
    match merges.iter().position(|merge| !sound(merge)) {
        Some(rank) => Err(reader.malformed(format!("`{key}` is not two pieces and a space at rank {rank}"))),
        None => Ok(merges.clone()),
    }
}

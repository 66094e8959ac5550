//! The engine that does the merging, made of a checked vocabulary.
//!
//! It is what `document.rs` writes, read by the engine's own reader, but for the tokens: those go to it as they are.
//! Through JSON it would make a tree of the whole vocabulary first, at every start of a program.

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, Tokenizer};

use super::vocabulary::Vocabulary;
use super::{TokenizerError, document};

/// `bos` is put in front of every text by programs that ask for special tokens.
pub(super) fn build(vocabulary: &Vocabulary, bos: Option<&str>) -> Result<Tokenizer, TokenizerError> {
    let failed = |error: tokenizers::Error| TokenizerError::Engine(error.to_string());
    let mut engine = Tokenizer::from_bytes(document::write_rules(vocabulary, bos)).map_err(failed)?;
    let ids: Vocab = (0u32..).zip(vocabulary.tokens()).map(|(id, token)| (token.text.clone(), id)).collect();
    let flags = document::Flags::of(vocabulary);
    let mut model = BPE::builder()
        .vocab_and_merges(ids, vocabulary.merges().to_vec())
        .fuse_unk(flags.fuse_unk)
        .byte_fallback(flags.byte_fallback)
        .ignore_merges(flags.ignore_merges);
    if let Some(unknown) = vocabulary.unknown().and_then(|id| vocabulary.text(id)) {
        model = model.unk_token(unknown.to_owned());
    }
    engine.with_model(model.build().map_err(failed)?);
    let added = vocabulary.tokens().iter().filter(|token| token.kind.is_added());
    let added = added.map(|token| AddedToken::from(&*token.text, token.kind.is_special()).normalized(token.normalized));
    engine.add_tokens(&added.collect::<Vec<_>>());
    Ok(engine)
}

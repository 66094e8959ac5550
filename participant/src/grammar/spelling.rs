//! What tokens spell, and which of them a grammar allows next.

use std::time::Instant;

use model::tokenizer::Tokenizer;

use super::matcher::{DEAD, Matcher};

/// All tokens that spell text, in the order of their bytes: those that begin alike are tried together.
pub struct Spelling {
    bytes: Vec<u8>,
    tokens: Vec<Token>,
    /// Those that end an answer.
    ends: Vec<u32>,
}

struct Token {
    id: u32,
    /// Where its bytes are.
    begin: u32,
    length: u16,
    /// Of its first bytes, how many are those of the token before.
    common: u16,
}

/// Tokens that are tried before the clock is looked at again: as long as a microsecond, or as a few milliseconds for the
/// worst of schemas.
const TOKENS_BETWEEN_LOOKS: usize = 16;

/// A bit for each token.
#[derive(Default)]
pub struct Allowed(Vec<u64>);

impl Spelling {
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let text = |id: u32| tokenizer.token_bytes(id).ok().filter(|bytes| tokenizer.is_text(id) && !bytes.is_empty());
        let all = (0..tokenizer.vocabulary_size()).filter_map(|id| Some((text(id)?, id))).collect();
        Self::of(all, tokenizer.settings().eos.clone())
    }

    /// Of texts with their tokens, and tokens that end an answer.
    pub(super) fn of(mut all: Vec<(Vec<u8>, u32)>, ends: Vec<u32>) -> Self {
        all.sort_unstable();
        let (mut bytes, mut tokens): (Vec<u8>, Vec<Token>) = (Vec::new(), Vec::with_capacity(all.len()));
        let mut before: &[u8] = &[];
        for (token, id) in &all {
            let common = token.iter().zip(before).take_while(|(a, b)| a == b).count();
            // Tokens are short: the tokenizer has checked them.
            let [length, common] = [token.len(), common].map(|count| count as u16);
            tokens.push(Token { id: *id, begin: bytes.len() as u32, length, common });
            bytes.extend_from_slice(token);
            before = token;
        }
        Self { bytes, tokens, ends }
    }

    /// The tokens with which an answer may go on, or end; and those of which nobody knows, because there are too many ways to
    /// read them: [`Matcher::push`] tells. Whether all were tried in time: who asks again goes on where this has ended.
    pub fn allowed(&self, matcher: &mut Matcher, until: Option<Instant>, to: &mut Allowed) -> bool {
        to.0.clear();
        // Behind each byte of the token that was tried last; the first is before all of them.
        let mut sets = vec![matcher.now()];
        for (place, token) in self.tokens.iter().enumerate() {
            if place % TOKENS_BETWEEN_LOOKS == 0 && until.is_some_and(|until| until <= Instant::now()) {
                return false;
            }
            let bytes = &self.bytes[token.begin as usize..][..usize::from(token.length)];
            // Where fewer bytes have come, the next of them was not allowed.
            let common = usize::from(token.common);
            if sets.len() <= common {
                continue;
            }
            sets.truncate(common + 1);
            for &byte in &bytes[common..] {
                match matcher.step(sets[sets.len() - 1], byte) {
                    DEAD => break,
                    // A lost one stays so.
                    set => sets.push(set),
                }
            }
            if sets.len() > bytes.len() {
                to.insert(token.id);
            }
        }
        if matcher.may_end() {
            self.ends.iter().for_each(|&id| to.insert(id));
        }
        true
    }
}

impl Allowed {
    fn insert(&mut self, token: u32) {
        let word = token as usize / 64;
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (token % 64);
    }

    pub fn holds(&self, token: u32) -> bool {
        self.0.get(token as usize / 64).is_some_and(|word| word >> (token % 64) & 1 == 1)
    }
}

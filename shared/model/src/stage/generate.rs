//! Token by token, with the keys and values of the tokens before.

use super::attention::CacheSlot;
use super::{Input, Lora, Stage, to_values};
use crate::{ModelError, Segments};

/// Keys and values of one sequence, for every block of a stage.
pub struct KvCache {
    slots: Vec<CacheSlot>,
    tokens: usize,
}

impl KvCache {
    /// Tokens whose keys and values are held.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub(super) fn slot(&mut self, block: usize) -> &mut CacheSlot {
        &mut self.slots[block]
    }
}

impl Stage {
    pub fn cache(&self) -> KvCache {
        KvCache { slots: self.blocks.iter().map(|_| CacheSlot::default()).collect(), tokens: 0 }
    }

    /// Appends `tokens` to the cached sequence and returns the logits behind the last of them, `[vocabulary]`.
    pub fn next_logits(&self, tokens: &[u32], cache: &mut KvCache, lora: &Lora) -> Result<Vec<f32>, ModelError> {
        let segments = Segments::new(vec![tokens.len()])?;
        if cache.tokens + tokens.len() > self.config.context {
            return Err(ModelError::Mismatch(format!(
                "{} tokens exceed the model's context of {}",
                cache.tokens + tokens.len(),
                self.config.context
            )));
        }
        let (input, _) = self.entry(Input::Tokens(tokens), &segments, false)?;
        let residual = self.run_blocks(input, &segments, lora.frozen(), None, Some(cache));
        cache.tokens += tokens.len();
        let last = self.normed(residual.narrow(0, tokens.len() - 1, 1))?;
        Ok(to_values(last.matmul(self.lm_head()?.transpose())))
    }
}

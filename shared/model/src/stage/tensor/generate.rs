//! Token by token, with the keys and values of the tokens before.

use super::attention::CacheSlot;
use super::{Lora, Rows, TensorStage, to_values};
use crate::Segments;

pub(in crate::stage) struct KvCache {
    slots: Vec<CacheSlot>,
    tokens: usize,
}

impl KvCache {
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    pub(super) fn slot(&mut self, block: usize) -> &mut CacheSlot {
        &mut self.slots[block]
    }
}

impl TensorStage {
    pub(in crate::stage) fn cache(&self) -> KvCache {
        KvCache { slots: self.blocks.iter().map(|_| CacheSlot::default()).collect(), tokens: 0 }
    }

    /// `[vocabulary]` behind the last of the rows.
    pub(in crate::stage) fn next_logits(
        &self,
        rows: Rows<'_>,
        segments: &Segments,
        cache: &mut KvCache,
        lora: &Lora,
    ) -> Vec<f32> {
        let (input, _) = self.entry(rows, false);
        let residual = self.run_blocks(input, segments, lora.frozen(), None, Some(cache));
        cache.tokens += segments.tokens();
        let last = self.normed(residual.narrow(0, segments.tokens() - 1, 1));
        to_values(last.matmul(self.lm_head().transpose()))
    }
}

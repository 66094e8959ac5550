//! Who holds which blocks.

use std::ops::Range;

use crate::ModelError;

/// Where the decoder is cut: `head` blocks after the embedding, `tail` blocks before the final norm. Each
/// participant may have its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    pub head_blocks: usize,
    pub tail_blocks: usize,
}

/// One party's share of the decoder: a run of blocks, with or without what stands before and behind them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub blocks: Range<usize>,
    /// The token embedding stands before the blocks.
    pub embedding: bool,
    /// Final norm and LM head stand behind the blocks.
    pub lm_head: bool,
}

impl Part {
    pub fn whole(blocks: usize) -> Self {
        Self { blocks: 0..blocks, embedding: true, lm_head: true }
    }
}

impl Cut {
    /// Head, body and tail of a decoder of `blocks` blocks; at least one block must be left for the body.
    pub fn parts(self, blocks: usize) -> Result<[Part; 3], ModelError> {
        let Self { head_blocks, tail_blocks } = self;
        let taken = head_blocks.checked_add(tail_blocks).filter(|&taken| taken < blocks).ok_or_else(|| {
            ModelError::Mismatch(format!(
                "head_blocks = {head_blocks} and tail_blocks = {tail_blocks} leave no body in a model of {blocks} blocks"
            ))
        })?;
        debug_assert!(taken < blocks);
        Ok([
            Part { blocks: 0..head_blocks, embedding: true, lm_head: false },
            Part { blocks: head_blocks..blocks - tail_blocks, embedding: false, lm_head: false },
            Part { blocks: blocks - tail_blocks..blocks, embedding: false, lm_head: true },
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_divides_every_block_once() {
        let [head, body, tail] = Cut { head_blocks: 1, tail_blocks: 2 }.parts(7).unwrap();
        assert_eq!((head.blocks, body.blocks, tail.blocks), (0..1, 1..5, 5..7));
        assert!(head.embedding && !head.lm_head && !body.embedding && !body.lm_head && tail.lm_head);
    }

    #[test]
    fn a_cut_that_leaves_no_body_is_refused_with_its_numbers() {
        for (head_blocks, tail_blocks) in [(2, 2), (4, 0), (usize::MAX, 1)] {
            let error = Cut { head_blocks, tail_blocks }.parts(4).unwrap_err().to_string();
            assert!(error.contains(&head_blocks.to_string()) && error.contains("4 blocks"), "{error}");
        }
    }
}

//! Dropout of the low-rank paths' inputs.

use std::ops::Range;

use rand::Rng;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng;
use sha2::{Digest, Sha256};

/// A draw of f64 takes so many of the generator's words of 32 bits.
const WORDS_PER_DRAW: u128 = 2;

/// Which inputs of the low-rank paths are zeroed in one micro-batch: a function of this seed and the layer's name
/// alone, so that both sides of a cut and the unsplit model draw the same masks.
#[derive(Debug, Clone)]
pub struct Dropout {
    pub seed: [u8; 32],
}

impl Dropout {
    /// 0 with `probability`, otherwise `1 / (1 − probability)`, which keeps the mean: of those of the micro-batch's inputs
    /// that `range` says, row by row.
    pub(super) fn mask(&self, name: &str, range: Range<usize>, probability: f64) -> Vec<f32> {
        let seed: [u8; 32] = Sha256::new().chain_update(self.seed).chain_update(name).finalize().into();
        let mut generator = ChaCha20Rng::from_seed(seed);
        generator.set_word_pos(range.start as u128 * WORDS_PER_DRAW);
        let kept = (1.0 / (1.0 - probability)) as f32;
        range.map(|_| if generator.random::<f64>() < probability { 0.0 } else { kept }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropout_mask_keeps_the_mean_and_depends_on_seed_and_name_alone() {
        let dropout = Dropout { seed: [7; 32] };
        let mask = dropout.mask("a", 0..100_000, 0.25);
        let mean = mask.iter().sum::<f32>() / mask.len() as f32;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        assert_eq!(mask, dropout.mask("a", 0..100_000, 0.25));
        assert_eq!(mask[1_001..5_000], dropout.mask("a", 1_001..5_000, 0.25));
        assert_ne!(mask, dropout.mask("b", 0..100_000, 0.25));
        assert_ne!(mask, Dropout { seed: [8; 32] }.mask("a", 0..100_000, 0.25));
    }
}

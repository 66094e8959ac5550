//! Randomness: one seed per experiment, one generator per purpose.
//!
//! A purpose is a label, such as "participant/3/batches". Generators of different labels are independent, so that
//! drawing more numbers for one purpose never shifts another. There is no randomness from the system here.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng;
use sha2::{Digest, Sha256};

use crate::Experiment;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Seed(pub u64);

impl Seed {
    /// SHA-256 of "headwater seed", the seed in little-endian order and the label: the first two have fixed lengths,
    /// so that no two pairs of seed and label hash the same text.
    pub fn bytes(self, label: &str) -> [u8; 32] {
        Sha256::new()
            .chain_update("headwater seed")
            .chain_update(self.0.to_le_bytes())
            .chain_update(label)
            .finalize()
            .into()
    }

    pub fn generator(self, label: &str) -> ChaCha20Rng {
        ChaCha20Rng::from_seed(self.bytes(label))
    }
}

impl Experiment {
    /// The generator for one purpose, the same on every machine.
    pub fn generator(&self, label: &str) -> ChaCha20Rng {
        Seed(self.seed).generator(label)
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::RngCore;

    use super::*;
    use crate::hex;

    #[test]
    fn bytes_are_the_hash_of_prefix_seed_and_label() {
        // printf 'headwater seed\x07\0\0\0\0\0\0\0participant/3/batches' | sha256sum
        check_bytes(7, "participant/3/batches", "005977bd4f13c972b7e7e12074df9c8cb326623df6ed56e2eeee743d8e1dbba2");
        // printf 'headwater seed\0\0\0\0\0\0\0\0' | sha256sum
        check_bytes(0, "", "73c7fe7a9441be522a85157fc255cf42cac85d5f017d0283ea7c1d88ff22fc1c");
    }

    fn check_bytes(seed: u64, label: &str, expected: &str) {
        assert_eq!(hex(&Seed(seed).bytes(label)), expected, "seed {seed}, label {label:?}");
    }

    #[test]
    fn generators_repeat_themselves_across_versions() {
        // The first 16 bytes of ChaCha20's key stream (counter and nonce 0), computed from its definition in Python.
        let mut generator = Seed(7).generator("participant/3/batches");
        assert_eq!(
            [generator.next_u64(), generator.next_u64()],
            [15_796_740_190_625_792_103, 8_091_798_343_125_350_119]
        );
    }

    #[test]
    fn labels_and_seeds_give_different_generators() {
        let first = |seed: u64, label: &str| Seed(seed).generator(label).next_u64();
        assert_ne!(first(7, "adapter"), first(7, "adapters"));
        assert_ne!(first(7, "adapter"), first(8, "adapter"));
    }
}

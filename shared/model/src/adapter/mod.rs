//! LoRA adapters as plain numbers: seeded start, cutting into parts and joining again, gradients.
//!
//! Names and shapes are PEFT's in memory, on the wire and on disk; see [`peft`] for the files.

pub mod gradients;
pub mod peft;

use std::collections::BTreeSet;
use std::ops::Range;

use experiment::{Factors, Seed};
use rand::Rng;

use crate::{ModelConfig, ModelError};
pub use gradients::Gradients;

/// The linear layers of a block, in the order in which adapters list them.
pub const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

pub fn target_index(target: &str) -> Option<usize> {
    TARGETS.iter().position(|known| *known == target)
}

/// `layers.3.self_attn.q_proj`
pub(crate) fn module_path(block: usize, target: &str) -> String {
    let parent = if matches!(target, "q_proj" | "k_proj" | "v_proj" | "o_proj") { "self_attn" } else { "mlp" };
    format!("layers.{block}.{parent}.{target}")
}

/// What adapters of one experiment have in common.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    pub rank: u32,
    pub alpha: f64,
    pub dropout: f64,
    /// In the order of [`TARGETS`].
    pub targets: Vec<String>,
    pub factors: Factors,
}

/// One factor of one low-rank product.
#[derive(Clone, PartialEq)]
pub struct AdapterTensor {
    /// `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`
    pub name: String,
    pub block: usize,
    pub target: String,
    /// A is `[rank, in]`, B is `[out, rank]`.
    pub shape: [usize; 2],
    pub values: Vec<f32>,
}

/// The factors of a run of blocks: by block, then target, A before B.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    pub config: AdapterConfig,
    tensors: Vec<AdapterTensor>,
}

impl AdapterConfig {
    pub fn new(adapter: &experiment::Adapter) -> Self {
        let mut targets = adapter.targets.clone();
        targets.sort_by_key(|target| target_index(target));
        let experiment::Adapter { rank, alpha, dropout, factors, .. } = *adapter;
        Self { rank, alpha, dropout, targets, factors }
    }

    /// Whether A and B train.
    pub fn trains(&self) -> [bool; 2] {
        [self.factors == Factors::Both, true]
    }
}

impl Adapter {
    /// The start of every experiment: A uniform in ±1/√in (as PEFT and `torch.nn.Linear` draw it), B zero, so that
    /// the adapted model equals the base model. Each tensor has a generator of its own: any part starts alike anywhere.
    pub fn seeded(
        config: AdapterConfig,
        model: &ModelConfig,
        blocks: Range<usize>,
        seed: Seed,
    ) -> Result<Self, ModelError> {
        Self::build(config, model, blocks, |name, [rows, columns], is_a| {
            if !is_a {
                return vec![0.0; rows * columns];
            }
            let bound = 1.0 / (columns as f64).sqrt();
            let mut generator = seed.generator(&format!("adapter/{name}"));
            (0..rows * columns).map(|_| generator.random_range(-bound..bound) as f32).collect()
        })
    }

    /// The adapter of nothing: the base model itself.
    pub fn none() -> Self {
        let config = AdapterConfig { rank: 1, alpha: 1.0, dropout: 0.0, targets: Vec::new(), factors: Factors::Both };
        Self { config, tensors: Vec::new() }
    }

    fn build(
        config: AdapterConfig,
        model: &ModelConfig,
        blocks: Range<usize>,
        mut values: impl FnMut(&str, [usize; 2], bool) -> Vec<f32>,
    ) -> Result<Self, ModelError> {
        let rank = config.rank as usize;
        let mut tensors = Vec::new();
        for block in blocks {
            for target in &config.targets {
                let [rows, columns] = model
                    .linear_shape(target)
                    .ok_or_else(|| ModelError::Mismatch(format!("no block has a linear layer `{target}`")))?;
                for (factor, shape) in [("A", [rank, columns]), ("B", [rows, rank])] {
                    let name = format!("base_model.model.model.{}.lora_{factor}.weight", module_path(block, target));
                    let values = values(&name, shape, factor == "A");
                    tensors.push(AdapterTensor { name, block, target: target.clone(), shape, values });
                }
            }
        }
        Ok(Self { config, tensors })
    }

    pub fn tensors(&self) -> &[AdapterTensor] {
        &self.tensors
    }

    /// `[A, B]` of every adapted layer.
    pub fn pairs(&self) -> impl Iterator<Item = [&AdapterTensor; 2]> {
        self.tensors.chunks_exact(2).map(|pair| [&pair[0], &pair[1]])
    }

    /// Whether tensor `i` trains.
    pub fn trains(&self, i: usize) -> bool {
        self.config.trains()[i % 2]
    }

    /// Numbers in all tensors.
    pub fn parameters(&self) -> usize {
        self.tensors.iter().map(|tensor| tensor.values.len()).sum()
    }

    /// The share of some of the blocks.
    pub fn part(&self, blocks: Range<usize>) -> Self {
        self.filtered(|block| blocks.contains(&block))
    }

    /// The blocks that have tensors here.
    pub fn blocks(&self) -> BTreeSet<usize> {
        self.tensors.iter().map(|tensor| tensor.block).collect()
    }

    /// The share of the blocks that `keep` accepts.
    pub fn filtered(&self, keep: impl Fn(usize) -> bool) -> Self {
        let tensors = self.tensors.iter().filter(|tensor| keep(tensor.block)).cloned().collect();
        Self { config: self.config.clone(), tensors }
    }

    /// Head, body and tail (in any order, of any number) as one adapter.
    pub fn join(parts: impl IntoIterator<Item = Self>) -> Result<Self, ModelError> {
        let mut parts = parts.into_iter();
        let mut joined = parts.next().ok_or_else(|| ModelError::Mismatch("no adapter to join".into()))?;
        for part in parts {
            if part.config != joined.config {
                return Err(ModelError::Mismatch("adapters of different rank, alpha or targets do not join".into()));
            }
            joined.tensors.extend(part.tensors);
        }
        joined.tensors.sort_by_key(|tensor| tensor.block);
        let mut names = BTreeSet::new();
        if let Some(twice) = joined.tensors.iter().find(|tensor| !names.insert(&tensor.name)) {
            return Err(ModelError::Mismatch(format!("two parts hold {}", twice.name)));
        }
        Ok(joined)
    }

    /// All values, tensor after tensor: what an aggregation strategy works on.
    pub fn flat(&self) -> Vec<f32> {
        self.tensors.iter().flat_map(|tensor| &tensor.values).copied().collect()
    }

    /// The inverse of [`flat`](Self::flat).
    pub fn with_flat(&self, flat: &[f32]) -> Result<Self, ModelError> {
        if flat.len() != self.parameters() {
            let expected = self.parameters();
            return Err(ModelError::Mismatch(format!("{} adapter values; expected {expected}", flat.len())));
        }
        let mut adapter = self.clone();
        let mut rest = flat;
        for tensor in &mut adapter.tensors {
            let (values, behind) = rest.split_at(tensor.values.len());
            tensor.values.copy_from_slice(values);
            rest = behind;
        }
        Ok(adapter)
    }

    /// The same adapter with other values, which must come in the order, number and size of these tensors.
    pub fn with_tensors(&self, values: Vec<Vec<f32>>) -> Result<Self, ModelError> {
        if values.len() != self.tensors.len() {
            let (found, expected) = (values.len(), self.tensors.len());
            return Err(ModelError::Mismatch(format!("{found} adapter tensors; expected {expected}")));
        }
        let mut adapter = self.clone();
        for (tensor, values) in adapter.tensors.iter_mut().zip(values) {
            if values.len() != tensor.values.len() {
                let (found, expected) = (values.len(), tensor.values.len());
                return Err(ModelError::Mismatch(format!("{found} values for {}; expected {expected}", tensor.name)));
            }
            tensor.values = values;
        }
        Ok(adapter)
    }

    pub(crate) fn values_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.tensors[i].values
    }

    /// `alpha / rank · B A`, `[out, in]`, row-major: what merging adds to a base weight.
    pub fn delta(&self, [a, b]: [&AdapterTensor; 2]) -> Vec<f32> {
        let ([rank, columns], [rows, _]) = (a.shape, b.shape);
        let scale = self.config.alpha / f64::from(self.config.rank);
        let mut delta = vec![0.0; rows * columns];
        for (row, delta) in delta.chunks_exact_mut(columns).enumerate() {
            let mut sums = vec![0.0f64; columns];
            for r in 0..rank {
                let factor = scale * f64::from(b.values[row * rank + r]);
                for (sum, a) in sums.iter_mut().zip(&a.values[r * columns..]) {
                    *sum += factor * f64::from(*a);
                }
            }
            for (delta, sum) in delta.iter_mut().zip(sums) {
                *delta = sum as f32;
            }
        }
        delta
    }
}

/// Prints name and shape alone.
impl std::fmt::Debug for AdapterTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}", self.name, self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::random::tests::tiny_config;

    fn adapter(blocks: Range<usize>) -> Adapter {
        let targets = vec!["q_proj".into(), "down_proj".into()];
        let config = AdapterConfig { rank: 3, alpha: 6.0, dropout: 0.0, targets, factors: Factors::Both };
        Adapter::seeded(config, &tiny_config(4), blocks, Seed(1)).unwrap()
    }

    #[test]
    fn parts_cut_from_the_whole_equal_parts_made_apart_and_join_again() {
        let whole = adapter(0..4);
        let parts = [whole.part(3..4), whole.part(0..1), whole.part(1..3)];
        assert_eq!(parts[2], adapter(1..3));
        assert_eq!(Adapter::join(parts).unwrap(), whole);
    }

    #[test]
    fn joining_the_same_block_twice_is_refused() {
        let error = Adapter::join([adapter(0..2), adapter(1..3)]).unwrap_err().to_string();
        assert!(error.contains("layers.1.self_attn.q_proj"), "{error}");
    }

    #[test]
    fn flat_values_come_back_in_place() {
        let whole = adapter(0..2);
        assert_eq!(whole.with_flat(&whole.flat()).unwrap(), whole);
        assert!(whole.with_flat(&[0.0]).is_err());
    }

    #[test]
    fn a_seeded_adapter_changes_nothing() {
        let adapter = adapter(0..1);
        for pair in adapter.pairs() {
            assert!(adapter.delta(pair).iter().all(|&x| x == 0.0));
            assert!(pair[0].values.iter().any(|&x| x != 0.0));
        }
    }
}

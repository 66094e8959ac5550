//! A Llama with random weights and a byte tokenizer, made from a seed: a model that needs no download.

use std::path::Path;

use experiment::Seed;
use quant::BlockType;
use rand_distr::{Distribution, Normal};

use super::{Source, TensorInfo, tensors_of};
use crate::{Family, ModelConfig, ModelError, Tokenizer};

pub struct RandomModel {
    config: ModelConfig,
    tokenizer: Tokenizer,
    tensors: Vec<TensorInfo>,
    seed: Seed,
}

impl RandomModel {
    pub fn new(shape: &experiment::RandomModel, seed: Seed) -> Result<Self, ModelError> {
        let tokenizer = Tokenizer::bytes();
        let experiment::RandomModel { blocks, width, ffn, heads, kv_heads } = *shape;
        let config = ModelConfig {
            family: Family::Llama,
            vocabulary: tokenizer.vocabulary_size() as usize,
            width: width as usize,
            ffn: ffn as usize,
            blocks: blocks as usize,
            heads: heads as usize,
            kv_heads: kv_heads as usize,
            head_size: width as usize / (heads as usize).max(1),
            rms_epsilon: 1e-5,
            rope_base: 10_000.0,
            rope_scaling: None,
            tied_embeddings: true,
            qkv_bias: false,
            context: 2048,
        };
        Self::of_shape(config, tokenizer, seed)
    }

    /// Random weights of any shape; the vocabulary must be the tokenizer's.
    pub fn of_shape(config: ModelConfig, tokenizer: Tokenizer, seed: Seed) -> Result<Self, ModelError> {
        let config = config.checked().map_err(|what| ModelError::Mismatch(format!("the random model {what}")))?;
        let tensors = tensors_of(&config)
            .into_iter()
            .map(|(name, shape)| TensorInfo { name, shape, dtype: BlockType::F32 })
            .collect();
        Ok(Self { config, tokenizer, tensors, seed })
    }
}

impl Source for RandomModel {
    fn origin(&self) -> &Path {
        Path::new("random model")
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Norms are 1; all else is normal, with deviation 1/√in for linear layers, so that activations keep their size,
    /// and 0.05 for embeddings. Every tensor has a generator of its own.
    fn read(&self, info: &TensorInfo) -> Result<Vec<u8>, ModelError> {
        let length = info.shape.iter().product();
        let values: Vec<f32> = match info.shape[..] {
            [_] if info.name.ends_with("norm.weight") => vec![1.0; length],
            _ => {
                let embedding = info.name.ends_with("embed_tokens.weight") || info.name.starts_with("lm_head");
                let columns = *info.shape.last().expect("a tensor has dimensions") as f64;
                let deviation = if embedding { 0.05 } else { 1.0 / columns.sqrt() };
                let normal = Normal::new(0.0, deviation).expect("a finite deviation");
                let mut generator = self.seed.generator(&format!("model/{}", info.name));
                (0..length).map(|_| normal.sample(&mut generator) as f32).collect()
            }
        };
        Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A model small enough for property tests: width 16, 4 heads on 2, bytes as tokens.
    pub(crate) fn tiny_config(blocks: usize) -> ModelConfig {
        tiny_model(blocks).config
    }

    pub(crate) fn tiny_model(blocks: usize) -> RandomModel {
        let shape = experiment::RandomModel { blocks: blocks as u32, width: 16, ffn: 24, heads: 4, kv_heads: 2 };
        RandomModel::new(&shape, Seed(7)).unwrap()
    }

    #[test]
    fn the_same_seed_makes_the_same_model() {
        let (a, b) = (tiny_model(2), tiny_model(2));
        for info in a.tensors() {
            assert_eq!(a.read(info).unwrap(), b.read(info).unwrap(), "{}", info.name);
        }
    }
}

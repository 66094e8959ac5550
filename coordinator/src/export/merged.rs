//! A base model with an adapter merged into it, one tensor at a time.

use std::path::Path;

use model::source::TensorInfo;
use model::{Adapter, ModelConfig, ModelError, Source, Tokenizer};
use quant::BlockType;

/// Reads as the base does, in f32, but for `alpha/rank · B A` added to every adapted layer. Nothing is kept between two
/// reads.
pub(super) struct Merged<'a> {
    base: &'a dyn Source,
    /// For all blocks of `base`.
    adapter: &'a Adapter,
    tensors: Vec<TensorInfo>,
}

impl<'a> Merged<'a> {
    pub fn new(base: &'a dyn Source, adapter: &'a Adapter) -> Self {
        let tensors = model::source::tensors_of(base.config()).into_iter();
        let tensors = tensors.map(|(name, shape)| TensorInfo { name, shape, dtype: BlockType::F32 }).collect();
        Self { base, adapter, tensors }
    }

    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let mut values = self.base.tensor(name, shape)?;
        let Some(layer) = name.strip_suffix(".weight") else { return Ok(values) };
        let factor = format!("base_model.model.{layer}.lora_A.weight");
        if let Some(pair) = self.adapter.pairs().find(|[a, _]| a.name == factor) {
            for (value, delta) in values.iter_mut().zip(self.adapter.delta(pair)) {
                *value += delta;
            }
        }
        Ok(values)
    }
}

impl Source for Merged<'_> {
    fn origin(&self) -> &Path {
        self.base.origin()
    }

    fn config(&self) -> &ModelConfig {
        self.base.config()
    }

    fn tokenizer(&self) -> &Tokenizer {
        self.base.tokenizer()
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read(&self, info: &TensorInfo) -> Result<Vec<u8>, ModelError> {
        let values = self.tensor(&info.name, &info.shape)?;
        Ok(values.into_iter().flat_map(f32::to_le_bytes).collect())
    }
}

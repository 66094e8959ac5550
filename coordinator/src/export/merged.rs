//! A base model with an adapter merged into it, one tensor at a time.

use model::{Adapter, ModelConfig, ModelError, Source, Tokenizer};

/// Reads as the base does, but for `alpha/rank · B A` added to every adapted layer. Nothing is kept between two reads.
pub(super) struct Merged<'a> {
    pub base: &'a dyn Source,
    /// For all blocks of `base`.
    pub adapter: &'a Adapter,
}

impl<'a> Merged<'a> {
    pub fn config(&self) -> &'a ModelConfig {
        self.base.config()
    }

    pub fn tokenizer(&self) -> &'a Tokenizer {
        self.base.tokenizer()
    }

    /// Hugging Face names and shapes, in model order.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        model::source::tensors_of(self.config())
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

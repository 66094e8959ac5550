//! Second moments of what the layers of a block are multiplied with, summed over tokens.
//!
//! Start from [`Walk::moments`]. What a quantizer makes of them is its own business.

use kernels::add_second_moments;

use crate::stage::Inputs;
use crate::{ModelConfig, ModelError, Walk};

/// Which of a block's four inputs a layer is multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerInput {
    /// The normed residual stream, of q, k and v.
    Attention,
    /// What attention mixed, of o.
    Mixed,
    /// The normed residual stream, of gate and up.
    Ffn,
    /// silu(gate) ∘ up, of down.
    Gated,
}

impl LayerInput {
    pub const ALL: [Self; 4] = [Self::Attention, Self::Mixed, Self::Ffn, Self::Gated];

    /// The block and the input of a weight matrix by its Hugging Face name; nothing for any other tensor.
    pub fn of_tensor(name: &str) -> Option<(usize, Self)> {
        let (block, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let input = match rest {
            "self_attn.q_proj.weight" | "self_attn.k_proj.weight" | "self_attn.v_proj.weight" => Self::Attention,
            "self_attn.o_proj.weight" => Self::Mixed,
            "mlp.gate_proj.weight" | "mlp.up_proj.weight" => Self::Ffn,
            "mlp.down_proj.weight" => Self::Gated,
            _ => return None,
        };
        Some((block.parse().ok()?, input))
    }

    /// Hugging Face names of the layers of a block that have this input.
    pub fn layers(self) -> &'static [&'static str] {
        match self {
            Self::Attention => &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            Self::Mixed => &["self_attn.o_proj"],
            Self::Ffn => &["mlp.gate_proj", "mlp.up_proj"],
            Self::Gated => &["mlp.down_proj"],
        }
    }

    pub fn columns(self, config: &ModelConfig) -> usize {
        match self {
            Self::Attention | Self::Ffn => config.width,
            Self::Mixed => config.query_width(),
            Self::Gated => config.ffn,
        }
    }

    pub fn of(self, inputs: &Inputs) -> &[f32] {
        match self {
            Self::Attention => &inputs.attention,
            Self::Mixed => &inputs.mixed,
            Self::Ffn => &inputs.ffn,
            Self::Gated => &inputs.gated,
        }
    }
}

/// Of one block.
pub struct Moments {
    pub tokens: usize,
    /// `XᵀX`, `[columns, columns]`, by [`LayerInput`].
    sums: [Vec<f32>; 4],
}

impl Moments {
    /// `XᵀX` of an input.
    pub fn of(&self, input: LayerInput) -> &[f32] {
        &self.sums[input as usize]
    }
}

impl Walk<'_> {
    /// Takes the text through the next block, and measures there.
    pub fn moments(&mut self) -> Result<Moments, ModelError> {
        let engine = self.device().kernels().expect("a walk uses our own kernels").clone();
        let columns = LayerInput::ALL.map(|input| input.columns(self.config()));
        let mut moments = Moments { tokens: 0, sums: columns.map(|columns| vec![0.0; columns * columns]) };
        self.step(|inputs| {
            for (input, columns) in LayerInput::ALL.into_iter().zip(columns) {
                let x = input.of(&inputs);
                add_second_moments(&engine, x, columns, &mut moments.sums[input as usize]);
                if input == LayerInput::Attention {
                    moments.tokens += x.len() / columns;
                }
            }
        })?;
        Ok(moments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::random::tests::tiny_model;
    use crate::source::{Source, tensors_of};

    #[test]
    fn every_layer_has_its_input_and_nothing_else_has_one() {
        let source = tiny_model(2);
        let mut matrices = 0;
        for (name, shape) in tensors_of(source.config()) {
            let layer = name.starts_with("model.layers.") && shape.len() == 2;
            let Some((block, input)) = LayerInput::of_tensor(&name) else {
                assert!(!layer, "{name}");
                continue;
            };
            assert_eq!(input.columns(source.config()), shape[1], "{name}");
            assert!(
                input.layers().iter().any(|layer| name == format!("model.layers.{block}.{layer}.weight")),
                "{name}"
            );
            matrices += 1;
        }
        assert_eq!(matrices, 14);
    }

    #[test]
    fn moments_are_sums_over_all_tokens() {
        let source = tiny_model(2);
        let sequences = [vec![1, 2, 3], vec![4, 5]];
        let mut walk = Walk::begin(&source, &sequences).unwrap();
        let mut inputs = Vec::new();
        walk.step(|seen| inputs.push(seen)).unwrap();
        let moments = Walk::begin(&source, &sequences).unwrap().moments().unwrap();
        assert_eq!(moments.tokens, 5);
        for input in LayerInput::ALL {
            let columns = input.columns(source.config());
            let x = input.of(&inputs[0]);
            for (a, b) in [(0, 0), (1, columns - 1), (columns - 1, 3)] {
                let sum: f32 = x.chunks(columns).map(|x| x[a] * x[b]).sum();
                let found = moments.of(input)[a * columns + b];
                assert!((found - sum).abs() < 1e-4 * (1.0 + sum.abs()), "{input:?}: {found}, {sum}");
            }
        }
    }
}

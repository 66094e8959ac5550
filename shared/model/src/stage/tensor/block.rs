//! One decoder block: attention and SwiGLU, each behind an RMSNorm and added to the residual stream.

use burn::tensor::{Device, Tensor, TensorData, activation};

use super::attention::{self, CacheSlot, Layout};
use super::lora::BlockLora;
use super::{Dropout, to_values};
use crate::adapter::{TARGETS, module_path};
use crate::{Family, ModelConfig, ModelError, Source};

pub(super) struct Block {
    attention_norm: RmsNorm,
    ffn_norm: RmsNorm,
    /// In the order of [`TARGETS`].
    linears: [Linear; TARGETS.len()],
    query_norm: Option<RmsNorm>,
    key_norm: Option<RmsNorm>,
    config: ModelConfig,
    device: Device,
}

struct Linear {
    /// `[in, out]`: Hugging Face stores the transpose.
    weight: Tensor<2>,
    /// `[1, out]`
    bias: Option<Tensor<2>>,
}

pub(super) struct RmsNorm {
    /// `[channels]`
    weight: Tensor<1>,
    epsilon: f64,
}

impl Block {
    pub(super) fn load(source: &dyn Source, index: usize, device: &Device) -> Result<Self, ModelError> {
        let config = source.config().clone();
        let prefix = format!("model.layers.{index}");
        let linear = |target: &str| -> Result<Linear, ModelError> {
            let [rows, columns] = config.linear_shape(target).expect("TARGETS are linear layers");
            let name = format!("model.{}", module_path(index, target));
            let weight = source.tensor(&format!("{name}.weight"), &[rows, columns])?;
            let weight = Tensor::<2>::from_data(TensorData::new(weight, [rows, columns]), device);
            // Transposed in memory once, instead of in every product.
            let weight = TensorData::new(to_values(weight.transpose()), [columns, rows]);
            let bias = match config.qkv_bias && matches!(target, "q_proj" | "k_proj" | "v_proj") {
                true => Some(source.tensor(&format!("{name}.bias"), &[rows])?),
                false => None,
            };
            let bias = bias.map(|bias| Tensor::from_data(TensorData::new(bias, [1, rows]), device));
            Ok(Linear { weight: Tensor::from_data(weight, device), bias })
        };
        let linears: Vec<Linear> = TARGETS.into_iter().map(linear).collect::<Result<_, _>>()?;
        let norm = |name: &str, size| RmsNorm::load(source, &format!("{prefix}.{name}.weight"), size, device);
        let head_norm = |name| (config.family == Family::Qwen3).then(|| norm(name, config.head_size)).transpose();
        Ok(Self {
            attention_norm: norm("input_layernorm", config.width)?,
            ffn_norm: norm("post_attention_layernorm", config.width)?,
            linears: linears.try_into().ok().expect("one layer for every target"),
            query_norm: head_norm("self_attn.q_norm")?,
            key_norm: head_norm("self_attn.k_norm")?,
            config,
            device: device.clone(),
        })
    }

    /// `[tokens, width] → [tokens, width]`
    pub(super) fn forward(
        &self,
        x: Tensor<2>,
        layout: &Layout,
        lora: &BlockLora,
        dropout: Option<&Dropout>,
        cache: Option<&mut CacheSlot>,
    ) -> Tensor<2> {
        let [tokens, _] = x.dims();
        let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = [0, 1, 2, 3, 4, 5, 6].map(|i: usize| {
            move |x: Tensor<2>| {
                let y = self.linears[i].forward(x.clone());
                match &lora[i] {
                    Some(pair) => y + pair.forward(x, dropout, &self.device),
                    None => y,
                }
            }
        });
        let heads = |x: Tensor<2>, heads: usize, norm: &Option<RmsNorm>| -> Tensor<3> {
            let x = x.reshape([tokens, heads, self.config.head_size]);
            match norm {
                Some(norm) => norm.forward(x),
                None => x,
            }
        };
        let h = self.attention_norm.forward(x.clone());
        let q = layout.rotate(heads(q_proj(h.clone()), self.config.heads, &self.query_norm));
        let k = layout.rotate(heads(k_proj(h.clone()), self.config.kv_heads, &self.key_norm));
        let v = heads(v_proj(h), self.config.kv_heads, &None);
        let x = x + o_proj(attention::attend(q, k, v, layout, cache));
        let h = self.ffn_norm.forward(x.clone());
        let gated = activation::silu(gate_proj(h.clone())) * up_proj(h);
        x + down_proj(gated)
    }
}

impl Linear {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let y = x.matmul(self.weight.clone());
        match &self.bias {
            Some(bias) => y + bias.clone(),
            None => y,
        }
    }
}

impl RmsNorm {
    pub(super) fn load(source: &dyn Source, name: &str, channels: usize, device: &Device) -> Result<Self, ModelError> {
        let weight = source.tensor(name, &[channels])?;
        let weight = Tensor::from_data(TensorData::new(weight, [channels]), device);
        Ok(Self { weight, epsilon: source.config().rms_epsilon })
    }

    /// `x / sqrt(mean(x²) + ε) · w` over the last dimension (Zhang and Sennrich, arXiv 1910.07467).
    pub(super) fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let rms = (x.clone().square().mean_dim(D - 1) + self.epsilon).sqrt();
        x / rms * self.weight.clone().unsqueeze()
    }
}

//! The shape of a decoder, read from `config.json` or from GGUF metadata and written back to both.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// A decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    pub family: Family,
    pub vocabulary: usize,
    /// Channels of the residual stream.
    pub width: usize,
    /// Channels inside the SwiGLU.
    pub ffn: usize,
    pub blocks: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub rms_epsilon: f64,
    pub rope_base: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<Llama3Scaling>,
    /// The LM head is the embedding, transposed.
    pub tied_embeddings: bool,
    /// q, k and v add a bias.
    pub qkv_bias: bool,
    /// Positions the model was trained for.
    pub context: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    Llama,
    Qwen2,
    /// As Qwen2 without biases, with an RMSNorm over every q and k head.
    Qwen3,
}

/// Frequency scaling of Llama 3 (`rope_type = "llama3"` in transformers).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Llama3Scaling {
    pub factor: f64,
    pub low_frequency_factor: f64,
    pub high_frequency_factor: f64,
    pub original_context: usize,
}

impl Family {
    pub const ALL: [Self; 3] = [Self::Llama, Self::Qwen2, Self::Qwen3];

    /// The name both `model_type` in `config.json` and `general.architecture` in GGUF use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.name() == name)
    }
}

/// Largest of every dimension: a foreign file cannot ask for more memory than these allow.
const DIMENSION_MAX: usize = 1 << 20;

impl ModelConfig {
    /// Reads `config.json`; the error is the part of a sentence that follows the file's name.
    pub fn from_huggingface(config: &Value) -> Result<Self, String> {
        let model_type = config["model_type"].as_str().ok_or("has no `model_type`")?;
        let family = Family::from_name(model_type)
            .ok_or_else(|| format!("model_type `{model_type}` is not supported; use llama, qwen2 or qwen3"))?;
        let size = |key: &str| -> Result<usize, String> {
            config[key].as_u64().map(|n| n as usize).ok_or_else(|| format!("has no whole number `{key}`"))
        };
        let (width, heads) = (size("hidden_size")?, size("num_attention_heads")?);
        let rope =
            if config["rope_parameters"].is_object() { &config["rope_parameters"] } else { &config["rope_scaling"] };
        let rope_base = config["rope_theta"].as_f64().or(rope["rope_theta"].as_f64()).unwrap_or(10_000.0);
        for (key, wanted) in
            [("hidden_act", json!("silu")), ("mlp_bias", json!(false)), ("use_sliding_window", json!(false))]
        {
            let found = &config[key];
            if !found.is_null() && *found != wanted {
                return Err(format!("{key} = {found} is not supported (only {wanted})"));
            }
        }
        Self {
            family,
            vocabulary: size("vocab_size")?,
            width,
            ffn: size("intermediate_size")?,
            blocks: size("num_hidden_layers")?,
            heads,
            kv_heads: config["num_key_value_heads"].as_u64().map_or(heads, |n| n as usize),
            head_size: config["head_dim"].as_u64().map_or(width / heads.max(1), |n| n as usize),
            rms_epsilon: config["rms_norm_eps"].as_f64().ok_or("has no number `rms_norm_eps`")?,
            rope_base,
            rope_scaling: llama3_scaling(rope)?,
            tied_embeddings: config["tie_word_embeddings"].as_bool().unwrap_or(false),
            qkv_bias: config["attention_bias"].as_bool().unwrap_or(family == Family::Qwen2),
            context: size("max_position_embeddings")?,
        }
        .checked()
    }

    /// The same shape as `config.json`, for export.
    pub fn to_huggingface(&self) -> Value {
        let mut config = json!({
            "architectures": [self.family.class()],
            "model_type": self.family.name(),
            "hidden_act": "silu",
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "rms_norm_eps": self.rms_epsilon,
            "rope_theta": self.rope_base,
            "rope_scaling": null,
            "tie_word_embeddings": self.tied_embeddings,
            "attention_bias": self.qkv_bias,
            "mlp_bias": false,
            "max_position_embeddings": self.context,
            "vocab_size": self.vocabulary,
            "use_cache": true,
        });
        if let Some(scaling) = self.rope_scaling {
            config["rope_scaling"] = json!({
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_context,
            });
        }
        config
    }

    /// q and k rows, and all channels that attention reads.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_size
    }

    pub fn key_width(&self) -> usize {
        self.kv_heads * self.head_size
    }

    /// Angular frequency of each of the `head_size / 2` rotary pairs.
    ///
    /// Without scaling `base^(-2i/d)`; with it, wavelengths beyond the original context are stretched by `factor`,
    /// those well inside it stay, and those between are blended (Llama 3.1 model card; transformers `_compute_llama3_parameters`).
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let pairs = self.head_size / 2;
        (0..pairs)
            .map(|i| {
                let frequency = self.rope_base.powf(-((2 * i) as f64) / self.head_size as f64);
                self.rope_scaling.map_or(frequency, |scaling| scaling.scale(frequency))
            })
            .collect()
    }

    /// `[out, in]` of a linear layer by its Hugging Face name, or nothing for a name no block has.
    pub fn linear_shape(&self, target: &str) -> Option<[usize; 2]> {
        Some(match target {
            "q_proj" => [self.query_width(), self.width],
            "k_proj" | "v_proj" => [self.key_width(), self.width],
            "o_proj" => [self.width, self.query_width()],
            "gate_proj" | "up_proj" => [self.ffn, self.width],
            "down_proj" => [self.width, self.ffn],
            _ => return None,
        })
    }

    /// Refuses shapes that would divide by zero, overflow or not fit together.
    pub fn checked(self) -> Result<Self, String> {
        let sizes = [
            ("vocabulary", self.vocabulary),
            ("width", self.width),
            ("ffn", self.ffn),
            ("blocks", self.blocks),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_size", self.head_size),
            ("context", self.context),
        ];
        for (name, size) in sizes {
            let max = if name == "context" { DIMENSION_MAX * 16 } else { DIMENSION_MAX };
            if size == 0 || size > max {
                return Err(format!("has {name} = {size}; expected 1 to {max}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!("has {} heads, no multiple of its {} key-value heads", self.heads, self.kv_heads));
        }
        if !self.head_size.is_multiple_of(2) || self.query_width() > DIMENSION_MAX {
            return Err(format!("has {} heads of size {}; the size must be even", self.heads, self.head_size));
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if !positive(self.rms_epsilon) || !positive(self.rope_base) {
            return Err(format!("has rms_epsilon {} and rope_base {}", self.rms_epsilon, self.rope_base));
        }
        if let Some(scaling) = &self.rope_scaling {
            let Llama3Scaling { factor, low_frequency_factor: low, high_frequency_factor: high, .. } = *scaling;
            if !(positive(factor) && positive(low) && positive(high) && low < high) {
                return Err(format!("has RoPE scaling factor {factor}, low {low}, high {high}"));
            }
        }
        Ok(self)
    }
}

impl Llama3Scaling {
    fn scale(&self, frequency: f64) -> f64 {
        let wavelength = 2.0 * std::f64::consts::PI / frequency;
        let context = self.original_context as f64;
        if wavelength < context / self.high_frequency_factor {
            frequency
        } else if wavelength > context / self.low_frequency_factor {
            frequency / self.factor
        } else {
            let span = self.high_frequency_factor - self.low_frequency_factor;
            let smooth = (context / wavelength - self.low_frequency_factor) / span;
            (1.0 - smooth) * frequency / self.factor + smooth * frequency
        }
    }
}

/// `rope_scaling` (or `rope_parameters` in newer files): absent, `default`, or `llama3`.
fn llama3_scaling(rope: &Value) -> Result<Option<Llama3Scaling>, String> {
    let kind = rope["rope_type"].as_str().or(rope["type"].as_str()).unwrap_or("default");
    let number = |key: &str| rope[key].as_f64().ok_or_else(|| format!("has llama3 RoPE scaling without `{key}`"));
    match kind {
        "default" => Ok(None),
        "llama3" => Ok(Some(Llama3Scaling {
            factor: number("factor")?,
            low_frequency_factor: number("low_freq_factor")?,
            high_frequency_factor: number("high_freq_factor")?,
            original_context: number("original_max_position_embeddings")? as usize,
        })),
        other => Err(format!("has RoPE scaling `{other}`; only `llama3` is supported")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama_3_2_1b() -> Value {
        json!({
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": true,
            "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        })
    }

    #[test]
    fn a_config_survives_the_way_to_json_and_back() {
        let config = ModelConfig::from_huggingface(&llama_3_2_1b()).unwrap();
        assert_eq!(ModelConfig::from_huggingface(&config.to_huggingface()).unwrap(), config);
    }

    #[test]
    fn llama3_scaling_keeps_short_waves_and_stretches_long_ones() {
        let config = ModelConfig::from_huggingface(&llama_3_2_1b()).unwrap();
        let plain = ModelConfig { rope_scaling: None, ..config.clone() };
        let (scaled, plain) = (config.rope_frequencies(), plain.rope_frequencies());
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[31], plain[31] / 32.0);
        assert!(scaled.iter().zip(&plain).all(|(s, p)| *s <= *p && *s >= p / 32.0));
    }

    #[test]
    fn impossible_shapes_are_refused_by_name() {
        let check_refused = |key: &str, value: Value, expected: &str| {
            let mut config = llama_3_2_1b();
            config[key] = value;
            let error = ModelConfig::from_huggingface(&config).unwrap_err();
            assert!(error.contains(expected), "{key}: {error}");
        };
        check_refused("num_key_value_heads", json!(7), "no multiple");
        check_refused("num_hidden_layers", json!(0), "blocks = 0");
        check_refused("vocab_size", json!(u64::MAX), "vocabulary");
        check_refused("hidden_act", json!("gelu"), "hidden_act");
        check_refused("model_type", json!("gpt2"), "model_type `gpt2`");
        check_refused("rms_norm_eps", json!(0.0), "rms_epsilon");
        check_refused("rope_scaling", json!({"rope_type": "yarn"}), "yarn");
    }
}

//! A GGUF file, presented under Hugging Face names and in Hugging Face's row order; and the way back, for export.

use std::collections::HashSet;
use std::path::Path;

use quant::gguf::{Header, Reader, TensorType, Vocabulary};

use super::{Source, Take, TensorInfo, tensors_among};
use crate::tokenizer::GgufTokenizer;
use crate::{Family, Llama3Scaling, ModelConfig, ModelError, Tokenizer};

pub(super) struct GgufModel {
    reader: Reader,
    config: ModelConfig,
    tokenizer: Tokenizer,
    tensors: Vec<TensorInfo>,
}

impl GgufModel {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let refused = |what: String| ModelError::file(path, what);
        let reader = Reader::open(path)?;
        let config = read_config(&reader)?;
        let vocabulary = reader.vocabulary()?;
        let tokenizer = Tokenizer::from_gguf(tokenizer_metadata(vocabulary), path);
        let tokenizer = tokenizer.map_err(|error| refused(error.to_string()))?;
        let tensors = tensors_among(&config, reader.tensors().len()).map_err(refused)?;
        let tensors = tensors.into_iter().map(|(name, shape)| {
            let stored = gguf_tensor_name(&name);
            let info = reader.tensor(&stored)?;
            if info.shape != shape {
                return Err(refused(format!("{stored} has shape {:?}; expected {shape:?}", info.shape)));
            }
            match info.ty {
                TensorType::Block(dtype) => Ok(TensorInfo { name, shape, dtype }),
                TensorType::Foreign(_) => Err(refused(format!(
                    "{stored} is stored as {}, which is not supported; requantize the file",
                    info.ty.name()
                ))),
            }
        });
        let tensors: Vec<TensorInfo> = tensors.collect::<Result<_, _>>()?;
        let used: HashSet<String> = tensors.iter().map(|info| gguf_tensor_name(&info.name)).collect();
        reader.check_used(|name| used.contains(name))?;
        Ok(Self { reader, config, tokenizer, tensors })
    }
}

impl Source for GgufModel {
    fn origin(&self) -> &Path {
        self.reader.path()
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

    fn read(&self, info: &TensorInfo) -> Result<Vec<u8>, ModelError> {
        let refused = |error: quant::Error| ModelError::file(self.origin(), format!("failed to {error}"));
        let raw = self.reader.read_tensor(&gguf_tensor_name(&info.name))?;
        match rotary_heads(&self.config, &info.name) {
            // Rows are whole blocks, so that quantized rows change places like any others.
            Some(heads) => {
                let rows = info.shape[0];
                quant::unpermute_rows(&raw, rows, raw.len() / rows, heads).map_err(refused)
            }
            None => Ok(raw),
        }
    }

    fn read_pieces(&self, info: &TensorInfo, take: &mut Take<'_>) -> Result<(), ModelError> {
        if rotary_heads(&self.config, &info.name).is_some() {
            return take(&self.read(info)?);
        }
        let (name, mut piece) = (gguf_tensor_name(&info.name), Vec::new());
        for first in (0..info.rows()).step_by(info.piece_rows()) {
            let rows = info.piece_rows().min(info.rows() - first);
            self.reader.read_rows(&name, first, rows, &mut piece)?;
            take(&piece)?;
        }
        Ok(())
    }
}

fn tokenizer_metadata(vocabulary: Vocabulary) -> GgufTokenizer {
    GgufTokenizer {
        model: vocabulary.model,
        pre: vocabulary.pre,
        tokens: vocabulary.tokens.iter().map(str::to_owned).collect(),
        merges: vocabulary.merges.iter().map(str::to_owned).collect(),
        token_types: vocabulary.token_types.into_iter().map(|kind| kind as i32).collect(),
        scores: Some(vocabulary.scores),
        bos: vocabulary.bos,
        eos: vocabulary.eos,
        eot: vocabulary.eot,
        unknown: vocabulary.unknown,
        add_bos: vocabulary.add_bos,
        add_space_prefix: vocabulary.add_space_prefix,
        chat_template: vocabulary.chat_template,
    }
}

/// Heads whose rows the `llama` architecture stores in interleaved order, for the tensors that have them.
pub fn rotary_heads(config: &ModelConfig, name: &str) -> Option<usize> {
    if config.family != Family::Llama {
        return None;
    }
    if name.contains(".q_proj.") {
        Some(config.heads)
    } else if name.contains(".k_proj.") {
        Some(config.kv_heads)
    } else {
        None
    }
}

/// `model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`
pub fn gguf_tensor_name(name: &str) -> String {
    let Some((block, rest)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
        return match name {
            "model.embed_tokens.weight" => "token_embd.weight".into(),
            "model.norm.weight" => "output_norm.weight".into(),
            "lm_head.weight" => "output.weight".into(),
            other => other.into(),
        };
    };
    let (module, kind) = rest.rsplit_once('.').unwrap_or((rest, "weight"));
    let module = match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => other,
    };
    format!("blk.{block}.{module}.{kind}")
}

fn read_config(reader: &Reader) -> Result<ModelConfig, ModelError> {
    let refused = |what: String| ModelError::file(reader.path(), what);
    let architecture: &str = reader.required("general.architecture")?;
    let family = Family::from_name(architecture)
        .ok_or_else(|| refused(format!("architecture `{architecture}` is not supported; use llama, qwen2 or qwen3")))?;
    let key = |name: &str| format!("{architecture}.{name}");
    let size = |name: &str| reader.required::<u32>(&key(name)).map(|n| n as usize);
    let optional = |name: &str| reader.optional::<u32>(&key(name)).map(|n| n.map(|n| n as usize));
    let number = |name: &str| reader.optional::<f32>(&key(name)).map(|n| n.map(shortest));

    let (width, heads) = (size("embedding_length")?, size("attention.head_count")?);
    let head_size = optional("attention.key_length")?.unwrap_or(width / heads.max(1));
    if let Some(rotary) = optional("rope.dimension_count")?.filter(|&rotary| rotary != head_size) {
        return Err(refused(format!("rotates {rotary} of {head_size} channels of a head, which is not supported")));
    }
    if let Some(scaling) = reader.optional::<&str>(&key("rope.scaling.type"))?.filter(|s| *s != "none") {
        return Err(refused(format!("has RoPE scaling `{scaling}`; only llama 3's is supported")));
    }
    let embedding = reader.tensor("token_embd.weight")?;
    let mut config = ModelConfig {
        family,
        vocabulary: embedding.shape.first().copied().unwrap_or(0),
        width,
        ffn: size("feed_forward_length")?,
        blocks: size("block_count")?,
        heads,
        kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
        head_size,
        rms_epsilon: shortest(reader.required(&key("attention.layer_norm_rms_epsilon"))?),
        rope_base: number("rope.freq_base")?.unwrap_or(10_000.0),
        rope_scaling: None,
        tied_embeddings: reader.tensor("output.weight").is_err(),
        qkv_bias: reader.tensor("blk.0.attn_q.bias").is_ok(),
        context: size("context_length")?,
    };
    if reader.tensor("rope_freqs.weight").is_ok() {
        let divisors = reader.read_values("rope_freqs.weight")?;
        config.rope_scaling = Some(llama3_scaling(&config, &divisors).map_err(refused)?);
    }
    config.checked().map_err(refused)
}

/// The f64 that prints like the f32: 1e-5 stays 1e-5.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// GGUF keeps divisors, not the rule that made them. All Llama 3 models share the rule but for its factor, which is
/// the largest divisor; anything else is refused rather than guessed.
fn llama3_scaling(config: &ModelConfig, divisors: &[f32]) -> Result<Llama3Scaling, String> {
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    let scaling =
        Llama3Scaling { factor, low_frequency_factor: 1.0, high_frequency_factor: 4.0, original_context: 8192 };
    let expected = rope_divisors(&ModelConfig { rope_scaling: Some(scaling), ..config.clone() });
    let same = divisors.len() == expected.len()
        && divisors.iter().zip(&expected).all(|(found, expected)| (found - expected).abs() <= 1e-4 * expected);
    if same { Ok(scaling) } else { Err("has rope_freqs that are not those of Llama 3, which is not supported".into()) }
}

/// What every rotary frequency is divided by: `rope_freqs.weight`.
pub fn rope_divisors(config: &ModelConfig) -> Vec<f32> {
    let plain = ModelConfig { rope_scaling: None, ..config.clone() }.rope_frequencies();
    plain.into_iter().zip(config.rope_frequencies()).map(|(plain, scaled)| (plain / scaled) as f32).collect()
}

/// The metadata that describes `config` to every GGUF runtime; the tokenizer's keys are added by the caller.
pub fn gguf_metadata(config: &ModelConfig, name: &str) -> Header {
    let architecture = config.family.name();
    let mut header = Header::new();
    header.set("general.architecture", architecture);
    header.set("general.name", name);
    header.set("general.quantization_version", 2u32);
    let sizes = [
        ("context_length", config.context),
        ("embedding_length", config.width),
        ("block_count", config.blocks),
        ("feed_forward_length", config.ffn),
        ("attention.head_count", config.heads),
        ("attention.head_count_kv", config.kv_heads),
        ("attention.key_length", config.head_size),
        ("attention.value_length", config.head_size),
        ("rope.dimension_count", config.head_size),
        ("vocab_size", config.vocabulary),
    ];
    for (key, size) in sizes {
        header.set(&format!("{architecture}.{key}"), size as u32);
    }
    header.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), config.rms_epsilon as f32);
    header.set(&format!("{architecture}.rope.freq_base"), config.rope_base as f32);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_every_gguf_runtime() {
        for (name, expected) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.12.self_attn.q_proj.bias", "blk.12.attn_q.bias"),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
            ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
            ("lm_head.weight", "output.weight"),
        ] {
            assert_eq!(gguf_tensor_name(name), expected);
        }
    }
}

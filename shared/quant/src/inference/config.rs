//! What a file's keys say about the decoder in it.

use crate::gguf::Reader;
use crate::{BlockType, Error};
use kernels::inference::Shape;

pub(super) struct Config {
    pub shape: Shape,
    pub blocks: usize,
    pub context: usize,
    /// Queries and keys are stored as neighbouring pairs, not as halves.
    pub interleaved: bool,
}

/// Tensors of a shape beyond this are refused before their sizes are multiplied.
const SIZE_MAX: usize = 1 << 24;
const BLOCKS_MAX: usize = 1 << 12;

pub(super) fn read(reader: &Reader) -> Result<Config, Error> {
    let architecture: &str = reader.required("general.architecture")?;
    if !["llama", "qwen2", "qwen3"].contains(&architecture) {
        let reason = format!("architecture `{architecture}` is not supported; use llama, qwen2 or qwen3");
        return Err(reader.malformed(reason));
    }
    let key = |name: &str| format!("{architecture}.{name}");
    let optional = |name: &str| -> Result<Option<usize>, Error> {
        let value = reader.optional::<u32>(&key(name))?.map(|value| value as usize);
        match value.filter(|value| !(1..=SIZE_MAX).contains(value)) {
            Some(value) => Err(reader.malformed(format!("`{}` is {value}, not 1 to {SIZE_MAX}", key(name)))),
            None => Ok(value),
        }
    };
    let required = |name: &str| -> Result<usize, Error> {
        let missing = || Error::MissingKey { path: reader.path().to_owned(), key: key(name) };
        optional(name)?.ok_or_else(missing)
    };
    let positive = |name: &str, value: f32| match value.is_finite() && value > 0.0 {
        true => Ok(value),
        false => Err(reader.malformed(format!("`{}` is {value}", key(name)))),
    };
    let (width, heads) = (required("embedding_length")?, required("attention.head_count")?);
    let kv_heads = optional("attention.head_count_kv")?.unwrap_or(heads);
    let head_size = optional("attention.key_length")?.unwrap_or(width / heads);
    let same = |name: &str| -> Result<(), Error> {
        match optional(name)?.filter(|&size| size != head_size) {
            Some(size) => Err(reader.malformed(format!("`{}` is {size}, but heads have {head_size}", key(name)))),
            None => Ok(()),
        }
    };
    same("rope.dimension_count")?;
    same("attention.value_length")?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(reader.malformed(format!("{heads} heads are no multiple of {kv_heads} heads of keys and values")));
    }
    if head_size == 0 || !head_size.is_multiple_of(2) {
        let reason =
            format!("{heads} heads of {width} channels have {head_size} each; expected an even number above 0");
        return Err(reader.malformed(reason));
    }
    if head_size > HEAD_MAX {
        let reason =
            format!("heads have {head_size} channels, more than the {HEAD_MAX} that are supported; use another model");
        return Err(reader.malformed(reason));
    }
    if let Some(scaling) = reader.optional::<&str>(&key("rope.scaling.type"))?.filter(|scaling| *scaling != "none") {
        return Err(reader.malformed(format!("has RoPE scaling `{scaling}`; only llama 3's is supported")));
    }
    let epsilon =
        positive("attention.layer_norm_rms_epsilon", reader.required(&key("attention.layer_norm_rms_epsilon"))?)?;
    let base = positive("rope.freq_base", reader.optional(&key("rope.freq_base"))?.unwrap_or(10_000.0))?;
    let mut frequencies: Vec<f64> =
        (0..head_size / 2).map(|i| f64::from(base).powf(-2.0 * i as f64 / head_size as f64)).collect();
    if reader.tensor("rope_freqs.weight").is_ok() {
        let divisors = reader.read_values("rope_freqs.weight")?;
        if divisors.len() != frequencies.len() || divisors.iter().any(|&divisor| divisor <= 0.0) {
            return Err(reader.malformed(format!("`rope_freqs.weight` has no {} divisors", frequencies.len())));
        }
        frequencies.iter_mut().zip(divisors).for_each(|(frequency, divisor)| *frequency /= f64::from(divisor));
    }
    let vocabulary = reader.tensor("token_embd.weight")?.shape.first().copied().unwrap_or(0);
    let shape = Shape {
        width,
        ffn: required("feed_forward_length")?,
        heads,
        kv_heads,
        head_size,
        vocabulary,
        epsilon,
        frequencies: frequencies.into_iter().map(|frequency| frequency as f32).collect(),
    };
    let blocks = required("block_count")?;
    if blocks > BLOCKS_MAX {
        return Err(reader.malformed(format!("`{}` is {blocks}, above {BLOCKS_MAX}", key("block_count"))));
    }
    Ok(Config { shape, blocks, context: required("context_length")?, interleaved: architecture == "llama" })
}

const HEAD_MAX: usize = kernels::HEAD_MAX;

/// How the kernels keep a block type: every value stays what it is.
pub(super) fn layout(ty: BlockType) -> kernels::quantized::Layout {
    use kernels::quantized::Layout;
    match ty {
        BlockType::F32 => Layout::F32,
        BlockType::F16 => Layout::F16,
        BlockType::BF16 => Layout::Bf16,
        BlockType::Q4_0 => Layout::Four,
        BlockType::Q4_1 => Layout::FourMin,
        BlockType::Q5_0 => Layout::Five,
        BlockType::Q5_1 => Layout::FiveMin,
        BlockType::Q8_0 => Layout::Eight,
        BlockType::IQ4_NL => Layout::Table,
        BlockType::Q2_K => Layout::SuperTwoMin,
        BlockType::Q3_K => Layout::SuperThree,
        BlockType::Q4_K => Layout::SuperFourMin,
        BlockType::Q5_K => Layout::SuperFiveMin,
        BlockType::Q6_K => Layout::SuperSix,
        BlockType::TQ1_0 | BlockType::TQ2_0 => Layout::Ternary,
    }
}

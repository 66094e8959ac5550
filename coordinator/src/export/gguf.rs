//! The merged model as a GGUF file.

use std::path::Path;

use model::Tokenizer;
use model::source::{gguf_metadata, gguf_tensor_name, rope_divisors, rotary_heads};
use quant::gguf::{Header, Writer};
use quant::{BlockType, dequantize, permute_rows, quantize};

use super::ExportError;
use super::merged::Merged;

/// Writes the file, with `ty` wherever the format allows it, and returns the largest distance between a merged weight
/// and what the file says of it. `name` is shown by programs that list models.
pub(super) fn write(merged: &Merged<'_>, name: &str, ty: BlockType, path: &Path) -> Result<f32, ExportError> {
    let config = merged.config();
    let mut header = gguf_metadata(config, name);
    header.set("general.file_type", file_type(ty)?);
    set_tokenizer(&mut header, merged.tokenizer(), config.vocabulary)?;
    let tensors = merged.tensors();
    for (name, shape) in &tensors {
        header.add_tensor(&gguf_tensor_name(name), shape, stored_type(ty, shape))?;
    }
    let divisors = config.rope_scaling.map(|_| rope_divisors(config));
    if let Some(divisors) = &divisors {
        header.add_tensor(ROPE_DIVISORS, &[divisors.len()], BlockType::F32)?;
    }

    let mut writer = Writer::create(path, header)?;
    let mut worst_error = 0f32;
    for (name, shape) in &tensors {
        let values = merged.tensor(name, shape)?;
        let (bytes, error) = pack(stored_type(ty, shape), &values).map_err(ExportError::tensor(name))?;
        worst_error = worst_error.max(error);
        let bytes = match rotary_heads(config, name) {
            // Rows are whole blocks, so that quantized rows change places like any others; a bias has rows of one value.
            Some(heads) => permute_rows(&bytes, shape[0], bytes.len() / shape[0], heads),
            None => Ok(bytes),
        };
        let bytes = bytes.map_err(ExportError::tensor(name))?;
        writer.write_tensor(&gguf_tensor_name(name), &bytes)?;
    }
    if let Some(divisors) = &divisors {
        writer.write_tensor(ROPE_DIVISORS, &quantize(BlockType::F32, divisors)?)?;
    }
    writer.finish()?;
    Ok(worst_error)
}

const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// llama.cpp wants norms and biases in F32, and no block may reach over the end of a row.
pub(super) fn stored_type(wanted: BlockType, shape: &[usize]) -> BlockType {
    match *shape {
        [] | [_] => BlockType::F32,
        [.., columns] if columns.is_multiple_of(wanted.block_elements()) => wanted,
        _ => BlockType::F16,
    }
}

/// The stored bytes, and the largest distance between a value and what they say of it.
fn pack(ty: BlockType, values: &[f32]) -> Result<(Vec<u8>, f32), quant::Error> {
    let bytes = quantize(ty, values)?;
    let mut unpacked = vec![0.0; values.len()];
    dequantize(ty, &bytes, &mut unpacked)?;
    let errors = unpacked.iter().zip(values).map(|(unpacked, value)| (unpacked - value).abs());
    Ok((bytes, errors.fold(0.0, f32::max)))
}

/// ggml's number for a file whose large tensors are mostly of this type.
fn file_type(ty: BlockType) -> Result<u32, quant::Error> {
    Ok(match ty {
        BlockType::F32 => 0,
        BlockType::F16 => 1,
        BlockType::Q4_0 => 2,
        BlockType::Q4_1 => 3,
        BlockType::Q8_0 => 7,
        BlockType::Q5_0 => 8,
        BlockType::Q5_1 => 9,
        BlockType::BF16 => 32,
        _ => return Err(quant::Error::Refused { reason: format!("{ty} is not a type for whole files") }),
    })
}

/// `rows` is how many tokens the embedding knows; a file with another number of them is opened by no runtime.
fn set_tokenizer(header: &mut Header, tokenizer: &Tokenizer, rows: usize) -> Result<(), ExportError> {
    let mut gguf = tokenizer.gguf()?;
    if gguf.tokens.len() > rows {
        return Err(ExportError::Vocabulary { tokens: gguf.tokens.len(), rows });
    }
    gguf.pad_to(rows as u32); // A checked `ModelConfig` has at most 2^20 rows.

    // llama.cpp wants the list for every byte-level vocabulary, even one without entries; SentencePiece has scores.
    if gguf.model == "gpt2" {
        header.set("tokenizer.ggml.merges", gguf.merges);
    }
    header.set("tokenizer.ggml.model", gguf.model);
    header.set("tokenizer.ggml.tokens", gguf.tokens);
    header.set("tokenizer.ggml.token_type", gguf.token_types);
    if let Some(scores) = gguf.scores {
        header.set("tokenizer.ggml.scores", scores);
    }
    let ids = [("bos", gguf.bos), ("eos", gguf.eos), ("eot", gguf.eot), ("unknown", gguf.unknown)];
    for (name, id) in ids.into_iter().filter_map(|(name, id)| Some((name, id?))) {
        header.set(&format!("tokenizer.ggml.{name}_token_id"), id);
    }
    for (key, flag) in [("add_bos_token", gguf.add_bos), ("add_space_prefix", gguf.add_space_prefix)] {
        if let Some(flag) = flag {
            header.set(&format!("tokenizer.ggml.{key}"), flag);
        }
    }
    for (key, text) in [("tokenizer.ggml.pre", gguf.pre), ("tokenizer.chat_template", gguf.chat_template)] {
        if let Some(text) = text {
            header.set(key, text);
        }
    }
    Ok(())
}

//! The merged model as a GGUF file.

use std::num::NonZero;
use std::panic::resume_unwind;
use std::path::Path;

use model::source::{gguf_metadata, gguf_tensor_name, rope_divisors, rotary_heads};
use model::{ModelConfig, Tokenizer};
use quant::gguf::{Header, Writer};
use quant::{BlockType, Layout, Method, Mix, dequantize, permute_rows, quantize_row};

use super::ExportError;
use super::importance::Importance;
use super::merged::Merged;

/// Writes the file and returns the largest distance between a merged weight and what the file says of it. `name` is shown
/// by programs that list models.
pub(super) fn write(
    merged: &Merged<'_>,
    name: &str,
    mix: Mix,
    method: Method,
    path: &Path,
) -> Result<f32, ExportError> {
    let config = merged.config();
    let mut header = gguf_metadata(config, name);
    header.set("general.file_type", mix.file_type());
    set_tokenizer(&mut header, merged.tokenizer(), config.vocabulary)?;
    let tensors = merged.tensors();
    for (name, shape) in &tensors {
        header.add_tensor(&gguf_tensor_name(name), shape, stored_type(mix, config, name, shape))?;
    }
    let divisors = config.rope_scaling.map(|_| rope_divisors(config));
    if let Some(divisors) = &divisors {
        header.add_tensor(ROPE_DIVISORS, &[divisors.len()], BlockType::F32)?;
    }

    // Reference bytes are those of llama-quantize, which knows no importance either unless it is told.
    let searched = method == Method::Search && mix.base().block_elements() > 1;
    let importance = if searched { Some(Importance::of(merged)?) } else { None };
    let mut writer = Writer::create(path, header)?;
    let mut worst_error = 0f32;
    for (name, shape) in &tensors {
        let values = merged.tensor(name, shape)?;
        let columns = shape[shape.len() - 1];
        let importance = importance.as_ref().and_then(|importance| importance.columns(name));
        let ty = stored_type(mix, config, name, shape);
        let (bytes, error) = pack(ty, method, &values, columns, importance).map_err(ExportError::tensor(name))?;
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
        writer.write_tensor(ROPE_DIVISORS, &quant::quantize(BlockType::F32, divisors)?)?;
    }
    writer.finish()?;
    Ok(worst_error)
}

const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// The type of the tensor with this Hugging Face name.
pub(super) fn stored_type(mix: Mix, config: &ModelConfig, name: &str, shape: &[usize]) -> BlockType {
    let layout = Layout {
        layers: config.blocks,
        heads: config.heads,
        kv_heads: config.kv_heads,
        tied: config.tied_embeddings,
        // Nobody has measured it; the mix is the one of a file without.
        importance: false,
    };
    mix.tensor_type(&layout, &gguf_tensor_name(name), shape)
}

/// The stored bytes, and the largest distance between a value and what they say of it. The rows are shared among threads.
fn pack(
    ty: BlockType,
    method: Method,
    values: &[f32],
    columns: usize,
    importance: Option<&[f32]>,
) -> Result<(Vec<u8>, f32), quant::Error> {
    let Some(row_bytes) = ty.bytes_of(columns) else {
        let reason = format!("rows of {columns} values are not whole blocks of {ty}");
        return Err(quant::Error::Refused { reason });
    };
    let rows = values.len() / columns;
    let mut bytes = vec![0; rows * row_bytes];
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let share = rows.div_ceil(threads).max(1);
    let pack_share = |values: &[f32], bytes: &mut [u8]| {
        let mut unpacked = vec![0.0; columns];
        let mut worst_error = 0f32;
        for (row, bytes) in values.chunks_exact(columns).zip(bytes.chunks_exact_mut(row_bytes)) {
            quantize_row(ty, method, row, importance, bytes)?;
            dequantize(ty, bytes, &mut unpacked)?;
            let errors = unpacked.iter().zip(row).map(|(unpacked, value)| (unpacked - value).abs());
            worst_error = errors.fold(worst_error, f32::max);
        }
        Ok(worst_error)
    };
    let worst_errors: Result<Vec<f32>, quant::Error> = std::thread::scope(|scope| {
        let shares = values.chunks(share * columns).zip(bytes.chunks_mut(share * row_bytes));
        let threads: Vec<_> = shares.map(|(values, bytes)| scope.spawn(move || pack_share(values, bytes))).collect();
        // A panic in a thread is a bug here, and goes on as one.
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    Ok((bytes, worst_errors?.into_iter().fold(0.0, f32::max)))
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

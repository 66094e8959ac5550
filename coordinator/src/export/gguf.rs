//! The merged model as GGUF files.

use std::num::NonZero;
use std::panic::resume_unwind;
use std::path::PathBuf;

use model::source::{TensorInfo, gguf_metadata, gguf_tensor_name, rope_divisors, rotary_heads};
use model::{ModelConfig, Source, Tokenizer};
use quant::gguf::{Header, Writer};
use quant::{BlockType, Layout, Method, Mix, dequantize, permute_rows, quantize_row, quantize_row_with_feedback};

use super::ExportError;
use super::budget::Types;
use super::calibration::{Columns, Guide};
use super::merged::Merged;

/// A file to write, and how.
pub(super) struct Wanted {
    pub choice: TypeChoice,
    pub path: PathBuf,
}

/// How the types of a file's tensors are chosen.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum TypeChoice {
    Mix(Mix),
    /// By name.
    Each(Types),
}

impl TypeChoice {
    fn stored_type(&self, config: &ModelConfig, name: &str, shape: &[usize], importance: bool) -> BlockType {
        match self {
            Self::Mix(mix) => stored_type(*mix, config, name, shape, importance),
            Self::Each(types) => types.get(name).copied().unwrap_or(BlockType::F32),
        }
    }

    /// ggml's number for a mix of this base type; for a choice of our own, the number of its most frequent type's.
    fn file_type(&self) -> u32 {
        match self {
            Self::Mix(mix) => mix.file_type(),
            Self::Each(types) => {
                let count = |ty: BlockType| types.values().filter(|found| **found == ty).count();
                let mixes = Mix::ALL.into_iter().filter(|mix| mix.base() != BlockType::F32);
                mixes.max_by_key(|mix| count(mix.base())).unwrap_or(Mix::F16).file_type()
            }
        }
    }
}

/// Writes the files side by side, and returns for each the largest distance between a merged weight and what the file says
/// of it. `name` is shown by programs that list models. Every tensor is read, and measured, once for all files.
pub(super) fn write(
    name: &str,
    files: &[Wanted],
    method: Method,
    guide: &mut Guide<'_>,
    importance: bool,
) -> Result<Vec<f32>, ExportError> {
    let merged = guide.merged();
    let config = merged.config();
    let divisors = config.rope_scaling.map(|_| rope_divisors(config));
    let mut writers = Vec::with_capacity(files.len());
    for Wanted { choice, path } in files {
        writers.push((choice, Writer::create(path, header(merged, name, choice, importance)?)?, 0f32));
    }

    for TensorInfo { name, shape, .. } in merged.tensors() {
        let values = merged.tensor(name, shape)?;
        let columns = shape[shape.len() - 1];
        for (choice, writer, worst_error) in &mut writers {
            let ty = choice.stored_type(config, name, shape, importance);
            let known = if searched(ty) { guide.columns(name)? } else { Columns::Nothing };
            let (bytes, error) = pack(ty, method, &values, columns, &known).map_err(ExportError::tensor(name))?;
            *worst_error = worst_error.max(error);
            let bytes = match rotary_heads(config, name) {
                // Rows are whole blocks, so that quantized rows change places like any others; a bias has rows of one value.
                Some(heads) => permute_rows(&bytes, shape[0], bytes.len() / shape[0], heads),
                None => Ok(bytes),
            };
            let bytes = bytes.map_err(ExportError::tensor(name))?;
            writer.write_tensor(&gguf_tensor_name(name), &bytes)?;
        }
    }
    let mut worst_errors = Vec::with_capacity(writers.len());
    for (_, mut writer, worst_error) in writers {
        if let Some(divisors) = &divisors {
            writer.write_tensor(ROPE_DIVISORS, &quant::quantize(BlockType::F32, divisors)?)?;
        }
        writer.finish()?;
        worst_errors.push(worst_error);
    }
    Ok(worst_errors)
}

fn header(merged: &Merged<'_>, name: &str, choice: &TypeChoice, importance: bool) -> Result<Header, ExportError> {
    let config = merged.config();
    let mut header = gguf_metadata(config, name);
    header.set("general.file_type", choice.file_type());
    set_tokenizer(&mut header, merged.tokenizer(), config.vocabulary)?;
    for TensorInfo { name, shape, .. } in merged.tensors() {
        let ty = choice.stored_type(config, name, shape, importance);
        header.add_tensor(&gguf_tensor_name(name), shape, ty)?;
    }
    if config.rope_scaling.is_some() {
        header.add_tensor(ROPE_DIVISORS, &[rope_divisors(config).len()], BlockType::F32)?;
    }
    Ok(header)
}

/// Bytes of everything but the model's tensors, and of the whole file in F16. `name` is part of both.
pub(super) fn sizes(merged: &Merged<'_>, name: &str) -> Result<[u64; 2], ExportError> {
    let f16 = header(merged, name, &TypeChoice::Mix(Mix::F16), false)?;
    let all = f16.file_bytes();
    let ours = |tensor: &&quant::gguf::TensorInfo| tensor.name != ROPE_DIVISORS;
    let padded = |tensor: &quant::gguf::TensorInfo| tensor.bytes.next_multiple_of(quant::gguf::ALIGNMENT);
    let tensors: u64 = f16.tensors().iter().filter(ours).map(padded).sum();
    Ok([all - tensors, all])
}

/// Whether what is known of columns can change the bytes of this type.
fn searched(ty: BlockType) -> bool {
    !matches!(ty, BlockType::F32 | BlockType::F16 | BlockType::BF16 | BlockType::Q8_0)
}

/// Whether any tensor of any of the files has such a type.
pub(super) fn any_searched(config: &ModelConfig, files: &[Wanted], importance: bool) -> bool {
    let tensors = model::source::tensors_of(config);
    let mut types = files
        .iter()
        .flat_map(|file| tensors.iter().map(|(name, shape)| file.choice.stored_type(config, name, shape, importance)));
    types.any(searched)
}

const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// The type of the tensor with this Hugging Face name.
pub(super) fn stored_type(mix: Mix, config: &ModelConfig, name: &str, shape: &[usize], importance: bool) -> BlockType {
    let layout = Layout {
        layers: config.blocks,
        heads: config.heads,
        kv_heads: config.kv_heads,
        tied: config.tied_embeddings,
        importance,
    };
    mix.tensor_type(&layout, &gguf_tensor_name(name), shape)
}

/// The stored bytes, and the largest distance between a value and what they say of it. The rows are shared among threads.
fn pack(
    ty: BlockType,
    method: Method,
    values: &[f32],
    columns: usize,
    known: &Columns<'_>,
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
            match known {
                Columns::Feedback(feedback) => quantize_row_with_feedback(ty, row, feedback, bytes)?,
                Columns::Importance(importance) => quantize_row(ty, method, row, Some(importance), bytes)?,
                Columns::Nothing => quantize_row(ty, method, row, None, bytes)?,
            }
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

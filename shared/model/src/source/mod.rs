//! Where base weights come from: a Hugging Face directory, a GGUF file, a store of parts received from the
//! coordinator, or a seed.
//!
//! Every source presents the same thing: a [`ModelConfig`], a tokenizer, and tensors under their Hugging Face names, in
//! the block type they are stored in. Nothing is dequantized before a [`Stage`](crate::Stage) asks for a tensor, so
//! that a 4-bit model also crosses the network as 4 bits.

mod gguf;
mod huggingface;
mod manifest;
pub mod random;
mod store;

use std::path::Path;
use std::sync::Arc;

use quant::BlockType;

use crate::{ModelConfig, ModelError, Tokenizer};
pub use gguf::{gguf_metadata, gguf_tensor_name, rope_divisors, rotary_heads};
pub(crate) use huggingface::floats;
pub use manifest::{Blob, MANIFEST_BYTES_MAX, Manifest, TensorEntry, digest_of};
pub use store::{BlobStore, BlobWriter, Resumed, StoredModel};

/// A tensor of a source. Shapes are row-major; `[out, in]` for linear layers.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: BlockType,
}

/// Base weights and what belongs to them.
pub trait Source: Send + Sync {
    /// Names the source in errors.
    fn origin(&self) -> &Path;

    fn config(&self) -> &ModelConfig;

    fn tokenizer(&self) -> &Tokenizer;

    /// Every tensor of the model, in model order.
    fn tensors(&self) -> &[TensorInfo];

    /// The stored bytes of a tensor, in Hugging Face's row order.
    fn read(&self, info: &TensorInfo) -> Result<Vec<u8>, ModelError>;

    /// The same, in pieces of whole rows, so that a large tensor is never in memory twice.
    ///
    /// # Errors
    /// An error after some pieces takes them back: what they said may be wrong.
    fn read_pieces(&self, info: &TensorInfo, take: &mut Take<'_>) -> Result<(), ModelError> {
        take(&self.read(info)?)
    }
}

/// Takes a piece of a tensor.
pub type Take<'a> = dyn FnMut(&[u8]) -> Result<(), ModelError> + 'a;

/// Bytes of a piece, and more only where a single row is longer.
const PIECE_BYTES: usize = 1 << 20;

impl dyn Source + '_ {
    /// The values of a tensor that must have this shape; all are finite.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let mut values = Vec::with_capacity(shape.iter().product());
        self.tensor_pieces(name, shape, |piece| values.extend_from_slice(piece))?;
        Ok(values)
    }

    /// The same, in pieces of whole rows; after an error those that were taken count for nothing.
    pub fn tensor_pieces(&self, name: &str, shape: &[usize], mut take: impl FnMut(&[f32])) -> Result<(), ModelError> {
        let found = self.tensors().iter().find(|info| info.name == name);
        let info = found.ok_or_else(|| ModelError::file(self.origin(), format!("has no tensor {name}")))?;
        if info.shape != shape {
            let what = format!("{name} has shape {:?}; expected {shape:?}", info.shape);
            return Err(ModelError::file(self.origin(), what));
        }
        let refused = |what: String| ModelError::file(self.origin(), format!("{name}: {what}"));
        let (mut taken, mut values) = (0, Vec::new());
        self.read_pieces(info, &mut |bytes| {
            values.resize(bytes.len() / info.row_bytes() * info.row_elements(), 0.0);
            quant::dequantize(info.dtype, bytes, &mut values).map_err(|error| refused(format!("failed to {error}")))?;
            taken += values.len();
            take(&values);
            Ok(())
        })?;
        let expected: usize = shape.iter().product();
        if taken != expected {
            return Err(refused(format!("holds {taken} numbers; expected {expected}")));
        }
        Ok(())
    }
}

impl TensorInfo {
    /// Bytes as stored; nothing if a row is not whole blocks, which no source holds.
    fn bytes(&self) -> Option<usize> {
        self.dtype.bytes_of(self.row_elements())?.checked_mul(self.rows())
    }

    /// A vector is one row.
    fn row_elements(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, rows)| rows.iter().product())
    }

    fn row_bytes(&self) -> usize {
        self.dtype.bytes_of(self.row_elements()).expect("a row is whole blocks")
    }

    fn piece_rows(&self) -> usize {
        (PIECE_BYTES / self.row_bytes()).max(1)
    }

    fn piece_bytes(&self) -> usize {
        self.piece_rows() * self.row_bytes()
    }
}

/// Opens what `path` points to: a `.gguf` file, a directory with `config.json`, or a directory that holds one GGUF file.
pub fn open(path: &Path) -> Result<Arc<dyn Source>, ModelError> {
    let metadata = std::fs::metadata(path).map_err(ModelError::io(path))?;
    if metadata.is_file() {
        return Ok(Arc::new(gguf::GgufModel::open(path)?));
    }
    if path.join("config.json").is_file() {
        return Ok(Arc::new(huggingface::HuggingFaceModel::open(path)?));
    }
    let entries = std::fs::read_dir(path).map_err(ModelError::io(path))?;
    let files = entries.map(|entry| entry.map(|entry| entry.path()).map_err(ModelError::io(path)));
    let files: Vec<_> = files.collect::<Result<_, _>>()?;
    let mut gguf = files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "gguf"));
    match (gguf.next(), gguf.next()) {
        (Some(file), None) => Ok(Arc::new(gguf::GgufModel::open(file)?)),
        (None, _) => Err(ModelError::file(
            path,
            "holds neither config.json nor a .gguf file; name a model's directory, or its GGUF file",
        )),
        _ => Err(ModelError::file(path, "holds several .gguf files; name one of them")),
    }
}

/// Opens the model an experiment names: its path, or the random model of its seed.
pub fn of_experiment(experiment: &experiment::Experiment) -> Result<Arc<dyn Source>, ModelError> {
    match (&experiment.model.path, &experiment.model.random) {
        (Some(path), _) => open(path),
        (None, Some(shape)) => Ok(Arc::new(random::RandomModel::new(shape, experiment::Seed(experiment.seed))?)),
        (None, None) => Err(ModelError::Mismatch("the experiment names no model".into())),
    }
}

/// Names and shapes of all tensors a decoder of this shape has, in model order.
pub fn tensors_of(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocabulary, config.width])];
    for block in 0..config.blocks {
        tensors.extend(tensors_of_block(config, block));
    }
    tensors.push(("model.norm.weight".to_owned(), vec![config.width]));
    if !config.tied_embeddings {
        tensors.push(("lm_head.weight".to_owned(), vec![config.vocabulary, config.width]));
    }
    tensors
}

/// The same of what has `found` tensors, and may claim any number of blocks: with more than it can have, no name is made.
fn tensors_among(config: &ModelConfig, found: usize) -> Result<Vec<(String, Vec<usize>)>, String> {
    match config.blocks <= found {
        true => Ok(tensors_of(config)),
        false => Err(format!("has {found} tensors for {} blocks", config.blocks)),
    }
}

fn tensors_of_block(config: &ModelConfig, block: usize) -> Vec<(String, Vec<usize>)> {
    let prefix = format!("model.layers.{block}");
    let norm = |name: &str, size: usize| (format!("{prefix}.{name}.weight"), vec![size]);
    let mut tensors = vec![norm("input_layernorm", config.width)];
    for target in crate::adapter::TARGETS {
        let shape = config.linear_shape(target).expect("TARGETS are linear layers");
        let path = format!("model.{}", crate::adapter::module_path(block, target));
        tensors.push((format!("{path}.weight"), shape.to_vec()));
        if config.qkv_bias && matches!(target, "q_proj" | "k_proj" | "v_proj") {
            tensors.push((format!("{path}.bias"), vec![shape[0]]));
        }
    }
    if config.family == crate::Family::Qwen3 {
        tensors.push(norm("self_attn.q_norm", config.head_size));
        tensors.push(norm("self_attn.k_norm", config.head_size));
    }
    tensors.push(norm("post_attention_layernorm", config.width));
    tensors
}

//! What can go wrong with quantized weights, sorted by whose fault it is.

use crate::BlockType;
use std::{io, path::PathBuf};

/// Messages finish the sentence "failed to …" and name the offending value.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused; the same call may work later.
    #[error("use {}: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },

    #[error("write {}: {source}{}", .path.display(), storage::remedy(source))]
    Write { path: PathBuf, source: io::Error },

    /// The file ends early: copy or download it again.
    #[error(
        "read {}: the file is truncated, {inside} ends at byte {bytes_needed} but the file has {bytes_found}; \
         copy or download it again", .path.display()
    )]
    Truncated { path: PathBuf, inside: String, bytes_needed: u64, bytes_found: u64 },

    /// The file breaks the format: it is damaged, or something else.
    #[error("read {}: {reason}; copy or fetch it again, or name a sound GGUF file", .path.display())]
    Malformed { path: PathBuf, reason: String },

    /// The file is sound but is not the kind of file the caller needs.
    #[error("read {}: metadata key `{key}` is missing; name the GGUF file of a model", .path.display())]
    MissingKey { path: PathBuf, key: String },

    #[error("read {}: metadata key `{key}` holds {found}, expected {expected}; copy or fetch it again", .path.display())]
    WrongType { path: PathBuf, key: String, expected: &'static str, found: String },

    #[error("read {}: there is no tensor `{tensor}`; copy or fetch it again", .path.display())]
    MissingTensor { path: PathBuf, tensor: String },

    #[error(
        "read {}: tensor `{tensor}` is stored as {found}, which is not supported; \
         requantize the file, for instance to Q8_0", .path.display()
    )]
    UnsupportedType { path: PathBuf, tensor: String, found: &'static str },

    /// The caller passed a buffer whose length does not fit its type or shape.
    #[error("use a buffer of {found} {unit} as {what}: expected {expected}")]
    WrongLength { what: &'static str, unit: &'static str, expected: usize, found: usize },

    #[error("use block {block} of {ty}: its scale or a value is NaN, infinite or too large for the type")]
    NotFinite { ty: BlockType, block: usize },

    #[error("use the importance of column {column}: it is NaN, infinite or negative")]
    Importance { column: usize },

    #[error("reorder {rows} rows for {heads} attention heads: each head needs the same even number of rows")]
    UnevenHeads { rows: usize, heads: usize },

    /// The caller asked the writer for a file that no reader would accept, or wrote its tensors in another order.
    #[error("write a gguf file: {reason}")]
    Refused { reason: String },
}

//! Products with weights of few bits, made of integers.
//!
//! # Layout
//! A [`Matrix`] holds *groups* of 16 rows, a group *blocks* of 32 columns, a block *lines* of 64 bytes: four bytes of each
//! of the 16 rows. Four columns of a row are a *quad*, and a line yields one quad or, where codes have fewer than eight
//! bits, several. A lane of a vector is then a row; no sum ever runs across lanes, and one broadcast of four activations
//! serves all 16 rows. A 64-byte line is one vector of AVX-512, two of AVX2 and four of NEON, so that one layout serves
//! every path and nothing has to be packed twice or kept twice.
//!
//! Scales and minima stand behind the codes of one, two or eight blocks, a *span*, so that they fill whole lines and memory
//! is read from one end to the other, as fast as a core can. Few [`Layout`]s cover ggml's block types, nearly in as many
//! bytes (TQ1_0 a quarter more, Q3_K 5 %, Q4_K and TQ2_0 3 %, Q5_K 2 %, Q6_K 1 %, and half a span where spans of two meet a
//! row of an odd number of blocks) and without changing a value: a layout says how codes are packed and what scales them,
//! not which file they came from.
//!
//! # Arithmetic
//! Activations become signed bytes, one scale for each 32 ([`activations`]). A block's products add up in `i32`, exactly;
//! `code − zero` costs nothing, as `−zero · Σx` is where the sum starts. Then one `fma` per block in f32, in order of the
//! columns, in a batch as for a single row: a row's result does not depend on those beside it.

mod activations;
mod format;
mod matrix;
mod strip;
#[cfg(test)]
mod tests;

pub(crate) use activations::{code_words, quantize_row};
pub(crate) use format::Format;
pub use format::Layout;
pub(crate) use matrix::{Batch, BatchProduct, RowInput, VectorProduct, batch_scratch_bytes};
pub use matrix::{Group, Matrix};
pub(crate) use strip::{Strip, strip};

/// Rows of a group.
pub const GROUP: usize = 16;
/// Columns of a block.
pub const BLOCK: usize = 32;
/// Columns of a superblock.
pub const SUPERBLOCK: usize = 256;

//! Quantizers: which codes and scales stand for a row of weights.
//!
//! [`quantize_row`] is the start, and works on one row, so that a caller may share rows among threads. A row comes with
//! the importance of its columns or without: how much the square of an error there costs, usually the mean square of the
//! activations that the column is multiplied with. [`Method::Reference`] makes the bytes that llama-quantize makes;
//! [`Method::Search`] looks for codes that lose less. Where bits go inside a block is [`crate::blocks`]' business.

mod affine;
mod feedback;
mod fits;
mod levels;
mod reference32;
mod reference_k;
mod search;
mod search_k;

use crate::blocks::{BlockResult, NotFinite, blocks32, float, partial_block, superblocks, ternary};
use crate::{BlockType, Error};
use half::f16;

pub use feedback::Feedback;

/// How codes are chosen. Plain floats are rounded to nearest, ties to even, by either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// ggml's procedure, on every machine with the bytes that ggml makes on x86-64: nothing is fused.
    Reference,
    /// Ours, which loses less.
    Search,
}

/// Packs `row`, whole blocks of it, into `bytes`. `importance` has one non-negative number for every value. Values that
/// are not finite, or whose scale exceeds the type, are refused.
pub fn quantize_row(
    ty: BlockType,
    method: Method,
    row: &[f32],
    importance: Option<&[f32]>,
    bytes: &mut [u8],
) -> Result<(), Error> {
    let mut row = Row::new(ty, row, importance, bytes)?;
    match method {
        Method::Reference => reference(&mut row),
        Method::Search => search::search(&mut row, None),
    }
}

/// As [`quantize_row`] with [`Method::Search`], for a matrix whose activations are known better than by the importance of
/// single columns.
pub fn quantize_row_with_feedback(
    ty: BlockType,
    row: &[f32],
    feedback: &Feedback,
    bytes: &mut [u8],
) -> Result<(), Error> {
    if feedback.columns() != row.len() {
        let (expected, found) = (row.len(), feedback.columns());
        return Err(Error::WrongLength { what: "feedback", unit: "columns", expected, found });
    }
    search::search(&mut Row::new(ty, row, None, bytes)?, Some(feedback))
}

/// No type of blocks can hold more, and the sums of the searches must not overflow.
const PACKED_MAX: f32 = 1e9;

/// Packs `values`, whole blocks of them, with [`Method::Reference`] and no importance.
pub fn quantize(ty: BlockType, values: &[f32]) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; ty.bytes_of(values.len()).ok_or_else(|| partial_block(ty, values.len()))?];
    quantize_row(ty, Method::Reference, values, None, &mut bytes)?;
    Ok(bytes)
}

fn reference(row: &mut Row<'_>) -> Result<(), Error> {
    let spread = row.row.iter().fold(0f32, |sum, x| sum + x * x) / row.row.len() as f32;
    match row.ty {
        BlockType::F32 => row.each(|x, _, block| float::encode_f32(x, block)),
        BlockType::F16 => row.each(|x, _, block| float::encode_f16(x, block)),
        BlockType::BF16 => row.each(|x, _, block| float::encode_bf16(x, block)),
        BlockType::Q4_0 => {
            row.each(|x, v, block| blocks32::pack_q4_0(&reference32::q4_0(x, v.map(|v| (v, spread))), block))
        }
        BlockType::Q4_1 => {
            row.each(|x, v, block| blocks32::pack_q4_1(&reference32::q4_1(x, v.map(|v| (v, spread))), block))
        }
        BlockType::Q5_0 => {
            row.each(|x, v, block| blocks32::pack_q5_0(&reference32::q5_0(x, v.map(|v| (v, spread))), block))
        }
        BlockType::Q5_1 => {
            row.each(|x, v, block| blocks32::pack_q5_1(&reference32::q5_1(x, v.map(|v| (v, spread))), block))
        }
        BlockType::Q8_0 => row.each(|x, _, block| blocks32::pack_q8_0(&reference32::q8_0(x), block)),
        BlockType::IQ4_NL => row.each(|x, v, block| blocks32::pack_q4_0(&reference32::iq4_nl(x, v), block)),
        BlockType::Q2_K => row.each(|x, v, block| superblocks::pack_q2_k(&reference_k::q2_k(x, v), block)),
        BlockType::Q3_K => row.each(|x, v, block| superblocks::pack_q3_k(&reference_k::q3_k(x, v), block)),
        BlockType::Q4_K => row.each(|x, v, block| superblocks::pack_q4_k(&reference_k::q4_k(x, v), block)),
        BlockType::Q5_K => row.each(|x, v, block| superblocks::pack_q5_k(&reference_k::q5_k(x, v), block)),
        BlockType::Q6_K => row.each(|x, v, block| superblocks::pack_q6_k(&reference_k::q6_k(x, v), block)),
        BlockType::TQ1_0 => row.each(|x, _, block| ternary::pack_tq1_0(&reference32::ternary(x), block)),
        BlockType::TQ2_0 => row.each(|x, _, block| ternary::pack_tq2_0(&reference32::ternary(x), block)),
    }
}

/// Values that a block can hold, and buffers whose lengths agree.
struct Row<'a> {
    ty: BlockType,
    row: &'a [f32],
    importance: Option<&'a [f32]>,
    bytes: &'a mut [u8],
}

impl<'a> Row<'a> {
    fn new(
        ty: BlockType,
        row: &'a [f32],
        importance: Option<&'a [f32]>,
        bytes: &'a mut [u8],
    ) -> Result<Row<'a>, Error> {
        let expected = ty.bytes_of(row.len()).ok_or_else(|| partial_block(ty, row.len()))?;
        if bytes.len() != expected {
            return Err(Error::WrongLength { what: ty.name(), unit: "bytes", expected, found: bytes.len() });
        }
        if let Some(importance) = importance {
            check_importance(row, importance)?;
        }
        let packed = ty.block_elements() > 1;
        if let Some(at) = row.iter().position(|value| !value.is_finite() || packed && value.abs() > PACKED_MAX) {
            return Err(Error::NotFinite { ty, block: at / ty.block_elements() });
        }
        Ok(Row { ty, row, importance, bytes })
    }

    /// `E` elements go into `B` bytes; both follow from the signature of `encode`, and must be the type's own.
    fn each<const E: usize, const B: usize>(
        &mut self,
        mut encode: impl FnMut(&[f32; E], Option<&[f32; E]>, &mut [u8; B]) -> BlockResult,
    ) -> Result<(), Error> {
        let ty = self.ty;
        debug_assert_eq!((B, E), (ty.block_bytes(), ty.block_elements()));
        let pairs = self.row.as_chunks::<E>().0.iter().zip(self.bytes.as_chunks_mut::<B>().0);
        for (block, (values, bytes)) in pairs.enumerate() {
            let importance = self.importance.map(|importance| &importance.as_chunks::<E>().0[block]);
            encode(values, importance, bytes).map_err(|NotFinite| Error::NotFinite { ty, block })?;
        }
        Ok(())
    }
}

fn check_importance(row: &[f32], importance: &[f32]) -> Result<(), Error> {
    if importance.len() != row.len() {
        let (expected, found) = (row.len(), importance.len());
        return Err(Error::WrongLength { what: "importance", unit: "numbers", expected, found });
    }
    match importance.iter().position(|v| !v.is_finite() || *v < 0.0) {
        Some(column) => Err(Error::Importance { column }),
        None => Ok(()),
    }
}

/// As the decoder will see it.
fn rounded(scale: f32) -> f32 {
    f16::from_f32(scale).to_f32()
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// For magnitudes up to 2^22: adding 1.5·2^23 leaves no room for a fraction. Unlike the library's function it needs no
/// instruction that the oldest x86-64 lacks, so that loops over it become vectors.
fn nearest_integer(x: f32) -> f32 {
    x + 12_582_912.0 - 12_582_912.0
}

#[cfg(test)]
mod tests;

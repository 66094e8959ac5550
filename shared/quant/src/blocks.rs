//! Block formats: how ggml packs a run of weights, and what each packed value means.
//!
//! Start from [`BlockType`]. [`dequantize`] checks lengths once and then hands whole blocks to the family that knows the
//! layout; a family never sees a partial block, a shape or a file. Values equal ggml's reference bit for bit: products
//! and sums in its order, in `f32`, never fused. A family also packs codes and scales that somebody chose; who chooses
//! them is [`quantize_row`](crate::quantize_row)'s business.
//!
//! To add a format: a variant and a row of `layout` here, its block functions in the family's file, one line in each
//! `match` on the type, and its row removed from `gguf::tensors`, where the formats that we cannot decode are listed.

pub(crate) mod blocks32;
pub(crate) mod float;
pub(crate) mod superblocks;
pub(crate) mod ternary;

use crate::Error;
use half::f16;
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types)] // The names are ggml's, and appear in file names and TOML.
pub enum BlockType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    IQ4_NL,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    TQ1_0,
    TQ2_0,
}

impl BlockType {
    pub const ALL: [BlockType; 16] = {
        use BlockType::*;
        [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, TQ1_0, TQ2_0]
    };

    pub fn from_ggml_id(id: u32) -> Option<BlockType> {
        Self::ALL.into_iter().find(|ty| ty.ggml_id() == id)
    }

    pub fn from_name(name: &str) -> Option<BlockType> {
        Self::ALL.into_iter().find(|ty| ty.name() == name)
    }

    pub fn ggml_id(self) -> u32 {
        self.layout().0
    }

    pub fn name(self) -> &'static str {
        self.layout().1
    }

    pub fn block_elements(self) -> usize {
        self.layout().2
    }

    pub fn block_bytes(self) -> usize {
        self.layout().3
    }

    /// Bytes of `elements` values in whole blocks; `None` if the last block would be partial or the count overflows.
    pub fn bytes_of(self, elements: usize) -> Option<usize> {
        let (_, _, block_elements, block_bytes) = self.layout();
        if !elements.is_multiple_of(block_elements) {
            return None;
        }
        (elements / block_elements).checked_mul(block_bytes)
    }

    /// ggml id, name, elements per block, bytes per block.
    const fn layout(self) -> (u32, &'static str, usize, usize) {
        match self {
            BlockType::F32 => (0, "F32", 1, 4),
            BlockType::F16 => (1, "F16", 1, 2),
            BlockType::BF16 => (30, "BF16", 1, 2),
            BlockType::Q4_0 => (2, "Q4_0", 32, 18),
            BlockType::Q4_1 => (3, "Q4_1", 32, 20),
            BlockType::Q5_0 => (6, "Q5_0", 32, 22),
            BlockType::Q5_1 => (7, "Q5_1", 32, 24),
            BlockType::Q8_0 => (8, "Q8_0", 32, 34),
            BlockType::IQ4_NL => (20, "IQ4_NL", 32, 18),
            BlockType::Q2_K => (10, "Q2_K", 256, 84),
            BlockType::Q3_K => (11, "Q3_K", 256, 110),
            BlockType::Q4_K => (12, "Q4_K", 256, 144),
            BlockType::Q5_K => (13, "Q5_K", 256, 176),
            BlockType::Q6_K => (14, "Q6_K", 256, 210),
            BlockType::TQ1_0 => (34, "TQ1_0", 256, 54),
            BlockType::TQ2_0 => (35, "TQ2_0", 256, 66),
        }
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Fills `out` with the values of `bytes`, which are whole blocks of `ty`. Every value is finite on success: a scale
/// or a plain float that is NaN or infinite is refused, because one of them would silently poison a whole network.
pub fn dequantize(ty: BlockType, bytes: &[u8], out: &mut [f32]) -> Result<(), Error> {
    let expected = ty.bytes_of(out.len()).ok_or_else(|| partial_block(ty, out.len()))?;
    if bytes.len() != expected {
        return Err(Error::WrongLength { what: ty.name(), unit: "bytes", expected, found: bytes.len() });
    }
    match ty {
        BlockType::F32 => decode_each(ty, bytes, out, float::decode_f32),
        BlockType::F16 => decode_each(ty, bytes, out, float::decode_f16),
        BlockType::BF16 => decode_each(ty, bytes, out, float::decode_bf16),
        BlockType::Q4_0 => decode_each(ty, bytes, out, blocks32::decode_q4_0),
        BlockType::Q4_1 => decode_each(ty, bytes, out, blocks32::decode_q4_1),
        BlockType::Q5_0 => decode_each(ty, bytes, out, blocks32::decode_q5_0),
        BlockType::Q5_1 => decode_each(ty, bytes, out, blocks32::decode_q5_1),
        BlockType::Q8_0 => decode_each(ty, bytes, out, blocks32::decode_q8_0),
        BlockType::IQ4_NL => decode_each(ty, bytes, out, blocks32::decode_iq4_nl),
        BlockType::Q2_K => decode_each(ty, bytes, out, superblocks::decode_q2_k),
        BlockType::Q3_K => decode_each(ty, bytes, out, superblocks::decode_q3_k),
        BlockType::Q4_K => decode_each(ty, bytes, out, superblocks::decode_q4_k),
        BlockType::Q5_K => decode_each(ty, bytes, out, superblocks::decode_q5_k),
        BlockType::Q6_K => decode_each(ty, bytes, out, superblocks::decode_q6_k),
        BlockType::TQ1_0 => decode_each(ty, bytes, out, ternary::decode_tq1_0),
        BlockType::TQ2_0 => decode_each(ty, bytes, out, ternary::decode_tq2_0),
    }
}

/// A block function's refusal; the loop around it knows which block it was.
pub(crate) struct NotFinite;

pub(crate) type BlockResult = Result<(), NotFinite>;

/// `B` bytes hold `E` elements; both follow from the signature of `decode`, and must be the type's own.
fn decode_each<const B: usize, const E: usize>(
    ty: BlockType,
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; B], &mut [f32; E]) -> BlockResult,
) -> Result<(), Error> {
    debug_assert_eq!((B, E), (ty.block_bytes(), ty.block_elements()));
    let pairs = bytes.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<E>().0);
    for (block, (bytes, out)) in pairs.enumerate() {
        decode(bytes, out).map_err(|NotFinite| Error::NotFinite { ty, block })?;
    }
    Ok(())
}

pub(crate) fn partial_block(ty: BlockType, elements: usize) -> Error {
    let expected = elements.next_multiple_of(ty.block_elements());
    Error::WrongLength { what: ty.name(), unit: "elements", expected, found: elements }
}

/// The finite scale stored at `at`.
fn scale<const B: usize>(block: &[u8; B], at: usize) -> Result<f32, NotFinite> {
    let scale = f16::from_le_bytes([block[at], block[at + 1]]);
    if scale.is_finite() { Ok(scale.to_f32()) } else { Err(NotFinite) }
}

/// Stores `scale` rounded to `f16`, unless that overflows.
fn put_scale<const B: usize>(block: &mut [u8; B], at: usize, scale: f32) -> BlockResult {
    let scale = f16::from_f32(scale);
    if !scale.is_finite() {
        return Err(NotFinite);
    }
    block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
    Ok(())
}

#[cfg(test)]
mod tests;

//! Plain floats, as blocks of one element. Narrowing rounds to nearest, ties to even.

use super::{BlockResult, NotFinite};
use half::{bf16, f16};

pub(super) fn decode_f32(block: &[u8; 4], out: &mut [f32; 1]) -> BlockResult {
    put_finite(f32::from_le_bytes(*block), out)
}

pub(super) fn decode_f16(block: &[u8; 2], out: &mut [f32; 1]) -> BlockResult {
    put_finite(f16::from_le_bytes(*block).to_f32(), out)
}

pub(super) fn decode_bf16(block: &[u8; 2], out: &mut [f32; 1]) -> BlockResult {
    put_finite(bf16::from_le_bytes(*block).to_f32(), out)
}

pub(crate) fn encode_f32(values: &[f32; 1], block: &mut [u8; 4]) -> BlockResult {
    *block = values[0].to_le_bytes();
    Ok(())
}

pub(crate) fn encode_f16(values: &[f32; 1], block: &mut [u8; 2]) -> BlockResult {
    let narrow = f16::from_f32(values[0]);
    *block = narrow.to_le_bytes();
    if narrow.is_finite() { Ok(()) } else { Err(NotFinite) }
}

pub(crate) fn encode_bf16(values: &[f32; 1], block: &mut [u8; 2]) -> BlockResult {
    let narrow = bf16::from_f32(values[0]);
    *block = narrow.to_le_bytes();
    if narrow.is_finite() { Ok(()) } else { Err(NotFinite) }
}

fn put_finite(value: f32, out: &mut [f32; 1]) -> BlockResult {
    out[0] = value;
    if value.is_finite() { Ok(()) } else { Err(NotFinite) }
}

//! The integer half of an instruction set: products of small unsigned codes with signed bytes, and what unpacks codes.
//!
//! As in [`Simd`](super::Simd), everything is unsafe because the caller promises that the CPU has the instructions and
//! that pointers reach as far as is read or written.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;
#[cfg(test)]
mod tests;

use crate::quantized::{Format, Strip};

/// Vectors of as many `i32` as [`Simd`](super::Simd) has lanes; each is also four bytes, the *quad* of one row.
pub(crate) trait Integers: Copy {
    /// The vector of f32.
    type V: Copy;
    type I: Copy;
    /// Products gather in 16 bits, and [`widen`](Self::widen) makes them whole after at most [`room`](Self::room) of them.
    const PAIRED: bool;
    /// Codes of eight bits are multiplied as signed bytes, 128 below what is stored.
    const SIGNED: bool;
    /// Too few for a strip's sums and a block's codes at once.
    const FEW_REGISTERS: bool = false;
    /// Rows of activations, and vectors of weight rows, of a strip.
    const STRIP_ROWS: usize;
    const STRIP_VECTORS: usize;

    unsafe fn load(from: *const u8) -> Self::I;
    unsafe fn store(to: *mut u8, v: Self::I);
    unsafe fn splat(x: i32) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn xor(a: Self::I, b: Self::I) -> Self::I;
    /// Shifts of whole lanes: what enters a byte from its neighbour is the caller's to mask.
    unsafe fn left<const N: u32>(v: Self::I) -> Self::I;
    unsafe fn right<const N: u32>(v: Self::I) -> Self::I;
    unsafe fn add(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn to_f32(v: Self::I) -> Self::V;
    /// Byte for byte, what `table` has for a code below 16.
    unsafe fn look_up(table: &[u8; 16], codes: Self::I) -> Self::I;

    /// Adds the four products of each lane's codes (below `2^BITS`; signed bytes where `BITS` is 8 and `SIGNED`) and x.
    unsafe fn mul_add<const BITS: u32>(sum: Self::I, codes: Self::I, x: Self::I) -> Self::I;
    /// How many such products fit before they are widened, a power of two.
    fn room(bits: u32) -> usize {
        let _ = bits;
        8
    }
    unsafe fn widen(sum: Self::I) -> Self::I;

    /// f16 numbers, and bytes, as f32.
    unsafe fn load_f16(from: *const u16) -> Self::V;
    unsafe fn load_u8(from: *const u8) -> Self::V;
    /// To the nearest f16, ties to even.
    unsafe fn store_f16(to: *mut u16, v: Self::V);
    /// Whole numbers of a signed byte's range, `LANES` of them.
    unsafe fn store_i8(to: *mut i8, v: Self::V);
    /// Asks for a line of memory in the second-level cache.
    unsafe fn prefetch(from: *const u8);

    /// A strip of a product, in this path's registers: see `quantized::strip`.
    unsafe fn strip<S: super::Simd<V = Self::V, Int = Self>, F: Format>(s: &Strip);
}

/// Of half precision; exact.
pub(crate) fn from_f16(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let magnitude = f32::from_bits(u32::from(half & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    // Exponent 31 stands for infinity and what is not a number.
    let magnitude = if half & 0x7c00 == 0x7c00 { magnitude.to_bits() | 0x7f80_0000 } else { magnitude.to_bits() };
    f32::from_bits(sign | magnitude)
}

/// The nearest number of half precision, ties to even; what is too large becomes infinity.
pub(crate) fn to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00;
    }
    if magnitude >= 0x4780_0000 {
        return sign | 0x7c00;
    }
    if magnitude < 0x3880_0000 {
        // Denormal: adding a half makes the f32 unit equal to the f16 unit, and rounds by the way.
        let rounded = f32::from_bits(magnitude) + 0.5;
        return sign | (rounded.to_bits() - 0x3f00_0000) as u16;
    }
    let odd = magnitude >> 13 & 1;
    sign | ((magnitude - 0x3800_0000 + 0xfff + odd) >> 13) as u16
}

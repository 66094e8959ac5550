//! One vector of an instruction set. Every kernel is written once, over [`Simd`], and compiled once for each path.
//!
//! All functions are unsafe for one reason: the caller promises that the CPU has the instruction set, which
//! [`Path::run`](crate::Path::run) has checked, and that pointers reach as many lanes as are read or written.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod integer;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;
#[cfg(test)]
mod tests;

use crate::tile::Tile;
use integer::Integers;

/// The most lanes a vector has on any path.
pub(crate) const LANES_MAX: usize = 16;
/// The most columns a panel has on any path.
pub(crate) const PANEL_MAX: usize = 48;

/// `LANES` numbers in f32, and what the kernels do with them.
pub(crate) trait Simd: Copy {
    type V: Copy;
    /// Its integers.
    type Int: Integers<V = Self::V>;
    const LANES: usize;
    /// Rows of a tile: what the registers hold beside `NV` vectors of a panel.
    const MR: usize;
    /// Vectors across a tile.
    const NV: usize;
    /// Whether pairs of bf16 numbers are multiplied in hardware.
    const BF16: bool;
    /// Whether tiles read packed pairs row by row, and not step by step.
    const PAIRS_BY_ROW: bool = false;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    /// The first `n ≤ LANES` lanes; the others are 0, and memory behind them is not touched.
    unsafe fn load_n(from: *const f32, n: usize) -> Self::V;
    unsafe fn store_n(to: *mut f32, v: Self::V, n: usize);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, rounded once where the path can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn round(v: Self::V) -> Self::V;
    /// `v · 2^n` for an `n` of whole numbers in −126..=127.
    unsafe fn scale(v: Self::V, n: Self::V) -> Self::V;
    unsafe fn sum(v: Self::V) -> f32;
    unsafe fn maximum(v: Self::V) -> f32;
    /// Transposes the first `LANES` of these vectors as a square.
    unsafe fn transpose(rows: &mut [Self::V; LANES_MAX]);

    /// bf16 numbers, widened.
    unsafe fn load_bf16(from: *const u16, n: usize) -> Self::V;
    /// Rounded to the nearest, ties to even.
    unsafe fn store_bf16(to: *mut u16, v: Self::V, n: usize);
    unsafe fn load_i8(from: *const i8, n: usize) -> Self::V;

    /// Two times `LANES` numbers of a row as `LANES` pairs of bf16, and sums of products of such pairs.
    unsafe fn pairs(low: Self::V, high: Self::V) -> Self::V;
    unsafe fn splat_bits(x: u32) -> Self::V;
    unsafe fn dot_pairs(acc: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// Lane i holds the pair of bf16 (a_i, b_i).
    unsafe fn zip_pairs(a: Self::V, b: Self::V) -> Self::V;
    /// The same of numbers that are bf16 already: the first `n ≤ LANES`.
    #[inline(always)]
    unsafe fn zip_bf16(a: *const u16, b: *const u16, n: usize) -> Self::V {
        // SAFETY: the caller's promise, see `Simd`.
        unsafe { Self::zip_pairs(Self::load_bf16(a, n), Self::load_bf16(b, n)) }
    }

    unsafe fn tile<const PAIRS: bool>(vectors: usize, tile: &Tile);
    /// A hint that the cache line at this address will be read soon. Any address will do: nothing is accessed.
    unsafe fn prefetch(_at: *const u8) {}
}

/// `e^v` with a relative error below 2e-7 (Cephes' polynomial); 0 and not a denormal below −87.3, capped at 88.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(v: S::V) -> S::V {
    // SAFETY: the caller's promise, see `Simd`.
    unsafe {
        let v = S::max(v, S::splat(-87.3));
        // min(v, 88) = −max(−v, −88)
        let v = S::sub(S::splat(0.0), S::max(S::sub(S::splat(0.0), v), S::splat(-88.0)));
        let n = S::round(S::mul(v, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-0.693_359_4), v);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_1e-4);
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = S::fma(p, r, S::splat(c));
        }
        let p = S::fma(p, S::mul(r, r), S::add(r, S::splat(1.0)));
        S::scale(p, n)
    }
}

/// The nearest bf16, ties to even; not-a-number stays one.
pub(crate) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

pub(crate) fn from_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

//! Plain arrays, for every CPU, and for Miri.

use super::{LANES_MAX, Simd, from_bf16, to_bf16};
use crate::tile::{Tile, tile};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

const LANES: usize = 4;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

// SAFETY, for every block below: pointers reach the lanes that are read or written, which is the caller's promise.
impl Simd for Portable {
    type V = [f32; LANES];
    type Int = super::integer::portable::Plain;
    const LANES: usize = LANES;
    const MR: usize = 4;
    const NV: usize = 2;
    const BF16: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: as above.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        // SAFETY: as above.
        unsafe { to.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_n(from: *const f32, n: usize) -> Self::V {
        if n >= LANES {
            // SAFETY: as above.
            return unsafe { Self::load(from) };
        }
        // SAFETY: as above; lanes from `n` on are not read.
        std::array::from_fn(|i| if i < n { unsafe { *from.add(i) } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store_n(to: *mut f32, v: Self::V, n: usize) {
        if n >= LANES {
            // SAFETY: as above.
            return unsafe { Self::store(to, v) };
        }
        for (i, &x) in v.iter().enumerate().take(n) {
            // SAFETY: as above.
            unsafe { *to.add(i) = x }
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn round(v: Self::V) -> Self::V {
        // Adding and subtracting 1.5 · 2²³ rounds to the nearest whole number, ties to even.
        v.map(|x| (x + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    unsafe fn scale(v: Self::V, n: Self::V) -> Self::V {
        zip(v, n, |v, n| v * f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    unsafe fn maximum(v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self::V; LANES_MAX]) {
        let old = *rows;
        for (i, row) in rows.iter_mut().enumerate().take(LANES) {
            *row = std::array::from_fn(|j| old[j][i]);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16, n: usize) -> Self::V {
        // SAFETY: as above.
        std::array::from_fn(|i| if i < n { from_bf16(unsafe { *from.add(i) }) } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, v: Self::V, n: usize) {
        for (i, &x) in v.iter().enumerate().take(n) {
            // SAFETY: as above.
            unsafe { *to.add(i) = to_bf16(x) }
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8, n: usize) -> Self::V {
        // SAFETY: as above.
        std::array::from_fn(|i| if i < n { f32::from(unsafe { *from.add(i) }) } else { 0.0 })
    }
    unsafe fn pairs(_: Self::V, _: Self::V) -> Self::V {
        unreachable!("this path has no bf16 products")
    }
    unsafe fn splat_bits(_: u32) -> Self::V {
        unreachable!("this path has no bf16 products")
    }
    unsafe fn dot_pairs(_: Self::V, _: Self::V, _: Self::V) -> Self::V {
        unreachable!("this path has no bf16 products")
    }
    unsafe fn zip_pairs(_: Self::V, _: Self::V) -> Self::V {
        unreachable!("this path has no bf16 products")
    }
    #[inline(always)]
    unsafe fn tile<const PAIRS: bool>(vectors: usize, t: &Tile) {
        // SAFETY: as above.
        unsafe {
            match vectors {
                1 => tile::<Self, 4, 1, PAIRS>(t),
                _ => tile::<Self, 4, 2, PAIRS>(t),
            }
        }
    }
}

//! NEON: 32 registers of 4 lanes; and the same with the dot product of bf16 pairs of Armv8.6.

use std::arch::aarch64::*;

use super::{LANES_MAX, Simd};
use crate::tile::{Tile, tile};

#[derive(Clone, Copy)]
pub(crate) struct Neon;

/// With `dotprod`, the products of bytes.
#[derive(Clone, Copy)]
pub(crate) struct NeonDot;

/// With `dotprod` and bf16: every CPU that has the latter has both.
#[derive(Clone, Copy)]
pub(crate) struct NeonBf16;

/// As `to_bf16`, in the low halves of the lanes: add 0x7fff and the lowest bit that stays, then cut; what is not a number
/// gets its quiet bit.
#[inline(always)]
unsafe fn narrow(v: float32x4_t) -> uint32x4_t {
    // SAFETY: every aarch64 has NEON.
    unsafe {
        let bits = vreinterpretq_u32_f32(v);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x40_0000));
        let number = vceqq_f32(v, v);
        vshrq_n_u32::<16>(vbslq_u32(number, up, quiet))
    }
}

// SAFETY, for every block below: the CPU has these instructions and pointers reach the lanes that are read or written;
// both are the caller's promise.
macro_rules! neon {
    ($name:ident, $integers:ty, $bf16:expr) => {
        impl Simd for $name {
            type V = float32x4_t;
            type Int = $integers;
            const LANES: usize = 4;
            const MR: usize = 8;
            const NV: usize = 3;
            const BF16: bool = $bf16;

            #[inline(always)]
            unsafe fn splat(x: f32) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vdupq_n_f32(x) }
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vld1q_f32(from) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut f32, v: float32x4_t) {
                // SAFETY: as above.
                unsafe { vst1q_f32(to, v) }
            }
            #[inline(always)]
            unsafe fn load_n(from: *const f32, n: usize) -> float32x4_t {
                // SAFETY: as above; of a partial vector only the first `n` numbers are read.
                unsafe {
                    if n >= 4 {
                        return vld1q_f32(from);
                    }
                    let mut some = [0f32; 4];
                    std::ptr::copy_nonoverlapping(from, some.as_mut_ptr(), n);
                    vld1q_f32(some.as_ptr())
                }
            }
            #[inline(always)]
            unsafe fn store_n(to: *mut f32, v: float32x4_t, n: usize) {
                // SAFETY: as above; of a partial vector only the first `n` numbers are written.
                unsafe {
                    if n >= 4 {
                        return vst1q_f32(to, v);
                    }
                    let mut all = [0f32; 4];
                    vst1q_f32(all.as_mut_ptr(), v);
                    std::ptr::copy_nonoverlapping(all.as_ptr(), to, n);
                }
            }
            #[inline(always)]
            unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vaddq_f32(a, b) }
            }
            #[inline(always)]
            unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vsubq_f32(a, b) }
            }
            #[inline(always)]
            unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vmulq_f32(a, b) }
            }
            #[inline(always)]
            unsafe fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vdivq_f32(a, b) }
            }
            #[inline(always)]
            unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vmaxq_f32(a, b) }
            }
            #[inline(always)]
            unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vfmaq_f32(c, a, b) }
            }
            #[inline(always)]
            unsafe fn round(v: float32x4_t) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vrndnq_f32(v) }
            }
            #[inline(always)]
            unsafe fn scale(v: float32x4_t, n: float32x4_t) -> float32x4_t {
                // SAFETY: as above.
                unsafe {
                    let exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
                    vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent)))
                }
            }
            #[inline(always)]
            unsafe fn sum(v: float32x4_t) -> f32 {
                // SAFETY: as above.
                unsafe { vaddvq_f32(v) }
            }
            #[inline(always)]
            unsafe fn maximum(v: float32x4_t) -> f32 {
                // SAFETY: as above.
                unsafe { vmaxvq_f32(v) }
            }
            #[inline(always)]
            unsafe fn transpose(rows: &mut [float32x4_t; LANES_MAX]) {
                // SAFETY: as above.
                unsafe {
                    let [a, b, c, d] = [rows[0], rows[1], rows[2], rows[3]];
                    let (ab_even, ab_odd) = (vtrn1q_f32(a, b), vtrn2q_f32(a, b));
                    let (cd_even, cd_odd) = (vtrn1q_f32(c, d), vtrn2q_f32(c, d));
                    rows[0] = vcombine_f32(vget_low_f32(ab_even), vget_low_f32(cd_even));
                    rows[1] = vcombine_f32(vget_low_f32(ab_odd), vget_low_f32(cd_odd));
                    rows[2] = vcombine_f32(vget_high_f32(ab_even), vget_high_f32(cd_even));
                    rows[3] = vcombine_f32(vget_high_f32(ab_odd), vget_high_f32(cd_odd));
                }
            }
            #[inline(always)]
            unsafe fn load_bf16(from: *const u16, n: usize) -> float32x4_t {
                // SAFETY: as above; of a partial vector only the first `n` numbers are read.
                unsafe {
                    let mut some = [0u16; 4];
                    std::ptr::copy_nonoverlapping(from, some.as_mut_ptr(), n.min(4));
                    vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(some.as_ptr())))
                }
            }
            #[inline(always)]
            unsafe fn store_bf16(to: *mut u16, v: float32x4_t, n: usize) {
                // SAFETY: as above; only the first `n` numbers are written.
                unsafe {
                    let mut all = [0u16; 4];
                    vst1_u16(all.as_mut_ptr(), vmovn_u32(narrow(v)));
                    std::ptr::copy_nonoverlapping(all.as_ptr(), to, n.min(4));
                }
            }
            #[inline(always)]
            unsafe fn load_i8(from: *const i8, n: usize) -> float32x4_t {
                // SAFETY: as above; of a partial vector only the first `n` numbers are read.
                unsafe {
                    let mut some = [0i8; 8];
                    std::ptr::copy_nonoverlapping(from, some.as_mut_ptr(), n.min(4));
                    vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(some.as_ptr())))))
                }
            }
            #[inline(always)]
            unsafe fn pairs(low: float32x4_t, high: float32x4_t) -> float32x4_t {
                // SAFETY: as above.
                unsafe {
                    let (low, high) = (vmovn_u32(narrow(low)), vmovn_u32(narrow(high)));
                    vreinterpretq_f32_u16(vcombine_u16(low, high))
                }
            }
            #[inline(always)]
            unsafe fn splat_bits(x: u32) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vreinterpretq_f32_u32(vdupq_n_u32(x)) }
            }
            #[inline(always)]
            unsafe fn dot_pairs(acc: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
                if !$bf16 {
                    unreachable!("this path has no bf16 products");
                }
                let mut sums = acc;
                // SAFETY: the CPU has BF16, the caller's promise; the instruction touches these registers alone.
                unsafe {
                    std::arch::asm!(
                        ".arch_extension bf16",
                        "bfdot {sums:v}.4s, {a:v}.8h, {b:v}.8h",
                        sums = inout(vreg) sums,
                        a = in(vreg) a,
                        b = in(vreg) b,
                        options(pure, nomem, nostack, preserves_flags),
                    );
                }
                sums
            }
            #[inline(always)]
            unsafe fn zip_pairs(a: float32x4_t, b: float32x4_t) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vreinterpretq_f32_u32(vorrq_u32(narrow(a), vshlq_n_u32::<16>(narrow(b)))) }
            }
            #[inline(always)]
            unsafe fn zip_bf16(a: *const u16, b: *const u16, n: usize) -> float32x4_t {
                // SAFETY: as above; of a partial vector only the first `n` numbers are read.
                unsafe {
                    let [a, b] = [a, b].map(|from| {
                        let mut some = [0u16; 4];
                        std::ptr::copy_nonoverlapping(from, some.as_mut_ptr(), n.min(4));
                        vld1_u16(some.as_ptr())
                    });
                    vreinterpretq_f32_u16(vcombine_u16(vzip1_u16(a, b), vzip2_u16(a, b)))
                }
            }
            #[inline(always)]
            unsafe fn tile<const PAIRS: bool>(vectors: usize, t: &Tile) {
                // SAFETY: as above.
                unsafe {
                    match vectors {
                        1 => tile::<Self, 8, 1, PAIRS>(t),
                        2 => tile::<Self, 8, 2, PAIRS>(t),
                        _ => tile::<Self, 8, 3, PAIRS>(t),
                    }
                }
            }
        }
    };
}

neon!(Neon, super::integer::neon::Plain, false);
neon!(NeonDot, super::integer::neon::Dot, false);
neon!(NeonBf16, super::integer::neon::Dot, true);

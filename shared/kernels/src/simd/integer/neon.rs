//! NEON, and the same with the products of four bytes (`dotprod`).

use std::arch::aarch64::*;

use super::{Integers, from_f16, to_f16};
use crate::quantized::{Format, Strip, strip};
use crate::simd::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Plain;

#[derive(Clone, Copy)]
pub(crate) struct Dot;

const LANES: usize = 4;

// SAFETY, for every block below: the CPU has these instructions and pointers reach the lanes that are read or written;
// both are the caller's promise.
macro_rules! integers {
    ($name:ident, $dot:expr) => {
        impl Integers for $name {
            type V = float32x4_t;
            type I = int32x4_t;
            const PAIRED: bool = false;
            const SIGNED: bool = true;
            const STRIP_ROWS: usize = 4;
            const STRIP_VECTORS: usize = 2;

            #[inline(always)]
            unsafe fn load(from: *const u8) -> int32x4_t {
                // SAFETY: as above.
                unsafe { vreinterpretq_s32_u8(vld1q_u8(from)) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut u8, v: int32x4_t) {
                // SAFETY: as above.
                unsafe { vst1q_u8(to, vreinterpretq_u8_s32(v)) }
            }
            #[inline(always)]
            unsafe fn splat(x: i32) -> int32x4_t {
                // SAFETY: as above.
                unsafe { vdupq_n_s32(x) }
            }
            #[inline(always)]
            unsafe fn and(a: int32x4_t, b: int32x4_t) -> int32x4_t {
                // SAFETY: as above.
                unsafe { vandq_s32(a, b) }
            }
            #[inline(always)]
            unsafe fn or(a: int32x4_t, b: int32x4_t) -> int32x4_t {
                // SAFETY: as above.
                unsafe { vorrq_s32(a, b) }
            }
            #[inline(always)]
            unsafe fn xor(a: int32x4_t, b: int32x4_t) -> int32x4_t {
                // SAFETY: as above.
                unsafe { veorq_s32(a, b) }
            }
            #[inline(always)]
            unsafe fn left<const N: u32>(v: int32x4_t) -> int32x4_t {
                // SAFETY: as above.
                unsafe { vshlq_s32(v, vdupq_n_s32(N as i32)) }
            }
            #[inline(always)]
            unsafe fn right<const N: u32>(v: int32x4_t) -> int32x4_t {
                // SAFETY: as above; a negative count shifts to the right.
                unsafe {
                    let shifted = vshlq_u32(vreinterpretq_u32_s32(v), vdupq_n_s32(-(N as i32)));
                    vreinterpretq_s32_u32(shifted)
                }
            }
            #[inline(always)]
            unsafe fn add(a: int32x4_t, b: int32x4_t) -> int32x4_t {
                // SAFETY: as above.
                unsafe { vaddq_s32(a, b) }
            }
            #[inline(always)]
            unsafe fn to_f32(v: int32x4_t) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vcvtq_f32_s32(v) }
            }
            #[inline(always)]
            unsafe fn look_up(table: &[u8; 16], codes: int32x4_t) -> int32x4_t {
                // SAFETY: as above.
                unsafe { vreinterpretq_s32_u8(vqtbl1q_u8(vld1q_u8(table.as_ptr()), vreinterpretq_u8_s32(codes))) }
            }
            #[inline(always)]
            unsafe fn mul_add<const BITS: u32>(sum: int32x4_t, codes: int32x4_t, x: int32x4_t) -> int32x4_t {
                // Codes of fewer bits are positive as signed bytes too.
                // SAFETY: as above.
                unsafe {
                    if $dot {
                        let mut sum = sum;
                        // The intrinsic is not stable yet.
                        std::arch::asm!(
                            ".arch_extension dotprod",
                            "sdot {sum:v}.4s, {codes:v}.16b, {x:v}.16b",
                            sum = inout(vreg) sum,
                            codes = in(vreg) codes,
                            x = in(vreg) x,
                            options(pure, nomem, nostack, preserves_flags)
                        );
                        return sum;
                    }
                    let (codes, x) = (vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(x));
                    let low = vmull_s8(vget_low_s8(codes), vget_low_s8(x));
                    let high = vmull_s8(vget_high_s8(codes), vget_high_s8(x));
                    // Two products of signed bytes fit 16 bits, but for −128 · −128 twice, and x is never −128.
                    vaddq_s32(sum, vpaddlq_s16(vpaddq_s16(low, high)))
                }
            }
            #[inline(always)]
            unsafe fn widen(sum: int32x4_t) -> int32x4_t {
                sum
            }
            #[inline(always)]
            unsafe fn load_f16(from: *const u16) -> float32x4_t {
                // SAFETY: as above.
                unsafe {
                    let halves: [u16; LANES] = from.cast::<[u16; LANES]>().read_unaligned();
                    vld1q_f32(halves.map(from_f16).as_ptr())
                }
            }
            #[inline(always)]
            unsafe fn load_u8(from: *const u8) -> float32x4_t {
                // SAFETY: as above.
                unsafe {
                    let bytes: [u8; LANES] = from.cast::<[u8; LANES]>().read_unaligned();
                    vcvtq_f32_u32(vld1q_u32(bytes.map(u32::from).as_ptr()))
                }
            }
            #[inline(always)]
            unsafe fn store_f16(to: *mut u16, v: float32x4_t) {
                // SAFETY: as above.
                unsafe {
                    let mut numbers = [0.0f32; LANES];
                    vst1q_f32(numbers.as_mut_ptr(), v);
                    to.cast::<[u16; LANES]>().write_unaligned(numbers.map(to_f16));
                }
            }
            #[inline(always)]
            unsafe fn store_i8(to: *mut i8, v: float32x4_t) {
                // SAFETY: as above.
                unsafe {
                    let mut numbers = [0.0f32; LANES];
                    vst1q_f32(numbers.as_mut_ptr(), v);
                    to.cast::<[i8; LANES]>().write_unaligned(numbers.map(|x| x as i8));
                }
            }
            #[inline(always)]
            unsafe fn prefetch(_: *const u8) {}
            #[inline(always)]
            unsafe fn strip<S: Simd<V = float32x4_t, Int = Self>, F: Format>(s: &Strip) {
                // SAFETY: as above.
                unsafe {
                    match s.rows {
                        1 | 2 => strip::<S, F, 4, 2, 2>(s),
                        _ => strip::<S, F, 4, 4, 2>(s),
                    }
                }
            }
        }
    };
}

integers!(Plain, false);
integers!(Dot, true);

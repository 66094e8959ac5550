//! AVX2 with F16C: products of bytes gather in 16 bits.

use std::arch::x86_64::*;

use super::Integers;
use crate::quantized::{Format, Strip, strip};
use crate::simd::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Paired;

/// Two products of a code below `2^bits` and a byte of at most 127 enter a sum of 16 bits each time. The products of eight
/// bits are those of two signed bytes, at most 2 · 128 · 127.
pub(super) fn room(bits: u32) -> usize {
    match bits {
        0..=4 => 8,
        5 => 4,
        6 => 2,
        _ => 1,
    }
}

// SAFETY, for every block below: the CPU has these instructions and pointers reach the lanes that are read or written;
// both are the caller's promise.
impl Integers for Paired {
    type V = __m256;
    type I = __m256i;
    const PAIRED: bool = true;
    const SIGNED: bool = true;
    const FEW_REGISTERS: bool = true;
    const STRIP_ROWS: usize = 4;
    const STRIP_VECTORS: usize = 1;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u8, v: __m256i) {
        // SAFETY: as above.
        unsafe { _mm256_storeu_si256(to.cast(), v) }
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_and_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn xor(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_xor_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn left<const N: u32>(v: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_sll_epi32(v, _mm_cvtsi32_si128(N as i32)) }
    }
    #[inline(always)]
    unsafe fn right<const N: u32>(v: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_srl_epi32(v, _mm_cvtsi32_si128(N as i32)) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn to_f32(v: __m256i) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_cvtepi32_ps(v) }
    }
    #[inline(always)]
    unsafe fn look_up(table: &[u8; 16], codes: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, codes)
        }
    }
    #[inline(always)]
    unsafe fn mul_add<const BITS: u32>(sum: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let products = match BITS < 8 {
                true => _mm256_maddubs_epi16(codes, x),
                // The sign moves from the codes to x.
                false => _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes)),
            };
            _mm256_add_epi16(sum, products)
        }
    }
    #[inline(always)]
    fn room(bits: u32) -> usize {
        room(bits)
    }
    #[inline(always)]
    unsafe fn widen(sum: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_madd_epi16(sum, _mm256_set1_epi16(1)) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, v: __m256) {
        // SAFETY: as above.
        unsafe { _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, v: __m256) {
        // SAFETY: as above.
        unsafe {
            let v = _mm256_cvtps_epi32(v);
            let halves = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            _mm_storel_epi64(to.cast(), _mm_packs_epi16(halves, halves))
        }
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        // SAFETY: as above; an address that is nobody's is no fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn strip<S: Simd<V = __m256, Int = Self>, F: Format>(s: &Strip) {
        // SAFETY: as above.
        unsafe {
            match s.rows {
                1 | 2 => strip::<S, F, 4, 2, 1>(s),
                _ => strip::<S, F, 4, 4, 1>(s),
            }
        }
    }
}

//! AVX-512 (BW), and the same with VNNI's products of four bytes.

use std::arch::x86_64::*;

use super::Integers;
use crate::quantized::{Format, Strip, strip};
use crate::simd::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Plain;

#[derive(Clone, Copy)]
pub(crate) struct Vnni;

// SAFETY, for every block below: the CPU has these instructions and pointers reach the lanes that are read or written;
// both are the caller's promise.
macro_rules! integers {
    ($name:ident, $vnni:expr) => {
        impl Integers for $name {
            type V = __m512;
            type I = __m512i;
            const PAIRED: bool = !$vnni;
            const SIGNED: bool = !$vnni;
            const STRIP_ROWS: usize = 6;
            const STRIP_VECTORS: usize = 2;

            #[inline(always)]
            unsafe fn load(from: *const u8) -> __m512i {
                // SAFETY: as above.
                unsafe { _mm512_loadu_si512(from.cast()) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut u8, v: __m512i) {
                // SAFETY: as above.
                unsafe { _mm512_storeu_si512(to.cast(), v) }
            }
            #[inline(always)]
            unsafe fn splat(x: i32) -> __m512i {
                // SAFETY: as above.
                unsafe { _mm512_set1_epi32(x) }
            }
            #[inline(always)]
            unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
                // SAFETY: as above.
                unsafe { _mm512_and_si512(a, b) }
            }
            #[inline(always)]
            unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
                // SAFETY: as above.
                unsafe { _mm512_or_si512(a, b) }
            }
            #[inline(always)]
            unsafe fn xor(a: __m512i, b: __m512i) -> __m512i {
                // SAFETY: as above.
                unsafe { _mm512_xor_si512(a, b) }
            }
            #[inline(always)]
            unsafe fn left<const N: u32>(v: __m512i) -> __m512i {
                // SAFETY: as above.
                unsafe { _mm512_slli_epi32::<N>(v) }
            }
            #[inline(always)]
            unsafe fn right<const N: u32>(v: __m512i) -> __m512i {
                // SAFETY: as above.
                unsafe { _mm512_srli_epi32::<N>(v) }
            }
            #[inline(always)]
            unsafe fn add(a: __m512i, b: __m512i) -> __m512i {
                // SAFETY: as above.
                unsafe { _mm512_add_epi32(a, b) }
            }
            #[inline(always)]
            unsafe fn to_f32(v: __m512i) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_cvtepi32_ps(v) }
            }
            #[inline(always)]
            unsafe fn look_up(table: &[u8; 16], codes: __m512i) -> __m512i {
                // SAFETY: as above.
                unsafe {
                    let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
                    _mm512_shuffle_epi8(table, codes)
                }
            }
            #[inline(always)]
            unsafe fn mul_add<const BITS: u32>(sum: __m512i, codes: __m512i, x: __m512i) -> __m512i {
                // SAFETY: as above.
                unsafe {
                    if $vnni {
                        _mm512_dpbusd_epi32(sum, codes, x)
                    } else if BITS < 8 {
                        _mm512_add_epi16(sum, _mm512_maddubs_epi16(codes, x))
                    } else {
                        // The sign moves from the codes to x.
                        let negative = _mm512_movepi8_mask(codes);
                        let x = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
                        _mm512_add_epi16(sum, _mm512_maddubs_epi16(_mm512_abs_epi8(codes), x))
                    }
                }
            }
            #[inline(always)]
            fn room(bits: u32) -> usize {
                if $vnni { 8 } else { super::avx2::room(bits) }
            }
            #[inline(always)]
            unsafe fn widen(sum: __m512i) -> __m512i {
                // SAFETY: as above.
                unsafe { if $vnni { sum } else { _mm512_madd_epi16(sum, _mm512_set1_epi16(1)) } }
            }
            #[inline(always)]
            unsafe fn load_f16(from: *const u16) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
            }
            #[inline(always)]
            unsafe fn load_u8(from: *const u8) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
            }
            #[inline(always)]
            unsafe fn store_f16(to: *mut u16, v: __m512) {
                // SAFETY: as above.
                unsafe {
                    let halves = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
                    _mm256_storeu_si256(to.cast(), halves)
                }
            }
            #[inline(always)]
            unsafe fn store_i8(to: *mut i8, v: __m512) {
                // SAFETY: as above.
                unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))) }
            }
            #[inline(always)]
            unsafe fn prefetch(from: *const u8) {
                // SAFETY: as above; an address that is nobody's is no fault.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
            }
            #[inline(always)]
            unsafe fn strip<S: Simd<V = __m512, Int = Self>, F: Format>(s: &Strip) {
                // SAFETY: as above.
                unsafe {
                    match s.rows {
                        1 | 2 => strip::<S, F, 6, 2, 2>(s),
                        3 | 4 => strip::<S, F, 6, 4, 2>(s),
                        _ => strip::<S, F, 6, 6, 2>(s),
                    }
                }
            }
        }
    };
}

integers!(Plain, false);
integers!(Vnni, true);

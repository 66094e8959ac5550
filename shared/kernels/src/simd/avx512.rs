//! AVX-512 (F, BW, DQ, VL): 32 registers of 16 lanes; the same with VNNI's products of bytes, with BF16's of pairs, and
//! with AMX.

use std::arch::x86_64::*;

use super::{LANES_MAX, Simd, amx};
use crate::tile::{Tile, tile};

#[derive(Clone, Copy)]
pub(crate) struct Avx512;

/// The same, with VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Vnni;

/// With VNNI and BF16: every CPU that has the latter has both.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16;

/// With AMX for products of pairs.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Amx;

#[inline(always)]
fn bf16(v: __m512) -> __m512bh {
    // SAFETY: the two types have the same bits.
    unsafe { std::mem::transmute::<__m512, __m512bh>(v) }
}

#[inline(always)]
fn mask(n: usize) -> u16 {
    ((1u32 << n.min(16)) - 1) as u16
}

// SAFETY, for every block below: the CPU has these instructions and pointers reach the lanes that are read or written;
// both are the caller's promise.
macro_rules! avx512 {
    ($name:ident, $integers:ty, $bf16:expr, $amx:expr) => {
        impl Simd for $name {
            type V = __m512;
            type Int = $integers;
            const LANES: usize = 16;
            const MR: usize = if $amx { amx::ROWS } else { 8 };
            const NV: usize = 3;
            const BF16: bool = $bf16;
            const PAIRS_BY_ROW: bool = $amx;

            #[inline(always)]
            unsafe fn splat(x: f32) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_set1_ps(x) }
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_loadu_ps(from) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut f32, v: __m512) {
                // SAFETY: as above.
                unsafe { _mm512_storeu_ps(to, v) }
            }
            #[inline(always)]
            unsafe fn load_n(from: *const f32, n: usize) -> __m512 {
                // SAFETY: as above; masked lanes are not touched.
                unsafe { _mm512_maskz_loadu_ps(mask(n), from) }
            }
            #[inline(always)]
            unsafe fn store_n(to: *mut f32, v: __m512, n: usize) {
                // SAFETY: as above; masked lanes are not touched.
                unsafe { _mm512_mask_storeu_ps(to, mask(n), v) }
            }
            #[inline(always)]
            unsafe fn add(a: __m512, b: __m512) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_add_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn sub(a: __m512, b: __m512) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_sub_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn mul(a: __m512, b: __m512) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_mul_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn div(a: __m512, b: __m512) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_div_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn max(a: __m512, b: __m512) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_max_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_fmadd_ps(a, b, c) }
            }
            #[inline(always)]
            unsafe fn round(v: __m512) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v) }
            }
            #[inline(always)]
            unsafe fn scale(v: __m512, n: __m512) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_scalef_ps(v, n) }
            }
            #[inline(always)]
            unsafe fn sum(v: __m512) -> f32 {
                // SAFETY: as above.
                unsafe { _mm512_reduce_add_ps(v) }
            }
            #[inline(always)]
            unsafe fn maximum(v: __m512) -> f32 {
                // SAFETY: as above.
                unsafe { _mm512_reduce_max_ps(v) }
            }
            #[inline(always)]
            unsafe fn transpose(rows: &mut [__m512; LANES_MAX]) {
                // SAFETY: as above.
                unsafe { transpose(rows) }
            }
            #[inline(always)]
            unsafe fn load_bf16(from: *const u16, n: usize) -> __m512 {
                // SAFETY: as above; masked lanes are not touched.
                unsafe {
                    let bits = match n >= 16 {
                        true => _mm256_loadu_si256(from.cast()),
                        false => _mm256_maskz_loadu_epi16(mask(n), from.cast()),
                    };
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
                }
            }
            #[inline(always)]
            unsafe fn store_bf16(to: *mut u16, v: __m512, n: usize) {
                // SAFETY: as above; masked lanes are not touched.
                unsafe {
                    // As `to_bf16`: add 0x7fff and the lowest bit that stays, then cut. What is not a number stays
                    // one, because its quiet bit is set first.
                    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
                    let bits = _mm512_castps_si512(v);
                    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                    let up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
                    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
                    let bits = _mm512_mask_mov_epi32(up, nan, quiet);
                    let cut = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits));
                    match n >= 16 {
                        true => _mm256_storeu_si256(to.cast(), cut),
                        false => _mm256_mask_storeu_epi16(to.cast(), mask(n), cut),
                    }
                }
            }
            #[inline(always)]
            unsafe fn load_i8(from: *const i8, n: usize) -> __m512 {
                // SAFETY: as above; masked lanes are not touched.
                unsafe {
                    let bytes = match n >= 16 {
                        true => _mm_loadu_si128(from.cast()),
                        false => _mm_maskz_loadu_epi8(mask(n), from),
                    };
                    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
                }
            }
            #[inline(always)]
            unsafe fn pairs(low: __m512, high: __m512) -> __m512 {
                if !$bf16 {
                    unreachable!("this path has no bf16 products");
                }
                // SAFETY: as above; the two types have the same bits.
                unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low)) }
            }
            #[inline(always)]
            unsafe fn splat_bits(x: u32) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_castsi512_ps(_mm512_set1_epi32(x as i32)) }
            }
            #[inline(always)]
            unsafe fn dot_pairs(acc: __m512, a: __m512, b: __m512) -> __m512 {
                if !$bf16 {
                    unreachable!("this path has no bf16 products");
                }
                // SAFETY: as above.
                unsafe { _mm512_dpbf16_ps(acc, bf16(a), bf16(b)) }
            }
            #[inline(always)]
            unsafe fn zip_pairs(a: __m512, b: __m512) -> __m512 {
                if !$bf16 {
                    unreachable!("this path has no bf16 products");
                }
                // SAFETY: as above.
                unsafe {
                    let low = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(a));
                    let high = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(b));
                    let (low, high) = (_mm512_cvtepu16_epi32(low), _mm512_cvtepu16_epi32(high));
                    _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32::<16>(high)))
                }
            }
            #[inline(always)]
            unsafe fn zip_bf16(a: *const u16, b: *const u16, n: usize) -> __m512 {
                // SAFETY: as above; masked lanes are not touched.
                unsafe {
                    let (a, b) = match n >= 16 {
                        true => (_mm256_loadu_si256(a.cast()), _mm256_loadu_si256(b.cast())),
                        false => {
                            let (a, b) = (a.cast(), b.cast());
                            (_mm256_maskz_loadu_epi16(mask(n), a), _mm256_maskz_loadu_epi16(mask(n), b))
                        }
                    };
                    let (low, high) = (_mm512_cvtepu16_epi32(a), _mm512_cvtepu16_epi32(b));
                    _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32::<16>(high)))
                }
            }
            #[inline(always)]
            unsafe fn prefetch(at: *const u8) {
                // SAFETY: a hint touches no memory.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
            }

            #[inline(always)]
            unsafe fn tile<const PAIRS: bool>(vectors: usize, t: &Tile) {
                // SAFETY: as above.
                unsafe {
                    if $amx {
                        return match PAIRS {
                            true => amx::tile_of_pairs(vectors, t),
                            false => amx::tile_of_numbers(vectors, t),
                        };
                    }
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

avx512!(Avx512, super::integer::avx512::Plain, false, false);
avx512!(Avx512Vnni, super::integer::avx512::Vnni, false, false);
avx512!(Avx512Bf16, super::integer::avx512::Vnni, true, false);
avx512!(Avx512Amx, super::integer::avx512::Vnni, true, true);

#[inline(always)]
unsafe fn transpose(rows: &mut [__m512; LANES_MAX]) {
    // SAFETY: the CPU has AVX-512F, the caller's promise.
    unsafe {
        // Pairs of rows, then of pairs: 4 × 4 squares within each 128-bit lane; then the lanes themselves.
        let mut pairs = *rows;
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        let mut quads = *rows;
        for i in 0..4 {
            let p = &pairs[4 * i..4 * i + 4];
            quads[4 * i] = _mm512_shuffle_ps::<0b01_00_01_00>(p[0], p[2]);
            quads[4 * i + 1] = _mm512_shuffle_ps::<0b11_10_11_10>(p[0], p[2]);
            quads[4 * i + 2] = _mm512_shuffle_ps::<0b01_00_01_00>(p[1], p[3]);
            quads[4 * i + 3] = _mm512_shuffle_ps::<0b11_10_11_10>(p[1], p[3]);
        }
        for j in 0..4 {
            let [a, b, c, d] = [quads[j], quads[4 + j], quads[8 + j], quads[12 + j]];
            let ab_even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
            let ab_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
            let cd_even = _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d);
            let cd_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d);
            rows[j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_even, cd_even);
            rows[4 + j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_odd, cd_odd);
            rows[8 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_even, cd_even);
            rows[12 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_odd, cd_odd);
        }
    }
}

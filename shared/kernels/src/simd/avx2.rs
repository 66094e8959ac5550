//! AVX2 with FMA: 16 registers of 8 lanes.

use std::arch::x86_64::*;

use super::{LANES_MAX, Simd};
use crate::tile::{Tile, tile};

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

#[inline(always)]
unsafe fn mask(n: usize) -> __m256i {
    const ONES_THEN_ZEROS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: eight numbers from index 8 − n ≥ 0 lie within the sixteen.
    unsafe { _mm256_loadu_si256(ONES_THEN_ZEROS.as_ptr().add(8 - n.min(8)).cast()) }
}

// SAFETY, for every block below: the CPU has these instructions and pointers reach the lanes that are read or written;
// both are the caller's promise.
impl Simd for Avx2 {
    type V = __m256;
    type Int = super::integer::avx2::Paired;
    const LANES: usize = 8;
    const MR: usize = 6;
    const NV: usize = 2;
    const BF16: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m256) {
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn load_n(from: *const f32, n: usize) -> __m256 {
        // SAFETY: as above; masked lanes are not touched.
        unsafe { if n >= 8 { _mm256_loadu_ps(from) } else { _mm256_maskload_ps(from, mask(n)) } }
    }
    #[inline(always)]
    unsafe fn store_n(to: *mut f32, v: __m256, n: usize) {
        // SAFETY: as above; masked lanes are not touched. Some CPUs take twenty times as long for a masked store.
        unsafe { if n >= 8 { _mm256_storeu_ps(to, v) } else { _mm256_maskstore_ps(to, mask(n), v) } }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn round(v: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v) }
    }
    #[inline(always)]
    unsafe fn scale(v: __m256, n: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        }
    }
    #[inline(always)]
    unsafe fn sum(v: __m256) -> f32 {
        // SAFETY: as above.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    unsafe fn maximum(v: __m256) -> f32 {
        // SAFETY: as above.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [__m256; LANES_MAX]) {
        // SAFETY: as above.
        unsafe {
            let mut pairs = *rows;
            for i in 0..4 {
                pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
            }
            let mut quads = *rows;
            for i in 0..2 {
                let p = &pairs[4 * i..4 * i + 4];
                quads[4 * i] = _mm256_shuffle_ps::<0b01_00_01_00>(p[0], p[2]);
                quads[4 * i + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(p[0], p[2]);
                quads[4 * i + 2] = _mm256_shuffle_ps::<0b01_00_01_00>(p[1], p[3]);
                quads[4 * i + 3] = _mm256_shuffle_ps::<0b11_10_11_10>(p[1], p[3]);
            }
            for j in 0..4 {
                rows[j] = _mm256_permute2f128_ps::<0x20>(quads[j], quads[4 + j]);
                rows[4 + j] = _mm256_permute2f128_ps::<0x31>(quads[j], quads[4 + j]);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16, n: usize) -> __m256 {
        // SAFETY: as above; of a partial vector only the first `n` numbers are read.
        unsafe {
            let bits = match n >= 8 {
                true => _mm_loadu_si128(from.cast()),
                false => {
                    let mut some = [0u16; 8];
                    std::ptr::copy_nonoverlapping(from, some.as_mut_ptr(), n);
                    _mm_loadu_si128(some.as_ptr().cast())
                }
            };
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, v: __m256, n: usize) {
        // SAFETY: as above.
        unsafe {
            // As `to_bf16`: add 0x7fff and the lowest bit that stays, then cut; what is not a number gets its quiet bit.
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let cut = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(up, quiet, nan));
            let packed = _mm256_permute4x64_epi64::<0b00_00_10_00>(_mm256_packus_epi32(cut, cut));
            let mut all = [0u16; 8];
            _mm_storeu_si128(all.as_mut_ptr().cast(), _mm256_castsi256_si128(packed));
            std::ptr::copy_nonoverlapping(all.as_ptr(), to, n.min(8));
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8, n: usize) -> __m256 {
        // SAFETY: as above; of a partial vector only the first `n` numbers are read.
        unsafe {
            let bytes = match n >= 8 {
                true => _mm_loadl_epi64(from.cast()),
                false => {
                    let mut some = [0i8; 8];
                    std::ptr::copy_nonoverlapping(from, some.as_mut_ptr(), n);
                    _mm_loadl_epi64(some.as_ptr().cast())
                }
            };
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))
        }
    }
    unsafe fn pairs(_: __m256, _: __m256) -> __m256 {
        unreachable!("this path has no bf16 products")
    }
    unsafe fn splat_bits(_: u32) -> __m256 {
        unreachable!("this path has no bf16 products")
    }
    unsafe fn dot_pairs(_: __m256, _: __m256, _: __m256) -> __m256 {
        unreachable!("this path has no bf16 products")
    }
    unsafe fn zip_pairs(_: __m256, _: __m256) -> __m256 {
        unreachable!("this path has no bf16 products")
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
            match vectors {
                1 => tile::<Self, 6, 1, PAIRS>(t),
                _ => tile::<Self, 6, 2, PAIRS>(t),
            }
        }
    }
}

//! Rows of activations as signed bytes: `x ≈ d · code`, one `d = max|x| / 127` for each 32 columns.
//!
//! A batch lies in strips of so many rows as the path multiplies at once. Of a strip and a block stand eight quads of each
//! row, a word each, then each row's `d`, its sums of codes of both halves, and `d` times these: 13 words a row.

use super::BLOCK;
use crate::simd::Simd;
use crate::simd::integer::Integers;

/// Words of a row's block.
pub(crate) const QUAD_WORDS: usize = 13;
/// Where what follows the quads stands, in words of a row.
pub(super) const SCALE: usize = 8;
pub(super) const SUM: usize = 9;
pub(super) const SCALED_SUM: usize = 11;

/// Words of a strip of `rows` rows.
pub(crate) fn code_words(columns: usize, rows: usize) -> usize {
    columns / BLOCK * QUAD_WORDS * rows
}

/// Row `row` of the strip of `rows` at `to`.
///
/// # Safety
/// The CPU has `S`; `x` has `columns` numbers, a multiple of 32; the strip has room.
#[inline(always)]
pub(crate) unsafe fn quantize_row<S: Simd>(x: *const f32, columns: usize, to: *mut u32, rows: usize, row: usize) {
    for block in 0..columns / BLOCK {
        // SAFETY: within the row, and the strip.
        unsafe {
            let x = x.add(block * BLOCK);
            let to = to.add(block * QUAD_WORDS * rows + row);
            let (mut largest, mut spoiled) = (S::splat(0.0), S::splat(0.0));
            let mut at = 0;
            while at < BLOCK {
                let v = S::load(x.add(at));
                largest = S::max(largest, S::max(v, S::sub(S::splat(0.0), v)));
                // A maximum may pass over what is not a number; a sum does not.
                spoiled = S::fma(v, S::splat(0.0), spoiled);
                at += S::LANES;
            }
            let largest = S::maximum(largest);
            // What is not a number, or infinite, shall spoil the result and not become a small code.
            let scale = largest / 127.0 + S::sum(spoiled);
            let inverse = if largest > 0.0 && largest.is_finite() { 127.0 / largest } else { 0.0 };
            let inverse = S::splat(inverse);
            let mut codes = [0i8; BLOCK];
            let mut at = 0;
            while at < BLOCK {
                S::Int::store_i8(codes.as_mut_ptr().add(at), S::round(S::mul(S::load(x.add(at)), inverse)));
                at += S::LANES;
            }
            let quads: [u32; 8] = codes.as_ptr().cast::<[u32; 8]>().read_unaligned();
            for (i, quad) in quads.into_iter().enumerate() {
                *to.add(i * rows) = quad;
            }
            let mut sums = [0i32; 2];
            for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<16>().0) {
                *sum = codes.iter().map(|&code| i32::from(code)).sum();
            }
            *to.add(SCALE * rows) = scale.to_bits();
            for (half, sum) in sums.into_iter().enumerate() {
                *to.add((SUM + half) * rows) = sum as u32;
                *to.add((SCALED_SUM + half) * rows) = (scale * sum as f32).to_bits();
            }
        }
    }
}

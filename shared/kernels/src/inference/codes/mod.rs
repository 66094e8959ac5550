//! Keys and values as signed bytes with scales: [`CacheType::Q8_0`](super::CacheType::Q8_0).
//!
//! A run of keys is codes `[quads][16 tokens][4 channels]` and behind them scales `[blocks][16 tokens]`, so that a vector is
//! one quad of each of its tokens, as products of bytes want it; a run of values is codes `[16 tokens][size, whole vectors]`
//! and scales likewise. Where the path multiplies unsigned bytes, codes of keys stand 128 above what they are.

use super::cache::{Kept, RUN, padded};
use crate::rope::HEAD_MAX;
use crate::simd::Simd;
use crate::simd::integer::{Integers, to_f16};

#[cfg(test)]
mod tests;

#[derive(Clone, Copy)]
pub(super) struct Codes {
    pub keys: *mut u8,
    pub values: *mut u8,
    pub size: usize,
}

/// Channels that share a scale.
const BLOCK: usize = 32;
/// Channels whose products a lane sums at once.
const QUAD: usize = 4;
const BLOCK_QUADS: usize = BLOCK / QUAD;
/// Bytes of a run's quad.
const QUAD_BYTES: usize = RUN * QUAD;

const CODE_MAX: f32 = 127.0;
/// The largest code of a query, which its two halves of a byte each make up: `128 · high + low`.
const QUERY_MAX: f32 = 127.0 * 128.0;

/// Vectors at a time, to hide a product's latency.
const CHAINS: usize = 4;

const SIGNS: i32 = 0x8080_8080_u32 as i32;

impl Codes {
    pub(super) fn run_bytes(size: usize) -> [usize; 2] {
        let scales = RUN * size.div_ceil(BLOCK) * size_of::<u16>();
        [QUAD_BYTES * size.div_ceil(QUAD) + scales, RUN * padded(size) + scales]
    }

    fn quads(&self) -> usize {
        self.size.div_ceil(QUAD)
    }

    /// Quads of a block.
    fn quads_of(&self, block: usize) -> std::ops::Range<usize> {
        block * BLOCK_QUADS..self.quads().min((block + 1) * BLOCK_QUADS)
    }

    fn blocks(&self) -> usize {
        self.size.div_ceil(BLOCK)
    }

    /// Codes and scales of a run of keys.
    ///
    /// # Safety
    /// There is such a run.
    #[inline(always)]
    unsafe fn key_run(&self, run: usize) -> (*mut u8, *mut u16) {
        // SAFETY: the caller's promise. Codes are whole words.
        unsafe {
            let codes = self.keys.add(run * Self::run_bytes(self.size)[0]);
            (codes, codes.add(self.quads() * QUAD_BYTES).cast())
        }
    }

    /// The same of values.
    ///
    /// # Safety
    /// There is such a run.
    #[inline(always)]
    unsafe fn value_run(&self, run: usize) -> (*mut i8, *mut u16) {
        // SAFETY: the caller's promise. Codes are whole vectors.
        unsafe {
            let codes = self.values.add(run * Self::run_bytes(self.size)[1]);
            (codes.cast(), codes.add(RUN * padded(self.size)).cast())
        }
    }

    /// Scores of `N` vectors of tokens.
    ///
    /// # Safety
    /// As for [`Kept::score`].
    #[inline(always)]
    unsafe fn score_some<S: Simd, const N: usize>(&self, query: &Query, vector: usize, scores: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe {
            let from: [(*mut u8, *mut u16); N] = std::array::from_fn(|i| {
                let token = (vector + i) * S::LANES;
                let (codes, scales) = self.key_run(token / RUN);
                (codes.add(token % RUN * QUAD), scales.add(token % RUN))
            });
            let mut sums = [S::splat(0.0); N];
            for block in 0..self.blocks() {
                let [high, low] = query.begins[block];
                let mut parts = [[S::Int::splat(high), S::Int::splat(low)]; N];
                for quad in self.quads_of(block) {
                    let [high, low] = query.quads[quad];
                    let x = [S::Int::splat(high), S::Int::splat(low)];
                    for (parts, (codes, _)) in parts.iter_mut().zip(from) {
                        let codes = S::Int::load(codes.add(quad * QUAD_BYTES));
                        for (sum, x) in parts.iter_mut().zip(x) {
                            *sum = products::<S>(*sum, codes, x);
                        }
                    }
                }
                let scale = S::splat(query.scales[block]);
                for ((sum, [high, low]), (_, scales)) in sums.iter_mut().zip(parts).zip(from) {
                    // At most 32 · 127 · 16256: exact in 32 bits.
                    let whole = S::Int::add(S::Int::left::<7>(high), low);
                    let scale = S::mul(scale, S::Int::load_f16(scales.add(block * RUN)));
                    *sum = S::fma(scale, S::Int::to_f32(whole), *sum);
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                S::store(scores.add((vector + i) * S::LANES), sum);
            }
        }
    }

    /// `N` vectors of a mixed value, from `channel` on, which is a multiple of their channels.
    ///
    /// # Safety
    /// As for [`Kept::mix`].
    #[inline(always)]
    unsafe fn mix_some<S: Simd, const N: usize>(
        &self,
        weights: *const f32,
        tokens: usize,
        inverse: f32,
        channel: usize,
        mixed: *mut f32,
    ) {
        // Four vectors lie in one block or are two.
        let blocks = (N * S::LANES).div_ceil(BLOCK);
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [S::splat(0.0); N];
            for run in 0..tokens.div_ceil(RUN) {
                let first = run * RUN;
                let (codes, scales) = self.value_run(run);
                let (codes, scales) = (codes.add(channel), scales.add(channel / BLOCK * RUN));
                // A token's weight times its block's scale.
                let mut scaled = [[0.0f32; RUN]; 2];
                for (block, scaled) in scaled.iter_mut().enumerate().take(blocks) {
                    for at in (0..RUN).step_by(S::LANES) {
                        let scale = S::Int::load_f16(scales.add(block * RUN + at));
                        S::store(scaled.as_mut_ptr().add(at), S::mul(S::load(weights.add(first + at)), scale));
                    }
                }
                let (count, mut token) = (RUN.min(tokens - first), 0);
                while token < count {
                    let codes = codes.add(token * padded(self.size)).cast_const();
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let weight = S::splat(scaled[i * S::LANES / BLOCK][token]);
                        *sum = S::fma(weight, S::load_i8(codes.add(i * S::LANES), S::LANES), *sum);
                    }
                    token += 1;
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                let at = channel + i * S::LANES;
                if at < self.size {
                    S::store_n(mixed.add(at), S::mul(sum, S::splat(inverse)), S::LANES.min(self.size - at));
                }
            }
        }
    }
}

impl Kept for Codes {
    fn size(&self) -> usize {
        self.size
    }

    #[inline(always)]
    unsafe fn put_key<S: Simd>(&self, token: usize, key: *const f32) {
        let mut codes = [0i8; HEAD_MAX];
        // SAFETY: the caller's promise; words of a run are aligned, and this token's are nobody else's.
        unsafe {
            let (to, scales) = self.key_run(token / RUN);
            let token = token % RUN;
            for block in 0..self.blocks() {
                let at = block * BLOCK;
                let count = BLOCK.min(self.size - at);
                *scales.add(block * RUN + token) = quantize::<S>(key.add(at), count, codes.as_mut_ptr().add(at));
            }
            let signs = if S::Int::SIGNED { 0 } else { SIGNS as u32 };
            for (quad, codes) in codes.as_chunks::<QUAD>().0.iter().enumerate().take(self.quads()) {
                let word = u32::from_ne_bytes(codes.map(|code| code as u8));
                *to.add(quad * QUAD_BYTES + token * QUAD).cast::<u32>() = word ^ signs;
            }
        }
    }

    #[inline(always)]
    unsafe fn put_value<S: Simd>(&self, token: usize, value: *const f32) {
        // SAFETY: the caller's promise; rows of values are whole vectors.
        unsafe {
            let (codes, scales) = self.value_run(token / RUN);
            let token = token % RUN;
            let codes = codes.add(token * padded(self.size));
            for block in 0..self.blocks() {
                let at = block * BLOCK;
                let count = BLOCK.min(self.size - at);
                *scales.add(block * RUN + token) = quantize::<S>(value.add(at), count, codes.add(at));
            }
        }
    }

    #[inline(always)]
    unsafe fn score<S: Simd>(&self, query: *const f32, scale: f32, runs: usize, scores: *mut f32) {
        let vectors = runs * RUN / S::LANES;
        // SAFETY: the caller's promise.
        unsafe {
            let query = Query::new::<S>(query, self.size, scale);
            let mut vector = 0;
            while vector + CHAINS <= vectors {
                self.score_some::<S, CHAINS>(&query, vector, scores);
                vector += CHAINS;
            }
            while vector < vectors {
                self.score_some::<S, 1>(&query, vector, scores);
                vector += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn mix<S: Simd>(&self, weights: *const f32, tokens: usize, inverse: f32, mixed: *mut f32) {
        let mut channel = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while channel + CHAINS * S::LANES <= padded(self.size) {
                self.mix_some::<S, CHAINS>(weights, tokens, inverse, channel, mixed);
                channel += CHAINS * S::LANES;
            }
            while channel < self.size {
                self.mix_some::<S, 1>(weights, tokens, inverse, channel, mixed);
                channel += S::LANES;
            }
        }
    }

    #[inline(always)]
    unsafe fn widen_keys<S: Simd>(&self, first: usize, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe {
            let (codes, scales) = self.key_run(first / RUN);
            let byte = S::Int::splat(255);
            for block in 0..self.blocks() {
                for token in (0..RUN).step_by(S::LANES) {
                    // (code + 128) · d − 128 · d, in which nothing is rounded.
                    let scale = S::Int::load_f16(scales.add(block * RUN + token));
                    let below = S::mul(scale, S::splat(-128.0));
                    for quad in self.quads_of(block) {
                        let codes = S::Int::load(codes.add(quad * QUAD_BYTES + token * QUAD));
                        let codes = if S::Int::SIGNED { S::Int::xor(codes, S::Int::splat(SIGNS)) } else { codes };
                        let bytes = [
                            S::Int::and(codes, byte),
                            S::Int::and(S::Int::right::<8>(codes), byte),
                            S::Int::and(S::Int::right::<16>(codes), byte),
                            S::Int::right::<24>(codes),
                        ];
                        for (i, code) in bytes.into_iter().enumerate() {
                            let channel = quad * QUAD + i;
                            if channel < self.size {
                                let key = S::fma(scale, S::Int::to_f32(code), below);
                                S::store(to.add(channel * RUN + token), key);
                            }
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn widen_values<S: Simd>(&self, first: usize, count: usize, to: *mut f32) {
        let row = padded(self.size);
        // SAFETY: the caller's promise.
        unsafe {
            for run in 0..count / RUN {
                let (codes, scales) = self.value_run(first / RUN + run);
                let to = to.add(run * RUN * row);
                for block in 0..self.blocks() {
                    let mut widened = [0.0f32; RUN];
                    for at in (0..RUN).step_by(S::LANES) {
                        S::store(widened.as_mut_ptr().add(at), S::Int::load_f16(scales.add(block * RUN + at)));
                    }
                    for (token, scale) in widened.into_iter().enumerate() {
                        let mut at = block * BLOCK;
                        while at < row.min((block + 1) * BLOCK) {
                            let code = S::load_i8(codes.add(token * row + at), S::LANES);
                            S::store(to.add(token * row + at), S::mul(code, S::splat(scale)));
                            at += S::LANES;
                        }
                    }
                }
            }
        }
    }
}

/// A query as whole numbers of 15 bits, `x ≈ scale · (128 · high + low)`, each block with a scale of its own.
struct Query {
    /// Quads of `high` and of `low`.
    quads: [[i32; 2]; HEAD_MAX / QUAD],
    /// What sums of their products begin with, so that codes that stand 128 too high come out right.
    begins: [[i32; 2]; HEAD_MAX / BLOCK],
    scales: [f32; HEAD_MAX / BLOCK],
}

impl Query {
    /// Scales are multiplied by `scale`.
    ///
    /// # Safety
    /// The CPU has `S`; the query has `size` numbers.
    #[inline(always)]
    unsafe fn new<S: Simd>(query: *const f32, size: usize, scale: f32) -> Self {
        let mut all = Self {
            quads: [[0; 2]; HEAD_MAX / QUAD],
            begins: [[0; 2]; HEAD_MAX / BLOCK],
            scales: [0.0; HEAD_MAX / BLOCK],
        };
        for block in 0..size.div_ceil(BLOCK) {
            let count = BLOCK.min(size - block * BLOCK);
            let mut halves = [[0i8; BLOCK]; 2];
            // SAFETY: the caller's promise; a block is whole vectors.
            unsafe {
                let query = query.add(block * BLOCK);
                let Range { largest, all_finite } = Range::of::<S>(query, count);
                all.scales[block] = (largest / QUERY_MAX + all_finite) * scale;
                let inverse = S::splat(inverse(QUERY_MAX, largest));
                for at in (0..count).step_by(S::LANES) {
                    let x = S::load_n(query.add(at), S::LANES.min(count - at));
                    let code = S::round(S::mul(x, inverse));
                    let high = S::round(S::mul(code, S::splat(1.0 / 128.0)));
                    let low = S::fma(high, S::splat(-128.0), code);
                    S::Int::store_i8(halves[0].as_mut_ptr().add(at), high);
                    S::Int::store_i8(halves[1].as_mut_ptr().add(at), low);
                }
            }
            for (half, codes) in halves.iter().enumerate() {
                for (i, &quad) in codes.as_chunks::<QUAD>().0.iter().enumerate() {
                    all.quads[block * BLOCK_QUADS + i][half] = i32::from_ne_bytes(quad.map(|code| code as u8));
                }
                if !S::Int::SIGNED {
                    all.begins[block][half] = -128 * codes.iter().map(|&code| i32::from(code)).sum::<i32>();
                }
            }
        }
        all
    }
}

/// Adds the products of each lane's four codes and x.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn products<S: Simd>(
    sum: <S::Int as Integers>::I,
    codes: <S::Int as Integers>::I,
    x: <S::Int as Integers>::I,
) -> <S::Int as Integers>::I {
    // SAFETY: the caller's promise.
    unsafe {
        match S::Int::PAIRED {
            // 16 bits hold one sum of two products.
            true => S::Int::add(sum, S::Int::widen(S::Int::mul_add::<8>(S::Int::splat(0), codes, x))),
            false => S::Int::mul_add::<8>(sum, codes, x),
        }
    }
}

/// Codes of up to a block of numbers, and their scale in half precision; codes are stored in whole vectors, zeros behind the
/// last.
///
/// # Safety
/// The CPU has `S`; there are `count` numbers, and there is room.
#[inline(always)]
unsafe fn quantize<S: Simd>(x: *const f32, count: usize, to: *mut i8) -> u16 {
    // SAFETY: the caller's promise.
    unsafe {
        let Range { largest, all_finite } = Range::of::<S>(x, count);
        let scale = to_f16(largest / CODE_MAX + all_finite);
        let inverse = S::splat(if scale == 0 { 0.0 } else { inverse(CODE_MAX, largest) });
        for at in (0..count).step_by(S::LANES) {
            let x = S::load_n(x.add(at), S::LANES.min(count - at));
            S::Int::store_i8(to.add(at), S::round(S::mul(x, inverse)));
        }
        scale
    }
}

/// `codes / largest`, or 0 where that is none.
fn inverse(codes: f32, largest: f32) -> f32 {
    let inverse = codes / largest;
    if inverse.is_finite() { inverse } else { 0.0 }
}

struct Range {
    largest: f32,
    /// 0, or not a number: what is none, or infinite, shall spoil the result and not become a small code.
    all_finite: f32,
}

impl Range {
    /// # Safety
    /// The CPU has `S`; there are `count` numbers.
    #[inline(always)]
    unsafe fn of<S: Simd>(x: *const f32, count: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let zero = S::splat(0.0);
            let (mut largest, mut finite) = (zero, zero);
            for at in (0..count).step_by(S::LANES) {
                let x = S::load_n(x.add(at), S::LANES.min(count - at));
                largest = S::max(largest, S::max(x, S::sub(zero, x)));
                finite = S::fma(x, zero, finite);
            }
            Self { largest: S::maximum(largest), all_finite: S::sum(finite) }
        }
    }
}

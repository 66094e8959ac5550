//! Causal attention over the cache, of one token or of a strip of a prompt's.

use super::cache::{Head, Kept, RUN, padded};
use crate::path::Work;
use crate::simd::{Simd, exp};
use crate::tile::Tile;

/// One head of the newest token.
pub(super) struct Attend {
    pub cache: Head,
    /// The number of tokens in the cache, the newest among them.
    pub tokens: usize,
    pub query: *const f32,
    pub mixed: *mut f32,
    /// Room for as many numbers as there are tokens, whole runs.
    pub scores: *mut f32,
}

impl Work for Attend {
    type Output = ();

    /// # Safety
    /// Also: the pointers reach a head's numbers, and are this thread's where they are written.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.cache {
                Head::F16(cache) => self.over::<S, _>(cache),
                Head::F32(cache) => self.over::<S, _>(cache),
                Head::Q8_0(cache) => self.over::<S, _>(cache),
            }
        }
    }
}

impl Attend {
    /// # Safety
    /// As for `run`; `cache` is the head's.
    #[inline(always)]
    unsafe fn over<S: Simd, K: Kept>(self, cache: K) {
        let Self { cache: _, tokens, query, mixed, scores } = self;
        let runs = tokens.div_ceil(RUN);
        let vectors = runs * RUN / S::LANES;
        // SAFETY: the cache has whole runs of 16 tokens, and so have the scores.
        unsafe {
            cache.score::<S>(query, 1.0 / (cache.size() as f32).sqrt(), runs, scores);
            for token in tokens..runs * RUN {
                *scores.add(token) = f32::NEG_INFINITY;
            }
            let mut largest = S::splat(f32::NEG_INFINITY);
            for vector in 0..vectors {
                largest = S::max(S::load(scores.add(vector * S::LANES)), largest);
            }
            let largest = S::splat(S::maximum(largest));
            let mut sum = S::splat(0.0);
            for vector in 0..vectors {
                let at = scores.add(vector * S::LANES);
                let weight = exp::<S>(S::sub(S::load(at), largest));
                S::store(at, weight);
                sum = S::add(sum, weight);
            }
            cache.mix::<S>(scores, tokens, 1.0 / S::sum(sum), mixed);
        }
    }
}

/// One head of a strip of a prompt's tokens, one token a lane: scores are made transposed, `[keys, strip]`, so that the
/// softmax runs down the lanes and the weights stand as a tile reads them.
pub(super) struct AttendStrip {
    pub cache: Head,
    /// Tokens before the strip's first.
    pub before: usize,
    /// At most [`strip_tokens`].
    pub tokens: usize,
    /// The strip's first query, and the distance to the next; likewise for the result.
    pub queries: *const f32,
    pub query_stride: usize,
    pub mixed: *mut f32,
    pub mixed_stride: usize,
    /// [`scratch_numbers`]
    pub scratch: *mut f32,
}

/// Values are widened so many tokens at a time.
const VALUES: usize = 256;
const STRIP_MAX: usize = 48;

/// Tokens of a strip.
pub(super) struct StripTokens;

impl Work for StripTokens {
    type Output = usize;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> usize {
        S::NV * S::LANES
    }
}

pub(super) fn scratch_numbers(head_size: usize, context: usize) -> usize {
    let size = padded(head_size);
    STRIP_MAX * (size + 2)
        + size * RUN
        + 64
        + context.next_multiple_of(RUN) * STRIP_MAX
        + VALUES * size
        + 64
        + (STRIP_MAX + 16) * size
}

impl Work for AttendStrip {
    type Output = ();

    /// # Safety
    /// Also: the pointers reach the strip's heads, and are this thread's where they are written.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.cache {
                Head::F16(cache) => self.over::<S, _>(cache),
                Head::F32(cache) => self.over::<S, _>(cache),
                Head::Q8_0(cache) => self.over::<S, _>(cache),
            }
        }
    }
}

impl AttendStrip {
    /// # Safety
    /// As for `run`; `cache` is the head's.
    #[inline(always)]
    unsafe fn over<S: Simd, K: Kept>(self, cache: K) {
        let Self { cache: _, before, tokens, queries, query_stride, mixed, mixed_stride, scratch } = self;
        let (size, row) = (cache.size(), padded(cache.size()));
        let lanes = S::NV * S::LANES;
        let keys = (before + tokens).next_multiple_of(RUN);
        let scale = 1.0 / (size as f32).sqrt();
        // SAFETY: the scratch is divided among what follows, as `scratch_numbers` counts it; the cache has whole runs.
        unsafe {
            let panel = scratch;
            let sums = panel.add(lanes * row);
            let run = sums.add(lanes);
            let scores = run.add(size * RUN + 64);
            let values = scores.add(keys * lanes);
            let result = values.add(VALUES * row + 64);
            for lane in 0..lanes {
                for channel in 0..size {
                    let query = if lane < tokens { *queries.add(lane * query_stride + channel) * scale } else { 0.0 };
                    *panel.add(channel * lanes + lane) = query;
                }
            }
            for first in (0..keys).step_by(RUN) {
                cache.widen_keys::<S>(first, run);
                let mut key = 0;
                while key < RUN {
                    let rows = S::MR.min(RUN - key);
                    let tile = Tile::new(size, run.add(key), RUN, panel, lanes);
                    let to = scores.add((first + key) * lanes);
                    S::tile::<false>(S::NV, &tile.into(to, lanes, rows, lanes, false));
                    key += S::MR;
                }
            }
            // A token sees itself and those before it.
            for key in before + 1..keys {
                for lane in 0..lanes.min(key - before) {
                    *scores.add(key * lanes + lane) = f32::NEG_INFINITY;
                }
            }
            for vector in 0..S::NV {
                let at = scores.add(vector * S::LANES);
                let mut largest = S::splat(f32::NEG_INFINITY);
                for key in 0..keys {
                    largest = S::max(S::load(at.add(key * lanes)), largest);
                }
                let mut sum = S::splat(0.0);
                for key in 0..keys {
                    let weight = exp::<S>(S::sub(S::load(at.add(key * lanes)), largest));
                    S::store(at.add(key * lanes), weight);
                    sum = S::add(sum, weight);
                }
                S::store(sums.add(vector * S::LANES), sum);
            }
            for first in (0..keys).step_by(VALUES) {
                let count = VALUES.min(keys - first);
                cache.widen_values::<S>(first, count, values);
                let mut lane = 0;
                while lane < tokens {
                    let mut channel = 0;
                    while channel < row {
                        let vectors = S::NV.min((row - channel) / S::LANES);
                        let a = scores.add(first * lanes + lane);
                        let tile = Tile::new(count, a, lanes, values.add(channel), row);
                        let to = result.add(lane * row + channel);
                        let rows = S::MR.min(tokens - lane);
                        S::tile::<false>(vectors, &tile.into(to, row, rows, vectors * S::LANES, first > 0));
                        channel += vectors * S::LANES;
                    }
                    lane += S::MR;
                }
            }
            for lane in 0..tokens {
                let inverse = S::splat(1.0 / *sums.add(lane));
                let mut at = 0;
                while at < size {
                    let n = S::LANES.min(size - at);
                    let value = S::mul(S::load_n(result.add(lane * row + at), n), inverse);
                    S::store_n(mixed.add(lane * mixed_stride + at), value, n);
                    at += S::LANES;
                }
            }
        }
    }
}

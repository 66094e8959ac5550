//! Codes are those of the formula, and attention over them is that of plain f64 over the same codes, on every path.

use super::super::Shape;
use super::super::attention::{Attend, AttendStrip, StripTokens, scratch_numbers};
use super::super::cache::{Cache, CacheType, Head, Kept, RUN, padded};
use super::{BLOCK, Codes};
use crate::Path;
use crate::path::Work;
use crate::simd::Simd;
use crate::simd::integer::{from_f16, to_f16};

const SIZES: &[usize] = if cfg!(miri) { &[6, 34] } else { &[2, 6, 16, 32, 34, 48, 64, 80, 128, 512] };

/// Numbers of both signs and many sizes; some blocks are zeros, or have one number far above the others.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    let number = |i: usize| {
        let x = ((i * 7919 + seed * 104_729) % 10_007) as f32 / 5_003.5 - 1.0;
        match (i / BLOCK + seed) % 7 {
            0 => 0.0,
            1 if i % BLOCK == 5 => 8.0 * x,
            2 => 1e-4 * x,
            _ => x,
        }
    };
    (0..count).map(number).collect()
}

/// What is kept of a row of numbers.
fn rounded(row: &[f32]) -> Vec<f32> {
    let block = |x: &[f32]| {
        let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let scale = from_f16(to_f16(largest / 127.0));
        let code = move |x: &f32| if scale == 0.0 { 0.0 } else { (x * (127.0 / largest)).round_ties_even() };
        x.iter().map(move |x| scale * code(x)).collect::<Vec<f32>>()
    };
    row.chunks(BLOCK).flat_map(block).collect()
}

/// A query as its whole numbers of 15 bits say.
fn rounded_query(query: &[f32]) -> Vec<f64> {
    let block = |x: &[f32]| {
        let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let inverse = 16256.0 / largest;
        let code = move |x: &f32| if inverse.is_finite() { (x * inverse).round_ties_even() } else { 0.0 };
        x.iter().map(move |x| f64::from(largest / 16256.0) * f64::from(code(x))).collect::<Vec<f64>>()
    };
    query.chunks(BLOCK).flat_map(block).collect()
}

struct Rows {
    size: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
    cache: Cache,
}

struct Put<'a>(&'a Rows, std::ops::Range<usize>);

impl Work for Put<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self(Rows { size, keys, values, cache }, tokens) = self;
        for token in tokens {
            // SAFETY: one thread; there is room for as many tokens as rows.
            unsafe {
                cache.head(1, 1).put_key::<S>(token, keys[token * size..].as_ptr());
                cache.head(1, 1).put_value::<S>(token, values[token * size..].as_ptr());
            }
        }
    }
}

impl Rows {
    fn new(size: usize, tokens: usize, path: Path) -> Self {
        let cache = Cache::new(&shape(size), 2, tokens, CacheType::Q8_0);
        let rows = Self { size, keys: numbers(tokens * size, 1), values: numbers(tokens * size, 2), cache };
        path.run(Put(&rows, 0..tokens));
        rows
    }

    fn codes(&self) -> Codes {
        let Head::Q8_0(codes) = self.cache.head(1, 1) else { panic!("the cache is of codes") };
        codes
    }

    /// Mixed values, and the sum of the magnitudes that were added.
    fn attend(&self, query: &[f64], tokens: usize) -> (Vec<f64>, f64) {
        let row = |all: &[f32], token: usize| rounded(&all[token * self.size..][..self.size]);
        let score = |token: usize| -> f64 {
            let products = row(&self.keys, token).into_iter().zip(query).map(|(k, q)| f64::from(k) * q);
            products.sum::<f64>() / (self.size as f64).sqrt()
        };
        let scores: Vec<f64> = (0..tokens).map(score).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mut mixed = vec![0.0; self.size];
        let mut most = 0.0f64;
        for (token, weight) in weights.iter().enumerate() {
            for (mixed, value) in mixed.iter_mut().zip(row(&self.values, token)) {
                *mixed += weight / sum * f64::from(value);
                most = most.max(f64::from(value.abs()));
            }
        }
        (mixed, most)
    }
}

fn shape(head_size: usize) -> Shape {
    let frequencies = vec![0.1; head_size / 2];
    Shape { width: 32, ffn: 32, heads: 2, kv_heads: 2, head_size, vocabulary: 32, epsilon: 1e-5, frequencies }
}

struct Widen(Codes, usize);

impl Work for Widen {
    type Output = [Vec<f32>; 2];
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> [Vec<f32>; 2] {
        let Self(codes, tokens) = self;
        let mut keys = vec![f32::NAN; tokens * codes.size];
        let mut values = vec![f32::NAN; tokens * padded(codes.size)];
        // SAFETY: there are so many tokens, whole runs.
        unsafe {
            for first in (0..tokens).step_by(RUN) {
                codes.widen_keys::<S>(first, keys.as_mut_ptr().add(first * codes.size));
            }
            // The first run alone, then the others.
            codes.widen_values::<S>(0, RUN, values.as_mut_ptr());
            codes.widen_values::<S>(RUN, tokens - RUN, values.as_mut_ptr().add(RUN * padded(codes.size)));
        }
        [keys, values]
    }
}

#[test]
fn every_path_keeps_the_numbers_of_the_formula() {
    let tokens = 3 * RUN;
    for &size in SIZES {
        for path in Path::available() {
            let rows = Rows::new(size, tokens, path);
            let [keys, values] = path.run(Widen(rows.codes(), tokens));
            for token in 0..tokens {
                let [key, value] = [&rows.keys, &rows.values].map(|all| rounded(&all[token * size..][..size]));
                for channel in 0..size {
                    let found = keys[token / RUN * RUN * size + channel * RUN + token % RUN];
                    assert_eq!(found, key[channel], "{path:?}: key {token}, channel {channel} of {size}");
                    let found = values[token * padded(size) + channel];
                    assert_eq!(found, value[channel], "{path:?}: value {token}, channel {channel} of {size}");
                }
            }
        }
    }
}

#[test]
fn one_token_attends_as_f64_does_over_the_same_codes() {
    let lengths: &[usize] = if cfg!(miri) { &[17] } else { &[1, 15, 16, 17, 100, 131] };
    for &size in SIZES {
        for path in Path::available() {
            let most = *lengths.last().expect("lengths");
            let rows = Rows::new(size, most, path);
            for &tokens in lengths {
                let query = numbers(size, tokens + 3);
                let mut mixed = vec![f32::NAN; size];
                let mut scores = vec![f32::NAN; most.next_multiple_of(RUN)];
                let cache = rows.cache.head(1, 1);
                let (to, scores) = (mixed.as_mut_ptr(), scores.as_mut_ptr());
                path.run(Attend { cache, tokens, query: query.as_ptr(), mixed: to, scores });
                let (expected, size_of_values) = rows.attend(&rounded_query(&query), tokens);
                for (channel, (found, expected)) in mixed.iter().zip(&expected).enumerate() {
                    let error = (f64::from(*found) - expected).abs() / size_of_values;
                    assert!(error < 2e-5, "{path:?}: {tokens} tokens, channel {channel} of {size}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn a_strip_attends_as_f64_does_over_the_same_codes() {
    for &size in SIZES {
        for path in Path::available() {
            let strip = path.run(StripTokens);
            let context = 50 + strip;
            let rows = Rows::new(size, context, path);
            for (before, tokens) in [(0, 1), (0, strip), (13, 3), (50, strip)] {
                let queries = numbers(tokens * size, before + 5);
                let mut mixed = vec![f32::NAN; tokens * size];
                // Kernels read a vector behind.
                let mut scratch = vec![f32::NAN; scratch_numbers(size, context) + 64];
                let work = AttendStrip {
                    cache: rows.cache.head(1, 1),
                    before,
                    tokens,
                    queries: queries.as_ptr(),
                    query_stride: size,
                    mixed: mixed.as_mut_ptr(),
                    mixed_stride: size,
                    scratch: scratch.as_mut_ptr(),
                };
                path.run(work);
                for token in 0..tokens {
                    let query: Vec<f64> = queries[token * size..][..size].iter().copied().map(f64::from).collect();
                    let (expected, size_of_values) = rows.attend(&query, before + token + 1);
                    for (found, expected) in mixed[token * size..][..size].iter().zip(&expected) {
                        let error = (f64::from(*found) - expected).abs() / size_of_values;
                        assert!(error < 2e-5, "{path:?}: token {token} behind {before}, of {size}: {error:e}");
                    }
                }
            }
        }
    }
}

struct Score(Codes, *const f32, *mut f32);

impl Work for Score {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self(codes, query, scores) = self;
        // SAFETY: there is a run of keys and of scores, and a query.
        unsafe { codes.score::<S>(query, 1.0, 1, scores) }
    }
}

#[test]
fn what_is_not_finite_becomes_no_code() {
    let (size, tokens) = (48, RUN);
    for path in Path::available() {
        for bad in [f32::NAN, f32::INFINITY] {
            // In the first vector of a block, in one behind it, and in the last block.
            for at in [0, 31, 33] {
                let mut rows = Rows::new(size, tokens, path);
                let mut query = numbers(size, 4);
                rows.keys[2 * size + at] = bad;
                rows.values[2 * size + at] = bad;
                path.run(Put(&rows, 0..tokens));
                let mut scores = [0.0; RUN];
                path.run(Score(rows.codes(), query.as_ptr(), scores.as_mut_ptr()));
                let spoiled: Vec<usize> = (0..RUN).filter(|&token| scores[token].is_nan()).collect();
                assert_eq!(spoiled, [2], "{path:?}: {bad} in a key at {at}");
                let [_, values] = path.run(Widen(rows.codes(), RUN));
                assert!(values[2 * padded(size) + at].is_nan(), "{path:?}: {bad} in a value at {at}");
                query[at] = bad;
                path.run(Score(rows.codes(), query.as_ptr(), scores.as_mut_ptr()));
                assert!(scores.iter().all(|score| score.is_nan()), "{path:?}: {bad} in a query at {at}");
            }
        }
    }
}

#[test]
fn a_number_takes_eight_and_a_half_bits() {
    let bits = |size: usize, ty: CacheType| {
        let [keys, values] = ty.run_bytes(size);
        (keys + values) as f64 * 8.0 / (2 * RUN * size) as f64
    };
    for size in [32, 64, 96, 128] {
        assert_eq!([CacheType::F32, CacheType::F16, CacheType::Q8_0].map(|ty| bits(size, ty)), [32.0, 16.0, 8.5]);
    }
    // The last block is short.
    assert_eq!(bits(80, CacheType::Q8_0), 8.0 + 16.0 * 3.0 / 80.0);
}

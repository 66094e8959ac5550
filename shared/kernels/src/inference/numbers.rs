//! Keys and values as numbers of f16 or f32.

use super::cache::{Kept, RUN, padded};
use crate::simd::Simd;
use crate::simd::integer::{Integers, to_f16};

/// Keys as `[tokens / 16][size][16]`, so that a vector holds one channel of 16 tokens; values as `[tokens][size, whole
/// vectors]`.
#[derive(Clone, Copy)]
pub(super) struct Numbers<T> {
    pub keys: *mut T,
    pub values: *mut T,
    pub size: usize,
}

/// What keys and values are kept as.
pub(super) trait Number: Copy {
    fn of(x: f32) -> Self;

    /// # Safety
    /// The CPU has `S`; the pointer reaches a vector.
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;

    /// # Safety
    /// As for `load`.
    unsafe fn store<S: Simd>(to: *mut Self, v: S::V);
}

/// Bits of an f16.
impl Number for u16 {
    fn of(x: f32) -> Self {
        to_f16(x)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::Int::load_f16(from) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { S::Int::store_f16(to, v) }
    }
}

impl Number for f32 {
    fn of(x: f32) -> Self {
        x
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load(from) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { S::store(to, v) }
    }
}

/// Chains of sums at a time, to hide an `fma`'s latency.
const CHAINS: usize = 4;

impl<T: Number> Numbers<T> {
    pub(super) fn run_bytes(size: usize) -> [usize; 2] {
        [RUN * size * size_of::<T>(), RUN * padded(size) * size_of::<T>()]
    }

    /// # Safety
    /// There is room for the token.
    unsafe fn value(&self, token: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.values.add(token * padded(self.size)) }
    }
}

impl<T: Number> Kept for Numbers<T> {
    fn size(&self) -> usize {
        self.size
    }

    #[inline(always)]
    unsafe fn put_key<S: Simd>(&self, token: usize, key: *const f32) {
        // The next channel is `RUN` behind.
        // SAFETY: the caller's promise.
        unsafe {
            let to = self.keys.add(token / RUN * RUN * self.size + token % RUN);
            for channel in 0..self.size {
                *to.add(channel * RUN) = T::of(*key.add(channel));
            }
        }
    }

    #[inline(always)]
    unsafe fn put_value<S: Simd>(&self, token: usize, value: *const f32) {
        let mut at = 0;
        while at < self.size {
            let n = S::LANES.min(self.size - at);
            // SAFETY: rows of values are whole vectors.
            unsafe { T::store::<S>(self.value(token).add(at), S::load_n(value.add(at), n)) }
            at += S::LANES;
        }
    }

    #[inline(always)]
    unsafe fn score<S: Simd>(&self, query: *const f32, scale: f32, runs: usize, scores: *mut f32) {
        let size = self.size;
        let vectors = runs * RUN / S::LANES;
        // SAFETY: the caller's promise; the cache has whole runs of 16 tokens.
        unsafe {
            let keys = |vector: usize| {
                let token = vector * S::LANES;
                self.keys.add(token / RUN * RUN * size + token % RUN).cast_const()
            };
            let mut vector = 0;
            while vector < vectors {
                let many = CHAINS.min(vectors - vector);
                let mut sums = [S::splat(0.0); CHAINS];
                if many == CHAINS {
                    let from = [keys(vector), keys(vector + 1), keys(vector + 2), keys(vector + 3)];
                    for channel in 0..size {
                        let q = S::splat(*query.add(channel));
                        for (sum, from) in sums.iter_mut().zip(from) {
                            *sum = S::fma(q, T::load::<S>(from.add(channel * RUN)), *sum);
                        }
                    }
                } else {
                    for (i, sum) in sums.iter_mut().enumerate() {
                        if i < many {
                            let from = keys(vector + i);
                            for channel in 0..size {
                                let q = S::splat(*query.add(channel));
                                *sum = S::fma(q, T::load::<S>(from.add(channel * RUN)), *sum);
                            }
                        }
                    }
                }
                for (i, sum) in sums.into_iter().enumerate() {
                    if i < many {
                        S::store(scores.add((vector + i) * S::LANES), S::mul(sum, S::splat(scale)));
                    }
                }
                vector += many;
            }
        }
    }

    #[inline(always)]
    unsafe fn mix<S: Simd>(&self, weights: *const f32, tokens: usize, inverse: f32, mixed: *mut f32) {
        let size = self.size;
        // SAFETY: the caller's promise; rows of values are whole vectors.
        unsafe {
            let inverse = S::splat(inverse);
            let mut channel = 0;
            while channel < size {
                let many = CHAINS.min((size - channel).div_ceil(S::LANES));
                let mut sums = [S::splat(0.0); CHAINS];
                let from = self.values.add(channel).cast_const();
                if many == CHAINS {
                    for token in 0..tokens {
                        let weight = S::splat(*weights.add(token));
                        let from = from.add(token * padded(size));
                        for (i, sum) in sums.iter_mut().enumerate() {
                            *sum = S::fma(weight, T::load::<S>(from.add(i * S::LANES)), *sum);
                        }
                    }
                } else {
                    for (i, sum) in sums.iter_mut().enumerate() {
                        if i < many {
                            for token in 0..tokens {
                                let value = T::load::<S>(from.add(token * padded(size) + i * S::LANES));
                                *sum = S::fma(S::splat(*weights.add(token)), value, *sum);
                            }
                        }
                    }
                }
                for (i, sum) in sums.into_iter().enumerate() {
                    if i < many {
                        let at = channel + i * S::LANES;
                        S::store_n(mixed.add(at), S::mul(sum, inverse), S::LANES.min(size - at));
                    }
                }
                channel += CHAINS * S::LANES;
            }
        }
    }

    #[inline(always)]
    unsafe fn widen_keys<S: Simd>(&self, first: usize, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { widen::<S, T>(self.keys.add(first * self.size), self.size * RUN, to) }
    }

    #[inline(always)]
    unsafe fn widen_values<S: Simd>(&self, first: usize, count: usize, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { widen::<S, T>(self.value(first), count * padded(self.size), to) }
    }
}

/// # Safety
/// The CPU has `S`; there are `count` numbers, whole vectors.
#[inline(always)]
unsafe fn widen<S: Simd, T: Number>(from: *const T, count: usize, to: *mut f32) {
    let mut at = 0;
    while at < count {
        // SAFETY: the caller's promise.
        unsafe { S::store(to.add(at), T::load::<S>(from.add(at))) }
        at += S::LANES;
    }
}

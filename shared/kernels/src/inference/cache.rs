//! Keys and values of one sequence.

use super::Shape;
use super::codes::Codes;
use super::numbers::Numbers;
use crate::region::Region;
use crate::simd::Simd;

/// Tokens of a run.
pub(super) const RUN: usize = 16;

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    /// In half precision, as llama.cpp does.
    #[default]
    F16,
    /// As they were computed, in twice the memory: for who compares sequences, because sums that differ in their last bit are
    /// rounded to f16 now to one side and now to the other.
    F32,
    /// As signed bytes, `x ≈ d · code`, in 8.5 bits a number: 32 channels of a token's head, the last of them fewer where the
    /// head is no multiple of that, share `d = max|x| / 127`, kept in half precision; `code = x · 127 / max|x|`, rounded to
    /// the nearest, ties to even (ggml's q8_0). Where one token attends, its query is rounded likewise, to 15 bits.
    Q8_0,
}

impl CacheType {
    /// Bytes of a run of one head's keys, and of its values.
    pub(super) fn run_bytes(self, head_size: usize) -> [usize; 2] {
        match self {
            Self::F16 => Numbers::<u16>::run_bytes(head_size),
            Self::F32 => Numbers::<f32>::run_bytes(head_size),
            Self::Q8_0 => Codes::run_bytes(head_size),
        }
    }
}

/// For every block and key-value head, runs of 16 tokens. Memory that no token has reached is not touched.
pub(super) struct Cache {
    ty: CacheType,
    keys: Region,
    values: Region,
    /// Of a head.
    runs: usize,
    kv_heads: usize,
    head_size: usize,
}

/// The keys and values of one head.
#[derive(Clone, Copy)]
pub(super) enum Head {
    F16(Numbers<u16>),
    F32(Numbers<f32>),
    Q8_0(Codes),
}

/// The same in one form, and what attention needs of it.
pub(super) trait Kept: Copy {
    /// Channels.
    fn size(&self) -> usize;

    /// # Safety
    /// The CPU has `S`; there is room for the token, and nobody else writes it; `key` has `size` numbers.
    unsafe fn put_key<S: Simd>(&self, token: usize, key: *const f32);

    /// # Safety
    /// As for `put_key`.
    unsafe fn put_value<S: Simd>(&self, token: usize, value: *const f32);

    /// `scores[token] = scale · query · key`, of all tokens of the first runs.
    ///
    /// # Safety
    /// The CPU has `S`; there are so many runs; `query` has `size` numbers.
    unsafe fn score<S: Simd>(&self, query: *const f32, scale: f32, runs: usize, scores: *mut f32);

    /// `mixed = inverse · Σ weights[token] · value`, of the first `tokens`.
    ///
    /// # Safety
    /// The CPU has `S`; there are so many tokens, and weights of whole runs; `mixed` has room for `size` numbers.
    unsafe fn mix<S: Simd>(&self, weights: *const f32, tokens: usize, inverse: f32, mixed: *mut f32);

    /// The run of keys from token `first` on as f32, `[size][RUN]`.
    ///
    /// # Safety
    /// The CPU has `S`; there are such tokens.
    unsafe fn widen_keys<S: Simd>(&self, first: usize, to: *mut f32);

    /// Values of `count` tokens from `first` on, whole runs, as f32, `[count][padded(size)]`.
    ///
    /// # Safety
    /// The CPU has `S`; there are such tokens.
    unsafe fn widen_values<S: Simd>(&self, first: usize, count: usize, to: *mut f32);
}

pub(super) fn padded(head_size: usize) -> usize {
    head_size.next_multiple_of(RUN)
}

impl Cache {
    pub(super) fn new(shape: &Shape, blocks: usize, context: usize, ty: CacheType) -> Self {
        let runs = context.div_ceil(RUN);
        let &Shape { kv_heads, head_size, .. } = shape;
        let region = |run_bytes: usize| {
            let all = [blocks.max(1), kv_heads, runs, run_bytes];
            let bytes = all.into_iter().try_fold(1usize, usize::checked_mul).expect("a size in memory");
            // Whole vectors are read.
            Region::new(bytes + 64, false)
        };
        let [keys, values] = ty.run_bytes(head_size).map(region);
        Self { ty, keys, values, runs, kv_heads, head_size }
    }

    pub(super) fn head(&self, block: usize, head: usize) -> Head {
        let runs = (block * self.kv_heads + head) * self.runs;
        let [keys, values] = self.ty.run_bytes(self.head_size);
        // SAFETY: the head lies within the memory.
        let (keys, values) =
            unsafe { (self.keys.start().as_ptr().add(runs * keys), self.values.start().as_ptr().add(runs * values)) };
        let size = self.head_size;
        match self.ty {
            CacheType::F16 => Head::F16(Numbers { keys: keys.cast(), values: values.cast(), size }),
            CacheType::F32 => Head::F32(Numbers { keys: keys.cast(), values: values.cast(), size }),
            CacheType::Q8_0 => Head::Q8_0(Codes { keys, values, size }),
        }
    }
}

impl Head {
    /// # Safety
    /// As for [`Kept::put_key`].
    #[inline(always)]
    pub(super) unsafe fn put_key<S: Simd>(&self, token: usize, key: *const f32) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F16(head) => head.put_key::<S>(token, key),
                Self::F32(head) => head.put_key::<S>(token, key),
                Self::Q8_0(head) => head.put_key::<S>(token, key),
            }
        }
    }

    /// # Safety
    /// As for `put_key`.
    #[inline(always)]
    pub(super) unsafe fn put_value<S: Simd>(&self, token: usize, value: *const f32) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F16(head) => head.put_value::<S>(token, value),
                Self::F32(head) => head.put_value::<S>(token, value),
                Self::Q8_0(head) => head.put_value::<S>(token, value),
            }
        }
    }
}

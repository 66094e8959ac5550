//! Keys and values of one sequence.

use super::Shape;
use crate::quantized::Region;
use crate::simd::Simd;
use crate::simd::integer::{Integers, to_f16};

/// Tokens of a run of keys.
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
}

impl CacheType {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F16 => size_of::<u16>(),
            Self::F32 => size_of::<f32>(),
        }
    }
}

/// For every block and key-value head: keys as `[tokens / 16][head_size][16]`, so that a vector holds one channel of 16
/// tokens; values as `[tokens][head_size, whole vectors]`. Memory that no token has reached is not touched.
pub(super) struct Cache {
    ty: CacheType,
    keys: Region,
    values: Region,
    capacity: usize,
    kv_heads: usize,
    head_size: usize,
}

/// The keys and values of one head.
#[derive(Clone, Copy)]
pub(super) enum Head {
    F16(Kept<u16>),
    F32(Kept<f32>),
}

/// The same, of numbers that are kept as `T`.
#[derive(Clone, Copy)]
pub(super) struct Kept<T> {
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

pub(super) fn padded(head_size: usize) -> usize {
    head_size.next_multiple_of(RUN)
}

impl Cache {
    pub(super) fn new(shape: &Shape, blocks: usize, context: usize, ty: CacheType) -> Self {
        let capacity = context.next_multiple_of(RUN);
        let &Shape { kv_heads, head_size, .. } = shape;
        let bytes = |size: usize| {
            let all = [blocks.max(1), kv_heads, capacity, size, ty.bytes()];
            all.into_iter().try_fold(1usize, usize::checked_mul).expect("a size in memory")
        };
        // Whole vectors are read.
        let [keys, values] = [bytes(head_size), bytes(padded(head_size))].map(|bytes| Region::new(bytes + 64, false));
        Self { ty, keys, values, capacity, kv_heads, head_size }
    }

    pub(super) fn head(&self, block: usize, head: usize) -> Head {
        let at = (block * self.kv_heads + head) * self.capacity;
        // SAFETY: the head lies within the memory.
        unsafe {
            match self.ty {
                CacheType::F16 => Head::F16(self.kept(at)),
                CacheType::F32 => Head::F32(self.kept(at)),
            }
        }
    }

    /// # Safety
    /// So many tokens lie before it, and numbers are kept as `T`.
    unsafe fn kept<T>(&self, at: usize) -> Kept<T> {
        let size = self.head_size;
        // SAFETY: the caller's promise.
        unsafe {
            let [keys, values] = [&self.keys, &self.values].map(|region| region.start().as_ptr().cast::<T>());
            Kept { keys: keys.add(at * size), values: values.add(at * padded(size)), size }
        }
    }
}

impl Head {
    /// # Safety
    /// There is room for the token, and nobody else writes it; `key` has `size` numbers.
    pub(super) unsafe fn put_key(&self, token: usize, key: *const f32) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F16(head) => head.put_key(token, key),
                Self::F32(head) => head.put_key(token, key),
            }
        }
    }

    /// # Safety
    /// The CPU has `S`; as for `put_key`.
    #[inline(always)]
    pub(super) unsafe fn put_value<S: Simd>(&self, token: usize, value: *const f32) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F16(head) => head.put_value::<S>(token, value),
                Self::F32(head) => head.put_value::<S>(token, value),
            }
        }
    }
}

impl<T: Number> Kept<T> {
    /// # Safety
    /// As for [`Head::put_key`].
    unsafe fn put_key(&self, token: usize, key: *const f32) {
        // The next channel is `RUN` behind.
        // SAFETY: the caller's promise.
        unsafe {
            let to = self.keys.add(token / RUN * RUN * self.size + token % RUN);
            for channel in 0..self.size {
                *to.add(channel * RUN) = T::of(*key.add(channel));
            }
        }
    }

    /// # Safety
    /// There is room for the token.
    pub(super) unsafe fn value(&self, token: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.values.add(token * padded(self.size)) }
    }

    /// # Safety
    /// The CPU has `S`; as for `put_key`.
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
}

//! Keys and values of one sequence, in half precision.

use super::Shape;
use crate::quantized::Region;
use crate::simd::Simd;
use crate::simd::integer::to_f16;

/// Tokens of a run of keys.
pub(super) const RUN: usize = 16;

/// For every block and key-value head: keys as `[tokens / 16][head_size][16]`, so that a vector holds one channel of 16
/// tokens; values as `[tokens][head_size, whole vectors]`. Memory that no token has reached is not touched.
pub(super) struct Cache {
    keys: Region,
    values: Region,
    capacity: usize,
    kv_heads: usize,
    head_size: usize,
}

/// The keys and values of one head.
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub keys: *mut u16,
    pub values: *mut u16,
    pub size: usize,
}

pub(super) fn padded(head_size: usize) -> usize {
    head_size.next_multiple_of(RUN)
}

impl Cache {
    pub(super) fn new(shape: &Shape, blocks: usize, context: usize) -> Self {
        let capacity = context.next_multiple_of(RUN);
        let &Shape { kv_heads, head_size, .. } = shape;
        let bytes = |size: usize| {
            let all = [blocks.max(1), kv_heads, capacity, size, 2];
            all.into_iter().try_fold(1usize, usize::checked_mul).expect("a size in memory")
        };
        // Whole vectors are read.
        let [keys, values] = [bytes(head_size), bytes(padded(head_size))].map(|bytes| Region::new(bytes + 64, false));
        Self { keys, values, capacity, kv_heads, head_size }
    }

    pub(super) fn head(&self, block: usize, head: usize) -> Head {
        let at = (block * self.kv_heads + head) * self.capacity;
        let size = self.head_size;
        // SAFETY: the head lies within the memory.
        unsafe {
            let [keys, values] = [&self.keys, &self.values].map(|region| region.start().as_ptr().cast::<u16>());
            Head { keys: keys.add(at * size), values: values.add(at * padded(size)), size }
        }
    }
}

impl Head {
    /// # Safety
    /// There is room for the token, and nobody else writes it; `key` has `size` numbers.
    pub(super) unsafe fn put_key(&self, token: usize, key: *const f32) {
        for channel in 0..self.size {
            // SAFETY: the caller's promise.
            unsafe { *self.key(token).add(channel * RUN) = to_f16(*key.add(channel)) }
        }
    }

    /// Where the first channel of a token's key is; the next is `RUN` behind it.
    ///
    /// # Safety
    /// There is room for the token.
    pub(super) unsafe fn key(&self, token: usize) -> *mut u16 {
        // SAFETY: the caller's promise.
        unsafe { self.keys.add(token / RUN * RUN * self.size + token % RUN) }
    }

    /// # Safety
    /// As for `key`.
    pub(super) unsafe fn value(&self, token: usize) -> *mut u16 {
        // SAFETY: the caller's promise.
        unsafe { self.values.add(token * padded(self.size)) }
    }

    /// # Safety
    /// The CPU has `S`; as for `put_key`.
    #[inline(always)]
    pub(super) unsafe fn put_value<S: Simd>(&self, token: usize, value: *const f32) {
        use crate::simd::integer::Integers;
        let mut at = 0;
        while at < self.size {
            let n = S::LANES.min(self.size - at);
            // SAFETY: rows of values are whole vectors.
            unsafe { S::Int::store_f16(self.value(token).add(at), S::load_n(value.add(at), n)) }
            at += S::LANES;
        }
    }
}

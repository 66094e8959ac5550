//! Activations that wait for the backward pass: as they are, or as bf16.

use std::ops::Range;

use crate::buffer::Buffer;
use crate::engine::{Engine, Shared, Task};
use crate::simd::Simd;

pub(crate) enum Kept {
    F32(Buffer<f32>),
    Bf16(Buffer<u16>),
}

/// Numbers of a task.
const NUMBERS: usize = 1 << 16;

impl Kept {
    pub(crate) fn new(engine: &Engine, numbers: Buffer<f32>) -> Self {
        struct Narrow<'a>(&'a [f32], Shared<u16>);
        impl Task for Narrow<'_> {
            const KERNEL: &'static str = "keep";

            #[inline(always)]
            unsafe fn run<S: Simd>(&self, i: usize) {
                let end = self.0.len().min((i + 1) * NUMBERS);
                let mut at = i * NUMBERS;
                while at < end {
                    let n = S::LANES.min(end - at);
                    // SAFETY: within both slices; this task alone writes these numbers.
                    unsafe { S::store_bf16(self.1.0.add(at), S::load_n(self.0.as_ptr().add(at), n), n) }
                    at += S::LANES;
                }
            }
        }
        if !engine.keeps_bf16() {
            return Self::F32(numbers);
        }
        let mut narrow = engine.take::<u16>(numbers.len());
        let to = Shared(narrow.as_mut_ptr());
        engine.parallel(numbers.len().div_ceil(NUMBERS), &Narrow(&numbers, to));
        Self::Bf16(narrow)
    }

    pub(crate) fn widened(self, engine: &Engine) -> Buffer<f32> {
        match self {
            Self::F32(numbers) => numbers,
            Self::Bf16(narrow) => {
                let mut wide = engine.take(narrow.len());
                widen(engine, &narrow, &mut wide);
                wide
            }
        }
    }

    /// Some numbers of each, one after the other, widened.
    pub(crate) fn gathered(engine: &Engine, parts: &[(&Self, Range<usize>)]) -> Self {
        let mut wide = engine.take(parts.iter().map(|(_, numbers)| numbers.len()).sum());
        let mut at = 0;
        for (kept, numbers) in parts {
            let to = &mut wide[at..at + numbers.len()];
            match kept {
                Self::F32(from) => to.copy_from_slice(&from[numbers.clone()]),
                Self::Bf16(from) => widen(engine, &from[numbers.clone()], to),
            }
            at += numbers.len();
        }
        Self::F32(wide)
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(numbers) => numbers.len(),
            Self::Bf16(numbers) => numbers.len(),
        }
    }
}

fn widen(engine: &Engine, narrow: &[u16], wide: &mut [f32]) {
    struct Widen<'a>(&'a [u16], Shared<f32>);
    impl Task for Widen<'_> {
        const KERNEL: &'static str = "keep";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            let end = self.0.len().min((i + 1) * NUMBERS);
            let mut at = i * NUMBERS;
            while at < end {
                let n = S::LANES.min(end - at);
                // SAFETY: within both slices; this task alone writes these numbers.
                unsafe { S::store_n(self.1.0.add(at), S::load_bf16(self.0.as_ptr().add(at), n), n) }
                at += S::LANES;
            }
        }
    }
    assert_eq!(narrow.len(), wide.len());
    let to = Shared(wide.as_mut_ptr());
    engine.parallel(narrow.len().div_ceil(NUMBERS), &Widen(narrow, to));
}

//! RMSNorm (Zhang and Sennrich, arXiv 1910.07467): `h = x · r · w` with `r = 1 / √(mean(x²) + ε)`.

use crate::buffer::Buffer;
use crate::engine::{Engine, Shared, Task};
use crate::product::Scratch;
use crate::rows::{Blocking, Packed, PackedParts, chunk, chunks};
use crate::simd::Simd;

/// `w [channels]`
pub(crate) struct RmsNorm {
    pub weight: Vec<f32>,
    pub epsilon: f32,
}

impl RmsNorm {
    /// Normed rows, packed; and `r` of every row.
    pub(crate) fn packed(&self, engine: &Engine, blocking: &Blocking, x: &[f32]) -> (Packed, Buffer<f32>) {
        struct Blocks<'a> {
            norm: &'a RmsNorm,
            blocking: &'a Blocking,
            x: &'a [f32],
            to: PackedParts,
            factors: Shared<f32>,
        }
        impl Task for Blocks<'_> {
            const KERNEL: &'static str = "norm";

            #[inline(always)]
            unsafe fn run<S: Simd>(&self, i: usize) {
                let channels = self.norm.weight.len();
                let mut normed = Scratch::new(S::MR * channels);
                let normed = normed.start();
                for (i, block) in chunk(&self.blocking.blocks, i) {
                    for row in 0..block.rows {
                        let x = &self.x[(block.row + row) * channels..][..channels];
                        // SAFETY: this task alone writes this row's factor; `normed` has room for MR rows.
                        unsafe {
                            let r = factor::<S>(x, self.norm.epsilon);
                            *self.factors.0.add(block.row + row) = r;
                            apply::<S>(x, &self.norm.weight, r, normed.add(row * channels));
                        }
                    }
                    // SAFETY: `normed` holds the block's rows; this task alone writes the block.
                    unsafe { self.to.pack::<S>(i, normed, channels, block.rows) }
                }
            }
        }
        assert_eq!(x.len(), blocking.rows * self.weight.len());
        let mut packed = Packed::new(engine, blocking, self.weight.len());
        let mut factors = engine.take(blocking.rows);
        let (to, shared) = (packed.parts(engine), Shared(factors.as_mut_ptr()));
        let task = Blocks { norm: self, blocking, x, to, factors: shared };
        engine.parallel(chunks(&blocking.blocks), &task);
        (packed, factors)
    }

    /// Normed rows.
    pub(crate) fn rows(&self, engine: &Engine, x: &[f32]) -> Buffer<f32> {
        struct Rows<'a>(&'a RmsNorm, &'a [f32], Shared<f32>);
        impl Task for Rows<'_> {
            const KERNEL: &'static str = "norm";

            #[inline(always)]
            unsafe fn run<S: Simd>(&self, i: usize) {
                let channels = self.0.weight.len();
                let all = self.1.len() / channels;
                for row in i * ROWS..all.min((i + 1) * ROWS) {
                    let x = &self.1[row * channels..][..channels];
                    // SAFETY: this task alone writes this row.
                    unsafe {
                        let r = factor::<S>(x, self.0.epsilon);
                        apply::<S>(x, &self.0.weight, r, self.2.0.add(row * channels));
                    }
                }
            }
        }
        let mut normed = engine.take(x.len());
        let rows = x.len() / self.weight.len();
        let to = Shared(normed.as_mut_ptr());
        engine.parallel(rows.div_ceil(ROWS), &Rows(self, x, to));
        normed
    }

    /// `gradient += ∂/∂x`, for the gradient `dh` of the normed rows: `r · (w ∘ dh) − x · r³ · mean(w ∘ dh ∘ x)`.
    pub(crate) fn backward(&self, engine: &Engine, x: &[f32], factors: &[f32], dh: &[f32], gradient: &mut [f32]) {
        struct Rows<'a> {
            norm: &'a RmsNorm,
            x: &'a [f32],
            factors: &'a [f32],
            dh: &'a [f32],
            gradient: Shared<f32>,
        }
        impl Task for Rows<'_> {
            const KERNEL: &'static str = "norm";

            #[inline(always)]
            unsafe fn run<S: Simd>(&self, i: usize) {
                let channels = self.norm.weight.len();
                for row in i * ROWS..self.factors.len().min((i + 1) * ROWS) {
                    let [x, dh] = [self.x, self.dh].map(|all| all[row * channels..].as_ptr());
                    let w = self.norm.weight.as_ptr();
                    let r = self.factors[row];
                    // SAFETY: a row has `channels` numbers; this task alone writes this row of the gradient.
                    unsafe {
                        let gradient = self.gradient.0.add(row * channels);
                        let mut sum = S::splat(0.0);
                        let mut at = 0;
                        while at < channels {
                            let n = S::LANES.min(channels - at);
                            let wd = S::mul(S::load_n(w.add(at), n), S::load_n(dh.add(at), n));
                            sum = S::fma(wd, S::load_n(x.add(at), n), sum);
                            at += S::LANES;
                        }
                        let mean = S::sum(sum) / channels as f32;
                        let (r, shift) = (S::splat(r), S::splat(-(r * r * r) * mean));
                        let mut at = 0;
                        while at < channels {
                            let n = S::LANES.min(channels - at);
                            let wd = S::mul(S::load_n(w.add(at), n), S::load_n(dh.add(at), n));
                            let dx = S::fma(wd, r, S::mul(S::load_n(x.add(at), n), shift));
                            S::store_n(gradient.add(at), S::add(S::load_n(gradient.add(at), n), dx), n);
                            at += S::LANES;
                        }
                    }
                }
            }
        }
        assert!(x.len() == dh.len() && x.len() == gradient.len() && x.len() == factors.len() * self.weight.len());
        let task = Rows { norm: self, x, factors, dh, gradient: Shared(gradient.as_mut_ptr()) };
        engine.parallel(factors.len().div_ceil(ROWS), &task);
    }
}

/// Rows of a task.
pub(crate) const ROWS: usize = 32;

/// # Safety
/// The CPU has `S`.
#[inline(always)]
pub(crate) unsafe fn factor<S: Simd>(x: &[f32], epsilon: f32) -> f32 {
    // SAFETY: loads stay within `x`.
    unsafe {
        let mut sum = S::splat(0.0);
        let mut at = 0;
        while at < x.len() {
            let v = S::load_n(x.as_ptr().add(at), S::LANES.min(x.len() - at));
            sum = S::fma(v, v, sum);
            at += S::LANES;
        }
        1.0 / (S::sum(sum) / x.len() as f32 + epsilon).sqrt()
    }
}

/// # Safety
/// The CPU has `S`; `to` has room for as many numbers as `x` has, `weight` has as many.
#[inline(always)]
pub(crate) unsafe fn apply<S: Simd>(x: &[f32], weight: &[f32], factor: f32, to: *mut f32) {
    let mut at = 0;
    while at < x.len() {
        let n = S::LANES.min(x.len() - at);
        // SAFETY: within the rows.
        unsafe {
            let normed = S::mul(S::load_n(x.as_ptr().add(at), n), S::splat(factor));
            S::store_n(to.add(at), S::mul(normed, S::load_n(weight.as_ptr().add(at), n)), n);
        }
        at += S::LANES;
    }
}

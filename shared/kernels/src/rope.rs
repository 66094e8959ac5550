//! Rotary positions (RoFormer, arXiv 2104.09864) on the halves `(i, i + size / 2)` of a head, as Hugging Face orders
//! them, behind an optional norm of every head (Qwen3).

use crate::engine::{Engine, Shared, Task};
use crate::norm::{ROWS, RmsNorm, apply, factor};
use crate::simd::{PANEL_MAX, Simd};

/// The rotation of every row.
pub struct Rotation {
    /// `[rows, head_size / 2]`
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

/// Heads that lie side by side in `x [rows, stride]`, from column `at` on.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    pub at: usize,
    pub heads: usize,
    pub size: usize,
    pub stride: usize,
}

/// Norms heads where there is a norm, and rotates them, forwards or back.
pub(crate) fn rotate(engine: &Engine, x: &mut [f32], all: &[(Heads, Option<&RmsNorm>)], by: &Rotation, back: bool) {
    struct Rows<'a> {
        x: Shared<f32>,
        rows: usize,
        all: &'a [(Heads, Option<&'a RmsNorm>)],
        by: &'a Rotation,
        back: bool,
    }
    impl Task for Rows<'_> {
        const KERNEL: &'static str = "rope";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            for row in i * ROWS..self.rows.min((i + 1) * ROWS) {
                for &(Heads { at, heads, size, stride }, norm) in self.all {
                    let half = size / 2;
                    let (cos, sin) = (self.by.cos[row * half..].as_ptr(), self.by.sin[row * half..].as_ptr());
                    for head in 0..heads {
                        // SAFETY: the head lies within the row, which this task alone touches.
                        unsafe {
                            let x = self.x.0.add(row * stride + at + head * size);
                            if let Some(norm) = norm {
                                let r = factor::<S>(std::slice::from_raw_parts(x, size), norm.epsilon);
                                let mut old = [0.0f32; HEAD_MAX];
                                std::ptr::copy_nonoverlapping(x, old.as_mut_ptr(), size);
                                apply::<S>(&old[..size], &norm.weight, r, x);
                            }
                            rotate_head::<S>(x, half, cos, sin, self.back);
                        }
                    }
                }
            }
        }
    }
    let Some(&(Heads { stride, size, .. }, _)) = all.first() else { return };
    let rows = x.len() / stride;
    for (heads, _) in all {
        assert!(heads.at + heads.heads * heads.size <= stride && heads.stride == stride && heads.size <= HEAD_MAX);
        assert!(by.cos.len() == rows * heads.size / 2 && by.sin.len() == by.cos.len() && size == heads.size);
    }
    let task = Rows { x: Shared(x.as_mut_ptr()), rows, all, by, back };
    engine.parallel(rows.div_ceil(ROWS), &task);
}

/// The largest head the kernels take.
pub const HEAD_MAX: usize = 512;

/// # Safety
/// The CPU has `S`; `x` has two halves, `cos` and `sin` one.
#[inline(always)]
pub(crate) unsafe fn rotate_head<S: Simd>(x: *mut f32, half: usize, cos: *const f32, sin: *const f32, back: bool) {
    let mut at = 0;
    while at < half {
        let n = S::LANES.min(half - at);
        // SAFETY: within the halves.
        unsafe {
            let (first, second) = (S::load_n(x.add(at), n), S::load_n(x.add(half + at), n));
            let (c, mut s) = (S::load_n(cos.add(at), n), S::load_n(sin.add(at), n));
            if back {
                s = S::sub(S::splat(0.0), s);
            }
            S::store_n(x.add(at), S::sub(S::mul(first, c), S::mul(second, s)), n);
            S::store_n(x.add(half + at), S::add(S::mul(second, c), S::mul(first, s)), n);
        }
        at += S::LANES;
    }
}

/// The gradient behind the norm of every head, in place; `x` holds the heads before the norm.
pub(crate) fn norm_backward(engine: &Engine, x: &[f32], gradient: &mut [f32], heads: Heads, norm: &RmsNorm) {
    let Heads { at, heads: count, size, stride } = heads;
    let rows = x.len() / stride;
    let gather = |from: &[f32]| {
        let mut heads = engine.take::<f32>(rows * count * size);
        for (row, to) in heads.chunks_exact_mut(count * size).enumerate() {
            to.copy_from_slice(&from[row * stride + at..][..count * size]);
        }
        heads
    };
    let (x, dh) = (gather(x), gather(gradient));
    let factors: Vec<f32> = x.chunks_exact(size).map(|head| plain_factor(head, norm.epsilon)).collect();
    let mut dx = engine.zeros(x.len());
    norm.backward(engine, &x, &factors, &dh, &mut dx);
    for (row, from) in dx.chunks_exact(count * size).enumerate() {
        gradient[row * stride + at..][..count * size].copy_from_slice(from);
    }
}

fn plain_factor(x: &[f32], epsilon: f32) -> f32 {
    let mut sums = [0.0f32; PANEL_MAX];
    for (i, x) in x.iter().enumerate() {
        sums[i % PANEL_MAX] += x * x;
    }
    1.0 / (sums.iter().sum::<f32>() / x.len() as f32 + epsilon).sqrt()
}

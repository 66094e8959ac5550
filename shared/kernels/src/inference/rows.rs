//! What happens to single rows between products.

use super::cache::Head;
use crate::gate::sigmoid;
use crate::norm::{apply, factor};
use crate::path::Work;
use crate::quantized::quantize_row;
use crate::rope::{HEAD_MAX, rotate_head};
use crate::simd::Simd;

/// Where a row goes as input of a product: as bytes into row `row` of a strip of `rows`, or as f32 `[columns, rows]`; where
/// a pointer is null, not that way.
#[derive(Clone, Copy)]
pub(super) struct Input {
    pub codes: *mut u32,
    pub code_rows: usize,
    pub code_row: usize,
    pub floats: *mut f32,
    pub float_rows: usize,
    pub float_row: usize,
}

impl Input {
    /// # Safety
    /// The CPU has `S`; `x` has as many columns as there is room for.
    #[inline(always)]
    unsafe fn put<S: Simd>(&self, x: *const f32, columns: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            if !self.codes.is_null() {
                quantize_row::<S>(x, columns, self.codes, self.code_rows, self.code_row);
            }
            if !self.floats.is_null() {
                for column in 0..columns {
                    *self.floats.add(column * self.float_rows + self.float_row) = *x.add(column);
                }
            }
        }
    }
}

/// A row, as it is, or normed, or the gated one of two.
pub(super) struct Prepare<'a> {
    pub x: *const f32,
    pub columns: usize,
    /// Weights and ε of RMSNorm.
    pub norm: Option<(&'a [f32], f32)>,
    /// `silu(x) · up`
    pub up: *const f32,
    /// Room for a row, whole vectors.
    pub row: *mut f32,
    pub to: Input,
}

impl Work for Prepare<'_> {
    type Output = ();

    /// # Safety
    /// Also: the pointers reach `columns` numbers, and are this thread's where they are written.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, columns, norm, up, row, to } = self;
        // SAFETY: the caller's promise.
        unsafe {
            if let Some((weight, epsilon)) = norm {
                let x = std::slice::from_raw_parts(x, columns);
                apply::<S>(x, weight, factor::<S>(x, epsilon), row);
                to.put::<S>(row, columns);
            } else if !up.is_null() {
                gate::<S>(x, up, columns, row);
                to.put::<S>(row, columns);
            } else {
                to.put::<S>(x, columns);
            }
        }
    }
}

/// `to = silu(gate) · up`, for a token's part of a row.
pub(super) struct Gate {
    pub gate: *const f32,
    pub up: *const f32,
    pub columns: usize,
    pub to: *mut f32,
}

impl Work for Gate {
    type Output = ();

    /// # Safety
    /// Also: the pointers reach `columns` numbers.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise.
        unsafe { gate::<S>(self.gate, self.up, self.columns, self.to) }
    }
}

/// # Safety
/// The CPU has `S`; the pointers reach `columns` numbers.
#[inline(always)]
unsafe fn gate<S: Simd>(gate: *const f32, up: *const f32, columns: usize, to: *mut f32) {
    let mut at = 0;
    while at < columns {
        let n = S::LANES.min(columns - at);
        // SAFETY: the caller's promise.
        unsafe {
            let g = S::load_n(gate.add(at), n);
            let silu = S::mul(g, sigmoid::<S>(g));
            S::store_n(to.add(at), S::mul(silu, S::load_n(up.add(at), n)), n);
        }
        at += S::LANES;
    }
}

/// A head behind its product: bias, norm, rotation; keys and values then go into the cache.
pub(super) struct FinishHead<'a> {
    pub x: *mut f32,
    pub size: usize,
    pub bias: Option<&'a [f32]>,
    pub norm: Option<(&'a [f32], f32)>,
    /// cos and sin of the row's position.
    pub rotation: Option<[*const f32; 2]>,
    pub store: Store,
    pub token: usize,
}

#[derive(Clone, Copy)]
pub(super) enum Store {
    Nowhere,
    Key(Head),
    Value(Head),
}

impl Work for FinishHead<'_> {
    type Output = ();

    /// # Safety
    /// Also: `x` has `size` numbers; x, and the token's place in the cache, are this thread's.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, size, bias, norm, rotation, store, token } = self;
        // SAFETY: the caller's promise; sizes are checked by `Decoder::new`.
        unsafe {
            if let Some(bias) = bias {
                for (i, bias) in bias.iter().enumerate() {
                    *x.add(i) += bias;
                }
            }
            if let Some((weight, epsilon)) = norm {
                let mut old = [0.0f32; HEAD_MAX];
                std::ptr::copy_nonoverlapping(x, old.as_mut_ptr(), size);
                apply::<S>(&old[..size], weight, factor::<S>(&old[..size], epsilon), x);
            }
            if let Some([cos, sin]) = rotation {
                rotate_head::<S>(x, size / 2, cos, sin, false);
            }
            match store {
                Store::Nowhere => {}
                Store::Key(head) => head.put_key::<S>(token, x),
                Store::Value(head) => head.put_value::<S>(token, x),
            }
        }
    }
}

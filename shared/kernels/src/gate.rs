//! SwiGLU (Shazeer, arXiv 2002.05202): `silu(gate) ∘ up`.

use crate::buffer::Buffer;
use crate::engine::{Engine, Shared, Task};
use crate::kept::Kept;
use crate::norm::ROWS;
use crate::product::Scratch;
use crate::rows::{Blocking, Packed, PackedParts, chunk, chunks};
use crate::simd::{Simd, exp};

/// `gate_up [rows, 2 · channels]`, gate before up; the gated rows, packed. `kept` gets gate and up as bf16.
pub(crate) fn packed(
    engine: &Engine,
    blocking: &Blocking,
    gate_up: &[f32],
    channels: usize,
    kept: Option<&mut [u16]>,
) -> Packed {
    struct Blocks<'a> {
        blocking: &'a Blocking,
        gate_up: &'a [f32],
        channels: usize,
        to: PackedParts,
        kept: Option<Shared<u16>>,
    }
    impl Task for Blocks<'_> {
        const KERNEL: &'static str = "gate";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            let channels = self.channels;
            let mut gated = Scratch::new(S::MR * channels);
            let gated = gated.start();
            for (i, block) in chunk(&self.blocking.blocks, i) {
                for row in 0..block.rows {
                    let gate = &self.gate_up[(block.row + row) * 2 * channels..][..2 * channels];
                    // SAFETY: gate and up have `channels` numbers each, `gated` MR rows of as many.
                    unsafe { gate_row::<S>(gate, gated.add(row * channels)) }
                    if let Some(kept) = self.kept {
                        let mut at = 0;
                        while at < gate.len() {
                            let n = S::LANES.min(gate.len() - at);
                            // SAFETY: this task alone writes the kept numbers of these rows.
                            unsafe {
                                let to = kept.0.add((block.row + row) * 2 * channels + at);
                                S::store_bf16(to, S::load_n(gate.as_ptr().add(at), n), n);
                            }
                            at += S::LANES;
                        }
                    }
                }
                // SAFETY: `gated` holds the block's rows; this task alone writes the block.
                unsafe { self.to.pack::<S>(i, gated, channels, block.rows) }
            }
        }
    }
    assert_eq!(gate_up.len(), blocking.rows * 2 * channels);
    let mut packed = Packed::new(engine, blocking, channels);
    let kept = kept.map(|kept| {
        assert_eq!(kept.len(), gate_up.len());
        Shared(kept.as_mut_ptr())
    });
    let task = Blocks { blocking, gate_up, channels, to: packed.parts(engine), kept };
    engine.parallel(chunks(&blocking.blocks), &task);
    packed
}

/// The gated rows, `[rows, channels]`.
pub(crate) fn rows(engine: &Engine, gate_up: &[f32], channels: usize) -> Buffer<f32> {
    struct Rows<'a>(&'a [f32], usize, Shared<f32>);
    impl Task for Rows<'_> {
        const KERNEL: &'static str = "gate";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            let Self(gate_up, channels, to) = *self;
            for row in i * ROWS..(gate_up.len() / (2 * channels)).min((i + 1) * ROWS) {
                // SAFETY: this task alone writes this row.
                unsafe { gate_row::<S>(&gate_up[row * 2 * channels..][..2 * channels], to.0.add(row * channels)) }
            }
        }
    }
    let mut gated = engine.take(gate_up.len() / 2);
    let to = Shared(gated.as_mut_ptr());
    engine.parallel((gate_up.len() / (2 * channels)).div_ceil(ROWS), &Rows(gate_up, channels, to));
    gated
}

/// # Safety
/// The CPU has `S`; `to` has room for half of the numbers of `gate_up`.
#[inline(always)]
unsafe fn gate_row<S: Simd>(gate_up: &[f32], to: *mut f32) {
    let channels = gate_up.len() / 2;
    let (gate, up) = (gate_up.as_ptr(), gate_up[channels..].as_ptr());
    let mut at = 0;
    while at < channels {
        let n = S::LANES.min(channels - at);
        // SAFETY: within the rows.
        unsafe {
            let g = S::load_n(gate.add(at), n);
            let silu = S::mul(g, sigmoid::<S>(g));
            S::store_n(to.add(at), S::mul(silu, S::load_n(up.add(at), n)), n);
        }
        at += S::LANES;
    }
}

/// # Safety
/// The CPU has `S`.
#[inline(always)]
pub(crate) unsafe fn sigmoid<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        let one = S::splat(1.0);
        S::div(one, S::add(one, exp::<S>(S::sub(S::splat(0.0), x))))
    }
}

/// From the gradient of the gated rows `[rows, channels]`: the gradients of gate and up `[rows, 2 · channels]`, and the
/// gated rows, if asked for.
pub(crate) fn backward(
    engine: &Engine,
    gate_up: Kept,
    gradient: &[f32],
    channels: usize,
    gated: bool,
) -> (Buffer<f32>, Option<Buffer<f32>>) {
    struct Rows<'a> {
        /// Gate and up, where they were kept as bf16; else they stand where their gradients go.
        narrow: Option<&'a [u16]>,
        gate_up: Shared<f32>,
        gradient: &'a [f32],
        channels: usize,
        gated: Option<Shared<f32>>,
    }
    impl Task for Rows<'_> {
        const KERNEL: &'static str = "gate";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            let channels = self.channels;
            let rows = self.gradient.len() / channels;
            for row in i * ROWS..rows.min((i + 1) * ROWS) {
                let gradient = self.gradient[row * channels..].as_ptr();
                let mut at = 0;
                while at < channels {
                    let n = S::LANES.min(channels - at);
                    // SAFETY: within the row, which this task alone writes.
                    unsafe {
                        let place = row * 2 * channels + at;
                        let gate = self.gate_up.0.add(place);
                        let up = gate.add(channels);
                        let d = S::load_n(gradient.add(at), n);
                        let (g, u) = match self.narrow {
                            Some(narrow) => {
                                let gate = narrow.as_ptr().add(place);
                                (S::load_bf16(gate, n), S::load_bf16(gate.add(channels), n))
                            }
                            None => (S::load_n(gate, n), S::load_n(up, n)),
                        };
                        let one = S::splat(1.0);
                        let sigmoid = sigmoid::<S>(g);
                        let silu = S::mul(g, sigmoid);
                        // silu' = σ · (1 + g · (1 − σ))
                        let slope = S::mul(sigmoid, S::fma(g, S::sub(one, sigmoid), one));
                        S::store_n(gate, S::mul(S::mul(d, u), slope), n);
                        S::store_n(up, S::mul(d, silu), n);
                        if let Some(gated) = self.gated {
                            S::store_n(gated.0.add(row * channels + at), S::mul(silu, u), n);
                        }
                    }
                    at += S::LANES;
                }
            }
        }
    }
    let (narrow, mut to) = match gate_up {
        Kept::F32(numbers) => (None, numbers),
        Kept::Bf16(narrow) => {
            let to = engine.take(narrow.len());
            (Some(narrow), to)
        }
    };
    assert_eq!(to.len(), 2 * gradient.len());
    let mut result = gated.then(|| engine.take(gradient.len()));
    let shared = result.as_mut().map(|gated| Shared(gated.as_mut_ptr()));
    let gate_up = Shared(to.as_mut_ptr());
    let task = Rows { narrow: narrow.as_deref(), gate_up, gradient, channels, gated: shared };
    engine.parallel((gradient.len() / channels).div_ceil(ROWS), &task);
    (to, result)
}

//! Memory that a session works in, allocated once.

use super::adapter::{RANK_MAX, SHARING};
use super::attention::{StripTokens, scratch_numbers};
use super::rows::Input;
use super::{Decoder, Shape};
use crate::Path;
use crate::buffer::Buffer;
use crate::engine::{Engine, Shared};
use crate::path::Work;
use crate::quantized::{Batch, RowInput, batch_scratch_bytes, code_words};
use crate::simd::Simd;
use crate::simd::integer::Integers;

/// Rows of a batch at most: then codes and results of a block stay in a second-level cache.
pub(super) const BATCH: usize = 128;

/// What threads share.
pub(super) struct Room {
    /// `[rows, width]`, the residual stream.
    pub x: Buffer<f32>,
    pub qkv: Buffer<f32>,
    pub mixed: Buffer<f32>,
    /// `[rows, 2 · ffn]`
    pub gate_up: Buffer<f32>,
    /// `[rows, head_size / 2]` each
    pub cos: Buffer<f32>,
    pub sin: Buffer<f32>,
    pub logits: Buffer<f32>,
    /// Input rows of a product, both ways.
    pub codes: Buffer<u32>,
    pub floats: Buffer<f32>,
    /// `[rows, SHARING · RANK_MAX]`, inputs that an adapter has narrowed.
    pub low: Buffer<f32>,
}

/// The same, to write through.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub x: Shared<f32>,
    pub qkv: Shared<f32>,
    pub mixed: Shared<f32>,
    pub gate_up: Shared<f32>,
    pub cos: Shared<f32>,
    pub sin: Shared<f32>,
    pub logits: Shared<f32>,
    pub codes: Shared<u32>,
    pub floats: Shared<f32>,
    pub low: Shared<f32>,
}

/// Rows that the path multiplies at once, as bytes and as f32.
#[derive(Clone, Copy)]
pub(super) struct StripRows {
    pub codes: usize,
    pub floats: usize,
    pub attention: usize,
}

impl StripRows {
    pub(super) fn of(path: Path) -> Self {
        struct Ask;
        impl Work for Ask {
            type Output = usize;
            #[inline(always)]
            unsafe fn run<S: Simd>(self) -> usize {
                S::Int::STRIP_ROWS
            }
        }
        Self { codes: path.run(Ask), floats: path.tile_rows(), attention: path.run(StripTokens) }
    }
}

impl Room {
    pub(super) fn new(engine: &Engine, shape: &Shape, rows: usize, logits: usize, strip: StripRows) -> Self {
        let longest = shape.longest();
        Self {
            x: engine.zeros(rows * shape.width),
            qkv: engine.zeros(rows * shape.qkv()),
            mixed: engine.zeros(rows * shape.queries()),
            gate_up: engine.zeros(rows * 2 * shape.ffn),
            cos: engine.zeros(rows * shape.head_size / 2),
            sin: engine.zeros(rows * shape.head_size / 2),
            logits: engine.zeros(logits * shape.vocabulary),
            codes: engine.take(code_words(longest, rows.next_multiple_of(strip.codes))),
            floats: engine.zeros(longest * rows.next_multiple_of(strip.floats)),
            // Its memory is not touched before there is an adapter.
            low: engine.take(rows * SHARING * RANK_MAX),
        }
    }

    pub(super) fn places(&mut self) -> Places {
        Places {
            x: Shared(self.x.as_mut_ptr()),
            qkv: Shared(self.qkv.as_mut_ptr()),
            mixed: Shared(self.mixed.as_mut_ptr()),
            gate_up: Shared(self.gate_up.as_mut_ptr()),
            cos: Shared(self.cos.as_mut_ptr()),
            sin: Shared(self.sin.as_mut_ptr()),
            logits: Shared(self.logits.as_mut_ptr()),
            codes: Shared(self.codes.as_mut_ptr()),
            floats: Shared(self.floats.as_mut_ptr()),
            low: Shared(self.low.as_mut_ptr()),
        }
    }

    /// cos and sin of as many positions from `first` on as there are rows.
    pub(super) fn rotate_from(&mut self, frequencies: &[f32], first: usize, rows: usize) {
        // transformers rounds frequency and angle to f32; doing the same keeps long positions equal to it.
        let angles = (first..first + rows).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
        for ((cos, sin), angle) in self.cos.iter_mut().zip(self.sin.iter_mut()).zip(angles) {
            (*sin, *cos) = angle.sin_cos();
        }
    }
}

impl Places {
    /// The same, with another's residual stream from number `at` on.
    pub(super) fn with_x(self, x: Shared<f32>, at: usize) -> Self {
        Self { x: Shared(x.0.wrapping_add(at)), ..self }
    }

    /// Row `row` of the shared input of a product.
    ///
    /// # Safety
    /// The row is within the room.
    pub(super) unsafe fn input(
        &self,
        columns: usize,
        row: usize,
        strip: StripRows,
        as_codes: bool,
        as_floats: bool,
    ) -> Input {
        let none: *mut f32 = std::ptr::null_mut();
        let (codes_first, floats_first) = (row / strip.codes * strip.codes, row / strip.floats * strip.floats);
        // SAFETY: the caller's promise.
        unsafe {
            Input {
                codes: if as_codes { self.codes.0.add(code_words(columns, codes_first)) } else { none.cast() },
                code_rows: strip.codes,
                code_row: row % strip.codes,
                floats: if as_floats { self.floats.0.add(floats_first * columns) } else { none },
                float_rows: strip.floats,
                float_row: row % strip.floats,
            }
        }
    }

    /// What an adapter has made of a row.
    ///
    /// # Safety
    /// The row is within the room.
    pub(super) unsafe fn low(&self, row: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.low.0.add(row * SHARING * RANK_MAX) }
    }

    pub(super) fn batch(&self, rows: usize) -> Batch {
        Batch { rows, codes: self.codes.0, floats: self.floats.0 }
    }
}

/// A thread's own.
pub(super) struct Slot {
    /// A row of codes, and of f32.
    codes: Buffer<u32>,
    row: Buffer<f32>,
    floats: Buffer<f32>,
    /// For unpacked weights, and for attention.
    scratch: Buffer<f32>,
    low: Buffer<f32>,
}

/// The same, to write through.
#[derive(Clone, Copy)]
pub(super) struct SlotPlaces {
    /// The thread's number.
    pub thread: usize,
    pub codes: Shared<u32>,
    pub row: Shared<f32>,
    pub floats: Shared<f32>,
    pub scratch: Shared<f32>,
    pub low: Shared<f32>,
}

impl Slot {
    pub(super) fn new(engine: &Engine, decoder: &Decoder, context: usize) -> Self {
        let shape = &decoder.shape;
        let longest = shape.longest();
        let unpacked = batch_scratch_bytes(longest).div_ceil(4);
        Self {
            codes: engine.take(code_words(longest, 1)),
            row: engine.take(longest),
            floats: engine.take(longest),
            scratch: engine.take(unpacked.max(scratch_numbers(shape.head_size, context))),
            low: engine.take(SHARING * RANK_MAX),
        }
    }

    pub(super) fn places(&mut self, thread: usize) -> SlotPlaces {
        SlotPlaces {
            thread,
            codes: Shared(self.codes.as_mut_ptr()),
            row: Shared(self.row.as_mut_ptr()),
            floats: Shared(self.floats.as_mut_ptr()),
            scratch: Shared(self.scratch.as_mut_ptr()),
            low: Shared(self.low.as_mut_ptr()),
        }
    }
}

impl SlotPlaces {
    /// The thread's own input row.
    pub(super) fn input(&self, as_codes: bool, as_floats: bool) -> Input {
        let codes = if as_codes { self.codes.0 } else { std::ptr::null_mut() };
        let floats = if as_floats { self.floats.0 } else { std::ptr::null_mut() };
        Input { codes, code_rows: 1, code_row: 0, floats, float_rows: 1, float_row: 0 }
    }

    pub(super) fn row_input(&self) -> RowInput {
        RowInput { codes: self.codes.0, floats: self.floats.0 }
    }
}

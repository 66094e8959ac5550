//! Activations in the order in which tiles read them.

use std::ops::Range;

use crate::buffer::Buffer;
use crate::engine::{Engine, Shared, Task};
use crate::simd::{LANES_MAX, Simd};

/// How the rows of a pass fall into tiles. No tile spans two groups: the rows of a group have one adapter.
pub(crate) struct Blocking {
    pub blocks: Vec<RowBlock>,
    pub groups: Vec<Group>,
    pub rows: usize,
}

#[derive(Clone, Copy)]
pub(crate) struct RowBlock {
    pub row: usize,
    /// At most the path's `MR`.
    pub rows: usize,
}

pub(crate) struct Group {
    pub blocks: Range<usize>,
    pub rows: Range<usize>,
}

impl Blocking {
    /// `group_rows[i]` rows have adapter i.
    pub(crate) fn new(group_rows: &[usize], tile_rows: usize) -> Self {
        let (mut blocks, mut groups, mut row) = (Vec::new(), Vec::new(), 0);
        for &rows in group_rows {
            let (first, end) = (blocks.len(), row + rows);
            let begin = row;
            while row < end {
                let rows = tile_rows.min(end - row);
                blocks.push(RowBlock { row, rows });
                row += rows;
            }
            groups.push(Group { blocks: first..blocks.len(), rows: begin..end });
        }
        Self { blocks, groups, rows: row }
    }
}

/// `[block][depth][MR]`: f32 numbers, or pairs of bf16 in the places of f32; or `[block][MR][depth]` of pairs, where the
/// path wants them by row.
pub(crate) struct Packed {
    pub numbers: Buffer<f32>,
    /// Numbers in a row.
    pub columns: usize,
    /// Steps of a sum over a row.
    pub depth: usize,
    pub pairs: bool,
}

impl Packed {
    pub(crate) fn new(engine: &Engine, blocking: &Blocking, columns: usize) -> Self {
        let pairs = engine.multiplies_bf16();
        let depth = if pairs { columns.div_ceil(2) } else { columns };
        let numbers = engine.take(blocking.blocks.len() * depth * engine.path().tile_rows());
        Self { numbers, columns, depth, pairs }
    }

    /// Packs `x [rows, columns]`.
    pub(crate) fn of(engine: &Engine, blocking: &Blocking, x: &[f32], columns: usize) -> Self {
        Self::of_columns(engine, blocking, x, columns, 0, columns)
    }

    /// Packs some columns of `x [rows, stride]`.
    pub(crate) fn of_columns(
        engine: &Engine,
        blocking: &Blocking,
        x: &[f32],
        stride: usize,
        column: usize,
        columns: usize,
    ) -> Self {
        struct Pack<'a> {
            blocking: &'a Blocking,
            x: &'a [f32],
            stride: usize,
            column: usize,
            to: PackedParts,
        }
        impl Task for Pack<'_> {
            const KERNEL: &'static str = "pack";

            #[inline(always)]
            unsafe fn run<S: Simd>(&self, i: usize) {
                for (i, block) in chunk(&self.blocking.blocks, i) {
                    // SAFETY: the block's rows are within `x`, and its place within `to`.
                    unsafe {
                        let x = self.x.as_ptr().add(block.row * self.stride + self.column);
                        self.to.pack::<S>(i, x, self.stride, block.rows);
                    }
                }
            }
        }
        assert!(x.len() == blocking.rows * stride && column + columns <= stride);
        let mut packed = Self::new(engine, blocking, columns);
        let task = Pack { blocking, x, stride, column, to: packed.parts(engine) };
        engine.parallel(chunks(&blocking.blocks), &task);
        packed
    }

    /// Where a tile begins to read a block, and how far apart its steps (its rows, where the path reads by row) are.
    ///
    /// # Safety
    /// There are so many blocks and steps.
    #[inline(always)]
    pub(crate) unsafe fn at<S: Simd>(&self, block: usize, step: usize) -> (*const f32, usize) {
        let by_row = self.pairs && S::PAIRS_BY_ROW;
        let (step, apart) = if by_row { (step, self.depth) } else { (step * S::MR, S::MR) };
        // SAFETY: the caller's promise.
        (unsafe { self.numbers.pointer().add(block * self.depth * S::MR + step) }, apart)
    }

    pub(crate) fn parts(&mut self, engine: &Engine) -> PackedParts {
        PackedParts {
            start: Shared(self.numbers.as_mut_ptr()),
            columns: self.columns,
            block: self.depth * engine.path().tile_rows(),
            pairs: self.pairs,
        }
    }
}

/// Blocks that one task takes: some hundred microseconds of work at least.
const CHUNK_BLOCKS: usize = 4;

pub(crate) fn chunks(blocks: &[RowBlock]) -> usize {
    blocks.len().div_ceil(CHUNK_BLOCKS)
}

/// The blocks of task `i`, numbered.
#[inline(always)]
pub(crate) fn chunk(blocks: &[RowBlock], i: usize) -> impl Iterator<Item = (usize, RowBlock)> {
    let first = i * CHUNK_BLOCKS;
    blocks[first..blocks.len().min(first + CHUNK_BLOCKS)].iter().enumerate().map(move |(j, &block)| (first + j, block))
}

/// Where tasks put the blocks of a [`Packed`].
#[derive(Clone, Copy)]
pub(crate) struct PackedParts {
    start: Shared<f32>,
    columns: usize,
    block: usize,
    pairs: bool,
}

impl PackedParts {
    /// Packs `rows` rows of `x`, `stride` numbers apart, as block `block`.
    ///
    /// # Safety
    /// The CPU has `S`; the rows exist, no more than `MR` of them; no other task writes this block.
    #[inline(always)]
    pub(crate) unsafe fn pack<S: Simd>(&self, block: usize, x: *const f32, stride: usize, rows: usize) {
        // SAFETY: see above.
        unsafe {
            let to = self.start.0.add(block * self.block);
            pack_rows::<S>(x, stride, rows, self.columns, self.pairs, to);
        }
    }
}

/// `[rows, columns] → [depth][MR]` (or `[MR][depth]`, see [`Packed`]), with zeros for rows that are not there.
///
/// # Safety
/// The CPU has `S`; `rows ≤ MR` rows of `columns` numbers exist; `to` has room.
#[inline(always)]
pub(crate) unsafe fn pack_rows<S: Simd>(
    x: *const f32,
    stride: usize,
    rows: usize,
    columns: usize,
    pairs: bool,
    to: *mut f32,
) {
    let step = if pairs { 2 * S::LANES } else { S::LANES };
    let depth = if pairs { columns.div_ceil(2) } else { columns };
    if pairs && S::PAIRS_BY_ROW {
        // SAFETY: loads stay within a row, and stores within the row's place.
        unsafe {
            for row in 0..S::MR {
                let (from, to) = (x.wrapping_add(row * stride), to.add(row * depth));
                for at in (0..columns).step_by(step) {
                    let n = if row < rows { step.min(columns - at) } else { 0 };
                    let pairs = pairs_of::<S>(from.wrapping_add(at), n);
                    S::store_n(to.add(at / 2), pairs, S::LANES.min(depth - at / 2));
                }
            }
        }
        return;
    }
    let mut at = 0;
    while at < columns {
        let n = step.min(columns - at);
        // SAFETY: loads stay within a row. A store writes a whole vector, whose end the next one writes again, but for
        // the last steps of the block, which write their MR numbers alone.
        unsafe {
            // A tile may have more rows than a vector has lanes.
            let mut done = 0;
            while done < S::MR {
                let mut square = [S::splat(0.0); LANES_MAX];
                for (i, square) in square.iter_mut().enumerate().take(S::LANES) {
                    let row = done + i;
                    if row < rows {
                        let from = x.add(row * stride + at);
                        *square = match pairs {
                            true => pairs_of::<S>(from, n),
                            false if n == step => S::load(from),
                            false => S::load_n(from, n),
                        };
                    }
                }
                S::transpose(&mut square);
                let (first, steps) = if pairs { (at / 2, n.div_ceil(2)) } else { (at, n) };
                let lanes = S::LANES.min(S::MR - done);
                for (i, &square) in square.iter().enumerate().take(steps) {
                    let to = to.add((first + i) * S::MR + done);
                    if S::MR <= S::LANES && (first + i + LANES_MAX) < depth {
                        S::store(to, square);
                    } else {
                        S::store_n(to, square, lanes);
                    }
                }
                done += S::LANES;
            }
        }
        at += step;
    }
}

/// `n ≤ 2 · LANES` numbers as pairs; zeros behind them.
///
/// # Safety
/// The CPU has `S`, with bf16; the numbers exist.
#[inline(always)]
unsafe fn pairs_of<S: Simd>(from: *const f32, n: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        if n == 2 * S::LANES {
            return S::pairs(S::load(from), S::load(from.add(S::LANES)));
        }
        let high = n.saturating_sub(S::LANES);
        let high = if high > 0 { S::load_n(from.add(S::LANES), high) } else { S::splat(0.0) };
        S::pairs(S::load_n(from, n.min(S::LANES)), high)
    }
}

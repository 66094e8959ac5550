//! Weights in groups of 16 rows, and their products.

use std::ops::Range;
use std::sync::Arc;

use super::format::{HALVES, Spans, with_format};
use super::strip::{FAR_AHEAD, VECTORS_MAX, unpack, vector};
use super::{BLOCK, Format, GROUP, Layout, SUPERBLOCK, Strip, code_words};
use crate::path::Work;
use crate::region::{LINE, Region};
use crate::simd::integer::{Integers, from_f16};
use crate::simd::portable::Portable;
use crate::simd::{Simd, from_bf16};
use crate::tile::Tile;

/// `[rows, columns]`, each row the weights of one output.
pub struct Matrix {
    rows: usize,
    columns: usize,
    layout: Layout,
    /// Shared with other matrices; from `at` on it is this one's.
    region: Arc<Region>,
    at: usize,
}

/// One group, to be filled: row `0..16` of it, by row and block of 32 columns.
pub struct Group<'a> {
    bytes: &'a mut [u8],
    layout: Layout,
    spans: Spans,
}

impl Matrix {
    /// All bits zero, until its [`groups`](Self::groups) are filled.
    ///
    /// # Panics
    /// If `columns` is no multiple of what the layout takes at a time, or there is nothing at all.
    pub fn new(rows: usize, columns: usize, layout: Layout) -> Self {
        Self::several(&[(rows, columns, layout)]).remove(0)
    }

    /// The same of several, in one piece of memory: rows, columns and layout of each.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn several(all: &[(usize, usize, Layout)]) -> Vec<Self> {
        let mut bytes = 0usize;
        let mut places = Vec::with_capacity(all.len());
        for &(rows, columns, layout) in all {
            assert!(
                rows > 0 && columns > 0 && columns.is_multiple_of(layout.columns_step()),
                "a {layout:?} of {columns}"
            );
            places.push(bytes);
            let more = rows.div_ceil(GROUP).checked_mul(layout.group_bytes(columns));
            bytes = more.and_then(|more| bytes.checked_add(more)).expect("a size in memory");
        }
        // Kernels that take whole vectors of the last line may read behind it.
        let region = Arc::new(Region::new(bytes + LINE, true));
        let matrix = |(&(rows, columns, layout), at): (&(usize, usize, Layout), usize)| Self {
            rows,
            columns,
            layout,
            region: region.clone(),
            at,
        };
        all.iter().zip(places).map(matrix).collect()
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Bytes of all groups.
    pub fn bytes(&self) -> usize {
        self.group_count() * self.group_bytes()
    }

    pub(crate) fn group_count(&self) -> usize {
        self.rows.div_ceil(GROUP)
    }

    fn group_bytes(&self) -> usize {
        self.layout.group_bytes(self.columns)
    }

    /// Rows 0 to 15, 16 to 31 and so on; the last may have fewer.
    pub fn groups(&mut self) -> impl ExactSizeIterator<Item = Group<'_>> + use<'_> {
        let (layout, columns, bytes) = (self.layout, self.columns, self.bytes());
        // SAFETY: the region holds as many bytes from here on, initialized; they are no other matrix's, and borrowed mutably
        // with `self`.
        let all = unsafe { std::slice::from_raw_parts_mut(self.region.start().as_ptr().add(self.at), bytes) };
        let spans = layout.spans();
        all.chunks_exact_mut(layout.group_bytes(columns)).map(move |bytes| Group { bytes, layout, spans })
    }

    fn start(&self) -> *const u8 {
        // SAFETY: the matrix lies within the region.
        unsafe { self.region.start().as_ptr().add(self.at).cast_const() }
    }

    /// The values of a row, as the file format defines them to the last bit.
    pub fn row(&self, row: usize, to: &mut [f32]) {
        assert!(row < self.rows && to.len() == self.columns);
        // SAFETY: the group lies within the memory.
        let group = unsafe { self.start().add(row / GROUP * self.group_bytes()) };
        let row = row % GROUP;
        let narrow = |column: usize| {
            // SAFETY: within the group, which is aligned.
            unsafe { *group.cast::<u16>().add(column * GROUP + row) }
        };
        match self.layout {
            Layout::F16 => to.iter_mut().enumerate().for_each(|(i, to)| *to = from_f16(narrow(i))),
            Layout::Bf16 => to.iter_mut().enumerate().for_each(|(i, to)| *to = from_bf16(narrow(i))),
            Layout::F32 => {
                // SAFETY: as above.
                to.iter_mut().enumerate().for_each(|(i, to)| *to = unsafe { *group.cast::<f32>().add(i * GROUP + row) })
            }
            _ => with_format!(self.layout, F => {
                // SAFETY: plain Rust runs everywhere; the group holds all blocks.
                unsafe { row_of::<F>(group, row, to) }
            }, _ => unreachable!("floats are above")),
        }
    }
}

/// # Safety
/// The group has the blocks of `to`.
unsafe fn row_of<F: Format>(group: *const u8, row: usize, to: &mut [f32]) {
    type Plain = <Portable as Simd>::Int;
    let (first, lane) = (row / Portable::LANES * Portable::LANES, row % Portable::LANES);
    for (block, to) in to.chunks_exact_mut(BLOCK).enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let span = group.add(block / F::SPAN * F::SPAN_BYTES);
            let (scales, block) = (span.add(F::SPAN_CODES), block % F::SPAN);
            let quads = F::quads::<Plain>(span.add(block * F::WORDS * LINE + first * 4));
            for (i, to) in to.iter_mut().enumerate() {
                let sub = i * F::SUBS / BLOCK;
                let code = i32::from(quads[i / 4][lane * 4 + i % 4]) - F::ZERO;
                *to = F::scale::<Portable>(scales, block, sub, first)[lane] * code as f32;
                if F::MIN {
                    *to += F::min::<Portable>(scales, block, sub, first)[lane];
                }
            }
        }
    }
}

impl Group<'_> {
    /// Word `word` of a row's block, as [`Layout`]'s codes want it: its bytes are four neighbouring columns.
    #[inline]
    pub fn word(&mut self, row: usize, block: usize, word: usize, value: u32) {
        let at = self.spans.codes(block) + word * LINE + 4 * row;
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// All words of a row's block.
    #[inline]
    pub fn words<const N: usize>(&mut self, row: usize, block: usize, values: [u32; N]) {
        let at = self.spans.codes(block);
        let lines = &mut self.bytes[at..at + N * LINE];
        for (line, value) in lines.as_chunks_mut::<LINE>().0.iter_mut().zip(values) {
            line[4 * row..4 * row + 4].copy_from_slice(&value.to_le_bytes());
        }
    }

    /// A weight of a layout of floats, as little-endian bytes.
    #[inline]
    pub fn float<const N: usize>(&mut self, row: usize, column: usize, value: [u8; N]) {
        let at = (column * GROUP + row) * N;
        self.bytes[at..at + N].copy_from_slice(&value);
    }

    /// The f16 scale of the row's block, or of its superblock in a super layout.
    #[inline]
    pub fn scale(&mut self, row: usize, block: usize, half: [u8; 2]) {
        let at = self.halves(block) + 2 * row;
        self.bytes[at..at + 2].copy_from_slice(&half);
    }

    /// Likewise what scales the minima.
    #[inline]
    pub fn min(&mut self, row: usize, block: usize, half: [u8; 2]) {
        let at = self.halves(block) + HALVES + 2 * row;
        self.bytes[at..at + 2].copy_from_slice(&half);
    }

    /// The small scale of run `run` of the row: of 32 columns in [`Layout::SuperFourMin`] and [`Layout::SuperFiveMin`],
    /// where `min` goes beside it; of 16 columns in the others, where it is scale and minimum, or signed.
    #[inline]
    pub fn run(&mut self, row: usize, run: usize, scale: u8, min: u8) {
        match self.layout {
            Layout::SuperFourMin | Layout::SuperFiveMin => {
                let at = self.spans.scales(run) + 2 * HALVES + self.spans.within(run) * 2 * GROUP + row;
                self.bytes[at] = scale;
                self.bytes[at + GROUP] = min;
            }
            _ => {
                let halves = if self.layout == Layout::SuperTwoMin { 2 * HALVES } else { HALVES };
                let (block, half) = (run / 2, run % 2);
                let at = self.spans.scales(block) + halves + (2 * self.spans.within(block) + half) * GROUP + row;
                self.bytes[at] = scale;
            }
        }
    }

    /// Where the f16 of a block are, or of a superblock: its span has no others.
    fn halves(&self, block: usize) -> usize {
        debug_assert!(self.layout.is_integer(), "floats have no scales");
        let block = block * (self.layout.columns_step() / BLOCK);
        self.spans.scales(block) + self.spans.within(block) * HALVES
    }
}

/// A row of activations, both ways.
#[derive(Clone, Copy)]
pub(crate) struct RowInput {
    /// As a strip of one row.
    pub codes: *const u32,
    pub floats: *const f32,
}

/// `to[row] (+)= weights · x` for the rows of some groups.
pub(crate) struct VectorProduct<'a> {
    pub matrix: &'a Matrix,
    pub groups: Range<usize>,
    pub x: RowInput,
    /// Where row 0 goes.
    pub to: *mut f32,
    pub accumulate: bool,
}

impl Work for VectorProduct<'_> {
    type Output = ();

    /// # Safety
    /// Also: x has the matrix's columns; the rows of `to` are this thread's.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Matrix { rows, columns, layout, .. } = *self.matrix;
        let bytes = layout.group_bytes(columns);
        for group in self.groups.clone() {
            let mut sums = [0.0f32; GROUP];
            let to_sums = sums.as_mut_ptr();
            // SAFETY: the group lies within the memory; x has these columns, as the caller promises.
            unsafe {
                let start = self.matrix.start().add(group * bytes);
                with_format!(layout, F => {
                    vector::<S, F>(start, columns / BLOCK, self.x.codes, to_sums);
                }, _ => float_vector::<S>(layout, start, columns, self.x.floats, to_sums));
            }
            let first = group * GROUP;
            for (i, sum) in sums.into_iter().enumerate().take(rows - first) {
                // SAFETY: a row of the matrix.
                unsafe {
                    let to = self.to.add(first + i);
                    *to = if self.accumulate { *to + sum } else { sum };
                }
            }
        }
    }
}

/// `LANES` weights of a layout of floats.
///
/// # Safety
/// The CPU has `S`; the group reaches as far.
#[inline(always)]
unsafe fn load_floats<S: Simd>(layout: Layout, group: *const u8, at: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        match layout {
            Layout::F16 => S::Int::load_f16(group.cast::<u16>().add(at)),
            Layout::Bf16 => S::load_bf16(group.cast::<u16>().add(at), S::LANES),
            _ => S::load(group.cast::<f32>().add(at)),
        }
    }
}

/// # Safety
/// The CPU has `S`; the group has so many columns, and so has x; `to` has room for 16 numbers.
#[inline(always)]
unsafe fn float_vector<S: Simd>(layout: Layout, group: *const u8, columns: usize, x: *const f32, to: *mut f32) {
    let mut row = 0;
    while row < GROUP {
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = S::splat(0.0);
            for column in 0..columns {
                let w = load_floats::<S>(layout, group, column * GROUP + row);
                // A line of f16 has two columns, one of f32 a single one.
                S::Int::prefetch(group.wrapping_add(FAR_AHEAD + column * GROUP * layout.float_bytes()));
                acc = S::fma(S::splat(*x.add(column)), w, acc);
            }
            S::store(to.add(row), acc);
        }
        row += S::LANES;
    }
}

/// Rows of activations, both ways: strips of the path's strip rows, and strips of the tile's rows `[columns, MR]`.
#[derive(Clone, Copy)]
pub(crate) struct Batch {
    pub rows: usize,
    pub codes: *const u32,
    pub floats: *const f32,
}

/// `to[i, row] (+)= weights · x[i]` for the rows of some groups and all rows i of a batch.
pub(crate) struct BatchProduct<'a> {
    pub matrix: &'a Matrix,
    pub groups: Range<usize>,
    pub x: Batch,
    /// Where row 0 of the matrix goes for row 0 of the batch.
    pub to: *mut f32,
    pub stride: usize,
    pub accumulate: bool,
    /// [`batch_scratch_bytes`], aligned to a line.
    pub scratch: *mut u8,
}

/// Room that unpacked groups take.
pub(crate) fn batch_scratch_bytes(columns: usize) -> usize {
    let blocks = columns.div_ceil(BLOCK);
    VECTORS_MAX * blocks * (8 * LINE + 2 * 2 * LINE) + columns * LINE
}

impl Work for BatchProduct<'_> {
    type Output = ();

    /// # Safety
    /// Also: x has the matrix's columns; these columns of `to` and the scratch are this thread's.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let layout = self.matrix.layout;
        // SAFETY: the caller's promise.
        unsafe { with_format!(layout, F => self.integers::<S, F>(), _ => self.floats::<S>()) }
    }
}

impl BatchProduct<'_> {
    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn integers<S: Simd, F: Format>(&self) {
        let Matrix { rows, columns, layout, .. } = *self.matrix;
        let bytes = layout.group_bytes(columns);
        let blocks = columns / BLOCK;
        let at_once = (S::Int::STRIP_VECTORS * S::LANES / GROUP).max(1);
        // SAFETY: the scratch is divided among the groups; all else is the caller's promise.
        unsafe {
            let codes = |i: usize| self.scratch.add(i * blocks * 8 * LINE);
            let numbers = codes(VECTORS_MAX).cast::<f32>();
            let scales = |i: usize| numbers.add(i * 2 * blocks * 2 * GROUP);
            let mins = |i: usize| scales(i).add(blocks * 2 * GROUP);
            let mut group = self.groups.start;
            while group < self.groups.end {
                let count = at_once.min(self.groups.end - group);
                for i in 0..count {
                    let start = self.matrix.start().add((group + i) * bytes);
                    unpack::<S, F>(start, blocks, codes(i), scales(i), mins(i));
                }
                let mut row = 0;
                while row < GROUP * count {
                    // A missing second group is the first again, and stored nowhere.
                    let place = |v: usize| {
                        let at = row + v * S::LANES;
                        if at < GROUP * count { (at / GROUP, at % GROUP) } else { (0, 0) }
                    };
                    let lanes = |v: usize| {
                        let at = row + v * S::LANES;
                        if at < GROUP * count { S::LANES.min(rows.saturating_sub(group * GROUP + at)) } else { 0 }
                    };
                    let each = |v: usize| (place(v), lanes(v));
                    let both = [each(0), each(1)];
                    let mut first = 0;
                    while first < self.x.rows {
                        // Behind the matrix's last row there is nothing, and nothing is stored.
                        let to = self.to.wrapping_add(first * self.stride + group * GROUP + row);
                        let strip = Strip {
                            blocks,
                            codes: both.map(|((i, at), _)| codes(i).add(at * 4).cast_const()),
                            scales: both.map(|((i, at), _)| scales(i).add(at).cast_const()),
                            mins: both.map(|((i, at), _)| mins(i).add(at).cast_const()),
                            x: self.x.codes.add(code_words(columns, first)),
                            to: [to, to.wrapping_add(S::LANES)],
                            lanes: both.map(|(_, lanes)| lanes),
                            stride: self.stride,
                            rows: S::Int::STRIP_ROWS.min(self.x.rows - first),
                            accumulate: self.accumulate,
                        };
                        S::Int::strip::<S, F>(&strip);
                        first += S::Int::STRIP_ROWS;
                    }
                    row += S::Int::STRIP_VECTORS * S::LANES;
                }
                group += count;
            }
        }
    }

    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn floats<S: Simd>(&self) {
        let Matrix { rows, columns, layout, .. } = *self.matrix;
        let panel = self.scratch.cast::<f32>();
        for group in self.groups.clone() {
            // SAFETY: the scratch has room for a group of f32; all else is the caller's promise.
            unsafe {
                let start = self.matrix.start().add(group * layout.group_bytes(columns));
                let mut at = 0;
                while at < columns * GROUP {
                    S::store(panel.add(at), load_floats::<S>(layout, start, at));
                    at += S::LANES;
                }
                let count = GROUP.min(rows - group * GROUP);
                let mut row = 0;
                while row < count {
                    let vectors = S::NV.min((GROUP - row) / S::LANES);
                    let width = (vectors * S::LANES).min(count - row);
                    let mut first = 0;
                    while first < self.x.rows {
                        let a = self.x.floats.add(first * columns);
                        let to = self.to.add(first * self.stride + group * GROUP + row);
                        let tile_rows = S::MR.min(self.x.rows - first);
                        let tile = Tile::new(columns, a, S::MR, panel.add(row), GROUP);
                        S::tile::<false>(vectors, &tile.into(to, self.stride, tile_rows, width, self.accumulate));
                        first += S::MR;
                    }
                    row += vectors * S::LANES;
                }
            }
        }
    }
}

const _: () = assert!(SUPERBLOCK == 8 * BLOCK);

//! Low-rank updates beside frozen weights (LoRA, Hu et al. 2021, section 4.1): `y += scale · B (A x)`, in f32 as trained.
//!
//! An adapter is numbers alone and is shared; which one is applied is a [`Session`](super::Session)'s business, so many of
//! them cost their own bytes on one decoder.

use super::Shape;
use crate::path::Work;
use crate::quantized::GROUP;
use crate::region::{LINE, Region};
use crate::simd::Simd;

/// Ranks beyond this are refused.
pub const RANK_MAX: usize = 256;
/// Products of one input at most: queries, keys, values.
pub(super) const SHARING: usize = 3;

/// A block's matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    Query,
    Key,
    Value,
    Mix,
    Gate,
    Up,
    Down,
}

impl Layer {
    pub const ALL: [Self; 7] = [Self::Query, Self::Key, Self::Value, Self::Mix, Self::Gate, Self::Up, Self::Down];

    /// Rows and columns.
    pub fn sizes(self, shape: &Shape) -> [usize; 2] {
        match self {
            Self::Query => [shape.queries(), shape.width],
            Self::Key | Self::Value => [shape.keys(), shape.width],
            Self::Mix => [shape.width, shape.queries()],
            Self::Gate | Self::Up => [shape.ffn, shape.width],
            Self::Down => [shape.width, shape.ffn],
        }
    }

    /// Its place among the layers with the same input, where `A x` goes.
    pub(super) fn low(self) -> usize {
        match self {
            Self::Query | Self::Mix | Self::Gate | Self::Down => 0,
            Self::Key | Self::Up => RANK_MAX,
            Self::Value => 2 * RANK_MAX,
        }
    }
}

/// The factors of some layers.
///
/// A token reads each of them once, from the memory itself where a base and its adapters are larger than the caches: so they
/// lie as they are read, from the first to the last, in huge pages.
pub struct Adapter {
    shape: Shape,
    blocks: usize,
    rank: usize,
    /// Where each block's layers' factors are.
    places: Vec<[Option<usize>; 7]>,
    /// A, and behind it B, scaled and transposed: each `[rank, length]`, in runs of [`GROUP`] along the length, the last of
    /// them shorter: `[length / GROUP][rank][GROUP]`.
    numbers: Region,
    count: usize,
}

/// The factors of one layer: A is `[rank, columns]`, B is `[rows, rank]`.
pub struct LayerFactors<'a> {
    pub block: usize,
    pub layer: Layer,
    pub a: &'a [f32],
    pub b: &'a [f32],
}

impl Adapter {
    /// # Panics
    /// If sizes do not agree, a layer comes twice, or the rank is 0 or above [`RANK_MAX`].
    pub fn new(shape: &Shape, blocks: usize, rank: usize, scale: f32, layers: &[LayerFactors<'_>]) -> Self {
        assert!((1..=RANK_MAX).contains(&rank), "a rank of 1 to {RANK_MAX}");
        let count = layers.iter().map(|layer| layer.a.len() + layer.b.len()).sum::<usize>();
        let numbers = Region::new((count * size_of::<f32>()).max(1), true);
        // SAFETY: so many numbers, zeros, that are nobody else's yet.
        let mut rest = unsafe { std::slice::from_raw_parts_mut(numbers.start().as_ptr().cast::<f32>(), count) };
        let mut places = vec![[None; 7]; blocks];
        for &LayerFactors { block, layer, a, b } in layers {
            let [rows, columns] = layer.sizes(shape);
            assert_eq!([a.len(), b.len()], [rank * columns, rows * rank], "the factors of block {block}'s {layer:?}");
            let place = places[block][layer as usize].replace(count - rest.len());
            assert_eq!(place, None, "block {block}'s {layer:?} once");
            let (to_a, behind) = rest.split_at_mut(a.len());
            let (to_b, behind) = behind.split_at_mut(b.len());
            in_runs(to_a, rank, |r, column| a[r * columns + column]);
            in_runs(to_b, rank, |r, row| scale * b[row * rank + r]);
            rest = behind;
        }
        Self { shape: shape.clone(), blocks, rank, places, numbers, count }
    }

    /// Bytes of the factors.
    pub fn bytes(&self) -> usize {
        self.count * size_of::<f32>()
    }

    pub(super) fn fits(&self, shape: &Shape, blocks: usize) -> bool {
        (&self.shape, self.blocks) == (shape, blocks)
    }

    /// A and B of a layer that has them.
    fn factors(&self, block: usize, layer: Layer) -> Option<[&[f32]; 2]> {
        let [rows, columns] = layer.sizes(&self.shape);
        // SAFETY: `new` has written so many, and nobody writes them any more.
        let all = unsafe { std::slice::from_raw_parts(self.numbers.start().as_ptr().cast::<f32>(), self.count) };
        let (a, b) = all[self.places[block][layer as usize]?..].split_at(self.rank * columns);
        Some([a, &b[..self.rank * rows]])
    }

    /// `A x` of layers with the same input.
    pub(super) fn narrow(&self, block: usize, layers: &'static [Layer], x: *const f32, to: *mut f32) -> Narrow<'_> {
        Narrow { adapter: self, block, layers, x, to }
    }

    /// Adds `B low` to some rows of a layer's product.
    pub(super) fn widen(&self, block: usize, layer: Layer, rows: std::ops::Range<usize>) -> Widen<'_> {
        Widen { adapter: self, block, layer, rows, low: std::ptr::null(), to: std::ptr::null_mut() }
    }
}

/// Writes a factor, of which `number` tells the numbers by place of the rank and place along its length.
fn in_runs(to: &mut [f32], rank: usize, number: impl Fn(usize, usize) -> f32) {
    for (i, run) in to.chunks_mut(rank * GROUP).enumerate() {
        let width = run.len() / rank;
        for (at, to) in run.iter_mut().enumerate() {
            *to = number(at / width, i * GROUP + at % width);
        }
    }
}

/// So many bytes ahead of where it is read a factor is asked for: what comes behind it is the next to be read.
const AHEAD: usize = 2048;

pub(super) struct Narrow<'a> {
    adapter: &'a Adapter,
    block: usize,
    layers: &'static [Layer],
    x: *const f32,
    /// [`SHARING`] times [`RANK_MAX`].
    to: *mut f32,
}

impl Work for Narrow<'_> {
    type Output = ();

    /// # Safety
    /// Also: `x` has the layers' columns; `to` is this thread's.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { adapter, block, layers, x, to } = self;
        let rank = adapter.rank;
        for &layer in layers {
            let Some([a, _]) = adapter.factors(block, layer) else { continue };
            let mut row = 0;
            while row < rank {
                // SAFETY: the caller's promise; A has these rows.
                unsafe {
                    let to = to.add(layer.low() + row);
                    match rank - row {
                        8.. => row += dots::<S, 8>(a, rank, row, x, to),
                        4.. => row += dots::<S, 4>(a, rank, row, x, to),
                        _ => row += dots::<S, 1>(a, rank, row, x, to),
                    }
                }
            }
        }
    }
}

/// `to[i] = A[row + i] · x` of `N` rows, which it returns.
///
/// # Safety
/// The CPU has `S`; A has these rows; the pointers reach so many numbers.
#[inline(always)]
unsafe fn dots<S: Simd, const N: usize>(a: &[f32], rank: usize, row: usize, x: *const f32, to: *mut f32) -> usize {
    let columns = a.len() / rank;
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [S::splat(0.0); N];
        let whole = columns / GROUP * GROUP;
        let mut column = 0;
        while column < whole {
            let run = a.as_ptr().add(column * rank + row * GROUP);
            for i in 0..N {
                S::prefetch(run.cast::<u8>().wrapping_add(AHEAD + i * LINE));
            }
            let mut at = 0;
            while at < GROUP {
                let x = S::load(x.add(column + at));
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = S::fma(S::load(run.add(i * GROUP + at)), x, *sum);
                }
                at += S::LANES;
            }
            column += GROUP;
        }
        let width = columns - whole;
        let run = a.as_ptr().add(whole * rank + row * width);
        let mut at = 0;
        while at < width {
            let n = S::LANES.min(width - at);
            let x = S::load_n(x.add(whole + at), n);
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = S::fma(S::load_n(run.add(i * width + at), n), x, *sum);
            }
            at += S::LANES;
        }
        for (i, sum) in sums.into_iter().enumerate() {
            *to.add(i) = S::sum(sum);
        }
    }
    N
}

pub(super) struct Widen<'a> {
    adapter: &'a Adapter,
    block: usize,
    layer: Layer,
    rows: std::ops::Range<usize>,
    low: *const f32,
    to: *mut f32,
}

impl Widen<'_> {
    /// `low` is what [`Narrow`] wrote, `to` is where row 0 is.
    pub(super) fn over(self, low: *const f32, to: *mut f32) -> Self {
        Self { low, to, ..self }
    }
}

impl Work for Widen<'_> {
    type Output = ();

    /// # Safety
    /// Also: the rows of `to` are this thread's; the first is that of a group.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { adapter, block, layer, rows, low, to } = self;
        let Some([_, b]) = adapter.factors(block, layer) else { return };
        let (rank, all) = (adapter.rank, b.len() / adapter.rank);
        let end = rows.end.min(all);
        // SAFETY: the caller's promise; B has these rows.
        unsafe {
            let low = low.add(layer.low());
            let mut row = rows.start;
            while row < end {
                let run = b.as_ptr().add(row * rank);
                let width = GROUP.min(all - row);
                for r in 0..rank {
                    S::prefetch(run.cast::<u8>().wrapping_add(AHEAD + r * LINE));
                }
                let mut at = 0;
                while at < width {
                    let (to, run, n) = (to.add(row + at), run.add(at), S::LANES.min(width - at));
                    let whole = n == S::LANES;
                    let mut sum = if whole { S::load(to) } else { S::load_n(to, n) };
                    for r in 0..rank {
                        let b = run.add(r * width);
                        let b = if whole { S::load(b) } else { S::load_n(b, n) };
                        sum = S::fma(S::splat(*low.add(r)), b, sum);
                    }
                    if whole {
                        S::store(to, sum)
                    } else {
                        S::store_n(to, sum, n)
                    }
                    at += S::LANES;
                }
                row += GROUP;
            }
        }
    }
}

//! Low-rank updates beside frozen weights (LoRA, Hu et al. 2021, section 4.1): `y += scale · B (A x)`, in f32 as trained.
//!
//! An adapter is numbers alone and is shared; which one is applied is a [`Session`](super::Session)'s business, so many of
//! them cost their own bytes on one decoder.

use super::Shape;
use crate::path::Work;
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
pub struct Adapter {
    shape: Shape,
    blocks: usize,
    rank: usize,
    /// Where each block's layers' factors are.
    places: Vec<[Option<usize>; 7]>,
    /// A as `[rank, columns]`, and behind it B, scaled and transposed, `[rank, rows]`.
    numbers: Vec<f32>,
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
        let mut places = vec![[None; 7]; blocks];
        let mut numbers = Vec::new();
        numbers.reserve_exact(layers.iter().map(|layer| layer.a.len() + layer.b.len()).sum());
        for &LayerFactors { block, layer, a, b } in layers {
            let [rows, columns] = layer.sizes(shape);
            assert_eq!([a.len(), b.len()], [rank * columns, rows * rank], "the factors of block {block}'s {layer:?}");
            let place = places[block][layer as usize].replace(numbers.len());
            assert_eq!(place, None, "block {block}'s {layer:?} once");
            numbers.extend_from_slice(a);
            numbers.extend((0..rank).flat_map(|r| (0..rows).map(move |row| scale * b[row * rank + r])));
        }
        Self { shape: shape.clone(), blocks, rank, places, numbers }
    }

    /// Bytes of the factors.
    pub fn bytes(&self) -> usize {
        self.numbers.len() * size_of::<f32>()
    }

    pub(super) fn fits(&self, shape: &Shape, blocks: usize) -> bool {
        (&self.shape, self.blocks) == (shape, blocks)
    }

    /// A and B of a layer that has them.
    fn factors(&self, block: usize, layer: Layer) -> Option<[&[f32]; 2]> {
        let [rows, columns] = layer.sizes(&self.shape);
        let (a, b) = self.numbers[self.places[block][layer as usize]?..].split_at(self.rank * columns);
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
            let columns = a.len() / rank;
            let mut row = 0;
            while row < rank {
                // SAFETY: the caller's promise; A has these rows of these columns.
                unsafe {
                    let (from, to) = (a.as_ptr().add(row * columns), to.add(layer.low() + row));
                    if rank - row >= 4 {
                        dots::<S, 4>(from, x, columns, to);
                        row += 4;
                    } else {
                        dots::<S, 1>(from, x, columns, to);
                        row += 1;
                    }
                }
            }
        }
    }
}

/// `to[i] = rows[i] · x` of `N` rows.
///
/// # Safety
/// The CPU has `S`; the pointers reach so many numbers.
#[inline(always)]
unsafe fn dots<S: Simd, const N: usize>(rows: *const f32, x: *const f32, columns: usize, to: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [S::splat(0.0); N];
        let mut at = 0;
        while at + S::LANES <= columns {
            let x = S::load(x.add(at));
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = S::fma(S::load(rows.add(i * columns + at)), x, *sum);
            }
            at += S::LANES;
        }
        if at < columns {
            let n = columns - at;
            let x = S::load_n(x.add(at), n);
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = S::fma(S::load_n(rows.add(i * columns + at), n), x, *sum);
            }
        }
        for (i, sum) in sums.into_iter().enumerate() {
            *to.add(i) = S::sum(sum);
        }
    }
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
    /// Also: the rows of `to` are this thread's.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { adapter, block, layer, rows, low, to } = self;
        let Some([_, b]) = adapter.factors(block, layer) else { return };
        let (rank, all) = (adapter.rank, b.len() / adapter.rank);
        let end = rows.end.min(all);
        let mut row = rows.start;
        while row < end {
            let n = S::LANES.min(end - row);
            // SAFETY: the caller's promise; B has these rows.
            unsafe {
                let (low, b) = (low.add(layer.low()), b.as_ptr().add(row));
                let mut sum = S::load_n(to.add(row), n);
                for r in 0..rank {
                    sum = S::fma(S::splat(*low.add(r)), S::load_n(b.add(r * all), n), sum);
                }
                S::store_n(to.add(row), sum, n);
            }
            row += S::LANES;
        }
    }
}

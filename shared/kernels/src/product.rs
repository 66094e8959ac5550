//! Products of activations with frozen weights, each with its adapter's low-rank part in the same pass.

use std::cell::RefCell;
use std::ops::Range;

use crate::buffer::{Buffer, SPOILED, spoil};
use crate::engine::{Engine, Shared, Task};
use crate::frozen::{F32, Frozen, Panel, pack};
use crate::region::Region;
use crate::rows::{Blocking, Group, Packed, chunk, chunks, pack_rows};
use crate::simd::{PANEL_MAX, Simd};
use crate::tile::Tile;

/// Steps of a panel at most: with 48 columns it fills 96 KiB of a second-level cache.
const DEPTH_MAX: usize = 512;

/// Columns of a result, as a sum of terms.
pub(crate) struct Columns<'a> {
    /// The first of them in the result.
    pub at: usize,
    pub columns: usize,
    pub terms: Vec<Term<'a>>,
    pub plus: Plus<'a>,
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub(crate) enum Plus<'a> {
    Nothing,
    /// What the result holds.
    Itself,
    /// Another matrix of the result's size.
    Rows(&'a [f32]),
}

/// `x Wᵀ + u E`, or `g W + u E`.
pub(crate) struct Term<'a> {
    pub x: &'a Packed,
    /// The columns of x that are summed over: from here on, as many as `length`.
    pub column: usize,
    pub length: usize,
    pub weights: &'a Frozen,
    /// True for `x Wᵀ`.
    pub transposed: bool,
    /// The first row (column, where transposed) of the weights that is summed over.
    pub from: usize,
    pub low_rank: Option<LowRank<'a>>,
}

/// The adapters' part of a term.
pub(crate) struct LowRank<'a> {
    pub u: &'a Inner,
    /// The first column of `u`.
    pub at: usize,
    /// For every group `E [rank, columns]`, if it has one.
    pub factors: Vec<Option<&'a Factor>>,
}

/// A factor of an adapter, `[rank, columns]`, with a vector's worth of memory behind the end.
pub(crate) struct Factor {
    numbers: Vec<f32>,
    pub rank: usize,
    pub columns: usize,
}

impl Factor {
    pub(crate) fn new(rank: usize, columns: usize, values: impl Iterator<Item = f32>) -> Self {
        let mut numbers = Vec::with_capacity(rank * columns + PANEL_MAX);
        numbers.extend(values);
        assert_eq!(numbers.len(), rank * columns, "a factor of {rank} × {columns}");
        numbers.resize(rank * columns + PANEL_MAX, if SPOILED { f32::NAN } else { 0.0 });
        Self { numbers, rank, columns }
    }
}

thread_local! {
    static ROOM: RefCell<Option<Region>> = const { RefCell::new(None) };
}

/// Room of this thread's own, for a panel or other scratch, aligned to a cache line. Its contents are left from earlier
/// use.
///
/// A guard and no closure: code in a closure is not compiled for the path.
pub(crate) struct Scratch(Option<Region>);

impl Scratch {
    pub(crate) fn new(numbers: usize) -> Self {
        // A layout is never empty.
        let bytes = numbers.max(1) * size_of::<f32>();
        let fits = |room: &Region| if SPOILED { room.bytes() == bytes } else { room.bytes() >= bytes };
        let room = ROOM.take().filter(fits).unwrap_or_else(|| Region::new(bytes, false));
        // SAFETY: this thread's own room, out of its place until it is put back.
        unsafe { spoil(room.start(), bytes) };
        Self(Some(room))
    }

    pub(crate) fn start(&mut self) -> *mut f32 {
        self.0.as_ref().expect("taken by drop alone").start().cast().as_ptr()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        ROOM.set(self.0.take());
    }
}

/// Sets columns of `to [rows, stride]`. Every task computes a panel of columns for all rows.
pub(crate) fn product(engine: &Engine, blocking: &Blocking, to: &mut [f32], stride: usize, all: &[Columns<'_>]) {
    struct Panels<'a> {
        blocking: &'a Blocking,
        to: Shared<f32>,
        stride: usize,
        all: &'a [Columns<'a>],
        /// Which of `all`, its column, and the number of columns.
        panels: Vec<(usize, usize, usize)>,
        threads: usize,
    }
    impl Task for Panels<'_> {
        const KERNEL: &'static str = "product";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            let (which, column, columns) = self.panels[i];
            let set = &self.all[which];
            let vectors = columns.div_ceil(S::LANES);
            let mut panel = Scratch::new(DEPTH_MAX * vectors * S::LANES);
            let mut plus = match set.plus {
                Plus::Nothing => std::ptr::null(),
                Plus::Itself => self.to.0.cast_const(),
                Plus::Rows(rows) => rows.as_ptr(),
            };
            // Threads take turns more often than not, so this one's next task will be about here.
            let after = self.panels.get(i + self.threads).map(|&(which, column, columns)| {
                let term = &self.all[which].terms[0];
                (term, column, columns)
            });
            for (t, term) in set.terms.iter().enumerate() {
                let next = set.terms.get(t + 1).map(|term| (term, column, columns)).or(after);
                // SAFETY: `product` has checked that all sizes agree; this task alone writes these columns.
                unsafe {
                    let to = self.to.0;
                    let place = Place { at: set.at + column, column, columns, vectors, to, stride: self.stride };
                    term.add::<S>(self.blocking, &place, panel.start(), plus, next);
                }
                plus = self.to.0;
            }
        }
    }
    assert_eq!(to.len(), blocking.rows * stride);
    let width = engine.path().run(PanelWidth);
    let mut panels = Vec::new();
    for (which, set) in all.iter().enumerate() {
        assert!(set.at + set.columns <= stride && !set.terms.is_empty());
        if let Plus::Rows(rows) = set.plus {
            assert_eq!(rows.len(), to.len(), "the sizes of a sum");
        }
        for term in &set.terms {
            let (sum, columns) = match term.transposed {
                true => (term.weights.columns(), term.weights.rows()),
                false => (term.weights.rows(), term.weights.columns()),
            };
            assert!(term.from + term.length <= sum && columns == set.columns, "the sizes of a product");
            assert!(term.column + term.length <= term.x.columns && term.length > 0, "the sizes of a product");
            // An odd length ends with half a pair, whose other half meets a zero of the panel.
            assert!(!term.x.pairs || term.column.is_multiple_of(2), "pairs stay together");
            if let Some(LowRank { u, at, factors }) = &term.low_rank {
                assert_eq!(factors.len(), blocking.groups.len());
                for factor in factors.iter().flatten() {
                    assert!(factor.columns == set.columns && at + factor.rank <= u.columns);
                }
            }
        }
        panels.extend((0..set.columns).step_by(width).map(|column| (which, column, width.min(set.columns - column))));
    }
    let tasks = panels.len();
    let threads = engine.threads();
    engine.parallel(tasks, &Panels { blocking, to: Shared(to.as_mut_ptr()), stride, all, panels, threads });
}

struct PanelWidth;

impl crate::path::Work for PanelWidth {
    type Output = usize;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> usize {
        S::LANES * S::NV
    }
}

/// Where a task's panel lies.
struct Place {
    /// Its first column in the result.
    at: usize,
    column: usize,
    columns: usize,
    vectors: usize,
    to: *mut f32,
    stride: usize,
}

impl Term<'_> {
    /// Steps that the terms' sum has, a pair of bf16 being one, and steps of each of the panels that it is taken in.
    fn steps(&self) -> (usize, usize) {
        let depth = self.length.div_ceil(self.per_step());
        (depth, depth.div_ceil(depth.div_ceil(DEPTH_MAX)))
    }

    fn per_step(&self) -> usize {
        if self.x.pairs { 2 } else { 1 }
    }

    /// The panel that begins with a step.
    fn panel(&self, from: usize, column: usize, columns: usize, lanes: usize) -> Panel {
        let (depth, part) = self.steps();
        let from_number = from * self.per_step();
        Panel {
            transposed: self.transposed,
            column,
            columns,
            from: self.from + from_number,
            depth: (part.min(depth - from) * self.per_step()).min(self.length - from_number),
            vectors: columns.div_ceil(lanes),
            pairs: self.x.pairs,
        }
    }

    /// While one panel is multiplied, the weights of the next one are fetched: those that `next` begins with, a term and
    /// its columns, behind the last one of this term.
    ///
    /// # Safety
    /// The CPU has `S`; the sizes agree; nobody else writes these columns; `panel` has room for `DEPTH_MAX` steps.
    #[inline(always)]
    unsafe fn add<S: Simd>(
        &self,
        blocking: &Blocking,
        place: &Place,
        panel: *mut f32,
        mut plus: *const f32,
        next: Option<(&Self, usize, usize)>,
    ) {
        let before = self.column / self.per_step();
        let (depth, part) = self.steps();
        let &Place { column, columns, vectors, .. } = place;
        let width = vectors * S::LANES;
        let mut from = 0;
        while from < depth {
            let steps = part.min(depth - from);
            let last = from + steps == depth;
            let ahead = match last {
                false => Some((self.weights, self.panel(from + steps, column, columns, S::LANES))),
                true => next.map(|(term, column, columns)| (term.weights, term.panel(0, column, columns, S::LANES))),
            };
            // SAFETY: the panels lie within the weights; x has `depth` steps in every block; the caller's promises.
            unsafe {
                self.weights.pack::<S>(&self.panel(from, column, columns, S::LANES), panel);
                for (g, group) in blocking.groups.iter().enumerate() {
                    let low_rank = match &self.low_rank {
                        Some(low_rank) if last => low_rank.factors[g].map(|factor| (low_rank, factor)),
                        _ => None,
                    };
                    for i in group.blocks.clone() {
                        if let Some((weights, panel)) = &ahead {
                            weights.prefetch::<S>(panel, i, blocking.blocks.len());
                        }
                        let block = blocking.blocks[i];
                        let (x, apart) = self.x.at::<S>(i, before + from);
                        let mut tile = Tile::new(steps, x, apart, panel, width);
                        if let Some((LowRank { u, at, .. }, factor)) = low_rank {
                            u.low_rank(i, *at, S::MR, factor, column, &mut tile);
                        }
                        let at = block.row * place.stride + place.at;
                        let mut tile = tile.into(place.to.add(at), place.stride, block.rows, columns, false);
                        if !plus.is_null() {
                            tile.plus = plus.add(at);
                        }
                        match self.x.pairs {
                            true => S::tile::<true>(vectors, &tile),
                            false => S::tile::<false>(vectors, &tile),
                        }
                    }
                }
            }
            plus = place.to;
            from += steps;
        }
    }
}

/// Products with the inner factors of several adapters, side by side: `x Aᵀ`, or `g B`.
pub(crate) struct Inner {
    /// `[rows, columns]`
    pub numbers: Buffer<f32>,
    /// `[block][columns][MR]`
    packed: Buffer<f32>,
    /// The ranks' sum, rounded up to whole vectors.
    pub columns: usize,
}

impl Inner {
    /// The same columns of some groups' rows, one group after the other.
    pub(crate) fn gathered(engine: &Engine, parts: &[(&Self, &Group)]) -> Self {
        let columns = parts[0].0.columns;
        assert!(parts.iter().all(|(inner, _)| inner.columns == columns), "adapters of different ranks");
        let tile = columns * engine.path().tile_rows();
        let times = |range: &Range<usize>, n: usize| range.start * n..range.end * n;
        let numbers = parts.iter().map(|(inner, group)| (&inner.numbers, times(&group.rows, columns)));
        let packed = parts.iter().map(|(inner, group)| (&inner.packed, times(&group.blocks, tile)));
        Self {
            numbers: engine.gathered(&numbers.collect::<Vec<_>>()),
            packed: engine.gathered(&packed.collect::<Vec<_>>()),
            columns,
        }
    }

    /// Gives a tile the low-rank part of `block`: columns from `at` on, times columns of the factor from `column` on.
    ///
    /// # Safety
    /// There are so many blocks of `tile_rows` rows, and `at + factor.rank` columns.
    #[inline(always)]
    pub(crate) unsafe fn low_rank(
        &self,
        block: usize,
        at: usize,
        tile_rows: usize,
        factor: &Factor,
        column: usize,
        tile: &mut Tile,
    ) {
        tile.more = factor.rank;
        // SAFETY: within the blocks, the caller's promise.
        tile.u = unsafe { self.packed.pointer().add((block * self.columns + at) * tile_rows) };
        tile.ldu = tile_rows;
        // SAFETY: the factor has more than `column` columns.
        tile.e = unsafe { factor.numbers.as_ptr().add(column) };
        tile.lde = factor.columns;
    }
}

/// Some columns of packed rows.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    pub x: &'a Packed,
    pub column: usize,
    pub columns: usize,
}

impl<'a> Part<'a> {
    pub(crate) fn all(x: &'a Packed) -> Self {
        Self { x, column: 0, columns: x.columns }
    }

    fn per_step(&self) -> usize {
        if self.x.pairs { 2 } else { 1 }
    }

    fn depth(&self) -> usize {
        self.columns.div_ceil(self.per_step())
    }
}

/// For every group the factors `[rank, in]` that stand side by side, each at its column.
pub(crate) fn inner(
    engine: &Engine,
    blocking: &Blocking,
    x: Part<'_>,
    columns: usize,
    factors: &[Vec<(usize, &Factor)>],
) -> Inner {
    struct Rows<'a> {
        blocking: &'a Blocking,
        x: Part<'a>,
        panels: &'a [Buffer<f32>],
        columns: usize,
        to: Shared<f32>,
        packed: Shared<f32>,
    }
    impl Task for Rows<'_> {
        const KERNEL: &'static str = "adapter";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            let (depth, pairs) = (self.x.depth(), self.x.x.pairs);
            let before = self.x.column / self.x.per_step();
            for (i, block) in chunk(&self.blocking.blocks, i) {
                let group = self.blocking.groups.iter().position(|group| group.blocks.contains(&i));
                let panels = &self.panels[group.expect("every block is in a group")];
                // SAFETY: this task alone writes these rows; `inner` has made all sizes agree.
                unsafe {
                    let (x, apart) = self.x.x.at::<S>(i, before);
                    let rows = self.to.0.add(block.row * self.columns);
                    let mut column = 0;
                    while column < self.columns {
                        let width = (S::NV * S::LANES).min(self.columns - column);
                        let panel = panels.pointer().add(column * depth);
                        let tile = Tile::new(depth, x, apart, panel, width);
                        let tile = tile.into(rows.add(column), self.columns, block.rows, width, false);
                        match pairs {
                            true => S::tile::<true>(width / S::LANES, &tile),
                            false => S::tile::<false>(width / S::LANES, &tile),
                        }
                        column += width;
                    }
                    let packed = self.packed.0.add(i * self.columns * S::MR);
                    pack_rows::<S>(rows, self.columns, block.rows, self.columns, false, packed);
                }
            }
        }
    }
    struct Panels<'a> {
        factors: &'a [Vec<(usize, &'a Factor)>],
        x: Part<'a>,
        columns: usize,
        to: Vec<Shared<f32>>,
    }
    impl Task for Panels<'_> {
        const KERNEL: &'static str = "adapter";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, group: usize) {
            let depth = self.x.depth();
            let mut column = 0;
            while column < self.columns {
                let width = (S::NV * S::LANES).min(self.columns - column);
                // The factors' rows in this panel, one under the other.
                let mut rows = vec![0.0f32; width * self.x.columns];
                for &(at, factor) in &self.factors[group] {
                    for r in (0..factor.rank).filter(|r| (column..column + width).contains(&(at + r))) {
                        let row = (at + r - column) * self.x.columns;
                        rows[row..row + self.x.columns]
                            .copy_from_slice(&factor.numbers[r * self.x.columns..][..self.x.columns]);
                    }
                }
                let panel = Panel {
                    transposed: true,
                    column: 0,
                    columns: width,
                    from: 0,
                    depth: self.x.columns,
                    vectors: width / S::LANES,
                    pairs: self.x.x.pairs,
                };
                // SAFETY: the panel is all of `rows`; the buffer has room for `depth · columns`; one task a group.
                unsafe {
                    pack::<S, _>(&F32(rows.as_ptr()), self.x.columns, &panel, self.to[group].0.add(column * depth))
                }
                column += width;
            }
        }
    }
    let lanes = engine.path().run(Lanes);
    let columns = columns.next_multiple_of(lanes);
    for &(at, factor) in factors.iter().flatten() {
        assert!(factor.columns == x.columns && at + factor.rank <= columns, "the sizes of an inner product");
    }
    assert_eq!(factors.len(), blocking.groups.len());
    assert!(x.column + x.columns <= x.x.columns);
    assert!(!x.x.pairs || x.column.is_multiple_of(2), "pairs stay together");
    let mut panels: Vec<Buffer<f32>> = factors.iter().map(|_| engine.take(x.depth() * columns)).collect();
    let to = panels.iter_mut().map(|panel| Shared(panel.as_mut_ptr())).collect();
    engine.parallel(factors.len(), &Panels { factors, x, columns, to });
    let mut numbers = engine.take(blocking.rows * columns);
    let mut packed = engine.take(blocking.blocks.len() * columns * engine.path().tile_rows());
    let (to, to_packed) = (Shared(numbers.as_mut_ptr()), Shared(packed.as_mut_ptr()));
    let task = Rows { blocking, x, panels: &panels, columns, to, packed: to_packed };
    engine.parallel(chunks(&blocking.blocks), &task);
    Inner { numbers, packed, columns }
}

struct Lanes;

impl crate::path::Work for Lanes {
    type Output = usize;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> usize {
        S::LANES
    }
}

/// Sums of outer products over the rows of a group: `uᵀ x`, `[rank, columns]`, for `rank` columns of `u` from `at` on.
pub(crate) struct Outer<'a> {
    pub u: &'a Inner,
    pub at: usize,
    pub rank: usize,
    /// `[rows, stride]`, of which columns from `column` on count.
    pub x: &'a Buffer<f32>,
    pub stride: usize,
    pub column: usize,
    pub columns: usize,
    pub rows: std::ops::Range<usize>,
}

/// The results come in the order of `all`.
pub(crate) fn outer(engine: &Engine, all: &[Outer<'_>]) -> Vec<Vec<f32>> {
    struct Panels<'a> {
        all: &'a [Outer<'a>],
        panels: Vec<(usize, usize, usize)>,
        to: Vec<Shared<f32>>,
    }
    impl Task for Panels<'_> {
        const KERNEL: &'static str = "adapter";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            let (which, column, columns) = self.panels[i];
            let outer = &self.all[which];
            let vectors = columns.div_ceil(S::LANES);
            let mut at = 0;
            while at < outer.rank {
                let rows = S::MR.min(outer.rank - at);
                // SAFETY: the rows are within `u` and `x`, behind whose ends whole vectors may be read; this task alone
                // writes these columns of the result.
                unsafe {
                    let u = outer.u.numbers.pointer().add(outer.rows.start * outer.u.columns + outer.at + at);
                    let x = outer.x.pointer().add(outer.rows.start * outer.stride + outer.column + column);
                    let tile = Tile::new(outer.rows.len(), u, outer.u.columns, x, outer.stride);
                    let to = self.to[which].0.add(at * outer.columns + column);
                    S::tile::<false>(vectors, &tile.into(to, outer.columns, rows, columns, false));
                }
                at += rows;
            }
        }
    }
    let width = engine.path().run(PanelWidth);
    let mut results: Vec<Vec<f32>> = all.iter().map(|outer| vec![0.0; outer.rank * outer.columns]).collect();
    let mut panels = Vec::new();
    for (which, outer) in all.iter().enumerate() {
        let rows = outer.rows.end;
        assert!(outer.column + outer.columns <= outer.stride && rows * outer.stride <= outer.x.len());
        assert!(rows * outer.u.columns <= outer.u.numbers.len() && outer.at + outer.rank <= outer.u.columns);
        let columns = (0..outer.columns).step_by(width);
        panels.extend(columns.map(|column| (which, column, width.min(outer.columns - column))));
    }
    let to = results.iter_mut().map(|result| Shared(result.as_mut_ptr())).collect();
    engine.parallel(panels.len(), &Panels { all, panels, to });
    results
}

/// `W x` for few rows of x, without packing: `to [rows, W.rows]`.
pub(crate) fn row_products(engine: &Engine, weights: &Frozen, x: &[f32], rows: usize, to: &mut [f32]) {
    struct Rows<'a> {
        weights: &'a Frozen,
        x: &'a [f32],
        rows: usize,
        to: Shared<f32>,
    }
    const ROWS: usize = 64;
    impl Task for Rows<'_> {
        const KERNEL: &'static str = "product";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            let all = self.weights.rows();
            let some = i * ROWS..all.min((i + 1) * ROWS);
            for row in 0..self.rows {
                // SAFETY: this task alone writes these numbers of every row.
                let to = unsafe { std::slice::from_raw_parts_mut(self.to.0.add(row * all + some.start), some.len()) };
                let x = self.x[row * self.weights.columns()..].as_ptr();
                // SAFETY: `row_products` has checked the sizes.
                unsafe { self.weights.row_products::<S>(some.clone(), x, to) }
            }
        }
    }
    assert!(x.len() == rows * weights.columns() && to.len() == rows * weights.rows(), "the sizes of a product");
    let task = Rows { weights, x, rows, to: Shared(to.as_mut_ptr()) };
    engine.parallel(weights.rows().div_ceil(ROWS), &task);
}

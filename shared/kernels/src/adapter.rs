//! Low-rank adapters of a block's linear layers (Hu et al., arXiv 2106.09685): `y = W x + s · B A x`.

use crate::buffer::Buffer;
use crate::engine::{Engine, Shared, Task};
use crate::product::{Factor, Inner, LowRank, Outer, Part, inner, outer};
use crate::rows::{Blocking, Group, Packed, RowBlock, chunk, chunks};
use crate::simd::Simd;
use crate::tile::Tile;

/// The linear layers of a block, in the order of its adapters: q, k, v, o, gate, up, down.
pub const LAYERS: usize = 7;

/// One layer's factors.
pub struct Pair {
    /// `[rank, in]`
    a: Factor,
    /// `s · Bᵀ [rank, out]`
    b: Factor,
    scale: f32,
}

/// The adapters of a block; a layer may have none.
pub type BlockAdapter = [Option<Pair>; LAYERS];

/// For a group and a layer: what the low-rank path's input is multiplied by, `[rows of the group, in]`.
pub type Masks<'a> = &'a (dyn Fn(usize, usize) -> Option<Vec<f32>> + Sync);

/// Gradients of one layer's factors, `[rank, in]` and `[out, rank]`; empty where a factor does not train.
pub struct PairGradients {
    pub a: Vec<f32>,
    pub b: Vec<f32>,
}

impl Pair {
    /// From `a [rank, in]`, `b [out, rank]` and the scale s.
    ///
    /// # Panics
    /// If the numbers do not fit the sizes.
    pub fn new(rank: usize, a: &[f32], b: &[f32], scale: f32) -> Self {
        let (inputs, outputs) = (a.len() / rank, b.len() / rank);
        let turned = (0..rank).flat_map(|r| (0..outputs).map(move |o| scale * b[o * rank + r]));
        Self { a: Factor::new(rank, inputs, a.iter().copied()), b: Factor::new(rank, outputs, turned), scale }
    }

    pub fn rank(&self) -> usize {
        self.a.rank
    }
}

/// What a product's adapters need to know of it: the layers that share its input.
#[derive(Clone, Copy)]
pub(crate) struct Layers<'a> {
    pub engine: &'a Engine,
    pub blocking: &'a Blocking,
    /// By group.
    pub adapters: &'a [&'a BlockAdapter],
    pub masks: Option<Masks<'a>>,
    pub layers: &'a [usize],
}

/// The input of layers, `[rows, in]`, as it lies there or as it is made.
pub(crate) enum InputRows<'a> {
    Have(&'a Buffer<f32>),
    Make(&'a dyn Fn() -> Buffer<f32>),
}

/// `x Aᵀ` (or `g · s B`) of some layers, each in some columns of some [`Inner`].
pub(crate) struct Inners {
    parts: Vec<Inner>,
    /// For every layer the part and the first column.
    places: Vec<(usize, usize)>,
}

impl Inners {
    /// Those of some groups, one after the other, all of adapters of the same ranks.
    pub(crate) fn gathered(engine: &Engine, groups: &[(&Self, &Group)]) -> Self {
        let places = &groups[0].0.places;
        assert!(groups.iter().all(|(inners, _)| inners.places == *places), "adapters of different ranks");
        let part = |i: usize| groups.iter().map(|(inners, group)| (&inners.parts[i], *group)).collect::<Vec<_>>();
        let parts = (0..groups[0].0.parts.len()).map(|i| Inner::gathered(engine, &part(i))).collect();
        Self { parts, places: places.clone() }
    }
}

impl<'a> Layers<'a> {
    fn pair(&self, group: usize, layer: usize) -> Option<&'a Pair> {
        self.adapters[group][layer].as_ref()
    }

    fn none(&self) -> bool {
        self.layers.iter().all(|&layer| self.adapters.iter().all(|adapter| adapter[layer].is_none()))
    }

    /// The most columns any group's adapter of this layer takes.
    fn rank(&self, layer: usize) -> usize {
        self.adapters.iter().filter_map(|adapter| adapter[layer].as_ref()).map(|pair| pair.a.rank).max().unwrap_or(0)
    }

    /// `x Aᵀ` for all layers; `rows` makes x row by row, where dropout wants it.
    pub(crate) fn inner_of_input(&self, x: &Packed, rows: &dyn Fn() -> Buffer<f32>) -> Option<Inners> {
        if self.none() {
            return None;
        }
        let (mut parts, mut places, mut column) = (Vec::new(), vec![(0, 0); self.layers.len()], 0);
        let mut together: Vec<Vec<(usize, &Factor)>> = self.adapters.iter().map(|_| Vec::new()).collect();
        for (i, &layer) in self.layers.iter().enumerate() {
            if let Some(masked) = self.masked(layer, rows) {
                let packed = Packed::of(self.engine, self.blocking, &masked, x.columns);
                let factors = self.each(|group| self.pair(group, layer).map(|pair| (0, &pair.a)).into_iter().collect());
                parts.push(inner(self.engine, self.blocking, Part::all(&packed), self.rank(layer), &factors));
                places[i] = (parts.len() - 1, 0);
                continue;
            }
            for (group, factors) in together.iter_mut().enumerate() {
                factors.extend(self.pair(group, layer).map(|pair| (column, &pair.a)));
            }
            // The part is made below, behind those with dropout.
            places[i] = (usize::MAX, column);
            column += self.rank(layer);
        }
        if column > 0 {
            parts.push(inner(self.engine, self.blocking, Part::all(x), column, &together));
        }
        let last = parts.len().saturating_sub(1);
        places.iter_mut().filter(|(part, _)| *part == usize::MAX).for_each(|(part, _)| *part = last);
        Some(Inners { parts, places })
    }

    /// `g · s B` of one layer's gradient.
    pub(crate) fn inner_of_gradient(&self, layer: usize, g: Part<'_>) -> Option<Inner> {
        let rank = self.rank(layer);
        let factors = self.each(|group| self.pair(group, layer).map(|pair| (0, &pair.b)).into_iter().collect());
        (rank > 0).then(|| inner(self.engine, self.blocking, g, rank, &factors))
    }

    fn each<T>(&self, f: impl Fn(usize) -> T) -> Vec<T> {
        (0..self.adapters.len()).map(f).collect()
    }

    /// `x ∘ mask`, if any group drops inputs of this layer.
    fn masked(&self, layer: usize, rows: &dyn Fn() -> Buffer<f32>) -> Option<Buffer<f32>> {
        let masks = self.masks?;
        let masks = self.each(|group| self.pair(group, layer).and_then(|_| masks(group, layer)));
        if masks.iter().all(Option::is_none) {
            return None;
        }
        let mut x = rows();
        self.mask(&mut x, &masks);
        Some(x)
    }

    fn mask(&self, x: &mut [f32], masks: &[Option<Vec<f32>>]) {
        let columns = x.len() / self.blocking.rows;
        for (group, mask) in self.blocking.groups.iter().zip(masks) {
            let rows = &mut x[group.rows.start * columns..group.rows.end * columns];
            for (x, mask) in rows.iter_mut().zip(mask.iter().flatten()) {
                *x *= mask;
            }
        }
    }

    /// The low-rank part of layer `i`'s output.
    pub(crate) fn of_output<'b>(&self, i: usize, inners: &'b Option<Inners>) -> Option<LowRank<'b>>
    where
        'a: 'b,
    {
        let (part, at) = inners.as_ref()?.places[i];
        let layer = self.layers[i];
        (self.rank(layer) > 0).then(|| {
            let u = &inners.as_ref().expect("looked at above").parts[part];
            LowRank { u, at, factors: self.each(|group| self.pair(group, layer).map(|pair| &pair.b)) }
        })
    }

    /// The low-rank part of the input's gradient, unless a mask stands between.
    pub(crate) fn of_input<'b>(&self, layer: usize, gradient: &'b Option<Inner>) -> Option<LowRank<'b>>
    where
        'a: 'b,
    {
        if self.drops(layer) {
            return None;
        }
        let u = gradient.as_ref()?;
        Some(LowRank { u, at: 0, factors: self.each(|group| self.pair(group, layer).map(|pair| &pair.a)) })
    }

    fn drops(&self, layer: usize) -> bool {
        let masked = |masks: Masks<'_>| {
            (0..self.adapters.len()).any(|group| self.pair(group, layer).is_some() && masks(group, layer).is_some())
        };
        self.masks.is_some_and(masked)
    }

    /// Adds the low-rank parts of the input's gradient that stand behind a mask.
    pub(crate) fn add_masked_input_gradient(&self, layer: usize, gradient: &Option<Inner>, dx: &mut [f32]) {
        let (Some(u), Some(masks), true) = (gradient, self.masks, self.drops(layer)) else { return };
        let columns = dx.len() / self.blocking.rows;
        let factors = self.each(|group| self.pair(group, layer).map(|pair| &pair.a));
        let mut part = expand(self.engine, self.blocking, u, &factors, columns);
        self.mask(&mut part, &self.each(|group| masks(group, layer)));
        for (dx, part) in dx.iter_mut().zip(part.iter()) {
            *dx += part;
        }
    }

    /// Gradients of the factors of every layer, for every group: `dA = (g s B)ᵀ x`, `dB = s · gᵀ (x Aᵀ)`.
    ///
    /// `rows` are the layers' input; `g [rows, stride]` holds layer i's gradient from column `at[i]` on.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn gradients(
        &self,
        trains: [bool; 2],
        inners: &Option<Inners>,
        gradients: &[Option<Inner>],
        rows: &InputRows<'_>,
        g: &Buffer<f32>,
        at: &[usize],
        to: &mut [[Option<PairGradients>; LAYERS]],
    ) {
        let Some(inners) = inners else { return };
        let stride = g.len() / self.blocking.rows;
        let mut plain: Option<Buffer<f32>> = None;
        for (i, &layer) in self.layers.iter().enumerate() {
            let Some(gradient) = &gradients[i] else { continue };
            let masked = self.masked(layer, &|| match rows {
                InputRows::Have(x) => self.engine.copy_of(x),
                InputRows::Make(make) => make(),
            });
            let x = match (&masked, rows) {
                (Some(x), _) => x,
                (None, InputRows::Have(x)) => *x,
                (None, InputRows::Make(make)) => &*plain.get_or_insert_with(make),
            };
            let columns = x.len() / self.blocking.rows;
            let (part, column) = inners.places[i];
            let mut all = Vec::new();
            for (group, slot) in self.blocking.groups.iter().enumerate() {
                let Some(pair) = self.pair(group, layer) else { continue };
                let rank = pair.a.rank;
                let rows = slot.rows.clone();
                if trains[0] {
                    all.push(Outer {
                        u: gradient,
                        at: 0,
                        rank,
                        x,
                        stride: columns,
                        column: 0,
                        columns,
                        rows: rows.clone(),
                    });
                }
                if trains[1] {
                    let u = &inners.parts[part];
                    let columns = pair.b.columns;
                    all.push(Outer { u, at: column, rank, x: g, stride, column: at[i], columns, rows });
                }
            }
            let mut results = outer(self.engine, &all).into_iter();
            for (group, to) in to.iter_mut().enumerate() {
                let Some(pair) = self.pair(group, layer) else { continue };
                let mut next = |train: bool| if train { results.next().expect("one for each") } else { Vec::new() };
                let a = next(trains[0]);
                let b = turned(&next(trains[1]), pair.b.rank, pair.scale);
                to[layer] = Some(PairGradients { a, b });
            }
        }
    }
}

/// `[rank, out] → scale · [out, rank]`
fn turned(values: &[f32], rank: usize, scale: f32) -> Vec<f32> {
    let mut turned = vec![0.0; values.len()];
    for (r, values) in values.chunks_exact(values.len().max(rank) / rank).enumerate() {
        for (to, value) in turned[r..].iter_mut().step_by(rank).zip(values) {
            *to = scale * value;
        }
    }
    turned
}

/// `u E`, `[rows, columns]`.
fn expand(engine: &Engine, blocking: &Blocking, u: &Inner, factors: &[Option<&Factor>], columns: usize) -> Buffer<f32> {
    struct Blocks<'a> {
        blocking: &'a Blocking,
        u: &'a Inner,
        factors: &'a [Option<&'a Factor>],
        columns: usize,
        to: Shared<f32>,
    }
    impl Task for Blocks<'_> {
        const KERNEL: &'static str = "adapter";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            for (i, RowBlock { row, rows }) in chunk(&self.blocking.blocks, i) {
                let group = self.blocking.groups.iter().position(|group| group.blocks.contains(&i));
                let Some(factor) = self.factors[group.expect("every block is in a group")] else { continue };
                let mut column = 0;
                while column < self.columns {
                    let columns = (S::NV * S::LANES).min(self.columns - column);
                    // SAFETY: this task alone writes these rows; u and the factor reach whole tiles.
                    unsafe {
                        let mut tile = Tile::new(0, std::ptr::null(), 0, std::ptr::null(), 0);
                        self.u.low_rank(i, 0, S::MR, factor, column, &mut tile);
                        let to = self.to.0.add(row * self.columns + column);
                        let tile = tile.into(to, self.columns, rows, columns, false);
                        S::tile::<false>(columns.div_ceil(S::LANES), &tile);
                    }
                    column += columns;
                }
            }
        }
    }
    let mut expanded = engine.zeros(blocking.rows * columns);
    let to = Shared(expanded.as_mut_ptr());
    engine.parallel(chunks(&blocking.blocks), &Blocks { blocking, u, factors, columns, to });
    expanded
}

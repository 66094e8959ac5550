//! Causal grouped-query attention within segments, without a matrix of all queries by all keys.
//!
//! A task takes one segment and one key-value head, and the queries that share it in strips of two vectors. Scores are
//! made transposed, `[keys, strip]`: then the softmax runs down the lanes, and the weights stand as a tile reads them.
//! Kept for the way back is the logarithm of each query's sum alone; the weights are made again from it, as in
//! FlashAttention (Dao et al., arXiv 2205.14135), but a strip's keys all at once, so that no sum is ever rescaled.
//!
//! Where the engine multiplies pairs of bf16 and tiles take them step by step, products here are of pairs too: of
//! neighbouring channels, keys or queries. Scores, the softmax and all sums are f32; what is multiplied is rounded.

use crate::buffer::Buffer;
use crate::engine::{Engine, Shared, Task};
use crate::frozen::{F32, Panel, pack};
use crate::product::Scratch;
use crate::rows::pack_rows;
use crate::simd::{LANES_MAX, Simd, exp};
use crate::tile::Tile;

/// Queries, keys and values side by side: `[rows, (heads + 2 · kv_heads) · size]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub size: usize,
}

impl Shape {
    pub(crate) fn stride(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.size
    }
}

/// `(first row, rows)` of a segment.
pub(crate) type Span = (usize, usize);

/// Mixed values `[rows, heads · size]`, and for every row and head the logarithm of the sum.
pub(crate) fn forward(engine: &Engine, shape: Shape, spans: &[Span], qkv: &Buffer<f32>) -> (Buffer<f32>, Buffer<f32>) {
    struct Forward<'a> {
        shape: Shape,
        spans: &'a [Span],
        qkv: &'a Buffer<f32>,
        mixed: Shared<f32>,
        sums: Shared<f32>,
        pairs: bool,
    }
    impl Task for Forward<'_> {
        const KERNEL: &'static str = "attention";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            // SAFETY: what is promised to this function, is to the other.
            unsafe { if self.pairs && takes_pairs::<S>() { self.of::<S, true>(i) } else { self.of::<S, false>(i) } }
        }
    }
    impl Forward<'_> {
        /// # Safety
        /// As [`Task::run`].
        #[inline(always)]
        unsafe fn of<S: Simd, const PAIRS: bool>(&self, i: usize) {
            let Shape { heads, kv_heads, size } = self.shape;
            let (start, length) = self.spans[i / kv_heads];
            let kv = i % kv_heads;
            let stride = self.shape.stride();
            let strip_keys = length.next_multiple_of(S::MR);
            let keys_packed = strip_keys * size;
            let scores_room = (strip_keys + LANES_MAX) * 2 * S::LANES;
            let numbers = keys_packed + size * 2 * S::LANES + scores_room + paired_room::<S, PAIRS>(length, size);
            let mut scratch = Scratch::new(numbers);
            let scratch = scratch.start();
            // SAFETY: `forward` has checked the sizes; this task alone writes the rows of these heads; `scratch` is
            // divided among what follows.
            unsafe {
                let at = Rows { qkv: self.qkv.pointer().add(start * stride), stride, size };
                let (keys, values) = (at.head(heads + kv), at.head(heads + kv_heads + kv));
                let queries = scratch.add(keys_packed);
                let scores = queries.add(size * 2 * S::LANES);
                pack_keys::<S, PAIRS>(keys, stride, length, size, scratch);
                let values = paired::<S, PAIRS>(values, stride, length, size, scores.add(scores_room));
                for head in kv * (heads / kv_heads)..(kv + 1) * (heads / kv_heads) {
                    let mut first = 0;
                    while first < length {
                        let strip = Strip::new::<S>(first, length);
                        strip.pack::<S, PAIRS>(at.head(head), stride, size, queries);
                        strip.scores::<S, PAIRS>(scratch, queries, size, scores);
                        let sums = self.sums.0.add((start + first) * heads + head);
                        strip.softmax::<S, PAIRS>(size, scores, sums, heads);
                        let mixed = self.mixed.0.add((start + first) * heads * size + head * size);
                        strip.mix::<S, PAIRS>(scores, values, size, mixed, heads * size);
                        first += strip.queries;
                    }
                }
            }
        }
    }
    let rows = check(shape, spans, qkv);
    let mut mixed = engine.take(rows * shape.heads * shape.size);
    let mut sums = engine.take(rows * shape.heads);
    let (to_mixed, to_sums) = (Shared(mixed.as_mut_ptr()), Shared(sums.as_mut_ptr()));
    let pairs = engine.multiplies_bf16();
    let task = Forward { shape, spans, qkv, mixed: to_mixed, sums: to_sums, pairs };
    engine.parallel(spans.len() * shape.kv_heads, &task);
    (mixed, sums)
}

/// The gradient of queries, keys and values from that of the mixed values.
pub(crate) fn backward(
    engine: &Engine,
    shape: Shape,
    spans: &[Span],
    qkv: &Buffer<f32>,
    sums: &[f32],
    gradient: &Buffer<f32>,
) -> Buffer<f32> {
    struct Backward<'a> {
        shape: Shape,
        spans: &'a [Span],
        qkv: &'a Buffer<f32>,
        sums: &'a [f32],
        gradient: &'a Buffer<f32>,
        to: Shared<f32>,
        pairs: bool,
    }
    impl Task for Backward<'_> {
        const KERNEL: &'static str = "attention back";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            // SAFETY: what is promised to this function, is to the other.
            unsafe { if self.pairs && takes_pairs::<S>() { self.of::<S, true>(i) } else { self.of::<S, false>(i) } }
        }
    }
    impl Backward<'_> {
        /// # Safety
        /// As [`Task::run`].
        #[inline(always)]
        unsafe fn of<S: Simd, const PAIRS: bool>(&self, i: usize) {
            let Shape { heads, kv_heads, size } = self.shape;
            let (start, length) = self.spans[i / kv_heads];
            let kv = i % kv_heads;
            let stride = self.shape.stride();
            let width = heads * size;
            let keys = length.next_multiple_of(S::MR);
            let lanes = 2 * S::LANES;
            // Packed keys and values; a strip's queries and gradients; weights and their gradients, both ways round; pairs of
            // keys, of a strip's queries and gradients, and of the weights' gradients.
            let turned_stride = length.next_multiple_of(S::LANES) + LANES_MAX;
            let (scores_room, turned_room) = ((keys + LANES_MAX) * lanes, turned_stride * lanes);
            let keys_paired_room = paired_room::<S, PAIRS>(length, size);
            let strip_paired_room = paired_room::<S, PAIRS>(lanes, size);
            let slopes_paired_room = paired_room::<S, PAIRS>(keys, lanes);
            let numbers = 2 * (keys + lanes) * size + 2 * scores_room + 2 * turned_room;
            let numbers = numbers + keys_paired_room + 2 * strip_paired_room + slopes_paired_room;
            let mut scratch = Scratch::new(numbers);
            let scratch = scratch.start();
            // SAFETY: `backward` has checked the sizes; this task alone writes the rows of these heads; `scratch` is
            // divided among what follows.
            unsafe {
                let at = Rows { qkv: self.qkv.pointer().add(start * stride), stride, size };
                let (key, value) = (at.head(heads + kv), at.head(heads + kv_heads + kv));
                let keys_packed = scratch;
                let values_packed = keys_packed.add(keys * size);
                let queries = values_packed.add(keys * size);
                let gradients = queries.add(size * lanes);
                let weights = gradients.add(size * lanes);
                let slopes = weights.add(scores_room);
                let weights_turned = slopes.add(scores_room);
                let slopes_turned = weights_turned.add(turned_room);
                let keys_paired = slopes_turned.add(turned_room);
                let query_paired = keys_paired.add(keys_paired_room);
                let gradient_paired = query_paired.add(strip_paired_room);
                let slopes_paired = gradient_paired.add(strip_paired_room);
                pack_keys::<S, PAIRS>(key, stride, length, size, keys_packed);
                pack_keys::<S, PAIRS>(value, stride, length, size, values_packed);
                let key_steps = paired::<S, PAIRS>(key, stride, length, size, keys_paired);
                let to = self.to.0.add(start * stride);
                let (to_key, to_value) = (to.add((heads + kv) * size), to.add((heads + kv_heads + kv) * size));
                for row in 0..length {
                    std::ptr::write_bytes(to_key.add(row * stride), 0, size);
                    std::ptr::write_bytes(to_value.add(row * stride), 0, size);
                }
                for head in kv * (heads / kv_heads)..(kv + 1) * (heads / kv_heads) {
                    let mut first = 0;
                    while first < length {
                        let strip = Strip::new::<S>(first, length);
                        let row = start + first;
                        let query = at.head(head).add(first * stride);
                        let gradient = self.gradient.pointer().add(row * width + head * size);
                        strip.pack::<S, PAIRS>(at.head(head), stride, size, queries);
                        strip.pack_at::<S, PAIRS>(gradient, width, size, gradients);
                        strip.scores::<S, PAIRS>(keys_packed, queries, size, weights);
                        strip.scores::<S, PAIRS>(values_packed, gradients, size, slopes);
                        let sums = self.sums[row * heads + head..].as_ptr();
                        strip.slopes::<S>(size, weights, slopes, sums, heads);
                        strip.turn::<S, PAIRS>(weights, weights_turned, turned_stride);
                        strip.turn::<S, PAIRS>(slopes, slopes_turned, turned_stride);
                        let to_query = to.add(first * stride + head * size);
                        let slope_steps = paired::<S, PAIRS>(slopes, lanes, strip.keys, lanes, slopes_paired);
                        strip.mix::<S, PAIRS>(slope_steps.start, key_steps, size, to_query, stride);
                        let steps = paired::<S, PAIRS>(gradient, width, strip.queries, size, gradient_paired);
                        strip.spread::<S, PAIRS>(weights_turned, turned_stride, steps, size, to_value, stride);
                        let steps = paired::<S, PAIRS>(query, stride, strip.queries, size, query_paired);
                        strip.spread::<S, PAIRS>(slopes_turned, turned_stride, steps, size, to_key, stride);
                        first += strip.queries;
                    }
                }
            }
        }
    }
    let rows = check(shape, spans, qkv);
    assert_eq!(gradient.len(), rows * shape.heads * shape.size);
    assert_eq!(sums.len(), rows * shape.heads);
    let mut to = engine.take(qkv.len());
    let shared = Shared(to.as_mut_ptr());
    let pairs = engine.multiplies_bf16();
    let task = Backward { shape, spans, qkv, sums, gradient, to: shared, pairs };
    engine.parallel(spans.len() * shape.kv_heads, &task);
    to
}

fn check(shape: Shape, spans: &[Span], qkv: &[f32]) -> usize {
    let rows = spans.iter().map(|(_, length)| length).sum::<usize>();
    assert_eq!(qkv.len(), rows * shape.stride());
    assert!(shape.heads.is_multiple_of(shape.kv_heads) && spans.iter().all(|(start, length)| start + length <= rows));
    rows
}

/// Where the heads of a segment lie.
#[derive(Clone, Copy)]
struct Rows {
    qkv: *const f32,
    stride: usize,
    size: usize,
}

impl Rows {
    /// # Safety
    /// The row has so many heads.
    unsafe fn head(self, head: usize) -> *const f32 {
        debug_assert!((head + 1) * self.size <= self.stride);
        // SAFETY: the caller's promise.
        unsafe { self.qkv.add(head * self.size) }
    }
}

/// Whether tiles read pairs as they are laid out here, step by step: AMX's read rows. What holds all pairs has no slack, so
/// that a strip must be whole tiles.
fn takes_pairs<S: Simd>() -> bool {
    S::BF16 && !S::PAIRS_BY_ROW && (2 * S::LANES).is_multiple_of(S::MR)
}

/// Rows as the right side of a tile: steps of numbers, or of pairs.
#[derive(Clone, Copy)]
struct Steps {
    start: *const f32,
    stride: usize,
}

/// Numbers that [`paired`] takes for so many rows.
fn paired_room<S: Simd, const PAIRS: bool>(rows: usize, columns: usize) -> usize {
    if PAIRS { rows.div_ceil(2) * columns.next_multiple_of(S::LANES) } else { 0 }
}

/// Rows as they are; or neighbours as one row of pairs, with zeros where the last has none, which goes to `to`.
///
/// # Safety
/// The CPU has `S`; the rows exist; `to` has [`paired_room`].
#[inline(always)]
unsafe fn paired<S: Simd, const PAIRS: bool>(
    rows: *const f32,
    stride: usize,
    count: usize,
    columns: usize,
    to: *mut f32,
) -> Steps {
    if !PAIRS {
        return Steps { start: rows, stride };
    }
    let vectors = columns.div_ceil(S::LANES);
    let panel = Panel { transposed: false, column: 0, columns, from: 0, depth: count, vectors, pairs: true };
    // SAFETY: the caller's promise.
    unsafe { pack::<S, _>(&F32(rows), stride, &panel, to) };
    Steps { start: to, stride: vectors * S::LANES }
}

/// Steps of a sum over so many numbers.
const fn steps<const PAIRS: bool>(numbers: usize) -> usize {
    if PAIRS { numbers.div_ceil(2) } else { numbers }
}

/// `[blocks of MR keys][size][MR]`, where numbers may be pairs.
///
/// # Safety
/// The CPU has `S`; the rows exist; `to` has room.
#[inline(always)]
unsafe fn pack_keys<S: Simd, const PAIRS: bool>(
    keys: *const f32,
    stride: usize,
    length: usize,
    size: usize,
    to: *mut f32,
) {
    let depth = steps::<PAIRS>(size);
    let mut first = 0;
    while first < length {
        let rows = S::MR.min(length - first);
        // SAFETY: see above.
        unsafe { pack_rows::<S>(keys.add(first * stride), stride, rows, size, PAIRS, to.add(first * depth)) }
        first += S::MR;
    }
}

/// Some queries of one head, as many as two vectors have lanes.
struct Strip {
    first: usize,
    queries: usize,
    /// Keys that the last of them sees.
    keys: usize,
}

// SAFETY, for every function below: the CPU has `S`, and pointers reach what the shapes in the comments say, rounded up to
// whole tiles and vectors; both are the caller's promise.
impl Strip {
    fn new<S: Simd>(first: usize, length: usize) -> Self {
        let queries = (2 * S::LANES).min(length - first);
        Self { first, queries, keys: first + queries }
    }

    /// Queries `[rows, size]` of the segment → `[size, 2 · LANES]`, or half as many steps of pairs.
    #[inline(always)]
    unsafe fn pack<S: Simd, const PAIRS: bool>(&self, queries: *const f32, stride: usize, size: usize, to: *mut f32) {
        // SAFETY: as above.
        unsafe { self.pack_at::<S, PAIRS>(queries.add(self.first * stride), stride, size, to) }
    }

    #[inline(always)]
    unsafe fn pack_at<S: Simd, const PAIRS: bool>(&self, rows: *const f32, stride: usize, size: usize, to: *mut f32) {
        let panel = Panel {
            transposed: true,
            column: 0,
            columns: self.queries,
            from: 0,
            depth: size,
            vectors: 2,
            pairs: PAIRS,
        };
        // SAFETY: as above.
        unsafe { pack::<S, _>(&F32(rows), stride, &panel, to) }
    }

    /// Products of every key with every query, `[keys, 2 · LANES]`; what no query sees is left out by whole vectors.
    #[inline(always)]
    unsafe fn scores<S: Simd, const PAIRS: bool>(
        &self,
        keys: *const f32,
        queries: *const f32,
        size: usize,
        to: *mut f32,
    ) {
        let (width, depth) = (2 * S::LANES, steps::<PAIRS>(size));
        let mut key = 0;
        while key < self.keys {
            // Keys from the second vector's first query on are seen by the second vector alone.
            let skip = if key >= self.first + S::LANES { S::LANES } else { 0 };
            // SAFETY: as above.
            unsafe {
                let tile = Tile::new(depth, keys.add(key * depth), S::MR, queries.add(skip), width);
                let tile = tile.into(to.add(key * width + skip), width, S::MR, width - skip, false);
                S::tile::<PAIRS>((width - skip) / S::LANES, &tile);
            }
            key += S::MR;
        }
    }

    /// Whether a vector's queries all see `key`; if not, which do, as 1 and 0.
    #[inline(always)]
    unsafe fn seen<S: Simd>(&self, key: usize, vector: usize) -> Option<[f32; LANES_MAX]> {
        let first = self.first + vector * S::LANES;
        (key > first).then(|| {
            let mut seen = [0.0; LANES_MAX];
            for (lane, seen) in seen.iter_mut().enumerate() {
                *seen = if key <= first + lane { 1.0 } else { 0.0 };
            }
            seen
        })
    }

    /// Scores to weights in place, or to pairs of weights at their beginning; the logarithm of each query's sum goes to
    /// `sums`, `stride` numbers apart.
    #[inline(always)]
    unsafe fn softmax<S: Simd, const PAIRS: bool>(&self, size: usize, scores: *mut f32, sums: *mut f32, stride: usize) {
        let width = 2 * S::LANES;
        let scale = 1.0 / (size as f32).sqrt();
        // SAFETY: as above.
        unsafe {
            for vector in 0..self.queries.div_ceil(S::LANES) {
                let at = scores.add(vector * S::LANES);
                let first = self.first + vector * S::LANES;
                let keys = self.keys.min(first + S::LANES);
                let scale = S::splat(scale);
                let mut max = S::splat(f32::NEG_INFINITY);
                for key in 0..keys {
                    let mut s = S::mul(S::load(at.add(key * width)), scale);
                    if let Some(seen) = self.seen::<S>(key, vector) {
                        // 0 for what is seen, a large negative number for what is not.
                        let seen = S::load(seen.as_ptr());
                        s = S::fma(S::sub(seen, S::splat(1.0)), S::splat(1e30), S::mul(s, seen));
                    }
                    S::store(at.add(key * width), s);
                    max = S::max(max, s);
                }
                let mut sum = S::splat(0.0);
                for key in 0..keys {
                    let mut p = exp::<S>(S::sub(S::load(at.add(key * width)), max));
                    if let Some(seen) = self.seen::<S>(key, vector) {
                        p = S::mul(p, S::load(seen.as_ptr()));
                    }
                    S::store(at.add(key * width), p);
                    sum = S::add(sum, p);
                }
                let inverse = S::div(S::splat(1.0), sum);
                let weight = |key: usize| match key < keys {
                    true => S::mul(S::load(at.add(key * width)), inverse),
                    false => S::splat(0.0),
                };
                for step in 0..steps::<PAIRS>(self.keys) {
                    // A pair is written no further on than what it is made of.
                    let weights =
                        if PAIRS { S::zip_pairs(weight(2 * step), weight(2 * step + 1)) } else { weight(step) };
                    S::store(at.add(step * width), weights);
                }
                let (mut maxima, mut totals) = ([0.0f32; LANES_MAX], [0.0f32; LANES_MAX]);
                S::store(maxima.as_mut_ptr(), max);
                S::store(totals.as_mut_ptr(), sum);
                for lane in 0..S::LANES.min(self.queries - vector * S::LANES) {
                    *sums.add((vector * S::LANES + lane) * stride) = maxima[lane] + totals[lane].ln();
                }
            }
        }
    }

    /// Scores → weights, and products of values with gradients → gradients of the scores as they were before scaling.
    #[inline(always)]
    unsafe fn slopes<S: Simd>(&self, size: usize, scores: *mut f32, slopes: *mut f32, sums: *const f32, stride: usize) {
        let width = 2 * S::LANES;
        // SAFETY: as above.
        unsafe {
            let scale = S::splat(1.0 / (size as f32).sqrt());
            for vector in 0..2 {
                let present = self.queries.saturating_sub(vector * S::LANES).min(S::LANES);
                let mut logarithms = [0.0f32; LANES_MAX];
                for (lane, logarithm) in logarithms.iter_mut().enumerate().take(present) {
                    *logarithm = *sums.add((vector * S::LANES + lane) * stride);
                }
                let logarithms = S::load(logarithms.as_ptr());
                let keys = if present == 0 { 0 } else { self.keys.min(self.first + (vector + 1) * S::LANES) };
                // Σ P ∘ dP of every query, by which its slopes add up to zero (FlashAttention, appendix B.2).
                let mut mean = S::splat(0.0);
                let scores = scores.add(vector * S::LANES);
                let slopes = slopes.add(vector * S::LANES);
                for key in 0..keys {
                    let at = scores.add(key * width);
                    let mut p = exp::<S>(S::sub(S::mul(S::load(at), scale), logarithms));
                    if let Some(seen) = self.seen::<S>(key, vector) {
                        p = S::mul(p, S::load(seen.as_ptr()));
                    }
                    S::store(at, p);
                    mean = S::fma(p, S::load(slopes.add(key * width)), mean);
                }
                for key in 0..keys {
                    let p = S::mul(S::load(scores.add(key * width)), scale);
                    let at = slopes.add(key * width);
                    S::store(at, S::mul(p, S::sub(S::load(at), mean)));
                }
                for key in keys..self.keys {
                    S::store(scores.add(key * width), S::splat(0.0));
                    S::store(slopes.add(key * width), S::splat(0.0));
                }
            }
        }
    }

    /// `to [queries, size] = weightsᵀ · rows`, for weights `[keys, 2 · LANES]`, or pairs of both.
    #[inline(always)]
    unsafe fn mix<S: Simd, const PAIRS: bool>(
        &self,
        weights: *const f32,
        rows: Steps,
        size: usize,
        to: *mut f32,
        to_stride: usize,
    ) {
        let width = 2 * S::LANES;
        let mut query = 0;
        while query < self.queries {
            let queries = S::MR.min(self.queries - query);
            let depth = steps::<PAIRS>(self.first + query + queries);
            let mut channel = 0;
            while channel < size {
                let channels = (S::LANES * 2).min(size - channel);
                // SAFETY: as above.
                unsafe {
                    let tile = Tile::new(depth, weights.add(query), width, rows.start.add(channel), rows.stride);
                    let tile = tile.into(to.add(query * to_stride + channel), to_stride, queries, channels, false);
                    S::tile::<PAIRS>(channels.div_ceil(S::LANES), &tile);
                }
                channel += channels;
            }
            query += S::MR;
        }
    }

    /// `[keys, 2 · LANES] → [2 · LANES, stride]`, or to pairs of queries: `[LANES, stride]`.
    #[inline(always)]
    unsafe fn turn<S: Simd, const PAIRS: bool>(&self, from: *const f32, to: *mut f32, stride: usize) {
        let width = 2 * S::LANES;
        let mut key = 0;
        while key < self.keys {
            for vector in 0..steps::<PAIRS>(2) {
                // SAFETY: as above.
                unsafe {
                    let mut square = [S::splat(0.0); LANES_MAX];
                    for (i, square) in square.iter_mut().enumerate().take(S::LANES.min(self.keys - key)) {
                        let from = from.add((key + i) * width + vector * S::LANES);
                        *square =
                            if PAIRS { S::pairs(S::load(from), S::load(from.add(S::LANES))) } else { S::load(from) };
                    }
                    S::transpose(&mut square);
                    for (i, &square) in square.iter().enumerate().take(S::LANES) {
                        S::store(to.add((vector * S::LANES + i) * stride + key), square);
                    }
                }
            }
            key += S::LANES;
        }
    }

    /// `to [keys, size] += weights · rows`, for weights `[2 · LANES, turned_stride]` and rows `[queries, size]`, or pairs of
    /// both.
    #[inline(always)]
    unsafe fn spread<S: Simd, const PAIRS: bool>(
        &self,
        weights: *const f32,
        turned_stride: usize,
        rows: Steps,
        size: usize,
        to: *mut f32,
        to_stride: usize,
    ) {
        let mut key = 0;
        while key < self.keys {
            let keys = S::MR.min(self.keys - key);
            // Queries before the key do not see it; in a pair with one that does, its weight is 0.
            let query = key.saturating_sub(self.first).min(self.queries);
            let step = if PAIRS { query / 2 } else { query };
            let mut channel = 0;
            while channel < size {
                let channels = (S::LANES * 2).min(size - channel);
                // SAFETY: as above.
                unsafe {
                    let weights = weights.add(step * turned_stride + key);
                    let at = rows.start.add(step * rows.stride + channel);
                    let depth = steps::<PAIRS>(self.queries) - step;
                    let tile = Tile::new(depth, weights, turned_stride, at, rows.stride);
                    let tile = tile.into(to.add(key * to_stride + channel), to_stride, keys, channels, true);
                    S::tile::<PAIRS>(channels.div_ceil(S::LANES), &tile);
                }
                channel += channels;
            }
            key += S::MR;
        }
    }
}

//! Weights that do not train, kept once, as they are stored; and the panels that products make of them.
//!
//! A product needs a panel of some columns in the order in which a tile reads them, once for `x Wᵀ` and once for `g W`.
//! Panels are made while a product runs, a cache's worth at a time: that costs one pass over the weights for hundreds of
//! rows of activations, and spares the memory of a second and a third copy.

use crate::region::LINE;
use crate::simd::{LANES_MAX, Simd, from_bf16, to_bf16};

/// How the numbers of a frozen matrix are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    F32,
    Bf16,
    /// 8-bit whole numbers, with one scale for every row (output channel).
    Int8,
}

/// A frozen matrix `W [rows, columns]`, row-major: `[out, in]` of a linear layer.
pub struct Frozen {
    rows: usize,
    columns: usize,
    numbers: Numbers,
}

enum Numbers {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
    Int8(Vec<i8>, Vec<f32>),
}

/// Takes a matrix row by row, so that its f32 numbers need not all exist at one time.
pub struct FrozenBuilder(Frozen);

impl FrozenBuilder {
    pub fn new(rows: usize, columns: usize, ty: WeightType) -> Self {
        let all = rows * columns;
        let numbers = match ty {
            WeightType::F32 => Numbers::F32(Vec::with_capacity(all)),
            WeightType::Bf16 => Numbers::Bf16(Vec::with_capacity(all)),
            WeightType::Int8 => Numbers::Int8(Vec::with_capacity(all), Vec::with_capacity(rows)),
        };
        Self(Frozen { rows, columns, numbers })
    }

    /// The next rows, row-major.
    ///
    /// # Panics
    /// If `values` does not hold whole rows.
    pub fn push(&mut self, values: &[f32]) {
        let columns = self.0.columns;
        assert!(values.len().is_multiple_of(columns.max(1)), "rows of {columns} numbers");
        match &mut self.0.numbers {
            Numbers::F32(numbers) => numbers.extend_from_slice(values),
            Numbers::Bf16(numbers) => numbers.extend(values.iter().map(|&x| to_bf16(x))),
            Numbers::Int8(numbers, scales) => {
                for row in values.chunks(columns.max(1)) {
                    let largest = row.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                    let scale = largest / 127.0;
                    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    numbers.extend(row.iter().map(|x| (x * inverse).round() as i8));
                    scales.push(scale);
                }
            }
        }
    }

    /// # Panics
    /// If rows are missing, or too many.
    pub fn finish(self) -> Frozen {
        let Frozen { rows, columns, numbers } = &self.0;
        let found = match numbers {
            Numbers::F32(numbers) => numbers.len(),
            Numbers::Bf16(numbers) => numbers.len(),
            Numbers::Int8(numbers, _) => numbers.len(),
        };
        assert_eq!(rows * columns, found, "a matrix of {rows} × {columns}");
        self.0
    }
}

impl Frozen {
    /// # Panics
    /// If `values` does not hold `rows · columns` numbers.
    pub fn new(rows: usize, columns: usize, values: Vec<f32>, ty: WeightType) -> Self {
        let mut frozen = FrozenBuilder::new(rows, columns, ty);
        frozen.push(&values);
        frozen.finish()
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::F32(numbers) => size_of_val(&numbers[..]),
            Numbers::Bf16(numbers) => size_of_val(&numbers[..]),
            Numbers::Int8(numbers, scales) => numbers.len() + size_of_val(&scales[..]),
        }
    }

    /// One row, as f32.
    pub fn row(&self, row: usize, to: &mut [f32]) {
        let at = row * self.columns..(row + 1) * self.columns;
        match &self.numbers {
            Numbers::F32(numbers) => to.copy_from_slice(&numbers[at]),
            Numbers::Bf16(numbers) => to.iter_mut().zip(&numbers[at]).for_each(|(to, &x)| *to = from_bf16(x)),
            Numbers::Int8(numbers, scales) => {
                to.iter_mut().zip(&numbers[at]).for_each(|(to, &x)| *to = f32::from(x) * scales[row]);
            }
        }
    }

    /// Dot products of some rows with `x`.
    ///
    /// # Safety
    /// The CPU has `S`; `x` reaches `columns` numbers and the rows are within the matrix.
    #[inline(always)]
    pub(crate) unsafe fn row_products<S: Simd>(&self, rows: std::ops::Range<usize>, x: *const f32, to: &mut [f32]) {
        debug_assert!(rows.end <= self.rows);
        // SAFETY: see above.
        unsafe {
            match &self.numbers {
                Numbers::F32(numbers) => products::<S, _>(&F32(numbers.as_ptr()), rows, self.columns, x, to),
                Numbers::Bf16(numbers) => products::<S, _>(&Bf16(numbers.as_ptr()), rows, self.columns, x, to),
                Numbers::Int8(numbers, scales) => {
                    products::<S, _>(&Int8(numbers.as_ptr(), scales.as_ptr()), rows, self.columns, x, to);
                }
            }
        }
    }

    /// Asks for share `i` of `shares` of a panel's cache lines.
    ///
    /// # Safety
    /// The CPU has `S`; the panel lies within this matrix.
    #[inline(always)]
    pub(crate) unsafe fn prefetch<S: Simd>(&self, panel: &Panel, i: usize, shares: usize) {
        let (start, bytes): (*const u8, usize) = match &self.numbers {
            Numbers::F32(numbers) => (numbers.as_ptr().cast(), 4),
            Numbers::Bf16(numbers) => (numbers.as_ptr().cast(), 2),
            Numbers::Int8(numbers, _) => (numbers.as_ptr().cast(), 1),
        };
        let (row, rows, column, columns) = match panel.transposed {
            true => (panel.column, panel.columns, panel.from, panel.depth),
            false => (panel.from, panel.depth, panel.column, panel.columns),
        };
        // A row's last line holds its last number, wherever its first one begins.
        let lines = (columns * bytes).div_ceil(LINE) + 1;
        for line in i * rows * lines / shares..(i + 1) * rows * lines / shares {
            let at = ((line % lines) * LINE).min(columns * bytes - 1);
            // SAFETY: the address is within the matrix.
            unsafe { S::prefetch(start.add(((row + line / lines) * self.columns + column) * bytes + at)) }
        }
    }

    /// # Safety
    /// As [`pack`], of this matrix.
    #[inline(always)]
    pub(crate) unsafe fn pack<S: Simd>(&self, panel: &Panel, to: *mut f32) {
        // SAFETY: see above.
        unsafe {
            match &self.numbers {
                Numbers::F32(numbers) => pack::<S, _>(&F32(numbers.as_ptr()), self.columns, panel, to),
                Numbers::Bf16(numbers) => pack::<S, _>(&Bf16(numbers.as_ptr()), self.columns, panel, to),
                Numbers::Int8(numbers, scales) => {
                    pack::<S, _>(&Int8(numbers.as_ptr(), scales.as_ptr()), self.columns, panel, to);
                }
            }
        }
    }
}

/// Which numbers of a matrix W stand in a panel.
pub(crate) struct Panel {
    /// True for `x Wᵀ`, whose columns are rows of W; false for `g W`, whose columns are columns of W.
    pub transposed: bool,
    /// The columns of the product.
    pub column: usize,
    pub columns: usize,
    /// The part of the sum.
    pub from: usize,
    pub depth: usize,
    /// Vectors in each step.
    pub vectors: usize,
    /// Steps are pairs of bf16.
    pub pairs: bool,
}

impl Panel {
    /// A vector of step `row` of a panel that is not transposed.
    ///
    /// # Safety
    /// As [`pack`].
    #[inline(always)]
    unsafe fn load<S: Simd, N: Numbered>(&self, numbers: &N, stride: usize, row: usize, vector: usize) -> S::V {
        let present = self.columns.saturating_sub(vector * S::LANES).min(S::LANES);
        // SAFETY: see above.
        unsafe {
            match row < self.depth && present > 0 {
                true => numbers.load::<S>(self.from + row, stride, self.column + vector * S::LANES, present),
                false => S::splat(0.0),
            }
        }
    }
}

impl Panel {
    /// A vector of pairs of steps `row` and `row + 1`.
    ///
    /// # Safety
    /// As [`pack`].
    #[inline(always)]
    unsafe fn load_two<S: Simd, N: Numbered>(&self, numbers: &N, stride: usize, row: usize, vector: usize) -> S::V {
        let present = self.columns.saturating_sub(vector * S::LANES).min(S::LANES);
        // SAFETY: see above.
        unsafe {
            if row + 1 < self.depth && present > 0 {
                let at = self.column + vector * S::LANES;
                return numbers.load_two::<S>(self.from + row, stride, at, present);
            }
            let a = self.load::<S, N>(numbers, stride, row, vector);
            S::zip_pairs(a, self.load::<S, N>(numbers, stride, row + 1, vector))
        }
    }
}

/// Numbers in rows, in whatever type.
pub(crate) trait Numbered {
    /// # Safety
    /// `at + n` numbers of the row exist.
    unsafe fn load<S: Simd>(&self, row: usize, stride: usize, at: usize, n: usize) -> S::V;
    /// `n ≤ LANES` numbers of two rows as pairs of bf16.
    ///
    /// # Safety
    /// `at + n` numbers of both rows exist, and the CPU has bf16.
    #[inline(always)]
    unsafe fn load_two<S: Simd>(&self, row: usize, stride: usize, at: usize, n: usize) -> S::V {
        // SAFETY: see above.
        unsafe { S::zip_pairs(self.load::<S>(row, stride, at, n), self.load::<S>(row + 1, stride, at, n)) }
    }
    /// `2 · LANES` numbers as pairs of bf16.
    ///
    /// # Safety
    /// `at + n` numbers of the row exist, and the CPU has bf16.
    #[inline(always)]
    unsafe fn load_pairs<S: Simd>(&self, row: usize, stride: usize, at: usize, n: usize) -> S::V {
        // SAFETY: see above.
        unsafe {
            let low = self.load::<S>(row, stride, at, n.min(S::LANES));
            let high = match n > S::LANES {
                true => self.load::<S>(row, stride, at + S::LANES, n - S::LANES),
                false => S::splat(0.0),
            };
            S::pairs(low, high)
        }
    }
}

pub(crate) struct F32(pub(crate) *const f32);
struct Bf16(*const u16);
struct Int8(*const i8, *const f32);

impl Numbered for F32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, row: usize, stride: usize, at: usize, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            let from = self.0.add(row * stride + at);
            if n >= S::LANES { S::load(from) } else { S::load_n(from, n) }
        }
    }
}

impl Numbered for Bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, row: usize, stride: usize, at: usize, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16(self.0.add(row * stride + at), n.min(S::LANES)) }
    }

    #[inline(always)]
    unsafe fn load_pairs<S: Simd>(&self, row: usize, stride: usize, at: usize, n: usize) -> S::V {
        // SAFETY: the caller's promise. Pairs are stored as they are read; no bit changes.
        unsafe {
            let from = self.0.add(row * stride + at);
            if n >= 2 * S::LANES {
                return S::load(from.cast());
            }
            let mut some = [0u16; 2 * LANES_MAX];
            std::ptr::copy_nonoverlapping(from, some.as_mut_ptr(), n);
            S::load(some.as_ptr().cast())
        }
    }

    #[inline(always)]
    unsafe fn load_two<S: Simd>(&self, row: usize, stride: usize, at: usize, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::zip_bf16(self.0.add(row * stride + at), self.0.add((row + 1) * stride + at), n) }
    }
}

impl Numbered for Int8 {
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, row: usize, stride: usize, at: usize, n: usize) -> S::V {
        // SAFETY: the caller's promise; there is a scale for every row.
        unsafe { S::mul(S::load_i8(self.0.add(row * stride + at), n.min(S::LANES)), S::splat(*self.1.add(row))) }
    }
}

/// Writes a panel, `[depth, vectors · LANES]`, with zeros where the matrix ends.
///
/// # Safety
/// The CPU has `S` (and bf16, for pairs); the panel lies within the matrix, whose rows are `stride` numbers apart; `to`
/// has room for `depth` steps (half of them, rounded up, for pairs) of `vectors` vectors.
#[inline(always)]
pub(crate) unsafe fn pack<S: Simd, N: Numbered>(numbers: &N, stride: usize, panel: &Panel, to: *mut f32) {
    let width = panel.vectors * S::LANES;
    let step = if panel.pairs { 2 * S::LANES } else { S::LANES };
    // SAFETY: every access below is within what the caller promises.
    unsafe {
        if panel.transposed {
            for vector in 0..panel.vectors {
                let present = panel.columns.saturating_sub(vector * S::LANES).min(S::LANES);
                let mut at = 0;
                while at < panel.depth {
                    let n = step.min(panel.depth - at);
                    let mut square = [S::splat(0.0); LANES_MAX];
                    for (i, square) in square.iter_mut().enumerate().take(present) {
                        let row = panel.column + vector * S::LANES + i;
                        *square = match panel.pairs {
                            true => numbers.load_pairs::<S>(row, stride, panel.from + at, n),
                            false => numbers.load::<S>(row, stride, panel.from + at, n),
                        };
                    }
                    S::transpose(&mut square);
                    let (first, steps) = if panel.pairs { (at / 2, n.div_ceil(2)) } else { (at, n) };
                    for (i, &square) in square.iter().enumerate().take(steps) {
                        S::store(to.add((first + i) * width + vector * S::LANES), square);
                    }
                    at += step;
                }
            }
            return;
        }
        if panel.pairs {
            for pair in 0..panel.depth.div_ceil(2) {
                for vector in 0..panel.vectors {
                    let both = panel.load_two::<S, N>(numbers, stride, 2 * pair, vector);
                    S::store(to.add(pair * width + vector * S::LANES), both);
                }
            }
        } else {
            for row in 0..panel.depth {
                for vector in 0..panel.vectors {
                    S::store(to.add(row * width + vector * S::LANES), panel.load::<S, N>(numbers, stride, row, vector));
                }
            }
        }
    }
}

/// # Safety
/// The CPU has `S`; the rows exist, and `x` reaches `columns` numbers.
#[inline(always)]
unsafe fn products<S: Simd, N: Numbered>(
    numbers: &N,
    rows: std::ops::Range<usize>,
    columns: usize,
    x: *const f32,
    to: &mut [f32],
) {
    for (to, row) in to.iter_mut().zip(rows) {
        // SAFETY: see above.
        unsafe {
            let mut sums = [S::splat(0.0); 4];
            let mut at = 0;
            while at < columns {
                for sum in &mut sums {
                    let n = columns.saturating_sub(at).min(S::LANES);
                    if n > 0 {
                        let w = numbers.load::<S>(row, columns, at, n);
                        let x = if n == S::LANES { S::load(x.add(at)) } else { S::load_n(x.add(at), n) };
                        *sum = S::fma(w, x, *sum);
                    }
                    at += S::LANES;
                }
            }
            *to = S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
        }
    }
}

//! The innermost product: a few rows times a panel, in registers.

use crate::simd::{PANEL_MAX, Simd};

/// `C = A · B + U · E`, plus what `plus` points to: a tile of at most `MR × (vectors · LANES)` numbers.
///
/// Each number of C sums its `depth` products in order, alone, in one register: it depends on neither the tile's place
/// nor its neighbours, so that a row's result is the same in every batch and with every number of threads.
pub(crate) struct Tile {
    /// Steps of the sum; a step is one number of f32 or a pair of bf16.
    pub depth: usize,
    /// `[depth][lda]`, of which a step reads MR numbers or pairs; pairs by row: `[MR][lda]`.
    pub a: *const f32,
    pub lda: usize,
    /// `[depth][ldb]`, of which a step reads whole vectors.
    pub b: *const f32,
    pub ldb: usize,
    /// The low-rank part, always in f32: `U [more][ldu]`, `E [more][lde]`.
    pub more: usize,
    pub u: *const f32,
    pub ldu: usize,
    pub e: *const f32,
    pub lde: usize,
    pub c: *mut f32,
    pub ldc: usize,
    pub rows: usize,
    pub columns: usize,
    /// Added to the result, if not null, in rows `ldc` apart: C itself where it accumulates.
    pub plus: *const f32,
}

impl Tile {
    pub(crate) fn new(depth: usize, a: *const f32, lda: usize, b: *const f32, ldb: usize) -> Self {
        let none = std::ptr::null();
        let c = std::ptr::null_mut();
        let [more, ldu, lde, ldc, rows, columns] = [0; 6];
        Self { depth, a, lda, b, ldb, more, u: none, ldu, e: none, lde, c, ldc, rows, columns, plus: none }
    }

    pub(crate) fn into(self, c: *mut f32, ldc: usize, rows: usize, columns: usize, accumulate: bool) -> Self {
        let plus = if accumulate { c.cast_const() } else { std::ptr::null() };
        Self { c, ldc, rows, columns, plus, ..self }
    }
}

/// # Safety
/// The CPU has `S`; A reaches `MR` and B `NV · LANES` numbers from the start of each step, likewise U and E; C reaches
/// `rows × columns`.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, const MR: usize, const NV: usize, const PAIRS: bool>(t: &Tile) {
    // SAFETY: every access below is within what the caller promises.
    unsafe {
        let mut acc = [[S::splat(0.0); NV]; MR];
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.depth {
            let mut panel = [S::splat(0.0); NV];
            for (v, panel) in panel.iter_mut().enumerate() {
                *panel = S::load(b.add(v * S::LANES));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                if PAIRS {
                    let x = S::splat_bits(a.add(r).cast::<u32>().read());
                    for (acc, panel) in acc.iter_mut().zip(panel) {
                        *acc = S::dot_pairs(*acc, x, panel);
                    }
                } else {
                    let x = S::splat(*a.add(r));
                    for (acc, panel) in acc.iter_mut().zip(panel) {
                        *acc = S::fma(x, panel, *acc);
                    }
                }
            }
            a = a.add(t.lda);
            b = b.add(t.ldb);
        }
        let (mut u, mut e) = (t.u, t.e);
        for _ in 0..t.more {
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = S::splat(*u.add(r));
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = S::fma(x, S::load(e.add(v * S::LANES)), *acc);
                }
            }
            u = u.add(t.ldu);
            e = e.add(t.lde);
        }
        // Accumulators are indexed by constants alone: otherwise they would live in memory from the first step on.
        if t.rows == MR && t.columns == NV * S::LANES {
            for (r, acc) in acc.iter().enumerate() {
                for (v, &acc) in acc.iter().enumerate() {
                    let at = r * t.ldc + v * S::LANES;
                    let acc = if t.plus.is_null() { acc } else { S::add(acc, S::load(t.plus.add(at))) };
                    S::store(t.c.add(at), acc);
                }
            }
            return;
        }
        let mut all = [[0.0f32; PANEL_MAX]; MR];
        for (all, acc) in all.iter_mut().zip(&acc) {
            for (v, &acc) in acc.iter().enumerate() {
                S::store(all.as_mut_ptr().add(v * S::LANES), acc);
            }
        }
        for (r, all) in all.iter().enumerate().take(t.rows) {
            let mut at = 0;
            while at < t.columns {
                let n = S::LANES.min(t.columns - at);
                let place = r * t.ldc + at;
                let new = S::load(all.as_ptr().add(at));
                let new = if t.plus.is_null() { new } else { S::add(new, S::load_n(t.plus.add(place), n)) };
                S::store_n(t.c.add(place), new, n);
                at += S::LANES;
            }
        }
    }
}

//! The innermost product of a batch: a strip of rows of activations times a few vectors of weight rows, in registers.

use super::activations::{QUAD_WORDS, SCALE, SCALED_SUM, SUM};
use super::{Format, GROUP};
use crate::region::LINE;
use crate::simd::Simd;
use crate::simd::integer::Integers;

/// Weights are unpacked first ([`unpack`]), once for all strips of a batch.
pub(crate) struct Strip {
    pub blocks: usize,
    /// One for each vector of weight rows: `[blocks][8]` lines, `[blocks][subs][16]` scales and minima.
    pub codes: [*const u8; VECTORS_MAX],
    pub scales: [*const f32; VECTORS_MAX],
    pub mins: [*const f32; VECTORS_MAX],
    /// Rows of activations, see [`activations`](super::activations).
    pub x: *const u32,
    /// `rows` rows, `stride` apart; of each vector so many lanes.
    pub to: [*mut f32; VECTORS_MAX],
    pub lanes: [usize; VECTORS_MAX],
    pub stride: usize,
    pub rows: usize,
    /// Added to what is there.
    pub accumulate: bool,
}

pub(crate) const VECTORS_MAX: usize = 2;

/// `R` rows of a strip that has room for `MR`.
///
/// # Safety
/// The CPU has `S`; the pointers reach as far as [`Strip`] says; `to` is this thread's alone.
#[inline(always)]
pub(crate) unsafe fn strip<S: Simd, F: Format, const MR: usize, const R: usize, const NV: usize>(s: &Strip) {
    type I<S> = <<S as Simd>::Int as Integers>::I;
    // SAFETY: every access below is within what the caller promises.
    unsafe {
        let mut acc = [[S::splat(0.0); NV]; R];
        for block in 0..s.blocks {
            let x = s.x.add(block * QUAD_WORDS * MR);
            for sub in 0..F::SUBS {
                let zero = F::zero::<S::Int>();
                let mut sums: [[I<S>; NV]; R] = [[S::Int::splat(0); NV]; R];
                if zero != 0 {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let of = |half: usize| *x.add((SUM + half) * MR + r) as i32;
                        let sum = if F::SUBS == 2 { of(sub) } else { of(0) + of(1) };
                        *sums = [S::Int::splat(-zero * sum); NV];
                    }
                }
                let quads = 8 / F::SUBS;
                let codes = |v: usize| s.codes[v].add((block * 8 + sub * quads) * LINE);
                let x_quads = x.add(sub * quads * MR);
                if S::Int::PAIRED {
                    let room = S::Int::room(F::BITS).min(quads);
                    debug_assert!(quads.is_multiple_of(room), "parts of a block are of one size");
                    // Unrolled, parts of a block are done row by row; with few registers all codes live in memory then
                    // (measured: AVX2 is 1.5 times as fast with a loop, AVX-512 0.95 times).
                    let is_loop = S::Int::FEW_REGISTERS && room < 8;
                    let end = if is_loop { std::hint::black_box(quads) } else { quads };
                    let mut first = 0;
                    while first < end {
                        let mut pairs: [[I<S>; NV]; R] = [[S::Int::splat(0); NV]; R];
                        for quad in first..first + room {
                            for v in 0..NV {
                                let codes = S::Int::load(codes(v).add(quad * LINE));
                                for (r, pairs) in pairs.iter_mut().enumerate() {
                                    let x = S::Int::splat(*x_quads.add(quad * MR + r) as i32);
                                    pairs[v] = mul_add::<S, F>(pairs[v], codes, x);
                                }
                            }
                        }
                        for (sums, pairs) in sums.iter_mut().zip(pairs) {
                            for (sum, pairs) in sums.iter_mut().zip(pairs) {
                                *sum = S::Int::add(*sum, S::Int::widen(pairs));
                            }
                        }
                        first += room;
                    }
                } else {
                    for quad in 0..quads {
                        let mut vectors = [S::Int::splat(0); NV];
                        for (v, vector) in vectors.iter_mut().enumerate() {
                            *vector = S::Int::load(codes(v).add(quad * LINE));
                        }
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let x = S::Int::splat(*x_quads.add(quad * MR + r) as i32);
                            for (sum, vector) in sums.iter_mut().zip(vectors) {
                                *sum = mul_add::<S, F>(*sum, vector, x);
                            }
                        }
                    }
                }
                let at = (block * F::SUBS + sub) * GROUP;
                let mut scales = [S::splat(0.0); NV];
                for (v, scale) in scales.iter_mut().enumerate() {
                    *scale = S::load(s.scales[v].add(at));
                }
                for (r, (acc, sums)) in acc.iter_mut().zip(sums).enumerate() {
                    let d = S::splat(f32::from_bits(*x.add(SCALE * MR + r)));
                    for ((acc, sum), scale) in acc.iter_mut().zip(sums).zip(scales) {
                        *acc = S::fma(S::Int::to_f32(sum), S::mul(scale, d), *acc);
                    }
                }
                if F::MIN {
                    let mut mins = [S::splat(0.0); NV];
                    for (v, min) in mins.iter_mut().enumerate() {
                        *min = S::load(s.mins[v].add(at));
                    }
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let of = |half: usize| f32::from_bits(*x.add((SCALED_SUM + half) * MR + r));
                        let sum = S::splat(if F::SUBS == 2 { of(sub) } else { of(0) + of(1) });
                        for (acc, min) in acc.iter_mut().zip(mins) {
                            *acc = S::fma(min, sum, *acc);
                        }
                    }
                }
            }
        }
        // Accumulators are indexed by constants alone: otherwise they would live in memory from the first block on.
        for (r, acc) in acc.iter().enumerate() {
            if r < s.rows {
                for (v, &acc) in acc.iter().enumerate() {
                    let to = s.to[v].wrapping_add(r * s.stride);
                    let lanes = s.lanes[v];
                    let acc = if s.accumulate { S::add(S::load_n(to, lanes), acc) } else { acc };
                    S::store_n(to, acc, lanes);
                }
            }
        }
    }
}

/// Bytes from what is read to what is asked for, into the second-level cache. A core reads memory in order as fast as it can
/// read at all, as long as it sees that it is in order; at the end of a page it has to see it anew. Asked for every few lines
/// of what comes a page later, it does not stop; asked for each, it waits for what was asked for and looks no further
/// (measured on a Zen 4, 32 GB/s: 24 with each line, 25 with none, 28 to 30 with a few).
pub(super) const AHEAD: usize = 4096;

/// The same where every line is asked for: in front of unpacking, which lies between one group and the next for so long that
/// the core begins anew each time, and of floats, which are faster so.
pub(super) const FAR_AHEAD: usize = 16384;

/// From one line of a block that is asked for to the next: the fastest that was tried.
const fn asked_step<F: Format>() -> usize {
    if F::WORDS > 5 { 2 } else { 4 }
}

/// A single row times the 16 rows of a group, `to` of them.
///
/// # Safety
/// The CPU has `S`; the group has so many blocks; `x` is a strip of one row; `to` has room for 16 numbers.
#[inline(always)]
pub(super) unsafe fn vector<S: Simd, F: Format>(group: *const u8, blocks: usize, x: *const u32, to: *mut f32) {
    let mut row = 0;
    while row < GROUP {
        // SAFETY: within the group, the row of activations, and 16 numbers.
        unsafe {
            let mut acc = S::splat(0.0);
            let (mut span, mut within) = (group, 0);
            for block in 0..blocks {
                let scales = span.add(F::SPAN_CODES);
                let codes = span.add(within * F::WORDS * LINE + row * 4);
                if row == 0 {
                    ask_ahead::<S, F>(codes);
                }
                let quads = F::quads::<S::Int>(codes);
                let x = x.add(block * QUAD_WORDS);
                for sub in 0..F::SUBS {
                    let of = |half: usize| *x.add(SUM + half) as i32;
                    let zero = F::zero::<S::Int>();
                    let start = match zero {
                        0 => S::Int::splat(0),
                        _ => S::Int::splat(-zero * if F::SUBS == 2 { of(sub) } else { of(0) + of(1) }),
                    };
                    let sum = match F::SUBS {
                        1 => products::<S, F, 8>(start, &quads, x),
                        _ => products::<S, F, 4>(start, &quads[4 * sub..], x.add(4 * sub)),
                    };
                    let d = S::splat(f32::from_bits(*x.add(SCALE)));
                    let scale = F::scale::<S>(scales, within, sub, row);
                    acc = S::fma(S::Int::to_f32(sum), S::mul(scale, d), acc);
                    if F::MIN {
                        let of = |half: usize| f32::from_bits(*x.add(SCALED_SUM + half));
                        let sum = if F::SUBS == 2 { of(sub) } else { of(0) + of(1) };
                        acc = S::fma(F::min::<S>(scales, within, sub, row), S::splat(sum), acc);
                    }
                }
                within += 1;
                if within == F::SPAN {
                    (span, within) = (span.wrapping_add(F::SPAN_BYTES), 0);
                }
            }
            S::store(to.add(row), acc);
        }
        row += S::LANES;
    }
}

/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn ask_ahead<S: Simd, F: Format>(block: *const u8) {
    let mut line = 0;
    while line < F::WORDS {
        // SAFETY: the caller's promise.
        unsafe { S::Int::prefetch(block.wrapping_add(AHEAD + line * LINE)) };
        line += const { asked_step::<F>() };
    }
}

/// # Safety
/// The CPU has `S`; there are `N` quads in both.
#[inline(always)]
unsafe fn products<S: Simd, F: Format, const N: usize>(
    start: <S::Int as Integers>::I,
    quads: &[<S::Int as Integers>::I],
    x: *const u32,
) -> <S::Int as Integers>::I {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum = start;
        if !S::Int::PAIRED {
            for (i, &quad) in quads.iter().enumerate().take(N) {
                sum = mul_add::<S, F>(sum, quad, S::Int::splat(*x.add(i) as i32));
            }
            return sum;
        }
        let room = S::Int::room(F::BITS);
        let mut first = 0;
        while first < N {
            let mut pairs = S::Int::splat(0);
            for (i, &quad) in quads[first..(first + room).min(N)].iter().enumerate() {
                pairs = mul_add::<S, F>(pairs, quad, S::Int::splat(*x.add(first + i) as i32));
            }
            sum = S::Int::add(sum, S::Int::widen(pairs));
            first += room;
        }
        sum
    }
}

/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn mul_add<S: Simd, F: Format>(
    sum: <S::Int as Integers>::I,
    codes: <S::Int as Integers>::I,
    x: <S::Int as Integers>::I,
) -> <S::Int as Integers>::I {
    // The number of bits is a constant of the format, and constants of traits are no const arguments.
    // SAFETY: the caller's promise.
    unsafe {
        match F::BITS {
            8 => S::Int::mul_add::<8>(sum, codes, x),
            _ => S::Int::mul_add::<6>(sum, codes, x),
        }
    }
}

/// Unpacks a group for [`strip`].
///
/// # Safety
/// The CPU has `S`; the group has so many blocks; `codes` has room for `blocks · 8` lines, `scales` and `mins` for
/// `blocks · subs · 16` numbers.
#[inline(always)]
pub(super) unsafe fn unpack<S: Simd, F: Format>(
    group: *const u8,
    blocks: usize,
    codes: *mut u8,
    scales: *mut f32,
    mins: *mut f32,
) {
    let (mut span, mut within) = (group, 0);
    for block in 0..blocks {
        let mut row = 0;
        while row < GROUP {
            // SAFETY: within the group and the room.
            unsafe {
                let packed = span.add(within * F::WORDS * LINE + row * 4);
                if row == 0 {
                    for line in 0..F::WORDS {
                        S::Int::prefetch(packed.wrapping_add(FAR_AHEAD + line * LINE));
                    }
                }
                let quads = F::quads::<S::Int>(packed);
                for (i, quad) in quads.into_iter().enumerate() {
                    S::Int::store(codes.add((block * 8 + i) * LINE + row * 4), quad);
                }
                let packed = span.add(F::SPAN_CODES);
                for sub in 0..F::SUBS {
                    let at = (block * F::SUBS + sub) * GROUP + row;
                    S::store(scales.add(at), F::scale::<S>(packed, within, sub, row));
                    if F::MIN {
                        S::store(mins.add(at), F::min::<S>(packed, within, sub, row));
                    }
                }
            }
            row += S::LANES;
        }
        within += 1;
        if within == F::SPAN {
            let mut at = F::SPAN_CODES;
            while at < F::SPAN_BYTES {
                // SAFETY: the caller's promise.
                unsafe { S::Int::prefetch(span.wrapping_add(FAR_AHEAD + at)) };
                at += LINE;
            }
            (span, within) = (span.wrapping_add(F::SPAN_BYTES), 0);
        }
    }
}

//! How codes are packed, and what scales them.

use super::{BLOCK, GROUP, SUPERBLOCK};
use crate::region::LINE;
use crate::simd::Simd;
use crate::simd::integer::Integers;

/// What a [`Matrix`](super::Matrix) is made of. *Min* adds a minimum to every scale; in *super* layouts, small integers
/// scale runs of 32 (or 16) columns under one f16 for 256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// d · (q − 8): Q4_0.
    Four,
    /// d · q + m: Q4_1.
    FourMin,
    /// d · (q − 16): Q5_0.
    Five,
    /// d · q + m: Q5_1.
    FiveMin,
    /// d · (q − 128): Q8_0, whose bytes are stored 128 higher.
    Eight,
    /// d · T\[q\]: IQ4_NL.
    Table,
    /// (D·sc) · q − (M·mn), runs of 32: Q4_K.
    SuperFourMin,
    /// The same of five bits: Q5_K.
    SuperFiveMin,
    /// (D·sc) · q − (M·mn), runs of 16, sc and mn in one byte: Q2_K.
    SuperTwoMin,
    /// (D·sc) · (q − 4), runs of 16: Q3_K.
    SuperThree,
    /// (D·sc) · (q − 32), runs of 16: Q6_K.
    SuperSix,
    /// D · (q − 1): TQ1_0 and TQ2_0.
    Ternary,
    F16,
    Bf16,
    F32,
}

/// Codes and scales of a layout, for kernels that are compiled once for each.
pub(crate) trait Format {
    /// Lines of a block, which are words of a row.
    const WORDS: usize;
    const BITS: u32;
    /// What is subtracted from a code.
    const ZERO: i32;
    /// Scales of a block.
    const SUBS: usize;
    const MIN: bool;
    /// Blocks whose codes lie together, in front of their scales.
    const SPAN: usize;
    /// Bytes of a span's codes: where its scales begin.
    const SPAN_CODES: usize = Self::SPAN * Self::WORDS * LINE;
    /// Bytes of a span, whole lines.
    const SPAN_BYTES: usize;

    /// The eight quads of a block, from the lines at `block`, one vector of each.
    unsafe fn quads<N: Integers>(block: *const u8) -> [N::I; 8];
    /// The scales of `LANES` rows from `row` on, for part `sub` of a block of the span whose scales are at `scales`.
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, sub: usize, row: usize) -> S::V;
    unsafe fn min<S: Simd>(scales: *const u8, block: usize, sub: usize, row: usize) -> S::V;

    /// What the path subtracts from a code: paths of signed bytes have done so for codes of eight bits.
    #[inline(always)]
    fn zero<N: Integers>() -> i32 {
        if Self::BITS == 8 && N::SIGNED { 0 } else { Self::ZERO }
    }
}

/// Runs `$body` with the type `$F` of an integer layout, or `$floats` for the others.
macro_rules! with_format {
    ($layout:expr, $F:ident => $body:expr, _ => $floats:expr) => {{
        use $crate::quantized::format::*;
        match $layout {
            Layout::Four => {
                type $F = Of<Four, 8, Half>;
                $body
            }
            Layout::FourMin => {
                type $F = Of<Four, 0, HalfMin>;
                $body
            }
            Layout::Five => {
                type $F = Of<Five, 16, Half>;
                $body
            }
            Layout::FiveMin => {
                type $F = Of<Five, 0, HalfMin>;
                $body
            }
            Layout::Eight => {
                type $F = Of<Eight, 128, Half>;
                $body
            }
            Layout::Table => {
                type $F = Of<Table, 128, Half>;
                $body
            }
            Layout::SuperFourMin => {
                type $F = Of<Four, 0, Super32Min>;
                $body
            }
            Layout::SuperFiveMin => {
                type $F = Of<Five, 0, Super32Min>;
                $body
            }
            Layout::SuperTwoMin => {
                type $F = Of<Two, 0, Super16Min>;
                $body
            }
            Layout::SuperThree => {
                type $F = Of<Three, 4, Super16>;
                $body
            }
            Layout::SuperSix => {
                type $F = Of<Six, 32, Super16>;
                $body
            }
            Layout::Ternary => {
                type $F = Of<Two, 1, Super256>;
                $body
            }
            Layout::F16 | Layout::Bf16 | Layout::F32 => $floats,
        }
    }};
}
pub(crate) use with_format;

impl Layout {
    /// Whether weights are integers under scales, and activations bytes.
    pub fn is_integer(self) -> bool {
        !matches!(self, Layout::F16 | Layout::Bf16 | Layout::F32)
    }

    /// Columns come in multiples of this.
    pub fn columns_step(self) -> usize {
        match self {
            _ if !self.is_integer() => 1,
            Layout::Four | Layout::FourMin | Layout::Five | Layout::FiveMin | Layout::Eight | Layout::Table => 32,
            _ => SUPERBLOCK,
        }
    }

    /// Words of a row's block.
    pub fn words(self) -> usize {
        with_format!(self, F => F::WORDS, _ => 0)
    }

    /// Bytes of a float.
    pub(super) fn float_bytes(self) -> usize {
        if self == Layout::F32 { 4 } else { 2 }
    }

    /// Bytes of a group, whole lines.
    pub(super) fn group_bytes(self, columns: usize) -> usize {
        if !self.is_integer() {
            return (columns * GROUP * self.float_bytes()).next_multiple_of(LINE);
        }
        let spans = self.spans();
        (columns / BLOCK).div_ceil(1 << spans.blocks_log2) * spans.bytes
    }

    /// Of a layout of integers.
    pub(super) fn spans(self) -> Spans {
        const fn of<F: Format>() -> Spans {
            assert!(F::SPAN.is_power_of_two());
            let (block, scales) = (F::WORDS * LINE, F::SPAN_CODES);
            Spans { blocks_log2: F::SPAN.trailing_zeros(), block, scales, bytes: F::SPAN_BYTES }
        }
        with_format!(self, F => of::<F>(), _ => Spans::default())
    }
}

/// How a group is divided: some blocks' codes, then what scales them, and so on.
#[derive(Clone, Copy, Default)]
pub(super) struct Spans {
    blocks_log2: u32,
    /// Bytes of a block's codes.
    block: usize,
    /// Bytes of a span's codes: where its scales begin.
    scales: usize,
    bytes: usize,
}

impl Spans {
    /// Where in a group the codes of a block are.
    #[inline(always)]
    pub(super) fn codes(self, block: usize) -> usize {
        (block >> self.blocks_log2) * self.bytes + self.within(block) * self.block
    }

    /// Where what scales a block begins.
    #[inline(always)]
    pub(super) fn scales(self, block: usize) -> usize {
        (block >> self.blocks_log2) * self.bytes + self.scales
    }

    /// Which block of its span it is.
    #[inline(always)]
    pub(super) fn within(self, block: usize) -> usize {
        block & ((1 << self.blocks_log2) - 1)
    }
}

pub(crate) struct Of<C, const ZERO: i32, S>(C, S);

impl<C: Codes, const ZERO: i32, X: Scales> Format for Of<C, ZERO, X> {
    const WORDS: usize = C::WORDS;
    const BITS: u32 = C::BITS;
    const ZERO: i32 = ZERO;
    const SUBS: usize = X::SUBS;
    const MIN: bool = X::MIN;
    const SPAN: usize = X::SPAN;
    const SPAN_BYTES: usize = Self::SPAN_CODES + X::BYTES.next_multiple_of(LINE);

    #[inline(always)]
    unsafe fn quads<N: Integers>(block: *const u8) -> [N::I; 8] {
        // SAFETY: the caller's promise.
        unsafe { C::quads::<N>(block) }
    }
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, sub: usize, row: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { X::scale::<S>(scales, block, sub, row) }
    }
    #[inline(always)]
    unsafe fn min<S: Simd>(scales: *const u8, block: usize, sub: usize, row: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { X::min::<S>(scales, block, sub, row) }
    }
}

/// How the codes of a block are packed.
pub(crate) trait Codes {
    const WORDS: usize;
    const BITS: u32;
    /// # Safety
    /// The CPU has `N`; a vector is readable at each of the block's lines.
    unsafe fn quads<N: Integers>(block: *const u8) -> [N::I; 8];
}

// SAFETY, for every block below: the caller's promise.

/// Line j < 2 has quads 4j to 4j + 3, two bits each, the first lowest.
pub(crate) struct Two;
/// As [`Two`], then one line with the third bits: bit j of a byte belongs to quad j.
pub(crate) struct Three;
/// Line j < 4 has quad j in its low nibbles and quad j + 4 in the high ones.
pub(crate) struct Four;
/// As [`Four`], then one line with the fifth bits: bit j of a byte belongs to quad j.
pub(crate) struct Five;
/// As [`Four`], then the upper two bits as in [`Two`].
pub(crate) struct Six;
/// A line per quad.
pub(crate) struct Eight;
/// [`Four`], looked up.
pub(crate) struct Table;

/// IQ4_NL's values.
const TABLE: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

#[inline(always)]
unsafe fn line<N: Integers>(block: *const u8, line: usize) -> N::I {
    // SAFETY: as above.
    unsafe { N::load(block.add(line * LINE)) }
}

#[inline(always)]
unsafe fn bytes<N: Integers>(byte: u8) -> N::I {
    // SAFETY: as above.
    unsafe { N::splat(i32::from_le_bytes([byte; 4])) }
}

impl Codes for Two {
    const WORDS: usize = 2;
    const BITS: u32 = 2;
    #[inline(always)]
    unsafe fn quads<N: Integers>(block: *const u8) -> [N::I; 8] {
        // SAFETY: as above.
        unsafe {
            let (a, b, mask) = (line::<N>(block, 0), line::<N>(block, 1), bytes::<N>(3));
            [
                N::and(a, mask),
                N::and(N::right::<2>(a), mask),
                N::and(N::right::<4>(a), mask),
                N::and(N::right::<6>(a), mask),
                N::and(b, mask),
                N::and(N::right::<2>(b), mask),
                N::and(N::right::<4>(b), mask),
                N::and(N::right::<6>(b), mask),
            ]
        }
    }
}

impl Codes for Three {
    const WORDS: usize = 3;
    const BITS: u32 = 3;
    #[inline(always)]
    unsafe fn quads<N: Integers>(block: *const u8) -> [N::I; 8] {
        // SAFETY: as above.
        unsafe {
            let low = Two::quads::<N>(block);
            let (high, mask) = (line::<N>(block, 2), bytes::<N>(4));
            let with = |low: N::I, high: N::I| N::or(low, N::and(high, mask));
            [
                with(low[0], N::left::<2>(high)),
                with(low[1], N::left::<1>(high)),
                with(low[2], high),
                with(low[3], N::right::<1>(high)),
                with(low[4], N::right::<2>(high)),
                with(low[5], N::right::<3>(high)),
                with(low[6], N::right::<4>(high)),
                with(low[7], N::right::<5>(high)),
            ]
        }
    }
}

impl Codes for Four {
    const WORDS: usize = 4;
    const BITS: u32 = 4;
    #[inline(always)]
    unsafe fn quads<N: Integers>(block: *const u8) -> [N::I; 8] {
        // SAFETY: as above.
        unsafe {
            let mask = bytes::<N>(15);
            let lines = [line::<N>(block, 0), line::<N>(block, 1), line::<N>(block, 2), line::<N>(block, 3)];
            [
                N::and(lines[0], mask),
                N::and(lines[1], mask),
                N::and(lines[2], mask),
                N::and(lines[3], mask),
                N::and(N::right::<4>(lines[0]), mask),
                N::and(N::right::<4>(lines[1]), mask),
                N::and(N::right::<4>(lines[2]), mask),
                N::and(N::right::<4>(lines[3]), mask),
            ]
        }
    }
}

impl Codes for Five {
    const WORDS: usize = 5;
    const BITS: u32 = 5;
    #[inline(always)]
    unsafe fn quads<N: Integers>(block: *const u8) -> [N::I; 8] {
        // SAFETY: as above.
        unsafe {
            let low = Four::quads::<N>(block);
            let (high, mask) = (line::<N>(block, 4), bytes::<N>(16));
            let with = |low: N::I, high: N::I| N::or(low, N::and(high, mask));
            [
                with(low[0], N::left::<4>(high)),
                with(low[1], N::left::<3>(high)),
                with(low[2], N::left::<2>(high)),
                with(low[3], N::left::<1>(high)),
                with(low[4], high),
                with(low[5], N::right::<1>(high)),
                with(low[6], N::right::<2>(high)),
                with(low[7], N::right::<3>(high)),
            ]
        }
    }
}

impl Codes for Six {
    const WORDS: usize = 6;
    const BITS: u32 = 6;
    #[inline(always)]
    unsafe fn quads<N: Integers>(block: *const u8) -> [N::I; 8] {
        // SAFETY: as above.
        unsafe {
            let low = Four::quads::<N>(block);
            let (a, b, mask) = (line::<N>(block, 4), line::<N>(block, 5), bytes::<N>(48));
            let with = |low: N::I, high: N::I| N::or(low, N::and(high, mask));
            [
                with(low[0], N::left::<4>(a)),
                with(low[1], N::left::<2>(a)),
                with(low[2], a),
                with(low[3], N::right::<2>(a)),
                with(low[4], N::left::<4>(b)),
                with(low[5], N::left::<2>(b)),
                with(low[6], b),
                with(low[7], N::right::<2>(b)),
            ]
        }
    }
}

impl Codes for Eight {
    const WORDS: usize = 8;
    const BITS: u32 = 8;
    #[inline(always)]
    unsafe fn quads<N: Integers>(block: *const u8) -> [N::I; 8] {
        let mut quads = [0; 8].map(|_: i32| std::mem::MaybeUninit::<N::I>::uninit());
        // SAFETY: as above; every quad is written.
        unsafe {
            for (i, quad) in quads.iter_mut().enumerate() {
                let codes = line::<N>(block, i);
                quad.write(if N::SIGNED { N::xor(codes, bytes::<N>(128)) } else { codes });
            }
            quads.map(|quad| quad.assume_init())
        }
    }
}

impl Codes for Table {
    const WORDS: usize = 4;
    const BITS: u32 = 8;
    #[inline(always)]
    unsafe fn quads<N: Integers>(block: *const u8) -> [N::I; 8] {
        const AS_STORED: [u8; 16] = shifted(128);
        const AS_SIGNED: [u8; 16] = shifted(0);
        let table = if N::SIGNED { &AS_SIGNED } else { &AS_STORED };
        // SAFETY: as above.
        unsafe {
            let [a, b, c, d, e, f, g, h] = Four::quads::<N>(block);
            [
                N::look_up(table, a),
                N::look_up(table, b),
                N::look_up(table, c),
                N::look_up(table, d),
                N::look_up(table, e),
                N::look_up(table, f),
                N::look_up(table, g),
                N::look_up(table, h),
            ]
        }
    }
}

const fn shifted(by: u8) -> [u8; 16] {
    let mut bytes = [0; 16];
    let mut i = 0;
    while i < 16 {
        bytes[i] = (TABLE[i] as u8).wrapping_add(by);
        i += 1;
    }
    bytes
}

/// What scales the codes of a span, behind them.
pub(crate) trait Scales {
    const SPAN: usize;
    /// Bytes of a span.
    const BYTES: usize;
    const SUBS: usize;
    const MIN: bool;
    /// # Safety
    /// The CPU has `S`; the span has this block, and `LANES` rows from `row` on.
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, sub: usize, row: usize) -> S::V;
    /// # Safety
    /// As for `scale`.
    unsafe fn min<S: Simd>(scales: *const u8, block: usize, sub: usize, row: usize) -> S::V {
        let _ = (scales, block, sub, row);
        unreachable!("this layout has no minima")
    }
}

/// For each of two blocks, 16 f16.
pub(crate) struct Half;
/// For a block, 16 f16, then 16 f16 minima.
pub(crate) struct HalfMin;
/// For a superblock 16 f16, 16 f16 for the minima; for each of its blocks 16 bytes, 16 bytes of minima.
pub(crate) struct Super32Min;
/// For a superblock 16 f16; for each of its 16 runs 16 signed bytes.
pub(crate) struct Super16;
/// For a superblock 16 f16, 16 f16 for the minima; for each of its 16 runs 16 bytes, scale low and minimum high.
pub(crate) struct Super16Min;
/// For a superblock 16 f16.
pub(crate) struct Super256;

/// Of a superblock's two lines of f16, and of a line of bytes.
pub(super) const HALVES: usize = 2 * GROUP;

impl Scales for Half {
    const SPAN: usize = 2;
    const BYTES: usize = 2 * HALVES;
    const SUBS: usize = 1;
    const MIN: bool = false;
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, _: usize, row: usize) -> S::V {
        // SAFETY: as above.
        unsafe { S::Int::load_f16(scales.add(block * HALVES + 2 * row).cast()) }
    }
}

impl Scales for HalfMin {
    const SPAN: usize = 1;
    const BYTES: usize = 2 * HALVES;
    const SUBS: usize = 1;
    const MIN: bool = true;
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, _: usize, row: usize) -> S::V {
        // SAFETY: as above.
        unsafe { S::Int::load_f16(scales.add(block * 2 * HALVES + 2 * row).cast()) }
    }
    #[inline(always)]
    unsafe fn min<S: Simd>(scales: *const u8, block: usize, _: usize, row: usize) -> S::V {
        // SAFETY: as above.
        unsafe { S::Int::load_f16(scales.add(block * 2 * HALVES + HALVES + 2 * row).cast()) }
    }
}

impl Scales for Super32Min {
    const SPAN: usize = SUPERBLOCK / BLOCK;
    const BYTES: usize = 2 * HALVES + 8 * 2 * GROUP;
    const SUBS: usize = 1;
    const MIN: bool = true;
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, _: usize, row: usize) -> S::V {
        // SAFETY: as above.
        unsafe {
            let d = S::Int::load_f16(scales.add(2 * row).cast());
            S::mul(d, S::Int::load_u8(scales.add(2 * HALVES + block * 2 * GROUP + row)))
        }
    }
    #[inline(always)]
    unsafe fn min<S: Simd>(scales: *const u8, block: usize, _: usize, row: usize) -> S::V {
        // SAFETY: as above.
        unsafe {
            let d = S::sub(S::splat(0.0), S::Int::load_f16(scales.add(HALVES + 2 * row).cast()));
            S::mul(d, S::Int::load_u8(scales.add(2 * HALVES + block * 2 * GROUP + GROUP + row)))
        }
    }
}

impl Scales for Super16 {
    const SPAN: usize = SUPERBLOCK / BLOCK;
    const BYTES: usize = HALVES + 16 * GROUP;
    const SUBS: usize = 2;
    const MIN: bool = false;
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, sub: usize, row: usize) -> S::V {
        // SAFETY: as above.
        unsafe {
            let d = S::Int::load_f16(scales.add(2 * row).cast());
            S::mul(d, S::load_i8(scales.add(HALVES + (block * 2 + sub) * GROUP + row).cast(), S::LANES))
        }
    }
}

impl Super16Min {
    /// Scales below 16, times 1 or 16, from the low or high nibbles.
    #[inline(always)]
    unsafe fn nibble<S: Simd>(scales: *const u8, block: usize, sub: usize, row: usize) -> [S::V; 2] {
        // SAFETY: as above.
        unsafe {
            let both = S::Int::load_u8(scales.add(2 * HALVES + (block * 2 + sub) * GROUP + row));
            // ⌊both / 16⌋: the nearest whole number of what lies at most 15/32 beside it.
            let high = S::round(S::fma(both, S::splat(0.0625), S::splat(-0.46875)));
            [S::fma(high, S::splat(-16.0), both), high]
        }
    }
}

impl Scales for Super16Min {
    const SPAN: usize = SUPERBLOCK / BLOCK;
    const BYTES: usize = 2 * HALVES + 16 * GROUP;
    const SUBS: usize = 2;
    const MIN: bool = true;
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u8, block: usize, sub: usize, row: usize) -> S::V {
        // SAFETY: as above.
        unsafe { S::mul(S::Int::load_f16(scales.add(2 * row).cast()), Self::nibble::<S>(scales, block, sub, row)[0]) }
    }
    #[inline(always)]
    unsafe fn min<S: Simd>(scales: *const u8, block: usize, sub: usize, row: usize) -> S::V {
        // SAFETY: as above.
        unsafe {
            let d = S::sub(S::splat(0.0), S::Int::load_f16(scales.add(HALVES + 2 * row).cast()));
            S::mul(d, Self::nibble::<S>(scales, block, sub, row)[1])
        }
    }
}

impl Scales for Super256 {
    const SPAN: usize = SUPERBLOCK / BLOCK;
    const BYTES: usize = HALVES;
    const SUBS: usize = 1;
    const MIN: bool = false;
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u8, _: usize, _: usize, row: usize) -> S::V {
        // SAFETY: as above.
        unsafe { S::Int::load_f16(scales.add(2 * row).cast()) }
    }
}

//! Every layout on every path, against its own values in f64; and batches against single rows, to the last bit.

use super::*;
use crate::Path;
use crate::path::Work;
use crate::region::Region;
use crate::simd::Simd;
use crate::simd::integer::{Integers, to_f16};

const ALL: [Layout; 15] = [
    Layout::Four,
    Layout::FourMin,
    Layout::Five,
    Layout::FiveMin,
    Layout::Eight,
    Layout::Table,
    Layout::SuperFourMin,
    Layout::SuperFiveMin,
    Layout::SuperTwoMin,
    Layout::SuperThree,
    Layout::SuperSix,
    Layout::Ternary,
    Layout::F16,
    Layout::Bf16,
    Layout::F32,
];

/// SplitMix64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In −1..1.
    fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Any codes, under scales of any sign.
fn matrix(layout: Layout, rows: usize, columns: usize, random: &mut Random) -> Matrix {
    let mut matrix = Matrix::new(rows, columns, layout);
    for (i, mut group) in matrix.groups().enumerate() {
        for row in 0..GROUP.min(rows - i * GROUP) {
            if !layout.is_integer() {
                for column in 0..columns {
                    let x = random.number();
                    match layout {
                        Layout::F16 => group.float(row, column, to_f16(x).to_le_bytes()),
                        Layout::Bf16 => group.float(row, column, crate::simd::to_bf16(x).to_le_bytes()),
                        _ => group.float(row, column, x.to_le_bytes()),
                    }
                }
                continue;
            }
            let is_super = layout.columns_step() == SUPERBLOCK;
            let with_min = matches!(
                layout,
                Layout::FourMin | Layout::FiveMin | Layout::SuperFourMin | Layout::SuperFiveMin | Layout::SuperTwoMin
            );
            for block in 0..columns / BLOCK {
                for word in 0..layout.words() {
                    group.word(row, block, word, random.next() as u32);
                }
            }
            for unit in 0..columns / layout.columns_step() {
                group.scale(row, unit, to_f16(random.number()).to_le_bytes());
                if with_min {
                    group.min(row, unit, to_f16(random.number()).to_le_bytes());
                }
            }
            let run = match layout {
                Layout::SuperFourMin | Layout::SuperFiveMin => 32,
                _ => 16,
            };
            if is_super && layout != Layout::Ternary {
                for run in 0..columns / run {
                    group.run(row, run, random.next() as u8, random.next() as u8);
                }
            }
        }
    }
    matrix
}

/// Rows as a path's strips.
struct Strips {
    path: Path,
    codes: Vec<u32>,
    floats: Vec<f32>,
}

struct Quantize<'a>(&'a [f32], usize, &'a mut [u32], usize, usize);

impl Work for Quantize<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the slices have room.
        unsafe { quantize_row::<S>(self.0.as_ptr(), self.1, self.2.as_mut_ptr(), self.3, self.4) }
    }
}

struct StripRows;

impl Work for StripRows {
    type Output = usize;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> usize {
        S::Int::STRIP_ROWS
    }
}

impl Strips {
    fn new(path: Path, x: &[f32], columns: usize, strip: usize, tile: usize) -> Self {
        let rows = x.len() / columns;
        let words = if columns.is_multiple_of(BLOCK) { code_words(columns, rows.next_multiple_of(strip)) } else { 0 };
        let (mut codes, mut floats) = (vec![0; words], vec![0.0; columns * rows.next_multiple_of(tile)]);
        for (row, x) in x.chunks_exact(columns).enumerate() {
            if words > 0 {
                let to = &mut codes[code_words(columns, row / strip * strip)..];
                path.run(Quantize(x, columns, to, strip, row % strip));
            }
            let to = &mut floats[row / tile * tile * columns..];
            x.iter().enumerate().for_each(|(column, &x)| to[column * tile + row % tile] = x);
        }
        Self { path, codes, floats }
    }

    fn batch(&self, rows: usize) -> Batch {
        Batch { rows, codes: self.codes.as_ptr(), floats: self.floats.as_ptr() }
    }
}

fn vector_product(path: Path, matrix: &Matrix, x: &[f32], start: &[f32]) -> Vec<f32> {
    let input = Strips::new(path, x, matrix.columns(), 1, 1);
    let x = RowInput { codes: input.codes.as_ptr(), floats: x.as_ptr() };
    let mut to = start.to_vec();
    let groups = 0..matrix.rows().div_ceil(GROUP);
    input.path.run(VectorProduct { matrix, groups, x, to: to.as_mut_ptr(), accumulate: true });
    to
}

fn batch_product(path: Path, matrix: &Matrix, x: &[f32], start: &[f32]) -> Vec<f32> {
    let (rows, stride) = (x.len() / matrix.columns(), matrix.rows());
    let input = Strips::new(path, x, matrix.columns(), path.run(StripRows), path.tile_rows());
    let mut to = start.to_vec();
    let scratch = Region::new(batch_scratch_bytes(matrix.columns()), false);
    let groups = 0..matrix.rows().div_ceil(GROUP);
    let (x, scratch) = (input.batch(rows), scratch.start().as_ptr());
    path.run(BatchProduct { matrix, groups, x, to: to.as_mut_ptr(), stride, accumulate: true, scratch });
    to
}

/// What the bytes of activations stand for.
fn rounded(x: &[f32]) -> Vec<f64> {
    let block = |x: &[f32]| {
        let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let (scale, inverse) = (largest / 127.0, if largest > 0.0 { 127.0 / largest } else { 0.0 });
        x.iter().map(|x| f64::from(scale) * f64::from((x * inverse).round_ties_even())).collect::<Vec<f64>>()
    };
    x.chunks(BLOCK).flat_map(block).collect()
}

fn check(layout: Layout, rows: usize, columns: usize, count: usize, random: &mut Random) {
    let matrix = matrix(layout, rows, columns, random);
    let x: Vec<f32> = (0..count * columns).map(|_| random.number() * 4.0).collect();
    let start: Vec<f32> = (0..count * rows).map(|_| random.number()).collect();
    for path in Path::available() {
        let all = batch_product(path, &matrix, &x, &start);
        for (i, x) in x.chunks_exact(columns).enumerate() {
            let start = &start[i * rows..][..rows];
            let found = vector_product(path, &matrix, x, start);
            assert_eq!(all[i * rows..][..rows], found, "{layout:?} on {path:?}: a batch and its row {i}");
            let x: Vec<f64> = if layout.is_integer() { rounded(x) } else { x.iter().map(|&x| f64::from(x)).collect() };
            for (row, found) in found.into_iter().enumerate() {
                let mut values = vec![0.0; columns];
                matrix.row(row, &mut values);
                let products = || values.iter().zip(&x).map(|(&w, x)| f64::from(w) * x);
                let (sum, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                let error = (f64::from(found) - f64::from(start[row]) - sum).abs() / (size + 1.0);
                assert!(error < 4e-6, "{layout:?} on {path:?}, row {row} of {rows} × {columns}: errs by {error:e}");
            }
        }
    }
}

#[test]
fn products_are_those_of_the_layouts_values_on_every_path() {
    let mut random = Random(1);
    for layout in ALL {
        let step = layout.columns_step();
        let sizes: &[(usize, usize, usize)] = match cfg!(miri) {
            // Miri takes a minute for a product of a superblock.
            true if step == SUPERBLOCK => &[(2, 1, 1)],
            true => &[(18, 1, 3)],
            false => &[(1, 1, 1), (16, 2, 2), (40, 3, 7), (65, 5, 13), (96, 18, 6), (48, 2, 10), (33, 3, 11)],
        };
        for &(rows, steps, count) in sizes {
            check(layout, rows, if step == 1 { 32 * steps + 5 } else { step * steps }, count, &mut random);
        }
    }
}

#[test]
fn codes_of_activations_are_the_same_on_every_path_and_err_by_half_a_step() {
    let mut random = Random(2);
    let columns = 96;
    let mut x: Vec<f32> = (0..columns).map(|_| random.number() * 3.0).collect();
    x[40] = 100.0;
    x[64..].fill(0.0);
    let words = |path| {
        let mut codes = vec![0; code_words(columns, 1)];
        Path::run(path, Quantize(&x, columns, &mut codes, 1, 0));
        codes
    };
    let expected = words(Path::available()[0]);
    for path in Path::available() {
        assert_eq!(words(path), expected, "{path:?}");
    }
    for (block, x) in expected.chunks_exact(activations::QUAD_WORDS).zip(x.chunks(BLOCK)) {
        let scale = f32::from_bits(block[activations::SCALE]);
        let codes: Vec<i8> = block[..8].iter().flat_map(|quad| quad.to_le_bytes()).map(|byte| byte as i8).collect();
        for (half, codes) in codes.chunks(16).enumerate() {
            let sum: i32 = codes.iter().map(|&code| i32::from(code)).sum();
            assert_eq!(block[activations::SUM + half] as i32, sum);
            assert_eq!(f32::from_bits(block[activations::SCALED_SUM + half]), scale * sum as f32);
        }
        for (code, x) in codes.iter().zip(x) {
            assert!((f32::from(*code) * scale - x).abs() <= scale * 0.500_01);
        }
    }
}

#[test]
fn a_number_that_is_none_spoils_its_block_and_no_other() {
    let (mut random, columns) = (Random(3), 96);
    let x: Vec<f32> = (0..columns).map(|_| random.number()).collect();
    let matrix = matrix(Layout::Four, 16, columns, &mut random);
    let strange = [f32::NAN, f32::INFINITY, -f32::NAN, f32::NEG_INFINITY];
    for path in Path::available() {
        for (at, strange) in (BLOCK..2 * BLOCK).zip(strange.into_iter().cycle()) {
            let mut x = x.clone();
            x[at] = strange;
            let mut codes = vec![0; code_words(columns, 1)];
            path.run(Quantize(&x, columns, &mut codes, 1, 0));
            let scales =
                codes.chunks_exact(activations::QUAD_WORDS).map(|block| f32::from_bits(block[activations::SCALE]));
            assert_eq!(
                scales.map(f32::is_nan).collect::<Vec<_>>(),
                [false, true, false],
                "{strange} at {at} on {path:?}"
            );
            let found = vector_product(path, &matrix, &x, &[0.0; 16]);
            assert!(found.iter().all(|y| y.is_nan()), "{strange} at {at} on {path:?}: {found:?}");
        }
    }
}

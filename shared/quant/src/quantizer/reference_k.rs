//! ggml's quantizers for the K formats.
//!
//! Sub-blocks are fitted one by one, their scales and minima are then rounded to a few bits under the superblock's `d` and
//! `dmin`, and at last every code is chosen again for the rounded scale. Where that is zero, the codes of the fit stay.

use super::fits::{NEGLIGIBLE, Tries, affine, non_negative, signed_extreme, symmetric, symmetric_sweeps};
use super::rounded;
use crate::blocks::superblocks::Superblock;

type Importance<'a> = Option<&'a [f32; 256]>;

pub(super) fn q2_k(values: &[f32; 256], importance: Importance<'_>) -> Superblock {
    match importance {
        None => {
            let tries = Tries { first: -0.5, step: 0.1, last: 15, absolute: true };
            with_minima::<16>(3, 15, tries, values, |_, x| x.abs())
        }
        Some(importance) => {
            let tries = Tries { first: -0.9, step: 0.05, last: 36, absolute: false };
            with_important_minima::<16>(3, 15, tries, values, importance, mean_square(values))
        }
    }
}

pub(super) fn q4_k(values: &[f32; 256], importance: Importance<'_>) -> Superblock {
    thirty_twos(15, Tries { first: -1.0, step: 0.1, last: 20, absolute: false }, values, importance)
}

pub(super) fn q5_k(values: &[f32; 256], importance: Importance<'_>) -> Superblock {
    thirty_twos(31, Tries { first: -0.5, step: 0.1, last: 15, absolute: false }, values, importance)
}

fn thirty_twos(n: i32, tries: Tries, values: &[f32; 256], importance: Importance<'_>) -> Superblock {
    match importance {
        None => with_minima::<32>(n, 63, tries, values, |sub, x| root_mean_square(sub) + x.abs()),
        Some(importance) => {
            let tries = Tries { first: -0.9, step: 0.05, last: 36, absolute: false };
            with_important_minima::<32>(n, 63, tries, values, importance, 2.0 * mean_square(values))
        }
    }
}

/// Scales and minima are rounded to multiples of a 1/`top` of their largest.
fn with_minima<const SUB: usize>(
    n: i32,
    top: u8,
    tries: Tries,
    values: &[f32; 256],
    weight: impl Fn(&[f32; SUB], f32) -> f32,
) -> Superblock {
    let mut parts = EMPTY;
    let (mut scales, mut mins) = ([0f32; 16], [0f32; 16]);
    let subs = values.as_chunks::<SUB>().0.iter().zip(parts.codes.as_chunks_mut::<SUB>().0);
    for (sub, (x, codes)) in subs.enumerate() {
        let weights = x.map(|value| weight(x, value));
        let (scale, min) = affine(n, tries, x, &weights, codes);
        (scales[sub], mins[sub]) = (scale, -min);
    }
    let round = |values: [f32; 16]| {
        // Not `f32::max`, which may prefer the -0 that the minimum of a zero sub-block is.
        let max = values.iter().fold(0f32, |max, &value| if value > max { value } else { max });
        let inverse = if max > 0.0 { f32::from(top) / max } else { 0.0 };
        (max / f32::from(top), values.map(|value| ((inverse * value).round_ties_even() as u8).min(top)))
    };
    let (d, scales) = round(scales);
    let (dmin, mins) = round(mins);
    finish_with_minima::<SUB>(n, values, Superblock { d, dmin, scales: scales.map(|sc| sc as i8), mins, ..parts })
}

fn with_important_minima<const SUB: usize>(
    n: i32,
    top: u8,
    tries: Tries,
    values: &[f32; 256],
    importance: &[f32; 256],
    spread: f32,
) -> Superblock {
    let mut parts = EMPTY;
    let (mut scales, mut mins, mut sums) = ([0f32; 16], [0f32; 16], [0f32; 16]);
    let subs = values.as_chunks::<SUB>().0.iter().zip(importance.as_chunks::<SUB>().0);
    for (sub, ((x, importance), codes)) in subs.zip(parts.codes.as_chunks_mut::<SUB>().0).enumerate() {
        let weights = weights(x, importance, spread);
        sums[sub] = sum(&weights);
        let (scale, min) = affine(n, tries, x, &weights, codes);
        (scales[sub], mins[sub]) = (scale, -min);
    }
    let count = 256 / SUB;
    let mut codes = [0; 16];
    parts.d = non_negative(i32::from(top), &scales[..count], &sums[..count], &mut codes[..count]);
    parts.scales = codes.map(|sc| sc as i8);
    parts.dmin = non_negative(i32::from(top), &mins[..count], &sums[..count], &mut parts.mins[..count]);
    finish_with_minima::<SUB>(n, values, parts)
}

/// Rounds the scales of the superblock and chooses the codes again.
fn finish_with_minima<const SUB: usize>(n: i32, values: &[f32; 256], mut parts: Superblock) -> Superblock {
    (parts.d, parts.dmin) = (rounded(parts.d), rounded(parts.dmin));
    for (e, (&x, code)) in values.iter().zip(&mut parts.codes).enumerate() {
        let scale = parts.d * f32::from(parts.scales[e / SUB]);
        if scale != 0.0 {
            let min = parts.dmin * f32::from(parts.mins[e / SUB]);
            *code = (((x + min) / scale).round_ties_even() as i32).clamp(0, n) as u8;
        }
    }
    parts
}

pub(super) fn q3_k(values: &[f32; 256], importance: Importance<'_>) -> Superblock {
    let mut parts = EMPTY;
    let (mut scales, mut sums) = ([0f32; 16], [0f32; 16]);
    let spread = 2.0 * mean_square(values);
    for (sub, (x, codes)) in sixteens(values, &mut parts.codes) {
        scales[sub] = match importance {
            None => symmetric_sweeps(4, x, codes),
            Some(importance) => {
                let weights = weights(x, &importance.as_chunks::<16>().0[sub], spread);
                sums[sub] = sum(&weights);
                symmetric(4, x, &weights, codes)
            }
        };
    }
    if importance.is_some() {
        let mut codes = [0; 16];
        parts.d = symmetric(32, &scales, &sums, &mut codes);
        parts.scales = codes.map(|code| (i32::from(code) - 32) as i8);
    } else {
        let extreme = signed_extreme(&scales);
        let inverse = if extreme == 0.0 { 0.0 } else { -32.0 / extreme };
        parts.d = if extreme == 0.0 { 0.0 } else { 1.0 / inverse };
        parts.scales = match extreme {
            0.0 => [-32; 16],
            _ => scales.map(|scale| (inverse * scale).round_ties_even().clamp(-32.0, 31.0) as i8),
        };
    }
    finish_symmetric(4, values, parts)
}

pub(super) fn q6_k(values: &[f32; 256], importance: Importance<'_>) -> Superblock {
    let mut parts = EMPTY;
    let mut scales = [0f32; 16];
    for (sub, (x, codes)) in sixteens(values, &mut parts.codes) {
        let weights = match importance {
            None => x.map(|x| x * x),
            Some(importance) => importance.as_chunks::<16>().0[sub],
        };
        scales[sub] = symmetric(32, x, &weights, codes);
    }
    let extreme = signed_extreme(&scales);
    if extreme.abs() < NEGLIGIBLE {
        return EMPTY;
    }
    let inverse = -128.0 / extreme;
    parts.d = 1.0 / inverse;
    parts.scales = scales.map(|scale| (inverse * scale).round_ties_even().min(127.0) as i8);
    finish_symmetric(32, values, parts)
}

fn finish_symmetric(n: i32, values: &[f32; 256], mut parts: Superblock) -> Superblock {
    parts.d = rounded(parts.d);
    for (e, (&x, code)) in values.iter().zip(&mut parts.codes).enumerate() {
        let scale = parts.d * f32::from(parts.scales[e / 16]);
        if scale != 0.0 {
            *code = (((x / scale).round_ties_even() as i32).clamp(-n, n - 1) + n) as u8;
        }
    }
    parts
}

const EMPTY: Superblock = Superblock { d: 0.0, dmin: 0.0, scales: [0; 16], mins: [0; 16], codes: [0; 256] };

fn sixteens<'a>(
    values: &'a [f32; 256],
    codes: &'a mut [u8; 256],
) -> impl Iterator<Item = (usize, (&'a [f32; 16], &'a mut [u8; 16]))> {
    values.as_chunks::<16>().0.iter().zip(codes.as_chunks_mut::<16>().0).enumerate()
}

fn weights<const SUB: usize>(x: &[f32; SUB], importance: &[f32; SUB], spread: f32) -> [f32; SUB] {
    std::array::from_fn(|i| importance[i] * (spread + x[i] * x[i]).sqrt())
}

fn mean_square(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |sum, x| sum + x * x) / values.len() as f32
}

fn root_mean_square(values: &[f32]) -> f32 {
    mean_square(values).sqrt()
}

fn sum(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |sum, value| sum + value)
}

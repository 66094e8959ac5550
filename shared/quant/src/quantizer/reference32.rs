//! ggml's quantizers for blocks of 32 and for ternary superblocks.
//!
//! Codes are chosen with the scale before it is rounded to `f16`, although the decoder will see it rounded. Without
//! importance they are plain arithmetic, with it a search over scales; `spread` is then the mean square of the whole row,
//! which keeps the weight of small values away from zero.

use super::fits::{NEGLIGIBLE, Tries, affine, range, signed_extreme, symmetric};
use super::inverse;
use crate::blocks::blocks32::{Block32, IQ4_NL_VALUES};
use crate::blocks::ternary::Ternary;

/// A block's importance and the mean square of its row.
pub(super) type Importance<'a> = Option<(&'a [f32; 32], f32)>;

pub(super) fn q4_0(values: &[f32; 32], importance: Importance<'_>) -> Block32 {
    let Some((importance, spread)) = importance else {
        let d = signed_extreme(values) / -8.0;
        let inverse = inverse(d);
        return Block32 { d, m: 0.0, codes: values.map(|x| ((x * inverse + 8.5) as u8).min(15)) };
    };
    let mut codes = [0; 32];
    let d = symmetric(8, values, &weights(values, importance, spread), &mut codes);
    Block32 { d, m: 0.0, codes }
}

pub(super) fn q5_0(values: &[f32; 32], importance: Importance<'_>) -> Block32 {
    let Some((importance, spread)) = importance else {
        let d = signed_extreme(values) / -16.0;
        let inverse = inverse(d);
        return Block32 { d, m: 0.0, codes: values.map(|x| ((x * inverse + 16.5) as u8).min(31)) };
    };
    let mut codes = [0; 32];
    let d = symmetric(16, values, &weights(values, importance, spread), &mut codes);
    Block32 { d, m: 0.0, codes }
}

pub(super) fn q4_1(values: &[f32; 32], importance: Importance<'_>) -> Block32 {
    with_minimum(15, values, importance)
}

pub(super) fn q5_1(values: &[f32; 32], importance: Importance<'_>) -> Block32 {
    with_minimum(31, values, importance)
}

fn with_minimum(n: u8, values: &[f32; 32], importance: Importance<'_>) -> Block32 {
    let Some((importance, spread)) = importance else {
        let (min, max) = range(values);
        let d = (max - min) / f32::from(n);
        let inverse = inverse(d);
        // The cast saturates, so a scale too small to invert cannot carry a code into the neighbouring bits.
        return Block32 { d, m: min, codes: values.map(|x| (((x - min) * inverse + 0.5) as u8).min(n)) };
    };
    let mut codes = [0; 32];
    let tries = Tries { first: -0.9, step: 0.05, last: 36, absolute: false };
    let (d, m) = affine(i32::from(n), tries, values, &weights(values, importance, spread), &mut codes);
    Block32 { d, m, codes }
}

pub(super) fn q8_0(values: &[f32; 32]) -> Block32 {
    let d = largest(values) / 127.0;
    let inverse = inverse(d);
    Block32 { d, m: 0.0, codes: values.map(|x| (x * inverse).round() as i8 as u8) }
}

/// The mean square is the block's own here, doubled.
pub(super) fn iq4_nl(values: &[f32; 32], importance: Option<&[f32; 32]>) -> Block32 {
    let weights = match importance {
        Some(importance) => {
            let squares = values.iter().fold(0f32, |sum, x| sum + x * x);
            weights(values, importance, 2.0 * squares / 32.0)
        }
        None => values.map(|x| x * x),
    };
    let extreme = signed_extreme(values);
    if extreme.abs() < NEGLIGIBLE {
        return Block32 { d: 0.0, m: 0.0, codes: [8; 32] };
    }
    let first = f32::from(IQ4_NL_VALUES[0]);
    let sums = |inverse: f32| {
        values.iter().zip(&weights).fold((0f32, 0f32), |(sum_xq, sum_q2), (&x, &w)| {
            let q = f32::from(IQ4_NL_VALUES[usize::from(nearest_iq4_nl(inverse * x))]);
            (sum_xq + w * q * x, sum_q2 + w * q * q)
        })
    };
    let (sum_xq, sum_q2) = sums(1.0 / (-extreme / first));
    let mut d = sum_xq / sum_q2;
    let mut best = d * sum_xq;
    for t in -7..=7 {
        let (sum_xq, sum_q2) = sums((t as f32 + first) / extreme);
        if sum_q2 > 0.0 && sum_xq * sum_xq > best * sum_q2 {
            d = sum_xq / sum_q2;
            best = d * sum_xq;
        }
    }
    if d.is_nan() {
        d = 0.0; // Nothing in the block matters.
    }
    let inverse = inverse(d);
    Block32 { d, m: 0.0, codes: values.map(|x| nearest_iq4_nl(inverse * x)) }
}

/// The code whose value is nearest; the larger of two equally near.
pub(super) fn nearest_iq4_nl(x: f32) -> u8 {
    let above = IQ4_NL_VALUES.partition_point(|&value| f32::from(value) <= x);
    match above {
        0 => 0,
        16 => 15,
        _ => {
            let [below_value, above_value] = [above - 1, above].map(|code| f32::from(IQ4_NL_VALUES[code]));
            if x - below_value < above_value - x { above as u8 - 1 } else { above as u8 }
        }
    }
}

/// Right for weights that are ternary already: the scale is the largest magnitude.
pub(super) fn ternary(values: &[f32; 256]) -> Ternary {
    let d = largest(values);
    let inverse = inverse(d);
    Ternary { d, digits: values.map(|x| ((x * inverse).round().clamp(-1.0, 1.0) as i8 + 1) as u8) }
}

fn weights(values: &[f32; 32], importance: &[f32; 32], spread: f32) -> [f32; 32] {
    std::array::from_fn(|i| importance[i] * (spread + values[i] * values[i]).sqrt())
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |largest, x| largest.max(x.abs()))
}

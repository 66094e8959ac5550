//! A scale and a minimum for a run of values.
//!
//! Codes and the straight line through them are improved in turn: least squares for the line, rounding for the codes. Each
//! turn can only lose less, but ends where its beginning led; so it begins several times, from ranges cut short at either end
//! or at both, where clipping pays, to one that is a little too long.

use super::{fits, nearest_integer};

/// How much shorter the first range is, in steps, at the low end and at the high end.
const CUTS: [(f32, f32); 14] = [
    (0.0, 0.0),
    (-0.4, -0.4),
    (0.2, 0.2),
    (0.4, 0.4),
    (0.6, 0.6),
    (0.8, 0.8),
    (1.2, 1.2),
    (0.0, -0.5),
    (-0.5, 0.0),
    (0.0, 0.5),
    (0.5, 0.0),
    (0.0, 1.0),
    (1.0, 0.0),
    (0.0, 1.5),
];
const TURNS: usize = 6;

/// Codes 0 to `n` stand for scale·q + min, with min at most `min_max`. Returns the scale, never negative, and min.
pub(super) fn fit<const SUB: usize>(n: u8, x: &[f32; SUB], w: &[f32; SUB], min_max: f32) -> (f32, f32) {
    let (low, high) = fits::range(x);
    let low = low.min(min_max);
    if high <= low {
        return (0.0, low);
    }
    let (mut sum_w, mut sum_x) = (0f32, 0f32);
    for (&x, &w) in x.iter().zip(w) {
        sum_w += w;
        sum_x += w * x;
    }
    let top = f32::from(n);
    let mut line = ((high - low) / top, low);
    let mut best = f32::MAX;
    for (low_cut, high_cut) in CUTS {
        let mut scale = (high - low) / (top + low_cut + high_cut);
        let mut min = (low + scale * low_cut).min(min_max);
        let mut previous = f32::MAX;
        for _ in 0..TURNS {
            let inverse = 1.0 / scale;
            let (mut sum_l, mut sum_l2, mut sum_xl, mut error) = (0f32, 0f32, 0f32, 0f32);
            for (&x, &w) in x.iter().zip(w) {
                let l = nearest_integer(((x - min) * inverse).clamp(0.0, top));
                let off = scale * l + min - x;
                error += w * off * off;
                sum_l += w * l;
                sum_l2 += w * l * l;
                sum_xl += w * l * x;
            }
            if error < best {
                (best, line) = (error, (scale, min));
            }
            let determinant = sum_w * sum_l2 - sum_l * sum_l;
            if error >= previous * 0.9999 || determinant <= 0.0 {
                break;
            }
            previous = error;
            scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if min > min_max {
                min = min_max;
                scale = (sum_xl - min * sum_l) / sum_l2;
            }
            if scale.is_nan() || scale <= 0.0 {
                break;
            }
        }
    }
    line
}

//! The searches that ggml's quantizers are made of, reproduced to the last bit.
//!
//! Each fits a run of values with integer codes under one scale, or a scale and a minimum, trying a fixed list of inverse
//! scales. Sums run in `f32` in index order, and the comparisons are ggml's: a different but equally good choice would be
//! another file. Lengths of `x`, `w` and `codes` are equal.

/// Below this no value of a run is worth a scale.
pub(super) const NEGLIGIBLE: f32 = 1e-15;

/// Codes -n to n-1, returned with n added. Tries inverse scales around -n/M, where M is the first value of largest
/// magnitude, and keeps the one with the largest (Σwxl)²/Σwl²; the scale is Σwxl/Σwl².
pub(super) fn symmetric(n: i32, x: &[f32], w: &[f32], codes: &mut [u8]) -> f32 {
    let extreme = signed_extreme(x);
    if extreme.abs() < NEGLIGIBLE {
        codes.fill(0);
        return 0.0;
    }
    let code = |inverse: f32, x: f32| ((inverse * x).round_ties_even() as i32).clamp(-n, n - 1);
    let sums = |inverse: f32| {
        x.iter().zip(w).fold((0f32, 0f32), |(sum_xl, sum_l2), (&x, &w)| {
            let l = code(inverse, x) as f32;
            (sum_xl + w * x * l, sum_l2 + w * l * l)
        })
    };

    let mut inverse = -(n as f32) / extreme;
    let (sum_xl, sum_l2) = sums(inverse);
    let mut scale = if sum_l2 == 0.0 { 0.0 } else { sum_xl / sum_l2 };
    let mut best = scale * sum_xl;
    for t in (-9..=9).filter(|&t| t != 0) {
        let candidate = -(n as f32 + 0.1 * t as f32) / extreme;
        let (sum_xl, sum_l2) = sums(candidate);
        if sum_l2 > 0.0 && sum_xl * sum_xl > best * sum_l2 {
            inverse = candidate;
            scale = sum_xl / sum_l2;
            best = scale * sum_xl;
        }
    }
    for (slot, &x) in codes.iter_mut().zip(x) {
        *slot = (code(inverse, x) + n) as u8;
    }
    scale
}

/// As [`symmetric`], weighted with x², from -n/M alone, followed by at most five sweeps that change single codes.
pub(super) fn symmetric_sweeps(n: i32, x: &[f32], codes: &mut [u8]) -> f32 {
    let extreme = signed_extreme(x);
    if extreme.abs() < NEGLIGIBLE {
        codes.fill(0);
        return 0.0;
    }
    let inverse = -(n as f32) / extreme;
    let (mut sum_xl, mut sum_l2) = (0f32, 0f32);
    for (slot, &x) in codes.iter_mut().zip(x) {
        let l = ((inverse * x).round_ties_even() as i32).clamp(-n, n - 1);
        *slot = (l + n) as u8;
        sum_xl += x * x * x * l as f32;
        sum_l2 += x * x * l as f32 * l as f32;
    }
    for _ in 0..5 {
        let mut changed = false;
        for (slot, &x) in codes.iter_mut().zip(x) {
            let (w, l) = (x * x, (i32::from(*slot) - n) as f32);
            let mut other_xl = sum_xl - w * x * l;
            if other_xl <= 0.0 {
                continue;
            }
            let mut other_l2 = sum_l2 - w * l * l;
            let new = ((x * other_l2 / other_xl).round_ties_even() as i32).clamp(-n, n - 1);
            if new as f32 == l {
                continue;
            }
            other_xl += w * x * new as f32;
            other_l2 += w * new as f32 * new as f32;
            if other_l2 > 0.0 && other_xl * other_xl * sum_l2 > sum_xl * sum_xl * other_l2 {
                *slot = (new + n) as u8;
                (sum_xl, sum_l2) = (other_xl, other_l2);
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    if sum_l2 > 0.0 { sum_xl / sum_l2 } else { 0.0 }
}

/// Which inverse scales [`affine`] tries, (first + step·t + n)/(max - min) for t = 0 to `last`, and how it adds up errors.
#[derive(Clone, Copy)]
pub(super) struct Tries {
    pub first: f32,
    pub step: f32,
    pub last: u8,
    pub absolute: bool,
}

/// Codes 0 to n for scale·l + min with min at most zero: weighted least squares for each try. Returns scale and minimum.
pub(super) fn affine(n: i32, tries: Tries, x: &[f32], w: &[f32], codes: &mut [u8]) -> (f32, f32) {
    let (low, max) = range(x);
    let mut min = low.min(0.0);
    if max <= min {
        codes.fill(0);
        return (0.0, min);
    }
    let (mut sum_w, mut sum_x) = (0f32, 0f32);
    for (&x, &w) in x.iter().zip(w) {
        sum_w += w;
        sum_x += w * x;
    }
    let code = |inverse: f32, min: f32, x: f32| ((inverse * (x - min)).round_ties_even() as i32).clamp(0, n);
    let cost = |error: f32| if tries.absolute { error.abs() } else { error * error };

    let inverse = n as f32 / (max - min);
    let mut scale = 1.0 / inverse;
    let mut best = 0f32;
    for ((slot, &x), &w) in codes.iter_mut().zip(x).zip(w) {
        let l = code(inverse, min, x);
        *slot = l as u8;
        best += w * cost(scale * l as f32 + min - x);
    }
    let mut tried = [0f32; 32];
    let tried = &mut tried[..x.len()];
    for t in 0..=tries.last {
        // An accepted minimum replaces the one that later tries start from.
        let inverse = (tries.first + tries.step * f32::from(t) + n as f32) / (max - min);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0f32, 0f32, 0f32);
        for ((slot, &x), &w) in tried.iter_mut().zip(x).zip(w) {
            let l = code(inverse, min, x) as f32;
            *slot = l;
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant <= 0.0 {
            continue;
        }
        let mut try_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let mut try_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        if try_min > 0.0 {
            try_min = 0.0;
            try_scale = sum_xl / sum_l2;
        }
        let mut error = 0f32;
        for ((&l, &x), &w) in tried.iter().zip(x).zip(w) {
            error += w * cost(try_scale * l + try_min - x);
        }
        if error < best {
            best = error;
            (scale, min) = (try_scale, try_min);
            for (slot, &l) in codes.iter_mut().zip(&*tried) {
                *slot = l as u8;
            }
        }
    }
    (scale, min)
}

/// Codes 0 to n for values of which none is negative, such as the scales of sub-blocks: nine tries by squared error, then
/// at most five sweeps that change single codes.
pub(super) fn non_negative(n: i32, x: &[f32], w: &[f32], codes: &mut [u8]) -> f32 {
    let max = x.iter().fold(0f32, |max, &x| max.max(x));
    if max < NEGLIGIBLE {
        codes.fill(0);
        return 0.0;
    }
    let error = |inverse: f32, top: i32| {
        let scale = 1.0 / inverse;
        x.iter().zip(w).fold(0f32, |sum, (&x, &w)| {
            let error = x - scale * (inverse * x).round_ties_even().min(top as f32);
            sum + w * error * error
        })
    };
    let mut inverse = n as f32 / max;
    let mut best = error(inverse, i32::MAX);
    for t in (-4..=4).filter(|&t| t != 0) {
        let candidate = (0.1 * t as f32 + n as f32) / max;
        let error = error(candidate, n);
        if error < best {
            best = error;
            inverse = candidate;
        }
    }
    let (mut sum_xl, mut sum_l2) = (0f32, 0f32);
    for ((slot, &x), &w) in codes.iter_mut().zip(x).zip(w) {
        let l = ((inverse * x).round_ties_even() as i32).min(n);
        *slot = l as u8;
        sum_xl += w * x * l as f32;
        sum_l2 += w * l as f32 * l as f32;
    }
    for _ in 0..5 {
        let mut changed = false;
        for ((slot, &x), &w) in codes.iter_mut().zip(x).zip(w) {
            let l = f32::from(*slot);
            let mut other_xl = sum_xl - w * x * l;
            let mut other_l2 = sum_l2 - w * l * l;
            if other_xl <= 0.0 || other_l2 <= 0.0 {
                continue;
            }
            let new = ((x * other_l2 / other_xl).round_ties_even() as i32).min(n);
            if new as f32 == l {
                continue;
            }
            other_xl += w * x * new as f32;
            other_l2 += w * new as f32 * new as f32;
            if other_xl * other_xl * sum_l2 > sum_xl * sum_xl * other_l2 {
                *slot = new as u8;
                (sum_xl, sum_l2) = (other_xl, other_l2);
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    if sum_l2 > 0.0 { sum_xl / sum_l2 } else { 0.0 }
}

/// The first value of largest magnitude, with its sign: it becomes the one code that has no mirror image.
pub(super) fn signed_extreme(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |extreme: f32, &x| if x.abs() > extreme.abs() { x } else { extreme })
}

pub(super) fn range(values: &[f32]) -> (f32, f32) {
    let mut range = (f32::MAX, -f32::MAX);
    for &x in values {
        if x < range.0 {
            range.0 = x;
        }
        if x > range.1 {
            range.1 = x;
        }
    }
    range
}

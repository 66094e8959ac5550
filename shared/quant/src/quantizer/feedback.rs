//! Errors that make up for each other.
//!
//! Where the activations of two columns rise and fall together, an error in one is undone by the opposite error in the
//! other. [`Feedback`] knows the second moments of the activations: after each rounded value it moves the values that are
//! still to come to where they cancel most of the error (GPTQ, Frantar et al., arXiv 2210.17323). With moments
//! H = R·D·Rᵀ, R unit upper triangular, what remains of a row's error is ΣD·(x - x̂)², and the moves are rows of R⁻¹.

use crate::Error;

/// For the columns of one matrix.
#[derive(Debug)]
pub struct Feedback {
    /// D, over its mean: what an error costs that later columns cannot undo.
    costs: Vec<f32>,
    /// R⁻¹, row-major.
    moves: Vec<f32>,
}

/// Added to the diagonal, in parts of its mean. Moments measured on a few thousand tokens agree on no more.
const DAMPING: f64 = 0.3;

impl Feedback {
    /// `moments` is the symmetric matrix XᵀX of activations X, `[token, column]`, in any unit; only its upper half is read.
    pub fn new(moments: &[f32], columns: usize) -> Result<Feedback, Error> {
        if columns.checked_mul(columns) != Some(moments.len()) {
            let (expected, found) = (columns.saturating_mul(columns), moments.len());
            return Err(Error::WrongLength { what: "second moments", unit: "numbers", expected, found });
        }
        let mut upper: Vec<f64> = moments.iter().map(|&moment| f64::from(moment)).collect();
        let mean = (0..columns).map(|column| upper[column * columns + column]).sum::<f64>() / columns.max(1) as f64;
        if !(mean > 0.0 && mean.is_finite()) {
            return Err(Error::Importance { column: 0 });
        }
        for column in 0..columns {
            upper[column * columns + column] += DAMPING * mean;
        }
        let costs = factorize(&mut upper, columns)?;
        let mean = costs.iter().sum::<f64>() / columns as f64;
        Ok(Feedback { costs: costs.iter().map(|cost| (cost / mean) as f32).collect(), moves: invert(&upper, columns) })
    }

    /// Moments of one text with the column importances of another: correlations stay, and each column's mean square becomes
    /// what `importance` says of it.
    pub fn with_importance(moments: &[f32], importance: &[f32]) -> Result<Feedback, Error> {
        let columns = importance.len();
        if columns.checked_mul(columns) != Some(moments.len()) {
            return Feedback::new(moments, columns);
        }
        let wrong = |v: &f32| !v.is_finite() || *v < 0.0;
        if let Some(column) = importance.iter().position(wrong) {
            return Err(Error::Importance { column });
        }
        let factor = |column: usize| {
            let own = moments[column * columns + column];
            if own > 0.0 { (importance[column] / own).sqrt() } else { 0.0 }
        };
        let factors: Vec<f32> = (0..columns).map(factor).collect();
        let mut scaled: Vec<f32> = moments.to_vec();
        for (row, values) in scaled.chunks_exact_mut(columns).enumerate() {
            for (value, factor) in values.iter_mut().zip(&factors) {
                *value *= factor * factors[row];
            }
            values[row] = importance[row];
        }
        Feedback::new(&scaled, columns)
    }

    pub fn columns(&self) -> usize {
        self.costs.len()
    }

    pub(super) fn costs(&self) -> &[f32] {
        &self.costs
    }

    /// Moves the values behind `column`, which was rounded down by `off`.
    pub(super) fn carry(&self, column: usize, off: f32, values: &mut [f32]) {
        let moves = &self.moves[column * self.columns()..][..self.columns()];
        for (value, part) in values[column + 1..].iter_mut().zip(&moves[column + 1..]) {
            *value -= off * part;
        }
    }
}

/// Turns the upper half of H into R and returns D, from the last column to the first.
fn factorize(upper: &mut [f64], columns: usize) -> Result<Vec<f64>, Error> {
    let mut costs = vec![0.0; columns];
    let mut scaled = vec![0.0; columns];
    for last in (0..columns).rev() {
        let cost = upper[last * columns + last];
        if !(cost > 0.0 && cost.is_finite()) {
            return Err(Error::Importance { column: last });
        }
        costs[last] = cost;
        upper[last * columns + last] = 1.0;
        for row in 0..last {
            scaled[row] = upper[row * columns + last];
            upper[row * columns + last] /= cost;
        }
        for row in 0..last {
            let factor = upper[row * columns + last];
            for (value, scaled) in upper[row * columns + row..][..last - row].iter_mut().zip(&scaled[row..last]) {
                *value -= factor * scaled;
            }
        }
    }
    Ok(costs)
}

/// The inverse of a unit upper triangular matrix, row by row from the last.
fn invert(upper: &[f64], columns: usize) -> Vec<f32> {
    let mut inverse = vec![0.0f64; columns * columns];
    for row in (0..columns).rev() {
        let (above, below) = inverse.split_at_mut((row + 1) * columns);
        let above = &mut above[row * columns..];
        above[row] = 1.0;
        for middle in row + 1..columns {
            let factor = upper[row * columns + middle];
            let known = &below[(middle - row - 1) * columns..][..columns];
            for (value, known) in above[middle..].iter_mut().zip(&known[middle..]) {
                *value -= factor * known;
            }
        }
    }
    inverse.into_iter().map(|value| value as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockType, Method, dequantize, quantize_row, quantize_row_with_feedback};

    /// Activations of 64 columns that four hidden causes move together, and a row of weights.
    fn moments_and_row() -> (Vec<f32>, Vec<f32>) {
        let wave = |i: usize, k: f32| (i as f32 * k).sin();
        let tokens = (0..200).map(|t| -> Vec<f32> {
            let cause = |c: usize, k: f32| wave(t * 7 + c, 0.3 + k) * wave(c + t, 1.3);
            (0..64).map(|c| (0..4).map(|k| cause(k, 0.37 * k as f32) * wave(c + 1, 0.9 + k as f32)).sum()).collect()
        });
        let mut moments = vec![0.0; 64 * 64];
        for token in tokens {
            for (row, x) in token.iter().enumerate() {
                for (column, y) in token.iter().enumerate() {
                    moments[row * 64 + column] += x * y;
                }
            }
        }
        (moments, (0..64).map(|c| wave(c * c + 1, 0.7) * 0.1).collect())
    }

    #[test]
    fn factors_multiply_to_the_damped_moments() {
        let (moments, _) = moments_and_row();
        let mut upper: Vec<f64> = moments.iter().map(|&moment| f64::from(moment)).collect();
        let mean = (0..64).map(|c| upper[c * 65]).sum::<f64>() / 64.0;
        (0..64).for_each(|c| upper[c * 65] += mean);
        let whole = upper.clone();
        let costs = factorize(&mut upper, 64).unwrap();
        let inverse = invert(&upper, 64);
        let r = |row: usize, column: usize| if column < row { 0.0 } else { upper[row * 64 + column] };
        for (row, column) in [(0, 0), (0, 63), (5, 17), (40, 41), (63, 63)] {
            let product: f64 = (0..64).map(|k| r(row, k) * costs[k] * r(column, k)).sum();
            assert!((product - whole[row * 64 + column]).abs() < mean * 1e-9, "H at {row}, {column}");
            let one: f64 = (0..64).map(|k| r(row, k) * f64::from(inverse[k * 64 + column])).sum();
            assert!((one - f64::from(u8::from(row == column))).abs() < 1e-5, "R·R⁻¹ at {row}, {column}");
        }
    }

    #[test]
    fn fed_back_errors_cancel_in_the_output() {
        let (moments, row) = moments_and_row();
        let feedback = Feedback::new(&moments, 64).unwrap();
        let importance: Vec<f32> = (0..64).map(|c| moments[c * 65]).collect();
        let output_error = |ty: BlockType, bytes: &[u8]| {
            let mut found = vec![0.0; 64];
            dequantize(ty, bytes, &mut found).unwrap();
            let off: Vec<f32> = found.iter().zip(&row).map(|(found, x)| found - x).collect();
            let products = (0..64 * 64).map(|i| off[i / 64] * moments[i] * off[i % 64]);
            products.sum::<f32>()
        };
        for ty in [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q5_0, BlockType::Q5_1, BlockType::IQ4_NL] {
            let mut bytes = vec![0; ty.bytes_of(64).unwrap()];
            quantize_row(ty, Method::Search, &row, Some(&importance), &mut bytes).unwrap();
            let without = output_error(ty, &bytes);
            quantize_row_with_feedback(ty, &row, &feedback, &mut bytes).unwrap();
            let with = output_error(ty, &bytes);
            assert!(with < without * 0.5, "{ty}: {with}, without feedback {without}");
        }
    }

    #[test]
    fn independent_columns_have_nothing_to_carry() {
        let mut moments = vec![0.0; 64 * 64];
        (0..64).for_each(|c| moments[c * 65] = 1.0 + c as f32);
        let feedback = Feedback::new(&moments, 64).unwrap();
        let mut values = [1.0; 64];
        feedback.carry(3, 0.5, &mut values);
        assert_eq!(values, [1.0; 64]);
    }

    #[test]
    fn importance_sets_the_mean_squares_and_keeps_the_correlations() {
        let (moments, row) = moments_and_row();
        let diagonal: Vec<f32> = (0..64).map(|c| moments[c * 65]).collect();
        let [same, own] =
            [Feedback::with_importance(&moments, &diagonal).unwrap(), Feedback::new(&moments, 64).unwrap()];
        for (same, own) in same.costs.iter().zip(&own.costs) {
            assert!((same / own - 1.0).abs() < 1e-3, "{same}, {own}");
        }
        // A column that does not matter costs nothing but the damping.
        let mut importance = diagonal;
        importance[7] = 0.0;
        let without = Feedback::with_importance(&moments, &importance).unwrap();
        let mut values = row;
        let before = values.clone();
        without.carry(7, 1.0, &mut values);
        assert_eq!(values, before);
        let bad = Feedback::with_importance(&moments, &[f32::NAN; 64]);
        assert!(matches!(bad, Err(Error::Importance { column: 0 })));
        assert!(matches!(Feedback::with_importance(&moments, &[1.0; 63]), Err(Error::WrongLength { .. })));
    }

    #[test]
    fn impossible_moments_are_refused() {
        for bad in [f32::NAN, f32::INFINITY, -1.0, 0.0] {
            assert!(matches!(Feedback::new(&[bad; 16], 4), Err(Error::Importance { .. })), "{bad}");
        }
        // No activations have these.
        assert!(matches!(Feedback::new(&[1.0, 9.0, 9.0, 1.0], 2), Err(Error::Importance { column: 0 })));
        assert!(matches!(Feedback::new(&[1.0; 15], 4), Err(Error::WrongLength { expected: 16, .. })));
        let feedback = Feedback::new(&[1.0], 1).unwrap();
        let refused = quantize_row_with_feedback(BlockType::Q4_0, &[0.5; 32], &feedback, &mut [0; 18]);
        assert!(matches!(refused, Err(Error::WrongLength { expected: 32, found: 1, .. })), "{refused:?}");
    }
}

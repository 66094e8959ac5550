//! The coordinate-wise trimmed mean (Yin et al., arXiv 1803.01498, definition 2).
//!
//! In every coordinate the `trim` smallest and the `trim` largest values are left out and the rest is averaged. Weights
//! play no part: a participant that lies about its vector may lie about its tokens too.

use super::{Strategy, StrategyError, Update, check_updates};

pub struct TrimmedMean {
    trim: usize,
}

impl TrimmedMean {
    pub fn new(trim: usize) -> Self {
        Self { trim }
    }
}

impl Strategy for TrimmedMean {
    fn aggregate(&mut self, global: &[f32], updates: &[Update<'_>]) -> Result<Vec<f32>, StrategyError> {
        check_updates(global, updates)?;
        let (trim, updates_count) = (self.trim, updates.len());
        if updates_count <= trim.saturating_mul(2) {
            return Err(StrategyError::TooFewToTrim { updates: updates_count, trim });
        }
        Ok(by_coordinate(global.len(), updates, |sorted| mean(&sorted[trim..updates_count - trim])))
    }
}

/// Applies `reduce` to the ascending values of each coordinate, so that the order of updates cannot matter.
pub(super) fn by_coordinate(coordinates: usize, updates: &[Update<'_>], reduce: impl Fn(&[f32]) -> f64) -> Vec<f32> {
    let mut sorted = Vec::with_capacity(updates.len());
    let mut reduced = Vec::with_capacity(coordinates);
    for coordinate in 0..coordinates {
        sorted.clear();
        sorted.extend(updates.iter().map(|update| update.values[coordinate]));
        sorted.sort_unstable_by(f32::total_cmp);
        reduced.push(reduce(&sorted) as f32);
    }
    reduced
}

/// The mean of at least one value. It starts with the first one and not with 0, which would turn -0 into 0.
pub(super) fn mean(values: &[f32]) -> f64 {
    let sum: Option<f64> = values.iter().map(|value| f64::from(*value)).reduce(|sum, value| sum + value);
    sum.unwrap_or(f64::NAN) / values.len() as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop, prop_assert, proptest};

    use super::*;
    use crate::strategy::tests::{any_values, check_aggregate, check_order_does_not_matter, update};

    #[test]
    fn the_extremes_of_every_coordinate_are_left_out() {
        // First coordinate: 1 and 900 go, (2 + 4 + 6) / 3 = 4. Second: -80 and 7 go, (1 + 2 + 3) / 3 = 2.
        let updates: [(f64, &[f32]); 5] =
            [(9.0, &[4.0, 7.0]), (1.0, &[900.0, 2.0]), (1.0, &[1.0, -80.0]), (0.0, &[2.0, 3.0]), (1.0, &[6.0, 1.0])];
        check_aggregate(&mut TrimmedMean::new(1), &[0.0, 0.0], &updates, &[4.0, 2.0]);
    }

    #[test]
    fn trimming_nothing_is_the_plain_mean() {
        check_aggregate(&mut TrimmedMean::new(0), &[0.0], &[(1.0, &[1.0]), (5.0, &[4.0])], &[2.5]);
    }

    #[test]
    fn as_many_values_must_remain_as_one() {
        for updates in 1..=4 {
            let too_few = vec![update(1.0, &[1.0]); updates];
            let error = TrimmedMean::new(2).aggregate(&[0.0], &too_few).unwrap_err();
            assert_eq!(error, StrategyError::TooFewToTrim { updates, trim: 2 });
        }
        let enough = vec![update(1.0, &[1.0]); 5];
        assert_eq!(TrimmedMean::new(2).aggregate(&[0.0], &enough), Ok(vec![1.0]));
        assert_eq!(
            StrategyError::TooFewToTrim { updates: 4, trim: 2 }.to_string(),
            "trim the 2 smallest and 2 largest of 4 updates: set `trim` below half of the quorum"
        );
    }

    proptest! {
        #[test]
        fn the_order_of_updates_does_not_matter(vectors in prop::collection::vec(any_values(4), 3..8)) {
            check_order_does_not_matter(&mut TrimmedMean::new(1), vectors);
        }

        #[test]
        fn trimming_equal_updates_changes_no_bit(values in any_values(4), count in 3..8usize) {
            let mean = TrimmedMean::new(1).aggregate(&[0.0; 4], &vec![update(1.0, &values); count]).unwrap();
            prop_assert!(mean.iter().zip(&values).all(|(mean, value)| mean.to_bits() == value.to_bits()));
        }

        #[test]
        fn one_liar_moves_nothing_beyond_the_honest(
            honest in prop::collection::vec(-1.0f32..1.0, 4..8),
            lie in -1e30f32..1e30,
        ) {
            let vectors: Vec<[f32; 1]> = honest.iter().chain([&lie]).map(|value| [*value]).collect();
            let updates: Vec<_> = vectors.iter().map(|values| update(1.0, values)).collect();
            let mean = TrimmedMean::new(1).aggregate(&[0.0], &updates).unwrap();
            prop_assert!((-1.0..=1.0).contains(&mean[0]));
        }
    }
}

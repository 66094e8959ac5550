//! The coordinate-wise median (Yin et al., arXiv 1803.01498, definition 1), without weights; of an even number of
//! values, the mean of the middle two.

use super::trimmed_mean::{by_coordinate, mean};
use super::{Strategy, StrategyError, Update, check_updates};

pub struct Median;

impl Strategy for Median {
    fn aggregate(&mut self, global: &[f32], updates: &[Update<'_>]) -> Result<Vec<f32>, StrategyError> {
        check_updates(global, updates)?;
        let (low, high) = ((updates.len() - 1) / 2, updates.len() / 2);
        Ok(by_coordinate(global.len(), updates, |sorted| mean(&sorted[low..=high])))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop, prop_assert, proptest};

    use super::*;
    use crate::strategy::tests::{any_values, check_aggregate, check_order_does_not_matter, update};

    #[test]
    fn the_middle_of_an_odd_number_whatever_the_weights() {
        let updates: [(f64, &[f32]); 3] = [(1000.0, &[50.0, 1.0]), (1.0, &[-7.0, 2.0]), (0.0, &[3.0, -9.0])];
        check_aggregate(&mut Median, &[0.0, 0.0], &updates, &[3.0, 1.0]);
    }

    #[test]
    fn the_mean_of_the_middle_two_of_an_even_number() {
        let updates: [(f64, &[f32]); 4] = [(1.0, &[8.0]), (1.0, &[1.0]), (1.0, &[2.0]), (1.0, &[100.0])];
        check_aggregate(&mut Median, &[0.0], &updates, &[5.0]);
    }

    proptest! {
        #[test]
        fn the_order_of_updates_does_not_matter(vectors in prop::collection::vec(any_values(4), 1..8)) {
            check_order_does_not_matter(&mut Median, vectors);
        }

        #[test]
        fn the_median_of_equal_updates_changes_no_bit(values in any_values(4), count in 1..8usize) {
            let median = Median.aggregate(&[0.0; 4], &vec![update(1.0, &values); count]).unwrap();
            prop_assert!(median.iter().zip(&values).all(|(median, value)| median.to_bits() == value.to_bits()));
        }
    }
}

//! FedAvg: the token-weighted mean (McMahan et al., arXiv 1602.05629, algorithm 1).

use super::{Strategy, StrategyError, Update, check_updates};

pub struct FedAvg;

impl Strategy for FedAvg {
    fn aggregate(&mut self, global: &[f32], updates: &[Update<'_>]) -> Result<Vec<f32>, StrategyError> {
        Ok(weighted_mean(global, updates)?.into_iter().map(|mean| mean as f32).collect())
    }
}

/// The mean in `f64`. Rounded to `f32`, the mean of equal values is that value, bit for bit: the few roundings of `f64`
/// are far smaller than half a unit in the last place of an `f32`.
pub(super) fn weighted_mean(global: &[f32], updates: &[Update<'_>]) -> Result<Vec<f64>, StrategyError> {
    check_updates(global, updates)?;
    let total: f64 = updates.iter().map(|update| update.weight).sum();
    // A sum starts with its first term and not with 0, which would turn -0 into 0.
    let mut weighty = updates.iter().filter(|update| update.weight > 0.0);
    let Some(first) = weighty.next() else {
        return Err(StrategyError::NoWeight { updates: updates.len() });
    };
    let mut sums: Vec<f64> = first.values.iter().map(|value| first.weight * f64::from(*value)).collect();
    for update in weighty {
        for (sum, value) in sums.iter_mut().zip(update.values) {
            *sum += update.weight * f64::from(*value);
        }
    }
    sums.iter_mut().for_each(|sum| *sum /= total);
    Ok(sums)
}

/// Where the updates would move the adapter, as one step of plain descent: the mean less the present value.
pub(super) fn mean_change(global: &[f32], updates: &[Update<'_>]) -> Result<Vec<f64>, StrategyError> {
    let mut changes = weighted_mean(global, updates)?;
    for (change, value) in changes.iter_mut().zip(global) {
        *change -= f64::from(*value);
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop, prop_assert, proptest};

    use super::*;
    use crate::strategy::tests::{any_values, any_weight, check_aggregate, update};

    #[test]
    fn the_mean_is_weighted_by_tokens() {
        // (1·2 + 3·6) / 4 = 5 and (1·0 + 3·(-4)) / 4 = -3; where the global vector was does not matter.
        check_aggregate(&mut FedAvg, &[9.0, 9.0], &[(1.0, &[2.0, 0.0]), (3.0, &[6.0, -4.0])], &[5.0, -3.0]);
    }

    #[test]
    fn an_update_without_weight_does_not_count() {
        check_aggregate(&mut FedAvg, &[0.0], &[(0.0, &[100.0]), (2.0, &[3.0])], &[3.0]);
    }

    #[test]
    fn updates_without_any_weight_have_no_mean() {
        let updates = [update(0.0, &[1.0]), update(0.0, &[2.0])];
        assert_eq!(FedAvg.aggregate(&[0.0], &updates), Err(StrategyError::NoWeight { updates: 2 }));
    }

    proptest! {
        #[test]
        fn averaging_equal_updates_changes_no_bit(
            values in any_values(8),
            weights in prop::collection::vec(any_weight(), 1..7),
        ) {
            let updates: Vec<_> = weights.iter().map(|weight| update(*weight, &values)).collect();
            let mean = FedAvg.aggregate(&[0.0; 8], &updates).unwrap();
            prop_assert!(mean.iter().zip(&values).all(|(mean, value)| mean.to_bits() == value.to_bits()));
        }
    }
}

//! What holds for every strategy, and the checks that their own tests share.

// Both worlds say Strategy; here, proptest's makes test inputs.
use proptest::prelude::{Strategy as Generator, prop, prop_assert, proptest};

use super::*;

pub fn update(weight: f64, values: &[f32]) -> Update<'_> {
    Update { weight, values }
}

pub fn any_weight() -> impl Generator<Value = f64> {
    (1..=u64::MAX).prop_map(|tokens| tokens as f64)
}

/// Finite values of all sizes and both signs, zeros and subnormals included.
pub fn any_values(len: usize) -> impl Generator<Value = Vec<f32>> {
    prop::collection::vec(prop::num::f32::ANY.prop_filter("finite", |value| value.is_finite()), len)
}

#[track_caller]
pub fn check_aggregate(strategy: &mut dyn Strategy, global: &[f32], updates: &[(f64, &[f32])], expected: &[f32]) {
    let updates: Vec<_> = updates.iter().map(|(weight, values)| update(*weight, values)).collect();
    let found = strategy.aggregate(global, &updates).expect("the updates are in order");
    assert_eq!(found.len(), expected.len());
    for (found_value, value) in found.iter().zip(expected) {
        assert!((found_value - value).abs() <= 1e-6 * value.abs(), "found {found:?}, expected {expected:?}");
    }
}

/// The strategy knows its updates only as numbers: turned round, they have the same aggregate to the bit.
#[track_caller]
pub fn check_order_does_not_matter(strategy: &mut dyn Strategy, mut vectors: Vec<Vec<f32>>) {
    let mut aggregate = |vectors: &[Vec<f32>]| -> Vec<u32> {
        let updates: Vec<_> = vectors.iter().map(|values| update(1.0, values)).collect();
        let aggregate = strategy.aggregate(&vec![0.0; vectors[0].len()], &updates).expect("the updates are in order");
        aggregate.into_iter().map(f32::to_bits).collect()
    };
    let forwards = aggregate(&vectors);
    vectors.reverse();
    assert_eq!(forwards, aggregate(&vectors));
    let middle = vectors.len() / 2;
    vectors.rotate_left(middle);
    assert_eq!(forwards, aggregate(&vectors));
}

/// One strategy runs through; another is given its state after two rounds and must end at the same bits.
#[track_caller]
pub fn check_resumes<S: Strategy>(fresh: impl Fn() -> S) {
    let round = |strategy: &mut S, global: &[f32], number: f32| {
        let [first, second] = [[number, -0.3], [0.5, number * 0.7]];
        strategy.aggregate(global, &[update(2.0, &first), update(3.0, &second)]).expect("the updates are in order")
    };
    let mut straight = fresh();
    assert_eq!(straight.state(), [], "nothing is remembered before the first round");
    let global = round(&mut straight, &[0.1, 0.2], 1.0);
    let global = round(&mut straight, &global, -2.0);

    let state: Vec<_> = straight.state().into_iter().map(|(name, values)| (name.to_owned(), values.to_vec())).collect();
    let mut resumed = fresh();
    resumed.restore(state.clone()).expect("the state is the strategy's own");
    assert_eq!(round(&mut straight, &global, 3.0), round(&mut resumed, &global, 3.0));
    assert_eq!(straight.state(), resumed.state());

    let stranger = vec![("momentums".to_owned(), vec![0.0])];
    assert_eq!(fresh().restore(stranger), Err(StrategyError::UnknownState { name: "momentums".to_owned() }));
    if state.len() > 1 {
        let error = fresh().restore(state[1..].to_vec()).unwrap_err();
        assert!(matches!(error, StrategyError::MissingState { .. }), "{error}");
    }
    let mut too_long = fresh();
    let longer = state.into_iter().map(|(name, _)| (name, vec![0.5; 3]));
    too_long.restore(longer.collect()).expect("the length is compared with the adapter's");
    let error = too_long.aggregate(&[0.1, 0.2], &[update(1.0, &[0.1, 0.2])]).unwrap_err();
    assert!(matches!(error, StrategyError::WrongStateLength { expected: 2, found: 3, .. }), "{error}");
    fresh().restore(Vec::new()).expect("a run may stop before its first round");
}

fn all_strategies() -> Vec<Box<dyn Strategy + Send + Sync>> {
    use experiment::Strategy as Named;
    let [learning_rate, beta1, beta2, tau] = [0.1, 0.9, 0.99, 1e-3];
    [
        Named::FedAvg,
        Named::FedProx { mu: 0.1 },
        Named::FedAvgM { learning_rate, momentum: 0.9 },
        Named::FedAdam { learning_rate, beta1, beta2, tau },
        Named::FedYogi { learning_rate, beta1, beta2, tau },
        Named::TrimmedMean { trim: 0 },
        Named::Median,
    ]
    .iter()
    .map(from_experiment)
    .collect()
}

#[test]
fn every_strategy_refuses_updates_that_do_not_fit() {
    for mut strategy in all_strategies() {
        assert_eq!(strategy.aggregate(&[0.0], &[]), Err(StrategyError::NoUpdates));
        let too_long = [update(1.0, &[1.0]), update(1.0, &[1.0, 2.0])];
        let wrong_length = StrategyError::WrongLength { index: 1, expected: 1, found: 2 };
        assert_eq!(strategy.aggregate(&[0.0], &too_long), Err(wrong_length));
        for weight in [-1.0, f64::NAN, f64::INFINITY] {
            let error = strategy.aggregate(&[0.0], &[update(weight, &[1.0])]).unwrap_err();
            assert!(matches!(error, StrategyError::BadWeight { index: 0, .. }), "{error}");
        }
        assert_eq!(strategy.state(), [], "an error leaves no trace");
    }
}

#[test]
fn every_strategy_leaves_an_empty_adapter_empty() {
    for mut strategy in all_strategies() {
        assert_eq!(strategy.aggregate(&[], &[update(1.0, &[])]), Ok(Vec::new()));
    }
}

#[test]
fn strategies_without_memory_refuse_the_state_of_others() {
    let state = vec![("velocity".to_owned(), vec![0.0])];
    let unknown = StrategyError::UnknownState { name: "velocity".to_owned() };
    assert_eq!(FedAvg.restore(state.clone()), Err(unknown.clone()));
    assert_eq!(Median.restore(state), Err(unknown));
    assert_eq!(Median.restore(Vec::new()), Ok(()));
}

proptest! {
    #[test]
    fn no_strategy_moves_an_adapter_that_nobody_has_changed(
        values in prop::collection::vec(-10.0f32..10.0, 5),
        weights in prop::collection::vec(any_weight(), 1..5),
    ) {
        for mut strategy in all_strategies() {
            let updates: Vec<_> = weights.iter().map(|weight| update(*weight, &values)).collect();
            let next = strategy.aggregate(&values, &updates).unwrap();
            for (next, value) in next.iter().zip(&values) {
                prop_assert!((next - value).abs() <= 1e-6 * value.abs(), "{} became {}", value, next);
            }
        }
    }
}

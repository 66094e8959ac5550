//! FedAvgM: FedAvg with momentum on the coordinator (Hsu et al., arXiv 1909.06335, section 4.3).
//!
//! With the mean change Δ: `v ← momentum · v + Δ`, then `w ← w + learning_rate · v`.

use super::fedavg::mean_change;
use super::{Strategy, StrategyError, Update, take_state};

pub struct FedAvgM {
    learning_rate: f64,
    momentum: f64,
    /// Empty before the first round, when it stands for zeros.
    velocity: Vec<f32>,
}

impl FedAvgM {
    pub fn new(learning_rate: f64, momentum: f64) -> Self {
        Self { learning_rate, momentum, velocity: Vec::new() }
    }
}

impl Strategy for FedAvgM {
    fn aggregate(&mut self, global: &[f32], updates: &[Update<'_>]) -> Result<Vec<f32>, StrategyError> {
        let changes = mean_change(global, updates)?;
        if self.velocity.is_empty() {
            self.velocity = vec![0.0; global.len()];
        }
        let (expected, found) = (global.len(), self.velocity.len());
        if found != expected {
            return Err(StrategyError::WrongStateLength { name: "velocity", expected, found });
        }
        let mut next = Vec::with_capacity(global.len());
        for ((velocity, change), value) in self.velocity.iter_mut().zip(changes).zip(global) {
            *velocity = (self.momentum * f64::from(*velocity) + change) as f32;
            next.push((f64::from(*value) + self.learning_rate * f64::from(*velocity)) as f32);
        }
        Ok(next)
    }

    fn state(&self) -> Vec<(&'static str, &[f32])> {
        if self.velocity.is_empty() { Vec::new() } else { vec![("velocity", &self.velocity)] }
    }

    fn restore(&mut self, state: Vec<(String, Vec<f32>)>) -> Result<(), StrategyError> {
        [self.velocity] = take_state(["velocity"], state)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::strategy::tests::{check_aggregate, check_resumes};

    #[test]
    fn velocity_carries_over_to_the_next_round() {
        let mut strategy = FedAvgM::new(0.5, 0.5);
        // The mean of 2 and 6 with weights 1 and 3 is 5, so that Δ = 4, v = 4, w = 1 + 0.5·4 = 3.
        check_aggregate(&mut strategy, &[1.0], &[(1.0, &[2.0]), (3.0, &[6.0])], &[3.0]);
        // Δ = 2 - 3 = -1, v = 0.5·4 - 1 = 1, w = 3 + 0.5·1 = 3.5.
        check_aggregate(&mut strategy, &[3.0], &[(1.0, &[2.0])], &[3.5]);
        assert_eq!(strategy.state(), [("velocity", [1.0].as_slice())]);
    }

    #[test]
    fn without_momentum_and_at_rate_one_it_is_the_mean() {
        check_aggregate(&mut FedAvgM::new(1.0, 0.0), &[1.0], &[(1.0, &[2.0]), (3.0, &[6.0])], &[5.0]);
    }

    #[test]
    fn a_restored_strategy_goes_on_like_the_first() {
        check_resumes(|| FedAvgM::new(0.7, 0.9));
    }
}

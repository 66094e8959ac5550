//! FedAdam: `v ← β₂·v + (1 - β₂)·Δ²`; all else is the adaptive strategies' common part.

use super::adaptive::Adaptive;
use super::{Strategy, StrategyError, Update};

pub struct FedAdam {
    adaptive: Adaptive,
    beta2: f64,
}

impl FedAdam {
    pub fn new(learning_rate: f64, beta1: f64, beta2: f64, tau: f64) -> Self {
        Self { adaptive: Adaptive::new(learning_rate, beta1, tau), beta2 }
    }
}

impl Strategy for FedAdam {
    fn aggregate(&mut self, global: &[f32], updates: &[Update<'_>]) -> Result<Vec<f32>, StrategyError> {
        let beta2 = self.beta2;
        self.adaptive
            .aggregate(global, updates, |second, change_squared| beta2 * second + (1.0 - beta2) * change_squared)
    }

    fn state(&self) -> Vec<(&'static str, &[f32])> {
        self.adaptive.state()
    }

    fn restore(&mut self, state: Vec<(String, Vec<f32>)>) -> Result<(), StrategyError> {
        self.adaptive.restore(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::strategy::tests::{check_aggregate, check_resumes};

    #[test]
    fn two_rounds_by_hand() {
        let mut strategy = FedAdam::new(3.0, 0.5, 0.75, 1.0);
        // The mean of 0 and 10 with weights 1 and 1 is 5, so that Δ = 4 and m = 2; v = 0.75·1² + 0.25·16 = 4.75,
        // w = 1 + 3·2 / (√4.75 + 1).
        let second = 1.0 + 6.0 / (4.75_f32.sqrt() + 1.0);
        check_aggregate(&mut strategy, &[1.0], &[(1.0, &[0.0]), (1.0, &[10.0])], &[second]);
        // Δ = 3 - 1 = 2, m = 0.5·2 + 0.5·2 = 2; v = 0.75·4.75 + 0.25·4 = 4.5625, w = 1 + 3·2 / (√4.5625 + 1).
        let third = 1.0 + 6.0 / (4.5625_f32.sqrt() + 1.0);
        check_aggregate(&mut strategy, &[1.0], &[(7.0, &[3.0])], &[third]);
        assert_eq!(strategy.state(), [("first_moment", [2.0].as_slice()), ("second_moment", [4.5625].as_slice())]);
    }

    #[test]
    fn without_a_change_the_adapter_rests() {
        check_aggregate(&mut FedAdam::new(0.1, 0.9, 0.99, 1e-3), &[1.5], &[(2.0, &[1.5])], &[1.5]);
    }

    #[test]
    fn a_restored_strategy_goes_on_like_the_first() {
        check_resumes(|| FedAdam::new(0.1, 0.9, 0.99, 1e-3));
    }
}

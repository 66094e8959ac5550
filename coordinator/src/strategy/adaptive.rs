//! What FedAdam and FedYogi share (Reddi et al., arXiv 2003.00295, algorithm 2).
//!
//! With the mean change Δ: `m ← β₁·m + (1 - β₁)·Δ`, then v by the strategy's own rule from v and Δ², then
//! `w ← w + learning_rate · m / (√v + τ)`. As in the paper, v starts at τ², m at 0, and there is no bias correction; the
//! mean is weighted by tokens, where the paper's is plain.

use super::fedavg::mean_change;
use super::{StrategyError, Update, take_state};

const NAMES: [&str; 2] = ["first_moment", "second_moment"];

pub(super) struct Adaptive {
    learning_rate: f64,
    beta1: f64,
    tau: f64,
    /// Both are empty before the first round and have the adapter's length afterwards.
    first_moment: Vec<f32>,
    second_moment: Vec<f32>,
}

impl Adaptive {
    pub fn new(learning_rate: f64, beta1: f64, tau: f64) -> Self {
        Self { learning_rate, beta1, tau, first_moment: Vec::new(), second_moment: Vec::new() }
    }

    /// `next_second_moment` makes the new v of the old one and Δ².
    pub fn aggregate(
        &mut self,
        global: &[f32],
        updates: &[Update<'_>],
        next_second_moment: impl Fn(f64, f64) -> f64,
    ) -> Result<Vec<f32>, StrategyError> {
        let changes = mean_change(global, updates)?;
        if self.first_moment.is_empty() {
            self.first_moment = vec![0.0; global.len()];
            self.second_moment = vec![(self.tau * self.tau) as f32; global.len()];
        }
        for (name, moment) in NAMES.into_iter().zip([&self.first_moment, &self.second_moment]) {
            let (expected, found) = (global.len(), moment.len());
            if found != expected {
                return Err(StrategyError::WrongStateLength { name, expected, found });
            }
        }
        let moments = self.first_moment.iter_mut().zip(&mut self.second_moment);
        let mut next = Vec::with_capacity(global.len());
        for (((first, second), change), value) in moments.zip(changes).zip(global) {
            *first = (self.beta1 * f64::from(*first) + (1.0 - self.beta1) * change) as f32;
            *second = next_second_moment(f64::from(*second), change * change) as f32;
            let step = self.learning_rate * f64::from(*first) / (f64::from(*second).sqrt() + self.tau);
            next.push((f64::from(*value) + step) as f32);
        }
        Ok(next)
    }

    pub fn state(&self) -> Vec<(&'static str, &[f32])> {
        if self.first_moment.is_empty() {
            return Vec::new();
        }
        NAMES.into_iter().zip([self.first_moment.as_slice(), &self.second_moment]).collect()
    }

    pub fn restore(&mut self, state: Vec<(String, Vec<f32>)>) -> Result<(), StrategyError> {
        let [first_moment, second_moment] = take_state(NAMES, state)?;
        let (expected, found) = (first_moment.len(), second_moment.len());
        if found != expected {
            return Err(StrategyError::WrongStateLength { name: NAMES[1], expected, found });
        }
        (self.first_moment, self.second_moment) = (first_moment, second_moment);
        Ok(())
    }
}

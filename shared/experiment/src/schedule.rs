//! The learning rate of every step: a plain function of the step's number.
//!
//! The formulas are those of Hugging Face's `get_constant_schedule_with_warmup`, `get_linear_schedule_with_warmup` and
//! `get_cosine_schedule_with_warmup`, so that runs can be compared with `transformers` step by step.

use std::f64::consts::PI;

use crate::{Experiment, Schedule, Training};

impl Training {
    /// The rate of step `step` of `total_steps`. Steps count from 0, so with a warm-up the very first has rate 0.
    /// From `total_steps` on, the rate stays where the schedule ends.
    pub fn learning_rate_at(&self, step: u64, total_steps: u64) -> f64 {
        let warmup_steps = self.warmup_steps;
        if step < warmup_steps {
            return self.learning_rate * (step as f64 / warmup_steps as f64);
        }
        let falling_steps = total_steps.saturating_sub(warmup_steps).max(1) as f64;
        let factor = match self.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => total_steps.saturating_sub(step) as f64 / falling_steps,
            Schedule::Cosine => {
                let progress = (step - warmup_steps) as f64 / falling_steps;
                0.5 * (1.0 + (PI * progress.min(1.0)).cos())
            }
        };
        self.learning_rate * factor
    }
}

impl Experiment {
    /// Optimizer steps of one participant over all rounds: what the schedule is stretched over.
    pub fn total_steps(&self) -> u64 {
        u64::from(self.federation.rounds) * self.federation.local_steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_rates(schedule: Schedule, warmup_steps: u64, total_steps: u64, expected: &[f64]) {
        let training = Training {
            batch_tokens: 256,
            accumulate: 1,
            learning_rate: 0.5,
            warmup_steps,
            schedule,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            clip_norm: 1.0,
        };
        for (step, expected) in expected.iter().enumerate() {
            let found = training.learning_rate_at(step as u64, total_steps);
            assert!(
                (found - expected).abs() <= 1e-15,
                "{schedule:?}, {warmup_steps} of {total_steps}, step {step}: found {found}, expected {expected}"
            );
        }
    }

    #[test]
    fn constant_rises_and_stays() {
        check_rates(Schedule::Constant, 4, 8, &[0.0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]);
    }

    #[test]
    fn linear_rises_and_falls_to_zero_after_the_last_step() {
        check_rates(Schedule::Linear, 2, 6, &[0.0, 0.25, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0]);
    }

    #[test]
    fn cosine_rises_and_falls_along_half_a_cosine() {
        // 0.5 · ½(1 + cos(π·k/4)) for k = 0 … 4; cos(π/4) = √½.
        let [quarter, three_quarters] = [1.0, -1.0].map(|sign: f64| 0.25 * (1.0 + sign * 0.5_f64.sqrt()));
        check_rates(Schedule::Cosine, 2, 6, &[0.0, 0.25, 0.5, quarter, 0.25, three_quarters, 0.0, 0.0]);
    }

    #[test]
    fn without_warmup_the_first_step_has_the_full_rate() {
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            check_rates(schedule, 0, 10, &[0.5]);
        }
    }

    #[test]
    fn a_schedule_that_ends_with_its_warmup_does_not_divide_by_zero() {
        // The last of these steps is never taken; `transformers` has these values for it too.
        check_rates(Schedule::Linear, 2, 2, &[0.0, 0.25, 0.0]);
        check_rates(Schedule::Cosine, 2, 2, &[0.0, 0.25, 0.5]);
    }
}

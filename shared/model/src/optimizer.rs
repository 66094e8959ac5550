//! AdamW over an adapter's plain numbers.

use crate::{Adapter, Gradients, ModelError};

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) with torch's order of operations: decoupled decay
/// first, then bias-corrected moments, ε added behind the root. It is element-wise, so the parts of a cut model step
/// exactly as the whole does.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    settings: Settings,
    /// Steps taken.
    steps: u64,
    first: Vec<Vec<f32>>,
    second: Vec<Vec<f32>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

impl AdamW {
    pub fn new(training: &experiment::Training, adapter: &Adapter) -> Self {
        let experiment::Training { beta1, beta2, epsilon, weight_decay, .. } = *training;
        Self::with_settings(Settings { beta1, beta2, epsilon, weight_decay }, adapter)
    }

    pub fn with_settings(settings: Settings, adapter: &Adapter) -> Self {
        let zeros: Vec<Vec<f32>> = (0..adapter.tensors().len())
            .map(|i| vec![0.0; if adapter.trains(i) { adapter.tensors()[i].values.len() } else { 0 }])
            .collect();
        Self { settings, steps: 0, first: zeros.clone(), second: zeros }
    }

    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One step of `learning_rate` against `gradients`, which must be those of `adapter`.
    pub fn step(&mut self, adapter: &mut Adapter, gradients: &Gradients, learning_rate: f64) {
        self.steps += 1;
        let Settings { beta1, beta2, epsilon, weight_decay } = self.settings;
        let steps = i32::try_from(self.steps).unwrap_or(i32::MAX);
        let step_size = (learning_rate / (1.0 - beta1.powi(steps))) as f32;
        let root_correction = (1.0 - beta2.powi(steps)).sqrt() as f32;
        let keep = (1.0 - learning_rate * weight_decay) as f32;
        let (mix1, keep2, mix2, epsilon) = ((1.0 - beta1) as f32, beta2 as f32, (1.0 - beta2) as f32, epsilon as f32);
        for (i, gradient) in gradients.tensors().iter().enumerate().filter(|(_, gradient)| !gradient.is_empty()) {
            let values = adapter.values_mut(i).iter_mut().zip(gradient);
            let moments = self.first[i].iter_mut().zip(&mut self.second[i]);
            for ((value, &g), (first, second)) in values.zip(moments) {
                *first += (g - *first) * mix1;
                *second = *second * keep2 + mix2 * g * g;
                let denominator = second.sqrt() / root_correction + epsilon;
                *value = *value * keep - step_size * (*first / denominator);
            }
        }
    }

    /// Moments and step count, to continue after a restart: `[steps]`, then first and second moments by tensor.
    pub fn state(&self) -> (u64, &[Vec<f32>], &[Vec<f32>]) {
        (self.steps, &self.first, &self.second)
    }

    /// Continues from saved moments, which must have this adapter's sizes.
    pub fn restore(&mut self, steps: u64, first: Vec<Vec<f32>>, second: Vec<Vec<f32>>) -> Result<(), ModelError> {
        let sizes = |tensors: &[Vec<f32>]| tensors.iter().map(Vec::len).collect::<Vec<_>>();
        if sizes(&first) != sizes(&self.first) || sizes(&second) != sizes(&self.second) {
            return Err(ModelError::Mismatch("saved optimizer moments do not fit this adapter".into()));
        }
        (self.steps, self.first, self.second) = (steps, first, second);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterConfig;
    use crate::source::random::tests::tiny_config;

    fn training() -> experiment::Training {
        experiment::Training {
            batch_tokens: 64,
            accumulate: 1,
            learning_rate: 0.01,
            warmup_steps: 0,
            schedule: experiment::Schedule::Constant,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            clip_norm: 0.0,
        }
    }

    fn adapter(factors: experiment::Factors) -> Adapter {
        let config = AdapterConfig { rank: 1, alpha: 1.0, dropout: 0.0, targets: vec!["q_proj".into()], factors };
        Adapter::seeded(config, &tiny_config(1), 0..1, experiment::Seed(1)).unwrap()
    }

    /// The paper's recurrence, one number at a time, in f64.
    #[test]
    fn three_steps_follow_the_papers_recurrence() {
        let mut adapter = adapter(experiment::Factors::Both);
        let mut optimizer = AdamW::new(&training(), &adapter);
        let (mut p, mut m, mut v) = (f64::from(adapter.tensors()[0].values[0]), 0.0, 0.0);
        for (t, g) in [(1, 0.5f64), (2, -0.25), (3, 2.0)] {
            let gradients = adapter.tensors().iter().map(|tensor| vec![g as f32; tensor.values.len()]).collect();
            optimizer.step(&mut adapter, &Gradients::new(gradients), 0.01);
            p *= 1.0 - 0.01 * 0.1;
            m = 0.9 * m + 0.1 * g;
            v = 0.999 * v + 0.001 * g * g;
            let (m_hat, v_hat) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.999f64.powi(t)));
            p -= 0.01 * m_hat / (v_hat.sqrt() + 1e-8);
            let found = f64::from(adapter.tensors()[0].values[0]);
            assert!((found - p).abs() < 1e-6, "step {t}: {found} instead of {p}");
        }
    }

    #[test]
    fn a_frozen_factor_stays() {
        let mut adapter = adapter(experiment::Factors::FreezeA);
        let before = adapter.clone();
        let mut optimizer = AdamW::new(&training(), &adapter);
        let [a, b] = [Vec::new(), vec![1.0; adapter.tensors()[1].values.len()]];
        optimizer.step(&mut adapter, &Gradients::new(vec![a, b]), 0.1);
        assert_eq!(adapter.tensors()[0], before.tensors()[0]);
        assert_ne!(adapter.tensors()[1], before.tensors()[1]);
    }

    #[test]
    fn a_restored_optimizer_continues_bit_for_bit() {
        let mut adapter = adapter(experiment::Factors::Both);
        let gradients = |adapter: &Adapter, scale: f32| {
            Gradients::new(
                adapter.tensors().iter().map(|t| t.values.iter().map(|x| x * scale + 0.1).collect()).collect(),
            )
        };
        let mut optimizer = AdamW::new(&training(), &adapter);
        let first_gradients = gradients(&adapter, 1.0);
        optimizer.step(&mut adapter, &first_gradients, 0.01);
        let (steps, first, second) = optimizer.state();
        let mut restored = AdamW::new(&training(), &adapter);
        restored.restore(steps, first.to_vec(), second.to_vec()).unwrap();
        let mut copy = adapter.clone();
        let second_gradients = gradients(&copy, 2.0);
        optimizer.step(&mut adapter, &second_gradients, 0.01);
        restored.step(&mut copy, &second_gradients, 0.01);
        assert_eq!(adapter, copy);
        assert!(restored.restore(1, Vec::new(), Vec::new()).is_err());
    }
}

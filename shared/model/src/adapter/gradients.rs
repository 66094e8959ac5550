//! Gradients of an adapter's tensors, in the adapter's order.

use super::Adapter;

/// One entry per adapter tensor; a factor that does not train has an empty one.
#[derive(Clone, PartialEq)]
pub struct Gradients {
    tensors: Vec<Vec<f32>>,
}

impl Gradients {
    pub fn new(tensors: Vec<Vec<f32>>) -> Self {
        Self { tensors }
    }

    pub fn tensors(&self) -> &[Vec<f32>] {
        &self.tensors
    }

    /// Adds the gradients of another micro-batch of the same step.
    pub fn add(&mut self, other: &Self) {
        self.add_scaled(other, 1.0);
    }

    pub fn add_scaled(&mut self, other: &Self, factor: f32) {
        for (sum, tensor) in self.tensors.iter_mut().zip(&other.tensors) {
            for (sum, value) in sum.iter_mut().zip(tensor) {
                *sum += factor * value;
            }
        }
    }

    pub fn scale(&mut self, factor: f32) {
        for value in self.tensors.iter_mut().flatten() {
            *value *= factor;
        }
    }

    /// Adds `mu · (w − w_global)`, the gradient of FedProx' proximal term (arXiv 1812.06127, equation 2).
    pub fn add_proximal(&mut self, mu: f32, adapter: &Adapter, global: &Adapter) {
        for ((gradient, here), there) in self.tensors.iter_mut().zip(adapter.tensors()).zip(global.tensors()) {
            for ((gradient, here), there) in gradient.iter_mut().zip(&here.values).zip(&there.values) {
                *gradient += mu * (here - there);
            }
        }
    }

    /// Squared L2 norm of each block's gradients, in f64 and in a fixed order.
    ///
    /// The parties of a cut exchange these and add them up block by block, so that each finds the very norm that the
    /// unsplit model finds.
    pub fn squared_norms(&self, adapter: &Adapter) -> Vec<f64> {
        let mut norms: Vec<(usize, f64)> = Vec::new();
        for (tensor, gradient) in adapter.tensors().iter().zip(&self.tensors) {
            let squared = gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
            match norms.last_mut() {
                Some((block, sum)) if *block == tensor.block => *sum += squared,
                _ => norms.push((tensor.block, squared)),
            }
        }
        norms.into_iter().map(|(_, norm)| norm).collect()
    }
}

/// The factor that brings a gradient to at most `clip_norm`, from the squared norms of all its blocks in model order;
/// 1 where `clip_norm` is 0. As `torch.nn.utils.clip_grad_norm_`, which adds 1e-6 to the norm.
pub fn clip_factor(squared_norms: impl IntoIterator<Item = f64>, clip_norm: f64) -> f32 {
    let norm = squared_norms.into_iter().fold(0.0, |sum, squared| sum + squared).sqrt();
    if clip_norm == 0.0 { 1.0 } else { (clip_norm / (norm + 1e-6)).min(1.0) as f32 }
}

impl std::fmt::Debug for Gradients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gradients[{} tensors]", self.tensors.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_brings_a_long_gradient_to_the_norm_and_leaves_a_short_one() {
        assert!((clip_factor([9.0, 16.0], 1.0) - 0.2).abs() < 1e-6);
        assert_eq!(clip_factor([0.01, 0.02], 1.0), 1.0);
        assert_eq!(clip_factor([1e9], 0.0), 1.0);
    }
}

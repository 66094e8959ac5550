//! LM head and cross-entropy in one pass over chunks of rows.
//!
//! The head is frozen, so its gradient reaches only its input, and the logits of more than one chunk never exist.

use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;

use super::{Loss, to_values};

/// Rows whose logits exist at one time: 25 MB with a vocabulary of 49,152.
const CHUNK_ROWS: usize = 128;

/// Summed cross-entropy of `normed [n, width]` against `targets [n]`.
pub(super) fn loss(head: Tensor<2>, normed: Tensor<2>, targets: &[u32]) -> Loss {
    let nats = chunks(head, normed, targets, |logits, target| row_nats(logits, target), |_, _| {});
    Loss { nats, tokens: targets.len() }
}

/// The loss, and the gradient of `loss / step_tokens` with respect to `normed`.
pub(super) fn loss_and_gradient(
    head: Tensor<2>,
    normed: Tensor<2>,
    targets: &[u32],
    step_tokens: usize,
) -> (Loss, Tensor<2>) {
    let scale = 1.0 / step_tokens as f64;
    let mut gradients = Vec::new();
    let per_row = |logits: &mut [f32], target: u32| row_gradient(logits, target, scale);
    let nats = chunks(head.clone(), normed, targets, per_row, |gradient, device| {
        let gradient = Tensor::<2>::from_data(gradient, device);
        gradients.push(gradient.matmul(head.clone()));
    });
    (Loss { nats, tokens: targets.len() }, Tensor::cat(gradients, 0))
}

/// Runs `per_row` over the logits of every row, in parallel, and hands each finished chunk to `then`.
fn chunks(
    head: Tensor<2>,
    normed: Tensor<2>,
    targets: &[u32],
    per_row: impl Fn(&mut [f32], u32) -> f64 + Sync,
    mut then: impl FnMut(TensorData, &burn::tensor::Device),
) -> f64 {
    let [vocabulary, _] = head.dims();
    let device = head.device();
    let mut nats = 0.0;
    for (chunk, targets) in targets.chunks(CHUNK_ROWS).enumerate() {
        let rows = normed.clone().narrow(0, chunk * CHUNK_ROWS, targets.len());
        let mut logits = to_values(rows.matmul(head.clone().transpose()));
        let losses: Vec<f64> =
            logits.par_chunks_mut(vocabulary).zip(targets).map(|(row, &target)| per_row(row, target)).collect();
        // Summed in order: the result does not depend on the number of threads.
        nats += losses.iter().sum::<f64>();
        then(TensorData::new(logits, [targets.len(), vocabulary]), &device);
    }
    nats
}

/// `ln Σ exp(x) − x_target`, summed in f64.
fn row_nats(logits: &[f32], target: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from((x - max).exp())).sum();
    sum.ln() - f64::from(logits[target as usize] - max)
}

/// Turns logits into `scale · (softmax − one-hot)` in place and returns the loss.
fn row_gradient(logits: &mut [f32], target: u32, scale: f64) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let target_shifted = f64::from(logits[target as usize] - max);
    let mut sum = 0.0;
    for x in logits.iter_mut() {
        *x = (*x - max).exp();
        sum += f64::from(*x);
    }
    let factor = scale / sum;
    for x in logits.iter_mut() {
        *x = (f64::from(*x) * factor) as f32;
    }
    let at_target = &mut logits[target as usize];
    *at_target = (f64::from(*at_target) - scale) as f32;
    sum.ln() - target_shifted
}

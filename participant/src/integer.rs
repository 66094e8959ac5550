//! The integer engine: a GGUF file's own weights, and activations as bytes.

use std::path::Path;
use std::sync::Arc;

use model::adapter::target_index;
use model::stage::Loss;
use model::{Adapter, Matrix, Source};
use quant::BlockType;
use quant::gguf::Reader;
use quant::inference::{
    Adapter as IntegerAdapter, Engine as Kernels, KernelPath, Layer, LayerFactors, Model, RANK_MAX, Session,
};

use crate::ParticipantError;
use crate::data::MicroBatch;

/// What runs a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    Integer,
    /// Weights dequantized: as exact as f32, and the integer engine's oracle.
    Float,
}

impl Engine {
    /// Integers for a quantized GGUF file; floats for everything else.
    pub fn of(source: &dyn Source) -> Self {
        let quantized = source
            .tensors()
            .iter()
            .any(|tensor| !matches!(tensor.dtype, BlockType::F32 | BlockType::F16 | BlockType::BF16));
        let is_file = source.origin().is_file();
        if quantized && is_file { Self::Integer } else { Self::Float }
    }
}

/// `threads` of 0 takes all cores.
pub fn load(path: &Path, threads: usize) -> Result<Model, ParticipantError> {
    let instructions = KernelPath::detect().map_err(ParticipantError::Usage)?;
    let engine = Kernels::new(instructions, threads, false);
    std::fs::metadata(path).map_err(ParticipantError::io(path))?;
    if path.is_dir() {
        let what = format!(
            "{} is no GGUF file, which the integer engine takes: make one with `coordinator quantize`, or use --engine float where the command has it",
            path.display()
        );
        return Err(ParticipantError::Usage(what));
    }
    Ok(Model::load(&Reader::open(path)?, &engine)?)
}

/// An adapter for a model's sequences, beside its weights: what it costs are its own factors, in f32.
pub fn adapter(model: &Model, adapter: &Adapter) -> Result<Arc<IntegerAdapter>, ParticipantError> {
    let (rank, alpha) = (adapter.config.rank as usize, adapter.config.alpha);
    if rank > RANK_MAX {
        let what =
            format!("the adapter has rank {rank}; the integer engine takes {RANK_MAX} at most: use --engine float");
        return Err(ParticipantError::Usage(what));
    }
    let layers = adapter.pairs().map(|[a, b]| {
        let layer = Layer::ALL[target_index(&a.target).expect("an adapter's targets are known")];
        LayerFactors { block: a.block, layer, a: &a.values, b: &b.values }
    });
    let layers: Vec<LayerFactors> = layers.collect();
    Ok(model.adapter(rank, (alpha / rank as f64) as f32, &layers))
}

/// Summed loss of a micro-batch's predictions.
pub(crate) fn loss(mut session: Session, batch: &MicroBatch) -> Loss {
    let mut total = Loss { nats: 0.0, tokens: 0 };
    let mut first = 0;
    for &length in &batch.segments {
        let segment = first..first + length as usize;
        let targets = &batch.targets[segment.clone()];
        session.truncate(0);
        session.score(&batch.tokens[segment], |row, logits| {
            if let Some(target) = targets[row] {
                total.nats += nats(logits, target);
                total.tokens += 1;
            }
        });
        first += length as usize;
    }
    total
}

/// `-ln softmax(logits)[target]`
fn nats(logits: &[f32], target: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from((logit - max).exp())).sum();
    f64::from(max) + sum.ln() - f64::from(logits[target as usize])
}

/// `[tokens, vocabulary]`
pub(crate) fn logits(mut session: Session, tokens: &[u32]) -> Matrix {
    let mut all = Vec::new();
    session.score(tokens, |_, logits| all.extend_from_slice(logits));
    Matrix::new(tokens.len(), all.len() / tokens.len().max(1), all)
}

#[cfg(test)]
mod tests {
    use super::nats;

    #[test]
    fn a_loss_is_the_logarithm_of_the_targets_share() {
        let logits = [1.0f32, 3.0, -2.0];
        let all: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        for (target, &logit) in logits.iter().enumerate() {
            let expected = -(f64::from(logit).exp() / all).ln();
            assert!((nats(&logits, target as u32) - expected).abs() < 1e-6);
        }
    }
}

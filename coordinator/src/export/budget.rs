//! Which type each tensor gets when a file may have so many bytes.
//!
//! To second order the KL that an error ΔW costs is half its square under the Fisher information, the mean square of the
//! gradients of what the model itself predicts (Kunstner et al., arXiv 1905.12558, section 2). It is measured on text that
//! the model writes, where the gradients of successive tokens do not correlate, so that those of whole sequences tell it;
//! within a matrix it is taken to be the same for all weights. The embedding and the LM head have no adapter to
//! measure gradients through: they are quantized alone, and the KL is measured. How far off each type is, a few rows of every
//! tensor tell. Then bytes go, one type at a time, to where one saves the most KL. Start from [`choose`].

use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

use experiment::{Backend, Device, Factors, Seed, WeightType};
use model::adapter::TARGETS;
use model::source::TensorInfo;
use model::stage::{Dropout, Input};
use model::{Adapter, AdapterConfig, ComputeDevice, ModelConfig, ModelError, Part, Segments, Source, Stage, Tokenizer};
use quant::{BlockType, Method, dequantize, quantize_row};

use super::calibration::own_text;
use super::check::Reference;
use super::merged::Merged;
use super::{ExportError, gguf};

/// The largest size of a file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    Bytes(u64),
    /// Of the size of the same model in F16.
    Percent(f64),
}

impl FromStr for Budget {
    /// What to give instead.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || String::from("give a size such as 60MB or 60MiB, or a part of the size in f16 such as 25%");
        let number = |digits: &str| digits.trim().parse::<f64>().ok().filter(|n| n.is_finite() && *n > 0.0);
        if let Some(percent) = text.strip_suffix('%') {
            return number(percent).map(Self::Percent).ok_or_else(refused);
        }
        let units = [("MiB", 1_048_576.0), ("MB", 1e6), ("GB", 1e9), ("KB", 1e3)];
        let found = units.into_iter().find_map(|(unit, bytes)| Some(number(text.strip_suffix(unit)?)? * bytes));
        found.map(|bytes| Self::Bytes(bytes as u64)).ok_or_else(refused)
    }
}

/// The type of every tensor, by Hugging Face name.
pub(super) type Types = BTreeMap<String, BlockType>;

const TYPES: [BlockType; 12] = {
    use BlockType::*;
    [Q2_K, Q3_K, Q4_K, Q4_0, IQ4_NL, Q4_1, Q5_K, Q5_0, Q5_1, Q6_K, Q8_0, F16]
};
/// Sequences and tokens that gradients are measured on.
const TEXT: [usize; 2] = [12, 128];
/// Of each tensor that are quantized for a try.
const ROWS: usize = 24;

/// # Errors
/// If no choice is small enough.
pub(super) fn choose(
    merged: &Merged<'_>,
    name: &str,
    budget: Budget,
    method: Method,
    seed: u64,
) -> Result<Types, ExportError> {
    let [metadata, f16] = gguf::sizes(merged, name)?;
    let bytes_max = match budget {
        Budget::Bytes(bytes) => bytes,
        Budget::Percent(percent) => (f16 as f64 * percent / 100.0) as u64,
    };
    let sensitivities = sensitivities(merged, method, Seed(seed))?;
    let mut types = Types::new();
    let mut tensors = Vec::new();
    let mut fixed = metadata;
    for TensorInfo { name, shape, .. } in merged.tensors() {
        match sensitivities.get(name) {
            Some(&sensitivity) => {
                let values = merged.tensor(name, shape)?;
                tensors.push((name, choices(name, &values, shape, method, sensitivity)?));
            }
            None => {
                types.insert(name.clone(), BlockType::F32);
                fixed += padded(BlockType::F32, shape);
            }
        }
    }
    let choices: Vec<&[Choice]> = tensors.iter().map(|(_, choices)| &choices[..]).collect();
    let chosen = spend(&choices, bytes_max.saturating_sub(fixed));
    let Some(chosen) = chosen else {
        let least: u64 = choices.iter().map(|choices| choices[0].bytes).sum();
        return Err(ExportError::SmallBudget { bytes_max, bytes_min: fixed + least });
    };
    types.extend(tensors.iter().zip(chosen).map(|((name, choices), i)| ((*name).clone(), choices[i].ty)));
    Ok(types)
}

/// What a tensor costs as one of the types.
#[derive(Debug, Clone, Copy)]
struct Choice {
    ty: BlockType,
    bytes: u64,
    kl_nats: f64,
}

/// With growing size, each losing less than all smaller ones, and saving less per byte than the step before.
fn choices(
    name: &str,
    values: &[f32],
    shape: &[usize],
    method: Method,
    sensitivity: f64,
) -> Result<Vec<Choice>, ExportError> {
    let columns = shape[shape.len() - 1];
    let rows = values.len() / columns;
    let step = rows.div_ceil(ROWS);
    let mut all = Vec::new();
    for ty in TYPES {
        let Some(row_bytes) = ty.bytes_of(columns) else { continue };
        let (mut bytes, mut unpacked) = (vec![0; row_bytes], vec![0.0; columns]);
        let (mut error, mut tried) = (0f64, 0);
        for row in values.chunks_exact(columns).step_by(step) {
            let packed = quantize_row(ty, method, row, None, &mut bytes);
            packed.and_then(|()| dequantize(ty, &bytes, &mut unpacked)).map_err(ExportError::tensor(name))?;
            error += row.iter().zip(&unpacked).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>();
            tried += columns;
        }
        let kl_nats = 0.5 * sensitivity * error / tried as f64;
        all.push(Choice { ty, bytes: padded(ty, shape), kl_nats });
    }
    all.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.kl_nats.total_cmp(&b.kl_nats)));
    let mut hull: Vec<Choice> = Vec::new();
    for choice in all {
        if hull.last().is_some_and(|last| choice.kl_nats >= last.kl_nats) {
            continue;
        }
        while let [.., before, last] = hull[..]
            && saving(&before, &choice) >= saving(&before, &last)
        {
            hull.pop();
        }
        hull.push(choice);
    }
    Ok(hull)
}

/// KL saved per byte.
fn saving(from: &Choice, to: &Choice) -> f64 {
    (from.kl_nats - to.kl_nats) / (to.bytes - from.bytes).max(1) as f64
}

/// Which choice of each tensor; nothing if even the smallest are too large.
fn spend(tensors: &[&[Choice]], bytes_max: u64) -> Option<Vec<usize>> {
    let mut left = bytes_max.checked_sub(tensors.iter().map(|choices| choices[0].bytes).sum())?;
    let mut chosen = vec![0; tensors.len()];
    loop {
        let steps = tensors.iter().zip(&chosen).enumerate().filter_map(|(i, (choices, &at))| {
            let (from, to) = (choices[at], *choices.get(at + 1)?);
            (to.bytes - from.bytes <= left).then(|| (i, to.bytes - from.bytes, saving(&from, &to)))
        });
        let Some((i, bytes, _)) = steps.max_by(|a, b| a.2.total_cmp(&b.2)) else { return Some(chosen) };
        chosen[i] += 1;
        left -= bytes;
    }
}

fn padded(ty: BlockType, shape: &[usize]) -> u64 {
    let bytes = ty.bytes_of(shape.iter().product()).expect("rows are whole blocks");
    bytes.next_multiple_of(quant::gguf::ALIGNMENT as usize) as u64
}

/// The KL per token that a mean square error of 1 in a matrix costs, times two, by name; for every tensor that may be
/// quantized.
fn sensitivities(merged: &Merged<'_>, method: Method, seed: Seed) -> Result<BTreeMap<String, f64>, ExportError> {
    let text = own_text(merged, TEXT, seed)?;
    let mut all = fisher(merged, &text, seed)?;
    let reference = Reference::new(merged, &text[..text.len().min(4)])?;
    for TensorInfo { name, shape, .. } in merged.tensors() {
        if name != "model.embed_tokens.weight" && name != "lm_head.weight" {
            continue;
        }
        let values = merged.tensor(name, shape)?;
        let columns = shape[1];
        let ty = if columns.is_multiple_of(32) { BlockType::Q4_0 } else { BlockType::F16 };
        let mut rounded = vec![0.0; values.len()];
        let mut bytes = vec![0; ty.bytes_of(columns).expect("whole blocks")];
        for (row, rounded) in values.chunks_exact(columns).zip(rounded.chunks_exact_mut(columns)) {
            let packed = quantize_row(ty, method, row, None, &mut bytes);
            packed.and_then(|()| dequantize(ty, &bytes, rounded)).map_err(ExportError::tensor(name))?;
        }
        let errors = values.iter().zip(&rounded).map(|(x, y)| f64::from(x - y).powi(2));
        let error = errors.sum::<f64>() / values.len() as f64;
        let kl = reference.divergence(&Replaced { merged, name, values: rounded })?;
        all.insert(name.clone(), if error > 0.0 { 2.0 * kl.max(0.0) / error } else { 0.0 });
    }
    Ok(all)
}

/// The trace of the Fisher information of each layer, per token: the squared norm of its weights' gradient, seen through
/// an adapter whose A is random and whose B is zero.
fn fisher(merged: &Merged<'_>, text: &[Vec<u32>], seed: Seed) -> Result<BTreeMap<String, f64>, ModelError> {
    let config = merged.config();
    let device = Device { backend: Backend::Native, weights: WeightType::F32, ..Default::default() };
    let stage = Stage::load(merged, Part::whole(config.blocks), &ComputeDevice::new(&device)?, None)?;
    let targets = TARGETS.map(str::to_owned).to_vec();
    let adapter = AdapterConfig { rank: 8, alpha: 8.0, dropout: 0.0, targets, factors: Factors::FreezeA };
    let adapter = Adapter::seeded(adapter, config, 0..config.blocks, seed)?;
    let lora = stage.attach(&adapter)?;
    let dropout = Dropout { seed: seed.bytes("budget") };
    let mut squares = vec![0f64; adapter.tensors().len()];
    let mut tokens = 0;
    for sequence in text.iter().filter(|sequence| sequence.len() > 1) {
        let targets: Vec<Option<u32>> = sequence[1..].iter().copied().map(Some).chain([None]).collect();
        let (input, segments) = (Input::Tokens(sequence), Segments::one(sequence.len()));
        let (_, backward) = stage.loss_backward(input, &segments, &targets, 1, &lora, &dropout, false)?;
        for (square, gradient) in squares.iter_mut().zip(backward.adapter.tensors()) {
            *square += gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>();
        }
        tokens += sequence.len() - 1;
    }
    let layers = adapter.pairs().zip(squares.chunks_exact(2)).map(|([a, _], squares)| {
        let [_, columns] = a.shape;
        // E|G Aᵀ|² = |G|²·|A|²/columns for a random A.
        let size: f64 = a.values.iter().map(|&a| f64::from(a).powi(2)).sum();
        let name = a.name.trim_start_matches("base_model.model.").replace(".lora_A.", ".");
        (name, squares[1] * columns as f64 / size / tokens.max(1) as f64)
    });
    Ok(layers.collect())
}

/// The merged model with other values of one tensor.
struct Replaced<'a> {
    merged: &'a Merged<'a>,
    name: &'a str,
    values: Vec<f32>,
}

impl Source for Replaced<'_> {
    fn origin(&self) -> &Path {
        self.merged.origin()
    }

    fn config(&self) -> &ModelConfig {
        self.merged.config()
    }

    fn tokenizer(&self) -> &Tokenizer {
        self.merged.tokenizer()
    }

    fn tensors(&self) -> &[TensorInfo] {
        self.merged.tensors()
    }

    fn read(&self, info: &TensorInfo) -> Result<Vec<u8>, ModelError> {
        match info.name == self.name {
            true => Ok(self.values.iter().flat_map(|value| value.to_le_bytes()).collect()),
            false => self.merged.read(info),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read_with_their_units() {
        let parsed = |text: &str| text.parse::<Budget>();
        assert_eq!(parsed("60MB").unwrap(), Budget::Bytes(60_000_000));
        assert_eq!(parsed("1.5 MiB").unwrap(), Budget::Bytes(1_572_864));
        assert_eq!(parsed("25%").unwrap(), Budget::Percent(25.0));
        for bad in ["", "60", "-1MB", "0%", "x%", "nanMB", "infGB", "MB"] {
            assert!(parsed(bad).unwrap_err().contains("60MB"), "{bad}");
        }
    }

    #[test]
    fn bytes_go_where_they_save_most_and_never_beyond_the_budget() {
        let choice = |ty, bytes, kl_nats| Choice { ty, bytes, kl_nats };
        let dear =
            [choice(BlockType::Q4_0, 10, 8.0), choice(BlockType::Q5_0, 14, 4.0), choice(BlockType::Q8_0, 20, 1.0)];
        let cheap = [choice(BlockType::Q4_0, 10, 0.5), choice(BlockType::Q8_0, 12, 0.0)];
        assert_eq!(spend(&[&dear, &cheap], 19), None);
        assert_eq!(spend(&[&dear, &cheap], 20), Some(vec![0, 0]));
        assert_eq!(spend(&[&dear, &cheap], 23), Some(vec![0, 1]));
        assert_eq!(spend(&[&dear, &cheap], 24), Some(vec![1, 0]));
        assert_eq!(spend(&[&dear, &cheap], 1000), Some(vec![2, 1]));
    }

    #[test]
    fn choices_that_cost_more_for_nothing_are_left_out() {
        let values: Vec<f32> = (0..8 * 256).map(|i| ((i * i) as f32 * 0.37).sin()).collect();
        let choices = choices("w", &values, &[8, 256], Method::Search, 1.0).unwrap();
        assert_eq!((choices[0].ty, choices[choices.len() - 1].ty), (BlockType::Q2_K, BlockType::F16));
        for pair in choices.windows(2) {
            assert!(pair[0].bytes < pair[1].bytes && pair[0].kl_nats > pair[1].kl_nats, "{pair:?}");
        }
        for triple in choices.windows(3) {
            assert!(saving(&triple[0], &triple[1]) > saving(&triple[1], &triple[2]), "{triple:?}");
        }
    }
}

//! Reads exported files back, and compares what they predict with what the merged model predicts.
//!
//! The text is one of ours unless the caller brings another; how far apart two models are hangs little on it. Logits are
//! computed with our own kernels, in f32, from the values that the files say.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use model::{LmHead, Matrix, ModelError, Source, Walk};
use serde::Serialize;

use super::ExportError;
use super::calibration::{self, encode};
use super::merged::Merged;

const TEXT: &str = include_str!("check.txt");
const TOKENS_MAX: usize = 1024;
/// Rows whose logits are held at once.
const ROWS: usize = 64;

/// How far a file's predictions are from the merged model's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// Mean Kullback-Leibler divergence of the file's predictions from the merged model's, per token.
    pub kl_nats: f64,
    /// Of the text, by the file and by the merged model.
    pub perplexity: f64,
    pub merged_perplexity: f64,
    /// The part of all positions with the same likeliest token.
    pub same_top: f64,
    pub tokens: usize,
    /// What `kl_nats` may be.
    pub limit_nats: f64,
    /// Bytes of the file, by what they are for.
    pub bytes: Vec<(&'static str, u64)>,
}

impl Check {
    pub fn passed(&self) -> bool {
        self.kl_nats <= self.limit_nats
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: Vec<String> =
            self.bytes.iter().map(|(class, bytes)| format!("{class} {:.2} MB", *bytes as f64 / 1e6)).collect();
        let change = (self.perplexity / self.merged_perplexity - 1.0) * 100.0;
        write!(
            f,
            "KL {:.5} nats (limit {}), perplexity {:.3} ({change:+.2} %), same top token {:.1} %, over {} tokens; {}",
            self.kl_nats,
            self.limit_nats,
            self.perplexity,
            self.same_top * 100.0,
            self.tokens,
            bytes.join(", ")
        )
    }
}

/// What is read back: a file or directory, and its limit.
pub(super) struct Expected {
    pub path: PathBuf,
    pub limit_nats: f64,
}

/// A file's text, for files to be checked on.
pub(super) fn read_text(merged: &Merged<'_>, path: &Path) -> Result<Vec<Vec<u32>>, ExportError> {
    calibration::read_text(merged, path, TOKENS_MAX)
}

/// The same, of our own text.
pub(super) fn own_text(merged: &Merged<'_>) -> Result<Vec<Vec<u32>>, ExportError> {
    encode(merged, TEXT, TOKENS_MAX)
}

/// Checks each of `files` on `text`.
pub(super) fn check(merged: &Merged<'_>, files: &[Expected], text: &[Vec<u32>]) -> Result<Vec<Check>, ExportError> {
    let reference = Reference::new(merged, text)?;
    let check_one = |file: &Expected| {
        let found = model::source::open(&file.path)?;
        if found.config() != merged.config() {
            return Err(ExportError::NotReadBack { path: file.path.clone(), what: "the shape of the model" });
        }
        if found.tokenizer().settings() != merged.tokenizer().settings() {
            return Err(ExportError::NotReadBack { path: file.path.clone(), what: "the tokenizer's settings" });
        }
        let sums = reference.compare(&*found)?;
        Ok(Check {
            kl_nats: sums.divergence / sums.rows as f64,
            perplexity: (sums.found_nats / sums.targets.max(1) as f64).exp(),
            merged_perplexity: (sums.merged_nats / sums.targets.max(1) as f64).exp(),
            same_top: sums.same_top as f64 / sums.rows as f64,
            tokens: sums.rows,
            limit_nats: file.limit_nats,
            bytes: bytes_by_class(&*found, &file.path)?,
        })
    };
    files.iter().map(check_one).collect()
}

/// What the merged model predicts on a text.
pub(super) struct Reference<'a> {
    text: &'a [Vec<u32>],
    residual: Matrix,
    head: LmHead,
}

impl<'a> Reference<'a> {
    pub fn new(merged: &Merged<'_>, text: &'a [Vec<u32>]) -> Result<Self, ModelError> {
        let (residual, head) = Walk::begin(merged, text)?.finish()?;
        Ok(Self { text, residual, head })
    }

    /// The mean KL of another model's predictions from these, in nats per token.
    pub fn divergence(&self, found: &dyn Source) -> Result<f64, ModelError> {
        let sums = self.compare(found)?;
        Ok(sums.divergence / sums.rows as f64)
    }

    fn compare(&self, found: &dyn Source) -> Result<Sums, ModelError> {
        let (residual, head) = Walk::begin(found, self.text)?.finish()?;
        // The token that each row should have predicted; none behind the last of a sequence.
        let targets = self.text.iter().flat_map(|text| text[1..].iter().copied().map(Some).chain([None]));
        let targets: Vec<Option<u32>> = targets.collect();
        let mut sums = Sums::default();
        for first in (0..targets.len()).step_by(ROWS) {
            let rows = first..targets.len().min(first + ROWS);
            let ours = self.head.logits(&self.residual, rows.clone())?;
            let theirs = head.logits(&residual, rows.clone())?;
            for (i, &target) in targets[rows].iter().enumerate() {
                sums.add(ours.row(i), theirs.row(i), target);
            }
        }
        Ok(sums)
    }
}

#[derive(Default)]
struct Sums {
    divergence: f64,
    found_nats: f64,
    merged_nats: f64,
    rows: usize,
    targets: usize,
    same_top: usize,
}

impl Sums {
    fn add(&mut self, merged: &[f32], found: &[f32], target: Option<u32>) {
        let ((merged_top, merged_max, merged_log), (found_top, found_max, found_log)) = (normal(merged), normal(found));
        // Σ p·(ln p - ln q), with ln p = x - max - log.
        let mut divergence = 0f64;
        let mut other = 0f64;
        for (&p, &q) in merged.iter().zip(found) {
            let weight = f64::from((p - merged_max).exp());
            divergence += weight * f64::from(p - q);
            other += weight;
        }
        divergence = divergence / other - f64::from(merged_max - found_max) - (merged_log - found_log);
        self.divergence += divergence;
        self.rows += 1;
        self.same_top += usize::from(merged_top == found_top);
        if let Some(target) = target {
            self.targets += 1;
            self.merged_nats += merged_log - f64::from(merged[target as usize] - merged_max);
            self.found_nats += found_log - f64::from(found[target as usize] - found_max);
        }
    }
}

/// The largest logit with its place, and ln Σ exp(x - max).
fn normal(logits: &[f32]) -> (usize, f32, f64) {
    let (mut top, mut max) = (0, f32::NEG_INFINITY);
    for (i, &logit) in logits.iter().enumerate() {
        if logit > max {
            (top, max) = (i, logit);
        }
    }
    let sum: f64 = logits.iter().map(|&logit| f64::from((logit - max).exp())).sum();
    (top, max, sum.ln())
}

/// Bytes of tensors by what they are for; the rest, which names and describes them, is metadata.
fn bytes_by_class(source: &dyn Source, path: &Path) -> Result<Vec<(&'static str, u64)>, ExportError> {
    let size = |path: &Path| fs::metadata(path).map(|metadata| metadata.len()).map_err(ExportError::io(path));
    let mut all = match path.is_dir() {
        false => size(path)?,
        true => super::huggingface::FILES.iter().map(|file| size(&path.join(file))).sum::<Result<u64, _>>()?,
    };
    let mut classes = ["embedding", "attention", "feed-forward", "head", "norms", "metadata"].map(|class| (class, 0));
    for info in source.tensors() {
        let class = match info.name.as_str() {
            "model.embed_tokens.weight" => 0,
            "lm_head.weight" => 3,
            name if name.contains(".self_attn.") => 1,
            name if name.contains(".mlp.") => 2,
            _ => 4,
        };
        let bytes = info.dtype.bytes_of(info.shape.iter().product()).unwrap_or(0) as u64;
        classes[class].1 += bytes;
        all = all.saturating_sub(bytes);
    }
    classes[5].1 = all;
    Ok(classes.into_iter().filter(|(_, bytes)| *bytes > 0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_and_losses_are_those_of_the_distributions() {
        let [p, q] = [[0.5f64, 0.25, 0.25], [0.25, 0.5, 0.25]];
        // Logits are the logarithms plus anything.
        let merged: Vec<f32> = p.iter().map(|p| (p.ln() + 7.0) as f32).collect();
        let found: Vec<f32> = q.iter().map(|q| (q.ln() - 3.0) as f32).collect();
        let mut sums = Sums::default();
        sums.add(&merged, &found, Some(1));
        sums.add(&merged, &merged, None);
        let expected = 0.5 * 2f64.ln() - 0.25 * 2f64.ln();
        assert!((sums.divergence - expected).abs() < 1e-6, "{}", sums.divergence);
        assert!((sums.merged_nats - 4f64.ln()).abs() < 1e-6 && (sums.found_nats - 2f64.ln()).abs() < 1e-6);
        assert_eq!((sums.rows, sums.targets, sums.same_top), (2, 1, 1));
    }
}

//! A training step to measure: a part of a model, made-up sequences, forward, backward and AdamW over the adapter.
//!
//! It reads no clock; whoever measures brings one.

use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use experiment::{Factors, Seed};
use rand::Rng;
use serde_json::{Value, json};

use crate::adapter::TARGETS;
use crate::optimizer::Settings;
use crate::source::{Source, random::RandomModel};
use crate::stage::{ComputeDevice, Dropout, Input, Lora};
use crate::{AdamW, Adapter, AdapterConfig, Family, Matrix, ModelConfig, ModelError, Part, Segments, Stage, Tokenizer};

/// Tokens of a step at most: more would only be a slip of the finger, and no memory holds it.
const BATCH_TOKENS_MAX: usize = 1 << 20;

/// What a step trains on.
#[derive(Debug, Clone)]
pub struct Shape {
    pub sequences: usize,
    /// Tokens of each; every position has a target.
    pub tokens: usize,
    pub rank: u32,
    pub targets: Vec<String>,
}

struct Workload {
    stage: Stage,
    adapter: Adapter,
    lora: Lora,
    optimizer: AdamW,
    segments: Segments,
    tokens: Vec<u32>,
    targets: Vec<Option<u32>>,
    /// For a part without the embedding.
    activations: Option<Matrix>,
    shape: Shape,
}

/// What the measured steps amounted to.
#[derive(Debug, Clone)]
pub struct Measured {
    /// From opening the model to the first step.
    pub load_ms: f64,
    /// The process' largest resident set, where the system tells it.
    pub peak_rss_bytes: Option<u64>,
    pub step_ms: Vec<f64>,
    pub tokens: usize,
    /// Arithmetic that a step needs at least: see `Workload::flops`.
    pub flops: f64,
    /// Mean of a step, by kernel; empty where the kernels are not ours.
    pub kernel_ms: BTreeMap<&'static str, f64>,
    /// What this machine's tile of the same type reaches, in units of 10⁹ operations per second.
    pub peak_gflops: Option<f64>,
    pub instructions: &'static str,
}

impl Shape {
    pub fn new(batch: Batch, layers: Layers, rank: Rank) -> Self {
        Self { sequences: batch.sequences, tokens: batch.tokens, rank: rank.0, targets: layers.0 }
    }
}

/// `SEQUENCESxTOKENS`.
#[derive(Debug, Clone, Copy)]
pub struct Batch {
    sequences: usize,
    tokens: usize,
}

impl FromStr for Batch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('x').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        let fits = |&(sequences, tokens): &(usize, usize)| {
            sequences.checked_mul(tokens).is_some_and(|all| (1..=BATCH_TOKENS_MAX).contains(&all))
        };
        match numbers.filter(fits) {
            Some((sequences, tokens)) => Ok(Self { sequences, tokens }),
            None => Err(format!("give SEQUENCESxTOKENS, such as 4x128, of at most {BATCH_TOKENS_MAX} tokens")),
        }
    }
}

/// Names of layers, separated by commas, or `all`.
#[derive(Debug, Clone)]
pub struct Layers(Vec<String>);

impl FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let layers: Vec<String> = match text {
            "all" => TARGETS.map(str::to_owned).to_vec(),
            names => names.split(',').map(str::to_owned).collect(),
        };
        if let Some(strange) = layers.iter().find(|layer| !TARGETS.contains(&layer.as_str())) {
            return Err(format!("no layer is called `{strange}`; give `all` or some of {}", TARGETS.join(",")));
        }
        Ok(Self(layers))
    }
}

/// An adapter's rank, as wide as an experiment may ask for.
#[derive(Debug, Clone, Copy)]
pub struct Rank(u32);

impl FromStr for Rank {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rank = text.parse().ok().filter(|rank: &u32| (1..=1024).contains(rank));
        rank.map(Self).ok_or_else(|| "give a rank of 1 to 1024".into())
    }
}

/// Loads a model (SmolLM2-135M's shape with random weights, if there is no path) and measures steps of the part that
/// `part` makes of its number of blocks, at least one. `clock` tells the time since any fixed moment.
pub fn measure(
    model: Option<&Path>,
    part: impl FnOnce(usize) -> Result<Part, ModelError>,
    device: &experiment::Device,
    shape: Shape,
    steps: usize,
    clock: impl Fn() -> Duration,
) -> Result<Measured, ModelError> {
    if steps == 0 {
        return Err(ModelError::Mismatch("no step is to be timed; give --steps of at least 1".into()));
    }
    let device = ComputeDevice::new(device)?.timed();
    let begun = clock();
    let source = match model {
        Some(path) => crate::source::open(path)?,
        None => smollm2_135m()?,
    };
    let part = part(source.config().blocks)?;
    let mut workload = Workload::new(&*source, part, &device, shape)?;
    let load_ms = (clock() - begun).as_secs_f64() * 1e3;
    drop(source);
    Ok(Measured { load_ms, ..workload.measure(steps, clock)? })
}

impl Workload {
    fn new(source: &dyn Source, part: Part, device: &ComputeDevice, shape: Shape) -> Result<Self, ModelError> {
        let config = source.config();
        let Shape { sequences, tokens, rank, ref targets } = shape;
        if tokens > config.context {
            let context = config.context;
            let what = format!("sequences of {tokens} tokens exceed the context of {context}; give a smaller --batch");
            return Err(ModelError::Mismatch(what));
        }
        let segments = Segments::new(vec![tokens; sequences])?;
        let adapter = AdapterConfig {
            rank,
            alpha: f64::from(2 * rank),
            dropout: 0.0,
            targets: targets.clone(),
            factors: Factors::Both,
        };
        let adapter = Adapter::seeded(adapter, config, part.blocks.clone(), Seed(1))?;
        let stage = Stage::load(source, part.clone(), device, None)?;
        let lora = stage.attach(&adapter)?;
        let settings = Settings { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
        let optimizer = AdamW::with_settings(settings, &adapter);
        let mut random = Seed(1).generator("bench");
        let all = segments.tokens();
        let mut drawn = || (0..all).map(|_| random.random_range(0..config.vocabulary as u32)).collect::<Vec<u32>>();
        let (tokens, targets) = (drawn(), drawn().into_iter().map(Some).collect());
        let activations = (!part.embedding).then(|| {
            Matrix::new(all, config.width, (0..all * config.width).map(|_| random.random_range(-1.0..1.0)).collect())
        });
        Ok(Self { stage, adapter, lora, optimizer, segments, tokens, targets, activations, shape })
    }

    /// Steps once untimed, then `steps` times.
    fn measure(&mut self, steps: usize, clock: impl Fn() -> Duration) -> Result<Measured, ModelError> {
        self.step()?;
        let kernels = self.stage.device().kernels().cloned();
        if let Some(kernels) = &kernels {
            kernels.take_times();
        }
        let mut step_ms = Vec::with_capacity(steps);
        for _ in 0..steps {
            let begun = clock();
            self.step()?;
            step_ms.push((clock() - begun).as_secs_f64() * 1e3);
        }
        let times = kernels.as_ref().map(|kernels| kernels.take_times()).unwrap_or_default();
        let kernel_ms = times.into_iter().map(|(name, time)| (name, time.as_secs_f64() * 1e3 / steps as f64)).collect();
        Ok(Measured {
            load_ms: 0.0,
            peak_rss_bytes: process_bytes("VmHWM:"),
            step_ms,
            tokens: self.segments.tokens(),
            flops: self.flops(),
            kernel_ms,
            peak_gflops: kernels.as_ref().map(|kernels| kernels::peak::gflops(kernels, 9)),
            instructions: kernels.as_ref().map_or("", |kernels| kernels.path().name()),
        })
    }

    fn step(&mut self) -> Result<(), ModelError> {
        let Self { stage, adapter, lora, optimizer, segments, tokens, targets, activations, .. } = self;
        let dropout = Dropout { seed: [0; 32] };
        let gradients = match activations {
            None => {
                let tokens = Input::Tokens(tokens);
                stage.loss_backward(tokens, segments, targets, targets.len(), lora, &dropout, false)?.1.adapter
            }
            Some(x) => {
                let (y, pending) = stage.forward_recorded(Input::Activations(x.clone()), segments, lora, &dropout)?;
                pending.backward(y)?.adapter
            }
        };
        optimizer.step(adapter, &gradients, 1e-4);
        *lora = stage.attach(adapter)?;
        Ok(())
    }

    /// A frozen weight is multiplied once forward and once backward, an adapter's once forward and twice backward; causal
    /// attention is two products forward and four backward, of half a square. A product of n numbers is 2n operations.
    fn flops(&self) -> f64 {
        let (config, part) = (self.stage.config(), self.stage.part());
        let linear = |target: &str| config.linear_shape(target).map_or(0, |[rows, columns]| rows * columns);
        let block: usize = TARGETS.into_iter().map(linear).sum();
        let head = if part.lm_head { config.vocabulary * config.width } else { 0 };
        let attention = 6 * self.shape.tokens * config.heads * config.head_size * part.blocks.len();
        let per_token = 4 * (block * part.blocks.len() + head) + 6 * self.adapter.parameters() + attention;
        per_token as f64 * self.segments.tokens() as f64
    }
}

impl Measured {
    pub fn median_ms(&self) -> f64 {
        let mut sorted = self.step_ms.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }

    pub fn gflops(&self) -> f64 {
        self.flops / self.median_ms() / 1e6
    }

    pub fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / self.median_ms() * 1e3
    }
}

impl Measured {
    pub fn to_json(&self) -> Value {
        json!({
            "isa": self.instructions, "step_ms": self.step_ms, "median_ms": self.median_ms(),
            "tokens_per_s": self.tokens_per_s(), "gflops": self.gflops(), "peak_gflops": self.peak_gflops,
            "peak_share": self.peak_gflops.map(|peak| self.gflops() / peak), "kernel_ms": self.kernel_ms,
            "load_ms": self.load_ms, "peak_rss_bytes": self.peak_rss_bytes,
        })
    }

    pub fn to_text(&self) -> String {
        let mut lines = vec![format!(
            "{:.0} ms a step (median of {}), {:.0} tokens/s, {:.0} GFLOP/s {}",
            self.median_ms(),
            self.step_ms.len(),
            self.tokens_per_s(),
            self.gflops(),
            self.instructions
        )];
        lines.extend(self.peak_gflops.map(|peak| {
            let share = 100.0 * self.gflops() / peak;
            format!("{share:.0} % of this machine's {peak:.0} GFLOP/s in products of that type")
        }));
        lines.extend(self.kernel_ms.iter().map(|(kernel, ms)| format!("  {kernel:16} {ms:8.1} ms")));
        let memory = self.peak_rss_bytes.map_or("unknown".to_owned(), |bytes| format!("{:.0} MB", bytes as f64 / 1e6));
        lines.push(format!("loaded in {:.0} ms, peak memory {memory}", self.load_ms));
        lines.join("\n")
    }
}

/// A line of what Linux says about this process, such as `VmHWM:`.
pub fn process_bytes(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}

/// SmolLM2-135M's shape with random weights, for measuring without a download.
fn smollm2_135m() -> Result<Arc<dyn Source>, ModelError> {
    let config = ModelConfig {
        family: Family::Llama,
        vocabulary: 49_152,
        width: 576,
        ffn: 1536,
        blocks: 30,
        heads: 9,
        kv_heads: 3,
        head_size: 64,
        rms_epsilon: 1e-5,
        rope_base: 100_000.0,
        rope_scaling: None,
        tied_embeddings: true,
        qkv_bias: false,
        context: 8192,
    };
    Ok(Arc::new(RandomModel::of_shape(config, Tokenizer::bytes(), Seed(1))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_no_memory_holds_is_refused() {
        for batch in ["0x128", "4x0", "4", "9999999999999x1", "4294967296x4294967296", "1024x1025"] {
            let error = batch.parse::<Batch>().unwrap_err();
            assert!(error.contains("of at most 1048576 tokens"), "{batch}: {error}");
        }
        assert_eq!("1024x1024".parse::<Batch>().unwrap().tokens, 1024);
    }

    #[test]
    fn a_layer_that_no_block_has_is_named() {
        let error = "q_proj,q_prj".parse::<Layers>().unwrap_err();
        assert!(error.contains("`q_prj`") && error.contains("q_proj,k_proj"), "{error}");
        assert_eq!("all".parse::<Layers>().unwrap().0, TARGETS);
        assert_eq!("q_proj,v_proj".parse::<Layers>().unwrap().0, ["q_proj", "v_proj"]);
    }

    #[test]
    fn a_rank_is_one_that_an_experiment_may_have() {
        for rank in ["0", "1025", "-1", "8.0", ""] {
            assert_eq!(rank.parse::<Rank>().unwrap_err(), "give a rank of 1 to 1024", "{rank}");
        }
        assert_eq!("1024".parse::<Rank>().unwrap().0, 1024);
    }
}

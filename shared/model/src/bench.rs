//! A training step to measure: a part of a model, made-up sequences, forward, backward and AdamW over the adapter.
//!
//! It reads no clock; whoever measures brings one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use experiment::{Factors, Seed};
use rand::Rng;

use crate::optimizer::Settings;
use crate::source::{Source, random::RandomModel};
use crate::stage::{ComputeDevice, Dropout, Input, Lora};
use crate::{AdamW, Adapter, AdapterConfig, Family, Matrix, ModelConfig, ModelError, Part, Segments, Stage, Tokenizer};

/// What a step trains on.
#[derive(Debug, Clone)]
pub struct Shape {
    pub sequences: usize,
    /// Tokens of each; every position has a target.
    pub tokens: usize,
    pub rank: u32,
    pub targets: Vec<String>,
}

pub struct Workload {
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
    pub step_ms: Vec<f64>,
    pub tokens: usize,
    /// Arithmetic that a step needs at least: see [`Workload::flops`].
    pub flops: f64,
    /// Mean of a step, by kernel; empty where the kernels are not ours.
    pub kernel_ms: BTreeMap<&'static str, f64>,
    /// What this machine's tile of the same type reaches, in units of 10⁹ operations per second.
    pub peak_gflops: Option<f64>,
    pub instructions: &'static str,
}

impl Workload {
    pub fn new(source: &dyn Source, part: Part, device: &ComputeDevice, shape: Shape) -> Result<Self, ModelError> {
        let config = source.config();
        let Shape { sequences, tokens, rank, ref targets } = shape;
        if tokens > config.context {
            let context = config.context;
            return Err(ModelError::Mismatch(format!("sequences of {tokens} tokens exceed the context of {context}")));
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

    /// Steps once untimed, then `steps` times; `clock` tells the time since any fixed moment.
    pub fn measure(&mut self, steps: usize, clock: impl Fn() -> Duration) -> Result<Measured, ModelError> {
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
        let block: usize = crate::adapter::TARGETS.into_iter().map(linear).sum();
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

/// SmolLM2-135M's shape with random weights, for measuring without a download.
pub fn smollm2_135m() -> Result<Arc<dyn Source>, ModelError> {
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

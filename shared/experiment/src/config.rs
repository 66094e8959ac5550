//! The experiment's sections, exactly as they stand in TOML.
//!
//! This file owns the names and shapes of the keys and what is left out may mean; the ranges of the values are in
//! `check.rs`. Start from [`Experiment`].

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

/// A checked experiment. Both sides hold the same one and compare its digest when a participant joins.
///
/// It comes from [`Experiment::from_file`] or [`Experiment::from_toml`], which check every value; deserializing it in
/// any other way skips those checks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// Names the run directory, `runs/<name>/`: ASCII letters, digits, `-` and `_`.
    pub name: String,
    /// Every generator of the experiment is derived from this number by a label.
    pub seed: u64,
    pub model: Model,
    pub split: Split,
    #[serde(default)]
    pub body: Body,
    pub adapter: Adapter,
    pub training: Training,
    pub data: Data,
    pub federation: Federation,
    #[serde(default)]
    pub wire: Wire,
    #[serde(default)]
    pub device: Device,
}

/// Where the base weights come from: exactly one of `path` and `random`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// A Hugging Face directory or a GGUF file, relative to the working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Refuse to run unless the model's digest (printed by `coordinator run`) is this one: 64 lowercase hexadecimal
    /// digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// A Llama with random weights and a byte tokenizer, made from the experiment's seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub random: Option<RandomModel>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandomModel {
    pub blocks: u32,
    pub width: u32,
    pub ffn: u32,
    pub heads: u32,
    pub kv_heads: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    pub mode: SplitMode,
    /// Blocks in the head, after the embedding: at least 1 where there is a body on another machine, because the
    /// embedding alone would give the tokens away. 0 for `whole`, which has no cuts.
    pub head_blocks: u32,
    /// Blocks in the tail, before the final norm and the LM head: at least 1 for `forward_only`, whose tail is all that
    /// trains. 0 for `whole`.
    pub tail_blocks: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SplitMode {
    /// Head and tail on the participant, body on the coordinator; activations and gradients cross both cuts.
    U,
    /// As `U`, but only the tail's adapters train: no gradient crosses.
    ForwardOnly,
    /// The whole model on the participant; only adapters cross.
    Whole,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Body {
    /// Only a `u` split trains its body, so only there may this be `per_participant`.
    pub adapters: BodyAdapters,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BodyAdapters {
    /// One set, one optimizer: each step's gradient is the token-weighted mean over the cohort.
    #[default]
    Shared,
    /// A set and an optimizer for every participant, aggregated at the end of the round like heads and tails.
    PerParticipant,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    pub rank: u32,
    /// The low-rank product is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Probability of zeroing an input of the low-rank path, in [0, 1).
    #[serde(default)]
    pub dropout: f64,
    /// Hugging Face module names out of [`TARGETS`], in that order whatever order the file has them in.
    pub targets: Vec<String>,
    /// Which factors train.
    #[serde(default)]
    pub factors: Factors,
}

/// Every linear layer of a block that can carry an adapter, in the order in which a forward pass meets them.
pub const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Factors {
    #[default]
    Both,
    /// A stays at its seeded start, so that the mean of B is the exact mean of B·A (FFA-LoRA, arXiv 2403.12313).
    FreezeA,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Tokens in one micro-batch at most; whole sequences are packed into it.
    pub batch_tokens: u32,
    /// Micro-batches per optimizer step.
    pub accumulate: u32,
    pub learning_rate: f64,
    /// The rate rises linearly from 0 over this many steps.
    pub warmup_steps: u64,
    pub schedule: Schedule,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Global L2 norm to which one participant's gradient of a step is clipped; 0 switches clipping off.
    pub clip_norm: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    Constant,
    /// Falls linearly, to reach 0 where the step after the last would be.
    Linear,
    /// Falls along half a cosine, to reach 0 where the step after the last would be.
    Cosine,
}

/// How a participant cuts its own data; what and where the data is, only the participant knows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Longer records are cut into sequences of at most this many tokens.
    pub sequence_tokens_max: u32,
    /// Share of the records that a participant keeps for evaluation, in [0, 1).
    pub held_out: f64,
    /// Columns of a CSV file, or keys of JSONL records that use other names.
    #[serde(default)]
    pub columns: Columns,
    /// How one file is dealt out to many participants (`participant swarm`).
    #[serde(default)]
    pub partition: Partition,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Columns {
    pub text: String,
    pub prompt: String,
    pub completion: String,
    pub messages: String,
}

impl Default for Columns {
    fn default() -> Self {
        let [text, prompt, completion, messages] = ["text", "prompt", "completion", "messages"].map(String::from);
        Self { text, prompt, completion, messages }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "by", rename_all = "snake_case")]
pub enum Partition {
    /// Records are dealt out evenly at random.
    #[default]
    #[serde(deserialize_with = "no_other_keys")]
    Iid,
    /// One natural client per value of a column.
    Key { column: String },
    /// Shares of each value of `column` are drawn from a symmetric Dirichlet distribution (arXiv 1909.06335).
    Dirichlet { column: String, alpha: f64 },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Federation {
    pub rounds: u32,
    /// Participants in one round.
    pub cohort: u32,
    /// Updates without which a round is not aggregated.
    pub quorum: u32,
    /// A round closes this long after its start, whoever is missing. Where it is left away, each member is waited for as
    /// long as it gets on, by the times that its own steps took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_s: Option<u64>,
    /// Optimizer steps of each participant in one round.
    pub local_steps: u64,
    /// Evaluate the held-out records before the first round, after every this many rounds, and after the last; 0: never.
    pub evaluate_every: u32,
    /// Behind the last round every participant measures on so many tokens of its training records, at most, how much each
    /// channel of the model matters to them, and sends sums over all of them: an importance matrix. 0: never.
    // Left out where it is 0, so that experiments from before keep their digests.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub imatrix_tokens: u64,
    #[serde(default)]
    pub average: Average,
    pub strategy: Strategy,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Average {
    /// Mean of the A factors and mean of the B factors.
    #[default]
    Factors,
    /// The exact mean of the products B·A, factored again at the adapter's rank.
    Product,
}

/// An aggregation strategy and its settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "name", rename_all = "lowercase")]
pub enum Strategy {
    /// Token-weighted mean (McMahan et al., arXiv 1602.05629).
    #[serde(deserialize_with = "no_other_keys")]
    FedAvg,
    /// FedAvg with a proximal term of weight `mu` in every participant's step (Li et al., arXiv 1812.06127).
    FedProx {
        mu: f64,
    },
    /// Server momentum (Hsu et al., arXiv 1909.06335).
    FedAvgM {
        learning_rate: f64,
        momentum: f64,
    },
    /// Adaptive server optimizers (Reddi et al., arXiv 2003.00295).
    FedAdam {
        learning_rate: f64,
        beta1: f64,
        beta2: f64,
        tau: f64,
    },
    FedYogi {
        learning_rate: f64,
        beta1: f64,
        beta2: f64,
        tau: f64,
    },
    /// Coordinate-wise mean without the `trim` smallest and `trim` largest values (Yin et al., arXiv 1803.01498).
    #[serde(rename = "trimmed_mean")]
    TrimmedMean {
        trim: u32,
    },
    /// Coordinate-wise median (ibid.).
    #[serde(deserialize_with = "no_other_keys")]
    Median,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Refuses keys beside the tag of a variant that has none: there, serde's `deny_unknown_fields` does nothing.
fn no_other_keys<'de, D: Deserializer<'de>>(keys: D) -> Result<(), D::Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Nothing {}

    Nothing::deserialize(keys).map(|Nothing {}| ())
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wire {
    /// Type in which activations and gradients cross the cuts.
    #[serde(default)]
    pub dtype: WireDtype,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WireDtype {
    #[default]
    F32,
    F16,
    Bf16,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Device {
    pub backend: Backend,
    /// Threads for tensor work; 0 takes all cores.
    pub threads: u32,
    /// How frozen weights are kept, and with them what is multiplied.
    pub weights: WeightType,
    /// Keep each block's input alone for the backward pass, make the rest again, and few logits at a time: slower, in less
    /// memory.
    pub recompute: bool,
}

/// How the native backend keeps frozen weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightType {
    #[default]
    F32,
    /// Activations are rounded to bf16 for products, where the CPU multiplies bf16; sums are f32.
    Bf16,
    /// 8 bits and a scale for every output channel; activations as with bf16.
    Int8,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Our own kernels, on the CPU.
    #[default]
    Native,
    Flex,
    Ndarray,
    Cuda,
    Wgpu,
}

impl Backend {
    pub const ALL: [Self; 5] = [Self::Native, Self::Flex, Self::Ndarray, Self::Cuda, Self::Wgpu];

    /// Its name in TOML, and of the cargo feature that compiles it in.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Flex => "flex",
            Self::Ndarray => "ndarray",
            Self::Cuda => "cuda",
            Self::Wgpu => "wgpu",
        }
    }
}

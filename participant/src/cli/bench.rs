//! `participant bench`: what this machine does.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use model::Part;
use model::bench::{self, Batch, Layers, Rank, Shape};
use quant::inference::CacheType;

use super::infer::{CacheName, duration};
use super::{TrainingDeviceArguments, print};
use crate::bench_adapters;
use crate::bench_deadline::{self, Requests};
use crate::bench_infer::{self, Workload};

#[derive(Subcommand)]
pub(super) enum BenchCommand {
    /// Time training steps of a whole model: tokens/s, GFLOP/s, ms by kernel, memory
    #[command(after_help = "Example:\n  participant bench train --batch 4x128 --weights bf16")]
    Train(BenchTrainArguments),
    /// Run a GGUF file: tokens/s of a prompt and of what follows, latency of a token, memory, load time
    #[command(after_help = "Example:\n  participant bench infer --model exports/model-q4_0.gguf --threads 2")]
    Infer(BenchInferArguments),
    /// Many adapters on one base: memory, and how long a change takes
    #[command(
        after_help = "Example:\n  participant bench adapters --model exports/model-q4_0.gguf --adapter exports/peft --count 64"
    )]
    Adapters(BenchAdaptersArguments),
}

#[derive(Args)]
pub(super) struct BenchInferArguments {
    /// A GGUF file
    #[arg(long)]
    model: PathBuf,
    /// [default: 512, with a deadline 16]
    #[arg(long, value_parser = positive)]
    prompt_tokens: Option<usize>,
    /// Tokens before them that are kept from one request to the next, as of a prompt that begins like the last
    #[arg(long, default_value_t = 0, requires = "deadline", value_parser = at_most::<COUNT_MAX>)]
    prefix_tokens: usize,
    /// Decoded one by one; with a deadline, of an answer at most
    #[arg(long, default_value_t = 128, value_parser = positive)]
    tokens: usize,
    /// Tokens that are there already, before the prompt and before those that are decoded
    #[arg(long, default_value_t = 0, conflicts_with = "deadline", value_parser = at_most::<COUNT_MAX>)]
    depth: usize,
    /// How keys and values are kept [default: f16]
    #[arg(long, value_enum, conflicts_with = "deadline")]
    cache: Option<CacheName>,
    /// 0 takes all cores
    #[arg(long, default_value_t = 0, value_parser = at_most::<THREADS_MAX>)]
    threads: usize,
    /// The best of so many
    #[arg(long, default_value_t = 3, conflicts_with = "deadline", value_parser = positive)]
    rounds: usize,
    /// Measure whether answers come in time instead: 20ms
    #[arg(long, allow_hyphen_values = true, value_parser = duration)]
    deadline: Option<Duration>,
    /// From one of these requests to the next, in the mean; they arrive by chance [default: twice the deadline]
    #[arg(long, allow_hyphen_values = true, value_parser = duration, requires = "deadline")]
    gap: Option<Duration>,
    /// Requests with a deadline
    #[arg(long, default_value_t = 1000, value_parser = positive, requires = "deadline")]
    requests: usize,
    /// Threads beside them that do nothing but take time
    #[arg(long, default_value_t = 0, requires = "deadline", value_parser = at_most::<THREADS_MAX>)]
    hogs: usize,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct BenchAdaptersArguments {
    /// A GGUF file
    #[arg(long)]
    model: PathBuf,
    /// A PEFT adapter for it
    #[arg(long)]
    adapter: PathBuf,
    /// It is loaded so many times, each time as an adapter of its own
    #[arg(long, default_value_t = 64, value_parser = positive)]
    count: usize,
    /// Changes that are timed
    #[arg(long, default_value_t = 1000, value_parser = positive)]
    switches: usize,
    /// 0 takes all cores
    #[arg(long, default_value_t = 0, value_parser = at_most::<THREADS_MAX>)]
    threads: usize,
    #[arg(long)]
    json: bool,
}

/// More of anything that is counted would be a slip of the finger.
const COUNT_MAX: usize = 1 << 20;
/// No machine that this is for has as many cores.
const THREADS_MAX: usize = 1024;

pub(super) fn positive(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=COUNT_MAX).contains(number));
    number.ok_or_else(|| format!("give a number from 1 to {COUNT_MAX}"))
}

pub(super) fn at_most<const MAX: usize>(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&number| number <= MAX).ok_or_else(|| format!("give a number from 0 to {MAX}"))
}

#[derive(Args)]
pub(super) struct BenchTrainArguments {
    /// A Hugging Face directory or a GGUF file [default: SmolLM2-135M's shape with random weights]
    #[arg(long)]
    model: Option<PathBuf>,
    /// Random weights, which is the default
    #[arg(long, conflicts_with = "model")]
    random: bool,
    /// Sequences, and tokens of each
    #[arg(long, default_value = "4x128", allow_hyphen_values = true)]
    batch: Batch,
    /// Layers with an adapter: their names, or `all`
    #[arg(long, default_value = "all")]
    lora: Layers,
    #[arg(long, default_value = "8")]
    rank: Rank,
    /// Timed steps, behind one that is not
    #[arg(long, default_value_t = 5, value_parser = positive)]
    steps: usize,
    #[command(flatten)]
    device: TrainingDeviceArguments,
    #[arg(long)]
    json: bool,
}

pub(super) fn bench_train(arguments: BenchTrainArguments) -> anyhow::Result<()> {
    let BenchTrainArguments { model, random: _, batch, lora, rank, steps, device, json } = arguments;
    let shape = Shape::new(batch, lora, rank);
    let device = device.choice().over(&Default::default());
    let begun = Instant::now();
    let whole = |blocks| Ok(Part::whole(blocks));
    let measured = bench::measure(model.as_deref(), whole, &device, shape, steps, || begun.elapsed())?;
    match json {
        true => print(measured.to_json()),
        false => print(measured.to_text()),
    }
}

pub(super) fn bench_infer(arguments: BenchInferArguments) -> anyhow::Result<()> {
    let BenchInferArguments {
        model,
        prompt_tokens,
        prefix_tokens,
        tokens,
        depth,
        cache,
        threads,
        rounds,
        deadline,
        gap,
        requests,
        hogs,
        json,
    } = arguments;
    if let Some(deadline) = deadline {
        let prompt_tokens = prompt_tokens.unwrap_or(16);
        let gap = gap.unwrap_or(2 * deadline);
        let requests = Requests { deadline, gap, count: requests, prefix_tokens, prompt_tokens, tokens, threads, hogs };
        let measured = bench_deadline::measure(&model, &requests)?;
        return match json {
            true => print(measured.to_json()),
            false => print(measured.to_text()),
        };
    }
    let prompt_tokens = prompt_tokens.unwrap_or(512);
    let cache = cache.map(CacheType::from).unwrap_or_default();
    let measured = bench_infer::measure(&model, &Workload { prompt_tokens, tokens, depth, cache, threads, rounds })?;
    match json {
        true => print(measured.to_json()),
        false => print(measured.to_text()),
    }
}

pub(super) fn bench_adapters(arguments: BenchAdaptersArguments) -> anyhow::Result<()> {
    let BenchAdaptersArguments { model, adapter, count, switches, threads, json } = arguments;
    let measured = bench_adapters::measure(&model, &adapter, count, switches, threads)?;
    match json {
        true => print(measured.to_json()),
        false => print(measured.to_text()),
    }
}

//! `coordinator bench`: what this machine makes of the body.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::{Args, Subcommand};
use model::Cut;
use model::bench::{self, Batch, Layers, Rank, Shape};

use super::print;

#[derive(Subcommand)]
pub(super) enum BenchCommand {
    /// Time the body's part of a training step, forward and backward: tokens/s, GFLOP/s, ms by kernel, memory
    #[command(after_help = "Example:\n  coordinator bench body --batch 4x128 --weights bf16")]
    Body(BenchBodyArguments),
}

#[derive(Args)]
pub(super) struct BenchBodyArguments {
    /// A Hugging Face directory or a GGUF file [default: SmolLM2-135M's shape with random weights]
    #[arg(long)]
    model: Option<PathBuf>,
    /// Blocks that the participants hold
    #[arg(long, default_value_t = 1, allow_negative_numbers = true)]
    head_blocks: usize,
    #[arg(long, default_value_t = 1, allow_negative_numbers = true)]
    tail_blocks: usize,
    /// Sequences, and tokens of each
    #[arg(long, default_value = "4x128", allow_hyphen_values = true)]
    batch: Batch,
    /// Layers with an adapter: their names, or `all`
    #[arg(long, default_value = "all")]
    lora: Layers,
    #[arg(long, default_value = "8", allow_negative_numbers = true)]
    rank: Rank,
    /// Timed steps, behind one that is not
    #[arg(
        long,
        default_value_t = 5,
        allow_negative_numbers = true,
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..)
    )]
    steps: usize,
    /// native | flex | ndarray | cuda | wgpu
    #[arg(long, default_value = "native")]
    backend: String,
    /// Threads for tensor work; 0 takes all cores
    #[arg(
        long,
        default_value_t = 0,
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u32).range(..=1024)
    )]
    threads: u32,
    /// f32 | bf16 | int8
    #[arg(long, default_value = "f32")]
    weights: String,
    #[arg(long)]
    json: bool,
}

pub(super) fn bench_body(arguments: BenchBodyArguments) -> anyhow::Result<()> {
    let BenchBodyArguments { model, head_blocks, tail_blocks, batch, lora, rank, steps, json, .. } = arguments;
    let BenchBodyArguments { backend, threads, weights, .. } = arguments;
    // The words are those of TOML, and so are their errors.
    let device = format!("backend = {backend:?}\nthreads = {threads}\nweights = {weights:?}");
    let device: experiment::Device = toml::from_str(&device).context("--backend or --weights")?;
    let shape = Shape::new(batch, lora, rank);
    let body = |blocks| Cut { head_blocks, tail_blocks }.parts(blocks).map(|[_, body, _]| body);
    let begun = Instant::now();
    let measured = bench::measure(model.as_deref(), body, &device, shape, steps, || begun.elapsed())?;
    match json {
        true => print(measured.to_json()),
        false => print(measured.to_text()),
    }
}

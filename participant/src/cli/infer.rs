//! Commands that run a model.

use std::io::Write;
use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, ValueEnum};
use experiment::Columns;
use serde_json::json;

use super::{DeviceArguments, print};
use crate::generate::{Generation, Runner};
use crate::integer::Engine;

#[derive(Args)]
pub(super) struct ModelArguments {
    /// A Hugging Face directory or a GGUF file
    #[arg(long)]
    model: PathBuf,
    /// A PEFT adapter to apply
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// What computes [default: integer for a quantized GGUF file without an adapter]
    #[arg(long, value_enum)]
    engine: Option<EngineName>,
    #[command(flatten)]
    device: DeviceArguments,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum EngineName {
    /// The file's own weights, activations as bytes; its own choice of instructions
    Integer,
    /// Weights and activations as `--weights` and `--backend` say
    Float,
}

#[derive(Args)]
pub(super) struct GenerateArguments {
    #[command(flatten)]
    model: ModelArguments,
    #[arg(long)]
    prompt: String,
    /// Give the prompt to the model as it is, not through the chat template
    #[arg(long)]
    raw: bool,
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct EvaluateArguments {
    #[command(flatten)]
    model: ModelArguments,
    #[arg(long)]
    data: PathBuf,
    /// Longer records are cut
    #[arg(long, default_value_t = 512)]
    sequence_tokens_max: u32,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct LogitsArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// JSONL of {"text": …} or {"tokens": […]}
    #[arg(long)]
    prompts: PathBuf,
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn generate(arguments: GenerateArguments) -> anyhow::Result<()> {
    let GenerateArguments { model, prompt, raw, max_tokens, temperature, seed, json } = arguments;
    if !(temperature >= 0.0 && temperature.is_finite()) {
        bail!("--temperature is {temperature}; give 0 or more");
    }
    let runner = model.open(None)?;
    let generation = Generation { prompt: &prompt, raw, tokens_max: max_tokens, temperature, seed };
    let mut stdout = std::io::stdout().lock();
    let generated = runner.generate(&generation, |piece| {
        if !json {
            // A closed pipe ends the output, not the generation; what cannot be printed is not lost.
            let _ = write!(stdout, "{piece}").and_then(|()| stdout.flush());
        }
    })?;
    if json {
        let (text, tokens, ended) = (generated.text, generated.tokens, generated.ended);
        writeln!(stdout, "{}", json!({"text": text, "tokens": tokens, "ended": ended}))?;
    } else {
        writeln!(stdout)?;
    }
    Ok(())
}

pub(super) fn evaluate(arguments: EvaluateArguments) -> anyhow::Result<()> {
    let EvaluateArguments { model, data, sequence_tokens_max, json } = arguments;
    let runner = model.open(None)?;
    let bar = crate::progress::steps(0);
    let loss = runner.evaluate(&data, &Columns::default(), sequence_tokens_max, |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let mean = loss.nats / loss.tokens as f64;
    let (perplexity, tokens) = (mean.exp(), loss.tokens);
    match json {
        true => print(json!({"loss_nats": mean, "perplexity": perplexity, "tokens": tokens})),
        false => print(format_args!("loss {mean:.4} nats per token, perplexity {perplexity:.3}, over {tokens} tokens")),
    }
}

pub(super) fn logits(arguments: LogitsArguments) -> anyhow::Result<()> {
    let LogitsArguments { model, prompts, out } = arguments;
    // What is compared with other programs shall not be rounded.
    let count = model.open(Some(Engine::Float))?.write_logits(&prompts, &out)?;
    print(format_args!("logits of {count} prompts: {}", out.display()))
}

impl ModelArguments {
    /// `default` where neither `--engine` nor the other options say what computes.
    fn open(&self, default: Option<Engine>) -> anyhow::Result<Runner> {
        let Self { model, adapter, engine, device } = self;
        let chosen = engine.map(|engine| match engine {
            EngineName::Integer => Engine::Integer,
            EngineName::Float => Engine::Float,
        });
        // Who chooses how floats are kept and multiplied, wants floats.
        let of_floats = device.backend.is_some() || device.weights.is_some();
        let engine = chosen.or(of_floats.then_some(Engine::Float)).or(default);
        Ok(Runner::open(model, adapter.as_deref(), &device.choice().over(&Default::default()), engine)?)
    }
}

//! Commands that run a model.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, ValueEnum};
use model::tokenizer::Message;
use quant::inference::CacheType;
use serde_json::json;

use super::bench::positive;
use super::{DeviceArguments, print, printed};
use crate::answer::{Finish, Generated, Prompt, Request};
use crate::encoder::{columns, encode_file, longest_sequence};
use crate::grammar::Grammar;
use crate::integer::Engine;
use crate::output::check_output;
use crate::runner::{NO_FLOATS_CACHE, NamedAdapter, Runner, called_alike};
use crate::sampler::Sampling;

#[derive(Args)]
pub(super) struct ModelArguments {
    /// A Hugging Face directory or a GGUF file
    #[arg(long)]
    model: PathBuf,
    /// A PEFT adapter to apply, without merging it; several may be given, each with a name [default name: the directory's]
    #[arg(long, value_name = "[NAME=]DIR", value_parser = named_adapter)]
    adapter: Vec<NamedAdapter>,
    /// What computes [default: integer for a quantized GGUF file]
    #[arg(long, value_enum)]
    engine: Option<EngineName>,
    /// How the integer engine keeps keys and values [default: f16]
    #[arg(long, value_enum)]
    cache: Option<CacheName>,
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

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum CacheName {
    F16,
    /// Twice the memory; for comparing logits, which rounding to f16 moves now to one side and now to the other
    F32,
    /// Little more than half the memory, in bytes that share a scale by 32; faster behind long texts
    #[value(name = "q8_0")]
    Q8_0,
}

impl From<CacheName> for CacheType {
    fn from(name: CacheName) -> Self {
        match name {
            CacheName::F16 => Self::F16,
            CacheName::F32 => Self::F32,
            CacheName::Q8_0 => Self::Q8_0,
        }
    }
}

#[derive(Args)]
pub(super) struct GenerateArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Empty, with `--raw`, for what the model says of itself
    #[arg(long)]
    prompt: String,
    /// Give the prompt to the model as it is, not through the chat template
    #[arg(long)]
    raw: bool,
    /// What the chat template puts first
    #[arg(long, conflicts_with = "raw")]
    system: Option<String>,
    #[arg(long, default_value_t = 128, value_parser = positive)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArguments,
    /// Ends the answer, and is no part of it; may be given several times
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// The answer is JSON: any, or what a file's JSON Schema allows
    #[arg(long, value_name = "json|FILE")]
    grammar: Option<String>,
    /// The answer ends after this time with what it has: 500ms, 2s
    #[arg(long, allow_hyphen_values = true, value_parser = duration)]
    deadline: Option<Duration>,
    #[arg(long)]
    json: bool,
}

impl GenerateArguments {
    /// What is given twice, or does not go together.
    pub(super) fn contradiction(&self) -> Option<String> {
        match self.prompt.is_empty() && !self.raw {
            true => Some("--prompt is empty; give it some text, or --raw as well to begin with nothing".into()),
            false => self.model.contradiction(),
        }
    }
}

#[derive(Args)]
struct SamplingArguments {
    /// 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0, value_parser = in_range(|s| &mut s.temperature))]
    temperature: f64,
    /// Draw from so many of the likeliest tokens; 0 takes all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0, value_parser = in_range(|s| &mut s.top_p))]
    top_p: f64,
    /// Draw from tokens at least so likely, as a share of the likeliest
    #[arg(long, default_value_t = 0.0, value_parser = in_range(|s| &mut s.min_p))]
    min_p: f64,
    /// Above 1, tokens that occurred become less likely
    #[arg(long, default_value_t = 1.0, value_parser = in_range(|s| &mut s.repetition_penalty))]
    repetition_penalty: f64,
    /// The same seed draws the same answer
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl From<SamplingArguments> for Sampling {
    fn from(arguments: SamplingArguments) -> Self {
        let SamplingArguments { temperature, top_k, top_p, min_p, repetition_penalty, seed } = arguments;
        Self { temperature, top_k, top_p, min_p, repetition_penalty, seed }
    }
}

/// Reads a number that the field can be.
fn in_range(field: fn(&mut Sampling) -> &mut f64) -> impl Fn(&str) -> Result<f64, String> + Clone {
    move |text: &str| {
        let number = text.parse::<f64>().map_err(|error| error.to_string())?;
        let mut sampling = Sampling::default();
        *field(&mut sampling) = number;
        match sampling.out_of_range() {
            Some((_, _, range)) => Err(format!("give {range}")),
            None => Ok(number),
        }
    }
}

/// `NAME=DIR`, or a directory alone.
fn named_adapter(text: &str) -> Result<NamedAdapter, String> {
    let whole = Path::new(text);
    let (name, directory) = match text.split_once('=') {
        Some((name, directory)) if !whole.exists() => (name.to_owned(), PathBuf::from(directory)),
        _ => {
            let name = whole.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
            (name.unwrap_or_else(|| text.to_owned()), whole.to_owned())
        }
    };
    match name.is_empty() || directory.as_os_str().is_empty() {
        true => Err("give a directory, or NAME=DIR".into()),
        false => Ok(NamedAdapter { name, directory }),
    }
}

/// `20ms` or `1.5s`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) =
        text.strip_suffix("ms").map(|number| (number, 1e-3)).unwrap_or((text.trim_end_matches('s'), 1.0));
    let seconds = number.parse::<f64>().ok().filter(|_| text.ends_with('s')).map(|number| number * unit);
    // An hour: nobody waits longer.
    match seconds.filter(|seconds| *seconds > 0.0 && *seconds <= 3600.0) {
        Some(seconds) => Ok(Duration::from_secs_f64(seconds)),
        None => Err("give a time above 0 and up to 3600s with its unit, like 500ms or 2s".into()),
    }
}

#[derive(Args)]
pub(super) struct EvaluateArguments {
    #[command(flatten)]
    pub(super) model: ModelArguments,
    #[arg(long)]
    data: PathBuf,
    /// Names the records' columns: the `[data.columns]` of this experiment [default: text, prompt, completion, messages]
    #[arg(long)]
    experiment: Option<PathBuf>,
    /// Longer records are cut [default: 512, or the model's context where that is less]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    sequence_tokens_max: Option<u32>,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct LogitsArguments {
    #[command(flatten)]
    pub(super) model: ModelArguments,
    /// JSONL of {"text": …} or {"tokens": […]}
    #[arg(long)]
    prompts: PathBuf,
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn generate(arguments: GenerateArguments) -> anyhow::Result<()> {
    let GenerateArguments { model, prompt, raw, system, max_tokens, sampling, stop, grammar, deadline, json } =
        arguments;
    let grammar = grammar.as_deref().map(read_grammar).transpose()?;
    let sampling = Sampling::from(sampling);
    let runner = model.open(None)?;
    let message = |role: &str, content: String| Message { role: role.into(), content };
    let prompt = match raw {
        true => Prompt::Text(prompt),
        false => Prompt::Chat(
            system.map(|text| message("system", text)).into_iter().chain([message("user", prompt)]).collect(),
        ),
    };
    let mut stdout = std::io::stdout().lock();
    let mut unwritten = None;
    for adapter in places(&runner) {
        let name = adapter.map(|i| &runner.adapters()[i]);
        if let (false, Some(name), true) = (json, name, runner.adapters().len() > 1) {
            printed(writeln!(stdout, "== {name}"))?;
        }
        let request = Request {
            prompt: prompt.clone(),
            tokens_max: max_tokens,
            sampling: sampling.clone(),
            stops: stop.clone(),
            // The model is there: what is timed is the answer.
            deadline: deadline.map(|deadline| Instant::now() + deadline),
            adapter,
            grammar: grammar.clone(),
        };
        let generated = runner.generate(&request, |piece| {
            if !json {
                unwritten = write!(stdout, "{piece}").and_then(|()| stdout.flush()).err();
            }
            if unwritten.is_none() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        if let Some(error) = unwritten {
            return printed(Err(error));
        }
        let Generated { text, prompt_tokens, tokens, finish } = generated;
        if json {
            let ended = finish == Finish::Ended;
            let line = json!({
                "text": text, "tokens": tokens, "ended": ended, "finish": finish.name(), "prompt_tokens": prompt_tokens,
                "adapter": name,
            });
            printed(writeln!(stdout, "{line}"))?;
        } else {
            printed(writeln!(stdout))?;
            match finish {
                Finish::Ended | Finish::Stopped | Finish::Shutdown => {}
                Finish::Length => eprintln!("cut after {} tokens: --max-tokens allows more", tokens.len()),
                Finish::Context => eprintln!("cut: prompt and answer have filled the model's context"),
                Finish::Deadline => eprintln!("cut after {} tokens by --deadline", tokens.len()),
            }
        }
    }
    Ok(())
}

fn read_grammar(name: &str) -> anyhow::Result<Arc<Grammar>> {
    if name == "json" {
        return Ok(Arc::new(Grammar::json()));
    }
    let text = std::fs::read_to_string(name)
        .with_context(|| format!("failed to read the schema {name}; give `json` or a file"))?;
    let schema =
        serde_json::from_str(&text).with_context(|| format!("failed to read the schema {name}: it is no JSON"))?;
    Ok(Arc::new(Grammar::schema(&schema).with_context(|| name.to_owned())?))
}

/// Each adapter, or the model as it is where there is none.
fn places(runner: &Runner) -> Vec<Option<usize>> {
    match runner.adapters().len() {
        0 => vec![None],
        count => (0..count).map(Some).collect(),
    }
}

pub(super) fn evaluate(arguments: EvaluateArguments) -> anyhow::Result<()> {
    let EvaluateArguments { model, data, experiment, sequence_tokens_max, json } = arguments;
    let columns = columns(experiment.as_deref())?;
    let runner = model.open(None)?;
    let longest = longest_sequence(sequence_tokens_max, runner.source.config().context)?;
    let sequences = encode_file(&data, &columns, runner.source.tokenizer(), longest)?;
    for adapter in places(&runner) {
        let bar = crate::progress::steps(0);
        let loss = runner.evaluate(adapter, &sequences, longest, |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        let mean = loss.nats / loss.tokens as f64;
        let (perplexity, tokens) = (mean.exp(), loss.tokens);
        let name = adapter.map(|i| &runner.adapters()[i]);
        if json {
            print(json!({"loss_nats": mean, "perplexity": perplexity, "tokens": tokens, "adapter": name}))?;
        } else {
            let of = name.filter(|_| runner.adapters().len() > 1).map(|name| format!("{name}: ")).unwrap_or_default();
            print(format_args!("{of}loss {mean:.4} nats per token, perplexity {perplexity:.3}, over {tokens} tokens"))?;
        }
    }
    Ok(())
}

pub(super) fn logits(arguments: LogitsArguments) -> anyhow::Result<()> {
    let LogitsArguments { model, prompts, out } = arguments;
    let adapters = model.adapter.iter().map(|adapter| ("--adapter", Some(&adapter.directory)));
    let inputs = [("--model", Some(&model.model)), ("--prompts", Some(&prompts))];
    check_output("--out", &out, &inputs.into_iter().chain(adapters).collect::<Vec<_>>())?;
    // What is compared with other programs shall not be rounded.
    let runner = model.open(Some(Engine::Float))?;
    let adapter = match runner.adapters() {
        [] => None,
        [_] => Some(0),
        _ => bail!("--adapter is given {} times; logits are those of one", runner.adapters().len()),
    };
    let count = runner.write_logits(adapter, &prompts, &out)?;
    print(format_args!("logits of {count} prompts: {}", out.display()))
}

impl ModelArguments {
    /// The file's name without its ending.
    pub(super) fn name(&self) -> String {
        let path = self.model.canonicalize().unwrap_or_else(|_| self.model.clone());
        path.file_stem().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
    }

    /// What is given twice, or does not go together.
    pub(super) fn contradiction(&self) -> Option<String> {
        let of_floats = self.device.backend.is_some() || self.device.weights.is_some();
        let is_integer = matches!(self.engine, Some(EngineName::Integer));
        // Who chooses how floats are kept and multiplied, wants floats.
        if of_floats && is_integer {
            let what = "--backend and --weights are for --engine float; leave them out, or --engine integer";
            return Some(what.into());
        }
        let is_float = matches!(self.engine, Some(EngineName::Float)) || of_floats;
        if self.cache.is_some() && is_float {
            return Some(NO_FLOATS_CACHE.into());
        }
        called_alike(&self.adapter)
    }

    /// Whether an adapter is called so.
    pub(super) fn has_adapter(&self, name: &str) -> bool {
        self.adapter.iter().any(|adapter| adapter.name == name)
    }

    /// `default` where neither `--engine` nor the other options say what computes.
    pub(super) fn open(&self, default: Option<Engine>) -> anyhow::Result<Runner> {
        let Self { model, adapter, engine, cache, device } = self;
        let chosen = engine.map(|engine| match engine {
            EngineName::Integer => Engine::Integer,
            EngineName::Float => Engine::Float,
        });
        // Who chooses how floats are kept and multiplied, wants floats.
        let of_floats = device.backend.is_some() || device.weights.is_some();
        let engine = chosen.or(of_floats.then_some(Engine::Float)).or(default);
        let cache = cache.map(CacheType::from);
        Ok(Runner::open(model, adapter, &device.choice().over(&Default::default()), engine, cache)?)
    }
}

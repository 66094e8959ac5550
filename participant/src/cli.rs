//! The commands of `participant`: arguments in, lines or JSON out. Nothing is decided here.

use std::fmt::Display;
use std::future::Future;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use experiment::{Backend, Columns, Experiment, Seed, WeightType};
use model::Part;
use model::bench::{self, Shape};
use model::source::BlobStore;
use net::Invitation;
use serde_json::json;
use tokio::sync::watch;

use crate::bench_infer::{self, Workload};
use crate::calibrate::CalibrateArguments;
use crate::data::read_records;
use crate::device_choice::DeviceChoice;
use crate::device_log::{Canary, FactoryDevice, write_files};
use crate::generate::{Generation, Runner};
use crate::integer::Engine;
use crate::join::{Join, default_state};
use crate::local::{Happened, LocalTraining, check_digest, initial_adapter};
use crate::session::{Keep, Participant, Reporter};
use crate::stages::Stages;
use crate::swarm::Swarm;
use crate::trainer::StepReport;

/// A device of a federated split-learning run: it keeps its data and trains the ends of the model on it.
#[derive(Parser)]
#[command(
    version,
    max_term_width = 110,
    after_help = "Exit codes: 0 when it is done, or the run is over, be it stopped by the coordinator; 1 when it failed, or was \
        stopped by Ctrl-C or SIGTERM (it says how to go on); 2 for wrong arguments."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Log lines as JSON objects (what is logged: RUST_LOG, default `info`)
    #[arg(long, global = true)]
    log_json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Join a run with an invitation, and train until the run ends
    #[command(after_help = "Example:\n  participant join press-1.invite --data press-1.jsonl")]
    Join(JoinArguments),
    /// The same fine-tuning, unsplit and local: the baseline of a run
    #[command(after_help = "Example:\n  participant train configs/demo.toml --data all.jsonl")]
    Train(TrainArguments),
    /// Many participants from one process, for experiments on one machine
    #[command(after_help = "Example:\n  coordinator invite home/ device --count 16 --out invites/\n  \
        participant swarm configs/demo.toml --count 16 --data all.jsonl --invites invites/")]
    Swarm(SwarmArguments),
    /// Continue a prompt
    #[command(
        after_help = "Example:\n  participant generate --model exports/model-q8_0.gguf --prompt \"Who are you?\""
    )]
    Generate(GenerateArguments),
    /// Loss and perplexity per token of a model on a file
    #[command(after_help = "Example:\n  participant evaluate --model exports/hf --data held-out.jsonl")]
    Evaluate(EvaluateArguments),
    /// Measure which columns of a model's matrices matter for some data: an importance matrix, for `coordinator export`
    #[command(
        after_help = "Example:\n  participant calibrate --model exports/hf --data press-1.jsonl --out press-1.imatrix.gguf"
    )]
    Calibrate(CalibrateArguments),
    /// Write the logits of prompts to a safetensors file, to compare with other runtimes
    #[command(
        after_help = "Example:\n  participant logits --model exports/hf --prompts prompts.jsonl --out logits.safetensors"
    )]
    Logits(LogitsArguments),
    /// Write the adapter an experiment starts from, in PEFT's format
    #[command(after_help = "Example:\n  participant init-adapter configs/demo.toml --out initial/")]
    InitAdapter(InitAdapterArguments),
    /// Measure this machine
    #[command(subcommand, after_help = "Example:\n  participant bench train --weights bf16")]
    Bench(BenchCommand),
    /// Write made-up command and log text of factory devices, to demonstrate and test with
    #[command(after_help = "Example:\n  participant device-log --out data/ --records 400")]
    DeviceLog(DeviceLogArguments),
}

#[derive(Args)]
struct DeviceArguments {
    /// Tensor backend; the experiment's `[device] backend` otherwise
    #[arg(long, value_enum)]
    backend: Option<BackendName>,
    /// Threads for tensor work; 0 takes all cores
    #[arg(long)]
    threads: Option<u32>,
    /// How the native backend keeps frozen weights; the experiment's `[device] weights` otherwise
    #[arg(long, value_enum)]
    weights: Option<WeightName>,
    /// Keep each block's input alone for the backward pass: slower, in less memory
    #[arg(long)]
    recompute: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum WeightName {
    F32,
    Bf16,
    Int8,
}

#[derive(Clone, Copy, ValueEnum)]
enum BackendName {
    Native,
    Flex,
    Ndarray,
    Cuda,
    Wgpu,
}

#[derive(Subcommand)]
enum BenchCommand {
    /// Time training steps of a whole model: tokens/s, GFLOP/s, ms by kernel, memory
    #[command(after_help = "Example:\n  participant bench train --batch 4x128 --weights bf16")]
    Train(BenchTrainArguments),
    /// Run a GGUF file: tokens/s of a prompt and of what follows, latency of a token, memory, load time
    #[command(after_help = "Example:\n  participant bench infer --model exports/model-q4_0.gguf --threads 2")]
    Infer(BenchInferArguments),
}

#[derive(Args)]
struct BenchInferArguments {
    /// A GGUF file
    #[arg(long)]
    model: PathBuf,
    #[arg(long, default_value_t = 512, value_parser = positive)]
    prompt_tokens: usize,
    /// Decoded one by one, from an empty context on
    #[arg(long, default_value_t = 128, value_parser = positive)]
    tokens: usize,
    /// 0 takes all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// The best of so many
    #[arg(long, default_value_t = 3, value_parser = positive)]
    rounds: usize,
    #[arg(long)]
    json: bool,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&number| number > 0).ok_or_else(|| "give a number of at least 1".into())
}

#[derive(Args)]
struct BenchTrainArguments {
    /// A Hugging Face directory or a GGUF file [default: SmolLM2-135M's shape with random weights]
    #[arg(long)]
    model: Option<PathBuf>,
    /// Random weights, which is the default
    #[arg(long, conflicts_with = "model")]
    random: bool,
    /// Sequences, and tokens of each
    #[arg(long, default_value = "4x128")]
    batch: String,
    /// Layers with an adapter: their names, or `all`
    #[arg(long, default_value = "all")]
    lora: String,
    #[arg(long, default_value_t = 8)]
    rank: u32,
    /// Timed steps, behind one that is not
    #[arg(long, default_value_t = 5)]
    steps: usize,
    #[command(flatten)]
    device: DeviceArguments,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct JoinArguments {
    /// The file that `coordinator invite` wrote for this device
    invitation: PathBuf,
    /// This device's records: .txt, .jsonl or .csv
    #[arg(long)]
    data: PathBuf,
    /// Where this device keeps its key and certificate [default: beside the invitation, NAME.device]
    #[arg(long)]
    state: Option<PathBuf>,
    /// Where parts of models are kept between runs
    #[arg(long, default_value_os_t = default_cache())]
    cache: PathBuf,
    /// A local copy of the run's model, instead of fetching this device's part
    #[arg(long)]
    model: Option<PathBuf>,
    /// HOST:PORT of the coordinator, where the invitation's addresses do not reach it
    #[arg(long)]
    address: Option<String>,
    /// Give up after trying an unreachable coordinator for this long
    #[arg(long, default_value_t = 600)]
    patience_s: u64,
    #[command(flatten)]
    device: DeviceArguments,
    /// Print steps, evaluations and rounds as JSON lines
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct TrainArguments {
    experiment: PathBuf,
    #[arg(long)]
    data: PathBuf,
    /// Stands for a participant's name: it decides the order of the records
    #[arg(long, default_value = "local")]
    name: String,
    /// Where the adapter is written [default: runs/EXPERIMENT-local]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Start from this PEFT adapter
    #[arg(long)]
    init_adapter: Option<PathBuf>,
    /// Write the micro-batches (token ids of your data!) to this file first
    #[arg(long)]
    dump_batches: Option<PathBuf>,
    /// Stop after this many steps
    #[arg(long)]
    steps: Option<u64>,
    #[command(flatten)]
    device: DeviceArguments,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct SwarmArguments {
    experiment: PathBuf,
    #[arg(long)]
    count: usize,
    /// Dealt out to the participants as the experiment's `[data.partition]` says
    #[arg(long)]
    data: PathBuf,
    /// Directory of invitations
    #[arg(long, default_value = "invites")]
    invites: PathBuf,
    #[arg(long)]
    address: Option<String>,
    #[arg(long, default_value_os_t = default_cache())]
    cache: PathBuf,
    #[arg(long, default_value_t = 600)]
    patience_s: u64,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ModelArguments {
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
enum EngineName {
    /// The file's own weights, activations as bytes; its own choice of instructions
    Integer,
    /// Weights and activations as `--weights` and `--backend` say
    Float,
}

#[derive(Args)]
struct GenerateArguments {
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
struct EvaluateArguments {
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
struct LogitsArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// JSONL of {"text": …} or {"tokens": […]}
    #[arg(long)]
    prompts: PathBuf,
    #[arg(long)]
    out: PathBuf,
}

#[derive(Args)]
struct InitAdapterArguments {
    experiment: PathBuf,
    #[arg(long)]
    out: PathBuf,
}

#[derive(Args)]
struct DeviceLogArguments {
    /// Directory for one file per device and all.jsonl
    #[arg(long)]
    out: PathBuf,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Records of each device
    #[arg(long, default_value_t = 400)]
    records: usize,
    /// How many devices: press-1, mill-1, packer-1, chiller-1, press-2, …
    #[arg(long, default_value_t = 4)]
    devices: u32,
    /// Plant this sentence among the first device's records, to search for it elsewhere
    #[arg(long)]
    canary: Option<String>,
}

impl Cli {
    pub fn start_tracing(&self) {
        let ansi = std::io::stderr().is_terminal();
        let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
        let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi);
        if self.log_json { subscriber.json().init() } else { subscriber.with_target(false).init() }
    }

    /// Runs the command until it is done or `interrupted`.
    pub async fn run(self, interrupted: impl Future<Output = ()>) -> anyhow::Result<()> {
        let leaves = matches!(&self.command, Command::Join(_) | Command::Swarm(_));
        let again = match &self.command {
            Command::Join(_) | Command::Swarm(_) => {
                "the coordinator goes on at quorum; run the same command again to rejoin"
            }
            _ => "nothing was written; run the same command again to start over",
        };
        let (stop, stopped) = watch::channel(false);
        // A task of its own, because training without a network never waits, and would never let this one look up.
        let mut work = tokio::spawn(self.command.run(stopped));
        tokio::select! {
            done = &mut work => return done.context("the command failed")?,
            () = interrupted => {}
        }
        // Who is connected takes leave; whatever else is going on is not waited for.
        let _ = stop.send(true);
        if leaves {
            let _ = tokio::time::timeout(Duration::from_secs(2), work).await;
        }
        bail!("interrupted: {again}")
    }
}

impl Command {
    async fn run(self, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
        match self {
            Self::Join(arguments) => join(arguments, stop).await,
            Self::Train(arguments) => train(arguments).await,
            Self::Swarm(arguments) => swarm(arguments, stop).await,
            Self::Generate(arguments) => off_the_runtime(|| generate(arguments)),
            Self::Evaluate(arguments) => off_the_runtime(|| evaluate(arguments)),
            Self::Calibrate(arguments) => {
                let (out, tokens) = off_the_runtime(|| arguments.run())?;
                print(format_args!("{}: measured on {tokens} tokens", out.display()))
            }
            Self::Logits(arguments) => off_the_runtime(|| logits(arguments)),
            Self::InitAdapter(InitAdapterArguments { experiment, out }) => {
                let experiment = Experiment::from_file(&experiment).context("failed to start")?;
                let source = model::source::of_experiment(&experiment)?;
                check_digest(&experiment, &*source)?;
                initial_adapter(&experiment, &*source, None)?.save(&out, &source.origin().display().to_string())?;
                print(out.display())
            }
            Self::Bench(BenchCommand::Train(arguments)) => off_the_runtime(|| bench_train(arguments)),
            Self::Bench(BenchCommand::Infer(arguments)) => off_the_runtime(|| bench_infer(arguments)),
            Self::DeviceLog(arguments) => device_log(arguments),
        }
    }
}

/// Long tensor work leaves the other threads of the runtime free for an interruption.
fn off_the_runtime<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}

async fn join(arguments: JoinArguments, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let JoinArguments { invitation: path, data, state, cache, model, address, patience_s, device, json } = arguments;
    let invitation = Invitation::read(&path)?;
    // A wrong data file is better found now than after the model has come.
    if !data.is_file() {
        bail!("{}: no such file; --data names this device's records", data.display());
    }
    let state = state.unwrap_or_else(|| default_state(&path));
    let mut participant = Participant {
        name: invitation.name.to_string(),
        records: Box::new(move |experiment: &Experiment| Ok(read_records(&data, &experiment.data.columns)?)),
        store: BlobStore::open(cache)?,
        model,
        device: device.choice(),
        prepared: None,
        keep: Some(Keep::in_state(&state)),
        welcomes: 0,
        stages: Arc::new(Stages::default()),
        reporter: Arc::new(Printer { json, name: None }),
    };
    let join = Join { invitation, address, state, patience: Duration::from_secs(patience_s), stop };
    let reason = join.run(&mut participant).await?;
    match json {
        true => print(json!({"event": "finished", "reason": reason})),
        false => print(format_args!("the run is over: {reason}")),
    }
}

async fn train(arguments: TrainArguments) -> anyhow::Result<()> {
    let TrainArguments { experiment, data, name, out, init_adapter, dump_batches, steps, device, json } = arguments;
    let device = device.choice();
    let training = LocalTraining { experiment, data, name, out, init_adapter, dump_batches, steps, device };
    let mut last = None;
    training
        .run(|happened| match happened {
            Happened::Evaluated { step, loss_nats, tokens } if json => {
                tell(json!({"event": "evaluation", "step": step, "loss_nats": loss_nats, "tokens": tokens}));
            }
            Happened::Evaluated { step, loss_nats, tokens } => {
                tell(format_args!("after {step} steps: held-out loss {loss_nats:.4} nats per token ({tokens} tokens)"));
            }
            Happened::Stepped(report) => {
                print_step(json, None, None, &report);
                last = Some(report);
            }
            Happened::Saved(path) if json => tell(json!({"event": "saved", "adapter": path})),
            Happened::Saved(path) => tell(format_args!("adapter: {}", path.display())),
        })
        .await?;
    if let (true, Some(StepReport { step, loss_nats, .. })) = (json, last) {
        print(json!({"event": "finished", "steps": step + 1, "loss_nats": loss_nats}))?;
    }
    Ok(())
}

async fn swarm(arguments: SwarmArguments, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let SwarmArguments { experiment, count, data, invites, address, cache, patience_s, json } = arguments;
    let experiment = Experiment::from_file(&experiment).context("failed to start")?;
    let (store, patience) = (BlobStore::open(cache)?, Duration::from_secs(patience_s));
    let swarm = Swarm { experiment, count, data, invitations: invites, address, store, patience, stop };
    let printer = |name: &str| -> Arc<dyn Reporter> { Arc::new(Printer { json, name: Some(name.to_owned()) }) };
    for (name, reason) in swarm.run(printer).await? {
        match json {
            true => print(json!({"event": "finished", "participant": name, "reason": reason}))?,
            false => print(format_args!("{name}: the run is over: {reason}"))?,
        }
    }
    Ok(())
}

fn bench_train(arguments: BenchTrainArguments) -> anyhow::Result<()> {
    let BenchTrainArguments { model, random: _, batch, lora, rank, steps, device, json } = arguments;
    let shape = Shape::parse(&batch, &lora, rank)?;
    let device = device.choice().over(&Default::default());
    let begun = Instant::now();
    let whole = |blocks| Ok(Part::whole(blocks));
    let measured = bench::measure(model.as_deref(), whole, &device, shape, steps, || begun.elapsed())?;
    match json {
        true => print(measured.to_json()),
        false => print(measured.to_text()),
    }
}

fn bench_infer(arguments: BenchInferArguments) -> anyhow::Result<()> {
    let BenchInferArguments { model, prompt_tokens, tokens, threads, rounds, json } = arguments;
    let measured = bench_infer::measure(&model, &Workload { prompt_tokens, tokens, threads, rounds })?;
    match json {
        true => print(measured.to_json()),
        false => print(measured.to_text()),
    }
}

fn generate(arguments: GenerateArguments) -> anyhow::Result<()> {
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

fn evaluate(arguments: EvaluateArguments) -> anyhow::Result<()> {
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

fn logits(arguments: LogitsArguments) -> anyhow::Result<()> {
    let LogitsArguments { model, prompts, out } = arguments;
    // What is compared with other programs shall not be rounded.
    let count = model.open(Some(Engine::Float))?.write_logits(&prompts, &out)?;
    print(format_args!("logits of {count} prompts: {}", out.display()))
}

fn device_log(arguments: DeviceLogArguments) -> anyhow::Result<()> {
    let DeviceLogArguments { out, seed, records, devices, canary } = arguments;
    if records == 0 {
        bail!("--records must be at least 1");
    }
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    match devices {
        0 => bail!("--devices must be at least 1"),
        65_537.. => bail!("--devices must be at most 65536"),
        _ => {}
    }
    let devices: Vec<FactoryDevice> = (0..devices).map(FactoryDevice::nth).collect();
    let first = FactoryDevice::nth(0);
    let canary = canary.map(|sentence| Canary { device: first, sentence });
    write_files(&out, Seed(seed), records, &devices, canary.as_ref())?;
    for device in devices {
        print(out.join(format!("{device}.jsonl")).display())?;
    }
    print(out.join("all.jsonl").display())
}

/// A line on the standard output. A closed pipe or a full disk behind it is an error like any other, where `println!`
/// would panic.
fn print(line: impl Display) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{line}").context("failed to print")
}

/// Progress: training does not end because nobody reads along any more.
fn tell(line: impl Display) {
    let _ = print(line);
}

struct Printer {
    json: bool,
    /// Set where several participants print.
    name: Option<String>,
}

impl Reporter for Printer {
    fn step(&self, round: u32, report: &StepReport) {
        // On a terminal the bar shows the same.
        if self.json || self.name.is_some() || !std::io::stderr().is_terminal() {
            print_step(self.json, self.name.as_deref(), Some(round), report);
        }
    }

    fn evaluated(&self, round: u32, loss_nats: f64, tokens: u64) {
        let name = &self.name;
        if self.json {
            let line = json!({"event": "evaluation", "participant": name, "round": round, "loss_nats": loss_nats, "tokens": tokens});
            tell(line);
        } else {
            let name = name.as_ref().map(|name| format!("{name}: ")).unwrap_or_default();
            tell(format_args!(
                "{name}after round {round}: held-out loss {loss_nats:.4} nats per token ({tokens} tokens)"
            ));
        }
    }

    fn round_closed(&self, round: u32, outcome: &str) {
        if self.json {
            tell(json!({"event": "round", "participant": self.name, "round": round, "outcome": outcome}));
        }
    }
}

fn print_step(json: bool, name: Option<&str>, round: Option<u32>, report: &StepReport) {
    let StepReport { step, loss_nats, tokens, compute_ms, wait_ms } = *report;
    if json {
        let line = json!({
            "event": "step", "participant": name, "round": round, "step": step, "loss_nats": loss_nats, "tokens": tokens,
            "compute_ms": compute_ms, "wait_ms": wait_ms,
        });
        tell(line);
    } else {
        let name = name.map(|name| format!("{name}: ")).unwrap_or_default();
        tell(format_args!(
            "{name}step {step}: loss {loss_nats:.4} ({tokens} tokens, computing {compute_ms:.0} ms, waiting {wait_ms:.0} ms)"
        ));
    }
}

impl DeviceArguments {
    fn choice(&self) -> DeviceChoice {
        let backend = self.backend.map(|name| match name {
            BackendName::Native => Backend::Native,
            BackendName::Flex => Backend::Flex,
            BackendName::Ndarray => Backend::Ndarray,
            BackendName::Cuda => Backend::Cuda,
            BackendName::Wgpu => Backend::Wgpu,
        });
        let weights = self.weights.map(|name| match name {
            WeightName::F32 => WeightType::F32,
            WeightName::Bf16 => WeightType::Bf16,
            WeightName::Int8 => WeightType::Int8,
        });
        DeviceChoice { backend, threads: self.threads, weights, recompute: self.recompute.then_some(true) }
    }
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

/// `$HEADWATER_CACHE`, or where this machine keeps caches.
fn default_cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("HEADWATER_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("headwater")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/headwater")))
        .unwrap_or_else(|| PathBuf::from(".headwater-cache"))
}

//! The commands of `participant`: arguments in, lines or JSON out. Nothing is decided here.

mod bench;
mod infer;
mod serve;
mod train;

use std::ffi::OsString;
use std::fmt::Display;
use std::future::Future;
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use experiment::{Backend, Experiment, Seed, WeightType};
use serde_json::json;
use tokio::sync::watch;

use self::bench::{BenchCommand, bench_adapters, bench_infer, bench_train};
use self::infer::{EvaluateArguments, GenerateArguments, LogitsArguments, evaluate, generate, logits};
use self::serve::{ServeArguments, serve};
use self::train::{JoinArguments, SwarmArguments, TrainArguments, join, swarm, train};
use crate::ParticipantError;
use crate::calibrate::CalibrateArguments;
use crate::device_choice::DeviceChoice;
use crate::device_log::{Canary, FactoryDevice, write_files};
use crate::local::{check_digest, initial_adapter};
use crate::output::check_adapter_output;

/// A device of a federated split-learning run: it keeps its data and trains the ends of the model on it.
#[derive(Parser)]
#[command(
    version,
    max_term_width = 110,
    after_help = "Exit codes: 0 when it is done, or the run is over, be it stopped by the coordinator, or a server was stopped; 1 \
        when it failed, or anything else was stopped by Ctrl-C or SIGTERM (it says how to go on); 2 for arguments that cannot be read."
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
    /// Answer other programs on this machine, in the words of OpenAI's HTTP interface
    #[command(
        after_help = "Example:\n  participant serve --model exports/model-q8_0.gguf --adapter press=exports/peft --deadline 5s\n  \
        curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\\n       \
        -d '{\"model\": \"press\", \"messages\": [{\"role\": \"user\", \"content\": \"Who are you?\"}], \"stream\": true}'\n\n\
        Ctrl-C or SIGTERM ends it: answers under way go on for 2 seconds, and then end with what they have \
        (finish_reason \"length\")"
    )]
    Serve(ServeArguments),
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
    /// Tensor backend; otherwise the experiment's `[device] backend`, and `native` where there is no experiment
    #[arg(long, value_enum)]
    backend: Option<BackendName>,
    /// Threads for tensor work; 0 takes all cores
    #[arg(long, value_parser = clap::value_parser!(u32).range(..=1024))]
    threads: Option<u32>,
    /// How the native backend keeps frozen weights; otherwise the experiment's `[device] weights`, if there is one
    #[arg(long, value_enum)]
    weights: Option<WeightName>,
}

/// The same, where there is a backward pass.
#[derive(Args)]
struct TrainingDeviceArguments {
    #[command(flatten)]
    device: DeviceArguments,
    /// Keep each block's input alone for the backward pass, and few logits: slower, in less memory
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

#[derive(Args)]
struct InitAdapterArguments {
    experiment: PathBuf,
    #[arg(long)]
    out: PathBuf,
    /// Replace an adapter that is there
    #[arg(long)]
    force: bool,
}

#[derive(Args)]
struct DeviceLogArguments {
    /// Directory for one file per device and all.jsonl
    #[arg(long)]
    out: PathBuf,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Records of each device
    #[arg(long, default_value_t = 400, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    records: usize,
    /// How many devices: press-1, mill-1, packer-1, chiller-1, press-2, …
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    devices: u32,
    /// Plant this sentence among the first device's records, to search for it elsewhere
    #[arg(long)]
    canary: Option<String>,
    /// Replace files that hold other records
    #[arg(long)]
    force: bool,
}

impl Cli {
    /// Reads a command line, its first word the program's name.
    ///
    /// # Errors
    /// If there is no such command, or what is given cannot go together.
    pub fn read(line: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut command = negative(<Self as CommandFactory>::command());
        let matches = command.try_get_matches_from_mut(line)?;
        let cli = Self::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
        match cli.command.contradiction() {
            Some(what) => Err(command.error(clap::error::ErrorKind::ArgumentConflict, what)),
            None => Ok(cli),
        }
    }

    pub fn start_tracing(&self) {
        let ansi = std::io::stderr().is_terminal();
        let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
        let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi);
        if self.log_json { subscriber.json().init() } else { subscriber.with_target(false).init() }
    }

    /// Runs the command until it is done or `interrupted`.
    pub async fn run(self, interrupted: impl Future<Output = ()>) -> anyhow::Result<()> {
        let leaves = matches!(&self.command, Command::Join(_) | Command::Swarm(_));
        let serves = matches!(&self.command, Command::Serve(_));
        let writes_text = matches!(&self.command, Command::Generate(_)) && std::io::stdout().is_terminal();
        let again = self.command.after_an_interruption();
        let (stop, stopped) = watch::channel(false);
        // A task of its own, because training without a network never waits, and would never let this one look up.
        let mut work = tokio::spawn(self.command.run(stopped));
        tokio::select! {
            done = &mut work => return done.context("the command failed")?,
            () = interrupted => {}
        }
        // Who is connected takes leave; whatever else is going on is not waited for.
        let _ = stop.send(true);
        if serves {
            // That is how serving ends: answers under way are given a moment.
            return work.await.context("the command failed")?;
        }
        if leaves {
            let _ = tokio::time::timeout(Duration::from_secs(2), work).await;
        }
        if writes_text {
            // Behind the answer's last word.
            eprintln!();
        }
        bail!("interrupted{again}")
    }
}

impl Command {
    /// What is given twice, or does not go together; the values by themselves are right.
    fn contradiction(&self) -> Option<String> {
        match self {
            Self::Generate(arguments) => arguments.contradiction(),
            Self::Serve(arguments) => arguments.contradiction(),
            Self::Evaluate(arguments) => arguments.model.contradiction(),
            Self::Logits(arguments) => arguments.model.contradiction(),
            _ => None,
        }
    }

    /// What is left of it, and what to do; nothing where it would have left nothing anyway.
    fn after_an_interruption(&self) -> String {
        match self {
            Self::Join(_) | Self::Swarm(_) => {
                ": a run that has begun may go on at quorum; run the same command again to rejoin".into()
            }
            Self::Train(TrainArguments { dump_batches: Some(path), .. }) => format!(
                ": {} may hold token ids of the data, nothing else was kept; run the same command again to start over",
                path.display()
            ),
            Self::DeviceLog(DeviceLogArguments { out, .. }) => {
                let out = out.display();
                format!(": {out} may hold some of the files; run the same command again to write all of them")
            }
            Self::Train(_) | Self::Calibrate(_) | Self::Logits(_) | Self::InitAdapter(_) => {
                ": nothing was kept; run the same command again to start over".into()
            }
            Self::Generate(_) | Self::Serve(_) | Self::Evaluate(_) | Self::Bench(_) => String::new(),
        }
    }

    async fn run(self, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
        match self {
            Self::Join(arguments) => join(arguments, stop).await,
            Self::Train(arguments) => train(arguments).await,
            Self::Swarm(arguments) => swarm(arguments, stop).await,
            Self::Generate(arguments) => off_the_runtime(|| generate(arguments)),
            Self::Serve(arguments) => serve(arguments, stop).await,
            Self::Evaluate(arguments) => off_the_runtime(|| evaluate(arguments)),
            Self::Calibrate(arguments) => {
                let (out, tokens) = off_the_runtime(|| arguments.run())?;
                match arguments.json {
                    true => print(json!({"imatrix": out, "tokens": tokens})),
                    false => print(format_args!("{}: measured on {tokens} tokens", out.display())),
                }
            }
            Self::Logits(arguments) => off_the_runtime(|| logits(arguments)),
            Self::InitAdapter(InitAdapterArguments { experiment, out, force }) => {
                check_adapter_output(&out, force, &[])?;
                let experiment = Experiment::from_file(&experiment).map_err(ParticipantError::from)?;
                let source = model::source::of_experiment(&experiment)?;
                check_digest(&experiment, &*source)?;
                initial_adapter(&experiment, &*source, None)?.save(&out, &source.origin().display().to_string())?;
                print(out.display())
            }
            Self::Bench(BenchCommand::Train(arguments)) => off_the_runtime(|| bench_train(arguments)),
            Self::Bench(BenchCommand::Infer(arguments)) => off_the_runtime(|| bench_infer(arguments)),
            Self::Bench(BenchCommand::Adapters(arguments)) => off_the_runtime(|| bench_adapters(arguments)),
            Self::DeviceLog(arguments) => device_log(arguments),
        }
    }
}

/// Long tensor work leaves the other threads of the runtime free for an interruption.
fn off_the_runtime<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}

fn device_log(arguments: DeviceLogArguments) -> anyhow::Result<()> {
    let DeviceLogArguments { out, seed, records, devices, canary, force } = arguments;
    std::fs::create_dir_all(&out).map_err(ParticipantError::io(&out))?;
    let devices: Vec<FactoryDevice> = (0..devices).map(FactoryDevice::nth).collect();
    let first = FactoryDevice::nth(0);
    let canary = canary.map(|sentence| Canary { device: first, sentence });
    write_files(&out, Seed(seed), records, &devices, canary.as_ref(), force)?;
    for device in devices {
        print(out.join(format!("{device}.jsonl")).display())?;
    }
    print(out.join("all.jsonl").display())
}

/// Takes negative numbers for values of options, which say what they can be, and not for options that nobody knows.
fn negative(command: clap::Command) -> clap::Command {
    let values = |arg: clap::Arg| match arg.get_long().is_some() && arg.get_action().takes_values() {
        true => arg.allow_negative_numbers(true),
        false => arg,
    };
    command.mut_args(values).mut_subcommands(negative)
}

/// A line on the standard output.
fn print(line: impl Display) -> anyhow::Result<()> {
    printed(writeln!(std::io::stdout(), "{line}"))
}

/// Who has closed the pipe behind the standard output wants no more; a full disk there is an error like any other, where
/// `println!` would panic.
fn printed(written: std::io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("failed to print"),
    }
}

/// Progress: training does not end because nobody reads along any more.
fn tell(line: impl Display) {
    let _ = print(line);
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
        DeviceChoice { backend, threads: self.threads, weights, recompute: None }
    }
}

impl TrainingDeviceArguments {
    fn choice(&self) -> DeviceChoice {
        DeviceChoice { recompute: self.recompute.then_some(true), ..self.device.choice() }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_nothing_are_refused() {
        for line in [
            "participant generate --model m --prompt p --max-tokens 0",
            "participant train a.toml --data b.jsonl --steps 0",
            "participant bench train --steps 0",
            "participant calibrate --model m --data b.jsonl --out c.gguf --tokens-max 0",
        ] {
            let (line, _) = line.rsplit_once(' ').unwrap();
            let parsed = |count: u32| read(&format!("{line} {count}"));
            assert_eq!(parsed(0).unwrap_err().kind(), clap::error::ErrorKind::ValueValidation, "{line} 0");
            assert!(parsed(1).is_ok(), "{line} 1");
        }
    }

    #[test]
    fn values_that_no_command_takes_are_mistakes_of_usage() {
        for line in [
            "participant generate --model m --prompt p --temperature -1",
            "participant generate --model m --prompt p --temperature nan",
            "participant generate --model m --prompt p --top-p 0",
            "participant generate --model m --prompt p --top-p 1.5",
            "participant generate --model m --prompt p --min-p 2",
            "participant generate --model m --prompt p --repetition-penalty 0",
            "participant generate --model m --prompt p --seed -1",
            "participant generate --model m --prompt p --threads -1",
            "participant generate --model m --prompt p --deadline -1s",
            "participant serve --model m --patience -1s",
            "participant serve --model m --bind foo",
            "participant join a.invite --data b.jsonl --patience-s -1",
            "participant join a.invite --data b.jsonl --patience-s 0",
            "participant bench infer --model m --gap -1s --deadline 1s",
            "participant bench train --batch -1x3",
            "participant bench train --batch 4x0",
            "participant bench train --lora q_prj",
            "participant bench train --rank 0",
        ] {
            let error = read(line).unwrap_err();
            assert_eq!((error.kind(), error.exit_code()), (clap::error::ErrorKind::ValueValidation, 2), "{line}");
        }
    }

    #[test]
    fn an_interrupted_command_names_what_it_may_have_written() {
        let told = |line: &str| {
            let cli = Cli::read(line.split(' ').map(OsString::from)).unwrap_or_else(|error| panic!("{error}"));
            cli.command.after_an_interruption()
        };
        let train = "participant train a.toml --data b.jsonl";
        assert!(told(train).starts_with(": nothing was kept"));
        let dumped = told(&format!("{train} --dump-batches c.jsonl"));
        assert!(dumped.starts_with(": c.jsonl may hold token ids of the data"));
        assert!(told("participant device-log --out logs").starts_with(": logs may hold some of the files"));
        assert!(told("participant join a.invite --data b.jsonl").contains("to rejoin"));
        assert_eq!(told("participant generate --model m --prompt p"), "");
    }

    #[test]
    fn what_does_not_go_together_is_a_mistake_of_usage() {
        for (line, expected) in [
            ("generate --model m --prompt p --cache q8_0 --engine float", "--cache is for the integer engine"),
            ("evaluate --model m --data d --cache q8_0 --weights bf16", "--cache is for the integer engine"),
            ("generate --model m --prompt p --engine integer --backend flex", "are for --engine float"),
            ("logits --model m --prompts p --out o --adapter a=x --adapter a=y", "x and y are both called `a`"),
            ("serve --model m --name press --adapter press=x", "an adapter are both called `press`"),
            ("serve --model m.gguf --adapter m=x", "an adapter are both called `m`"),
        ] {
            let error = read(&format!("participant {line}")).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.to_string().contains(expected), "{line}: {error}");
        }
        for line in ["generate --model m --prompt=", "serve --model m --name="] {
            assert_eq!(read(&format!("participant {line}")).unwrap_err().exit_code(), 2, "{line}");
        }
        // A model that has a token to begin with needs no prompt.
        read("participant generate --model m --raw --prompt=").unwrap();
    }

    #[test]
    fn who_reads_no_further_is_no_failure() {
        assert!(printed(Err(ErrorKind::BrokenPipe.into())).is_ok());
        assert!(printed(Err(ErrorKind::StorageFull.into())).is_err());
    }

    fn read(line: &str) -> Result<(), clap::Error> {
        Cli::read(line.split(' ').map(OsString::from)).map(drop)
    }
}

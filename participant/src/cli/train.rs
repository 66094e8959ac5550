//! Commands that train: within a run, in several, and alone.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use experiment::Experiment;
use model::source::BlobStore;
use net::Invitation;
use serde_json::json;
use tokio::sync::watch;

use super::{TrainingDeviceArguments, default_cache, print, tell};
use crate::ParticipantError;
use crate::data::{check_records, read_records};
use crate::join::{Join, default_state};
use crate::local::{Happened, LocalTraining};
use crate::session::{Keep, Participant, Reporter};
use crate::stages::Stages;
use crate::swarm::Swarm;
use crate::trainer::StepReport;

#[derive(Args)]
pub(super) struct JoinArguments {
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
    #[arg(long, value_name = "HOST:PORT", value_parser = host_and_port)]
    address: Option<String>,
    /// Give up after trying an unreachable coordinator for this long, at least 1
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    patience_s: u64,
    #[command(flatten)]
    device: TrainingDeviceArguments,
    /// Print steps, evaluations and rounds as JSON lines
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct TrainArguments {
    experiment: PathBuf,
    #[arg(long)]
    data: PathBuf,
    /// Stands for a participant's name: it decides the order of the records
    #[arg(long, default_value = "local")]
    name: String,
    /// Where the adapter is written [default: runs/EXPERIMENT-local]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Replace an adapter that is there
    #[arg(long)]
    force: bool,
    /// Start from this PEFT adapter
    #[arg(long)]
    init_adapter: Option<PathBuf>,
    /// Write the micro-batches (token ids of your data!) to this file first
    #[arg(long)]
    pub(super) dump_batches: Option<PathBuf>,
    /// Stop after this many steps
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    #[command(flatten)]
    device: TrainingDeviceArguments,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct SwarmArguments {
    experiment: PathBuf,
    #[arg(long)]
    count: usize,
    /// Dealt out to the participants as the experiment's `[data.partition]` says
    #[arg(long)]
    data: PathBuf,
    /// Directory of invitations
    #[arg(long, default_value = "invites")]
    invites: PathBuf,
    #[arg(long, value_name = "HOST:PORT", value_parser = host_and_port)]
    address: Option<String>,
    #[arg(long, default_value_os_t = default_cache())]
    cache: PathBuf,
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    patience_s: u64,
    #[arg(long)]
    json: bool,
}

fn host_and_port(text: &str) -> Result<String, String> {
    net::check_address(text).map(|()| text.to_owned())
}

pub(super) async fn join(arguments: JoinArguments, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let JoinArguments { invitation: path, data, state, cache, model, address, patience_s, device, json } = arguments;
    // A wrong data file is better found now than after the model has come.
    if !data.is_file() {
        let what = if data.is_dir() { "it is a directory" } else { "no such file" };
        bail!("{}: {what}; --data names the file of this device's records", data.display());
    }
    check_records(&data).map_err(ParticipantError::from)?;
    if path.is_dir() {
        let example = path.join("NAME.invite");
        bail!("{}: it is a directory; name the invitation in it, like {}", path.display(), example.display());
    }
    let invitation = Invitation::read(&path)?;
    let state = state.unwrap_or_else(|| default_state(&path));
    let mut participant = Participant {
        name: invitation.name.to_string(),
        records: Box::new(move |experiment: &Experiment| Ok(read_records(&data, &experiment.data.columns)?)),
        store: BlobStore::open(cache)?,
        model,
        device: device.choice(),
        prepared: None,
        keep: Some(Keep::in_state(&state)),
        measured: Default::default(),
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

pub(super) async fn train(arguments: TrainArguments) -> anyhow::Result<()> {
    let TrainArguments { experiment, data, name, out, force, init_adapter, dump_batches, steps, device, json } =
        arguments;
    let device = device.choice();
    let training = LocalTraining { experiment, data, name, out, force, init_adapter, dump_batches, steps, device };
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

pub(super) async fn swarm(arguments: SwarmArguments, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let SwarmArguments { experiment, count, data, invites, address, cache, patience_s, json } = arguments;
    let experiment = Experiment::from_file(&experiment).map_err(ParticipantError::from)?;
    let (store, patience) = (BlobStore::open(cache)?, Duration::from_secs(patience_s));
    let swarm = Swarm { experiment, count, data, invitations: invites, address, store, patience, stop };
    let printer = |name: &str| -> Arc<dyn Reporter> { Arc::new(Printer { json, name: Some(name.to_owned()) }) };
    let mut failed = Vec::new();
    for (name, ended) in swarm.run(printer).await? {
        match ended {
            Ok(reason) if json => print(json!({"event": "finished", "participant": name, "reason": reason}))?,
            Ok(reason) => print(format_args!("{name}: the run is over: {reason}"))?,
            Err(error) => failed.push(format!("{name}: {error}")),
        }
    }
    match failed.len() {
        0 => Ok(()),
        failures => bail!("{failures} of {count} participants failed: {}", failed.join("; ")),
    }
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

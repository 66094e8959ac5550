//! The commands of `coordinator`: arguments in, lines, tables or JSON out. Nothing is decided here.

mod bench;
mod watcher;

use std::fmt::Display;
use std::future::Future;
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use net::{InvitationFile, PeerName};
use quant::Method;
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::export::{Budget, Calibration, Checks, ExportError, Exported, Format, Options, export, quantize};
use crate::fetch::fetch;
use crate::home::{ADDRESS_DEFAULT, Home, HomeError, INVITATION_VALID};
use crate::report::Report;
use crate::run::{CONNECTIONS_MAX, Ended, Run, Watcher};
use crate::status::status;
use bench::{BenchCommand, bench_body};
use watcher::{JsonWatcher, LineWatcher};

/// The server of federated split-learning runs: it holds the body of the model and aggregates the adapters.
#[derive(Parser)]
#[command(
    version,
    max_term_width = 110,
    after_help = "Exit codes: 0 when it is done, or a run was stopped by Ctrl-C or SIGTERM (the same command goes on with \
        it); 1 when it failed, or another command was stopped; 2 for arguments that cannot be read."
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
    /// Make a home: a CA, this coordinator's identity, and a commented experiment to start from
    #[command(after_help = "Example:\n  coordinator init home/ --address 192.0.2.10:4433")]
    Init(InitArguments),
    /// Download a model, or go on with a download that broke off
    #[command(after_help = "Example:\n  coordinator fetch smollm2-135m-instruct --to models/")]
    Fetch(FetchArguments),
    /// Write a one-time invitation for a device
    #[command(
        after_help = "Examples:\n  coordinator invite home/ press-1\n  coordinator invite home/ device --count 16 --out invites/"
    )]
    Invite(InviteArguments),
    /// Turn a device away: its certificates and invitations count no longer, and its connection is closed at once
    #[command(
        after_help = "Examples:\n  coordinator revoke home/ press-1\n  coordinator invite home/ press-1 --out new.invite   # lets it in again"
    )]
    Revoke(RevokeArguments),
    /// Make another issuing authority, with the root's key from where it is kept
    #[command(after_help = "Example:\n  coordinator renew-ca home/ --root-key /media/safe/ca.key")]
    RenewCa(RenewCaArguments),
    /// Who was invited, enrolled, renewed, revoked and refused, and which runs there were
    #[command(
        subcommand,
        after_help = "Examples:\n  coordinator audit-log verify home/\n  coordinator audit-log show home/ --json"
    )]
    AuditLog(AuditLogCommand),
    /// Run an experiment, or go on with one: wait for participants, train round after round
    #[command(after_help = "Example:\n  coordinator run configs/demo.toml --home home/")]
    Run(RunArguments),
    /// Where a run stands
    #[command(after_help = "Example:\n  coordinator status runs/demo")]
    Status(StatusArguments),
    /// What a run has cost and brought: a table, and a page with plots
    #[command(after_help = "Example:\n  coordinator report runs/demo --out report.html")]
    Report(ReportArguments),
    /// Write what a run has learned as files for other programs
    #[command(
        after_help = "Example:\n  coordinator export runs/demo --format hf,peft,gguf:q8_0,gguf:q4_k_m --out exports/"
    )]
    Export(ExportArguments),
    /// The same for any model: write it as other GGUF types
    #[command(after_help = "Example:\n  coordinator quantize exports/hf --format gguf:q4_k_m --out exports/")]
    Quantize(QuantizeArguments),
    /// Measure this machine
    #[command(subcommand, after_help = "Example:\n  coordinator bench body --weights bf16")]
    Bench(BenchCommand),
}

#[derive(Args)]
struct InitArguments {
    /// The directory to make
    home: PathBuf,
    /// HOST:PORT under which devices reach this coordinator; may be given several times, the first one is listened on
    #[arg(long, default_value = ADDRESS_DEFAULT, value_parser = address)]
    address: Vec<String>,
}

#[derive(Args)]
struct FetchArguments {
    /// A model of the catalogue; a wrong name lists it
    name: String,
    /// Where models are kept, each in a directory of its own
    #[arg(long, default_value = "models")]
    to: PathBuf,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct InviteArguments {
    /// The coordinator's home
    home: PathBuf,
    /// The device's name; with --count the first part of several names
    name: PeerName,
    /// Invite NAME-1, NAME-2, … up to this number, at most 65536
    #[arg(long, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    count: Option<u32>,
    /// The invitation's file, or with --count their directory [default: NAME.invite]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Make an earlier invitation of the same name worthless
    #[arg(long)]
    replace: bool,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct RevokeArguments {
    /// The coordinator's home
    home: PathBuf,
    /// The device's name
    name: PeerName,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct RenewCaArguments {
    /// The coordinator's home
    home: PathBuf,
    /// The root's key: the file ca.key that `coordinator init` has made
    #[arg(long, value_name = "FILE")]
    root_key: PathBuf,
}

#[derive(Subcommand)]
enum AuditLogCommand {
    /// Check that no line was changed, removed or moved
    #[command(after_help = "Example:\n  coordinator audit-log verify home/")]
    Verify(AuditLogArguments),
    /// Print it, verified
    #[command(after_help = "Example:\n  coordinator audit-log show home/")]
    Show(AuditLogArguments),
}

#[derive(Args)]
struct AuditLogArguments {
    /// The coordinator's home
    home: PathBuf,
    /// The hash of a line, as an earlier `verify` has printed it and somebody has kept it elsewhere
    #[arg(long, value_name = "HASH", value_parser = hash)]
    head: Option<String>,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct RunArguments {
    /// The experiment's TOML file
    experiment: PathBuf,
    /// The coordinator's home
    #[arg(long, default_value = "home")]
    home: PathBuf,
    /// Where run directories are made
    #[arg(long, default_value = "runs")]
    runs: PathBuf,
    /// Start from this PEFT adapter
    #[arg(long)]
    init_adapter: Option<PathBuf>,
    /// Print every metric as a JSON line
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct StatusArguments {
    /// The run's directory, such as runs/demo
    run: PathBuf,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ReportArguments {
    /// The run's directory, such as runs/demo
    run: PathBuf,
    /// The page [default: RUN/report.html]
    #[arg(long)]
    out: Option<PathBuf>,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ExportArguments {
    /// The run's directory, such as runs/demo
    run: PathBuf,
    #[command(flatten)]
    files: FileArguments,
    /// Importance matrices in GGUF, as llama-imatrix and `participant calibrate` write them; several are added up, and
    /// `federated` stands for all of the devices' in RUN/imatrix/
    #[arg(long, value_delimiter = ',', value_name = "FILE")]
    imatrix: Vec<PathBuf>,
    /// A finished round [default: the newest]
    #[arg(long, allow_negative_numbers = true)]
    round: Option<u32>,
}

#[derive(Args)]
struct QuantizeArguments {
    /// A Hugging Face directory or a GGUF file
    model: PathBuf,
    /// A PEFT adapter to merge into it
    #[arg(long)]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    files: FileArguments,
    /// Importance matrices in GGUF, as llama-imatrix and `participant calibrate` write them; several are added up
    #[arg(long, value_delimiter = ',', value_name = "FILE")]
    imatrix: Vec<PathBuf>,
}

#[derive(Args)]
struct FileArguments {
    /// hf, peft, or gguf: with f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0, iq4_nl,
    /// q3_k_l, q3_k_m, q3_k_s, q2_k, q2_k_s, tq2_0, tq1_0: llama-quantize's mixes of types
    #[arg(long, value_delimiter = ',', required_unless_present = "budget")]
    format: Vec<Format>,
    /// Also write model-budget.gguf, of so many bytes at most (60MB, 60MiB, or 25% of its size in f16): types are chosen for
    /// each tensor, by what errors in it cost
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    budget: Option<Budget>,
    /// How gguf files choose their codes
    #[arg(long, value_enum, default_value_t = Quantizer::Search)]
    quantizer: Quantizer,
    /// What the search measures activations on: text that the model writes (`self`), a text file, or `none`
    #[arg(long, default_value = "self", value_name = "self|none|FILE")]
    calibrate: String,
    /// The directory of the files; it is made if it is not there
    #[arg(long)]
    out: PathBuf,
    /// Replace files that are there
    #[arg(long)]
    force: bool,
    /// Compare the files' predictions with the model's on this text [default: one of ours]
    #[arg(long, value_name = "FILE")]
    check_text: Option<PathBuf>,
    /// Nats per token that a file's predictions may be off (KL) [default: by format, from 0.00001 for f32 to 3 for q2_k]
    #[arg(long, value_name = "NATS", allow_negative_numbers = true, value_parser = nats)]
    limit_kl: Option<f64>,
    /// Do not read the files back
    #[arg(long, conflicts_with_all = ["check_text", "limit_kl"])]
    no_check: bool,
    #[arg(long)]
    json: bool,
}

fn address(text: &str) -> Result<String, String> {
    net::check_address(text).map(|()| text.to_owned())
}

/// Beyond a number that is none, nothing ever is.
fn nats(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| "give a number of nats, 0 or more, such as 0.05".into())
}

impl FileArguments {
    fn options(&self, imatrix: Vec<PathBuf>) -> Options {
        let calibration = match self.calibrate.as_str() {
            "self" => Calibration::Own,
            "none" => Calibration::None,
            path => Calibration::Text(path.into()),
        };
        let check = match self.no_check {
            true => Checks::Skip,
            false => Checks::Compare { text: self.check_text.clone(), limit_nats: self.limit_kl },
        };
        let method = self.quantizer.into();
        Options { method, calibration, imatrix, force: self.force, check, budget: self.budget }
    }

    fn write(
        &self,
        imatrix: Vec<PathBuf>,
        write: impl FnOnce(&[Format], &Options) -> Result<Vec<Exported>, ExportError>,
    ) -> anyhow::Result<()> {
        let exported = write(&self.format, &self.options(imatrix)).map_err(failed)?;
        for exported in &exported {
            match self.json {
                true => print(serde_json::to_string(exported)?)?,
                false => print(exported)?,
            }
        }
        exported.iter().try_for_each(Exported::verdict).map_err(failed)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Quantizer {
    /// Look for the codes that lose least
    Search,
    /// Make the bytes that llama-quantize makes
    Reference,
}

impl From<Quantizer> for Method {
    fn from(quantizer: Quantizer) -> Method {
        match quantizer {
            Quantizer::Search => Method::Search,
            Quantizer::Reference => Method::Reference,
        }
    }
}

impl Cli {
    pub fn start_tracing(&self) {
        let ansi = std::io::stderr().is_terminal();
        let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
        let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi);
        if self.log_json { subscriber.json().init() } else { subscriber.with_target(false).init() }
    }

    /// Runs the command until it is done. `interrupted` stops a run in good order, and anything else at once.
    pub async fn run(self, interrupted: impl Future<Output = ()>) -> anyhow::Result<()> {
        if let Command::Run(arguments) = self.command {
            return run(arguments, interrupted).await;
        }
        let work = tokio::task::spawn_blocking(move || self.command.perform());
        tokio::select! {
            done = work => done.context("the command failed")?,
            () = interrupted => bail!("interrupted; files are whole under their names, or not there: run the same command again"),
        }
    }
}

impl Command {
    fn perform(self) -> anyhow::Result<()> {
        match self {
            Self::Init(InitArguments { home, address }) => {
                let home = Home::init(&home, address, OffsetDateTime::now_utc()).map_err(|error| match error {
                    // They are in no file yet.
                    HomeError::Addresses { reason, .. } => anyhow::anyhow!("failed to accept --address: {reason}"),
                    error => failed(error),
                })?;
                print(format_args!("{}: a CA, an identity and experiment.toml", home.path().display()))?;
                print(
                    "ca.key is needed again only for `coordinator renew-ca`: move it to a safe place, off this machine",
                )?;
                print(format_args!("next: coordinator invite {} NAME", quoted(home.path())))
            }
            Self::Fetch(FetchArguments { name, to, json }) => {
                let mut printed = Ok(());
                let mut tell = |line: &str| {
                    if !json && printed.is_ok() {
                        printed = print(line);
                    }
                };
                let fetched = fetch(&name, &to, &mut tell).map_err(failed)?;
                printed?;
                if json { print(serde_json::to_string(&fetched)?) } else { Ok(()) }
            }
            Self::Invite(arguments) => invite(arguments),
            Self::Revoke(RevokeArguments { home, name, json }) => {
                let home = Home::open(&home).map_err(failed)?;
                warn_of_audit_log(&home);
                let now = OffsetDateTime::now_utc();
                home.revoke(&name, now).map_err(failed)?;
                match json {
                    true => print(json!({"name": name.to_string(), "revoked_unix": now.unix_timestamp()})),
                    false => print(format_args!("{name} is revoked; a running coordinator closes its connection")),
                }
            }
            Self::RenewCa(RenewCaArguments { home, root_key }) => {
                let until = Home::renew_authority(&home, &root_key, OffsetDateTime::now_utc()).map_err(failed)?;
                let until = until.format(&Rfc3339)?;
                print(format_args!("{}: an issuing authority until {until}; restart the coordinator", home.display()))
            }
            Self::AuditLog(AuditLogCommand::Verify(AuditLogArguments { home, head, json })) => {
                let entries = Home::open(&home).and_then(|home| home.audit_log(head.as_deref())).map_err(failed)?;
                let (lines, last) = (entries.len(), entries.last().map_or("", |entry| &entry.hash));
                match json {
                    true => print(json!({"lines": lines, "head": last})),
                    false => print(format_args!("{lines} lines, none changed, removed or moved; the last is {last}")),
                }
            }
            Self::AuditLog(AuditLogCommand::Show(AuditLogArguments { home, head, json })) => {
                let entries = Home::open(&home).and_then(|home| home.audit_log(head.as_deref())).map_err(failed)?;
                entries.iter().try_for_each(|entry| match json {
                    true => print(serde_json::to_string(entry)?),
                    false => print(entry),
                })
            }
            Self::Run(_) => bail!("a run is not performed here"),
            Self::Status(StatusArguments { run, json }) => {
                let standing = status(&run).map_err(failed)?;
                match json {
                    true => print(serde_json::to_string(&standing)?),
                    false => print(standing.to_text(unix_ms()).trim_end()),
                }
            }
            Self::Bench(BenchCommand::Body(arguments)) => bench_body(arguments),
            Self::Report(ReportArguments { run, out, json }) => {
                let report = Report::of_run(&run).map_err(failed)?;
                let page = run.join(Report::PAGE);
                let out = out.unwrap_or_else(|| page.clone());
                let is_part = place(&out).zip(place(&run)).is_some_and(|(out, run)| out.starts_with(run));
                if is_part && place(&out) != place(&page) {
                    bail!("--out {} lies in the run, which it would damage; choose another path", out.display());
                }
                report.write_page(&out).map_err(failed)?;
                match json {
                    true => print(serde_json::to_string(&report.summary)?),
                    false => print(format_args!("{}\npage: {}", report.text.trim_end(), out.display())),
                }
            }
            Self::Export(ExportArguments { run, files, imatrix, round }) => {
                files.write(imatrix, |formats, options| export(&run, round, formats, options, &files.out))
            }
            Self::Quantize(QuantizeArguments { model, adapter, files, imatrix }) => files
                .write(imatrix, |formats, options| quantize(&model, adapter.as_deref(), formats, options, &files.out)),
        }
    }
}

fn invite(arguments: InviteArguments) -> anyhow::Result<()> {
    let InviteArguments { home, name, count, out, replace, json } = arguments;
    let home = Home::open(&home).map_err(failed)?;
    warn_of_audit_log(&home);
    let names = match count {
        None => vec![name],
        Some(count) => (1..=count).map(|i| PeerName::new(&format!("{name}-{i}"))).collect::<Result<Vec<_>, _>>()?,
    };
    for name in names {
        let path = match (&out, count) {
            (Some(directory), Some(_)) => directory.join(format!("{name}.invite")),
            (Some(file), None) => file.clone(),
            (None, _) => PathBuf::from(format!("{name}.invite")),
        };
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            let failed = || format!("cannot make the directory {}; give another --out", directory.display());
            // A directory of many files is made; that of one is there unless its path is mistyped.
            if count.is_some() {
                std::fs::create_dir_all(directory).with_context(failed)?;
            } else if !directory.is_dir() {
                bail!("failed to write {}: its directory is not there; make it, or give another --out", path.display());
            }
        }
        let file = InvitationFile::create(&path, &name, replace)?;
        let invitation = home.invite(&name, OffsetDateTime::now_utc(), INVITATION_VALID, replace).map_err(failed)?;
        file.write(&invitation)?;
        match json {
            true => {
                print(json!({"name": name.to_string(), "invitation": path, "expires_unix": invitation.expires_unix}))?
            }
            false => {
                print(format_args!("{}: good once, for a day; give it to {name} and nobody else", path.display()))?
            }
        }
    }
    Ok(())
}

/// Whoever adds to a log whose end was changed is told so; what is further back, `audit-log verify` finds.
fn warn_of_audit_log(home: &Home) {
    match home.check_audit_end() {
        Ok(()) => {}
        Err(HomeError::Audit { path, tampered }) => {
            let (path, home) = (path.display(), quoted(home.path()));
            tracing::warn!("{path}: {tampered}; look into it: coordinator audit-log verify {home}");
        }
        // What is to be added next fails for the same reason, and says so.
        Err(error) => tracing::debug!(%error, "the audit log is not looked at"),
    }
}

/// The path without links and dots; of a file that is not there yet, where it will be.
fn place(path: &Path) -> Option<PathBuf> {
    path.canonicalize().ok().or_else(|| {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some(directory.canonicalize().ok()?.join(path.file_name()?))
    })
}

async fn run(arguments: RunArguments, interrupted: impl Future<Output = ()>) -> anyhow::Result<()> {
    let RunArguments { experiment, home, runs, init_adapter, json } = arguments;
    let again = command_line(&experiment, &home, &runs);
    let run =
        Run { experiment, home, runs, init_adapter, journal: Default::default(), connections_max: CONNECTIONS_MAX };
    let watcher: Box<dyn Watcher> = if json { Box::new(JsonWatcher) } else { Box::new(LineWatcher::new()) };
    let Ended { directory, rounds, of, stopped } = run.run(watcher, interrupted).await?;
    if stopped && !json {
        print(format_args!("stopped after round {rounds} of {of}; nothing finished is lost. To go on:\n  {again}"))?;
    } else if !json {
        print(format_args!("next: coordinator report {}", quoted(&directory)))?;
    }
    Ok(())
}

/// What goes on with a run; its adapter is that of its newest round, so that no other one is named.
fn command_line(experiment: &Path, home: &Path, runs: &Path) -> String {
    format!("coordinator run {} --home {} --runs {}", quoted(experiment), quoted(home), quoted(runs))
}

/// A SHA-256 in hexadecimal digits.
fn hash(text: &str) -> Result<String, String> {
    match text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        true => Ok(text.to_owned()),
        false => Err("a hash has 64 hexadecimal digits".to_owned()),
    }
}

/// As a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    // A name with a zero byte, which there is none of.
    shlex::try_quote(&text).map_or(text.clone(), |quoted| quoted.into_owned())
}

/// For errors whose messages finish the sentence "failed to …".
fn failed(error: impl Display) -> anyhow::Error {
    anyhow::anyhow!("failed to {error}")
}

/// A line on the standard output. A full disk behind it is an error like any other, where `println!` would panic; a closed
/// pipe is none, because somebody has read enough.
fn print(line: impl Display) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        printed => printed.context("failed to print"),
    }
}

fn unix_ms() -> u64 {
    (OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000) as u64
}

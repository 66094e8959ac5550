//! `participant serve`.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::bench::{at_most, positive};
use super::infer::{ModelArguments, duration};
use super::print;
use crate::serve::{Limits, Server};

const QUEUE_MAX: usize = 65_536;

#[derive(Args)]
pub(super) struct ServeArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// What requests call the model without an adapter [default: the file's name]
    #[arg(long)]
    name: Option<String>,
    /// ADDRESS:PORT; who reaches it may ask anything, there are no passwords
    #[arg(long, default_value = "127.0.0.1:8080")]
    bind: SocketAddr,
    /// An answer ends after this time with what it has, unless its request says `deadline_ms`
    #[arg(long, value_parser = duration)]
    deadline: Option<Duration>,
    /// Tokens of an answer, unless its request says
    #[arg(long, default_value_t = 512, value_parser = positive)]
    max_tokens: usize,
    /// Answers that are made at the same time
    #[arg(long, default_value_t = Limits::default().answers, value_parser = positive)]
    concurrent: usize,
    /// Requests that wait for their turn; more are refused
    #[arg(long, default_value_t = Limits::default().waiting, value_parser = at_most::<QUEUE_MAX>)]
    queue: usize,
    /// A request that takes longer to come, head and body each, is given up, and so is who reads nothing of an answer for so long
    #[arg(long, value_parser = duration, default_value = "10s")]
    patience: Duration,
    /// For requests that give no seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Say where it listens as JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn serve(arguments: ServeArguments, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let ServeArguments { model, name, bind, deadline, max_tokens, concurrent, queue, patience, seed, json } = arguments;
    let base = name.unwrap_or_else(|| model.name());
    let runner = super::off_the_runtime(|| model.open(None))?;
    let listener = TcpListener::bind(bind).await.with_context(|| format!("failed to listen on {bind}; give --bind"))?;
    let address = listener.local_addr()?;
    let limits = Limits { answers: concurrent, waiting: queue, patience, ..Limits::default() };
    let serving = Server { runner, base, deadline, tokens_max: max_tokens, seed, limits, stop }.start(listener)?;
    // Who reads this may count on it.
    match json {
        true => print(json!({"event": "listening", "address": address.to_string(), "models": serving.models()}))?,
        false => {
            print(format_args!("listening on http://{address}/v1 (models: {})", serving.models().join(", ")))?;
        }
    }
    serving.run().await;
    Ok(())
}

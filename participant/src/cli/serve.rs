//! `participant serve`.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::bench::{at_most, positive};
use super::infer::{ModelArguments, duration};
use super::print;
use crate::serve::{Limits, Server, called_like_an_adapter};

const QUEUE_MAX: usize = 65_536;
const SEQUENCES_MAX: usize = 1024;

#[derive(Args)]
pub(super) struct ServeArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// What requests call the model without an adapter [default: the file's name]
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    name: Option<String>,
    /// ADDRESS:PORT; who reaches it may ask anything, there are no passwords
    #[arg(long, default_value = "127.0.0.1:8080", value_parser = address)]
    bind: SocketAddr,
    /// An answer ends after this time with what it has, unless its request says `deadline_ms`
    #[arg(long, allow_hyphen_values = true, value_parser = duration)]
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
    /// Prompts whose keys and values are kept, so that one which begins alike is not read from its first token; by the time it
    /// takes, a caller can tell that another's prompt began like its own. 0 keeps none [default: 4; none with the float engine]
    #[arg(long, value_parser = at_most::<SEQUENCES_MAX>)]
    sequences: Option<usize>,
    /// A request that takes longer to come, head and body each, is given up, and so is who reads nothing of an answer for so long
    #[arg(long, allow_hyphen_values = true, value_parser = duration, default_value = "10s")]
    patience: Duration,
    /// For requests that give no seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Say where it listens as JSON
    #[arg(long)]
    json: bool,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "give an address of this machine and a port, like 127.0.0.1:8080".into())
}

impl ServeArguments {
    /// What is given twice, or does not go together.
    pub(super) fn contradiction(&self) -> Option<String> {
        let base = self.base();
        let is_taken = self.model.has_adapter(&base);
        self.model.contradiction().or_else(|| is_taken.then(|| called_like_an_adapter(&base)))
    }

    fn base(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.model.name())
    }
}

pub(super) async fn serve(arguments: ServeArguments, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let base = arguments.base();
    let ServeArguments {
        model, bind, deadline, max_tokens, concurrent, queue, sequences, patience, seed, json, ..
    } = arguments;
    let runner = super::off_the_runtime(|| model.open(None))?;
    let bytes = runner.sequence_bytes();
    let sequences = match (sequences, bytes) {
        (Some(1..), None) => bail!("--sequences needs the integer engine: a GGUF file, and `--engine integer`"),
        (_, None) => 0,
        (asked, Some(_)) => asked.unwrap_or(Limits::default().sequences),
    };
    let [token_bytes, sequence_bytes] = bytes.unwrap_or_default();
    let listener = match TcpListener::bind(bind).await {
        Ok(listener) => listener,
        Err(error) => bail!("failed to listen on {bind}: {error}; give another --bind"),
    };
    let address = listener.local_addr()?;
    let limits = Limits { answers: concurrent, waiting: queue, sequences, patience, ..Limits::default() };
    let serving = Server { runner, base, deadline, tokens_max: max_tokens, seed, limits, stop }.start(listener)?;
    // Who reads this may count on it.
    match json {
        true => print(json!({
            "event": "listening", "address": address.to_string(), "models": serving.models(),
            "sequences": sequences, "token_bytes": token_bytes, "sequence_bytes_max": sequence_bytes,
        }))?,
        false => {
            if sequences > 0 {
                let (token, whole) = (token_bytes as f64 / 1e3, sequence_bytes as f64 / 1e6);
                print(format_args!(
                    "{sequences} prompts are kept: {token:.1} kB a token, at most {whole:.0} MB each, with their answers"
                ))?;
            }
            print(format_args!("listening on http://{address}/v1 (models: {})", serving.models().join(", ")))?;
        }
    }
    serving.run().await;
    Ok(())
}

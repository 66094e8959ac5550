//! What `coordinator run` prints as it goes: rows for a script, or lines and a bar for a person.

use std::io::IsTerminal;
use std::time::Instant;

use experiment::Row;
use indicatif::{ProgressBar, ProgressStyle};

use super::print;
use crate::report::units::{counted, printable};
use crate::run::Watcher;

/// Rows as JSON, one a line.
pub(super) struct JsonWatcher;

impl Watcher for JsonWatcher {
    fn row(&mut self, row: &Row) {
        // The row is in metrics.jsonl; a run does not end because nobody reads along any more.
        if let Ok(line) = serde_json::to_string(row) {
            let _ = print(line);
        }
    }

    fn note(&mut self, text: &str) {
        tracing::info!("{text}");
    }

    fn step(&mut self, _: u64, _: u64, _: f64) {}
}

/// Lines for a person, with a bar below them on a terminal.
pub(super) struct LineWatcher {
    bar: ProgressBar,
    /// Loss sum and count of the open round's evaluations.
    evaluated: (f64, u32, Option<u32>),
    bytes: std::collections::BTreeMap<String, u64>,
    began: Instant,
}

impl LineWatcher {
    pub(super) fn new() -> Self {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} steps, loss {msg}, {eta}");
        let bar = bar.with_style(style.expect("a template of ours"));
        Self { bar, evaluated: (0.0, 0, None), bytes: Default::default(), began: Instant::now() }
    }

    fn line(&self, text: &str) {
        // A run does not end because nobody reads along any more.
        // Some of it is a participant's word.
        let _ = self.bar.suspend(|| print(printable(text)));
    }

    fn tell_evaluation(&mut self) {
        if let (sum, count @ 1.., Some(round)) = std::mem::take(&mut self.evaluated) {
            let mean = sum / f64::from(count);
            let devices = counted(u64::from(count), "device");
            self.line(&format!("after round {round}: held-out loss {mean:.4} nats per token, mean of {devices}"));
        }
    }
}

impl Watcher for LineWatcher {
    fn row(&mut self, row: &Row) {
        match row {
            Row::Evaluation { round, loss_nats, .. } => {
                if self.evaluated.2.is_some_and(|known| known != *round) {
                    self.tell_evaluation();
                }
                let (sum, count, _) = self.evaluated;
                self.evaluated = (sum + loss_nats, count + 1, Some(*round));
            }
            Row::Round { round, members, loss_nats, tokens, duration_ms, aggregation_error, .. } => {
                self.tell_evaluation();
                let rate = *tokens as f64 / duration_ms * 1e3;
                let error =
                    aggregation_error.map(|error| format!(", aggregation error {error:.2e}")).unwrap_or_default();
                let updates = counted(members.len() as u64, "update");
                self.line(&format!(
                    "round {round}: loss {loss_nats:.4}, {updates}, {tokens} tokens at {rate:.0} tokens/s in {:.1} s{error}",
                    duration_ms / 1e3
                ));
            }
            Row::Bytes { participant, udp_sent, udp_received, .. } => {
                self.bytes.insert(participant.clone(), udp_sent + udp_received);
            }
            Row::Finished { rounds, reason, .. } => {
                self.tell_evaluation();
                self.bar.finish_and_clear();
                let bytes: u64 = self.bytes.values().sum();
                let megabytes = bytes as f64 / 1e6;
                let minutes = self.began.elapsed().as_secs_f64() / 60.0;
                let rounds = counted(u64::from(*rounds), "round");
                self.line(&format!("{reason}: {rounds}, {megabytes:.1} MB over the network, {minutes:.1} minutes"));
            }
            _ => {}
        }
    }

    fn note(&mut self, text: &str) {
        self.line(text);
    }

    fn evaluated(&mut self) {
        self.tell_evaluation();
    }

    fn step(&mut self, done: u64, all: u64, loss_nats: f64) {
        self.bar.set_length(all);
        self.bar.set_position(done);
        self.bar.set_message(format!("{loss_nats:.4}"));
    }
}

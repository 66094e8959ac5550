//! How fast this machine runs a GGUF file: load, prompt, token after token, memory.
//!
//! A token's latency is that of MLPerf's single-stream scenario: one request after the other, no batching.

use std::path::Path;
use std::time::{Duration, Instant};

use model::bench::process_bytes;
use quant::inference::{CacheType, bandwidth_gb_per_s};
use serde_json::{Value, json};

use crate::{ParticipantError, integer};

pub struct Workload {
    pub prompt_tokens: usize,
    pub tokens: usize,
    /// Tokens that are there already.
    pub depth: usize,
    pub cache: CacheType,
    /// 0 takes all cores.
    pub threads: usize,
    pub rounds: usize,
}

/// Rates are those of the best round: what else runs on the machine only ever takes away from it.
pub struct Measured {
    pub instructions: &'static str,
    pub threads: usize,
    /// From opening the file to weights that are ready.
    pub load_ms: f64,
    pub prompt_tokens_per_s: f64,
    pub decode_tokens_per_s: f64,
    /// Of all tokens of all rounds: half of them, 90, 99 and 99.9 % took no longer.
    pub latency_ms: [f64; 4],
    pub weight_bytes: usize,
    pub file_bytes: u64,
    pub kv_bytes: usize,
    pub bandwidth_gb_per_s: f64,
    /// The process' resident set, and its largest, before the bandwidth was measured; where the system tells.
    pub rss_bytes: Option<u64>,
    pub peak_rss_bytes: Option<u64>,
}

pub fn measure(path: &Path, workload: &Workload) -> Result<Measured, ParticipantError> {
    let Workload { prompt_tokens, tokens, depth, cache, threads, rounds } = *workload;
    let begun = Instant::now();
    let model = integer::load(path, threads)?.keeping(cache);
    let load = begun.elapsed();
    let engine = model.engine();
    let longest = depth + prompt_tokens.max(tokens);
    if longest > model.context() {
        let context = model.context();
        let what = format!("{longest} tokens exceed the model's context of {context}: ask for fewer");
        return Err(ParticipantError::Usage(what));
    }
    // Any tokens cost the same.
    let all: Vec<u32> = (0..longest).map(|i| ((i * 7919 + 13) % model.vocabulary()) as u32).collect();
    let mut session = model.session(longest);
    session.next(&all[..longest.min(depth.max(8))]);
    let (mut prompt, mut decode) = (Duration::MAX, Duration::MAX);
    let mut each = Vec::with_capacity(rounds * tokens);
    for _ in 0..rounds {
        session.truncate(depth);
        let begun = Instant::now();
        session.next(&all[depth..depth + prompt_tokens]);
        prompt = prompt.min(begun.elapsed());
        session.truncate(depth);
        let mut round = Duration::ZERO;
        for token in &all[depth..depth + tokens] {
            let begun = Instant::now();
            session.next(std::slice::from_ref(token));
            let latency = begun.elapsed();
            each.push(latency);
            round += latency;
        }
        decode = decode.min(round);
    }
    each.sort();
    Ok(Measured {
        instructions: engine.path().name(),
        threads: engine.threads(),
        load_ms: load.as_secs_f64() * 1e3,
        prompt_tokens_per_s: prompt_tokens as f64 / prompt.as_secs_f64(),
        decode_tokens_per_s: tokens as f64 / decode.as_secs_f64(),
        latency_ms: [0.5, 0.9, 0.99, 0.999].map(|share| percentile_ms(&each, share)),
        weight_bytes: model.bytes(),
        file_bytes: std::fs::metadata(path).map_err(ParticipantError::io(path))?.len(),
        kv_bytes: model.kv_bytes(longest),
        rss_bytes: process_bytes("VmRSS:"),
        peak_rss_bytes: process_bytes("VmHWM:"),
        bandwidth_gb_per_s: bandwidth_gb_per_s(engine),
    })
}

/// Of sorted times: what this share of them does not exceed.
pub(crate) fn percentile_ms(sorted: &[Duration], share: f64) -> f64 {
    let at = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).map_or(0.0, |time| time.as_secs_f64() * 1e3)
}

impl Measured {
    /// Weight bytes read per second, of what this machine reads at most.
    pub fn bandwidth_share(&self) -> f64 {
        self.weight_bytes as f64 * self.decode_tokens_per_s / 1e9 / self.bandwidth_gb_per_s
    }

    pub fn to_json(&self) -> Value {
        let [p50, p90, p99, p99_9] = self.latency_ms;
        json!({
            "instructions": self.instructions, "threads": self.threads, "load_ms": self.load_ms,
            "prompt_tokens_per_s": self.prompt_tokens_per_s, "decode_tokens_per_s": self.decode_tokens_per_s,
            "latency_ms": {"p50": p50, "p90": p90, "p99": p99, "p99.9": p99_9},
            "weight_bytes": self.weight_bytes, "file_bytes": self.file_bytes, "kv_bytes": self.kv_bytes,
            "rss_bytes": self.rss_bytes, "peak_rss_bytes": self.peak_rss_bytes,
            "bandwidth_gb_per_s": self.bandwidth_gb_per_s, "bandwidth_share": self.bandwidth_share(),
        })
    }

    pub fn to_text(&self) -> String {
        let [p50, p90, p99, p99_9] = self.latency_ms;
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let mut text = format!(
            "load {:.0} ms; prompt {:.0} tokens/s; decode {:.1} tokens/s ({} threads, {})\n\
             a token: p50 {p50:.2} ms, p90 {p90:.2} ms, p99 {p99:.2} ms, p99.9 {p99_9:.2} ms\n\
             weights {:.1} MB of a file of {:.1} MB, keys and values {:.1} MB; {:.0} % of {:.1} GB/s",
            self.load_ms,
            self.prompt_tokens_per_s,
            self.decode_tokens_per_s,
            self.threads,
            self.instructions,
            mb(self.weight_bytes as u64),
            mb(self.file_bytes),
            mb(self.kv_bytes as u64),
            100.0 * self.bandwidth_share(),
            self.bandwidth_gb_per_s,
        );
        if let (Some(rss), Some(peak)) = (self.rss_bytes, self.peak_rss_bytes) {
            text += &format!("; resident {:.1} MB, at most {:.1} MB", mb(rss), mb(peak));
        }
        text
    }
}

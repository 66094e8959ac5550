//! What many adapters on one base cost: memory, and the time to change from one to another.

use std::path::Path;
use std::time::Instant;

use model::Adapter;
use model::bench::process_bytes;
use serde_json::{Value, json};

use crate::ParticipantError;
use crate::bench_infer::percentile_ms;
use crate::integer;

pub struct Costs {
    pub adapters: usize,
    /// Of one adapter's factors.
    pub adapter_bytes: usize,
    /// The process' resident set with the base and a sequence, and with all adapters as well; where the system tells.
    pub base_rss_bytes: Option<u64>,
    pub rss_bytes: Option<u64>,
    /// From one adapter to the next: half of all changes took no longer, 90, 99, 99.9 %.
    pub switch_ms: [f64; 4],
    /// A token of the base alone, of one adapter again and again, and of another adapter each time, in the median.
    pub token_ms: [f64; 3],
}

/// `directory` is loaded `count` times, each time as an adapter of its own.
pub fn measure(
    path: &Path,
    directory: &Path,
    count: usize,
    switches: usize,
    threads: usize,
) -> Result<Costs, ParticipantError> {
    let model = integer::load(path, threads)?;
    let source = model::source::open(path)?;
    let config = source.config().clone();
    // What it holds is no part of the base.
    drop(source);
    let mut session = model.session(8);
    let prompt = [1, 2, 3];
    session.next(&prompt);
    session.next(&prompt[..1]);
    let base_rss_bytes = process_bytes("VmRSS:");
    let load = || integer::adapter(&model, &Adapter::load(directory, &config)?);
    let adapters: Vec<_> = (0..count).map(|_| load()).collect::<Result<_, ParticipantError>>()?;
    for adapter in &adapters {
        session.adapt(Some(adapter.clone()));
        session.next(&prompt);
    }
    let rss_bytes = process_bytes("VmRSS:");
    let mut token = |adapter: &dyn Fn(usize) -> Option<usize>| {
        let (mut changes, mut tokens) = (Vec::with_capacity(switches), Vec::with_capacity(switches));
        for i in 0..switches {
            let next = adapter(i).map(|i| adapters[i % count].clone());
            let begun = Instant::now();
            session.adapt(next);
            let changed = Instant::now();
            session.next(&prompt[..1]);
            tokens.push(changed.elapsed());
            changes.push(changed - begun);
        }
        changes.sort();
        tokens.sort();
        (changes, percentile_ms(&tokens, 0.5))
    };
    let (_, without) = token(&|_| None);
    let (_, same) = token(&|_| Some(0));
    let (changes, other) = token(&Some);
    Ok(Costs {
        adapters: count,
        adapter_bytes: adapters.first().map_or(0, |adapter| adapter.bytes()),
        base_rss_bytes,
        rss_bytes,
        switch_ms: [0.5, 0.9, 0.99, 0.999].map(|share| percentile_ms(&changes, share)),
        token_ms: [without, same, other],
    })
}

impl Costs {
    pub fn to_json(&self) -> Value {
        let ([p50, p90, p99, p99_9], [without, same, other]) = (self.switch_ms, self.token_ms);
        json!({
            "adapters": self.adapters, "adapter_bytes": self.adapter_bytes, "base_rss_bytes": self.base_rss_bytes,
            "rss_bytes": self.rss_bytes, "switch_ms": {"p50": p50, "p90": p90, "p99": p99, "p99.9": p99_9},
            "token_ms": {"base": without, "same_adapter": same, "another_adapter": other},
        })
    }

    pub fn to_text(&self) -> String {
        let ([p50, _, p99, p99_9], [without, same, other]) = (self.switch_ms, self.token_ms);
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let mut text = format!(
            "{} adapters of {:.2} MB; a change takes {p50:.4} ms, p99 {p99:.4} ms, p99.9 {p99_9:.4} ms\n\
             a token: {without:.2} ms without an adapter, {same:.2} ms with the same one, {other:.2} ms with another each time",
            self.adapters,
            mb(self.adapter_bytes as u64),
        );
        if let (Some(base), Some(all)) = (self.base_rss_bytes, self.rss_bytes) {
            text += &format!("\nresident {:.1} MB without adapters, {:.1} MB with all of them", mb(base), mb(all));
        }
        text
    }
}

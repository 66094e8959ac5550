//! Whether answers come in time: requests with deadlines, which come when they come, beside other work for the CPU if asked
//! for.
//!
//! They arrive as a Poisson process, as in MLPerf's server scenario, and are answered in order. An answer's time counts from
//! its request's arrival, whether anybody was awake or free by then or not. As in [`serve`](crate::serve), the engine has a
//! thread of its own, and another one sends the answer by its time, with what the engine has said so far.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use experiment::Seed;
use quant::inference::ask_for_short_turns;
use rand::Rng;
use rand_distr::Exp1;
use serde_json::{Value, json};

use crate::answer::Reserve;
use crate::bench_infer::percentile_ms;
use crate::sampler::{Sampler, Sampling};
use crate::{ParticipantError, integer};

pub struct Requests {
    pub deadline: Duration,
    /// From one request to the next, in the mean.
    pub gap: Duration,
    pub count: usize,
    pub prompt_tokens: usize,
    /// Of an answer at most.
    pub tokens: usize,
    /// 0 takes all cores.
    pub threads: usize,
    /// Threads that do nothing but take time.
    pub hogs: usize,
}

/// What the engine says of an answer.
enum Said {
    Token,
    End,
}

/// Later than the deadline by more than this is late.
pub const GRACE: Duration = Duration::from_millis(5);

pub struct InTime {
    pub requests: usize,
    /// Later than the deadline and [`GRACE`].
    pub late: usize,
    /// Without a single token: as good as no answer.
    pub missing: usize,
    pub tokens: usize,
    /// From a request to its answer: half of all took no longer, 90, 99, 99.9 %, none.
    pub answer_ms: [f64; 5],
    pub deadline_ms: f64,
    pub hogs: usize,
    pub threads: usize,
}

pub fn measure(path: &Path, requests: &Requests) -> Result<InTime, ParticipantError> {
    let Requests { deadline, gap, count, prompt_tokens, tokens, threads, hogs } = *requests;
    let model = integer::load(path, threads)?;
    if prompt_tokens + tokens > model.context() {
        let (all, context) = (prompt_tokens + tokens, model.context());
        let what = format!("prompt and answer of {all} tokens exceed the model's context of {context}");
        return Err(ParticipantError::Usage(what));
    }
    let prompt: Vec<u32> = (0..prompt_tokens).map(|i| ((i * 7919 + 13) % model.vocabulary()) as u32).collect();
    let mut session = model.session(prompt_tokens + tokens);
    session.next(&prompt);
    session.next(&prompt[..1]);
    let stop = AtomicBool::new(false);
    let mut reserve = Reserve::default();
    let (mut answers, mut missing, mut all) = (Vec::with_capacity(count), 0, 0);
    std::thread::scope(|scope| {
        for _ in 0..hogs {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let (asks, asked) = channel::<(usize, Instant)>();
        let (tells, told) = channel::<(usize, Said)>();
        let (model, prompt, session) = (&model, &prompt, &mut session);
        let engine = scope.spawn(move || {
            for (number, due) in asked {
                session.truncate(0);
                let mut sampler = Sampler::new(Sampling::default(), model.vocabulary());
                let mut logits = session.next_until(prompt, Some(due));
                let mut answer = 0;
                while let Some(found) = logits
                    && answer < tokens
                {
                    answer += 1;
                    let token = sampler.choose(found);
                    let _ = tells.send((number, Said::Token));
                    logits = session.next_until(&[token], Some(due));
                }
                let _ = tells.send((number, Said::End));
            }
        });
        ask_for_short_turns();
        let mut arrivals = Seed(0).generator("bench/arrivals");
        let mut begun = Instant::now();
        for number in 0..count {
            begun += gap.mul_f64(arrivals.sample::<f64, _>(Exp1));
            std::thread::sleep(begun.saturating_duration_since(Instant::now()));
            let due = reserve.due(begun, begun + deadline);
            let mut answer = 0;
            // An engine that has gone is told of below.
            let _ = asks.send((number, due));
            loop {
                match told.recv_timeout(due.saturating_duration_since(Instant::now())) {
                    Ok((of, _)) if of != number => {}
                    Ok((_, Said::Token)) => answer += 1,
                    Ok((_, Said::End)) | Err(_) => break,
                }
            }
            let ended = Instant::now();
            if ended >= due {
                reserve.ended(due, ended);
            }
            answers.push(ended - begun);
            missing += usize::from(answer == 0);
            all += answer;
        }
        drop(asks);
        stop.store(true, Ordering::Relaxed);
        engine.join().expect("the engine does not panic");
    });
    answers.sort();
    Ok(InTime {
        requests: count,
        late: answers.iter().filter(|&&answer| answer > deadline + GRACE).count(),
        missing,
        tokens: all,
        answer_ms: [0.5, 0.9, 0.99, 0.999, 1.0].map(|share| percentile_ms(&answers, share)),
        deadline_ms: deadline.as_secs_f64() * 1e3,
        hogs,
        threads: model.engine().threads(),
    })
}

impl InTime {
    pub fn to_json(&self) -> Value {
        let [p50, p90, p99, p99_9, max] = self.answer_ms;
        json!({
            "deadline_ms": self.deadline_ms, "requests": self.requests, "missing": self.missing, "late": self.late,
            "tokens": self.tokens, "hogs": self.hogs, "threads": self.threads,
            "answer_ms": {"p50": p50, "p90": p90, "p99": p99, "p99.9": p99_9, "max": max},
        })
    }

    pub fn to_text(&self) -> String {
        let Self { requests, late, missing, tokens, answer_ms, deadline_ms, hogs, threads } = self;
        let [p50, p90, p99, p99_9, max] = answer_ms;
        format!(
            "{requests} answers, {late} of them later than {deadline_ms:.0} ms and {} ms; {:.1} tokens each, {missing} without any\n\
             an answer: p50 {p50:.2} ms, p90 {p90:.2} ms, p99 {p99:.2} ms, p99.9 {p99_9:.2} ms, at most {max:.2} ms \
             ({threads} threads beside {hogs} that take time)",
            GRACE.as_millis(),
            *tokens as f64 / (*requests).max(1) as f64,
        )
    }
}

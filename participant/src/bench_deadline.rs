//! Whether answers come in time: requests with deadlines, which come when they come, beside other work for the CPU if asked
//! for.
//!
//! They arrive as a Poisson process, as in MLPerf's server scenario, and are answered in order. An answer's time counts from
//! its request's arrival, whether anybody was awake or free by then or not. As in [`serve`](crate::serve), the engine has a
//! thread of its own, which turns to a newcomer as soon as who is before it has a token, and another one sends the answer by
//! its time, with what the engine has said so far. Unlike there, the engine does not come back to who made room.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use experiment::Seed;
use quant::inference::ask_for_shortest_turns;
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
    /// Before the prompt, and kept from the request before.
    pub prefix_tokens: usize,
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

/// A request that waits for the rest of its answer.
struct Open {
    number: usize,
    begun: Instant,
    due: Instant,
    tokens: usize,
    first: Option<Duration>,
}

struct Ended {
    took: Duration,
    tokens: usize,
    /// When its first token came.
    first: Option<Duration>,
}

impl Open {
    fn token(&mut self, now: Instant) {
        self.tokens += 1;
        self.first.get_or_insert(now - self.begun);
    }

    fn end(self, now: Instant) -> Ended {
        Ended { took: now - self.begun, tokens: self.tokens, first: self.first }
    }
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
    /// From a request to its answer's first token, where it has one: half of these took no longer, 90, 99 %.
    pub first_ms: [f64; 3],
    /// From a request to its answer: half of all took no longer, 90, 99, 99.9 %, none.
    pub answer_ms: [f64; 5],
    pub deadline_ms: f64,
    pub prefix_tokens: usize,
    pub prompt_tokens: usize,
    pub hogs: usize,
    pub threads: usize,
}

pub fn measure(path: &Path, requests: &Requests) -> Result<InTime, ParticipantError> {
    let Requests { deadline, gap, count, prefix_tokens, prompt_tokens, tokens, threads, hogs } = *requests;
    let model = integer::load(path, threads)?;
    let (prompt_end, context) = (prefix_tokens + prompt_tokens, model.context());
    let all = prompt_end + tokens;
    if all > context {
        let what = format!("prompt and answer of {all} tokens exceed the model's context of {context}: ask for fewer");
        return Err(ParticipantError::Usage(what));
    }
    let prompt: Vec<u32> = (0..prompt_end).map(|i| ((i * 7919 + 13) % model.vocabulary()) as u32).collect();
    let mut session = model.session(all);
    session.next(&prompt);
    session.next(&prompt[..1]);
    let prompt = &prompt[prefix_tokens..];
    let stop = AtomicBool::new(false);
    let mut reserve = Reserve::default();
    let mut ended = Vec::with_capacity(count);
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
        let (model, session) = (&model, &mut session);
        let engine = scope.spawn(move || {
            let mut next = asked.recv().ok();
            while let Some((number, due)) = next.take() {
                session.truncate(prefix_tokens);
                let mut sampler = Sampler::new(Sampling::default(), model.vocabulary());
                let mut logits = session.prompt_until(prompt, Some(due));
                let (mut answer, mut is_over) = (0, true);
                while let Some(found) = logits {
                    answer += 1;
                    let token = sampler.choose(found);
                    let _ = tells.send((number, Said::Token));
                    // Who has something makes room for who has nothing, and ends in time with that.
                    next = asked.try_recv().ok();
                    is_over = next.is_none() || answer == tokens;
                    if next.is_some() || answer == tokens {
                        break;
                    }
                    logits = session.next_until(&[token], Some(due));
                }
                if is_over {
                    let _ = tells.send((number, Said::End));
                }
                if next.is_none() {
                    next = asked.recv().ok();
                }
            }
        });
        ask_for_shortest_turns();
        let mut arrivals = Seed(0).generator("bench/arrivals");
        let mut arrival = Instant::now();
        let mut open: Vec<Open> = Vec::new();
        for number in 0..=count {
            arrival += gap.mul_f64(arrivals.sample::<f64, _>(Exp1));
            // Behind the last request, its answer.
            let comes =
                |open: &[Open]| if number < count { Some(arrival) } else { open.iter().map(|open| open.due).max() };
            while let Some(until) = comes(&open) {
                let until = open.iter().map(|open| open.due).fold(until, Instant::min);
                let said = told.recv_timeout(until.saturating_duration_since(Instant::now()));
                let now = Instant::now();
                if let Ok((of, said)) = said
                    && let Some(at) = open.iter().position(|open| open.number == of)
                {
                    match said {
                        Said::Token => open[at].token(now),
                        Said::End => ended.push(open.swap_remove(at).end(now)),
                    }
                }
                while let Some(at) = open.iter().position(|open| open.due <= now) {
                    let over = open.swap_remove(at);
                    reserve.ended(over.due, now);
                    ended.push(over.end(now));
                }
                if number < count && arrival <= now {
                    break;
                }
            }
            if number < count {
                let due = reserve.due(arrival, arrival + deadline);
                open.push(Open { number, begun: arrival, due, tokens: 0, first: None });
                // An engine that has gone has no answer.
                let _ = asks.send((number, due));
            }
        }
        drop(asks);
        stop.store(true, Ordering::Relaxed);
        engine.join().expect("the engine does not panic");
    });
    let sorted = |time: fn(&Ended) -> Option<Duration>| {
        let mut times: Vec<Duration> = ended.iter().filter_map(time).collect();
        times.sort();
        times
    };
    let (answers, firsts) = (sorted(|ended| Some(ended.took)), sorted(|ended| ended.first));
    Ok(InTime {
        requests: count,
        late: answers.iter().filter(|&&answer| answer > deadline + GRACE).count(),
        missing: count - firsts.len(),
        tokens: ended.iter().map(|ended| ended.tokens).sum(),
        first_ms: [0.5, 0.9, 0.99].map(|share| percentile_ms(&firsts, share)),
        answer_ms: [0.5, 0.9, 0.99, 0.999, 1.0].map(|share| percentile_ms(&answers, share)),
        deadline_ms: deadline.as_secs_f64() * 1e3,
        prefix_tokens,
        prompt_tokens,
        hogs,
        threads: model.engine().threads(),
    })
}

impl InTime {
    pub fn to_json(&self) -> Value {
        let ([p50, p90, p99, p99_9, max], first) = (self.answer_ms, self.first_ms);
        json!({
            "deadline_ms": self.deadline_ms, "requests": self.requests, "missing": self.missing, "late": self.late,
            "tokens": self.tokens, "hogs": self.hogs, "threads": self.threads,
            "prefix_tokens": self.prefix_tokens, "prompt_tokens": self.prompt_tokens,
            "first_token_ms": {"p50": first[0], "p90": first[1], "p99": first[2]},
            "answer_ms": {"p50": p50, "p90": p90, "p99": p99, "p99.9": p99_9, "max": max},
        })
    }

    pub fn to_text(&self) -> String {
        let Self { requests, late, missing, tokens, deadline_ms, prefix_tokens, prompt_tokens, hogs, threads, .. } =
            self;
        let ([p50, p90, p99, p99_9, max], first) = (self.answer_ms, self.first_ms);
        let behind = match prefix_tokens {
            0 => String::new(),
            kept => format!(" behind {kept} kept ones"),
        };
        format!(
            "{requests} answers to {prompt_tokens} tokens{behind}, {late} of them later than {deadline_ms:.0} ms and {} ms; {:.1} \
             tokens each, {missing} without any\n\
             a first token: p50 {:.2} ms, p90 {:.2} ms, p99 {:.2} ms, where there is one\n\
             an answer: p50 {p50:.2} ms, p90 {p90:.2} ms, p99 {p99:.2} ms, p99.9 {p99_9:.2} ms, at most {max:.2} ms \
             ({threads} threads beside {hogs} that take time)",
            GRACE.as_millis(),
            *tokens as f64 / (*requests).max(1) as f64,
            first[0],
            first[1],
            first[2],
        )
    }
}

//! Prompts that begin like earlier ones: what is kept of these changes no answer.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use experiment::Seed;
use model::{Adapter, AdapterConfig};
use participant::answer::{Finish, Generated, Prompt, Request};
use participant::integer::Engine;
use participant::runner::{NamedAdapter, Runner};
use participant::sampler::Sampling;
use participant::sequences::Sequences;

use super::{Desk, SMOKE, smoke};

const TOKENS: usize = 12;

/// A model with two adapters that change its answers.
struct Kept {
    runner: Runner,
    sequences: Sequences,
}

impl Kept {
    fn new(most: usize) -> Self {
        let desk = Desk::new();
        desk.weights("base.gguf");
        let experiment = smoke(SMOKE);
        let source = model::source::of_experiment(&experiment).unwrap();
        let adapters = [1, 2].map(|seed| {
            let config = AdapterConfig::new(&experiment.adapter);
            let adapter = Adapter::seeded(config, source.config(), 0..source.config().blocks, Seed(seed)).unwrap();
            let step = |(i, x): (usize, f32)| x + ((i * 7919 + seed as usize * 31) % 101) as f32 / 500.0;
            let flat: Vec<f32> = adapter.flat().into_iter().enumerate().map(step).collect();
            let name = seed.to_string();
            let directory = desk.path(&name);
            adapter.with_flat(&flat).unwrap().save(&directory, "base").unwrap();
            NamedAdapter { name, directory }
        });
        let device = experiment::Device { threads: 2, ..experiment.device };
        let runner = Runner::open(&desk.path("base.gguf"), &adapters, &device, Some(Engine::Integer), None).unwrap();
        Self { runner, sequences: Sequences::new(most) }
    }

    fn context(&self) -> usize {
        self.runner.source.config().context
    }

    /// Any tokens, others for another seed.
    fn prompt(&self, length: usize, seed: usize) -> Vec<u32> {
        let vocabulary = self.runner.source.config().vocabulary;
        (0..length).map(|i| ((i * 7919 + seed * 104_729 + i * i * seed) % vocabulary) as u32).collect()
    }

    /// Nothing is kept for it, nor of it.
    fn answer(&self, request: &Request) -> Generated {
        self.runner.generate(request, |_| ControlFlow::Continue(())).unwrap()
    }

    /// The answer to a prompt is the one that nothing was kept for; behind so many kept tokens.
    fn check(&mut self, prompt: &[u32], adapter: Option<usize>, cached: usize) {
        let request = request(prompt, adapter);
        let expected = self.answer(&request);
        let mut answer = self.runner.answer_among(&request, None, &mut self.sequences, 0).unwrap();
        assert_eq!(answer.cached_tokens, cached);
        let finish = std::iter::repeat_with(|| answer.step(None).unwrap().finish).flatten().next();
        assert_eq!((&answer.tokens, finish), (&expected.tokens, Some(expected.finish)));
        self.sequences.keep(answer.into_kept().unwrap());
    }
}

/// Drawn from all tokens: any other logits would soon give another answer.
fn request(prompt: &[u32], adapter: Option<usize>) -> Request {
    let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
    let prompt = Prompt::Tokens(prompt.to_vec());
    Request { prompt, tokens_max: TOKENS, sampling, stops: Vec::new(), deadline: None, adapter, grammar: None }
}

#[test]
fn an_answer_is_the_same_behind_what_was_kept() {
    let mut kept = Kept::new(4);
    let first = kept.prompt(300, 1);
    kept.check(&first, None, 0);
    kept.check(&first, None, 299);
    let longer = [first.clone(), kept.prompt(40, 2)].concat();
    kept.check(&longer, None, 300);
    let diverging = [first[..200].to_vec(), kept.prompt(50, 3)].concat();
    kept.check(&diverging, None, 200);
    // A conversation goes on: the answer is a part of the next prompt, and its tokens are made again.
    let answer = kept.answer(&request(&diverging, None)).tokens;
    let second = [diverging, answer, kept.prompt(9, 4)].concat();
    kept.check(&second, None, 250);
    // Shorter than what is kept, down to a single token, which has nothing before its last.
    kept.check(&second[..150], None, 149);
    kept.check(&second[..1], None, 0);

    for adapter in [Some(0), Some(1)] {
        kept.check(&first, adapter, 0);
        kept.check(&first, adapter, 299);
    }
    let answers = [None, Some(0), Some(1)].map(|adapter| {
        let answer = kept.answer(&request(&first, adapter));
        answer.tokens
    });
    assert!(answers[0] != answers[1] && answers[1] != answers[2], "the adapters do something");
}

#[test]
fn an_answer_that_nobody_reads_ends() {
    let kept = Kept::new(0);
    let request = request(&kept.prompt(5, 1), None);
    let whole = kept.answer(&request);
    let mut pieces = 0;
    let first = |_: &str| {
        pieces += 1;
        ControlFlow::Break(())
    };
    let cut = kept.runner.generate(&request, first).unwrap();
    assert!(whole.tokens.len() > cut.tokens.len() && whole.tokens.starts_with(&cut.tokens), "{:?}", cut.tokens);
    assert!(whole.text.starts_with(&cut.text));
    assert_eq!((pieces, cut.finish), (1, Finish::Stopped));
}

#[test]
fn a_context_may_be_filled_behind_what_was_kept() {
    let mut kept = Kept::new(2);
    let context = kept.context();
    let full = kept.prompt(context, 1);
    kept.check(&full[..context - 3], None, 0);
    for length in [context - 2, context - 1, context, context] {
        kept.check(&full[..length], None, length - 1);
        let answer = kept.answer(&request(&full[..length], None));
        assert_eq!((answer.finish, answer.tokens.len()), (Finish::Context, context + 1 - length));
    }
    kept.check(&full[..context / 4 * 3], None, context / 4 * 3 - 1);
}

#[test]
fn what_ends_in_the_middle_of_its_prompt_leaves_what_it_has_read() {
    let mut kept = Kept::new(1);
    let long = kept.prompt(400, 1);
    let other = [long[..200].to_vec(), kept.prompt(120, 2)].concat();
    // Its caller goes away behind the first step.
    let mut answer = kept.runner.answer_among(&request(&long, None), None, &mut kept.sequences, 0).unwrap();
    assert_eq!(answer.step(None).unwrap().finish, None);
    kept.sequences.keep(answer.into_kept().unwrap());
    kept.check(&other, None, 128);
    // Somebody else's answer is due in the middle of a step, which then has not happened.
    let mut answer = kept.runner.answer_among(&request(&long, None), None, &mut kept.sequences, 0).unwrap();
    assert_eq!(answer.cached_tokens, 200);
    for _ in 0..10 {
        answer.step(Some(Instant::now())).unwrap();
    }
    kept.sequences.keep(answer.into_kept().unwrap());
    kept.check(&long, None, 200);
    // Its own deadline passes anywhere: in the prompt, or in the answer.
    kept.check(&other, None, 200);
    for micros in [0, 50, 100, 200, 300, 500, 700, 1000, 1500, 2000, 3000, 5000, 10_000] {
        let due = Instant::now() + Duration::from_micros(micros);
        let mut answer = kept.runner.answer_among(&request(&long, None), Some(due), &mut kept.sequences, 0).unwrap();
        assert_eq!(answer.cached_tokens, 200);
        while answer.step(None).unwrap().finish.is_none() {}
        kept.sequences.keep(answer.into_kept().unwrap());
        kept.check(&other, None, 200);
    }
}

#[test]
fn the_longest_common_beginning_is_taken_and_the_least_recently_used_goes_first() {
    let mut kept = Kept::new(2);
    let [one, two, three] = [1, 2, 3].map(|seed| kept.prompt(100, seed));
    kept.check(&one, None, 0);
    kept.check(&two, None, 0);
    kept.check(&one, None, 99);
    // In the place of the second.
    kept.check(&three, None, 0);
    kept.check(&one, None, 99);
    kept.check(&two, None, 0);
    // Two that begin alike; the longer beginning counts.
    let branch = [one[..60].to_vec(), kept.prompt(40, 5)].concat();
    let mut kept = Kept::new(3);
    let both = [&one, &branch].map(|prompt| {
        let mut answer = kept.runner.answer_among(&request(prompt, None), None, &mut kept.sequences, 0).unwrap();
        answer.step(None).unwrap();
        answer.into_kept().unwrap()
    });
    both.into_iter().for_each(|one| kept.sequences.keep(one));
    kept.check(&one, None, 99);
    kept.check(&branch, None, 99);
    // A few words in common do not cost a conversation its place, as long as there is room, be the prompt nothing but these.
    let few = [one[..10].to_vec(), kept.prompt(90, 7)].concat();
    kept.check(&few, None, 0);
    for prompt in [&one, &branch, &few] {
        kept.check(prompt, None, 99);
    }
    let mut kept = Kept::new(2);
    kept.check(&one, None, 0);
    kept.check(&one[..20], None, 0);
    kept.check(&one, None, 99);
    // Those that are lent take room as well.
    let mut kept = Kept::new(2);
    kept.check(&one, None, 0);
    let lent = kept.runner.answer_among(&request(&two, None), None, &mut kept.sequences, 1).unwrap();
    kept.sequences.keep(lent.into_kept().unwrap());
    kept.check(&one, None, 0);
}

#[test]
fn nothing_is_kept_where_nothing_may_be() {
    let mut kept = Kept::new(0);
    let prompt = kept.prompt(50, 1);
    kept.check(&prompt, None, 0);
    kept.check(&prompt, None, 0);
}

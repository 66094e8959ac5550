//! One answer, a step at a time: who asks for several takes steps of each in turn, and any of them can end in time with what
//! it has.

use std::time::{Duration, Instant};

use model::tokenizer::{DecodeStream, Message, Tokenizer};

use crate::ParticipantError;
use crate::runner::{Runner, Sequence};
use crate::sampler::{Sampler, Sampling};
use crate::stop::StopStrings;

/// What to answer. No `Debug`, because text is never logged.
#[derive(Clone)]
pub enum Prompt {
    /// Continued as it is.
    Text(String),
    /// Through the model's chat template.
    Chat(Vec<Message>),
}

#[derive(Clone)]
pub struct Request {
    pub prompt: Prompt,
    /// Of the answer.
    pub tokens_max: usize,
    pub sampling: Sampling,
    /// Strings that end the answer, and are no part of it.
    pub stops: Vec<String>,
    /// The answer ends by then with what it has: nothing, perhaps.
    pub deadline: Option<Instant>,
    /// By its place in [`Runner::adapters`].
    pub adapter: Option<usize>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    Ended,
    /// A stop string came.
    Stopped,
    /// It has as many tokens as were asked for.
    Length,
    /// Prompt and answer fill the model's context.
    Context,
    Deadline,
}

impl Finish {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ended => "ended",
            Self::Stopped => "stopped",
            Self::Length => "length",
            Self::Context => "context",
            Self::Deadline => "deadline",
        }
    }
}

/// An answer on its way.
pub struct Answer<'a> {
    sequence: Sequence<'a>,
    tokenizer: &'a Tokenizer,
    sampler: Sampler,
    text: Option<(DecodeStream<'a>, StopStrings)>,
    /// Tokens that the model has not seen, and how many of them it takes at once.
    input: Vec<u32>,
    chunk: usize,
    room: usize,
    /// When its last step is broken off.
    due: Option<Instant>,
    tokens_max: usize,
    pub prompt_tokens: usize,
    pub tokens: Vec<u32>,
}

pub struct Step {
    /// Whole characters, often none.
    pub text: String,
    /// Set once, by the last step.
    pub finish: Option<Finish>,
}

/// Prompt tokens of a step at most: as many as the kernels take at once.
const CHUNK: usize = 128;

/// So long before a deadline a step is broken off: for the step to end, and for the text to go out. On a busy machine a
/// thread loses its core for milliseconds, so it is as long as steps have lately ended behind their time, and a quarter more.
#[derive(Clone, Copy, Debug)]
pub struct Reserve(Duration);

impl Default for Reserve {
    fn default() -> Self {
        Self(Duration::from_millis(2))
    }
}

impl Reserve {
    const LEAST: Duration = Duration::from_millis(1);

    /// When the last step towards a deadline that was set at `begun` ends: at least half of the time is for steps.
    pub fn due(self, begun: Instant, deadline: Instant) -> Instant {
        let whole = deadline.saturating_duration_since(begun);
        begun + (whole - self.0.min(whole / 2))
    }

    /// A step was to end at `due`, and has ended now.
    pub fn ended(&mut self, due: Instant, now: Instant) {
        let late = now.saturating_duration_since(due);
        // What was late once may be again for the next few hundred answers.
        self.0 = (late + late / 4).max(self.0 - self.0 / 256).max(Self::LEAST);
    }
}

impl Runner {
    /// The tokens of a prompt.
    ///
    /// # Errors
    /// If there are none, or more than the model's context holds, or it has no chat template that renders.
    fn prompt(&self, prompt: &Prompt) -> Result<Vec<u32>, ParticipantError> {
        let tokenizer = self.source.tokenizer();
        let mut tokens: Vec<u32> = match prompt {
            Prompt::Text(text) => tokenizer.text_prefix().into_iter().chain(tokenizer.encode(text, true)?).collect(),
            Prompt::Chat(_) if tokenizer.settings().chat_template.is_none() => {
                let what =
                    "the model has no chat template; give the prompt to it as it is: `--raw`, or /v1/completions";
                return Err(ParticipantError::Usage(what.into()));
            }
            Prompt::Chat(messages) => tokenizer.encode(&tokenizer.chat(messages, true)?, true)?,
        };
        if tokens.is_empty() {
            tokens.extend(tokenizer.settings().bos);
        }
        // The last token is never an input.
        let context = self.source.config().context;
        match tokens.len() {
            0 => Err(ParticipantError::Usage("the prompt has no token; give it some text".into())),
            length if length > context => {
                let what = format!("the prompt has {length} tokens, more than the model's context of {context}");
                Err(ParticipantError::Usage(what))
            }
            _ => Ok(tokens),
        }
    }

    /// Begins an answer that has to end at `due`; the request's numbers have been checked.
    pub fn answer(&self, request: &Request, due: Option<Instant>) -> Result<Answer<'_>, ParticipantError> {
        let Request { prompt, tokens_max, sampling, stops, deadline: _, adapter } = request;
        if due.is_some() && !self.keeps_deadlines() {
            let what = "a deadline needs the integer engine: a GGUF file, and `--engine integer`";
            return Err(ParticipantError::Usage(what.into()));
        }
        let input = self.prompt(prompt)?;
        let (tokenizer, config) = (self.source.tokenizer(), self.source.config());
        let mut sampler = Sampler::new(sampling.clone(), config.vocabulary);
        sampler.note(&input);
        Ok(Answer {
            sequence: self.sequence(input.len().saturating_add(*tokens_max).min(config.context), *adapter),
            tokenizer,
            sampler,
            text: Some((tokenizer.decode_stream(), StopStrings::new(stops.iter().cloned()))),
            prompt_tokens: input.len(),
            chunk: CHUNK,
            room: config.context + 1 - input.len(),
            input,
            due,
            tokens_max: *tokens_max,
            tokens: Vec::new(),
        })
    }

    /// A whole answer; `emit` is called with every piece of text as soon as it is whole.
    pub fn generate(&self, request: &Request, mut emit: impl FnMut(&str)) -> Result<Generated, ParticipantError> {
        let due = request.deadline.map(|deadline| Reserve::default().due(Instant::now(), deadline));
        let mut answer = self.answer(request, due)?;
        let mut text = String::new();
        loop {
            let Step { text: piece, finish } = answer.step(None)?;
            emit(&piece);
            text.push_str(&piece);
            if let Some(finish) = finish {
                let Answer { prompt_tokens, tokens, .. } = answer;
                return Ok(Generated { text, prompt_tokens, tokens, finish });
            }
        }
    }
}

pub struct Generated {
    pub text: String,
    pub prompt_tokens: usize,
    pub tokens: Vec<u32>,
    pub finish: Finish,
}

impl Answer<'_> {
    /// When it has to end, if it has to.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// A part of the prompt, or one token. Where another answer is due at `until`, the step is broken off by then, and
    /// nothing has happened.
    pub fn step(&mut self, until: Option<Instant>) -> Result<Step, ParticipantError> {
        if self.tokens.len() >= self.tokens_max.min(self.room) {
            let finish = if self.tokens.len() >= self.tokens_max { Finish::Length } else { Finish::Context };
            return Ok(self.finish(String::new(), finish));
        }
        let first = until.into_iter().chain(self.due).min();
        let count = self.chunk.min(self.input.len());
        let Some(logits) = self.sequence.next(&self.input[..count], first)? else {
            // Smaller steps fit between others' deadlines.
            self.chunk = (count / 2).max(1);
            let due = self.due.is_some() && self.due == first;
            return Ok(match due {
                true => self.finish(String::new(), Finish::Deadline),
                false => Step { text: String::new(), finish: None },
            });
        };
        self.chunk = CHUNK;
        if count < self.input.len() {
            self.input.drain(..count);
            return Ok(Step { text: String::new(), finish: None });
        }
        let token = self.sampler.choose(logits);
        if self.tokenizer.settings().eos.contains(&token) {
            return Ok(self.finish(String::new(), Finish::Ended));
        }
        self.sampler.note(&[token]);
        self.tokens.push(token);
        self.input.clear();
        self.input.push(token);
        let (stream, stops) = self.text.as_mut().expect("an answer that has not ended");
        let (text, stopped) = stops.push(&stream.push(token)?);
        if stopped {
            self.text = None;
            return Ok(Step { text, finish: Some(Finish::Stopped) });
        }
        Ok(match self.tokens.len() >= self.tokens_max {
            true => self.finish(text, Finish::Length),
            false => Step { text, finish: None },
        })
    }

    /// Ends the answer, with the text that was held back.
    pub fn finish(&mut self, mut text: String, finish: Finish) -> Step {
        if let Some((stream, mut stops)) = self.text.take() {
            let (rest, stopped) = stops.push(&stream.finish());
            text.push_str(&rest);
            if !stopped {
                text.push_str(&stops.finish());
            }
        }
        Step { text, finish: Some(finish) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_follows_what_was_late_and_leaves_half_of_the_time() {
        let begun = Instant::now();
        let ms = Duration::from_millis;
        let left = |reserve: Reserve, whole: u64| reserve.due(begun, begun + ms(whole)) - begun;
        let mut reserve = Reserve::default();
        assert_eq!(left(reserve, 100), ms(98));
        reserve.ended(begun, begun + ms(8));
        assert_eq!(left(reserve, 100), ms(90));
        assert_eq!(left(reserve, 12), ms(6));
        // A deadline that has passed is due at once.
        assert_eq!(reserve.due(begun, begun), begun);
        (0..5000).for_each(|_| reserve.ended(begun, begun));
        assert_eq!(left(reserve, 100), ms(99));
    }
}

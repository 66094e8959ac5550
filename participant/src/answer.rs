//! One answer, a step at a time: who asks for several takes steps of each in turn, and any of them can end in time with what
//! it has.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::Source;
use model::tokenizer::{DecodeStream, Message, Tokenizer};

use crate::ParticipantError;
use crate::grammar::{Allowed, Grammar, Matcher, Spelling};
use crate::runner::{Runner, Sequence};
use crate::sampler::{Sampler, Sampling};
use crate::sequences::{Kept, Sequences};
use crate::stop::StopStrings;

/// What to answer. No `Debug`, because text is never logged.
#[derive(Clone)]
pub enum Prompt {
    /// Continued as it is.
    Text(String),
    /// Through the model's chat template.
    Chat(Vec<Message>),
    /// What [`encode`](Self::encode) has made of one of the others.
    Tokens(Vec<u32>),
}

#[derive(Clone)]
pub struct Request {
    pub prompt: Prompt,
    /// Of the answer.
    pub tokens_max: usize,
    pub sampling: Sampling,
    /// Strings that end the answer, and are no part of it; none is empty.
    pub stops: Vec<String>,
    /// The answer ends by then with what it has: nothing, perhaps.
    pub deadline: Option<Instant>,
    /// By its place in [`Runner::adapters`].
    pub adapter: Option<usize>,
    /// What the answer has to be. One that ends early, by its length or its deadline, is the beginning of such a text.
    pub grammar: Option<Arc<Grammar>>,
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
    /// Its server ends.
    Shutdown,
}

impl Finish {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ended => "ended",
            Self::Stopped => "stopped",
            Self::Length => "length",
            Self::Context => "context",
            Self::Deadline => "deadline",
            Self::Shutdown => "shutdown",
        }
    }
}

/// An answer on its way.
pub struct Answer<'a> {
    sequence: Sequence<'a>,
    tokenizer: &'a Tokenizer,
    sampler: Sampler,
    form: Option<Form<'a>>,
    text: Option<(DecodeStream<'a>, StopStrings)>,
    prompt: Vec<u32>,
    /// Tokens of the prompt that the model has seen, and how many of them it takes at once.
    seen: usize,
    chunk: usize,
    room: usize,
    /// When its last step is broken off.
    due: Option<Instant>,
    tokens_max: usize,
    /// Tokens of the prompt that a kept sequence had seen before.
    pub cached_tokens: usize,
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

impl Prompt {
    /// Its tokens, which takes time for long ones.
    ///
    /// # Errors
    /// If there are none, or more than the model's context holds, or it has no chat template that renders.
    pub fn encode(&self, source: &dyn Source) -> Result<Vec<u32>, ParticipantError> {
        let (tokenizer, context) = (source.tokenizer(), source.config().context);
        let encode = |text: &str| {
            check_beginning(tokenizer, text, context)?;
            Ok::<_, ParticipantError>(tokenizer.encode(text, true)?)
        };
        let mut tokens: Vec<u32> = match self {
            Self::Tokens(tokens) => tokens.clone(),
            Self::Text(text) => tokenizer.text_prefix().into_iter().chain(encode(text)?).collect(),
            Self::Chat(_) if tokenizer.settings().chat_template.is_none() => {
                let what =
                    "the model has no chat template; give the prompt to it as it is: `--raw`, or /v1/completions";
                return Err(ParticipantError::Usage(what.into()));
            }
            Self::Chat(messages) => encode(&tokenizer.chat(messages, true)?)?,
        };
        if tokens.is_empty() {
            tokens.extend(tokenizer.settings().bos);
        }
        // The last token is never an input.
        match tokens.len() {
            0 => Err(ParticipantError::Usage("the prompt has no token; give it some text".into())),
            length if length > context => Err(too_long("has", length, context)),
            _ => Ok(tokens),
        }
    }
}

/// Bytes of a text's beginning for each token of a context: few texts have as many.
const BYTES_PER_TOKEN: usize = 8;

/// Refuses a text of which the beginning alone has more tokens than the context, before all of it is encoded.
fn check_beginning(tokenizer: &Tokenizer, text: &str, context: usize) -> Result<(), ParticipantError> {
    let most = context.saturating_mul(BYTES_PER_TOKEN);
    if text.len() <= 2 * most {
        return Ok(());
    }
    // A single space between letters begins a word, with any of our rules: words before it have the same tokens in the whole.
    let bytes = text.as_bytes();
    let begins = |at: &usize| {
        bytes[*at] == b' ' && bytes[at - 1].is_ascii_alphanumeric() && bytes[at + 1].is_ascii_alphanumeric()
    };
    let Some(end) = (1..most).rev().find(begins) else { return Ok(()) };
    match tokenizer.encode(&text[..end], true)?.len() {
        count if count > context => Err(too_long("begins with", count, context)),
        _ => Ok(()),
    }
}

fn too_long(has: &str, count: usize, context: usize) -> ParticipantError {
    let what =
        format!("the prompt {has} {count} tokens, more than the model's context of {context}; give a shorter one");
    ParticipantError::Usage(what)
}

impl Runner {
    /// Begins an answer that has to end at `due`; the request's numbers have been checked.
    pub fn answer(&self, request: &Request, due: Option<Instant>) -> Result<Answer<'_>, ParticipantError> {
        self.answer_among(request, due, &mut Sequences::new(0), 0)
    }

    /// The same, behind the longest beginning of its prompt that is kept; `lent` other answers have sequences of these.
    pub fn answer_among(
        &self,
        request: &Request,
        due: Option<Instant>,
        sequences: &mut Sequences,
        lent: usize,
    ) -> Result<Answer<'_>, ParticipantError> {
        let Request { prompt, tokens_max, sampling, stops, deadline: _, adapter, grammar } = request;
        if due.is_some() && !self.keeps_deadlines() {
            let what = "a deadline needs the integer engine: a GGUF file, and `--engine integer`";
            return Err(ParticipantError::Usage(what.into()));
        }
        let prompt = prompt.encode(&*self.source)?;
        let (tokenizer, config) = (self.source.tokenizer(), self.source.config());
        let mut sampler = Sampler::new(sampling.clone(), config.vocabulary);
        sampler.note(&prompt);
        let all = prompt.len().saturating_add(*tokens_max).min(config.context);
        let (sequence, cached_tokens) = sequences.begin(self, &prompt, all, *adapter, lent);
        Ok(Answer {
            sequence,
            tokenizer,
            sampler,
            form: grammar.as_ref().map(|grammar| Form::new(self.spelling(), grammar)),
            text: Some((tokenizer.decode_stream(), StopStrings::new(stops.clone()))),
            room: config.context + 1 - prompt.len(),
            prompt,
            seen: cached_tokens,
            chunk: CHUNK,
            due,
            tokens_max: *tokens_max,
            cached_tokens,
            tokens: Vec::new(),
        })
    }

    /// A whole answer; `emit` is called with every piece of text as soon as it is whole, until it says that nobody wants more.
    pub fn generate(
        &self,
        request: &Request,
        mut emit: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generated, ParticipantError> {
        let due = request.deadline.map(|deadline| Reserve::default().due(Instant::now(), deadline));
        let mut answer = self.answer(request, due)?;
        let mut text = String::new();
        loop {
            let Step { text: piece, finish } = answer.step(None)?;
            let unwanted = emit(&piece).is_break();
            text.push_str(&piece);
            if let Some(finish) = finish.or(unwanted.then_some(Finish::Stopped)) {
                let prompt_tokens = answer.prompt_tokens();
                return Ok(Generated { text, prompt_tokens, tokens: answer.tokens, finish });
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
    pub fn prompt_tokens(&self) -> usize {
        self.prompt.len()
    }

    /// Whether the next step may bring the first token.
    pub(crate) fn begins_with_this_step(&self) -> bool {
        self.tokens.is_empty() && self.prompt.len() - self.seen <= self.chunk
    }

    /// What the model has seen of the prompt, for those that begin alike; wherever the answer stands, and however it ended.
    pub fn into_kept(self) -> Option<Kept> {
        let Self { sequence, mut prompt, seen, .. } = self;
        prompt.truncate(seen);
        match sequence {
            Sequence::Integer(session) => Some(Kept { session, tokens: prompt }),
            Sequence::Float { .. } => None,
        }
    }

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
        // A step that was broken off behind the model's part has its logits.
        let logits = if self.form.as_ref().is_some_and(|form| form.waits) {
            &[]
        } else {
            let rest = &self.prompt[self.seen..];
            let count = self.chunk.min(rest.len());
            let found = match self.tokens.last() {
                Some(&token) => self.sequence.next(token, first)?,
                None => self.sequence.prompt(&rest[..count], first)?,
            };
            let Some(logits) = found else {
                // Smaller steps fit between others' deadlines.
                self.chunk = (count / 2).max(1);
                return Ok(self.broken_off(first));
            };
            self.chunk = CHUNK;
            self.seen += count;
            if self.seen < self.prompt.len() {
                return Ok(Step { text: String::new(), finish: None });
            }
            if let Some(form) = &mut self.form {
                form.take(logits);
            }
            logits
        };
        let logits = match &mut self.form {
            Some(form) => match form.restrict(first)? {
                Restricted::To(logits) => logits,
                Restricted::ToNothing => return Ok(self.finish(String::new(), Finish::Ended)),
                Restricted::NotInTime => return Ok(self.broken_off(first)),
            },
            None => logits,
        };
        // A model may have more rows than there are tokens.
        let token = self.sampler.choose(&logits[..logits.len().min(self.tokenizer.vocabulary_size() as usize)]);
        if self.tokenizer.settings().eos.contains(&token) {
            return Ok(self.finish(String::new(), Finish::Ended));
        }
        self.sampler.note(&[token]);
        self.tokens.push(token);
        let (stream, stops) = self.text.as_mut().expect("an answer that has not ended");
        let (text, stopped) = stops.push(&stream.push(token)?);
        if stopped {
            self.text = None;
            return Ok(Step { text, finish: Some(Finish::Stopped) });
        }
        if let Some(form) = &mut self.form {
            form.push(&self.tokenizer.token_bytes(token)?)?;
            if form.matcher.is_over() {
                return Ok(self.finish(text, Finish::Ended));
            }
        }
        Ok(match self.tokens.len() >= self.tokens_max {
            true => self.finish(text, Finish::Length),
            false => Step { text, finish: None },
        })
    }

    /// A step that has not come to its end by `first`: the last one, where this answer is due itself.
    fn broken_off(&mut self, first: Option<Instant>) -> Step {
        match self.due.is_some() && self.due == first {
            true => self.finish(String::new(), Finish::Deadline),
            false => Step { text: String::new(), finish: None },
        }
    }

    /// Ends the answer, with the text that was held back.
    pub fn finish(&mut self, mut text: String, finish: Finish) -> Step {
        if let Some((stream, mut stops)) = self.text.take() {
            // A character that an answer breaks off in is not a wrong one.
            let (rest, stopped) = match finish {
                Finish::Ended | Finish::Stopped => stops.push(&stream.finish()),
                Finish::Length | Finish::Context | Finish::Deadline | Finish::Shutdown => Default::default(),
            };
            text.push_str(&rest);
            if !stopped {
                text.push_str(&stops.finish());
            }
        }
        Step { text, finish: Some(finish) }
    }
}

/// An answer's grammar, and where it stands.
struct Form<'a> {
    spelling: &'a Spelling,
    matcher: Matcher,
    allowed: Allowed,
    logits: Vec<f32>,
    /// Whether the logits wait for being restricted.
    waits: bool,
}

enum Restricted<'a> {
    To(&'a [f32]),
    /// The answer is whole, nothing can follow, and the model has no token to say so.
    ToNothing,
    NotInTime,
}

impl<'a> Form<'a> {
    fn new(spelling: &'a Spelling, grammar: &Arc<Grammar>) -> Self {
        let matcher = Matcher::new(grammar.clone());
        Self { spelling, matcher, allowed: Allowed::default(), logits: Vec::new(), waits: false }
    }

    fn take(&mut self, logits: &[f32]) {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        self.waits = true;
    }

    /// The logits that were taken; tokens that are not allowed are impossible.
    fn restrict(&mut self, until: Option<Instant>) -> Result<Restricted<'_>, ParticipantError> {
        let Self { spelling, matcher, allowed, logits, waits } = self;
        if !spelling.allowed(matcher, until, allowed) {
            return Ok(Restricted::NotInTime);
        }
        *waits = false;
        for (logit, token) in logits.iter_mut().zip(0..) {
            *logit = match allowed.holds(token) {
                // One that is no number is as unlikely as can be, but not impossible.
                true => logit.max(f32::MIN),
                false => f32::NEG_INFINITY,
            };
        }
        match logits.iter().any(|&logit| logit > f32::NEG_INFINITY) {
            true => Ok(Restricted::To(logits)),
            false if matcher.may_end() => Ok(Restricted::ToNothing),
            false => {
                let what = "the model has no token with which the answer could go on as its grammar demands: a schema that \
                            contains itself without an end has no answer";
                Err(ParticipantError::Usage(what.into()))
            }
        }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), ParticipantError> {
        match self.matcher.push(bytes) {
            true => Ok(()),
            false => {
                let what = "the answer can be read as its schema's alternatives in too many ways; give a schema whose \
                            alternatives differ early, like objects by their first property";
                Err(ParticipantError::Usage(what.into()))
            }
        }
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

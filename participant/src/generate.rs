//! Text from a model on this device, token by token.

use std::path::Path;
use std::sync::Arc;

use experiment::Seed;
use model::stage::KvCache;
use model::stage::Lora;
use model::tokenizer::Message;
use model::{Adapter, ComputeDevice, Part, Source, Stage};
use quant::inference::{Model as IntegerModel, Session};
use rand::Rng;

use crate::ParticipantError;
use crate::integer::{self, Engine};

/// A whole model, ready to run.
pub struct Runner {
    pub source: Arc<dyn Source>,
    pub(crate) engine: Running,
}

/// What computes.
pub(crate) enum Running {
    /// Weights as the file has them, activations as bytes.
    Integer(IntegerModel),
    /// Weights as the device says, with or without an adapter.
    Float { stage: Box<Stage>, lora: Lora },
}

/// A sequence on the way.
enum Sequence<'a> {
    Integer(Box<Session>),
    Float { stage: &'a Stage, lora: &'a Lora, cache: Box<KvCache>, logits: Vec<f32> },
}

impl Sequence<'_> {
    fn next_logits(&mut self, tokens: &[u32]) -> Result<&[f32], ParticipantError> {
        match self {
            Self::Integer(session) => Ok(session.next(tokens)),
            Self::Float { stage, lora, cache, logits } => {
                *logits = stage.next_logits(tokens, cache, lora)?;
                Ok(logits)
            }
        }
    }
}

pub struct Generation<'a> {
    pub prompt: &'a str,
    /// The prompt goes in as it is, not through the chat template.
    pub raw: bool,
    pub tokens_max: usize,
    /// 0 always takes the likeliest token.
    pub temperature: f64,
    pub seed: u64,
}

pub struct Generated {
    pub text: String,
    pub prompt_tokens: usize,
    pub tokens: Vec<u32>,
    /// The model ended the text itself.
    pub ended: bool,
}

impl Runner {
    pub fn open(
        model: &Path,
        adapter: Option<&Path>,
        device: &experiment::Device,
        engine: Option<Engine>,
    ) -> Result<Self, ParticipantError> {
        let source = model::source::open(model)?;
        let engine = match engine.unwrap_or_else(|| Engine::of(&*source, adapter)) {
            Engine::Integer => {
                if adapter.is_some() {
                    let what = "the integer engine takes no adapter; export the merged model, or use --engine float";
                    return Err(ParticipantError::Usage(what.into()));
                }
                Running::Integer(integer::load(model, device.threads)?)
            }
            Engine::Float => {
                let device = ComputeDevice::new(device)?;
                let stage = Stage::load(&*source, Part::whole(source.config().blocks), &device, None)?;
                let adapter = match adapter {
                    Some(directory) => Adapter::load(directory, source.config())?,
                    None => Adapter::none(),
                };
                let lora = stage.attach(&adapter)?;
                Running::Float { stage: Box::new(stage), lora }
            }
        };
        Ok(Self { source, engine })
    }

    /// A new sequence of at most `tokens`.
    fn sequence(&self, tokens: usize) -> Sequence<'_> {
        match &self.engine {
            Running::Integer(model) => Sequence::Integer(Box::new(model.session(tokens))),
            Running::Float { stage, lora } => {
                Sequence::Float { stage, lora, cache: Box::new(stage.cache()), logits: Vec::new() }
            }
        }
    }

    /// Calls `emit` with every piece of text as soon as it is whole.
    pub fn generate(
        &self,
        generation: &Generation<'_>,
        mut emit: impl FnMut(&str),
    ) -> Result<Generated, ParticipantError> {
        let tokenizer = self.source.tokenizer();
        let mut prompt: Vec<u32> = if generation.raw {
            tokenizer.text_prefix().into_iter().chain(tokenizer.encode(generation.prompt, true)?).collect()
        } else if tokenizer.settings().chat_template.is_none() {
            let what = "the model has no chat template; give the prompt to it as it is, with --raw";
            return Err(ParticipantError::Usage(what.into()));
        } else {
            let message = Message { role: "user".into(), content: generation.prompt.to_owned() };
            tokenizer.encode(&tokenizer.chat(&[message], true)?, true)?
        };
        if prompt.is_empty() {
            let what = "the prompt has no token; give --prompt some text";
            prompt.extend(tokenizer.settings().bos);
            if prompt.is_empty() {
                return Err(ParticipantError::Usage(what.into()));
            }
        }
        // The last token is never an input.
        let (context, longest) = (self.source.config().context, prompt.len().saturating_add(generation.tokens_max));
        if prompt.len() > context {
            let what = format!("the prompt has {} tokens, more than the model's context of {context}", prompt.len());
            return Err(ParticipantError::Usage(what));
        }
        let mut sequence = self.sequence(longest.min(context));
        let mut random = Seed(generation.seed).generator("generate");
        let mut stream = tokenizer.decode_stream();
        let mut generated =
            Generated { text: String::new(), prompt_tokens: prompt.len(), tokens: Vec::new(), ended: false };
        let mut input = prompt;
        while generated.tokens.len() < generation.tokens_max {
            if generated.prompt_tokens + generated.tokens.len() > context {
                let what = format!("prompt and answer have filled the model's context of {context} tokens");
                return Err(ParticipantError::Usage(what));
            }
            let logits = sequence.next_logits(&input)?;
            let token = choose(logits, generation.temperature, &mut random);
            if tokenizer.settings().eos.contains(&token) {
                generated.ended = true;
                break;
            }
            generated.tokens.push(token);
            let piece = stream.push(token)?;
            emit(&piece);
            generated.text.push_str(&piece);
            input.clear();
            input.push(token);
        }
        let rest = stream.finish();
        emit(&rest);
        generated.text.push_str(&rest);
        Ok(generated)
    }
}

/// The likeliest token, or a draw from the softmax at `temperature`.
fn choose(logits: &[f32], temperature: f64, random: &mut impl Rng) -> u32 {
    let (mut best, mut max) = (0, f32::NEG_INFINITY);
    for (i, &logit) in logits.iter().enumerate() {
        if logit > max {
            (best, max) = (i, logit);
        }
    }
    if temperature <= 0.0 {
        return best as u32;
    }
    let weights: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit - max) / temperature).exp()).collect();
    let mut left = random.random::<f64>() * weights.iter().sum::<f64>();
    let drawn = weights.iter().position(|weight| {
        left -= weight;
        left < 0.0
    });
    drawn.unwrap_or(best) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temperature_0_takes_the_first_of_the_likeliest_and_a_high_one_spreads() {
        let mut random = Seed(1).generator("test");
        let logits = [0.0, 3.0, 3.0, -1.0];
        assert_eq!(choose(&logits, 0.0, &mut random), 1);
        let mut counts = [0i32; 4];
        for _ in 0..4000 {
            counts[choose(&logits, 1.0, &mut random) as usize] += 1;
        }
        // softmax: 0.024, 0.484, 0.484, 0.009
        for (count, expected) in counts.into_iter().zip([96, 1934, 1934, 36]) {
            assert!((count - expected).abs() < 150, "{counts:?}");
        }
    }
}

//! A whole model on this device, with any number of adapters for it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use model::stage::{KvCache, Lora};
use model::{Adapter, ComputeDevice, Part, Source, Stage};
use quant::inference::{Adapter as IntegerAdapter, CacheType, Model as IntegerModel, Session};

use crate::ParticipantError;
use crate::grammar::Spelling;
use crate::integer::{self, Engine};

/// A directory in PEFT's format, and what it is called here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedAdapter {
    pub name: String,
    pub directory: PathBuf,
}

/// Ready to run. Adapters are told apart by their place in the list that the runner was opened with; no place is the model
/// as it is.
pub struct Runner {
    pub source: Arc<dyn Source>,
    pub(crate) engine: Running,
    adapters: Vec<String>,
    spelling: Arc<OnceLock<Spelling>>,
}

/// What computes.
pub(crate) enum Running {
    /// Weights as the file has them, activations as bytes.
    Integer { model: IntegerModel, adapters: Vec<Arc<IntegerAdapter>> },
    /// Weights as the device says. The first of the adapters is none.
    Float { stage: Box<Stage>, adapters: Vec<Lora> },
}

/// One text on its way through the model.
pub(crate) enum Sequence<'a> {
    Integer(Box<Session>),
    Float { stage: &'a Stage, lora: &'a Lora, cache: Box<KvCache>, logits: Vec<f32> },
}

pub(crate) const NO_FLOATS_CACHE: &str =
    "--cache is for the integer engine: give --engine integer and a GGUF file, or leave it out";

/// Says which two of them have one name, if any.
pub(crate) fn called_alike(adapters: &[NamedAdapter]) -> Option<String> {
    adapters.iter().enumerate().find_map(|(i, NamedAdapter { name, directory })| {
        let other = adapters[..i].iter().find(|other| other.name == *name)?;
        let (a, b) = (other.directory.display(), directory.display());
        Some(format!("the adapters {a} and {b} are both called `{name}`; give --adapter NAME=DIR"))
    })
}

impl Runner {
    pub fn open(
        model: &Path,
        adapters: &[NamedAdapter],
        device: &experiment::Device,
        engine: Option<Engine>,
        cache: Option<CacheType>,
    ) -> Result<Self, ParticipantError> {
        if let Some(what) = called_alike(adapters) {
            return Err(ParticipantError::Usage(what));
        }
        let source = model::source::open(model)?;
        let load = |adapter: &NamedAdapter| Adapter::load(&adapter.directory, source.config());
        let engine = match engine.unwrap_or_else(|| Engine::of(&*source)) {
            Engine::Integer => {
                // The file itself, where the model was named by the directory it lies in.
                let model = integer::load(source.origin(), device.threads as usize)?.keeping(cache.unwrap_or_default());
                // One after the other: their files are not held together.
                let adapters = adapters.iter().map(|adapter| integer::adapter(&model, &load(adapter)?));
                Running::Integer { adapters: adapters.collect::<Result<_, ParticipantError>>()?, model }
            }
            Engine::Float if cache.is_some() => {
                return Err(ParticipantError::Usage(NO_FLOATS_CACHE.into()));
            }
            Engine::Float => {
                let device = ComputeDevice::new(device)?;
                let stage = Stage::load(&*source, Part::whole(source.config().blocks), &device, None)?;
                let mut attached = vec![stage.attach(&Adapter::none())?];
                for adapter in adapters {
                    attached.push(stage.attach(&load(adapter)?)?);
                }
                Running::Float { stage: Box::new(stage), adapters: attached }
            }
        };
        let adapters = adapters.iter().map(|adapter| adapter.name.clone()).collect();
        Ok(Self { source, engine, adapters, spelling: Arc::default() })
    }

    /// Their names.
    pub fn adapters(&self) -> &[String] {
        &self.adapters
    }

    /// What the model's tokens spell; made by the first who asks, in some hundredths of a second.
    pub(crate) fn spelling(&self) -> &Spelling {
        self.spelling.get_or_init(|| Spelling::new(self.source.tokenizer()))
    }

    /// The same, for who makes it beside the engine.
    pub(crate) fn shared_spelling(&self) -> Arc<OnceLock<Spelling>> {
        self.spelling.clone()
    }

    /// Whether computing can be broken off at a time.
    pub fn keeps_deadlines(&self) -> bool {
        matches!(self.engine, Running::Integer { .. })
    }

    /// Bytes of a sequence's keys and values: of a token, and of a whole context. None where sequences cannot be kept.
    pub fn sequence_bytes(&self) -> Option<[usize; 2]> {
        match &self.engine {
            Running::Integer { model, .. } => Some([1, model.context()].map(|tokens| model.kv_bytes(tokens))),
            Running::Float { .. } => None,
        }
    }

    /// A new sequence of at most `tokens`.
    pub(crate) fn sequence(&self, tokens: usize, adapter: Option<usize>) -> Sequence<'_> {
        match &self.engine {
            Running::Integer { model, adapters } => {
                let mut session = model.session(tokens);
                session.adapt(adapter.map(|i| adapters[i].clone()));
                Sequence::Integer(Box::new(session))
            }
            Running::Float { stage, adapters } => {
                let lora = &adapters[adapter.map_or(0, |i| i + 1)];
                Sequence::Float { stage, lora, cache: Box::new(stage.cache()), logits: Vec::new() }
            }
        }
    }
}

impl Sequence<'_> {
    /// The logits behind a part of a prompt, or none if that takes longer than `until`: then nothing has happened. Floats are
    /// not broken off.
    pub(crate) fn prompt(
        &mut self,
        tokens: &[u32],
        until: Option<Instant>,
    ) -> Result<Option<&[f32]>, ParticipantError> {
        match self {
            Self::Integer(session) => Ok(session.prompt_until(tokens, until)),
            Self::Float { stage, lora, cache, logits } => {
                *logits = stage.next_logits(tokens, cache, lora)?;
                Ok(Some(logits))
            }
        }
    }

    /// The same of a token behind it.
    pub(crate) fn next(&mut self, token: u32, until: Option<Instant>) -> Result<Option<&[f32]>, ParticipantError> {
        match self {
            Self::Integer(session) => Ok(session.next_until(&[token], until)),
            Self::Float { .. } => self.prompt(&[token], until),
        }
    }
}

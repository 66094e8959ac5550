//! What a quantizer is told of the columns of a weight matrix.
//!
//! Best are second moments of the activations that meet the matrix, measured on text while the model is walked through;
//! where nobody brings text, the model writes it itself. An importance matrix, which knows single columns and comes from
//! elsewhere, corrects these moments, or stands alone. With neither, importance is judged from the weights.
//! Start from [`Guide::new`].

use std::fs;
use std::path::{Path, PathBuf};

use experiment::{Backend, Device, Seed, WeightType};
use model::source::gguf_tensor_name;
use model::{Adapter, ComputeDevice, LayerInput, ModelError, Part, Source, Stage, Walk};
use quant::{Feedback, Imatrix};
use rand::Rng;

use super::ExportError;
use super::importance::Importance;
use super::merged::Merged;

/// Where the text comes from on which activations are measured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Calibration {
    /// Nowhere: nothing is measured.
    None,
    /// From the model itself.
    #[default]
    Own,
    /// From a text file.
    Text(PathBuf),
}

/// Sequences that a model writes, and tokens of each.
const OWN: [usize; 2] = [24, 192];
/// Of a text file no more is read; moments hardly change any more.
const TOKENS_MAX: usize = 16_384;
const SEQUENCE_TOKENS: usize = 512;

/// What is known of the columns of one matrix.
pub(super) enum Columns<'a> {
    Nothing,
    Importance(Vec<f32>),
    Feedback(&'a Feedback),
}

/// Goes through the model's tensors in model order, and knows what it has measured for the block at hand.
pub(super) struct Guide<'a> {
    merged: &'a Merged<'a>,
    imatrix: Option<&'a Imatrix>,
    prior: Option<Importance>,
    walk: Option<Walk<'a>>,
    /// For the block that the walk has just passed.
    feedback: [Option<Feedback>; 4],
}

impl<'a> Guide<'a> {
    /// Knows of no column but what `imatrix` says.
    pub fn told(merged: &'a Merged<'a>, imatrix: Option<&'a Imatrix>) -> Self {
        Self { merged, imatrix, prior: None, walk: None, feedback: Default::default() }
    }

    pub fn new(
        merged: &'a Merged<'a>,
        calibration: &Calibration,
        imatrix: Option<&'a Imatrix>,
        seed: u64,
    ) -> Result<Self, ExportError> {
        let mut guide = Self::told(merged, imatrix);
        let text = match calibration {
            Calibration::None if imatrix.is_some() => return Ok(guide),
            Calibration::None => {
                guide.prior = Some(Importance::of(merged)?);
                return Ok(guide);
            }
            Calibration::Own => own_text(merged, OWN, Seed(seed))?,
            Calibration::Text(path) => read_text(merged, path, TOKENS_MAX)?,
        };
        guide.walk = Some(Walk::begin(merged, &text)?);
        Ok(guide)
    }

    /// Tensors are asked for in model order, each any number of times or never.
    pub fn columns(&mut self, name: &str) -> Result<Columns<'_>, ExportError> {
        let told = self.imatrix.and_then(|imatrix| imatrix.columns(&gguf_tensor_name(name)));
        let Some((block, input)) = LayerInput::of_tensor(name) else {
            return Ok(told.map_or(Columns::Nothing, Columns::Importance));
        };
        if let Some(walk) = &mut self.walk {
            while walk.block() < block {
                walk.step(|_| {})?;
            }
            if walk.block() == block {
                self.feedback = measured(walk, block, self.imatrix)?;
            }
            assert_eq!(walk.block(), block + 1, "tensors are asked for in model order");
        }
        if let Some(feedback) = &self.feedback[input as usize] {
            return Ok(Columns::Feedback(feedback));
        }
        let prior = || self.prior.as_ref().and_then(|prior| prior.columns(name)).map(<[f32]>::to_vec);
        Ok(told.or_else(prior).map_or(Columns::Nothing, Columns::Importance))
    }

    pub fn merged(&self) -> &'a Merged<'a> {
        self.merged
    }
}

/// Takes the walk through a block. An input whose activations are all zero has no feedback.
fn measured(
    walk: &mut Walk<'_>,
    block: usize,
    imatrix: Option<&Imatrix>,
) -> Result<[Option<Feedback>; 4], ExportError> {
    let moments = walk.moments()?;
    let config = walk.config();
    let of_input = |input: LayerInput| -> Result<Option<Feedback>, ExportError> {
        let columns = input.columns(config);
        let name = format!("model.layers.{block}.{}.weight", input.layers()[0]);
        let moments = moments.of(input);
        if (0..columns).all(|column| moments[column * (columns + 1)] == 0.0) {
            return Ok(None);
        }
        let told = imatrix.and_then(|imatrix| imatrix.columns(&gguf_tensor_name(&name)));
        let feedback = match told {
            Some(told) if told.iter().any(|v| *v > 0.0) => Feedback::with_importance(moments, &told),
            _ => Feedback::new(moments, columns),
        };
        feedback.map(Some).map_err(ExportError::tensor(&name))
    };
    std::thread::scope(|scope| {
        let threads = LayerInput::ALL.map(|input| scope.spawn(move || of_input(input)));
        let mut all = [const { None }; 4];
        for (slot, thread) in all.iter_mut().zip(threads) {
            // A panic in a thread is a bug here, and goes on as one.
            *slot = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(all)
    })
}

/// What the model writes when nothing is asked of it: a draw from its own distribution behind each of the tokens that may
/// begin a text, in turn.
pub(super) fn own_text(
    source: &dyn Source,
    [sequences, tokens]: [usize; 2],
    seed: Seed,
) -> Result<Vec<Vec<u32>>, ModelError> {
    // One byte a weight: how good the text is does not hang on the ninth bit, and it is written faster.
    let device = Device { backend: Backend::Native, weights: WeightType::Int8, ..Default::default() };
    let device = ComputeDevice::new(&device)?;
    let stage = Stage::load(source, Part::whole(source.config().blocks), &device, None)?;
    let lora = stage.attach(&Adapter::none())?;
    let settings = source.tokenizer().settings();
    let known = source.tokenizer().vocabulary_size() as usize;
    let mut starts: Vec<u32> = settings.bos.into_iter().chain(settings.eos.iter().copied()).collect();
    starts.dedup();
    if starts.is_empty() {
        starts.push(0);
    }
    let mut random = seed.generator("calibration");
    let mut text = Vec::with_capacity(sequences);
    for sequence in 0..sequences {
        let mut cache = stage.cache();
        let mut written = vec![starts[sequence % starts.len()]];
        while written.len() < tokens.min(source.config().context) {
            let logits = stage.next_logits(&written[written.len() - 1..], &mut cache, &lora)?;
            written.push(drawn(&logits[..known.min(logits.len())], &mut random));
        }
        text.push(written);
    }
    Ok(text)
}

/// A draw from the softmax.
fn drawn(logits: &[f32], random: &mut impl Rng) -> u32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let mut left = random.random::<f64>() * weights.iter().map(|&weight| f64::from(weight)).sum::<f64>();
    let drawn = weights.iter().position(|&weight| {
        left -= f64::from(weight);
        left < 0.0
    });
    drawn.unwrap_or(0) as u32
}

/// The beginning of a text file, in sequences.
pub(super) fn read_text(source: &dyn Source, path: &Path, tokens_max: usize) -> Result<Vec<Vec<u32>>, ExportError> {
    let text = fs::read(path).map_err(ExportError::reading(path))?;
    let text = String::from_utf8(text)
        .map_err(|_| ExportError::Text { path: path.to_owned(), what: "it is not UTF-8".to_owned() })?;
    let sequences = encode(source, &text, tokens_max)?;
    if sequences.iter().map(Vec::len).sum::<usize>() < 16 {
        return Err(ExportError::Text { path: path.to_owned(), what: "it has fewer than 16 tokens".to_owned() });
    }
    Ok(sequences)
}

pub(super) fn encode(source: &dyn Source, text: &str, tokens_max: usize) -> Result<Vec<Vec<u32>>, ExportError> {
    let tokenizer = source.tokenizer();
    let prefix = tokenizer.text_prefix();
    // A token has a byte at least; and what the tokenizer takes at once is bounded.
    let mut end = text.len().min(tokens_max.saturating_mul(16)).min(1 << 20);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut tokens = tokenizer.encode(&text[..end], false)?;
    tokens.truncate(tokens_max);
    let length = SEQUENCE_TOKENS.min(source.config().context) - 1;
    let sequences = tokens.chunks(length.max(1)).map(|some| prefix.into_iter().chain(some.iter().copied()).collect());
    Ok(sequences.collect())
}

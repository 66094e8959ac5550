//! One party's share of the decoder on a compute device: frozen base weights, forward, and vector-Jacobian products.
//!
//! A [`Stage`] holds base weights only. Adapters come with every call as a [`Lora`], so that one stage serves many
//! participants. Everything that enters or leaves is a plain [`Matrix`]. A stage never decides anything: what is
//! trained, when, and with which rate is the caller's business.
//!
//! What comes in is checked here, for both kinds of stage: one on our own kernels, one on the tensor library's backends.

mod device;
mod dropout;
mod native;
mod tensor;

use std::ops::Range;

use crate::{Adapter, Gradients, Matrix, ModelConfig, ModelError, Part, Segments, Source};
pub use device::ComputeDevice;
use device::Place;
pub use dropout::Dropout;
pub use kernels::Inputs;
use native::NativeStage;
use tensor::TensorStage;

pub struct Stage {
    config: ModelConfig,
    part: Part,
    device: ComputeDevice,
    weights: Weights,
}

enum Weights {
    Native(NativeStage),
    Tensor(Box<TensorStage>),
}

/// An adapter beside a stage's blocks, ready for a pass.
pub struct Lora(OnDevice);

enum OnDevice {
    Native(native::Lora),
    Tensor(tensor::Lora),
}

/// Keys and values of one sequence, for every block of a stage.
pub struct KvCache {
    slots: Slots,
    tokens: usize,
}

enum Slots {
    Native(Vec<kernels::Cache>),
    Tensor(tensor::KvCache),
}

/// What a stage is fed: the first one with tokens, every other with the residual stream of the one before.
pub enum Input<'a> {
    Tokens(&'a [u32]),
    /// `[tokens, width]`
    Activations(Matrix),
}

/// An input that has been found to fit the stage.
enum Rows<'a> {
    Tokens(&'a [u32]),
    Activations(Matrix),
}

/// The positions that have a target, and their targets.
struct Trained {
    rows: Vec<u32>,
    targets: Vec<u32>,
}

impl Trained {
    /// Those within `rows`, counted from its start.
    fn of(&self, rows: Range<usize>) -> Self {
        let place = |row: usize| self.rows.partition_point(|&trained| (trained as usize) < row);
        let places = place(rows.start)..place(rows.end);
        Self {
            rows: self.rows[places.clone()].iter().map(|row| row - rows.start as u32).collect(),
            targets: self.targets[places].to_vec(),
        }
    }
}

/// Summed over the trained tokens of a micro-batch, so that micro-batches of different size add up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    pub nats: f64,
    pub tokens: usize,
}

/// A forward pass to record.
pub struct Recording<'a> {
    pub input: Input<'a>,
    pub segments: &'a Segments,
    pub lora: &'a Lora,
    pub dropout: &'a Dropout,
}

/// A forward pass that waits for the gradient of its output. Its activations live as long as this value.
pub struct Pending(Recorded);

enum Recorded {
    Native(native::Pending),
    Tensor(Box<tensor::Pending>),
}

/// What a backward pass yields.
pub struct Backward {
    /// Gradient of the stage's input, `[tokens, width]`, where it was asked for.
    pub input: Option<Matrix>,
    pub adapter: Gradients,
}

impl Backward {
    /// What two parts of one micro-batch add up to.
    fn joined(mut above: Self, below: Self) -> Self {
        above.adapter.add(&below.adapter);
        let input = above.input.zip(below.input).map(|(above, below)| above.on_top_of(below));
        Self { input, adapter: above.adapter }
    }
}

impl Stage {
    /// Loads the tensors of `part` and no others. Tensors that `lend` already holds (a tied embedding) are shared.
    pub fn load(
        source: &dyn Source,
        part: Part,
        device: &ComputeDevice,
        lend: Option<&Stage>,
    ) -> Result<Self, ModelError> {
        let config = source.config().clone();
        if part.blocks.end > config.blocks {
            return Err(ModelError::Mismatch(format!(
                "blocks {}..{} are asked of a model of {} blocks",
                part.blocks.start, part.blocks.end, config.blocks
            )));
        }
        let weights = match (device.place(), lend.map(|stage| &stage.weights)) {
            (Place::Native(native), lend) => {
                let lend = match lend {
                    Some(Weights::Native(stage)) => Some(stage),
                    _ => None,
                };
                Weights::Native(NativeStage::load(source, &part, native, lend)?)
            }
            (Place::Tensor(device), lend) => {
                let lend = match lend {
                    Some(Weights::Tensor(stage)) => Some(&**stage),
                    _ => None,
                };
                Weights::Tensor(Box::new(TensorStage::load(source, part.clone(), device, lend)?))
            }
        };
        Ok(Self { config, part, device: device.clone(), weights })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn part(&self) -> &Part {
        &self.part
    }

    pub fn device(&self) -> &ComputeDevice {
        &self.device
    }

    /// Puts `adapter` beside this stage's blocks. It must cover exactly these blocks (or be empty).
    pub fn attach(&self, adapter: &Adapter) -> Result<Lora, ModelError> {
        if let Some(strange) = adapter.tensors().iter().find(|tensor| !self.part.blocks.contains(&tensor.block)) {
            return Err(ModelError::Mismatch(format!(
                "adapter tensor {} belongs to none of the blocks {:?}",
                strange.name, self.part.blocks
            )));
        }
        Ok(Lora(match &self.weights {
            Weights::Native(_) => OnDevice::Native(native::Lora::new(adapter, &self.part)),
            Weights::Tensor(stage) => OnDevice::Tensor(stage.attach(adapter)),
        }))
    }

    /// The residual stream behind the last block, `[tokens, width]`; nothing is recorded.
    pub fn forward(&self, input: Input<'_>, segments: &Segments, lora: &Lora) -> Result<Matrix, ModelError> {
        let rows = self.entry(input, segments)?;
        Ok(match self.with(lora)? {
            With::Native(stage, lora) => stage.forward(rows, segments, lora),
            With::Tensor(stage, lora) => stage.forward(rows, segments, lora),
        })
    }

    /// As [`forward`](Self::forward), of several participants' activations: where the device can, in one pass over the
    /// base. Each gets what it would get alone, bit for bit.
    pub fn forward_together(&self, all: Vec<(Matrix, &Segments, &Lora)>) -> Result<Vec<Matrix>, ModelError> {
        let Weights::Native(stage) = &self.weights else {
            let one =
                |(x, segments, lora): (Matrix, &Segments, &Lora)| self.forward(Input::Activations(x), segments, lora);
            return all.into_iter().map(one).collect();
        };
        let mut checked = Vec::with_capacity(all.len());
        for (x, segments, lora) in all {
            self.check_activations(&x, segments)?;
            checked.push((x, segments, lora.native()?));
        }
        Ok(stage.forward_together(checked))
    }

    /// As [`forward`](Self::forward), and `measure` sees what the layers of every block are multiplied with, by the
    /// block's index in the model.
    ///
    /// # Errors
    /// Also if the stage does not run on our own kernels.
    pub fn forward_measured(
        &self,
        input: Input<'_>,
        segments: &Segments,
        lora: &Lora,
        mut measure: impl FnMut(usize, Inputs),
    ) -> Result<Matrix, ModelError> {
        let rows = self.entry(input, segments)?;
        let first = self.part.blocks.start;
        match self.with(lora)? {
            With::Native(stage, lora) => {
                Ok(stage.forward_measured(rows, segments, lora, &mut |block, inputs| measure(first + block, inputs)))
            }
            With::Tensor(..) => {
                Err(ModelError::Mismatch("only stages of the backend `native` measure their inputs".into()))
            }
        }
    }

    /// As [`forward`](Self::forward), recorded, so that [`Pending::backward`] can follow.
    pub fn forward_recorded(
        &self,
        input: Input<'_>,
        segments: &Segments,
        lora: &Lora,
        dropout: &Dropout,
    ) -> Result<(Matrix, Pending), ModelError> {
        let mut all = self.forward_recorded_together(vec![Recording { input, segments, lora, dropout }])?;
        Ok(all.remove(0))
    }

    /// As [`forward_recorded`](Self::forward_recorded), of several participants at once: where the device can, in one pass
    /// over the base. Each gets what it would get alone, bit for bit.
    pub fn forward_recorded_together(&self, all: Vec<Recording<'_>>) -> Result<Vec<(Matrix, Pending)>, ModelError> {
        match &self.weights {
            Weights::Native(stage) => {
                let mut checked = Vec::with_capacity(all.len());
                for Recording { input, segments, lora, dropout } in all {
                    checked.push((self.entry(input, segments)?, segments, lora.native()?, dropout));
                }
                let recorded = stage.forward_recorded_together(checked);
                Ok(recorded.into_iter().map(|(y, pending)| (y, Pending(Recorded::Native(pending)))).collect())
            }
            Weights::Tensor(stage) => {
                let one = |Recording { input, segments, lora, dropout }: Recording<'_>| {
                    let OnDevice::Tensor(lora) = &lora.0 else { return Err(strange_device()) };
                    let (y, pending) = stage.forward_recorded(self.entry(input, segments)?, segments, lora, dropout);
                    Ok((y, Pending(Recorded::Tensor(Box::new(pending)))))
                };
                all.into_iter().map(one).collect()
            }
        }
    }

    /// Loss of the predictions at every position that has a target.
    ///
    /// `targets[i]` is the token that position `i` shall predict, or nothing.
    pub fn loss(
        &self,
        input: Input<'_>,
        segments: &Segments,
        targets: &[Option<u32>],
        lora: &Lora,
    ) -> Result<Loss, ModelError> {
        let trained = self.trained_positions(targets, segments)?;
        let rows = self.entry(input, segments)?;
        Ok(match self.with(lora)? {
            With::Native(stage, lora) => stage.loss(rows, segments, &trained, lora),
            With::Tensor(stage, lora) => stage.loss(rows, segments, &trained, lora),
        })
    }

    /// Loss and its gradients: of the adapter, and of the input if `input_gradient` is set.
    ///
    /// Gradients are those of `nats / step_tokens`, where `step_tokens` counts the trained tokens of the whole
    /// optimizer step, so that the gradients of its micro-batches simply add up.
    #[allow(clippy::too_many_arguments)]
    pub fn loss_backward(
        &self,
        input: Input<'_>,
        segments: &Segments,
        targets: &[Option<u32>],
        step_tokens: usize,
        lora: &Lora,
        dropout: &Dropout,
        input_gradient: bool,
    ) -> Result<(Loss, Backward), ModelError> {
        let trained = self.trained_positions(targets, segments)?;
        let rows = self.entry(input, segments)?;
        Ok(match self.with(lora)? {
            With::Native(stage, lora) => {
                stage.loss_backward(rows, segments, &trained, step_tokens, lora, dropout, input_gradient)
            }
            With::Tensor(stage, lora) => {
                stage.loss_backward(rows, segments, &trained, step_tokens, lora, dropout, input_gradient)
            }
        })
    }

    /// Logits of every position, `[tokens, vocabulary]`.
    pub fn logits(&self, input: Input<'_>, segments: &Segments, lora: &Lora) -> Result<Matrix, ModelError> {
        self.check_lm_head()?;
        let rows = self.entry(input, segments)?;
        Ok(match self.with(lora)? {
            With::Native(stage, lora) => stage.logits(rows, segments, lora),
            With::Tensor(stage, lora) => stage.logits(rows, segments, lora),
        })
    }

    /// An empty cache for a new sequence.
    pub fn cache(&self) -> KvCache {
        let slots = match &self.weights {
            Weights::Native(stage) => Slots::Native(stage.cache()),
            Weights::Tensor(stage) => Slots::Tensor(stage.cache()),
        };
        KvCache { slots, tokens: 0 }
    }

    /// Appends `tokens` to the cached sequence and returns the logits behind the last of them, `[vocabulary]`.
    pub fn next_logits(&self, tokens: &[u32], cache: &mut KvCache, lora: &Lora) -> Result<Vec<f32>, ModelError> {
        let segments = Segments::new(vec![tokens.len()])?;
        let context = self.config.context;
        let behind = cache.tokens + tokens.len();
        if behind > context {
            return Err(ModelError::Mismatch(format!("{behind} tokens exceed the model's context of {context}")));
        }
        self.check_lm_head()?;
        let rows = self.entry(Input::Tokens(tokens), &segments)?;
        let logits = match (self.with(lora)?, &mut cache.slots) {
            (With::Native(stage, lora), Slots::Native(slots)) => stage.next_logits(rows, cache.tokens, slots, lora),
            (With::Tensor(stage, lora), Slots::Tensor(slots)) => stage.next_logits(rows, &segments, slots, lora),
            _ => return Err(strange_device()),
        };
        cache.tokens = behind;
        Ok(logits)
    }

    fn with<'a>(&'a self, lora: &'a Lora) -> Result<With<'a>, ModelError> {
        match (&self.weights, &lora.0) {
            (Weights::Native(stage), OnDevice::Native(lora)) => Ok(With::Native(stage, lora)),
            (Weights::Tensor(stage), OnDevice::Tensor(lora)) => Ok(With::Tensor(stage, lora)),
            _ => Err(strange_device()),
        }
    }

    fn entry<'a>(&self, input: Input<'a>, segments: &Segments) -> Result<Rows<'a>, ModelError> {
        let mismatch = |what: String| Err(ModelError::Mismatch(what));
        match input {
            Input::Tokens(tokens) => {
                if !self.part.embedding {
                    return mismatch("tokens were given to a part without the embedding".into());
                }
                if tokens.len() != segments.tokens() {
                    return mismatch(format!("{} tokens for segments of {}", tokens.len(), segments.tokens()));
                }
                if let Some(token) = tokens.iter().find(|&&token| token as usize >= self.config.vocabulary) {
                    return mismatch(format!("token {token} in a vocabulary of {}", self.config.vocabulary));
                }
                Ok(Rows::Tokens(tokens))
            }
            Input::Activations(x) => {
                self.check_activations(&x, segments)?;
                Ok(Rows::Activations(x))
            }
        }
    }

    /// Whether `x` is a residual stream of these segments.
    pub fn check_activations(&self, x: &Matrix, segments: &Segments) -> Result<(), ModelError> {
        let (found, expected) = ([x.rows(), x.columns()], [segments.tokens(), self.config.width]);
        match found == expected {
            true => Ok(()),
            false => Err(ModelError::Mismatch(format!("activations of shape {found:?}; expected {expected:?}"))),
        }
    }

    fn check_lm_head(&self) -> Result<(), ModelError> {
        match self.part.lm_head {
            true => Ok(()),
            false => Err(ModelError::Mismatch("this part has no LM head".into())),
        }
    }

    fn trained_positions(&self, targets: &[Option<u32>], segments: &Segments) -> Result<Trained, ModelError> {
        self.check_lm_head()?;
        if targets.len() != segments.tokens() {
            return Err(ModelError::Mismatch(format!("{} targets for {} tokens", targets.len(), segments.tokens())));
        }
        let (rows, targets): (Vec<u32>, Vec<u32>) =
            targets.iter().enumerate().filter_map(|(row, target)| target.map(|target| (row as u32, target))).unzip();
        if let Some(target) = targets.iter().find(|&&target| target as usize >= self.config.vocabulary) {
            return Err(ModelError::Mismatch(format!("target {target} in a vocabulary of {}", self.config.vocabulary)));
        }
        if targets.is_empty() {
            return Err(ModelError::Mismatch("a micro-batch without a single target".into()));
        }
        Ok(Trained { rows, targets })
    }
}

/// A stage and an adapter on the same kind of device.
enum With<'a> {
    Native(&'a NativeStage, &'a native::Lora),
    Tensor(&'a TensorStage, &'a tensor::Lora),
}

fn strange_device() -> ModelError {
    ModelError::Mismatch("an adapter or a cache was made by a stage on another device".into())
}

impl KvCache {
    /// Tokens whose keys and values are held.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

impl Lora {
    fn native(&self) -> Result<&native::Lora, ModelError> {
        match &self.0 {
            OnDevice::Native(lora) => Ok(lora),
            OnDevice::Tensor(_) => Err(strange_device()),
        }
    }
}

impl Pending {
    /// Vector-Jacobian products for the gradient of the output, `[tokens, width]`.
    pub fn backward(self, gradient: Matrix) -> Result<Backward, ModelError> {
        Ok(Self::backward_together(vec![(self, gradient)])?.remove(0))
    }

    /// The same of several, which one pass may have recorded or many: where the device can, in one pass over the base.
    /// Each gets what it would get alone, bit for bit.
    pub fn backward_together(all: Vec<(Self, Matrix)>) -> Result<Vec<Backward>, ModelError> {
        let (mut native, mut tensor) = (Vec::new(), Vec::new());
        for (place, (pending, gradient)) in all.into_iter().enumerate() {
            pending.check_gradient(&gradient)?;
            match pending.0 {
                Recorded::Native(pending) => native.push((place, (pending, gradient))),
                Recorded::Tensor(pending) => tensor.push((place, pending.backward(gradient))),
            }
        }
        let (places, native): (Vec<usize>, Vec<_>) = native.into_iter().unzip();
        tensor.extend(places.into_iter().zip(native::Pending::backward_together(native)));
        tensor.sort_by_key(|(place, _)| *place);
        Ok(tensor.into_iter().map(|(_, backward)| backward).collect())
    }

    /// Whether `gradient` is one of the output.
    pub fn check_gradient(&self, gradient: &Matrix) -> Result<(), ModelError> {
        let expected = match &self.0 {
            Recorded::Native(pending) => pending.shape(),
            Recorded::Tensor(pending) => pending.shape(),
        };
        let found = [gradient.rows(), gradient.columns()];
        match found == expected {
            true => Ok(()),
            false => Err(ModelError::Mismatch(format!("a cut gradient of shape {found:?}; expected {expected:?}"))),
        }
    }
}

#[cfg(test)]
mod tests;

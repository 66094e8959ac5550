//! One party's share of the decoder on a compute device: frozen base weights, forward, and vector-Jacobian products.
//!
//! A [`Stage`] holds base weights only. Adapters come with every call as a [`Lora`], so that one stage serves many
//! participants. Everything that enters or leaves is a plain [`Matrix`]. A stage never decides anything: what is
//! trained, when, and with which rate is the caller's business.

mod attention;
mod block;
mod device;
mod generate;
mod lm_head;
mod lora;

use burn::tensor::{Int, Tensor, TensorData};

use crate::{Gradients, Matrix, ModelConfig, ModelError, Part, Segments, Source};
use attention::Layout;
use block::{Block, RmsNorm};
pub use device::ComputeDevice;
pub use generate::KvCache;
pub use lora::{Dropout, Lora};

pub struct Stage {
    config: ModelConfig,
    part: Part,
    device: ComputeDevice,
    /// `[vocabulary, width]`
    embedding: Option<Tensor<2>>,
    blocks: Vec<Block>,
    norm: Option<RmsNorm>,
    /// `[vocabulary, width]`; the embedding itself where the two are tied.
    lm_head: Option<Tensor<2>>,
}

/// What a stage is fed: the first one with tokens, every other with the residual stream of the one before.
pub enum Input<'a> {
    Tokens(&'a [u32]),
    /// `[tokens, width]`
    Activations(Matrix),
}

/// Summed over the trained tokens of a micro-batch, so that micro-batches of different size add up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    pub nats: f64,
    pub tokens: usize,
}

/// A forward pass that waits for the gradient of its output.
///
/// The recorded graph lives as long as this value. Dropping it unused runs a throw-away backward pass, because the
/// tensor library frees an abandoned graph in no other way (burn #4970).
pub struct Pending {
    output: Option<Tensor<2>>,
    input: Option<Tensor<2>>,
    leaves: lora::Leaves,
    device: ComputeDevice,
}

/// What a backward pass yields.
pub struct Backward {
    /// Gradient of the stage's input, `[tokens, width]`, where it was asked for.
    pub input: Option<Matrix>,
    pub adapter: Gradients,
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
        let table = |name: &str| -> Result<Tensor<2>, ModelError> {
            let values = source.tensor(name, &[config.vocabulary, config.width])?;
            Ok(Tensor::from_data(TensorData::new(values, [config.vocabulary, config.width]), device.inner()))
        };
        let lent =
            lend.and_then(|stage| stage.embedding.clone().or(stage.lm_head.clone().filter(|_| config.tied_embeddings)));
        let tied = config.tied_embeddings && part.lm_head;
        let embedding_table = match lent {
            Some(table) if part.embedding || tied => Some(table),
            _ if part.embedding || tied => Some(table("model.embed_tokens.weight")?),
            _ => None,
        };
        let lm_head = match part.lm_head {
            true if config.tied_embeddings => embedding_table.clone(),
            true => Some(table("lm_head.weight")?),
            false => None,
        };
        let norm =
            part.lm_head.then(|| RmsNorm::load(source, "model.norm.weight", config.width, device)).transpose()?;
        let blocks = part.blocks.clone().map(|index| Block::load(source, index, device)).collect::<Result<_, _>>()?;
        let embedding = embedding_table.filter(|_| part.embedding);
        Ok(Self { config, part, device: device.clone(), embedding, blocks, norm, lm_head })
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

    /// The residual stream behind the last block, `[tokens, width]`; nothing is recorded.
    pub fn forward(&self, input: Input<'_>, segments: &Segments, lora: &Lora) -> Result<Matrix, ModelError> {
        let output = self.residual(input, segments, lora)?;
        Ok(to_matrix(output))
    }

    /// As [`forward`](Self::forward), recorded, so that [`Pending::backward`] can follow.
    pub fn forward_recorded(
        &self,
        input: Input<'_>,
        segments: &Segments,
        lora: &Lora,
        dropout: &Dropout,
    ) -> Result<(Matrix, Pending), ModelError> {
        let leaves = lora.leaves();
        let (input, leaf) = self.entry(input, segments, true)?;
        let output = self.run_blocks(input, segments, &leaves, Some(dropout), None);
        let matrix = to_matrix(output.clone().inner());
        Ok((matrix, Pending { output: Some(output), input: leaf, leaves, device: self.device.clone() }))
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
        let residual = self.residual(input, segments, lora)?;
        let normed = self.normed(residual.select(0, self.rows(&trained.rows)))?;
        Ok(lm_head::loss(self.lm_head()?, normed, &trained.targets))
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
        let leaves = lora.leaves();
        let (input, leaf) = self.entry(input, segments, input_gradient)?;
        let residual = self.run_blocks(input, segments, &leaves, Some(dropout), None);
        let normed = self.normed(residual.select(0, self.rows(&trained.rows)))?;
        let (loss, gradient) =
            lm_head::loss_and_gradient(self.lm_head()?, normed.clone().inner(), &trained.targets, step_tokens);
        let pending = Pending { output: Some(normed), input: leaf, leaves, device: self.device.clone() };
        Ok((loss, pending.backward_tensor(gradient)))
    }

    /// Logits of every position, `[tokens, vocabulary]`.
    pub fn logits(&self, input: Input<'_>, segments: &Segments, lora: &Lora) -> Result<Matrix, ModelError> {
        let residual = self.residual(input, segments, lora)?;
        let logits = self.normed(residual)?.matmul(self.lm_head()?.transpose());
        Ok(to_matrix(logits))
    }

    fn residual(&self, input: Input<'_>, segments: &Segments, lora: &Lora) -> Result<Tensor<2>, ModelError> {
        let (input, _) = self.entry(input, segments, false)?;
        Ok(self.run_blocks(input, segments, lora.frozen(), None, None))
    }

    /// Puts the input on the device; tracked, if its gradient is wanted and it is not the token embedding.
    fn entry(
        &self,
        input: Input<'_>,
        segments: &Segments,
        gradient: bool,
    ) -> Result<(Tensor<2>, Option<Tensor<2>>), ModelError> {
        let mismatch = |what: String| Err(ModelError::Mismatch(what));
        match input {
            Input::Tokens(tokens) => {
                let Some(embedding) = &self.embedding else {
                    return mismatch("tokens were given to a part without the embedding".into());
                };
                if tokens.len() != segments.tokens() {
                    return mismatch(format!("{} tokens for segments of {}", tokens.len(), segments.tokens()));
                }
                if let Some(token) = tokens.iter().find(|&&token| token as usize >= self.config.vocabulary) {
                    return mismatch(format!("token {token} in a vocabulary of {}", self.config.vocabulary));
                }
                Ok((embedding.clone().select(0, self.indices(tokens)), None))
            }
            Input::Activations(x) => {
                if (x.rows(), x.columns()) != (segments.tokens(), self.config.width) {
                    return mismatch(format!(
                        "activations of shape [{}, {}]; expected [{}, {}]",
                        x.rows(),
                        x.columns(),
                        segments.tokens(),
                        self.config.width
                    ));
                }
                let x = from_matrix(x, &self.device);
                match gradient {
                    true => {
                        let leaf = x.autodiff().require_grad();
                        Ok((leaf.clone(), Some(leaf)))
                    }
                    false => Ok((x, None)),
                }
            }
        }
    }

    fn run_blocks(
        &self,
        input: Tensor<2>,
        segments: &Segments,
        leaves: &lora::Leaves,
        dropout: Option<&Dropout>,
        mut cache: Option<&mut KvCache>,
    ) -> Tensor<2> {
        let start = cache.as_ref().map_or(0, |cache| cache.tokens());
        let layout = Layout::new(&self.config, segments, start, &self.device);
        self.blocks.iter().enumerate().fold(input, |x, (i, block)| {
            let slot = cache.as_deref_mut().map(|cache| cache.slot(i));
            block.forward(x, &layout, &leaves[i], dropout, slot)
        })
    }

    fn normed(&self, residual: Tensor<2>) -> Result<Tensor<2>, ModelError> {
        let norm = self.norm.as_ref().ok_or_else(|| ModelError::Mismatch("this part has no LM head".into()))?;
        Ok(norm.forward(residual))
    }

    fn lm_head(&self) -> Result<Tensor<2>, ModelError> {
        self.lm_head.clone().ok_or_else(|| ModelError::Mismatch("this part has no LM head".into()))
    }

    fn trained_positions(&self, targets: &[Option<u32>], segments: &Segments) -> Result<Trained, ModelError> {
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

    fn rows(&self, rows: &[u32]) -> Tensor<1, Int> {
        self.indices(rows)
    }

    fn indices(&self, indices: &[u32]) -> Tensor<1, Int> {
        let indices: Vec<i32> = indices.iter().map(|&index| index as i32).collect();
        let length = indices.len();
        Tensor::from_data(TensorData::new(indices, [length]), self.device.inner())
    }
}

/// The positions that have a target, and their targets.
struct Trained {
    rows: Vec<u32>,
    targets: Vec<u32>,
}

impl Pending {
    /// Vector-Jacobian products for the gradient of the output, `[tokens, width]`.
    pub fn backward(self, gradient: Matrix) -> Result<Backward, ModelError> {
        let [rows, columns] = self.output.as_ref().expect("taken by backward alone").dims();
        if (gradient.rows(), gradient.columns()) != (rows, columns) {
            return Err(ModelError::Mismatch(format!(
                "a cut gradient of shape [{}, {}]; expected [{rows}, {columns}]",
                gradient.rows(),
                gradient.columns()
            )));
        }
        let gradient = from_matrix(gradient, &self.device);
        Ok(self.backward_tensor(gradient))
    }

    fn backward_tensor(mut self, gradient: Tensor<2>) -> Backward {
        let output = self.output.take().expect("taken by backward alone");
        if !output.is_tracked() {
            return Backward { input: None, adapter: self.leaves.gradients(None) };
        }
        // The sum's own gradient is 1, so the product hands `gradient` on without rounding.
        let mut gradients = (output * gradient).sum().backward();
        let input = self
            .input
            .take()
            .map(|leaf| to_matrix(leaf.grad_remove(&mut gradients).expect("the input is part of the graph")));
        Backward { input, adapter: self.leaves.gradients(Some(&mut gradients)) }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(output) = self.output.take().filter(|output| output.is_tracked()) {
            drop(output.sum().backward());
        }
    }
}

fn from_matrix(x: Matrix, device: &ComputeDevice) -> Tensor<2> {
    let shape = [x.rows(), x.columns()];
    Tensor::from_data(TensorData::new(x.into_values(), shape), device.inner())
}

fn to_matrix(x: Tensor<2>) -> Matrix {
    let [rows, columns] = x.dims();
    Matrix::new(rows, columns, to_values(x))
}

fn to_values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_into_vec::<f32>().expect("every tensor of a stage is f32")
}

#[cfg(test)]
mod tests;

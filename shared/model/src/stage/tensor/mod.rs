//! A stage on one of the tensor library's backends, with its automatic differentiation: the oracle of the native one.

mod attention;
mod block;
mod generate;
mod lm_head;
mod lora;

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::{Backward, Dropout, Loss, Rows, Trained};
use crate::{Matrix, ModelConfig, ModelError, Part, Segments, Source};
use attention::Layout;
use block::{Block, RmsNorm};
pub(super) use generate::KvCache;
pub(super) use lora::Lora;

pub(super) struct TensorStage {
    config: ModelConfig,
    part: Part,
    device: Device,
    /// `[vocabulary, width]`
    embedding: Option<Tensor<2>>,
    blocks: Vec<Block>,
    norm: Option<RmsNorm>,
    /// `[vocabulary, width]`; the embedding itself where the two are tied.
    lm_head: Option<Tensor<2>>,
}

/// The recorded graph of a forward pass.
///
/// It lives as long as this value. Dropping it unused runs a throw-away backward pass, because the tensor library frees
/// an abandoned graph in no other way (burn #4970).
pub(super) struct Pending {
    output: Option<Tensor<2>>,
    input: Option<Tensor<2>>,
    leaves: lora::Leaves,
    device: Device,
}

impl TensorStage {
    pub(super) fn load(
        source: &dyn Source,
        part: Part,
        device: &Device,
        lend: Option<&Self>,
    ) -> Result<Self, ModelError> {
        let config = source.config().clone();
        let table = |name: &str| -> Result<Tensor<2>, ModelError> {
            let values = source.tensor(name, &[config.vocabulary, config.width])?;
            Ok(Tensor::from_data(TensorData::new(values, [config.vocabulary, config.width]), device))
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

    pub(super) fn forward(&self, rows: Rows<'_>, segments: &Segments, lora: &Lora) -> Matrix {
        to_matrix(self.residual(rows, segments, lora))
    }

    pub(super) fn forward_recorded(
        &self,
        rows: Rows<'_>,
        segments: &Segments,
        lora: &Lora,
        dropout: &Dropout,
    ) -> (Matrix, Pending) {
        let leaves = lora.leaves();
        let (input, leaf) = self.entry(rows, true);
        let output = self.run_blocks(input, segments, &leaves, Some(dropout), None);
        let matrix = to_matrix(output.clone().inner());
        (matrix, Pending { output: Some(output), input: leaf, leaves, device: self.device.clone() })
    }

    pub(super) fn loss(&self, rows: Rows<'_>, segments: &Segments, trained: &Trained, lora: &Lora) -> Loss {
        let residual = self.residual(rows, segments, lora);
        let normed = self.normed(residual.select(0, self.indices(&trained.rows)));
        lm_head::loss(self.lm_head(), normed, &trained.targets)
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn loss_backward(
        &self,
        rows: Rows<'_>,
        segments: &Segments,
        trained: &Trained,
        step_tokens: usize,
        lora: &Lora,
        dropout: &Dropout,
        input_gradient: bool,
    ) -> (Loss, Backward) {
        let leaves = lora.leaves();
        let (input, leaf) = self.entry(rows, input_gradient);
        let residual = self.run_blocks(input, segments, &leaves, Some(dropout), None);
        let normed = self.normed(residual.select(0, self.indices(&trained.rows)));
        let (loss, gradient) =
            lm_head::loss_and_gradient(self.lm_head(), normed.clone().inner(), &trained.targets, step_tokens);
        let pending = Pending { output: Some(normed), input: leaf, leaves, device: self.device.clone() };
        (loss, pending.backward_tensor(gradient))
    }

    pub(super) fn logits(&self, rows: Rows<'_>, segments: &Segments, lora: &Lora) -> Matrix {
        let residual = self.residual(rows, segments, lora);
        to_matrix(self.normed(residual).matmul(self.lm_head().transpose()))
    }

    fn residual(&self, rows: Rows<'_>, segments: &Segments, lora: &Lora) -> Tensor<2> {
        let (input, _) = self.entry(rows, false);
        self.run_blocks(input, segments, lora.frozen(), None, None)
    }

    /// Puts the input on the device; tracked, if its gradient is wanted and it is not the token embedding.
    fn entry(&self, rows: Rows<'_>, gradient: bool) -> (Tensor<2>, Option<Tensor<2>>) {
        match rows {
            Rows::Tokens(tokens) => {
                let embedding = self.embedding.as_ref().expect("the caller has looked at the part");
                (embedding.clone().select(0, self.indices(tokens)), None)
            }
            Rows::Activations(x) => {
                let x = from_matrix(x, &self.device);
                match gradient {
                    true => {
                        let leaf = x.autodiff().require_grad();
                        (leaf.clone(), Some(leaf))
                    }
                    false => (x, None),
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

    fn normed(&self, residual: Tensor<2>) -> Tensor<2> {
        self.norm.as_ref().expect("the caller has looked at the part").forward(residual)
    }

    fn lm_head(&self) -> Tensor<2> {
        self.lm_head.clone().expect("the caller has looked at the part")
    }

    fn indices(&self, indices: &[u32]) -> Tensor<1, Int> {
        let indices: Vec<i32> = indices.iter().map(|&index| index as i32).collect();
        let length = indices.len();
        Tensor::from_data(TensorData::new(indices, [length]), &self.device)
    }
}

impl Pending {
    /// `[rows, columns]` of the output.
    pub(super) fn shape(&self) -> [usize; 2] {
        self.output.as_ref().expect("taken by backward alone").dims()
    }

    pub(super) fn backward(self, gradient: Matrix) -> Backward {
        let gradient = from_matrix(gradient, &self.device);
        self.backward_tensor(gradient)
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

fn from_matrix(x: Matrix, device: &Device) -> Tensor<2> {
    let shape = [x.rows(), x.columns()];
    Tensor::from_data(TensorData::new(x.into_values(), shape), device)
}

fn to_matrix(x: Tensor<2>) -> Matrix {
    let [rows, columns] = x.dims();
    Matrix::new(rows, columns, to_values(x))
}

fn to_values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_into_vec::<f32>().expect("every tensor of a stage is f32")
}

//! An adapter on the device, and the leaves of one recorded pass through it.

use burn::tensor::{Device, Gradients as Tape, Tensor, TensorData};

use super::{Dropout, TensorStage, to_values};
use crate::adapter::{TARGETS, target_index};
use crate::{Adapter, Gradients};

/// An adapter whose factors lie on a stage's device, ready for a pass.
pub(in crate::stage) struct Lora {
    frozen: Leaves,
    /// Whether A and B train.
    train: [bool; 2],
}

/// The factors of every block of a stage.
#[derive(Clone)]
pub(super) struct Leaves {
    blocks: Vec<BlockLora>,
    train: [bool; 2],
}

/// One pair for every linear layer of a block that has one, in the order of [`TARGETS`].
pub(super) type BlockLora = [Option<Pair>; TARGETS.len()];

#[derive(Clone)]
pub(super) struct Pair {
    /// `[rank, in]`
    a: Tensor<2>,
    /// `[out, rank]`
    b: Tensor<2>,
    scale: f64,
    dropout: f64,
    /// Names the dropout mask.
    name: String,
}

impl TensorStage {
    /// The caller has found that the adapter's tensors belong to these blocks.
    pub(in crate::stage) fn attach(&self, adapter: &Adapter) -> Lora {
        let mut blocks: Vec<BlockLora> = self.part.blocks.clone().map(|_| Default::default()).collect();
        let scale = adapter.config.alpha / f64::from(adapter.config.rank);
        for [a, b] in adapter.pairs() {
            let upload = |tensor: &crate::AdapterTensor| {
                Tensor::from_data(TensorData::new(tensor.values.clone(), tensor.shape), &self.device)
            };
            let target = target_index(&a.target).expect("an adapter has known targets");
            blocks[a.block - self.part.blocks.start][target] =
                Some(Pair { a: upload(a), b: upload(b), scale, dropout: adapter.config.dropout, name: a.name.clone() });
        }
        let train = adapter.config.trains();
        Lora { frozen: Leaves { blocks, train }, train }
    }
}

impl Lora {
    pub(super) fn frozen(&self) -> &Leaves {
        &self.frozen
    }

    /// Fresh leaves for one recorded pass: gradients of different passes never meet.
    pub(super) fn leaves(&self) -> Leaves {
        let leaf = |tensor: &Tensor<2>, train: bool| match train {
            true => tensor.clone().autodiff().require_grad(),
            false => tensor.clone(),
        };
        let [train_a, train_b] = self.train;
        let mut leaves = self.frozen.clone();
        for pair in leaves.blocks.iter_mut().flatten().flatten() {
            pair.a = leaf(&pair.a, train_a);
            pair.b = leaf(&pair.b, train_b);
        }
        leaves
    }
}

impl std::ops::Index<usize> for Leaves {
    type Output = BlockLora;

    fn index(&self, block: usize) -> &BlockLora {
        &self.blocks[block]
    }
}

impl Leaves {
    /// Gradients in the order of the adapter's tensors; a factor that does not train has none.
    pub(super) fn gradients(&self, mut tape: Option<&mut Tape>) -> Gradients {
        let mut take = |leaf: &Tensor<2>, train: bool| -> Vec<f32> {
            if !train {
                return Vec::new();
            }
            let gradient = tape.as_deref_mut().and_then(|tape| leaf.grad_remove(tape));
            gradient.map_or_else(|| vec![0.0; leaf.shape().num_elements()], to_values)
        };
        let [train_a, train_b] = self.train;
        let tensors =
            self.blocks.iter().flatten().flatten().flat_map(|pair| [take(&pair.a, train_a), take(&pair.b, train_b)]);
        Gradients::new(tensors.collect())
    }
}

impl Pair {
    /// `scale · dropout(x) Aᵀ Bᵀ`, `[tokens, in] → [tokens, out]` (Hu et al., arXiv 2106.09685, equation 3).
    pub(super) fn forward(&self, x: Tensor<2>, dropout: Option<&Dropout>, device: &Device) -> Tensor<2> {
        let x = match dropout {
            Some(dropout) if self.dropout > 0.0 => {
                let [tokens, channels] = x.dims();
                let mask = dropout.mask(&self.name, 0..tokens * channels, self.dropout);
                x * Tensor::from_data(TensorData::new(mask, [tokens, channels]), device)
            }
            _ => x,
        };
        x.matmul(self.a.clone().transpose()).matmul(self.b.clone().transpose()).mul_scalar(self.scale)
    }
}

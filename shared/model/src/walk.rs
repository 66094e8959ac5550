//! A model walked through block by block, with a whole text at every block.
//!
//! Start from [`Walk::begin`]. No more than one block's weights are held at a time, and no gradient: this is for looking at
//! a model, such as at what its layers are multiplied with, or at how far its logits are from another's. Only our own
//! kernels are used, with f32 numbers.

use experiment::{Backend, Device, WeightType};

use crate::stage::{Input, Inputs};
use crate::{Adapter, ComputeDevice, Matrix, ModelConfig, ModelError, Part, Segments, Source, Stage};

pub struct Walk<'a> {
    source: &'a dyn Source,
    device: ComputeDevice,
    /// The residual stream before `block`, for some sequences each.
    passes: Vec<(Segments, Matrix)>,
    block: usize,
    adapter: Adapter,
}

/// Tokens that go through a block together; activations of more would not fit into caches anyway.
const PASS_TOKENS: usize = 2048;

/// The LM head alone.
pub struct LmHead(Stage);

impl<'a> Walk<'a> {
    /// Each of `sequences` attends to itself alone.
    pub fn begin(source: &'a dyn Source, sequences: &[Vec<u32>]) -> Result<Self, ModelError> {
        Self::with_adapter(source, Adapter::none(), sequences)
    }

    /// The same with an adapter for all blocks.
    pub fn with_adapter(source: &'a dyn Source, adapter: Adapter, sequences: &[Vec<u32>]) -> Result<Self, ModelError> {
        let device = Device { backend: Backend::Native, weights: WeightType::F32, ..Default::default() };
        let device = ComputeDevice::new(&device)?;
        let embedding = Stage::load(source, Part { blocks: 0..0, embedding: true, lm_head: false }, &device, None)?;
        let lora = embedding.attach(&Adapter::none())?;
        let mut passes = Vec::new();
        let mut rest = sequences;
        while !rest.is_empty() {
            let mut tokens = 0;
            let some = rest.iter().take_while(|sequence| {
                tokens += sequence.len();
                tokens <= PASS_TOKENS
            });
            let (some, behind) = rest.split_at(some.count().max(1));
            rest = behind;
            let segments = Segments::new(some.iter().map(Vec::len).collect())?;
            let residual = embedding.forward(Input::Tokens(&some.concat()), &segments, &lora)?;
            passes.push((segments, residual));
        }
        Ok(Self { source, device, passes, block: 0, adapter })
    }

    /// Takes the text through the next block; `measure` sees what its layers are multiplied with.
    ///
    /// # Panics
    /// Behind the last block.
    pub fn step(&mut self, mut measure: impl FnMut(Inputs)) -> Result<(), ModelError> {
        assert!(self.block < self.source.config().blocks, "a step behind the last block");
        let part = Part { blocks: self.block..self.block + 1, embedding: false, lm_head: false };
        let adapter = self.adapter.part(part.blocks.clone());
        let stage = Stage::load(self.source, part, &self.device, None)?;
        let lora = stage.attach(&adapter)?;
        for (segments, residual) in &mut self.passes {
            let before = std::mem::replace(residual, Matrix::new(0, 0, Vec::new()));
            let before = Input::Activations(before);
            *residual = stage.forward_measured(before, segments, &lora, |_, inputs| measure(inputs))?;
        }
        self.block += 1;
        Ok(())
    }

    /// The next block to be walked through.
    pub fn block(&self) -> usize {
        self.block
    }

    pub fn config(&self) -> &ModelConfig {
        self.source.config()
    }

    /// The device that the walk computes on, whose kernels also serve whoever looks on.
    pub fn device(&self) -> &ComputeDevice {
        &self.device
    }

    /// The residual stream behind the last block, `[tokens, width]`, and the LM head that turns it into logits.
    pub fn finish(mut self) -> Result<(Matrix, LmHead), ModelError> {
        while self.block < self.source.config().blocks {
            self.step(drop)?;
        }
        let blocks = self.source.config().blocks;
        let part = Part { blocks: blocks..blocks, embedding: false, lm_head: true };
        let head = Stage::load(self.source, part, &self.device, None)?;
        let rows = self.passes.iter().map(|(_, residual)| residual.rows()).sum();
        let values = self.passes.into_iter().flat_map(|(_, residual)| residual.into_values()).collect();
        Ok((Matrix::new(rows, self.source.config().width, values), LmHead(head)))
    }
}

impl LmHead {
    /// Of `rows` of a residual stream, `[rows, vocabulary]`.
    pub fn logits(&self, residual: &Matrix, rows: std::ops::Range<usize>) -> Result<Matrix, ModelError> {
        let (count, width) = (rows.len(), residual.columns());
        let values = residual.values()[rows.start * width..rows.end * width].to_vec();
        let lora = self.0.attach(&Adapter::none())?;
        self.0.logits(Input::Activations(Matrix::new(count, width, values)), &Segments::one(count), &lora)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::random::tests::tiny_model;

    #[test]
    fn a_walk_ends_where_the_whole_model_does() {
        let source = tiny_model(3);
        let sequences = [vec![1, 2, 3, 4], vec![200; 2040], vec![7], vec![9, 8]];
        let mut walk = Walk::begin(&source, &sequences).unwrap();
        let mut seen = 0;
        walk.step(|inputs| seen += inputs.attention.len()).unwrap();
        assert_eq!((walk.block(), seen), (1, 2047 * source.config().width));
        let (residual, head) = walk.finish().unwrap();
        let device = ComputeDevice::new(&Device::default()).unwrap();
        let stage = Stage::load(&source, Part::whole(3), &device, None).unwrap();
        let lora = stage.attach(&Adapter::none()).unwrap();
        let segments = Segments::new(sequences.iter().map(Vec::len).collect()).unwrap();
        let whole = stage.logits(Input::Tokens(&sequences.concat()), &segments, &lora).unwrap();
        let found = head.logits(&residual, 2..2047).unwrap();
        let expected = &whole.values()[2 * whole.columns()..];
        for (found, expected) in found.values().iter().zip(expected) {
            assert!((found - expected).abs() < 1e-4, "{found}, {expected}");
        }
    }
}

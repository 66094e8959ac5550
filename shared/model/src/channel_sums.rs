//! How much each channel matters that a block's layers are multiplied with: squares, summed over tokens.
//!
//! These are the diagonals of [`Moments`](crate::Moments), small enough to send: a device makes them of its own blocks, a
//! coordinator of the body's, and joined they are an importance matrix of the whole model. Sums are kept in f64, so that
//! they hardly depend on the order of the tokens, and leave in f32. Start from [`ChannelSums::new`].

use std::collections::BTreeMap;

use quant::Imatrix;

use crate::source::gguf_tensor_name;
use crate::stage::Inputs;
use crate::{LayerInput, ModelConfig, ModelError, Source};

/// Of some blocks of a model.
#[derive(Clone, PartialEq)]
pub struct ChannelSums(BTreeMap<usize, BlockSums>);

#[derive(Clone, PartialEq)]
struct BlockSums {
    tokens: u64,
    /// `[columns]`, by [`LayerInput`].
    squares: [Vec<f64>; 4],
}

impl ChannelSums {
    /// Of these blocks, over no tokens.
    pub fn new(config: &ModelConfig, blocks: impl IntoIterator<Item = usize>) -> Self {
        let empty = || BlockSums { tokens: 0, squares: LayerInput::ALL.map(|input| vec![0.0; input.columns(config)]) };
        Self(blocks.into_iter().map(|block| (block, empty())).collect())
    }

    /// Adds what the layers of a block were multiplied with, some tokens' rows.
    ///
    /// # Panics
    /// If the block is none of these.
    pub fn add(&mut self, block: usize, inputs: &Inputs) {
        let sums = self.0.get_mut(&block).expect("a block that is summed");
        for (input, squares) in LayerInput::ALL.into_iter().zip(&mut sums.squares) {
            let rows = input.of(inputs).chunks_exact(squares.len());
            if input == LayerInput::Attention {
                sums.tokens += rows.len() as u64;
            }
            for row in rows {
                squares.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
            }
        }
    }

    /// Tokens that every block has seen; nothing where blocks have seen different ones, or there is no block.
    pub fn tokens(&self) -> Option<u64> {
        let mut tokens = self.0.values().map(|sums| sums.tokens);
        let first = tokens.next()?;
        tokens.all(|tokens| tokens == first).then_some(first)
    }

    /// By block, then in the order of [`LayerInput::ALL`]: the Hugging Face name of the first matrix that is multiplied
    /// with the input, and the sums, `[columns]`.
    pub fn named(&self) -> Vec<(String, Vec<f32>)> {
        let mut named = Vec::new();
        for (block, sums) in &self.0 {
            for (input, squares) in LayerInput::ALL.into_iter().zip(&sums.squares) {
                named.push((matrix(*block, input.layers()[0]), squares.iter().map(|&square| square as f32).collect()));
            }
        }
        named
    }

    /// The same blocks with sums that came from elsewhere, in the order of [`named`](Self::named).
    ///
    /// # Errors
    /// If their number or widths are others, or a sum is negative or not finite.
    pub fn with_sums(&self, tokens: u64, sums: Vec<Vec<f32>>) -> Result<Self, ModelError> {
        let expected = 4 * self.0.len();
        if sums.len() != expected {
            return Err(ModelError::Mismatch(format!("{} inputs' sums, expected {expected}", sums.len())));
        }
        let mut sums = sums.into_iter();
        let mut with = self.clone();
        for (block, blocks) in &mut with.0 {
            blocks.tokens = tokens;
            for (input, squares) in LayerInput::ALL.into_iter().zip(&mut blocks.squares) {
                let sums = sums.next().expect("counted above");
                let name = || matrix(*block, input.layers()[0]);
                if sums.len() != squares.len() {
                    let (found, expected) = (sums.len(), squares.len());
                    return Err(ModelError::Mismatch(format!("{found} sums for {}, expected {expected}", name())));
                }
                if let Some(channel) = sums.iter().position(|sum| !sum.is_finite() || *sum < 0.0) {
                    let what = format!("the sum of channel {channel} of {} is negative or not finite", name());
                    return Err(ModelError::Mismatch(what));
                }
                *squares = sums.into_iter().map(f64::from).collect();
            }
        }
        Ok(with)
    }

    /// Whether what comes out of a block's norms is as small as a norm leaves it. By RMSNorm (arXiv 1910.07467, section 4) a
    /// row has a mean square of 1 at most before the gains, so that sums over `tokens` rows, each divided by the square of its
    /// channel's gain, add up to at most `tokens · width`. Of what is behind attention or a gate no such bound is known.
    pub fn check_norms(&self, source: &dyn Source) -> Result<(), ModelError> {
        let width = source.config().width;
        for (block, sums) in &self.0 {
            for (input, norm) in
                [(LayerInput::Attention, "input_layernorm"), (LayerInput::Ffn, "post_attention_layernorm")]
            {
                let gains = source.tensor(&matrix(*block, norm), &[width])?;
                let normed = sums.squares[input as usize].iter().zip(gains).filter(|(square, _)| **square > 0.0);
                let total: f64 = normed.map(|(square, gain)| square / f64::from(gain).powi(2)).sum();
                let most = sums.tokens as f64 * width as f64 * NORM_SLACK;
                if total > most {
                    let name = matrix(*block, input.layers()[0]);
                    let what = format!("the sums of {name} are {:.1} times what a norm can leave", total / most);
                    return Err(ModelError::Mismatch(what));
                }
            }
        }
        Ok(())
    }

    /// Sums of disjoint parts of one model.
    pub fn join(parts: impl IntoIterator<Item = Self>) -> Result<Self, ModelError> {
        let mut joined = BTreeMap::new();
        for (block, sums) in parts.into_iter().flat_map(|part| part.0) {
            if joined.insert(block, sums).is_some() {
                return Err(ModelError::Mismatch(format!("block {block} is summed twice")));
            }
        }
        Ok(Self(joined))
    }

    /// As a file for quantizers, where each matrix has the sums of its input.
    pub fn imatrix(&self, dataset: String) -> Result<Imatrix, quant::Error> {
        let mut imatrix = Imatrix::default();
        imatrix.datasets.push(dataset);
        for (block, sums) in &self.0 {
            for (input, squares) in LayerInput::ALL.into_iter().zip(&sums.squares) {
                let squares: Vec<f32> = squares.iter().map(|&square| square as f32).collect();
                for layer in input.layers() {
                    imatrix.add(&gguf_tensor_name(&matrix(*block, layer)), &squares, sums.tokens as f32)?;
                }
            }
        }
        Ok(imatrix)
    }
}

/// For rounding, here and on the other machine.
const NORM_SLACK: f64 = 1.01;

fn matrix(block: usize, layer: &str) -> String {
    format!("model.layers.{block}.{layer}.weight")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::random::tests::tiny_model;
    use crate::{ComputeDevice, Part, Segments, Source, Stage, Walk, stage::Input};

    const SEQUENCES: [&[u32]; 2] = [&[1, 2, 3], &[4, 5]];

    fn walked(source: &dyn Source) -> ChannelSums {
        let blocks = source.config().blocks;
        let mut sums = ChannelSums::new(source.config(), 0..blocks);
        let mut walk = Walk::begin(source, &SEQUENCES.map(<[u32]>::to_vec)).unwrap();
        for block in 0..blocks {
            walk.step(|inputs| sums.add(block, &inputs)).unwrap();
        }
        sums
    }

    #[test]
    fn sums_are_the_diagonals_of_second_moments() {
        let source = tiny_model(2);
        let sums = walked(&source);
        assert_eq!(sums.tokens(), Some(5));
        let mut walk = Walk::begin(&source, &SEQUENCES.map(<[u32]>::to_vec)).unwrap();
        for block in 0..2 {
            let moments = walk.moments().unwrap();
            for (input, squares) in LayerInput::ALL.into_iter().zip(&sums.0[&block].squares) {
                let columns = squares.len();
                for (column, &square) in squares.iter().enumerate() {
                    let expected = f64::from(moments.of(input)[column * (columns + 1)]);
                    assert!((square - expected).abs() <= 1e-5 * expected, "{input:?} {column}: {square}, {expected}");
                }
            }
        }
    }

    #[test]
    fn a_stage_of_several_parts_sums_what_a_walk_does() {
        let source = tiny_model(3);
        let device = ComputeDevice::new(&Default::default()).unwrap();
        let segments = Segments::new(SEQUENCES.iter().map(|some| some.len()).collect()).unwrap();
        let mut parts = Vec::new();
        let (tokens, mut x) = (SEQUENCES.concat(), None);
        for part in [
            Part { blocks: 0..1, embedding: true, lm_head: false },
            Part { blocks: 1..3, embedding: false, lm_head: false },
        ] {
            let mut sums = ChannelSums::new(source.config(), part.blocks.clone());
            let stage = Stage::load(&source, part, &device, None).unwrap();
            let lora = stage.attach(&crate::Adapter::none()).unwrap();
            let input = x.take().map_or(Input::Tokens(&tokens), Input::Activations);
            let add = |block: usize, inputs| sums.add(block, &inputs);
            x = Some(stage.forward_measured(input, &segments, &lora, add).unwrap());
            // As they cross the network.
            let sent = sums.named().into_iter().map(|(_, sums)| sums).collect();
            parts.push(ChannelSums::new(source.config(), sums.0.keys().copied()).with_sums(5, sent).unwrap());
        }
        let expected = walked(&source).imatrix(String::new()).unwrap();
        assert!(ChannelSums::join(parts.clone()).unwrap().imatrix(String::new()).unwrap() == expected);
        assert!(ChannelSums::join([parts[0].clone(), parts[0].clone()]).is_err());
    }

    #[test]
    fn norms_bound_what_comes_out_of_them() {
        let source = tiny_model(2);
        let sums = walked(&source);
        sums.check_norms(&source).unwrap();
        let scaled = |factor: f32| {
            let values = sums.named().into_iter().map(|(_, sums)| sums.iter().map(|sum| sum * factor).collect());
            sums.with_sums(5, values.collect()).unwrap().check_norms(&source).map_err(|error| error.to_string())
        };
        // A row's mean square is 1 but for the epsilon.
        scaled(0.9).unwrap();
        let error = scaled(10.0).unwrap_err();
        assert!(error.contains("q_proj.weight are 9.") || error.contains("q_proj.weight are 10."), "{error}");
    }

    #[test]
    fn sums_that_cannot_be_are_refused() {
        let empty = ChannelSums::new(tiny_model(2).config(), 0..2);
        let good: Vec<Vec<f32>> = empty.named().into_iter().map(|(_, sums)| vec![1.0; sums.len()]).collect();
        assert_eq!(empty.with_sums(3, good.clone()).unwrap().tokens(), Some(3));
        let check = |change: fn(&mut Vec<Vec<f32>>), complaint: &str| {
            let mut sums = good.clone();
            change(&mut sums);
            let error = empty.with_sums(3, sums).err().unwrap().to_string();
            assert!(error.contains(complaint), "{error}");
        };
        check(|sums| drop(sums.pop()), "7 inputs' sums, expected 8");
        check(|sums| sums[5].push(1.0), "sums for model.layers.1.self_attn.o_proj.weight, expected");
        check(|sums| sums[0][1] = -1.0, "channel 1 of model.layers.0.self_attn.q_proj.weight is negative");
        check(|sums| sums[3][0] = f32::NAN, "channel 0 of model.layers.0.mlp.down_proj.weight is negative or not");
    }
}

//! Which columns of a weight matrix matter, judged from the weights alone.
//!
//! An error in a column costs as much as the mean square of the activation that it is multiplied with. Without a text to
//! measure them on, mean squares are carried through the model: those of the embedding's columns, with earlier tokens
//! counted as the more frequent ones, through each norm and each matrix, as if activations were independent. What this
//! cannot know, it leaves open: no importance is claimed for the output of attention and for the embedding.
//! Start from [`Importance::of`].

use super::merged::Merged;
use model::{ModelConfig, ModelError, Source};

/// By block.
pub(super) struct Importance(Vec<Block>);

/// Mean squares of what the matrices of a block are multiplied with.
struct Block {
    attention_input: Vec<f32>,
    ffn_input: Vec<f32>,
    ffn_hidden: Vec<f32>,
}

impl Importance {
    /// Reads every matrix that changes the residual stream once.
    pub fn of(merged: &Merged<'_>) -> Result<Self, ModelError> {
        let weights = Weights(merged);
        let mut residual = embedded(&weights)?;
        let blocks = 0..merged.config().blocks;
        Ok(Self(blocks.map(|block| pass(&weights, block, &mut residual)).collect::<Result<_, _>>()?))
    }

    /// Of the columns of a tensor, by its Hugging Face name; `None` where nothing is known.
    pub fn columns(&self, name: &str) -> Option<&[f32]> {
        let (block, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let block = self.0.get(block.parse::<usize>().ok()?)?;
        match rest {
            "self_attn.q_proj.weight" | "self_attn.k_proj.weight" | "self_attn.v_proj.weight" => {
                Some(&block.attention_input)
            }
            "mlp.gate_proj.weight" | "mlp.up_proj.weight" => Some(&block.ffn_input),
            "mlp.down_proj.weight" => Some(&block.ffn_hidden),
            _ => None,
        }
    }
}

/// Token ids are ranks in the order of merging, and frequencies fall with the rank, but not before the bytes are over.
const RANK_OFFSET: f32 = 300.0;

/// Attention averages values over positions, which keeps about this part of their mean square.
const ATTENTION_KEEPS: f32 = 0.3;

fn embedded(weights: &Weights<'_>) -> Result<Vec<f32>, ModelError> {
    let width = weights.config().width;
    let embedding = weights.matrix("model.embed_tokens.weight", weights.config().vocabulary, width)?;
    let mut columns = vec![0f32; width];
    let (mut frequencies, mut squares) = (0f32, 0f32);
    for (rank, row) in embedding.chunks_exact(width).enumerate() {
        let square = row.iter().map(|x| x * x).sum::<f32>() / width as f32;
        if square == 0.0 {
            continue;
        }
        let frequency = 1.0 / (rank as f32 + RANK_OFFSET);
        frequencies += frequency;
        squares += frequency * square;
        // The first norm sees each token at the same size.
        for (column, x) in columns.iter_mut().zip(row) {
            *column += frequency * x * x / square;
        }
    }
    let scale = if frequencies > 0.0 { squares / (frequencies * frequencies) } else { 0.0 };
    columns.iter_mut().for_each(|column| *column *= scale);
    Ok(columns)
}

/// Takes the mean squares of the residual stream through one block.
fn pass(weights: &Weights<'_>, block: usize, residual: &mut [f32]) -> Result<Block, ModelError> {
    let &ModelConfig { width, ffn, heads, kv_heads, head_size, .. } = weights.config();
    let name = |rest: &str| format!("model.layers.{block}.{rest}.weight");

    let attention_input = weights.normed(&name("input_layernorm"), residual)?;
    let values = weights.through(&name("self_attn.v_proj"), kv_heads * head_size, &attention_input)?;
    // Each query head reads the values of its key-value head.
    let shared = heads / kv_heads;
    let mixed: Vec<f32> = (0..heads * head_size)
        .map(|column| ATTENTION_KEEPS * values[column / head_size / shared * head_size + column % head_size])
        .collect();
    add(residual, &weights.through(&name("self_attn.o_proj"), width, &mixed)?);

    let ffn_input = weights.normed(&name("post_attention_layernorm"), residual)?;
    let gates = weights.through(&name("mlp.gate_proj"), ffn, &ffn_input)?;
    let ups = weights.through(&name("mlp.up_proj"), ffn, &ffn_input)?;
    let ffn_hidden: Vec<f32> = gates.iter().zip(&ups).map(|(&gate, &up)| silu_square(gate) * up).collect();
    add(residual, &weights.through(&name("mlp.down_proj"), width, &ffn_hidden)?);
    Ok(Block { attention_input, ffn_input, ffn_hidden })
}

/// The mean square of silu(x) for x of mean square `square`: a quarter of it for small x, half of it for large.
fn silu_square(square: f32) -> f32 {
    square * (0.25 + 0.25 * square / (square + 4.0))
}

fn add(residual: &mut [f32], squares: &[f32]) {
    for (residual, square) in residual.iter_mut().zip(squares) {
        *residual += square;
    }
}

struct Weights<'a>(&'a Merged<'a>);

impl<'a> Weights<'a> {
    fn config(&self) -> &'a ModelConfig {
        self.0.config()
    }

    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Vec<f32>, ModelError> {
        self.0.tensor(name, &[rows, columns])
    }

    /// Mean squares behind a matrix of `rows`.
    fn through(&self, name: &str, rows: usize, squares: &[f32]) -> Result<Vec<f32>, ModelError> {
        let matrix = self.matrix(name, rows, squares.len())?;
        let row = |row: &[f32]| row.iter().zip(squares).map(|(w, square)| w * w * square).sum();
        Ok(matrix.chunks_exact(squares.len()).map(row).collect())
    }

    /// Mean squares behind an RMS norm.
    fn normed(&self, name: &str, squares: &[f32]) -> Result<Vec<f32>, ModelError> {
        let mean = squares.iter().sum::<f32>() / squares.len() as f32;
        let unit = if mean > 0.0 { 1.0 / mean } else { 0.0 };
        let gains = self.0.tensor(name, &[squares.len()])?;
        Ok(gains.iter().zip(squares).map(|(gain, square)| gain * gain * square * unit).collect())
    }
}

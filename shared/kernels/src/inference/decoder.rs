//! The weights of a decoder.

use super::CacheType;
use super::cache::RUN;
use crate::quantized::Matrix;
use crate::rope::HEAD_MAX;

/// Sizes, and what no matrix says.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    pub width: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub vocabulary: usize,
    pub epsilon: f32,
    /// `[head_size / 2]`, angles per position of the pairs `(i, i + head_size / 2)` of a head.
    pub frequencies: Vec<f32>,
}

/// A Llama, or with biases a Qwen2, or with norms of heads a Qwen3. Queries and keys are in the order of halves.
pub struct Decoder {
    pub(super) shape: Shape,
    /// `[vocabulary, width]`
    pub(super) embedding: Matrix,
    pub(super) blocks: Vec<DecoderBlock>,
    pub(super) norm: Vec<f32>,
    /// None where the embedding is the output as well.
    output: Option<Matrix>,
}

pub struct DecoderBlock {
    pub attention_norm: Vec<f32>,
    /// `[heads · head_size, width]`, `[kv_heads · head_size, width]` twice.
    pub qkv: [Matrix; 3],
    pub biases: Option<[Vec<f32>; 3]>,
    /// `[head_size]` each, of queries and keys.
    pub head_norms: Option<[Vec<f32>; 2]>,
    /// `[width, heads · head_size]`
    pub mix: Matrix,
    pub ffn_norm: Vec<f32>,
    /// `[ffn, width]`
    pub gate: Matrix,
    pub up: Matrix,
    /// `[width, ffn]`
    pub down: Matrix,
}

impl Shape {
    pub(super) fn queries(&self) -> usize {
        self.heads * self.head_size
    }

    pub(super) fn keys(&self) -> usize {
        self.kv_heads * self.head_size
    }

    /// Queries, keys and values.
    pub(super) fn qkv(&self) -> usize {
        self.queries() + 2 * self.keys()
    }

    /// The longest row that is multiplied.
    pub(super) fn longest(&self) -> usize {
        self.width.max(self.ffn).max(self.queries())
    }
}

impl Decoder {
    /// # Panics
    /// If sizes do not agree.
    pub fn new(
        shape: Shape,
        embedding: Matrix,
        blocks: Vec<DecoderBlock>,
        norm: Vec<f32>,
        output: Option<Matrix>,
    ) -> Self {
        let Shape { width, ffn, heads, kv_heads, head_size, vocabulary, .. } = shape;
        let check = |matrix: &Matrix, rows: usize, columns: usize| {
            assert_eq!((matrix.rows(), matrix.columns()), (rows, columns), "the shape of a decoder's matrix");
        };
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads) && head_size.is_multiple_of(2) && head_size <= HEAD_MAX);
        assert_eq!((shape.frequencies.len(), norm.len()), (head_size / 2, width));
        check(&embedding, vocabulary, width);
        output.iter().for_each(|output| check(output, vocabulary, width));
        for block in &blocks {
            let rows = [shape.queries(), shape.keys(), shape.keys()];
            for (matrix, rows) in block.qkv.iter().zip(rows) {
                check(matrix, rows, width);
            }
            for (bias, rows) in block.biases.iter().flatten().zip(rows) {
                assert_eq!(bias.len(), rows, "a bias");
            }
            assert!(block.head_norms.iter().flatten().all(|norm| norm.len() == head_size), "a norm of heads");
            assert_eq!([block.attention_norm.len(), block.ffn_norm.len()], [width; 2], "a norm");
            check(&block.mix, width, shape.queries());
            check(&block.gate, ffn, width);
            check(&block.up, ffn, width);
            check(&block.down, width, ffn);
        }
        Self { shape, embedding, blocks, norm, output }
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn output(&self) -> &Matrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// Bytes of the keys and values of so many tokens.
    pub fn kv_bytes(&self, tokens: usize, ty: CacheType) -> usize {
        let [keys, values] = ty.run_bytes(self.shape.head_size);
        self.blocks.len() * self.shape.kv_heads * tokens * ((keys + values) / RUN)
    }

    /// Bytes of the matrices.
    pub fn bytes(&self) -> usize {
        let block = |block: &DecoderBlock| {
            let DecoderBlock { qkv, mix, gate, up, down, .. } = block;
            qkv.iter().chain([mix, gate, up, down]).map(Matrix::bytes).sum::<usize>()
        };
        self.embedding.bytes()
            + self.output.as_ref().map_or(0, Matrix::bytes)
            + self.blocks.iter().map(block).sum::<usize>()
    }
}

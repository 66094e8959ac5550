//! A file's decoder in memory.

use super::config::{self, Config, layout};
use super::pack::pack_row;
use crate::gguf::{Reader, TensorType};
use crate::{BlockType, Error};
use kernels::Engine;
use kernels::inference::{Adapter, CacheType, Decoder, DecoderBlock, LayerFactors, Session};
use kernels::quantized::{GROUP, Group, Matrix};
use std::sync::{Arc, Mutex};

/// Weights, read once and kept once, in about as many bytes as in the file. Cheap to clone.
#[derive(Clone)]
pub struct Model {
    engine: Engine,
    decoder: Arc<Decoder>,
    context: usize,
    cache: CacheType,
}

/// A matrix on its way from the file.
struct Loading {
    name: String,
    ty: BlockType,
    matrix: Matrix,
    /// Rows of a head, whose order changes.
    interleaved: Option<usize>,
}

/// Groups of one matrix that are read at once.
struct Part<'a> {
    name: &'a str,
    ty: BlockType,
    first_row: usize,
    rows: usize,
    interleaved: Option<usize>,
    groups: Vec<Group<'a>>,
}

/// Bytes of the file that are read at once, about.
const PART_BYTES: usize = 128 << 10;
/// As many as a disk keeps busy.
const LOAD_THREADS_MAX: usize = 8;

impl Model {
    /// Reads and repacks all weights: for a moment on up to eight cores, however few threads the engine has.
    ///
    /// # Errors
    /// If the file cannot be read, is none of a supported decoder, or has numbers that are not finite.
    pub fn load(reader: &Reader, engine: &Engine) -> Result<Model, Error> {
        let Config { shape, blocks, context, interleaved } = config::read(reader)?;
        reader.check_used(|name| is_used(reader, blocks, name))?;
        let (queries, keys) = (shape.heads * shape.head_size, shape.kv_heads * shape.head_size);
        let head = interleaved.then_some(shape.head_size);
        let mut all = Vec::new();
        let mut sizes = Vec::new();
        let mut matrix = |name: String, rows: usize, columns: usize, interleaved: Option<usize>| {
            let ty = block_type(reader, &name, &[rows, columns])?;
            sizes.push((rows, columns, layout(ty)));
            all.push((name, ty, interleaved));
            Ok::<(), Error>(())
        };
        matrix("token_embd.weight".into(), shape.vocabulary, shape.width, None)?;
        let untied = reader.tensor("output.weight").is_ok();
        if untied {
            matrix("output.weight".into(), shape.vocabulary, shape.width, None)?;
        }
        for i in 0..blocks {
            let of_block = [
                ("attn_q", queries, shape.width, head),
                ("attn_k", keys, shape.width, head),
                ("attn_v", keys, shape.width, None),
                ("attn_output", shape.width, queries, None),
                ("ffn_gate", shape.ffn, shape.width, None),
                ("ffn_up", shape.ffn, shape.width, None),
                ("ffn_down", shape.width, shape.ffn, None),
            ];
            for (name, rows, columns, interleaved) in of_block {
                matrix(format!("blk.{i}.{name}.weight"), rows, columns, interleaved)?;
            }
        }
        let loading = |((name, ty, interleaved), matrix)| Loading { name, ty, matrix, interleaved };
        let mut all: Vec<Loading> = all.into_iter().zip(Matrix::several(&sizes)).map(loading).collect();
        fill(reader, &mut all)?;

        let mut matrices = all.into_iter().map(|loading| loading.matrix);
        let mut next = || matrices.next().expect("as many as were pushed");
        let (embedding, output) = (next(), untied.then(&mut next));
        let vector = |name: String, length: usize| -> Result<Vec<f32>, Error> {
            block_type(reader, &name, &[length])?;
            reader.read_values(&name)
        };
        let mut decoder_blocks = Vec::with_capacity(blocks);
        for i in 0..blocks {
            let of = |name: &str, length: usize| vector(format!("blk.{i}.{name}"), length);
            let optional = |name: &str| reader.tensor(&format!("blk.{i}.{name}")).is_ok();
            let biases = match optional("attn_q.bias") {
                true => {
                    let [q, k] = [("attn_q.bias", queries), ("attn_k.bias", keys)]
                        .map(|(name, length)| Ok::<_, Error>(halves(of(name, length)?, head)));
                    Some([q?, k?, of("attn_v.bias", keys)?])
                }
                false => None,
            };
            let head_norms = match optional("attn_q_norm.weight") {
                true => Some([of("attn_q_norm.weight", shape.head_size)?, of("attn_k_norm.weight", shape.head_size)?]),
                false => None,
            };
            decoder_blocks.push(DecoderBlock {
                attention_norm: of("attn_norm.weight", shape.width)?,
                qkv: [next(), next(), next()],
                biases,
                head_norms,
                mix: next(),
                ffn_norm: of("ffn_norm.weight", shape.width)?,
                gate: next(),
                up: next(),
                down: next(),
            });
        }
        let norm = vector("output_norm.weight".into(), shape.width)?;
        let decoder = Arc::new(Decoder::new(shape, embedding, decoder_blocks, norm, output));
        Ok(Model { engine: engine.clone(), decoder, context, cache: CacheType::default() })
    }

    /// The same weights; sequences keep keys and values this way.
    pub fn keeping(self, cache: CacheType) -> Model {
        Model { cache, ..self }
    }

    /// The tokens that the model was made for.
    pub fn context(&self) -> usize {
        self.context
    }

    pub fn vocabulary(&self) -> usize {
        self.decoder.shape().vocabulary
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Bytes of the matrices in memory.
    pub fn bytes(&self) -> usize {
        self.decoder.bytes()
    }

    /// Bytes of the keys and values of so many tokens.
    pub fn kv_bytes(&self, tokens: usize) -> usize {
        self.decoder.kv_bytes(tokens, self.cache)
    }

    /// A LoRA adapter for this model's sequences, which they [`adapt`](Session::adapt) to: `scale · B A` beside the weights.
    /// Rows of queries and keys are in the order of Hugging Face's files, whatever the GGUF file's order is.
    ///
    /// # Panics
    /// If factors do not have the shapes of their layers, or the rank is 0 or above [`RANK_MAX`](super::RANK_MAX).
    pub fn adapter(&self, rank: usize, scale: f32, layers: &[LayerFactors<'_>]) -> Arc<Adapter> {
        Arc::new(Adapter::new(self.decoder.shape(), self.decoder.blocks(), rank, scale, layers))
    }

    /// A new sequence of at most `context` tokens. The memory of keys and values is touched as tokens come.
    pub fn session(&self, context: usize) -> Session {
        Session::new(&self.engine, &self.decoder, context.max(1), self.cache)
    }
}

/// Whether [`Model::load`] reads this tensor of a block, or bias.
fn is_used(reader: &Reader, blocks: usize, name: &str) -> bool {
    let Some((block, of)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else { return false };
    let beside = |other: &str| reader.tensor(&format!("blk.{block}.{other}")).is_ok();
    let is_known = match of {
        "attn_q.bias" | "attn_k.bias" | "attn_v.bias" => beside("attn_q.bias"),
        "attn_q_norm.weight" | "attn_k_norm.weight" => beside("attn_q_norm.weight"),
        "attn_norm.weight" | "attn_q.weight" | "attn_k.weight" | "attn_v.weight" | "attn_output.weight" => true,
        "ffn_norm.weight" | "ffn_gate.weight" | "ffn_up.weight" | "ffn_down.weight" => true,
        _ => false,
    };
    is_known && block.parse().is_ok_and(|block: usize| block < blocks)
}

/// The type of a tensor that must have this shape.
fn block_type(reader: &Reader, name: &str, shape: &[usize]) -> Result<BlockType, Error> {
    let info = reader.tensor(name)?;
    if info.shape != shape {
        return Err(reader.malformed(format!("tensor `{name}` has shape {:?}, expected {shape:?}", info.shape)));
    }
    match info.ty {
        TensorType::Block(ty) => Ok(ty),
        TensorType::Foreign(_) => {
            let (path, tensor) = (reader.path().to_owned(), name.to_owned());
            Err(Error::UnsupportedType { path, tensor, found: info.ty.name() })
        }
    }
}

fn fill(reader: &Reader, all: &mut [Loading]) -> Result<(), Error> {
    let mut parts = Vec::new();
    for Loading { name, ty, matrix, interleaved } in all {
        let rows = matrix.rows();
        let row_bytes = ty.bytes_of(matrix.columns()).expect("the table has whole blocks");
        // Whole heads, where rows change places within one.
        let step = match *interleaved {
            None => GROUP,
            Some(head) if head.is_multiple_of(GROUP) => head,
            Some(_) => rows.next_multiple_of(GROUP),
        };
        let part_rows = (PART_BYTES / row_bytes).next_multiple_of(step).max(step);
        let mut groups = matrix.groups();
        for first_row in (0..rows).step_by(part_rows) {
            let groups = groups.by_ref().take(part_rows / GROUP).collect();
            let rows = part_rows.min(rows - first_row);
            parts.push(Part { name, ty: *ty, first_row, rows, interleaved: *interleaved, groups });
        }
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(LOAD_THREADS_MAX).min(parts.len());
    let parts = Mutex::new(parts.into_iter());
    let work = || {
        let mut bytes = Vec::new();
        loop {
            let part = parts.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
            let Some(part) = part else { return Ok(()) };
            part.fill(reader, &mut bytes)?;
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mine = work();
        others.into_iter().map(|other| other.join().expect("packing does not panic")).fold(mine, Result::and)
    })
}

impl Part<'_> {
    fn fill(mut self, reader: &Reader, bytes: &mut Vec<u8>) -> Result<(), Error> {
        reader.read_rows(self.name, self.first_row, self.rows, bytes)?;
        let row_bytes = bytes.len() / self.rows;
        for row in 0..self.rows {
            let from = &bytes[source_row(row, self.interleaved) * row_bytes..][..row_bytes];
            pack_row(self.ty, from, row % GROUP, &mut self.groups[row / GROUP])
                .map_err(|_| reader.malformed(format!("tensor `{}` has a number that is not finite", self.name)))?;
        }
        Ok(())
    }
}

/// A bias in the order of halves.
fn halves(values: Vec<f32>, interleaved: Option<usize>) -> Vec<f32> {
    (0..values.len()).map(|row| values[source_row(row, interleaved)]).collect()
}

/// Which of a file's rows is this one of the matrix: in heads of so many, the file has both halves' rows in turn.
fn source_row(row: usize, interleaved: Option<usize>) -> usize {
    match interleaved {
        None => row,
        Some(head) => row / head * head + row % (head / 2) * 2 + row % head / (head / 2),
    }
}

//! A stage on our own kernels: no graph, no tensor library; saved activations belong to the pass that waits for them.

use std::sync::Arc;

use kernels::{
    Block, BlockAdapter, BlockWeights, Cache, Engine, Frozen, HEAD_MAX, Head, Keep, LAYERS, Masks, Pair, Pass,
    Rotation, Saved, Stream,
};
use rayon::prelude::*;

use super::device::Native;
use super::{Backward, Dropout, Loss, Rows, Trained};
use crate::adapter::{TARGETS, module_path, target_index};
use crate::{Adapter, Family, Gradients, Matrix, ModelConfig, ModelError, Part, Segments, Source};

#[derive(Clone)]
pub(super) struct NativeStage(Arc<Inner>);

struct Inner {
    config: ModelConfig,
    engine: Engine,
    keep: Keep,
    /// `[vocabulary, width]`
    embedding: Option<Arc<Frozen>>,
    blocks: Vec<Block>,
    head: Option<Head>,
    /// `[vocabulary, width]`; the embedding itself where the two are tied.
    lm_head: Option<Arc<Frozen>>,
    tied: Option<Arc<Frozen>>,
}

/// The adapters of a stage's blocks.
#[derive(Clone)]
pub(super) struct Lora(Arc<LoraInner>);

struct LoraInner {
    blocks: Vec<BlockAdapter>,
    /// Whether A and B train.
    trains: [bool; 2],
    dropout: f64,
    /// Of A, for every block and layer: names the dropout mask.
    names: Vec<[String; LAYERS]>,
}

/// The saved activations of a forward pass.
pub(super) struct Pending {
    stage: NativeStage,
    pass: Pass,
    saved: Vec<Saved>,
    lora: Lora,
    dropout: Dropout,
    /// The input is a residual stream, whose gradient somebody waits for.
    input_gradient: bool,
}

const _: () = assert!(TARGETS.len() == LAYERS);

impl NativeStage {
    pub(super) fn load(
        source: &dyn Source,
        part: &Part,
        native: &Native,
        lend: Option<&Self>,
    ) -> Result<Self, ModelError> {
        let config = source.config().clone();
        if config.head_size > HEAD_MAX {
            let what = format!("has heads of {}; the native backend takes {HEAD_MAX}", config.head_size);
            return Err(ModelError::file(source.origin(), what));
        }
        if !config.head_size.is_multiple_of(2) || !config.ffn.is_multiple_of(2) {
            let (head, ffn) = (config.head_size, config.ffn);
            let what = format!("has heads of {head} and {ffn} hidden channels; the native backend takes even numbers");
            return Err(ModelError::file(source.origin(), what));
        }
        let ty = native.weights;
        let matrix = |name: &str, rows: usize, columns: usize| -> Result<Frozen, ModelError> {
            Ok(Frozen::new(rows, columns, source.tensor(name, &[rows, columns])?, ty))
        };
        let table = |name: &str| matrix(name, config.vocabulary, config.width).map(Arc::new);
        let tied = match lend.and_then(|stage| stage.0.tied.clone()) {
            Some(lent) if part.embedding || (part.lm_head && config.tied_embeddings) => Some(lent),
            _ if part.embedding || (part.lm_head && config.tied_embeddings) => {
                Some(table("model.embed_tokens.weight")?)
            }
            _ => None,
        };
        let lm_head = match part.lm_head {
            true if config.tied_embeddings => tied.clone(),
            true => Some(table("lm_head.weight")?),
            false => None,
        };
        let epsilon = config.rms_epsilon as f32;
        let head = match part.lm_head {
            true => Some(Head::new(source.tensor("model.norm.weight", &[config.width])?, epsilon)),
            false => None,
        };
        let block = |index: usize| -> Result<Block, ModelError> {
            let mut layers = Vec::new();
            for target in TARGETS {
                let [rows, columns] = config.linear_shape(target).expect("TARGETS are linear layers");
                layers.push(matrix(&format!("model.{}.weight", module_path(index, target)), rows, columns)?);
            }
            let vector = |name: &str, size: usize| source.tensor(&format!("model.layers.{index}.{name}"), &[size]);
            let [query, key] = [config.heads, config.kv_heads].map(|heads| heads * config.head_size);
            let biases = match config.qkv_bias {
                true => Some([
                    vector("self_attn.q_proj.bias", query)?,
                    vector("self_attn.k_proj.bias", key)?,
                    vector("self_attn.v_proj.bias", key)?,
                ]),
                false => None,
            };
            let head_norms = match config.family {
                Family::Qwen3 => Some([
                    vector("self_attn.q_norm.weight", config.head_size)?,
                    vector("self_attn.k_norm.weight", config.head_size)?,
                ]),
                _ => None,
            };
            Ok(Block::new(BlockWeights {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_size: config.head_size,
                epsilon,
                attention_norm: vector("input_layernorm.weight", config.width)?,
                ffn_norm: vector("post_attention_layernorm.weight", config.width)?,
                layers: layers.try_into().ok().expect("one layer for every target"),
                biases,
                head_norms,
            }))
        };
        let blocks = part.blocks.clone().into_par_iter().map(block).collect::<Result<_, _>>()?;
        let embedding = tied.clone().filter(|_| part.embedding);
        let keep = if native.recompute { Keep::Input } else { Keep::Everything };
        let engine = native.engine.clone();
        Ok(Self(Arc::new(Inner { config, engine, keep, embedding, blocks, head, lm_head, tied })))
    }

    pub(super) fn forward(&self, rows: Rows<'_>, segments: &Segments, lora: &Lora) -> Matrix {
        self.matrix(&self.residual(rows, segments, lora))
    }

    pub(super) fn forward_recorded(
        &self,
        rows: Rows<'_>,
        segments: &Segments,
        lora: &Lora,
        dropout: &Dropout,
    ) -> (Matrix, Pending) {
        let (output, pending) = self.record(rows, segments, lora, dropout);
        (self.matrix(&output), pending)
    }

    pub(super) fn loss(&self, rows: Rows<'_>, segments: &Segments, trained: &Trained, lora: &Lora) -> Loss {
        let residual = self.residual(rows, segments, lora);
        let (nats, _) = self.loss_of(&residual, trained, None);
        Loss { nats, tokens: trained.targets.len() }
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
        let (residual, mut pending) = self.record(rows, segments, lora, dropout);
        pending.input_gradient &= input_gradient;
        let (nats, gradient) = self.loss_of(&residual, trained, Some(1.0 / step_tokens as f64));
        drop(residual);
        let backward = pending.backward_stream(gradient.expect("asked for"));
        (Loss { nats, tokens: trained.targets.len() }, backward)
    }

    pub(super) fn logits(&self, rows: Rows<'_>, segments: &Segments, lora: &Lora) -> Matrix {
        let residual = self.residual(rows, segments, lora);
        let Inner { engine, config, .. } = &*self.0;
        let (head, weights) = self.head();
        Matrix::new(segments.tokens(), config.vocabulary, head.logits(engine, weights, &residual))
    }

    pub(super) fn cache(&self) -> Vec<Cache> {
        self.0.blocks.iter().map(|_| Cache::default()).collect()
    }

    /// `[vocabulary]` behind the last of the rows, which follow `before` tokens in the cache.
    pub(super) fn next_logits(&self, rows: Rows<'_>, before: usize, cache: &mut [Cache], lora: &Lora) -> Vec<f32> {
        let Inner { engine, config, blocks, .. } = &*self.0;
        let mut x = self.entry(rows);
        let tokens = x.len() / config.width;
        let pass = Pass::new(engine, &[vec![tokens]], rotation(config, &[tokens], before));
        for ((block, adapter), slot) in blocks.iter().zip(&lora.0.blocks).zip(cache) {
            x = block.next(engine, &pass, x, adapter, slot);
        }
        let last = Stream::new(engine, &x[(tokens - 1) * config.width..]);
        let (head, weights) = self.head();
        head.logits(engine, weights, &last)
    }

    fn record(&self, rows: Rows<'_>, segments: &Segments, lora: &Lora, dropout: &Dropout) -> (Stream, Pending) {
        let Inner { engine, config, blocks, keep, .. } = &*self.0;
        let input_gradient = matches!(rows, Rows::Activations(_));
        let mut x = self.entry(rows);
        let pass = Pass::new(engine, &[segments.lengths().to_vec()], rotation(config, segments.lengths(), 0));
        let mut saved = Vec::with_capacity(blocks.len());
        for (i, (block, adapter)) in blocks.iter().zip(&lora.0.blocks).enumerate() {
            let mask = lora.mask(i, config, pass.rows(), dropout);
            let masks: Option<Masks<'_>> = if lora.0.dropout > 0.0 { Some(&mask) } else { None };
            let (y, kept) = block.forward(engine, &pass, x, &[adapter], masks, *keep);
            saved.push(kept.expect("it is asked to keep"));
            x = y;
        }
        let (stage, lora, dropout) = (self.clone(), lora.clone(), dropout.clone());
        (x, Pending { stage, pass, saved, lora, dropout, input_gradient })
    }

    fn residual(&self, rows: Rows<'_>, segments: &Segments, lora: &Lora) -> Stream {
        let Inner { engine, config, blocks, .. } = &*self.0;
        let pass = Pass::new(engine, &[segments.lengths().to_vec()], rotation(config, segments.lengths(), 0));
        let each = blocks.iter().zip(&lora.0.blocks);
        each.fold(self.entry(rows), |x, (block, adapter)| {
            block.forward(engine, &pass, x, &[adapter], None, Keep::Nothing).0
        })
    }

    fn entry(&self, rows: Rows<'_>) -> Stream {
        let Inner { engine, config, embedding, .. } = &*self.0;
        match rows {
            Rows::Tokens(tokens) => {
                let embedding = embedding.as_ref().expect("the caller has looked at the part");
                let mut x = Stream::room(engine, tokens.len() * config.width);
                for (&token, row) in tokens.iter().zip(x.chunks_exact_mut(config.width)) {
                    embedding.row(token as usize, row);
                }
                x
            }
            Rows::Activations(x) => Stream::new(engine, x.values()),
        }
    }

    fn head(&self) -> (&Head, &Frozen) {
        let found = self.0.head.as_ref().zip(self.0.lm_head.as_deref());
        found.expect("the caller has looked at the part")
    }

    /// Summed loss of the trained rows of the residual stream; with a scale also the gradient of all its rows.
    fn loss_of(&self, residual: &Stream, trained: &Trained, scale: Option<f64>) -> (f64, Option<Stream>) {
        let Inner { engine, config, .. } = &*self.0;
        let width = config.width;
        let (head, weights) = self.head();
        let mut rows = Stream::room(engine, trained.rows.len() * width);
        for (&row, to) in trained.rows.iter().zip(rows.chunks_exact_mut(width)) {
            to.copy_from_slice(&residual[row as usize * width..][..width]);
        }
        let (nats, gradient) = head.loss(engine, weights, &rows, &trained.targets, scale);
        let spread = gradient.map(|gradient| {
            let mut all = Stream::room(engine, residual.len());
            all.fill(0.0);
            for (&row, from) in trained.rows.iter().zip(gradient.chunks_exact(width)) {
                all[row as usize * width..][..width].copy_from_slice(from);
            }
            all
        });
        (nats, spread)
    }

    fn matrix(&self, x: &Stream) -> Matrix {
        let width = self.0.config.width;
        Matrix::new(x.len() / width, width, x.to_vec())
    }
}

impl Lora {
    /// The caller has found that the adapter's tensors belong to the part's blocks.
    pub(super) fn new(adapter: &Adapter, part: &Part) -> Self {
        let mut blocks: Vec<BlockAdapter> = part.blocks.clone().map(|_| Default::default()).collect();
        let mut names: Vec<[String; LAYERS]> = part.blocks.clone().map(|_| Default::default()).collect();
        let scale = (adapter.config.alpha / f64::from(adapter.config.rank)) as f32;
        for [a, b] in adapter.pairs() {
            let layer = target_index(&a.target).expect("an adapter has known targets");
            let block = a.block - part.blocks.start;
            blocks[block][layer] = Some(Pair::new(adapter.config.rank as usize, &a.values, &b.values, scale));
            names[block][layer] = a.name.clone();
        }
        Self(Arc::new(LoraInner { blocks, trains: adapter.config.trains(), dropout: adapter.config.dropout, names }))
    }

    /// The masks of a block's layers.
    fn mask<'a>(
        &'a self,
        block: usize,
        config: &'a ModelConfig,
        rows: usize,
        dropout: &'a Dropout,
    ) -> impl Fn(usize, usize) -> Option<Vec<f32>> + Sync + 'a {
        move |_, layer| {
            let [_, columns] = config.linear_shape(TARGETS[layer]).expect("TARGETS are linear layers");
            Some(dropout.mask(&self.0.names[block][layer], rows * columns, self.0.dropout))
        }
    }
}

impl Pending {
    /// `[rows, columns]` of the output.
    pub(super) fn shape(&self) -> [usize; 2] {
        [self.pass.rows(), self.stage.0.config.width]
    }

    pub(super) fn backward(self, gradient: Matrix) -> Backward {
        let gradient = Stream::new(&self.stage.0.engine, gradient.values());
        self.backward_stream(gradient)
    }

    fn backward_stream(self, gradient: Stream) -> Backward {
        let Self { stage, pass, saved, lora, dropout, input_gradient } = self;
        let Inner { engine, config, blocks, .. } = &*stage.0;
        let mut by_block = Vec::with_capacity(blocks.len());
        let mut stream = Some(gradient);
        for (i, saved) in saved.into_iter().enumerate().rev() {
            let adapter = &lora.0.blocks[i];
            let mask = lora.mask(i, config, pass.rows(), &dropout);
            let masks: Option<Masks<'_>> = if lora.0.dropout > 0.0 { Some(&mask) } else { None };
            let gradient = stream.take().expect("every block but the first yields one");
            let wanted = i > 0 || input_gradient;
            let (input, gradients) =
                blocks[i].backward(engine, &pass, saved, gradient, &[adapter], lora.0.trains, masks, wanted);
            by_block.push(gradients);
            stream = input;
        }
        let of_pair = by_block.into_iter().rev().flatten().flatten().flatten();
        let adapter = Gradients::new(of_pair.flat_map(|pair| [pair.a, pair.b]).collect());
        let input = stream.filter(|_| input_gradient).map(|stream| stage.matrix(&stream));
        Backward { input, adapter }
    }
}

/// Positions start at `start` in every segment: 0, except when a cache holds the tokens before.
fn rotation(config: &ModelConfig, lengths: &[usize], start: usize) -> Rotation {
    // transformers rounds frequency and angle to f32; doing the same keeps long positions equal to it.
    let frequencies: Vec<f32> = config.rope_frequencies().into_iter().map(|f| f as f32).collect();
    let positions = lengths.iter().flat_map(|&length| start..start + length);
    let angles = positions.flat_map(|position| frequencies.iter().map(move |frequency| position as f32 * frequency));
    let (cos, sin) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
    Rotation { cos, sin }
}

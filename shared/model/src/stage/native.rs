//! A stage on our own kernels: no graph, no tensor library; saved activations belong to the pass that waits for them.

use std::ops::Range;
use std::sync::Arc;

use kernels::{
    Block, BlockAdapter, BlockWeights, Cache, Engine, Frozen, FrozenBuilder, HEAD_MAX, Head, Inputs, Keep, LAYERS,
    Masks, Pair, Pass, Rotation, Saved, Stream,
};
use rayon::prelude::*;

use group::Group;
pub(super) use recorded::Pending;
use recorded::Recorded;

use super::device::Native;
use super::{Backward, Dropout, Loss, Rows, Trained};
use crate::adapter::{TARGETS, module_path, target_index};
use crate::{Adapter, Family, Gradients, Matrix, ModelConfig, ModelError, Part, Segments, Source};

mod group;
mod recorded;

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
            let mut frozen = FrozenBuilder::new(rows, columns, ty);
            source.tensor_pieces(name, &[rows, columns], |rows| frozen.push(rows))?;
            Ok(frozen.finish())
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
        let keep = if native.recompute { Keep::Input } else { Keep::Everything };
        let epsilon = config.rms_epsilon as f32;
        let head = match part.lm_head {
            true => Some(Head::new(source.tensor("model.norm.weight", &[config.width])?, epsilon, keep)),
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
        let engine = native.engine.clone();
        Ok(Self(Arc::new(Inner { config, engine, keep, embedding, blocks, head, lm_head, tied })))
    }

    pub(super) fn forward(&self, rows: Rows<'_>, segments: &Segments, lora: &Lora) -> Matrix {
        self.matrix(&self.residual(rows, segments, lora))
    }

    /// In as few passes as the adapters' ranks allow.
    pub(super) fn forward_together(&self, all: Vec<(Matrix, &Segments, &Lora)>) -> Vec<Matrix> {
        self.together(
            all,
            |(_, _, lora)| lora,
            |some| {
                let rows = some.iter().map(|(x, ..)| x.values()).collect::<Vec<_>>().concat();
                let groups: Vec<Group> =
                    some.iter().map(|(_, segments, lora)| Group::whole(segments, lora, None)).collect();
                let y = self.run(Stream::new(&self.0.engine, &rows), &groups, Keep::Nothing).0;
                self.matrices(&y, groups.iter().map(Group::rows))
            },
        )
    }

    /// As [`forward_together`](Self::forward_together), recorded.
    pub(super) fn forward_recorded_together(
        &self,
        all: Vec<(Rows<'_>, &Segments, &Lora, &Dropout)>,
    ) -> Vec<(Matrix, Pending)> {
        self.together(
            all,
            |(_, _, lora, _)| lora,
            |some| {
                let (mut rows, mut groups, mut places) = (Vec::new(), Vec::new(), Vec::new());
                let input_gradient = some.iter().all(|(rows, ..)| matches!(rows, Rows::Activations(_)));
                for (one, segments, lora, dropout) in some {
                    rows.push(one);
                    let first = groups.len();
                    groups.extend(Group::within_limit(segments, lora, Some(dropout)));
                    places.push(first..groups.len());
                }
                let (y, recorded) = self.record(self.entries(rows), groups);
                let sizes = places.iter().map(|groups| recorded.rows(groups));
                let matrices = self.matrices(&y, sizes);
                let recorded = Arc::new(recorded);
                let pending = |groups| Pending { recorded: recorded.clone(), groups, input_gradient };
                matrices.into_iter().zip(places).map(|(y, groups)| (y, pending(groups))).collect()
            },
        )
    }

    /// Runs `pass` over those of `all` whose adapters have the same ranks, and gives the results in the order of `all`.
    fn together<'a, T, R>(
        &self,
        all: Vec<T>,
        lora: impl Fn(&T) -> &'a Lora,
        mut pass: impl FnMut(Vec<T>) -> Vec<R>,
    ) -> Vec<R> {
        let mut results: Vec<Option<R>> = all.iter().map(|_| None).collect();
        let mut rest: Vec<(usize, T)> = all.into_iter().enumerate().collect();
        while let Some((_, first)) = rest.first() {
            let first = lora(first).clone();
            let (alike, others) = rest.into_iter().partition(|(_, one)| lora(one).is_like(&first));
            let (places, some): (Vec<usize>, Vec<T>) = Vec::into_iter(alike).unzip();
            rest = others;
            for (place, result) in places.into_iter().zip(pass(some)) {
                results[place] = Some(result);
            }
        }
        results.into_iter().map(|result| result.expect("every one was in some pass")).collect()
    }

    pub(super) fn loss(&self, rows: Rows<'_>, segments: &Segments, trained: &Trained, lora: &Lora) -> Loss {
        let mut nats = 0.0;
        for group in Group::within_limit(segments, lora, None) {
            let trained = trained.of(group.range());
            if !trained.rows.is_empty() {
                let x = self.entry_of(&rows, group.range());
                nats += self.loss_of(&self.run(x, &[group], Keep::Nothing).0, &trained, None).0;
            }
        }
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
        let input_gradient = input_gradient && matches!(rows, Rows::Activations(_));
        let (mut nats, mut all) = (0.0, None);
        for group in Group::within_limit(segments, lora, Some(dropout)) {
            let trained = trained.of(group.range());
            let (residual, recorded) = self.record(self.entry_of(&rows, group.range()), vec![group]);
            let (group_nats, gradient) = self.loss_of(&residual, &trained, Some(1.0 / step_tokens as f64));
            drop(residual);
            nats += group_nats;
            let backward = recorded.backward(&[1], gradient.expect("asked for"), input_gradient).remove(0);
            all = Some(match all {
                None => backward,
                Some(above) => Backward::joined(above, backward),
            });
        }
        let backward = all.expect("a micro-batch has at least one sequence");
        (Loss { nats, tokens: trained.targets.len() }, backward)
    }

    pub(super) fn logits(&self, rows: Rows<'_>, segments: &Segments, lora: &Lora) -> Matrix {
        let residual = self.residual(rows, segments, lora);
        let Inner { engine, config, .. } = &*self.0;
        let (head, weights) = self.head();
        Matrix::new(segments.tokens(), config.vocabulary, head.logits(engine, weights, &residual))
    }

    pub(super) fn forward_measured(
        &self,
        rows: Rows<'_>,
        segments: &Segments,
        lora: &Lora,
        measure: &mut dyn FnMut(usize, Inputs),
    ) -> Matrix {
        let Inner { engine, config, blocks, .. } = &*self.0;
        let pass = Pass::new(engine, &[segments.lengths().to_vec()], rotation(config, segments.lengths(), 0));
        let mut x = self.entry(rows);
        for (i, (block, adapter)) in blocks.iter().zip(&lora.0.blocks).enumerate() {
            let (y, inputs) = block.forward_measured(engine, &pass, x, &[adapter]);
            measure(i, inputs);
            x = y;
        }
        self.matrix(&x)
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

    fn record(&self, x: Stream, groups: Vec<Group>) -> (Stream, Recorded) {
        let (y, pass, saved) = self.run(x, &groups, self.0.keep);
        (y, Recorded { stage: self.clone(), pass, groups, saved })
    }

    /// All blocks forwards; what each leaves, if it is asked to keep anything.
    fn run(&self, x: Stream, groups: &[Group], keep: Keep) -> (Stream, Pass, Vec<Saved>) {
        let Inner { engine, blocks, .. } = &*self.0;
        let pass = self.pass(groups);
        let mut saved = Vec::with_capacity(blocks.len());
        let x = blocks.iter().enumerate().fold(x, |x, (i, block)| {
            let mask = self.masks(groups, i);
            let masks: Option<Masks<'_>> = if groups.iter().any(Group::drops) { Some(&mask) } else { None };
            let adapters: Vec<&BlockAdapter> = groups.iter().map(|group| &group.lora.0.blocks[i]).collect();
            let (y, kept) = block.forward(engine, &pass, x, &adapters, masks, keep);
            saved.extend(kept);
            y
        });
        (x, pass, saved)
    }

    fn pass(&self, groups: &[Group]) -> Pass {
        let lengths: Vec<Vec<usize>> = groups.iter().map(|group| group.lengths.clone()).collect();
        Pass::new(&self.0.engine, &lengths, rotation(&self.0.config, &lengths.concat(), 0))
    }

    /// The dropout masks of a block's layers, by group.
    fn masks<'a>(&'a self, groups: &'a [Group], block: usize) -> impl Fn(usize, usize) -> Option<Vec<f32>> + Sync + 'a {
        move |group, layer| {
            let Group { lora, dropout, .. } = &groups[group];
            let dropout = dropout.as_ref().filter(|_| lora.0.dropout > 0.0)?;
            let [_, columns] = self.0.config.linear_shape(TARGETS[layer]).expect("TARGETS are linear layers");
            let Range { start, end } = groups[group].range();
            Some(dropout.mask(&lora.0.names[block][layer], start * columns..end * columns, lora.0.dropout))
        }
    }

    fn residual(&self, rows: Rows<'_>, segments: &Segments, lora: &Lora) -> Stream {
        self.run(self.entry(rows), &[Group::whole(segments, lora, None)], Keep::Nothing).0
    }

    /// The inputs of several groups, one after the other.
    fn entries(&self, mut rows: Vec<Rows<'_>>) -> Stream {
        if rows.len() == 1 {
            return self.entry(rows.remove(0));
        }
        let streams: Vec<Stream> = rows.into_iter().map(|rows| self.entry(rows)).collect();
        joined(&self.0.engine, &streams)
    }

    fn entry(&self, rows: Rows<'_>) -> Stream {
        let all = match &rows {
            Rows::Tokens(tokens) => tokens.len(),
            Rows::Activations(x) => x.rows(),
        };
        self.entry_of(&rows, 0..all)
    }

    fn entry_of(&self, rows: &Rows<'_>, range: Range<usize>) -> Stream {
        let Inner { engine, config, embedding, .. } = &*self.0;
        match rows {
            Rows::Tokens(tokens) => {
                let embedding = embedding.as_ref().expect("the caller has looked at the part");
                let mut x = Stream::room(engine, range.len() * config.width);
                for (&token, row) in tokens[range].iter().zip(x.chunks_exact_mut(config.width)) {
                    embedding.row(token as usize, row);
                }
                x
            }
            Rows::Activations(x) => {
                Stream::new(engine, &x.values()[range.start * config.width..range.end * config.width])
            }
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
        if trained.rows.is_empty() {
            return (0.0, scale.map(|_| Stream::zeros(engine, residual.len())));
        }
        let (head, weights) = self.head();
        let mut rows = Stream::room(engine, trained.rows.len() * width);
        for (&row, to) in trained.rows.iter().zip(rows.chunks_exact_mut(width)) {
            to.copy_from_slice(&residual[row as usize * width..][..width]);
        }
        let (nats, gradient) = head.loss(engine, weights, &rows, &trained.targets, scale);
        let spread = gradient.map(|gradient| {
            let mut all = Stream::zeros(engine, residual.len());
            for (&row, from) in trained.rows.iter().zip(gradient.chunks_exact(width)) {
                all[row as usize * width..][..width].copy_from_slice(from);
            }
            all
        });
        (nats, spread)
    }

    fn matrix(&self, x: &[f32]) -> Matrix {
        let width = self.0.config.width;
        Matrix::new(x.len() / width, width, x.to_vec())
    }

    /// Cuts `x` into matrices of these many rows.
    fn matrices(&self, x: &[f32], rows: impl Iterator<Item = usize>) -> Vec<Matrix> {
        let mut rest = x;
        let mut next = |rows: usize| {
            let (rows, behind) = rest.split_at(rows * self.0.config.width);
            rest = behind;
            self.matrix(rows)
        };
        rows.map(&mut next).collect()
    }
}

/// Rows of several streams, one after the other.
fn joined(engine: &Engine, streams: &[Stream]) -> Stream {
    let mut all = Stream::room(engine, streams.iter().map(|stream| stream.len()).sum());
    let mut at = 0;
    for stream in streams {
        all[at..at + stream.len()].copy_from_slice(stream);
        at += stream.len();
    }
    all
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

    /// Whether a pass can take both: adapters of the same ranks, with or without dropout.
    fn is_like(&self, other: &Self) -> bool {
        let ranks = |lora: &Self| -> Vec<Option<usize>> {
            lora.0.blocks.iter().flatten().map(|pair| pair.as_ref().map(Pair::rank)).collect()
        };
        Arc::ptr_eq(&self.0, &other.0)
            || (self.0.trains == other.0.trains && self.0.dropout == other.0.dropout && ranks(self) == ranks(other))
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

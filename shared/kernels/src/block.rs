//! A decoder block with frozen weights, forwards and back. Rows are tokens; the residual stream is f32.
//!
//! The backward pass is written out: no gradient of a weight exists, only those of the adapters' factors and of the
//! block's input. Kept for it are the block's input, what attention needs, and gate and up; the rest is made again.

use crate::adapter::{BlockAdapter, Inners, InputRows, LAYERS, Layers, Masks, PairGradients};
use crate::attention::{self, Shape, Span};
use crate::buffer::Buffer;
use crate::engine::Engine;
use crate::frozen::Frozen;
use crate::gate;
use crate::kept::Kept;
use crate::norm::RmsNorm;
use crate::product::{Columns, Inner, LowRank, Part, Plus, Term, product};
use crate::rope::{self, Heads, Rotation};
use crate::rows::{Blocking, Group, Packed};

/// What a block is made of; the layers stand in the order of the adapters' [`LAYERS`].
pub struct BlockWeights {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub epsilon: f32,
    /// `[width]`
    pub attention_norm: Vec<f32>,
    pub ffn_norm: Vec<f32>,
    /// `[out, in]`
    pub layers: [Frozen; LAYERS],
    /// Of q, k and v.
    pub biases: Option<[Vec<f32>; 3]>,
    /// `[head_size]`, of every query's and every key's head (Qwen3).
    pub head_norms: Option<[Vec<f32>; 2]>,
}

pub struct Block {
    shape: Shape,
    width: usize,
    ffn: usize,
    attention_norm: RmsNorm,
    ffn_norm: RmsNorm,
    layers: [Frozen; LAYERS],
    /// Of q, k and v side by side.
    biases: Option<Vec<f32>>,
    head_norms: Option<[RmsNorm; 2]>,
}

/// The rows of a pass: which segment, position and adapter each has.
pub struct Pass {
    pub(crate) blocking: Blocking,
    /// `(first row, rows)` of every segment; none lies in two groups.
    pub(crate) segments: Vec<Span>,
    pub(crate) rotation: Rotation,
}

/// What a block's forward pass leaves for its backward pass.
pub struct Saved {
    pub(crate) x: Kept,
    /// Absent where everything else is made again from x.
    pub(crate) inner: Option<SavedInner>,
}

pub(crate) struct SavedInner {
    attention_factors: Buffer<f32>,
    ffn_factors: Buffer<f32>,
    /// Before norms and rotation of the heads, where they have norms.
    raw_heads: Option<Kept>,
    qkv: Kept,
    /// Absent where no adapter asks what went into o.
    pub(crate) mixed: Option<Kept>,
    sums: Buffer<f32>,
    pub(crate) middle: Kept,
    pub(crate) gate_up: Kept,
    /// `x Aᵀ` of q, k and v, of o, of gate and up, and of down.
    inners: [Option<Inners>; 4],
}

/// What one group of a pass has left in a block.
pub struct GroupSaved<'a> {
    pub saved: &'a Saved,
    pub pass: &'a Pass,
    pub group: usize,
}

impl Saved {
    /// What groups of several passes have left, for a backward pass over them together. Their adapters have the same
    /// ranks, and the passes were kept alike.
    ///
    /// # Panics
    /// If not, or if there is no group.
    pub fn gathered<'a>(engine: &Engine, groups: &[GroupSaved<'a>]) -> Self {
        let x: Vec<&Kept> = groups.iter().map(|part| &part.saved.x).collect();
        let inners: Vec<&SavedInner> = groups.iter().filter_map(|part| part.saved.inner.as_ref()).collect();
        assert!(inners.is_empty() || inners.len() == groups.len(), "passes that were kept differently");
        let inner = (!inners.is_empty()).then(|| SavedInner {
            attention_factors: gathered(engine, groups, &inners, |inner| &inner.attention_factors),
            ffn_factors: gathered(engine, groups, &inners, |inner| &inner.ffn_factors),
            raw_heads: inners[0].raw_heads.is_some().then(|| {
                gathered_kept(engine, groups, inners.iter().map(|inner| inner.raw_heads.as_ref().expect("kept alike")))
            }),
            qkv: gathered_kept(engine, groups, inners.iter().map(|inner| &inner.qkv)),
            // Where one has none, no adapter of these groups asks, for they are alike.
            mixed: inners
                .iter()
                .map(|inner| inner.mixed.as_ref())
                .collect::<Option<Vec<_>>>()
                .map(|mixed| gathered_kept(engine, groups, mixed.into_iter())),
            sums: gathered(engine, groups, &inners, |inner| &inner.sums),
            middle: gathered_kept(engine, groups, inners.iter().map(|inner| &inner.middle)),
            gate_up: gathered_kept(engine, groups, inners.iter().map(|inner| &inner.gate_up)),
            inners: std::array::from_fn(|i| {
                let parts = groups.iter().zip(&inners);
                let of_group =
                    |(part, inner): (&GroupSaved<'a>, &&'a SavedInner)| Some((inner.inners[i].as_ref()?, part.rows()));
                let some: Vec<_> = parts.filter_map(of_group).collect();
                (!some.is_empty()).then(|| Inners::gathered(engine, &some))
            }),
        });
        Self { x: gathered_kept(engine, groups, x.into_iter()), inner }
    }
}

impl<'a> GroupSaved<'a> {
    fn rows(&self) -> &'a Group {
        &self.pass.blocking.groups[self.group]
    }

    /// Where the group's rows lie among so many numbers of all rows.
    fn of(&self, numbers: usize) -> std::ops::Range<usize> {
        let columns = numbers / self.pass.blocking.rows;
        let rows = &self.rows().rows;
        rows.start * columns..rows.end * columns
    }
}

fn gathered(
    engine: &Engine,
    groups: &[GroupSaved<'_>],
    inners: &[&SavedInner],
    of: impl Fn(&SavedInner) -> &Buffer<f32>,
) -> Buffer<f32> {
    let parts: Vec<_> = groups.iter().zip(inners).map(|(part, inner)| (of(inner), part.of(of(inner).len()))).collect();
    engine.gathered(&parts)
}

fn gathered_kept<'a>(engine: &Engine, groups: &[GroupSaved<'_>], kept: impl Iterator<Item = &'a Kept>) -> Kept {
    let parts: Vec<_> = groups.iter().zip(kept).map(|(part, kept)| (kept, part.of(kept.len()))).collect();
    Kept::gathered(engine, &parts)
}

/// Gradients of a block's adapters, by group.
pub type BlockGradients = Vec<[Option<PairGradients>; LAYERS]>;

/// What of a pass is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    /// The block's input alone: half as much arithmetic again, for a tenth of the memory.
    Input,
    /// All that the backward pass cannot make again at once.
    Everything,
    /// Likewise, and what went into o.
    Measured,
}

const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
pub(crate) const O: usize = 3;
pub(crate) const GATE: usize = 4;
pub(crate) const UP: usize = 5;
pub(crate) const DOWN: usize = 6;

impl Pass {
    /// `group_segments[i]` are the lengths of the segments that have adapter i.
    ///
    /// # Panics
    /// If the rotation has not a row for every token.
    pub fn new(engine: &Engine, group_segments: &[Vec<usize>], rotation: Rotation) -> Self {
        let group_rows: Vec<usize> = group_segments.iter().map(|lengths| lengths.iter().sum()).collect();
        let blocking = Blocking::new(&group_rows, engine.path().tile_rows());
        let mut row = 0;
        let segments = group_segments.iter().flatten().map(|&length| {
            row += length;
            (row - length, length)
        });
        Self { segments: segments.collect(), blocking, rotation }
    }

    pub fn rows(&self) -> usize {
        self.blocking.rows
    }
}

impl Block {
    /// # Panics
    /// If the sizes do not fit each other.
    pub fn new(weights: BlockWeights) -> Self {
        let BlockWeights { heads, kv_heads, head_size, epsilon, attention_norm, ffn_norm, layers, .. } = weights;
        let norm = |weight| RmsNorm { weight, epsilon };
        let (width, ffn) = (attention_norm.len(), layers[GATE].rows());
        let [query, key] = [heads, kv_heads].map(|heads| heads * head_size);
        let expected =
            [(query, width), (key, width), (key, width), (width, query), (ffn, width), (ffn, width), (width, ffn)];
        for (layer, expected) in layers.iter().zip(expected) {
            assert_eq!((layer.rows(), layer.columns()), expected, "a block's layer");
        }
        assert_eq!(ffn_norm.len(), width, "a block's norm");
        for (bias, size) in weights.biases.iter().flatten().zip([query, key, key]) {
            assert_eq!(bias.len(), size, "a block's bias");
        }
        for norm in weights.head_norms.iter().flatten() {
            assert_eq!(norm.len(), head_size, "a norm of heads");
        }
        // Halves of a head are rotated together; pairs of bf16 lie in gate or in up.
        assert!(head_size.is_multiple_of(2) && ffn.is_multiple_of(2), "heads of {head_size} and {ffn} hidden channels");
        Self {
            shape: Shape { heads, kv_heads, size: head_size },
            width,
            ffn,
            attention_norm: norm(attention_norm),
            ffn_norm: norm(ffn_norm),
            layers,
            biases: weights.biases.map(|biases| biases.concat()),
            head_norms: weights.head_norms.map(|norms| norms.map(norm)),
        }
    }

    /// Bytes of the weights in memory.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(Frozen::bytes).sum()
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    pub(crate) fn layers(&self) -> &[Frozen; LAYERS] {
        &self.layers
    }

    /// Before attention and before the feed-forward layers.
    pub(crate) fn norms(&self) -> [&RmsNorm; 2] {
        [&self.attention_norm, &self.ffn_norm]
    }

    /// Channels inside the feed-forward layers.
    pub(crate) fn ffn(&self) -> usize {
        self.ffn
    }

    /// Parameters of the frozen layers.
    pub fn parameters(&self) -> usize {
        self.layers.iter().map(|layer| layer.rows() * layer.columns()).sum()
    }

    /// `x [rows, width]` → the block's output, and what the backward pass needs.
    pub fn forward(
        &self,
        engine: &Engine,
        pass: &Pass,
        x: Stream,
        adapters: &[&BlockAdapter],
        masks: Option<Masks<'_>>,
        keep: Keep,
    ) -> (Stream, Option<Saved>) {
        let Stream(x) = x;
        let (output, inner) = self.forward_inner(engine, pass, &x, adapters, masks, keep);
        let saved = match keep {
            Keep::Nothing => None,
            // Made again, the block must come out bit for bit as it did.
            Keep::Input => Some(Saved { x: Kept::F32(x), inner: None }),
            Keep::Everything | Keep::Measured => Some(Saved { x: Kept::new(engine, x), inner }),
        };
        (Stream(output), saved)
    }

    fn forward_inner(
        &self,
        engine: &Engine,
        pass: &Pass,
        x: &Buffer<f32>,
        adapters: &[&BlockAdapter],
        masks: Option<Masks<'_>>,
        keep: Keep,
    ) -> (Buffer<f32>, Option<SavedInner>) {
        let Pass { blocking, segments, rotation } = pass;
        let keeps_mixed = keep == Keep::Measured;
        let keep = matches!(keep, Keep::Everything | Keep::Measured);
        let layers = |layers| Layers { engine, blocking, adapters, masks, layers };

        let (h, attention_factors) = self.attention_norm.packed(engine, blocking, x);
        let inputs = layers(&[Q, K, V]);
        let inputs_inner = inputs.inner_of_input(&h, &|| self.attention_norm.rows(engine, x));
        let mut qkv = self.biases_or_room(engine, blocking.rows);
        let stride = self.shape.stride();
        let biases = if self.biases.is_some() { Plus::Itself } else { Plus::Nothing };
        let columns: Vec<Columns<'_>> = [Q, K, V]
            .into_iter()
            .enumerate()
            .map(|(i, layer)| {
                let low_rank = inputs.of_output(i, &inputs_inner);
                let term = forward_term(&h, &self.layers[layer], low_rank);
                let columns = self.layers[layer].rows();
                Columns { at: self.heads_at()[i], columns, terms: vec![term], plus: biases }
            })
            .collect();
        product(engine, blocking, &mut qkv, stride, &columns);
        drop(columns);
        drop(h);
        let raw_heads = (keep && self.head_norms.is_some()).then(|| Kept::new(engine, engine.copy_of(&qkv)));
        rope::rotate(engine, &mut qkv, &self.rotated_heads(), rotation, false);
        let (mixed, sums) = attention::forward(engine, self.shape, segments, &qkv);

        let output = layers(&[O]);
        let packed = Packed::of(engine, blocking, &mixed, self.layers[O].columns());
        let output_inner = output.inner_of_input(&packed, &|| engine.copy_of(&mixed));
        let mut middle = engine.take(x.len());
        let term = forward_term(&packed, &self.layers[O], output.of_output(0, &output_inner));
        product(engine, blocking, &mut middle, self.width, &[self.whole_width(term, x)]);
        drop(packed);

        let (h, ffn_factors) = self.ffn_norm.packed(engine, blocking, &middle);
        let gates = layers(&[GATE, UP]);
        let gates_inner = gates.inner_of_input(&h, &|| self.ffn_norm.rows(engine, &middle));
        let mut gate_up = engine.take(blocking.rows * 2 * self.ffn);
        let columns = [GATE, UP].map(|layer| {
            let i = layer - GATE;
            let term = forward_term(&h, &self.layers[layer], gates.of_output(i, &gates_inner));
            Columns { at: i * self.ffn, columns: self.ffn, terms: vec![term], plus: Plus::Nothing }
        });
        product(engine, blocking, &mut gate_up, 2 * self.ffn, &columns);
        drop(columns);
        drop(h);

        let down = layers(&[DOWN]);
        let mut kept_gate_up = (keep && engine.keeps_bf16()).then(|| engine.take::<u16>(gate_up.len()));
        let gated = gate::packed(engine, blocking, &gate_up, self.ffn, kept_gate_up.as_deref_mut());
        let down_inner = down.inner_of_input(&gated, &|| gate::rows(engine, &gate_up, self.ffn));
        let mut output = engine.take(x.len());
        let term = forward_term(&gated, &self.layers[DOWN], down.of_output(0, &down_inner));
        product(engine, blocking, &mut output, self.width, &[self.whole_width(term, &middle)]);
        drop(gated);

        let kept = |numbers| Kept::new(engine, numbers);
        let saved = keep.then(|| SavedInner {
            attention_factors,
            ffn_factors,
            raw_heads,
            qkv: kept(qkv),
            mixed: (keeps_mixed || output_inner.is_some()).then(|| kept(mixed)),
            sums,
            middle: kept(middle),
            gate_up: match kept_gate_up {
                Some(narrow) => Kept::Bf16(narrow),
                None => Kept::F32(gate_up),
            },
            inners: [inputs_inner, output_inner, gates_inner, down_inner],
        });
        (output, saved)
    }

    /// The gradient of the block's input, if asked for, and those of the adapters, from the gradient of its output.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        engine: &Engine,
        pass: &Pass,
        saved: Saved,
        gradient: Stream,
        adapters: &[&BlockAdapter],
        trains: [bool; 2],
        masks: Option<Masks<'_>>,
        input_gradient: bool,
    ) -> (Option<Stream>, BlockGradients) {
        let Pass { blocking, segments, rotation } = pass;
        let layers = |layers| Layers { engine, blocking, adapters, masks, layers };
        let mut gradients: BlockGradients = adapters.iter().map(|_| Default::default()).collect();
        let (x, inner) = match saved {
            Saved { x, inner: Some(inner) } => (x.widened(engine), inner),
            Saved { x, inner: None } => {
                let x = x.widened(engine);
                let (_, inner) = self.forward_inner(engine, pass, &x, adapters, masks, Keep::Everything);
                (x, inner.expect("everything is kept"))
            }
        };
        let Stream(mut gradient) = gradient;
        let rows = blocking.rows;
        let [inputs_inner, output_inner, gates_inner, down_inner] = inner.inners;

        // y = middle + W_down (silu(gate) ∘ up)
        let down = layers(&[DOWN]);
        let g = Packed::of(engine, blocking, &gradient, self.width);
        let g_inner = [down.inner_of_gradient(DOWN, Part::all(&g))];
        let mut gated_gradient = engine.take(rows * self.ffn);
        let term = backward_term(&g, 0, &self.layers[DOWN], down.of_input(DOWN, &g_inner[0]));
        let all = Columns { at: 0, columns: self.ffn, terms: vec![term], plus: Plus::Nothing };
        product(engine, blocking, &mut gated_gradient, self.ffn, &[all]);
        down.add_masked_input_gradient(DOWN, &g_inner[0], &mut gated_gradient);
        drop(g);
        let (gate_up_gradient, gated) =
            gate::backward(engine, inner.gate_up, &gated_gradient, self.ffn, down_inner.is_some());
        drop(gated_gradient);
        if let Some(gated) = gated {
            let have = InputRows::Have(&gated);
            down.gradients(trains, &down_inner, &g_inner, &have, &gradient, &[0], &mut gradients);
        }
        drop((down_inner, g_inner));

        // gate and up of h = norm(middle)
        let middle = inner.middle.widened(engine);
        let gates = layers(&[GATE, UP]);
        let g = Packed::of(engine, blocking, &gate_up_gradient, 2 * self.ffn);
        let mut h_gradient = engine.take(rows * self.width);
        let places = [0, self.ffn];
        let g_inner = Back { layers: gates, block: self, g: &g }.input_gradient(&places, &mut h_gradient);
        drop(g);
        let make = || self.ffn_norm.rows(engine, &middle);
        let h = InputRows::Make(&make);
        gates.gradients(trains, &gates_inner, &g_inner, &h, &gate_up_gradient, &places, &mut gradients);
        drop(gate_up_gradient);
        self.ffn_norm.backward(engine, &middle, &inner.ffn_factors, &h_gradient, &mut gradient);
        drop(middle);

        // middle = x + W_o mixed
        let output = layers(&[O]);
        let g = Packed::of(engine, blocking, &gradient, self.width);
        let g_inner = [output.inner_of_gradient(O, Part::all(&g))];
        let columns = self.layers[O].columns();
        let mut mixed_gradient = engine.take(rows * columns);
        let term = backward_term(&g, 0, &self.layers[O], output.of_input(O, &g_inner[0]));
        let all = Columns { at: 0, columns, terms: vec![term], plus: Plus::Nothing };
        product(engine, blocking, &mut mixed_gradient, columns, &[all]);
        output.add_masked_input_gradient(O, &g_inner[0], &mut mixed_gradient);
        drop(g);
        if let Some(mixed) = inner.mixed.filter(|_| output_inner.is_some()) {
            let mixed = mixed.widened(engine);
            let have = InputRows::Have(&mixed);
            output.gradients(trains, &output_inner, &g_inner, &have, &gradient, &[0], &mut gradients);
        }
        drop(g_inner);

        let qkv = inner.qkv.widened(engine);
        let mut qkv_gradient = attention::backward(engine, self.shape, segments, &qkv, &inner.sums, &mixed_gradient);
        drop((qkv, mixed_gradient));
        let plain_heads: Vec<_> = self.rotated_heads().into_iter().map(|(heads, _)| (heads, None)).collect();
        rope::rotate(engine, &mut qkv_gradient, &plain_heads, rotation, true);
        if let (Some(raw), Some(norms)) = (inner.raw_heads, &self.head_norms) {
            let raw = raw.widened(engine);
            for ((heads, _), norm) in plain_heads.into_iter().zip(norms) {
                rope::norm_backward(engine, &raw, &mut qkv_gradient, heads, norm);
            }
        }

        // q, k and v of h = norm(x)
        let inputs = layers(&[Q, K, V]);
        let g = Packed::of(engine, blocking, &qkv_gradient, self.shape.stride());
        let places = self.heads_at();
        let back = Back { layers: inputs, block: self, g: &g };
        let g_inner = match input_gradient {
            true => back.input_gradient(&places, &mut h_gradient),
            false => back.inners(&places),
        };
        drop(g);
        let make = || self.attention_norm.rows(engine, &x);
        let h = InputRows::Make(&make);
        inputs.gradients(trains, &inputs_inner, &g_inner, &h, &qkv_gradient, &places, &mut gradients);
        let input = input_gradient.then(|| {
            self.attention_norm.backward(engine, &x, &inner.attention_factors, &h_gradient, &mut gradient);
            Stream(gradient)
        });
        (input, gradients)
    }

    /// Where queries, keys and values begin.
    pub(crate) fn heads_at(&self) -> [usize; 3] {
        let Shape { heads, kv_heads, size } = self.shape;
        [0, heads * size, (heads + kv_heads) * size]
    }

    pub(crate) fn rotated_heads(&self) -> [(Heads, Option<&RmsNorm>); 2] {
        let Shape { heads, kv_heads, size } = self.shape;
        let stride = self.shape.stride();
        let norm = |i: usize| self.head_norms.as_ref().map(|norms| &norms[i]);
        [
            (Heads { at: 0, heads, size, stride }, norm(0)),
            (Heads { at: heads * size, heads: kv_heads, size, stride }, norm(1)),
        ]
    }

    fn biases_or_room(&self, engine: &Engine, rows: usize) -> Buffer<f32> {
        let mut qkv = engine.take(rows * self.shape.stride());
        if let Some(biases) = &self.biases {
            qkv.chunks_exact_mut(biases.len()).for_each(|row| row.copy_from_slice(biases));
        }
        qkv
    }

    pub(crate) fn add_biases(&self, qkv: &mut [f32]) {
        let Some(biases) = &self.biases else { return };
        for row in qkv.chunks_exact_mut(biases.len()) {
            row.iter_mut().zip(biases).for_each(|(x, bias)| *x += bias);
        }
    }

    fn whole_width<'a>(&self, term: Term<'a>, plus: &'a [f32]) -> Columns<'a> {
        Columns { at: 0, columns: self.width, terms: vec![term], plus: Plus::Rows(plus) }
    }
}

/// The way back through layers that share their input.
struct Back<'a> {
    layers: Layers<'a>,
    block: &'a Block,
    /// The layers' gradients side by side.
    g: &'a Packed,
}

impl Back<'_> {
    /// `g · s B` for every layer; those without an adapter have none.
    fn inners(&self, places: &[usize]) -> Vec<Option<Inner>> {
        let one = |(&layer, &column): (&usize, &usize)| {
            let columns = self.block.layers[layer].rows();
            self.layers.inner_of_gradient(layer, Part { x: self.g, column, columns })
        };
        self.layers.layers.iter().zip(places).map(one).collect()
    }

    /// Those, and the gradient of the input.
    fn input_gradient(&self, places: &[usize], to: &mut [f32]) -> Vec<Option<Inner>> {
        let Layers { engine, blocking, layers, .. } = self.layers;
        let inners = self.inners(places);
        let terms = layers.iter().zip(places).zip(&inners).map(|((&layer, &at), inner)| {
            backward_term(self.g, at, &self.block.layers[layer], self.layers.of_input(layer, inner))
        });
        let columns = Columns { at: 0, columns: self.block.width, terms: terms.collect(), plus: Plus::Nothing };
        product(engine, blocking, to, self.block.width, &[columns]);
        for (&layer, inner) in layers.iter().zip(&inners) {
            self.layers.add_masked_input_gradient(layer, inner, to);
        }
        inners
    }
}

fn forward_term<'a>(x: &'a Packed, weights: &'a Frozen, low_rank: Option<LowRank<'a>>) -> Term<'a> {
    Term { x, column: 0, length: x.columns, weights, transposed: true, from: 0, low_rank }
}

fn backward_term<'a>(g: &'a Packed, column: usize, weights: &'a Frozen, low_rank: Option<LowRank<'a>>) -> Term<'a> {
    Term { x: g, column, length: weights.rows(), weights, transposed: false, from: 0, low_rank }
}

/// The residual stream, `[rows, width]`.
pub struct Stream(pub(crate) Buffer<f32>);

impl Stream {
    pub fn new(engine: &Engine, values: &[f32]) -> Self {
        Self(engine.copy_of(values))
    }

    pub fn zeros(engine: &Engine, numbers: usize) -> Self {
        let mut all = Self::room(engine, numbers);
        all.fill(0.0);
        all
    }

    /// Contents are left from earlier use: to be filled.
    pub fn room(engine: &Engine, numbers: usize) -> Self {
        Self(engine.take(numbers))
    }
}

impl std::ops::Deref for Stream {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl std::ops::DerefMut for Stream {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

//! One token through all blocks: five phases each, and one for the logits.

use std::ops::Range;

use super::adapter::{Adapter, Layer};
use super::attention::Attend;
use super::cache::Cache;
use super::phases::{Phases, share};
use super::room::{Places, SlotPlaces};
use super::rows::{FinishHead, Gate, Prepare, Store};
use super::{Decoder, DecoderBlock};
use crate::Path;
use crate::quantized::{GROUP, Matrix, VectorProduct};

pub(super) struct TokenPass<'a> {
    pub path: Path,
    pub threads: usize,
    pub decoder: &'a Decoder,
    pub adapter: Option<&'a Adapter>,
    pub cache: &'a Cache,
    pub phases: &'a Phases,
    /// The token's position.
    pub at: usize,
    pub room: Places,
}

pub(super) fn phases(blocks: usize) -> usize {
    5 * blocks + 1
}

/// Tasks of a product for each thread: few enough that taking them costs nothing, enough to even out.
const TASKS: usize = 4;
const LOGITS_TASKS: usize = 16;

pub(super) const QKV: [Layer; 3] = [Layer::Query, Layer::Key, Layer::Value];
pub(super) const GATE_UP: [Layer; 2] = [Layer::Gate, Layer::Up];

/// Whether matrices want their input as bytes, as f32.
pub(super) fn wanted(matrices: &[&Matrix]) -> (bool, bool) {
    let integer = |matrix: &&Matrix| matrix.layout().is_integer();
    (matrices.iter().any(integer), !matrices.iter().all(integer))
}

impl TokenPass<'_> {
    /// What every thread does.
    pub(super) fn run(&self, slot: &SlotPlaces) {
        let mut phase = 0;
        for (i, block) in self.decoder.blocks.iter().enumerate() {
            self.attention(&mut phase, slot, i, block);
            self.ffn(&mut phase, slot, i, block);
        }
        self.logits(&mut phase, slot);
    }

    /// The logits behind the token.
    pub(super) fn logits(&self, phase: &mut usize, slot: &SlotPlaces) {
        let (output, room) = (self.decoder.output(), &self.room);
        let prepared = self.prepare(slot, room.x.0, Some(&self.decoder.norm), &[output], (0, &[]));
        let into = Into { to: room.logits.0, accumulate: false, tasks: LOGITS_TASKS };
        self.product(phase, slot, output, into, prepared);
    }

    fn attention(&self, phase: &mut usize, slot: &SlotPlaces, index: usize, block: &DecoderBlock) {
        let (shape, room) = (&self.decoder.shape, &self.room);
        let (size, all) = (shape.head_size, shape.heads + 2 * shape.kv_heads);
        let heads = [shape.heads, shape.kv_heads, shape.kv_heads];
        // A task is a head where heads are whole groups, else a whole matrix.
        let by_head = size.is_multiple_of(GROUP);
        let [q, k, v] = &block.qkv;
        let mut prepared = self.prepare(slot, room.x.0, Some(&block.attention_norm), &[q, k, v], (index, &QKV));
        self.phases.run(*phase, slot.thread, if by_head { all } else { 3 }, |task| {
            prepared.once();
            let (part, range) = match (by_head, task) {
                (false, part) => (part, 0..heads[part]),
                (true, head) if head < shape.heads => (0, head..head + 1),
                (true, head) => {
                    let head = head - shape.heads;
                    (1 + head / shape.kv_heads, head % shape.kv_heads..head % shape.kv_heads + 1)
                }
            };
            let matrix = &block.qkv[part];
            let groups =
                if by_head { range.start * size / GROUP..range.end * size / GROUP } else { 0..matrix.group_count() };
            let at = [0, shape.queries(), shape.queries() + shape.keys()][part];
            // SAFETY: rows of a token's room; this task alone writes these heads, and their place in the cache.
            let to = unsafe { room.qkv.0.add(at) };
            self.path.run(VectorProduct { matrix, groups, x: slot.row_input(), to, accumulate: false });
            self.adapt(index, QKV[part], range.start * size..range.end * size, slot, to);
            for head in range {
                self.finish(index, block, part, head, to);
            }
        });
        *phase += 1;
        self.phases.run(*phase, slot.thread, shape.heads, |head| {
            let cache = self.cache.head(index, head / (shape.heads / shape.kv_heads));
            // SAFETY: this task alone writes this head.
            let (query, mixed) = unsafe { (room.qkv.0.add(head * size), room.mixed.0.add(head * size)) };
            self.path.run(Attend { cache, tokens: self.at + 1, query, mixed, scores: slot.scratch.0 });
        });
        *phase += 1;
        let prepared = self.prepare(slot, room.mixed.0, None, &[&block.mix], (index, &[Layer::Mix]));
        self.product(phase, slot, &block.mix, Into { to: room.x.0, accumulate: true, tasks: TASKS }, prepared);
    }

    /// Bias, norm and rotation of a head, and its place in the cache.
    fn finish(&self, index: usize, block: &DecoderBlock, part: usize, head: usize, rows: *mut f32) {
        let shape = &self.decoder.shape;
        let size = shape.head_size;
        let bias = block.biases.as_ref().map(|biases| &biases[part][head * size..][..size]);
        let norm = block.head_norms.as_ref().filter(|_| part < 2).map(|norms| (&norms[part][..], shape.epsilon));
        let rotation = (part < 2).then_some([self.room.cos.0.cast_const(), self.room.sin.0.cast_const()]);
        let store = match part {
            0 => Store::Nowhere,
            1 => Store::Key(self.cache.head(index, head)),
            _ => Store::Value(self.cache.head(index, head)),
        };
        // SAFETY: the head lies within its rows.
        let x = unsafe { rows.add(head * size) };
        self.path.run(FinishHead { x, size, bias, norm, rotation, store, token: self.at });
    }

    fn ffn(&self, phase: &mut usize, slot: &SlotPlaces, index: usize, block: &DecoderBlock) {
        let (shape, room) = (&self.decoder.shape, &self.room);
        let mut prepared =
            self.prepare(slot, room.x.0, Some(&block.ffn_norm), &[&block.gate, &block.up], (index, &GATE_UP));
        let groups = block.gate.group_count();
        let tasks = groups.min(TASKS * self.threads);
        self.phases.run(*phase, slot.thread, tasks, |task| {
            prepared.once();
            let groups = share(groups, tasks, task);
            // SAFETY: this task alone writes these rows.
            unsafe {
                let (gate, up) = (room.gate_up.0, room.gate_up.0.add(shape.ffn));
                let first = groups.start * GROUP;
                let columns = shape.ffn.min(groups.end * GROUP) - first;
                for (matrix, to, layer) in [(&block.gate, gate, Layer::Gate), (&block.up, up, Layer::Up)] {
                    let groups = groups.clone();
                    self.path.run(VectorProduct { matrix, groups, x: slot.row_input(), to, accumulate: false });
                    self.adapt(index, layer, first..first + columns, slot, to);
                }
                let (gate, up) = (gate.add(first), up.add(first));
                self.path.run(Gate { gate, up, columns, to: gate });
            }
        });
        *phase += 1;
        let prepared = self.prepare(slot, room.gate_up.0, None, &[&block.down], (index, &[Layer::Down]));
        self.product(phase, slot, &block.down, Into { to: room.x.0, accumulate: true, tasks: TASKS }, prepared);
    }

    fn product(&self, phase: &mut usize, slot: &SlotPlaces, matrix: &Matrix, into: Into, mut prepared: Prepared<'_>) {
        let Into { to, accumulate, tasks } = into;
        let groups = matrix.group_count();
        let tasks = groups.min(tasks * self.threads);
        self.phases.run(*phase, slot.thread, tasks, |task| {
            prepared.once();
            let groups = share(groups, tasks, task);
            let rows = groups.start * GROUP..groups.end * GROUP;
            self.path.run(VectorProduct { matrix, groups, x: slot.row_input(), to, accumulate });
            let (index, layers) = prepared.layers;
            layers.iter().for_each(|&layer| self.adapt(index, layer, rows.clone(), slot, to));
        });
        *phase += 1;
    }

    /// Adds what the adapter makes of the thread's own input.
    fn adapt(&self, index: usize, layer: Layer, rows: Range<usize>, slot: &SlotPlaces, to: *mut f32) {
        if let Some(adapter) = self.adapter {
            self.path.run(adapter.widen(index, layer, rows).over(slot.low.0, to));
        }
    }

    fn prepare<'a>(
        &'a self,
        slot: &'a SlotPlaces,
        x: *const f32,
        norm: Option<&'a [f32]>,
        matrices: &[&Matrix],
        layers: (usize, &'static [Layer]),
    ) -> Prepared<'a> {
        let (codes, floats) = wanted(matrices);
        Prepared { pass: self, slot, x, norm, codes, floats, columns: matrices[0].columns(), layers, done: false }
    }
}

/// Where a product goes, and in how many tasks for each thread.
#[derive(Clone, Copy)]
struct Into {
    to: *mut f32,
    accumulate: bool,
    tasks: usize,
}

/// A thread's own input row of a product, made when its first task needs it.
struct Prepared<'a> {
    pass: &'a TokenPass<'a>,
    slot: &'a SlotPlaces,
    x: *const f32,
    norm: Option<&'a [f32]>,
    codes: bool,
    floats: bool,
    columns: usize,
    /// The block and the layers whose input it is, for an adapter.
    layers: (usize, &'static [Layer]),
    done: bool,
}

impl Prepared<'_> {
    fn once(&mut self) {
        if !self.done {
            self.done = true;
            let norm = self.norm.map(|norm| (norm, self.pass.decoder.shape.epsilon));
            let (x, columns, row) = (self.x, self.columns, self.slot.row.0);
            let to = self.slot.input(self.codes, self.floats);
            self.pass.path.run(Prepare { x, columns, norm, up: std::ptr::null(), row, to });
            if let Some(adapter) = self.pass.adapter {
                let (block, layers) = self.layers;
                let x = if norm.is_some() { row.cast_const() } else { x };
                self.pass.path.run(adapter.narrow(block, layers, x, self.slot.low.0));
            }
        }
    }
}

//! Several tokens of one sequence through all blocks: eleven phases each.

use std::ops::Range;

use super::adapter::{Adapter, Layer};
use super::attention::AttendStrip;
use super::cache::Cache;
use super::phases::{Phases, share};
use super::room::{Places, SlotPlaces, StripRows};
use super::rows::{FinishHead, Prepare, Store};
use super::token::{GATE_UP, QKV, wanted};
use super::{Decoder, DecoderBlock};
use crate::Path;
use crate::quantized::{BatchProduct, GROUP, Matrix};

pub(super) struct BatchPass<'a> {
    pub path: Path,
    pub decoder: &'a Decoder,
    pub adapter: Option<&'a Adapter>,
    pub cache: &'a Cache,
    pub phases: &'a Phases,
    /// Tokens before the batch.
    pub before: usize,
    pub rows: usize,
    pub strip: StripRows,
    pub room: Places,
}

pub(super) fn phases(blocks: usize) -> usize {
    11 * blocks + 2
}

/// Rows of a task that prepares some.
const ROWS: usize = 8;
/// Groups of a product's task: as many as a strip takes on the widest path, twice where there are rows enough.
fn task_groups(rows: usize) -> usize {
    if rows <= 32 { 2 } else { 4 }
}

/// Where rows come from.
#[derive(Clone, Copy)]
struct From<'a> {
    x: *const f32,
    stride: usize,
    columns: usize,
    norm: Option<&'a [f32]>,
    /// `x` holds gates, and what they gate behind them.
    gated: bool,
    /// The block, for an adapter.
    block: usize,
}

/// Where products of rows go: `to [rows, stride] (+)= input · Wᵀ`.
#[derive(Clone, Copy)]
struct Into {
    /// The block, for an adapter.
    block: usize,
    stride: usize,
    rows: usize,
    accumulate: bool,
}

impl BatchPass<'_> {
    /// What every thread does; returns the next phase.
    pub(super) fn blocks(&self, slot: &SlotPlaces) -> usize {
        let mut phase = 0;
        for (i, block) in self.decoder.blocks.iter().enumerate() {
            self.attention(&mut phase, slot, i, block);
            self.ffn(&mut phase, slot, i, block);
        }
        phase
    }

    /// The logits of some rows.
    pub(super) fn logits(&self, phase: &mut usize, slot: &SlotPlaces, rows: Range<usize>) {
        if rows.is_empty() {
            return;
        }
        let (shape, output) = (&self.decoder.shape, self.decoder.output());
        // SAFETY: the rows are within the room.
        let x = unsafe { self.room.x.0.add(rows.start * shape.width) };
        let norm = Some(&self.decoder.norm[..]);
        let from = From { x, stride: shape.width, columns: shape.width, norm, gated: false, block: 0 };
        self.prepare(phase, slot, from, rows.len(), &[output], &[]);
        let into = Into { block: 0, stride: shape.vocabulary, rows: rows.len(), accumulate: false };
        self.product(phase, slot, &[(output, self.room.logits.0, None)], into);
    }

    fn attention(&self, phase: &mut usize, slot: &SlotPlaces, index: usize, block: &DecoderBlock) {
        let (shape, room) = (&self.decoder.shape, &self.room);
        let (width, size, stride) = (shape.width, shape.head_size, shape.qkv());
        let norm = Some(&block.attention_norm[..]);
        let [q, k, v] = &block.qkv;
        self.prepare(
            phase,
            slot,
            From { x: room.x.0, stride: width, columns: width, norm, gated: false, block: index },
            self.rows,
            &[q, k, v],
            &QKV,
        );
        // SAFETY: the columns of keys and values are within the rows.
        let (keys, values) =
            unsafe { (room.qkv.0.add(shape.queries()), room.qkv.0.add(shape.queries() + shape.keys())) };
        let products =
            [(q, room.qkv.0, Some(Layer::Query)), (k, keys, Some(Layer::Key)), (v, values, Some(Layer::Value))];
        self.product(phase, slot, &products, Into { block: index, stride, rows: self.rows, accumulate: false });
        self.phases.run(*phase, slot.thread, self.rows.div_ceil(ROWS), |task| {
            for row in task * ROWS..self.rows.min((task + 1) * ROWS) {
                self.finish(index, block, row);
            }
        });
        *phase += 1;
        let strip = self.strip.attention;
        let strips = self.rows.div_ceil(strip);
        self.phases.run_dealt(*phase, slot.thread, shape.heads * strips, |task| {
            // The longest first.
            let (head, first) = (task % shape.heads, (strips - 1 - task / shape.heads) * strip);
            // SAFETY: this task alone writes these heads.
            let work = unsafe {
                AttendStrip {
                    cache: self.cache.head(index, head / (shape.heads / shape.kv_heads)),
                    before: self.before + first,
                    tokens: strip.min(self.rows - first),
                    queries: room.qkv.0.add(first * stride + head * size),
                    query_stride: stride,
                    mixed: room.mixed.0.add(first * shape.queries() + head * size),
                    mixed_stride: shape.queries(),
                    scratch: slot.scratch.0,
                }
            };
            self.path.run(work);
        });
        *phase += 1;
        let queries = shape.queries();
        let from = From { x: room.mixed.0, stride: queries, columns: queries, norm: None, gated: false, block: index };
        self.prepare(phase, slot, from, self.rows, &[&block.mix], &[Layer::Mix]);
        let into = Into { block: index, stride: width, rows: self.rows, accumulate: true };
        self.product(phase, slot, &[(&block.mix, room.x.0, Some(Layer::Mix))], into);
    }

    /// Biases, norms and rotations of a row's heads, and their place in the cache.
    fn finish(&self, index: usize, block: &DecoderBlock, row: usize) {
        let (shape, room) = (&self.decoder.shape, &self.room);
        let size = shape.head_size;
        let half = size / 2;
        // SAFETY: within the row, which this task alone touches.
        unsafe {
            let mut x = room.qkv.0.add(row * shape.qkv());
            let rotation = [room.cos.0.add(row * half).cast_const(), room.sin.0.add(row * half).cast_const()];
            for (part, heads) in [shape.heads, shape.kv_heads, shape.kv_heads].into_iter().enumerate() {
                for head in 0..heads {
                    let bias = block.biases.as_ref().map(|biases| &biases[part][head * size..][..size]);
                    let norm = block.head_norms.as_ref().filter(|_| part < 2);
                    let norm = norm.map(|norms| (&norms[part][..], shape.epsilon));
                    let store = match part {
                        0 => Store::Nowhere,
                        1 => Store::Key(self.cache.head(index, head)),
                        _ => Store::Value(self.cache.head(index, head)),
                    };
                    let rotation = (part < 2).then_some(rotation);
                    self.path.run(FinishHead { x, size, bias, norm, rotation, store, token: self.before + row });
                    x = x.add(size);
                }
            }
        }
    }

    fn ffn(&self, phase: &mut usize, slot: &SlotPlaces, index: usize, block: &DecoderBlock) {
        let (shape, room) = (&self.decoder.shape, &self.room);
        let (width, ffn) = (shape.width, shape.ffn);
        let norm = Some(&block.ffn_norm[..]);
        let from = From { x: room.x.0, stride: width, columns: width, norm, gated: false, block: index };
        self.prepare(phase, slot, from, self.rows, &[&block.gate, &block.up], &GATE_UP);
        // SAFETY: within the rows.
        let up = unsafe { room.gate_up.0.add(ffn) };
        let products = [(&block.gate, room.gate_up.0, Some(Layer::Gate)), (&block.up, up, Some(Layer::Up))];
        self.product(
            phase,
            slot,
            &products,
            Into { block: index, stride: 2 * ffn, rows: self.rows, accumulate: false },
        );
        let from = From { x: room.gate_up.0, stride: 2 * ffn, columns: ffn, norm: None, gated: true, block: index };
        self.prepare(phase, slot, from, self.rows, &[&block.down], &[Layer::Down]);
        let into = Into { block: index, stride: width, rows: self.rows, accumulate: true };
        self.product(phase, slot, &[(&block.down, room.x.0, Some(Layer::Down))], into);
    }

    /// Rows become the shared input of products with `matrices`, which are `layers` to an adapter.
    fn prepare(
        &self,
        phase: &mut usize,
        slot: &SlotPlaces,
        from: From<'_>,
        rows: usize,
        matrices: &[&Matrix],
        layers: &'static [Layer],
    ) {
        let (codes, floats) = wanted(matrices);
        let From { x, stride, columns, norm, gated, block } = from;
        let norm = norm.map(|norm| (norm, self.decoder.shape.epsilon));
        self.phases.run(*phase, slot.thread, rows.div_ceil(ROWS), |task| {
            for row in task * ROWS..rows.min((task + 1) * ROWS) {
                // SAFETY: the row is within the room; this task alone writes its place in the input.
                unsafe {
                    let x = x.add(row * stride);
                    let up = if gated { x.add(columns) } else { std::ptr::null() };
                    let to = self.room.input(columns, row, self.strip, codes, floats);
                    self.path.run(Prepare { x, columns, norm, up, row: slot.row.0, to });
                    if let Some(adapter) = self.adapter {
                        let x = if norm.is_some() || gated { slot.row.0.cast_const() } else { x };
                        self.path.run(adapter.narrow(block, layers, x, self.room.low(row)));
                    }
                }
            }
        });
        *phase += 1;
    }

    /// The product with each matrix, at its place, with what an adapter adds to its layer.
    fn product(
        &self,
        phase: &mut usize,
        slot: &SlotPlaces,
        matrices: &[(&Matrix, *mut f32, Option<Layer>)],
        into: Into,
    ) {
        let Into { block, stride, rows, accumulate } = into;
        let tasks = |matrix: &Matrix| matrix.group_count().div_ceil(task_groups(rows));
        let all = matrices.iter().map(|(matrix, ..)| tasks(matrix)).sum();
        self.phases.run(*phase, slot.thread, all, |mut task| {
            for &(matrix, to, layer) in matrices {
                let many = tasks(matrix);
                if task < many {
                    let groups = share(matrix.group_count(), many, task);
                    let x = self.room.batch(rows);
                    let scratch = slot.scratch.0.cast();
                    let columns = groups.start * GROUP..groups.end * GROUP;
                    self.path.run(BatchProduct { matrix, groups, x, to, stride, accumulate, scratch });
                    if let (Some(adapter), Some(layer)) = (self.adapter, layer) {
                        for row in 0..rows {
                            // SAFETY: rows of the room.
                            let (low, to) = unsafe { (self.room.low(row), to.add(row * stride)) };
                            self.path.run(adapter.widen(block, layer, columns.clone()).over(low, to));
                        }
                    }
                    return;
                }
                task -= many;
            }
        });
        *phase += 1;
    }
}

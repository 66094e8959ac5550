//! Token by token: a block over the newest tokens of one sequence, with keys and values of those before.

use crate::adapter::{BlockAdapter, Layers};
use crate::block::{Block, DOWN, GATE, O, Pass, Stream, UP};
use crate::buffer::Buffer;
use crate::engine::{Engine, Shared, Task};
use crate::frozen::Frozen;
use crate::product::{Columns, Plus, Term, product, row_products};
use crate::rows::Packed;
use crate::simd::{Simd, exp};

/// Up to so many rows are multiplied one by one, without packing anything.
pub(crate) const FEW_ROWS: usize = 4;

/// Keys and values of one block, `[tokens, kv_heads · size]` each.
#[derive(Default)]
pub struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Block {
    /// `x [rows, width]`, the tokens behind those in the cache; `pass` has one segment, whose positions go on from them.
    pub fn next(&self, engine: &Engine, pass: &Pass, x: Stream, adapter: &BlockAdapter, cache: &mut Cache) -> Stream {
        let Stream(mut x) = x;
        let rows = pass.rows();
        let shape = self.shape();
        let linear = |x: &Buffer<f32>, layer: usize| self.linear(engine, pass, x, layer, adapter);
        let h = self.norms()[0].rows(engine, &x);
        let mut qkv = engine.take::<f32>(rows * shape.stride());
        for (i, at) in self.heads_at().into_iter().enumerate() {
            let part = linear(&h, i);
            let columns = part.len() / rows;
            for (row, part) in part.chunks_exact(columns).enumerate() {
                qkv[row * shape.stride() + at..][..columns].copy_from_slice(part);
            }
        }
        self.add_biases(&mut qkv);
        crate::rope::rotate(engine, &mut qkv, &self.rotated_heads(), &pass.rotation, false);
        for row in qkv.chunks_exact(shape.stride()) {
            let [_, keys, values] = self.heads_at();
            cache.keys.extend_from_slice(&row[keys..values]);
            cache.values.extend_from_slice(&row[values..]);
        }
        let mixed = attend(engine, shape, &qkv, cache, rows);
        add(&mut x, &linear(&mixed, O));
        let h = self.norms()[1].rows(engine, &x);
        let (gate, up) = (linear(&h, GATE), linear(&h, UP));
        let ffn = gate.len() / rows;
        let mut gate_up = engine.take::<f32>(2 * gate.len());
        for ((to, gate), up) in gate_up.chunks_exact_mut(2 * ffn).zip(gate.chunks_exact(ffn)).zip(up.chunks_exact(ffn))
        {
            to[..ffn].copy_from_slice(gate);
            to[ffn..].copy_from_slice(up);
        }
        let gated = crate::gate::rows(engine, &gate_up, ffn);
        add(&mut x, &linear(&gated, DOWN));
        Stream(x)
    }

    fn linear(
        &self,
        engine: &Engine,
        pass: &Pass,
        x: &Buffer<f32>,
        layer: usize,
        adapter: &BlockAdapter,
    ) -> Buffer<f32> {
        let weights: &Frozen = &self.layers()[layer];
        let mut y = engine.take(pass.rows() * weights.rows());
        let low_rank = adapter[layer].is_some();
        if pass.rows() <= FEW_ROWS && !low_rank {
            row_products(engine, weights, x, pass.rows(), &mut y);
            return y;
        }
        let blocking = &pass.blocking;
        let packed = Packed::of(engine, blocking, x, weights.columns());
        let adapters = [adapter];
        let layers = Layers { engine, blocking, adapters: &adapters, masks: None, layers: &[layer] };
        let inner = layers.inner_of_input(&packed, &|| engine.copy_of(x));
        let low_rank = layers.of_output(0, &inner);
        let length = weights.columns();
        let term = Term { x: &packed, column: 0, length, weights, transposed: true, from: 0, low_rank };
        let all = Columns { at: 0, columns: weights.rows(), terms: vec![term], plus: Plus::Nothing };
        product(engine, blocking, &mut y, weights.rows(), &[all]);
        y
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// The last `rows` tokens' queries against the whole cache, `[rows, heads · size]`.
fn attend(engine: &Engine, shape: crate::attention::Shape, qkv: &[f32], cache: &Cache, rows: usize) -> Buffer<f32> {
    struct Heads<'a> {
        shape: crate::attention::Shape,
        qkv: &'a [f32],
        cache: &'a Cache,
        rows: usize,
        mixed: Shared<f32>,
    }
    impl Task for Heads<'_> {
        const KERNEL: &'static str = "attention";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            let crate::attention::Shape { heads, kv_heads, size } = self.shape;
            let (row, head) = (i / heads, i % heads);
            let (stride, kv) = (kv_heads * size, head / (heads / kv_heads));
            let tokens = self.cache.keys.len() / stride - (self.rows - 1 - row);
            let query = &self.qkv[row * self.shape.stride() + head * size..][..size];
            let scale = 1.0 / (size as f32).sqrt();
            let mut weights = vec![0.0f32; tokens];
            let mut largest = f32::NEG_INFINITY;
            for (token, weight) in weights.iter_mut().enumerate() {
                let key = &self.cache.keys[token * stride + kv * size..][..size];
                // SAFETY: key and query have `size` numbers.
                *weight = unsafe { dot::<S>(query, key) } * scale;
                largest = largest.max(*weight);
            }
            let mut sum = 0.0;
            for weight in &mut weights {
                // SAFETY: the CPU has `S`.
                *weight = unsafe { S::maximum(exp::<S>(S::splat(*weight - largest))) };
                sum += *weight;
            }
            // SAFETY: this task alone writes this head of this row.
            unsafe {
                let mixed = self.mixed.0.add((row * heads + head) * size);
                let mut channel = 0;
                while channel < size {
                    let n = S::LANES.min(size - channel);
                    let mut total = S::splat(0.0);
                    for (token, &weight) in weights.iter().enumerate() {
                        let value = self.cache.values[token * stride + kv * size + channel..].as_ptr();
                        total = S::fma(S::splat(weight), S::load_n(value, n), total);
                    }
                    S::store_n(mixed.add(channel), S::div(total, S::splat(sum)), n);
                    channel += S::LANES;
                }
            }
        }
    }
    let mut mixed = engine.take(rows * shape.heads * shape.size);
    let to = Shared(mixed.as_mut_ptr());
    engine.parallel(rows * shape.heads, &Heads { shape, qkv, cache, rows, mixed: to });
    mixed
}

/// # Safety
/// The CPU has `S`; `b` is as long as `a`.
#[inline(always)]
unsafe fn dot<S: Simd>(a: &[f32], b: &[f32]) -> f32 {
    // SAFETY: loads stay within the slices.
    unsafe {
        let mut sum = S::splat(0.0);
        let mut at = 0;
        while at < a.len() {
            let n = S::LANES.min(a.len() - at);
            sum = S::fma(S::load_n(a.as_ptr().add(at), n), S::load_n(b.as_ptr().add(at), n), sum);
            at += S::LANES;
        }
        S::sum(sum)
    }
}

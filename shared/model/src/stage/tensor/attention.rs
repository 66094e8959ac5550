//! Causal grouped-query attention over packed segments, with rotary positions.

use burn::tensor::{Bool, Device, Tensor, TensorData, activation};

use crate::{ModelConfig, Segments};

/// What all blocks of a pass share: the segments, and the rotation of every token.
pub(super) struct Layout {
    segments: Segments,
    /// `[tokens, 1, head_size / 2]`
    cos: Tensor<3>,
    sin: Tensor<3>,
    /// `[1, q, k]` for every distinct segment length, true where a key lies behind its query.
    masks: Vec<(usize, Tensor<3, Bool>)>,
    kv_heads: usize,
}

/// Keys and values of the tokens seen so far, `[kv_heads, tokens, head_size]`.
#[derive(Default)]
pub(super) struct CacheSlot {
    pub(super) keys_values: Option<[Tensor<3>; 2]>,
}

impl Layout {
    /// Positions start at `start` in every segment: 0, except when a cache holds the tokens before.
    pub(super) fn new(config: &ModelConfig, segments: &Segments, start: usize, device: &Device) -> Self {
        // transformers rounds frequency and angle to f32; doing the same keeps long positions equal to it.
        let frequencies: Vec<f32> = config.rope_frequencies().into_iter().map(|f| f as f32).collect();
        let positions = segments.lengths().iter().flat_map(|&length| start..start + length);
        let angles: Vec<f32> = positions
            .flat_map(|position| frequencies.iter().map(move |frequency| position as f32 * frequency))
            .collect();
        let shape = [segments.tokens(), 1, frequencies.len()];
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().copied().map(f).collect();
            Tensor::from_data(TensorData::new(values, shape), device)
        };
        let mut lengths = segments.lengths().to_vec();
        lengths.sort_unstable();
        lengths.dedup();
        let masks = lengths.into_iter().map(|length| (length, causal_mask(length, start + length, device))).collect();
        Self {
            segments: segments.clone(),
            cos: table(f32::cos),
            sin: table(f32::sin),
            masks,
            kv_heads: config.kv_heads,
        }
    }

    /// Rotates the halves `(i, i + head_size / 2)` of every head (RoFormer, arXiv 2104.09864, in Hugging Face's order).
    pub(super) fn rotate(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, _, head_size] = x.dims();
        let half = head_size / 2;
        let (first, second) = (x.clone().narrow(2, 0, half), x.narrow(2, half, half));
        let rotated_first = first.clone() * self.cos.clone() - second.clone() * self.sin.clone();
        let rotated_second = second * self.cos.clone() + first * self.sin.clone();
        Tensor::cat(vec![rotated_first, rotated_second], 2)
    }

    fn mask(&self, length: usize) -> Tensor<3, Bool> {
        let (_, mask) = self.masks.iter().find(|(known, _)| *known == length).expect("a mask for every length");
        mask.clone()
    }
}

/// `[1, queries, keys]`: query `i` is the `keys − queries + i`-th token and sees no later key.
fn causal_mask(queries: usize, keys: usize, device: &Device) -> Tensor<3, Bool> {
    let hidden: Vec<bool> =
        (0..queries).flat_map(|query| (0..keys).map(move |key| key > keys - queries + query)).collect();
    Tensor::from_data(TensorData::new(hidden, [1, queries, keys]), device)
}

/// Attention of q `[tokens, heads, head_size]` to k and v `[tokens, kv_heads, head_size]`: `[tokens, heads · head_size]`.
///
/// With a cache there is one segment, and its keys and values are appended to those of the tokens before.
pub(super) fn attend(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    layout: &Layout,
    cache: Option<&mut CacheSlot>,
) -> Tensor<2> {
    let [_, heads, head_size] = q.dims();
    let kv_heads = layout.kv_heads;
    let group = heads / kv_heads;
    let one = |q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, length: usize| -> Tensor<2> {
        let [_, keys, _] = k.dims();
        // Query heads that share a key-value head lie side by side: [len, heads, d] → [kv, group · len, d].
        let q = q.reshape([length, kv_heads, group, head_size]).swap_dims(0, 1).swap_dims(1, 2);
        let q = q.reshape([kv_heads, group * length, head_size]);
        let scores = q.matmul(k.swap_dims(1, 2)).mul_scalar(1.0 / (head_size as f64).sqrt());
        let scores = scores.reshape([kv_heads * group, length, keys]);
        let mask = layout.mask(length).expand([kv_heads * group, length, keys]);
        let weights = activation::softmax(scores.mask_fill(mask, f32::NEG_INFINITY), 2);
        let mixed = weights.reshape([kv_heads, group * length, keys]).matmul(v);
        // [kv, group · len, d] → [len, heads · d]
        mixed
            .reshape([kv_heads, group, length, head_size])
            .swap_dims(1, 2)
            .swap_dims(0, 1)
            .reshape([length, heads * head_size])
    };
    if let Some(slot) = cache {
        let [length, ..] = q.dims();
        let (mut k, mut v) = (k.swap_dims(0, 1), v.swap_dims(0, 1));
        if let Some([keys, values]) = slot.keys_values.take() {
            k = Tensor::cat(vec![keys, k], 1);
            v = Tensor::cat(vec![values, v], 1);
        }
        slot.keys_values = Some([k.clone(), v.clone()]);
        return one(q, k, v, length);
    }
    let outputs = layout.segments.spans().map(|(start, length)| {
        let part = |x: &Tensor<3>| x.clone().narrow(0, start, length);
        one(part(&q), part(&k).swap_dims(0, 1), part(&v).swap_dims(0, 1), length)
    });
    Tensor::cat(outputs.collect(), 0)
}

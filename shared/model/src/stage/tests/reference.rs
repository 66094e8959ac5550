//! A decoder in plain f64 loops, one sequence at a time, as the papers write it. It shares nothing with the stage but
//! the weights.

use crate::{Family, Source};

/// Logits of every position, `[tokens][vocabulary]`.
pub fn logits(source: &dyn Source, tokens: &[u32]) -> Vec<Vec<f32>> {
    let config = source.config();
    let load = |name: &str| -> Vec<f64> {
        let info = source.tensors().iter().find(|info| info.name == name).expect(name);
        source.tensor(name, &info.shape).unwrap().into_iter().map(f64::from).collect()
    };
    let embedding = load("model.embed_tokens.weight");
    let width = config.width;
    let mut stream: Vec<Vec<f64>> =
        tokens.iter().map(|&token| embedding[token as usize * width..][..width].to_vec()).collect();
    for block in 0..config.blocks {
        let weight = |name: &str| load(&format!("model.layers.{block}.{name}"));
        let linear = |x: &[f64], name: &str| {
            let mut y = product(&weight(&format!("{name}.weight")), x);
            if config.qkv_bias && ["q_proj", "k_proj", "v_proj"].iter().any(|target| name.ends_with(target)) {
                y.iter_mut().zip(weight(&format!("{name}.bias"))).for_each(|(y, b)| *y += b);
            }
            y
        };
        let heads = |x: Vec<f64>, position: usize, norm: Option<&str>| -> Vec<Vec<f64>> {
            let per_head =
                x.chunks(config.head_size).map(|head| match norm.filter(|_| config.family == Family::Qwen3) {
                    Some(norm) => rms_norm(head, &weight(norm), config.rms_epsilon),
                    None => head.to_vec(),
                });
            per_head
                .map(|head| if norm.is_some() { rotate(&head, position, &config.rope_frequencies()) } else { head })
                .collect()
        };
        let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for (position, x) in stream.iter().enumerate() {
            let h = rms_norm(x, &weight("input_layernorm.weight"), config.rms_epsilon);
            queries.push(heads(linear(&h, "self_attn.q_proj"), position, Some("self_attn.q_norm.weight")));
            keys.push(heads(linear(&h, "self_attn.k_proj"), position, Some("self_attn.k_norm.weight")));
            values.push(heads(linear(&h, "self_attn.v_proj"), position, None));
        }
        for position in 0..tokens.len() {
            let mut mixed = Vec::new();
            for (head, query) in queries[position].iter().enumerate() {
                let shared = head / (config.heads / config.kv_heads);
                let scale = (config.head_size as f64).sqrt();
                let score = |key: usize| dot(query, &keys[key][shared]) / scale;
                let weights: Vec<f64> = (0..=position).map(|key| score(key).exp()).collect();
                let sum: f64 = weights.iter().sum();
                mixed.extend((0..config.head_size).map(|channel| {
                    (0..=position).map(|key| weights[key] / sum * values[key][shared][channel]).sum::<f64>()
                }));
            }
            add(&mut stream[position], &linear(&mixed, "self_attn.o_proj"));
            let h = rms_norm(&stream[position], &weight("post_attention_layernorm.weight"), config.rms_epsilon);
            let (gate, up) = (linear(&h, "mlp.gate_proj"), linear(&h, "mlp.up_proj"));
            let gated: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            add(&mut stream[position], &linear(&gated, "mlp.down_proj"));
        }
    }
    let head = if config.tied_embeddings { embedding } else { load("lm_head.weight") };
    let norm = load("model.norm.weight");
    let row = |x: &Vec<f64>| product(&head, &rms_norm(x, &norm, config.rms_epsilon)).into_iter().map(|y| y as f32);
    stream.iter().map(|x| row(x).collect()).collect()
}

fn product(weight: &[f64], x: &[f64]) -> Vec<f64> {
    weight.chunks(x.len()).map(|row| dot(row, x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let rms = (dot(x, x) / x.len() as f64 + epsilon).sqrt();
    x.iter().zip(weight).map(|(x, w)| x / rms * w).collect()
}

fn rotate(head: &[f64], position: usize, frequencies: &[f64]) -> Vec<f64> {
    let half = head.len() / 2;
    let rotated = |i: usize| {
        let (sin, cos) = (position as f64 * frequencies[i % half]).sin_cos();
        if i < half { head[i] * cos - head[i + half] * sin } else { head[i] * cos + head[i - half] * sin }
    };
    (0..head.len()).map(rotated).collect()
}

//! Packing against `dequantize`, bit for bit; and whole models against a forward pass in f64 that reads the same file.

use super::config::layout;
use super::pack::pack_row;
use super::{Engine, KernelPath, Model};
use crate::gguf::{Header, Reader, Writer};
use crate::{BlockType, dequantize, quantize};
use kernels::quantized::Matrix;

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    // Sums of uniform numbers, about Gaussian.
    (0..count).map(|_| (next() + next() + next()) * 0.6).collect()
}

#[test]
fn packed_rows_keep_every_value() {
    // Where blocks are small, an odd number of them as well.
    let small = BlockType::ALL.into_iter().filter(|ty| ty.block_elements() == 32).map(|ty| (ty, 288));
    for (ty, columns) in BlockType::ALL.into_iter().map(|ty| (ty, 512)).chain(small) {
        let rows = 21;
        // Every code occurs: bytes at random, but for scales that are whatever quantizing finds.
        let mut bytes = Vec::new();
        for row in 0..rows {
            bytes.extend(quantize(ty, &numbers(columns, 100 + row)).unwrap());
        }
        let row_bytes = bytes.len() / rows as usize;
        let mut matrix = Matrix::new(rows as usize, columns, layout(ty));
        for (i, mut group) in matrix.groups().enumerate() {
            for (row, bytes) in bytes.chunks(row_bytes).skip(16 * i).take(16).enumerate() {
                assert!(pack_row(ty, bytes, row, &mut group).is_ok());
            }
        }
        for (row, bytes) in bytes.chunks(row_bytes).enumerate() {
            let (mut expected, mut found) = (vec![0.0; columns], vec![0.0; columns]);
            dequantize(ty, bytes, &mut expected).unwrap();
            matrix.row(row, &mut found);
            assert_eq!(found, expected, "{ty}, row {row}");
        }
        assert!(matrix.bytes() as f64 <= 1.26 * bytes.len() as f64 * 32.0 / 21.0, "{ty}: {} bytes", matrix.bytes());
    }
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    let mut matrix = Matrix::new(1, 256, layout(BlockType::Q4_K));
    let mut bytes = quantize(BlockType::Q4_K, &numbers(256, 1)).unwrap();
    bytes[1] = 0x7c;
    assert!(pack_row(BlockType::Q4_K, &bytes, 0, &mut matrix.groups().next().unwrap()).is_err());
    for (ty, value) in [(BlockType::F16, vec![0, 0x7e]), (BlockType::BF16, vec![0x80, 0x7f])] {
        let mut matrix = Matrix::new(1, 1, layout(ty));
        assert!(pack_row(ty, &value, 0, &mut matrix.groups().next().unwrap()).is_err(), "{ty}");
    }
}

/// A small decoder's file.
struct File {
    architecture: &'static str,
    ty: BlockType,
    tied: bool,
    scaled: bool,
    /// One more, a vector of as many numbers as the model is wide.
    extra: Option<&'static str>,
}

const WIDTH: usize = 256;
const FFN: usize = 512;
const HEADS: [usize; 2] = [4, 2];
const HEAD: usize = 64;
const VOCABULARY: usize = 90;
const BLOCKS: usize = 2;

impl File {
    fn write(&self, path: &std::path::Path) {
        let mut header = Header::new();
        header.set("general.architecture", self.architecture);
        let sizes = [
            ("context_length", 512),
            ("embedding_length", WIDTH),
            ("block_count", BLOCKS),
            ("feed_forward_length", FFN),
            ("attention.head_count", HEADS[0]),
            ("attention.head_count_kv", HEADS[1]),
        ];
        for (key, size) in sizes {
            header.set(&format!("{}.{key}", self.architecture), size as u32);
        }
        header.set(&format!("{}.attention.layer_norm_rms_epsilon", self.architecture), 1e-5f32);
        header.set(&format!("{}.rope.freq_base", self.architecture), 1e4f32);
        let mut tensors: Vec<(String, Vec<usize>)> =
            vec![("token_embd.weight".into(), vec![VOCABULARY, WIDTH]), ("output_norm.weight".into(), vec![WIDTH])];
        if !self.tied {
            tensors.push(("output.weight".into(), vec![VOCABULARY, WIDTH]));
        }
        if self.scaled {
            tensors.push(("rope_freqs.weight".into(), vec![HEAD / 2]));
        }
        let [queries, keys] = HEADS.map(|heads| heads * HEAD);
        for i in 0..BLOCKS {
            let mut of = |name: &str, shape: &[usize]| tensors.push((format!("blk.{i}.{name}"), shape.to_vec()));
            for (name, shape) in [
                ("attn_norm.weight", &[WIDTH][..]),
                ("attn_q.weight", &[queries, WIDTH]),
                ("attn_k.weight", &[keys, WIDTH]),
                ("attn_v.weight", &[keys, WIDTH]),
                ("attn_output.weight", &[WIDTH, queries]),
                ("ffn_norm.weight", &[WIDTH]),
                ("ffn_gate.weight", &[FFN, WIDTH]),
                ("ffn_up.weight", &[FFN, WIDTH]),
                ("ffn_down.weight", &[WIDTH, FFN]),
            ] {
                of(name, shape);
            }
            if self.architecture == "qwen2" {
                of("attn_q.bias", &[queries]);
                of("attn_k.bias", &[keys]);
                of("attn_v.bias", &[keys]);
            }
            if self.architecture == "qwen3" {
                of("attn_q_norm.weight", &[HEAD]);
                of("attn_k_norm.weight", &[HEAD]);
            }
        }
        tensors.extend(self.extra.map(|name| (name.to_owned(), vec![WIDTH])));
        let ty = |shape: &[usize]| if shape.len() == 1 { BlockType::F32 } else { self.ty };
        for (name, shape) in &tensors {
            header.add_tensor(name, shape, ty(shape)).unwrap();
        }
        let mut writer = Writer::create(path, header).unwrap();
        for (i, (name, shape)) in tensors.iter().enumerate() {
            let mut values = numbers(shape.iter().product(), i as u64 + 7);
            match shape.len() {
                1 => values.iter_mut().for_each(|value| *value = 1.0 + 0.3 * *value),
                _ => values.iter_mut().for_each(|value| *value *= 0.09),
            }
            writer.write_tensor(name, &quantize(ty(shape), &values).unwrap()).unwrap();
        }
        writer.finish().unwrap();
    }
}

/// The logits behind every token, as the papers have it: one token, one head, one number at a time.
fn reference(reader: &Reader, interleaved: bool, tokens: &[usize]) -> Vec<Vec<f64>> {
    let values = |name: &str| -> Option<Vec<f64>> {
        reader.tensor(name).ok()?;
        Some(reader.read_values(name).unwrap().into_iter().map(f64::from).collect())
    };
    let times = |w: &[f64], x: &[f64]| -> Vec<f64> {
        w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    };
    let norm = |x: &[f64], weight: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter().zip(weight).map(|(x, w)| x / (mean + 1e-5).sqrt() * w).collect()
    };
    let divisors = values("rope_freqs.weight").unwrap_or(vec![1.0; HEAD / 2]);
    let rotate = |x: &mut [f64], position: usize| {
        for head in x.chunks_mut(HEAD) {
            for (i, divisor) in divisors.iter().enumerate() {
                let angle = position as f64 * 1e4f64.powf(-2.0 * i as f64 / HEAD as f64) / divisor;
                let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + HEAD / 2) };
                let (sin, cos) = angle.sin_cos();
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
            }
        }
    };
    let embedding = values("token_embd.weight").unwrap();
    let mut rows: Vec<Vec<f64>> = tokens.iter().map(|&token| embedding[token * WIDTH..][..WIDTH].to_vec()).collect();
    for block in 0..BLOCKS {
        let of = |name: &str| values(&format!("blk.{block}.{name}"));
        let needed = |name: &str| of(name).unwrap();
        let (mut keys, mut all_values): (Vec<Vec<f64>>, Vec<Vec<f64>>) = (Vec::new(), Vec::new());
        let project = |x: &[f64], part: &str, position: usize| {
            let mut y = times(&needed(&format!("attn_{part}.weight")), x);
            if let Some(bias) = of(&format!("attn_{part}.bias")) {
                y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
            if let Some(weight) = of(&format!("attn_{part}_norm.weight")) {
                y = y.chunks(HEAD).flat_map(|head| norm(head, &weight)).collect();
            }
            if part != "v" {
                rotate(&mut y, position);
            }
            y
        };
        for (position, x) in rows.iter_mut().enumerate() {
            let h = norm(x, &needed("attn_norm.weight"));
            let query = project(&h, "q", position);
            keys.push(project(&h, "k", position));
            all_values.push(project(&h, "v", position));
            let mut mixed = Vec::new();
            for head in 0..HEADS[0] {
                let kv = head / (HEADS[0] / HEADS[1]) * HEAD;
                let query = &query[head * HEAD..][..HEAD];
                let score = |key: &Vec<f64>| query.iter().zip(&key[kv..]).map(|(q, k)| q * k).sum::<f64>() / 8.0;
                let weights: Vec<f64> = keys.iter().map(|key| score(key).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for channel in 0..HEAD {
                    let of = weights.iter().zip(&all_values).map(|(weight, value)| weight * value[kv + channel]);
                    mixed.push(of.sum::<f64>() / sum);
                }
            }
            let added = times(&needed("attn_output.weight"), &mixed);
            x.iter_mut().zip(added).for_each(|(x, y)| *x += y);
            let h = norm(x, &needed("ffn_norm.weight"));
            let (gate, up) = (times(&needed("ffn_gate.weight"), &h), times(&needed("ffn_up.weight"), &h));
            let gated: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let added = times(&needed("ffn_down.weight"), &gated);
            x.iter_mut().zip(added).for_each(|(x, y)| *x += y);
        }
    }
    let output = values("output.weight").unwrap_or(embedding);
    let weight = values("output_norm.weight").unwrap();
    rows.iter().map(|x| times(&output, &norm(x, &weight))).collect()
}

/// Of the error's length to the logits' length, over all positions; token by token and at once.
fn check(file: &File, limit: f64) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    file.write(&path);
    let reader = Reader::open(&path).unwrap();
    let tokens: Vec<usize> = (0..21).map(|i| (i * 37 + 5) % VOCABULARY).collect();
    let expected = reference(&reader, file.architecture == "llama", &tokens);
    let tokens: Vec<u32> = tokens.into_iter().map(|token| token as u32).collect();
    let engine = Engine::new(KernelPath::detect().unwrap(), 2, false);
    let model = Model::load(&reader, &engine).unwrap();
    let mut found = Vec::new();
    let mut session = model.session(tokens.len());
    session.score(&tokens, |_, logits| found.push(logits.to_vec()));
    session.truncate(0);
    let single: Vec<Vec<f32>> = tokens.iter().map(|&token| session.next(&[token]).to_vec()).collect();
    session.truncate(0);
    assert_eq!(session.next(&tokens), found[tokens.len() - 1], "the logits behind the last of a prompt");
    for (how, found) in [("a prompt", &found), ("single tokens", &single)] {
        assert_eq!(found.len(), expected.len());
        let both = found.iter().flatten().zip(expected.iter().flatten());
        let error: f64 = both.map(|(&found, expected)| (f64::from(found) - expected).powi(2)).sum();
        let size: f64 = expected.iter().flatten().map(|expected| expected.powi(2)).sum();
        let share = (error / size).sqrt();
        assert!(share < limit, "{} of {}, {how}: errs by {share:.5}", file.architecture, file.ty);
    }
}

/// Activations that are bytes err by 0.3 % of their root mean square each; a random network makes some 2 % of it.
const OF_BYTES: f64 = 0.04;

#[test]
fn models_of_every_type_are_those_of_the_reference() {
    for ty in BlockType::ALL {
        let floats = [BlockType::F32, BlockType::F16, BlockType::BF16].contains(&ty);
        check(
            &File { architecture: "llama", ty, tied: true, scaled: false, extra: None },
            if floats { 1e-3 } else { OF_BYTES },
        );
    }
}

#[test]
fn biases_norms_of_heads_and_scaled_rotations_are_those_of_the_reference() {
    for architecture in ["llama", "qwen2", "qwen3"] {
        for (tied, scaled) in [(false, false), (true, true)] {
            check(&File { architecture, ty: BlockType::F32, tied, scaled, extra: None }, 1e-3);
            check(&File { architecture, ty: BlockType::Q8_0, tied, scaled, extra: None }, OF_BYTES);
        }
    }
}

/// Without a bias that the model has, every logit would be wrong.
#[test]
fn a_tensor_that_would_be_left_out_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let load = |architecture: &'static str, extra: &'static str| {
        File { architecture, ty: BlockType::F32, tied: true, scaled: false, extra: Some(extra) }.write(&path);
        let engine = Engine::new(KernelPath::detect().unwrap(), 1, false);
        Model::load(&Reader::open(&path).unwrap(), &engine).map_err(|error| error.to_string())
    };
    for extra in ["blk.1.attn_output.bias", "blk.0.attn_k.bias", "blk.2.attn_norm.weight", "output.bias"] {
        let error = load("llama", extra).err().expect("a refusal");
        assert!(error.contains(extra) && error.contains("use a model that does not have it"), "{error}");
    }
    assert!(load("qwen2", "blk.0.attn_output.bias").is_err());
    assert!(load("llama", "blk.0.attn_rot_embd").is_ok());
}

/// Of a file whose only tensor is an embedding 32 wide.
fn refusal(width: u32, [heads, kv_heads]: [u32; 2], head_size: Option<u32>) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let mut header = Header::new();
    header.set("general.architecture", "llama");
    for (key, size) in [
        ("context_length", 8),
        ("embedding_length", width),
        ("block_count", 1),
        ("feed_forward_length", 64),
        ("attention.head_count", heads),
        ("attention.head_count_kv", kv_heads),
    ] {
        header.set(&format!("llama.{key}"), size);
    }
    head_size.into_iter().for_each(|size| header.set("llama.attention.key_length", size));
    header.set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
    header.add_tensor("token_embd.weight", &[5, 32], BlockType::F32).unwrap();
    let mut writer = Writer::create(&path, header).unwrap();
    writer.write_tensor("token_embd.weight", &[0; 5 * 32 * 4]).unwrap();
    writer.finish().unwrap();
    let engine = Engine::new(KernelPath::detect().unwrap(), 1, false);
    Model::load(&Reader::open(&path).unwrap(), &engine).err().expect("a refusal").to_string()
}

#[test]
fn a_file_of_other_sizes_is_refused_by_name() {
    let error = refusal(64, [1, 1], None);
    assert!(error.contains("token_embd.weight") && error.contains("[5, 64]"), "{error}");
    for (heads, head_size, expected) in [
        ([8, 8], Some(1024), "heads have 1024 channels, more than the 512 that are supported"),
        ([3, 2], Some(32), "3 heads are no multiple of 2 heads of keys and values"),
        ([8, 8], Some(33), "8 heads of 64 channels have 33 each; expected an even number"),
        ([65, 65], None, "65 heads of 64 channels have 0 each"),
    ] {
        let error = refusal(64, heads, head_size);
        assert!(error.contains(expected), "{error}");
    }
}

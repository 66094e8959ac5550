//! The same sequence in batches, token by token, on every path and any number of threads.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Adapter, CacheType, Decoder, DecoderBlock, Layer, LayerFactors, Session, Shape};
use crate::quantized::{Layout, Matrix};
use crate::{Engine, Path};

/// Small numbers of both signs.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 10_007) as f32 / 5_003.5 - 1.0).collect()
}

fn matrix(rows: usize, columns: usize, seed: usize, delta: Option<Vec<f32>>) -> Matrix {
    let mut values: Vec<f32> = numbers(rows * columns, seed).into_iter().map(|value| 0.2 * value).collect();
    values.iter_mut().zip(delta.iter().flatten()).for_each(|(value, delta)| *value += delta);
    let mut matrix = Matrix::new(rows, columns, Layout::F32);
    for (i, mut group) in matrix.groups().enumerate() {
        for row in 0..16.min(rows - 16 * i) {
            for column in 0..columns {
                group.float(row, column, values[(16 * i + row) * columns + column].to_le_bytes());
            }
        }
    }
    matrix
}

fn decoder(heads: usize, kv_heads: usize, head_size: usize, blocks: usize) -> Arc<Decoder> {
    merged(heads, kv_heads, head_size, blocks, |_, _| None)
}

/// The same, with `delta` of each block's layers, `[rows, columns]`, added to them.
fn merged(
    heads: usize,
    kv_heads: usize,
    head_size: usize,
    blocks: usize,
    delta: impl Fn(usize, Layer) -> Option<Vec<f32>>,
) -> Arc<Decoder> {
    let (width, ffn, vocabulary) = (40, 72, 50);
    let shape = Shape {
        width,
        ffn,
        heads,
        kv_heads,
        head_size,
        vocabulary,
        epsilon: 1e-5,
        frequencies: (0..head_size / 2).map(|i| 0.5f32.powi(i as i32)).collect(),
    };
    let layer = |block: usize, layer: Layer, seed: usize| {
        let [rows, columns] = layer.sizes(&shape);
        matrix(rows, columns, 10 * block + seed, delta(block, layer))
    };
    let block = |i: usize| DecoderBlock {
        attention_norm: vec![1.0; width],
        qkv: [layer(i, Layer::Query, heads), layer(i, Layer::Key, kv_heads), layer(i, Layer::Value, kv_heads)],
        biases: (i == 0).then(|| [heads, kv_heads, kv_heads].map(|heads| numbers(heads * head_size, heads))),
        head_norms: (i == 1).then(|| [vec![1.1; head_size], vec![0.9; head_size]]),
        mix: layer(i, Layer::Mix, 4),
        ffn_norm: vec![1.0; width],
        gate: layer(i, Layer::Gate, 5),
        up: layer(i, Layer::Up, 6),
        down: layer(i, Layer::Down, 7),
    };
    let blocks = (0..blocks).map(block).collect();
    Arc::new(Decoder::new(shape.clone(), matrix(vocabulary, width, 1, None), blocks, vec![1.0; width], None))
}

fn all_logits(session: &mut Session, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    session.score(tokens, |_, logits| all.push(logits.to_vec()));
    all
}

#[test]
fn batches_single_tokens_paths_and_threads_agree() {
    let shapes: &[(usize, usize, usize)] =
        if cfg!(miri) { &[(2, 1, 6)] } else { &[(6, 2, 6), (4, 4, 16), (3, 1, 48), (2, 1, 80)] };
    let lengths: &[usize] = if cfg!(miri) { &[3] } else { &[1, 17, 150] };
    for &(heads, kv_heads, head_size) in shapes {
        let decoder = decoder(heads, kv_heads, head_size, 2);
        for &length in lengths {
            let tokens: Vec<u32> = (0..length as u32).map(|i| (i * 31 + 7) % 50).collect();
            let mut expected: Option<Vec<Vec<f32>>> = None;
            // Keys and values that are rounded are rounded now to one side and now to the other.
            let cases = [(CacheType::F32, 2e-5), (CacheType::F16, 3e-3), (CacheType::Q8_0, 3e-2)];
            for (path, (cache, most)) in Path::available().into_iter().flat_map(|path| cases.map(|case| (path, case))) {
                let mut of_path = None;
                for threads in if cfg!(miri) { 1..=2 } else { 1..=3 } {
                    let engine = Engine::new(path, threads, false);
                    let mut session = Session::new(&engine, &decoder, length, cache);
                    let batch = all_logits(&mut session, &tokens);
                    assert_eq!(session.tokens(), length);
                    session.truncate(0);
                    let single: Vec<Vec<f32>> = tokens.iter().map(|&token| session.next(&[token]).to_vec()).collect();
                    // A prompt behind what is there already.
                    session.truncate(length / 3);
                    let last = session.next(&tokens[length / 3..]).to_vec();
                    let both = (batch, single, last);
                    match &of_path {
                        None => of_path = Some(both),
                        Some(first) => assert!(first == &both, "{path:?}: {threads} threads and 1 differ"),
                    }
                }
                let (batch, single, last) = of_path.expect("there were threads");
                let expected = expected.get_or_insert_with(|| batch.clone());
                for (how, found) in [("batch", &batch[..]), ("single", &single[..]), ("rest", &[last])] {
                    let expected = &expected[length - found.len()..];
                    for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
                        let size = expected.iter().fold(0.0f32, |size, x| size.max(x.abs()));
                        for (found, expected) in found.iter().zip(expected) {
                            let error = (found - expected).abs() / size;
                            assert!(
                                error < most,
                                "{path:?}, {cache:?}, {how} of {length}, row {row}, head {head_size}: {error:e}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Factors of rank 5 of every layer that the seed picks.
struct Factors {
    rank: usize,
    all: Vec<(usize, Layer, Vec<f32>, Vec<f32>)>,
}

const SCALE: f32 = 1.5;

impl Factors {
    fn new(shape: &Shape, blocks: usize, rank: usize, layers: &[Layer]) -> Self {
        let of = |(block, layer): (usize, Layer)| {
            let [rows, columns] = layer.sizes(shape);
            let seed = 100 + 10 * block + layer as usize;
            let small = |count, seed| numbers(count, seed).into_iter().map(|x| 0.4 * x).collect();
            (block, layer, small(rank * columns, seed), small(rows * rank, seed + 50))
        };
        let all = (0..blocks).flat_map(|block| layers.iter().map(move |&layer| (block, layer))).map(of).collect();
        Self { rank, all }
    }

    fn adapter(&self, shape: &Shape, blocks: usize) -> Arc<Adapter> {
        let layers = self.all.iter().map(|(block, layer, a, b)| LayerFactors { block: *block, layer: *layer, a, b });
        let layers: Vec<LayerFactors> = layers.collect();
        Arc::new(Adapter::new(shape, blocks, self.rank, SCALE, &layers))
    }

    /// `scale · B A`
    fn delta(&self, block: usize, layer: Layer) -> Option<Vec<f32>> {
        let (_, _, a, b) = self.all.iter().find(|(at, of, ..)| (*at, *of) == (block, layer))?;
        let columns = a.len() / self.rank;
        let product = |row: usize, column: usize| -> f32 {
            (0..self.rank).map(|r| b[row * self.rank + r] * a[r * columns + column]).sum()
        };
        let rows = b.len() / self.rank;
        Some((0..rows * columns).map(|i| SCALE * product(i / columns, i % columns)).collect())
    }
}

#[test]
fn an_adapter_equals_its_merged_weights_and_leaves_with_the_next() {
    let shapes: &[(usize, usize, usize, usize)] =
        if cfg!(miri) { &[(2, 1, 6, 5)] } else { &[(6, 2, 6, 5), (2, 1, 16, 8), (2, 1, 80, 1), (2, 2, 8, 13)] };
    for &(heads, kv_heads, head_size, rank) in shapes {
        let base = decoder(heads, kv_heads, head_size, 2);
        for layers in [&Layer::ALL[..], &[Layer::Query, Layer::Value], &[Layer::Down]] {
            let factors = Factors::new(base.shape(), 2, rank, layers);
            let merged = merged(heads, kv_heads, head_size, 2, |block, layer| factors.delta(block, layer));
            let adapter = factors.adapter(base.shape(), 2);
            let numbers: usize = factors.all.iter().map(|(_, _, a, b)| a.len() + b.len()).sum();
            assert_eq!(adapter.bytes(), 4 * numbers);
            let length = if cfg!(miri) { 2 } else { 37 };
            let tokens: Vec<u32> = (0..length).map(|i| (i * 31 + 7) % 50).collect();
            for path in Path::available() {
                for (threads, cache, most) in [(1, CacheType::F16, 3e-3), (2, CacheType::F32, 2e-5)] {
                    let engine = Engine::new(path, threads, false);
                    let expected = all_logits(&mut Session::new(&engine, &merged, tokens.len(), cache), &tokens);
                    let mut session = Session::new(&engine, &base, tokens.len(), cache);
                    let without = all_logits(&mut session, &tokens);
                    session.adapt(Some(adapter.clone()));
                    assert_eq!(session.tokens(), 0);
                    let batch = all_logits(&mut session, &tokens);
                    session.truncate(0);
                    let single: Vec<Vec<f32>> = tokens.iter().map(|&token| session.next(&[token]).to_vec()).collect();
                    for found in [&batch, &single] {
                        let mut changed = 0.0f32;
                        for ((found, expected), without) in found.iter().zip(&expected).zip(&without) {
                            let size = expected.iter().fold(0.0f32, |size, x| size.max(x.abs()));
                            for ((found, expected), without) in found.iter().zip(expected).zip(without) {
                                changed = changed.max((expected - without).abs() / size);
                                let error = (found - expected).abs() / size;
                                assert!(error < most, "{path:?}, {cache:?}: {found}, not {expected}");
                            }
                        }
                        assert!(changed > 0.05, "the adapter does something: {changed}");
                    }
                    session.adapt(None);
                    assert_eq!(all_logits(&mut session, &tokens), without);
                }
            }
        }
    }
}

#[test]
fn what_was_forgotten_leaves_no_trace() {
    for &head_size in if cfg!(miri) { &[6][..] } else { &[6, 48, 64][..] } {
        let decoder = decoder(2, 1, head_size, 2);
        let tokens: Vec<u32> = (0..if cfg!(miri) { 18 } else { 60 }).map(|i| (i * 31 + 7) % 50).collect();
        for path in Path::available() {
            for cache in [CacheType::F32, CacheType::F16, CacheType::Q8_0] {
                let engine = Engine::new(path, 2, false);
                // A prompt that ends within a run of 16, tokens one by one, and a prompt behind them.
                let (first, second, third) = (&tokens[..5], &tokens[5..11], &tokens[11..]);
                let go_on = |session: &mut Session| {
                    let mut all: Vec<Vec<f32>> = second.iter().map(|&token| session.next(&[token]).to_vec()).collect();
                    all.push(session.next(third).to_vec());
                    all
                };
                let mut fresh = Session::new(&engine, &decoder, tokens.len(), cache);
                fresh.next(first);
                let expected = go_on(&mut fresh);
                let mut session = Session::new(&engine, &decoder, tokens.len(), cache);
                session.next(first);
                session.next(&vec![49; tokens.len() - first.len()]);
                session.truncate(first.len());
                assert!(go_on(&mut session) == expected, "{path:?}, {cache:?}: what was forgotten shows");
            }
        }
    }
}

#[test]
fn eight_bits_a_number_take_the_memory_they_say() {
    let decoder = decoder(2, 2, 64, 2);
    let numbers = 2 * 2 * 2 * 64 * 4096;
    assert_eq!(decoder.kv_bytes(4096, CacheType::F16), 2 * numbers);
    assert_eq!(decoder.kv_bytes(4096, CacheType::Q8_0), numbers + numbers / 16);
}

#[test]
fn a_sequence_that_ran_out_of_time_goes_on_where_it_was() {
    let decoder = if cfg!(miri) { decoder(2, 1, 6, 2) } else { decoder(4, 2, 16, 2) };
    let tokens: Vec<u32> = (0..if cfg!(miri) { 4 } else { 300 }).map(|i| (i * 31 + 7) % 50).collect();
    let engine = Engine::new(*Path::available().last().expect("a path"), 2, false);
    let mut session = Session::new(&engine, &decoder, tokens.len() + 1, CacheType::F16);
    session.next(&tokens);
    let expected = session.next(&[5]).to_vec();
    let all: &[u64] = if cfg!(miri) { &[0, 100, 1_000_000] } else { &[0, 0, 1, 3, 10, 30, 100, 300, 1000, 1_000_000] };
    for &micros in all {
        session.truncate(0);
        let until = |micros| Some(Instant::now() + Duration::from_micros(micros));
        if session.next_until(&tokens, until(micros)).is_none() {
            assert_eq!(session.tokens(), 0);
            session.next(&tokens);
        }
        assert_eq!(session.next_until(&[5], until(0)), None);
        assert_eq!(session.tokens(), tokens.len());
        let found = match session.next_until(&[5], until(micros / 10)).map(<[f32]>::to_vec) {
            Some(logits) => logits,
            None => session.next(&[5]).to_vec(),
        };
        assert_eq!(found, expected);
    }
}

#[test]
fn a_prompt_is_the_same_however_it_is_divided_and_whatever_was_there() {
    // Beyond a batch, and beyond what attention takes at a time.
    let length = if cfg!(miri) { 3 } else { 300 };
    let all: &[usize] =
        if cfg!(miri) { &[1] } else { &[0, 1, 2, 15, 16, 17, 47, 48, 127, 128, 129, 200, 256, 257, 298, 299] };
    let tokens: Vec<u32> = (0..length as u32).map(|i| (i * 31 + 7) % 50).collect();
    let others: Vec<u32> = (0..length as u32).map(|i| (i * 17 + 3) % 50).collect();
    for &(heads, kv_heads, head_size) in if cfg!(miri) { &[(2, 1, 6)][..] } else { &[(6, 2, 6), (2, 1, 80)][..] } {
        let decoder = decoder(heads, kv_heads, head_size, 2);
        let adapter = Factors::new(decoder.shape(), 2, 5, &Layer::ALL).adapter(decoder.shape(), 2);
        let cases = [(CacheType::F16, None), (CacheType::F32, Some(adapter))];
        for (path, (cache, adapter)) in
            Path::available().into_iter().flat_map(|path| cases.clone().map(|case| (path, case)))
        {
            let engine = Engine::new(path, 2, false);
            let mut session = Session::new(&engine, &decoder, length + 2, cache);
            session.adapt(adapter);
            let behind = |session: &mut Session, tokens: &[u32]| {
                let prompt = session.prompt_until(tokens, None).expect("no time is set").to_vec();
                [prompt, session.next(&[5]).to_vec(), session.next(&[6]).to_vec()]
            };
            let expected = behind(&mut session, &tokens);
            for &shared in all {
                // Behind what is shared: an answer, and another prompt that may run out of time.
                session.truncate(shared);
                session.next(&[9]);
                session.next(&[9]);
                session.truncate(shared);
                let until = Instant::now() + Duration::from_micros(shared as u64);
                session.prompt_until(&others[shared..], Some(until));
                session.truncate(shared);
                assert_eq!(session.tokens(), shared);
                // Some of the rest one by one, and all else at once.
                let several = (length - 1).min(shared + 2);
                for &token in &tokens[shared..several] {
                    session.prompt_until(&[token], None).expect("no time is set");
                }
                let found = behind(&mut session, &tokens[several..]);
                assert!(found == expected, "{path:?}, {cache:?}, head {head_size}: another one behind {shared} tokens");
            }
        }
    }
}

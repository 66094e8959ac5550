//! The same sequence in batches, token by token, on every path and any number of threads.

use std::sync::Arc;

use super::{Decoder, DecoderBlock, Session, Shape};
use crate::quantized::{Layout, Matrix};
use crate::{Engine, Path};

/// Small numbers of both signs.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 10_007) as f32 / 5_003.5 - 1.0).collect()
}

fn matrix(rows: usize, columns: usize, seed: usize) -> Matrix {
    let values = numbers(rows * columns, seed);
    let mut matrix = Matrix::new(rows, columns, Layout::F32);
    for (i, mut group) in matrix.groups().enumerate() {
        for row in 0..16.min(rows - 16 * i) {
            for column in 0..columns {
                group.float(row, column, (0.2 * values[(16 * i + row) * columns + column]).to_le_bytes());
            }
        }
    }
    matrix
}

fn decoder(heads: usize, kv_heads: usize, head_size: usize, blocks: usize) -> Arc<Decoder> {
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
    let block = |i: usize| DecoderBlock {
        attention_norm: vec![1.0; width],
        qkv: [heads, kv_heads, kv_heads].map(|heads| matrix(heads * head_size, width, 10 * i + heads)),
        biases: (i == 0).then(|| [heads, kv_heads, kv_heads].map(|heads| numbers(heads * head_size, heads))),
        head_norms: (i == 1).then(|| [vec![1.1; head_size], vec![0.9; head_size]]),
        mix: matrix(width, heads * head_size, 10 * i + 4),
        ffn_norm: vec![1.0; width],
        gate: matrix(ffn, width, 10 * i + 5),
        up: matrix(ffn, width, 10 * i + 6),
        down: matrix(width, ffn, 10 * i + 7),
    };
    let blocks = (0..blocks).map(block).collect();
    Arc::new(Decoder::new(shape, matrix(vocabulary, width, 1), blocks, vec![1.0; width], None))
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
            for path in Path::available() {
                let mut of_path = None;
                for threads in if cfg!(miri) { 1..=2 } else { 1..=3 } {
                    let engine = Engine::new(path, threads, false);
                    let mut session = Session::new(&engine, &decoder, length);
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
                            // Keys and values are rounded to half precision, now to one side and now to the other.
                            assert!(
                                error < 3e-3,
                                "{path:?}, {how} of {length}, row {row}, head {head_size}: {error:e}"
                            );
                        }
                    }
                }
            }
        }
    }
}

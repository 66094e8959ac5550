//! The oracles: a cut model equals the uncut one bit for bit, packed sequences equal lone ones, gradients equal finite
//! differences, and every family equals a plain reference written from the papers.

mod reference;

use experiment::{Factors, Seed};
use proptest::prelude::*;
use rand::Rng;

use super::*;
use crate::adapter::TARGETS;
use crate::source::random::RandomModel;
use crate::source::random::tests::tiny_model;
use crate::{Adapter, AdapterConfig, Cut, Family, Llama3Scaling};

const BLOCKS: usize = 4;

/// An adapter with every factor away from zero, so that every gradient path is alive.
fn random_adapter(source: &dyn Source, targets: &[&str], dropout: f64, factors: Factors, seed: u64) -> Adapter {
    let targets = targets.iter().map(|target| (*target).to_owned()).collect();
    let config = AdapterConfig { rank: 2, alpha: 4.0, dropout, targets, factors };
    let adapter = Adapter::seeded(config, source.config(), 0..source.config().blocks, Seed(seed)).unwrap();
    let mut generator = Seed(seed).generator("adapter values");
    let flat: Vec<f32> = (0..adapter.parameters()).map(|_| generator.random_range(-0.2..0.2)).collect();
    adapter.with_flat(&flat).unwrap()
}

struct Batch {
    tokens: Vec<u32>,
    targets: Vec<Option<u32>>,
    segments: Segments,
}

fn random_batch(lengths: &[usize], seed: u64) -> Batch {
    let mut generator = Seed(seed).generator("batch");
    let segments = Segments::new(lengths.to_vec()).unwrap();
    let tokens: Vec<u32> = (0..segments.tokens()).map(|_| generator.random_range(0..256)).collect();
    let mut targets: Vec<Option<u32>> =
        tokens.iter().map(|_| generator.random_bool(0.7).then(|| generator.random_range(0..256))).collect();
    targets[0] = Some(65);
    Batch { tokens, targets, segments }
}

/// Loss and gradients of the model in one piece.
fn unsplit(source: &dyn Source, device: &ComputeDevice, adapter: &Adapter, batch: &Batch) -> (Loss, Gradients) {
    let stage = Stage::load(source, Part::whole(BLOCKS), device, None).unwrap();
    let lora = stage.attach(adapter).unwrap();
    let Batch { tokens, targets, segments } = batch;
    let dropout = Dropout { seed: [9; 32] };
    let (loss, backward) =
        stage.loss_backward(Input::Tokens(tokens), segments, targets, 50, &lora, &dropout, false).unwrap();
    (loss, backward.adapter)
}

/// The same through head, body and tail, handing over nothing but matrices.
fn split(source: &dyn Source, device: &ComputeDevice, adapter: &Adapter, batch: &Batch, cut: Cut) -> (Loss, Gradients) {
    let [head_part, body_part, tail_part] = cut.parts(BLOCKS).unwrap();
    let head = Stage::load(source, head_part, device, None).unwrap();
    let body = Stage::load(source, body_part, device, None).unwrap();
    let tail = Stage::load(source, tail_part, device, Some(&head)).unwrap();
    let [head_lora, body_lora, tail_lora] =
        [&head, &body, &tail].map(|stage| stage.attach(&adapter.part(stage.part().blocks.clone())).unwrap());
    let Batch { tokens, targets, segments } = batch;
    let dropout = Dropout { seed: [9; 32] };
    let (x, head_pending) = head.forward_recorded(Input::Tokens(tokens), segments, &head_lora, &dropout).unwrap();
    let (x, body_pending) = body.forward_recorded(Input::Activations(x), segments, &body_lora, &dropout).unwrap();
    let (loss, tail_backward) =
        tail.loss_backward(Input::Activations(x), segments, targets, 50, &tail_lora, &dropout, true).unwrap();
    let body_backward = body_pending.backward(tail_backward.input.unwrap()).unwrap();
    let head_backward = head_pending.backward(body_backward.input.unwrap()).unwrap();
    let gradients = [head_backward.adapter, body_backward.adapter, tail_backward.adapter];
    (loss, Gradients::new(gradients.iter().flat_map(|part| part.tensors().to_vec()).collect()))
}

fn bits(gradients: &Gradients) -> Vec<Vec<u32>> {
    gradients.tensors().iter().map(|tensor| tensor.iter().map(|g| g.to_bits()).collect()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn a_split_model_equals_the_unsplit_one_bit_for_bit(
        lengths in prop::collection::vec(1usize..12, 1..4),
        seed in any::<u64>(),
        dropout in prop::sample::select(vec![0.0, 0.3]),
        factors in prop::sample::select(vec![Factors::Both, Factors::FreezeA]),
    ) {
        let source = tiny_model(BLOCKS);
        let adapter = random_adapter(&source, &TARGETS, dropout, factors, seed);
        let batch = random_batch(&lengths, seed);
        for device in ComputeDevice::compiled() {
            let (loss, gradients) = unsplit(&source, &device, &adapter, &batch);
            for (head_blocks, tail_blocks) in [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0)] {
                let cut = Cut { head_blocks, tail_blocks };
                let (split_loss, split_gradients) = split(&source, &device, &adapter, &batch, cut);
                prop_assert_eq!(loss.nats.to_bits(), split_loss.nats.to_bits(), "{:?} {:?}", device, cut);
                prop_assert_eq!(bits(&gradients), bits(&split_gradients), "{:?} {:?}", device, cut);
            }
        }
    }
}

/// Of more than one group on the native device: one sequence is longer than a group, and the last has no target.
fn long_batch() -> Batch {
    let mut batch = random_batch(&[300, 200, 40, 700, 30, 500], 8);
    batch.targets[1_270..].fill(None);
    batch
}

#[test]
fn a_long_micro_batch_splits_bit_for_bit() {
    let source = tiny_model(BLOCKS);
    let batch = long_batch();
    for dropout in [0.0, 0.3] {
        let adapter = random_adapter(&source, &["q_proj", "down_proj"], dropout, Factors::Both, 8);
        for device in ComputeDevice::compiled() {
            let (loss, gradients) = unsplit(&source, &device, &adapter, &batch);
            let cut = Cut { head_blocks: 1, tail_blocks: 1 };
            let (split_loss, split_gradients) = split(&source, &device, &adapter, &batch, cut);
            assert_eq!(loss.nats.to_bits(), split_loss.nats.to_bits(), "{device:?}");
            assert_eq!(bits(&gradients), bits(&split_gradients), "{device:?}");
        }
    }
}

#[test]
fn a_long_micro_batch_equals_the_sum_of_its_sequences() {
    let source = tiny_model(BLOCKS);
    let batch = long_batch();
    let adapter = random_adapter(&source, &["q_proj", "down_proj"], 0.0, Factors::Both, 8);
    for device in ComputeDevice::compiled() {
        let (loss, gradients) = unsplit(&source, &device, &adapter, &batch);
        let (mut nats, mut sum, mut trained) = (0.0, vec![0.0; gradients.tensors().concat().len()], 0);
        for (start, length) in batch.segments.spans().filter(|(start, _)| *start < 1_270) {
            let lone = Batch {
                tokens: batch.tokens[start..start + length].to_vec(),
                targets: batch.targets[start..start + length].to_vec(),
                segments: Segments::one(length),
            };
            let (loss, gradients) = unsplit(&source, &device, &adapter, &lone);
            nats += loss.nats;
            trained += loss.tokens;
            sum.iter_mut().zip(gradients.tensors().concat()).for_each(|(sum, one)| *sum += one);
        }
        let stage = Stage::load(&source, Part::whole(BLOCKS), &device, None).unwrap();
        let lora = stage.attach(&adapter).unwrap();
        let Batch { tokens, targets, segments } = &batch;
        let evaluated = stage.loss(Input::Tokens(tokens), segments, targets, &lora).unwrap();
        for loss in [loss, evaluated] {
            assert_eq!(loss.tokens, trained);
            assert!((loss.nats - nats).abs() < 1e-4 * nats, "{device:?}: {} {nats}", loss.nats);
        }
        check_close(&gradients.tensors().concat(), &sum, 1e-4);
    }
}

/// Other backends than the native one go through all sequences at once: with a wrong place in a mask they would differ.
/// (A cut model could not tell, whose parts have the same places.)
#[test]
fn a_long_micro_batch_has_the_same_dropout_on_every_backend() {
    let source = tiny_model(BLOCKS);
    let batch = long_batch();
    let adapter = random_adapter(&source, &["q_proj", "down_proj"], 0.3, Factors::Both, 8);
    let [native, other] = [ComputeDevice::compiled().remove(0), ComputeDevice::compiled().remove(1)]
        .map(|device| unsplit(&source, &device, &adapter, &batch).1.tensors().concat());
    check_close(&native, &other, 1e-4);
}

/// Two recordings at once, of several groups each, go back in any company and order to what each gets alone.
#[test]
fn long_micro_batches_that_are_recorded_together_go_back_as_if_alone() {
    let source = tiny_model(BLOCKS);
    for (device, factors) in ComputeDevice::compiled()
        .into_iter()
        .flat_map(|device| [(device.clone(), Factors::Both), (device, Factors::FreezeA)])
    {
        let stage =
            Stage::load(&source, Part { blocks: 1..3, embedding: false, lm_head: false }, &device, None).unwrap();
        let width = source.config().width;
        let dropouts = [Dropout { seed: [1; 32] }, Dropout { seed: [2; 32] }];
        let parts: Vec<_> = [vec![300, 300, 40], vec![600, 20]]
            .into_iter()
            .enumerate()
            .map(|(i, lengths)| {
                let segments = Segments::new(lengths).unwrap();
                let mut generator = Seed(i as u64).generator("rows");
                let mut rows = || {
                    let values = (0..segments.tokens() * width).map(|_| generator.random_range(-1.0..1.0)).collect();
                    Matrix::new(segments.tokens(), width, values)
                };
                let (x, gradient) = (rows(), rows());
                let adapter = random_adapter(&source, &["q_proj", "up_proj"], 0.3, factors, i as u64).part(1..3);
                (x, gradient, segments, stage.attach(&adapter).unwrap())
            })
            .collect();
        let outcome = |backward: Backward| {
            let input: Vec<u32> = backward.input.unwrap().values().iter().map(|x| x.to_bits()).collect();
            (input, bits(&backward.adapter))
        };
        let alone: Vec<_> = parts
            .iter()
            .zip(&dropouts)
            .map(|((x, gradient, segments, lora), dropout)| {
                let (_, pending) =
                    stage.forward_recorded(Input::Activations(x.clone()), segments, lora, dropout).unwrap();
                outcome(pending.backward(gradient.clone()).unwrap())
            })
            .collect();
        let together = || -> Vec<(Pending, Matrix)> {
            let all = parts.iter().zip(&dropouts).map(|((x, _, segments, lora), dropout)| Recording {
                input: Input::Activations(x.clone()),
                segments,
                lora,
                dropout,
            });
            let recorded = stage.forward_recorded_together(all.collect()).unwrap();
            recorded.into_iter().zip(&parts).map(|((_, pending), part)| (pending, part.1.clone())).collect()
        };
        let back = |all: Vec<(Pending, Matrix)>| -> Vec<_> {
            Pending::backward_together(all).unwrap().into_iter().map(outcome).collect()
        };
        assert!(back(together()) == alone, "{device:?}");
        let mut reversed = together();
        reversed.reverse();
        assert!(back(reversed).into_iter().rev().eq(alone.iter().cloned()), "{device:?}");
        let mut all = together();
        let last = all.remove(1);
        assert!(back(vec![last]) == alone[1..], "{device:?}");
        assert!(back(all) == alone[..1], "{device:?}");
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let source = tiny_model(BLOCKS);
    let adapter = random_adapter(&source, &TARGETS, 0.0, Factors::Both, 3);
    let batch = random_batch(&[9, 5], 3);
    for device in ComputeDevice::compiled() {
        let stage = Stage::load(&source, Part::whole(BLOCKS), &device, None).unwrap();
        let (_, gradients) = unsplit(&source, &device, &adapter, &batch);
        let gradient: Vec<f32> = gradients.tensors().concat();
        let mut generator = Seed(1).generator("direction");
        let direction: Vec<f32> = gradient.iter().map(|_| generator.random_range(-1.0..1.0)).collect();
        let loss_at = |step: f32| {
            let moved: Vec<f32> = adapter.flat().iter().zip(&direction).map(|(w, d)| w + step * d).collect();
            let lora = stage.attach(&adapter.with_flat(&moved).unwrap()).unwrap();
            let loss = stage.loss(Input::Tokens(&batch.tokens), &batch.segments, &batch.targets, &lora).unwrap();
            loss.nats / 50.0
        };
        let step = 1e-3;
        let difference = (loss_at(step) - loss_at(-step)) / (2.0 * f64::from(step));
        let product: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        assert!((difference - product).abs() < 2e-3 * product.abs().max(0.1), "{device:?}: {difference} {product}");
    }
}

#[test]
fn packed_sequences_equal_lone_ones() {
    let source = tiny_model(BLOCKS);
    let adapter = random_adapter(&source, &["q_proj", "v_proj"], 0.0, Factors::Both, 4);
    for device in ComputeDevice::compiled() {
        let stage = Stage::load(&source, Part::whole(BLOCKS), &device, None).unwrap();
        let lora = stage.attach(&adapter).unwrap();
        let batch = random_batch(&[7, 1, 12], 5);
        let packed = stage.logits(Input::Tokens(&batch.tokens), &batch.segments, &lora).unwrap();
        for (start, length) in batch.segments.spans() {
            let tokens = &batch.tokens[start..start + length];
            let lone = stage.logits(Input::Tokens(tokens), &Segments::one(length), &lora).unwrap();
            for row in 0..length {
                check_close(packed.row(start + row), lone.row(row), 1e-5);
            }
        }
    }
}

#[test]
fn decoding_with_a_cache_equals_the_full_pass() {
    let source = tiny_model(BLOCKS);
    let adapter = random_adapter(&source, &TARGETS, 0.0, Factors::Both, 6);
    let batch = random_batch(&[10], 6);
    for device in ComputeDevice::compiled() {
        let stage = Stage::load(&source, Part::whole(BLOCKS), &device, None).unwrap();
        let lora = stage.attach(&adapter).unwrap();
        let full = stage.logits(Input::Tokens(&batch.tokens), &batch.segments, &lora).unwrap();
        let mut cache = stage.cache();
        check_close(&stage.next_logits(&batch.tokens[..6], &mut cache, &lora).unwrap(), full.row(5), 1e-5);
        for (i, token) in batch.tokens.iter().enumerate().skip(6) {
            check_close(&stage.next_logits(&[*token], &mut cache, &lora).unwrap(), full.row(i), 1e-5);
        }
    }
}

#[test]
fn every_family_equals_the_reference() {
    let llama = tiny_model(2).config().clone();
    let scaling =
        Llama3Scaling { factor: 8.0, low_frequency_factor: 1.0, high_frequency_factor: 4.0, original_context: 64 };
    let variants = [
        llama.clone(),
        ModelConfig { rope_scaling: Some(scaling), tied_embeddings: false, ..llama.clone() },
        ModelConfig { family: Family::Qwen2, qkv_bias: true, ..llama.clone() },
        ModelConfig { family: Family::Qwen3, head_size: 8, ..llama },
    ];
    for config in variants {
        let source = RandomModel::of_shape(config.clone(), crate::Tokenizer::bytes(), Seed(11)).unwrap();
        let batch = random_batch(&[20], 8);
        let expected = reference::logits(&source, &batch.tokens);
        for device in ComputeDevice::compiled() {
            let stage = Stage::load(&source, Part::whole(2), &device, None).unwrap();
            let adapter = random_adapter(&source, &[], 0.0, Factors::Both, 1);
            let lora = stage.attach(&adapter).unwrap();
            let found = stage.logits(Input::Tokens(&batch.tokens), &batch.segments, &lora).unwrap();
            for (row, expected) in expected.iter().enumerate() {
                check_close(found.row(row), expected, 2e-4);
            }
        }
    }
}

#[test]
fn an_abandoned_pass_disturbs_nothing() {
    let source = tiny_model(BLOCKS);
    let adapter = random_adapter(&source, &TARGETS, 0.0, Factors::Both, 3);
    let batch = random_batch(&[9], 3);
    let device = ComputeDevice::compiled().remove(0);
    let before = unsplit(&source, &device, &adapter, &batch);
    let stage = Stage::load(&source, Part::whole(BLOCKS), &device, None).unwrap();
    let lora = stage.attach(&adapter).unwrap();
    let dropout = Dropout { seed: [9; 32] };
    drop(stage.forward_recorded(Input::Tokens(&batch.tokens), &batch.segments, &lora, &dropout).unwrap());
    assert_eq!(bits(&unsplit(&source, &device, &adapter, &batch).1), bits(&before.1));
}

#[test]
fn wrong_inputs_are_refused_with_their_numbers() {
    let source = tiny_model(BLOCKS);
    let device = ComputeDevice::compiled().remove(0);
    let [head, body, _] = Cut { head_blocks: 1, tail_blocks: 1 }.parts(BLOCKS).unwrap();
    let adapter = random_adapter(&source, &["q_proj"], 0.0, Factors::Both, 3);
    let body = Stage::load(&source, body, &device, None).unwrap();
    assert!(body.attach(&adapter).is_err(), "an adapter of other blocks");
    let lora = body.attach(&adapter.part(1..3)).unwrap();
    let check_refused = |input: Input<'_>, expected: &str| {
        let error = body.forward(input, &Segments::one(2), &lora).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check_refused(Input::Tokens(&[1, 2]), "without the embedding");
    check_refused(Input::Activations(Matrix::new(3, 16, vec![0.0; 48])), "[3, 16]");
    check_refused(Input::Activations(Matrix::new(2, 8, vec![0.0; 16])), "[2, 8]");
    let head = Stage::load(&source, head, &device, None).unwrap();
    let lora = head.attach(&adapter.part(0..1)).unwrap();
    let error = head.forward(Input::Tokens(&[1, 999]), &Segments::one(2), &lora).unwrap_err().to_string();
    assert!(error.contains("token 999"), "{error}");
}

fn check_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance * e.abs().max(1.0), "at {i}: {f} instead of {e}");
    }
}

#[test]
fn measured_inputs_multiply_to_the_blocks_output() {
    let source = tiny_model(BLOCKS);
    let device = ComputeDevice::new(&experiment::Device::default()).unwrap();
    let stage = Stage::load(&source, Part { blocks: 1..3, embedding: false, lm_head: false }, &device, None).unwrap();
    let lora = stage.attach(&Adapter::none()).unwrap();
    let config = source.config().clone();
    let segments = Segments::new(vec![5, 3]).unwrap();
    let x = Matrix::new(8, config.width, (0..8 * config.width).map(|i| (i as f32 * 0.7).sin()).collect());
    let plain = stage.forward(Input::Activations(x.clone()), &segments, &lora).unwrap();
    let mut behind = vec![x.values().to_vec()];
    let measured = stage.forward_measured(Input::Activations(x), &segments, &lora, |block, inputs| {
        let name = |layer: &str| format!("model.layers.{block}.{layer}.weight");
        let times = |name: &str, x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
            let weights = (&source as &dyn Source).tensor(name, &[rows, columns]).unwrap();
            let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f32>();
            x.chunks(columns)
                .flat_map(|x| weights.chunks(columns).map(move |w| dot(x, w)).collect::<Vec<_>>())
                .collect()
        };
        let o = times(&name("self_attn.o_proj"), &inputs.mixed, config.width, config.query_width());
        let down = times(&name("mlp.down_proj"), &inputs.gated, config.width, config.ffn);
        let gate = times(&name("mlp.gate_proj"), &inputs.ffn, config.ffn, config.width);
        let up = times(&name("mlp.up_proj"), &inputs.ffn, config.ffn, config.width);
        for ((gated, gate), up) in inputs.gated.iter().zip(gate).zip(up) {
            assert!((gated - gate / (1.0 + (-gate).exp()) * up).abs() < 1e-4);
        }
        let before = behind.last().unwrap();
        behind.push(before.iter().zip(o).zip(down).map(|((x, o), down)| x + o + down).collect());
        assert_eq!(inputs.attention.len(), 8 * config.width);
        assert_eq!(block, behind.len() - 1);
    });
    assert_eq!(measured.unwrap(), plain);
    for (found, expected) in behind[2].iter().zip(plain.values()) {
        assert!((found - expected).abs() < 1e-4, "{found} {expected}");
    }
}

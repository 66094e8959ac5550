//! A block's output, and its gradients against central differences of the reference.

use kernels::{
    Block, BlockAdapter, BlockWeights, Cache, Engine, Frozen, GroupSaved, Keep, Masks, Pair, Pass, Rotation, Saved,
    Stream, WeightType,
};

use crate::reference;
use crate::{Draw, engines, kept, paths, relative_error};

#[derive(Debug)]
pub struct Case {
    pub heads: usize,
    pub kv_heads: usize,
    pub size: usize,
    pub width: usize,
    pub ffn: usize,
    /// Lengths of segments, by group.
    pub groups: Vec<Vec<usize>>,
    /// Of every group's adapter; 0 leaves it without one.
    pub ranks: Vec<usize>,
    pub epsilon: f32,
    pub biases: bool,
    pub head_norms: bool,
    pub dropout: bool,
    pub weights: WeightType,
}

impl Case {
    fn small(weights: WeightType) -> Self {
        Self {
            heads: 4,
            kv_heads: 2,
            size: 16,
            width: 48,
            ffn: 80,
            groups: vec![vec![5, 1, 40], vec![13]],
            ranks: vec![4, 8],
            epsilon: 1e-5,
            biases: false,
            head_norms: false,
            dropout: false,
            weights,
        }
    }
}

pub struct Made {
    block: Block,
    reference: reference::Block,
    adapters: Vec<BlockAdapter>,
    pub reference_adapters: Vec<reference::Adapter>,
    pub x: Vec<f32>,
    /// The loss is the sum of outputs times these.
    slope: Vec<f32>,
    rotation: Rotation,
    masks: Vec<Vec<Option<Vec<f32>>>>,
    pub case: Case,
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

pub fn made(case: Case, seed: u64) -> Made {
    let mut draw = Draw(seed);
    let Case { heads, kv_heads, size, width, ffn, epsilon, .. } = case;
    let (query, key) = (heads * size, kv_heads * size);
    let shapes = [(query, width), (key, width), (key, width), (width, query), (ffn, width), (ffn, width), (width, ffn)];
    let layers = shapes.map(|(rows, columns)| {
        Frozen::new(rows, columns, draw.values(rows * columns, 1.7 / (columns as f64).sqrt()), case.weights)
    });
    let mut norm = |n: usize| draw.values(n, 0.5).iter().map(|x| x + 1.0).collect::<Vec<f32>>();
    let norms = [norm(width), norm(width)];
    let head_norms = case.head_norms.then(|| [norm(size), norm(size)]);
    let biases = case.biases.then(|| [query, key, key].map(|n| draw.values(n, 0.5)));
    let reference = reference::Block {
        heads,
        kv_heads,
        size,
        epsilon: f64::from(epsilon),
        norms: norms.each_ref().map(|norm| wide(norm)),
        layers: layers.each_ref().map(|layer| wide(&kept(layer))),
        biases: biases.as_ref().map(|biases| biases.each_ref().map(|bias| wide(bias))),
        head_norms: head_norms.as_ref().map(|norms| norms.each_ref().map(|norm| wide(norm))),
    };
    let rows_of: Vec<usize> = case.groups.iter().map(|lengths| lengths.iter().sum()).collect();
    let masks: Vec<Vec<Option<Vec<f32>>>> = rows_of
        .iter()
        .map(|rows| {
            let mut mask = |columns: usize| {
                let kept = |x: f32| if x < -0.5 { 0.0 } else { 4.0 / 3.0 };
                case.dropout.then(|| draw.values(rows * columns, 1.0).into_iter().map(kept).collect())
            };
            shapes.iter().map(|(_, columns)| mask(*columns)).collect()
        })
        .collect();
    let (mut adapters, mut reference_adapters) = (Vec::new(), Vec::new());
    for (group, &rank) in case.ranks.iter().enumerate() {
        let mut parts: Vec<Option<(Vec<f32>, Vec<f32>)>> = Vec::new();
        for (i, (rows, columns)) in shapes.iter().enumerate() {
            // The second group adapts two layers alone.
            let adapted = rank > 0 && (group == 0 || i == 2 || i == 6);
            parts.push(adapted.then(|| (draw.values(rank * columns, 0.3), draw.values(rows * rank, 0.3))));
        }
        let scale = 3.0 / (rank.max(1) as f32).sqrt();
        adapters.push(std::array::from_fn(|i| parts[i].as_ref().map(|(a, b)| Pair::new(rank, a, b, scale))));
        reference_adapters.push(std::array::from_fn(|i| {
            let mask = masks[group][i].as_ref().map(|mask| wide(mask));
            let pair = |(a, b): &(Vec<f32>, Vec<f32>)| reference::Pair {
                rank,
                a: wide(a),
                b: wide(b),
                scale: f64::from(scale),
                mask: mask.clone(),
            };
            parts[i].as_ref().map(pair)
        }));
    }
    let rows: usize = rows_of.iter().sum();
    let positions = case.groups.iter().flatten().flat_map(|&length| 0..length);
    let angles: Vec<f32> =
        positions.flat_map(|p| (0..size / 2).map(move |i| p as f32 * 0.7f32.powi(i as i32))).collect();
    let rotation = Rotation {
        cos: angles.iter().map(|angle| angle.cos()).collect(),
        sin: angles.iter().map(|angle| angle.sin()).collect(),
    };
    let block = Block::new(BlockWeights {
        heads,
        kv_heads,
        head_size: size,
        epsilon,
        attention_norm: norms[0].clone(),
        ffn_norm: norms[1].clone(),
        layers,
        biases,
        head_norms,
    });
    let (x, slope) = (draw.values(rows * width, 1.0), draw.values(rows * width, 1.0));
    Made { block, reference, adapters, reference_adapters, x, slope, rotation, masks, case }
}

impl Made {
    fn pass(&self, engine: &Engine) -> Pass {
        let Rotation { cos, sin } = &self.rotation;
        Pass::new(engine, &self.case.groups, Rotation { cos: cos.clone(), sin: sin.clone() })
    }

    pub fn run(&self, engine: &Engine, keep: Keep) -> (Vec<f32>, Vec<f32>, kernels::BlockGradients) {
        let pass = self.pass(engine);
        let adapters: Vec<&BlockAdapter> = self.adapters.iter().collect();
        let mask = |group: usize, layer: usize| self.masks[group][layer].clone();
        let masks: Option<Masks<'_>> = self.case.dropout.then_some(&mask);
        let x = Stream::new(engine, &self.x);
        let (y, saved) = self.block.forward(engine, &pass, x, &adapters, masks, keep);
        let slope = Stream::new(engine, &self.slope);
        let saved = saved.expect("something is kept");
        let (dx, gradients) = self.block.backward(engine, &pass, saved, slope, &adapters, [true, true], masks, true);
        (y.to_vec(), dx.expect("asked for").to_vec(), gradients)
    }

    /// As `run`, but the backward pass goes over some of the groups alone, in this order.
    fn run_some(&self, engine: &Engine, keep: Keep, some: &[usize]) -> (Vec<f32>, kernels::BlockGradients) {
        let pass = self.pass(engine);
        let adapters: Vec<&BlockAdapter> = self.adapters.iter().collect();
        let x = Stream::new(engine, &self.x);
        let (_, saved) = self.block.forward(engine, &pass, x, &adapters, None, keep);
        let saved = saved.expect("something is kept");
        let rows = |group: usize| {
            let before: usize = self.case.groups[..group].iter().flatten().sum();
            before..before + self.case.groups[group].iter().sum::<usize>()
        };
        let pick = |values: &[f32], columns: usize| -> Vec<f32> {
            let one = |&group: &usize| &values[rows(group).start * columns..rows(group).end * columns];
            some.iter().flat_map(one).copied().collect()
        };
        let groups: Vec<Vec<usize>> = some.iter().map(|&group| self.case.groups[group].clone()).collect();
        let half = self.case.size / 2;
        let rotation = Rotation { cos: pick(&self.rotation.cos, half), sin: pick(&self.rotation.sin, half) };
        let parts: Vec<_> = some.iter().map(|&group| GroupSaved { saved: &saved, pass: &pass, group }).collect();
        let gathered = Saved::gathered(engine, &parts);
        let pass = Pass::new(engine, &groups, rotation);
        let adapters: Vec<&BlockAdapter> = some.iter().map(|&group| &self.adapters[group]).collect();
        let slope = Stream::new(engine, &pick(&self.slope, self.case.width));
        let (dx, gradients) = self.block.backward(engine, &pass, gathered, slope, &adapters, [true, true], None, true);
        (dx.expect("asked for").to_vec(), gradients)
    }

    /// The output of the only segment, some tokens at a time.
    pub fn token_by_token(&self, engine: &Engine, pieces: &[usize]) -> Vec<f32> {
        let (width, half) = (self.case.width, self.case.size / 2);
        let mut cache = Cache::default();
        let (mut from, mut found) = (0, Vec::new());
        for &tokens in pieces {
            let rows = |values: &[f32], width: usize| values[from * width..(from + tokens) * width].to_vec();
            let rotation = Rotation { cos: rows(&self.rotation.cos, half), sin: rows(&self.rotation.sin, half) };
            let pass = Pass::new(engine, &[vec![tokens]], rotation);
            let x = Stream::new(engine, &rows(&self.x, width));
            found.extend_from_slice(&self.block.next(engine, &pass, x, &self.adapters[0], &mut cache));
            from += tokens;
        }
        found
    }

    /// The reference's output for other inputs and adapters.
    pub fn expected(&self, x: &[f64], adapters: &[reference::Adapter]) -> Vec<f64> {
        let width = self.case.width;
        let half = self.case.size / 2;
        let rows: Vec<Vec<f64>> = x.chunks(width).map(<[f64]>::to_vec).collect();
        let table = |values: &[f32]| values.chunks(half).map(wide).collect::<Vec<_>>();
        let (cos, sin) = (table(&self.rotation.cos), table(&self.rotation.sin));
        let (mut row, mut all) = (0, Vec::new());
        for (lengths, adapter) in self.case.groups.iter().zip(adapters) {
            let group = row;
            for &length in lengths {
                // A mask belongs to its group's rows: the segment's part of it.
                let mut adapter = adapter.clone();
                for pair in adapter.iter_mut().flatten() {
                    let columns = pair.a.len() / pair.rank;
                    pair.mask = pair.mask.as_ref().map(|mask| mask[(row - group) * columns..].to_vec());
                }
                let at = row..row + length;
                all.extend(self.reference.forward(&rows[at.clone()], &adapter, &cos[at.clone()], &sin[at]).concat());
                row += length;
            }
        }
        all
    }

    pub fn loss(&self, x: &[f64], adapters: &[reference::Adapter]) -> f64 {
        self.expected(x, adapters).iter().zip(&self.slope).map(|(y, s)| y * f64::from(*s)).sum()
    }

    /// Checks every gradient in a few random directions.
    fn check_gradients(&self, dx: &[f32], gradients: &kernels::BlockGradients, tolerance: f64, what: &str) {
        let mut draw = Draw(77);
        let step = 1e-4;
        let mut check = |name: String, gradient: &[f32], moved: &dyn Fn(f64, &[f64]) -> f64| {
            let direction = wide(&draw.values(gradient.len(), 1.0));
            let difference = (moved(step, &direction) - moved(-step, &direction)) / (2.0 * step);
            let product: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * d).sum();
            let size = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let error = (difference - product).abs() / size.max(1e-6);
            assert!(error <= tolerance, "{what}, {name}: {difference} {product}, error {error:e}");
        };
        let x = wide(&self.x);
        check("dx".into(), dx, &|step, direction| {
            let x: Vec<f64> = x.iter().zip(direction).map(|(x, d)| x + step * d).collect();
            self.loss(&x, &self.reference_adapters)
        });
        for (group, gradients) in gradients.iter().enumerate() {
            for (layer, gradients) in gradients.iter().enumerate() {
                let Some(gradients) = gradients else {
                    assert!(self.reference_adapters[group][layer].is_none());
                    continue;
                };
                for (factor, gradient) in [(0, &gradients.a), (1, &gradients.b)] {
                    check(format!("group {group} layer {layer} factor {factor}"), gradient, &|step, direction| {
                        let mut adapters = self.reference_adapters.clone();
                        let pair = adapters[group][layer].as_mut().expect("it has a gradient");
                        let values = if factor == 0 { &mut pair.a } else { &mut pair.b };
                        values.iter_mut().zip(direction).for_each(|(v, d)| *v += step * d);
                        self.loss(&x, &adapters)
                    });
                }
            }
        }
    }
}

fn check(case: Case, seed: u64) {
    let narrow = case.weights != WeightType::F32;
    let made = made(case, seed);
    let expected = made.expected(&wide(&made.x), &made.reference_adapters);
    // bf16 activations err by 2⁻⁹ each; f32 sums of some dozens by a few 2⁻²⁴.
    let (forward_max, gradient_max) = if narrow { (1e-2, 6e-2) } else { (2e-6, 2e-5) };
    for engine in engines(narrow) {
        for keep in [Keep::Everything, Keep::Input] {
            let what = format!("{:?}, {} threads, {keep:?}", engine.path(), engine.threads());
            let (y, dx, gradients) = made.run(&engine, keep);
            let error = relative_error(&y, &expected);
            assert!(error <= forward_max, "{what}: output errs by {error:e}");
            made.check_gradients(&dx, &gradients, gradient_max, &what);
        }
    }
}

#[test]
fn a_block_and_its_gradients_equal_the_reference() {
    check(Case::small(WeightType::F32), 1);
}

#[test]
fn with_biases_and_normed_heads_too() {
    check(Case { biases: true, head_norms: true, ..Case::small(WeightType::F32) }, 2);
}

#[test]
fn with_dropout_too() {
    check(Case { dropout: true, ..Case::small(WeightType::F32) }, 3);
}

#[test]
fn sizes_that_fill_no_vector_work() {
    let groups = vec![vec![3, 17]];
    check(
        Case {
            heads: 3,
            kv_heads: 1,
            size: 10,
            width: 22,
            ffn: 38,
            groups,
            ranks: vec![3],
            ..Case::small(WeightType::F32)
        },
        4,
    );
}

#[test]
fn bf16_weights_work() {
    check(Case::small(WeightType::Bf16), 5);
}

#[test]
fn int8_weights_work() {
    check(Case::small(WeightType::Int8), 6);
}

#[test]
fn a_row_does_not_depend_on_the_batch_around_it_nor_on_threads() {
    for weights in [WeightType::F32, WeightType::Bf16] {
        let both = made(Case::small(weights), 7);
        for path in paths() {
            let engine = |threads| Engine::new(path, threads, weights != WeightType::F32);
            let (y, dx, gradients) = both.run(&engine(1), Keep::Everything);
            let (y3, dx3, gradients3) = both.run(&engine(3), Keep::Everything);
            assert!(y == y3 && dx == dx3, "{path:?}: threads change the result");
            // The second group, alone.
            let rows: usize = both.case.groups[0].iter().sum();
            let at = rows * both.case.width;
            let half = rows * both.case.size / 2;
            let mut alone = made(Case::small(weights), 7);
            alone.case.groups.remove(0);
            alone.adapters.remove(0);
            alone.masks.remove(0);
            alone.x.drain(..at);
            alone.slope.drain(..at);
            alone.rotation.cos.drain(..half);
            alone.rotation.sin.drain(..half);
            let (lone_y, lone_dx, lone_gradients) = alone.run(&engine(1), Keep::Everything);
            assert!(y[at..] == lone_y[..] && dx[at..] == lone_dx[..], "{path:?}: the batch changes a row");
            for (layer, lone) in lone_gradients[0].iter().enumerate() {
                for gradients in [&gradients, &gradients3] {
                    let together = gradients[1][layer].as_ref();
                    assert_eq!(together.map(|g| &g.a), lone.as_ref().map(|g| &g.a), "{path:?} layer {layer}");
                    assert_eq!(together.map(|g| &g.b), lone.as_ref().map(|g| &g.b), "{path:?} layer {layer}");
                }
            }
        }
    }
}

#[test]
fn groups_of_a_pass_go_back_together_with_others_or_alone() {
    for (weights, keep) in [
        (WeightType::F32, Keep::Everything),
        (WeightType::F32, Keep::Input),
        (WeightType::Bf16, Keep::Everything),
        (WeightType::Bf16, Keep::Input),
    ] {
        let groups = vec![vec![5, 1, 14], vec![13], vec![9, 8]];
        let all = made(Case { groups, ranks: vec![4, 0, 4], head_norms: true, ..Case::small(weights) }, 9);
        for engine in engines(weights != WeightType::F32) {
            let (_, dx, gradients) = all.run(&engine, keep);
            let (some_dx, some) = all.run_some(&engine, keep, &[2, 0]);
            let width = all.case.width;
            assert!(some_dx == [&dx[33 * width..], &dx[..20 * width]].concat(), "{:?}", engine.path());
            for (found, group) in some.iter().zip([2, 0]) {
                for (found, expected) in found.iter().zip(&gradients[group]) {
                    assert_eq!(found.as_ref().map(|g| &g.a), expected.as_ref().map(|g| &g.a), "{:?}", engine.path());
                    assert_eq!(found.as_ref().map(|g| &g.b), expected.as_ref().map(|g| &g.b), "{:?}", engine.path());
                }
            }
        }
    }
}

#[test]
fn token_by_token_equals_all_at_once() {
    let case =
        Case { groups: vec![vec![21]], ranks: vec![4], head_norms: true, biases: true, ..Case::small(WeightType::F32) };
    let made = made(case, 8);
    let expected = made.expected(&wide(&made.x), &made.reference_adapters);
    for engine in engines(false) {
        let error = relative_error(&made.token_by_token(&engine, &[9, 1, 1, 6, 4]), &expected);
        assert!(error <= 2e-6, "{:?}: {error:e}", engine.path());
    }
}

//! Shapes that no one chose: every dimension drawn, so that rows, vectors, tiles, panels and chunks end anywhere.
//!
//! A shape depends on its number alone, and a failure names it. `HEADWATER_SHAPES` takes other shapes than the first few:
//! a number, or a range as `1000..2000`.

use std::ops::Range;

use kernels::{Engine, Keep, WeightType};

use crate::blocks::{self, Case, wide};
use crate::{Draw, heads, paths, relative_error};

/// Calls `check` with a draw for every shape, and says which one it was that panicked.
fn each_shape(few: u64, check: impl Fn(&mut Draw)) {
    struct Named(u64);
    impl Drop for Named {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("this was HEADWATER_SHAPES={}", self.0);
            }
        }
    }
    for shape in shapes().unwrap_or(0..few) {
        let _named = Named(shape);
        check(&mut Draw(shape << 32));
    }
}

fn shapes() -> Option<Range<u64>> {
    let text = std::env::var("HEADWATER_SHAPES").ok().filter(|text| !text.is_empty())?;
    let number = |text: &str| text.parse::<u64>().expect("HEADWATER_SHAPES is a number or a range");
    Some(match text.split_once("..") {
        Some((from, to)) => number(from)..number(to),
        None => number(&text)..number(&text) + 1,
    })
}

/// Mostly small, so that a few large ones together stay affordable; Miri takes a thousand times as long.
fn dimension(draw: &mut Draw) -> usize {
    let most = if cfg!(miri) {
        6
    } else if draw.below(4) == 0 {
        130
    } else {
        24
    };
    1 + draw.below(most)
}

fn one_in(draw: &mut Draw, n: usize) -> bool {
    draw.below(n) == 0
}

fn weights(draw: &mut Draw) -> WeightType {
    [WeightType::F32, WeightType::Bf16, WeightType::Int8][draw.below(3)]
}

/// Every path, on one thread or three.
fn engines(draw: &mut Draw, narrow: bool) -> Vec<Engine> {
    paths().map(|path| Engine::new(path, [1, 3][draw.below(2)], narrow)).collect()
}

fn case(draw: &mut Draw) -> Case {
    let size = 2 * dimension(draw).div_ceil(2);
    // Up to 130 heads, where they are small.
    let heads_most = (if cfg!(miri) { 12 } else { 260 } / size).max(1);
    let heads_per_kv = 1 + draw.below(heads_most);
    let kv_heads = 1 + draw.below((heads_most / heads_per_kv).max(1));
    let mut groups: Vec<Vec<usize>> =
        (0..1 + draw.below(3)).map(|_| (0..draw.below(3)).map(|_| dimension(draw)).collect()).collect();
    // A group may be empty, but not all.
    groups[0].push(dimension(draw));
    let ranks = groups.iter().map(|_| if one_in(draw, 4) { 0 } else { dimension(draw) }).collect();
    Case {
        heads: kv_heads * heads_per_kv,
        kv_heads,
        size,
        width: dimension(draw),
        ffn: 2 * dimension(draw).div_ceil(2),
        groups,
        ranks,
        // Near zero a norm of few channels is all but a step, where no two roundings agree.
        epsilon: 0.1,
        biases: one_in(draw, 2),
        head_norms: one_in(draw, 2),
        dropout: one_in(draw, 3),
        weights: weights(draw),
    }
}

#[test]
fn blocks_of_every_shape_and_their_gradients_equal_the_reference() {
    each_shape(if cfg!(miri) { 2 } else { 40 }, |draw| {
        let (case, narrow) = (case(draw), one_in(draw, 2));
        let what = format!("{case:?}, narrow: {narrow}");
        let made = blocks::made(case, draw.0);
        let x = wide(&made.x);
        let expected = made.expected(&x, &made.reference_adapters);

        // The loss in one random direction of the input and all adapters together.
        let step = 1e-5;
        let directions: Vec<Vec<f64>> = parts(&made).into_iter().map(|n| wide(&draw.values(n, 1.0))).collect();
        let loss = |step: f64| {
            let mut directions = directions.iter();
            let mut moved = |values: &mut [f64]| {
                let direction = directions.next().expect("one for each part");
                values.iter_mut().zip(direction).for_each(|(value, d)| *value += step * d);
            };
            let (mut x, mut adapters) = (x.clone(), made.reference_adapters.clone());
            moved(&mut x);
            for pair in adapters.iter_mut().flatten().flatten() {
                moved(&mut pair.a);
                moved(&mut pair.b);
            }
            made.loss(&x, &adapters)
        };
        let difference = (loss(step) - loss(-step)) / (2.0 * step);

        let (forward_max, gradient_max) = if narrow { (3e-2, 1e-1) } else { (2e-6, 1e-5) };
        let mut first: Option<Vec<Vec<f64>>> = None;
        for engine in engines(draw, narrow) {
            let keep = [Keep::Everything, Keep::Input][draw.below(2)];
            let what = format!("{:?}, {} threads, {keep:?}, {what}", engine.path(), engine.threads());
            let (y, dx, gradients) = made.run(&engine, keep);
            let error = relative_error(&y, &expected);
            assert!(error <= forward_max, "output errs by {error:e}: {what}");

            let mut found = vec![wide(&dx)];
            found.extend(gradients.iter().flatten().flatten().flat_map(|pair| [wide(&pair.a), wide(&pair.b)]));
            let product: f64 = found.iter().flatten().zip(directions.iter().flatten()).map(|(g, d)| g * d).sum();
            let size = norm(found.iter().flatten());
            let error = (product - difference).abs() / size;
            assert!(error <= gradient_max, "gradients err by {error:e}: {what}");

            // Part by part the paths agree, too; a part may be all but zero, and its digits noise.
            let first = first.get_or_insert_with(|| found.clone());
            for (i, (found, first)) in found.iter().zip(first).enumerate() {
                let error = norm(found.iter().zip(first.iter()).map(|(a, b)| a - b).collect::<Vec<_>>().iter());
                let error = error / (norm(first.iter()) + 0.1 * size);
                assert!(error <= gradient_max, "part {i} of the gradients differs by {error:e}: {what}");
            }
        }
    });
}

/// How many numbers the input and each adapter's factors have.
fn parts(made: &blocks::Made) -> Vec<usize> {
    let pairs = made.reference_adapters.iter().flatten().flatten();
    std::iter::once(made.x.len()).chain(pairs.flat_map(|pair| [pair.a.len(), pair.b.len()])).collect()
}

fn norm<'a>(values: impl Iterator<Item = &'a f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn tokens_in_every_number_of_pieces_equal_the_reference() {
    each_shape(if cfg!(miri) { 2 } else { 40 }, |draw| {
        let mut case = Case { dropout: false, ..case(draw) };
        case.ranks.truncate(1);
        let mut pieces: Vec<usize> = (0..1 + draw.below(6)).map(|_| 1 + draw.below(6)).collect();
        pieces.push(dimension(draw));
        case.groups = vec![vec![pieces.iter().sum()]];
        let narrow = one_in(draw, 2);
        let what = format!("{case:?}, {pieces:?}, narrow: {narrow}");
        let made = blocks::made(case, draw.0);
        let expected = made.expected(&wide(&made.x), &made.reference_adapters);
        for engine in engines(draw, narrow) {
            let error = relative_error(&made.token_by_token(&engine, &pieces), &expected);
            assert!(error <= if narrow { 3e-2 } else { 2e-6 }, "errs by {error:e}: {:?}, {what}", engine.path());
        }
    });
}

#[test]
fn heads_of_every_shape_and_their_gradients_equal_the_reference() {
    each_shape(if cfg!(miri) { 2 } else { 40 }, |draw| {
        let [width, vocabulary, rows] = [0; 3].map(|_| dimension(draw));
        let (ty, narrow) = (weights(draw), one_in(draw, 2));
        let made = heads::made(width, vocabulary, rows, ty, Keep::Everything, draw.0);
        made.check(&engines(draw, narrow), if narrow { 1e-2 } else { 2e-6 });
    });
}

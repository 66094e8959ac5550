//! Loss and logits, and the loss' gradient against central differences of the reference.

use kernels::{Frozen, Head, Stream, WeightType};

use crate::reference::{dot, normed, product};
use crate::{Draw, engines, kept, relative_error};

struct Made {
    head: Head,
    norm: Vec<f64>,
    weights: Frozen,
    wide: Vec<f64>,
    x: Vec<f32>,
    targets: Vec<u32>,
}

const EPSILON: f32 = 1e-5;

fn made(width: usize, vocabulary: usize, rows: usize, ty: WeightType) -> Made {
    let mut draw = Draw(1);
    let weights = Frozen::new(vocabulary, width, draw.values(vocabulary * width, 0.5), ty);
    let norm: Vec<f32> = draw.values(width, 0.5).iter().map(|x| x + 1.0).collect();
    let x = draw.values(rows * width, 1.0);
    let targets = (0..rows).map(|_| draw.below(vocabulary) as u32).collect();
    let wide = kept(&weights).into_iter().map(f64::from).collect();
    let head = Head::new(norm.clone(), EPSILON);
    Made { head, norm: norm.into_iter().map(f64::from).collect(), weights, wide, x, targets }
}

impl Made {
    fn logits(&self, x: &[f64]) -> Vec<f64> {
        product(&self.wide, &normed(x, &self.norm, f64::from(EPSILON)))
    }

    fn nats(&self, x: &[f64]) -> f64 {
        let rows = x.chunks(self.norm.len()).zip(&self.targets);
        rows.map(|(x, &target)| {
            let logits = self.logits(x);
            let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            logits.iter().map(|l| (l - largest).exp()).sum::<f64>().ln() + largest - logits[target as usize]
        })
        .sum()
    }
}

fn check(width: usize, vocabulary: usize, rows: usize, ty: WeightType, tolerance: f64) {
    let made = made(width, vocabulary, rows, ty);
    let x: Vec<f64> = made.x.iter().map(|&x| f64::from(x)).collect();
    let expected = made.nats(&x);
    let direction: Vec<f64> = Draw(5).values(x.len(), 1.0).into_iter().map(f64::from).collect();
    let moved = |step: f64| -> Vec<f64> { x.iter().zip(&direction).map(|(x, d)| x + step * d).collect() };
    let step = 1e-5;
    let difference = (made.nats(&moved(step)) - made.nats(&moved(-step))) / (2.0 * step) * 0.25;
    for engine in engines(ty != WeightType::F32) {
        let stream = Stream::new(&engine, &made.x);
        let (nats, gradient) = made.head.loss(&engine, &made.weights, &stream, &made.targets, Some(0.25));
        assert!((nats / expected - 1.0).abs() <= tolerance, "{:?}: {nats} for {expected}", engine.path());
        let gradient: Vec<f64> = gradient.expect("asked for").iter().map(|&g| f64::from(g)).collect();
        let size = dot(&gradient, &gradient).sqrt();
        let error = (dot(&gradient, &direction) - difference).abs() / size;
        assert!(error <= 20.0 * tolerance, "{:?}: gradient errs by {error:e}", engine.path());
        let (again, none) = made.head.loss(&engine, &made.weights, &stream, &made.targets, None);
        assert!(again == nats && none.is_none());
        let logits: Vec<f64> = x.chunks(width).flat_map(|x| made.logits(x)).collect();
        let error = relative_error(&made.head.logits(&engine, &made.weights, &stream), &logits);
        assert!(error <= tolerance, "{:?}: logits err by {error:e}", engine.path());
    }
}

#[test]
fn loss_and_gradient_equal_the_reference() {
    check(24, 100, 9, WeightType::F32, 2e-6);
}

#[test]
fn vocabularies_of_several_chunks_work() {
    check(16, 9001, 270, WeightType::F32, 3e-6);
}

#[test]
fn few_rows_work() {
    check(33, 77, 3, WeightType::F32, 2e-6);
}

#[test]
fn narrow_weights_work() {
    check(24, 100, 9, WeightType::Bf16, 5e-3);
    check(24, 100, 9, WeightType::Int8, 5e-3);
}

#[test]
fn vocabularies_that_are_odd_work_in_pairs() {
    check(24, 101, 9, WeightType::Bf16, 5e-3);
}

//! Loss and logits, and the loss' gradient against central differences of the reference.

use kernels::{Engine, Frozen, Head, Keep, Stream, WeightType};

use crate::reference::{dot, normed, product};
use crate::{Draw, engines, kept, relative_error};

pub struct Made {
    head: Head,
    norm: Vec<f64>,
    weights: Frozen,
    wide: Vec<f64>,
    x: Vec<f32>,
    targets: Vec<u32>,
}

const EPSILON: f32 = 1e-5;

pub fn made(width: usize, vocabulary: usize, rows: usize, ty: WeightType, keep: Keep, seed: u64) -> Made {
    let mut draw = Draw(seed);
    let weights = Frozen::new(vocabulary, width, draw.values(vocabulary * width, 0.5), ty);
    let norm: Vec<f32> = draw.values(width, 0.5).iter().map(|x| x + 1.0).collect();
    let x = draw.values(rows * width, 1.0);
    let targets = (0..rows).map(|_| draw.below(vocabulary) as u32).collect();
    let wide = kept(&weights).into_iter().map(f64::from).collect();
    let head = Head::new(norm.clone(), EPSILON, keep);
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

    pub fn check(&self, engines: &[Engine], tolerance: f64) {
        let x: Vec<f64> = self.x.iter().map(|&x| f64::from(x)).collect();
        let expected = self.nats(&x);
        let direction: Vec<f64> = Draw(5).values(x.len(), 1.0).into_iter().map(f64::from).collect();
        let moved = |step: f64| -> Vec<f64> { x.iter().zip(&direction).map(|(x, d)| x + step * d).collect() };
        let step = 1e-5;
        let difference = (self.nats(&moved(step)) - self.nats(&moved(-step))) / (2.0 * step) * 0.25;
        let logits: Vec<f64> = x.chunks(self.norm.len()).flat_map(|x| self.logits(x)).collect();
        for engine in engines {
            let what = format!("{:?}, {} threads", engine.path(), engine.threads());
            let stream = Stream::new(engine, &self.x);
            let (nats, gradient) = self.head.loss(engine, &self.weights, &stream, &self.targets, Some(0.25));
            let error = (nats - expected).abs() / expected.max(1.0);
            assert!(error <= tolerance, "{what}: {nats} for {expected}");
            let gradient: Vec<f64> = gradient.expect("asked for").iter().map(|&g| f64::from(g)).collect();
            let size = dot(&gradient, &gradient).sqrt().max(1e-2);
            let error = (dot(&gradient, &direction) - difference).abs() / size;
            assert!(error <= 20.0 * tolerance, "{what}: gradient errs by {error:e}");
            let (again, none) = self.head.loss(engine, &self.weights, &stream, &self.targets, None);
            assert!(again == nats && none.is_none());
            let error = relative_error(&self.head.logits(engine, &self.weights, &stream), &logits);
            assert!(error <= tolerance, "{what}: logits err by {error:e}");
        }
    }
}

fn check(width: usize, vocabulary: usize, rows: usize, ty: WeightType, tolerance: f64) {
    for keep in [Keep::Everything, Keep::Input] {
        made(width, vocabulary, rows, ty, keep, 1).check(&engines(ty != WeightType::F32), tolerance);
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

//! Final norm, LM head and cross-entropy. Logits of some rows exist at a time, never those of all.

use crate::block::{Keep, Stream};
use crate::engine::{Engine, Shared, Task};
use crate::frozen::Frozen;
use crate::norm::RmsNorm;
use crate::product::{Columns, Plus, Term, product, row_products};
use crate::rows::{Blocking, Packed};
use crate::simd::{Simd, exp};

/// Rows whose logits exist at one time, at most: 50 MB with a vocabulary of 49,152.
const CHUNK_ROWS_MAX: usize = 256;
/// Fewer would spend more time on the panels of the weights than on products with them.
const CHUNK_ROWS_MIN: usize = 64;
/// Columns of the logits' gradient that are packed at one time.
const CHUNK_COLUMNS: usize = 4096;

pub struct Head {
    norm: RmsNorm,
    chunk_rows_max: usize,
}

impl Head {
    /// `norm [width]`. Where blocks keep their inputs alone, logits take as little memory as they may.
    pub fn new(norm: Vec<f32>, epsilon: f32, keep: Keep) -> Self {
        let chunk_rows_max = if keep == Keep::Input { CHUNK_ROWS_MIN } else { CHUNK_ROWS_MAX };
        Self { norm: RmsNorm { weight: norm, epsilon }, chunk_rows_max }
    }

    /// Summed cross-entropy in nats of rows `x [rows, width]` against their targets, with `weights [vocabulary, width]`.
    ///
    /// With `gradient_scale` also the gradient of the sum times that scale, `[rows, width]`.
    pub fn loss(
        &self,
        engine: &Engine,
        weights: &Frozen,
        x: &Stream,
        targets: &[u32],
        gradient_scale: Option<f64>,
    ) -> (f64, Option<Stream>) {
        let width = self.norm.weight.len();
        let vocabulary = weights.rows();
        assert!(x.len() == targets.len() * width && weights.columns() == width);
        assert!(targets.iter().all(|&target| (target as usize) < vocabulary));
        let mut gradient = gradient_scale.map(|_| engine.zeros(x.len()));
        let mut nats = 0.0;
        let rows = self.chunk_rows(weights, targets.len());
        // One for all chunks, of which the last one may be smaller.
        let mut all_logits = engine.take(rows * vocabulary);
        for (i, targets) in targets.chunks(rows.max(1)).enumerate() {
            let place = i * rows * width..(i * rows + targets.len()) * width;
            let x = &x[place.clone()];
            let logits = &mut all_logits[..targets.len() * vocabulary];
            let blocking = Blocking::new(&[targets.len()], engine.path().tile_rows());
            let (normed, factors) = self.norm.packed(engine, &blocking, x);
            logits_of(engine, &blocking, &normed, weights, logits);
            drop(normed);
            nats += softmax(engine, logits, targets, gradient_scale);
            let Some(gradient) = &mut gradient else { continue };
            let mut dh = engine.take(targets.len() * width);
            for column in (0..vocabulary).step_by(CHUNK_COLUMNS) {
                let columns = CHUNK_COLUMNS.min(vocabulary - column);
                let g = Packed::of_columns(engine, &blocking, logits, vocabulary, column, columns);
                let term = Term {
                    x: &g,
                    column: 0,
                    length: columns,
                    weights,
                    transposed: false,
                    from: column,
                    low_rank: None,
                };
                let plus = if column > 0 { Plus::Itself } else { Plus::Nothing };
                let all = Columns { at: 0, columns: width, terms: vec![term], plus };
                product(engine, &blocking, &mut dh, width, &[all]);
            }
            self.norm.backward(engine, x, &factors, &dh, &mut gradient[place]);
        }
        (nats, gradient.map(Stream))
    }

    /// Logits of every row, `[rows, vocabulary]`.
    pub fn logits(&self, engine: &Engine, weights: &Frozen, x: &Stream) -> Vec<f32> {
        let width = self.norm.weight.len();
        let rows = x.len() / width;
        let mut all = vec![0.0; rows * weights.rows()];
        if rows <= crate::decode::FEW_ROWS {
            let normed = self.norm.rows(engine, x);
            row_products(engine, weights, &normed, rows, &mut all);
            return all;
        }
        let chunk = self.chunk_rows(weights, rows);
        for (x, to) in x.chunks(chunk * width).zip(all.chunks_mut(chunk * weights.rows())) {
            let blocking = Blocking::new(&[x.len() / width], engine.path().tile_rows());
            let (normed, _) = self.norm.packed(engine, &blocking, x);
            logits_of(engine, &blocking, &normed, weights, to);
        }
        all
    }

    /// As many of `rows` as let the logits be no larger than the weights, for who keeps small weights has little memory;
    /// and so that all chunks are about equal.
    fn chunk_rows(&self, weights: &Frozen, rows: usize) -> usize {
        let row_bytes = weights.rows() * size_of::<f32>();
        let most = (weights.bytes() / row_bytes.max(1)).clamp(CHUNK_ROWS_MIN, self.chunk_rows_max);
        rows.div_ceil(rows.div_ceil(most).max(1))
    }
}

fn logits_of(engine: &Engine, blocking: &Blocking, normed: &Packed, weights: &Frozen, to: &mut [f32]) {
    let length = weights.columns();
    let term = Term { x: normed, column: 0, length, weights, transposed: true, from: 0, low_rank: None };
    let all = Columns { at: 0, columns: weights.rows(), terms: vec![term], plus: Plus::Nothing };
    product(engine, blocking, to, weights.rows(), &[all]);
}

/// The rows' summed loss, in order; with a scale, logits become `scale · (softmax − one-hot)`.
fn softmax(engine: &Engine, logits: &mut [f32], targets: &[u32], scale: Option<f64>) -> f64 {
    struct Rows<'a> {
        logits: Shared<f32>,
        vocabulary: usize,
        targets: &'a [u32],
        scale: Option<f64>,
        nats: Shared<f64>,
    }
    /// Numbers that are summed in f32 before their sum goes on in f64.
    const RUN: usize = 2048;
    impl Task for Rows<'_> {
        const KERNEL: &'static str = "softmax";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, row: usize) {
            let vocabulary = self.vocabulary;
            // SAFETY: this task alone has this row.
            unsafe {
                let logits = self.logits.0.add(row * vocabulary);
                let mut max = S::splat(f32::NEG_INFINITY);
                let mut at = 0;
                while at + S::LANES <= vocabulary {
                    max = S::max(max, S::load(logits.add(at)));
                    at += S::LANES;
                }
                let mut largest = S::maximum(max);
                for i in at..vocabulary {
                    largest = largest.max(*logits.add(i));
                }
                let target = self.targets[row] as usize;
                let above = f64::from(*logits.add(target) - largest);
                let max = S::splat(largest);
                let mut sum = 0.0f64;
                let mut run = 0;
                while run < vocabulary {
                    let end = vocabulary.min(run + RUN);
                    let mut part = S::splat(0.0);
                    let mut at = run;
                    while at < end {
                        let n = S::LANES.min(end - at);
                        let e = exp::<S>(S::sub(S::load_n(logits.add(at), n), max));
                        if n == S::LANES {
                            part = S::add(part, e);
                            S::store(logits.add(at), e);
                        } else {
                            S::store_n(logits.add(at), e, n);
                            part = S::add(part, S::load_n(logits.add(at), n));
                        }
                        at += S::LANES;
                    }
                    sum += f64::from(S::sum(part));
                    run = end;
                }
                *self.nats.0.add(row) = sum.ln() - above;
                let Some(scale) = self.scale else { return };
                let factor = S::splat((scale / sum) as f32);
                let mut at = 0;
                while at < vocabulary {
                    let n = S::LANES.min(vocabulary - at);
                    S::store_n(logits.add(at), S::mul(S::load_n(logits.add(at), n), factor), n);
                    at += S::LANES;
                }
                let at_target = logits.add(target);
                *at_target = (f64::from(*at_target) - scale) as f32;
            }
        }
    }
    let mut nats = vec![0.0; targets.len()];
    let vocabulary = logits.len() / targets.len();
    let (logits, shared) = (Shared(logits.as_mut_ptr()), Shared(nats.as_mut_ptr()));
    engine.parallel(targets.len(), &Rows { logits, vocabulary, targets, scale, nats: shared });
    nats.iter().sum()
}

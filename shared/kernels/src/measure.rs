//! What a block's layers are multiplied with, for who wants to know which columns of the weights matter.

use crate::block::{Block, Pass, Saved, Stream};
use crate::engine::Engine;
use crate::frozen::{Frozen, WeightType};
use crate::gate;
use crate::product::{Columns, Plus, Term, product};
use crate::rows::{Blocking, Packed};
use crate::{BlockAdapter, Keep};

/// Inputs of a block's layers, `[rows, in]` each.
pub struct Inputs {
    /// Of q, k and v.
    pub attention: Stream,
    /// Of o.
    pub mixed: Stream,
    /// Of gate and up.
    pub ffn: Stream,
    /// Of down.
    pub gated: Stream,
}

impl Block {
    /// As [`Block::forward`] without masks, with the inputs of the layers.
    pub fn forward_measured(
        &self,
        engine: &Engine,
        pass: &Pass,
        x: Stream,
        adapters: &[&BlockAdapter],
    ) -> (Stream, Inputs) {
        let (output, saved) = self.forward(engine, pass, x, adapters, None, Keep::Measured);
        let Some(Saved { x, inner: Some(inner) }) = saved else { unreachable!("everything is kept") };
        let mixed = inner.mixed.expect("measured");
        let [attention_norm, ffn_norm] = self.norms();
        let gate_up = inner.gate_up.widened(engine);
        let inputs = Inputs {
            attention: Stream(attention_norm.rows(engine, &x.widened(engine))),
            mixed: Stream(mixed.widened(engine)),
            ffn: Stream(ffn_norm.rows(engine, &inner.middle.widened(engine))),
            gated: Stream(gate::rows(engine, &gate_up, self.ffn())),
        };
        (output, inputs)
    }
}

/// Adds `XᵀX` of `x [rows, columns]` to `to [columns, columns]`, in f32.
///
/// # Panics
/// If the sizes do not agree.
pub fn add_second_moments(engine: &Engine, x: &[f32], columns: usize, to: &mut [f32]) {
    assert!(columns > 0 && x.len().is_multiple_of(columns) && to.len() == columns * columns, "the sizes of moments");
    let rows = x.len() / columns;
    if rows == 0 {
        return;
    }
    let mut turned = engine.take::<f32>(x.len());
    for (row, x) in x.chunks_exact(columns).enumerate() {
        for (column, &x) in x.iter().enumerate() {
            turned[column * rows + row] = x;
        }
    }
    let blocking = Blocking::new(&[columns], engine.path().tile_rows());
    let left = Packed::of(engine, &blocking, &turned, rows);
    let right = Frozen::new(rows, columns, x.to_vec(), WeightType::F32);
    let term = Term { x: &left, column: 0, length: rows, weights: &right, transposed: false, from: 0, low_rank: None };
    product(engine, &blocking, to, columns, &[Columns { at: 0, columns, terms: vec![term], plus: Plus::Itself }]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Path;

    #[test]
    fn second_moments_are_sums_of_products_of_columns() {
        let sizes: &[(usize, usize)] =
            if cfg!(miri) { &[(1, 1), (3, 5), (7, 20)] } else { &[(1, 1), (3, 5), (37, 70), (600, 33)] };
        for path in Path::available() {
            let engine = Engine::new(path, 2, false);
            for &(rows, columns) in sizes {
                let x: Vec<f32> = (0..rows * columns).map(|i| ((i * i + 3 * i) % 17) as f32 - 8.0).collect();
                let mut found = vec![1.0; columns * columns];
                add_second_moments(&engine, &x, columns, &mut found);
                add_second_moments(&engine, &[], columns, &mut found);
                for a in 0..columns {
                    for b in 0..columns {
                        let sum: f32 = (0..rows).map(|row| x[row * columns + a] * x[row * columns + b]).sum();
                        assert_eq!(found[a * columns + b], 1.0 + sum, "{path:?}, {rows} × {columns}: {a}, {b}");
                    }
                }
            }
        }
    }
}

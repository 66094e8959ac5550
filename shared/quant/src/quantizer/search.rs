//! Our own quantizer, which looks for the codes and scales that lose the least weighted squared error.
//!
//! The weight of a value is its column's importance. Without importance, large values weigh a little more than small ones:
//! columns that were trained to be large tend to see large activations. Formats of eight bits and plain floats leave
//! nothing to search for and are quantized as ggml does.

use super::levels::Levels;
use super::{Row, affine, inverse, nearest_integer, reference, rounded, search_k};
use crate::blocks::blocks32::{self, Block32, IQ4_NL_VALUES};
use crate::blocks::superblocks;
use crate::blocks::ternary::{self, Ternary};
use crate::{BlockType, Error};

pub(super) fn search(row: &mut Row<'_>) -> Result<(), Error> {
    let weights = Weights::of(row);
    match row.ty {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 | BlockType::Q8_0 => reference(row),
        BlockType::Q4_0 => {
            let mut levels = Levels::steps(8);
            row.each(|x, v, block| blocks32::pack_q4_0(&scaled(&mut levels, x, &weights.at(x, v)), block))
        }
        BlockType::Q5_0 => {
            let mut levels = Levels::steps(16);
            row.each(|x, v, block| blocks32::pack_q5_0(&scaled(&mut levels, x, &weights.at(x, v)), block))
        }
        BlockType::IQ4_NL => {
            let mut levels = Levels::new(IQ4_NL_VALUES.map(f32::from).to_vec());
            row.each(|x, v, block| blocks32::pack_q4_0(&scaled(&mut levels, x, &weights.at(x, v)), block))
        }
        BlockType::Q4_1 => row.each(|x, v, block| blocks32::pack_q4_1(&with_minimum(15, x, &weights.at(x, v)), block)),
        BlockType::Q5_1 => row.each(|x, v, block| blocks32::pack_q5_1(&with_minimum(31, x, &weights.at(x, v)), block)),
        BlockType::TQ1_0 => {
            let mut levels = Levels::new(vec![-1.0, 0.0, 1.0]);
            row.each(|x, v, block| ternary::pack_tq1_0(&ternary(&mut levels, x, &weights.at(x, v)), block))
        }
        BlockType::TQ2_0 => {
            let mut levels = Levels::new(vec![-1.0, 0.0, 1.0]);
            row.each(|x, v, block| ternary::pack_tq2_0(&ternary(&mut levels, x, &weights.at(x, v)), block))
        }
        BlockType::Q2_K => row.each(|x, v, block| {
            superblocks::pack_q2_k(&search_k::with_minima::<16>(3, 15, x, &weights.at(x, v)), block)
        }),
        BlockType::Q4_K => row.each(|x, v, block| {
            superblocks::pack_q4_k(&search_k::with_minima::<32>(15, 63, x, &weights.at(x, v)), block)
        }),
        BlockType::Q5_K => row.each(|x, v, block| {
            superblocks::pack_q5_k(&search_k::with_minima::<32>(31, 63, x, &weights.at(x, v)), block)
        }),
        BlockType::Q3_K => {
            let mut levels = Levels::steps(4);
            row.each(|x, v, block| {
                superblocks::pack_q3_k(&search_k::symmetric(4, 32, &mut levels, x, &weights.at(x, v)), block)
            })
        }
        BlockType::Q6_K => {
            let mut levels = Levels::steps(32);
            row.each(|x, v, block| {
                superblocks::pack_q6_k(&search_k::symmetric(32, 128, &mut levels, x, &weights.at(x, v)), block)
            })
        }
    }
}

/// What an error costs, for every value of a row.
struct Weights {
    /// Of the row's values.
    mean_square: f32,
    /// The inverse of the mean importance, so that the unit of importance does not matter; zero if nothing is important.
    unit: f32,
}

impl Weights {
    fn of(row: &Row<'_>) -> Weights {
        let mean = |values: &mut dyn Iterator<Item = f32>| values.sum::<f32>() / row.row.len() as f32;
        let importance = row.importance.map_or(0.0, |importance| mean(&mut importance.iter().copied()));
        Weights { mean_square: mean(&mut row.row.iter().map(|x| x * x)), unit: inverse(importance) }
    }

    fn at<const N: usize>(&self, x: &[f32; N], importance: Option<&[f32; N]>) -> [f32; N] {
        match importance {
            // A column that calibration never saw in use may still be used.
            Some(importance) if self.unit > 0.0 => importance.map(|v| v * self.unit + 1e-3),
            _ => x.map(|x| (4.0 * self.mean_square + x * x).sqrt()),
        }
    }
}

fn scaled(levels: &mut Levels, x: &[f32; 32], w: &[f32; 32]) -> Block32 {
    let d = rounded(levels.fit(x, w));
    let inverse = inverse(d);
    Block32 { d, m: 0.0, codes: x.map(|x| levels.nearest(x * inverse) as u8) }
}

fn ternary(levels: &mut Levels, x: &[f32; 256], w: &[f32; 256]) -> Ternary {
    let d = rounded(levels.fit(x, w));
    let inverse = inverse(d);
    Ternary { d, digits: x.map(|x| levels.nearest(x * inverse) as u8) }
}

fn with_minimum(n: u8, x: &[f32; 32], w: &[f32; 32]) -> Block32 {
    let (d, m) = affine::fit(n, x, w, f32::MAX);
    let (d, m) = (rounded(d), rounded(m));
    let inverse = inverse(d);
    Block32 { d, m, codes: x.map(|x| nearest_integer(((x - m) * inverse).clamp(0.0, f32::from(n))) as u8) }
}

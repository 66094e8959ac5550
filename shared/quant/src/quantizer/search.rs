//! Our own quantizer, which looks for the codes and scales that lose the least weighted squared error.
//!
//! The weight of a value is its column's importance. Without importance, large values weigh a little more than small ones:
//! columns that were trained to be large tend to see large activations. With [`Feedback`] a block's scales are chosen as
//! ever, and its values are then rounded one by one, each after the errors of those before it have been carried to it.
//! Q8_0 and plain floats leave nothing to search for and are quantized as ggml does.

use super::levels::Levels;
use super::{Feedback, Row, affine, inverse, nearest_integer, reference, rounded, search_k};
use crate::blocks::blocks32::{self, Block32, IQ4_NL_VALUES};
use crate::blocks::superblocks::{self, Superblock};
use crate::blocks::ternary::{self, Ternary};
use crate::blocks::{BlockResult, NotFinite};
use crate::{BlockType, Error};

pub(super) fn search(row: &mut Row<'_>, feedback: Option<&Feedback>) -> Result<(), Error> {
    let iq4_nl = || IQ4_NL_VALUES.map(f32::from).to_vec();
    match row.ty {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 | BlockType::Q8_0 => reference(row),
        BlockType::Q4_0 => encode(row, feedback, Scaled(Levels::steps(8)), blocks32::pack_q4_0),
        BlockType::Q5_0 => encode(row, feedback, Scaled(Levels::steps(16)), blocks32::pack_q5_0),
        BlockType::IQ4_NL => encode(row, feedback, Scaled(Levels::new(iq4_nl())), blocks32::pack_q4_0),
        BlockType::Q4_1 => encode(row, feedback, WithMinimum(15), blocks32::pack_q4_1),
        BlockType::Q5_1 => encode(row, feedback, WithMinimum(31), blocks32::pack_q5_1),
        BlockType::TQ1_0 => encode(row, feedback, Digits(Levels::new(vec![-1.0, 0.0, 1.0])), ternary::pack_tq1_0),
        BlockType::TQ2_0 => encode(row, feedback, Digits(Levels::new(vec![-1.0, 0.0, 1.0])), ternary::pack_tq2_0),
        BlockType::Q2_K => encode(row, feedback, WithMinima::<16> { n: 3, top: 15 }, superblocks::pack_q2_k),
        BlockType::Q4_K => encode(row, feedback, WithMinima::<32> { n: 15, top: 63 }, superblocks::pack_q4_k),
        BlockType::Q5_K => encode(row, feedback, WithMinima::<32> { n: 31, top: 63 }, superblocks::pack_q5_k),
        BlockType::Q3_K => {
            encode(row, feedback, Symmetric { n: 4, top: 32, levels: Levels::steps(4) }, superblocks::pack_q3_k)
        }
        BlockType::Q6_K => {
            encode(row, feedback, Symmetric { n: 32, top: 128, levels: Levels::steps(32) }, superblocks::pack_q6_k)
        }
    }
}

/// How a kind of block is chosen.
trait Choice<const E: usize> {
    type Parts;

    /// Scales and codes for the values `x` with weights `w`.
    fn choose(&mut self, x: &[f32; E], w: &[f32; E]) -> Self::Parts;

    /// Gives element `e` the code nearest to `x`, with the scales as they are, and returns what it says.
    fn settle(&self, parts: &mut Self::Parts, e: usize, x: f32) -> f32;
}

fn encode<const E: usize, const B: usize, C: Choice<E>>(
    row: &mut Row<'_>,
    feedback: Option<&Feedback>,
    mut choice: C,
    pack: impl Fn(&C::Parts, &mut [u8; B]) -> BlockResult,
) -> Result<(), Error> {
    let Some(feedback) = feedback else {
        let weights = Weights::of(row);
        return row.each(|x, v, block| pack(&choice.choose(x, &weights.at(x, v)), block));
    };
    let mut values = row.row.to_vec();
    let weights = feedback.costs().as_chunks::<E>().0;
    for (index, (weights, block)) in weights.iter().zip(row.bytes.as_chunks_mut::<B>().0).enumerate() {
        let mut parts = choice.choose(&values.as_chunks::<E>().0[index], weights);
        for e in 0..E {
            let column = index * E + e;
            let off = values[column] - choice.settle(&mut parts, e, values[column]);
            feedback.carry(column, off, &mut values);
        }
        pack(&parts, block).map_err(|NotFinite| Error::NotFinite { ty: row.ty, block: index })?;
    }
    Ok(())
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

/// One scale and a table of levels.
struct Scaled(Levels);

impl Choice<32> for Scaled {
    type Parts = Block32;

    fn choose(&mut self, x: &[f32; 32], w: &[f32; 32]) -> Block32 {
        let d = rounded(self.0.fit(x, w));
        let inverse = inverse(d);
        Block32 { d, m: 0.0, codes: x.map(|x| self.0.nearest(x * inverse) as u8) }
    }

    fn settle(&self, parts: &mut Block32, e: usize, x: f32) -> f32 {
        let code = self.0.nearest(x * inverse(parts.d));
        parts.codes[e] = code as u8;
        parts.d * self.0.level(code)
    }
}

struct Digits(Levels);

impl Choice<256> for Digits {
    type Parts = Ternary;

    fn choose(&mut self, x: &[f32; 256], w: &[f32; 256]) -> Ternary {
        let d = rounded(self.0.fit(x, w));
        let inverse = inverse(d);
        Ternary { d, digits: x.map(|x| self.0.nearest(x * inverse) as u8) }
    }

    fn settle(&self, parts: &mut Ternary, e: usize, x: f32) -> f32 {
        let digit = self.0.nearest(x * inverse(parts.d));
        parts.digits[e] = digit as u8;
        parts.d * self.0.level(digit)
    }
}

/// A scale and a minimum, for codes of 0 to this.
struct WithMinimum(u8);

impl Choice<32> for WithMinimum {
    type Parts = Block32;

    fn choose(&mut self, x: &[f32; 32], w: &[f32; 32]) -> Block32 {
        let (d, m) = affine::fit(self.0, x, w, f32::MAX);
        let mut parts = Block32 { d: rounded(d), m: rounded(m), codes: [0; 32] };
        for (e, &x) in x.iter().enumerate() {
            self.settle(&mut parts, e, x);
        }
        parts
    }

    fn settle(&self, parts: &mut Block32, e: usize, x: f32) -> f32 {
        let code = nearest_integer(((x - parts.m) * inverse(parts.d)).clamp(0.0, f32::from(self.0)));
        parts.codes[e] = code as u8;
        parts.d * code + parts.m
    }
}

/// Sub-blocks of `SUB` with a scale and a minimum of 0 to `top`, for codes of 0 to `n`.
struct WithMinima<const SUB: usize> {
    n: u8,
    top: u8,
}

impl<const SUB: usize> Choice<256> for WithMinima<SUB> {
    type Parts = Superblock;

    fn choose(&mut self, x: &[f32; 256], w: &[f32; 256]) -> Superblock {
        search_k::with_minima::<SUB>(self.n, self.top, x, w)
    }

    fn settle(&self, parts: &mut Superblock, e: usize, x: f32) -> f32 {
        let scale = parts.d * f32::from(parts.scales[e / SUB]);
        let min = parts.dmin * f32::from(parts.mins[e / SUB]);
        let code = nearest_integer(((x + min) * inverse(scale)).clamp(0.0, f32::from(self.n)));
        parts.codes[e] = code as u8;
        scale * code - min
    }
}

/// Sub-blocks of 16 with a signed scale of -`top` to `top` - 1, for codes of -`n` to `n` - 1.
struct Symmetric {
    n: i32,
    top: i32,
    levels: Levels,
}

impl Choice<256> for Symmetric {
    type Parts = Superblock;

    fn choose(&mut self, x: &[f32; 256], w: &[f32; 256]) -> Superblock {
        search_k::symmetric(self.n, self.top, &mut self.levels, x, w)
    }

    fn settle(&self, parts: &mut Superblock, e: usize, x: f32) -> f32 {
        let scale = parts.d * f32::from(parts.scales[e / 16]);
        let code = nearest_integer((x * inverse(scale)).clamp(-self.n as f32, (self.n - 1) as f32));
        parts.codes[e] = (code as i32 + self.n) as u8;
        scale * code
    }
}

//! The best single scale for a run of values, found exactly.
//!
//! As the inverse scale grows, a code changes only where its value crosses the middle between two levels. Visiting these
//! crossings in order visits every code vector that rounding can produce, and two running sums tell how good each is: with
//! levels l and the best scale for them, the squared error is Σwx² - (Σwxl)²/Σwl².

use super::fits;

/// Levels in ascending order, of both signs. A code is an index into them.
pub(super) struct Levels {
    levels: Vec<f32>,
    /// Between neighbours.
    middles: Vec<f32>,
    largest: f32,
    /// Of [`LEAST`].
    most: f32,
    /// Kept from run to run, to allocate once.
    crossings: Vec<u64>,
}

/// Inverse scales are tried from where the largest value meets this part of the largest level, to where it meets `most`
/// times that level. Beyond one it is clipped, from which few levels gain more than many.
const LEAST: f32 = 0.6;

impl Levels {
    /// The levels -`n` to `n` - 1.
    pub(super) fn steps(n: i8) -> Levels {
        Levels::new((-n..n).map(f32::from).collect())
    }

    pub(super) fn new(levels: Vec<f32>) -> Levels {
        let middles = levels.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
        let largest = levels.iter().fold(0f32, |largest, level| largest.max(level.abs()));
        let most = 1.0 + 6.0 / (levels.len() / 2) as f32;
        Levels { levels, middles, largest, most, crossings: Vec::new() }
    }

    /// The scale, of either sign, that loses the least; zero for zeros. There are as many weights `w` as values, at most
    /// 256 of them.
    pub(super) fn fit(&mut self, x: &[f32], w: &[f32]) -> f32 {
        let amax = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        if amax < fits::NEGLIGIBLE {
            return 0.0;
        }
        let unit = self.largest / amax;
        let (mut best, mut scale) = (0f32, 0f32);
        for sign in [-1f32, 1.0] {
            let (mut sum_xl, mut sum_l2) = self.start(x, w, sign * unit);
            let mut judge = |sum_xl: f32, sum_l2: f32| {
                if sum_xl * sum_xl > best * sum_l2 {
                    best = sum_xl * sum_xl / sum_l2;
                    scale = sum_xl / sum_l2;
                }
            };
            judge(sum_xl, sum_l2);
            for &crossing in &self.crossings {
                let (i, code) = (crossing as usize >> 8 & 0xff, crossing as usize & 0xff);
                let (x, w, new) = (x[i], w[i], self.levels[code]);
                let old = self.levels[if x * sign > 0.0 { code - 1 } else { code + 1 }];
                sum_xl += w * x * (new - old);
                sum_l2 += w * (new * new - old * old);
                judge(sum_xl, sum_l2);
            }
        }
        scale
    }

    /// Σwxl and Σwl² at the least inverse scale, and the sorted crossings from there to the largest.
    fn start(&mut self, x: &[f32], w: &[f32], unit: f32) -> (f32, f32) {
        let (mut sum_xl, mut sum_l2) = (0f32, 0f32);
        self.crossings.clear();
        for (i, (&x, &w)) in x.iter().zip(w).enumerate() {
            let x_unit = x * unit;
            let reach = x_unit * self.most;
            let mut code = self.nearest(x_unit * LEAST);
            let level = self.levels[code];
            sum_xl += w * x * level;
            sum_l2 += w * level * level;
            // A positive value moves up through the middles, a negative one down.
            if reach > 0.0 {
                while code < self.middles.len() && self.middles[code] < reach {
                    code += 1;
                    self.crossings.push(crossing(self.middles[code - 1] / x_unit, i, code));
                }
            } else {
                while code > 0 && self.middles[code - 1] > reach {
                    code -= 1;
                    self.crossings.push(crossing(self.middles[code] / x_unit, i, code));
                }
            }
        }
        self.crossings.sort_unstable();
        (sum_xl, sum_l2)
    }

    pub(super) fn level(&self, code: usize) -> f32 {
        self.levels[code]
    }

    /// The code of the level nearest to `x`.
    pub(super) fn nearest(&self, x: f32) -> usize {
        self.middles.partition_point(|&middle| middle <= x)
    }
}

/// Sorts by where it happens, which is positive: the bits of positive floats sort as the floats do.
fn crossing(at: f32, element: usize, code: usize) -> u64 {
    u64::from(at.to_bits()) << 16 | (element as u64) << 8 | code as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn loss(levels: &Levels, scale: f32, x: &[f32], w: &[f32]) -> f32 {
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let value = |x: f32| scale * levels.levels[levels.nearest(x * inverse)];
        x.iter().zip(w).map(|(&x, &w)| w * (value(x) - x).powi(2)).sum()
    }

    proptest! {
        #[test]
        fn no_scale_on_a_fine_grid_loses_less(
            x in prop::collection::vec(-1f32..1.0, 16),
            w in prop::collection::vec(0.1f32..2.0, 16),
            n in prop::sample::select(vec![4i8, 8, 16]),
        ) {
            let mut levels = Levels::steps(n);
            let found = levels.fit(&x, &w);
            let found = loss(&levels, found, &x, &w);
            let amax = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            for step in 0..400 {
                let inverse = f32::from(n) / amax * (0.7 + step as f32 * 0.002);
                for scale in [1.0 / inverse, -1.0 / inverse] {
                    prop_assert!(found <= loss(&levels, scale, &x, &w) * 1.0001 + 1e-6);
                }
            }
        }
    }

    #[test]
    fn values_on_the_levels_are_found_again() {
        for scale in [0.37f32, -0.02] {
            let x: Vec<f32> = (-8..8).map(|level| scale * level as f32).collect();
            let found = Levels::steps(8).fit(&x, &[1.0; 16]);
            assert!((found / scale - 1.0).abs() < 1e-6, "{found} for {scale}");
        }
    }
}

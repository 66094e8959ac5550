//! Our own search for the K formats.
//!
//! Everything that a superblock says is chosen together: `d` and `dmin` as the decoder will see them, the small integers of
//! each sub-block, and the codes. Sub-blocks move their integers step by step to where they lose least with codes chosen
//! anew; then `d` and `dmin` are refitted to all codes by least squares. Either is kept only where it loses less.

use super::levels::Levels;
use super::{affine, fits, inverse, nearest_integer, rounded};
use crate::blocks::superblocks::Superblock;

const SWEEPS: usize = 8;
/// Sweeps end when one gains less than this part of the error.
const GAIN_MIN: f32 = 2e-4;
/// `d` begins where the largest scale is its largest integer times each of these.
const STARTS: [f32; 3] = [1.0, 0.94, 0.88];

/// Formats whose sub-blocks of `SUB` have a scale and a minimum of 0 to `top`, and codes of 0 to `n`.
pub(super) fn with_minima<const SUB: usize>(n: u8, top: u8, x: &[f32; 256], w: &[f32; 256]) -> Superblock {
    let (x, w) = (x.as_chunks::<SUB>().0, w.as_chunks::<SUB>().0);
    let (mut scales, mut mins) = ([0f32; 16], [0f32; 16]);
    for (sub, (x, w)) in x.iter().zip(w).enumerate() {
        let (scale, min) = affine::fit(n, x, w, 0.0);
        (scales[sub], mins[sub]) = (scale, -min);
    }
    let largest = |values: [f32; 16]| values.into_iter().fold(0f32, f32::max);

    let mut best = Lines::EMPTY;
    let mut least = f32::INFINITY;
    for start in STARTS {
        let unit = inverse(f32::from(top) * start);
        let (d, dmin) = (rounded(largest(scales) * unit), rounded(largest(mins) * unit));
        let integer = |value: f32, unit: f32| (value * inverse(unit)).round().min(f32::from(top)) as u8;
        let mut lines = Lines {
            n,
            top,
            d,
            dmin,
            sc: scales.map(|scale| integer(scale, d)),
            mn: mins.map(|min| integer(min, dmin)),
        };
        let mut error = f32::INFINITY;
        for _ in 0..SWEEPS {
            let before = error;
            error = x.iter().zip(w).enumerate().map(|(sub, (x, w))| lines.settle(sub, x, w)).sum();
            if error >= before * (1.0 - GAIN_MIN) {
                break;
            }
            let Some(refitted) = lines.refit(x, w) else { break };
            let refitted_error: f32 = x.iter().zip(w).enumerate().map(|(sub, (x, w))| refitted.error(sub, x, w)).sum();
            if refitted_error >= error {
                break;
            }
            (lines, error) = (refitted, refitted_error);
        }
        if error < least || least.is_infinite() {
            (best, least) = (lines, error);
        }
    }

    let mut codes = [0; 256];
    for (sub, (codes, x)) in codes.as_chunks_mut::<SUB>().0.iter_mut().zip(x).enumerate() {
        let (scale, min) = best.line(sub);
        let inverse = inverse(scale);
        *codes = x.map(|x| nearest_integer(((x + min) * inverse).clamp(0.0, f32::from(n))) as u8);
    }
    Superblock { d: best.d, dmin: best.dmin, scales: best.sc.map(|sc| sc as i8), mins: best.mn, codes }
}

/// The straight lines of all sub-blocks: d·sc·q - dmin·mn for codes q of 0 to `n`.
#[derive(Clone, Copy)]
struct Lines {
    n: u8,
    /// The largest `sc` and `mn`.
    top: u8,
    d: f32,
    dmin: f32,
    sc: [u8; 16],
    mn: [u8; 16],
}

impl Lines {
    const EMPTY: Lines = Lines { n: 0, top: 0, d: 0.0, dmin: 0.0, sc: [0; 16], mn: [0; 16] };

    fn line(&self, sub: usize) -> (f32, f32) {
        (self.d * f32::from(self.sc[sub]), self.dmin * f32::from(self.mn[sub]))
    }

    fn error<const SUB: usize>(&self, sub: usize, x: &[f32; SUB], w: &[f32; SUB]) -> f32 {
        let (scale, min) = self.line(sub);
        let inverse = inverse(scale);
        weighted_error(x, w, |x| scale * nearest_integer(((x + min) * inverse).clamp(0.0, f32::from(self.n))) - min)
    }

    /// Moves the scale and the minimum of a sub-block by single steps for as long as that loses less. Returns the loss.
    fn settle<const SUB: usize>(&mut self, sub: usize, x: &[f32; SUB], w: &[f32; SUB]) -> f32 {
        let mut error = self.error(sub, x, w);
        loop {
            let from = *self;
            for (scale_step, min_step) in MOVES {
                let mut moved = from;
                let (Some(sc), Some(mn)) =
                    (from.sc[sub].checked_add_signed(scale_step), from.mn[sub].checked_add_signed(min_step))
                else {
                    continue;
                };
                if sc > self.top || mn > self.top {
                    continue;
                }
                (moved.sc[sub], moved.mn[sub]) = (sc, mn);
                let moved_error = moved.error(sub, x, w);
                if moved_error < error {
                    (error, *self) = (moved_error, moved);
                }
            }
            if (from.sc[sub], from.mn[sub]) == (self.sc[sub], self.mn[sub]) {
                return error;
            }
        }
    }

    /// `d` and `dmin` by least squares for the present codes; `None` where that makes no sense.
    fn refit<const SUB: usize>(&self, x: &[[f32; SUB]], w: &[[f32; SUB]]) -> Option<Lines> {
        // The values are d·a - dmin·b with a = sc·q and b = mn.
        let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0f32, 0f32, 0f32, 0f32, 0f32);
        for (sub, (x, w)) in x.iter().zip(w).enumerate() {
            let (scale, min) = self.line(sub);
            let inverse = inverse(scale);
            let (mut qq, mut q1, mut sum_w, mut qx, mut sum_x) = (0f32, 0f32, 0f32, 0f32, 0f32);
            for (&x, &w) in x.iter().zip(w) {
                let q = nearest_integer(((x + min) * inverse).clamp(0.0, f32::from(self.n)));
                qq += w * q * q;
                q1 += w * q;
                sum_w += w;
                qx += w * q * x;
                sum_x += w * x;
            }
            let (sc, mn) = (f32::from(self.sc[sub]), f32::from(self.mn[sub]));
            aa += sc * sc * qq;
            ab -= sc * mn * q1;
            bb += mn * mn * sum_w;
            ax += sc * qx;
            bx -= mn * sum_x;
        }
        let determinant = aa * bb - ab * ab;
        let (d, dmin) = if determinant > aa * bb * 1e-6 {
            ((ax * bb - bx * ab) / determinant, (bx * aa - ax * ab) / determinant)
        } else {
            (ax / aa, self.dmin)
        };
        (d > 0.0 && dmin >= 0.0).then(|| Lines { d: rounded(d), dmin: rounded(dmin), ..*self })
    }
}

const MOVES: [(i8, i8); 8] = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)];

/// Formats whose sixteen sub-blocks have a signed scale of -`top` to `top` - 1, and codes of -`n` to `n` - 1.
pub(super) fn symmetric(n: i32, top: i32, levels: &mut Levels, x: &[f32; 256], w: &[f32; 256]) -> Superblock {
    let (x, w) = (x.as_chunks::<16>().0, w.as_chunks::<16>().0);
    let scales: [f32; 16] = std::array::from_fn(|sub| levels.fit(&x[sub], &w[sub]));
    let extreme = fits::signed_extreme(&scales);

    let mut best = Multiples { n, top, d: 0.0, sc: [0; 16] };
    let mut least = f32::INFINITY;
    for start in STARTS {
        // The extreme scale becomes the integer that has no mirror image.
        let d = rounded(-extreme / (top as f32 * start));
        let integer = |scale: f32| ((scale * inverse(d)).round() as i32).clamp(-top, top - 1);
        let mut multiples = Multiples { d, sc: scales.map(integer), ..best };
        let mut error = f32::INFINITY;
        for _ in 0..SWEEPS {
            let before = error;
            error = (0..16).map(|sub| multiples.settle(sub, &x[sub], &w[sub])).sum();
            if error >= before * (1.0 - GAIN_MIN) {
                break;
            }
            let Some(refitted) = multiples.refit(x, w) else { break };
            let refitted_error: f32 = (0..16).map(|sub| refitted.error(sub, &x[sub], &w[sub])).sum();
            if refitted_error >= error {
                break;
            }
            (multiples, error) = (refitted, refitted_error);
        }
        if error < least || least.is_infinite() {
            (best, least) = (multiples, error);
        }
    }

    let mut codes = [0; 256];
    for (sub, codes) in codes.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let inverse = inverse(best.d * best.sc[sub] as f32);
        *codes = x[sub].map(|x| (best.code(x * inverse) as i32 + n) as u8);
    }
    Superblock { d: best.d, dmin: 0.0, scales: best.sc.map(|sc| sc as i8), mins: [0; 16], codes }
}

/// The steps of all sub-blocks: d·sc·q for codes q of -`n` to `n` - 1 and scales of -`top` to `top` - 1.
#[derive(Clone, Copy)]
struct Multiples {
    n: i32,
    top: i32,
    d: f32,
    sc: [i32; 16],
}

impl Multiples {
    fn code(&self, x: f32) -> f32 {
        nearest_integer(x.clamp(-self.n as f32, (self.n - 1) as f32))
    }

    fn error(&self, sub: usize, x: &[f32; 16], w: &[f32; 16]) -> f32 {
        let scale = self.d * self.sc[sub] as f32;
        let inverse = inverse(scale);
        weighted_error(x, w, |x| scale * self.code(x * inverse))
    }

    /// Moves the scale of a sub-block by one or two to where it loses least. Returns the loss.
    fn settle(&mut self, sub: usize, x: &[f32; 16], w: &[f32; 16]) -> f32 {
        let from = *self;
        let mut error = self.error(sub, x, w);
        for sc in (from.sc[sub] - 2).max(-self.top)..=(from.sc[sub] + 2).min(self.top - 1) {
            let mut moved = from;
            moved.sc[sub] = sc;
            let moved_error = moved.error(sub, x, w);
            if moved_error < error {
                (error, *self) = (moved_error, moved);
            }
        }
        error
    }

    /// `d` by least squares for the present codes.
    fn refit(&self, x: &[[f32; 16]], w: &[[f32; 16]]) -> Option<Multiples> {
        let (mut sum_xl, mut sum_l2) = (0f32, 0f32);
        for (sub, (x, w)) in x.iter().zip(w).enumerate() {
            let inverse = inverse(self.d * self.sc[sub] as f32);
            for (&x, &w) in x.iter().zip(w) {
                let l = self.sc[sub] as f32 * self.code(x * inverse);
                sum_xl += w * x * l;
                sum_l2 += w * l * l;
            }
        }
        (sum_l2 > 0.0).then(|| Multiples { d: rounded(sum_xl / sum_l2), ..*self })
    }
}

/// Eight sums side by side, so that the compiler may use vectors.
fn weighted_error<const SUB: usize>(x: &[f32; SUB], w: &[f32; SUB], value: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0f32; 8];
    for (x, w) in x.as_chunks::<8>().0.iter().zip(w.as_chunks::<8>().0) {
        for lane in 0..8 {
            let off = value(x[lane]) - x[lane];
            sums[lane] += w[lane] * off * off;
        }
    }
    sums.iter().sum()
}

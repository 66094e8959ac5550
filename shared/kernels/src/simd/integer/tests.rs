//! Half precision against its definition, on every path.

use super::{Integers, from_f16, to_f16};
use crate::Path;
use crate::path::Work;
use crate::simd::Simd;

#[test]
fn halves_are_what_their_bits_say() {
    for half in (0..=u16::MAX).step_by(if cfg!(miri) { 97 } else { 1 }) {
        let (sign, exponent, fraction) = (half >> 15, i32::from(half >> 10 & 31), f64::from(half & 0x3ff) / 1024.0);
        let magnitude = match exponent {
            0 => fraction * 2f64.powi(-14),
            31 if fraction == 0.0 => f64::INFINITY,
            31 => f64::NAN,
            _ => (1.0 + fraction) * 2f64.powi(exponent - 15),
        };
        let expected = if sign == 1 { -magnitude } else { magnitude };
        let found = from_f16(half);
        assert!(f64::from(found) == expected || found.is_nan() && expected.is_nan(), "{half:#x}: {found}");
        if !found.is_nan() {
            assert_eq!(to_f16(found), half);
        }
    }
    // Ties go to the even neighbour; what is too large, to infinity.
    for (x, expected) in
        [(1.0 + 1.0 / 2048.0, 0x3c00), (1.0 + 3.0 / 2048.0, 0x3c02), (65519.0, 0x7bff), (65520.0, 0x7c00)]
    {
        assert_eq!((to_f16(x), to_f16(-x)), (expected, expected | 0x8000));
    }
    assert_eq!((to_f16(2f32.powi(-25)), to_f16(2f32.powi(-25) * 1.01), to_f16(1e-20)), (0, 1, 0));
}

#[test]
fn paths_widen_and_narrow_as_single_numbers_are() {
    struct Check(u16);
    impl Work for Check {
        type Output = ();
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            let halves: Vec<u16> = (0..16).map(|i| self.0.wrapping_add(i)).collect();
            let mut widened = [0.0f32; 16];
            // SAFETY: there are as many numbers as a vector has at most.
            unsafe { S::store(widened.as_mut_ptr(), S::Int::load_f16(halves.as_ptr())) };
            for (&half, &found) in halves.iter().zip(&widened).take(S::LANES) {
                let expected = from_f16(half);
                assert!(found == expected || found.is_nan() && expected.is_nan(), "{half:#x}");
            }
            // Numbers between halves, too.
            let numbers = widened.map(|x| if x.is_nan() { 0.0 } else { x * 1.000_37 });
            let mut narrowed = [0u16; 16];
            // SAFETY: as above.
            unsafe { S::Int::store_f16(narrowed.as_mut_ptr(), S::load(numbers.as_ptr())) };
            for (x, found) in numbers.iter().zip(narrowed).take(S::LANES) {
                assert_eq!(found, to_f16(*x), "{x:e}");
            }
            let bytes: Vec<u8> = (0..16).map(|i| (self.0 >> 4) as u8 ^ (i * 17)).collect();
            let mut widened = [0.0f32; 16];
            // SAFETY: as above.
            unsafe { S::store(widened.as_mut_ptr(), S::Int::load_u8(bytes.as_ptr())) };
            assert!(bytes.iter().zip(widened).take(S::LANES).all(|(&byte, found)| found == f32::from(byte)));
        }
    }
    for path in Path::available() {
        for first in (0..u16::MAX).step_by(if cfg!(miri) { 4096 } else { 4 }) {
            path.run(Check(first));
        }
    }
}

//! Ternary formats: 256 elements of -1, 0 or 1 under one scale `d`, for weights that were trained to be ternary.
//!
//! TQ2_0 spends two bits on an element, in the places of Q2_K's codes. TQ1_0 packs five into a byte: the byte is the
//! fraction v/243 of the base-3 number v of their digits, in units of 1/256 and rounded up, so that multiplying by 3 moves
//! the next digit above the byte.

use super::{BlockResult, put_scale, scale};

/// Digits are 0, 1, 2 for -1, 0, 1.
pub(crate) struct Ternary {
    pub d: f32,
    pub digits: [u8; 256],
}

/// Codes 0, `d` 64: d·(q - 1).
pub(super) fn decode_tq2_0(block: &[u8; 66], out: &mut [f32; 256]) -> BlockResult {
    let d = scale(block, 64)?;
    for (e, out) in out.iter_mut().enumerate() {
        let (half, j, l) = (e / 128, e % 128 / 32, e % 32);
        let digit = block[32 * half + l] >> (2 * j) & 3;
        *out = d * (i32::from(digit) - 1) as f32;
    }
    Ok(())
}

pub(crate) fn pack_tq2_0(parts: &Ternary, block: &mut [u8; 66]) -> BlockResult {
    put_scale(block, 64, parts.d)?;
    block[..64].fill(0);
    for (e, digit) in parts.digits.iter().enumerate() {
        let (half, j, l) = (e / 128, e % 128 / 32, e % 32);
        block[32 * half + l] |= digit << (2 * j);
    }
    Ok(())
}

/// Five digits in each of the bytes 0 to 47 and four in 48 to 51, `d` 52: d·(digit - 1).
pub(super) fn decode_tq1_0(block: &[u8; 54], out: &mut [f32; 256]) -> BlockResult {
    let d = scale(block, 52)?;
    for (e, out) in out.iter_mut().enumerate() {
        *out = d * (i32::from(tq1_0_digit(block, e)) - 1) as f32;
    }
    Ok(())
}

/// Digit `e` of a block of TQ1_0: 0, 1, 2 for -1, 0, 1.
pub(crate) fn tq1_0_digit(block: &[u8; 54], e: usize) -> u8 {
    let (byte, place) = tq1_0_place(e);
    let fraction = block[byte].wrapping_mul(POWERS[place]);
    ((u16::from(fraction) * 3) >> 8) as u8
}

pub(crate) fn pack_tq1_0(parts: &Ternary, block: &mut [u8; 54]) -> BlockResult {
    put_scale(block, 52, parts.d)?;
    let mut numbers = [0u16; 52];
    for (e, &digit) in parts.digits.iter().enumerate() {
        let (byte, place) = tq1_0_place(e);
        numbers[byte] += u16::from(digit) * u16::from(POWERS[4 - place]);
    }
    for (byte, number) in block.iter_mut().zip(numbers) {
        *byte = (number * 256).div_ceil(243) as u8; // At most 242·256/243, rounded up: 255.
    }
    Ok(())
}

const POWERS: [u8; 5] = [1, 3, 9, 27, 81];

/// The byte that holds element `e`, and how many digits precede it there.
fn tq1_0_place(e: usize) -> (usize, usize) {
    match e {
        0..160 => (e % 32, e / 32),
        160..240 => (32 + e % 16, (e - 160) / 16),
        _ => (48 + e % 4, (e - 240) / 4),
    }
}

//! Formats of 32 elements with one scale `d`, and in the `_1` formats a minimum `m`, per block.
//!
//! Nibbles are stored as 16 bytes: the low halves are elements 0 to 15, the high halves 16 to 31. The fifth bit of a
//! Q5 code is one bit of a `u32`, at the element's own index. The encoders choose codes with the unrounded scale, as
//! ggml does, although the decoder will see it rounded to `f16`.

use super::{BlockResult, put_scale, scale};

/// `d` 0, nibbles 2: d·(q - 8).
pub(super) fn decode_q4_0(block: &[u8; 18], out: &mut [f32; 32]) -> BlockResult {
    let d = scale(block, 0)?;
    for (i, &pair) in block[2..].iter().enumerate() {
        out[i] = d * (i32::from(pair & 15) - 8) as f32;
        out[i + 16] = d * (i32::from(pair >> 4) - 8) as f32;
    }
    Ok(())
}

/// `d` 0, `m` 2, nibbles 4: d·q + m.
pub(super) fn decode_q4_1(block: &[u8; 20], out: &mut [f32; 32]) -> BlockResult {
    let (d, m) = (scale(block, 0)?, scale(block, 2)?);
    for (i, &pair) in block[4..].iter().enumerate() {
        out[i] = d * f32::from(pair & 15) + m;
        out[i + 16] = d * f32::from(pair >> 4) + m;
    }
    Ok(())
}

/// `d` 0, fifth bits 2, nibbles 6: d·(q - 16).
pub(super) fn decode_q5_0(block: &[u8; 22], out: &mut [f32; 32]) -> BlockResult {
    let d = scale(block, 0)?;
    let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for (i, &pair) in block[6..].iter().enumerate() {
        let low = u32::from(pair & 15) | (fifth >> i & 1) << 4;
        let high = u32::from(pair >> 4) | (fifth >> (i + 16) & 1) << 4;
        out[i] = d * (low as i32 - 16) as f32;
        out[i + 16] = d * (high as i32 - 16) as f32;
    }
    Ok(())
}

/// `d` 0, `m` 2, fifth bits 4, nibbles 8: d·q + m.
pub(super) fn decode_q5_1(block: &[u8; 24], out: &mut [f32; 32]) -> BlockResult {
    let (d, m) = (scale(block, 0)?, scale(block, 2)?);
    let fifth = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for (i, &pair) in block[8..].iter().enumerate() {
        let low = u32::from(pair & 15) | (fifth >> i & 1) << 4;
        let high = u32::from(pair >> 4) | (fifth >> (i + 16) & 1) << 4;
        out[i] = d * low as f32 + m;
        out[i + 16] = d * high as f32 + m;
    }
    Ok(())
}

/// `d` 0, signed codes 2: d·q.
pub(super) fn decode_q8_0(block: &[u8; 34], out: &mut [f32; 32]) -> BlockResult {
    let d = scale(block, 0)?;
    for (out, &code) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(code as i8);
    }
    Ok(())
}

pub(super) fn encode_q4_0(values: &[f32; 32], block: &mut [u8; 18]) -> BlockResult {
    let d = signed_extreme(values) / -8.0;
    put_scale(block, 0, d)?;
    let codes = values.map(|x| ((x * inverse(d) + 8.5) as u8).min(15));
    put_nibbles(&codes, &mut block[2..]);
    Ok(())
}

pub(super) fn encode_q4_1(values: &[f32; 32], block: &mut [u8; 20]) -> BlockResult {
    let (min, max) = range(values);
    let d = (max - min) / 15.0;
    put_scale(block, 0, d)?;
    put_scale(block, 2, min)?;
    let codes = values.map(|x| (((x - min) * inverse(d) + 0.5) as u8).min(15));
    put_nibbles(&codes, &mut block[4..]);
    Ok(())
}

pub(super) fn encode_q5_0(values: &[f32; 32], block: &mut [u8; 22]) -> BlockResult {
    let d = signed_extreme(values) / -16.0;
    put_scale(block, 0, d)?;
    let codes = values.map(|x| ((x * inverse(d) + 16.5) as u8).min(31));
    block[2..6].copy_from_slice(&fifth_bits(&codes).to_le_bytes());
    put_nibbles(&codes, &mut block[6..]);
    Ok(())
}

pub(super) fn encode_q5_1(values: &[f32; 32], block: &mut [u8; 24]) -> BlockResult {
    let (min, max) = range(values);
    let d = (max - min) / 31.0;
    put_scale(block, 0, d)?;
    put_scale(block, 2, min)?;
    // The cast saturates, so a scale too small to invert cannot carry a code into the neighbouring bits.
    let codes = values.map(|x| (((x - min) * inverse(d) + 0.5) as u8).min(31));
    block[4..8].copy_from_slice(&fifth_bits(&codes).to_le_bytes());
    put_nibbles(&codes, &mut block[8..]);
    Ok(())
}

pub(super) fn encode_q8_0(values: &[f32; 32], block: &mut [u8; 34]) -> BlockResult {
    let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let d = largest / 127.0;
    put_scale(block, 0, d)?;
    for (code, x) in block[2..].iter_mut().zip(values) {
        *code = (x * inverse(d)).round() as i8 as u8;
    }
    Ok(())
}

/// The first element of largest magnitude, with its sign: it becomes the one code that has no mirror image, -8 or -16.
fn signed_extreme(values: &[f32; 32]) -> f32 {
    values.iter().fold(0.0, |extreme: f32, &x| if x.abs() > extreme.abs() { x } else { extreme })
}

fn range(values: &[f32; 32]) -> (f32, f32) {
    let mut range = (f32::MAX, -f32::MAX);
    for &x in values {
        if x < range.0 {
            range.0 = x;
        }
        if x > range.1 {
            range.1 = x;
        }
    }
    range
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn put_nibbles(codes: &[u8; 32], nibbles: &mut [u8]) {
    for (i, pair) in nibbles.iter_mut().enumerate() {
        *pair = codes[i] & 15 | (codes[i + 16] & 15) << 4;
    }
}

fn fifth_bits(codes: &[u8; 32]) -> u32 {
    codes.iter().enumerate().fold(0, |bits, (i, &code)| bits | u32::from(code >> 4 & 1) << i)
}

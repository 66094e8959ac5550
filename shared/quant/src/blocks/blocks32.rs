//! Formats of 32 elements with one scale `d`, and in the `_1` formats a minimum `m`, per block.
//!
//! Nibbles are stored as 16 bytes: the low halves are elements 0 to 15, the high halves 16 to 31. The fifth bit of a
//! Q5 code is one bit of a `u32`, at the element's own index.

use super::{BlockResult, put_scale, scale};

/// What a block says, before packing. `m` is zero where the format has no minimum.
pub(crate) struct Block32 {
    pub d: f32,
    pub m: f32,
    pub codes: [u8; 32],
}

/// What the codes of IQ4_NL stand for.
pub(crate) const IQ4_NL_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

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

/// `d` 0, nibbles 2: d·T[q].
pub(super) fn decode_iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) -> BlockResult {
    let d = scale(block, 0)?;
    for (i, &pair) in block[2..].iter().enumerate() {
        out[i] = d * f32::from(IQ4_NL_VALUES[usize::from(pair & 15)]);
        out[i + 16] = d * f32::from(IQ4_NL_VALUES[usize::from(pair >> 4)]);
    }
    Ok(())
}

/// Q4_0 and IQ4_NL: the codes mean different things, but lie in the same places.
pub(crate) fn pack_q4_0(parts: &Block32, block: &mut [u8; 18]) -> BlockResult {
    put_scale(block, 0, parts.d)?;
    put_nibbles(&parts.codes, &mut block[2..]);
    Ok(())
}

pub(crate) fn pack_q4_1(parts: &Block32, block: &mut [u8; 20]) -> BlockResult {
    put_scale(block, 0, parts.d)?;
    put_scale(block, 2, parts.m)?;
    put_nibbles(&parts.codes, &mut block[4..]);
    Ok(())
}

pub(crate) fn pack_q5_0(parts: &Block32, block: &mut [u8; 22]) -> BlockResult {
    put_scale(block, 0, parts.d)?;
    block[2..6].copy_from_slice(&fifth_bits(&parts.codes).to_le_bytes());
    put_nibbles(&parts.codes, &mut block[6..]);
    Ok(())
}

pub(crate) fn pack_q5_1(parts: &Block32, block: &mut [u8; 24]) -> BlockResult {
    put_scale(block, 0, parts.d)?;
    put_scale(block, 2, parts.m)?;
    block[4..8].copy_from_slice(&fifth_bits(&parts.codes).to_le_bytes());
    put_nibbles(&parts.codes, &mut block[8..]);
    Ok(())
}

/// The codes are signed bytes.
pub(crate) fn pack_q8_0(parts: &Block32, block: &mut [u8; 34]) -> BlockResult {
    put_scale(block, 0, parts.d)?;
    block[2..].copy_from_slice(&parts.codes);
    Ok(())
}

fn put_nibbles(codes: &[u8; 32], nibbles: &mut [u8]) {
    for (i, pair) in nibbles.iter_mut().enumerate() {
        *pair = codes[i] & 15 | (codes[i + 16] & 15) << 4;
    }
}

fn fifth_bits(codes: &[u8; 32]) -> u32 {
    codes.iter().enumerate().fold(0, |bits, (i, &code)| bits | u32::from(code >> 4 & 1) << i)
}

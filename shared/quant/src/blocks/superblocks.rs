//! K formats: superblocks of 256 elements, whose sub-blocks have small integer scales under one `f16` scale.
//!
//! Q4_K and Q5_K have eight sub-blocks of 32 with a scale and a minimum of six bits each; the others have sixteen
//! sub-blocks of 16, in Q2_K with a scale and a minimum of four bits, in Q3_K and Q6_K with a signed scale of six and
//! eight bits.

use super::{BlockResult, put_scale, scale};

/// What a superblock says, before packing. Q4_K and Q5_K use the first eight scales and minima, Q3_K and Q6_K no minimum.
#[derive(Clone)]
pub(crate) struct Superblock {
    pub d: f32,
    pub dmin: f32,
    pub scales: [i8; 16],
    pub mins: [u8; 16],
    /// As stored, so never negative: Q3_K subtracts 4 from its codes and Q6_K 32.
    pub codes: [u8; 256],
}

/// Scales and minima 0, bit pairs 16, `d` 80, `dmin` 82: (d·sc)·q - dmin·mn.
pub(super) fn decode_q2_k(block: &[u8; 84], out: &mut [f32; 256]) -> BlockResult {
    let (d, dmin) = (scale(block, 80)?, scale(block, 82)?);
    for (e, out) in out.iter_mut().enumerate() {
        let (half, j, l) = (e / 128, e % 128 / 32, e % 32);
        let q = block[16 + 32 * half + l] >> (2 * j) & 3;
        let scales = block[e / 16];
        *out = d * f32::from(scales & 15) * f32::from(q) - dmin * f32::from(scales >> 4);
    }
    Ok(())
}

/// High bits 0, bit pairs 32, packed scales 96, `d` 108: d·(S - 32)·(q - 4).
pub(super) fn decode_q3_k(block: &[u8; 110], out: &mut [f32; 256]) -> BlockResult {
    let d = scale(block, 108)?;
    for (e, out) in out.iter_mut().enumerate() {
        let (half, j, l, sub) = (e / 128, e % 128 / 32, e % 32, e / 16);
        let q = block[32 + 32 * half + l] >> (2 * j) & 3 | (block[l] >> (e / 32) & 1) << 2;
        let low = block[96 + sub % 8] >> (4 * (sub / 8)) & 15;
        let sc = low | (block[104 + sub % 4] >> (2 * (sub / 4)) & 3) << 4;
        *out = d * (i32::from(sc) - 32) as f32 * (i32::from(q) - 4) as f32;
    }
    Ok(())
}

/// `d` 0, `dmin` 2, packed scales 4, nibbles 16: (d·sc)·q - dmin·mn.
pub(super) fn decode_q4_k(block: &[u8; 144], out: &mut [f32; 256]) -> BlockResult {
    let (d, dmin) = (scale(block, 0)?, scale(block, 2)?);
    for (sub, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (sc, mn) = scale_and_min(&block[4..16], sub);
        let (step, offset) = (d * f32::from(sc), dmin * f32::from(mn));
        // Two sub-blocks share 32 bytes: the even one has the low nibbles.
        let codes = &block[16 + 32 * (sub / 2)..][..32];
        for (out, &pair) in out.iter_mut().zip(codes) {
            let q = pair >> (4 * (sub % 2)) & 15;
            *out = step * f32::from(q) - offset;
        }
    }
    Ok(())
}

/// `d` 0, `dmin` 2, packed scales 4, fifth bits 16, nibbles 48: as Q4_K, with bit `sub` of byte `l` of the fifth bits.
pub(super) fn decode_q5_k(block: &[u8; 176], out: &mut [f32; 256]) -> BlockResult {
    let (d, dmin) = (scale(block, 0)?, scale(block, 2)?);
    for (sub, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (sc, mn) = scale_and_min(&block[4..16], sub);
        let (step, offset) = (d * f32::from(sc), dmin * f32::from(mn));
        let codes = &block[48 + 32 * (sub / 2)..][..32];
        for ((out, &pair), &fifth) in out.iter_mut().zip(codes).zip(&block[16..48]) {
            let q = pair >> (4 * (sub % 2)) & 15 | (fifth >> sub & 1) << 4;
            *out = step * f32::from(q) - offset;
        }
    }
    Ok(())
}

/// Low nibbles 0, high bit pairs 128, scales 192, `d` 208: (d·sc)·(q - 32).
pub(super) fn decode_q6_k(block: &[u8; 210], out: &mut [f32; 256]) -> BlockResult {
    let d = scale(block, 208)?;
    for (run, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        // Each half of the superblock has 64 bytes of nibbles and 32 of bit pairs, shared by its four runs of 32.
        let (half, j) = (run / 4, run % 4);
        let nibbles = &block[64 * half + 32 * (j % 2)..][..32];
        let pairs = &block[128 + 32 * half..][..32];
        for (l, out) in out.iter_mut().enumerate() {
            let q = nibbles[l] >> (4 * (j / 2)) & 15 | (pairs[l] >> (2 * j) & 3) << 4;
            let sc = block[192 + 2 * run + l / 16] as i8;
            *out = d * f32::from(sc) * (i32::from(q) - 32) as f32;
        }
    }
    Ok(())
}

/// Eight six-bit scales and eight six-bit minima in 12 bytes. The first four of each fill the low six bits of bytes
/// 0 to 3 and 4 to 7; the others have their low nibbles in bytes 8 to 11 and their high bits on top of the first four.
pub(crate) fn scale_and_min(packed: &[u8], sub: usize) -> (u8, u8) {
    if sub < 4 {
        (packed[sub] & 63, packed[sub + 4] & 63)
    } else {
        let low = packed[sub + 4];
        (low & 15 | packed[sub - 4] >> 6 << 4, low >> 4 | packed[sub] >> 6 << 4)
    }
}

pub(crate) fn pack_q2_k(parts: &Superblock, block: &mut [u8; 84]) -> BlockResult {
    put_scale(block, 80, parts.d)?;
    put_scale(block, 82, parts.dmin)?;
    block[..80].fill(0);
    for (byte, (&sc, mn)) in block.iter_mut().zip(parts.scales.iter().zip(parts.mins)) {
        *byte = sc as u8 | mn << 4;
    }
    for (e, code) in parts.codes.iter().enumerate() {
        let (half, j, l) = (e / 128, e % 128 / 32, e % 32);
        block[16 + 32 * half + l] |= code << (2 * j);
    }
    Ok(())
}

pub(crate) fn pack_q3_k(parts: &Superblock, block: &mut [u8; 110]) -> BlockResult {
    put_scale(block, 108, parts.d)?;
    block[..108].fill(0);
    for (sub, &scale) in parts.scales.iter().enumerate() {
        let sc = (i16::from(scale) + 32) as u8;
        block[96 + sub % 8] |= (sc & 15) << (4 * (sub / 8));
        block[104 + sub % 4] |= (sc >> 4) << (2 * (sub / 4));
    }
    for (e, code) in parts.codes.iter().enumerate() {
        let (half, j, l) = (e / 128, e % 128 / 32, e % 32);
        block[32 + 32 * half + l] |= (code & 3) << (2 * j);
        block[l] |= (code >> 2) << (e / 32);
    }
    Ok(())
}

pub(crate) fn pack_q4_k(parts: &Superblock, block: &mut [u8; 144]) -> BlockResult {
    put_scale(block, 0, parts.d)?;
    put_scale(block, 2, parts.dmin)?;
    put_scales_and_mins(parts, &mut block[4..16]);
    put_nibbles(&parts.codes, &mut block[16..]);
    Ok(())
}

pub(crate) fn pack_q5_k(parts: &Superblock, block: &mut [u8; 176]) -> BlockResult {
    put_scale(block, 0, parts.d)?;
    put_scale(block, 2, parts.dmin)?;
    put_scales_and_mins(parts, &mut block[4..16]);
    block[16..48].fill(0);
    for (e, code) in parts.codes.iter().enumerate() {
        block[16 + e % 32] |= (code >> 4) << (e / 32);
    }
    put_nibbles(&parts.codes, &mut block[48..]);
    Ok(())
}

pub(crate) fn pack_q6_k(parts: &Superblock, block: &mut [u8; 210]) -> BlockResult {
    put_scale(block, 208, parts.d)?;
    block[..192].fill(0);
    for (e, code) in parts.codes.iter().enumerate() {
        let (half, j, l) = (e / 128, e % 128 / 32, e % 32);
        block[64 * half + 32 * (j % 2) + l] |= (code & 15) << (4 * (j / 2));
        block[128 + 32 * half + l] |= (code >> 4) << (2 * j);
    }
    for (byte, scale) in block[192..208].iter_mut().zip(parts.scales) {
        *byte = scale as u8;
    }
    Ok(())
}

/// The inverse of [`scale_and_min`].
fn put_scales_and_mins(parts: &Superblock, packed: &mut [u8]) {
    for sub in 0..4 {
        let (sc, mn) = (parts.scales[sub] as u8, parts.mins[sub]);
        let (late_sc, late_mn) = (parts.scales[sub + 4] as u8, parts.mins[sub + 4]);
        packed[sub] = sc | late_sc >> 4 << 6;
        packed[sub + 4] = mn | late_mn >> 4 << 6;
        packed[sub + 8] = late_sc & 15 | (late_mn & 15) << 4;
    }
}

/// Low nibbles; two sub-blocks of 32 share 32 bytes.
fn put_nibbles(codes: &[u8; 256], nibbles: &mut [u8]) {
    for (byte, pair) in nibbles.iter_mut().enumerate() {
        let even = 64 * (byte / 32) + byte % 32;
        *pair = codes[even] & 15 | (codes[even + 32] & 15) << 4;
    }
}

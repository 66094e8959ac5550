//! K formats: superblocks of 256 elements, whose sub-blocks have small integer scales under one `f16` scale.
//!
//! Q4_K and Q5_K have eight sub-blocks of 32 with a scale and a minimum of six bits each; Q6_K has sixteen sub-blocks
//! of 16 with a signed byte each. Only decoding lives here.

use super::{BlockResult, scale};

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
fn scale_and_min(packed: &[u8], sub: usize) -> (u8, u8) {
    if sub < 4 {
        (packed[sub] & 63, packed[sub + 4] & 63)
    } else {
        let low = packed[sub + 4];
        (low & 15 | packed[sub - 4] >> 6 << 4, low >> 4 | packed[sub] >> 6 << 4)
    }
}

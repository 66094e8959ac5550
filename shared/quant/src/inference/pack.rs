//! ggml's blocks, as the kernels want them: words of four columns each.

use crate::BlockType;
use crate::blocks::superblocks::scale_and_min;
use crate::blocks::ternary::tq1_0_digit;
use crate::blocks::{BlockResult, NotFinite};
use kernels::quantized::Group;

/// A row of whole blocks of `ty`, into row `row` of a group. Scales and floats that are not finite are refused.
pub(super) fn pack_row(ty: BlockType, bytes: &[u8], row: usize, group: &mut Group<'_>) -> BlockResult {
    match ty {
        BlockType::F32 => floats(bytes, row, group, |value| f32::from_le_bytes(value).is_finite()),
        BlockType::F16 => floats(bytes, row, group, is_finite_f16),
        BlockType::BF16 => floats(bytes, row, group, |value: [u8; 2]| value[1] & 0x7f != 0x7f || value[0] & 0x80 == 0),
        BlockType::Q4_0 | BlockType::IQ4_NL => blocks(bytes, |i, block: &[u8; 18]| {
            group.words(row, i, words::<4>(block, 2));
            scale(block, 0).map(|d| group.scale(row, i, d))
        }),
        BlockType::Q4_1 => blocks(bytes, |i, block: &[u8; 20]| {
            group.words(row, i, words::<4>(block, 4));
            group.scale(row, i, scale(block, 0)?);
            scale(block, 2).map(|m| group.min(row, i, m))
        }),
        BlockType::Q5_0 => blocks(bytes, |i, block: &[u8; 22]| {
            let [a, b, c, d] = words::<4>(block, 6);
            group.words(row, i, [a, b, c, d, plane(words::<1>(block, 2)[0])]);
            scale(block, 0).map(|d| group.scale(row, i, d))
        }),
        BlockType::Q5_1 => blocks(bytes, |i, block: &[u8; 24]| {
            let [a, b, c, d] = words::<4>(block, 8);
            group.words(row, i, [a, b, c, d, plane(words::<1>(block, 4)[0])]);
            group.scale(row, i, scale(block, 0)?);
            scale(block, 2).map(|m| group.min(row, i, m))
        }),
        // The kernels store bytes 128 higher.
        BlockType::Q8_0 => blocks(bytes, |i, block: &[u8; 34]| {
            group.words(row, i, words::<8>(block, 2).map(|word| word ^ 0x8080_8080));
            scale(block, 0).map(|d| group.scale(row, i, d))
        }),
        BlockType::Q4_K => blocks(bytes, |i, block: &[u8; 144]| {
            for half in 0..4 {
                let [even, odd] = nibbles(words::<8>(block, 16 + 32 * half));
                group.words(row, 8 * i + 2 * half, even);
                group.words(row, 8 * i + 2 * half + 1, odd);
            }
            super_scales_and_mins(i, block, row, group)
        }),
        BlockType::Q5_K => blocks(bytes, |i, block: &[u8; 176]| {
            let fifths = words::<8>(block, 16);
            for half in 0..4 {
                for (odd, [a, b, c, d]) in nibbles(words::<8>(block, 48 + 32 * half)).into_iter().enumerate() {
                    let sub = 2 * half + odd;
                    group.words(row, 8 * i + sub, [a, b, c, d, bits(fifths, sub)]);
                }
            }
            super_scales_and_mins(i, block, row, group)
        }),
        BlockType::Q6_K => blocks(bytes, |i, block: &[u8; 210]| {
            for run in 0..8 {
                let (half, j) = (run / 4, run % 4);
                let low = words::<8>(block, 64 * half + 32 * (j % 2)).map(|word| word >> (4 * (j / 2)) & 0x0f0f_0f0f);
                let [a, b, c, d] = std::array::from_fn(|quad| low[quad] | low[quad + 4] << 4);
                let [e, f] = pairs(words::<8>(block, 128 + 32 * half), j);
                group.words(row, 8 * i + run, [a, b, c, d, e, f]);
            }
            for (run, &sc) in block[192..208].iter().enumerate() {
                group.run(row, 16 * i + run, sc, 0);
            }
            scale(block, 208).map(|d| group.scale(row, i, d))
        }),
        BlockType::Q2_K => blocks(bytes, |i, block: &[u8; 84]| {
            for run in 0..8 {
                group.words(row, 8 * i + run, pairs(words::<8>(block, 16 + 32 * (run / 4)), run % 4));
            }
            for (run, &both) in block[..16].iter().enumerate() {
                group.run(row, 16 * i + run, both, 0);
            }
            group.scale(row, i, scale(block, 80)?);
            scale(block, 82).map(|m| group.min(row, i, m))
        }),
        BlockType::Q3_K => blocks(bytes, |i, block: &[u8; 110]| {
            let high = words::<8>(block, 0);
            for run in 0..8 {
                let [a, b] = pairs(words::<8>(block, 32 + 32 * (run / 4)), run % 4);
                group.words(row, 8 * i + run, [a, b, bits(high, run)]);
            }
            for run in 0..16 {
                let low = block[96 + run % 8] >> (4 * (run / 8)) & 15;
                let sc = low | (block[104 + run % 4] >> (2 * (run / 4)) & 3) << 4;
                group.run(row, 16 * i + run, sc.wrapping_sub(32), 0);
            }
            scale(block, 108).map(|d| group.scale(row, i, d))
        }),
        BlockType::TQ2_0 => blocks(bytes, |i, block: &[u8; 66]| {
            for run in 0..8 {
                group.words(row, 8 * i + run, pairs(words::<8>(block, 32 * (run / 4)), run % 4));
            }
            scale(block, 64).map(|d| group.scale(row, i, d))
        }),
        BlockType::TQ1_0 => blocks(bytes, |i, block: &[u8; 54]| {
            for run in 0..8 {
                let mut words = [0u32; 2];
                for e in 0..32 {
                    let digit = u32::from(tq1_0_digit(block, 32 * run + e));
                    words[e / 16] |= digit << (8 * (e % 4) + 2 * (e / 4 % 4));
                }
                group.words(row, 8 * i + run, words);
            }
            scale(block, 52).map(|d| group.scale(row, i, d))
        }),
    }
}

fn blocks<const B: usize>(bytes: &[u8], mut pack: impl FnMut(usize, &[u8; B]) -> BlockResult) -> BlockResult {
    bytes.as_chunks::<B>().0.iter().enumerate().try_for_each(|(i, block)| pack(i, block))
}

fn floats<const N: usize>(
    bytes: &[u8],
    row: usize,
    group: &mut Group<'_>,
    is_finite: impl Fn([u8; N]) -> bool,
) -> BlockResult {
    for (column, &value) in bytes.as_chunks::<N>().0.iter().enumerate() {
        if !is_finite(value) {
            return Err(NotFinite);
        }
        group.float(row, column, value);
    }
    Ok(())
}

fn is_finite_f16(half: [u8; 2]) -> bool {
    half[1] & 0x7c != 0x7c
}

fn scale(block: &[u8], at: usize) -> Result<[u8; 2], NotFinite> {
    let half = [block[at], block[at + 1]];
    if is_finite_f16(half) { Ok(half) } else { Err(NotFinite) }
}

fn words<const N: usize>(block: &[u8], at: usize) -> [u32; N] {
    let bytes = &block[at..at + 4 * N];
    std::array::from_fn(|i| u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]))
}

/// Of bit e for element e: bit `quad` of byte `e % 4`, where `quad = e / 4`.
fn plane(elements: u32) -> u32 {
    (0..8).fold(0, |plane, quad| {
        let four = elements >> (4 * quad) & 15;
        // Bit i of four to bit 8 i: no two of the products meet.
        plane | (four.wrapping_mul(0x0020_4081) & 0x0101_0101) << quad
    })
}

/// Bit `bit` of eight quads of bytes, likewise.
fn bits(quads: [u32; 8], bit: usize) -> u32 {
    quads.iter().enumerate().fold(0, |plane, (quad, word)| plane | (word >> bit & 0x0101_0101) << quad)
}

/// Bits `2 j` and `2 j + 1` of eight quads of bytes: four quads to a word.
fn pairs(quads: [u32; 8], j: usize) -> [u32; 2] {
    let of = |quads: &[u32]| {
        quads.iter().enumerate().fold(0, |word, (quad, four)| word | (four >> (2 * j) & 0x0303_0303) << (2 * quad))
    };
    [of(&quads[..4]), of(&quads[4..])]
}

/// Low and high nibbles of 32 bytes are blocks of their own.
fn nibbles(quads: [u32; 8]) -> [[u32; 4]; 2] {
    let low = std::array::from_fn(|i| quads[i] & 0x0f0f_0f0f | (quads[i + 4] & 0x0f0f_0f0f) << 4);
    let high = std::array::from_fn(|i| quads[i] >> 4 & 0x0f0f_0f0f | quads[i + 4] & 0xf0f0_f0f0);
    [low, high]
}

/// As Q4_K and Q5_K begin.
fn super_scales_and_mins(i: usize, block: &[u8], row: usize, group: &mut Group<'_>) -> BlockResult {
    for sub in 0..8 {
        let (sc, mn) = scale_and_min(&block[4..16], sub);
        group.run(row, 8 * i + sub, sc, mn);
    }
    group.scale(row, i, scale(block, 0)?);
    scale(block, 2).map(|m| group.min(row, i, m))
}

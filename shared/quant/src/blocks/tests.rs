use super::*;
use proptest::prelude::*;

const QUANTIZED: [(BlockType, &[usize]); 13] = [
    // With the offsets of the f16 scales in a block.
    (BlockType::Q4_0, &[0]),
    (BlockType::Q4_1, &[0, 2]),
    (BlockType::Q5_0, &[0]),
    (BlockType::Q5_1, &[0, 2]),
    (BlockType::Q8_0, &[0]),
    (BlockType::IQ4_NL, &[0]),
    (BlockType::Q2_K, &[80, 82]),
    (BlockType::Q3_K, &[108]),
    (BlockType::Q4_K, &[0, 2]),
    (BlockType::Q5_K, &[0, 2]),
    (BlockType::Q6_K, &[208]),
    (BlockType::TQ1_0, &[52]),
    (BlockType::TQ2_0, &[64]),
];

#[test]
fn ids_and_names_lead_back_to_their_type() {
    for ty in BlockType::ALL {
        assert_eq!(BlockType::from_ggml_id(ty.ggml_id()), Some(ty));
        assert_eq!(BlockType::from_name(ty.name()), Some(ty));
        assert_eq!(ty.bytes_of(3 * ty.block_elements()), Some(3 * ty.block_bytes()));
        assert_eq!(ty.bytes_of(ty.block_elements() + 1).is_none(), ty.block_elements() > 1);
    }
}

#[test]
fn every_format_decodes_as_its_formula_says() {
    for (ty, scales) in QUANTIZED {
        let blocks = 20;
        let mut bytes = noise(blocks * ty.block_bytes());
        for (index, block) in bytes.chunks_exact_mut(ty.block_bytes()).enumerate() {
            for &at in scales {
                let scale = f16::from_f32((index as f32 - 9.3) * 0.013 * (at + 1) as f32);
                block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        let mut values = vec![0.0; blocks * ty.block_elements()];
        dequantize(ty, &bytes, &mut values).unwrap();
        for (i, value) in values.iter().enumerate() {
            let (block, e) = (i / ty.block_elements(), i % ty.block_elements());
            let expected = formula(ty, &bytes[block * ty.block_bytes()..][..ty.block_bytes()], e);
            assert_eq!(value.to_bits(), expected.to_bits(), "{ty} block {block} element {e}: {value} vs {expected}");
        }
    }
}

/// Element `e` of a block by the published formulas, with none of the loops above.
fn formula(ty: BlockType, b: &[u8], e: usize) -> f32 {
    let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    let nibble = |at: usize| i32::from(if e < 16 { b[at + e] & 15 } else { b[at + e - 16] >> 4 });
    let fifth = |at: usize| i32::from(b[at + e / 8] >> (e % 8) & 1) * 16;
    let (h, j, l, s) = (e / 128, e % 128 / 32, e % 32, e / 32);
    let (sc, mn) = match () {
        _ if !matches!(ty, BlockType::Q4_K | BlockType::Q5_K) => (0, 0),
        _ if s < 4 => (b[4 + s] & 63, b[8 + s] & 63),
        _ => ((b[8 + s] & 15) + 16 * (b[s] >> 6), (b[8 + s] >> 4) + 16 * (b[4 + s] >> 6)),
    };
    match ty {
        BlockType::Q4_0 => half(0) * (nibble(2) - 8) as f32,
        BlockType::Q4_1 => half(0) * nibble(4) as f32 + half(2),
        BlockType::Q5_0 => half(0) * (nibble(6) + fifth(2) - 16) as f32,
        BlockType::Q5_1 => half(0) * (nibble(8) + fifth(4)) as f32 + half(2),
        BlockType::Q8_0 => half(0) * f32::from(b[2 + e] as i8),
        BlockType::IQ4_NL => half(0) * f32::from(blocks32::IQ4_NL_VALUES[nibble(2) as usize]),
        BlockType::Q2_K => {
            let q = b[16 + 32 * h + l] >> (2 * j) & 3;
            half(80) * f32::from(b[e / 16] & 15) * f32::from(q) - half(82) * f32::from(b[e / 16] >> 4)
        }
        BlockType::Q3_K => {
            let q = i32::from(b[32 + 32 * h + l] >> (2 * j) & 3) + 4 * i32::from(b[l] >> s & 1) - 4;
            let low = if e / 16 < 8 { b[96 + e / 16] & 15 } else { b[88 + e / 16] >> 4 };
            let sc = i32::from(low) + 16 * i32::from(b[104 + e / 16 % 4] >> (2 * (e / 64)) & 3) - 32;
            half(108) * sc as f32 * q as f32
        }
        BlockType::TQ1_0 => {
            let (byte, k) = match e {
                0..160 => (b[e % 32], e / 32),
                160..240 => (b[32 + e % 16], (e - 160) / 16),
                _ => (b[48 + e % 4], (e - 240) / 4),
            };
            let trit = (((u32::from(byte) * 3u32.pow(k as u32)) & 255) * 3) >> 8;
            half(52) * (trit as f32 - 1.0)
        }
        BlockType::TQ2_0 => half(64) * (f32::from(b[32 * h + l] >> (2 * j) & 3) - 1.0),
        BlockType::Q4_K => {
            let q = b[16 + 32 * (e / 64) + l] >> (4 * (s & 1)) & 15;
            half(0) * f32::from(sc) * f32::from(q) - half(2) * f32::from(mn)
        }
        BlockType::Q5_K => {
            let q = (b[48 + 32 * (e / 64) + l] >> (4 * (s & 1)) & 15) + 16 * (b[16 + l] >> s & 1);
            half(0) * f32::from(sc) * f32::from(q) - half(2) * f32::from(mn)
        }
        BlockType::Q6_K => {
            let low = b[64 * h + 32 * (j & 1) + l] >> (4 * (j >> 1)) & 15;
            let q = low + 16 * (b[128 + 32 * h + l] >> (2 * j) & 3);
            half(208) * f32::from(b[192 + e / 16] as i8) * (f32::from(q) - 32.0)
        }
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => unreachable!("plain floats have no formula"),
    }
}

/// Bytes that look random and are the same in every run.
fn noise(len: usize) -> Vec<u8> {
    (1..=len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761).rotate_left(15).wrapping_mul(0x9E37_79B1) >> 24) as u8)
        .collect()
}

#[test]
fn nan_and_infinite_scales_are_refused() {
    for (ty, scales) in QUANTIZED {
        for &at in scales {
            for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
                let mut bytes = vec![0; 3 * ty.block_bytes()];
                let second = ty.block_bytes() + at;
                bytes[second..second + 2].copy_from_slice(&bad.to_le_bytes());
                let refused = dequantize(ty, &bytes, &mut vec![0.0; 3 * ty.block_elements()]);
                assert!(matches!(refused, Err(Error::NotFinite { block: 1, .. })), "{ty} at {at}: {refused:?}");
            }
        }
    }
}

#[test]
fn plain_floats_that_are_not_finite_are_refused() {
    let refused = dequantize(BlockType::F32, &f32::NAN.to_le_bytes(), &mut [0.0]);
    assert!(matches!(refused, Err(Error::NotFinite { block: 0, .. })));
}

#[test]
fn buffers_of_another_length_are_refused() {
    for ty in BlockType::ALL {
        let (elements, bytes) = (ty.block_elements(), ty.block_bytes());
        for (bytes, elements) in [(bytes - 1, elements), (bytes + 1, elements), (bytes, 0), (bytes, elements + 1)] {
            let refused = dequantize(ty, &vec![0; bytes], &mut vec![0.0; elements]);
            assert!(matches!(refused, Err(Error::WrongLength { .. })), "{ty}: {refused:?}");
        }
    }
}

proptest! {
    #[test]
    fn arbitrary_blocks_decode_to_finite_values_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        for ty in BlockType::ALL {
            let blocks = bytes.len() / ty.block_bytes();
            let mut values = vec![f32::NAN; blocks * ty.block_elements()];
            if dequantize(ty, &bytes[..blocks * ty.block_bytes()], &mut values).is_ok() {
                prop_assert!(values.iter().all(|value| value.is_finite()));
            }
        }
    }
}

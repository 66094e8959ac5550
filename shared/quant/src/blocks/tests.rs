use super::*;
use proptest::prelude::*;

const QUANTIZED: [(BlockType, &[usize]); 8] = [
    // With the offsets of the f16 scales in a block.
    (BlockType::Q4_0, &[0]),
    (BlockType::Q4_1, &[0, 2]),
    (BlockType::Q5_0, &[0]),
    (BlockType::Q5_1, &[0, 2]),
    (BlockType::Q8_0, &[0]),
    (BlockType::Q4_K, &[0, 2]),
    (BlockType::Q5_K, &[0, 2]),
    (BlockType::Q6_K, &[208]),
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
fn narrow_floats_round_to_nearest_with_ties_to_even() {
    // f16 has 10 fraction bits and bf16 has 7: half a step above 1, one and a half steps above 1, and exact values.
    let f16s = [1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, -2.5, 65504.0, -0.0];
    check_round_trip(BlockType::F16, &f16s, &[1.0, 1.0 + 2.0 / 1024.0, -2.5, 65504.0, -0.0]);
    let bf16s = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -2.5, 1e-40];
    check_round_trip(BlockType::BF16, &bf16s, &[1.0, 1.0 + 2.0 / 128.0, -2.5, f32::from_bits(0x0001_0000)]);
    check_round_trip(BlockType::F32, &[1e-45, -0.1], &[1e-45, -0.1]);
}

fn check_round_trip(ty: BlockType, values: &[f32], expected: &[f32]) {
    let mut found = vec![0.0; values.len()];
    dequantize(ty, &quantize(ty, values).unwrap(), &mut found).unwrap();
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&found), bits(expected), "{ty}: {found:?}");
}

#[test]
fn zero_blocks_are_stored_as_ggml_stores_them() {
    let nibbles = |byte: u8| vec![byte; 16];
    let expected = [
        (BlockType::Q4_0, [vec![0x00, 0x80], nibbles(0x88)].concat()),
        (BlockType::Q4_1, vec![0; 20]),
        (BlockType::Q5_0, [vec![0x00, 0x80], vec![0xff; 4], nibbles(0x00)].concat()),
        (BlockType::Q5_1, vec![0; 24]),
        (BlockType::Q8_0, vec![0; 34]),
    ];
    for (ty, bytes) in expected {
        assert_eq!(quantize(ty, &[0.0; 32]).unwrap(), bytes, "{ty}");
    }
}

#[test]
fn quantizing_what_has_no_quantizer_is_refused() {
    for ty in [BlockType::Q4_K, BlockType::Q5_K, BlockType::Q6_K] {
        assert!(matches!(quantize(ty, &[0.0; 256]), Err(Error::NoQuantizer { .. })));
    }
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
fn values_that_no_scale_can_hold_are_refused() {
    for ty in BlockType::ALL.into_iter().filter(|ty| ty.block_elements() < 256) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
            if bad == f32::MAX && ty == BlockType::F32 {
                continue;
            }
            let mut values = [0.5; 64];
            values[40] = bad;
            let block = 40 / ty.block_elements();
            match quantize(ty, &values) {
                Err(Error::NotFinite { block: found, .. }) if found == block => {}
                other => panic!("{ty} took {bad}: {other:?}"),
            }
        }
    }
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
    assert!(matches!(quantize(BlockType::Q8_0, &[0.0; 33]), Err(Error::WrongLength { expected: 64, .. })));
}

proptest! {
    #[test]
    fn quantization_errs_by_at_most_half_a_scale(
        shape in prop::collection::vec(-1.0f32..1.0, 64),
        size in prop::sample::select(vec![1e-3f32, 0.05, 1.0, 300.0]),
        offset in prop::sample::select(vec![0.0f32, 1.0, -2.0]),
    ) {
        let values: Vec<f32> = shape.iter().map(|x| (x + offset) * size).collect();
        for (ty, _) in QUANTIZED.into_iter().filter(|(ty, _)| ty.block_elements() == 32) {
            let mut found = vec![0.0; values.len()];
            dequantize(ty, &quantize(ty, &values).unwrap(), &mut found).unwrap();
            for (values, found) in values.chunks(32).zip(found.chunks(32)) {
                check_half_a_scale(ty, values, found);
            }
        }
    }

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

fn check_half_a_scale(ty: BlockType, values: &[f32], found: &[f32]) {
    let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let range = values.iter().fold(f32::MIN, |max, &x| max.max(x)) - values.iter().fold(f32::MAX, |min, &x| min.min(x));
    let (extent, codes, mirrored) = match ty {
        BlockType::Q4_0 => (largest, 8.0, true),
        BlockType::Q5_0 => (largest, 16.0, true),
        BlockType::Q4_1 => (range, 15.0, false),
        BlockType::Q5_1 => (range, 31.0, false),
        _ => (largest, 127.0, false),
    };
    let scale = extent / codes;
    // The codes were chosen with an exact scale and minimum, but the block holds both as f16, which keeps eleven bits
    // down to 2^-14 and multiples of 2^-24 below.
    let f16_error = |x: f32| (x * 2f32.powi(-11)).max(2f32.powi(-25));
    let rounding = codes * f16_error(scale) + f16_error(largest) + largest * 1e-6;
    for (value, found) in values.iter().zip(found) {
        // Codes reach one step less on the side opposite the extreme, so only there the error can be a whole scale.
        let clamped = mirrored && value.abs() > largest - scale / 2.0;
        let bound = if clamped { scale } else { scale / 2.0 } + rounding;
        assert!((value - found).abs() <= bound, "{ty}: {value} became {found}, scale {scale}");
    }
}

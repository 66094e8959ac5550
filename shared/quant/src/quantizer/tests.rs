use super::*;
use crate::dequantize;
use proptest::prelude::*;
use std::sync::LazyLock;

const METHODS: [Method; 2] = [Method::Reference, Method::Search];

/// All that are not plain floats.
fn packed() -> impl Iterator<Item = BlockType> {
    BlockType::ALL.into_iter().filter(|ty| ty.block_elements() > 1)
}

fn pack(ty: BlockType, method: Method, row: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let mut bytes = vec![0; ty.bytes_of(row.len()).unwrap()];
    quantize_row(ty, method, row, importance, &mut bytes).unwrap();
    bytes
}

fn unpack(ty: BlockType, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / ty.block_bytes() * ty.block_elements()];
    dequantize(ty, bytes, &mut values).unwrap();
    values
}

/// Weights and the importance of their columns, the same on every machine.
fn seeded(len: usize, mut seed: u32) -> (Vec<f32>, Vec<f32>) {
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        seed as i32 as f32 / 2_147_483_648.0
    };
    let draw = |_| {
        let (x, v) = (next(), next());
        (x * x * x * 0.1, v.abs() + 0.05)
    };
    (0..len).map(draw).unzip()
}

/// `golden.txt` holds what llama.cpp 0c1e570 (baseline x86-64) makes of [`seeded`] blocks: type, `plain` or `important`,
/// and the bytes in hexadecimal.
#[test]
fn reference_bytes_are_those_of_llama_cpp() {
    let mut checked = Vec::new();
    for line in include_str!("golden.txt").lines() {
        let [ty, kind, expected] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let ty = BlockType::from_name(ty).unwrap();
        let (row, importance) = seeded(ty.block_elements().max(32), 7);
        let found = pack(ty, Method::Reference, &row, (kind == "important").then_some(&importance));
        let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, expected, "{ty} {kind}");
        checked.push(ty);
    }
    checked.dedup();
    assert_eq!(checked, packed().collect::<Vec<_>>());
}

#[test]
fn the_search_loses_less_than_ggml() {
    let (row, importance) = seeded(16 * 256, 11);
    for ty in packed() {
        let loss = |method: Method, importance: Option<&[f32]>| {
            let found = unpack(ty, &pack(ty, method, &row, importance));
            let weight = |column: usize| importance.map_or(1.0, |importance| importance[column]);
            let errors = found.iter().zip(&row).enumerate().map(|(i, (found, x))| weight(i) * (found - x).powi(2));
            errors.sum::<f32>()
        };
        for importance in [None, Some(importance.as_slice())] {
            let (ours, theirs) = (loss(Method::Search, importance), loss(Method::Reference, importance));
            let enough = if ty == BlockType::Q8_0 { theirs } else { theirs * 0.99 };
            assert!(ours <= enough, "{ty}, importance {}: {ours}, ggml {theirs}", importance.is_some());
        }
    }
}

#[test]
fn weights_that_lie_on_a_grid_are_found_again() {
    use BlockType::*;
    let (row, importance) = seeded(4 * 256, 3);
    for ty in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, TQ1_0, TQ2_0] {
        let grid = unpack(ty, &pack(ty, Method::Reference, &row, None));
        for importance in [None, Some(importance.as_slice())] {
            let found = unpack(ty, &pack(ty, Method::Search, &grid, importance));
            for (grid, found) in grid.iter().zip(&found) {
                assert!((grid - found).abs() <= 1e-6, "{ty}: {grid} became {found}");
            }
        }
    }
}

#[test]
fn the_unit_of_importance_does_not_matter() {
    let (row, importance) = seeded(512, 5);
    let scaled: Vec<f32> = importance.iter().map(|v| v * 4096.0).collect();
    for ty in packed() {
        let found = pack(ty, Method::Search, &row, Some(&scaled));
        assert_eq!(found, pack(ty, Method::Search, &row, Some(&importance)), "{ty}");
    }
    for ty in packed() {
        // Nothing being important is knowing nothing.
        assert_eq!(pack(ty, Method::Search, &row, Some(&[0.0; 512])), pack(ty, Method::Search, &row, None), "{ty}");
    }
}

#[test]
fn an_important_column_errs_less() {
    let (row, _) = seeded(256, 9);
    let mut importance = vec![1.0; 256];
    importance[40] = 1e4;
    for ty in packed().filter(|&ty| ty != BlockType::Q8_0) {
        let error =
            |importance: Option<&[f32]>| (unpack(ty, &pack(ty, Method::Search, &row, importance))[40] - row[40]).abs();
        let (with, without) = (error(Some(&importance)), error(Some(&[1.0; 256])));
        assert!(with <= without * 1.0001, "{ty}: {with}, without importance {without}");
    }
}

#[test]
fn impossible_importance_is_refused() {
    let mut bytes = [0; 18];
    for method in METHODS {
        for bad in [f32::NAN, f32::INFINITY, -1.0] {
            let mut importance = [1.0; 32];
            importance[7] = bad;
            let refused = quantize_row(BlockType::Q4_0, method, &[0.5; 32], Some(&importance), &mut bytes);
            assert!(matches!(refused, Err(Error::Importance { column: 7 })), "{refused:?}");
        }
        let refused = quantize_row(BlockType::Q4_0, method, &[0.5; 32], Some(&[1.0; 31]), &mut bytes);
        assert!(matches!(refused, Err(Error::WrongLength { expected: 32, found: 31, .. })), "{refused:?}");
        let refused = quantize_row(BlockType::Q4_0, method, &[0.5; 64], None, &mut bytes);
        assert!(matches!(refused, Err(Error::WrongLength { expected: 36, found: 18, .. })), "{refused:?}");
    }
    assert!(matches!(quantize(BlockType::Q8_0, &[0.0; 33]), Err(Error::WrongLength { expected: 64, .. })));
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
        (BlockType::IQ4_NL, [vec![0x00, 0x00], nibbles(0x88)].concat()),
    ];
    for (ty, bytes) in expected {
        assert_eq!(quantize(ty, &[0.0; 32]).unwrap(), bytes, "{ty}");
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
}

proptest! {
    #[test]
    fn quantization_errs_by_at_most_half_a_scale(
        shape in prop::collection::vec(-1.0f32..1.0, 64),
        size in prop::sample::select(vec![1e-3f32, 0.05, 1.0, 300.0]),
        offset in prop::sample::select(vec![0.0f32, 1.0, -2.0]),
    ) {
        let values: Vec<f32> = shape.iter().map(|x| (x + offset) * size).collect();
        let simple = [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q5_0, BlockType::Q5_1, BlockType::Q8_0];
        for ty in simple {
            let mut found = vec![0.0; values.len()];
            dequantize(ty, &quantize(ty, &values).unwrap(), &mut found).unwrap();
            for (values, found) in values.chunks(32).zip(found.chunks(32)) {
                check_half_a_scale(ty, values, found);
            }
        }
    }
}

proptest! {
    // Each case packs every type several times.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn errors_stay_within_what_the_codes_of_a_type_allow(
        shape in prop::collection::vec(-1.0f32..1.0, 256),
        size in prop::sample::select(vec![0.05f32, 1.0, 300.0]),
        offset in prop::sample::select(vec![0.0f32, 1.0, -2.0]),
    ) {
        let values: Vec<f32> = shape.iter().map(|x| (x + offset) * size).collect();
        let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        for (ty, bound) in RELATIVE_ERRORS {
            for method in METHODS {
                let found = unpack(ty, &pack(ty, method, &values, None));
                let error: f32 = values.iter().zip(&found).map(|(x, found)| (x - found).powi(2)).sum();
                let error = (error / 256.0).sqrt();
                prop_assert!(error <= bound * largest, "{} {:?}: {}", ty, method, error / largest);
            }
        }
    }

    #[test]
    fn any_numbers_are_packed_or_refused(
        bits in prop::collection::vec(any::<u32>(), 256),
        importance in prop::collection::vec(prop::sample::select(vec![0.0f32, 1e-30, 1.0, 1e30]), 256),
        exponents in 1u32..256,
    ) {
        // Exponents below a bound, for otherwise some value always exceeds every type.
        let row: Vec<f32> = bits.iter().map(|bits| f32::from_bits((bits % (exponents << 23)) | (bits & 1 << 31))).collect();
        for ty in BlockType::ALL {
            for method in METHODS {
                for importance in [None, Some(importance.as_slice())] {
                    let mut bytes = vec![0; ty.bytes_of(row.len()).unwrap()];
                    if quantize_row(ty, method, &row, importance, &mut bytes).is_ok() {
                        prop_assert!(unpack(ty, &bytes).iter().all(|value| value.is_finite()));
                    }
                }
            }
            let mut bytes = vec![0; ty.bytes_of(row.len()).unwrap()];
            if quantize_row_with_feedback(ty, &row, &TOGETHER, &mut bytes).is_ok() {
                prop_assert!(unpack(ty, &bytes).iter().all(|value| value.is_finite()));
            }
        }
    }
}

/// Columns whose activations mostly rise and fall together.
static TOGETHER: LazyLock<Feedback> = LazyLock::new(|| {
    let moments: Vec<f32> = (0..256 * 256).map(|i| if i % 257 == 0 { 2.0 } else { 1.5 }).collect();
    Feedback::new(&moments, 256).unwrap()
});

/// Bounds on the root mean square error, relative to the largest value: about half a step of the coarsest sub-block, a whole
/// one where codes reach less far on one side.
const RELATIVE_ERRORS: [(BlockType, f32); 9] = [
    (BlockType::Q8_0, 0.004),
    (BlockType::Q6_K, 0.03),
    (BlockType::Q5_K, 0.035),
    (BlockType::Q4_K, 0.07),
    (BlockType::Q4_0, 0.1),
    (BlockType::IQ4_NL, 0.12),
    (BlockType::Q3_K, 0.2),
    (BlockType::Q2_K, 0.34),
    (BlockType::TQ2_0, 0.6),
];

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

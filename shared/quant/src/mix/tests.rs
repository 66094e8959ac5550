use super::*;
use BlockType::*;

/// SmolLM2-135M: 576 wide, so that only the rows of `ffn_down` are whole superblocks.
const SMOLLM2: Layout = Layout { layers: 30, heads: 9, kv_heads: 3, tied: true, importance: false };

/// Everything in one type where rows allow it.
const WIDE: Layout = Layout { layers: 16, heads: 8, kv_heads: 2, tied: false, importance: false };

fn counts(mix: Mix, layout: &Layout, kind: &str, columns: usize) -> Vec<(BlockType, usize)> {
    let mut counts = std::collections::BTreeMap::new();
    for layer in 0..layout.layers {
        *counts.entry(mix.tensor_type(layout, &format!("blk.{layer}.{kind}.weight"), &[64, columns])).or_insert(0) += 1;
    }
    counts.into_iter().collect()
}

#[test]
fn names_and_file_types_are_distinct_and_lead_back() {
    for (i, mix) in Mix::ALL.into_iter().enumerate() {
        assert_eq!(Mix::from_name(mix.name()), Some(mix));
        for other in &Mix::ALL[..i] {
            assert!(other.name() != mix.name() && other.file_type() != mix.file_type(), "{other} and {mix}");
        }
    }
    assert_eq!(Mix::from_name("Q4_K"), None);
}

#[test]
fn smollm2_gets_the_types_that_llama_quantize_gives_it() {
    let expected = [
        // Mix, attn_q, attn_v, attn_output, ffn_down; the embedding is Q8_0 under every one of them.
        (Mix::Q6_K, vec![(Q8_0, 30)], vec![(Q8_0, 30)], vec![(Q8_0, 30)], vec![(Q6_K, 30)]),
        (Mix::Q5_K_M, vec![(Q5_1, 30)], vec![(Q5_1, 16), (Q8_0, 14)], vec![(Q5_1, 30)], vec![(Q5_K, 16), (Q6_K, 14)]),
        (Mix::Q4_K_M, vec![(Q5_0, 30)], vec![(Q5_0, 16), (Q8_0, 14)], vec![(Q5_0, 30)], vec![(Q4_K, 16), (Q6_K, 14)]),
        (Mix::Q4_K_S, vec![(Q5_0, 30)], vec![(Q5_0, 26), (Q5_1, 4)], vec![(Q5_0, 30)], vec![(Q4_K, 27), (Q5_K, 3)]),
        (Mix::Q3_K_M, vec![(Q4_0, 30)], vec![(Q5_0, 28), (Q5_1, 2)], vec![(Q5_0, 30)], vec![(Q4_K, 29), (Q5_K, 1)]),
        (Mix::Q2_K, vec![(Q4_0, 30)], vec![(Q4_0, 30)], vec![(Q4_0, 30)], vec![(Q3_K, 30)]),
        (Mix::IQ4_NL, vec![(IQ4_NL, 30)], vec![(IQ4_NL, 30)], vec![(IQ4_NL, 30)], vec![(IQ4_NL, 27), (Q5_K, 3)]),
        (Mix::TQ2_0, vec![(Q4_0, 30)], vec![(Q4_0, 30)], vec![(Q4_0, 30)], vec![(TQ2_0, 30)]),
    ];
    for (mix, q, v, output, down) in expected {
        assert_eq!(counts(mix, &SMOLLM2, "attn_q", 576), q, "{mix}, attn_q");
        assert_eq!(counts(mix, &SMOLLM2, "attn_v", 576), v, "{mix}, attn_v");
        assert_eq!(counts(mix, &SMOLLM2, "attn_output", 576), output, "{mix}, attn_output");
        assert_eq!(counts(mix, &SMOLLM2, "ffn_down", 1536), down, "{mix}, ffn_down");
        assert_eq!(mix.tensor_type(&SMOLLM2, "token_embd.weight", &[49_152, 576]), Q8_0, "{mix}");
    }
}

#[test]
fn rows_of_whole_superblocks_get_the_k_types() {
    let of = |mix: Mix, name: &str| mix.tensor_type(&WIDE, name, &[512, 256]);
    assert_eq!([of(Mix::Q4_K_M, "token_embd.weight"), of(Mix::Q4_K_M, "output.weight")], [Q4_K, Q6_K]);
    assert_eq!([of(Mix::TQ1_0, "token_embd.weight"), of(Mix::TQ1_0, "output.weight")], [Q4_K, Q6_K]);
    assert_eq!(of(Mix::Q8_0, "output.weight"), Q8_0);
    assert_eq!([of(Mix::Q2_K, "blk.9.attn_v.weight"), of(Mix::Q2_K, "blk.9.attn_output.weight")], [Q4_K, Q3_K]);
    let ungrouped = Layout { kv_heads: 8, ..WIDE };
    assert_eq!(Mix::Q2_K.tensor_type(&ungrouped, "blk.9.attn_v.weight", &[256, 256]), Q3_K);
    // The first two, the last two and every third between them.
    assert_eq!(counts(Mix::Q4_K_M, &WIDE, "ffn_down", 256), [(Q4_K, 8), (Q6_K, 8)]);
    // A tied embedding is the head.
    let tied = Layout { tied: true, ..WIDE };
    assert_eq!(Mix::Q2_K.tensor_type(&tied, "token_embd.weight", &[512, 256]), Q6_K);
}

#[test]
fn importance_changes_the_mix_where_it_serves_better_than_bits() {
    let important = Layout { importance: true, ..WIDE };
    assert_eq!(counts(Mix::Q4_0, &WIDE, "ffn_down", 256), [(Q4_0, 16)]);
    assert_eq!(counts(Mix::Q4_0, &important, "ffn_down", 256), [(Q4_0, 14), (Q4_1, 2)]);
    assert_eq!(counts(Mix::IQ4_NL, &WIDE, "ffn_down", 256), [(IQ4_NL, 14), (Q5_K, 2)]);
    assert_eq!(counts(Mix::IQ4_NL, &important, "ffn_down", 256), [(IQ4_NL, 16)]);
}

#[test]
fn vectors_and_norms_stay_f32_and_odd_rows_become_f16() {
    for mix in Mix::ALL {
        assert_eq!(mix.tensor_type(&WIDE, "blk.0.attn_q.bias", &[256]), F32);
        assert_eq!(mix.tensor_type(&WIDE, "blk.0.attn_norm.weight", &[256]), F32);
        assert_eq!(mix.tensor_type(&WIDE, "blk.0.attn_q_norm.weight", &[4, 64]), F32);
        let odd = mix.tensor_type(&WIDE, "blk.0.ffn_up.weight", &[512, 40]);
        assert_eq!(odd, if mix.base().block_elements() == 1 { mix.base() } else { F16 }, "{mix}");
    }
}

#[test]
fn every_type_fits_the_row_it_was_chosen_for() {
    for mix in Mix::ALL {
        for layers in [1, 2, 7, 30] {
            for (tied, importance) in [(false, false), (true, false), (false, true), (true, true)] {
                let layout = Layout { layers, tied, importance, ..WIDE };
                for columns in [1, 32, 48, 64, 256, 288, 576, 768] {
                    for kind in ["attn_q", "attn_v", "attn_output", "ffn_up", "ffn_down"] {
                        let names = (0..layers).map(|layer| format!("blk.{layer}.{kind}.weight"));
                        for name in names.chain(["token_embd.weight".to_owned(), "output.weight".to_owned()]) {
                            let ty = mix.tensor_type(&layout, &name, &[8, columns]);
                            assert!(ty.bytes_of(columns).is_some(), "{mix}: {name} of {columns} columns is {ty}");
                        }
                    }
                }
            }
        }
    }
}

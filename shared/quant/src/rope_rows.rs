//! The row order of Q and K projections in GGUF files of the `llama` architecture.
//!
//! Those files rotate neighbouring pairs (2i, 2i+1) of a head, Hugging Face rotates halves (i, i+d/2), so the rows of
//! `attn_q` and `attn_k`, their biases and their `lora_B` are reordered within each head. qwen2 and qwen3 keep halves
//! and need none of this. A row is moved whole, so quantized rows work like float rows: they are whole blocks.

use crate::Error;

/// Hugging Face order to GGUF order: row h·d + j·d/2 + i of head h moves to h·d + 2i + j. Pass the query heads for Q
/// and the key-value heads for K.
pub fn permute_rows(raw: &[u8], rows: usize, row_bytes: usize, heads: usize) -> Result<Vec<u8>, Error> {
    let head_rows = head_rows(raw, rows, row_bytes, heads)?;
    Ok(gather(raw, row_bytes, rows, |row| {
        let (head, within) = (row / head_rows, row % head_rows);
        head * head_rows + within % 2 * (head_rows / 2) + within / 2
    }))
}

/// GGUF order to Hugging Face order, the inverse of [`permute_rows`].
pub fn unpermute_rows(raw: &[u8], rows: usize, row_bytes: usize, heads: usize) -> Result<Vec<u8>, Error> {
    let head_rows = head_rows(raw, rows, row_bytes, heads)?;
    Ok(gather(raw, row_bytes, rows, |row| {
        let (head, within) = (row / head_rows, row % head_rows);
        head * head_rows + within % (head_rows / 2) * 2 + within / (head_rows / 2)
    }))
}

/// Row `r` of the result is row `source(r)` of `raw`.
fn gather(raw: &[u8], row_bytes: usize, rows: usize, source: impl Fn(usize) -> usize) -> Vec<u8> {
    let mut reordered = Vec::with_capacity(raw.len());
    for row in 0..rows {
        reordered.extend_from_slice(&raw[source(row) * row_bytes..][..row_bytes]);
    }
    reordered
}

/// Rows of one head, after checking that `raw` is `rows` whole rows and that they divide among the heads.
fn head_rows(raw: &[u8], rows: usize, row_bytes: usize, heads: usize) -> Result<usize, Error> {
    let expected = rows.saturating_mul(row_bytes);
    if raw.len() != expected {
        return Err(Error::WrongLength { what: "rows", unit: "bytes", expected, found: raw.len() });
    }
    if heads == 0 || rows == 0 || !rows.is_multiple_of(heads) || !(rows / heads).is_multiple_of(2) {
        return Err(Error::UnevenHeads { rows, heads });
    }
    Ok(rows / heads)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockType, dequantize, quantize};
    use proptest::prelude::*;

    #[test]
    fn halves_of_a_head_are_interleaved() {
        // Two heads of six rows of one byte; each head's halves are (0 1 2, 3 4 5).
        let hf = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15];
        let gguf = [0, 3, 1, 4, 2, 5, 10, 13, 11, 14, 12, 15];
        assert_eq!(permute_rows(&hf, 12, 1, 2).unwrap(), gguf);
        assert_eq!(unpermute_rows(&gguf, 12, 1, 2).unwrap(), hf);
    }

    #[test]
    fn permuting_quantized_rows_equals_quantizing_permuted_rows() {
        let (rows, columns, heads) = (16, 64, 2);
        let values: Vec<f32> = (0..rows * columns).map(|i| (i as f32 * 0.7).sin()).collect();
        let floats = permute_rows(bytemuck::cast_slice(&values), rows, columns * 4, heads).unwrap();
        let mut permuted = vec![0.0; values.len()];
        dequantize(BlockType::F32, &floats, &mut permuted).unwrap();

        let quantized = quantize(BlockType::Q4_0, &values).unwrap();
        let row_bytes = BlockType::Q4_0.bytes_of(columns).unwrap();
        let moved = permute_rows(&quantized, rows, row_bytes, heads).unwrap();
        assert_eq!(moved, quantize(BlockType::Q4_0, &permuted).unwrap());
    }

    #[test]
    fn rows_that_do_not_divide_among_heads_are_refused() {
        for (rows, heads) in [(8, 0), (8, 3), (6, 2), (0, 1)] {
            let refused = permute_rows(&vec![0; rows], rows, 1, heads);
            assert!(matches!(refused, Err(Error::UnevenHeads { .. })), "{rows} rows, {heads} heads: {refused:?}");
        }
        for (rows, row_bytes) in [(8, 2), (usize::MAX, 2), (usize::MAX / 2 + 5, 2)] {
            let refused = unpermute_rows(&[0; 8], rows, row_bytes, 1);
            assert!(matches!(refused, Err(Error::WrongLength { .. })), "{rows} × {row_bytes}: {refused:?}");
        }
    }

    proptest! {
        #[test]
        fn unpermuting_undoes_permuting(heads in 1usize..6, half in 1usize..5, row_bytes in 0usize..7, seed: u8) {
            let rows = heads * half * 2;
            let raw: Vec<u8> = (0..rows * row_bytes).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect();
            let there = permute_rows(&raw, rows, row_bytes, heads).unwrap();
            prop_assert_eq!(&unpermute_rows(&there, rows, row_bytes, heads).unwrap(), &raw);
            let back = unpermute_rows(&raw, rows, row_bytes, heads).unwrap();
            prop_assert_eq!(permute_rows(&back, rows, row_bytes, heads).unwrap(), raw);
        }
    }
}

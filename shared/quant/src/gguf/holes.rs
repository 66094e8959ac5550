//! One test for each kind of hole that GGUF readers have had, and for each rule of ours that closes one.
//!
//! A file is forged field by field, so that its counts and lengths can lie; [`check_refused`] wants an error that says
//! what is wrong, not merely an error.

use super::*;
use crate::Error;
use std::fs;

#[test]
fn the_forged_file_is_sound_until_it_is_spoiled() {
    open(&Forgery::sound()).unwrap().vocabulary().unwrap();
}

#[test]
fn another_magic_number_is_refused() {
    check_refused("begins with", |file| file.magic = *b"GGML");
}

#[test]
fn other_versions_are_refused() {
    for version in [0, 1, 4, 3u32.swap_bytes()] {
        check_refused("version", |file| file.version = version);
    }
}

#[test]
fn a_key_count_that_wraps_is_refused() {
    for keys in [-1, i64::MIN, i64::MAX, KEYS_MAX + 1] {
        check_refused("metadata keys, not 0 to 4096", |file| file.keys = keys);
    }
}

#[test]
fn a_tensor_count_that_wraps_is_refused() {
    for tensors in [-1, i64::MIN, i64::MAX, TENSORS_MAX + 1] {
        check_refused("tensors, not 0 to 65536", |file| file.tensors = tensors);
    }
}

#[test]
fn counts_larger_than_the_file_are_truncation() {
    check_refused("truncated", |file| {
        (file.keys, file.infos, file.data) = (KEYS_MAX, Vec::new(), Vec::new());
    });
    check_refused("truncated", |file| (file.tensors, file.data) = (TENSORS_MAX, Vec::new()));
}

#[test]
fn a_string_length_that_wraps_when_incremented_is_refused() {
    for length in [u64::MAX, STRING_BYTES_MAX + 1] {
        check_refused("has a string of", |file| file.key_with("k", 8, &length.to_le_bytes()));
    }
    check_refused("truncated", |file| file.key_with("k", 8, &STRING_BYTES_MAX.to_le_bytes()));
}

#[test]
fn a_key_or_tensor_name_that_is_too_long_is_refused() {
    check_refused("more than 1024", |file| file.key_with(&"k".repeat(1_025), 7, &[1]));
    check_refused("more than 63", |file| file.tensor(&"t".repeat(64), &[32], 0, 64));
}

#[test]
fn names_that_are_empty_or_would_reach_a_terminal_raw_are_refused() {
    for name in ["", "\u{1b}[2J", "a b", "ключ"] {
        check_refused("not visible ASCII", |file| file.key_with(name, 7, &[1]));
        check_refused("not visible ASCII", |file| file.tensor(name, &[32], 0, 64));
    }
}

#[test]
fn text_that_is_not_utf8_is_refused() {
    check_refused("not UTF-8", |file| file.key_with("k", 8, b"\x01\0\0\0\0\0\0\0\xff"));
}

#[test]
fn an_array_count_whose_bytes_wrap_is_refused() {
    for (ty, size) in [(0, 1), (2, 2), (4, 4), (6, 4), (7, 1), (8, 8), (10, 8), (12, 8)] {
        for count in [u64::MAX, (u64::MAX / size).saturating_add(2), 1 << 61, ARRAY_ELEMENTS_MAX + 1] {
            check_refused("elements, more than", |file| file.array("k", ty, count, &[0; 8]));
        }
        check_refused("truncated", |file| file.array("k", ty, ARRAY_ELEMENTS_MAX, &[0; 8]));
    }
}

#[test]
fn nested_and_unknown_types_are_refused() {
    check_refused("nests an array", |file| file.array("k", 9, 1, &[0; 32]));
    for ty in [13, -1, i32::MIN] {
        check_refused("array of unknown type", |file| file.array("k", ty, 1, &[0; 32]));
        check_refused("has the unknown type", |file| file.key_with("k", ty, &[0; 32]));
    }
}

#[test]
fn a_bool_that_is_neither_0_nor_1_is_refused() {
    check_refused("as a bool", |file| file.key_with("k", 7, &[2]));
    check_refused("as a bool", |file| file.array("k", 7, 2, &[1, 255]));
}

#[test]
fn a_key_that_occurs_twice_is_refused() {
    check_refused("`general.architecture` occurs twice", |file| file.key_with("general.architecture", 7, &[1]));
}

#[test]
fn a_tensor_name_that_occurs_twice_is_refused() {
    check_refused("`weight` occurs twice", |file| file.tensor("weight", &[32], 0, 64));
}

#[test]
fn alignments_that_are_zero_or_odd_or_small_are_refused() {
    for alignment in [0u32, 1, 2, 4, 7, 31, 48, u32::MAX] {
        check_refused("not a power of two", |file| file.key_with("general.alignment", 4, &alignment.to_le_bytes()));
    }
    check_refused("holds u64, expected u32", |file| file.key_with("general.alignment", 10, &32u64.to_le_bytes()));
    // Sound in itself, but then the data section begins where this file has none.
    check_refused("truncated", |file| file.key_with("general.alignment", 4, &(1u32 << 31).to_le_bytes()));
}

#[test]
fn dimensions_that_are_zero_or_negative_are_refused() {
    for n in [0, -1, -32, i64::MIN] {
        check_refused("has a dimension of", |file| file.tensor("t", &[n], 0, 64));
        check_refused("has a dimension of", |file| file.tensor("t", &[32, n], 0, 64));
    }
}

#[test]
fn a_number_of_dimensions_outside_1_to_4_is_refused() {
    check_refused("0 dimensions", |file| file.tensor("t", &[], 0, 64));
    check_refused("5 dimensions", |file| file.tensor("t", &[1; 5], 0, 64));
    check_refused("4294967295 dimensions", |file| {
        file.tensors += 1;
        file.infos.extend(b"\x01\0\0\0\0\0\0\0t\xff\xff\xff\xff");
    });
}

#[test]
fn a_shape_whose_product_wraps_is_refused() {
    for shape in [[1 << 32, 1 << 32, 1, 1], [i64::MAX, 2, 1, 1], [1 << 16; 4], [i64::MAX; 4], [1 << 31, 1 << 31, 2, 1]]
    {
        check_refused("larger than any file", |file| file.tensor("t", &shape, 0, 64));
    }
}

#[test]
fn a_byte_size_that_wraps_is_refused() {
    check_refused("larger than any file", |file| file.tensor("t", &[1 << 62], 0, 64)); // 2^64 bytes
}

#[test]
fn a_padded_size_that_wraps_is_refused() {
    check_refused("larger than any file", |file| file.tensor("t", &[i64::MAX], 1, 64)); // 2^64 - 2 bytes
}

#[test]
fn a_running_offset_that_wraps_is_refused() {
    check_refused("larger than any file", |file| {
        file.tensor("t", &[1 << 62], 1, 64);
        file.tensor("u", &[1 << 62], 1, 64 + (1 << 63)); // Together 2^64 bytes, so the next would lie at 64 again.
    });
}

#[test]
fn a_total_that_wraps_to_a_small_size_is_refused() {
    // The section's bytes fit in 64 bits; only the header's in front of them no longer do.
    check_refused("beyond any file", |file| {
        file.tensor("t", &[1 << 62], 1, 64);
        file.tensor("u", &[(1 << 62) - 64], 1, 64 + (1 << 63));
    });
}

#[test]
fn a_tensor_that_ends_beyond_the_file_is_refused() {
    check_refused("truncated, tensor `t`", |file| file.tensor("t", &[1_000_000], 0, 64));
    check_refused("truncated, tensor `weight`", |file| file.data.truncate(33));
}

#[test]
fn an_offset_other_than_the_padded_sum_is_refused() {
    for offset in [0, 32, 65, 96, u64::MAX, u64::MAX - 31] {
        check_refused("expected 64", |file| file.tensor("t", &[32], 0, offset));
    }
}

#[test]
fn bytes_behind_the_last_tensor_are_refused() {
    check_refused("bytes follow tensor `weight`", |file| file.data.extend([0; 33]));
}

#[test]
fn a_row_that_is_not_whole_blocks_is_refused() {
    for (row, ty) in [(33, 8), (16, 2), (128, 12), (32, 14)] {
        check_refused("no whole blocks", |file| file.tensor("t", &[row, 64], ty, 64));
    }
}

#[test]
fn type_ids_that_are_negative_or_retired_are_refused() {
    for ty in [-1, i32::MIN, i32::MAX, 4, 5, 31, 36, 43] {
        check_refused("unknown type id", |file| file.tensor("t", &[256], ty, 64));
    }
}

#[test]
fn a_header_larger_than_its_bound_is_refused() {
    // Seventeen strings of 16 MiB. The file is sparse, so this costs no disk, and reading stops before the last.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("large.gguf");
    let mut file = fs::File::create(&path).unwrap();
    use std::io::{Seek, SeekFrom, Write};
    file.write_all(b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x11\0\0\0\0\0\0\0").unwrap();
    for key in b'a'..b'a' + 17 {
        file.write_all(&[1, 0, 0, 0, 0, 0, 0, 0, key, 8, 0, 0, 0]).unwrap();
        file.write_all(&STRING_BYTES_MAX.to_le_bytes()).unwrap();
        file.seek(SeekFrom::Current(STRING_BYTES_MAX as i64)).unwrap();
    }
    file.set_len(1 << 40).unwrap();
    let error = Reader::open(&path).unwrap_err();
    assert!(error.to_string().contains("makes its header larger than"), "{error}");
}

#[test]
fn a_tensor_we_cannot_decode_is_refused_only_when_it_is_read() {
    let mut file = Forgery::sound();
    file.tensor("t", &[256], 16, 64);
    file.data.extend([0; 96]);
    let (_directory, reader) = open_kept(&file);
    let reader = reader.unwrap();
    assert_eq!(reader.tensor("t").unwrap().ty.name(), "IQ2_XXS");
    for refused in [reader.read_tensor("t").err(), reader.read_values("t").err()] {
        let message = refused.unwrap().to_string();
        assert!(message.contains("tensor `t` is stored as IQ2_XXS"), "{message}");
    }
    reader.read_values("weight").unwrap();
}

#[test]
fn a_scale_that_is_nan_or_infinite_is_refused() {
    for scale in [[0x00, 0x7c], [0x00, 0xfc], [0x01, 0x7e]] {
        let mut file = Forgery::sound();
        file.data[..2].copy_from_slice(&scale);
        let (_directory, reader) = open_kept(&file);
        let message = reader.unwrap().read_values("weight").unwrap_err().to_string();
        assert!(message.contains("tensor `weight`: cannot use block 0 of Q8_0"), "{message}");
    }
}

#[test]
fn token_types_or_scores_of_another_length_are_refused() {
    for count in [0u64, 1, 3] {
        let elements = [1, 0, 0, 0].repeat(count as usize);
        let key = "tokenizer.ggml.token_type";
        check_vocabulary_refused("but there are 2 tokens", |file| file.array(key, 5, count, &elements));
        let key = "tokenizer.ggml.scores";
        check_vocabulary_refused("but there are 2 tokens", |file| file.array(key, 6, count, &elements));
    }
}

#[test]
fn token_types_and_scores_without_a_meaning_are_refused() {
    let key = "tokenizer.ggml.token_type";
    check_vocabulary_refused("unknown type 7", |file| file.array(key, 5, 2, &[1, 0, 0, 0, 7, 0, 0, 0]));
    let key = "tokenizer.ggml.scores";
    check_vocabulary_refused("holds NaN", |file| file.array(key, 6, 2, &[0, 0, 0, 0, 0, 0, 0xc0, 0x7f]));
}

#[test]
fn special_ids_outside_the_vocabulary_are_refused() {
    for name in ["bos", "eos", "eot", "unknown", "padding"] {
        for id in [2u32, u32::MAX] {
            let key = format!("tokenizer.ggml.{name}_token_id");
            check_vocabulary_refused("but there are 2 tokens", |file| file.key_with(&key, 4, &id.to_le_bytes()));
        }
    }
}

#[test]
fn a_token_text_that_occurs_twice_is_refused() {
    check_vocabulary_refused("repeats an earlier token at id 1", |file| file.replace_token(b"b", b"a"));
}

#[test]
fn an_embedding_with_another_number_of_rows_is_refused() {
    check_vocabulary_refused("2 tokens but 3 embedding rows", |file| {
        file.tensor("token_embd.weight", &[1, 3], 0, 64);
        file.data.extend([0; 32]);
    });
}

#[test]
fn merges_that_are_not_two_pieces_are_refused() {
    for merge in ["ab", " b", "a ", "a b c", ""] {
        let bytes = [&(merge.len() as u64).to_le_bytes(), merge.as_bytes()].concat();
        check_vocabulary_refused("not two pieces", |file| file.array("tokenizer.ggml.merges", 8, 1, &bytes));
    }
}

/// A sound file after `spoil` must fail to open, with an error that contains `fragment` and names the file.
fn check_refused(fragment: &str, spoil: impl Fn(&mut Forgery)) {
    let mut file = Forgery::sound();
    spoil(&mut file);
    check_message(open(&file).map(|_| ()), fragment);
}

/// As [`check_refused`], for a container that opens but whose vocabulary does not agree with itself.
fn check_vocabulary_refused(fragment: &str, spoil: impl Fn(&mut Forgery)) {
    let mut file = Forgery::sound();
    spoil(&mut file);
    check_message(open(&file).unwrap().vocabulary().map(|_| ()), fragment);
}

fn check_message(result: Result<(), Error>, fragment: &str) {
    let message = result.expect_err("a broken file was accepted").to_string();
    assert!(message.contains(fragment), "expected \"… {fragment} …\", found \"{message}\"");
    assert!(message.contains("forged.gguf"), "the error does not name the file: {message}");
}

fn open(file: &Forgery) -> Result<Reader, Error> {
    open_kept(file).1
}

/// Keeps the file on disk as long as the directory lives.
fn open_kept(file: &Forgery) -> (tempfile::TempDir, Result<Reader, Error>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("forged.gguf");
    fs::write(&path, file.bytes()).unwrap();
    let reader = Reader::open(&path);
    (directory, reader)
}

/// A file in pieces, with counts that need not be true.
struct Forgery {
    magic: [u8; 4],
    version: u32,
    tensors: i64,
    keys: i64,
    metadata: Vec<u8>,
    infos: Vec<u8>,
    data: Vec<u8>,
}

impl Forgery {
    /// An architecture, a vocabulary of two tokens, and one Q8_0 tensor of a single block.
    fn sound() -> Forgery {
        let (metadata, infos) = (Vec::new(), Vec::new());
        let mut file = Forgery { magic: *b"GGUF", version: 3, tensors: 0, keys: 0, metadata, infos, data: vec![0; 64] };
        file.key_with("general.architecture", 8, b"\x05\0\0\0\0\0\0\0llama");
        file.key_with("tokenizer.ggml.model", 8, b"\x04\0\0\0\0\0\0\0gpt2");
        file.array("tokenizer.ggml.tokens", 8, 2, b"\x01\0\0\0\0\0\0\0a\x01\0\0\0\0\0\0\0b");
        file.tensor("weight", &[32], 8, 0);
        file
    }

    fn key_with(&mut self, key: &str, ty: i32, value: &[u8]) {
        self.keys += 1;
        put(&mut self.metadata, key);
        self.metadata.extend(ty.to_le_bytes());
        self.metadata.extend(value);
    }

    fn array(&mut self, key: &str, ty: i32, count: u64, elements: &[u8]) {
        self.key_with(key, 9, &[&ty.to_le_bytes()[..], &count.to_le_bytes(), elements].concat());
    }

    /// `ne` is in the file's order, contiguous dimension first.
    fn tensor(&mut self, name: &str, ne: &[i64], ty: i32, offset: u64) {
        self.tensors += 1;
        put(&mut self.infos, name);
        self.infos.extend((ne.len() as u32).to_le_bytes());
        ne.iter().for_each(|n| self.infos.extend(n.to_le_bytes()));
        self.infos.extend(ty.to_le_bytes());
        self.infos.extend(offset.to_le_bytes());
    }

    fn replace_token(&mut self, old: &[u8; 1], new: &[u8; 1]) {
        let last = self.metadata.len() - 1;
        assert_eq!(&self.metadata[last..], old, "the last token is the last byte of the metadata");
        self.metadata[last] = new[0];
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.tensors.to_le_bytes());
        bytes.extend(self.keys.to_le_bytes());
        bytes.extend(&self.metadata);
        bytes.extend(&self.infos);
        if !self.data.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(32), 0);
        }
        bytes.extend(&self.data);
        bytes
    }
}

fn put(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

use super::*;
use crate::{BlockType, Error, quantize};
use proptest::prelude::*;
use std::{fs, path::Path, sync::LazyLock};

#[test]
fn a_written_file_reads_back_as_it_was_declared() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("small.gguf");
    let header = small_header();
    let (values, bytes) = small_tensor();
    write(&path, header.clone(), &[("norm", bytemuck::cast_slice(&[1.0f32, 2.0, 3.0])), ("weight", &bytes)]);

    let reader = Reader::open(&path).unwrap();
    assert_eq!(reader.header(), &header);
    assert_eq!(reader.tensor("weight").unwrap().shape, [2, 64]);
    assert_eq!(reader.tensor("weight").unwrap().ty, TensorType::Block(BlockType::F16));
    assert_eq!(reader.read_tensor("weight").unwrap(), bytes);
    assert_eq!(reader.read_values("weight").unwrap(), values);
    assert_eq!(reader.read_values("norm").unwrap(), [1.0, 2.0, 3.0]);
    assert!(matches!(reader.read_tensor("bias"), Err(Error::MissingTensor { .. })));
}

#[test]
fn every_byte_of_a_small_file_is_where_the_format_puts_it() {
    let mut header = Header::new();
    header.set("k", 7u32);
    header.set("a", vec!["x".to_owned()]);
    header.add_tensor("t", &[1, 2], BlockType::F32).unwrap();
    let mut expected: Vec<u8> = Vec::new();
    expected.extend(b"GGUF\x03\0\0\0"); // magic, version
    expected.extend(b"\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"); // tensors, keys
    expected.extend(b"\x01\0\0\0\0\0\0\0a\x09\0\0\0"); // key, type array
    expected.extend(b"\x08\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0x"); // of string, count, length, text
    expected.extend(b"\x01\0\0\0\0\0\0\0k\x04\0\0\0\x07\0\0\0"); // key, type u32, value
    expected.extend(b"\x01\0\0\0\0\0\0\0t\x02\0\0\0"); // tensor name, dimensions
    expected.extend(b"\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0"); // contiguous dimension first
    expected.extend(b"\0\0\0\0\0\0\0\0\0\0\0\0"); // type F32, offset
    expected.resize(128, 0);
    expected.extend([0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]); // 1.0, -2.0
    expected.resize(160, 0);

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("golden.gguf");
    write(&path, header, &[("t", bytemuck::cast_slice(&[1.0f32, -2.0]))]);
    assert_eq!(fs::read(&path).unwrap(), expected);
}

#[test]
fn every_metadata_type_survives_a_round_trip() {
    let mut header = Header::new();
    let scalars = [
        Value::U8(200),
        Value::I8(-100),
        Value::U16(60_000),
        Value::I16(-30_000),
        Value::U32(u32::MAX),
        Value::I32(i32::MIN),
        Value::F32(-0.5),
        Value::Bool(true),
        Value::String("naïve\u{0120}\n".to_owned()),
        Value::U64(u64::MAX),
        Value::I64(i64::MIN),
        Value::F64(1e300),
        vec![1u8, 2].into(),
        vec![-1i8].into(),
        vec![1u16, 2].into(),
        vec![-1i16].into(),
        vec![1u32].into(),
        vec![-1i32, 3].into(),
        vec![0.5f32].into(),
        vec![true, false].into(),
        vec![String::new(), "b".to_owned()].into(),
        vec![1u64].into(),
        vec![-1i64].into(),
        Vec::<f64>::new().into(),
    ];
    for (index, value) in scalars.into_iter().enumerate() {
        header.set(&format!("key.{index}"), value);
    }
    let bytes = header.encode();
    let (reread, data_start) = header::parse(Path::new("memory"), bytes.as_slice(), bytes.len() as u64).unwrap();
    assert_eq!(reread, header);
    assert_eq!(data_start, bytes.len() as u64);
}

#[test]
fn a_missing_key_and_a_wrong_type_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("small.gguf");
    write_small(&path);
    let reader = Reader::open(&path).unwrap();
    assert_eq!(reader.required::<u32>("llama.block_count").unwrap(), 30);
    assert_eq!(reader.required::<&str>("general.architecture").unwrap(), "llama");
    assert_eq!(reader.required::<&[i32]>("tokenizer.ggml.token_type").unwrap(), [1, 3]);
    assert_eq!(reader.optional::<f32>("llama.rope.freq_base").unwrap(), None);

    let missing = reader.required::<f32>("llama.rope.freq_base").unwrap_err();
    assert_message(&missing, &path, "metadata key `llama.rope.freq_base` is missing");
    let wrong = reader.optional::<u64>("llama.block_count").unwrap_err();
    assert_message(&wrong, &path, "metadata key `llama.block_count` holds u32, expected u64");
}

fn assert_message(error: &Error, path: &Path, fragment: &str) {
    let message = error.to_string();
    assert!(message.contains(fragment) && message.contains(&path.display().to_string()), "{message}");
}

#[test]
fn a_vocabulary_is_read_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("small.gguf");
    write_small(&path);
    let vocabulary = Reader::open(&path).unwrap().vocabulary().unwrap();
    assert_eq!(vocabulary.tokens, ["a", "<|end|>"].into_iter().collect());
    assert_eq!(vocabulary.token_types, [TokenType::Normal, TokenType::Control]);
    assert_eq!(vocabulary.scores, [0.0, 0.0]);
    assert_eq!(vocabulary.merges, ["a b"].into_iter().collect());
    assert_eq!((vocabulary.eos, vocabulary.bos, vocabulary.add_bos), (Some(1), None, Some(false)));
}

#[test]
fn equal_contents_are_equal_bytes_whatever_order_the_keys_were_set_in() {
    let directory = tempfile::tempdir().unwrap();
    let files = [["a", "b"], ["b", "a"]].map(|keys| {
        let path = directory.path().join(keys[0]);
        let mut header = Header::new();
        keys.iter().for_each(|key| header.set(key, *key));
        write(&path, header, &[]);
        fs::read(path).unwrap()
    });
    assert_eq!(files[0], files[1]);
}

#[test]
fn an_unfinished_file_never_takes_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    fs::write(&path, "the file before").unwrap();

    let writer = Writer::create(&path, small_header()).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(error.to_string().contains("`norm` was declared but not written"), "{error}");
    drop(Writer::create(&path, small_header()).unwrap());

    assert_eq!(fs::read(&path).unwrap(), b"the file before");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "a partial file was left behind");
}

#[test]
fn tensors_out_of_order_or_of_another_size_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::create(&directory.path().join("model.gguf"), small_header()).unwrap();
    for (name, bytes) in [("weight", 256), ("norm", 11), ("norm", 16), ("other", 12)] {
        let refused = writer.write_tensor(name, &vec![0; bytes]);
        assert!(matches!(refused, Err(Error::Refused { .. })), "{name}, {bytes} bytes: {refused:?}");
    }
    writer.write_tensor("norm", &[0; 12]).unwrap();
    writer.write_tensor("weight", &[0; 256]).unwrap();
    assert!(matches!(writer.write_tensor("weight", &[0; 256]), Err(Error::Refused { .. })));
}

#[test]
fn a_header_that_no_reader_would_accept_is_not_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let headers: [fn(&mut Header); 6] = [
        |header| header.set("", 1u32),
        |header| header.set("line\nbreak", 1u32),
        |header| header.set("general.alignment", 64u32),
        |header| header.set("general.alignment", 3u32),
        |header| header.set("nan", f32::NAN),
        |header| (0..=KEYS_MAX).for_each(|i| header.set(&i.to_string(), i)),
    ];
    for (index, spoil) in headers.into_iter().enumerate() {
        let mut header = Header::new();
        spoil(&mut header);
        let refused = Writer::create(&path, header);
        assert!(matches!(refused, Err(Error::Refused { .. })), "header {index}: {refused:?}");
    }
    let mut header = Header::new();
    header.add_tensor("t", &[32], BlockType::Q8_0).unwrap();
    for (name, shape) in [("t", &[32][..]), ("u", &[33]), ("v", &[]), ("", &[32]), ("w", &[0, 32]), ("x", &[1; 5])] {
        assert!(matches!(header.add_tensor(name, shape, BlockType::Q8_0), Err(Error::Refused { .. })), "{name}");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_file_cut_at_any_byte_is_truncated() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("small.gguf");
    for length in 0..SMALL.len() {
        fs::write(&path, &SMALL[..length]).unwrap();
        let refused = Reader::open(&path);
        assert!(matches!(refused, Err(Error::Truncated { .. })), "at {length} of {}: {refused:?}", SMALL.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), sound_start: bool) {
        let start = b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0";
        let bytes = if sound_start { [&start[..], &bytes].concat() } else { bytes };
        read_everything(&bytes);
    }

    #[test]
    fn mutations_of_a_sound_file_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
        doubled in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = SMALL.clone();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(at) = doubled {
            let at = at.index(bytes.len());
            bytes.insert(at, bytes[at]);
        }
        if let Some(at) = cut {
            bytes.truncate(at.index(bytes.len()));
        }
        read_everything(&bytes);
    }
}

/// Whatever opens must also be readable to its last byte without a panic.
fn read_everything(bytes: &[u8]) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("hostile.gguf");
    fs::write(&path, bytes).unwrap();
    let Ok(reader) = Reader::open(&path) else { return };
    let _ = reader.vocabulary();
    for info in reader.tensors() {
        assert!(info.bytes <= bytes.len() as u64);
        if let Ok(values) = reader.read_values(&info.name) {
            assert!(values.len() == info.elements() && values.iter().all(|value| value.is_finite()));
        }
    }
}

/// Reads a published model where one is at hand; the numbers are those of SmolLM2-135M-Instruct.
#[test]
fn a_published_smollm2_file_is_read() {
    let Some(path) = std::env::var_os("HEADWATER_SMOLLM2_GGUF") else {
        println!("skipped: HEADWATER_SMOLLM2_GGUF names no file");
        return;
    };
    let reader = Reader::open(Path::new(&path)).unwrap();
    assert_eq!(reader.required::<&str>("general.architecture").unwrap(), "llama");
    assert_eq!(reader.required::<u32>("llama.block_count").unwrap(), 30);
    assert_eq!(reader.required::<f32>("llama.rope.freq_base").unwrap(), 100_000.0);
    assert_eq!(reader.tensor("token_embd.weight").unwrap().shape, [49_152, 576]);
    assert_eq!(reader.tensor("blk.0.ffn_down.weight").unwrap().shape, [576, 1_536]);
    assert_eq!(reader.tensors().iter().map(|info| info.elements()).sum::<usize>(), 134_515_008);
    for info in reader.tensors() {
        let values = reader.read_values(&info.name).unwrap();
        let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        assert!(largest > 0.0 && largest < 1_000.0, "{}: {largest}", info.name);
    }
    let vocabulary = reader.vocabulary().unwrap();
    assert_eq!((vocabulary.model.as_str(), vocabulary.pre.as_deref()), ("gpt2", Some("smollm")));
    assert_eq!((vocabulary.tokens.len(), vocabulary.merges.len()), (49_152, 48_900));
    assert_eq!(&vocabulary.tokens[vocabulary.eos.unwrap() as usize], "<|im_end|>");
}

fn small_header() -> Header {
    let mut header = Header::new();
    header.set("general.architecture", "llama");
    header.set("llama.block_count", 30u32);
    header.set("tokenizer.ggml.model", "gpt2");
    header.set("tokenizer.ggml.tokens", vec!["a".to_owned(), "<|end|>".to_owned()]);
    header.set("tokenizer.ggml.token_type", vec![1, 3]);
    header.set("tokenizer.ggml.merges", vec!["a b".to_owned()]);
    header.set("tokenizer.ggml.eos_token_id", 1u32);
    header.set("tokenizer.ggml.add_bos_token", false);
    header.add_tensor("norm", &[3], BlockType::F32).unwrap();
    header.add_tensor("weight", &[2, 64], BlockType::F16).unwrap();
    header
}

fn small_tensor() -> (Vec<f32>, Vec<u8>) {
    let values: Vec<f32> = (0..128).map(|i| i as f32 / 8.0).collect();
    let bytes = quantize(BlockType::F16, &values).unwrap();
    (values, bytes)
}

/// The bytes of the small file, written once because every finished file is flushed to the disk.
static SMALL: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("small.gguf");
    write_small(&path);
    fs::read(&path).unwrap()
});

fn write_small(path: &Path) {
    let (_, bytes) = small_tensor();
    write(path, small_header(), &[("norm", &[0; 12]), ("weight", &bytes)]);
}

fn write(path: &Path, header: Header, tensors: &[(&str, &[u8])]) {
    let mut writer = Writer::create(path, header).unwrap();
    for (name, bytes) in tensors {
        writer.write_tensor(name, bytes).unwrap();
    }
    writer.finish().unwrap();
}

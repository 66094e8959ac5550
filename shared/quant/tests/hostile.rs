//! Hostile GGUF files: every truncation of a small model and many random mutations end in a clear error or in a model that
//! reads to its last byte; none makes the reader panic, hang, or allocate more than twice the file's size at once.
//!
//! `HEADWATER_MUTATIONS` sets the number of mutations, 100,000 unless it is set; scripts/check/hostile.sh asks for more.

use kernels::CountingAllocator;
use quant::gguf::{Header, Reader, Writer};
use quant::{BlockType, Error, Imatrix, quantize};
use std::path::Path;
use std::time::{Duration, Instant};

#[global_allocator]
static MEMORY: CountingAllocator = CountingAllocator::new();

/// What any file costs: paths, error messages, nodes of trees.
const FIXED_BYTES: usize = 4096;

/// One test, so that nobody else allocates meanwhile.
#[test]
fn hostile_files_are_refused_or_read_whole_within_twice_their_size() {
    let small = small_model();
    check(&small).expect("the model before it is spoiled");
    if let Some(seeds) = std::env::var_os("HEADWATER_SEEDS") {
        write_seeds(Path::new(&seeds), &small);
    }
    for length in 0..small.len() {
        let error = check(&small[..length]).expect_err("a truncated file");
        assert!(matches!(error, Error::Truncated { .. }), "cut at {length}: {error}");
    }
    for (i, claim) in lying_headers().iter().enumerate() {
        assert!(check(claim).is_err(), "header {i} lies");
    }

    let mutations: u64 = match std::env::var("HEADWATER_MUTATIONS") {
        Ok(number) => number.parse().expect("HEADWATER_MUTATIONS is a number"),
        Err(_) => 100_000,
    };
    let mut valid = 0;
    for seed in 0..mutations {
        let mutated = mutated(&small, &mut Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1));
        match check(&mutated) {
            Ok(()) => valid += 1,
            Err(error) => {
                let message = error.to_string();
                // The longest legal name of a key is 1,024 letters.
                assert!(message.contains("memory.gguf") && message.len() < 1300, "mutation {seed}: {message}");
            }
        }
    }
    println!("{mutations} mutations: {valid} valid, {} refused", mutations - valid);
    assert!(valid > 0 && valid < mutations, "mutations that all end alike test nothing");
}

/// Opens and reads everything, and returns the first refusal.
fn check(bytes: &[u8]) -> Result<(), Error> {
    let copy = bytes.to_vec();
    let begun = Instant::now();
    MEMORY.reset();
    let read = read(copy);
    let found = MEMORY.since_reset();
    let limit = 2 * bytes.len() + FIXED_BYTES;
    assert!(found.largest <= limit, "{} bytes at once for a file of {}", found.largest, bytes.len());
    // Descriptions of the smallest tensors, their names, and an index of these.
    assert!(found.peak <= 4 * limit, "{} bytes at a time for a file of {}", found.peak, bytes.len());
    assert!(begun.elapsed() < Duration::from_secs(10), "a hang");
    read
}

fn read(bytes: Vec<u8>) -> Result<(), Error> {
    let reader = Reader::of_bytes("memory.gguf", bytes)?;
    reader.vocabulary()?;
    for info in reader.tensors() {
        reader.read_tensor(&info.name)?;
    }
    Ok(())
}

/// Sound files for a fuzzer to begin with.
fn write_seeds(directory: &Path, small: &[u8]) {
    std::fs::write(directory.join("model"), small).unwrap();
    let mut imatrix = Imatrix::default();
    imatrix.datasets.push("d".to_owned());
    imatrix.add("blk.0.attn_q.weight", &[1.0, 2.0], 3.0).unwrap();
    imatrix.write(&directory.join("imatrix")).unwrap();
}

fn small_model() -> Vec<u8> {
    let mut header = Header::new();
    header.set("general.architecture", "llama");
    header.set("llama.block_count", 1u32);
    header.set("llama.rope.freq_base", 10_000f32);
    header.set("tokenizer.ggml.model", "gpt2");
    header.set("tokenizer.ggml.tokens", vec!["a".to_owned(), "b".to_owned(), "<|end|>".to_owned()]);
    header.set("tokenizer.ggml.token_type", vec![1, 1, 3]);
    header.set("tokenizer.ggml.merges", vec!["a b".to_owned()]);
    header.set("tokenizer.ggml.eos_token_id", 2u32);
    header.set("tokenizer.ggml.add_bos_token", false);
    let tensors = [
        ("output_norm.weight", vec![3], BlockType::F32),
        ("token_embd.weight", vec![3, 32], BlockType::F16),
        ("blk.0.attn_q.weight", vec![2, 64], BlockType::Q4_0),
        ("blk.0.ffn_down.weight", vec![1, 256], BlockType::Q2_K),
    ];
    for (name, shape, ty) in &tensors {
        header.add_tensor(name, shape, *ty).unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("small.gguf");
    let mut writer = Writer::create(&path, header).unwrap();
    for (name, shape, ty) in &tensors {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i as f32 * 0.7).sin()).collect();
        writer.write_tensor(name, &quantize(*ty, &values).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    // A file may end without the padding of its last tensor; then every truncation takes something away.
    bytes.truncate(bytes.len() - (96 - BlockType::Q2_K.block_bytes()));
    bytes
}

/// A header with one array, of which `filler` bytes are there.
fn array(ty: u32, count: u64, filler: usize) -> Vec<u8> {
    let mut bytes = start(0, 1);
    bytes.extend(1u64.to_le_bytes());
    bytes.push(b'k');
    bytes.extend(9u32.to_le_bytes());
    bytes.extend(ty.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes.resize(bytes.len() + filler, 0);
    bytes
}

fn start(tensors: i64, keys: i64) -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(keys.to_le_bytes());
    bytes
}

/// Headers whose counts and lengths promise more than the file holds.
fn lying_headers() -> Vec<Vec<u8>> {
    let mut all = vec![start(65_536, 0), start(0, 4096), start(i64::MAX, i64::MAX)];
    for ty in 0..13 {
        for count in [1u64 << 20, 15_999_999, 1 << 40, u64::MAX] {
            all.extend([0, 100_000].map(|filler| array(ty, count, filler)));
        }
    }
    // Nothing but empty strings, a long one that lets memory double, and nothing but the smallest tensors.
    all.push(array(8, 20_000, 8 * 20_000 - 1));
    let mut doubling = array(8, 2, 0);
    for bytes in [1u64 << 16, 1] {
        doubling.extend(bytes.to_le_bytes());
        doubling.resize(doubling.len() + bytes as usize, b'a');
    }
    all.push(doubling);
    let mut tensors = start(20_001, 0);
    for i in 0..20_000u64 {
        let name = format!("{i:x}");
        tensors.extend((name.len() as u64).to_le_bytes());
        tensors.extend(name.as_bytes());
        tensors.extend(1u32.to_le_bytes());
        tensors.extend(1u64.to_le_bytes());
        tensors.extend(24u32.to_le_bytes());
        tensors.extend((32 * i).to_le_bytes());
    }
    all.push(tensors);
    all
}

fn mutated(sound: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len().max(1));
        match random.below(8) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at.min(bytes.len()), random.next() as u8),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            3 => {
                let numbers = [0, 1, 0x7f, 0xff, 1 << 31, u64::MAX, i64::MAX as u64, 1 << 61, 33];
                let number = numbers[random.below(numbers.len())].to_le_bytes();
                bytes.iter_mut().skip(at).zip(number).for_each(|(byte, new)| *byte = new);
            }
            4 => {
                let from = random.below(bytes.len().max(1));
                let some: Vec<u8> = bytes.iter().skip(from).take(random.below(40)).copied().collect();
                let at = at.min(bytes.len());
                bytes.splice(at..at, some);
            }
            _ if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            _ => {}
        }
    }
    bytes
}

/// Xorshift: the same mutations on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n
    }
}

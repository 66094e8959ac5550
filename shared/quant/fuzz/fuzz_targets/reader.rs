//! Any bytes as a GGUF file: whatever opens is read to its last byte, and every value of it is finite.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quant::gguf::Reader;

fuzz_target!(|bytes: &[u8]| {
    let Ok(reader) = Reader::of_bytes("fuzz.gguf", bytes.to_vec()) else { return };
    let _ = reader.vocabulary();
    for info in reader.tensors() {
        assert!(info.bytes <= bytes.len() as u64);
        if let Ok(values) = reader.read_values(&info.name) {
            assert!(values.len() == info.elements() && values.iter().all(|value| value.is_finite()));
        }
    }
});

//! Any bytes as an importance matrix: what is accepted is finite and not negative.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quant::Imatrix;

fuzz_target!(|bytes: &[u8]| {
    let Ok(imatrix) = Imatrix::of_bytes("fuzz.gguf", bytes.to_vec()) else { return };
    for (name, columns) in imatrix.matrices() {
        let importance = imatrix.columns(name).expect("it is listed");
        assert!(importance.len() == columns && importance.iter().all(|v| *v >= 0.0));
    }
});

//! Any bytes as a tensor frame: an accepted header is the encoding of what it says, an accepted payload is finite.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wire::{FrameHeader, HEADER_BYTES, PayloadBuffer};

fuzz_target!(|bytes: &[u8]| {
    let Some((header, payload)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(decoded) = FrameHeader::decode(header) else { return };
    assert_eq!(decoded.tensor.encode(decoded.payload_crc32c), *header);
    // Whoever waits for a tensor knows its size; here that is what the input holds.
    if decoded.payload_bytes != payload.len() as u64 {
        return;
    }
    let mut buffer = PayloadBuffer::new(&decoded);
    buffer.bytes_mut().copy_from_slice(payload);
    if let Ok(values) = buffer.into_values(&decoded) {
        assert!(values.len() == decoded.tensor.shape.elements() && values.iter().all(|value| value.is_finite()));
    }
});

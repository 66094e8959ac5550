//! A tensor's values as the bytes of a frame's payload, and back.
//!
//! In f32 neither direction copies: the values' own memory is what is written and what is read into. Values that are not finite are refused
//! in both directions, so that no peer's weights can be poisoned by one.

use std::borrow::Cow;

use half::{bf16, f16, slice::HalfFloatSliceExt};

use crate::{DType, FrameError, FrameHeader, TensorHeader, limits};

#[cfg(target_endian = "big")]
compile_error!("payloads are little-endian, and are read and written without a copy");

/// The bytes of a payload that is about to be sent.
pub struct Payload<'a> {
    bytes: Cow<'a, [u8]>,
    pub crc32c: u32,
}

impl<'a> Payload<'a> {
    /// The payload of `values` under `header`.
    pub fn new(header: &TensorHeader, values: &'a [f32]) -> Result<Self, FrameError> {
        let expected = header.shape.elements();
        if values.len() != expected {
            return Err(FrameError::Values { found: values.len(), expected });
        }
        if let Some(index) = first_not_finite(values) {
            return Err(FrameError::NotFinite { index });
        }
        let bytes = match header.dtype {
            DType::F32 => Cow::Borrowed(bytemuck::cast_slice(values)),
            DType::F16 => {
                let mut halves = vec![f16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                // Above 65,504 a finite f32 becomes an infinite f16.
                if let Some(index) = halves.iter().position(|value| !value.is_finite()) {
                    return Err(FrameError::NotFinite { index });
                }
                Cow::Owned(bytemuck::cast_slice(&halves).to_vec())
            }
            DType::Bf16 => {
                let mut halves = vec![bf16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                if let Some(index) = halves.iter().position(|value| !value.is_finite()) {
                    return Err(FrameError::NotFinite { index });
                }
                Cow::Owned(bytemuck::cast_slice(&halves).to_vec())
            }
        };
        let crc32c = crc32c::crc32c(&bytes);
        Ok(Self { bytes, crc32c })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Memory for a payload that is about to arrive, taken only once its header has been accepted.
pub enum PayloadBuffer {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl PayloadBuffer {
    pub fn new(header: &FrameHeader) -> Self {
        let elements = header.tensor.shape.elements();
        match header.tensor.dtype {
            DType::F32 => Self::F32(vec![0.0; elements]),
            DType::F16 => Self::F16(vec![f16::ZERO; elements]),
            DType::Bf16 => Self::Bf16(vec![bf16::ZERO; elements]),
        }
    }

    /// Where the payload's bytes go: exactly as many as the header states.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::F32(values) => bytemuck::cast_slice_mut(values),
            Self::F16(values) => bytemuck::cast_slice_mut(values),
            Self::Bf16(values) => bytemuck::cast_slice_mut(values),
        }
    }

    /// The values, after their checksum and their finiteness have been checked.
    pub fn into_values(mut self, header: &FrameHeader) -> Result<Vec<f32>, FrameError> {
        let found = crc32c::crc32c(self.bytes_mut());
        if found != header.payload_crc32c {
            return Err(FrameError::Checksum { found, expected: header.payload_crc32c });
        }
        let values = match self {
            Self::F32(values) => values,
            Self::F16(halves) => halves.to_f32_vec(),
            Self::Bf16(halves) => halves.to_f32_vec(),
        };
        match first_not_finite(&values) {
            Some(index) => Err(FrameError::NotFinite { index }),
            None => Ok(values),
        }
    }
}

/// Place of the first value that is NaN, infinite, or above [`limits::VALUE_MAX`] in magnitude.
pub fn first_not_finite(values: &[f32]) -> Option<usize> {
    // A fold over a chunk is branch-free and fast; only a chunk that holds an offender is searched. Without their signs, bits of floats
    // are in the order of what they mean, NaN behind infinity.
    const CHUNK: usize = 256;
    const MAGNITUDE: u32 = 0x7fff_ffff;
    let is_clean = |value: &f32| value.to_bits() & MAGNITUDE <= limits::VALUE_MAX.to_bits();
    let clean = |chunk: &[f32]| chunk.iter().fold(true, |clean, value| clean & is_clean(value));
    let chunk = values.chunks(CHUNK).position(|chunk| !clean(chunk))?;
    let start = chunk * CHUNK;
    values[start..].iter().position(|value| !is_clean(value)).map(|index| start + index)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{FrameKind, Shape};

    fn header(dtype: DType, values: usize) -> TensorHeader {
        let shape = Shape::new(&[values as u32]).unwrap();
        TensorHeader { kind: FrameKind::Activations, dtype, session: 0, round: 0, step: 0, micro: 0, shape }
    }

    /// What arrives when `values` are sent in `dtype`.
    fn carried(dtype: DType, values: &[f32]) -> Result<Vec<f32>, FrameError> {
        let header = header(dtype, values.len());
        let payload = Payload::new(&header, values)?;
        let frame = FrameHeader::decode(&header.encode(payload.crc32c))?;
        let mut buffer = PayloadBuffer::new(&frame);
        buffer.bytes_mut().copy_from_slice(payload.bytes());
        buffer.into_values(&frame)
    }

    #[test]
    fn f32_is_sent_from_its_own_memory() {
        let values = [1.0, -2.5, 3.25];
        let payload = Payload::new(&header(DType::F32, 3), &values).unwrap();
        assert_eq!(payload.bytes().as_ptr(), values.as_ptr().cast());
        assert_eq!(payload.bytes()[4..8], (-2.5f32).to_le_bytes());
    }

    #[test]
    fn first_value_that_is_not_finite_is_named() {
        let mut values = vec![1.0f32; 1000];
        assert_eq!(first_not_finite(&values), None);
        values[999] = f32::INFINITY;
        assert_eq!(first_not_finite(&values), Some(999));
        values[300] = f32::NAN;
        assert_eq!(first_not_finite(&values), Some(300));
        assert_eq!(carried(DType::F32, &values), Err(FrameError::NotFinite { index: 300 }));
        values[0] = f32::NEG_INFINITY;
        assert_eq!(first_not_finite(&values), Some(0));
        assert_eq!(first_not_finite(&[limits::VALUE_MAX, f32::MIN_POSITIVE / 2.0, -0.0]), None);
        assert_eq!(first_not_finite(&[0.0, -limits::VALUE_MAX * 1.0001]), Some(1));
    }

    #[test]
    fn value_too_large_for_f16_is_not_sent() {
        assert_eq!(carried(DType::F16, &[1.0, 70_000.0]), Err(FrameError::NotFinite { index: 1 }));
        assert_eq!(carried(DType::Bf16, &[f32::MAX]), Err(FrameError::NotFinite { index: 0 }));
        assert!(carried(DType::Bf16, &[70_000.0]).is_ok());
    }

    #[test]
    fn hostile_payload_is_refused() {
        let expected = header(DType::F32, 2);
        let nan: Vec<u8> = [1.0, f32::NAN].iter().flat_map(|value: &f32| value.to_le_bytes()).collect();
        let check = |crc: u32, refused: FrameError| {
            let frame = FrameHeader::decode(&expected.encode(crc)).unwrap();
            let mut buffer = PayloadBuffer::new(&frame);
            buffer.bytes_mut().copy_from_slice(&nan);
            assert_eq!(buffer.into_values(&frame).unwrap_err(), refused);
        };
        let crc = crc32c::crc32c(&nan);
        check(crc, FrameError::NotFinite { index: 1 });
        check(crc ^ 1, FrameError::Checksum { found: crc, expected: crc ^ 1 });
    }

    #[test]
    fn number_of_values_must_fit_the_shape() {
        let error = Payload::new(&header(DType::F32, 3), &[0.0; 2]).err();
        assert_eq!(error, Some(FrameError::Values { found: 2, expected: 3 }));
    }

    proptest! {
        #[test]
        fn f32_arrives_bit_for_bit(values in proptest::collection::vec(any::<f32>(), 1..700)) {
            match carried(DType::F32, &values) {
                Ok(arrived) => prop_assert_eq!(bytemuck::cast_slice::<f32, u32>(&arrived), bytemuck::cast_slice::<f32, u32>(&values)),
                Err(error) => {
                    let index = values.iter().position(|value| !value.is_finite() || value.abs() > limits::VALUE_MAX).unwrap();
                    prop_assert_eq!(error, FrameError::NotFinite { index });
                }
            }
        }

        #[test]
        fn halves_are_within_their_rounding(values in proptest::collection::vec(-1000.0f32..1000.0, 1..300)) {
            for (dtype, relative) in [(DType::F16, 2f32.powi(-11)), (DType::Bf16, 2f32.powi(-8))] {
                for (arrived, sent) in carried(dtype, &values).unwrap().iter().zip(&values) {
                    // Below the smallest normal f16 the spacing no longer shrinks.
                    prop_assert!((arrived - sent).abs() <= relative * sent.abs() + 2f32.powi(-25), "{} became {}", sent, arrived);
                }
            }
        }
    }
}

//! The 64-byte header of a tensor frame, and the shape it states.
//!
//! A header is decoded before any memory is taken for the payload that follows it, and a decoded header has been checked against itself: its
//! payload length is its shape times its dtype. Whether it is the frame that was waited for, [`TensorHeader::check_expected`] decides. This
//! file does no input or output and never sees a payload.

use crate::{DType, limits};

/// Length of an encoded header. The payload begins here, so that it is aligned to 64 bytes within the frame.
pub const HEADER_BYTES: usize = 64;

const MAGIC: [u8; 4] = *b"HWTF";
const VERSION: u8 = 1;

/// What a tensor is, and where in the run it belongs. The sender describes a tensor with it; the receiver states with it what it waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorHeader {
    pub kind: FrameKind,
    pub dtype: DType,
    pub session: u64,
    pub round: u32,
    /// Optimizer step; 0 for adapters and channel sums.
    pub step: u64,
    /// Micro-batch within the step; for adapters and channel sums, the tensor's place in its listing.
    pub micro: u32,
    pub shape: Shape,
}

/// A header as it came: what the tensor is, how it is coded, and what its payload must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    pub tensor: TensorHeader,
    pub codec: u8,
    pub payload_bytes: u64,
    pub payload_crc32c: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Output of the head (to the coordinator) or of the body (back).
    Activations = 0,
    /// Gradient at the tail's cut (to the coordinator) or at the head's (back).
    CutGradient = 1,
    /// One factor of an adapter.
    Adapter = 2,
    /// Sums of squares, one for every channel of one input.
    ChannelSums = 3,
}

/// One to four dimensions, none of them 0, whose product fits the protocol.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    dims: [u32; limits::DIMS_MAX],
    ndim: u8,
}

/// Why a header was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("the frame begins with {found:02x?} instead of {MAGIC:02x?}")]
    Magic { found: [u8; 4] },
    #[error("the frame's {field} is {found}, which this version does not know")]
    Unknown { field: &'static str, found: u8 },
    #[error("the shape that begins with {found:?} has {ndim} dimensions, none may be 0 and the rest must be")]
    Shape { found: Vec<u32>, ndim: usize },
    #[error("reserved bytes of the header are not 0")]
    Reserved,
    #[error("the payload has {found} bytes, its shape and dtype need {expected}")]
    PayloadLength { found: u64, expected: u64 },
    #[error("a tensor of {found} bytes exceeds the limit of {limit}")]
    TooLarge { found: u64, limit: u64 },
    #[error("the frame's {field} is {found}, expected {expected}")]
    Expected { field: &'static str, found: String, expected: String },
    #[error("the payload's checksum is {found:08x}, the header says {expected:08x}")]
    Checksum { found: u32, expected: u32 },
    #[error("value {index} of the tensor is not finite, or above {:e} in magnitude", limits::VALUE_MAX)]
    NotFinite { index: usize },
    #[error("the tensor has {found} values, its shape needs {expected}")]
    Values { found: usize, expected: usize },
}

impl TensorHeader {
    /// Bytes of the payload in the plain codec.
    pub fn payload_bytes(&self) -> u64 {
        // A shape's product is at most 2^28 and a dtype has at most 4 bytes.
        self.shape.elements() as u64 * self.dtype.bytes() as u64
    }

    /// The header for a payload with this checksum.
    pub fn encode(&self, payload_crc32c: u32) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[5] = self.kind as u8;
        bytes[6] = crate::CODEC_PLAIN;
        bytes[7] = self.dtype.code();
        bytes[8..16].copy_from_slice(&self.session.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.step.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.round.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.micro.to_le_bytes());
        for (slot, dim) in bytes[32..48].chunks_exact_mut(4).zip(self.shape.dims) {
            slot.copy_from_slice(&dim.to_le_bytes());
        }
        bytes[48..56].copy_from_slice(&self.payload_bytes().to_le_bytes());
        bytes[56..60].copy_from_slice(&payload_crc32c.to_le_bytes());
        bytes[60] = self.shape.ndim;
        bytes
    }

    /// Refuses a header that is not this one, naming the first field that differs.
    pub fn check_expected(&self, found: &TensorHeader) -> Result<(), FrameError> {
        check_field(
            "kind",
            &format_args!("{:?}", found.kind),
            &format_args!("{:?}", self.kind),
            found.kind == self.kind,
        )?;
        check_field("session", &found.session, &self.session, found.session == self.session)?;
        check_field("round", &found.round, &self.round, found.round == self.round)?;
        check_field("step", &found.step, &self.step, found.step == self.step)?;
        check_field("micro-batch", &found.micro, &self.micro, found.micro == self.micro)?;
        check_field("dtype", &found.dtype, &self.dtype, found.dtype == self.dtype)?;
        check_field("shape", &found.shape, &self.shape, found.shape == self.shape)
    }
}

impl FrameHeader {
    /// The header in `bytes`, checked against itself and against the protocol's limits.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let magic = field(bytes, 0);
        if magic != MAGIC {
            return Err(FrameError::Magic { found: magic });
        }
        let [version, kind, codec, dtype] = field(bytes, 4);
        if version != VERSION {
            return Err(FrameError::Unknown { field: "version", found: version });
        }
        if codec != crate::CODEC_PLAIN {
            return Err(FrameError::Unknown { field: "codec", found: codec });
        }
        let kind = FrameKind::from_code(kind).ok_or(FrameError::Unknown { field: "kind", found: kind })?;
        let dtype = DType::from_code(dtype).ok_or(FrameError::Unknown { field: "dtype", found: dtype })?;
        let ndim = usize::from(bytes[60]);
        let dims: [u32; limits::DIMS_MAX] = std::array::from_fn(|axis| u32::from_le_bytes(field(bytes, 32 + 4 * axis)));
        if ndim > limits::DIMS_MAX || dims[ndim..].iter().any(|&dim| dim != 0) {
            return Err(FrameError::Shape { found: dims.to_vec(), ndim });
        }
        let shape = Shape::new(&dims[..ndim])?;
        if bytes[61..64] != [0; 3] {
            return Err(FrameError::Reserved);
        }
        let tensor = TensorHeader {
            kind,
            dtype,
            session: u64::from_le_bytes(field(bytes, 8)),
            round: u32::from_le_bytes(field(bytes, 24)),
            step: u64::from_le_bytes(field(bytes, 16)),
            micro: u32::from_le_bytes(field(bytes, 28)),
            shape,
        };
        let payload_bytes = u64::from_le_bytes(field(bytes, 48));
        if payload_bytes != tensor.payload_bytes() {
            return Err(FrameError::PayloadLength { found: payload_bytes, expected: tensor.payload_bytes() });
        }
        Ok(Self { tensor, codec, payload_bytes, payload_crc32c: u32::from_le_bytes(field(bytes, 56)) })
    }
}

impl FrameKind {
    fn from_code(code: u8) -> Option<Self> {
        [Self::Activations, Self::CutGradient, Self::Adapter, Self::ChannelSums]
            .into_iter()
            .find(|&kind| kind as u8 == code)
    }
}

impl Shape {
    pub fn new(dims: &[u32]) -> Result<Self, FrameError> {
        let refused =
            || FrameError::Shape { found: dims[..dims.len().min(limits::DIMS_MAX)].to_vec(), ndim: dims.len() };
        if dims.is_empty() || dims.len() > limits::DIMS_MAX || dims.contains(&0) {
            return Err(refused());
        }
        // Counted as f32, the widest dtype, so that a shape is valid whatever it is sent in.
        let bytes = dims.iter().try_fold(4u64, |bytes, &dim| bytes.checked_mul(u64::from(dim))).unwrap_or(u64::MAX);
        if bytes > limits::PAYLOAD_BYTES_MAX {
            return Err(FrameError::TooLarge { found: bytes, limit: limits::PAYLOAD_BYTES_MAX });
        }
        let mut padded = [0; limits::DIMS_MAX];
        padded[..dims.len()].copy_from_slice(dims);
        Ok(Self { dims: padded, ndim: dims.len() as u8 })
    }

    pub fn dims(&self) -> &[u32] {
        &self.dims[..usize::from(self.ndim)]
    }

    /// Product of the dimensions.
    pub fn elements(&self) -> usize {
        self.dims().iter().map(|&dim| dim as usize).product()
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.dims().fmt(f)
    }
}

impl TryFrom<&[u32]> for Shape {
    type Error = FrameError;

    fn try_from(dims: &[u32]) -> Result<Self, FrameError> {
        Self::new(dims)
    }
}

fn check_field(
    field: &'static str,
    found: &dyn std::fmt::Debug,
    expected: &dyn std::fmt::Debug,
    same: bool,
) -> Result<(), FrameError> {
    if same {
        return Ok(());
    }
    Err(FrameError::Expected { field, found: format!("{found:?}"), expected: format!("{expected:?}") })
}

fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    std::array::from_fn(|index| bytes[at + index])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> TensorHeader {
        TensorHeader {
            kind: FrameKind::Activations,
            dtype: DType::F32,
            session: 1,
            round: 2,
            step: 3,
            micro: 4,
            shape: Shape::new(&[5, 6]).unwrap(),
        }
    }

    /// Checks that a header with `bytes` at `at` is refused with an error that mentions `complaint`.
    fn check_refused(at: usize, bytes: &[u8], complaint: &str) {
        let mut encoded = header().encode(0);
        encoded[at..at + bytes.len()].copy_from_slice(bytes);
        let error = FrameHeader::decode(&encoded).unwrap_err().to_string();
        assert!(error.contains(complaint), "{error:?} does not mention {complaint:?}");
    }

    #[test]
    fn header_that_contradicts_itself_is_refused() {
        check_refused(0, b"XXXX", "begins with");
        check_refused(4, &[2], "version");
        check_refused(5, &[4], "kind");
        check_refused(6, &[1], "codec");
        check_refused(7, &[3], "dtype");
        check_refused(32, &[6], "its shape and dtype need 144");
        check_refused(32, &[0], "shape");
        check_refused(40, &[1], "shape");
        check_refused(48, &u64::MAX.to_le_bytes(), "payload");
        check_refused(60, &[0], "shape");
        check_refused(60, &[5], "shape");
        check_refused(60, &[255], "shape");
        check_refused(63, &[1], "reserved");
    }

    #[test]
    fn shape_that_overflows_is_refused() {
        let huge = [u32::MAX; 4];
        assert!(matches!(Shape::new(&huge), Err(FrameError::TooLarge { .. })));
        assert!(matches!(Shape::new(&[1 << 16, 1 << 10, 2]), Err(FrameError::TooLarge { found: 0x2000_0000, .. })));
        assert_eq!(Shape::new(&[1 << 16, 1 << 10]).unwrap().elements(), 1 << 26);
        assert!(Shape::new(&[]).is_err());
        assert!(Shape::new(&[1; 5]).is_err());
    }

    #[test]
    fn unexpected_header_is_refused_by_its_first_wrong_field() {
        let expected = header();
        let check = |found: TensorHeader, field: &str| {
            let error = expected.check_expected(&found).unwrap_err();
            assert!(matches!(&error, FrameError::Expected { field: wrong, .. } if *wrong == field), "{error}");
        };
        assert_eq!(expected.check_expected(&header()), Ok(()));
        check(TensorHeader { kind: FrameKind::CutGradient, ..header() }, "kind");
        check(TensorHeader { session: 9, ..header() }, "session");
        check(TensorHeader { round: 9, ..header() }, "round");
        check(TensorHeader { step: 9, ..header() }, "step");
        check(TensorHeader { micro: 9, ..header() }, "micro-batch");
        check(TensorHeader { dtype: DType::F16, ..header() }, "dtype");
        check(TensorHeader { shape: Shape::new(&[6, 5]).unwrap(), ..header() }, "shape");
        check(TensorHeader { shape: Shape::new(&[30]).unwrap(), ..header() }, "shape");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), HEADER_BYTES)) {
            let _ = FrameHeader::decode(&bytes.try_into().unwrap());
        }

        #[test]
        fn bytes_after_the_magic_decode_to_what_they_came_from(
            tail in proptest::collection::vec(0u8..4, HEADER_BYTES - 8), kind in 0u8..4, dtype in 0u8..3,
        ) {
            let bytes: [u8; HEADER_BYTES] =
                [&MAGIC[..], &[VERSION, kind, 0, dtype], &tail].concat().try_into().unwrap();
            if let Ok(header) = FrameHeader::decode(&bytes) {
                prop_assert_eq!(header.tensor.encode(header.payload_crc32c), bytes);
            }
        }

        #[test]
        fn headers_round_trip(
            session: u64, round: u32, step: u64, micro: u32, crc: u32, kind in 0u8..4, dtype in 0u8..3,
            dims in proptest::collection::vec(1u32..90, 1..=4),
        ) {
            let tensor = TensorHeader {
                kind: FrameKind::from_code(kind).unwrap(),
                dtype: DType::from_code(dtype).unwrap(),
                session, round, step, micro,
                shape: Shape::new(&dims).unwrap(),
            };
            let decoded = FrameHeader::decode(&tensor.encode(crc)).unwrap();
            prop_assert_eq!(decoded.tensor, tensor);
            prop_assert_eq!(decoded.payload_crc32c, crc);
        }
    }
}

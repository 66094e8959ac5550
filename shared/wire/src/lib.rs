//! What crosses the network, as bytes: typed messages, tensor frames, their limits and the close codes.
//!
//! Nothing here opens a socket, waits or knows a tensor library: every function turns bytes into checked values or back. PROTOCOL.md is the
//! specification; start from [`Request`], [`FromParticipant`] and [`FromCoordinator`] for messages and from [`TensorHeader`] for frames.

mod close;
mod codec;
mod frame;
#[cfg(test)]
mod golden;
pub mod limits;
mod message;
mod payload;
mod shown;

pub use close::{CloseCode, ProtocolError};
pub use codec::{CodecError, Message, decode, encode};
pub use frame::{FrameError, FrameHeader, FrameKind, HEADER_BYTES, Shape, TensorHeader};
pub use message::{
    AdapterListing, BlobHeader, BlobRef, Commit, DType, Enrolled, FromCoordinator, FromParticipant, MessageKind,
    Outcome, Purpose, RefusalReason, Request, SquaredNorms, TensorInfo, UpdateReply,
};
pub use payload::{Payload, PayloadBuffer, first_not_finite};

/// The checksum of payloads: CRC-32C (Castagnoli).
pub use crc32c::crc32c;

/// Name and major version of the protocol, as TLS negotiates it.
pub const ALPN: &[u8] = b"headwater/1";

/// Minor version: both sides speak the smaller of the two.
pub const MINOR: u16 = 3;

/// The first minor version in which a certificate is renewed over the live connection.
pub const RENEWING_MINOR: u16 = 2;

/// The first minor version that measures for an importance matrix.
pub const MEASURING_MINOR: u16 = 3;

/// The only payload codec so far: values in the header's dtype, one after the other.
pub const CODEC_PLAIN: u8 = 0;

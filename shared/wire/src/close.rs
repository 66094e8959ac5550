//! Which error closes a connection with which code, and whose fault it is: the only such table.

use crate::{CodecError, FrameError};

/// What went wrong in the conversation itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    #[error(transparent)]
    Message(#[from] CodecError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("{found} came where {expected} was due")]
    Unexpected { expected: &'static str, found: String },
    #[error("the stream ended {missing} bytes before the end of {what}")]
    Truncated { what: &'static str, missing: u64 },
    #[error("a certificate of {found} came where {expected} was due")]
    Role { expected: &'static str, found: String },
    #[error("nothing moved for {waited_ms} ms while {what} was due")]
    TooSlow { what: &'static str, waited_ms: u64 },
}

/// Application error codes of QUIC, for closing connections and for resetting streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum CloseCode {
    /// The run is over, or the connection has served its purpose.
    Done = 0x00,
    /// The closer shuts down or leaves; the run goes on.
    GoingAway = 0x01,
    /// The closer failed by itself.
    Internal = 0x02,
    /// This step, round or stream is no longer wanted; the connection stays.
    Stale = 0x03,
    /// A message that does not decode.
    MalformedMessage = 0x10,
    /// A tensor frame that does not decode, or whose checksum differs.
    MalformedFrame = 0x11,
    /// A message or frame that was not due.
    Unexpected = 0x12,
    /// A message, frame or count above its limit.
    OverLimit = 0x13,
    /// A tensor with NaN or infinite values.
    NotFinite = 0x14,
    /// Nothing moved for too long while the other side waited.
    TooSlow = 0x15,
    /// No common version, dtype or codec.
    Incompatible = 0x20,
    /// The experiments differ.
    ExperimentDiffers = 0x21,
    /// The certificate's role may not do this, or its participant is not a member.
    NotAuthorized = 0x30,
    /// The same device has connected again, and goes on there.
    Superseded = 0x31,
    /// The coordinator no longer counts the peer's certificate.
    Revoked = 0x32,
    /// The coordinator serves as many connections as it will.
    NoRoom = 0x40,
}

impl CloseCode {
    pub const ALL: [Self; 16] = [
        Self::Done,
        Self::GoingAway,
        Self::Internal,
        Self::Stale,
        Self::MalformedMessage,
        Self::MalformedFrame,
        Self::Unexpected,
        Self::OverLimit,
        Self::NotFinite,
        Self::TooSlow,
        Self::Incompatible,
        Self::ExperimentDiffers,
        Self::NotAuthorized,
        Self::Superseded,
        Self::Revoked,
        Self::NoRoom,
    ];

    pub fn code(self) -> u32 {
        self as u32
    }

    pub fn from_code(code: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|known| u64::from(known.code()) == code)
    }

    /// Whether connecting again, unchanged, may help.
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::GoingAway | Self::Internal | Self::TooSlow | Self::NoRoom)
    }
}

impl ProtocolError {
    /// The code with which the side that notices closes the connection.
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::Message(CodecError::TooLong { .. } | CodecError::OverLimit { .. }) => CloseCode::OverLimit,
            Self::Message(CodecError::LeftOver { .. } | CodecError::Malformed { .. }) => CloseCode::MalformedMessage,
            Self::Frame(error) => match error {
                FrameError::TooLarge { .. } => CloseCode::OverLimit,
                FrameError::NotFinite { .. } => CloseCode::NotFinite,
                FrameError::Expected { .. } => CloseCode::Unexpected,
                FrameError::Magic { .. }
                | FrameError::Unknown { .. }
                | FrameError::Shape { .. }
                | FrameError::Reserved
                | FrameError::PayloadLength { .. }
                | FrameError::Checksum { .. }
                | FrameError::Values { .. } => CloseCode::MalformedFrame,
            },
            Self::Unexpected { .. } => CloseCode::Unexpected,
            Self::Truncated { .. } => CloseCode::MalformedMessage,
            Self::Role { .. } => CloseCode::NotAuthorized,
            Self::TooSlow { .. } => CloseCode::TooSlow,
        }
    }
}

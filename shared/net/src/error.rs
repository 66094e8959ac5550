//! Why talking to a peer failed, and who has to do something about it.

use quinn::{ConnectionError, ReadError, WriteError};
use wire::{CloseCode, ProtocolError};

use crate::identity::IdentityError;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetError {
    /// The peer's fault: close its connection with [`NetError::close_code`].
    #[error("{peer} misbehaved: {error}")]
    PeerMisbehaved { peer: String, error: ProtocolError },
    /// The peer's certificate is not one that this side may believe.
    #[error("the peer is not who it should be: {reason}")]
    PeerUntrusted { reason: String },
    /// The peer does not believe this side's certificate: it has expired, was revoked, or belongs to another coordinator.
    #[error("the peer refused our certificate: {reason}")]
    PeerRefused { reason: String },
    /// The two programs have no version in common.
    #[error("the peer is incompatible: {reason}")]
    Incompatible { reason: String },
    /// This side's fault: an address, a certificate or a limit in its own configuration.
    #[error("{reason}")]
    Misconfigured { reason: String },
    /// This side's fault: a value that the protocol does not allow. Nothing of it has been sent.
    #[error("not sent: {error}")]
    Unsendable { error: ProtocolError },
    /// The network, or a peer that has vanished.
    #[error("there is no connection: {reason}")]
    Lost { reason: String, retryable: bool },
    /// The peer closed the connection in its own words. `code` is absent where this version does not know `number`.
    #[error("the peer closed the connection with code {number:#x}: {reason}")]
    Closed { code: Option<CloseCode>, number: u64, reason: String },
    /// The peer gave up this one stream; the connection lives.
    #[error("the peer gave up the stream with code {number:#x}")]
    Reset { code: Option<CloseCode>, number: u64 },
}

impl NetError {
    /// Whether connecting again, unchanged, may help.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Lost { retryable, .. } => *retryable,
            Self::Closed { code, .. } => code.is_some_and(CloseCode::is_retryable),
            // Nothing was wrong with what it said, only with the way it came.
            Self::PeerMisbehaved { error: ProtocolError::TooSlow { .. }, .. } => true,
            _ => false,
        }
    }

    /// The code with which this side closes the connection after the error.
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::PeerMisbehaved { error, .. } => error.close_code(),
            Self::PeerUntrusted { .. } => CloseCode::NotAuthorized,
            Self::Incompatible { .. } => CloseCode::Incompatible,
            Self::Misconfigured { .. } | Self::Unsendable { .. } => CloseCode::Internal,
            Self::PeerRefused { .. } | Self::Lost { .. } | Self::Closed { .. } | Self::Reset { .. } => {
                CloseCode::GoingAway
            }
        }
    }

    pub(crate) fn closed(number: u64, reason: String) -> Self {
        Self::Closed { code: CloseCode::from_code(number), number, reason }
    }

    pub(crate) fn reset(number: u64) -> Self {
        Self::Reset { code: CloseCode::from_code(number), number }
    }

    pub(crate) fn closed_here() -> Self {
        Self::Lost { reason: "this side has closed it".into(), retryable: false }
    }
}

impl From<IdentityError> for NetError {
    fn from(error: IdentityError) -> Self {
        Self::Misconfigured { reason: error.to_string() }
    }
}

impl From<ConnectionError> for NetError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => {
                Self::closed(close.error_code.into_inner(), String::from_utf8_lossy(&close.reason).into_owned())
            }
            // What the peer's TLS has said about us.
            ConnectionError::ConnectionClosed(close) => match tls_alert(u64::from(close.error_code)) {
                Some(NO_APPLICATION_PROTOCOL | PROTOCOL_VERSION) => {
                    Self::Incompatible { reason: close.error_code.to_string() }
                }
                Some(alert) => Self::PeerRefused { reason: refusal(alert, &close.error_code.to_string()) },
                None => Self::Lost { reason: close.to_string(), retryable: true },
            },
            // What our TLS says about the peer.
            ConnectionError::TransportError(error) => match tls_alert(u64::from(error.code)) {
                Some(NO_APPLICATION_PROTOCOL | PROTOCOL_VERSION) => Self::Incompatible { reason: error.to_string() },
                Some(_) => Self::PeerUntrusted { reason: error.to_string() },
                None => Self::Lost { reason: error.to_string(), retryable: true },
            },
            ConnectionError::VersionMismatch => {
                Self::Incompatible { reason: "it speaks another version of QUIC".into() }
            }
            ConnectionError::Reset => Self::Lost { reason: "the peer has restarted".into(), retryable: true },
            ConnectionError::TimedOut => Self::Lost { reason: "the peer has gone silent".into(), retryable: true },
            ConnectionError::LocallyClosed => Self::closed_here(),
            ConnectionError::CidsExhausted => {
                Self::Lost { reason: "connection ids are exhausted".into(), retryable: false }
            }
        }
    }
}

impl From<ReadError> for NetError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => Self::reset(code.into_inner()),
            ReadError::ConnectionLost(error) => error.into(),
            ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
                Self::Lost { reason: error.to_string(), retryable: false }
            }
        }
    }
}

impl From<WriteError> for NetError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => Self::reset(code.into_inner()),
            WriteError::ConnectionLost(error) => error.into(),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => {
                Self::Lost { reason: error.to_string(), retryable: false }
            }
        }
    }
}

/// TLS alerts (RFC 8446, section 6) that are about programs rather than people.
const PROTOCOL_VERSION: u8 = 70;
const NO_APPLICATION_PROTOCOL: u8 = 120;

const CERTIFICATE_REVOKED: u8 = 44;
const CERTIFICATE_EXPIRED: u8 = 45;

/// What an alert means for the person whose certificate it is about, and what to do.
fn refusal(alert: u8, otherwise: &str) -> String {
    match alert {
        CERTIFICATE_REVOKED => "it has been revoked; ask the coordinator for a new invitation".into(),
        CERTIFICATE_EXPIRED => {
            "it has expired or is not valid yet; check this device's clock, or ask the coordinator for a new invitation"
                .into()
        }
        _ => format!("{otherwise}; ask the coordinator for a new invitation"),
    }
}

/// The TLS alert within a QUIC transport error code (RFC 9001, section 4.8).
fn tls_alert(code: u64) -> Option<u8> {
    code.checked_sub(0x100).and_then(|alert| u8::try_from(alert).ok())
}

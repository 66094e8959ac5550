//! Peers, connections and streams: QUIC with TLS 1.3 on both sides, or the same in memory for tests.
//!
//! This crate knows who a peer is (from its certificate, never from a message) and what crossed the network (the byte ledger). It knows
//! nothing of rounds, steps or tensors beyond their headers. A coordinator starts from [`Listener`], a participant from [`Dialer`]; both get
//! a [`Connection`].

mod address;
mod authority;
mod config;
mod connection;
mod datagrams;
mod endpoint;
mod error;
mod gate;
mod identity;
mod invitation;
mod ledger;
mod memory;
mod overhead;
mod reset;
mod stream;
mod watched;

pub use address::check_address;
pub use authority::{Authority, DeviceKey, Root};
pub use config::{Congestion, Transport, TransportLimits};
pub use connection::{Connection, StreamKind};
pub use datagrams::{Datagrams, Weather};
pub use endpoint::{Dialer, Listener};
pub use error::NetError;
pub use gate::{Everyone, Gate};
pub use identity::{Identity, IdentityError, PeerIdentity, PeerName, certified_key, certified_key_der};
pub use invitation::{Invitation, InvitationError, InvitationFile};
pub use ledger::LedgerSnapshot;
pub use memory::{Cable, Network, Side, Tap};
pub use overhead::{DirectionStats, TransportStats};
pub use stream::{RecvStream, SendStream};
pub use watched::Watched;

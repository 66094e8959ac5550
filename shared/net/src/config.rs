//! The settings of QUIC and TLS: one hardened constructor for each end, and nothing left to the defaults that matters.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use quinn::{
    ClientConfig, IdleTimeout, ServerConfig, TransportConfig, ValidationTokenConfig, VarInt,
    congestion::{BbrConfig, CubicConfig},
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::{
    RootCertStore, client::Resumption, server::NoServerSessionStorage, server::WebPkiClientVerifier, version::TLS13,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Gate, NetError, gate::GatedVerifier, identity::Identity};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// A handshake that has not finished by then is dropped.
pub(crate) const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// A peer that has begun a message or frame must move within this time.
pub(crate) const READ_STALL: Duration = Duration::from_secs(30);
/// A peer must accept some of what is sent to it within this time; longer than [`READ_STALL`], because it may be busy with others.
pub(crate) const WRITE_STALL: Duration = Duration::from_secs(120);
/// Handshakes in progress above which an unvalidated address must first prove that it can receive.
pub(crate) const HANDSHAKES_BEFORE_RETRY: usize = 64;
/// Handshakes in progress above which newcomers are turned away.
pub(crate) const HANDSHAKES_MAX: usize = 1024;

const IDLE: Duration = Duration::from_secs(20);
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// A device that waits says something this often: a coordinator that was started again answers that it does not know it.
const DIALER_KEEP_ALIVE: Duration = Duration::from_secs(2);
/// How long an address may take to show that it can receive.
const RETRY_LIFETIME: Duration = Duration::from_secs(15);
const CRYPTO_BUFFER_BYTES: usize = 16 * KIB as usize;
const SOCKET_BUFFER_BYTES: usize = 4 * MIB as usize;
const SEND_WINDOW_BYTES: u64 = 16 * MIB;
const STREAM_WINDOW_BYTES_MIN: u64 = MIB;
const STREAM_WINDOW_BYTES_MAX: u64 = 4 * MIB;
const CONNECTION_WINDOW_BYTES_MAX: u64 = 16 * MIB;
/// Streams beside the steps': control, an adapter or update, a blob, and one that is just ending.
const STREAMS_BESIDE_STEPS: u32 = 4;

/// How a connection carries an experiment's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transport {
    pub limits: TransportLimits,
    pub congestion: Congestion,
}

/// What sizes the flow-control windows, and so the memory that one peer can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransportLimits {
    /// The largest tensor frame of a step.
    pub tensor_bytes_max: u64,
    /// Micro-batches of one participant that may be under way together.
    pub in_flight: u32,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Congestion {
    #[default]
    Cubic,
    /// For links that lose packets for other reasons than congestion.
    Bbr,
}

impl TransportLimits {
    fn stream_window(&self) -> u64 {
        self.tensor_bytes_max.saturating_mul(2).clamp(STREAM_WINDOW_BYTES_MIN, STREAM_WINDOW_BYTES_MAX)
    }

    fn connection_window(&self) -> u64 {
        let streams = u64::from(self.in_flight.clamp(1, wire::limits::IN_FLIGHT_MAX));
        (streams * self.stream_window() + MIB).min(CONNECTION_WINDOW_BYTES_MAX)
    }

    fn streams(&self) -> u32 {
        self.in_flight.clamp(1, wire::limits::IN_FLIGHT_MAX) + STREAMS_BESIDE_STEPS
    }
}

/// For the coordinator: TLS 1.3 with a client certificate of our own authority, no 0-RTT, no resumption.
pub(crate) fn hardened_listener(
    identity: &Identity,
    transport: &Transport,
    gate: Arc<dyn Gate>,
) -> Result<ServerConfig, NetError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let certificates = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(identity)?), provider.clone())
        .build()
        .map_err(misconfigured)?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(misconfigured)?
        .with_client_cert_verifier(Arc::new(GatedVerifier { certificates, gate }))
        .with_single_cert(identity.chain()?, identity.key()?)
        .map_err(misconfigured)?;
    tls.alpn_protocols = vec![wire::ALPN.to_vec()];
    tls.max_early_data_size = 0;
    // A resumed session would skip the client certificate.
    tls.send_tls13_tickets = 0;
    tls.session_storage = Arc::new(NoServerSessionStorage {});
    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).map_err(misconfigured)?));
    config
        .transport_config(Arc::new(hardened_transport(transport, transport.limits.streams())?))
        .max_incoming(HANDSHAKES_MAX)
        .incoming_buffer_size(64 * KIB)
        .incoming_buffer_size_total(16 * MIB)
        .retry_token_lifetime(RETRY_LIFETIME)
        // A token for the next connection would spare it the proof that it can receive.
        .validation_token_config(no_tokens())
        .migration(true);
    Ok(config)
}

fn no_tokens() -> ValidationTokenConfig {
    let mut config = ValidationTokenConfig::default();
    config.sent(0);
    config
}

/// For a participant: TLS 1.3 that believes our own authority alone, no 0-RTT, no resumption.
pub(crate) fn hardened_dialer(identity: &Identity, transport: &Transport) -> Result<ClientConfig, NetError> {
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(misconfigured)?
        .with_root_certificates(roots(identity)?)
        .with_client_auth_cert(identity.chain()?, identity.key()?)
        .map_err(misconfigured)?;
    tls.alpn_protocols = vec![wire::ALPN.to_vec()];
    tls.enable_early_data = false;
    tls.resumption = Resumption::disabled();
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).map_err(misconfigured)?));
    // Participants open all streams.
    let mut quic = hardened_transport(transport, 0)?;
    quic.keep_alive_interval(Some(DIALER_KEEP_ALIVE));
    config.transport_config(Arc::new(quic));
    Ok(config)
}

fn hardened_transport(transport: &Transport, streams_accepted: u32) -> Result<TransportConfig, NetError> {
    let window = |bytes| VarInt::from_u64(bytes).map_err(misconfigured);
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(streams_accepted.into())
        .max_concurrent_uni_streams(0u32.into())
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE).map_err(misconfigured)?))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .stream_receive_window(window(transport.limits.stream_window())?)
        .receive_window(window(transport.limits.connection_window())?)
        .send_window(SEND_WINDOW_BYTES)
        .datagram_receive_buffer_size(None)
        .datagram_send_buffer_size(0)
        // Handshake bytes that came ahead of others, for which memory is taken before anybody has proved anything.
        .crypto_buffer_size(CRYPTO_BUFFER_BYTES)
        .allow_spin(false);
    match transport.congestion {
        Congestion::Cubic => config.congestion_controller_factory(Arc::new(CubicConfig::default())),
        Congestion::Bbr => config.congestion_controller_factory(Arc::new(BbrConfig::default())),
    };
    Ok(config)
}

/// A UDP socket with buffers for a whole window. Systems often grant less; then loss on fast links rises, and the log says why.
pub(crate) fn hardened_socket(address: SocketAddr) -> Result<std::net::UdpSocket, NetError> {
    let failed = |error: io::Error| NetError::Misconfigured {
        reason: format!("cannot bind {address}: {error}; stop what uses that port, or choose another"),
    };
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP)).map_err(failed)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        // One socket for both families.
        socket.set_only_v6(false).map_err(failed)?;
    }
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    let granted_receive = socket.recv_buffer_size().map_err(failed)?;
    let granted_send = socket.send_buffer_size().map_err(failed)?;
    if granted_receive.min(granted_send) < SOCKET_BUFFER_BYTES {
        tracing::warn!(
            wanted_bytes = SOCKET_BUFFER_BYTES,
            granted_receive_bytes = granted_receive,
            granted_send_bytes = granted_send,
            "the system grants smaller socket buffers (Linux: raise net.core.rmem_max and net.core.wmem_max)"
        );
    }
    socket.set_nonblocking(true).map_err(failed)?;
    socket.bind(&address.into()).map_err(failed)?;
    Ok(socket.into())
}

fn roots(identity: &Identity) -> Result<RootCertStore, NetError> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.authority()?).map_err(misconfigured)?;
    Ok(roots)
}

fn misconfigured(error: impl std::fmt::Display) -> NetError {
    NetError::Misconfigured { reason: error.to_string() }
}

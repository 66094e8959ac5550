//! The two sockets: a coordinator's that listens, a participant's that dials.
//!
//! Either yields a connection only after TLS has verified the peer's certificate and its role fits: a listener never hands out a
//! coordinator, a dialer nothing else.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, Incoming, TokioRuntime};
use tokio::{
    sync::mpsc,
    task::{JoinHandle, JoinSet},
    time::{Instant, timeout},
};
use wire::{CloseCode, ProtocolError};

use crate::{
    Connection, Datagrams, Everyone, Gate, NetError, Transport,
    config::{
        HANDSHAKE_DEADLINE, HANDSHAKES_BEFORE_RETRY, HANDSHAKES_MAX, hardened_dialer, hardened_listener,
        hardened_socket,
    },
    identity::{COORDINATOR_DNS, Identity, PeerIdentity},
    reset,
};

/// Connections that have finished their handshake and wait for [`Listener::accept`].
const ACCEPTED_MAX: usize = 64;

/// A handshake without an answer is joined by another after this time, and by a third after twice as long again.
const FRESH_HANDSHAKE: Duration = Duration::from_secs(1);

/// The coordinator's socket.
pub struct Listener {
    endpoint: Endpoint,
    local_address: SocketAddr,
    accepted: mpsc::Receiver<Connection>,
    admission: JoinHandle<()>,
}

/// A participant's socket.
pub struct Dialer {
    endpoint: Endpoint,
    config: quinn::ClientConfig,
}

impl Listener {
    /// Listens on `address` for everybody whose certificate is good. Must be called within a tokio runtime.
    pub fn bind(address: SocketAddr, identity: &Identity, transport: &Transport) -> Result<Self, NetError> {
        Self::bind_gated(address, identity, transport, Arc::new(Everyone))
    }

    /// The same for those of them whom `gate` admits.
    pub fn bind_gated(
        address: SocketAddr,
        identity: &Identity,
        transport: &Transport,
        gate: Arc<dyn Gate>,
    ) -> Result<Self, NetError> {
        let config = hardened_listener(identity, transport, gate)?;
        Self::of(endpoint(address, reset::endpoint_config(identity)?, Some(config))?, address)
    }

    /// The same on another network than the system's. What QUIC draws at random follows from `seed`.
    pub fn on(
        network: &Datagrams,
        address: SocketAddr,
        seed: u64,
        identity: &Identity,
        transport: &Transport,
        gate: Arc<dyn Gate>,
    ) -> Result<Self, NetError> {
        let config = hardened_listener(identity, transport, gate)?;
        Self::of(endpoint_on(network, address, seed, reset::endpoint_config(identity)?, Some(config))?, address)
    }

    fn of(endpoint: Endpoint, address: SocketAddr) -> Result<Self, NetError> {
        let local_address = endpoint.local_addr().map_err(|error| cannot_bind(address, &error))?;
        let (sender, accepted) = mpsc::channel(ACCEPTED_MAX);
        let admission = tokio::spawn(admit(endpoint.clone(), sender));
        Ok(Self { endpoint, local_address, accepted, admission })
    }

    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// The next participant, or invitation, that has proved who it is. May be dropped and called again without losing one.
    pub async fn accept(&mut self) -> Option<Connection> {
        self.accepted.recv().await
    }

    /// Closes every connection with `code` and waits until the peers have been told.
    pub async fn close(self, code: CloseCode, reason: &str) {
        self.endpoint.close(code.code().into(), reason.as_bytes());
        self.endpoint.wait_idle().await;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.admission.abort();
    }
}

impl Dialer {
    /// Must be called within a tokio runtime.
    pub fn new(identity: &Identity, transport: &Transport) -> Result<Self, NetError> {
        let config = hardened_dialer(identity, transport)?;
        let any_port = |ip: std::net::IpAddr| endpoint(SocketAddr::new(ip, 0), EndpointConfig::default(), None);
        // One socket for both families, where the system has IPv6 at all.
        let endpoint = any_port(Ipv6Addr::UNSPECIFIED.into()).or_else(|_| any_port(Ipv4Addr::UNSPECIFIED.into()))?;
        Ok(Self { endpoint, config })
    }

    /// The same on another network than the system's, as [`Listener::on`].
    pub fn on(
        network: &Datagrams,
        address: SocketAddr,
        seed: u64,
        identity: &Identity,
        transport: &Transport,
    ) -> Result<Self, NetError> {
        let config = hardened_dialer(identity, transport)?;
        Ok(Self { endpoint: endpoint_on(network, address, seed, EndpointConfig::default(), None)?, config })
    }

    /// Connects to the coordinator at `address`, a `host:port`; every address of a host name is tried in turn. A coordinator that refuses
    /// this side's certificate says so only afterwards: at the first read, or in [`Connection::closed`].
    pub async fn connect(&self, address: &str) -> Result<Connection, NetError> {
        let unresolved =
            |reason: String| NetError::Lost { reason: format!("cannot resolve {address}: {reason}"), retryable: true };
        let candidates = tokio::net::lookup_host(address).await.map_err(|error| unresolved(error.to_string()))?;
        let mut last = unresolved("it has no addresses".into());
        for candidate in candidates {
            match self.connect_to(candidate).await {
                Ok(connection) => return Ok(connection),
                Err(error) => last = error,
            }
        }
        if let NetError::PeerUntrusted { reason } = &mut last {
            *reason += &format!(
                "; what answers at {address} is not the coordinator that invited this device: correct the address, or ask for \
                 a new invitation"
            );
        }
        Err(last)
    }

    /// Waits until the peers of closed connections have been told.
    pub async fn close(self) {
        self.endpoint.wait_idle().await;
    }

    /// QUIC asks again at doubling intervals; a coordinator that is just starting is found sooner by handshakes that begin
    /// anew. The first to succeed counts.
    async fn connect_to(&self, address: SocketAddr) -> Result<Connection, NetError> {
        let silent = || NetError::Lost {
            reason: format!(
                "{address} did not answer within {} s: is the coordinator running, and does UDP get there?",
                HANDSHAKE_DEADLINE.as_secs()
            ),
            retryable: true,
        };
        let begun = Instant::now();
        let mut handshakes = JoinSet::new();
        let mut gap = FRESH_HANDSHAKE;
        let connected = loop {
            let connecting = self
                .endpoint
                .connect_with(self.config.clone(), address, COORDINATOR_DNS)
                .map_err(|error| NetError::Misconfigured { reason: format!("cannot connect to {address}: {error}") })?;
            handshakes.spawn(connecting);
            let left = HANDSHAKE_DEADLINE.checked_sub(begun.elapsed()).ok_or_else(silent)?;
            match timeout(gap.min(left), handshakes.join_next()).await {
                Ok(Some(Ok(connected))) => break connected?,
                // A task of its own has nothing to fail at.
                Ok(_) => return Err(silent()),
                Err(_) if gap >= left => return Err(silent()),
                Err(_) => gap += FRESH_HANDSHAKE,
            }
        };
        admit_role(connected, |peer| *peer == PeerIdentity::Coordinator, "the coordinator")
    }
}

/// Runs handshakes side by side, so that a slow one delays nobody, until the endpoint is closed.
async fn admit(endpoint: Endpoint, accepted: mpsc::Sender<Connection>) {
    let mut handshakes = JoinSet::new();
    loop {
        tokio::select! {
            incoming = endpoint.accept() => match incoming {
                Some(incoming) => begin_handshake(incoming, &mut handshakes, &accepted),
                None => return,
            },
            Some(_) = handshakes.join_next() => {}
        }
    }
}

fn begin_handshake(incoming: Incoming, handshakes: &mut JoinSet<()>, accepted: &mpsc::Sender<Connection>) {
    if handshakes.len() >= HANDSHAKES_MAX {
        incoming.refuse();
        return;
    }
    if handshakes.len() >= HANDSHAKES_BEFORE_RETRY && incoming.may_retry() {
        // It fails only where `may_retry` is false.
        let _ = incoming.retry();
        return;
    }
    let address = incoming.remote_address();
    let accepted = accepted.clone();
    handshakes.spawn(async move {
        match handshake(incoming).await {
            // The listener is gone where this fails, and the connection goes with it.
            Ok(connection) => drop(accepted.send(connection).await),
            Err(error) => tracing::debug!(%address, %error, "handshake refused"),
        }
    });
}

async fn handshake(incoming: Incoming) -> Result<Connection, NetError> {
    let connecting = incoming.accept()?;
    let connected = timeout(HANDSHAKE_DEADLINE, connecting)
        .await
        .map_err(|_| NetError::Lost { reason: "the handshake took too long".into(), retryable: false })??;
    admit_role(connected, |peer| *peer != PeerIdentity::Coordinator, "a participant or an invitation")
}

fn admit_role(
    connected: quinn::Connection,
    fits: impl Fn(&PeerIdentity) -> bool,
    expected: &'static str,
) -> Result<Connection, NetError> {
    let admitted = Connection::authenticated(connected.clone()).and_then(|connection| {
        if fits(connection.peer()) {
            return Ok(connection);
        }
        let found = connection.peer().to_string();
        Err(NetError::PeerMisbehaved { peer: found.clone(), error: ProtocolError::Role { expected, found } })
    });
    if let Err(error) = &admitted {
        connected.close(error.close_code().code().into(), error.to_string().as_bytes());
    }
    admitted
}

fn endpoint(
    address: SocketAddr,
    config: EndpointConfig,
    listening: Option<quinn::ServerConfig>,
) -> Result<Endpoint, NetError> {
    let socket = hardened_socket(address)?;
    Endpoint::new(config, listening, socket, Arc::new(TokioRuntime)).map_err(|error| cannot_bind(address, &error))
}

fn endpoint_on(
    network: &Datagrams,
    address: SocketAddr,
    seed: u64,
    mut config: EndpointConfig,
    listening: Option<quinn::ServerConfig>,
) -> Result<Endpoint, NetError> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    config.rng_seed(Some(bytes));
    let socket: Arc<dyn AsyncUdpSocket> = network.socket(address);
    Endpoint::new_with_abstract_socket(config, listening, socket, Arc::new(TokioRuntime))
        .map_err(|error| cannot_bind(address, &error))
}

fn cannot_bind(address: SocketAddr, error: &std::io::Error) -> NetError {
    let next_step = match error.kind() {
        std::io::ErrorKind::AddrNotAvailable => "it must be an address of this machine, or 0.0.0.0 for all of them",
        std::io::ErrorKind::PermissionDenied => "choose a port that this user may listen on, such as 4433",
        _ => "stop what uses that port, or choose another",
    };
    NetError::Misconfigured { reason: format!("cannot bind {address}: {error}; {next_step}") }
}

//! A peer that means harm, for scripts/check/hostile.sh: it prints how the coordinator gets rid of it.
//!
//!     hostile half ADDRESS COUNT               so many handshakes begun and never finished, and again every 9 s; until it is killed
//!     hostile slow ADDRESS STATE INVITE...     each a participant that says hello at one byte a second, and again when it is cut off
//!     hostile idle ADDRESS STATE INVITE...     each a participant that says hello and nothing more, and again when it is cut off
//!     hostile KIND ADDRESS STATE INVITE        one participant that is wrong in one way; ends with a JSON line when it is closed
//!
//! STATE is a directory in which the identities are kept that the invitations are turned into.

use std::fs;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use net::{
    Authority, Congestion, Connection, DeviceKey, Dialer, Identity, Invitation, NetError, StreamKind, Transport,
    TransportLimits,
};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller, VarInt};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use time::OffsetDateTime;
use tokio::sync::Semaphore;
use tokio::time::sleep;
use wire::{
    BlobRef, CODEC_PLAIN, CloseCode, DType, Enrolled, FrameKind, FromCoordinator, FromParticipant, MessageKind,
    Purpose, Request, Shape, TensorHeader,
};

const TRANSPORT: Transport =
    Transport { limits: TransportLimits { tensor_bytes_max: 1 << 21, in_flight: 2 }, congestion: Congestion::Cubic };

/// Enrolments under way at a time.
const ENROLLING_MAX: usize = 32;

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *arguments.as_slice() {
        ["half", address, count] => half(address.parse()?, count.parse()?).await,
        ["slow", address, state, ref invitations @ ..] => slow(address, Path::new(state), invitations).await,
        ["idle", address, state, ref invitations @ ..] => idle(address, Path::new(state), invitations).await,
        [kind, address, state, invitation] => one(kind, address, Path::new(state), invitation).await,
        _ => {
            Err("usage: hostile half ADDRESS COUNT | slow|idle ADDRESS STATE INVITE... | KIND ADDRESS STATE INVITE"
                .into())
        }
    }
}

/// Handshakes whose first flight is sent, from an address that answers a retry, and nothing more.
async fn half(address: SocketAddr, count: usize) -> Result<(), Failure> {
    let socket = Arc::new(tokio::net::UdpSocket::from_std({
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.set_nonblocking(true)?;
        socket
    })?);
    // Nobody will see it: the handshake does not get that far.
    let config = quic(&Authority::create(OffsetDateTime::now_utc())?.issue_coordinator(OffsetDateTime::now_utc())?)?;
    let mut endpoint = quinn_proto::Endpoint::new(Arc::new(quinn_proto::EndpointConfig::default()), None, false, None);
    let mut open = std::collections::HashMap::new();
    let (mut buffer, mut datagram) = (Vec::new(), vec![0; 2048]);
    // As many as asked for within 5 s, and each one anew before the coordinator's deadline of 10 s has quite passed.
    let pause = Duration::from_secs(5) / count.max(1) as u32;
    let mut begun: std::collections::VecDeque<(Instant, quinn_proto::ConnectionHandle)> = Default::default();
    loop {
        if begun.front().is_some_and(|(at, _)| at.elapsed() > Duration::from_secs(9))
            && let Some((_, handle)) = begun.pop_front()
        {
            open.remove(&handle);
        }
        if open.len() < count {
            let (handle, mut connection) =
                endpoint.connect(Instant::now(), config.clone(), address, "coordinator.headwater")?;
            while let Some(transmit) = connection.poll_transmit(Instant::now(), 1, &mut buffer) {
                let _ = socket.try_send_to(&buffer[..transmit.size], address);
                buffer.clear();
            }
            open.insert(handle, connection);
            begun.push_back((Instant::now(), handle));
        }
        let next = tokio::time::Instant::now() + pause;
        while let Ok(Ok((length, from))) = tokio::time::timeout_at(next, socket.recv_from(&mut datagram)).await {
            // A retry (RFC 9000, section 17.2.5) is answered; whatever comes later is not.
            if datagram[0] & 0xf0 != 0xf0 {
                continue;
            }
            let bytes = bytes::BytesMut::from(&datagram[..length]);
            let event = endpoint.handle(Instant::now(), from, None, None, bytes, &mut buffer);
            buffer.clear();
            if let Some(quinn_proto::DatagramEvent::ConnectionEvent(handle, event)) = event
                && let Some(connection) = open.get_mut(&handle)
            {
                connection.handle_event(event);
                while let Some(transmit) = connection.poll_transmit(Instant::now(), 1, &mut buffer) {
                    let _ = socket.try_send_to(&buffer[..transmit.size], address);
                    buffer.clear();
                }
            }
        }
    }
}

/// The identity that an invitation is turned into, now or by an earlier process.
async fn enrolled(address: &str, state: &Path, invitation: &str) -> Result<Identity, Failure> {
    let invitation = Invitation::read(Path::new(invitation))?;
    let [certificate, key] = ["pem", "key"].map(|ending| state.join(format!("{}.{ending}", invitation.name)));
    if certificate.exists() {
        return Ok(Identity::from_pem(
            &fs::read_to_string(certificate)?,
            &fs::read_to_string(key)?,
            &invitation.ca_pem,
        )?);
    }
    fs::create_dir_all(state)?;
    let device = DeviceKey::generate()?;
    let dialer = Dialer::new(&invitation.identity()?, &TRANSPORT)?;
    let connection = dialer.connect(address).await?;
    let (mut send, mut receive) = connection.open(StreamKind::Control).await?;
    send.message(&Request::Enrol { csr_der: device.request_der()? }).await?;
    send.finish();
    let Enrolled { chain_pem } = receive.message().await?;
    connection.close(CloseCode::Done, "enrolled");
    fs::write(key, device.pem())?;
    fs::write(certificate, &chain_pem)?;
    Ok(Identity::from_pem(&chain_pem, device.pem(), &invitation.ca_pem)?)
}

async fn slow(address: &str, state: &Path, invitations: &[&str]) -> Result<(), Failure> {
    let mut peers = tokio::task::JoinSet::new();
    for invitation in invitations {
        let identity = enrolled(address, state, invitation).await?;
        let address = address.to_owned();
        peers.spawn(async move {
            loop {
                let _ = say_hello_slowly(&identity, &address).await;
                sleep(Duration::from_secs(1)).await;
            }
        });
    }
    println!("{} slow peers", invitations.len());
    while peers.join_next().await.is_some() {}
    Ok(())
}

/// Not hostile, but many: they are welcomed, take no part, and keep their connections alive.
async fn idle(address: &str, state: &Path, invitations: &[&str]) -> Result<(), Failure> {
    let enrolling = Arc::new(Semaphore::new(ENROLLING_MAX));
    let (count, welcomed) = (invitations.len(), Arc::new(AtomicU64::new(0)));
    let mut peers = tokio::task::JoinSet::new();
    for invitation in invitations {
        let (address, state, invitation) = (address.to_owned(), state.to_owned(), invitation.to_string());
        let (enrolling, welcomed) = (enrolling.clone(), welcomed.clone());
        peers.spawn(async move {
            let identity = loop {
                let _one = enrolling.acquire().await;
                // The link loses packets, and the coordinator may be killed.
                match enrolled(&address, &state, &invitation).await {
                    Ok(identity) => break identity,
                    Err(error) => eprintln!("{invitation}: {error}"),
                }
                sleep(Duration::from_secs(1)).await;
            };
            loop {
                let waited: Result<NetError, Failure> = async {
                    let connection = Dialer::new(&identity, &TRANSPORT)?.connect(&address).await?;
                    let peer = Peer::greet(&connection).await?;
                    println!("welcomed {}", 1 + welcomed.fetch_add(1, Ordering::Relaxed));
                    let ended = connection.closed().await;
                    welcomed.fetch_sub(1, Ordering::Relaxed);
                    drop(peer);
                    Ok::<_, Failure>(ended)
                }
                .await;
                if let Err(error) = waited {
                    eprintln!("{invitation}: {error}");
                }
                sleep(Duration::from_secs(1)).await;
            }
        });
    }
    println!("{count} idle peers");
    while peers.join_next().await.is_some() {}
    Ok(())
}

async fn say_hello_slowly(identity: &Identity, address: &str) -> Result<(), NetError> {
    let dialer = Dialer::new(identity, &TRANSPORT)?;
    let connection = dialer.connect(address).await?;
    let (mut send, _receive) = connection.open(StreamKind::Control).await?;
    // A message that claims 64 KiB.
    for byte in [0, 0, 1, 0].into_iter().chain(std::iter::repeat(1)) {
        send.bytes(MessageKind::Control, &[byte]).await?;
        sleep(Duration::from_secs(1)).await;
    }
    Ok(())
}

async fn one(kind: &str, address: &str, state: &Path, invitation: &str) -> Result<(), Failure> {
    let identity = enrolled(address, state, invitation).await?;
    let begun = Instant::now();
    let (code, reason) = match kind {
        "gaps" => gaps(&identity, address.parse()?).await?,
        "unread" => unread(&identity, address.parse()?).await?,
        kind => {
            let dialer = Dialer::new(&identity, &TRANSPORT)?;
            let connection = dialer.connect(address).await?;
            let mut peer = Peer::greet(&connection).await?;
            // It may be closed while it is still at it.
            let _ = peer.misbehave(kind).await?;
            match tokio::time::timeout(Duration::from_secs(200), connection.closed()).await? {
                NetError::Closed { number, reason, .. } => (number, reason),
                error => return Err(error.into()),
            }
        }
    };
    let (seconds, reason) = (begun.elapsed().as_secs_f64(), reason.replace(['"', '\\'], "'"));
    println!("{{\"kind\": \"{kind}\", \"code\": {code}, \"reason\": \"{reason}\", \"seconds\": {seconds:.2}}}");
    Ok(())
}

/// A participant as far as its welcome.
struct Peer<'a> {
    connection: &'a Connection,
    control: (net::SendStream, net::RecvStream),
    session: u64,
}

impl<'a> Peer<'a> {
    async fn greet(connection: &'a Connection) -> Result<Self, Failure> {
        let (mut send, mut receive) = connection.open(StreamKind::Control).await?;
        send.message(&hello()).await?;
        let FromCoordinator::Welcome { session, .. } = receive.message().await? else {
            return Err("no welcome".into());
        };
        Ok(Self { connection, control: (send, receive), session })
    }

    async fn misbehave(&mut self, kind: &str) -> Result<Result<(), NetError>, Failure> {
        let width = 64;
        let tensor = |shape: &[u32]| {
            Ok::<_, Failure>(TensorHeader {
                kind: FrameKind::Activations,
                dtype: DType::F32,
                session: self.session,
                round: 1,
                step: 0,
                micro: 0,
                shape: Shape::new(shape)?,
            })
        };
        let header = tensor(&[8, width])?;
        let session = self.session;
        let bad = |value: f32| {
            let mut values = vec![0.5f32; 8 * width as usize];
            values[3] = value;
            frame(&header, &values)
        };
        Ok(match kind {
            // A message of 4 GiB, and a tensor of 16 EiB.
            "length" => self.control.0.bytes(MessageKind::Control, &u32::MAX.to_le_bytes()).await,
            "payload" => {
                let mut frame = header.encode(0).to_vec();
                frame[48..56].fill(0xff);
                self.step(session, &frame).await
            }
            "nan" => self.step(session, &bad(f32::NAN)).await,
            "infinity" => self.step(session, &bad(f32::INFINITY)).await,
            "1e38" => self.step(session, &bad(1e38)).await,
            "stale" => self.step(session ^ 1, &bad(0.5)).await,
            "shape" => {
                let header = tensor(&[8, width + 1])?;
                self.step(session, &frame(&header, &[0.5; 8 * 65])).await
            }
            "churn" => loop {
                let opened = self.connection.open(StreamKind::Bulk).await;
                let Ok((mut send, _receive)) = opened else { break opened.map(drop) };
                let _ = send.bytes(MessageKind::Control, &[1, 0]).await;
                send.reset(CloseCode::Stale);
            },
            kind => return Err(format!("{kind:?} is no kind of misbehaviour").into()),
        })
    }

    async fn step(&self, session: u64, frame: &[u8]) -> Result<(), NetError> {
        let (mut send, mut receive) = self.connection.open(StreamKind::Step { age: 0 }).await?;
        let request = Request::Step {
            session,
            round: 1,
            attempt: 1,
            step: 0,
            micro: 0,
            micros: 1,
            purpose: Purpose::Train,
            segments: vec![8],
            trained_tokens: 8,
            step_tokens: 8,
        };
        send.message(&request).await?;
        send.bytes(MessageKind::Activations, frame).await?;
        receive.end().await
    }
}

fn hello() -> FromParticipant {
    let (dtypes, codecs) = (vec![DType::F32], vec![CODEC_PLAIN]);
    FromParticipant::Hello { minor: wire::MINOR, dtypes, codecs, software: "hostile".into() }
}

fn frame(header: &TensorHeader, values: &[f32]) -> Vec<u8> {
    let payload: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    [&header.encode(wire::crc32c(&payload))[..], &payload].concat()
}

/// The length of a message, and its bytes one by one, each in a datagram of its own, of which every second is lost on the way.
async fn gaps(identity: &Identity, address: SocketAddr) -> Result<(u64, String), Failure> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let lossy = Arc::new(Lossy { inner: TokioRuntime.wrap_udp_socket(socket)?, sent: AtomicU64::new(0) });
    let endpoint = quinn::Endpoint::new_with_abstract_socket(
        quinn::EndpointConfig::default(),
        None,
        lossy,
        Arc::new(TokioRuntime),
    )?;
    let connection = endpoint.connect_with(quic(identity)?, address, "coordinator.headwater")?.await?;
    let mut streams = Vec::new();
    let writing = async {
        for _ in 0..6 {
            let (mut send, receive) = connection.open_bi().await?;
            send.write_all(&[0, 0, 1, 0]).await?;
            streams.push((send, receive));
        }
        loop {
            for (send, _) in &mut streams {
                send.write_all(&[1]).await?;
            }
            sleep(Duration::from_millis(1)).await;
        }
        #[allow(unreachable_code)]
        Ok::<(), Failure>(())
    };
    tokio::select! {
        _ = writing => {}
        _ = connection.closed() => {}
    }
    closed(connection.closed().await)
}

/// Asks for all that there is, with a window of one kilobyte, and never reads it.
async fn unread(identity: &Identity, address: SocketAddr) -> Result<(u64, String), Failure> {
    let mut transport = quinn::TransportConfig::default();
    transport.stream_receive_window(VarInt::from_u32(1024)).keep_alive_interval(Some(Duration::from_secs(2)));
    let mut config = quic(identity)?;
    config.transport_config(Arc::new(transport));
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse()?)?;
    let connection = endpoint.connect_with(config, address, "coordinator.headwater")?.await?;
    let (mut send, mut receive) = connection.open_bi().await?;
    let body = wire::encode(&hello())?;
    send.write_all(&[&(body.len() as u32).to_le_bytes()[..], &body].concat()).await?;
    let mut length = [0; 4];
    receive.read_exact(&mut length).await?;
    let mut body = vec![0; u32::from_le_bytes(length) as usize];
    receive.read_exact(&mut body).await?;
    let FromCoordinator::Welcome { manifest: BlobRef { sha256, .. }, .. } = wire::decode(&body)? else {
        return Err("no welcome".into());
    };
    let body = wire::encode(&Request::FetchBlob { sha256, offset: 0 })?;
    let request = [&(body.len() as u32).to_le_bytes()[..], &body].concat();
    let mut streams = Vec::new();
    let asking = async {
        loop {
            let (mut send, receive) = connection.open_bi().await?;
            send.write_all(&request).await?;
            send.finish()?;
            streams.push((send, receive));
        }
        #[allow(unreachable_code)]
        Ok::<(), Failure>(())
    };
    tokio::select! {
        _ = asking => {}
        _ = connection.closed() => {}
    }
    closed(connection.closed().await)
}

fn closed(error: quinn::ConnectionError) -> Result<(u64, String), Failure> {
    match error {
        quinn::ConnectionError::ApplicationClosed(close) => {
            Ok((close.error_code.into_inner(), String::from_utf8_lossy(&close.reason).into_owned()))
        }
        error => Err(error.into()),
    }
}

fn quic(identity: &Identity) -> Result<quinn::ClientConfig, Failure> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(identity.ca_pem().as_bytes())?)?;
    let chain = CertificateDer::pem_slice_iter(identity.chain_pem().as_bytes()).collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem().as_bytes())?;
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)?;
    tls.alpn_protocols = vec![wire::ALPN.to_vec()];
    Ok(quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?)))
}

/// Loses every second datagram, once the handshake is over.
#[derive(Debug)]
struct Lossy {
    inner: Arc<dyn AsyncUdpSocket>,
    sent: AtomicU64,
}

impl AsyncUdpSocket for Lossy {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit) -> io::Result<()> {
        let sent = self.sent.fetch_add(1, Ordering::Relaxed);
        if sent > 10 && sent % 2 == 1 { Ok(()) } else { self.inner.try_send(transmit) }
    }

    fn poll_recv(
        &self,
        context: &mut Context,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(context, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }
}

//! A connection to one peer whose identity is known: over QUIC, or in memory for tests, behind one type.

use std::{net::SocketAddr, sync::Arc};

use tokio::sync::SetOnce;
use wire::CloseCode;

use crate::{
    Cable, LedgerSnapshot, NetError, Network, RecvStream, SendStream, Tap, TransportStats,
    identity::{PeerIdentity, certified_key_der, fingerprint},
    ledger::Ledger,
    memory,
    stream::{ReadHalf, WriteHalf},
};

/// Clones are handles of the same connection; it closes when the last of them and of its streams is gone.
#[derive(Clone)]
pub struct Connection {
    link: Link,
    peer: Arc<PeerIdentity>,
    peer_key: [u8; 32],
    issued_unix: i64,
    minor: Arc<SetOnce<u16>>,
    ledger: Arc<Ledger>,
}

/// What a stream carries, which decides what goes first when the link is busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamKind {
    Control,
    /// A micro-batch; `age` counts those that were opened before it and are still under way.
    Step {
        age: u32,
    },
    /// Adapters, updates and blobs.
    Bulk,
}

#[derive(Clone)]
enum Link {
    Quic(quinn::Connection),
    Memory(Arc<memory::End>),
}

impl Connection {
    /// Both ends of a connection in memory: the first is held by `first`, so that its peer is `second`.
    pub fn pair(first: PeerIdentity, second: PeerIdentity) -> (Self, Self) {
        Self::paired(first, second, None)
    }

    /// As [`Connection::pair`], with every byte that either side writes shown to `tap`.
    pub fn pair_tapped(first: PeerIdentity, second: PeerIdentity, tap: Tap) -> (Self, Self) {
        Self::paired(first, second, Some(tap))
    }

    fn paired(first: PeerIdentity, second: PeerIdentity, tap: Option<Tap>) -> (Self, Self) {
        let (first_end, second_end) = memory::pair(tap);
        (Self::in_memory(first_end, second), Self::in_memory(second_end, first))
    }

    /// As [`Connection::pair`], with a network between the ends, and a cable that can be cut.
    pub fn pair_over(first: PeerIdentity, second: PeerIdentity, network: Arc<dyn Network>) -> (Self, Self, Cable) {
        let (first_end, second_end, cable) = memory::pair_over(None, Some(network));
        (Self::in_memory(first_end, second), Self::in_memory(second_end, first), cable)
    }

    fn in_memory(end: Arc<memory::End>, peer: PeerIdentity) -> Self {
        let key = fingerprint(peer.uri().as_bytes());
        Self::new(Link::Memory(end), peer, key, 0)
    }

    /// The connection after its handshake, with the peer that its certificate names.
    pub(crate) fn authenticated(connection: quinn::Connection) -> Result<Self, NetError> {
        let (peer, peer_key, issued_unix) = peer_of(&connection)?;
        Ok(Self::new(Link::Quic(connection), peer, peer_key, issued_unix))
    }

    fn new(link: Link, peer: PeerIdentity, peer_key: [u8; 32], issued_unix: i64) -> Self {
        Self { link, peer: Arc::new(peer), peer_key, issued_unix, minor: Arc::default(), ledger: Arc::default() }
    }

    /// Who the peer's certificate says it is.
    pub fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    /// SHA-256 of the public key that the peer has proved to hold: peers of one name with one key are the same device. In
    /// memory every name has a key of its own.
    pub fn peer_key(&self) -> [u8; 32] {
        self.peer_key
    }

    /// The second in which the peer's certificate was issued; in memory 0.
    pub fn issued_unix(&self) -> i64 {
        self.issued_unix
    }

    /// To be told once hello and welcome have crossed: the minor version of the protocol that both sides speak.
    pub fn agree(&self, minor: u16) {
        // A second hello is refused elsewhere.
        let _ = self.minor.set(minor);
    }

    /// Waits until that is known.
    pub async fn agreed_minor(&self) -> u16 {
        *self.minor.wait().await
    }

    pub fn remote_address(&self) -> Option<SocketAddr> {
        match &self.link {
            Link::Quic(connection) => Some(connection.remote_address()),
            Link::Memory(_) => None,
        }
    }

    /// Opens a stream, as soon as the peer grants one. The peer sees it with its first bytes.
    pub async fn open(&self, kind: StreamKind) -> Result<(SendStream, RecvStream), NetError> {
        let halves = match &self.link {
            Link::Quic(connection) => {
                let (write, read) = connection.open_bi().await?;
                (WriteHalf::Quic(write), ReadHalf::Quic(read))
            }
            Link::Memory(end) => {
                let (write, read) = end.open().await?;
                (WriteHalf::Memory(write), ReadHalf::Memory(read))
            }
        };
        let (send, recv) = self.stream(halves);
        send.prioritize(kind);
        Ok((send, recv))
    }

    /// The next stream that the peer opens. May be dropped and called again without losing one.
    pub async fn accept(&self) -> Result<(SendStream, RecvStream), NetError> {
        let halves = match &self.link {
            Link::Quic(connection) => {
                let (write, read) = connection.accept_bi().await?;
                (WriteHalf::Quic(write), ReadHalf::Quic(read))
            }
            Link::Memory(end) => {
                let (write, read) = end.accept().await?;
                (WriteHalf::Memory(write), ReadHalf::Memory(read))
            }
        };
        Ok(self.stream(halves))
    }

    /// Closes the connection at once: what is unsent is dropped, so that the side that received last is the one to call this.
    pub fn close(&self, code: CloseCode, reason: &str) {
        match &self.link {
            Link::Quic(connection) => connection.close(code.code().into(), reason.as_bytes()),
            Link::Memory(end) => end.close(code, reason),
        }
    }

    /// Waits until the connection is over, and says why.
    pub async fn closed(&self) -> NetError {
        match &self.link {
            Link::Quic(connection) => connection.closed().await.into(),
            Link::Memory(end) => end.closed().await,
        }
    }

    /// What has crossed so far.
    pub fn ledger(&self) -> LedgerSnapshot {
        self.ledger.snapshot()
    }

    /// What QUIC has counted so far; nothing in memory.
    pub fn transport_stats(&self) -> Option<TransportStats> {
        match &self.link {
            Link::Quic(connection) => Some(TransportStats::from(&connection.stats())),
            Link::Memory(_) => None,
        }
    }

    fn stream(&self, (write, read): (WriteHalf, ReadHalf)) -> (SendStream, RecvStream) {
        (
            SendStream::new(write, self.ledger.clone(), self.peer.clone()),
            RecvStream::new(read, self.ledger.clone(), self.peer.clone()),
        )
    }
}

impl StreamKind {
    pub(crate) fn priority(self) -> i32 {
        match self {
            Self::Control => 20,
            Self::Step { age } => 10 - age.min(15) as i32,
            Self::Bulk => -10,
        }
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.peer)
            .field("remote_address", &self.remote_address())
            .finish_non_exhaustive()
    }
}

fn peer_of(connection: &quinn::Connection) -> Result<(PeerIdentity, [u8; 32], i64), NetError> {
    let untrusted = |reason: String| NetError::PeerUntrusted { reason };
    let chain = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<rustls_pki_types::CertificateDer<'static>>>().ok())
        .ok_or_else(|| untrusted("it presented no certificate".into()))?;
    let leaf = chain.first().ok_or_else(|| untrusted("it presented no certificate".into()))?;
    let (identity, issued_unix) = PeerIdentity::issued(leaf).map_err(|error| untrusted(error.to_string()))?;
    Ok((identity, certified_key_der(leaf).map_err(|error| untrusted(error.to_string()))?, issued_unix))
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Mutex, PoisonError},
        time::Duration,
    };

    use wire::{
        BlobHeader, DType, FrameError, FrameKind, FromParticipant, MessageKind, Payload, ProtocolError, Request, Shape,
        TensorHeader, limits,
    };

    use super::*;
    use crate::PeerName;

    fn alice() -> PeerIdentity {
        PeerIdentity::Participant { name: PeerName::new("alice").unwrap() }
    }

    /// A stream in both directions: the participant's halves, the coordinator's, and the connections that keep it open.
    async fn stream() -> ((SendStream, RecvStream), (SendStream, RecvStream), (Connection, Connection)) {
        let (participant, coordinator) = Connection::pair(alice(), PeerIdentity::Coordinator);
        let opened = participant.open(StreamKind::Step { age: 0 }).await.unwrap();
        let accepted = coordinator.accept().await.unwrap();
        (opened, accepted, (participant, coordinator))
    }

    fn header() -> TensorHeader {
        let shape = Shape::new(&[4, 8]).unwrap();
        TensorHeader { kind: FrameKind::Activations, dtype: DType::F32, session: 1, round: 2, step: 3, micro: 4, shape }
    }

    /// Sends `bytes` and the end of the stream, waits for `expected`, and checks that `complaint` is the error.
    async fn check_frame_refused(bytes: &[u8], expected: TensorHeader, complaint: ProtocolError) {
        let ((mut send, _back), (_there, mut recv), _connections) = stream().await;
        send.bytes(MessageKind::Activations, bytes).await.unwrap();
        send.finish();
        let error = recv.tensor(&expected).await.unwrap_err();
        assert_eq!(error, NetError::PeerMisbehaved { peer: "participant alice".into(), error: complaint });
    }

    #[tokio::test]
    async fn tensors_arrive_in_every_dtype() {
        let ((mut send, _back), (_there, mut recv), _connections) = stream().await;
        let values: Vec<f32> = (0..32).map(|index| index as f32 / 4.0).collect();
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let header = TensorHeader { dtype, ..header() };
            send.tensor(&header, &values).await.unwrap();
            assert_eq!(recv.tensor(&header).await.unwrap(), values);
        }
    }

    #[tokio::test]
    async fn tensor_that_was_not_waited_for_is_refused() {
        let frame = [&header().encode(Payload::new(&header(), &[0.0; 32]).unwrap().crc32c)[..], &[0; 128]].concat();
        let differs = |field, found: &str, expected: &str| {
            ProtocolError::Frame(FrameError::Expected { field, found: found.into(), expected: expected.into() })
        };
        let check = async |expected, complaint| check_frame_refused(&frame, expected, complaint).await;
        check(TensorHeader { kind: FrameKind::CutGradient, ..header() }, differs("kind", "Activations", "CutGradient"))
            .await;
        check(TensorHeader { session: 9, ..header() }, differs("session", "1", "9")).await;
        check(TensorHeader { round: 9, ..header() }, differs("round", "2", "9")).await;
        check(TensorHeader { step: 9, ..header() }, differs("step", "3", "9")).await;
        check(TensorHeader { micro: 9, ..header() }, differs("micro-batch", "4", "9")).await;
        check(TensorHeader { dtype: DType::F16, ..header() }, differs("dtype", "F32", "F16")).await;
        let shape = Shape::new(&[8, 4]).unwrap();
        check(TensorHeader { shape, ..header() }, differs("shape", "[4, 8]", "[8, 4]")).await;
    }

    #[tokio::test]
    async fn damaged_tensor_is_refused() {
        let mut values = [1.0f32; 32];
        let frame = |values: &[f32], crc32c| {
            let payload: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            [&header().encode(crc32c)[..], &payload].concat()
        };
        let good = Payload::new(&header(), &values).unwrap().crc32c;
        for missing in [1, 100, 128] {
            let cut = frame(&values, good);
            let truncated = ProtocolError::Truncated { what: "tensor", missing };
            check_frame_refused(&cut[..cut.len() - missing as usize], header(), truncated).await;
        }
        let headless = ProtocolError::Truncated { what: "tensor header", missing: 4 };
        check_frame_refused(&frame(&values, good)[..60], header(), headless).await;
        let checksum = ProtocolError::Frame(FrameError::Checksum { found: good, expected: !good });
        check_frame_refused(&frame(&values, !good), header(), checksum).await;
        values[17] = f32::NAN;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let poisoned = frame(&values, wire::crc32c(&bytes));
        check_frame_refused(&poisoned, header(), ProtocolError::Frame(FrameError::NotFinite { index: 17 })).await;
    }

    #[tokio::test]
    async fn our_own_mistakes_are_not_sent() {
        let ((mut send, _back), _there, (participant, _coordinator)) = stream().await;
        let error = send.tensor(&header(), &[f32::INFINITY; 32]).await.unwrap_err();
        assert_eq!(error, NetError::Unsendable { error: ProtocolError::Frame(FrameError::NotFinite { index: 0 }) });
        let reason = "x".repeat(limits::TEXT_BYTES_MAX + 1);
        assert!(matches!(send.message(&FromParticipant::Leaving { reason }).await, Err(NetError::Unsendable { .. })));
        assert_eq!(participant.ledger().sent_total(), 0);
    }

    #[tokio::test]
    async fn message_above_its_limit_is_refused_by_its_length() {
        let ((mut send, _back), (_there, mut recv), _connections) = stream().await;
        send.bytes(MessageKind::Control, &(limits::MESSAGE_BYTES_MAX as u32 + 1).to_le_bytes()).await.unwrap();
        let error = recv.message::<FromParticipant>().await.unwrap_err();
        assert_eq!(error.close_code(), CloseCode::OverLimit, "{error}");
    }

    #[tokio::test]
    async fn receiving_may_be_cancelled_within_a_message() {
        let ((mut send, _back), (_there, mut recv), _connections) = stream().await;
        let message = FromParticipant::Leaving { reason: "a reason of some length".into() };
        let body = wire::encode(&message).unwrap();
        let bytes = [&(body.len() as u32).to_le_bytes()[..], &body].concat();
        for byte in &bytes[..bytes.len() - 1] {
            send.bytes(MessageKind::Control, &[*byte]).await.unwrap();
            tokio::select! {
                biased;
                early = recv.message::<FromParticipant>() => panic!("{early:?}"),
                () = std::future::ready(()) => {}
            }
        }
        send.bytes(MessageKind::Control, &bytes[bytes.len() - 1..]).await.unwrap();
        assert_eq!(recv.message::<FromParticipant>().await.unwrap(), message);
    }

    #[tokio::test]
    async fn ledger_counts_both_directions_by_kind() {
        let ((mut send, mut back), (mut there, mut recv), (participant, coordinator)) = stream().await;
        let adapter = TensorHeader { kind: FrameKind::Adapter, ..header() };
        send.message(&Request::FetchAdapter { round: 1 }).await.unwrap();
        recv.message::<Request>().await.unwrap();
        there.tensor(&adapter, &[0.5; 32]).await.unwrap();
        back.tensor(&adapter).await.unwrap();
        send.tensor(&adapter, &[0.5; 32]).await.unwrap();
        recv.tensor(&adapter).await.unwrap();
        there.message(&BlobHeader { length: 3 }).await.unwrap();
        back.message::<BlobHeader>().await.unwrap();
        there.bytes(MessageKind::Blob, &[1, 2, 3]).await.unwrap();
        back.bytes(MessageKind::Blob, &mut [0; 3]).await.unwrap();
        let (ours, theirs) = (participant.ledger(), coordinator.ledger());
        assert_eq!((ours.sent(MessageKind::Adapter), ours.received(MessageKind::Adapter)), (4 + 2, 64 + 128));
        assert_eq!((ours.sent(MessageKind::Update), ours.received(MessageKind::Update)), (64 + 128, 0));
        assert_eq!((ours.sent(MessageKind::Blob), ours.received(MessageKind::Blob)), (0, 4 + 1 + 3));
        for (kind, sent, received) in ours.rows() {
            assert_eq!((theirs.received(kind), theirs.sent(kind)), (sent, received), "{}", kind.name());
        }
    }

    #[tokio::test]
    async fn closing_in_memory_is_like_closing_over_quic() {
        let ((mut send, mut back), (mut there, mut recv), (participant, coordinator)) = stream().await;
        there.message(&BlobHeader { length: 1 }).await.unwrap();
        coordinator.close(CloseCode::NoRoom, "full");
        coordinator.close(CloseCode::Done, "too late to change the reason");
        let expected = NetError::Closed { code: Some(CloseCode::NoRoom), number: 0x40, reason: "full".into() };
        assert!(expected.is_retryable());
        assert_eq!(participant.closed().await, expected);
        assert_eq!(back.message::<BlobHeader>().await, Ok(BlobHeader { length: 1 }));
        assert_eq!(back.message::<BlobHeader>().await.unwrap_err(), expected);
        assert_eq!(send.message(&BlobHeader { length: 1 }).await.unwrap_err(), expected);
        assert_eq!(participant.open(StreamKind::Control).await.err(), Some(expected));
        assert_eq!(recv.message::<BlobHeader>().await.unwrap_err(), NetError::closed_here());
        assert_eq!(coordinator.accept().await.err(), Some(NetError::closed_here()));
    }

    #[tokio::test]
    async fn connection_closes_with_its_last_handle() {
        let (participant, coordinator) = Connection::pair(alice(), PeerIdentity::Coordinator);
        let (mut send, recv) = participant.open(StreamKind::Control).await.unwrap();
        drop(participant);
        send.message(&BlobHeader { length: 1 }).await.unwrap();
        drop((send, recv));
        let error = coordinator.closed().await;
        assert!(matches!(error, NetError::Closed { code: Some(CloseCode::Done), .. }), "{error}");
    }

    #[tokio::test]
    async fn reset_and_stop_reach_the_other_half_with_their_code() {
        let ((mut send, mut back), (mut there, mut recv), _connections) = stream().await;
        send.reset(CloseCode::Stale);
        let stale = NetError::Reset { code: Some(CloseCode::Stale), number: 3 };
        assert_eq!(recv.message::<Request>().await.unwrap_err(), stale);
        back.stop(CloseCode::GoingAway);
        let stopped = NetError::Reset { code: Some(CloseCode::GoingAway), number: 1 };
        assert_eq!(there.message(&BlobHeader { length: 1 }).await.unwrap_err(), stopped);
    }

    #[tokio::test]
    async fn bytes_after_the_end_are_refused() {
        let ((mut send, _back), (_there, mut recv), _connections) = stream().await;
        send.message(&BlobHeader { length: 1 }).await.unwrap();
        send.bytes(MessageKind::Blob, &[1]).await.unwrap();
        recv.message::<BlobHeader>().await.unwrap();
        let error = recv.end().await.unwrap_err();
        assert_eq!(error.close_code(), CloseCode::Unexpected, "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn peer_that_stalls_within_a_frame_is_named() {
        let ((mut send, _back), (_there, mut recv), _connections) = stream().await;
        // Before the first byte there is no hurry.
        let patience = tokio::time::timeout(Duration::from_secs(3600), recv.tensor(&header())).await;
        assert!(patience.is_err());
        send.bytes(MessageKind::Activations, &header().encode(0)).await.unwrap();
        let error = recv.tensor(&header()).await.unwrap_err();
        assert_eq!(error.close_code(), CloseCode::TooSlow, "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn peer_that_never_reads_is_named() {
        let ((mut send, _back), _there, _connections) = stream().await;
        let error = send.bytes(MessageKind::Blob, &[0; 1 << 20]).await.unwrap_err();
        assert_eq!(error.close_code(), CloseCode::TooSlow, "{error}");
    }

    #[tokio::test]
    async fn tap_sees_what_both_sides_write() {
        let seen: Arc<Mutex<Vec<u8>>> = Arc::default();
        let tap: Tap = {
            let seen = seen.clone();
            Arc::new(move |bytes| seen.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes))
        };
        let (participant, coordinator) = Connection::pair_tapped(alice(), PeerIdentity::Coordinator, tap);
        let (mut send, _recv) = participant.open(StreamKind::Control).await.unwrap();
        let (mut back, _there) = coordinator.accept().await.unwrap();
        send.message(&BlobHeader { length: 1 }).await.unwrap();
        back.message(&BlobHeader { length: 2 }).await.unwrap();
        assert_eq!(*seen.lock().unwrap(), [1, 0, 0, 0, 1, 1, 0, 0, 0, 2]);
    }
}

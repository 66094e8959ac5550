//! The two halves of a stream: messages, tensor frames and plain bytes, counted in the connection's ledger.
//!
//! What arrives is checked here, so that a caller gets the value that it waited for or an error that names the peer. Nothing here knows
//! which message is due.

use std::{future::Future, sync::Arc, time::Duration};

use wire::{
    CloseCode, FrameHeader, FrameKind, HEADER_BYTES, Message, MessageKind, Payload, PayloadBuffer, ProtocolError,
    TensorHeader,
};

use crate::{
    NetError,
    config::{READ_STALL, WRITE_STALL},
    connection::StreamKind,
    identity::PeerIdentity,
    ledger::Ledger,
    memory,
};

const LENGTH_BYTES: usize = 4;
/// Memory for a message grows by this much, as its bytes arrive.
const GROWTH_BYTES: usize = 64 * 1024;

/// The writing half. Dropping it finishes the stream. Its futures must be awaited to their end: half a message cannot be taken back.
pub struct SendStream {
    half: WriteHalf,
    ledger: Arc<Ledger>,
    peer: Arc<PeerIdentity>,
}

/// The reading half. Dropping it tells the peer to stop.
pub struct RecvStream {
    half: ReadHalf,
    ledger: Arc<Ledger>,
    peer: Arc<PeerIdentity>,
    /// The beginning of a message or header: its first `filled` bytes have arrived, the rest is room. Kept across cancelled reads.
    partial: Vec<u8>,
    filled: usize,
}

pub(crate) enum WriteHalf {
    Quic(quinn::SendStream),
    Memory(memory::Writer),
}

pub(crate) enum ReadHalf {
    Quic(quinn::RecvStream),
    Memory(memory::Reader),
}

impl SendStream {
    pub(crate) fn new(half: WriteHalf, ledger: Arc<Ledger>, peer: Arc<PeerIdentity>) -> Self {
        Self { half, ledger, peer }
    }

    /// Sends a message: its length in 4 bytes, then its body.
    pub async fn message<M: Message>(&mut self, message: &M) -> Result<(), NetError> {
        let body = wire::encode(message).map_err(|error| NetError::Unsendable { error: error.into() })?;
        // A body is at most `LISTING_BYTES_MAX`.
        let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
        bytes.extend(body);
        self.write(message.kind(), &bytes, M::NAME).await
    }

    /// Sends a tensor in the header's dtype: the header, then the values.
    pub async fn tensor(&mut self, header: &TensorHeader, values: &[f32]) -> Result<(), NetError> {
        let payload = Payload::new(header, values).map_err(|error| NetError::Unsendable { error: error.into() })?;
        let kind = frame_row(header.kind, *self.peer == PeerIdentity::Coordinator);
        self.write(kind, &header.encode(payload.crc32c), "tensor header").await?;
        self.write(kind, payload.bytes(), "tensor").await
    }

    /// Sends bytes that a message before them has announced.
    pub async fn bytes(&mut self, kind: MessageKind, bytes: &[u8]) -> Result<(), NetError> {
        self.write(kind, bytes, "blob").await
    }

    /// Which streams go first when several have something to send.
    pub fn prioritize(&self, kind: StreamKind) {
        if let WriteHalf::Quic(stream) = &self.half {
            // It fails on a stream that is over, where priority means nothing.
            let _ = stream.set_priority(kind.priority());
        }
    }

    /// Ends the stream after what has been sent.
    pub fn finish(&mut self) {
        match &mut self.half {
            // It fails where the stream is over already.
            WriteHalf::Quic(stream) => drop(stream.finish()),
            WriteHalf::Memory(stream) => stream.finish(),
        }
    }

    /// Waits, after [`SendStream::finish`], until the peer has received everything, or has dropped its reading half because it needs no more:
    /// only then may the connection be closed from here.
    pub async fn delivered(&mut self) -> Result<(), NetError> {
        match &mut self.half {
            WriteHalf::Quic(stream) => match stream.stopped().await {
                Ok(None) => Ok(()),
                // What quinn says for a dropped reading half.
                Ok(Some(code)) if code == CloseCode::Done.code().into() => Ok(()),
                Ok(Some(code)) => Err(NetError::reset(code.into_inner())),
                Err(quinn::StoppedError::ConnectionLost(error)) => Err(error.into()),
                Err(error @ quinn::StoppedError::ZeroRttRejected) => {
                    Err(NetError::Lost { reason: error.to_string(), retryable: false })
                }
            },
            WriteHalf::Memory(stream) => stream.delivered().await,
        }
    }

    /// Gives up the stream: what has not been sent yet never will be.
    pub fn reset(&mut self, code: CloseCode) {
        match &mut self.half {
            WriteHalf::Quic(stream) => drop(stream.reset(code.code().into())),
            WriteHalf::Memory(stream) => stream.reset(code),
        }
    }

    async fn write(&mut self, kind: MessageKind, bytes: &[u8], what: &'static str) -> Result<(), NetError> {
        let mut left = bytes;
        while !left.is_empty() {
            let written = unless_stalled(WRITE_STALL, &self.peer, what, self.half.write(left)).await?;
            self.ledger.count_sent(kind, written);
            left = &left[written..];
        }
        Ok(())
    }
}

impl RecvStream {
    pub(crate) fn new(half: ReadHalf, ledger: Arc<Ledger>, peer: Arc<PeerIdentity>) -> Self {
        Self { half, ledger, peer, partial: Vec::new(), filled: 0 }
    }

    /// The next message. May be dropped and called again without losing anything, hence fit for `select!`.
    pub async fn message<M: Message>(&mut self) -> Result<M, NetError> {
        self.fill(LENGTH_BYTES, M::NAME).await?;
        // `fill` has just made these four bytes.
        let length = u32::from_le_bytes(std::array::from_fn(|at| self.partial[at])) as usize;
        if length > M::BODY_BYTES_MAX {
            let limit = M::BODY_BYTES_MAX;
            return Err(self.misbehaved(wire::CodecError::TooLong { message: M::NAME, found: length, limit }));
        }
        self.fill(LENGTH_BYTES + length, M::NAME).await?;
        let bytes = self.take_partial();
        let decoded = wire::decode::<M>(&bytes[LENGTH_BYTES..]);
        let kind = decoded.as_ref().map_or(MessageKind::Control, Message::kind);
        self.ledger.count_received(kind, bytes.len());
        decoded.map_err(|error| self.misbehaved(error))
    }

    /// The next tensor, which must be exactly the one that `expected` describes. Memory is taken only for that one.
    pub async fn tensor(&mut self, expected: &TensorHeader) -> Result<Vec<f32>, NetError> {
        self.fill(HEADER_BYTES, "tensor header").await?;
        let bytes = self.take_partial();
        let kind = frame_row(expected.kind, *self.peer != PeerIdentity::Coordinator);
        self.ledger.count_received(kind, bytes.len());
        let header =
            FrameHeader::decode(&std::array::from_fn(|at| bytes[at])).map_err(|error| self.misbehaved(error))?;
        expected.check_expected(&header.tensor).map_err(|error| self.misbehaved(error))?;
        let mut payload = PayloadBuffer::new(&header);
        self.read_exact(kind, payload.bytes_mut(), "tensor").await?;
        payload.into_values(&header).map_err(|error| self.misbehaved(error))
    }

    /// Fills `buffer` with bytes that a message before them has announced.
    pub async fn bytes(&mut self, kind: MessageKind, buffer: &mut [u8]) -> Result<(), NetError> {
        self.read_exact(kind, buffer, "blob").await
    }

    /// Waits for the end of the stream; anything before it is the peer's mistake.
    pub async fn end(&mut self) -> Result<(), NetError> {
        let mut byte = [0];
        let what = "the stream's end";
        if self.filled == 0 && unless_stalled(READ_STALL, &self.peer, what, self.half.read(&mut byte)).await? == 0 {
            return Ok(());
        }
        Err(self.misbehaved(ProtocolError::Unexpected { expected: what, found: "another byte".into() }))
    }

    /// Tells the peer that nothing more of this stream will be read.
    pub fn stop(&mut self, code: CloseCode) {
        match &mut self.half {
            // It fails where the stream is over already.
            ReadHalf::Quic(stream) => drop(stream.stop(code.code().into())),
            ReadHalf::Memory(stream) => stream.stop(code),
        }
    }

    /// Reads until `partial` holds `target` bytes. The first byte may take as long as it likes; after it, the peer has to keep moving.
    async fn fill(&mut self, target: usize, what: &'static str) -> Result<(), NetError> {
        while self.filled < target {
            let room = target.min(self.filled + GROWTH_BYTES);
            self.partial.resize(room, 0);
            let read = self.half.read(&mut self.partial[self.filled..]);
            let count = match self.filled {
                0 => read.await?,
                _ => unless_stalled(READ_STALL, &self.peer, what, read).await?,
            };
            if count == 0 {
                let missing = (target - self.filled) as u64;
                return Err(self.misbehaved(ProtocolError::Truncated { what, missing }));
            }
            self.filled += count;
        }
        Ok(())
    }

    fn take_partial(&mut self) -> Vec<u8> {
        self.filled = 0;
        std::mem::take(&mut self.partial)
    }

    async fn read_exact(&mut self, kind: MessageKind, buffer: &mut [u8], what: &'static str) -> Result<(), NetError> {
        let mut filled = 0;
        while filled < buffer.len() {
            let count = unless_stalled(READ_STALL, &self.peer, what, self.half.read(&mut buffer[filled..])).await?;
            if count == 0 {
                let missing = (buffer.len() - filled) as u64;
                return Err(self.misbehaved(ProtocolError::Truncated { what, missing }));
            }
            self.ledger.count_received(kind, count);
            filled += count;
        }
        Ok(())
    }

    fn misbehaved(&self, error: impl Into<ProtocolError>) -> NetError {
        NetError::PeerMisbehaved { peer: self.peer.to_string(), error: error.into() }
    }
}

impl WriteHalf {
    async fn write(&mut self, bytes: &[u8]) -> Result<usize, NetError> {
        match self {
            Self::Quic(stream) => Ok(stream.write(bytes).await?),
            Self::Memory(stream) => stream.write(bytes).await,
        }
    }
}

impl ReadHalf {
    /// Reads some bytes; 0 at the end of the stream.
    async fn read(&mut self, buffer: &mut [u8]) -> Result<usize, NetError> {
        match self {
            Self::Quic(stream) => Ok(stream.read(buffer).await?.unwrap_or(0)),
            Self::Memory(stream) => stream.read(buffer).await,
        }
    }
}

/// The ledger's row for a frame; adapters that go to the coordinator are updates.
fn frame_row(kind: FrameKind, to_coordinator: bool) -> MessageKind {
    match kind {
        FrameKind::Activations => MessageKind::Activations,
        FrameKind::CutGradient => MessageKind::CutGradient,
        FrameKind::Adapter if to_coordinator => MessageKind::Update,
        FrameKind::Adapter => MessageKind::Adapter,
        FrameKind::ChannelSums => MessageKind::ChannelSums,
    }
}

async fn unless_stalled<T>(
    limit: Duration,
    peer: &PeerIdentity,
    what: &'static str,
    progress: impl Future<Output = Result<T, NetError>>,
) -> Result<T, NetError> {
    tokio::time::timeout(limit, progress).await.unwrap_or_else(|_| {
        let error = ProtocolError::TooSlow { what, waited_ms: limit.as_millis() as u64 };
        Err(NetError::PeerMisbehaved { peer: peer.to_string(), error })
    })
}

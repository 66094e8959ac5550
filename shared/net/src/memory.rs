//! A connection without a network: two ends in one process, one bounded pipe per stream and direction.
//!
//! It behaves as QUIC does where the program can tell: streams end, reset and stop one by one, closing ends them all with a code and a reason,
//! and an unread stream holds its writer back. It has no delay, loses nothing and reads no clock.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    sync::{Mutex, mpsc, watch},
};
use wire::CloseCode;

use crate::NetError;

/// Sees every byte that either end writes, in the order of each stream.
pub type Tap = Arc<dyn Fn(&[u8]) + Send + Sync>;

const PIPE_BYTES: usize = 256 * 1024;
const STREAMS_WAITING: usize = 64;

/// One end of a pair.
pub(crate) struct End {
    side: Side,
    to_peer: mpsc::Sender<Stream>,
    from_peer: Mutex<mpsc::Receiver<Stream>>,
    closing: Arc<watch::Sender<Option<Closing>>>,
    tap: Option<Tap>,
}

pub(crate) struct Writer {
    end: Arc<End>,
    half: WriteHalf,
}

pub(crate) struct Reader {
    end: Arc<End>,
    half: ReadHalf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    First,
    Second,
}

#[derive(Debug, Clone)]
struct Closing {
    by: Side,
    code: CloseCode,
    reason: String,
}

/// A stream on its way to the other end.
struct Stream {
    write: WriteHalf,
    read: ReadHalf,
}

struct WriteHalf {
    pipe: Option<DuplexStream>,
    signals: Arc<Signals>,
}

struct ReadHalf {
    pipe: Option<DuplexStream>,
    signals: Arc<Signals>,
}

/// What one direction of a stream says beside its bytes.
#[derive(Default)]
struct Signals {
    finished: AtomicBool,
    /// A close code plus one; 0 while there is none.
    reset: AtomicU64,
    stopped: AtomicU64,
}

pub(crate) fn pair(tap: Option<Tap>) -> (Arc<End>, Arc<End>) {
    let (to_second, from_first) = mpsc::channel(STREAMS_WAITING);
    let (to_first, from_second) = mpsc::channel(STREAMS_WAITING);
    let closing = Arc::new(watch::Sender::new(None));
    let end = |side, to_peer, from_peer| {
        Arc::new(End { side, to_peer, from_peer: Mutex::new(from_peer), closing: closing.clone(), tap: tap.clone() })
    };
    (end(Side::First, to_second, from_second), end(Side::Second, to_first, from_first))
}

impl End {
    pub(crate) async fn open(self: &Arc<Self>) -> Result<(Writer, Reader), NetError> {
        let (our_write, their_read) = direction();
        let (their_write, our_read) = direction();
        tokio::select! {
            biased;
            error = self.closed() => return Err(error),
            sent = self.to_peer.send(Stream { write: their_write, read: their_read }) => {
                sent.map_err(|_| self.vanished())?;
            }
        }
        Ok((Writer { end: self.clone(), half: our_write }, Reader { end: self.clone(), half: our_read }))
    }

    pub(crate) async fn accept(self: &Arc<Self>) -> Result<(Writer, Reader), NetError> {
        let mut from_peer = self.from_peer.lock().await;
        let stream = tokio::select! {
            biased;
            error = self.closed() => return Err(error),
            stream = from_peer.recv() => stream.ok_or_else(|| self.vanished())?,
        };
        Ok((Writer { end: self.clone(), half: stream.write }, Reader { end: self.clone(), half: stream.read }))
    }

    /// The first closing counts, as in QUIC.
    pub(crate) fn close(&self, code: CloseCode, reason: &str) {
        self.closing.send_if_modified(|closing| {
            let first = closing.is_none();
            closing.get_or_insert_with(|| Closing { by: self.side, code, reason: reason.to_owned() });
            first
        });
    }

    pub(crate) async fn closed(&self) -> NetError {
        let mut closing = self.closing.subscribe();
        // The sender lives in `self`, so that waiting cannot fail.
        let _ = closing.wait_for(Option::is_some).await;
        self.closing_error().unwrap_or_else(|| self.vanished())
    }

    fn closing_error(&self) -> Option<NetError> {
        let closing = self.closing.borrow();
        let Closing { by, code, reason } = closing.as_ref()?;
        if *by == self.side {
            return Some(NetError::closed_here());
        }
        Some(NetError::closed(u64::from(code.code()), reason.clone()))
    }

    fn vanished(&self) -> NetError {
        self.closing_error()
            .unwrap_or_else(|| NetError::Lost { reason: "the other end is gone".into(), retryable: false })
    }
}

impl Drop for End {
    /// As in QUIC, a connection that nobody holds any more is closed.
    fn drop(&mut self) {
        self.close(CloseCode::Done, "");
    }
}

impl Writer {
    /// Writes some of `bytes`, at least one of them.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> Result<usize, NetError> {
        let Some(pipe) = &mut self.half.pipe else {
            return Err(NetError::Lost { reason: "the stream is finished".into(), retryable: false });
        };
        let written = tokio::select! {
            biased;
            error = self.end.closed() => return Err(error),
            written = pipe.write(bytes) => written,
        };
        let written = written.map_err(|error| broken(&self.end, &self.half.signals.stopped, &error))?;
        if let Some(tap) = &self.end.tap {
            tap(&bytes[..written]);
        }
        Ok(written)
    }

    pub(crate) fn finish(&mut self) {
        self.half.signals.finished.store(true, SeqCst);
        self.half.pipe = None;
    }

    pub(crate) fn reset(&mut self, code: CloseCode) {
        self.half.signals.reset.store(u64::from(code.code()) + 1, SeqCst);
        self.half.pipe = None;
    }
}

impl Reader {
    /// Reads some bytes; 0 at the end of the stream.
    pub(crate) async fn read(&mut self, buffer: &mut [u8]) -> Result<usize, NetError> {
        let Some(pipe) = &mut self.half.pipe else {
            return Err(NetError::Lost { reason: "the stream is stopped".into(), retryable: false });
        };
        let read = tokio::select! {
            biased;
            read = pipe.read(buffer) => read,
            error = self.end.closed() => return Err(error),
        };
        match read {
            // The pipe ends when its writer finishes, resets, or goes down with its connection.
            Ok(0) if !self.half.signals.finished.load(SeqCst) => match self.half.signals.reset.load(SeqCst) {
                0 => self.end.closing_error().map_or(Ok(0), Err),
                code => Err(NetError::reset(code - 1)),
            },
            Ok(count) => Ok(count),
            Err(error) => Err(broken(&self.end, &self.half.signals.reset, &error)),
        }
    }

    pub(crate) fn stop(&mut self, code: CloseCode) {
        self.half.signals.stopped.store(u64::from(code.code()) + 1, SeqCst);
        self.half.pipe = None;
    }
}

fn direction() -> (WriteHalf, ReadHalf) {
    let (write, read) = tokio::io::duplex(PIPE_BYTES);
    let signals = Arc::new(Signals::default());
    (WriteHalf { pipe: Some(write), signals: signals.clone() }, ReadHalf { pipe: Some(read), signals })
}

fn broken(end: &End, signal: &AtomicU64, error: &io::Error) -> NetError {
    if let Some(closing) = end.closing_error() {
        return closing;
    }
    match signal.load(SeqCst) {
        // A reader that has gone without a word stops the stream with code 0, as in QUIC.
        0 if error.kind() == io::ErrorKind::BrokenPipe => NetError::reset(0),
        0 => NetError::Lost { reason: error.to_string(), retryable: false },
        code => NetError::reset(code - 1),
    }
}

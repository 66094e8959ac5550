//! A connection without a network: two ends in one process, one bounded pipe per stream and direction.
//!
//! It behaves as QUIC does where the program can tell: streams end, reset and stop one by one, closing ends them all with a code and a reason,
//! and an unread stream holds its writer back. It has no delay, loses nothing and reads no clock; unless there is a [`Network`] between the
//! ends, which delays what is sent, and a [`Cable`] that can be cut.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    runtime::Handle,
    sync::{Mutex, mpsc},
    time::sleep,
};
use wire::CloseCode;

use crate::{NetError, Watched};

/// Sees every byte that either end writes, in the order of each stream.
pub type Tap = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// What lies between two ends, for simulations. Streams stay in order, each by itself; nothing else does.
pub trait Network: Send + Sync {
    /// How long `bytes`, an end of a stream or a closing (of 0 bytes) are under way from this end.
    fn delay(&self, from: Side, bytes: usize) -> Duration;
}

/// The connection's cable, to be cut.
#[derive(Clone)]
pub struct Cable {
    closings: [Arc<Closings>; 2],
    state: Arc<Watched<Cut>>,
}

/// Pieces of what is sent cross a [`Network`] one by one.
const PIECE_BYTES: usize = 4096;
const PIPE_BYTES: usize = 256 * 1024;
const STREAMS_WAITING: usize = 64;

/// One end of a pair.
pub(crate) struct End {
    side: Side,
    to_peer: mpsc::Sender<Stream>,
    from_peer: Mutex<mpsc::Receiver<Stream>>,
    closing: Arc<Closings>,
    closing_there: Arc<Closings>,
    tap: Option<Tap>,
    way: Option<Way>,
}

/// Through a network.
#[derive(Clone)]
struct Way {
    network: Arc<dyn Network>,
    state: Arc<Watched<Cut>>,
}

/// Whether anything arrives any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    No,
    Yes,
    /// Both ends know.
    Noticed,
}

type Closings = Watched<Option<Closing>>;

pub(crate) struct Writer {
    end: Arc<End>,
    half: WriteHalf,
}

pub(crate) struct Reader {
    end: Arc<End>,
    half: ReadHalf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    First,
    Second,
}

#[derive(Debug, Clone)]
enum Closing {
    By { side: Side, code: CloseCode, reason: String },
    Lost,
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
    /// Whether the other end has all of it, and whether it never will.
    arrived: Watched<bool>,
    lost: AtomicBool,
}

pub(crate) fn pair(tap: Option<Tap>) -> (Arc<End>, Arc<End>) {
    let (first, second, _) = pair_over(tap, None);
    (first, second)
}

pub(crate) fn pair_over(tap: Option<Tap>, network: Option<Arc<dyn Network>>) -> (Arc<End>, Arc<End>, Cable) {
    let (to_second, from_first) = mpsc::channel(STREAMS_WAITING);
    let (to_first, from_second) = mpsc::channel(STREAMS_WAITING);
    let closings = [(); 2].map(|()| Arc::new(Watched::new(None)));
    let state = Arc::new(Watched::new(Cut::No));
    let end = |side, to_peer, from_peer, [closing, closing_there]: [&Arc<Closings>; 2]| {
        let way = network.clone().map(|network| Way { network, state: state.clone() });
        let (closing, closing_there) = (closing.clone(), closing_there.clone());
        Arc::new(End { side, to_peer, from_peer: Mutex::new(from_peer), closing, closing_there, tap: tap.clone(), way })
    };
    let [first, second] = &closings;
    let ends = (
        end(Side::First, to_second, from_second, [first, second]),
        end(Side::Second, to_first, from_first, [second, first]),
    );
    (ends.0, ends.1, Cable { closings, state })
}

impl Cable {
    /// From now on nothing arrives any more; each end finds out after a while of its own. Before the ends are dropped, which
    /// would close the connection.
    pub fn cut(&self, first_notices: Duration, second_notices: Duration) {
        let is_first = self.state.change(|state| std::mem::replace(state, Cut::Yes) == Cut::No);
        if !is_first {
            return;
        }
        let Self { closings: [first, second], state } = self.clone();
        tokio::spawn(async move {
            let notice = async |after, end: &Closings| {
                sleep(after).await;
                set(end, Closing::Lost);
            };
            tokio::join!(notice(first_notices, &first), notice(second_notices, &second));
            state.set(Cut::Noticed);
        });
    }
}

fn set(closings: &Closings, closing: Closing) -> bool {
    closings.change(|known| {
        let is_first = known.is_none();
        known.get_or_insert(closing);
        is_first
    })
}

impl Way {
    /// None where the cable is cut first, or has been.
    async fn unless_cut<T>(&self, what: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.state.wait_for(|state| (*state != Cut::No).then_some(())) => None,
            done = what => Some(done),
        }
    }

    /// What hangs on a cable that was cut is held until both ends know.
    async fn hold<T>(&self, held: T) {
        self.state.wait_for(|state| (*state == Cut::Noticed).then_some(())).await;
        drop(held);
    }

    async fn carry(
        self,
        from: Side,
        closing: Arc<Closings>,
        mut sent: DuplexStream,
        mut arriving: DuplexStream,
        signals: Arc<Signals>,
    ) {
        let mut piece = [0; PIECE_BYTES];
        loop {
            let crossed = async {
                let read = sent.read(&mut piece).await.unwrap_or(0);
                // As in QUIC, what is unsent when an end closes is dropped, and so is the end of a stream that goes with it.
                if closing.get().is_some() {
                    signals.lost.store(true, SeqCst);
                    return false;
                }
                sleep(self.network.delay(from, read)).await;
                if read == 0 {
                    signals.arrived.set(true);
                    return false;
                }
                // Who reads no more has said so.
                arriving.write_all(&piece[..read]).await.is_ok()
            };
            match self.unless_cut(crossed).await {
                Some(true) => {}
                Some(false) => return,
                None => {
                    signals.lost.store(true, SeqCst);
                    return self.hold((sent, arriving)).await;
                }
            }
        }
    }
}

impl End {
    pub(crate) async fn open(self: &Arc<Self>) -> Result<(Writer, Reader), NetError> {
        let there = if self.side == Side::First { Side::Second } else { Side::First };
        let (our_write, their_read) = direction(self.side, &self.closing, self.way.as_ref());
        let (their_write, our_read) = direction(there, &self.closing_there, self.way.as_ref());
        let stream = Stream { write: their_write, read: their_read };
        if let Some(way) = self.way.clone().filter(|way| *way.state.get() != Cut::No) {
            tokio::spawn(async move { way.hold(stream).await });
        } else {
            tokio::select! {
                biased;
                error = self.closed() => return Err(error),
                sent = self.to_peer.send(stream) => if sent.is_err() {
                    return Err(self.gone().await);
                }
            }
        }
        Ok((Writer { end: self.clone(), half: our_write }, Reader { end: self.clone(), half: our_read }))
    }

    pub(crate) async fn accept(self: &Arc<Self>) -> Result<(Writer, Reader), NetError> {
        let mut from_peer = self.from_peer.lock().await;
        let stream = tokio::select! {
            biased;
            error = self.closed() => return Err(error),
            stream = from_peer.recv() => match stream {
                Some(stream) => stream,
                None => return Err(self.gone().await),
            },
        };
        Ok((Writer { end: self.clone(), half: stream.write }, Reader { end: self.clone(), half: stream.read }))
    }

    /// The first closing counts, as in QUIC.
    pub(crate) fn close(&self, code: CloseCode, reason: &str) {
        let closing = Closing::By { side: self.side, code, reason: reason.to_owned() };
        if !set(&self.closing, closing.clone()) {
            return;
        }
        match (&self.way, Handle::try_current()) {
            (Some(way), Ok(runtime)) => {
                let (way, side, there) = (way.clone(), self.side, self.closing_there.clone());
                runtime.spawn(async move {
                    let crossed = sleep(way.network.delay(side, 0));
                    if way.unless_cut(crossed).await.is_some() {
                        set(&there, closing);
                    }
                });
            }
            _ => drop(set(&self.closing_there, closing)),
        }
    }

    pub(crate) async fn closed(&self) -> NetError {
        self.closing.wait_for(|closing| closing.is_some().then_some(())).await;
        self.closing_error().unwrap_or_else(|| self.vanished())
    }

    fn closing_error(&self) -> Option<NetError> {
        match self.closing.get().as_ref()? {
            Closing::By { side, .. } if *side == self.side => Some(NetError::closed_here()),
            Closing::By { code, reason, .. } => Some(NetError::closed(u64::from(code.code()), reason.clone())),
            Closing::Lost => Some(NetError::Lost { reason: "the peer has gone silent".into(), retryable: true }),
        }
    }

    /// The other end is no more, of which this one hears when the network says so.
    async fn gone(&self) -> NetError {
        match &self.way {
            Some(_) => self.closed().await,
            None => self.vanished(),
        }
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

    /// Waits until the other end has everything. Without a network it has: closing takes nothing away from a pipe's reader.
    pub(crate) async fn delivered(&mut self) -> Result<(), NetError> {
        if self.end.way.is_none() {
            return Ok(());
        }
        let arrived = &self.half.signals.arrived;
        tokio::select! {
            biased;
            () = arrived.wait_for(|arrived| arrived.then_some(())) => Ok(()),
            error = self.end.closed() => Err(error),
        }
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
            Ok(0) if self.half.signals.lost.load(SeqCst) => Err(self.end.gone().await),
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

fn direction(from: Side, closing: &Arc<Closings>, way: Option<&Way>) -> (WriteHalf, ReadHalf) {
    let (write, mut read) = tokio::io::duplex(PIPE_BYTES);
    let signals = Arc::new(Signals::default());
    if let Some(way) = way.cloned() {
        let (arriving, arrived) = tokio::io::duplex(PIPE_BYTES);
        let sent = std::mem::replace(&mut read, arrived);
        tokio::spawn(way.carry(from, closing.clone(), sent, arriving, signals.clone()));
    }
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

//! One connection, served: hello and welcome, then whatever streams the participant opens.
//!
//! Nothing is decided here. What a peer says becomes an [`Incoming`] for the run loop or a job for the body, after it
//! has been checked; what the run loop wants said arrives as a message. Who the peer is comes from its certificate.

mod blobs;
mod certificates;
mod session;
mod stream;
mod sums;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::Duration;

use experiment::{Experiment, SplitMode, WireDtype};
use model::source::Manifest;
use model::{Adapter, ChannelSums, Cut, Source};
use net::{Connection, NetError, PeerIdentity, RecvStream, SendStream};
use planted::Bug;
use tokio::sync::{mpsc, oneshot};
use wire::{CloseCode, DType, FromCoordinator, FromParticipant, ProtocolError, RefusalReason, UpdateReply};

pub use blobs::Blobs;
pub use certificates::Renewals;
use session::Session;
use stream::Stream;

use crate::body::{BodyHandle, RoundKey};
use crate::home::Home;
use crate::home::audit::Event;
use crate::journal::Journal;
use crate::round::ParticipantName;

/// A peer that connects must say hello within this time.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// Connections of one peer that are served at a time: those that it has lost count until they time out.
pub const CONNECTIONS_OF_PEER_MAX: usize = 8;

/// What every connection needs to know.
pub struct Shared {
    pub experiment: Arc<Experiment>,
    pub source: Arc<dyn Source>,
    pub manifest: Manifest,
    pub blobs: Blobs,
    pub home: Home,
    /// Absent in `whole` mode.
    pub body: Option<BodyHandle>,
    pub journal: Journal,
    /// The global adapter, and the round that begins with it.
    pub published: RwLock<Option<(u32, Arc<Adapter>)>>,
    pub incoming: mpsc::Sender<Incoming>,
    pub sessions: AtomicU64,
    pub connections_max: usize,
    /// How many connections of each peer are served.
    pub served: Mutex<BTreeMap<String, usize>>,
    pub renewals: Renewals,
}

/// What a connection tells the run loop.
pub enum Incoming {
    /// A participant is ready. The answer says whether it may stay.
    Joined {
        participant: ParticipantName,
        session: u64,
        /// The minor version of the protocol that it speaks.
        minor: u16,
        connection: Connection,
        messages: mpsc::Sender<ToParticipant>,
        answer: oneshot::Sender<Result<(), String>>,
    },
    Departed {
        participant: ParticipantName,
        session: u64,
        reason: String,
        how: Departure,
    },
    Said {
        participant: ParticipantName,
        session: u64,
        message: FromParticipant,
        /// The attempt whose step it reports, where it does.
        of: Option<RoundKey>,
    },
    Update {
        participant: ParticipantName,
        session: u64,
        key: RoundKey,
        tokens: u64,
        loss_nats: f64,
        /// The blocks the participant trained, or why they are refused.
        adapter: Result<Adapter, (RefusalReason, String)>,
        answer: oneshot::Sender<UpdateReply>,
    },
    ChannelSums {
        participant: ParticipantName,
        session: u64,
        /// Of all blocks, the body's included, or why they are refused.
        sums: Result<ChannelSums, (RefusalReason, String)>,
        answer: oneshot::Sender<UpdateReply>,
    },
}

/// How a participant has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// Without a word, or for trouble of ours: it comes back as soon as it can.
    Lost,
    /// It was stopped, and may be started again.
    Left,
    /// It was sent away, or all is over.
    Ended,
}

/// What the run loop wants said.
pub struct ToParticipant {
    pub message: FromCoordinator,
    /// With a round that is resumed: trained tokens of the steps that earlier sessions have committed.
    pub committed: BTreeMap<u64, u64>,
}

impl Shared {
    pub fn cut(&self) -> Option<Cut> {
        let experiment::Split { mode, head_blocks, tail_blocks } = self.experiment.split;
        (mode != SplitMode::Whole)
            .then_some(Cut { head_blocks: head_blocks as usize, tail_blocks: tail_blocks as usize })
    }

    /// The blocks a participant holds, and those of them it trains.
    fn blocks(&self) -> [Vec<usize>; 2] {
        let blocks = self.manifest.config.blocks;
        match self.cut() {
            None => [(0..blocks).collect(), (0..blocks).collect()],
            Some(Cut { head_blocks, tail_blocks }) => {
                let head = 0..head_blocks;
                let tail = blocks - tail_blocks..blocks;
                let held = head.chain(tail.clone()).collect();
                let trained =
                    if self.experiment.split.mode == SplitMode::U { Vec::clone(&held) } else { tail.collect() };
                [held, trained]
            }
        }
    }

    /// The tensors that an update has.
    pub fn trained_share(&self, global: &Adapter) -> Adapter {
        let [_, trained] = self.blocks();
        global.filtered(|block| trained.contains(&block))
    }

    fn dtype(&self) -> DType {
        match self.experiment.wire.dtype {
            WireDtype::F32 => DType::F32,
            WireDtype::F16 => DType::F16,
            WireDtype::Bf16 => DType::Bf16,
        }
    }
}

/// Serves one peer until it or the run is done. Where the run ends first, be it before this has begun, the peer is told that
/// it may try again.
pub fn serve(connection: Connection, shared: Arc<Shared>) -> impl Future<Output = ()> {
    let leaving = Leaving(connection.clone());
    let counted = Counted::new(&connection, &shared);
    async move {
        let _leaving = leaving;
        let Some(_counted) = counted else {
            let reason = format!("{CONNECTIONS_OF_PEER_MAX} connections of this peer are served already");
            return connection.close(CloseCode::NoRoom, &reason);
        };
        serve_peer(connection, shared).await;
    }
}

/// A connection's first stream. It is kept until the connection is closed: dropped before, it would look as if it had ended,
/// and what the peer would hear of first is that.
type Control = Option<(SendStream, RecvStream)>;

async fn serve_peer(connection: Connection, shared: Arc<Shared>) {
    let peer = connection.peer().clone();
    let mut control = None;
    let served = match &peer {
        PeerIdentity::Participant { name } => {
            let name = ParticipantName::new(name.to_string());
            Session::run(name, &connection, &shared, &mut control).await
        }
        PeerIdentity::Enrol { name, .. } => {
            let enrolled = certificates::enrol(&connection, &shared, &mut control).await;
            if let Err(ServeError::Close(CloseCode::NotAuthorized, reason)) = &enrolled {
                shared.home.admission().note(Event::Refused, name, reason);
            }
            enrolled
        }
        PeerIdentity::Coordinator => {
            Err(ServeError::Close(CloseCode::NotAuthorized, "a coordinator joins no run".into()))
        }
    };
    match served {
        Ok(()) => {
            // The participant received last and closes; a peer that does not is not waited for for ever.
            let _ = tokio::time::timeout(Duration::from_secs(5), connection.closed()).await;
            connection.close(CloseCode::Done, "done");
        }
        Err(error) => {
            let (code, reason) = error.close();
            tracing::info!(%peer, %reason, "closing a connection");
            connection.close(code, &reason);
        }
    }
}

/// A connection that counts as one of its peer's.
struct Counted {
    peer: String,
    shared: Arc<Shared>,
}

impl Counted {
    /// None where the peer has as many as it may have.
    fn new(connection: &Connection, shared: &Arc<Shared>) -> Option<Self> {
        let peer = connection.peer().to_string();
        let mut served = locked(&shared.served);
        let count = served.entry(peer.clone()).or_default();
        if *count >= CONNECTIONS_OF_PEER_MAX {
            return None;
        }
        *count += 1;
        Some(Self { peer, shared: shared.clone() })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut served = locked(&self.shared.served);
        if let Some(count) = served.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                served.remove(&self.peer);
            }
        }
    }
}

/// A peer that is dropped unserved is not sent away for good: without a word its connection would be closed as if all
/// were done.
struct Leaving(Connection);

impl Drop for Leaving {
    fn drop(&mut self) {
        if !planted::is(Bug::DropsPeersSilently) {
            self.0.close(CloseCode::GoingAway, "the coordinator has ended");
        }
    }
}

/// Why a connection ends before its time.
enum ServeError {
    Net(NetError),
    Close(CloseCode, String),
    /// The participant has taken its leave, and says why.
    Left(String),
}

impl From<NetError> for ServeError {
    fn from(error: NetError) -> Self {
        Self::Net(error)
    }
}

impl ServeError {
    fn departure(&self) -> Departure {
        match self {
            Self::Net(NetError::Lost { retryable: true, .. }) => Departure::Lost,
            Self::Net(NetError::Closed { code: Some(CloseCode::GoingAway), .. }) => Departure::Lost,
            // Whom trouble of ours has sent away tries again.
            Self::Close(CloseCode::Internal, _) => Departure::Lost,
            Self::Left(_) => Departure::Left,
            Self::Net(_) | Self::Close(..) => Departure::Ended,
        }
    }

    fn close(&self) -> (CloseCode, String) {
        match self {
            Self::Net(error) => (error.close_code(), error.to_string()),
            Self::Close(code, reason) => (*code, reason.clone()),
            Self::Left(reason) => (CloseCode::Done, format!("the participant left: {reason}")),
        }
    }
}

async fn within<T>(deadline: Duration, what: impl Future<Output = T>) -> Result<T, ServeError> {
    let late = |_| {
        ServeError::Close(
            CloseCode::TooSlow,
            format!("nothing was said within {} s of connecting; try again", deadline.as_secs()),
        )
    };
    tokio::time::timeout(deadline, what).await.map_err(late)
}

/// What is there is whole: nothing panics while it holds the lock, and nothing waits.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The peer is at fault, in a way that only the coordinator's knowledge shows.
fn misbehaved(found: String) -> ServeError {
    let error = ProtocolError::Unexpected { expected: "a request that fits the run", found };
    ServeError::Close(error.close_code(), error.to_string())
}

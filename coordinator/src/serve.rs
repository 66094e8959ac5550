//! One connection, served: hello and welcome, then whatever streams the participant opens.
//!
//! Nothing is decided here. What a peer says becomes an [`Incoming`] for the run loop or a job for the body, after it
//! has been checked; what the run loop wants said arrives as a message. Who the peer is comes from its certificate.

mod certificates;
mod sums;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, Weak};
use std::time::Duration;

use experiment::{Experiment, SplitMode, WireDtype};
use model::source::{Manifest, TensorInfo as SourceTensor};
use model::{Adapter, ChannelSums, Cut, Matrix, Segments, Source};
use net::{Connection, NetError, PeerIdentity, RecvStream, SendStream, StreamKind};
use planted::Bug;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use wire::{
    AdapterListing, BlobHeader, BlobRef, CODEC_PLAIN, CloseCode, Commit, DType, FrameKind, FromCoordinator,
    FromParticipant, MessageKind, ProtocolError, Purpose, RefusalReason, Request, Shape, SquaredNorms, TensorHeader,
    TensorInfo, UpdateReply,
};

use crate::body::{self, BodyError, BodyHandle, Forward, Place, RoundKey};
use crate::home::Home;
use crate::home::audit::Event;
use crate::journal::Journal;
use crate::round::ParticipantName;
use crate::witness::{Micro, Witness, Work};

/// What a participant is told that knows no run without a deadline; the coordinator alone closes rounds.
const OLD_DEADLINE_S: u64 = 24 * 3600;
/// A peer that connects must say hello within this time.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
/// Streams that a participant may open and give up, one after the other, before it finishes one. A round that is closed
/// costs an honest one those that are in flight.
const STREAMS_GIVEN_UP_MAX: u32 = 256;
/// The run's end is told behind the answers that are on their way, but no later than this.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
const BLOB_CHUNK_BYTES: usize = 256 << 10;

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
        /// Its connection broke off without a word.
        may_return: bool,
    },
    Said {
        participant: ParticipantName,
        session: u64,
        message: FromParticipant,
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

/// What the run loop wants said.
pub struct ToParticipant {
    pub message: FromCoordinator,
    /// With a round that is resumed: trained tokens of the steps that earlier sessions have committed.
    pub committed: BTreeMap<u64, u64>,
}

/// Everything that participants may fetch, by content.
pub struct Blobs {
    manifest: Vec<u8>,
    manifest_digest: [u8; 32],
    tokenizer: [u8; 32],
    tensors: HashMap<[u8; 32], SourceTensor>,
    /// Those that are being sent, so that a crowd that asks for one and does not read it holds it in memory once.
    open: Mutex<HashMap<[u8; 32], Weak<Vec<u8>>>>,
}

impl Blobs {
    pub fn new(manifest: &Manifest) -> Self {
        let tensors = manifest.tensors.iter().filter_map(|entry| Some((entry.blob.sha256, entry.info()?)));
        Self {
            manifest: manifest.to_bytes(),
            manifest_digest: manifest.digest(),
            tokenizer: manifest.tokenizer_json.sha256,
            tensors: tensors.collect(),
            open: Mutex::default(),
        }
    }

    /// A blob that nobody has open is read while the others wait: read side by side, it would be there as often.
    fn open(&self, digest: &[u8; 32], source: &dyn Source) -> Option<Result<Arc<Vec<u8>>, model::ModelError>> {
        let mut open = self.open.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(bytes) = open.get(digest).and_then(Weak::upgrade) {
            return Some(Ok(bytes));
        }
        open.retain(|_, bytes| bytes.strong_count() > 0);
        let read = self.read(digest, source)?.map(Arc::new);
        if let Ok(bytes) = &read {
            open.insert(*digest, Arc::downgrade(bytes));
        }
        Some(read)
    }

    fn read(&self, digest: &[u8; 32], source: &dyn Source) -> Option<Result<Vec<u8>, model::ModelError>> {
        if *digest == self.manifest_digest {
            Some(Ok(self.manifest.clone()))
        } else if *digest == self.tokenizer {
            Some(Ok(source.tokenizer().json()))
        } else {
            self.tensors.get(digest).map(|info| source.read(info))
        }
    }
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
    async move {
        let _leaving = leaving;
        serve_peer(connection, shared).await;
    }
}

async fn serve_peer(connection: Connection, shared: Arc<Shared>) {
    let peer = connection.peer().clone();
    let served = match &peer {
        PeerIdentity::Participant { name } => {
            let name = ParticipantName::new(name.to_string());
            Session::run(name, &connection, &shared).await
        }
        PeerIdentity::Enrol { name, .. } => {
            let enrolled = certificates::enrol(&connection, &shared).await;
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
}

impl From<NetError> for ServeError {
    fn from(error: NetError) -> Self {
        Self::Net(error)
    }
}

impl ServeError {
    /// Whether the peer has gone without a word, or with the word that it will try again.
    fn may_return(&self) -> bool {
        match self {
            Self::Net(NetError::Lost { retryable, .. }) => *retryable,
            Self::Net(NetError::Closed { code, .. }) => *code == Some(CloseCode::GoingAway),
            _ => false,
        }
    }

    fn close(&self) -> (CloseCode, String) {
        match self {
            Self::Net(error) => (error.close_code(), error.to_string()),
            Self::Close(code, reason) => (*code, reason.clone()),
        }
    }
}

async fn within<T>(deadline: Duration, what: impl Future<Output = T>) -> Result<T, ServeError> {
    let late = |_| ServeError::Close(CloseCode::TooSlow, "no hello in time".into());
    tokio::time::timeout(deadline, what).await.map_err(late)
}

struct Session<'a> {
    id: u64,
    participant: ParticipantName,
    connection: &'a Connection,
    shared: &'a Arc<Shared>,
    minor: u16,
    witness: Arc<Mutex<Witness>>,
    answering: Arc<Answering>,
}

impl Session<'_> {
    async fn run(
        participant: ParticipantName,
        connection: &Connection,
        shared: &Arc<Shared>,
    ) -> Result<(), ServeError> {
        let id = shared.sessions.fetch_add(1, Ordering::Relaxed);
        let witness = Arc::new(Mutex::new(Witness::new(&shared.experiment)));
        let mut session = Session { id, participant, connection, shared, minor: 0, witness, answering: Arc::default() };
        let PeerIdentity::Participant { name } = connection.peer() else {
            return Err(ServeError::Close(CloseCode::NotAuthorized, "no participant".into()));
        };
        // Whatever it is busy with, or does not do: a peer that is revoked goes.
        let ended = tokio::select! {
            biased;
            ended = session.until_over() => ended,
            () = shared.home.admission().revoked(name, connection.issued_unix()) => {
                let reason = "its certificate has been revoked; ask the coordinator for a new invitation";
                Err(ServeError::Close(CloseCode::Revoked, reason.into()))
            }
        };
        let reason = match &ended {
            Ok(()) => "the run is over".to_owned(),
            Err(error) => error.close().1,
        };
        let may_return = matches!(&ended, Err(error) if error.may_return());
        let (participant, session) = (session.participant.clone(), session.id);
        // It fails when the run loop has ended, which then knows. Of a session that never joined it is not news.
        let _ = shared.incoming.send(Incoming::Departed { participant, session, reason, may_return }).await;
        ended
    }

    async fn until_over(&mut self) -> Result<(), ServeError> {
        let (connection, session) = (self.connection, self);
        let (mut send, mut receive) = within(HELLO_DEADLINE, connection.accept()).await??;
        send.prioritize(StreamKind::Control);
        let hello: FromParticipant = within(HELLO_DEADLINE, receive.message()).await??;
        if let FromParticipant::Hello { minor, .. } = hello {
            session.minor = minor;
            connection.agree(minor.min(wire::MINOR));
        }
        if let Err(reason) = session.check_hello(&hello) {
            let code = CloseCode::Incompatible;
            send.message(&FromCoordinator::Refused { code: code.code(), reason: reason.clone() }).await?;
            return Err(ServeError::Close(code, reason));
        }
        send.message(&session.welcome()).await?;
        let (messages, mut to_send) = mpsc::channel(16);
        session.serve_streams(&mut send, &mut receive, messages, &mut to_send).await
    }

    /// The run's experiment as this participant knows it: one from before a key would refuse it, and so would one from
    /// before a key could be left away.
    fn experiment(&self) -> Experiment {
        let mut experiment = Experiment::clone(&self.shared.experiment);
        if self.minor < wire::MEASURING_MINOR {
            experiment.federation.imatrix_tokens = 0;
            experiment.federation.deadline_s.get_or_insert(OLD_DEADLINE_S);
        }
        experiment
    }

    fn check_hello(&self, hello: &FromParticipant) -> Result<(), String> {
        let FromParticipant::Hello { dtypes, codecs, .. } = hello else {
            return Err(format!("{hello:?} came where a hello was due"));
        };
        let dtype = self.shared.dtype();
        if !dtypes.contains(&dtype) || !codecs.contains(&CODEC_PLAIN) {
            return Err(format!("the run needs tensors in {dtype:?}, codec {CODEC_PLAIN}; update the participant"));
        }
        Ok(())
    }

    fn welcome(&self) -> FromCoordinator {
        let (experiment, blobs) = (self.experiment(), &self.shared.blobs);
        let cut = self.shared.cut().unwrap_or(Cut { head_blocks: 0, tail_blocks: 0 });
        FromCoordinator::Welcome {
            minor: wire::MINOR,
            session: self.id,
            dtype: self.shared.dtype(),
            codec: CODEC_PLAIN,
            head_blocks: cut.head_blocks as u32,
            tail_blocks: cut.tail_blocks as u32,
            experiment_toml: experiment.resolved_toml(),
            experiment_digest: experiment.digest(),
            manifest: BlobRef { sha256: blobs.manifest_digest, length: blobs.manifest.len() as u64 },
        }
    }

    /// Until the run ends (`Ok`) or the connection does.
    async fn serve_streams(
        &self,
        send: &mut SendStream,
        receive: &mut RecvStream,
        messages: mpsc::Sender<ToParticipant>,
        to_send: &mut mpsc::Receiver<ToParticipant>,
    ) -> Result<(), ServeError> {
        // Dropped with everything it runs when this function returns.
        let mut streams: JoinSet<Result<(), ServeError>> = JoinSet::new();
        let mut joining: Option<oneshot::Receiver<Result<(), String>>> = None;
        let (mut is_ready, mut given_up) = (false, 0);
        loop {
            tokio::select! {
                // What the peer can make ready without end comes last.
                biased;
                joined = async { joining.as_mut().expect("guarded").await }, if joining.is_some() => {
                    joining = None;
                    self.note_joining(&joined);
                    if let Ok(Err(reason)) = joined {
                        let code = CloseCode::NotAuthorized;
                        send.message(&FromCoordinator::Refused { code: code.code(), reason: reason.clone() }).await?;
                        return Err(ServeError::Close(code, reason));
                    }
                }
                message = to_send.recv() => {
                    let Some(ToParticipant { message, committed }) = message else { return Ok(()) };
                    let last = matches!(message, FromCoordinator::Finish { .. });
                    if let FromCoordinator::StartRound { round, attempt, first_step, local_steps, evaluate, .. } = message {
                        let steps = first_step..first_step.saturating_add(local_steps);
                        locked(&self.witness).gave(RoundKey { round, attempt }, steps, evaluate);
                    }
                    if let FromCoordinator::ResumeRound {
                        round, attempt, first_step, local_steps, evaluate, reported, ..
                    } = message {
                        let steps = first_step..first_step.saturating_add(local_steps);
                        let mut witness = locked(&self.witness);
                        witness.gave_again(RoundKey { round, attempt }, steps, evaluate, committed, reported);
                    }
                    if let FromCoordinator::Measure { round } = message {
                        locked(&self.witness).gave(RoundKey { round, attempt: 1 }, 0..0, false);
                    }
                    if last {
                        // Whoever hears that the run is over leaves, and reads no answer any more.
                        let _ = tokio::time::timeout(ANSWER_DEADLINE, self.answering.write()).await;
                    }
                    send.message(&message).await?;
                    if last {
                        send.finish();
                        return Ok(send.delivered().await?);
                    }
                }
                Some(served) = streams.join_next() => match served {
                    // The participant gave this stream up; it has its reasons, and the connection lives, unless it does
                    // nothing else.
                    Ok(Err(ServeError::Net(NetError::Reset { .. }))) if given_up < STREAMS_GIVEN_UP_MAX => given_up += 1,
                    Ok(Err(ServeError::Net(NetError::Reset { .. }))) => {
                        let what = format!("{given_up} streams were opened and given up in a row");
                        return Err(ServeError::Close(CloseCode::OverLimit, what));
                    }
                    Ok(served) => {
                        served?;
                        given_up = 0;
                    }
                    Err(error) => return Err(ServeError::Close(CloseCode::Internal, error.to_string())),
                },
                stream = self.connection.accept() => {
                    let (stream_send, stream_receive) = stream?;
                    let stream = Stream {
                        session: self.id,
                        participant: self.participant.clone(),
                        connection: self.connection.clone(),
                        shared: self.shared.clone(),
                        witness: self.witness.clone(),
                        answering: self.answering.clone(),
                        send: stream_send,
                        receive: stream_receive,
                        finished: false,
                    };
                    streams.spawn(stream.serve());
                }
                message = receive.message::<FromParticipant>() => match message? {
                    // It would supersede itself.
                    FromParticipant::Ready { .. } if is_ready => return Err(misbehaved("a second ready".into())),
                    FromParticipant::Ready { experiment_digest } => {
                        if experiment_digest != self.experiment().digest() {
                            return Err(ServeError::Close(CloseCode::ExperimentDiffers, "the experiments differ".into()));
                        }
                        let (answer, joined) = oneshot::channel();
                        (joining, is_ready) = (Some(joined), true);
                        self.tell(Incoming::Joined {
                            participant: self.participant.clone(),
                            session: self.id,
                            minor: self.minor,
                            connection: self.connection.clone(),
                            messages: messages.clone(),
                            answer,
                        }).await?;
                    }
                    FromParticipant::Leaving { reason } => {
                        return Err(ServeError::Close(CloseCode::Done, format!("the participant left: {reason}")));
                    }
                    FromParticipant::Hello { .. } => {
                        return Err(ServeError::Close(CloseCode::Unexpected, "a second hello".into()));
                    }
                    message => {
                        self.check_report(&message)?;
                        let (participant, session) = (self.participant.clone(), self.id);
                        self.tell(Incoming::Said { participant, session, message }).await?;
                    }
                },
            }
        }
    }

    fn note_joining(&self, joined: &Result<Result<(), String>, oneshot::error::RecvError>) {
        let PeerIdentity::Participant { name } = self.connection.peer() else { return };
        let admission = self.shared.home.admission();
        match joined {
            Ok(Ok(())) => admission.note(Event::Joined, name, self.shared.experiment.name.clone()),
            Ok(Err(reason)) => admission.note(Event::Refused, name, reason.clone()),
            // The run is over.
            Err(_) => {}
        }
    }

    fn check_report(&self, message: &FromParticipant) -> Result<(), ServeError> {
        let mut witness = locked(&self.witness);
        let judged = match *message {
            FromParticipant::StepFinished { round, step, tokens, .. } => witness.check_step(round, step, tokens),
            FromParticipant::Evaluated { round, tokens, .. } => witness.check_evaluation(round, tokens),
            _ => Ok(()),
        };
        judged.map_err(misbehaved)
    }

    async fn tell(&self, incoming: Incoming) -> Result<(), ServeError> {
        let over = |_| ServeError::Close(CloseCode::GoingAway, "the run is over".into());
        self.shared.incoming.send(incoming).await.map_err(over)
    }
}

/// Held for reading by streams whose answer must be there before the run's end is told.
type Answering = tokio::sync::RwLock<()>;

/// One stream that a participant opened. Dropped before its end, because it or the run is no longer wanted, it is given
/// up: merely ended, it would look like an answer that breaks off.
struct Stream {
    session: u64,
    participant: ParticipantName,
    connection: Connection,
    shared: Arc<Shared>,
    witness: Arc<Mutex<Witness>>,
    answering: Arc<Answering>,
    send: SendStream,
    receive: RecvStream,
    finished: bool,
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.finished {
            self.send.reset(CloseCode::Stale);
            self.receive.stop(CloseCode::Stale);
        }
    }
}

/// A step request, checked as far as it can be by itself.
struct Step {
    place: Place,
    purpose: Purpose,
    segments: Segments,
    trained_tokens: u32,
    step_tokens: u32,
}

impl Step {
    fn micro(&self) -> Micro {
        let Place { step, micro, micros, .. } = self.place;
        Micro { step, micro, micros, trained_tokens: self.trained_tokens, step_tokens: self.step_tokens }
    }
}

/// What is there is whole: nothing panics while it holds the lock, and nothing waits.
fn locked(witness: &Mutex<Witness>) -> MutexGuard<'_, Witness> {
    witness.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Stream {
    fn finish(&mut self) {
        self.send.finish();
        self.finished = true;
    }

    async fn serve(mut self) -> Result<(), ServeError> {
        match self.receive.message().await? {
            Request::Step {
                session,
                round,
                attempt,
                step,
                micro,
                micros,
                purpose,
                segments,
                trained_tokens,
                step_tokens,
            } => {
                let place = Place {
                    key: RoundKey { round, attempt },
                    session: self.session,
                    participant: self.participant.clone(),
                    step,
                    micro,
                    micros,
                };
                if session != self.session {
                    return Err(misbehaved(format!("a step of session {session} in session {}", self.session)));
                }
                let segments = self.check_segments(&segments)?;
                if trained_tokens as usize > segments.tokens() {
                    let tokens = segments.tokens();
                    return Err(misbehaved(format!("{trained_tokens} trained tokens in a micro-batch of {tokens}")));
                }
                if purpose == Purpose::Train {
                    self.check_size(micros, step_tokens)?;
                }
                let served = self.step(&Step { place, purpose, segments, trained_tokens, step_tokens }).await;
                match served {
                    Err(StepError::Serve(error)) => Err(error),
                    Ok(()) | Err(StepError::Stale) => Ok(()),
                }
            }
            Request::FetchAdapter { round } => self.fetch_adapter(round).await,
            Request::Update { round, attempt, tokens, loss_nats, tensors } => {
                self.update(RoundKey { round, attempt }, tokens, loss_nats, tensors).await
            }
            Request::FetchBlob { sha256, offset } => self.fetch_blob(sha256, offset).await,
            Request::Renew { csr_der } => self.renew(csr_der).await,
            Request::ChannelSums { round, tokens, tensors } => self.channel_sums(round, tokens, tensors).await,
            Request::Enrol { .. } => Err(misbehaved("an enrolment by a participant that is enrolled".into())),
        }
    }

    fn check_segments(&self, segments: &[u32]) -> Result<Segments, ServeError> {
        let experiment::Training { batch_tokens, .. } = self.shared.experiment.training;
        let tokens: u64 = segments.iter().map(|&length| u64::from(length)).sum();
        if tokens > u64::from(batch_tokens) {
            let what = format!("a micro-batch of {tokens} tokens; the experiment allows {batch_tokens}");
            return Err(ServeError::Close(CloseCode::OverLimit, what));
        }
        let lengths = segments.iter().map(|&length| length as usize).collect();
        Segments::new(lengths).map_err(|error| misbehaved(error.to_string()))
    }

    /// A step that trains is of the experiment's size: its trained tokens are its weight in the cohort.
    fn check_size(&self, micros: u32, step_tokens: u32) -> Result<(), ServeError> {
        let experiment::Training { batch_tokens, accumulate, .. } = self.shared.experiment.training;
        if micros != accumulate {
            return Err(misbehaved(format!("a step of {micros} micro-batches; the experiment has {accumulate}")));
        }
        let allowed = u64::from(batch_tokens) * u64::from(accumulate);
        if step_tokens == 0 {
            return Err(misbehaved("a step of 0 trained tokens".into()));
        }
        if u64::from(step_tokens) > allowed {
            let what = format!("a step of {step_tokens} trained tokens; the experiment allows {allowed}");
            return Err(ServeError::Close(CloseCode::OverLimit, what));
        }
        Ok(())
    }

    /// The same of an update, whose weight is that of all its steps.
    fn check_work(&self, key: RoundKey, tokens: u64) -> Result<(), String> {
        let work = locked(&self.witness).work_of(key);
        let experiment::Training { batch_tokens, accumulate, .. } = self.shared.experiment.training;
        let step_allowed = u64::from(batch_tokens) * u64::from(accumulate);
        let allowed = step_allowed.saturating_mul(self.shared.experiment.federation.local_steps);
        match work {
            Work::Unfinished => Err("its steps are not complete".into()),
            Work::Finished { tokens: trained } if tokens != trained => {
                Err(format!("it claims {tokens} trained tokens; its steps had {trained}"))
            }
            Work::Uncounted if tokens > allowed => {
                Err(format!("it claims {tokens} trained tokens; a round has at most {allowed}"))
            }
            Work::Finished { .. } | Work::Uncounted => Ok(()),
        }
    }

    /// PROTOCOL.md, "Step": four tensors and a commit, or two tensors.
    async fn step(&mut self, step: &Step) -> Result<(), StepError> {
        let Some(body) = self.shared.body.clone() else {
            return Err(misbehaved("a step through a body that this run does not have".into()).into());
        };
        let Step { place, purpose, segments, step_tokens, .. } = step;
        let width = self.shared.manifest.config.width;
        let header = TensorHeader {
            kind: FrameKind::Activations,
            dtype: self.shared.dtype(),
            session: self.session,
            round: place.key.round,
            step: place.step,
            micro: place.micro,
            shape: Shape::new(&[segments.tokens() as u32, width as u32])
                .map_err(|error| misbehaved(error.to_string()))?,
        };
        let x = Matrix::new(segments.tokens(), width, self.receive.tensor(&header).await?);
        if !locked(&self.witness).has_given(place.key) {
            return Err(StepError::Stale);
        }
        let forward = match purpose {
            Purpose::Train => Forward::Train,
            Purpose::Evaluate => Forward::Evaluate,
            Purpose::Measure => Forward::Measure,
        };
        let y = body.forward(place.clone(), forward, segments.clone(), x).await?;
        match purpose {
            Purpose::Train => locked(&self.witness).trained(place.key, step.micro()).map_err(misbehaved)?,
            Purpose::Evaluate => locked(&self.witness).evaluated(place.key, step.trained_tokens),
            // The body counts these itself.
            Purpose::Measure => {}
        }
        self.send.tensor(&header, y.values()).await.map_err(overflowed)?;
        if *purpose != Purpose::Train || self.shared.experiment.split.mode != SplitMode::U {
            self.receive.end().await?;
            if *purpose == Purpose::Train {
                if place.micro + 1 == place.micros {
                    let (squared_norms_head, squared_norms_tail) = (Vec::new(), Vec::new());
                    let tokens = u64::from(*step_tokens);
                    body.commit(place.clone(), body::Commit { squared_norms_head, squared_norms_tail, tokens }).await?;
                }
                locked(&self.witness).finished(place.key, step.micro());
            }
            self.finish();
            return Ok(());
        }
        let header = TensorHeader { kind: FrameKind::CutGradient, ..header };
        let gradient = Matrix::new(segments.tokens(), width, self.receive.tensor(&header).await?);
        let body::Backward { gradient, squared_norms } = body.backward(place.clone(), gradient).await?;
        self.send.tensor(&header, gradient.values()).await.map_err(overflowed)?;
        if let Some(blocks) = squared_norms {
            self.send.message(&SquaredNorms { blocks }).await?;
            let Commit { squared_norms_head, squared_norms_tail } = self.receive.message().await?;
            let commit = body::Commit { squared_norms_head, squared_norms_tail, tokens: u64::from(*step_tokens) };
            body.commit(place.clone(), commit).await?;
            locked(&self.witness).finished(place.key, step.micro());
        }
        self.receive.end().await?;
        self.finish();
        Ok(())
    }

    async fn fetch_adapter(mut self, round: u32) -> Result<(), ServeError> {
        self.receive.end().await?;
        self.send.prioritize(StreamKind::Bulk);
        let published = self.shared.published.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        let Some((_, adapter)) = published.filter(|(published, _)| *published == round) else { return Ok(()) };
        let [held, _] = self.shared.blocks();
        let share = adapter.filtered(|block| held.contains(&block));
        let tensors = listing_of(&share);
        self.send.message(&AdapterListing { round, adapter: "default".into(), tensors: tensors.clone() }).await?;
        for (i, (tensor, info)) in share.tensors().iter().zip(&tensors).enumerate() {
            let header = self.header(FrameKind::Adapter, round, i, info)?;
            self.send.tensor(&header, &tensor.values).await?;
        }
        self.finish();
        Ok(())
    }

    async fn update(
        mut self,
        key: RoundKey,
        tokens: u64,
        loss_nats: f64,
        tensors: Vec<TensorInfo>,
    ) -> Result<(), ServeError> {
        let published = self.shared.published.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        let Some((_, global)) = published else {
            return Err(misbehaved("an update before the first round".into()));
        };
        let like = self.shared.trained_share(&global);
        let (expected, session) = (listing_of(&like), self.session);
        let adapter = if tensors != expected {
            let (found, expected) = (tensors.len(), expected.len());
            self.receive.stop(CloseCode::Unexpected);
            let text = format!("the update lists {found} tensors that are not the {expected} that this run trains");
            Err((RefusalReason::WrongTensors, text))
        } else {
            let mut values = Vec::with_capacity(tensors.len());
            for (i, info) in tensors.iter().enumerate() {
                let header = self.header(FrameKind::Adapter, key.round, i, info)?;
                values.push(self.receive.tensor(&header).await?);
            }
            self.receive.end().await?;
            like.with_tensors(values).map_err(|error| (RefusalReason::WrongTensors, error.to_string()))
        };
        let adapter = match self.check_work(key, tokens) {
            Ok(()) => adapter,
            Err(text) => adapter.and(Err((RefusalReason::WrongCount, text))),
        };
        let (answer, answered) = oneshot::channel();
        let participant = self.participant.clone();
        let update = Incoming::Update { participant, session, key, tokens, loss_nats, adapter, answer };
        let over = ServeError::Close(CloseCode::GoingAway, "the run is over".into());
        if self.shared.incoming.send(update).await.is_err() {
            return Err(over);
        }
        let reply = answered
            .await
            .unwrap_or(UpdateReply::Refused { reason: RefusalReason::Late, text: "the run is over".into() });
        self.send.message(&reply).await?;
        self.finish();
        Ok(())
    }

    async fn fetch_blob(mut self, sha256: [u8; 32], offset: u64) -> Result<(), ServeError> {
        self.receive.end().await?;
        self.send.prioritize(StreamKind::Bulk);
        let shared = self.shared.clone();
        let read = offload::beside(move || shared.blobs.open(&sha256, &*shared.source)).await;
        let internal = |error: String| {
            tracing::error!(%error, "a part of the model cannot be read");
            ServeError::Close(CloseCode::Internal, "the coordinator cannot read the model".into())
        };
        let bytes = match read.map_err(|error| internal(error.to_string()))? {
            Some(Ok(bytes)) => bytes,
            Some(Err(error)) => return Err(internal(error.to_string())),
            None => return Err(misbehaved("a blob that is no part of this run's model".into())),
        };
        let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
        let rest = rest.ok_or_else(|| misbehaved(format!("offset {offset} in a blob of {} bytes", bytes.len())))?;
        self.send.message(&BlobHeader { length: rest.len() as u64 }).await?;
        for chunk in rest.chunks(BLOB_CHUNK_BYTES) {
            self.send.bytes(MessageKind::Blob, chunk).await?;
        }
        self.finish();
        Ok(())
    }

    /// Of the `i`th tensor of a listing.
    fn header(&self, kind: FrameKind, round: u32, i: usize, tensor: &TensorInfo) -> Result<TensorHeader, ServeError> {
        let shape = tensor.shape().map_err(|error| misbehaved(error.to_string()))?;
        let (dtype, session) = (DType::F32, self.session);
        Ok(TensorHeader { kind, dtype, session, round, step: 0, micro: i as u32, shape })
    }
}

fn listing_of(adapter: &Adapter) -> Vec<TensorInfo> {
    let info = |tensor: &model::AdapterTensor| TensorInfo {
        name: tensor.name.clone(),
        shape: tensor.shape.iter().map(|&size| size as u32).collect(),
    };
    adapter.tensors().iter().map(info).collect()
}

/// The peer is at fault, in a way that only the coordinator's knowledge shows.
fn misbehaved(found: String) -> ServeError {
    let error = ProtocolError::Unexpected { expected: "a request that fits the run", found };
    ServeError::Close(error.close_code(), error.to_string())
}

/// What the body makes of finite values is finite, unless these are beyond all measure.
fn overflowed(error: NetError) -> ServeError {
    match error {
        NetError::Unsendable { error } => {
            let what = format!("the values that it sent overflow in the body: {error}");
            ServeError::Close(CloseCode::NotFinite, what)
        }
        error => error.into(),
    }
}

enum StepError {
    Stale,
    Serve(ServeError),
}

impl From<NetError> for StepError {
    fn from(error: NetError) -> Self {
        Self::Serve(error.into())
    }
}

impl From<ServeError> for StepError {
    fn from(error: ServeError) -> Self {
        Self::Serve(error)
    }
}

impl From<BodyError> for StepError {
    fn from(error: BodyError) -> Self {
        match error {
            BodyError::Stale => Self::Stale,
            BodyError::Order(_) | BodyError::Misplaced(_) => Self::Serve(misbehaved(error.to_string())),
            BodyError::Model(_) => {
                tracing::error!(%error, "the body failed");
                Self::Serve(ServeError::Close(CloseCode::Internal, "the body failed".into()))
            }
        }
    }
}

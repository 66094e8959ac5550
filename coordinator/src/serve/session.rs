//! One participant's connection: hello and welcome, what the run loop wants said, and a task for each stream.
//!
//! It refuses what does not fit the session: a peer that cannot speak the run's types, a second hello or ready, another
//! experiment, and reports that its own work does not bear out. Who may stay, the run loop answers.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use experiment::Experiment;
use model::Cut;
use net::{Connection, NetError, PeerIdentity, RecvStream, SendStream, StreamKind};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use wire::{CODEC_PLAIN, CloseCode, FromCoordinator, FromParticipant};

use super::stream::Answering;
use super::{
    Control, Departure, HELLO_DEADLINE, Incoming, ServeError, Shared, Stream, ToParticipant, locked, misbehaved, within,
};
use crate::body::RoundKey;
use crate::home::audit::Event;
use crate::round::ParticipantName;
use crate::witness::{Reported, Witness};

/// What a participant is told that knows no run without a deadline; the coordinator alone closes rounds.
const OLD_DEADLINE_S: u64 = 24 * 3600;
/// Streams that a participant may open and give up, one after the other, before it finishes one. A round that is closed
/// costs an honest one those that are in flight.
const STREAMS_GIVEN_UP_MAX: u32 = 256;
/// The run's end is told behind the answers that are on their way, but no later than this.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

pub(super) struct Session<'a> {
    id: u64,
    participant: ParticipantName,
    connection: &'a Connection,
    shared: &'a Arc<Shared>,
    minor: u16,
    witness: Arc<Mutex<Witness>>,
    answering: Arc<Answering>,
}

impl Session<'_> {
    pub(super) async fn run(
        participant: ParticipantName,
        connection: &Connection,
        shared: &Arc<Shared>,
        control: &mut Control,
    ) -> Result<(), ServeError> {
        let id = shared.sessions.fetch_add(1, Ordering::Relaxed);
        let witness = Arc::new(Mutex::new(Witness::new(&shared.experiment)));
        let answering = Arc::default();
        let mut session = Session { id, participant, connection, shared, minor: 0, witness, answering };
        let PeerIdentity::Participant { name } = connection.peer() else {
            return Err(ServeError::Close(CloseCode::NotAuthorized, "no participant".into()));
        };
        // Whatever it is busy with, or does not do: a peer that is revoked goes.
        let ended = tokio::select! {
            biased;
            ended = session.until_over(control) => ended,
            () = shared.home.admission().revoked(name, connection.issued_unix()) => {
                let reason = "its certificate has been revoked; ask the coordinator for a new invitation";
                Err(ServeError::Close(CloseCode::Revoked, reason.into()))
            }
        };
        let reason = match &ended {
            Ok(()) => "the run is over".to_owned(),
            Err(error) => error.close().1,
        };
        let how = ended.as_ref().map_or_else(ServeError::departure, |()| Departure::Ended);
        let (participant, session) = (session.participant.clone(), session.id);
        // It fails when the run loop has ended, which then knows. Of a session that never joined it is not news.
        let _ = shared.incoming.send(Incoming::Departed { participant, session, reason, how }).await;
        ended
    }

    async fn until_over(&mut self, control: &mut Control) -> Result<(), ServeError> {
        let (connection, session) = (self.connection, self);
        let (send, receive) = control.insert(within(HELLO_DEADLINE, connection.accept()).await??);
        send.prioritize(StreamKind::Control);
        let hello: FromParticipant = within(HELLO_DEADLINE, receive.message()).await??;
        if let FromParticipant::Hello { minor, .. } = hello {
            session.minor = minor;
            connection.agree(minor.min(wire::MINOR));
        }
        if let Err(reason) = session.check_hello(&hello) {
            let code = CloseCode::Incompatible;
            return Err(refuse(send, code, reason).await);
        }
        send.message(&session.welcome()).await?;
        let (messages, mut to_send) = mpsc::channel(16);
        session.serve_streams(send, receive, messages, &mut to_send).await
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
            manifest: blobs.manifest(),
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
                        return Err(refuse(send, code, reason).await);
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
                        return Err(ServeError::Left(reason));
                    }
                    FromParticipant::Hello { .. } => {
                        return Err(ServeError::Close(CloseCode::Unexpected, "a second hello".into()));
                    }
                    message => {
                        let of = match self.check_report(&message)? {
                            Some(Reported { is_new: false, .. }) => continue,
                            reported => reported.map(|reported| reported.key),
                        };
                        let (participant, session) = (self.participant.clone(), self.id);
                        self.tell(Incoming::Said { participant, session, message, of }).await?;
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

    fn check_report(&self, message: &FromParticipant) -> Result<Option<Reported>, ServeError> {
        let mut witness = locked(&self.witness);
        let judged = match *message {
            FromParticipant::StepFinished { round, step, tokens, .. } => {
                witness.check_step(round, step, tokens).map(Some)
            }
            FromParticipant::Evaluated { round, tokens, .. } => witness.check_evaluation(round, tokens).map(|()| None),
            FromParticipant::CannotResume { round, attempt } => {
                witness.check_giving_up(RoundKey { round, attempt }).map(|()| None)
            }
            _ => Ok(None),
        };
        judged.map_err(misbehaved)
    }

    async fn tell(&self, incoming: Incoming) -> Result<(), ServeError> {
        let over = |_| ServeError::Close(CloseCode::GoingAway, "the run is over".into());
        self.shared.incoming.send(incoming).await.map_err(over)
    }
}

/// Tells a participant why it may not take part, and lets it hear that before the connection is closed.
async fn refuse(send: &mut SendStream, code: CloseCode, reason: String) -> ServeError {
    let refused = FromCoordinator::Refused { code: code.code(), reason: reason.clone() };
    let told = async {
        send.message(&refused).await?;
        send.finish();
        send.delivered().await
    };
    let _ = tokio::time::timeout(ANSWER_DEADLINE, told).await;
    ServeError::Close(code, reason)
}

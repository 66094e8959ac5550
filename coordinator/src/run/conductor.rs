//! Keeps a run going: what happens becomes events for the round machine, and its actions are performed.
//!
//! Held here is what is between the machine and the streams: who is connected, and which updates have come. How rounds end
//! is in `closing`, who gets on in `progress`, how an interrupted round goes on in `recovery`, what goes into the run
//! directory in `record`, what participants say in `said`, how updates are answered in `updates`.

mod closing;
mod measuring;
mod progress;
mod record;
mod recovery;
mod said;
mod updates;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use experiment::{MetricsLog, Row, RunDirectory, hex};
use model::Adapter;
use net::{Connection, PeerIdentity};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use wire::{CloseCode, FromCoordinator, Outcome, UpdateReply};

use self::updates::JudgedUpdate;
use super::{Arrivals, Ended, RunError, SOFTWARE, Watcher, body_blocks};
use crate::aggregate::Aggregator;
use crate::body::RoundKey;
use crate::home::audit;
use crate::journal::{Entry, Health, Record};
use crate::report::units::counted;
use crate::round::{Action, DeviceId, Event, FinishReason, ParticipantName, Rounds};
use crate::serve::{self, Departure, Incoming, Shared, ToParticipant};
use crate::status::ParticipantStatus;

/// How often a full disk is asked whether it has room again.
const STORAGE_RETRY: Duration = Duration::from_millis(250);
pub(super) struct Conductor {
    rounds: Rounds,
    directory: RunDirectory,
    metrics: MetricsLog,
    aggregator: Aggregator,
    /// The global adapter.
    adapter: Arc<Adapter>,
    finished: u32,
    /// Everybody who was ever here.
    participants: BTreeMap<ParticipantName, ParticipantStatus>,
    connections: BTreeMap<ParticipantName, Connected>,
    open: Option<OpenRound>,
    state: String,
    status_written: Option<Instant>,
    /// Something has changed since.
    status_is_stale: bool,
    /// It could not be written when that was last tried.
    status_missed: bool,
    /// Connections, those that have not joined included.
    served: usize,
    begun: Instant,
    shared: Arc<Shared>,
    watcher: Box<dyn Watcher>,
    /// Evaluations on record, by the round whose adapter they are of.
    evaluated: BTreeSet<(u32, String)>,
    /// The first step of the open round that is not on record yet, by participant.
    reported: BTreeMap<ParticipantName, u64>,
    /// Round, attempt and sender of the updates that a coordinator before this one has recorded, where the round is not over.
    delivered: BTreeSet<(u32, u32, String)>,
    /// Steps that it has recorded, where the round is not over: a round that is begun anew is trained to the same losses.
    trained: BTreeSet<recovery::TrainedStep>,
    /// The row of the round that is not over, where it was: its files were damaged, and it is made again.
    remade: Option<Row>,
    /// Refused updates since a round was last finished: which one, and how many.
    refused: BTreeMap<ParticipantName, (u32, u32)>,
    /// Rows that a full disk has not taken.
    unwritten: VecDeque<Row>,
    /// How the journal does, and what the conductor's own files have met.
    health: watch::Receiver<Health>,
    trouble: Option<String>,
    /// What was last said of either.
    degraded: bool,
    /// What the machine was last told of it.
    held: bool,
    /// When it was last looked at what has crossed the connections.
    looked: Instant,
    stop: watch::Receiver<bool>,
    /// Importance matrices, once they are asked for.
    measuring: Option<measuring::Measuring>,
}

struct Connected {
    session: u64,
    minor: u16,
    connection: Connection,
    messages: mpsc::Sender<ToParticipant>,
    /// All that had crossed it when that was last looked at.
    moved_bytes: u64,
}

struct OpenRound {
    key: RoundKey,
    begun: Instant,
    cohort: Vec<ParticipantName>,
    first_step: u64,
    updates: BTreeMap<ParticipantName, Update>,
    steps_done: u64,
}

struct Update {
    adapter: Adapter,
    tokens: u64,
    loss_nats: f64,
}

/// What to do about something, and the update it was about.
type Reaction = (Vec<Action>, Option<Judged>);

/// What the machine decides about.
enum Judged {
    Update(JudgedUpdate),
    Sums(measuring::JudgedSums),
}

impl Conductor {
    pub(super) fn new(
        rounds: Rounds,
        (directory, metrics): (RunDirectory, MetricsLog),
        aggregator: Aggregator,
        adapter: Adapter,
        finished: u32,
        shared: Arc<Shared>,
        watcher: Box<dyn Watcher>,
    ) -> Self {
        directory.hold_reserve();
        Self {
            evaluated: BTreeSet::new(),
            reported: BTreeMap::new(),
            delivered: BTreeSet::new(),
            trained: BTreeSet::new(),
            remade: None,
            refused: BTreeMap::new(),
            unwritten: VecDeque::new(),
            health: shared.journal.health(),
            trouble: None,
            degraded: false,
            held: false,
            looked: Instant::now(),
            stop: watch::channel(false).1,
            measuring: None,
            rounds,
            metrics,
            directory,
            aggregator,
            adapter: Arc::new(adapter),
            finished,
            participants: BTreeMap::new(),
            connections: BTreeMap::new(),
            open: None,
            state: "waiting for participants".into(),
            status_written: None,
            status_is_stale: false,
            status_missed: false,
            served: 0,
            begun: Instant::now(),
            shared,
            watcher,
        }
    }

    pub(super) fn announce(&mut self, address: Option<SocketAddr>) -> Result<(), RunError> {
        if let Some(address) = address {
            self.watcher.note(&format!("listening on {address}"));
        }
        let experiment = self.shared.experiment.clone();
        let model_digest = hex(&self.shared.manifest.digest());
        let row = Row::Run {
            time_unix_ms: self.shared.journal.unix_ms(),
            experiment_digest: hex(&experiment.digest()),
            model_digest: model_digest.clone(),
            software: SOFTWARE.into(),
            energy_j: None,
        };
        self.record(&row)?;
        self.watcher.note(&format!("model {model_digest} of {}", self.shared.source.origin().display()));
        self.watcher.note(&format!("run directory {}", self.directory.path().display()));
        if self.finished > 0 {
            self.watcher.note(&format!("{} of {} rounds are finished", self.finished, experiment.federation.rounds));
        }
        let cohort = experiment.federation.cohort;
        self.watcher.note(&format!("waiting for {}", counted(u64::from(cohort), "participant")));
        self.write_status(true)
    }

    pub(super) async fn conduct(
        mut self,
        mut connections: Arrivals,
        mut events: mpsc::Receiver<Incoming>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<Ended, RunError> {
        let mut peers = JoinSet::new();
        let (tell, stop) = watch::channel(false);
        self.stop = stop.clone();
        let stopping = async {
            shutdown.await;
            let _ = tell.send(true);
            std::future::pending().await
        };
        let ended = tokio::select! {
            biased;
            ended = self.until_finished(&mut peers, &mut connections, &mut events, stop) => ended,
            never = stopping => never,
        };
        match ended {
            Ok(reason) => self.end(reason, peers).await,
            Err(error) => {
                // Who is told so tries again, and finds the coordinator when its trouble is mended.
                for connected in self.connections.values() {
                    connected.connection.close(CloseCode::GoingAway, "the coordinator has failed");
                }
                Err(error)
            }
        }
    }

    async fn until_finished(
        &mut self,
        peers: &mut JoinSet<()>,
        Arrivals(connections): &mut Arrivals,
        events: &mut mpsc::Receiver<Incoming>,
        mut stop: watch::Receiver<bool>,
    ) -> Result<FinishReason, RunError> {
        let mut stopped = false;
        let mut health = self.health.clone();
        if self.open.is_some() || self.finished > 0 {
            // What was interrupted may be complete; and a time has to be counted from now on.
            let actions = self.handle(Event::Ticked);
            if let Some(reason) = self.perform(actions, None).await? {
                return Ok(reason);
            }
        }
        loop {
            self.note_storage()?;
            if self.served != peers.len() {
                (self.served, self.status_is_stale) = (peers.len(), true);
            }
            let noted = self.note_progress();
            if let Some(reason) = self.perform(noted, None).await? {
                return Ok(reason);
            }
            let now_ms = self.now_ms();
            let deadline = self.rounds.next_deadline_ms().map(|at| Duration::from_millis(at.saturating_sub(now_ms)));
            let status_due = self.status_due();
            let happened = tokio::select! {
                // What becomes ready seldom comes first, so that nobody who says much keeps anything else from happening.
                biased;
                Ok(_) = stop.wait_for(|stop| *stop), if !stopped => {
                    stopped = true;
                    Err(Event::StopRequested)
                }
                Ok(()) = health.changed() => continue,
                () = tokio::time::sleep(deadline.unwrap_or(Duration::MAX)), if deadline.is_some() => Err(Event::Ticked),
                () = tokio::time::sleep(STORAGE_RETRY), if !self.unwritten.is_empty() => {
                    self.write_rows()?;
                    continue;
                }
                () = tokio::time::sleep_until(status_due.unwrap_or_else(Instant::now)), if status_due.is_some() => {
                    self.write_status(true)?;
                    continue;
                }
                // A peer's task that has ended has said so; it is only collected here.
                Some(_) = peers.join_next() => continue,
                // A connection has cost its handshake, which takes longer than this.
                Some(connection) = connections.recv() => {
                    self.admit(connection, peers);
                    continue;
                }
                incoming = events.recv() => Ok(incoming.expect("the run holds a sender")),
            };
            let (actions, judged) = match happened {
                Err(event) => {
                    // Who has got on meanwhile is not late.
                    let mut actions = self.note_progress();
                    actions.extend(self.handle(event));
                    (actions, None)
                }
                Ok(incoming) => match self.receive(incoming).await? {
                    Some(received) => received,
                    None => continue,
                },
            };
            if let Some(reason) = self.perform(actions, judged).await? {
                return Ok(reason);
            }
        }
    }

    fn admit(&self, connection: Connection, peers: &mut JoinSet<()>) {
        // Every member may come again before the connection it has lost times out.
        let connections_max = self.shared.connections_max.max(2 * self.shared.experiment.federation.cohort as usize);
        if peers.len() >= connections_max {
            tracing::warn!(peer = %connection.peer(), connections_max, "no room for a connection");
            connection.close(CloseCode::NoRoom, &format!("{connections_max} connections are served already"));
            return;
        }
        peers.spawn(serve::serve(connection, self.shared.clone()));
    }

    fn handle(&mut self, event: Event) -> Vec<Action> {
        let now_ms = self.now_ms();
        self.rounds.handle(event, now_ms)
    }

    /// Takes note of what a connection says, and asks the machine what to do about it.
    async fn receive(&mut self, incoming: Incoming) -> Result<Option<Reaction>, RunError> {
        match incoming {
            Incoming::Joined { participant, session, minor, connection, messages, answer } => {
                // The machine refuses by an action; asking it first keeps the newcomer out of the tables until then.
                let (round, device) = (self.rounds.round(), DeviceId(connection.peer_key()));
                let actions = self.handle(Event::Joined { participant: participant.clone(), device });
                let refused = actions.iter().find_map(|action| match action {
                    Action::RefuseJoin { participant: refused, reason } if *refused == participant => {
                        Some(reason.to_string())
                    }
                    _ => None,
                });
                // A peer that is gone already reports its departure.
                let _ = answer.send(refused.clone().map_or(Ok(()), Err));
                if refused.is_none() {
                    if actions.contains(&Action::Supersede { participant: participant.clone() }) {
                        self.supersede(&participant, round)?;
                    }
                    self.watcher.note(&format!("{participant} joined"));
                    let connected = Connected { session, minor, connection, messages, moved_bytes: 0 };
                    self.connections.insert(participant.clone(), connected);
                    self.set_state(&participant, "connected");
                }
                Ok(Some((actions, None)))
            }
            Incoming::Departed { participant, session, reason, how } => {
                if self.connections.get(&participant).is_none_or(|connected| connected.session != session) {
                    return Ok(None);
                }
                self.note_departure(&participant, self.rounds.round(), reason)?;
                let event = match how {
                    Departure::Lost => Event::Lost { participant },
                    Departure::Left => Event::Left { participant },
                    Departure::Ended => Event::Departed { participant },
                };
                Ok(Some((self.handle(event), None)))
            }
            Incoming::Said { participant, session, message, of } => {
                if self.connections.get(&participant).is_none_or(|connected| connected.session != session) {
                    return Ok(None);
                }
                Ok(self.said(participant, message, of)?.map(|event| (self.handle(event), None)))
            }
            Incoming::Update { participant, session, key, tokens, loss_nats, adapter, answer } => {
                if self.connections.get(&participant).is_none_or(|connected| connected.session != session) {
                    return Ok(None);
                }
                let RoundKey { round, attempt } = key;
                if let Ok(adapter) = &adapter
                    && self.is_accepted(&participant, key, (tokens, loss_nats), adapter)
                {
                    self.shared.journal.flush(move || drop(answer.send(UpdateReply::Accepted))).await;
                    return Ok(None);
                }
                let name = participant.clone();
                let (event, adapter, reason) = match adapter {
                    Ok(adapter) => (Event::UpdateArrived { participant, round, attempt, tokens }, Some(adapter), None),
                    Err(reason) => (Event::UpdateRejected { participant, round, attempt }, None, Some(reason)),
                };
                let attempt = key.attempt;
                let judged = JudgedUpdate { participant: name, attempt, adapter, reason, tokens, loss_nats, answer };
                Ok(Some((self.handle(event), Some(Judged::Update(judged)))))
            }
            incoming @ Incoming::ChannelSums { .. } => {
                Ok(self.sums_arrived(incoming).map(|(event, judged)| (self.handle(event), Some(Judged::Sums(judged)))))
            }
        }
    }

    /// What the earlier connection still says, its departure included, is of a session that is known no longer.
    fn supersede(&mut self, participant: &ParticipantName, round: u32) -> Result<(), RunError> {
        let reason = "the same device has connected again";
        if let Some(earlier) = self.connections.get(participant) {
            if let PeerIdentity::Participant { name } = earlier.connection.peer() {
                let from =
                    earlier.connection.remote_address().map_or(String::new(), |address| format!(" from {address}"));
                self.shared.home.admission().note(
                    audit::Event::Superseded,
                    name,
                    format!("its connection{from} is ended"),
                );
            }
            earlier.connection.close(CloseCode::Superseded, reason);
        }
        self.note_departure(participant, round, reason.into())
    }

    fn note_departure(&mut self, participant: &ParticipantName, round: u32, reason: String) -> Result<(), RunError> {
        self.record_bytes(participant)?;
        self.connections.remove(participant);
        self.set_state(participant, "departed");
        self.watcher.note(&format!("{participant} departed: {reason}"));
        self.record(&Row::Departure { round, participant: participant.to_string(), reason, energy_j: None })
    }

    /// Performs the machine's actions in their order; returns why the run is over, if it is.
    async fn perform(
        &mut self,
        actions: Vec<Action>,
        judged: Option<Judged>,
    ) -> Result<Option<FinishReason>, RunError> {
        let mut judged = judged;
        let mut finish = None;
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            match action {
                // Done where the join was received.
                Action::RefuseJoin { .. } | Action::Supersede { .. } => {}
                Action::WaitFor { round, missing } => {
                    self.state = "waiting for participants".into();
                    let what = match round > self.shared.experiment.federation.rounds {
                        true => "the end of the run".to_owned(),
                        false => format!("round {round}"),
                    };
                    self.watcher.note(&format!("{what} waits for {}", counted(missing as u64, "more participant")));
                    self.write_status(true)?;
                }
                Action::StartRound { round, attempt, cohort, first_step, evaluate } => {
                    self.start_round(RoundKey { round, attempt }, cohort, first_step, evaluate).await?;
                }
                Action::ResumeMember { participant, round, attempt, first_step, evaluate } => {
                    let key = RoundKey { round, attempt };
                    if !self.resume(&participant, key, first_step, evaluate).await? {
                        actions.extend(self.handle(Event::CannotResume { participant, round, attempt }));
                    }
                }
                Action::AcceptUpdate { .. } => {
                    if let Some(Judged::Update(judged)) = judged.take() {
                        self.accept(judged).await?;
                    }
                }
                Action::RefuseUpdate { round, reason, .. } => {
                    if let Some(Judged::Update(judged)) = judged.take() {
                        self.refuse(judged, round, reason)?;
                    }
                }
                Action::NoteLate { participant } => {
                    self.watcher
                        .note(&format!("{participant} has got nowhere for too long; nobody waits for it any more"));
                }
                Action::RemoveMember { participant } => match &self.shared.body {
                    // The body notes it where it is done, between two commits.
                    Some(body) => body.remove(participant.clone()).await,
                    None => self.note(Record::Removed { participant: participant.to_string() }).await,
                },
                Action::Aggregate { round, members } => self.aggregate(round, members).await?,
                Action::AbandonRound { round, attempt, why } => {
                    self.watcher.note(&format!("round {round}, attempt {attempt} is abandoned: {why}"));
                    if let Some(body) = &self.shared.body {
                        body.abandon().await;
                    }
                    self.note(Record::Abandoned { attempt }).await;
                    if let Some(open) = self.open.take() {
                        for participant in open.cohort {
                            self.send(
                                &participant,
                                FromCoordinator::RoundClosed { round, outcome: Outcome::Abandoned },
                            )
                            .await;
                        }
                    }
                }
                Action::Evaluate { round, participants } => self.evaluate(round, participants).await?,
                Action::Measure { participants } => actions.extend(self.measure(participants).await?),
                Action::AcceptSums { participant } => {
                    if let Some(Judged::Sums(judged)) = judged.take() {
                        self.accept_sums(participant, judged).await?;
                    }
                }
                Action::RefuseSums { participant, reason } => {
                    if let Some(Judged::Sums(judged)) = judged.take() {
                        self.refuse_sums(&participant, reason, judged);
                    }
                }
                Action::Finish { reason } => finish = Some(reason),
            }
        }
        Ok(finish)
    }

    async fn start_round(
        &mut self,
        key: RoundKey,
        cohort: Vec<ParticipantName>,
        first_step: u64,
        evaluate: bool,
    ) -> Result<(), RunError> {
        let RoundKey { round, attempt } = key;
        self.shared.journal.begin(round).await;
        let names = cohort.iter().map(ToString::to_string).collect();
        self.note(Record::Started { attempt, cohort: names, first_step, evaluate }).await;
        self.reported.clear();
        // Nobody is asked for, or reports, what earlier rounds ended with.
        self.evaluated.retain(|(evaluated, _)| evaluated.saturating_add(1) >= round);
        self.publish(key, cohort.clone(), first_step).await;
        let local_steps = self.shared.experiment.federation.local_steps;
        // Otherwise what is trained now would belong to no round after a kill.
        let is_kept = self.until_kept().await?;
        for participant in cohort.iter().filter(|_| is_kept) {
            self.set_state(participant, "training");
            let start = FromCoordinator::StartRound { round, attempt, first_step, local_steps, evaluate, train: true };
            self.send(participant, start).await;
        }
        let names: Vec<&str> = cohort.iter().map(ParticipantName::as_str).collect();
        self.watcher.note(&format!("round {round} starts with {}", names.join(", ")));
        self.open =
            Some(OpenRound { key, begun: Instant::now(), cohort, first_step, updates: BTreeMap::new(), steps_done: 0 });
        self.state = "training".into();
        self.write_status(true)
    }

    /// The final evaluation is a round without steps, one behind the last.
    async fn evaluate(&mut self, round: u32, participants: Vec<ParticipantName>) -> Result<(), RunError> {
        let key = RoundKey { round: round + 1, attempt: 1 };
        let first_step = u64::from(round) * self.shared.experiment.federation.local_steps;
        self.publish(key, participants.clone(), first_step).await;
        for participant in &participants {
            self.set_state(participant, "evaluating");
            let (round, attempt) = (key.round, key.attempt);
            let start = FromCoordinator::StartRound {
                round,
                attempt,
                first_step,
                local_steps: 0,
                evaluate: true,
                train: false,
            };
            self.send(participant, start).await;
        }
        self.state = "evaluating".into();
        self.write_status(true)
    }

    async fn publish(&mut self, key: RoundKey, members: Vec<ParticipantName>, first_step: u64) {
        let published = Some((key.round, self.adapter.clone()));
        *self.shared.published.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = published;
        if let (Some(body), Some(blocks)) = (&self.shared.body, self.body_blocks()) {
            body.open(key, members, first_step, self.adapter.part(blocks)).await;
        }
    }

    async fn send(&self, participant: &ParticipantName, message: FromCoordinator) {
        self.send_all(participant, ToParticipant { message, committed: BTreeMap::new() });
    }

    fn send_all(&self, participant: &ParticipantName, message: ToParticipant) {
        if let Some(connected) = self.connections.get(participant) {
            // Full only if the participant reads nothing; then its connection is about to fail, and it departs.
            let _ = connected.messages.try_send(message);
        }
    }

    async fn note(&self, record: Record) {
        self.shared.journal.append(Entry::new(record), || {}).await;
    }

    /// Waits until the journal has everything on disk, however long that is full; says no where the run is to stop first.
    async fn until_kept(&mut self) -> Result<bool, RunError> {
        let (tell, mut kept) = oneshot::channel();
        self.shared.journal.flush(move || tell.send(()).unwrap_or(())).await;
        let (mut stop, mut health) = (self.stop.clone(), self.health.clone());
        loop {
            tokio::select! {
                biased;
                kept = &mut kept => {
                    // A journal that has failed has said why.
                    self.note_storage()?;
                    return Ok(kept.is_ok());
                }
                Ok(()) = health.changed() => self.note_storage()?,
                Ok(_) = stop.wait_for(|stop| *stop) => return Ok(false),
            }
        }
    }

    fn body_blocks(&self) -> Option<std::ops::Range<usize>> {
        body_blocks(&self.shared.experiment, self.shared.manifest.config.blocks)
    }

    /// Since the run began, on a clock that never goes back.
    fn now_ms(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

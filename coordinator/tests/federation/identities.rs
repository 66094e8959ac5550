//! Who may take part, and what becomes of a run when one side of it goes away: over QUIC on loopback, with invitations.

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;

use coordinator::home::{Home, INVITATION_VALID, audit};
use coordinator::run::{Ended, Run, RunError, Watcher};
use experiment::Row;
use model::source::BlobStore;
use net::{Invitation, InvitationFile, PeerName};
use participant::ParticipantError;
use participant::device::Device;
use participant::join::{Join, transport};
use participant::session::Participant;
use participant::swarm::Swarm;
use time::OffsetDateTime;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::world::{Holding, Seen, World, alone, run_to_the_end};

const NAME: &str = "press-1";

/// A home with a port of its own.
pub struct Site {
    pub world: World,
    pub address: String,
}

/// A coordinator on a runtime of its own, so that it can go down without a word.
pub struct Running {
    runtime: Runtime,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<Ended, RunError>>,
    happened: UnboundedReceiver<Happened>,
}

enum Happened {
    Noted(String),
    Wrote(Row),
}

struct Teller(UnboundedSender<Happened>);

/// A guard against hanging, and no measure of anything.
pub async fn within_a_minute<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(600), what).await.expect("somebody waits for ever")
}

pub fn check_refused(ended: Result<String, ParticipantError>, complaint: &str) {
    let error = ended.unwrap_err();
    assert!(error.to_string().contains(complaint), "{error}");
    assert!(!error.is_retryable(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invitation_used_twice_is_refused() {
    within_a_minute(async {
        let site = Site::new(str::to_owned);
        let mut running = site.start().await;
        let invitation = site.invite(NAME);
        let first = site.join(&invitation, "first", site.world.participant(NAME).0);
        running.until_noted("press-1 joined").await;
        let second = site.join(&invitation, "second", site.world.participant(NAME).0);
        check_refused(second.await.unwrap(), "the invitation was already used at");
        running.stop().await;
        assert_eq!(first.await.unwrap().unwrap(), "stopped after round 0 of 2");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_others_of_a_swarm_go_on_where_one_cannot() {
    within_a_minute(async {
        let site = Site::new(alone);
        let running = site.start().await;
        let invitations = site.world.path("invites");
        std::fs::create_dir(&invitations).unwrap();
        for name in [NAME, "mill-1"] {
            let invitation = site.invite(name);
            let file = invitations.join(format!("{name}.invite"));
            InvitationFile::create(&file, &invitation.name, false).unwrap().write(&invitation).unwrap();
        }
        // Another device has used one of them.
        let used = Invitation::read(&invitations.join("mill-1.invite")).unwrap();
        Device::open(&site.world.path("other")).unwrap().enrol(&used, &site.address, &transport()).await.unwrap();
        // Which writes its records.
        drop(site.world.participant(NAME));
        let swarm = Swarm {
            experiment: site.world.experiment.clone(),
            count: 2,
            data: site.world.path("press-1.jsonl"),
            invitations,
            address: Some(site.address.clone()),
            store: BlobStore::open(site.world.path("cache")).unwrap(),
            patience: Duration::from_secs(30),
            stop: tokio::sync::watch::channel(false).1,
        };
        let ended = swarm.run(|_| Arc::new(Seen::default())).await.unwrap();
        running.end().await.unwrap();
        let [(mill, refused), (press, done)] = ended.try_into().unwrap();
        assert_eq!((mill.as_str(), press.as_str(), done.unwrap().as_str()), ("mill-1", NAME, "completed"));
        check_refused(refused, "the invitation was already used at");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_joins_again_with_its_kept_state() {
    within_a_minute(async {
        let site = Site::new(str::to_owned);
        let invitation = site.invite(NAME);
        for _ in 0..2 {
            let mut running = site.start().await;
            // The second time the invitation would be refused.
            let device = site.join(&invitation, "device", site.world.participant(NAME).0);
            running.until_noted("press-1 joined").await;
            running.stop().await;
            assert_eq!(device.await.unwrap().unwrap(), "stopped after round 0 of 2");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_device_under_a_connected_name_is_refused() {
    within_a_minute(async {
        let site = Site::new(str::to_owned);
        let mut running = site.start().await;
        let first = site.join(&site.invite(NAME), "device", site.world.participant(NAME).0);
        running.until_noted("press-1 joined").await;
        let name = PeerName::new(NAME).unwrap();
        let replacement = site.home().invite(&name, OffsetDateTime::now_utc(), INVITATION_VALID, true).unwrap();
        let second = site.join(&replacement, "another device", site.world.participant(NAME).0);
        check_refused(second.await.unwrap(), "a participant of this name is connected already, and its key is another");
        running.stop().await;
        assert_eq!(first.await.unwrap().unwrap(), "stopped after round 0 of 2");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_connections_of_one_device_the_later_one_stays() {
    within_a_minute(async {
        let site = Site::new(str::to_owned);
        let mut running = site.start().await;
        let invitation = site.invite(NAME);
        let first = site.join(&invitation, "device", site.world.participant(NAME).0);
        running.until_noted("press-1 joined").await;
        let second = site.join(&invitation, "device", site.world.participant(NAME).0);
        check_refused(first.await.unwrap(), "the same identity has connected from elsewhere");
        running.until_noted("press-1 departed: the same device has connected again").await;
        running.until_noted("press-1 joined").await;
        running.stop().await;
        assert_eq!(second.await.unwrap().unwrap(), "stopped after round 0 of 2");
        let lines = site.home().audit_log(None).unwrap();
        let superseded: Vec<_> = lines.iter().filter(|line| line.event == audit::Event::Superseded).collect();
        assert!(matches!(&*superseded, [line] if line.name.as_deref() == Some(NAME)), "{lines:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_another_home_is_refused() {
    within_a_minute(async {
        let (site, other) = (Site::new(str::to_owned), Site::new(str::to_owned));
        let running = site.start().await;
        let foreign = other.invite(NAME);
        let ended = site.join(&foreign, "believing its own home", site.world.participant(NAME).0).await.unwrap();
        check_refused(ended, "the peer is not who it should be");
        let forged = Invitation { ca_pem: site.invite("mill-1").ca_pem, ..foreign };
        let ended = site.join(&forged, "believing this home", site.world.participant(NAME).0).await.unwrap();
        check_refused(ended, "the peer refused our certificate");
        running.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_invitation_is_refused() {
    within_a_minute(async {
        let site = Site::new(str::to_owned);
        let running = site.start().await;
        let long_ago = OffsetDateTime::now_utc() - 2 * INVITATION_VALID;
        let name = PeerName::new(NAME).unwrap();
        let expired = site.home().invite(&name, long_ago, INVITATION_VALID, false).unwrap();
        let ended = site.join(&expired, "device", site.world.participant(NAME).0).await.unwrap();
        check_refused(ended, "the peer refused our certificate");
        running.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_was_killed_goes_on_where_it_was() {
    within_a_minute(async {
        let site = Site::new(alone);
        let running = site.start().await;
        let (mut participant, _) = site.world.participant(NAME);
        // The second step of the second round.
        let (holding, mut reached, release) = Holding::at(6);
        participant.reporter = Arc::new(holding);
        let joined = site.join(&site.invite(NAME), "device", participant);
        reached.recv().await.unwrap();
        running.kill().await;
        let mut running = site.start().await;
        running.until_noted("1 of 2 rounds are finished").await;
        drop((reached, release));
        assert_eq!(joined.await.unwrap().unwrap(), "completed");
        assert_eq!(running.end().await.unwrap().rounds, 2);

        let undisturbed = World::new(alone);
        run_to_the_end(&undisturbed, &[NAME]).await;
        assert_eq!(site.world.adapter(2), undisturbed.adapter(2));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_failed_goes_on_where_it_was() {
    within_a_minute(async {
        let site = Site::new(alone);
        let mut running = site.start().await;
        let joined = site.join(&site.invite(NAME), "device", site.world.participant(NAME).0);
        running.until_wrote(|row| matches!(row, Row::Step { round: 1, .. })).await;
        // As a disk would that has no room left: the second round cannot be kept.
        let obstacle = site.world.path("runs").join(&site.world.experiment.name).join("rounds/0002");
        std::fs::write(&obstacle, "").unwrap();
        let error = running.end().await.unwrap_err().to_string();
        assert!(error.contains("0002"), "{error}");
        std::fs::remove_file(&obstacle).unwrap();
        let running = site.start().await;
        assert_eq!(joined.await.unwrap().unwrap(), "completed");
        assert_eq!(running.end().await.unwrap().rounds, 2);

        let undisturbed = World::new(alone);
        run_to_the_end(&undisturbed, &[NAME]).await;
        assert_eq!(site.world.adapter(2), undisturbed.adapter(2));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_round_goes_on_at_quorum_without_a_participant_that_went_away() {
    within_a_minute(async {
        let site = Site::new(|text| text.replace("quorum = 2", "quorum = 1").replace("rounds = 2", "rounds = 1"));
        let mut running = site.start().await;
        // Nobody can end the round while this one is held up.
        let (mut staying, _) = site.world.participant(NAME);
        let (holding, mut reached, release) = Holding::at(0);
        staying.reporter = Arc::new(holding);
        let staying = site.join(&site.invite(NAME), "staying", staying);
        let leaving = site.join(&site.invite("mill-1"), "leaving", site.world.participant("mill-1").0);
        reached.recv().await.unwrap();
        leaving.abort();
        running.until_noted("mill-1 departed").await;
        drop((reached, release));
        assert_eq!(staying.await.unwrap().unwrap(), "completed");
        let round = running.until_wrote(|row| matches!(row, Row::Round { .. })).await;
        let Row::Round { members, .. } = round else { unreachable!("it was asked for") };
        assert_eq!(members, [NAME]);
        assert_eq!(running.end().await.unwrap().rounds, 1);
    })
    .await;
}

impl Site {
    pub fn new(change: impl Fn(&str) -> String) -> Self {
        let world = World::new(change);
        // Nobody else is given this port so soon again.
        let address = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        std::fs::write(world.path("home/home.toml"), format!("addresses = [\"{address}\"]\n")).unwrap();
        Self { world, address }
    }

    pub fn home(&self) -> Home {
        Home::open(&self.world.path("home")).unwrap()
    }

    pub fn invite(&self, name: &str) -> Invitation {
        let name = PeerName::new(name).unwrap();
        self.home().invite(&name, OffsetDateTime::now_utc(), INVITATION_VALID, false).unwrap()
    }

    /// A coordinator that listens; one that was here before must be gone.
    pub async fn start(&self) -> Running {
        let run = Run {
            experiment: self.world.path("test.toml"),
            home: self.world.path("home"),
            runs: self.world.path("runs"),
            connections_max: coordinator::run::CONNECTIONS_MAX,
            init_adapter: None,
            journal: Default::default(),
        };
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (stop, stopped) = oneshot::channel();
        let (tell, happened) = unbounded_channel();
        let ended = runtime.spawn(async move {
            let shutdown = async {
                if stopped.await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            run.run(Box::new(Teller(tell)), shutdown).await
        });
        let mut running = Running { runtime, stop, ended, happened };
        running.until_noted("listening on").await;
        running
    }

    /// A device that keeps its identity in `state` and joins at this site, whatever the invitation's addresses are.
    pub fn join(
        &self,
        invitation: &Invitation,
        state: &str,
        mut participant: Participant,
    ) -> JoinHandle<Result<String, ParticipantError>> {
        let join = Join {
            invitation: invitation.clone(),
            address: Some(self.address.clone()),
            state: self.world.path(state),
            patience: Duration::from_secs(30),
            stop: tokio::sync::watch::channel(false).1,
        };
        tokio::spawn(async move { join.run(&mut participant).await })
    }
}

impl Running {
    pub async fn until_noted(&mut self, beginning: &str) {
        loop {
            match self.happened.recv().await.expect("the run ended without such a note") {
                Happened::Noted(text) if text.starts_with(beginning) => return,
                _ => {}
            }
        }
    }

    pub async fn until_wrote(&mut self, fits: impl Fn(&Row) -> bool) -> Row {
        loop {
            match self.happened.recv().await.expect("the run ended without such a row") {
                Happened::Wrote(row) if fits(&row) => return row,
                _ => {}
            }
        }
    }

    pub async fn end(self) -> Result<Ended, RunError> {
        let ended = self.ended.await.unwrap();
        down(self.runtime).await;
        ended
    }

    pub async fn stop(self) {
        self.stop.send(()).unwrap();
        assert!(self.ended.await.unwrap().unwrap().stopped);
        down(self.runtime).await;
    }

    /// Nothing is sent any more, not even that the connections are closed.
    pub async fn kill(self) {
        down(self.runtime).await;
    }
}

/// Waits until nothing of the runtime is left. That would block, which must not happen on another runtime's threads.
async fn down(runtime: Runtime) {
    tokio::task::spawn_blocking(move || drop(runtime)).await.unwrap();
}

impl Watcher for Teller {
    fn row(&mut self, row: &Row) {
        // A test that has seen enough listens no longer.
        let _ = self.0.send(Happened::Wrote(row.clone()));
    }

    fn note(&mut self, text: &str) {
        let _ = self.0.send(Happened::Noted(text.to_owned()));
    }

    fn step(&mut self, _: u64, _: u64, _: f64) {}
}

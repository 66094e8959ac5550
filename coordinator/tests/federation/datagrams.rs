//! Whole runs over real QUIC on a network in memory, under a clock that jumps to whatever is due next: datagrams are lost,
//! doubled, delayed and overtaken, the network falls apart and heals, devices get other ports. All that is left out is the
//! system's sockets.
//!
//! turmoil, the ready-made network, breaks a link until it is repaired, where these runs need single datagrams that are lost or
//! come twice; it has no routers that forget a port; and its sockets can be awaited, where quinn polls. Hence
//! [`net::Datagrams`], which is shorter than an adapter would be.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use coordinator::home::{Home, INVITATION_VALID};
use coordinator::journal::Settings;
use experiment::Row;
use model::Adapter;
use model::source::BlobStore;
use net::{Datagrams, DeviceKey, Dialer, Everyone, Identity, Listener, PeerName, Weather};
use participant::ParticipantError;
use participant::join::{Persistence, finish, transport};
use participant::session::{Keep, Participant};
use time::OffsetDateTime;
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::world::World;

const NAMES: [&str; 2] = ["mill-1", "press-1"];
const COORDINATOR: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), 4433);

/// What befalls the network in a run.
#[derive(Clone, Copy)]
enum Change {
    Nothing,
    /// It falls apart behind the first step, for longer than a silent connection lives.
    Parted,
    /// All devices get other ports, again and again.
    Rebound,
}

/// What a run over this network left.
struct Left {
    adapter: Adapter,
    departures: usize,
    lost: u64,
    virtual_time: Duration,
}

/// Longer than a silent connection lives.
const PARTED: Duration = Duration::from_secs(25);
const ROUGH: Weather = Weather { lost_permille: 50, doubled_permille: 50, delay_ms: [10, 60], is_parted: false };

#[test]
fn loss_doubling_delays_and_a_partition_change_no_bit() {
    let site = Site::new();
    let calm = site.run(1, Weather::CALM, Change::Nothing);
    assert_eq!((calm.departures, calm.lost), (0, 0));
    let rough = site.run(2, ROUGH, Change::Nothing);
    assert_eq!((&rough.adapter, rough.departures), (&calm.adapter, 0));
    assert!(rough.lost > 0);
    // Both sides lose each other, and find each other again.
    let parted = site.run(3, ROUGH, Change::Parted);
    assert_eq!(parted.adapter, calm.adapter);
    assert!(parted.departures >= 2, "{} departures", parted.departures);
    assert!(parted.virtual_time > rough.virtual_time + PARTED, "{:?}", parted.virtual_time);
}

#[test]
fn a_change_of_ports_costs_no_connection() {
    let site = Site::new();
    let calm = site.run(1, Weather::CALM, Change::Nothing);
    let slow = Weather { delay_ms: [20, 20], ..Weather::CALM };
    let rebound = site.run(1, slow, Change::Rebound);
    assert_eq!((rebound.adapter, rebound.departures), (calm.adapter, 0));
    // What the coordinator sent to a forgotten port.
    assert!(rebound.lost > 0);
}

/// The devices' identities, which are the same in every run.
struct Site {
    home: World,
    identities: Vec<Identity>,
}

impl Site {
    fn new() -> Self {
        let world = World::new(str::to_owned);
        let home = Home::open(&world.path("home")).unwrap();
        let now = OffsetDateTime::now_utc();
        let identity = |name: &str| {
            let name = PeerName::new(name).unwrap();
            let invitation = home.invite(&name, now, INVITATION_VALID, false).unwrap();
            let (key, fingerprint) = (DeviceKey::generate().unwrap(), invitation.identity().unwrap().fingerprint());
            let chain = home.redeem(&name, fingerprint, &key.request_der().unwrap(), now).unwrap();
            Identity::from_pem(&chain, key.pem(), &invitation.ca_pem).unwrap()
        };
        Self { identities: NAMES.map(identity).into(), home: world }
    }

    fn run(&self, seed: u64, weather: Weather, change: Change) -> Left {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(self.run_on(seed, weather, change))
    }

    async fn run_on(&self, seed: u64, weather: Weather, change: Change) -> Left {
        let (world, began) = (World::new(str::to_owned), Instant::now());
        let network = Datagrams::new(seed, weather);
        let home = Home::open(&self.home.path("home")).unwrap();
        let identity = home.identity(OffsetDateTime::now_utc()).unwrap();
        let mut listener =
            Listener::on(&network, COORDINATOR, seed, &identity, &transport(), Arc::new(Everyone)).unwrap();
        let clock = move || OffsetDateTime::UNIX_EPOCH + began.elapsed();
        let mut coordinator = world.coordinator_with(Settings { clock: Arc::new(clock), ..Settings::default() });
        let connections = coordinator.connections();
        let accepting = tokio::spawn(async move {
            while let Some(connection) = listener.accept().await {
                if connections.send(connection).await.is_err() {
                    return;
                }
            }
        });
        let mut devices = JoinSet::new();
        for (i, (name, identity)) in NAMES.iter().zip(&self.identities).enumerate() {
            let (mut participant, _) = world.participant(name);
            // A device that waits for another one's lock would wait for ever on one thread.
            participant.store = BlobStore::open(world.path(name).join("store")).unwrap();
            let directory = world.path(name).join("training");
            participant.keep = Some(Keep { directory, disk: Default::default() });
            devices.spawn(take_part(network.clone(), i, seed, identity_again(identity), participant));
        }
        let rebinding = network.clone();
        let rebinding = tokio::spawn(async move {
            for number in 1..20 {
                sleep_until(began + Duration::from_millis(u64::from(number) * 300)).await;
                for device in 0..NAMES.len() {
                    let address = device_address(device, 1);
                    rebinding.rebind(address, SocketAddr::new(address.ip(), 50_000 + number));
                }
            }
        });
        if !matches!(change, Change::Rebound) {
            rebinding.abort();
        }
        if matches!(change, Change::Parted) {
            coordinator.until(|row| matches!(row, Row::Step { .. })).await;
            network.set(Weather { is_parted: true, ..weather });
            sleep(PARTED).await;
            network.set(weather);
        }
        while let Some(ended) = devices.join_next().await {
            assert_eq!(ended.unwrap().unwrap(), "completed");
        }
        coordinator.until(|row| matches!(row, Row::Finished { .. })).await;
        let rows = coordinator.rows.clone();
        coordinator.end().await.unwrap();
        accepting.abort();
        rebinding.abort();
        let departures = rows.lock().unwrap().iter().filter(|row| matches!(row, Row::Departure { .. })).count();
        let (adapter, (_, lost)) = (world.adapter(2), network.counts());
        Left { adapter, departures, lost, virtual_time: began.elapsed() }
    }
}

fn identity_again(identity: &Identity) -> Identity {
    Identity::from_pem(identity.chain_pem(), identity.key_pem(), identity.ca_pem()).unwrap()
}

/// Every connection has a port of its own.
fn device_address(device: usize, attempt: u16) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::new(10, 0, 1, device as u8 + 1).into(), 40_000 + attempt)
}

async fn take_part(
    network: Datagrams,
    device: usize,
    seed: u64,
    identity: Identity,
    mut participant: Participant,
) -> Result<String, ParticipantError> {
    let mut persistence = Persistence::new(Duration::from_secs(3600));
    for attempt in 1.. {
        let welcomes = participant.welcomes;
        let address = device_address(device, attempt);
        let dialer = Dialer::on(&network, address, seed + u64::from(attempt), &identity, &transport())?;
        let ended = match dialer.connect(&COORDINATOR.to_string()).await {
            Ok(connection) => {
                let ran = participant.run(&connection).await;
                let ran = finish(&connection, ran).await;
                dialer.close().await;
                ran
            }
            Err(error) => Err(error.into()),
        };
        match ended {
            Ok(reason) => return Ok(reason),
            Err(error) => persistence.after(error, participant.welcomes != welcomes).await?,
        }
    }
    unreachable!("it tries again until it gives up")
}

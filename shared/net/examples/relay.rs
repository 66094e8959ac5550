//! A bad network between two programs of one machine: every UDP datagram that comes to one port goes on to another, and back,
//! unless the seed says that it is lost, doubled, delayed, overtaken, or has a bit flipped.
//!
//!     cargo run --release --example relay -- --listen 127.0.0.1:5000 --to 127.0.0.1:4433 --seed 1 --loss 0.05
//!
//! `--loss P`, `--duplicate P`, `--reorder P` (held back until later ones have passed), `--flip P` (one bit of a datagram),
//! `--delay-ms MIN-MAX` (another delay every second, in order), `--blackout-s AT,FOR` (nothing passes), `--rebind-s EVERY` (the far side sees another port). What has
//! been done is printed as JSON when a line or the end comes on standard input.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use tokio::net::UdpSocket;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

#[derive(Clone, Default)]
struct Faults {
    loss: f64,
    duplicate: f64,
    reorder: f64,
    flip: f64,
    delay_ms: [u64; 2],
    blackout_s: Option<[f64; 2]>,
    rebind_s: Option<f64>,
}

#[derive(Default)]
struct Counts {
    passed: AtomicU64,
    lost: AtomicU64,
    doubled: AtomicU64,
    reordered: AtomicU64,
    flipped: AtomicU64,
    blacked_out: AtomicU64,
    rebound: AtomicU64,
}

struct Relay {
    near: UdpSocket,
    to: SocketAddr,
    faults: Faults,
    counts: Counts,
    random: Mutex<ChaCha20Rng>,
    seed: u64,
    begun: Instant,
    /// Datagrams under way there and back, each to be sent at its time and none before those ahead of it.
    lines: [mpsc::Sender<UnderWay>; 2],
}

/// A client that has said nothing for so long is gone; should it come again, the far side sees another port.
const SILENT: Duration = Duration::from_secs(60);

type UnderWay = (Instant, Pin<Box<dyn Future<Output = ()> + Send>>);

/// Datagrams that a link holds at most; more are lost, as in any router.
const LINE_DATAGRAMS: usize = 65_536;

/// The far side of one client: the socket that its datagrams go out of, since when, and the task that reads the answers.
struct Far {
    socket: Arc<UdpSocket>,
    since: Instant,
    heard: Instant,
    /// Answers to earlier ports are still on their way.
    answers: JoinSet<()>,
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let (listen, to, seed, faults) = arguments();
    let near = UdpSocket::bind(listen).await?;
    let (counts, random) = (Counts::default(), Mutex::new(ChaCha20Rng::seed_from_u64(seed)));
    let ((there, there_end), (back, back_end)) = (mpsc::channel(LINE_DATAGRAMS), mpsc::channel(LINE_DATAGRAMS));
    let lines: [mpsc::Sender<UnderWay>; 2] = [there, back];
    let mut carrying = JoinSet::new();
    for mut end in [there_end, back_end] {
        carrying.spawn(async move {
            while let Some((due, send)) = end.recv().await {
                tokio::time::sleep_until(due.into()).await;
                send.await;
            }
        });
    }
    let relay = Arc::new(Relay { near, to, faults, counts, random, seed, begun: Instant::now(), lines });
    let passing = tokio::spawn(relay.clone().pass());
    tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new())).await??;
    passing.abort();
    let Counts { passed, lost, doubled, reordered, flipped, blacked_out, rebound } = &relay.counts;
    let [passed, lost, doubled, reordered, flipped, blacked_out, rebound] =
        [passed, lost, doubled, reordered, flipped, blacked_out, rebound].map(|count| count.load(Relaxed));
    println!(
        "{{\"passed\":{passed},\"lost\":{lost},\"doubled\":{doubled},\"reordered\":{reordered},\"flipped\":{flipped},\
         \"blacked_out\":{blacked_out},\"rebound\":{rebound}}}"
    );
    Ok(())
}

impl Relay {
    async fn pass(self: Arc<Self>) {
        let mut far: HashMap<SocketAddr, Far> = HashMap::new();
        let mut buffer = vec![0; 65_536];
        let mut looked = Instant::now();
        loop {
            if looked.elapsed() > SILENT / 4 {
                looked = Instant::now();
                far.retain(|_, far| far.heard.elapsed() < SILENT);
            }
            // On Linux an earlier datagram that found no program is reported here; it is lost like any other.
            let Ok((length, client)) = self.near.recv_from(&mut buffer).await else { continue };
            let is_old =
                |far: &Far| self.faults.rebind_s.is_some_and(|every| far.since.elapsed().as_secs_f64() > every);
            if far.get(&client).is_none_or(is_old) {
                let Ok(socket) = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await else { continue };
                let socket = Arc::new(socket);
                let known = far.entry(client).or_insert_with(|| Far {
                    socket: socket.clone(),
                    since: Instant::now(),
                    heard: Instant::now(),
                    answers: JoinSet::new(),
                });
                if !Arc::ptr_eq(&known.socket, &socket) {
                    self.counts.rebound.fetch_add(1, Relaxed);
                }
                (known.socket, known.since) = (socket.clone(), Instant::now());
                known.answers.spawn(self.clone().answer(socket, client));
            }
            let Some(known) = far.get_mut(&client) else { continue };
            known.heard = Instant::now();
            let socket = known.socket.clone();
            self.disturb(0, buffer[..length].to_vec(), move |relay, datagram| {
                let socket = socket.clone();
                async move { drop(socket.send_to(&datagram, relay.to).await) }
            })
            .await;
        }
    }

    async fn answer(self: Arc<Self>, socket: Arc<UdpSocket>, client: SocketAddr) {
        let mut buffer = vec![0; 65_536];
        loop {
            let Ok((length, _)) = socket.recv_from(&mut buffer).await else { continue };
            self.disturb(1, buffer[..length].to_vec(), move |relay, datagram| async move {
                drop(relay.near.send_to(&datagram, client).await);
            })
            .await;
        }
    }

    /// Decides what becomes of a datagram, and sends it, now or later.
    async fn disturb<F: Future<Output = ()> + Send + 'static>(
        self: &Arc<Self>,
        direction: usize,
        mut datagram: Vec<u8>,
        send: impl Fn(Arc<Self>, Vec<u8>) -> F + Send + 'static + Clone,
    ) {
        let Faults { loss, duplicate, reorder, flip, delay_ms: [least, most], blackout_s, .. } = self.faults.clone();
        let at = self.begun.elapsed().as_secs_f64();
        if blackout_s.is_some_and(|[from, length]| (from..from + length).contains(&at)) {
            self.counts.blacked_out.fetch_add(1, Relaxed);
            return;
        }
        let mut random = self.random.lock().await;
        if random.random_bool(loss) {
            self.counts.lost.fetch_add(1, Relaxed);
            return;
        }
        if random.random_bool(flip) && !datagram.is_empty() {
            let bit = random.random_range(0..datagram.len() * 8);
            datagram[bit / 8] ^= 1 << (bit % 8);
            self.counts.flipped.fetch_add(1, Relaxed);
        }
        let copies = if random.random_bool(duplicate) { 2 } else { 1 };
        self.counts.doubled.fetch_add(copies - 1, Relaxed);
        // Real delays change slowly, and overtaking is a fault of its own.
        let delay_ms = ChaCha20Rng::seed_from_u64(self.seed ^ at as u64).random_range(least..=most);
        for _ in 0..copies {
            self.counts.passed.fetch_add(1, Relaxed);
            let (relay, send, datagram) = (self.clone(), send.clone(), datagram.clone());
            if random.random_bool(reorder) {
                let delay_ms = delay_ms + random.random_range(1..=10);
                self.counts.reordered.fetch_add(1, Relaxed);
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(delay_ms)).await;
                    send(relay, datagram).await;
                });
            } else if delay_ms == 0 {
                send(relay, datagram).await;
            } else {
                let due = Instant::now() + Duration::from_millis(delay_ms);
                if self.lines[direction].try_send((due, Box::pin(async move { send(relay, datagram).await }))).is_err()
                {
                    self.counts.lost.fetch_add(1, Relaxed);
                }
            }
        }
    }
}

fn arguments() -> (SocketAddr, SocketAddr, u64, Faults) {
    let (mut listen, mut to, mut seed, mut faults) = (None, None, 0, Faults::default());
    let words: Vec<String> = std::env::args().skip(1).collect();
    for pair in words.chunks(2) {
        let [name, value] = pair else { usage(&pair[0]) };
        let number = || value.parse::<f64>().unwrap_or_else(|_| usage(name));
        let probability = || Some(number()).filter(|p| (0.0..=1.0).contains(p)).unwrap_or_else(|| usage(name));
        let two = |between: char| -> [f64; 2] {
            let (first, second) = value.split_once(between).unwrap_or_else(|| usage(name));
            [first, second].map(|number| number.parse().unwrap_or_else(|_| usage(name)))
        };
        match name.as_str() {
            "--listen" => listen = value.parse().ok(),
            "--to" => to = value.parse().ok(),
            "--seed" => seed = value.parse().unwrap_or_else(|_| usage(name)),
            "--loss" => faults.loss = probability(),
            "--duplicate" => faults.duplicate = probability(),
            "--reorder" => faults.reorder = probability(),
            "--flip" => faults.flip = probability(),
            "--delay-ms" => {
                faults.delay_ms = two('-').map(|ms| ms as u64);
                let [least, most] = faults.delay_ms;
                if least > most {
                    usage(name);
                }
            }
            "--blackout-s" => faults.blackout_s = Some(two(',')),
            "--rebind-s" => faults.rebind_s = Some(number()),
            name => usage(name),
        }
    }
    match (listen, to) {
        (Some(listen), Some(to)) => (listen, to, seed, faults),
        _ => usage("--listen and --to"),
    }
}

fn usage(what: &str) -> ! {
    eprintln!("relay: {what}: see the first lines of shared/net/examples/relay.rs");
    std::process::exit(2)
}

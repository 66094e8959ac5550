//! UDP in memory, for tests: sockets that QUIC runs over as it does over the system's, on a network that loses and delays
//! datagrams, falls apart and heals, and gives senders other ports.
//!
//! What happens to a datagram is drawn from a seed, in the order in which they are sent, and the time is tokio's: under a
//! paused clock, on one thread, the same programs meet the same network. It knows nothing of what is in a datagram.
//! Start from [`Datagrams::new`] and [`Datagrams::socket`].

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use tokio::time::{Instant, Sleep, sleep_until};

/// Datagrams under way to one socket; more are lost, as in any router.
const UNDER_WAY_MAX: usize = 4096;

/// A network, and everything that is under way in it.
#[derive(Clone)]
pub struct Datagrams(Arc<Mutex<State>>);

/// What a network does to datagrams.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weather {
    /// Of a thousand, those that are lost, and those that come twice.
    pub lost_permille: u32,
    pub doubled_permille: u32,
    /// Drawn for each datagram, so that those behind it may overtake it.
    pub delay_ms: [u64; 2],
    /// Nothing passes.
    pub is_parted: bool,
}

struct State {
    random: ChaCha20Rng,
    weather: Weather,
    sockets: HashMap<SocketAddr, Inbox>,
    /// What a sender's datagrams seem to come from, where that is not its own address.
    outside: HashMap<SocketAddr, SocketAddr>,
    sent: u64,
    lost: u64,
}

#[derive(Default)]
struct Inbox {
    /// By the time at which it arrives, and its number.
    under_way: BTreeMap<(Instant, u64), (SocketAddr, Vec<u8>)>,
    waiting: Option<Waker>,
}

/// One end; it is quinn's.
struct Socket {
    network: Datagrams,
    address: SocketAddr,
    timer: Mutex<Pin<Box<Sleep>>>,
}

/// There is always room to send.
#[derive(Debug)]
struct Writable;

impl Weather {
    /// Every datagram arrives after a millisecond.
    pub const CALM: Self = Self { lost_permille: 0, doubled_permille: 0, delay_ms: [1, 1], is_parted: false };
}

impl Datagrams {
    /// Within a tokio runtime, whose clock it reads.
    pub fn new(seed: u64, weather: Weather) -> Self {
        Self(Arc::new(Mutex::new(State {
            random: ChaCha20Rng::seed_from_u64(seed),
            weather,
            sockets: HashMap::new(),
            outside: HashMap::new(),
            sent: 0,
            lost: 0,
        })))
    }

    /// From now on, for whatever is sent.
    pub fn set(&self, weather: Weather) {
        self.state().weather = weather;
    }

    /// A socket at `address`, which must be nobody else's.
    pub fn socket(&self, address: SocketAddr) -> Arc<dyn AsyncUdpSocket> {
        self.state().sockets.insert(address, Inbox::default());
        let timer = Mutex::new(Box::pin(sleep_until(Instant::now())));
        Arc::new(Socket { network: self.clone(), address, timer })
    }

    /// What `address` sends comes from `outside` from now on, and what is sent to its earlier port is lost: a router has
    /// forgotten it.
    pub fn rebind(&self, address: SocketAddr, outside: SocketAddr) {
        self.state().outside.insert(address, outside);
    }

    /// Datagrams sent, and those of them that were lost.
    pub fn counts(&self) -> (u64, u64) {
        let state = self.state();
        (state.sent, state.lost)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl State {
    fn send(&mut self, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        let now = Instant::now();
        self.sent += 1;
        let Weather { lost_permille, doubled_permille, delay_ms: [least, most], is_parted } = self.weather;
        let is_lost = self.random.random_ratio(lost_permille, 1000) || is_parted;
        let copies = if self.random.random_ratio(doubled_permille, 1000) { 2 } else { 1 };
        let source = self.outside.get(&from).copied().unwrap_or(from);
        let inside = self.outside.iter().find(|(_, outside)| **outside == to).map(|(inside, _)| *inside);
        let is_forgotten = inside.is_none() && self.outside.contains_key(&to);
        let reached = self.sockets.get_mut(&inside.unwrap_or(to)).filter(|_| !is_lost && !is_forgotten);
        let Some(inbox) = reached else {
            self.lost += 1;
            return;
        };
        for _ in 0..copies {
            let due = now + Duration::from_millis(self.random.random_range(least..=most));
            if inbox.under_way.len() < UNDER_WAY_MAX {
                // Its number, and that of its copy.
                let number = 2 * self.sent + u64::from(inbox.under_way.contains_key(&(due, 2 * self.sent)));
                inbox.under_way.insert((due, number), (source, bytes.to_vec()));
            }
        }
        if let Some(waiting) = inbox.waiting.take() {
            waiting.wake();
        }
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.network.state().send(self.address, transmit.destination, transmit.contents);
        Ok(())
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.network.state();
        let Some(inbox) = state.sockets.get_mut(&self.address) else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        let mut received = 0;
        while let Some(((due, number), (from, bytes))) = inbox.under_way.pop_first() {
            let fits = received < buffers.len().min(metas.len());
            if due > Instant::now() || !fits {
                inbox.under_way.insert((due, number), (from, bytes));
                break;
            }
            // As a system would, it cuts off what does not fit.
            let length = bytes.len().min(buffers[received].len());
            buffers[received][..length].copy_from_slice(&bytes[..length]);
            metas[received] = RecvMeta { addr: from, len: length, stride: length, ecn: None, dst_ip: None };
            received += 1;
        }
        if received > 0 {
            return Poll::Ready(Ok(received));
        }
        inbox.waiting = Some(context.waker().clone());
        let next = inbox.under_way.first_key_value().map(|((due, _), _)| *due);
        drop(state);
        if let Some(next) = next {
            let mut timer = self.timer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            timer.as_mut().reset(next);
            if timer.as_mut().poll(context).is_ready() {
                // Due in this very moment.
                context.waker().wake_by_ref();
            }
        }
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.network.state().sockets.remove(&self.address);
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a socket in memory at {}", self.address)
    }
}

impl UdpPoller for Writable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

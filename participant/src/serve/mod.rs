//! `participant serve`: the device's model for programs on it, in the words of OpenAI's HTTP interface.
//!
//! Whoever connects is hostile until checked: everything has a limit, in bytes, in time or in number. What a conversation
//! says goes to who asked, and nowhere else: it is never logged. Start from [`Server`].

mod engine;
mod events;
mod http;
mod patient;
mod request;
mod response;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use self::engine::Queue;
use self::http::Service;
use self::patient::Patient;
use crate::ParticipantError;
use crate::runner::Runner;

pub struct Server {
    pub runner: Runner,
    /// What requests call the model without an adapter.
    pub base: String,
    /// Of requests that give none.
    pub deadline: Option<Duration>,
    pub tokens_max: usize,
    /// With the request's number it seeds requests that give none.
    pub seed: u64,
    pub limits: Limits,
    /// Turns true when the server is to end.
    pub stop: watch::Receiver<bool>,
}

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Answers that are made at the same time, a token of each in turn.
    pub answers: usize,
    /// Requests that wait for their turn; further ones are refused.
    pub waiting: usize,
    /// Kept when their answers have ended, for prompts that begin like theirs; who has a prefix in common with another's prompt
    /// can tell by the time. The float engine keeps none.
    pub sequences: usize,
    pub connections: usize,
    pub body_bytes: usize,
    /// To send a request's head, and again to send its body; and to read anything of an answer at all.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let patience = Duration::from_secs(10);
        Self { answers: 4, waiting: 32, sequences: 4, connections: 128, body_bytes: 1 << 20, patience }
    }
}

const HEAD_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 64;
/// A connection is closed after this time whatever happens on it: who reads an answer slower than that will not miss it.
const CONNECTION_MAX: Duration = Duration::from_secs(1800);
/// Prompts that become tokens at the same time: long ones take a core of the engine's.
const ENCODING: usize = 1;
/// For answers under way when the server ends, as --help says; behind that they end with what they have.
const LEAVE: Duration = Duration::from_secs(2);
/// For that to go out.
const FLUSH: Duration = Duration::from_secs(1);

impl Server {
    /// Begins to serve whoever connects; [`Serving::run`] lets them.
    ///
    /// # Errors
    /// If a deadline is set that the engine cannot keep, or two models have one name.
    pub fn start(self, listener: TcpListener) -> Result<Serving, ParticipantError> {
        let Self { runner, base, deadline, tokens_max, seed, limits, stop } = self;
        if deadline.is_some() && !runner.keeps_deadlines() {
            let what = "--deadline needs the integer engine: a GGUF file, and `--engine integer`";
            return Err(ParticipantError::Usage(what.into()));
        }
        if runner.adapters().contains(&base) {
            return Err(ParticipantError::Usage(called_like_an_adapter(&base)));
        }
        let only_local = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
        let models = std::iter::once(base).chain(runner.adapters().iter().cloned()).collect();
        let (source, spelling) = (runner.source.clone(), runner.shared_spelling());
        let (queue, worker) = Queue::start(runner, limits)?;
        let (close, closing) = watch::channel(false);
        let service = Arc::new(Service {
            queue,
            source,
            spelling,
            models,
            deadline,
            tokens_max,
            seed,
            limits,
            only_local,
            requests: AtomicU64::new(0),
            encoding: Arc::new(Semaphore::new(ENCODING)),
            closing,
        });
        Ok(Serving { listener, service, worker, limits, stop, close })
    }
}

pub(crate) fn called_like_an_adapter(base: &str) -> String {
    format!("the model and an adapter are both called `{base}`; give --name, or --adapter NAME=DIR")
}

/// A server that nothing is in the way of any more.
pub struct Serving {
    listener: TcpListener,
    service: Arc<Service>,
    worker: JoinHandle<()>,
    limits: Limits,
    stop: watch::Receiver<bool>,
    /// Ends answers with what they have.
    close: watch::Sender<bool>,
}

impl Serving {
    /// What requests may ask for; the first is the model without an adapter.
    pub fn models(&self) -> &[String] {
        &self.service.models
    }

    /// Answers until it is stopped.
    pub async fn run(self) {
        let Self { listener, service, worker, limits, mut stop, close } = self;
        let connections = Arc::new(Semaphore::new(limits.connections));
        let mut tasks = JoinSet::new();
        loop {
            // Who comes while all places are taken waits in the system's own queue.
            let place = tokio::select! {
                place = connections.clone().acquire_owned() => place.expect("the semaphore is never closed"),
                () = stopped(&mut stop) => break,
            };
            let stream = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        // Too many files are open, or the peer has gone: the next one may do better.
                        tracing::warn!("failed to accept a connection: {error}");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
                () = stopped(&mut stop) => break,
            };
            let _ = stream.set_nodelay(true);
            give_up_the_unread(&stream, limits.patience);
            let (service, mut stop) = (service.clone(), stop.clone());
            tasks.spawn(async move {
                let _place = place;
                let answer = hyper::service::service_fn(move |request| service.clone().answer(request));
                let mut builder = http1::Builder::new();
                builder.timer(TokioTimer::new()).header_read_timeout(limits.patience);
                builder.max_buf_size(HEAD_BYTES_MAX).max_headers(HEADERS_MAX);
                let connection = builder.serve_connection(TokioIo::new(Patient::new(stream, limits.patience)), answer);
                tokio::pin!(connection);
                let whole = async {
                    tokio::select! {
                        ended = &mut connection => return ended,
                        () = stopped(&mut stop) => {}
                    }
                    connection.as_mut().graceful_shutdown();
                    connection.await
                };
                match timeout(CONNECTION_MAX, whole).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!("a connection ended: {error}"),
                    Err(_) => tracing::debug!("a connection took too long"),
                }
            });
            while tasks.try_join_next().is_some() {}
        }
        drop(listener);
        tracing::info!("the server ends; answers under way have {} s more", LEAVE.as_secs());
        if timeout(LEAVE, all(&mut tasks)).await.is_err() {
            tracing::warn!(connections = tasks.len(), "answers that are under way end with what they have");
            let _ = close.send(true);
            let _ = timeout(FLUSH, all(&mut tasks)).await;
        }
        tasks.shutdown().await;
        drop(service);
        // The queue is closed, and nobody waits for an answer any more: the worker ends after its step.
        let joined = tokio::task::spawn_blocking(move || worker.join());
        let _ = timeout(LEAVE, joined).await;
    }
}

/// What a peer does not read for so long, the system throws away, also when this program has closed the connection: it would
/// keep megabytes of its own memory for it, for minutes, however many such peers come. A system without this keeps them.
fn give_up_the_unread(stream: &TcpStream, patience: Duration) {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let _ = socket2::SockRef::from(stream).set_tcp_user_timeout(Some(patience));
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    let _ = (stream, patience);
}

/// Returns when all of them have ended.
async fn all(tasks: &mut JoinSet<()>) {
    while tasks.join_next().await.is_some() {}
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error is as good: nobody is left who could stop it otherwise.
    let _ = stop.wait_for(|stop| *stop).await;
}

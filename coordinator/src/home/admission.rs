//! Who may come in while a coordinator runs, and what it notes in the audit log meanwhile.
//!
//! `coordinator revoke` is another process: it writes `revoked.toml`, and the [`Keeper`] of a running coordinator reads that file every second.
//! From then on the [`Gate`] refuses the name within the handshake, and [`Admission::revoked`] tells whoever serves it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use net::{Gate, PeerIdentity, PeerName};
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::audit::Event;
use super::{Home, HomeError, REVOKED, Revocations};

const REVOCATIONS_READ: Duration = Duration::from_secs(1);
/// Notes that wait for the disk.
const NOTES_MAX: usize = 256;
/// Somebody who knocks all the time is written down once in a while.
const SAME_NOTE: Duration = Duration::from_secs(60);
/// Names whose last note is remembered.
const NAMES_MAX: usize = 4096;

pub struct Admission {
    revocations: watch::Sender<Arc<Revocations>>,
    notes: mpsc::Sender<Note>,
    waiting: std::sync::Mutex<Option<mpsc::Receiver<Note>>>,
}

struct Note {
    event: Event,
    name: PeerName,
    detail: String,
}

/// Keeps an [`Admission`] up to date until it is told to stop, or dropped.
pub struct Keeper {
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Admission {
    pub(super) fn new(revocations: Revocations) -> Self {
        let (notes, waiting) = mpsc::channel(NOTES_MAX);
        let (revocations, waiting) = (watch::channel(Arc::new(revocations)).0, Some(waiting).into());
        Self { revocations, notes, waiting }
    }

    /// Waits until what was issued to `name` in the second `issued_unix` counts no longer.
    pub async fn revoked(&self, name: &PeerName, issued_unix: i64) {
        let mut revocations = self.revocations.subscribe();
        if revocations.wait_for(|revocations| revocations.revokes(name, issued_unix)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// For the audit log, as soon as the disk has time; of the same event and name once a minute.
    pub fn note(&self, event: Event, name: &PeerName, detail: impl Into<String>) {
        let note = Note { event, name: name.clone(), detail: detail.into() };
        // Where so many wait already, somebody floods: one line less of it.
        let _ = self.notes.try_send(note);
    }
}

impl Gate for Admission {
    fn admits(&self, peer: &PeerIdentity, issued_unix: i64) -> bool {
        let (PeerIdentity::Participant { name } | PeerIdentity::Enrol { name, .. }) = peer else { return true };
        let is_revoked = self.revocations.borrow().revokes(name, issued_unix);
        if is_revoked {
            self.note(Event::Refused, name, "revoked");
        }
        !is_revoked
    }
}

impl Keeper {
    /// Of the home that is kept at the same path: the one whose admission is to be kept may be in use elsewhere.
    pub fn start(home: &Home) -> Result<Self, HomeError> {
        let (admission, home) = (home.admission.clone(), Home::open(home.path())?);
        let (stop, stopped) = oneshot::channel();
        let waiting = admission.waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        let task = tokio::spawn(async move {
            if let Some(notes) = waiting {
                keep(Arc::new(home), admission, notes, stopped).await;
            }
        });
        Ok(Self { stop: Some(stop), task })
    }

    /// Returns when every note is on the disk.
    pub async fn stop(mut self) {
        drop(self.stop.take());
        let _ = (&mut self.task).await;
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if self.stop.is_some() {
            self.task.abort();
        }
    }
}

async fn keep(
    home: Arc<Home>,
    admission: Arc<Admission>,
    mut notes: mpsc::Receiver<Note>,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut noted: HashMap<(Event, PeerName), Instant> = HashMap::new();
    let mut tick = tokio::time::interval(REVOCATIONS_READ);
    loop {
        tokio::select! {
            biased;
            Some(note) = notes.recv() => {
                let now = Instant::now();
                noted.retain(|_, at| now.duration_since(*at) < SAME_NOTE);
                let known = (note.event, note.name.clone());
                // The time of what was written down, not of the last knock: else who never stops would never be noted
                // again.
                if noted.len() < NAMES_MAX && !noted.contains_key(&known) {
                    noted.insert(known, now);
                    write_down(home.clone(), note).await;
                }
            }
            // What was noted before is written down before.
            _ = &mut stopped => return,
            _ = tick.tick() => read_again(home.clone(), &admission).await,
        }
    }
}

async fn write_down(home: Arc<Home>, Note { event, name, detail }: Note) {
    let write = move || home.audit(OffsetDateTime::now_utc(), event, Some(&name), &detail);
    if let Ok(Err(error)) = offload::beside(write).await {
        tracing::error!(%error, "the audit log cannot be written");
    }
}

async fn read_again(home: Arc<Home>, admission: &Admission) {
    let read = offload::beside(move || Revocations::read(&home.path().join(REVOKED))).await;
    match read {
        Ok(Ok(found)) => {
            admission.revocations.send_if_modified(|known| {
                let is_new = **known != found;
                if is_new {
                    *known = Arc::new(found);
                }
                is_new
            });
        }
        // Whoever was revoked stays so.
        Ok(Err(error)) => tracing::error!(%error, "who is revoked cannot be read; it stays as it was"),
        Err(_) => {}
    }
}

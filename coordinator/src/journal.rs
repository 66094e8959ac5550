//! What happens within a round, as records in the order in which it happened: `runs/<name>/journal/0003.journal`, and for a
//! long round `0003-1.journal` and so on, each of which begins with the state that those before it led to.
//!
//! A finished round is a checkpoint; the journal of the round behind it is what makes a killed coordinator go on within that
//! round instead of before it. A record is on disk before anybody is told of what it says. [`Journal`] is the queue to the
//! one thread that writes; several records share an fsync. A write that fails is tried again until the disk takes it, and
//! nobody is told anything meanwhile; a failed fsync ends the run.

mod recovery;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use planted::Bug;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use storage::{Disk, Identity, StorageError};
use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

pub use recovery::{OpenAttempt, Recovered, Update, Work};

/// Records that wait at most; a participant has one or two.
const QUEUE_RECORDS: usize = 256;
/// Records that share an fsync.
const BATCH_RECORDS: usize = 64;
const RETRY: Duration = Duration::from_millis(250);

/// One record; its numbers follow it as tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// An attempt at the round begins.
    Started {
        attempt: u32,
        cohort: Vec<String>,
        first_step: u64,
        evaluate: bool,
    },
    /// A member has committed a step; the tensors are its clipped gradients of the body, where that trains.
    Committed {
        participant: String,
        step: u64,
        tokens: u64,
    },
    /// Nobody waits for this member any longer.
    Removed {
        participant: String,
    },
    /// A member's update was accepted; the tensors are its adapter's. A loss is kept by its bits: JSON's decimals may lose one.
    Accepted {
        participant: String,
        tokens: u64,
        loss_nats_bits: u64,
    },
    Abandoned {
        attempt: u32,
    },
    /// All that the body has done in the open attempt; the tensors are what the state names, in its order.
    Body {
        state: BodyState,
    },
}

/// An open round's body: adapters and gradients of the shared body, of each member, and the optimizers' moments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BodyState {
    pub members: Vec<MemberState>,
    /// The step that a shared body applies next.
    pub open_step: Option<u64>,
    /// Whether the shared body's adapter before its last step is there too.
    pub before: bool,
    /// With the steps each has taken.
    pub optimizers: Vec<(String, u64)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberState {
    pub participant: String,
    pub step: u64,
    /// Trained tokens of each committed step.
    pub tokens: Vec<[u64; 2]>,
    pub digest: Option<String>,
    pub own: bool,
    pub before: bool,
    /// Tokens of its commit to the open step.
    pub committed: Option<u64>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub record: Record,
    pub tensors: Vec<Vec<f32>>,
}

/// How the disk does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    Good,
    /// Nothing can be written for now, for this reason.
    Degraded(String),
    /// Nothing will be written any more.
    Failed(String),
}

/// The queue to the writing thread.
#[derive(Clone)]
pub struct Journal {
    settings: Settings,
    jobs: mpsc::Sender<Job>,
    health: watch::Receiver<Health>,
}

type Done = Box<dyn FnOnce() + Send>;

enum Job {
    /// A journal for this round; the one before it is kept, older ones are not.
    Begin {
        round: u32,
    },
    Append {
        entry: Entry,
        done: Done,
    },
    /// Called when everything before it is on disk.
    Flush {
        done: Done,
    },
}

impl Journal {
    /// Starts the thread. `open` is the journal of the round that goes on, if one does.
    pub fn start(place: Place, open: Option<Segment>) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel(QUEUE_RECORDS);
        let (tell, health) = watch::channel(Health::Good);
        let settings = place.settings.clone();
        let writer = Writer { place, open, tell };
        offload::start("journal", writer.run(queue))?;
        Ok(Self { settings, jobs, health })
    }

    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    pub fn snapshot_bytes(&self) -> usize {
        self.settings.snapshot_bytes
    }

    /// The time of day.
    pub fn unix_ms(&self) -> u64 {
        ((self.settings.clock)().unix_timestamp_nanos() / 1_000_000) as u64
    }

    pub async fn begin(&self, round: u32) {
        self.tell(Job::Begin { round }).await;
    }

    /// `done` is called once the record is on disk, and dropped uncalled if it never will be.
    pub async fn append(&self, entry: Entry, done: impl FnOnce() + Send + 'static) {
        self.tell(Job::Append { entry, done: Box::new(done) }).await;
    }

    /// Calls `done` once everything that was appended before is on disk.
    pub async fn flush(&self, done: impl FnOnce() + Send + 'static) {
        self.tell(Job::Flush { done: Box::new(done) }).await;
    }

    /// It fails where the writer has ended; what was to be called is dropped with the job.
    async fn tell(&self, job: Job) {
        let _ = self.jobs.send(job).await;
    }
}

pub type Clock = Arc<dyn Fn() -> OffsetDateTime + Send + Sync>;

/// How a journal is kept, and on what machine.
#[derive(Clone)]
pub struct Settings {
    /// Tests let it fail.
    pub disk: Disk,
    /// The time of day, for people to read and to tell one start from another: nothing waits by it. Tests let it jump.
    pub clock: Clock,
    /// Behind so many bytes of commits, the body's state takes their place.
    pub snapshot_bytes: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { disk: Disk::default(), clock: Arc::new(OffsetDateTime::now_utc), snapshot_bytes: 64 << 20 }
    }
}

/// Where a run's journals lie, and whose they are.
#[derive(Clone)]
pub struct Place {
    pub settings: Settings,
    pub directory: PathBuf,
    pub experiment_digest: [u8; 32],
}

impl Place {
    fn path(&self, round: u32, number: u32) -> PathBuf {
        let name = match number {
            0 => format!("{round:04}.journal"),
            number => format!("{round:04}-{number}.journal"),
        };
        self.directory.join(name)
    }

    fn identity(&self, round: u32) -> Identity {
        Sha256::new()
            .chain_update("headwater journal")
            .chain_update(self.experiment_digest)
            .chain_update(round.to_le_bytes())
            .finalize()
            .into()
    }

    /// The newest segment of the journal of `round` that is whole at its start, and what is in it, if there is one.
    pub fn open(&self, round: u32) -> Result<Option<(Segment, Vec<Entry>)>, StorageError> {
        let mut numbers: Vec<u32> = self.segments().into_iter().filter(|(of, _)| *of == round).map(|of| of.1).collect();
        numbers.sort_unstable();
        for number in numbers.into_iter().rev() {
            let path = self.path(round, number);
            let opened = storage::Journal::open(&self.settings.disk, &path, &self.identity(round))?;
            let Some((journal, records)) = opened else { continue };
            let foreign = |what| StorageError::Foreign { path: path.clone(), what };
            let entries: Vec<Entry> =
                records.iter().map(|record| Entry::decode(record).map_err(foreign)).collect::<Result<_, _>>()?;
            if number > 0 && !entries.iter().any(|entry| matches!(entry.record, Record::Body { .. })) {
                tracing::warn!(path = %path.display(), "the start of a journal's segment is damaged; the one before counts");
                continue;
            }
            let mut segment = Segment { round, number, journal, carried: Vec::new() };
            entries.iter().zip(records).for_each(|(entry, record)| segment.carry(entry, record));
            return Ok(Some((segment, entries)));
        }
        Ok(None)
    }

    fn create(&self, round: u32, number: u32) -> Result<storage::Journal, StorageError> {
        let write = |source| StorageError::Write { path: self.directory.clone(), source };
        std::fs::create_dir_all(&self.directory).map_err(write)?;
        storage::Journal::create(&self.settings.disk, &self.path(round, number), &self.identity(round))
    }

    /// Round and number of every segment that is there.
    fn segments(&self) -> Vec<(u32, u32)> {
        let Ok(entries) = std::fs::read_dir(&self.directory) else { return Vec::new() };
        let parse = |name: &str| {
            let name = name.strip_suffix(".journal")?;
            let (round, number) = name.split_once('-').unwrap_or((name, "0"));
            Some((round.parse().ok()?, number.parse().ok()?))
        };
        entries.flatten().filter_map(|entry| entry.file_name().to_str().and_then(parse)).collect()
    }

    /// Removes what there is of this round and of later ones.
    fn remove_from(&self, round: u32) {
        for (of, segment) in self.segments().into_iter().filter(|(of, _)| *of >= round) {
            let _ = self.settings.disk.remove(&self.path(of, segment));
        }
    }

    /// Removes what is older than two generations; that one fails to go is no reason to stop.
    fn remove_old(&self, round: u32, number: u32) {
        let is_old = |of: u32, segment: u32| of.saturating_add(1) < round || (of == round && segment + 1 < number);
        for (of, segment) in self.segments().into_iter().filter(|(of, segment)| is_old(*of, *segment)) {
            let _ = self.settings.disk.remove(&self.path(of, segment));
        }
    }
}

/// One file of a round's journal. One behind the first begins with what is carried over, and the body's state.
pub struct Segment {
    round: u32,
    number: u32,
    journal: storage::Journal,
    /// Records of the open attempt that a body's state does not stand for.
    carried: Vec<Vec<u8>>,
}

impl Segment {
    fn carry(&mut self, entry: &Entry, encoded: Vec<u8>) {
        match entry.record {
            Record::Started { .. } => self.carried = vec![encoded],
            Record::Removed { .. } | Record::Accepted { .. } | Record::Abandoned { .. } => self.carried.push(encoded),
            Record::Committed { .. } | Record::Body { .. } => {}
        }
    }
}

impl Entry {
    pub fn new(record: Record) -> Self {
        Self { record, tensors: Vec::new() }
    }

    /// Of its numbers, which are nearly all of it.
    pub fn bytes(&self) -> usize {
        4 * self.tensors.iter().map(Vec::len).sum::<usize>()
    }

    /// JSON of the record, and the tensors.
    fn encode(&self) -> Vec<u8> {
        let header = serde_json::to_vec(&self.record).expect("names and numbers alone");
        storage::pack(&header, self.tensors.iter().map(Vec::as_slice))
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let (header, tensors) = storage::unpack(bytes).ok_or("a record breaks off")?;
        let record = serde_json::from_slice(header)
            .map_err(|error| format!("a record is not one that this version knows: {error}"))?;
        Ok(Self { record, tensors })
    }
}

struct Writer {
    place: Place,
    open: Option<Segment>,
    tell: watch::Sender<Health>,
}

impl Writer {
    async fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        let mut jobs = Vec::new();
        while queue.recv_many(&mut jobs, BATCH_RECORDS).await > 0 {
            match self.perform(std::mem::take(&mut jobs), &queue).await {
                Ok(done) => done.into_iter().for_each(|done| done()),
                Err(error) => {
                    tracing::error!(%error, "the journal cannot be written any more");
                    let _ = self.tell.send(Health::Failed(error.to_string()));
                    return;
                }
            }
        }
    }

    /// Returns whom to tell, once all of it is on disk.
    async fn perform(&mut self, jobs: Vec<Job>, queue: &mpsc::Receiver<Job>) -> Result<Vec<Done>, StorageError> {
        let begun = Instant::now();
        let mut told = Vec::new();
        let (mut is_written, mut bytes) = (false, 0);
        for job in jobs {
            match job {
                Job::Begin { round } => {
                    if self.open.as_ref().is_none_or(|open| open.round != round) {
                        // What the journal before it holds is on disk before it is left.
                        self.sync()?;
                        let place = self.place.clone();
                        // Of a round that is begun anew, because the one before it had to be made again, nothing counts.
                        place.remove_from(round);
                        let journal = self.until_written(queue, |_| place.create(round, 0)).await?;
                        self.open = Some(Segment { round, number: 0, journal, carried: Vec::new() });
                        self.place.remove_old(round, 0);
                    }
                }
                Job::Append { entry, done } => {
                    let payload = entry.encode();
                    bytes += payload.len();
                    if matches!(entry.record, Record::Body { .. }) {
                        self.sync()?;
                        self.begin_segment(queue, &payload).await?;
                    } else {
                        self.until_written(queue, |open| {
                            open.as_mut().map_or(Ok(()), |open| open.journal.append(&payload))
                        })
                        .await?;
                        if let Some(open) = &mut self.open {
                            open.carry(&entry, payload);
                        }
                    }
                    is_written = true;
                    match planted::is(Bug::AnswersBeforeSync) {
                        true => done(),
                        false => told.push(done),
                    }
                }
                Job::Flush { done } => told.push(done),
            }
        }
        if is_written {
            offload::disk_takes_time().await;
            self.sync()?;
            tracing::debug!(records = told.len(), bytes, took_ms = begun.elapsed().as_secs_f64() * 1e3, "journaled");
        }
        Ok(told)
    }

    fn sync(&mut self) -> Result<(), StorageError> {
        self.open.as_mut().map_or(Ok(()), |open| open.journal.sync())
    }

    /// Goes on in another file, which begins with the body's state. The one before is kept.
    async fn begin_segment(&mut self, queue: &mpsc::Receiver<Job>, body: &[u8]) -> Result<(), StorageError> {
        let Some(Segment { round, number, carried, .. }) = &self.open else { return Ok(()) };
        let (round, number, carried) = (*round, number + 1, carried.clone());
        let place = self.place.clone();
        // Until the state is in it, a crash leaves a segment that does not count.
        let write = |_: &mut Option<Segment>| {
            let mut journal = place.create(round, number)?;
            let kept = if planted::is(Bug::DropsCarriedRecords) { &carried[..1] } else { &carried };
            kept.iter().map(Vec::as_slice).chain([body]).try_for_each(|record| journal.append(record))?;
            Ok(journal)
        };
        let journal = self.until_written(queue, write).await?;
        self.open = Some(Segment { round, number, journal, carried });
        self.sync()?;
        self.place.remove_old(round, number);
        Ok(())
    }

    /// Tries again until the disk takes it, unless nobody waits any more or it never will.
    async fn until_written<T>(
        &mut self,
        queue: &mpsc::Receiver<Job>,
        mut write: impl FnMut(&mut Option<Segment>) -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        loop {
            match write(&mut self.open) {
                Ok(written) => {
                    self.tell.send_if_modified(|health| std::mem::replace(health, Health::Good) != Health::Good);
                    return Ok(written);
                }
                Err(error) if error.may_pass() && !queue.is_closed() => {
                    self.tell.send_if_modified(|health| {
                        let is_new = *health == Health::Good;
                        *health = Health::Degraded(error.to_string());
                        is_new
                    });
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Where the journals of the run in `directory` lie.
pub fn directory(run: &Path) -> PathBuf {
    run.join("journal")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry() -> Entry {
        let record = Record::Committed { participant: "mill-1".into(), step: 3, tokens: 200 };
        Entry { record, tensors: vec![vec![1.5, -0.0, f32::MIN_POSITIVE / 2.0], Vec::new(), vec![f32::MAX]] }
    }

    #[test]
    fn an_entry_comes_back_bit_for_bit() {
        let found = Entry::decode(&entry().encode()).unwrap();
        assert_eq!(found, entry());
        assert_eq!(found.tensors[0][1].to_bits(), (-0.0f32).to_bits());
    }

    #[test]
    fn an_entry_of_another_version_is_refused() {
        let bytes = storage::pack(br#"{"record":"levitated","step":3}"#, std::iter::empty());
        assert!(Entry::decode(&bytes).unwrap_err().contains("not one that this version knows"));
        assert!(Entry::decode(&entry().encode()[1..]).is_err());
    }

    /// What is left of a round that was begun once before counts for an adapter that is no more.
    #[tokio::test]
    async fn a_round_that_is_begun_anew_leaves_no_segment_of_its_first_time() {
        let directory = tempfile::tempdir().unwrap();
        let settings = Settings::default();
        let place = Place { settings, directory: directory.path().join("journal"), experiment_digest: [7; 32] };
        for (round, number) in [(5, 0), (6, 4), (7, 0)] {
            place.create(round, number).unwrap();
        }
        let journal = Journal::start(place.clone(), None).unwrap();
        journal.begin(6).await;
        let (tell, told) = tokio::sync::oneshot::channel();
        journal.flush(move || tell.send(()).unwrap()).await;
        told.await.unwrap();
        let mut left = place.segments();
        left.sort_unstable();
        assert_eq!(left, [(5, 0), (6, 0)]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Entry::decode(&bytes);
        }
    }
}

//! An append-only file of records. What [`Journal::sync`] has returned for is still there after any crash; what was being
//! written at a crash is cut off at the next opening.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::{Disk, Identity, StorageError};

/// A record claims no more than this, whatever its length field says.
pub const RECORD_BYTES_MAX: usize = 1 << 30;

const MAGIC: [u8; 4] = *b"HWJL";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 44;
const RECORD_HEADER_BYTES: usize = 8;

/// A journal to go on with, and its records so far.
pub type Opened = (Journal, Vec<Vec<u8>>);

pub struct Journal {
    disk: Disk,
    path: PathBuf,
    file: File,
    /// Bytes of whole records, header included: where the next one begins.
    length: u64,
    /// Checksum of the last record, or of the header: the next one is chained to it.
    tail: u32,
    /// What is behind `length` could not be cut off, or a sync has failed.
    broken: bool,
}

impl Journal {
    /// An empty journal at `path`. Until this returns, a crash leaves what was there before.
    pub fn create(disk: &Disk, path: &Path, identity: &Identity) -> Result<Self, StorageError> {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(".tmp");
        let temporary = path.with_file_name(name);
        let header = header(identity);
        let mut file = disk.create(&temporary).map_err(StorageError::write(&temporary))?;
        disk.write_at(&mut file, &temporary, 0, &header).map_err(StorageError::write(&temporary))?;
        disk.sync(&file, &temporary).map_err(StorageError::sync(&temporary))?;
        disk.rename(&temporary, path).map_err(StorageError::write(path))?;
        disk.sync_directory(path).map_err(StorageError::sync(path))?;
        let tail = crc32c::crc32c(&header);
        Ok(Self { disk: disk.clone(), path: path.to_owned(), file, length: HEADER_BYTES as u64, tail, broken: false })
    }

    /// The journal at `path` and its whole records, if there is one of this `identity`. What follows the last whole record
    /// was being written at a crash, or is damaged: it is cut off.
    pub fn open(disk: &Disk, path: &Path, identity: &Identity) -> Result<Option<Opened>, StorageError> {
        let (file, bytes) = match disk.open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(StorageError::read(path))?,
        };
        // A journal gets its name with its header on disk: another header is damage, or not ours.
        if bytes.get(..HEADER_BYTES) != Some(&header(identity)[..]) {
            return Ok(None);
        }
        let Walked { records, length, tail } = walk(&bytes);
        let mut journal =
            Self { disk: disk.clone(), path: path.to_owned(), file, length: length as u64, tail, broken: false };
        if length < bytes.len() {
            journal.cut()?;
        }
        journal.settle(&bytes[HEADER_BYTES..length])?;
        Ok(Some((journal, records)))
    }

    /// Bytes of the file that count.
    pub fn length_bytes(&self) -> u64 {
        self.length
    }

    /// Hands a record to the operating system; it is on disk after the next [`sync`](Self::sync). After an error that may
    /// pass, the journal is as it was before.
    pub fn append(&mut self, payload: &[u8]) -> Result<(), StorageError> {
        if self.broken {
            // The file was longer than it may be when the disk failed; perhaps it can be cut by now.
            self.cut()?;
        }
        if payload.len() > RECORD_BYTES_MAX {
            let source = std::io::Error::new(ErrorKind::InvalidInput, "the record is too long");
            return Err(StorageError::Write { path: self.path.clone(), source });
        }
        let checksum = checksum(self.tail, payload);
        let mut record = Vec::with_capacity(RECORD_HEADER_BYTES + payload.len());
        record.extend((payload.len() as u32).to_le_bytes());
        record.extend(checksum.to_le_bytes());
        record.extend(payload);
        if let Err(source) = self.disk.write_at(&mut self.file, &self.path, self.length, &record) {
            // Half a record is cut off here or, at the latest, before the next one; opening would do it too.
            self.broken = true;
            let _ = self.cut();
            return Err(StorageError::Write { path: self.path.clone(), source });
        }
        (self.length, self.tail) = (self.length + record.len() as u64, checksum);
        Ok(())
    }

    /// Returns once everything appended is on disk. After an error nothing is known: open the journal again.
    pub fn sync(&mut self) -> Result<(), StorageError> {
        self.disk.sync(&self.file, &self.path).map_err(StorageError::sync(&self.path))
    }

    /// Brings the records that were read to the disk. Behind a sync that failed they may be in the system's memory alone, and
    /// counted as written there: another sync of the same pages would write nothing. What was cut off must not come back
    /// behind new records either.
    fn settle(&mut self, records: &[u8]) -> Result<(), StorageError> {
        match self.disk.write_at(&mut self.file, &self.path, HEADER_BYTES as u64, records) {
            // A file system that needs new room for old bytes has none: they stay as they are.
            Err(source) if source.kind() != ErrorKind::StorageFull => Err(StorageError::write(&self.path)(source)),
            _ => self.sync(),
        }
    }

    fn cut(&mut self) -> Result<(), StorageError> {
        self.disk.truncate(&self.file, &self.path, self.length).map_err(StorageError::write(&self.path))?;
        self.broken = false;
        Ok(())
    }
}

struct Walked {
    records: Vec<Vec<u8>>,
    length: usize,
    tail: u32,
}

/// The whole records behind a header that is in order.
fn walk(bytes: &[u8]) -> Walked {
    let mut walked = Walked { records: Vec::new(), length: HEADER_BYTES, tail: crc32c::crc32c(&bytes[..HEADER_BYTES]) };
    while let Some(header) = bytes[walked.length..].first_chunk::<RECORD_HEADER_BYTES>() {
        let [a, b, c, d, e, f, g, h] = *header;
        let (length, found) = (u32::from_le_bytes([a, b, c, d]) as usize, u32::from_le_bytes([e, f, g, h]));
        let start = walked.length + RECORD_HEADER_BYTES;
        // The bytes are there before any memory is taken for them.
        let Some(payload) = bytes.get(start..).and_then(|rest| rest.get(..length)) else { break };
        if checksum(walked.tail, payload) != found {
            break;
        }
        walked.records.push(payload.to_vec());
        (walked.length, walked.tail) = (start + length, found);
    }
    walked
}

/// Over what came before, the length and the payload: a record that was moved, doubled or cut short does not fit.
fn checksum(tail: u32, payload: &[u8]) -> u32 {
    let start = crc32c::crc32c_append(tail, &(payload.len() as u32).to_le_bytes());
    crc32c::crc32c_append(start, payload)
}

fn header(identity: &Identity) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MAGIC);
    header[4..8].copy_from_slice(&VERSION.to_le_bytes());
    header[8..40].copy_from_slice(identity);
    let checksum = crc32c::crc32c(&header[..40]);
    header[40..].copy_from_slice(&checksum.to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use proptest::prelude::*;
    use tempfile::{TempDir, tempdir};

    use super::*;
    use crate::{Fault, Operation};

    const OURS: Identity = [7; 32];
    const EIO: i32 = 5;
    const ENOSPC: i32 = 28;

    fn payloads() -> Vec<Vec<u8>> {
        vec![b"started".to_vec(), Vec::new(), vec![0xa5; 300], b"committed".to_vec()]
    }

    fn written(payloads: &[Vec<u8>]) -> (TempDir, PathBuf) {
        let directory = tempdir().unwrap();
        let path = directory.path().join("journal");
        let mut journal = Journal::create(&Disk::default(), &path, &OURS).unwrap();
        for payload in payloads {
            journal.append(payload).unwrap();
        }
        journal.sync().unwrap();
        (directory, path)
    }

    fn records(path: &Path) -> Option<Vec<Vec<u8>>> {
        Journal::open(&Disk::default(), path, &OURS).unwrap().map(|(_, records)| records)
    }

    #[test]
    fn what_is_read_counts_only_once_it_is_on_the_disk() {
        let (_directory, path) = written(&payloads());
        // As behind a sync that failed: the records can be read, and nobody knows where from.
        let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
        let seen = asked.clone();
        let watched = Disk::with_faults(Arc::new(move |operation, _| {
            seen.lock().unwrap().push(operation);
            Fault::None
        }));
        Journal::open(&watched, &path, &OURS).unwrap().unwrap();
        assert_eq!(*asked.lock().unwrap(), [Operation::Write, Operation::Sync]);
        let fails = |which| {
            Disk::with_faults(Arc::new(move |operation, _| match operation == which {
                true => Fault::Fails { errno: EIO },
                false => Fault::None,
            }))
        };
        assert!(Journal::open(&fails(Operation::Sync), &path, &OURS).is_err());
        assert!(Journal::open(&fails(Operation::Write), &path, &OURS).is_err());
        // With no room for them elsewhere, the old bytes are synced where they are.
        let full = Disk::with_faults(Arc::new(|operation, _| match operation {
            Operation::Write => Fault::Fails { errno: ENOSPC },
            _ => Fault::None,
        }));
        assert_eq!(Journal::open(&full, &path, &OURS).unwrap().unwrap().1, payloads());
    }

    #[test]
    fn records_come_back_and_more_are_appended() {
        let (_directory, path) = written(&payloads());
        let (mut journal, found) = Journal::open(&Disk::default(), &path, &OURS).unwrap().unwrap();
        assert_eq!(found, payloads());
        journal.append(b"more").unwrap();
        journal.sync().unwrap();
        assert_eq!(records(&path).unwrap(), [payloads(), vec![b"more".to_vec()]].concat());
    }

    #[test]
    fn another_identity_or_no_file_is_no_journal() {
        let (directory, path) = written(&payloads());
        assert!(Journal::open(&Disk::default(), &path, &[8; 32]).unwrap().is_none());
        assert!(records(&directory.path().join("nothing")).is_none());
    }

    /// Whatever is accepted of damaged bytes is a beginning of what was written.
    fn check_prefix(path: &Path, original: &[Vec<u8>]) -> usize {
        let found = records(path).unwrap_or_default();
        assert!(found.len() <= original.len() && found[..] == original[..found.len()], "{found:?}");
        found.len()
    }

    #[test]
    fn cut_anywhere_it_ends_with_the_last_whole_record() {
        let (directory, path) = written(&payloads());
        let bytes = std::fs::read(&path).unwrap();
        let damaged = directory.path().join("damaged");
        for length in 0..bytes.len() {
            std::fs::write(&damaged, &bytes[..length]).unwrap();
            let whole = check_prefix(&damaged, &payloads());
            assert!(whole < payloads().len());
            let Some((mut journal, _)) = Journal::open(&Disk::default(), &damaged, &OURS).unwrap() else { continue };
            journal.append(b"goes on").unwrap();
            assert_eq!(records(&damaged).unwrap(), [&payloads()[..whole], &[b"goes on".to_vec()]].concat());
        }
    }

    #[test]
    fn no_flipped_bit_is_believed() {
        let (directory, path) = written(&payloads());
        let bytes = std::fs::read(&path).unwrap();
        let damaged = directory.path().join("damaged");
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&damaged, flipped).unwrap();
            assert!(check_prefix(&damaged, &payloads()) < payloads().len(), "bit {bit}");
        }
    }

    #[test]
    fn records_that_were_swapped_or_doubled_are_not_believed() {
        let original = [b"first".to_vec(), b"later".to_vec()];
        let (_directory, path) = written(&original);
        let bytes = std::fs::read(&path).unwrap();
        let (header, [first, later]) = (&bytes[..HEADER_BYTES], [&bytes[44..57], &bytes[57..70]]);
        std::fs::write(&path, [header, later, first].concat()).unwrap();
        assert_eq!(check_prefix(&path, &original), 0);
        std::fs::write(&path, [header, first, first].concat()).unwrap();
        assert_eq!(check_prefix(&path, &original), 1);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), whole in any::<bool>()) {
            let directory = tempdir().unwrap();
            let path = directory.path().join("journal");
            let header = if whole { header(&OURS).to_vec() } else { Vec::new() };
            std::fs::write(&path, [header, bytes].concat()).unwrap();
            check_prefix(&path, &[]);
        }
    }

    /// Every operation of writing two records fails once, in every way: what was synced is there, and where the error may
    /// pass, the same call succeeds afterwards.
    #[test]
    fn a_failing_disk_loses_nothing_that_was_synced() {
        for (errno, torn) in [(EIO, None), (ENOSPC, None), (ENOSPC, Some(3)), (EIO, Some(11))] {
            for failing in 0..12 {
                let count = AtomicUsize::new(0);
                let disk = Disk::with_faults(Arc::new(move |operation, _| {
                    let fails = count.fetch_add(1, SeqCst) == failing;
                    match torn {
                        _ if !fails => Fault::None,
                        Some(written) if operation == Operation::Write => Fault::Tears { written, errno },
                        _ => Fault::Fails { errno },
                    }
                }));
                let directory = tempdir().unwrap();
                let path = directory.path().join("journal");
                let created = match Journal::create(&disk, &path, &OURS) {
                    Err(error) if error.may_pass() => Journal::create(&disk, &path, &OURS),
                    created => created,
                };
                let mut synced = Vec::new();
                let Ok(mut journal) = created else { continue };
                for payload in payloads() {
                    if journal.append(&payload).is_err() {
                        journal.append(&payload).unwrap();
                    }
                    if journal.sync().is_err() {
                        break;
                    }
                    synced.push(payload);
                }
                let found = records(&path).unwrap();
                assert!(found.starts_with(&synced), "operation {failing}, {torn:?}: {found:?}");
            }
        }
    }

    #[test]
    fn half_a_record_that_could_not_be_cut_off_is_cut_off_later() {
        let broken = Arc::new(AtomicUsize::new(0));
        let hook = broken.clone();
        let disk = Disk::with_faults(Arc::new(move |operation, _| match (hook.load(SeqCst), operation) {
            (1, Operation::Write) => Fault::Tears { written: 9, errno: ENOSPC },
            (1, Operation::Truncate) => Fault::Fails { errno: EIO },
            _ => Fault::None,
        }));
        let directory = tempdir().unwrap();
        let path = directory.path().join("journal");
        let mut journal = Journal::create(&disk, &path, &OURS).unwrap();
        broken.store(1, SeqCst);
        assert!(journal.append(b"a record").unwrap_err().is_full());
        broken.store(0, SeqCst);
        journal.append(b"short").unwrap();
        journal.sync().unwrap();
        assert_eq!(records(&path).unwrap(), [b"short".to_vec()]);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), journal.length_bytes());
    }
}

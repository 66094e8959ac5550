//! Snapshots of one thing, the two newest of which are kept: a new one replaces the older of the two, and counts only once
//! it is whole on disk.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::{Disk, Identity, StorageError};

const MAGIC: [u8; 4] = *b"HWSN";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 56;
const DIGEST_BYTES: usize = 32;

/// `<directory>/<name>.a` and `<name>.b`.
pub struct Generations {
    disk: Disk,
    slots: [PathBuf; 2],
    identity: Identity,
    /// Of the newest generation that was written or found.
    sequence: u64,
}

/// A snapshot, found whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    pub sequence: u64,
    pub payload: Vec<u8>,
}

impl Generations {
    /// The generations that are there, newest first: damaged ones and those of another identity are passed over.
    pub fn open(
        disk: &Disk,
        directory: &Path,
        name: &str,
        identity: Identity,
    ) -> Result<(Self, Vec<Generation>), StorageError> {
        let slots = ["a", "b"].map(|slot| directory.join(format!("{name}.{slot}")));
        let mut found = Vec::new();
        for path in &slots {
            match std::fs::read(path) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                read => found.extend(parse(read.map_err(StorageError::read(path))?, &identity)),
            }
        }
        found.sort_by_key(|generation| std::cmp::Reverse(generation.sequence));
        let sequence = found.first().map_or(0, |generation| generation.sequence);
        Ok((Self { disk: disk.clone(), slots, identity, sequence }, found))
    }

    /// Makes `payload` the newest generation. Until this returns, a crash leaves the one before; after an error that may
    /// pass, so does this.
    pub fn save(&mut self, payload: &[u8]) -> Result<u64, StorageError> {
        let sequence = self.sequence + 1;
        // The newest generation is never the one that is written over.
        let path = &self.slots[(sequence % 2) as usize];
        let temporary = path.with_extension("tmp");
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len() + DIGEST_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.identity);
        bytes.extend(sequence.to_le_bytes());
        bytes.extend((payload.len() as u64).to_le_bytes());
        bytes.extend(payload);
        let digest = Sha256::digest(&bytes);
        bytes.extend(digest);
        let written = || -> Result<(), StorageError> {
            let mut file = self.disk.create(&temporary).map_err(StorageError::write(&temporary))?;
            self.disk.write_at(&mut file, &temporary, 0, &bytes).map_err(StorageError::write(&temporary))?;
            self.disk.sync(&file, &temporary).map_err(StorageError::sync(&temporary))?;
            self.disk.rename(&temporary, path).map_err(StorageError::write(path))?;
            self.disk.sync_directory(path).map_err(StorageError::sync(path))
        };
        if let Err(error) = written() {
            // It may take the last of a full disk; that it cannot be removed is not worth another error.
            let _ = self.disk.remove(&temporary);
            return Err(error);
        }
        self.sequence = sequence;
        Ok(sequence)
    }
}

/// None where anything at all is wrong.
fn parse(mut bytes: Vec<u8>, identity: &Identity) -> Option<Generation> {
    let payload_bytes = bytes.len().checked_sub(HEADER_BYTES + DIGEST_BYTES)?;
    let (covered, digest) = bytes.split_at(HEADER_BYTES + payload_bytes);
    let (header, _) = covered.split_first_chunk::<HEADER_BYTES>()?;
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let is_ours = header[..4] == MAGIC && header[4..8] == VERSION.to_le_bytes() && header[8..40] == *identity;
    if !is_ours || number(48) != payload_bytes as u64 || Sha256::digest(covered)[..] != *digest {
        return None;
    }
    let sequence = number(40);
    bytes.truncate(HEADER_BYTES + payload_bytes);
    bytes.drain(..HEADER_BYTES);
    Some(Generation { sequence, payload: bytes })
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

    fn load(directory: &Path) -> Vec<Vec<u8>> {
        let (_, found) = Generations::open(&Disk::default(), directory, "state", OURS).unwrap();
        found.into_iter().map(|generation| generation.payload).collect()
    }

    fn saved(payloads: &[&[u8]]) -> TempDir {
        let directory = tempdir().unwrap();
        let (mut generations, _) = Generations::open(&Disk::default(), directory.path(), "state", OURS).unwrap();
        for payload in payloads {
            generations.save(payload).unwrap();
        }
        directory
    }

    #[test]
    fn the_two_newest_are_kept_also_over_a_restart() {
        let directory = saved(&[b"one", b"two", b"three"]);
        assert_eq!(load(directory.path()), [b"three".to_vec(), b"two".to_vec()]);
        let (mut generations, _) = Generations::open(&Disk::default(), directory.path(), "state", OURS).unwrap();
        assert_eq!(generations.save(b"four").unwrap(), 4);
        assert_eq!(load(directory.path()), [b"four".to_vec(), b"three".to_vec()]);
    }

    #[test]
    fn another_identity_is_passed_over() {
        let directory = saved(&[b"one"]);
        let (_, found) = Generations::open(&Disk::default(), directory.path(), "state", [8; 32]).unwrap();
        assert_eq!(found, []);
    }

    /// The newest generation lies in slot b, the older one in slot a.
    #[test]
    fn damage_anywhere_falls_back_to_the_other_generation() {
        let directory = saved(&[b"first state", b"older state", b"newest state"]);
        let path = directory.path().join("state.b");
        let bytes = std::fs::read(&path).unwrap();
        let check = |damaged: &[u8], what: &str| {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(load(directory.path()), [b"older state".to_vec()], "{what}");
        };
        for length in 0..bytes.len() {
            check(&bytes[..length], &format!("cut to {length}"));
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            check(&flipped, &format!("bit {bit}"));
        }
        check(&[&bytes[..], b"x"].concat(), "a byte more");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(load(directory.path()), [b"older state".to_vec()]);
    }

    #[test]
    fn swapped_generations_are_told_apart_by_what_is_in_them() {
        let directory = saved(&[b"older", b"newest"]);
        let path = |slot: &str| directory.path().join(format!("state.{slot}"));
        for (from, to) in [("a", "x"), ("b", "a"), ("x", "b")] {
            std::fs::rename(path(from), path(to)).unwrap();
        }
        assert_eq!(load(directory.path()), [b"newest".to_vec(), b"older".to_vec()]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]
        #[test]
        fn no_mutation_is_believed(at in any::<prop::sample::Index>(), value in any::<u8>(), more in any::<prop::sample::Index>(), second in any::<u8>()) {
            let mut bytes = Vec::new();
            let payload = b"what was learned so far";
            bytes.extend(MAGIC);
            bytes.extend(VERSION.to_le_bytes());
            bytes.extend(OURS);
            bytes.extend(3u64.to_le_bytes());
            bytes.extend((payload.len() as u64).to_le_bytes());
            bytes.extend(payload);
            let digest = Sha256::digest(&bytes);
            bytes.extend(digest);
            prop_assert!(parse(bytes.clone(), &OURS).is_some());
            let mut mutated = bytes.clone();
            let (at, more) = (at.index(bytes.len()), more.index(bytes.len()));
            (mutated[at], mutated[more]) = (value, second);
            prop_assert_eq!(parse(mutated.clone(), &OURS).is_some(), mutated == bytes);
        }
    }

    #[test]
    fn a_failing_disk_keeps_the_newest_whole_generation() {
        for errno in [5, 28] {
            for failing in 0..6 {
                for torn in [false, true] {
                    let directory = saved(&[b"older", b"newest"]);
                    let count = AtomicUsize::new(0);
                    let disk = Disk::with_faults(Arc::new(move |operation, _| match count.fetch_add(1, SeqCst) {
                        at if at != failing => Fault::None,
                        _ if torn && operation == Operation::Write => Fault::Tears { written: 20, errno },
                        _ => Fault::Fails { errno },
                    }));
                    let (mut generations, _) = Generations::open(&disk, directory.path(), "state", OURS).unwrap();
                    let saved = generations.save(b"next");
                    let found = load(directory.path());
                    match saved {
                        Ok(_) => assert_eq!(found, [b"next".to_vec(), b"newest".to_vec()]),
                        Err(error) => {
                            // A rename may be on disk although its directory's sync has failed.
                            assert!(found[0] == b"newest" || !error.may_pass(), "{found:?}");
                            if error.may_pass() {
                                generations.save(b"next").unwrap();
                                assert_eq!(load(directory.path())[0], b"next");
                            }
                        }
                    }
                }
            }
        }
    }
}

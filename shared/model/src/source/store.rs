//! Parts of models received from a coordinator, kept by content and shared between experiments.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Blob, Manifest, Source, Take, TensorEntry, TensorInfo};
use crate::{ModelConfig, ModelError, Tokenizer};

/// A directory of blobs, each under the hexadecimal SHA-256 of its bytes.
#[derive(Debug, Clone)]
pub struct BlobStore {
    directory: PathBuf,
}

/// Writes one blob; what has arrived stays when the connection is lost, and the next writer continues behind it.
pub struct BlobWriter {
    /// Held until the blob is complete or given up.
    _lock: File,
    blob: Blob,
    file: File,
    written: u64,
    partial: PathBuf,
    complete: PathBuf,
}

/// What [`BlobStore::resume`] finds.
pub enum Resumed {
    Writer(BlobWriter),
    /// The blob is there.
    Whole,
    /// Another participant of this machine, in this process or another, writes to the store. Ask again: what it fetches
    /// need not be fetched again.
    Busy,
}

impl BlobStore {
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, ModelError> {
        let directory = directory.into();
        std::fs::create_dir_all(&directory).map_err(ModelError::io(&directory))?;
        Ok(Self { directory })
    }

    fn path(&self, blob: &Blob) -> PathBuf {
        self.directory.join(experiment::hex(&blob.sha256))
    }

    pub fn holds(&self, blob: &Blob) -> bool {
        std::fs::metadata(self.path(blob)).is_ok_and(|metadata| metadata.len() == blob.bytes)
    }

    /// The bytes of a blob, hashed again: a disk can change them.
    pub fn read(&self, blob: &Blob) -> Result<Vec<u8>, ModelError> {
        let path = self.path(blob);
        let bytes = std::fs::read(&path).map_err(ModelError::io(&path))?;
        if Blob::of(&bytes) == *blob { Ok(bytes) } else { Err(other_content(&path)) }
    }

    /// The same in pieces of `piece_bytes`; an error at the end says that their content was not the blob's.
    fn read_pieces(&self, blob: &Blob, piece_bytes: usize, take: &mut Take<'_>) -> Result<(), ModelError> {
        let path = self.path(blob);
        let mut file = File::open(&path).map_err(ModelError::io(&path))?;
        if file.metadata().map_err(ModelError::io(&path))?.len() != blob.bytes {
            return Err(other_content(&path));
        }
        let mut left = usize::try_from(blob.bytes).map_err(|_| other_content(&path))?;
        let (mut hash, mut piece) = (Sha256::new(), vec![0; piece_bytes.min(left)]);
        while left > 0 {
            piece.truncate(left);
            file.read_exact(&mut piece).map_err(ModelError::io(&path))?;
            left -= piece.len();
            hash.update(&piece);
            take(&piece)?;
        }
        let found: [u8; 32] = hash.finalize().into();
        if found == blob.sha256 { Ok(()) } else { Err(other_content(&path)) }
    }

    /// Opens a blob for writing behind the bytes that an earlier attempt left.
    ///
    /// Never waits: a thread that did could be the one that the other writer needs to go on.
    pub fn resume(&self, blob: &Blob) -> Result<Resumed, ModelError> {
        if self.holds(blob) {
            return Ok(Resumed::Whole);
        }
        let path = self.directory.join("lock");
        let lock =
            OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(ModelError::io(&path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(Resumed::Busy),
            Err(TryLockError::Error(source)) => return Err(ModelError::Io { path, source }),
        }
        // It may have come just before the lock was free.
        if self.holds(blob) {
            return Ok(Resumed::Whole);
        }
        let complete = self.path(blob);
        let partial = complete.with_extension("part");
        let mut file = OpenOptions::new().append(true).create(true).open(&partial).map_err(ModelError::io(&partial))?;
        let mut written = file.metadata().map_err(ModelError::io(&partial))?.len();
        if written > blob.bytes {
            file.set_len(0).map_err(ModelError::io(&partial))?;
            file = OpenOptions::new().append(true).open(&partial).map_err(ModelError::io(&partial))?;
            written = 0;
        }
        Ok(Resumed::Writer(BlobWriter { _lock: lock, blob: *blob, file, written, partial, complete }))
    }
}

fn other_content(path: &Path) -> ModelError {
    ModelError::file(path, "does not have the content it is named by; delete it and join again")
}

impl BlobWriter {
    /// Bytes that need not be sent again.
    pub fn written(&self) -> u64 {
        self.written
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        let over = self.written + bytes.len() as u64 > self.blob.bytes;
        if over {
            return Err(ModelError::file(&self.partial, format!("got more than its {} bytes", self.blob.bytes)));
        }
        self.file.write_all(bytes).map_err(ModelError::io(&self.partial))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Gives the blob its name if its content has that hash, and throws it away otherwise.
    pub fn finish(self) -> Result<(), ModelError> {
        let io = || ModelError::io(&self.partial);
        self.file.sync_all().map_err(io())?;
        let mut hash = Sha256::new();
        let mut file = File::open(&self.partial).map_err(io())?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            match file.read(&mut buffer).map_err(io())? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
        let found: [u8; 32] = hash.finalize().into();
        if found != self.blob.sha256 || self.written != self.blob.bytes {
            std::fs::remove_file(&self.partial).map_err(io())?;
            let what = format!(
                "has SHA-256 {}, not the one it was announced with; it is fetched anew",
                experiment::hex(&found)
            );
            return Err(ModelError::file(&self.partial, what));
        }
        std::fs::rename(&self.partial, &self.complete).map_err(io())
    }
}

/// A model of which a store holds the blobs of some parts.
pub struct StoredModel {
    store: BlobStore,
    manifest: Manifest,
    tokenizer: Tokenizer,
    tensors: Vec<TensorInfo>,
}

impl StoredModel {
    /// The tokenizer's blob must be in the store; tensors are read when a stage asks for them.
    pub fn open(store: BlobStore, manifest: Manifest) -> Result<Self, ModelError> {
        let json = store.read(&manifest.tokenizer_json)?;
        let tokenizer = Tokenizer::from_json(&json, &manifest.tokenizer)
            .map_err(|error| ModelError::file(store.path(&manifest.tokenizer_json), error))?;
        let tensors = manifest.tensors.iter().filter_map(TensorEntry::info).collect();
        Ok(Self { store, manifest, tokenizer, tensors })
    }

    fn blob(&self, info: &TensorInfo) -> Result<&Blob, ModelError> {
        let entry = self.manifest.tensors.iter().find(|entry| entry.name == info.name);
        let entry = entry.ok_or_else(|| ModelError::file(self.origin(), format!("has no tensor {}", info.name)))?;
        Ok(&entry.blob)
    }
}

impl Source for StoredModel {
    fn origin(&self) -> &Path {
        &self.store.directory
    }

    fn config(&self) -> &ModelConfig {
        &self.manifest.config
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read(&self, info: &TensorInfo) -> Result<Vec<u8>, ModelError> {
        self.store.read(self.blob(info)?)
    }

    fn read_pieces(&self, info: &TensorInfo, take: &mut Take<'_>) -> Result<(), ModelError> {
        self.store.read_pieces(self.blob(info)?, info.piece_bytes(), take)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resumed(store: &BlobStore, blob: &Blob) -> BlobWriter {
        match store.resume(blob).unwrap() {
            Resumed::Writer(writer) => writer,
            Resumed::Whole => panic!("the blob is there"),
            Resumed::Busy => panic!("somebody else writes to the store"),
        }
    }

    #[test]
    fn a_blob_resumes_where_it_broke_off() {
        let directory = tempfile::tempdir().unwrap();
        let store = BlobStore::open(directory.path()).unwrap();
        let bytes = b"headwater".repeat(1000);
        let blob = Blob::of(&bytes);
        let mut writer = resumed(&store, &blob);
        writer.write(&bytes[..4000]).unwrap();
        drop(writer);
        assert!(!store.holds(&blob));
        let mut writer = resumed(&store, &blob);
        assert_eq!(writer.written(), 4000);
        writer.write(&bytes[4000..]).unwrap();
        writer.finish().unwrap();
        assert!(store.holds(&blob));
        assert!(matches!(store.resume(&blob).unwrap(), Resumed::Whole));
        assert_eq!(store.read(&blob).unwrap(), bytes);
    }

    #[test]
    fn who_asks_while_another_writes_is_told_so_and_does_not_wait() {
        let directory = tempfile::tempdir().unwrap();
        let store = BlobStore::open(directory.path()).unwrap();
        let [first, second] = [Blob::of(b"first"), Blob::of(b"second")];
        let mut writer = resumed(&store, &first);
        for blob in [first, second] {
            assert!(matches!(store.resume(&blob).unwrap(), Resumed::Busy));
        }
        writer.write(b"first").unwrap();
        writer.finish().unwrap();
        // What is there can be had whoever writes.
        let _writer = resumed(&store, &second);
        assert!(matches!(store.resume(&first).unwrap(), Resumed::Whole));
        assert!(matches!(store.resume(&second).unwrap(), Resumed::Busy));
    }

    #[test]
    fn pieces_are_the_blob_and_a_changed_one_is_noticed_behind_them() {
        let directory = tempfile::tempdir().unwrap();
        let store = BlobStore::open(directory.path()).unwrap();
        let bytes = b"headwater".repeat(1000);
        let blob = Blob::of(&bytes);
        let mut writer = resumed(&store, &blob);
        writer.write(&bytes).unwrap();
        writer.finish().unwrap();
        let pieces = |bytes: usize| {
            let mut pieces = Vec::new();
            let read = store.read_pieces(&blob, bytes, &mut |piece| {
                pieces.push(piece.to_vec());
                Ok(())
            });
            read.map(|()| pieces)
        };
        let found = pieces(4000).unwrap();
        assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [4000, 4000, 1000]);
        assert_eq!(found.concat(), bytes);

        let mut changed = bytes.clone();
        changed[8999] ^= 1;
        std::fs::write(store.path(&blob), &changed).unwrap();
        assert!(pieces(4000).unwrap_err().to_string().contains("join again"));
        std::fs::write(store.path(&blob), &bytes[..8999]).unwrap();
        assert!(pieces(4000).unwrap_err().to_string().contains("join again"));
    }

    #[test]
    fn a_blob_with_another_content_is_thrown_away() {
        let directory = tempfile::tempdir().unwrap();
        let store = BlobStore::open(directory.path()).unwrap();
        let blob = Blob::of(b"expected");
        let mut writer = resumed(&store, &blob);
        writer.write(b"received").unwrap();
        assert!(writer.finish().unwrap_err().to_string().contains("SHA-256"));
        let mut writer = resumed(&store, &blob);
        assert_eq!(writer.written(), 0);
        assert!(writer.write(b"far too long").is_err());
    }
}

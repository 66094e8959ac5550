//! Gets what is missing of a model from the coordinator: the manifest, the tokenizer, and the tensors of this
//! participant's own parts, each by its content.

use std::sync::Arc;
use std::time::Duration;

use indicatif::ProgressBar;
use model::source::{Blob, BlobStore, BlobWriter, Manifest, Resumed, StoredModel};
use model::{Part, Source};
use net::{Connection, StreamKind};
use wire::{BlobHeader, BlobRef, MessageKind, Request};

use crate::ParticipantError;
use crate::progress;

/// Bytes read at a time; a blob that breaks off continues behind the last of them.
const CHUNK_BYTES: usize = 256 << 10;

/// The manifest that `reference` names, fetched unless the store has it.
pub async fn manifest(
    connection: &Connection,
    store: &BlobStore,
    reference: BlobRef,
) -> Result<Manifest, ParticipantError> {
    let blob = Blob { sha256: reference.sha256, bytes: reference.length };
    if blob.bytes > model::source::MANIFEST_BYTES_MAX as u64 {
        return Err(ParticipantError::Coordinator(format!("its manifest has {} bytes", blob.bytes)));
    }
    if !store.holds(&blob) {
        fetch(connection, store, &blob, &ProgressBar::hidden()).await?;
    }
    Ok(Manifest::from_bytes(&store.read(&blob)?)?)
}

/// A source of the tensors that `parts` need; those the store lacks are fetched.
pub async fn source(
    connection: &Connection,
    store: &BlobStore,
    manifest: Manifest,
    parts: &[Part],
) -> Result<Arc<dyn Source>, ParticipantError> {
    let tensors = manifest.needed_by(parts).into_iter().map(|entry| entry.blob);
    let needed: Vec<Blob> = [manifest.tokenizer_json].into_iter().chain(tensors).collect();
    let missing: Vec<Blob> = needed.into_iter().filter(|blob| !store.holds(blob)).collect();
    if !missing.is_empty() {
        let bar = progress::bytes("model part", missing.iter().map(|blob| blob.bytes).sum());
        for blob in &missing {
            // Two tensors of equal content are one blob.
            if !store.holds(blob) {
                fetch(connection, store, blob, &bar).await?;
            }
        }
        bar.finish_and_clear();
        let bytes: u64 = missing.iter().map(|blob| blob.bytes).sum();
        tracing::info!(blobs = missing.len(), bytes, "fetched this device's part of the model");
    }
    Ok(Arc::new(StoredModel::open(store.clone(), manifest)?))
}

async fn fetch(
    connection: &Connection,
    store: &BlobStore,
    blob: &Blob,
    bar: &ProgressBar,
) -> Result<(), ParticipantError> {
    let Some(mut writer) = writer(store, blob).await? else {
        bar.inc(blob.bytes);
        return Ok(());
    };
    bar.inc(writer.written());
    let (mut send, mut receive) = connection.open(StreamKind::Bulk).await?;
    send.message(&Request::FetchBlob { sha256: blob.sha256, offset: writer.written() }).await?;
    send.finish();
    let BlobHeader { length } = receive.message().await?;
    if length != blob.bytes - writer.written() {
        let expected = blob.bytes - writer.written();
        return Err(ParticipantError::Coordinator(format!("it offers {length} bytes of a blob that lacks {expected}")));
    }
    let mut left = length;
    let mut buffer = vec![0; CHUNK_BYTES];
    while left > 0 {
        let chunk = &mut buffer[..left.min(CHUNK_BYTES as u64) as usize];
        receive.bytes(MessageKind::Blob, chunk).await?;
        writer.write(chunk)?;
        bar.inc(chunk.len() as u64);
        left -= chunk.len() as u64;
    }
    receive.end().await?;
    Ok(offload::in_place(|| writer.finish())?)
}

/// From one look at a store that another participant writes to until the next. Nobody tells when a file lock of another
/// process is free, so it is asked for again and again.
const BUSY_RETRY: Duration = Duration::from_millis(100);

/// A writer of the blob; none, if it has come. While another participant writes to the store, the task waits, and no
/// thread does: a process may have more participants than threads that can wait, and who writes needs one to go on.
async fn writer(store: &BlobStore, blob: &Blob) -> Result<Option<BlobWriter>, ParticipantError> {
    let mut waits = false;
    loop {
        match offload::in_place(|| store.resume(blob))? {
            Resumed::Writer(writer) => return Ok(Some(writer)),
            Resumed::Whole => return Ok(None),
            Resumed::Busy => {
                if !waits {
                    tracing::info!("another participant of this machine fetches parts of the model; waiting");
                }
                waits = true;
                tokio::time::sleep(BUSY_RETRY).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On the only thread there is: if it waited for the lock, it would wait for ever.
    #[tokio::test(start_paused = true)]
    async fn a_blob_that_another_fetches_is_waited_for_without_a_thread() {
        let directory = tempfile::tempdir().unwrap();
        let store = BlobStore::open(directory.path()).unwrap();
        let blob = Blob::of(b"headwater");
        let mut other = writer(&store, &blob).await.unwrap().expect("nobody else writes");
        let fetched = async move {
            tokio::time::sleep(5 * BUSY_RETRY).await;
            other.write(b"headwater").unwrap();
            other.finish().unwrap();
        };
        let (mine, ()) = tokio::join!(writer(&store, &blob), fetched);
        assert!(mine.unwrap().is_none());
        assert!(store.holds(&blob));
    }
}

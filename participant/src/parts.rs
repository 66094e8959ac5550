//! Gets what is missing of a model from the coordinator: the manifest, the tokenizer, and the tensors of this
//! participant's own parts, each by its content.

use std::sync::Arc;

use indicatif::ProgressBar;
use model::source::{Blob, BlobStore, Manifest, StoredModel};
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
    let Some(mut writer) = offload::in_place(|| store.resume(blob))? else {
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

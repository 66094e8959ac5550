//! Everything that participants may fetch, by content: the manifest, the tokenizer and the model's tensors, and nothing else.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use model::Source;
use model::source::{Manifest, TensorInfo};
use wire::BlobRef;

pub struct Blobs {
    manifest: Vec<u8>,
    manifest_digest: [u8; 32],
    tokenizer: [u8; 32],
    tensors: HashMap<[u8; 32], TensorInfo>,
    /// Those that are being sent, so that a crowd that asks for one and does not read it holds it in memory once.
    open: Mutex<HashMap<[u8; 32], Weak<Vec<u8>>>>,
}

impl Blobs {
    pub fn new(manifest: &Manifest) -> Self {
        let tensors = manifest.tensors.iter().filter_map(|entry| Some((entry.blob.sha256, entry.info()?)));
        Self {
            manifest: manifest.to_bytes(),
            manifest_digest: manifest.digest(),
            tokenizer: manifest.tokenizer_json.sha256,
            tensors: tensors.collect(),
            open: Mutex::default(),
        }
    }

    pub(super) fn manifest(&self) -> BlobRef {
        BlobRef { sha256: self.manifest_digest, length: self.manifest.len() as u64 }
    }

    /// A blob that nobody has open is read while the others wait: read side by side, it would be there as often.
    pub(super) fn open(
        &self,
        digest: &[u8; 32],
        source: &dyn Source,
    ) -> Option<Result<Arc<Vec<u8>>, model::ModelError>> {
        let mut open = self.open.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(bytes) = open.get(digest).and_then(Weak::upgrade) {
            return Some(Ok(bytes));
        }
        open.retain(|_, bytes| bytes.strong_count() > 0);
        let read = self.read(digest, source)?.map(Arc::new);
        if let Ok(bytes) = &read {
            open.insert(*digest, Arc::downgrade(bytes));
        }
        Some(read)
    }

    fn read(&self, digest: &[u8; 32], source: &dyn Source) -> Option<Result<Vec<u8>, model::ModelError>> {
        if *digest == self.manifest_digest {
            Some(Ok(self.manifest.clone()))
        } else if *digest == self.tokenizer {
            Some(Ok(source.tokenizer().json()))
        } else {
            self.tensors.get(digest).map(|info| source.read(info))
        }
    }
}

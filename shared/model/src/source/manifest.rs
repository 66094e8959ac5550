//! What a model consists of, by content: the list a participant gets before it asks for any weights.

use quant::BlockType;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Source, TensorInfo};
use crate::tokenizer::{JSON_BYTES_MAX, TokenizerSettings};
use crate::{ModelConfig, ModelError, Part};

/// Names every piece of a model by its SHA-256. Two models are the same if their manifests have the same digest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub config: ModelConfig,
    pub tokenizer: TokenizerSettings,
    pub tokenizer_json: Blob,
    pub tensors: Vec<TensorEntry>,
}

/// Bytes, named by their content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blob {
    #[serde(with = "hex_digest")]
    pub sha256: [u8; 32],
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    pub name: String,
    pub shape: Vec<usize>,
    /// ggml's name of the block type.
    pub dtype: String,
    pub blob: Blob,
}

/// A manifest of a model with a hundred thousand tensors stays below this.
pub const MANIFEST_BYTES_MAX: usize = 32 << 20;

pub fn digest_of(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

impl Manifest {
    /// Reads and hashes every tensor of `source`: about a second for each gigabyte.
    pub fn of(source: &dyn Source) -> Result<Self, ModelError> {
        let tokenizer_json = source.tokenizer().json();
        let tensors = source.tensors().iter().map(|info| {
            let bytes = source.read(info)?;
            Ok(TensorEntry {
                name: info.name.clone(),
                shape: info.shape.clone(),
                dtype: info.dtype.name().to_owned(),
                blob: Blob::of(&bytes),
            })
        });
        Ok(Self {
            config: source.config().clone(),
            tokenizer: source.tokenizer().settings().clone(),
            tokenizer_json: Blob::of(&tokenizer_json),
            tensors: tensors.collect::<Result<_, ModelError>>()?,
        })
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("JSON of plain values")
    }

    /// Checks everything a peer could have got wrong: the tensors must be exactly those of the shape.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ModelError> {
        let refused = |what: String| ModelError::Mismatch(format!("the model's manifest {what}"));
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(refused(format!("has {} bytes; at most {MANIFEST_BYTES_MAX} are read", bytes.len())));
        }
        let mut manifest: Self = serde_json::from_slice(bytes).map_err(|error| refused(error.to_string()))?;
        manifest.config = manifest.config.checked().map_err(refused)?;
        let tokenizer = manifest.tokenizer_json.bytes;
        if tokenizer > JSON_BYTES_MAX as u64 {
            return Err(refused(format!("gives tokenizer.json {tokenizer} bytes; at most {JSON_BYTES_MAX} are read")));
        }
        let expected = super::tensors_among(&manifest.config, manifest.tensors.len()).map_err(refused)?;
        if manifest.tensors.len() != expected.len() {
            return Err(refused(format!("lists {} tensors; expected {}", manifest.tensors.len(), expected.len())));
        }
        for (entry, (name, shape)) in manifest.tensors.iter().zip(&expected) {
            if entry.name != *name || entry.shape != *shape {
                return Err(refused(format!("lists {} {:?}; expected {name} {shape:?}", entry.name, entry.shape)));
            }
            let info = entry.info().ok_or_else(|| refused(format!("gives {name} the unknown type {}", entry.dtype)))?;
            if info.bytes().map(|bytes| bytes as u64) != Some(entry.blob.bytes) {
                return Err(refused(format!("gives {name} {} bytes", entry.blob.bytes)));
            }
        }
        Ok(manifest)
    }

    /// The model's digest, the same however the manifest travelled.
    pub fn digest(&self) -> [u8; 32] {
        digest_of(&self.to_bytes())
    }

    /// The entries a party with these parts needs.
    pub fn needed_by(&self, parts: &[Part]) -> Vec<&TensorEntry> {
        let tied = self.config.tied_embeddings;
        let needed = |part: &Part, name: &str| match name {
            "model.embed_tokens.weight" => part.embedding || (part.lm_head && tied),
            "model.norm.weight" | "lm_head.weight" => part.lm_head,
            name => part.blocks.clone().any(|block| name.starts_with(&format!("model.layers.{block}."))),
        };
        self.tensors.iter().filter(|entry| parts.iter().any(|part| needed(part, &entry.name))).collect()
    }
}

impl Blob {
    pub fn of(bytes: &[u8]) -> Self {
        Self { sha256: digest_of(bytes), bytes: bytes.len() as u64 }
    }
}

impl TensorEntry {
    pub fn info(&self) -> Option<TensorInfo> {
        let dtype = BlockType::from_name(&self.dtype)?;
        Some(TensorInfo { name: self.name.clone(), shape: self.shape.clone(), dtype })
    }
}

mod hex_digest {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(digest: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&experiment::hex(digest))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(deserializer)?;
        let digit_pairs =
            text.as_bytes().chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
        let bytes: Option<Vec<u8>> = digit_pairs.collect();
        let digest = bytes.filter(|_| text.len() == 64).and_then(|bytes| bytes.try_into().ok());
        digest.ok_or_else(|| D::Error::custom(format!("`{text}` is no SHA-256 digest")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cut;
    use crate::source::random::tests::tiny_model;

    #[test]
    fn a_manifest_survives_the_wire_and_keeps_its_digest() {
        let manifest = Manifest::of(&tiny_model(3)).unwrap();
        let back = Manifest::from_bytes(&manifest.to_bytes()).unwrap();
        assert_eq!((back.digest(), &back), (manifest.digest(), &manifest));
    }

    #[test]
    fn a_participant_needs_its_own_blocks_and_no_others() {
        let manifest = Manifest::of(&tiny_model(12)).unwrap();
        let [head, body, tail] = Cut { head_blocks: 1, tail_blocks: 1 }.parts(12).unwrap();
        let names = |parts: &[Part]| manifest.needed_by(parts).iter().map(|e| e.name.clone()).collect::<Vec<_>>();
        let own = names(&[head, tail]);
        assert!(own.iter().any(|name| name.starts_with("model.layers.0.")));
        assert!(own.iter().any(|name| name.starts_with("model.layers.11.")));
        assert!(!own.iter().any(|name| name.starts_with("model.layers.1.")));
        assert!(own.contains(&"model.norm.weight".to_owned()));
        let body = names(&[body]);
        assert!(body.iter().all(|name| !own.contains(name)));
        assert_eq!(own.len() + body.len(), manifest.tensors.len());
    }

    #[test]
    fn a_manifest_that_lies_is_refused() {
        let check_refused = |change: fn(&mut Manifest), expected: &str| {
            let mut manifest = Manifest::of(&tiny_model(2)).unwrap();
            change(&mut manifest);
            let error = Manifest::from_bytes(&manifest.to_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check_refused(|m| m.tensors[1].shape = vec![1 << 40], "model.layers.0.input_layernorm");
        check_refused(|m| m.tensors[1].blob.bytes += 1, "bytes");
        check_refused(|m| m.tensors[1].dtype = "Q9".into(), "unknown type Q9");
        check_refused(|m| drop(m.tensors.pop()), "tensors; expected");
        check_refused(|m| m.config.kv_heads = 0, "kv_heads");
        check_refused(|m| m.config.blocks = 1 << 20, "has 20 tensors for 1048576 blocks");
        check_refused(
            |m| m.tokenizer_json.bytes = u64::MAX,
            "gives tokenizer.json 18446744073709551615 bytes; at most",
        );
        check_refused(|m| m.tokenizer_json.bytes = (64 << 20) + 1, "at most 67108864 are read");
    }
}

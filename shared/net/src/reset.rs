//! The key by which a restarted coordinator tells its participants that their connections are gone.
//!
//! QUIC calls that a stateless reset (RFC 9000, section 10.3). Both the reset tokens and the connection ids are derived from the coordinator's
//! private key, so that a coordinator that comes back with the same key is noticed within a round trip instead of an idle time-out.

use std::sync::Arc;

use quinn::EndpointConfig;
use quinn_proto::{
    HashedConnectionIdGenerator,
    crypto::{CryptoError, HmacKey},
};
use sha2::{Digest, Sha256};

use crate::{IdentityError, identity::Identity};

/// RFC 9000, section 15.
const QUIC_VERSION_1: u32 = 1;

/// The endpoint of whoever holds `identity`'s key.
pub(crate) fn endpoint_config(identity: &Identity) -> Result<EndpointConfig, IdentityError> {
    let key = identity.key()?;
    let derived = |label: &str| -> [u8; 32] {
        Sha256::new().chain_update(label).chain_update(key.secret_der()).finalize().into()
    };
    let [a, b, c, d, e, f, g, h, ..] = derived("headwater connection ids");
    let connection_ids = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let mut config = EndpointConfig::new(Arc::new(ResetKey(derived("headwater stateless reset"))));
    // quinn would accept drafts too.
    config.supported_versions(vec![QUIC_VERSION_1]);
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(connection_ids)));
    Ok(config)
}

/// HMAC-SHA-256 (RFC 2104) under a key of 32 bytes.
struct ResetKey([u8; 32]);

impl ResetKey {
    fn tag(&self, data: &[u8]) -> [u8; 32] {
        const BLOCK_BYTES: usize = 64;
        let keyed = |pad: u8| {
            let mut block = [pad; BLOCK_BYTES];
            block.iter_mut().zip(self.0).for_each(|(byte, key)| *byte ^= key);
            Sha256::new().chain_update(block)
        };
        let inner = keyed(0x36).chain_update(data).finalize();
        keyed(0x5c).chain_update(inner).finalize().into()
    }
}

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(&self.tag(data));
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        // Compared without an early exit, so that time tells nothing about how much of a guess was right.
        let difference = self.tag(data).iter().zip(signature).fold(0, |difference, (a, b)| difference | (a ^ b));
        if signature.len() == self.signature_len() && difference == 0 { Ok(()) } else { Err(CryptoError) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tag_is_hmac_sha_256() {
        // RFC 4231, test case 1, has a key of 20 bytes; HMAC pads keys with zeros, so that 12 zeros make it one of 32.
        let mut key = [0; 32];
        key[..20].fill(0x0b);
        let tag: String = ResetKey(key).tag(b"Hi There").iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(tag, "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
    }

    #[test]
    fn only_the_whole_tag_verifies() {
        let key = ResetKey([7; 32]);
        let mut tag = key.tag(b"connection");
        assert!(key.verify(b"connection", &tag).is_ok());
        assert!(key.verify(b"connection", &tag[..16]).is_err());
        assert!(key.verify(b"", &tag).is_err());
        tag[31] ^= 1;
        assert!(key.verify(b"connection", &tag).is_err());
    }
}

//! A client whose first handshake message offers another version of TLS than it speaks: rustls itself would never say so over QUIC.

use std::{any::Any, sync::Arc};

use quinn::crypto::rustls::QuicClientConfig;
use quinn_proto::{
    ConnectError, ConnectionId, Side, TransportError,
    crypto::{ClientConfig, ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey, Session},
    transport_parameters::TransportParameters,
};

/// The client of `tls`, offering `version` and no other.
pub fn offering_tls(version: u16, tls: rustls::ClientConfig) -> quinn::ClientConfig {
    let inner = Arc::new(QuicClientConfig::try_from(tls).unwrap());
    quinn::ClientConfig::new(Arc::new(Mangled { inner, version }))
}

struct Mangled {
    inner: Arc<QuicClientConfig>,
    version: u16,
}

struct MangledSession {
    inner: Box<dyn Session>,
    version: u16,
}

impl ClientConfig for Mangled {
    fn start_session(
        self: Arc<Self>,
        version: u32,
        server_name: &str,
        params: &TransportParameters,
    ) -> Result<Box<dyn Session>, ConnectError> {
        let inner = self.inner.clone().start_session(version, server_name, params)?;
        Ok(Box::new(MangledSession { inner, version: self.version }))
    }
}

impl Session for MangledSession {
    fn write_handshake(&mut self, buf: &mut Vec<u8>) -> Option<Keys> {
        let from = buf.len();
        let keys = self.inner.write_handshake(buf);
        // RFC 8446, section 4.2.1: the extension supported_versions, with TLS 1.3 alone.
        let offer = [0, 0x2b, 0, 3, 2, 3, 4];
        if let Some(at) = buf[from..].windows(offer.len()).position(|bytes| bytes == offer) {
            buf[from + at + 5..][..2].copy_from_slice(&self.version.to_be_bytes());
        }
        keys
    }

    fn initial_keys(&self, dst_cid: &ConnectionId, side: Side) -> Keys {
        self.inner.initial_keys(dst_cid, side)
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        self.inner.handshake_data()
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.inner.peer_identity()
    }

    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        self.inner.early_crypto()
    }

    fn early_data_accepted(&self) -> Option<bool> {
        self.inner.early_data_accepted()
    }

    fn is_handshaking(&self) -> bool {
        self.inner.is_handshaking()
    }

    fn read_handshake(&mut self, buf: &[u8]) -> Result<bool, TransportError> {
        self.inner.read_handshake(buf)
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        self.inner.transport_parameters()
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        self.inner.next_1rtt_keys()
    }

    fn is_valid_retry(&self, orig_dst_cid: &ConnectionId, header: &[u8], payload: &[u8]) -> bool {
        self.inner.is_valid_retry(orig_dst_cid, header, payload)
    }

    fn export_keying_material(
        &self,
        output: &mut [u8],
        label: &[u8],
        context: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        self.inner.export_keying_material(output, label, context)
    }
}

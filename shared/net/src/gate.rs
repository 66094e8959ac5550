//! Who may come in, of those whose certificate is good: asked within the TLS handshake, before a byte of the protocol is read.
//!
//! Nothing here keeps a list; a coordinator brings its own [`Gate`].

use std::{fmt, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, UnixTime};

use crate::identity::PeerIdentity;

/// Decides about peers whose certificates the authority has signed and that are in their time.
pub trait Gate: Send + Sync {
    /// Whether a certificate that was issued to `peer` in the second `issued_unix` still counts. Must not block.
    fn admits(&self, peer: &PeerIdentity, issued_unix: i64) -> bool;
}

/// Turns nobody away.
pub struct Everyone;

impl Gate for Everyone {
    fn admits(&self, _: &PeerIdentity, _: i64) -> bool {
        true
    }
}

/// A verifier of certificates, and the gate behind it.
pub(crate) struct GatedVerifier {
    pub(crate) certificates: Arc<dyn ClientCertVerifier>,
    pub(crate) gate: Arc<dyn Gate>,
}

impl ClientCertVerifier for GatedVerifier {
    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.certificates.verify_client_cert(leaf, intermediates, now)?;
        // A certificate that names nobody is refused behind the handshake, with a reason that the peer can read.
        match PeerIdentity::issued(leaf) {
            Ok((peer, issued_unix)) if !self.gate.admits(&peer, issued_unix) => Err(CertificateError::Revoked.into()),
            _ => Ok(verified),
        }
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.certificates.root_hint_subjects()
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.certificates.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.certificates.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.certificates.supported_verify_schemes()
    }

    fn offer_client_auth(&self) -> bool {
        self.certificates.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.certificates.client_auth_mandatory()
    }
}

impl fmt::Debug for GatedVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatedVerifier").finish_non_exhaustive()
    }
}

//! Who a peer is, read from its certificate, and what this side presents of itself.
//!
//! A name or role is believed only where it stands in the URI of a certificate that our own authority has signed; that signature is checked
//! by TLS before anything here is asked. Issuing certificates is the business of `authority`.

use std::{fmt, str::FromStr};

use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use x509_parser::{extensions::GeneralName, prelude::FromDer};

use crate::authority::CLOCK_SKEW;

/// The DNS name in every coordinator's certificate: participants verify the role, wherever the coordinator may listen.
pub(crate) const COORDINATOR_DNS: &str = "coordinator.headwater";

const CHAIN: &str = "certificate chain";
pub(crate) const PRIVATE_KEY: &str = "private key";

const NAME_BYTES_MAX: usize = 64;

/// A participant's name: 1 to 64 ASCII letters, digits, `_` and `-`, so that it can stand in a URI, a file name and a log line.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerName(String);

/// The role and name that a certificate gives its holder.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PeerIdentity {
    Coordinator,
    Participant {
        name: PeerName,
    },
    /// May ask for a certificate as `name`, and for nothing else. `fingerprint` is the SHA-256 of the enrolment certificate, by which an
    /// invitation is used up.
    Enrol {
        name: PeerName,
        fingerprint: [u8; 32],
    },
}

/// What one side presents and trusts: a certificate with its key, and the only authority it believes.
pub struct Identity {
    chain_pem: String,
    key_pem: String,
    ca_pem: String,
    peer: PeerIdentity,
    fingerprint: [u8; 32],
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
}

/// What is wrong with a name, a certificate or a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("{found:?} is not a name: 1 to {NAME_BYTES_MAX} ASCII letters, digits, `_` and `-` are")]
    Name { found: String },
    #[error("the {what} is not valid PEM: {reason}")]
    Pem { what: &'static str, reason: String },
    #[error("the key is not that of the {what}")]
    OtherKey { what: &'static str },
    #[error("the certificate does not say who its holder is: {reason}")]
    Certificate { reason: String },
    #[error("the certificate request is refused: {reason}")]
    Request { reason: String },
    #[error("the {what} cannot be made: {reason}")]
    Issue { what: &'static str, reason: String },
}

impl IdentityError {
    /// Whether it is the private key that is damaged, and not a certificate.
    pub fn is_of_key(&self) -> bool {
        matches!(self, Self::Pem { what: PRIVATE_KEY, .. })
    }

    fn pem(what: &'static str) -> impl FnOnce(pem::Error) -> Self {
        move |error| {
            let reason = match error {
                // These two would be shown as numbers.
                pem::Error::MissingSectionEnd { .. } => "it breaks off before its end".into(),
                pem::Error::IllegalSectionStart { .. } => "a line that begins a section is damaged".into(),
                error => error.to_string(),
            };
            Self::Pem { what, reason }
        }
    }
}

impl PeerName {
    pub fn new(name: &str) -> Result<Self, IdentityError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(allowed) {
            return Err(IdentityError::Name { found: name.chars().take(NAME_BYTES_MAX).collect() });
        }
        Ok(Self(name.to_owned()))
    }
}

impl PeerIdentity {
    /// The identity in a certificate whose signature has been verified, and the second in which it was issued.
    pub(crate) fn issued(der: &[u8]) -> Result<(Self, i64), IdentityError> {
        let certificate = parse_certificate(der)?;
        let issued_unix = certificate.validity().not_before.timestamp().saturating_add(CLOCK_SKEW.whole_seconds());
        Ok((Self::from_parsed(&certificate, der)?, issued_unix))
    }

    fn from_parsed(certificate: &x509_parser::certificate::X509Certificate, der: &[u8]) -> Result<Self, IdentityError> {
        let refused = |reason: &str| IdentityError::Certificate { reason: reason.into() };
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| refused(&error.to_string()))?
            .ok_or_else(|| refused("it has no subject alternative name"))?;
        let mut uris = names.value.general_names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        // With two URIs a certificate would be two people.
        let (Some(uri), None) = (uris.next(), uris.next()) else {
            return Err(refused("its subject alternative name does not hold exactly one URI"));
        };
        let role = uri.strip_prefix("headwater://").ok_or_else(|| refused("its URI is not a headwater:// one"))?;
        match role.split_once('/') {
            None if role == "coordinator" => Ok(Self::Coordinator),
            Some(("participant", name)) => Ok(Self::Participant { name: PeerName::new(name)? }),
            Some(("enrol", name)) => Ok(Self::Enrol { name: PeerName::new(name)?, fingerprint: fingerprint(der) }),
            _ => Err(refused("its URI names no known role")),
        }
    }

    /// The URI by which a certificate carries this identity.
    pub(crate) fn uri(&self) -> String {
        match self {
            Self::Coordinator => "headwater://coordinator".into(),
            Self::Participant { name } => format!("headwater://participant/{name}"),
            Self::Enrol { name, .. } => format!("headwater://enrol/{name}"),
        }
    }
}

impl Identity {
    pub fn from_pem(chain_pem: &str, key_pem: &str, ca_pem: &str) -> Result<Self, IdentityError> {
        let leaf = first_certificate(chain_pem, CHAIN)?;
        // What is between it and the authority is sent with it.
        certificates(chain_pem)?;
        first_certificate(ca_pem, "authority's certificate")?;
        private_key(key_pem)?;
        let parsed = parse_certificate(&leaf)?;
        Ok(Self {
            chain_pem: chain_pem.to_owned(),
            key_pem: key_pem.to_owned(),
            ca_pem: ca_pem.to_owned(),
            peer: PeerIdentity::from_parsed(&parsed, &leaf)?,
            fingerprint: fingerprint(&leaf),
            not_before: parsed.validity().not_before.to_datetime(),
            not_after: parsed.validity().not_after.to_datetime(),
        })
    }

    /// Who this side is.
    pub fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    pub fn chain_pem(&self) -> &str {
        &self.chain_pem
    }

    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// SHA-256 of the certificate.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// When the certificate expires.
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }

    /// When it is time to ask for another one: two thirds of the certificate's own time are over.
    pub fn renewal_due(&self) -> OffsetDateTime {
        self.not_before + (self.not_after - self.not_before) * 2 / 3
    }

    pub(crate) fn chain(&self) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
        certificates(&self.chain_pem)
    }

    pub(crate) fn key(&self) -> Result<PrivateKeyDer<'static>, IdentityError> {
        private_key(&self.key_pem)
    }

    pub(crate) fn authority(&self) -> Result<CertificateDer<'static>, IdentityError> {
        first_certificate(&self.ca_pem, "authority's certificate")
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("peer", &self.peer).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for PeerName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl FromStr for PeerName {
    type Err = IdentityError;

    fn from_str(name: &str) -> Result<Self, IdentityError> {
        Self::new(name)
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Coordinator => f.write_str("the coordinator"),
            Self::Participant { name } => write!(f, "participant {name}"),
            Self::Enrol { name, .. } => write!(f, "an invitation for {name}"),
        }
    }
}

/// [`Connection::peer_key`](crate::Connection::peer_key) of whoever presents this chain.
pub fn certified_key(chain_pem: &str) -> Result<[u8; 32], IdentityError> {
    certified_key_der(&first_certificate(chain_pem, CHAIN)?)
}

/// SHA-256 of the public key in a certificate in DER, algorithm included: the same in every certificate of one key.
pub fn certified_key_der(der: &[u8]) -> Result<[u8; 32], IdentityError> {
    Ok(fingerprint(parse_certificate(der)?.public_key().raw))
}

/// When the first certificate in `pem` expires.
pub(crate) fn not_after(pem: &str, what: &'static str) -> Result<OffsetDateTime, IdentityError> {
    Ok(parse_certificate(&first_certificate(pem, what)?)?.validity().not_after.to_datetime())
}

fn parse_certificate(der: &[u8]) -> Result<x509_parser::certificate::X509Certificate<'_>, IdentityError> {
    match x509_parser::certificate::X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok((rest, _)) => Err(IdentityError::Certificate { reason: format!("{} bytes follow it", rest.len()) }),
        Err(error) => Err(IdentityError::Certificate { reason: error.to_string() }),
    }
}

fn first_certificate(pem: &str, what: &'static str) -> Result<CertificateDer<'static>, IdentityError> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(IdentityError::pem(what))
}

fn certificates(chain_pem: &str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let chain = CertificateDer::pem_slice_iter(chain_pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    chain.map_err(IdentityError::pem(CHAIN))
}

fn private_key(pem: &str) -> Result<PrivateKeyDer<'static>, IdentityError> {
    PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(IdentityError::pem(PRIVATE_KEY))
}

pub(crate) fn fingerprint(der: &[u8]) -> [u8; 32] {
    Sha256::digest(der).into()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;
    use crate::{Authority, DeviceKey};

    /// Checks who a certificate with these URIs is, or that it is nobody.
    fn check_uris(uris: &[&str], expected: Option<PeerIdentity>) {
        let mut params = CertificateParams::default();
        // A subject that looks like somebody must not matter.
        params.distinguished_name.push(DnType::CommonName, "headwater://coordinator");
        params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        assert_eq!(PeerIdentity::issued(certificate.der()).ok().map(|(peer, _)| peer), expected, "{uris:?}");
    }

    #[test]
    fn only_one_well_formed_uri_makes_an_identity() {
        let alice = PeerIdentity::Participant { name: PeerName::new("alice-2_B").unwrap() };
        check_uris(&["headwater://participant/alice-2_B"], Some(alice));
        check_uris(&["headwater://coordinator"], Some(PeerIdentity::Coordinator));
        check_uris(&[], None);
        check_uris(&["headwater://participant/alice", "headwater://coordinator"], None);
        check_uris(&["headwater://participant/alice", "headwater://participant/alice"], None);
        check_uris(&["headwater://coordinator/"], None);
        check_uris(&["headwater://coordinator/x"], None);
        check_uris(&["headwater://participant"], None);
        check_uris(&["headwater://participant/"], None);
        check_uris(&["headwater://participant/a/b"], None);
        check_uris(&["headwater://participant/../coordinator"], None);
        check_uris(&["headwater://participant/al%69ce"], None);
        check_uris(&["HEADWATER://coordinator"], None);
        check_uris(&["https://participant/alice"], None);
        check_uris(&["headwater://auditor/alice"], None);
    }

    #[test]
    fn names_are_short_and_plain() {
        for good in ["a", "A-1_z", &"x".repeat(64)] {
            assert_eq!(PeerName::new(good).unwrap().as_ref(), good);
        }
        for bad in ["", "a b", "a/b", "ä", "a\n", ".", &"x".repeat(65)] {
            assert!(PeerName::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn request_counts_only_for_its_key() {
        let now = OffsetDateTime::now_utc();
        let authority = Authority::create(now).unwrap();
        let key = DeviceKey::generate().unwrap();
        // This request asks to be the coordinator, and to sign for others.
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI("headwater://coordinator".try_into().unwrap())];
        params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
        let request = params.serialize_request(&KeyPair::from_pem(key.pem()).unwrap()).unwrap();
        let name = PeerName::new("alice").unwrap();
        let chain = authority.issue_participant(&name, request.der(), now).unwrap();
        let identity = Identity::from_pem(&chain, key.pem(), authority.root_pem()).unwrap();
        assert_eq!(*identity.peer(), PeerIdentity::Participant { name });
        let days = (identity.not_after() - now).whole_days();
        assert!((29..=30).contains(&days), "{days} days");
    }

    #[test]
    fn damaged_request_certifies_no_other_key() {
        let now = OffsetDateTime::now_utc();
        let authority = Authority::create(now).unwrap();
        let name = PeerName::new("alice").unwrap();
        let key = DeviceKey::generate().unwrap();
        let request = key.request_der().unwrap();
        let certified_key = |request: &[u8]| {
            let chain = authority.issue_participant(&name, request, now).ok()?;
            let leaf = first_certificate(&chain, CHAIN).unwrap();
            Some(parse_certificate(&leaf).unwrap().public_key().raw.to_vec())
        };
        let honest = certified_key(&request).unwrap();
        let mut accepted = 0;
        for at in 0..request.len() {
            let mut damaged = request.clone();
            damaged[at] ^= 1;
            // A few bits are not signed and not read, such as the count of unused bits in the signature itself.
            if let Some(found) = certified_key(&damaged) {
                assert_eq!(found, honest, "bit 0 of byte {at}");
                accepted += 1;
            }
            assert_eq!(certified_key(&request[..at]), None, "{at} bytes");
        }
        assert!(accepted < 4, "{accepted} damaged requests were accepted");
    }

    #[test]
    fn damaged_files_are_told_apart_and_not_shown_as_numbers() {
        let now = OffsetDateTime::now_utc();
        let identity = Authority::create(now).unwrap().issue_coordinator(now).unwrap();
        let (chain, key, ca) = (identity.chain_pem(), identity.key_pem(), identity.ca_pem());
        // Before the last line: of the chain, the certificate behind the first is damaged.
        let cut = |pem: &str| pem[..pem.len() - 40].to_owned();
        let broken = |pem: &str| pem.replacen("PRIVATE KEY-----", "PRIVATE KEY", 1);
        for (chain, key, ca, what) in [
            (cut(chain), key.to_owned(), ca.to_owned(), "the certificate chain is"),
            (chain.to_owned(), cut(key), ca.to_owned(), "the private key is"),
            (chain.to_owned(), broken(key), ca.to_owned(), "the private key is"),
            (chain.to_owned(), key.to_owned(), cut(ca), "the authority's certificate is"),
        ] {
            let error = Identity::from_pem(&chain, &key, &ca).unwrap_err();
            assert_eq!(error.is_of_key(), what == "the private key is", "{error}");
            let told = error.to_string();
            assert!(told.starts_with(what) && !told.contains('['), "{told}");
        }
    }

    #[test]
    fn authority_survives_its_files() {
        let now = OffsetDateTime::now_utc();
        let made = Authority::create(now).unwrap();
        let read = Authority::from_pem(made.root_pem(), made.certificate_pem(), made.key_pem()).unwrap();
        assert_eq!((read.certificate_pem(), read.not_after()), (made.certificate_pem(), made.not_after()));
        assert!(read.issue_coordinator(now).is_ok());
    }

    #[test]
    fn debug_shows_no_key() {
        let now = OffsetDateTime::now_utc();
        let identity = Authority::create(now).unwrap().issue_coordinator(now).unwrap();
        assert!(!format!("{identity:?}").contains("KEY"));
    }
}

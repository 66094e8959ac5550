//! The certificate authority of one coordinator, and the key that a device makes for itself.
//!
//! The authority signs three kinds of certificates, each good for one role and one direction of TLS. A device's private key never leaves it:
//! what travels is a certificate request, of which only the public key is used. The caller says what time it is.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
    SerialNumber,
};
use rustls_pki_types::CertificateSigningRequestDer;
use time::{Duration, OffsetDateTime};

use crate::identity::{COORDINATOR_DNS, Identity, IdentityError, PeerIdentity, PeerName};

const AUTHORITY_DAYS: i64 = 3650;
const COORDINATOR_DAYS: i64 = 365;
const PARTICIPANT_DAYS: i64 = 30;

/// How much earlier than now a certificate begins, because clocks differ.
const CLOCK_SKEW: Duration = Duration::hours(1);

/// Signs for one coordinator and all of its participants.
pub struct Authority {
    certificate_pem: String,
    key_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A participant's private key, made on its own machine.
pub struct DeviceKey {
    key: KeyPair,
    pem: String,
}

impl Authority {
    /// A new authority with a new key.
    pub fn create(now: OffsetDateTime) -> Result<Self, IdentityError> {
        let key = new_key()?;
        let mut params = params("headwater authority", now, Duration::days(AUTHORITY_DAYS))?;
        // Path length 0: whatever it signs cannot sign in turn.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(cannot_issue("authority's certificate"))?;
        Self::from_pem(&certificate.pem(), &key.serialize_pem())
    }

    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, IdentityError> {
        let key = key_from_pem(key_pem)?;
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, key)
            .map_err(|error| IdentityError::Pem { what: "authority's certificate", reason: error.to_string() })?;
        Ok(Self { certificate_pem: certificate_pem.to_owned(), key_pem: key_pem.to_owned(), issuer })
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// The coordinator's own certificate, with a new key.
    pub fn issue_coordinator(&self, now: OffsetDateTime) -> Result<Identity, IdentityError> {
        let key = new_key()?;
        let chain = self.issue(&PeerIdentity::Coordinator, &key, now, Duration::days(COORDINATOR_DAYS))?;
        Identity::from_pem(&chain, &key.serialize_pem(), &self.certificate_pem)
    }

    /// A certificate and key to be handed to the person who will enrol a device as `name`.
    pub fn issue_enrolment(
        &self,
        name: &PeerName,
        now: OffsetDateTime,
        valid: Duration,
    ) -> Result<Identity, IdentityError> {
        let key = new_key()?;
        let role = PeerIdentity::Enrol { name: name.clone(), fingerprint: [0; 32] };
        let chain = self.issue(&role, &key, now, valid)?;
        Identity::from_pem(&chain, &key.serialize_pem(), &self.certificate_pem)
    }

    /// A device's certificate chain in PEM. Of the request only the public key counts, and its holder has proved to own it; the name is
    /// that of the enrolment certificate, or of the certificate being renewed.
    pub fn issue_participant(
        &self,
        name: &PeerName,
        csr_der: &[u8],
        now: OffsetDateTime,
    ) -> Result<String, IdentityError> {
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der))
            .map_err(|error| IdentityError::Request { reason: error.to_string() })?;
        let role = PeerIdentity::Participant { name: name.clone() };
        self.issue(&role, &request.public_key, now, Duration::days(PARTICIPANT_DAYS))
    }

    fn issue(
        &self,
        role: &PeerIdentity,
        key: &impl PublicKeyData,
        now: OffsetDateTime,
        valid: Duration,
    ) -> Result<String, IdentityError> {
        let uri = role.uri();
        let mut params = params(&uri, now, valid)?;
        let san = |text: &str| text.try_into().map_err(cannot_issue("certificate"));
        params.subject_alt_names = vec![SanType::URI(san(&uri)?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match role {
            PeerIdentity::Coordinator => {
                params.subject_alt_names.push(SanType::DnsName(san(COORDINATOR_DNS)?));
                vec![ExtendedKeyUsagePurpose::ServerAuth]
            }
            PeerIdentity::Participant { .. } | PeerIdentity::Enrol { .. } => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        params.use_authority_key_identifier_extension = true;
        params.signed_by(key, &self.issuer).map(|certificate| certificate.pem()).map_err(cannot_issue("certificate"))
    }
}

impl DeviceKey {
    pub fn generate() -> Result<Self, IdentityError> {
        let key = new_key()?;
        let pem = key.serialize_pem();
        Ok(Self { key, pem })
    }

    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        Ok(Self { key: key_from_pem(pem)?, pem: pem.to_owned() })
    }

    /// For the device's own disk; this is never sent.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate request that proves possession of the key and states no name.
    pub fn request_der(&self) -> Result<Vec<u8>, IdentityError> {
        let request =
            CertificateParams::default().serialize_request(&self.key).map_err(cannot_issue("certificate request"))?;
        Ok(request.der().to_vec())
    }
}

fn params(common_name: &str, now: OffsetDateTime, valid: Duration) -> Result<CertificateParams, IdentityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + valid;
    let mut serial = [0; 16];
    rustls::crypto::ring::default_provider().secure_random.fill(&mut serial).map_err(|_| IdentityError::Issue {
        what: "serial number",
        reason: "the system gave no random bytes".into(),
    })?;
    // A serial number is positive.
    serial[0] &= 0x7f;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

fn new_key() -> Result<KeyPair, IdentityError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(cannot_issue("private key"))
}

fn key_from_pem(pem: &str) -> Result<KeyPair, IdentityError> {
    KeyPair::from_pem(pem).map_err(|error| IdentityError::Pem { what: "private key", reason: error.to_string() })
}

fn cannot_issue(what: &'static str) -> impl Fn(rcgen::Error) -> IdentityError {
    move |error| IdentityError::Issue { what, reason: error.to_string() }
}

//! The certificate authorities of one coordinator, and the key that a device makes for itself.
//!
//! A root, which peers believe and which signs nothing but issuing authorities, so that its key can be kept offline; and an issuing
//! authority, which signs three kinds of certificates, each good for one role and one direction of TLS. A device's private key never leaves
//! it: what travels is a certificate request, of which only the public key is used. The caller says what time it is.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
    SerialNumber,
};
use rustls_pki_types::CertificateSigningRequestDer;
use time::{Duration, OffsetDateTime};

use crate::identity::{
    COORDINATOR_DNS, Identity, IdentityError, PRIVATE_KEY, PeerIdentity, PeerName, certified_key, fingerprint,
    not_after,
};

const ROOT_DAYS: i64 = 3650;
const AUTHORITY_DAYS: i64 = 730;
const COORDINATOR_DAYS: i64 = 365;
const PARTICIPANT_DAYS: i64 = 30;

/// How much earlier than now a certificate begins, because clocks differ.
pub(crate) const CLOCK_SKEW: Duration = Duration::hours(1);

/// What everybody of one coordinator believes. Its key is needed again only to make another issuing authority.
pub struct Root {
    certificate_pem: String,
    key_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// Signs for one coordinator and all of its participants, in the name of the root.
pub struct Authority {
    root_pem: String,
    certificate_pem: String,
    key_pem: String,
    issuer: Issuer<'static, KeyPair>,
    not_after: OffsetDateTime,
}

/// A participant's private key, made on its own machine.
pub struct DeviceKey {
    key: KeyPair,
    pem: String,
}

impl Root {
    /// A new root with a new key.
    pub fn create(now: OffsetDateTime) -> Result<Self, IdentityError> {
        let key = new_key()?;
        // Path length 1: what it signs may sign certificates, and those may not.
        let params = authority_params("headwater root", now, Duration::days(ROOT_DAYS), 1)?;
        let certificate = params.self_signed(&key).map_err(cannot_issue("root's certificate"))?;
        Self::from_pem(&certificate.pem(), &key.serialize_pem())
    }

    /// Refuses a key that is not the certificate's.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, IdentityError> {
        let issuer = issuer(certificate_pem, key_pem, "root's certificate")?;
        Ok(Self { certificate_pem: certificate_pem.to_owned(), key_pem: key_pem.to_owned(), issuer })
    }

    /// Whether this is a certificate at all; the key may be far away.
    pub fn check(certificate_pem: &str) -> Result<(), IdentityError> {
        not_after(certificate_pem, "root's certificate").map(drop)
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// A new issuing authority with a new key.
    pub fn issue_authority(&self, now: OffsetDateTime) -> Result<Authority, IdentityError> {
        let key = new_key()?;
        let mut params = authority_params("headwater issuing authority", now, Duration::days(AUTHORITY_DAYS), 0)?;
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).map_err(cannot_issue("authority's certificate"))?;
        Authority::from_pem(&self.certificate_pem, &certificate.pem(), &key.serialize_pem())
    }
}

impl Authority {
    /// A new authority under a new root, whose key is forgotten at once.
    pub fn create(now: OffsetDateTime) -> Result<Self, IdentityError> {
        Root::create(now)?.issue_authority(now)
    }

    /// The issuing authority with this certificate, under the root whose certificate is `root_pem`. The two may be one.
    pub fn from_pem(root_pem: &str, certificate_pem: &str, key_pem: &str) -> Result<Self, IdentityError> {
        Ok(Self {
            root_pem: root_pem.to_owned(),
            certificate_pem: certificate_pem.to_owned(),
            key_pem: key_pem.to_owned(),
            issuer: issuer(certificate_pem, key_pem, "authority's certificate")?,
            not_after: not_after(certificate_pem, "authority's certificate")?,
        })
    }

    /// What peers believe.
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// When its certificate expires, and with it every one that it has signed.
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }

    /// The coordinator's own certificate, with a new key.
    pub fn issue_coordinator(&self, now: OffsetDateTime) -> Result<Identity, IdentityError> {
        let key = new_key()?;
        let chain = self.issue(&PeerIdentity::Coordinator, &key, now, Duration::days(COORDINATOR_DAYS))?;
        Identity::from_pem(&chain, &key.serialize_pem(), &self.root_pem)
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
        Identity::from_pem(&chain, &key.serialize_pem(), &self.root_pem)
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
        let leaf = params.signed_by(key, &self.issuer).map_err(cannot_issue("certificate"))?.pem();
        // Peers have the root; what is between it and the leaf travels with the leaf.
        Ok(if self.certificate_pem == self.root_pem { leaf } else { leaf + &self.certificate_pem })
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

fn authority_params(
    common_name: &str,
    now: OffsetDateTime,
    valid: Duration,
    path_length: u8,
) -> Result<CertificateParams, IdentityError> {
    let mut params = params(common_name, now, valid)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn issuer(certificate_pem: &str, key_pem: &str, what: &'static str) -> Result<Issuer<'static, KeyPair>, IdentityError> {
    let key = key_from_pem(key_pem)?;
    if fingerprint(&key.subject_public_key_info()) != certified_key(certificate_pem)? {
        return Err(IdentityError::OtherKey { what });
    }
    Issuer::from_ca_cert_pem(certificate_pem, key)
        .map_err(|error| IdentityError::Pem { what, reason: error.to_string() })
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
    KeyPair::from_pem(pem).map_err(|error| IdentityError::Pem { what: PRIVATE_KEY, reason: error.to_string() })
}

fn cannot_issue(what: &'static str) -> impl Fn(rcgen::Error) -> IdentityError {
    move |error| IdentityError::Issue { what, reason: error.to_string() }
}

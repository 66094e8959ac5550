//! Hostile bytes for what devices and coordinators read of each other's identities: invitations, certificates, certificate requests.

#[path = "../../wire/tests/mutation/mod.rs"]
mod mutation;

use kernels::CountingAllocator;
use net::{Authority, DeviceKey, Identity, Invitation, PeerName};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use time::{Duration, OffsetDateTime};

#[global_allocator]
static MEMORY: CountingAllocator = CountingAllocator::new();

/// One test, so that nobody else allocates meanwhile.
#[test]
fn hostile_identities_are_refused_within_twice_their_size() {
    let now = OffsetDateTime::now_utc();
    let authority = Authority::create(now).unwrap();
    let name = PeerName::new("alice").unwrap();
    let key = DeviceKey::generate().unwrap();
    let request = key.request_der().unwrap();
    let chain = authority.issue_participant(&name, &request, now).unwrap();
    let enrolment = authority.issue_enrolment(&name, now, Duration::HOUR).unwrap();
    let invitation = Invitation {
        name: name.clone(),
        addresses: vec!["example.org:4433".into(), "[::1]:4433".into()],
        ca_pem: authority.root_pem().into(),
        enrol_cert_pem: enrolment.chain_pem().into(),
        enrol_key_pem: enrolment.key_pem().into(),
        expires_unix: enrolment.not_after().unix_timestamp(),
    };

    mutation::check(&MEMORY, "certificate request", &[request], |bytes| {
        authority.issue_participant(&name, bytes, now).is_ok()
    });
    mutation::check(&MEMORY, "invitation", &[invitation.to_toml().into_bytes()], |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return false };
        match Invitation::parse(text) {
            Ok(read) => {
                assert!(!read.addresses.is_empty());
                true
            }
            Err(error) => {
                assert!(!error.contains("PRIVATE KEY"), "{error}");
                false
            }
        }
    });
    mutation::check(&MEMORY, "certificate chain in PEM", &[chain.clone().into_bytes()], |bytes| {
        std::str::from_utf8(bytes).is_ok_and(|text| Identity::from_pem(text, key.pem(), authority.root_pem()).is_ok())
    });
    let der = CertificateDer::from_pem_slice(chain.as_bytes()).unwrap().to_vec();
    mutation::check(&MEMORY, "certificate", &[der], |bytes| net::certified_key_der(bytes).is_ok());
}

//! The handshake matrix: everybody who is not who he should be is turned away over real QUIC, before anything he says is read.
//!
//! Wrong participants knock at one listener, each with a certificate, key or handshake of his own making, and send a request at once; the
//! first connection that the listener ever hands out is the honest one that comes last. Wrong coordinators are dialled by an honest
//! participant. Every case is named, and printed with the reason it was given (`--nocapture`).

mod mangle;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use net::{
    Authority, Congestion, DeviceKey, Dialer, Gate, Identity, Listener, PeerIdentity, PeerName, Root, Transport,
    TransportLimits,
};
use quinn::{ConnectionError, crypto::rustls::QuicClientConfig};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose as Usage, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::{
    client::{ClientSessionMemoryCache, ClientSessionStore, ResolvesClientCert, Resumption},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use time::{Duration, OffsetDateTime};

const TRANSPORT: Transport =
    Transport { limits: TransportLimits { tensor_bytes_max: 1 << 21, in_flight: 2 }, congestion: Congestion::Cubic };

const EVE: &str = "headwater://participant/eve";
const COORDINATOR: &str = "headwater://coordinator";
const DNS: &str = "coordinator.headwater";

fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn name(name: &str) -> PeerName {
    PeerName::new(name).unwrap()
}

async fn before_deadline<T>(outcome: impl Future<Output = T>) -> T {
    tokio::time::timeout(std::time::Duration::from_secs(10), outcome).await.expect("nothing happens")
}

/// Certificates and the key that goes, or should go, with the first of them.
struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
}

/// A signer: certificate and key in PEM.
struct Signer {
    certificate_pem: String,
    key_pem: String,
}

/// One authority of ours with everything that it should never give away.
struct Ours {
    root: Root,
    authority: Authority,
}

impl Ours {
    fn new() -> Self {
        let root = Root::create(now() - Duration::days(1500)).unwrap();
        let authority = root.issue_authority(now() - Duration::days(400)).unwrap();
        Self { root, authority }
    }

    fn issuing(&self) -> Signer {
        Signer::of(&self.authority)
    }

    fn participant(&self, who: &str, issued: OffsetDateTime) -> Identity {
        let key = DeviceKey::generate().unwrap();
        let chain = self.authority.issue_participant(&name(who), &key.request_der().unwrap(), issued).unwrap();
        Identity::from_pem(&chain, key.pem(), self.authority.root_pem()).unwrap()
    }
}

impl Signer {
    fn of(authority: &Authority) -> Self {
        Self { certificate_pem: authority.certificate_pem().into(), key_pem: authority.key_pem().into() }
    }

    fn der(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.certificate_pem.as_bytes()).unwrap()
    }

    /// A sound certificate of participant `eve`, but for what `change` changes, with this signer's own behind it.
    fn sign(&self, change: impl FnOnce(&mut CertificateParams)) -> Credentials {
        let (leaf, key) = self.leaf(change);
        Credentials { chain: vec![leaf.der().clone(), self.der()], key }
    }

    fn leaf(&self, change: impl FnOnce(&mut CertificateParams)) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let issuer = Issuer::from_ca_cert_pem(&self.certificate_pem, KeyPair::from_pem(&self.key_pem).unwrap());
        (params(change).signed_by(&key, &issuer.unwrap()).unwrap(), key)
    }

    fn signer(&self, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let (certificate, key) = self.leaf(change);
        Self { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() }
    }
}

fn params(change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![uri(EVE)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![Usage::ClientAuth];
    (params.not_before, params.not_after) = (now() - Duration::HOUR, now() + Duration::DAY);
    change(&mut params);
    params
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

fn authority(path_length: u8) -> impl Fn(&mut CertificateParams) {
    move |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.extended_key_usages = Vec::new();
    }
}

/// A coordinator's certificate as `issue_coordinator` makes it.
fn coordinator(params: &mut CertificateParams) {
    params.subject_alt_names = vec![uri(COORDINATOR), dns(DNS)];
    params.extended_key_usages = vec![Usage::ServerAuth];
}

fn of_identity(identity: &Identity) -> Credentials {
    let chain = CertificateDer::pem_slice_iter(identity.chain_pem().as_bytes()).map(Result::unwrap).collect();
    Credentials { chain, key: KeyPair::from_pem(identity.key_pem()).unwrap() }
}

fn flipped(der: &CertificateDer, at: usize) -> CertificateDer<'static> {
    let mut bytes = der.to_vec();
    bytes[at] ^= 1;
    bytes.into()
}

/// Presents what it is told to, whether it makes sense or not.
#[derive(Debug)]
struct Presenting(Option<Arc<CertifiedKey>>);

impl Presenting {
    fn new(credentials: Option<Credentials>) -> Arc<Self> {
        Arc::new(Self(credentials.map(|Credentials { chain, key }| {
            let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            Arc::new(CertifiedKey::new(chain, rustls::crypto::ring::sign::any_supported_type(&key).unwrap()))
        })))
    }
}

impl ResolvesClientCert for Presenting {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

impl ResolvesServerCert for Presenting {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }
}

fn tls(ours: &Ours, credentials: Option<Credentials>) -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ours.root.certificate_pem().as_bytes()).unwrap()).unwrap();
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_cert_resolver(Presenting::new(credentials));
    tls.alpn_protocols = vec![wire::ALPN.to_vec()];
    tls
}

fn quic(tls: rustls::ClientConfig) -> quinn::ClientConfig {
    quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()))
}

/// Sends a request as soon as the handshake allows, and returns why the connection ended.
async fn knock(address: SocketAddr, config: quinn::ClientConfig) -> ConnectionError {
    let endpoint = quinn::Endpoint::client(loopback()).unwrap();
    let knocking = async {
        let connection = match endpoint.connect_with(config, address, DNS).unwrap().await {
            Ok(connection) => connection,
            Err(error) => return error,
        };
        // In TLS 1.3 a client is done before it knows what the server thinks of its certificate.
        if let Ok((mut send, _receive)) = connection.open_bi().await {
            let _ = send.write_all(&[1, 0, 0, 0, 3]).await;
            return connection.closed().await;
        }
        connection.closed().await
    };
    before_deadline(knocking).await
}

/// Refused in so many words: by an alert of TLS, by a close code, or for its version; not by silence.
fn check_refused(case: &str, error: &ConnectionError) {
    let said = match error {
        ConnectionError::ConnectionClosed(close) => close.error_code.to_string(),
        ConnectionError::ApplicationClosed(close) => {
            assert_eq!(close.error_code.into_inner(), u64::from(wire::CloseCode::NotAuthorized.code()), "{case}");
            String::from_utf8_lossy(&close.reason).into_owned()
        }
        ConnectionError::VersionMismatch => "version mismatch".into(),
        error => panic!("{case}: {error}"),
    };
    println!("refused: {case}: {said}");
}

/// Turns away whoever is called `revoked`, once that is so.
#[derive(Default)]
struct Revoking {
    active: AtomicBool,
    asked: Mutex<Vec<String>>,
}

impl Gate for Revoking {
    fn admits(&self, peer: &PeerIdentity, _: i64) -> bool {
        self.asked.lock().unwrap().push(peer.to_string());
        !(self.active.load(Ordering::SeqCst) && peer.to_string() == "participant revoked")
    }
}

/// Counts the tickets that a server hands out.
#[derive(Debug)]
struct Counting {
    cache: ClientSessionMemoryCache,
    tickets: AtomicUsize,
}

impl ClientSessionStore for Counting {
    fn set_kx_hint(&self, name: rustls_pki_types::ServerName<'static>, group: rustls::NamedGroup) {
        self.cache.set_kx_hint(name, group);
    }

    fn kx_hint(&self, name: &rustls_pki_types::ServerName<'_>) -> Option<rustls::NamedGroup> {
        self.cache.kx_hint(name)
    }

    fn set_tls12_session(
        &self,
        name: rustls_pki_types::ServerName<'static>,
        value: rustls::client::Tls12ClientSessionValue,
    ) {
        self.cache.set_tls12_session(name, value);
    }

    fn tls12_session(
        &self,
        name: &rustls_pki_types::ServerName<'_>,
    ) -> Option<rustls::client::Tls12ClientSessionValue> {
        self.cache.tls12_session(name)
    }

    fn remove_tls12_session(&self, name: &rustls_pki_types::ServerName<'static>) {
        self.cache.remove_tls12_session(name);
    }

    fn insert_tls13_ticket(
        &self,
        name: rustls_pki_types::ServerName<'static>,
        value: rustls::client::Tls13ClientSessionValue,
    ) {
        self.tickets.fetch_add(1, Ordering::SeqCst);
        self.cache.insert_tls13_ticket(name, value);
    }

    fn take_tls13_ticket(
        &self,
        name: &rustls_pki_types::ServerName<'static>,
    ) -> Option<rustls::client::Tls13ClientSessionValue> {
        self.cache.take_tls13_ticket(name)
    }
}

/// Everybody who is wrong by what he presents.
fn intruders(ours: &Ours) -> Vec<(&'static str, Option<Credentials>)> {
    let (issuing, other) = (ours.issuing(), Signer::of(&Authority::create(now()).unwrap()));
    let named = |san: Vec<SanType>| Some(issuing.sign(|params| params.subject_alt_names = san));
    let self_signed = |change: &dyn Fn(&mut CertificateParams)| {
        let key = KeyPair::generate().unwrap();
        let certificate = params(|params| change(params)).self_signed(&key).unwrap();
        Some(Credentials { chain: vec![certificate.der().clone()], key })
    };
    let mut all = vec![
        ("no certificate", None),
        ("a certificate that is no certificate", {
            let Credentials { key, .. } = issuing.sign(|_| ());
            Some(Credentials { chain: vec![b"certificate".to_vec().into()], key })
        }),
        ("self-signed", self_signed(&|_| ())),
        ("self-signed, as an authority", self_signed(&authority(3))),
        ("another authority of the same name", Some(other.sign(|_| ()))),
        ("another authority, with ours behind it", {
            let mut credentials = other.sign(|_| ());
            credentials.chain.push(issuing.der());
            Some(credentials)
        }),
        ("our authority's certificate, but signed by another", {
            let mut credentials = other.sign(|_| ());
            credentials.chain[1] = issuing.der();
            Some(credentials)
        }),
        ("expired", Some(issuing.sign(|params| params.not_after = now() - Duration::MINUTE))),
        (
            "expired a month ago, issued by the book",
            Some(of_identity(&ours.participant("eve", now() - Duration::days(60)))),
        ),
        ("not yet valid", Some(issuing.sign(|params| params.not_before = now() + Duration::MINUTE))),
        ("issued by the book, tomorrow", Some(of_identity(&ours.participant("eve", now() + Duration::days(1))))),
        ("valid at no time", Some(issuing.sign(|params| params.not_after = params.not_before - Duration::DAY))),
        ("usage: TLS servers", Some(issuing.sign(|params| params.extended_key_usages = vec![Usage::ServerAuth]))),
        ("usage: code signing", Some(issuing.sign(|params| params.extended_key_usages = vec![Usage::CodeSigning]))),
        ("usage: time stamping", Some(issuing.sign(|params| params.extended_key_usages = vec![Usage::TimeStamping]))),
        ("the coordinator's own certificate", { Some(of_identity(&ours.authority.issue_coordinator(now()).unwrap())) }),
        ("role: coordinator", named(vec![uri(COORDINATOR)])),
        ("role: unknown", named(vec![uri("headwater://auditor/eve")])),
        ("role: none", named(vec![uri("headwater://eve")])),
        ("name: of another run", named(vec![uri("headwater://run-2/participant/eve")])),
        ("name: with a run behind it", named(vec![uri("headwater://participant/eve/run-2")])),
        ("name: empty", named(vec![uri("headwater://participant/")])),
        ("name: too long", named(vec![uri(&format!("headwater://participant/{}", "e".repeat(65)))])),
        ("name: encoded", named(vec![uri("headwater://participant/%65ve")])),
        ("name: a path", named(vec![uri("headwater://participant/../coordinator")])),
        ("name: in capital letters of the scheme", named(vec![uri("HEADWATER://participant/eve")])),
        ("name: of another scheme", named(vec![uri("spiffe://headwater/participant/eve")])),
        ("names: none", named(Vec::new())),
        ("names: two", named(vec![uri(EVE), uri("headwater://participant/adam")])),
        ("names: a DNS name alone", named(vec![dns("eve")])),
        ("names: an e-mail address alone", named(vec![SanType::Rfc822Name("eve@example.org".try_into().unwrap())])),
        ("an extension that nobody knows and that is critical", {
            Some(issuing.sign(|params| {
                let mut extension = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99_999, 1], vec![5, 0]);
                extension.set_criticality(true);
                params.custom_extensions = vec![extension];
            }))
        }),
        (
            "an authority in a participant's place",
            Some(issuing.sign(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))),
        ),
        ("our issuing authority itself", {
            Some(Credentials { chain: vec![issuing.der()], key: KeyPair::from_pem(ours.authority.key_pem()).unwrap() })
        }),
        ("our root itself", {
            let root = CertificateDer::from_pem_slice(ours.root.certificate_pem().as_bytes()).unwrap();
            Some(Credentials { chain: vec![root], key: KeyPair::from_pem(ours.root.key_pem()).unwrap() })
        }),
        ("a chain without the issuing authority", {
            let mut credentials = issuing.sign(|_| ());
            credentials.chain.truncate(1);
            Some(credentials)
        }),
        ("a chain that is too long", {
            let below = issuing.signer(authority(0));
            let mut credentials = below.sign(|_| ());
            credentials.chain.push(issuing.der());
            Some(credentials)
        }),
        ("signed by a participant", {
            let mallory =
                issuing.signer(|params| params.subject_alt_names = vec![uri("headwater://participant/mallory")]);
            let mut credentials = mallory.sign(|_| ());
            credentials.chain.push(issuing.der());
            Some(credentials)
        }),
        ("an issuing authority that has expired", {
            Some(Signer::of(&ours.root.issue_authority(now() - Duration::days(800)).unwrap()).sign(|_| ()))
        }),
        ("the key of another certificate", {
            Some(Credentials { key: KeyPair::generate().unwrap(), ..issuing.sign(|_| ()) })
        }),
        ("an invitation that has expired", {
            let late = ours.authority.issue_enrolment(&name("eve"), now() - Duration::DAY, Duration::HOUR).unwrap();
            Some(of_identity(&late))
        }),
        ("an invitation of another authority", {
            let authority = Authority::create(now()).unwrap();
            Some(of_identity(&authority.issue_enrolment(&name("eve"), now(), Duration::HOUR).unwrap()))
        }),
    ];
    for (case, from_end) in [("a flipped bit in the signature", 1), ("a flipped bit in the issuing authority", 0)] {
        let mut credentials = issuing.sign(|_| ());
        let certificate = &mut credentials.chain[1 - from_end];
        *certificate = flipped(certificate, certificate.len() - 1);
        all.push((case, Some(credentials)));
    }
    let mut credentials = issuing.sign(|_| ());
    let at = credentials.chain[0].windows(3).position(|bytes| bytes == b"eve").unwrap();
    credentials.chain[0] = flipped(&credentials.chain[0], at);
    all.push(("a flipped bit in the name", Some(credentials)));
    all
}

#[tokio::test]
async fn wrong_participants_are_refused_before_they_are_heard() {
    let ours = Ours::new();
    let gate = Arc::new(Revoking::default());
    let coordinator = ours.authority.issue_coordinator(now()).unwrap();
    let mut listener = Listener::bind_gated(loopback(), &coordinator, &TRANSPORT, gate.clone()).unwrap();
    let address = listener.local_address();
    let mut cases = 0;
    for (case, credentials) in intruders(&ours) {
        check_refused(case, &knock(address, quic(tls(&ours, credentials))).await);
        cases += 1;
    }

    // Handshakes that are wrong, whoever it is.
    let sound = || Some(ours.issuing().sign(|_| ()));
    let with_alpn = |protocols: &[&[u8]]| {
        let mut tls = tls(&ours, sound());
        tls.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        quic(tls)
    };
    let mut other_quic = quic(tls(&ours, sound()));
    other_quic.version(0xff00_001d);
    for (case, config) in [
        ("another major version of the protocol", with_alpn(&[b"headwater/2"])),
        ("another protocol", with_alpn(&[b"h3"])),
        ("no protocol", with_alpn(&[])),
        ("TLS 1.2", mangle::offering_tls(0x0303, tls(&ours, sound()))),
        ("a TLS of the future", mangle::offering_tls(0x0305, tls(&ours, sound()))),
        ("a draft of QUIC", other_quic),
    ] {
        check_refused(case, &knock(address, config).await);
        cases += 1;
    }

    // A participant in good standing gets in with the same handshake, and gets no ticket for the next one.
    let device = ours.participant("revoked", now());
    let store = Arc::new(Counting { cache: ClientSessionMemoryCache::new(8), tickets: AtomicUsize::new(0) });
    let resuming = || {
        let mut tls = tls(&ours, Some(of_identity(&device)));
        tls.resumption = Resumption::store(store.clone());
        tls.enable_early_data = true;
        quic(tls)
    };
    let endpoint = quinn::Endpoint::client(loopback()).unwrap();
    let admitted = before_deadline(endpoint.connect_with(resuming(), address, DNS).unwrap()).await.unwrap();
    assert_eq!(
        *before_deadline(listener.accept()).await.unwrap().peer(),
        PeerIdentity::Participant { name: name("revoked") }
    );
    before_deadline(admitted.closed()).await;
    assert_eq!(store.tickets.load(Ordering::SeqCst), 0, "a session that could be resumed");
    assert!(endpoint.connect_with(resuming(), address, DNS).unwrap().into_0rtt().is_err(), "data before the handshake");
    println!("refused: data before the handshake (0-RTT)");
    gate.active.store(true, Ordering::SeqCst);
    check_refused("revoked", &knock(address, quic(tls(&ours, Some(of_identity(&device))))).await);
    check_refused("revoked, resuming a session from before", &knock(address, resuming()).await);
    cases += 3;

    let honest = Dialer::new(&ours.participant("honest", now()), &TRANSPORT).unwrap();
    let _open = honest.connect(&address.to_string()).await.unwrap();
    let accepted = loop {
        // The connection above that was begun for 0-RTT alone may have come to its end as any other.
        let accepted = before_deadline(listener.accept()).await.unwrap();
        if accepted.peer().to_string() != "participant revoked" {
            break accepted;
        }
    };
    assert_eq!(*accepted.peer(), PeerIdentity::Participant { name: name("honest") });
    // Whose certificate is not good is not even looked up.
    assert!(!gate.asked.lock().unwrap().iter().any(|peer| peer.contains("adam")));
    println!("{cases} wrong participants refused");
    assert!(cases >= 50, "{cases}");
}

/// A listener by hand.
fn impostor(alpn: &[u8], credentials: Credentials) -> quinn::Endpoint {
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Presenting::new(Some(credentials)));
    tls.alpn_protocols = vec![alpn.to_vec()];
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls).unwrap();
    let endpoint = quinn::Endpoint::server(quinn::ServerConfig::with_crypto(Arc::new(crypto)), loopback()).unwrap();
    let listening = endpoint.clone();
    tokio::spawn(async move {
        while let Some(incoming) = listening.accept().await {
            let _ = incoming.await;
        }
    });
    endpoint
}

#[tokio::test]
async fn wrong_coordinators_are_not_believed() {
    let ours = Ours::new();
    let (issuing, other) = (ours.issuing(), Signer::of(&Authority::create(now()).unwrap()));
    let signed = |change: &dyn Fn(&mut CertificateParams)| {
        issuing.sign(|params| {
            coordinator(params);
            change(params);
        })
    };
    let flipped_signature = || {
        let mut credentials = signed(&|_| ());
        credentials.chain[0] = flipped(&credentials.chain[0], credentials.chain[0].len() - 1);
        credentials
    };
    let too_long = || {
        let mut credentials = issuing.signer(authority(0)).sign(coordinator);
        credentials.chain.push(issuing.der());
        credentials
    };
    let by_itself = || {
        let key = KeyPair::generate().unwrap();
        let certificate = params(coordinator).self_signed(&key).unwrap();
        Credentials { chain: vec![certificate.der().clone()], key }
    };
    let cases: Vec<(&str, &[u8], Credentials)> = vec![
        ("self-signed", wire::ALPN, by_itself()),
        ("another authority", wire::ALPN, other.sign(coordinator)),
        ("expired", wire::ALPN, signed(&|params| params.not_after = now() - Duration::MINUTE)),
        ("not yet valid", wire::ALPN, signed(&|params| params.not_before = now() + Duration::MINUTE)),
        ("usage: TLS clients", wire::ALPN, signed(&|params| params.extended_key_usages = vec![Usage::ClientAuth])),
        ("a participant", wire::ALPN, of_identity(&ours.participant("eve", now()))),
        ("a participant that may be a server", wire::ALPN, signed(&|params| params.subject_alt_names[0] = uri(EVE))),
        ("an invitation", wire::ALPN, {
            of_identity(&ours.authority.issue_enrolment(&name("eve"), now(), Duration::HOUR).unwrap())
        }),
        ("names: no DNS name", wire::ALPN, signed(&|params| params.subject_alt_names.truncate(1))),
        ("names: another DNS name", wire::ALPN, signed(&|params| params.subject_alt_names[1] = dns("example.org"))),
        ("names: no role", wire::ALPN, signed(&|params| drop(params.subject_alt_names.remove(0)))),
        ("names: two roles", wire::ALPN, signed(&|params| params.subject_alt_names.push(uri(EVE)))),
        ("a flipped bit in the signature", wire::ALPN, flipped_signature()),
        ("the key of another certificate", wire::ALPN, {
            Credentials { key: KeyPair::generate().unwrap(), ..signed(&|_| ()) }
        }),
        ("a chain that is too long", wire::ALPN, too_long()),
        ("another protocol", b"h3", signed(&|_| ())),
    ];
    let honest = Dialer::new(&ours.participant("honest", now()), &TRANSPORT).unwrap();
    let count = cases.len();
    for (case, alpn, credentials) in cases {
        let endpoint = impostor(alpn, credentials);
        let address = endpoint.local_addr().unwrap().to_string();
        let error = before_deadline(honest.connect(&address)).await.err();
        println!("not believed: {case}: {}", error.unwrap_or_else(|| panic!("{case}")));
    }
    // The same hand makes a coordinator that is believed, where nothing is wrong.
    let endpoint = impostor(wire::ALPN, signed(&|_| ()));
    before_deadline(honest.connect(&endpoint.local_addr().unwrap().to_string())).await.unwrap();
    println!("{count} wrong coordinators not believed");
}

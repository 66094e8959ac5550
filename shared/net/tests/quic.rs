//! Real QUIC on the loopback interface: who gets in, what is refused, and whether the byte ledger agrees with what UDP carried.

use std::{net::SocketAddr, sync::Arc};

use net::{
    Authority, Congestion, Connection, DeviceKey, Dialer, Identity, Listener, NetError, PeerIdentity, PeerName,
    StreamKind, Transport, TransportLimits,
};
use quinn::crypto::rustls::QuicClientConfig;
use rustls_pki_types::{CertificateDer, pem::PemObject};
use time::{Duration, OffsetDateTime};
use wire::{CloseCode, DType, FrameKind, MessageKind, Purpose, Request, Shape, TensorHeader};

const TRANSPORT: Transport =
    Transport { limits: TransportLimits { tensor_bytes_max: 1 << 21, in_flight: 2 }, congestion: Congestion::Cubic };

fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn name(name: &str) -> PeerName {
    PeerName::new(name).unwrap()
}

fn participant(authority: &Authority, who: &str, issued: OffsetDateTime) -> Identity {
    let key = DeviceKey::generate().unwrap();
    let chain = authority.issue_participant(&name(who), &key.request_der().unwrap(), issued).unwrap();
    Identity::from_pem(&chain, key.pem(), authority.root_pem()).unwrap()
}

/// `identity`, but believing another authority.
fn believing(identity: &Identity, authority: &Authority) -> Identity {
    Identity::from_pem(identity.chain_pem(), identity.key_pem(), authority.root_pem()).unwrap()
}

/// A connection between a coordinator and participant `alice`: her end, the coordinator's, and the sockets under them.
async fn connected() -> (Connection, Connection, (Dialer, Listener)) {
    let authority = Authority::create(now()).unwrap();
    let mut listener = Listener::bind(loopback(), &authority.issue_coordinator(now()).unwrap(), &TRANSPORT).unwrap();
    let dialer = Dialer::new(&participant(&authority, "alice", now()), &TRANSPORT).unwrap();
    let dialed = dialer.connect(&listener.local_address().to_string()).await.unwrap();
    let accepted = before_deadline(listener.accept()).await.unwrap();
    (dialed, accepted, (dialer, listener))
}

/// So that an intruder who gets in, or an honest peer who does not, fails the test instead of holding it up.
async fn before_deadline<T>(outcome: impl Future<Output = T>) -> T {
    tokio::time::timeout(std::time::Duration::from_secs(5), outcome).await.expect("nothing happens")
}

/// A certificate that our own authority has signed, though it never would.
fn forged(
    authority: &Authority,
    uri: &str,
    usage: rcgen::ExtendedKeyUsagePurpose,
) -> (rcgen::Certificate, rcgen::KeyPair) {
    let issuer_key = rcgen::KeyPair::from_pem(authority.key_pem()).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(authority.certificate_pem(), issuer_key).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(["coordinator.headwater".to_string()]).unwrap();
    params.subject_alt_names.push(rcgen::SanType::URI(uri.try_into().unwrap()));
    params.extended_key_usages = vec![usage];
    (params.signed_by(&key, &issuer).unwrap(), key)
}

/// Checks that a coordinator turns `intruder` away, and that the next honest participant is the first one to be accepted.
async fn check_intruder(authority: &Authority, intruder: &Identity) -> NetError {
    let mut listener = Listener::bind(loopback(), &authority.issue_coordinator(now()).unwrap(), &TRANSPORT).unwrap();
    let address = listener.local_address().to_string();
    let dialer = Dialer::new(intruder, &TRANSPORT).unwrap();
    let error = match dialer.connect(&address).await {
        Ok(connection) => before_deadline(connection.closed()).await,
        Err(error) => error,
    };
    let honest = Dialer::new(&participant(authority, "honest", now()), &TRANSPORT).unwrap();
    let _open = honest.connect(&address).await.unwrap();
    let accepted = before_deadline(listener.accept()).await.unwrap();
    assert_eq!(*accepted.peer(), PeerIdentity::Participant { name: name("honest") });
    error
}

/// Checks that an honest participant does not connect to a listener with this identity.
async fn check_impostor(authority: &Authority, impostor: &Identity) -> NetError {
    let listener = Listener::bind(loopback(), impostor, &TRANSPORT).unwrap();
    let dialer = Dialer::new(&participant(authority, "honest", now()), &TRANSPORT).unwrap();
    dialer.connect(&listener.local_address().to_string()).await.unwrap_err()
}

#[tokio::test]
async fn both_sides_know_each_other_from_their_certificates() {
    let (alice, coordinator, _sockets) = connected().await;
    assert_eq!(*alice.peer(), PeerIdentity::Coordinator);
    assert_eq!(*coordinator.peer(), PeerIdentity::Participant { name: name("alice") });
}

#[tokio::test]
async fn device_is_the_same_by_its_key_and_not_by_its_name() {
    let authority = Authority::create(now()).unwrap();
    let mut listener = Listener::bind(loopback(), &authority.issue_coordinator(now()).unwrap(), &TRANSPORT).unwrap();
    let address = listener.local_address().to_string();
    let key = DeviceKey::generate().unwrap();
    let issued = || {
        let chain = authority.issue_participant(&name("alice"), &key.request_der().unwrap(), now()).unwrap();
        Identity::from_pem(&chain, key.pem(), authority.root_pem()).unwrap()
    };
    let mut keys = Vec::new();
    for identity in [issued(), issued(), participant(&authority, "alice", now())] {
        let dialer = Dialer::new(&identity, &TRANSPORT).unwrap();
        let _open = dialer.connect(&address).await.unwrap();
        keys.push(before_deadline(listener.accept()).await.unwrap().peer_key());
    }
    assert_eq!(keys[0], keys[1], "two certificates of one key");
    assert_ne!(keys[0], keys[2]);
}

#[tokio::test]
async fn invitation_is_no_participant() {
    let authority = Authority::create(now()).unwrap();
    let mut listener = Listener::bind(loopback(), &authority.issue_coordinator(now()).unwrap(), &TRANSPORT).unwrap();
    let enrolment = authority.issue_enrolment(&name("bob"), now(), Duration::minutes(15)).unwrap();
    let _open =
        Dialer::new(&enrolment, &TRANSPORT).unwrap().connect(&listener.local_address().to_string()).await.unwrap();
    let fingerprint = enrolment.fingerprint();
    assert_eq!(
        *before_deadline(listener.accept()).await.unwrap().peer(),
        PeerIdentity::Enrol { name: name("bob"), fingerprint }
    );
}

#[tokio::test]
async fn participant_of_another_authority_is_refused() {
    let (ours, other) = (Authority::create(now()).unwrap(), Authority::create(now()).unwrap());
    let error = check_intruder(&ours, &believing(&participant(&other, "eve", now()), &ours)).await;
    assert!(matches!(error, NetError::PeerRefused { .. }), "{error}");
}

#[tokio::test]
async fn coordinator_of_another_authority_is_refused() {
    let (ours, other) = (Authority::create(now()).unwrap(), Authority::create(now()).unwrap());
    let error = check_impostor(&ours, &believing(&other.issue_coordinator(now()).unwrap(), &ours)).await;
    assert!(matches!(error, NetError::PeerUntrusted { .. }), "{error}");
}

#[tokio::test]
async fn coordinator_certificate_is_no_participant() {
    let authority = Authority::create(now()).unwrap();
    let error = check_intruder(&authority, &authority.issue_coordinator(now()).unwrap()).await;
    assert!(matches!(error, NetError::PeerRefused { .. }), "{error}");
}

#[tokio::test]
async fn participant_certificate_is_no_coordinator() {
    let authority = Authority::create(now()).unwrap();
    let error = check_impostor(&authority, &participant(&authority, "mallory", now())).await;
    assert!(matches!(error, NetError::PeerUntrusted { .. }), "{error}");
}

#[tokio::test]
async fn invitation_is_no_coordinator() {
    let authority = Authority::create(now()).unwrap();
    let enrolment = authority.issue_enrolment(&name("mallory"), now(), Duration::minutes(15)).unwrap();
    let error = check_impostor(&authority, &enrolment).await;
    assert!(matches!(error, NetError::PeerUntrusted { .. }), "{error}");
}

#[tokio::test]
async fn certificates_outside_their_time_are_refused() {
    let authority = Authority::create(now() - Duration::days(500)).unwrap();
    for issued in [now() - Duration::days(31), now() + Duration::days(2)] {
        let error = check_intruder(&authority, &participant(&authority, "eve", issued)).await;
        assert!(matches!(error, NetError::PeerRefused { .. }), "{error}");
    }
    let late = authority.issue_enrolment(&name("late"), now() - Duration::hours(1), Duration::minutes(15)).unwrap();
    let error = check_intruder(&authority, &late).await;
    assert!(matches!(error, NetError::PeerRefused { .. }), "{error}");
    for issued in [now() - Duration::days(400), now() + Duration::days(2)] {
        let error = check_impostor(&authority, &authority.issue_coordinator(issued).unwrap()).await;
        assert!(matches!(error, NetError::PeerUntrusted { .. }), "{error}");
    }
}

#[tokio::test]
async fn key_of_another_certificate_is_a_mistake_of_ours() {
    let authority = Authority::create(now()).unwrap();
    let (one, two) = (participant(&authority, "one", now()), participant(&authority, "two", now()));
    let mixed = Identity::from_pem(one.chain_pem(), two.key_pem(), authority.root_pem()).unwrap();
    assert!(matches!(Dialer::new(&mixed, &TRANSPORT), Err(NetError::Misconfigured { .. })));
}

/// Connects with a hand-made TLS client, and returns why that fails.
async fn check_raw_intruder(tls: impl FnOnce(&Authority) -> rustls::ClientConfig) -> NetError {
    let authority = Authority::create(now()).unwrap();
    let listener = Listener::bind(loopback(), &authority.issue_coordinator(now()).unwrap(), &TRANSPORT).unwrap();
    let endpoint = quinn::Endpoint::client(loopback()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls(&authority)).unwrap()));
    let connecting = endpoint.connect_with(config, listener.local_address(), "coordinator.headwater").unwrap();
    match connecting.await {
        Ok(connection) => before_deadline(connection.closed()).await.into(),
        Err(error) => error.into(),
    }
}

fn raw_client(authority: &Authority) -> rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.root_pem().as_bytes()).unwrap()).unwrap();
    rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
}

#[tokio::test]
async fn client_without_a_certificate_is_refused() {
    let error = check_raw_intruder(|authority| {
        let mut tls = raw_client(authority).with_no_client_auth();
        tls.alpn_protocols = vec![wire::ALPN.to_vec()];
        tls
    })
    .await;
    assert!(matches!(error, NetError::PeerRefused { .. }), "{error}");
}

#[tokio::test]
async fn other_protocol_is_refused() {
    let error = check_raw_intruder(|authority| {
        let mut tls = raw_client(authority).with_no_client_auth();
        tls.alpn_protocols = vec![b"headwater/2".to_vec()];
        tls
    })
    .await;
    assert!(matches!(error, NetError::Incompatible { .. }), "{error}");
}

#[tokio::test]
async fn self_signed_certificate_is_refused() {
    let error = check_raw_intruder(|authority| {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names = vec![rcgen::SanType::URI("headwater://participant/eve".try_into().unwrap())];
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.self_signed(&key).unwrap();
        let key = rustls_pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let mut tls = raw_client(authority).with_client_auth_cert(vec![certificate.der().clone()], key).unwrap();
        tls.alpn_protocols = vec![wire::ALPN.to_vec()];
        tls
    })
    .await;
    assert!(matches!(error, NetError::PeerRefused { .. }), "{error}");
}

#[tokio::test]
async fn certificate_without_a_known_role_is_refused() {
    let error = check_raw_intruder(|authority| {
        let usage = rcgen::ExtendedKeyUsagePurpose::ClientAuth;
        let (certificate, key) = forged(authority, "headwater://auditor/eve", usage);
        let key = rustls_pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let issuing = CertificateDer::from_pem_slice(authority.certificate_pem().as_bytes()).unwrap();
        let chain = vec![certificate.der().clone(), issuing];
        let mut tls = raw_client(authority).with_client_auth_cert(chain, key).unwrap();
        tls.alpn_protocols = vec![wire::ALPN.to_vec()];
        tls
    })
    .await;
    assert!(matches!(error, NetError::Closed { code: Some(CloseCode::NotAuthorized), .. }), "{error}");
}

#[tokio::test]
async fn role_counts_even_where_tls_would_be_content() {
    let authority = Authority::create(now()).unwrap();
    let forged = |uri, usage| {
        let (certificate, key) = forged(&authority, uri, usage);
        Identity::from_pem(
            &(certificate.pem() + authority.certificate_pem()),
            &key.serialize_pem(),
            authority.root_pem(),
        )
        .unwrap()
    };
    let listening = forged("headwater://participant/mallory", rcgen::ExtendedKeyUsagePurpose::ServerAuth);
    let error = check_impostor(&authority, &listening).await;
    assert_eq!(error.close_code(), CloseCode::NotAuthorized, "{error}");
    let dialing = forged("headwater://coordinator", rcgen::ExtendedKeyUsagePurpose::ClientAuth);
    let error = check_intruder(&authority, &dialing).await;
    assert!(matches!(error, NetError::Closed { code: Some(CloseCode::NotAuthorized), .. }), "{error}");
}

#[tokio::test]
async fn closing_tells_the_peer_code_and_reason() {
    let (alice, coordinator, (_dialer, listener)) = connected().await;
    coordinator.close(CloseCode::ExperimentDiffers, "digest 12ab");
    let error = alice.closed().await;
    let expected =
        NetError::Closed { code: Some(CloseCode::ExperimentDiffers), number: 0x21, reason: "digest 12ab".into() };
    assert_eq!(error, expected);
    assert!(!error.is_retryable());
    let error = alice.open(StreamKind::Control).await.err();
    assert_eq!(error, Some(expected));
    listener.close(CloseCode::Done, "").await;
}

#[test]
fn restarted_coordinator_is_noticed_without_a_time_out() {
    let authority = Authority::create(now()).unwrap();
    let identity = authority.issue_coordinator(now()).unwrap();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (alive, killed) = (runtime(), runtime());
    let mut listener = killed.block_on(async { Listener::bind(loopback(), &identity, &TRANSPORT).unwrap() });
    let address = listener.local_address();
    // A runtime for each side, so that one of them can go down without a word.
    let serving = std::thread::spawn(move || {
        let accepted = killed.block_on(listener.accept()).unwrap();
        drop(killed);
        drop((accepted, listener));
    });
    let (_dialer, alice) = alive.block_on(async {
        let dialer = Dialer::new(&participant(&authority, "alice", now()), &TRANSPORT).unwrap();
        let alice = dialer.connect(&address.to_string()).await.unwrap();
        (dialer, alice)
    });
    serving.join().unwrap();
    alive.block_on(async {
        let _restarted = Listener::bind(address, &identity, &TRANSPORT).unwrap();
        let (mut send, _recv) = alice.open(StreamKind::Bulk).await.unwrap();
        send.bytes(MessageKind::Blob, &[0; 1000]).await.unwrap();
        let error = alice.closed().await;
        assert_eq!(error, NetError::Lost { reason: "the peer has restarted".into(), retryable: true });
    });
}

#[tokio::test]
async fn reset_and_stop_reach_the_other_half_with_their_code() {
    let (alice, coordinator, _sockets) = connected().await;
    let (mut send, mut recv) = alice.open(StreamKind::Bulk).await.unwrap();
    send.message(&Request::FetchAdapter { round: 1 }).await.unwrap();
    let (mut back, mut there) = coordinator.accept().await.unwrap();
    there.message::<Request>().await.unwrap();
    send.reset(CloseCode::Stale);
    let stale = NetError::Reset { code: Some(CloseCode::Stale), number: 3 };
    assert_eq!(there.message::<Request>().await.unwrap_err(), stale);
    recv.stop(CloseCode::GoingAway);
    let error = loop {
        if let Err(error) = back.bytes(MessageKind::Blob, &[0; 4096]).await {
            break error;
        }
    };
    assert_eq!(error, NetError::Reset { code: Some(CloseCode::GoingAway), number: 1 });
}

#[tokio::test]
async fn slow_reader_of_a_large_stream_is_not_cut_off() {
    // HEADWATER_SLOW_MIB sets the stream's size; scripts/check/hostile.sh asks for more.
    let mib: usize = std::env::var("HEADWATER_SLOW_MIB").map_or(32, |number| number.parse().expect("a number"));
    let blob_bytes = mib << 20;
    let (alice, coordinator, _sockets) = connected().await;
    let sender = tokio::spawn(async move {
        let (mut send, mut recv) = coordinator.accept().await.unwrap();
        recv.message::<Request>().await.unwrap();
        for chunk in vec![7u8; blob_bytes].chunks(1 << 20) {
            send.bytes(MessageKind::Blob, chunk).await.unwrap();
        }
        send.finish();
        send.delivered().await.unwrap();
    });
    let (mut send, mut recv) = alice.open(StreamKind::Bulk).await.unwrap();
    send.message(&Request::FetchBlob { sha256: [0; 32], offset: 0 }).await.unwrap();
    // Between two small reads everything else in the process may run, so that the writer is always ahead.
    let mut buffer = vec![0; 32 << 10];
    for _ in 0..blob_bytes / buffer.len() {
        recv.bytes(MessageKind::Blob, &mut buffer).await.unwrap();
        assert!(buffer.iter().all(|&byte| byte == 7));
        tokio::task::yield_now().await;
    }
    recv.end().await.unwrap();
    sender.await.unwrap();
}

#[tokio::test]
async fn ledger_and_overhead_explain_the_udp_bytes() {
    const STEPS: u64 = 9;
    let (alice, coordinator, _sockets) = connected().await;
    let shape = Shape::new(&[1, 512, 576]).unwrap();
    let header =
        move |kind, step| TensorHeader { kind, dtype: DType::F32, session: 1, round: 1, step, micro: 0, shape };
    let values: Vec<f32> = (0..shape.elements()).map(|index| (index as f32).sin()).collect();
    let echo = tokio::spawn(async move {
        for step in 0..STEPS {
            let (mut send, mut recv) = coordinator.accept().await.unwrap();
            recv.message::<Request>().await.unwrap();
            for kind in [FrameKind::Activations, FrameKind::CutGradient] {
                let values = recv.tensor(&header(kind, step)).await.unwrap();
                send.tensor(&header(kind, step), &values).await.unwrap();
            }
            recv.end().await.unwrap();
            send.finish();
            send.delivered().await.unwrap();
        }
        coordinator
    });
    for step in 0..STEPS {
        let (mut send, mut recv) = alice.open(StreamKind::Step { age: 0 }).await.unwrap();
        let request = Request::Step {
            session: 1,
            round: 1,
            attempt: 1,
            step,
            micro: 0,
            micros: 1,
            purpose: Purpose::Train,
            segments: vec![128; 4],
            trained_tokens: 508,
            step_tokens: 508,
        };
        send.message(&request).await.unwrap();
        for kind in [FrameKind::Activations, FrameKind::CutGradient] {
            send.tensor(&header(kind, step), &values).await.unwrap();
            assert_eq!(recv.tensor(&header(kind, step)).await.unwrap(), values);
        }
        send.finish();
        recv.end().await.unwrap();
        send.delivered().await.unwrap();
    }
    let coordinator = echo.await.unwrap();
    let (up, down) = (alice.ledger(), coordinator.ledger());
    let frame_bytes = 64 + shape.elements() as u64 * 4;
    for kind in [MessageKind::Activations, MessageKind::CutGradient] {
        assert_eq!([up.sent(kind), up.received(kind)], [STEPS * frame_bytes; 2]);
        assert_eq!([down.sent(kind), down.received(kind)], [STEPS * frame_bytes; 2]);
    }
    assert_eq!((up.sent_total(), up.received_total()), (down.received_total(), down.sent_total()));
    let (alice, coordinator) = (alice.transport_stats().unwrap(), coordinator.transport_stats().unwrap());
    for (what, ledger_bytes, direction) in [
        ("alice sent", up.sent_total(), alice.sent),
        ("alice received", up.received_total(), alice.received),
        ("coordinator sent", down.sent_total(), coordinator.sent),
        ("coordinator received", down.received_total(), coordinator.received),
    ] {
        let expected = ledger_bytes + direction.overhead_bytes();
        let error = (expected as f64 - direction.udp_bytes as f64) / direction.udp_bytes as f64;
        println!(
            "{what}: ledger {ledger_bytes}, overhead {} ({:.2} %), UDP {}, error {:+.3} %",
            direction.overhead_bytes(),
            100.0 * direction.overhead_bytes() as f64 / ledger_bytes as f64,
            direction.udp_bytes,
            100.0 * error
        );
        assert!(error.abs() <= 0.01, "{what}: {direction:?}");
    }
}

//! What becomes of a certificate: used up invitations, renewal over the live connection, expiry, revocation. Over QUIC on loopback.

use std::fs;
use std::sync::Arc;

use coordinator::home::audit::Event;
use coordinator::home::{Home, INVITATION_VALID};
use experiment::{Row, hex};
use net::{DeviceKey, Dialer, Invitation, PeerName, StreamKind};
use participant::device::Device;
use participant::join::transport;
use time::{Duration, OffsetDateTime};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use wire::{CODEC_PLAIN, CloseCode, DType, Enrolled, FromCoordinator, FromParticipant, Request};

use crate::hostile::check_closed;
use crate::identities::{Site, check_refused, within_a_minute};
use crate::world::Holding;

const NAME: &str = "press-1";

fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

/// The state of a device that enrolled at another time, and the invitation it did so with.
fn enrolled_at(site: &Site, state: &str, when: OffsetDateTime) -> Invitation {
    let (home, name) = (site.home(), PeerName::new(NAME).unwrap());
    let invitation = home.invite(&name, when, INVITATION_VALID, true).unwrap();
    let fingerprint = invitation.identity().unwrap().fingerprint();
    let key = DeviceKey::generate().unwrap();
    let chain = home.redeem(&name, fingerprint, &key.request_der().unwrap(), when).unwrap();
    let directory = site.world.path(state);
    fs::create_dir_all(&directory).unwrap();
    let enrolled = hex(&fingerprint);
    for (file, text) in [
        ("device.key", key.pem()),
        ("device.pem", &chain),
        ("ca.pem", &invitation.ca_pem),
        ("enrolled", enrolled.as_str()),
    ] {
        fs::write(directory.join(file), text).unwrap();
    }
    invitation
}

fn identity(site: &Site, state: &str) -> net::Identity {
    Device::open(&site.world.path(state)).unwrap().identity().unwrap().unwrap()
}

fn audited(site: &Site) -> Vec<(Event, Option<String>)> {
    site.home().audit_log(None).unwrap().into_iter().map(|entry| (entry.event, entry.name)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_about_to_expire_is_renewed_during_a_run() {
    within_a_minute(async {
        let site = Site::new(crate::world::alone);
        let invitation = enrolled_at(&site, "device", now() - Duration::days(25));
        let before = identity(&site, "device");
        assert!(before.not_after() - now() < Duration::days(6));
        let running = site.start().await;
        let joined = site.join(&invitation, "device", site.world.participant(NAME).0);
        assert_eq!(joined.await.unwrap().unwrap(), "completed");
        running.end().await.unwrap();
        let renewed = identity(&site, "device");
        assert!(renewed.not_after() - now() > Duration::days(29));
        assert_eq!((renewed.peer(), renewed.key_pem()), (before.peer(), before.key_pem()));
        let events = audited(&site);
        assert_eq!(events.iter().filter(|(event, _)| *event == Event::Renewed).count(), 1, "{events:?}");
        assert_eq!(events[events.len() - 1], (Event::RunEnded, None));
    })
    .await;
}

/// The certificate that it has is good for days yet: a home that cannot issue another one costs no round.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_that_fails_by_the_coordinators_trouble_costs_no_step() {
    within_a_minute(async {
        let site = Site::new(crate::world::alone);
        let invitation = enrolled_at(&site, "device", now() - Duration::days(25));
        let before = identity(&site, "device");
        let mut running = site.start().await;
        running.until_wrote(|row| matches!(row, Row::Run { .. })).await;
        let revoked = site.home().path().join("revoked.toml");
        fs::write(&revoked, "somebody has changed it").unwrap();
        let joined = site.join(&invitation, "device", site.world.participant(NAME).0);
        assert_eq!(joined.await.unwrap().unwrap(), "completed");
        assert_eq!(identity(&site, "device").not_after(), before.not_after());
        fs::remove_file(&revoked).unwrap();
        running.end().await.unwrap();
    })
    .await;
}

/// Every one of them is signed, and a line in the audit log.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_renews_again_and_again_is_sent_away() {
    within_a_minute(async {
        let site = Site::new(str::to_owned);
        enrolled_at(&site, "device", now());
        let running = site.start().await;
        let device = identity(&site, "device");
        let dialer = Dialer::new(&device, &transport()).unwrap();
        let connection = dialer.connect(&site.address).await.unwrap();
        let (mut send, mut receive) = connection.open(StreamKind::Control).await.unwrap();
        let (dtypes, codecs) = (vec![DType::F32], vec![CODEC_PLAIN]);
        let hello = FromParticipant::Hello { minor: wire::MINOR, dtypes, codecs, software: "by hand".into() };
        send.message(&hello).await.unwrap();
        let welcome: FromCoordinator = receive.message().await.unwrap();
        assert!(matches!(welcome, FromCoordinator::Welcome { .. }), "{welcome:?}");
        let csr_der = DeviceKey::from_pem(device.key_pem()).unwrap().request_der().unwrap();
        let request = Request::Renew { csr_der };
        let renew = async || {
            let (mut send, mut receive) = connection.open(StreamKind::Control).await.unwrap();
            send.message(&request).await.unwrap();
            send.finish();
            receive.message::<Enrolled>().await
        };
        for _ in 0..4 {
            renew().await.unwrap();
        }
        assert!(renew().await.is_err());
        let complaint = "more than 4 renewals within 30 s";
        check_closed(&connection.closed().await, CloseCode::OverLimit, complaint);
        dialer.close().await;
        running.stop().await;
        let events = audited(&site);
        assert_eq!(events.iter().filter(|(event, _)| *event == Event::Renewed).count(), 4, "{events:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_device_is_told_what_to_do_and_a_new_invitation_does_it() {
    within_a_minute(async {
        let site = Site::new(str::to_owned);
        let expired = enrolled_at(&site, "device", now() - Duration::days(31));
        let mut running = site.start().await;
        let ended = site.join(&expired, "device", site.world.participant(NAME).0).await.unwrap();
        check_refused(ended, "it has expired or is not valid yet; check this device's clock, or ask the coordinator");
        let before = identity(&site, "device");
        let name = PeerName::new(NAME).unwrap();
        let anew = site.home().invite(&name, now(), INVITATION_VALID, true).unwrap();
        let joined = site.join(&anew, "device", site.world.participant(NAME).0);
        running.until_noted("press-1 joined").await;
        running.stop().await;
        assert_eq!(joined.await.unwrap().unwrap(), "stopped after round 0 of 2");
        assert_ne!(identity(&site, "device").key_pem(), before.key_pem());
    })
    .await;
}

/// A used invitation is answered again to the same key alone, so that the device must not lose it.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_killed_while_it_enrols_anew_goes_on_with_the_same_invitation() {
    within_a_minute(async {
        let site = Site::new(str::to_owned);
        let running = site.start().await;
        for (state, is_renamed) in [("gone", false), ("renamed", true)] {
            enrolled_at(&site, state, now() - Duration::days(31));
            let path = |name: &str| site.world.path(state).join(name);
            let before = ["device.key", "enrolled"].map(|name| fs::read(path(name)).unwrap());
            let anew = site.home().invite(&PeerName::new(NAME).unwrap(), now(), INVITATION_VALID, true).unwrap();
            let enrol = async || {
                let device = Device::open(&site.world.path(state)).unwrap();
                device.enrol(&anew, &site.address, &transport()).await.unwrap()
            };
            let enrolled = enrol().await;
            // As it was, with the old certificate gone, and the next key in its place or not.
            fs::remove_file(path("device.pem")).unwrap();
            fs::write(path("enrolled"), &before[1]).unwrap();
            if !is_renamed {
                fs::rename(path("device.key"), path("device.key.next")).unwrap();
                fs::write(path("device.key"), &before[0]).unwrap();
            }
            assert_eq!(enrol().await.key_pem(), enrolled.key_pem());
            assert_eq!(identity(&site, state).key_pem(), enrolled.key_pem());
            assert!(!path("device.key.next").exists());
        }
        running.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_device_is_cut_off_and_stays_out_until_it_is_invited_anew() {
    within_a_minute(async {
        let site = Site::new(str::to_owned);
        let running = site.start().await;
        let invitation = site.invite(NAME);
        let joined = site.join(&invitation, "device", site.world.participant(NAME).0);
        // In the middle of a step, which the other one holds up.
        let (mut other, _) = site.world.participant("mill-1");
        let (holding, mut reached, release) = Holding::at(0);
        other.reporter = Arc::new(holding);
        let beside = site.join(&site.invite("mill-1"), "beside", other);
        reached.recv().await.unwrap();
        let name = PeerName::new(NAME).unwrap();
        site.home().revoke(&name, now()).unwrap();
        check_refused(joined.await.unwrap(), "its certificate has been revoked; ask the coordinator");
        let again = site.join(&invitation, "device", site.world.participant(NAME).0);
        check_refused(again.await.unwrap(), "it has been revoked; ask the coordinator for a new invitation");
        drop((reached, release));
        running.stop().await;
        beside.await.unwrap().unwrap();
        let events = audited(&site);
        assert!(events.contains(&(Event::Revoked, Some(NAME.into()))), "{events:?}");
        assert!(events.contains(&(Event::Refused, Some(NAME.into()))), "{events:?}");

        let mut running = site.start().await;
        let again = site.join(&invitation, "device", site.world.participant(NAME).0);
        check_refused(again.await.unwrap(), "it has been revoked");
        let again = site.join(&invitation, "another state", site.world.participant(NAME).0);
        check_refused(again.await.unwrap(), "it has been revoked");
        let anew = site.invite(NAME);
        let joined = site.join(&anew, "device", site.world.participant(NAME).0);
        running.until_noted("press-1 joined").await;
        running.stop().await;
        joined.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_of_before_and_after_a_renewal_of_the_authority_train_together() {
    within_a_minute(async {
        let three = |text: &str| text.replace("cohort = 2", "cohort = 3").replace("quorum = 2", "quorum = 3");
        let site = Site::new(three);
        // One certificate is of the earlier issuing authority, and lasts.
        let before = enrolled_at(&site, NAME, now() - Duration::days(1));
        // An invitation of before the renewal is good after it, too: the root is the same.
        let unused = site.invite("mill-1");
        let earlier = fs::read_to_string(site.world.path("home/issuing.pem")).unwrap();
        let home = site.world.path("home");
        Home::renew_authority(&home, &home.join("ca.key"), now()).unwrap();
        assert_ne!(fs::read_to_string(site.world.path("home/issuing.pem")).unwrap(), earlier);
        // From now on the root's key is elsewhere.
        fs::remove_file(home.join("ca.key")).unwrap();
        let running = site.start().await;
        let joined = [(NAME, before), ("mill-1", unused), ("packer-1", site.invite("packer-1"))]
            .map(|(name, invitation)| site.join(&invitation, name, site.world.participant(name).0));
        for joined in joined {
            assert_eq!(joined.await.unwrap().unwrap(), "completed");
        }
        assert_eq!(running.end().await.unwrap().rounds, 2);
        // A device sends its issuing authority along, and the two that enrolled now have the new one.
        let issuers = [NAME, "mill-1", "packer-1"].map(|name| {
            let chain = identity(&site, name).chain_pem().to_owned();
            chain[chain.rfind("-----BEGIN").unwrap()..].trim().to_owned()
        });
        assert_eq!(issuers[0], earlier.trim());
        assert_ne!(issuers[1], earlier.trim());
        assert_eq!(issuers[1], issuers[2]);
    })
    .await;
}

/// `HEADWATER_INVITATIONS` sets the number, 20 unless it is set; scripts/check/hostile.sh asks for more.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_uses_of_an_invitation_at_once_exactly_one_succeeds() {
    let count: usize = std::env::var("HEADWATER_INVITATIONS").map_or(20, |number| number.parse().expect("a number"));
    within_a_minute(async {
        let site = Arc::new(Site::new(str::to_owned));
        let running = site.start().await;
        let (mut uses, at_once) = (JoinSet::new(), Arc::new(Semaphore::new(64)));
        for i in 0..count {
            let invitation = site.invite(&format!("device-{i}"));
            for side in ["left", "right"] {
                let (site, invitation, at_once) = (site.clone(), invitation.clone(), at_once.clone());
                uses.spawn(async move {
                    let _one = at_once.acquire().await.unwrap();
                    let device = Device::open(&site.world.path(&format!("{side}-{i}"))).unwrap();
                    (i, device.enrol(&invitation, &site.address, &transport()).await)
                });
            }
        }
        let mut succeeded = vec![0; count];
        while let Some(used) = uses.join_next().await {
            match used.unwrap() {
                (i, Ok(_)) => succeeded[i] += 1,
                (_, Err(error)) => assert!(error.to_string().contains("the invitation was already used"), "{error}"),
            }
        }
        assert!(succeeded.iter().all(|&successes| successes == 1), "{succeeded:?}");
        println!("{count} invitations used twice at once, one success each");
        running.stop().await;
    })
    .await;
}

//! Whom the coordinator has invited: one invitation per name, good for one certificate.
//!
//! Of an invitation only its fingerprint is kept, in `invitations/<name>.toml`; the secret is in the file that is
//! handed over. Deleting a record withdraws the invitation, and so does replacing it. A certificate that has been
//! issued stays good until it expires, or its name is revoked. Start from [`Home::invite`] and [`Home::redeem`].

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use experiment::{hex, write_atomically};
use net::{IdentityError, Invitation, PeerName, certified_key};
use serde::{Deserialize, Serialize};
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime};

use super::audit::Event;
use super::{Home, HomeError, INVITATIONS, ISSUING, file};

/// How long an invitation can be used, unless `coordinator invite` is told otherwise.
pub const INVITATION_VALID: Duration = Duration::DAY;

const INVITATION_VALID_MAX: Duration = Duration::days(30);

/// Why somebody who holds an invitation gets no certificate. All but the last are for that person to read.
#[derive(Debug, thiserror::Error)]
pub enum RedeemError {
    #[error("enrol {name}: no invitation is on record; ask the coordinator for one")]
    Unknown { name: PeerName },
    #[error("enrol {name}: the invitation expired at {expired}; ask the coordinator for a new one")]
    Expired { name: PeerName, expired: String },
    #[error(
        "enrol {name}: the invitation was already used at {used}; if that was not you, tell the coordinator, and ask \
         for a new one"
    )]
    Used { name: PeerName, used: String },
    #[error("enrol {name}: the invitation was replaced by a newer one; use that one")]
    Replaced { name: PeerName },
    #[error("enrol {name}: {source}; the invitation can still be used")]
    Request { name: PeerName, source: IdentityError },
    #[error("renew the certificate of {name}: {reason}")]
    Renewal { name: PeerName, reason: String },
    /// The coordinator's own trouble: it names paths, and is not for the peer.
    #[error(transparent)]
    Home(#[from] HomeError),
}

/// What is remembered of an invitation.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// SHA-256 of the enrolment certificate, in hexadecimal.
    fingerprint: String,
    expires_unix: i64,
    redeemed_unix: Option<i64>,
    /// SHA-256 of the key that it was redeemed for: that device may not have had the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
}

impl Home {
    /// A new invitation, to be handed to the person who will enrol a device as `name`.
    ///
    /// A name has one invitation that is pending or used. `replace` makes another, and the old one worthless; whoever
    /// has already enrolled with it keeps that certificate until it expires.
    pub fn invite(
        &self,
        name: &PeerName,
        now: OffsetDateTime,
        valid: Duration,
        replace: bool,
    ) -> Result<Invitation, HomeError> {
        if !valid.is_positive() || valid > INVITATION_VALID_MAX {
            return Err(HomeError::Validity { name: name.clone(), valid });
        }
        let _lock = self.lock()?;
        let path = self.record_path(name);
        // A record that is replaced is not read, so that a damaged one can be.
        if !replace
            && let Some(record) = Record::read(&path)?
            && let Some(state) = record.obstacle(now)
        {
            return Err(HomeError::AlreadyInvited { name: name.clone(), path, state });
        }
        let now = self.issue_time(name, now)?;
        let identity = self.authority.issue_enrolment(name, now, valid).map_err(|source| self.cannot_issue(source))?;
        let expires_unix = identity.not_after().unix_timestamp();
        Record { fingerprint: hex(&identity.fingerprint()), expires_unix, redeemed_unix: None, key: None }
            .write(&path)?;
        self.audit_locked(now, Event::Invited, Some(name), &format!("until {}", moment(expires_unix)))?;
        Ok(Invitation {
            name: name.clone(),
            addresses: self.addresses().to_vec(),
            ca_pem: self.authority.root_pem().to_owned(),
            enrol_cert_pem: identity.chain_pem().to_owned(),
            enrol_key_pem: identity.key_pem().to_owned(),
            expires_unix,
        })
    }

    /// Uses up the invitation whose enrolment certificate has this fingerprint: the certificate chain of the device
    /// that made the request, in PEM. A request of the same key is answered again, for as long as the invitation is valid:
    /// an answer may be lost on the way. The caller's peer has proved to hold that certificate's key.
    pub fn redeem(
        &self,
        name: &PeerName,
        fingerprint: [u8; 32],
        csr_der: &[u8],
        now: OffsetDateTime,
    ) -> Result<String, RedeemError> {
        let _lock = self.lock()?;
        let path = self.record_path(name);
        let Some(mut record) = Record::read(&path)? else {
            return Err(RedeemError::Unknown { name: name.clone() });
        };
        if record.fingerprint != hex(&fingerprint) {
            return Err(RedeemError::Replaced { name: name.clone() });
        }
        let used = record.redeemed_unix.map(|used| RedeemError::Used { name: name.clone(), used: moment(used) });
        if record.has_expired(now) {
            let expired = || RedeemError::Expired { name: name.clone(), expired: moment(record.expires_unix) };
            return Err(used.unwrap_or_else(expired));
        }
        let issued = self.issue_time(name, now)?;
        let chain = self.authority.issue_participant(name, csr_der, issued).map_err(|source| match source {
            IdentityError::Request { .. } => RedeemError::Request { name: name.clone(), source },
            source => self.cannot_issue(source).into(),
        })?;
        let key = certified_key(&chain).ok().map(|key| hex(&key));
        if let Some(used) = used {
            return if key.is_some() && key == record.key { Ok(chain) } else { Err(used) };
        }
        // The line first: where that cannot be written, the invitation can still be used. The chain is worth something once
        // it leaves this function, so by then the use is on disk, too.
        self.audit_locked(now, Event::Enrolled, Some(name), &key_of(&chain))?;
        (record.redeemed_unix, record.key) = (Some(now.unix_timestamp()), key);
        record.write(&path)?;
        Ok(chain)
    }

    /// Another certificate for a participant that holds one, by a request of the same key. The caller's peer has proved
    /// to hold that key, by a certificate that was issued in the second `issued_unix`: it may have been revoked since
    /// it was let in.
    pub fn renew(
        &self,
        name: &PeerName,
        (key, issued_unix): ([u8; 32], i64),
        csr_der: &[u8],
        now: OffsetDateTime,
    ) -> Result<String, RedeemError> {
        let refused = |reason: String| RedeemError::Renewal { name: name.clone(), reason };
        let _lock = self.lock()?;
        let chain = self.authority.issue_participant(name, csr_der, now).map_err(|source| match source {
            IdentityError::Request { .. } => refused(source.to_string()),
            source => self.cannot_issue(source).into(),
        })?;
        if certified_key(&chain).ok() != Some(key) {
            return Err(refused("the request is of another key".into()));
        }
        if self.revocations()?.revokes(name, issued_unix) {
            return Err(refused("it is revoked".into()));
        }
        self.audit_locked(now, Event::Renewed, Some(name), &key_of(&chain))?;
        Ok(chain)
    }

    pub(super) fn record_path(&self, name: &PeerName) -> PathBuf {
        // A name has neither dots nor slashes, so this stays in the directory.
        self.path.join(INVITATIONS).join(format!("{name}.toml"))
    }

    fn cannot_issue(&self, source: IdentityError) -> HomeError {
        HomeError::Issue { path: self.path.join(ISSUING[0]), source }
    }
}

impl Record {
    fn read(path: &Path) -> Result<Option<Self>, HomeError> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text.map_err(file("read the invitation", path))?,
        };
        let malformed = |reason| HomeError::Invitation { path: path.to_owned(), reason };
        let record: Self = toml::from_str(&text).map_err(|error| malformed(error.to_string()))?;
        let hexadecimal = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if record.fingerprint.len() != 64 || !record.fingerprint.bytes().all(hexadecimal) {
            return Err(malformed(format!("fingerprint = {:?} is not 64 hexadecimal digits", record.fingerprint)));
        }
        Ok(Some(record))
    }

    fn write(&self, path: &Path) -> Result<(), HomeError> {
        let text = toml::to_string(self).expect("strings and numbers can be written as TOML");
        Ok(write_atomically(path, text.as_bytes())?)
    }

    fn has_expired(&self, now: OffsetDateTime) -> bool {
        now.unix_timestamp() > self.expires_unix
    }

    /// Why another invitation for the same name would be a surprise; none where this one was never used and cannot be.
    fn obstacle(&self, now: OffsetDateTime) -> Option<String> {
        match self.redeemed_unix {
            Some(used) => Some(format!("was used at {}", moment(used))),
            None if self.has_expired(now) => None,
            None => Some(format!("can be used until {}", moment(self.expires_unix))),
        }
    }
}

fn key_of(chain: &str) -> String {
    certified_key(chain).map(|key| format!("key {}", hex(&key))).unwrap_or_default()
}

/// A time as people read it.
fn moment(unix: i64) -> String {
    let formatted = OffsetDateTime::from_unix_timestamp(unix).ok().and_then(|time| time.format(&Rfc3339).ok());
    // A time that nobody can write down comes from a damaged record.
    formatted.unwrap_or_else(|| format!("second {unix}"))
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use net::{DeviceKey, Identity, PeerIdentity};
    use tempfile::TempDir;

    use super::*;
    use crate::home::tests::{new_home, now};

    fn alice() -> PeerName {
        PeerName::new("alice").unwrap()
    }

    fn fingerprint(invitation: &Invitation) -> [u8; 32] {
        invitation.identity().unwrap().fingerprint()
    }

    fn request() -> Vec<u8> {
        DeviceKey::generate().unwrap().request_der().unwrap()
    }

    fn invited() -> (TempDir, Home, Invitation) {
        let (directory, home) = new_home();
        let invitation = home.invite(&alice(), now(), INVITATION_VALID, false).unwrap();
        (directory, home, invitation)
    }

    fn check_refused<T>(result: Result<T, impl std::fmt::Display>, complaint: &str) {
        let error = result.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("alice") && error.contains(complaint), "{error:?} does not say {complaint:?}");
    }

    #[test]
    fn a_device_whose_answer_was_lost_asks_again_with_the_same_key_and_nobody_else_does() {
        let (_directory, home, invitation) = invited();
        let (fingerprint, request) = (fingerprint(&invitation), request());
        let lost = home.redeem(&alice(), fingerprint, &request, now()).unwrap();
        let again = home.redeem(&alice(), fingerprint, &request, now() + Duration::HOUR).unwrap();
        assert_eq!(certified_key(&again).unwrap(), certified_key(&lost).unwrap());
        check_refused(home.redeem(&alice(), fingerprint, &self::request(), now()), "already used");
        let late = now() + INVITATION_VALID + Duration::HOUR;
        check_refused(home.redeem(&alice(), fingerprint, &request, late), "already used");
    }

    #[test]
    fn an_invitation_whose_use_cannot_be_written_down_is_not_used_up() {
        let (_directory, home, invitation) = invited();
        let log = home.path().join("audit.jsonl");
        let lines = fs::read(&log).unwrap();
        fs::write(&log, "no line of an audit log\n").unwrap();
        let failed = home.redeem(&alice(), fingerprint(&invitation), &request(), now());
        assert!(failed.unwrap_err().to_string().contains("audit.jsonl"));
        fs::write(&log, lines).unwrap();
        home.redeem(&alice(), fingerprint(&invitation), &request(), now()).unwrap();
    }

    #[test]
    fn an_invitation_is_good_for_one_certificate() {
        let (_directory, home, invitation) = invited();
        assert_eq!(Invitation::parse(&invitation.to_toml()).unwrap(), invitation);
        assert_eq!(invitation.addresses, home.addresses());
        let key = DeviceKey::generate().unwrap();
        let chain = home.redeem(&alice(), fingerprint(&invitation), &key.request_der().unwrap(), now()).unwrap();
        let device = Identity::from_pem(&chain, key.pem(), &invitation.ca_pem).unwrap();
        assert_eq!(*device.peer(), PeerIdentity::Participant { name: alice() });
        // Also after a restart.
        let home = Home::open(home.path()).unwrap();
        let again = home.redeem(&alice(), fingerprint(&invitation), &request(), now() + Duration::HOUR);
        check_refused(again, "already used at 2026-09-21T14:13:20Z");
    }

    #[test]
    fn of_a_pending_invitation_only_the_fingerprint_is_kept() {
        let (_directory, home, invitation) = invited();
        let expected = format!(
            "fingerprint = \"{}\"\nexpires_unix = {}\n",
            hex(&fingerprint(&invitation)),
            now().unix_timestamp() + 24 * 60 * 60
        );
        assert_eq!(fs::read_to_string(home.path().join("invitations/alice.toml")).unwrap(), expected);
    }

    #[test]
    fn nobody_enrols_without_an_invitation_on_record() {
        let (_directory, home, invitation) = invited();
        fs::remove_file(home.path().join("invitations/alice.toml")).unwrap();
        check_refused(home.redeem(&alice(), fingerprint(&invitation), &request(), now()), "no invitation is on record");
    }

    #[test]
    fn an_invitation_expires() {
        let (_directory, home, invitation) = invited();
        let expiry = now() + INVITATION_VALID;
        let late = home.redeem(&alice(), fingerprint(&invitation), &request(), expiry + Duration::SECOND);
        check_refused(late, "expired at 2026-09-22T14:13:20Z");
        home.redeem(&alice(), fingerprint(&invitation), &request(), expiry).unwrap();
    }

    #[test]
    fn a_replaced_invitation_is_worthless() {
        let (_directory, home, first) = invited();
        check_refused(home.invite(&alice(), now(), INVITATION_VALID, false), "can be used until 2026-09-22T14:13:20Z");
        let second = home.invite(&alice(), now(), INVITATION_VALID, true).unwrap();
        check_refused(home.redeem(&alice(), fingerprint(&first), &request(), now()), "replaced by a newer one");
        home.redeem(&alice(), fingerprint(&second), &request(), now()).unwrap();
        check_refused(home.invite(&alice(), now(), INVITATION_VALID, false), "was used at 2026-09-21T14:13:20Z");
        let third = home.invite(&alice(), now(), INVITATION_VALID, true).unwrap();
        check_refused(home.redeem(&alice(), fingerprint(&second), &request(), now()), "replaced by a newer one");
        home.redeem(&alice(), fingerprint(&third), &request(), now()).unwrap();
    }

    #[test]
    fn an_expired_unused_invitation_stands_in_nobodys_way() {
        let (_directory, home, first) = invited();
        let later = now() + INVITATION_VALID + Duration::SECOND;
        home.invite(&alice(), later, INVITATION_VALID, false).unwrap();
        check_refused(home.redeem(&alice(), fingerprint(&first), &request(), later), "replaced by a newer one");
    }

    #[test]
    fn an_invitation_for_one_name_enrols_no_other() {
        let (_directory, home, invitation) = invited();
        let bob = PeerName::new("bob").unwrap();
        home.invite(&bob, now(), INVITATION_VALID, false).unwrap();
        let result = home.redeem(&bob, fingerprint(&invitation), &request(), now());
        assert!(matches!(result, Err(RedeemError::Replaced { name }) if name == bob));
    }

    #[test]
    fn a_broken_request_does_not_use_the_invitation_up() {
        let (_directory, home, invitation) = invited();
        check_refused(home.redeem(&alice(), fingerprint(&invitation), &[0x30, 0], now()), "can still be used");
        home.redeem(&alice(), fingerprint(&invitation), &request(), now()).unwrap();
    }

    #[test]
    fn no_certificate_leaves_before_its_use_is_on_disk() {
        let (_directory, home, invitation) = invited();
        // A directory where the temporary file must go: the record cannot be written.
        let obstacle = home.path().join("invitations/alice.toml.tmp");
        fs::create_dir(&obstacle).unwrap();
        let result = home.redeem(&alice(), fingerprint(&invitation), &request(), now());
        assert!(matches!(result, Err(RedeemError::Home(HomeError::File(_)))));
        fs::remove_dir(&obstacle).unwrap();
        home.redeem(&alice(), fingerprint(&invitation), &request(), now()).unwrap();
    }

    #[test]
    fn a_certificate_is_renewed_for_its_own_key_alone() {
        let (_directory, home, invitation) = invited();
        let key = DeviceKey::generate().unwrap();
        let request = key.request_der().unwrap();
        let chain = home.redeem(&alice(), fingerprint(&invitation), &request, now()).unwrap();
        let certified = (certified_key(&chain).unwrap(), now().unix_timestamp());
        let later = now() + Duration::days(20);
        let renewed = home.renew(&alice(), certified, &request, later).unwrap();
        let identity = Identity::from_pem(&renewed, key.pem(), &invitation.ca_pem).unwrap();
        assert_eq!(identity.not_after(), later + Duration::days(30));
        let other = DeviceKey::generate().unwrap().request_der().unwrap();
        check_refused(home.renew(&alice(), certified, &other, later), "the request is of another key");
        check_refused(home.renew(&alice(), certified, &[0x30, 0], later), "request is refused");
        home.revoke(&alice(), later).unwrap();
        // Also in the seconds before a coordinator that runs has heard of it and ends the connection.
        let soon = later + Duration::seconds(2);
        check_refused(home.renew(&alice(), certified, &request, soon), "it is revoked");
    }

    #[test]
    fn of_concurrent_redemptions_exactly_one_succeeds() {
        const THREADS: usize = 8;
        let (_directory, shared, _) = invited();
        for _ in 0..20 {
            let invitation = shared.invite(&alice(), now(), INVITATION_VALID, true).unwrap();
            let fingerprint = fingerprint(&invitation);
            let together = Barrier::new(THREADS);
            let results: Vec<_> = thread::scope(|scope| {
                let attempt = |thread| {
                    let (shared, together) = (&shared, &together);
                    scope.spawn(move || {
                        // Half of them come through another open home, as from another process.
                        let own = Home::open(shared.path()).unwrap();
                        let home = if thread % 2 == 0 { shared } else { &own };
                        let request = request();
                        together.wait();
                        home.redeem(&alice(), fingerprint, &request, now())
                    })
                };
                let threads: Vec<_> = (0..THREADS).map(attempt).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let used = results.iter().filter(|result| matches!(result, Err(RedeemError::Used { .. }))).count();
            let redeemed = results.iter().filter(|result| result.is_ok()).count();
            assert_eq!((redeemed, used), (1, THREADS - 1));
        }
    }

    #[test]
    fn a_damaged_record_is_named_and_can_be_replaced() {
        let (_directory, home, _) = invited();
        let path = home.path().join("invitations/alice.toml");
        for damaged in ["", "fingerprint = \"AB\"\nexpires_unix = 1", "fingerprint = \"\"\nexpires_unix = 1\nextra = 1"]
        {
            fs::write(&path, damaged).unwrap();
            check_refused(home.invite(&alice(), now(), INVITATION_VALID, false), "delete that file");
            check_refused(home.redeem(&alice(), [0; 32], &request(), now()), "delete that file");
        }
        home.invite(&alice(), now(), INVITATION_VALID, true).unwrap();
    }

    #[test]
    fn an_invitation_is_good_for_a_sensible_time() {
        let (_directory, home) = new_home();
        for valid in [Duration::ZERO, -Duration::HOUR, Duration::MAX, INVITATION_VALID_MAX + Duration::SECOND] {
            check_refused(home.invite(&alice(), now(), valid, false), "at most 30 days");
        }
        home.invite(&alice(), now(), INVITATION_VALID_MAX, false).unwrap();
    }
}

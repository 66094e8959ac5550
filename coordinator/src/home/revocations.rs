//! Whose certificates count no longer: `revoked.toml`, a second for each name.
//!
//! What was issued to a name up to that second, certificates and invitations, is refused; what is issued later counts,
//! so that a device can be invited again. Nothing here closes a connection: that is the business of whoever serves it.
//! Start from [`Home::revoke`].

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use experiment::write_atomically;
use net::PeerName;
use time::{Duration, OffsetDateTime};

use super::audit::Event;
use super::{Home, HomeError, REVOKED, file, remove};

/// Names, and the last second whose certificates do not count.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Revocations(BTreeMap<PeerName, i64>);

impl Home {
    /// From now on nothing counts that was issued to `name` before; an invitation that waits is withdrawn.
    pub fn revoke(&self, name: &PeerName, now: OffsetDateTime) -> Result<(), HomeError> {
        let _lock = self.lock()?;
        let mut revocations = Revocations::read(&self.path.join(REVOKED))?;
        let record = self.record_path(name);
        let is_known = record.try_exists().map_err(file("look for", &record))?;
        if !is_known && !revocations.0.contains_key(name) {
            // A misspelt name would be trusted on.
            return Err(HomeError::Unknown { name: name.clone(), path: self.path.join(super::INVITATIONS) });
        }
        let until = revocations.0.entry(name.clone()).or_insert(i64::MIN);
        *until = now.unix_timestamp().max(*until);
        write_atomically(&self.path.join(REVOKED), revocations.to_toml().as_bytes())?;
        remove(&record)?;
        self.audit_locked(now, Event::Revoked, Some(name), "")
    }

    /// What is revoked according to the disk.
    pub fn revocations(&self) -> Result<Revocations, HomeError> {
        Revocations::read(&self.path.join(REVOKED))
    }

    /// The second in which something may be issued to `name` that is to count, even in the very second of a revocation.
    pub(super) fn issue_time(&self, name: &PeerName, now: OffsetDateTime) -> Result<OffsetDateTime, HomeError> {
        let revoked = self.revocations()?.0.get(name).copied();
        let earliest = revoked.and_then(|unix| OffsetDateTime::from_unix_timestamp(unix.saturating_add(1)).ok());
        let Some(earliest) = earliest.filter(|earliest| *earliest > now) else { return Ok(now) };
        // Far ahead where the clock has been set back since: what is issued now would be refused as revoked, and what is
        // dated so far ahead as not valid yet.
        if earliest - now >= Duration::DAY {
            return Err(HomeError::ClockBehind {
                name: name.clone(),
                revoked: earliest,
                path: self.path.join(REVOKED),
            });
        }
        Ok(earliest)
    }
}

impl Revocations {
    /// Whether a certificate that was issued to `name` in the second `issued_unix` counts no longer.
    pub fn revokes(&self, name: &PeerName, issued_unix: i64) -> bool {
        self.0.get(name).is_some_and(|until| issued_unix <= *until)
    }

    pub(super) fn read(path: &Path) -> Result<Self, HomeError> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            text => text.map_err(file("read", path))?,
        };
        let malformed = |reason: String| HomeError::Revocations { path: path.to_owned(), reason };
        let table: BTreeMap<String, i64> = toml::from_str(&text).map_err(|error| malformed(error.to_string()))?;
        let named = |(name, until): (String, i64)| Ok((PeerName::new(&name)?, until));
        table
            .into_iter()
            .map(named)
            .collect::<Result<_, net::IdentityError>>()
            .map(Self)
            .map_err(|error| malformed(error.to_string()))
    }

    fn to_toml(&self) -> String {
        // A name is a key as it stands: letters, digits, `_` and `-`.
        self.0.iter().map(|(name, until)| format!("{name} = {until}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::INVITATION_VALID;
    use crate::home::tests::{new_home, now};

    fn alice() -> PeerName {
        PeerName::new("alice").unwrap()
    }

    #[test]
    fn what_was_issued_until_a_revocation_counts_no_longer_and_what_comes_later_does() {
        let (_directory, home) = new_home();
        home.invite(&alice(), now(), INVITATION_VALID, false).unwrap();
        home.revoke(&alice(), now()).unwrap();
        // Also after a restart.
        let home = Home::open(home.path()).unwrap();
        let revocations = home.revocations().unwrap();
        let issued = now().unix_timestamp();
        assert!(revocations.revokes(&alice(), issued) && revocations.revokes(&alice(), issued - 1));
        assert!(!revocations.revokes(&alice(), issued + 1));
        assert!(!revocations.revokes(&PeerName::new("bob").unwrap(), issued));
        // In the very same second, and nobody asks for --replace.
        let again = home.invite(&alice(), now(), INVITATION_VALID, false).unwrap();
        assert_eq!(again.expires_unix, issued + 1 + INVITATION_VALID.whole_seconds());
    }

    #[test]
    fn a_clock_that_was_set_back_behind_a_revocation_is_named() {
        let (_directory, home) = new_home();
        home.invite(&alice(), now(), INVITATION_VALID, false).unwrap();
        home.revoke(&alice(), now() + Duration::days(2)).unwrap();
        let error = home.invite(&alice(), now(), INVITATION_VALID, false).unwrap_err().to_string();
        assert!(error.contains("alice") && error.contains("set the clock"), "{error}");
        home.invite(&alice(), now() + Duration::days(1) + Duration::MINUTE, INVITATION_VALID, false).unwrap();
    }

    #[test]
    fn a_name_that_nobody_was_invited_by_is_not_revoked() {
        let (_directory, home) = new_home();
        let error = home.revoke(&alice(), now()).unwrap_err().to_string();
        assert!(error.contains("alice") && error.contains("invitations"), "{error}");
        assert_eq!(home.revocations().unwrap(), Revocations::default());
    }

    #[test]
    fn a_damaged_list_is_an_error_and_not_an_amnesty() {
        let (_directory, home) = new_home();
        for damaged in ["alice", "alice = \"no\"", "\"a b\" = 1"] {
            fs::write(home.path().join("revoked.toml"), damaged).unwrap();
            let error = home.revocations().unwrap_err().to_string();
            assert!(error.contains("revoked.toml") && error.contains("backup"), "{error}");
            assert!(Home::open(home.path()).is_err());
        }
    }
}

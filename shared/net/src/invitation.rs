//! The file by which a coordinator invites one participant: where to connect, whom to believe, and a certificate that may only enrol.
//!
//! It is TOML, and it is a secret until it has been used or has expired: it is written readable by its owner alone.

use std::{
    fs,
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::identity::{Identity, IdentityError, PeerIdentity, PeerName};

const VERSION: u32 = 1;
const FILE_BYTES_MAX: u64 = 64 * 1024;
const ADDRESSES_MAX: usize = 16;

#[derive(Clone, PartialEq)]
pub struct Invitation {
    pub name: PeerName,
    /// `host:port`, in the order in which they are tried.
    pub addresses: Vec<String>,
    pub ca_pem: String,
    pub enrol_cert_pem: String,
    pub enrol_key_pem: String,
    /// The enrolment certificate is refused after this.
    pub expires_unix: i64,
}

/// Where an invitation will be, readable by its owner alone, whole or not at all. Made before there is one: that it cannot
/// be written shows before anything is promised.
#[derive(Debug)]
pub struct InvitationFile {
    path: PathBuf,
    unfinished: PathBuf,
    file: fs::File,
}

#[derive(Debug, thiserror::Error)]
pub enum InvitationError {
    #[error("{}: {what}; give another --out, or --replace an earlier invitation for the same name", path.display())]
    Taken { path: PathBuf, what: String },
    #[error("{}: {error}; check the path and the disk", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{}: {reason}; ask the coordinator for a new invitation", path.display())]
    Malformed { path: PathBuf, reason: String },
}

/// The file, before it has been checked.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    headwater_invitation: u32,
    name: String,
    addresses: Vec<String>,
    expires_unix: i64,
    ca: String,
    enrol_certificate: String,
    enrol_key: String,
}

impl Invitation {
    /// The invitation in a file's text. The error is a fragment that [`Invitation::read`] completes with the file's name.
    pub fn parse(text: &str) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|error| format!("not an invitation: {}", error.message()))?;
        if file.headwater_invitation != VERSION {
            return Err(format!(
                "an invitation of version {}, this program reads {VERSION}",
                file.headwater_invitation
            ));
        }
        if file.addresses.is_empty() || file.addresses.len() > ADDRESSES_MAX {
            return Err(format!(
                "an invitation with {} addresses, 1 to {ADDRESSES_MAX} are allowed",
                file.addresses.len()
            ));
        }
        let invitation = Self {
            name: PeerName::new(&file.name).map_err(|error| error.to_string())?,
            addresses: file.addresses,
            ca_pem: file.ca,
            enrol_cert_pem: file.enrol_certificate,
            enrol_key_pem: file.enrol_key,
            expires_unix: file.expires_unix,
        };
        let identity = invitation.identity().map_err(|error| error.to_string())?;
        match identity.peer() {
            PeerIdentity::Enrol { name, .. } if *name == invitation.name => Ok(invitation),
            other => Err(format!("an invitation for {} with a certificate of {other}", invitation.name)),
        }
    }

    pub fn to_toml(&self) -> String {
        let file = File {
            headwater_invitation: VERSION,
            name: self.name.to_string(),
            addresses: self.addresses.clone(),
            expires_unix: self.expires_unix,
            ca: self.ca_pem.clone(),
            enrol_certificate: self.enrol_cert_pem.clone(),
            enrol_key: self.enrol_key_pem.clone(),
        };
        // Strings, numbers and one list of strings: TOML can say all of it.
        toml::to_string_pretty(&file).expect("an invitation has only plain values")
    }

    pub fn read(path: &Path) -> Result<Self, InvitationError> {
        let failed = |error| InvitationError::Io { path: path.to_owned(), error };
        let malformed = |reason| InvitationError::Malformed { path: path.to_owned(), reason };
        let length = fs::metadata(path).map_err(failed)?.len();
        if length > FILE_BYTES_MAX {
            return Err(malformed(format!("{length} bytes, an invitation has at most {FILE_BYTES_MAX}")));
        }
        Self::parse(&fs::read_to_string(path).map_err(failed)?).map_err(malformed)
    }

    /// What to present while enrolling.
    pub fn identity(&self) -> Result<Identity, IdentityError> {
        Identity::from_pem(&self.enrol_cert_pem, &self.enrol_key_pem, &self.ca_pem)
    }
}

impl InvitationFile {
    /// With `replace`, in the place of an earlier invitation for `name`, and of nothing else.
    pub fn create(path: &Path, name: &PeerName, replace: bool) -> Result<Self, InvitationError> {
        let failed = |error| InvitationError::Io { path: path.to_owned(), error };
        let taken = |what: String| InvitationError::Taken { path: path.to_owned(), what };
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            Ok(found) if !found.is_file() => return Err(taken("something is there that is no regular file".into())),
            Ok(_) if !replace => return Err(taken("already there".into())),
            Ok(_) => match Invitation::read(path) {
                Ok(earlier) if earlier.name == *name => {}
                Ok(earlier) => return Err(taken(format!("an invitation for {}", earlier.name))),
                Err(_) => return Err(taken("no invitation, and not replaced".into())),
            },
        }
        let mut unfinished = std::ffi::OsString::from(".");
        unfinished.push(path.file_name().unwrap_or_default());
        unfinished.push(format!(".{}.unfinished", std::process::id()));
        let unfinished = path.with_file_name(unfinished);
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(&unfinished).map_err(failed)?;
        Ok(Self { path: path.to_owned(), unfinished, file })
    }

    /// Gives the file its content and its name.
    pub fn write(mut self, invitation: &Invitation) -> Result<(), InvitationError> {
        let written = self.file.write_all(invitation.to_toml().as_bytes()).and_then(|()| self.file.sync_all());
        let named = written.and_then(|()| fs::rename(&self.unfinished, &self.path));
        named.map_err(|error| InvitationError::Io { path: self.path.clone(), error })
    }
}

impl Drop for InvitationFile {
    fn drop(&mut self) {
        // Where it has its name, there is nothing to remove.
        let _ = fs::remove_file(&self.unfinished);
    }
}

impl std::fmt::Debug for Invitation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Invitation")
            .field("name", &self.name)
            .field("addresses", &self.addresses)
            .field("expires_unix", &self.expires_unix)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use time::{Duration, OffsetDateTime};

    use super::*;
    use crate::Authority;

    fn invitation(name: &str) -> Invitation {
        let now = OffsetDateTime::now_utc();
        let authority = Authority::create(now).unwrap();
        let name = PeerName::new(name).unwrap();
        let identity = authority.issue_enrolment(&name, now, Duration::minutes(15)).unwrap();
        Invitation {
            name,
            addresses: vec!["example.org:4433".into(), "[::1]:4433".into()],
            ca_pem: authority.root_pem().into(),
            enrol_cert_pem: identity.chain_pem().into(),
            enrol_key_pem: identity.key_pem().into(),
            expires_unix: identity.not_after().unix_timestamp(),
        }
    }

    #[test]
    fn invitation_survives_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("alice.invitation");
        let written = invitation("alice");
        InvitationFile::create(&path, &written.name, false).unwrap().write(&written).unwrap();
        let read = Invitation::read(&path).unwrap();
        assert!(read == written, "{read:?}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "a temporary file is left");
        #[cfg(unix)]
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions()) & 0o777, 0o600);
    }

    #[test]
    fn only_an_earlier_invitation_for_the_same_name_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.pem");
        let (alice, bob) = (invitation("alice"), invitation("bob"));
        let refused = |name: &PeerName, replace: bool, complaint: &str| {
            let before = fs::read(&path).unwrap();
            let error = InvitationFile::create(&path, name, replace).unwrap_err().to_string();
            assert!(error.contains("ca.pem") && error.contains(complaint), "{error}");
            assert_eq!(fs::read(&path).unwrap(), before);
        };
        fs::write(&path, &alice.ca_pem).unwrap();
        refused(&alice.name, true, "no invitation");
        fs::remove_file(&path).unwrap();
        InvitationFile::create(&path, &alice.name, false).unwrap().write(&alice).unwrap();
        refused(&alice.name, false, "already there");
        refused(&bob.name, true, "an invitation for alice");
        let again = invitation("alice");
        InvitationFile::create(&path, &alice.name, true).unwrap().write(&again).unwrap();
        assert!(Invitation::read(&path).unwrap() == again);
        // One that is never written leaves the earlier one, and nothing else.
        drop(InvitationFile::create(&path, &alice.name, true).unwrap());
        assert!(Invitation::read(&path).unwrap() == again);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn errors_name_the_file_and_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("broken.invitation");
        let check = |complaint: &str| {
            let error = Invitation::read(&path).unwrap_err().to_string();
            assert!(error.contains("broken.invitation") && error.contains(complaint), "{error}");
        };
        check("No such file");
        fs::write(&path, "not toml at all").unwrap();
        check("ask the coordinator for a new invitation");
        fs::write(&path, invitation("a").to_toml().replace("headwater_invitation = 1", "headwater_invitation = 2"))
            .unwrap();
        check("version 2");
        fs::write(&path, invitation("a").to_toml() + "\nextra = 1").unwrap();
        check("extra");
        fs::write(&path, invitation("a").to_toml().replace("name = \"a\"", "name = \"b\"")).unwrap();
        check("an invitation for b with a certificate of an invitation for a");
        fs::write(&path, invitation("a").to_toml().replace("PRIVATE KEY", "PRIVATE")).unwrap();
        check("private key");
        fs::write(&path, "x".repeat(70_000)).unwrap();
        check("70000 bytes");
    }

    #[test]
    fn debug_shows_no_key() {
        assert!(!format!("{:?}", invitation("a")).contains("KEY"));
    }
}

//! The directory in which a coordinator keeps who it is: its certificate authority, its own certificate, where it is
//! reached, and whom it has invited.
//!
//! This file owns the directory's layout and the coordinator's identity; invitations, revocations and the audit log have
//! files of their own. It never overwrites a directory that holds something, never reads the clock, and keeps no key of a
//! participant. The root's key, `ca.key`, is needed for [`Home::renew_authority`] alone and belongs elsewhere. Start from
//! [`Home`].

mod addresses;
mod admission;
pub mod audit;
mod invitations;
mod revocations;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use experiment::write_atomically;
use net::{Authority, Identity, IdentityError, PeerIdentity, PeerName, Root};
use storage::Disk;
use time::{Duration, OffsetDateTime};

use addresses::{Addresses, Settings};
use audit::Event;

pub use admission::{Admission, Keeper};
pub use invitations::{INVITATION_VALID, RedeemError};
pub use revocations::Revocations;

/// Where a coordinator listens, and is reached, unless `coordinator init` is told otherwise.
pub const ADDRESS_DEFAULT: &str = "127.0.0.1:4433";

/// A coordinator that starts with less time left makes itself a new certificate, of 365 days: it presents the one that it has
/// started with as long as it runs.
const RENEWAL: Duration = Duration::days(335);

const SETTINGS: &str = "home.toml";
/// In its place while a home is being made.
const UNFINISHED: &str = "home.toml.partial";
const ROOT: [&str; 2] = ["ca.pem", "ca.key"];
const ISSUING: [&str; 2] = ["issuing.pem", "issuing.key"];
const COORDINATOR: [&str; 2] = ["coordinator.pem", "coordinator.key"];
const EXPERIMENT: &str = "experiment.toml";
const INVITATIONS: &str = "invitations";
const REVOKED: &str = "revoked.toml";
const LOCK: &str = "lock";

/// An open home. Several threads, and several processes, may use one directory at a time.
pub struct Home {
    path: PathBuf,
    addresses: Addresses,
    authority: Authority,
    admission: Arc<Admission>,
}

/// What is wrong with a home, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    #[error("make a home in {}: it already holds {found}; choose another directory, or move them away", path.display())]
    NotEmpty { path: PathBuf, found: String },
    #[error("open {}: it has no {SETTINGS}; make a home with `coordinator init {}`", path.display(), path.display())]
    NotAHome { path: PathBuf },
    #[error(
        "find {}, whose key is there; restore it from a backup, or make both anew with the root's key \
         (coordinator renew-ca)", path.display()
    )]
    Incomplete { path: PathBuf },
    #[error("parse {}: {source}", path.display())]
    Settings {
        path: PathBuf,
        // Boxed, because toml's error would make every `Result` here large.
        source: Box<toml::de::Error>,
    },
    #[error("accept `addresses` in {}: {reason}", path.display())]
    Addresses { path: PathBuf, reason: String },
    #[error(
        "listen on {address}: {reason}; correct the first of `addresses` in {}, which must be an address of this \
         machine", path.display()
    )]
    Unresolved { path: PathBuf, address: String, reason: String },
    #[error("use {}: {source}; {next_step}", path.display())]
    Identity { path: PathBuf, source: IdentityError, next_step: &'static str },
    #[error("sign a certificate with {}: {source}", path.display())]
    Issue { path: PathBuf, source: IdentityError },
    #[error("invite {name}: {valid} is no time to use an invitation in; give it more than 0 and at most 30 days")]
    Validity { name: PeerName, valid: Duration },
    #[error(
        "invite {name}: {} is of an invitation that {state}; --replace makes a new one and the old one worthless",
        path.display()
    )]
    AlreadyInvited { name: PeerName, path: PathBuf, state: String },
    #[error("parse the invitation in {}: {reason}; delete that file, then invite again", path.display())]
    Invitation { path: PathBuf, reason: String },
    #[error("revoke {name}: nobody of that name was invited; the names are those of the files in {}", path.display())]
    Unknown { name: PeerName, path: PathBuf },
    #[error(
        "issue anything to {name}: it was revoked at {revoked}, which is a day or more ahead of this machine's clock; set \
         the clock, or correct the second in {}", path.display()
    )]
    ClockBehind { name: PeerName, revoked: OffsetDateTime, path: PathBuf },
    #[error("parse {}: {reason}; restore it from a backup: who is revoked must not be forgotten", path.display())]
    Revocations { path: PathBuf, reason: String },
    #[error(
        "believe {}: {tampered}; somebody has changed it, or the disk has. Look into it, and move both audit files away \
         to begin a new log", path.display()
    )]
    Audit { path: PathBuf, tampered: audit::Tampered },
    #[error(transparent)]
    File(#[from] experiment::Error),
}

const SETTINGS_COMMENT: &str = "\
# Where this coordinator is reached, as host:port, in the order in which participants try. It listens on the first.
# A first address of 0.0.0.0 or [::] listens on every interface and is left out of invitations.
";

impl Home {
    /// Makes a home in a directory that is empty or does not exist yet, or holds one that was not finished. Without
    /// addresses it is [`ADDRESS_DEFAULT`].
    pub fn init(path: &Path, mut addresses: Vec<String>, now: OffsetDateTime) -> Result<Self, HomeError> {
        if addresses.is_empty() {
            addresses.push(ADDRESS_DEFAULT.into());
        }
        let settings = Settings { addresses };
        // Before anything is made: a wrong address must not leave half a home.
        Addresses::read(&settings, &path.join(SETTINGS))?;
        fs::create_dir_all(path).map_err(file("make the directory", path))?;
        clear_unfinished(path)?;
        check_empty(path)?;
        let settings = toml::to_string(&settings).expect("a list of strings can be written as TOML");
        let unfinished = path.join(UNFINISHED);
        fs::write(&unfinished, SETTINGS_COMMENT.to_owned() + &settings).map_err(file("write", &unfinished))?;

        let [certificate, key] = ROOT.map(|name| path.join(name));
        let issue = |source| HomeError::Issue { path: certificate.clone(), source };
        let root = Root::create(now).map_err(issue)?;
        let authority = root.issue_authority(now).map_err(issue)?;
        write_private(&key, root.key_pem())?;
        write_atomically(&certificate, root.certificate_pem().as_bytes())?;
        write_authority(path, &authority)?;
        let invitations = path.join(INVITATIONS);
        fs::create_dir(&invitations).map_err(file("make the directory", &invitations))?;
        write_atomically(&path.join(EXPERIMENT), experiment::skeleton().as_bytes())?;
        issue_coordinator(path, &authority, now)?;
        audit::append(path, now, Event::HomeMade, None, "")?;
        // Last, because a directory with this file is a home.
        let settings_path = path.join(SETTINGS);
        File::open(&unfinished)
            .and_then(|settings| settings.sync_all())
            .and_then(|()| fs::rename(&unfinished, &settings_path))
            .and_then(|()| Disk::default().sync_directory(&settings_path))
            .map_err(file("write", &settings_path))?;
        Self::open(path)
    }

    pub fn open(path: &Path) -> Result<Self, HomeError> {
        let settings_path = path.join(SETTINGS);
        let text = match fs::read_to_string(&settings_path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(HomeError::NotAHome { path: path.to_owned() });
            }
            read => read.map_err(file("read", &settings_path))?,
        };
        let settings = toml::from_str(&text)
            .map_err(|source| HomeError::Settings { path: settings_path.clone(), source: Box::new(source) })?;
        let addresses = Addresses::read(&settings, &settings_path)?;
        let [root, root_key] = ROOT.map(|name| path.join(name));
        let [mut certificate, mut key] = ISSUING.map(|name| path.join(name));
        if !certificate.try_exists().map_err(file("look for", &certificate))? {
            if key.try_exists().map_err(file("look for", &key))? {
                return Err(HomeError::Incomplete { path: certificate });
            }
            // A home of the first version, whose root signs for itself.
            (certificate, key) = (root.clone(), root_key);
        }
        let unusable = |path: &Path| {
            let path = path.to_owned();
            let next_step =
                "renew it with the root's key (coordinator renew-ca), or restore certificate and key from a backup";
            move |source| HomeError::Identity { path, source, next_step }
        };
        let root_pem = read(&root)?;
        Root::check(&root_pem).map_err(unusable(&root))?;
        let authority = Authority::from_pem(&root_pem, &read(&certificate)?, &read(&key)?);
        let authority =
            authority.map_err(|source| unusable(if source.is_of_key() { &key } else { &certificate })(source))?;
        let admission = Arc::new(Admission::new(Revocations::read(&path.join(REVOKED))?));
        Ok(Self { path: path.to_owned(), addresses, authority, admission })
    }

    /// Makes another issuing authority, with the root's key, which may lie anywhere. What the one before it has signed
    /// stays good.
    ///
    /// It asks for no issuing authority that is in order: a home in which this was cut short is mended by doing it again.
    pub fn renew_authority(home: &Path, root_key: &Path, now: OffsetDateTime) -> Result<OffsetDateTime, HomeError> {
        if !home.join(SETTINGS).try_exists().map_err(file("look into", home))? {
            return Err(HomeError::NotAHome { path: home.to_owned() });
        }
        let _lock = lock(home)?;
        let next_step = "give --root-key the file ca.key that `coordinator init` made together with this home's ca.pem";
        let unusable = |source| HomeError::Identity { path: root_key.to_owned(), source, next_step };
        let root = Root::from_pem(&read(&home.join(ROOT[0]))?, &read(root_key)?).map_err(unusable)?;
        let authority = root.issue_authority(now).map_err(unusable)?;
        write_authority(home, &authority)?;
        issue_coordinator(home, &authority, now)?;
        let until = authority.not_after();
        audit::append(home, now, Event::AuthorityRenewed, None, &format!("until {until}"))?;
        Ok(until)
    }

    /// When the issuing authority expires; then nobody gets in any more.
    pub fn authority_not_after(&self) -> OffsetDateTime {
        self.authority.not_after()
    }

    /// Who may come in, as far as `revoked.toml` has been read.
    pub fn admission(&self) -> &Arc<Admission> {
        &self.admission
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where participants reach this coordinator, in the order in which they try.
    pub fn addresses(&self) -> &[String] {
        &self.addresses.dialled
    }

    /// What to bind. It may ask the name service, and wait for it.
    pub fn listen_address(&self) -> Result<SocketAddr, HomeError> {
        let address = &self.addresses.listen;
        let unresolved =
            |reason| HomeError::Unresolved { path: self.path.join(SETTINGS), address: address.clone(), reason };
        let mut found = address.to_socket_addrs().map_err(|error| unresolved(error.to_string()))?;
        found.next().ok_or_else(|| unresolved("that name has no address".into()))
    }

    /// The coordinator's own certificate and key: those in the directory, or new ones where these are a month old
    /// or one of them has been deleted.
    pub fn identity(&self, now: OffsetDateTime) -> Result<Identity, HomeError> {
        let _lock = self.lock()?;
        let [certificate, key] = COORDINATOR.map(|name| self.path.join(name));
        for path in [&certificate, &key] {
            if !path.try_exists().map_err(file("look for", path))? {
                return issue_coordinator(&self.path, &self.authority, now);
            }
        }
        let next_step = "delete it, and the next start makes a new one";
        let identity = Identity::from_pem(&read(&certificate)?, &read(&key)?, self.authority.root_pem())
            .and_then(|identity| match identity.peer() {
                PeerIdentity::Coordinator => Ok(identity),
                other => Err(IdentityError::Certificate { reason: format!("it is that of {other}") }),
            })
            .map_err(|source| {
                let path = if source.is_of_key() { key } else { certificate };
                HomeError::Identity { path, source, next_step }
            })?;
        if identity.not_after() - now < RENEWAL {
            return issue_coordinator(&self.path, &self.authority, now);
        }
        Ok(identity)
    }

    /// Keeps other threads and processes from changing this home until the file is dropped.
    fn lock(&self) -> Result<File, HomeError> {
        lock(&self.path)
    }
}

fn lock(home: &Path) -> Result<File, HomeError> {
    let path = home.join(LOCK);
    let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
    lock.and_then(|lock| lock.lock().map(|()| lock)).map_err(file("lock", &path))
}

/// Replaces the coordinator's certificate and key.
///
/// The certificate goes first and comes last, so that a crash between the two files leaves no certificate, of which the
/// next start makes a new one, and never a certificate with another one's key.
fn issue_coordinator(home: &Path, authority: &Authority, now: OffsetDateTime) -> Result<Identity, HomeError> {
    let [certificate, key] = COORDINATOR.map(|name| home.join(name));
    let identity =
        authority.issue_coordinator(now).map_err(|source| HomeError::Issue { path: home.join(ISSUING[0]), source })?;
    remove(&certificate)?;
    write_private(&key, identity.key_pem())?;
    write_atomically(&certificate, identity.chain_pem().as_bytes())?;
    Ok(identity)
}

/// The certificate first: with a key that is not its own, the next command says so, and does not sign with a forgotten one.
fn write_authority(home: &Path, authority: &Authority) -> Result<(), HomeError> {
    let [certificate, key] = ISSUING.map(|name| home.join(name));
    write_atomically(&certificate, authority.certificate_pem().as_bytes())?;
    write_private(&key, authority.key_pem())
}

/// Removes what an `init` has left that was cut short: nobody can have been invited by it. Where anything else lies beside
/// it, all is left alone.
fn clear_unfinished(path: &Path) -> Result<(), HomeError> {
    let unfinished = path.join(UNFINISHED);
    if !unfinished.is_file() {
        return Ok(());
    }
    let made: Vec<&str> = ROOT
        .into_iter()
        .chain(ISSUING)
        .chain(COORDINATOR)
        .chain([audit::LOG, audit::HEAD])
        .chain([EXPERIMENT])
        .collect();
    let is_ours = |name: &str| {
        [UNFINISHED, INVITATIONS].contains(&name) || made.contains(&name.strip_suffix(".tmp").unwrap_or(name))
    };
    let names = names_in(path)?;
    if !names.iter().all(|name| is_ours(name)) {
        return Ok(());
    }
    let invitations = path.join(INVITATIONS);
    if let Err(error) = fs::remove_dir(&invitations)
        && error.kind() != ErrorKind::NotFound
    {
        return Err(file("remove the directory", &invitations)(error));
    }
    // The one that tells of it last.
    let others = names.iter().filter(|name| ![UNFINISHED, INVITATIONS].contains(&name.as_str()));
    others.map(|name| path.join(name)).chain([unfinished.clone()]).try_for_each(|path| remove(&path))
}

fn names_in(path: &Path) -> Result<Vec<String>, HomeError> {
    fs::read_dir(path)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name().display().to_string())).collect())
        .map_err(file("look into", path))
}

fn check_empty(path: &Path) -> Result<(), HomeError> {
    let mut names = names_in(path)?;
    if names.is_empty() {
        return Ok(());
    }
    names.sort();
    const SHOWN: usize = 5;
    let more = names.len().saturating_sub(SHOWN);
    names.truncate(SHOWN);
    let mut found = names.join(", ");
    if more > 0 {
        found += &format!(" and {more} more");
    }
    Err(HomeError::NotEmpty { path: path.to_owned(), found })
}

/// Writes a file that nobody but its owner may ever read, not even while it is being written.
fn write_private(path: &Path, text: &str) -> Result<(), HomeError> {
    // A file that exists would keep its mode.
    remove(path)?;
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
        .map_err(file("write", path))
}

fn remove(path: &Path) -> Result<(), HomeError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(file("remove", path)(error)),
        _ => Ok(()),
    }
}

fn read(path: &Path) -> Result<String, HomeError> {
    fs::read_to_string(path).map_err(file("read", path))
}

/// For `map_err`: `action` is a verb that `path` completes.
fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HomeError {
    let path = path.to_owned();
    move |source| experiment::Error::File { action, path, source }.into()
}

#[cfg(test)]
mod tests;

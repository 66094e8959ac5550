use tempfile::{TempDir, tempdir};

use super::*;

pub(super) fn now() -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(1_790_000_000).unwrap()
}

pub(super) fn new_home() -> (TempDir, Home) {
    let directory = tempdir().unwrap();
    let home = Home::init(&directory.path().join("home"), Vec::new(), now()).unwrap();
    (directory, home)
}

fn check_private(path: &Path) {
    #[cfg(unix)]
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path).unwrap().permissions()) & 0o777,
        0o600,
        "{}",
        path.display()
    );
}

#[test]
fn a_new_home_holds_what_a_coordinator_needs() {
    let (_directory, home) = new_home();
    let mut names: Vec<_> =
        fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let expected = "audit.head audit.jsonl ca.key ca.pem coordinator.key coordinator.pem experiment.toml home.toml invitations \
                    issuing.key issuing.pem";
    assert_eq!(names.join(" "), expected);
    check_private(&home.path().join("ca.key"));
    check_private(&home.path().join("issuing.key"));
    check_private(&home.path().join("coordinator.key"));
    assert_eq!(read(&home.path().join("experiment.toml")).unwrap(), experiment::skeleton());
    let opened = Home::open(home.path()).unwrap();
    assert_eq!(opened.addresses(), [ADDRESS_DEFAULT]);
    assert_eq!(opened.listen_address().unwrap(), ADDRESS_DEFAULT.parse().unwrap());
}

#[test]
fn a_directory_that_holds_something_is_left_alone() {
    let directory = tempdir().unwrap();
    for name in ["f", "b", "c", "d", "e", "a"] {
        fs::write(directory.path().join(name), "mine").unwrap();
    }
    let error = Home::init(directory.path(), Vec::new(), now()).err().unwrap().to_string();
    assert!(error.contains("it already holds a, b, c, d, e and 1 more; choose another directory"), "{error}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 6);

    let (_directory, home) = new_home();
    assert!(matches!(Home::init(home.path(), Vec::new(), now()), Err(HomeError::NotEmpty { .. })));
}

/// Ctrl-C may come at any time, and the same command is then to be run again.
#[test]
fn a_home_that_was_not_finished_is_begun_anew() {
    let (_directory, home) = new_home();
    let (path, finished) = (home.path(), names_in(home.path()).unwrap());
    let [settings, partial] = ["home.toml", UNFINISHED].map(|name| path.join(name));
    for gone in ["audit.head", "coordinator.pem", "experiment.toml", "invitations", "issuing.key", "ca.pem"] {
        let key = read(&path.join("ca.key")).unwrap();
        fs::rename(&settings, &partial).unwrap();
        let gone = path.join(gone);
        if gone.is_dir() {
            fs::remove_dir(&gone).unwrap()
        } else {
            fs::remove_file(&gone).unwrap()
        }
        fs::write(path.join("experiment.toml.tmp"), "[").unwrap();
        assert!(matches!(Home::open(path), Err(HomeError::NotAHome { .. })));
        let again = Home::init(path, Vec::new(), now()).unwrap();
        assert_ne!(read(&path.join("ca.key")).unwrap(), key);
        let sorted = |mut names: Vec<String>| {
            names.sort();
            names
        };
        assert_eq!(sorted(names_in(again.path()).unwrap()), sorted(finished.clone()));
    }
    // Somebody's own file beside it is not ours to judge.
    fs::rename(&settings, &partial).unwrap();
    fs::write(path.join("mine"), "mine").unwrap();
    let key = read(&path.join("ca.key")).unwrap();
    assert!(matches!(Home::init(path, Vec::new(), now()), Err(HomeError::NotEmpty { .. })));
    assert_eq!(read(&path.join("ca.key")).unwrap(), key);
}

#[test]
fn a_wrong_address_leaves_nothing_behind() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("home");
    let error = Home::init(&path, vec!["localhost".into()], now()).err().unwrap().to_string();
    assert!(error.contains("home.toml") && error.contains("\"localhost\" is not host:port"), "{error}");
    assert!(!path.exists());
}

#[test]
fn a_directory_without_settings_is_not_a_home() {
    let directory = tempdir().unwrap();
    let error = Home::open(directory.path()).err().unwrap().to_string();
    assert!(error.contains(&format!("`coordinator init {}`", directory.path().display())), "{error}");
}

#[test]
fn broken_settings_are_named() {
    let (_directory, home) = new_home();
    let check = |settings: &str, complaint: &str| {
        fs::write(home.path().join("home.toml"), settings).unwrap();
        let error = Home::open(home.path()).err().unwrap().to_string();
        assert!(error.contains("home.toml") && error.contains(complaint), "{error}");
    };
    check("", "addresses");
    check("addresses = []", "there are none");
    check("addresses = [\"a:1\"]\nport = 1", "port");
    let authority = home.path().join("ca.pem");
    fs::write(home.path().join("home.toml"), "addresses = [\"a:1\"]").unwrap();
    fs::write(&authority, "gone").unwrap();
    let error = Home::open(home.path()).err().unwrap().to_string();
    assert!(error.contains("ca.pem") && error.contains("from a backup"), "{error}");
}

#[test]
fn an_address_that_does_not_resolve_names_its_key() {
    let directory = tempdir().unwrap();
    // A label of a name has at most 63 bytes (RFC 1035, 2.3.4), so this fails without asking anybody.
    let nowhere = "n".repeat(64);
    let home = Home::init(directory.path(), vec![format!("{nowhere}.invalid:4433")], now()).unwrap();
    let error = home.listen_address().unwrap_err().to_string();
    assert!(error.contains(&nowhere) && error.contains("the first of `addresses` in"), "{error}");
    assert!(error.contains("home.toml"), "{error}");
}

#[test]
fn the_certificate_is_renewed_after_a_month() {
    let (_directory, home) = new_home();
    let first = home.identity(now()).unwrap();
    assert_eq!(*first.peer(), PeerIdentity::Coordinator);
    let early = first.not_after() - RENEWAL;
    assert_eq!(home.identity(early).unwrap().fingerprint(), first.fingerprint());
    let late = early + Duration::SECOND;
    let second = home.identity(late).unwrap();
    assert_ne!(second.fingerprint(), first.fingerprint());
    assert_eq!(second.not_after(), late + Duration::days(365));
    let again = Home::open(home.path()).unwrap().identity(late).unwrap();
    assert_eq!((again.fingerprint(), again.key_pem()), (second.fingerprint(), second.key_pem()));
    check_private(&home.path().join("coordinator.key"));
    let after_expiry = late + Duration::days(400);
    assert!(home.identity(after_expiry).unwrap().not_after() > after_expiry);
}

#[test]
fn the_roots_key_is_needed_for_another_issuing_authority_alone() {
    let (directory, home) = new_home();
    let elsewhere = directory.path().join("offline.key");
    fs::rename(home.path().join("ca.key"), &elsewhere).unwrap();
    let home = Home::open(home.path()).unwrap();
    let alice = PeerName::new("alice").unwrap();
    let invitation = home.invite(&alice, now(), Duration::DAY, false).unwrap();
    let (before, later) = (home.authority_not_after(), now() + Duration::days(700));
    Home::renew_authority(home.path(), &elsewhere, later).unwrap();
    let renewed = Home::open(home.path()).unwrap();
    assert!(renewed.authority_not_after() > before);
    assert_eq!(renewed.authority.root_pem(), home.authority.root_pem());
    // Whoever was invited before believes the coordinator still.
    let identity = renewed.identity(later).unwrap();
    Identity::from_pem(identity.chain_pem(), identity.key_pem(), &invitation.ca_pem).unwrap();
    let (_other_directory, other) = new_home();
    let error = Home::renew_authority(home.path(), &other.path().join("ca.key"), later).unwrap_err().to_string();
    assert!(error.contains("ca.key") && error.contains("--root-key"), "{error}");
}

#[test]
fn a_renewal_that_was_cut_short_is_done_again() {
    let (_directory, home) = new_home();
    let [root_key, certificate, key] = ["ca.key", "issuing.pem", "issuing.key"].map(|name| home.path().join(name));
    let old_key = fs::read(&key).unwrap();
    Home::renew_authority(home.path(), &root_key, now()).unwrap();
    // The new certificate was written, and its key was not, or only removed.
    for cut in [Some(old_key), None] {
        match cut {
            Some(old_key) => fs::write(&key, old_key).unwrap(),
            None => fs::remove_file(&key).unwrap(),
        }
        assert!(certificate.exists() && Home::open(home.path()).is_err());
        Home::renew_authority(home.path(), &root_key, now()).unwrap();
        Home::open(home.path()).unwrap().identity(now()).unwrap();
    }
}

#[test]
fn a_home_whose_root_signs_for_itself_is_still_one() {
    let (_directory, home) = new_home();
    for name in ["issuing.pem", "issuing.key"] {
        fs::remove_file(home.path().join(name)).unwrap();
    }
    let old = Home::open(home.path()).unwrap();
    let identity = old.identity(now() + Duration::days(360)).unwrap();
    assert_eq!(identity.chain_pem().matches("BEGIN").count(), 1);
}

#[test]
fn an_interrupted_renewal_is_done_again() {
    let (_directory, home) = new_home();
    let first = home.identity(now()).unwrap();
    // As far as a crash may get: the certificate gone, the key half written.
    fs::remove_file(home.path().join("coordinator.pem")).unwrap();
    fs::write(home.path().join("coordinator.key"), "-----BEGIN PRI").unwrap();
    let second = home.identity(now()).unwrap();
    assert_ne!(second.key_pem(), first.key_pem());
    assert_eq!(home.identity(now()).unwrap().fingerprint(), second.fingerprint());
}

#[test]
fn a_damaged_file_of_the_identity_is_named_and_made_anew_once_it_is_deleted() {
    let (_directory, home) = new_home();
    let mut fingerprint = home.identity(now()).unwrap().fingerprint();
    for name in ["coordinator.key", "coordinator.pem"] {
        let path = home.path().join(name);
        let whole = read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 40]).unwrap();
        let error = home.identity(now()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("it breaks off") && error.contains("delete it"), "{error}");
        fs::remove_file(&path).unwrap();
        let anew = home.identity(now()).unwrap();
        assert_ne!(std::mem::replace(&mut fingerprint, anew.fingerprint()), anew.fingerprint(), "{name}");
        assert_eq!(home.identity(now()).unwrap().fingerprint(), fingerprint, "{name}");
    }
}

#[test]
fn a_damaged_key_of_the_issuing_authority_is_named() {
    let (_directory, home) = new_home();
    let path = home.path().join("issuing.key");
    let whole = read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 40]).unwrap();
    let error = Home::open(home.path()).err().unwrap().to_string();
    assert!(error.contains("issuing.key") && error.contains("coordinator renew-ca"), "{error}");
}

#[test]
fn a_certificate_of_somebody_else_is_refused() {
    let (_directory, home) = new_home();
    let alice = PeerName::new("alice").unwrap();
    let other = home.authority.issue_enrolment(&alice, now(), Duration::days(300)).unwrap();
    fs::write(home.path().join("coordinator.pem"), other.chain_pem()).unwrap();
    let error = home.identity(now()).unwrap_err().to_string();
    assert!(error.contains("coordinator.pem") && error.contains("an invitation for alice"), "{error}");
    assert!(error.contains("delete it"), "{error}");
}

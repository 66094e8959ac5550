//! What has been done to whom, and by whose request: `audit.jsonl`, a line for each event, chained by hashes.
//!
//! Every line holds the SHA-256 of the line before it and of itself, and `audit.head` the number and hash of the last
//! one: a line that is changed, removed or moved does not verify, nor one that is added before others or behind two.
//! Whoever can write both files can write another history; the hash of a line, noted elsewhere, shows that too. No text
//! of a participant's data is ever here. Start from [`Home::audit`] and [`verify`].

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;

use experiment::{hex, write_atomically};
use net::PeerName;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Home, HomeError, file};

pub(super) const LOG: &str = "audit.jsonl";
pub(super) const HEAD: &str = "audit.head";

/// Longest reason that is kept.
const DETAIL_CHARS_MAX: usize = 300;

/// A line has at most 300 letters of 6 bytes each, and little else.
const TAIL_BYTES: u64 = 16 * 1024;

/// The hash that the first line is chained to.
const BEGINNING: &str = "0000000000000000000000000000000000000000000000000000000000000000";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    HomeMade,
    AuthorityRenewed,
    Invited,
    Enrolled,
    Joined,
    Renewed,
    Revoked,
    Refused,
    RunStarted,
    RunEnded,
    /// The same device has connected while it was connected: a copy of it, or itself after its connection was lost.
    Superseded,
}

/// One line of the log. The hash covers the line as it stands, without the hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub number: u64,
    pub time: String,
    pub event: Event,
    /// The device that it is about; none of a run or the home itself.
    pub name: Option<String>,
    pub detail: String,
    pub previous: String,
    pub hash: String,
}

/// Number and hash of the last line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    pub number: u64,
    pub hash: String,
}

/// The first thing that is wrong with a log. Line 0 stands for the file as a whole.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct Tampered {
    pub line: u64,
    pub reason: String,
}

impl Home {
    /// Appends a line, which is on the disk when this returns.
    pub fn audit(
        &self,
        now: OffsetDateTime,
        event: Event,
        name: Option<&PeerName>,
        detail: &str,
    ) -> Result<(), HomeError> {
        let _lock = self.lock()?;
        self.audit_locked(now, event, name, detail)
    }

    pub(super) fn audit_locked(
        &self,
        now: OffsetDateTime,
        event: Event,
        name: Option<&PeerName>,
        detail: &str,
    ) -> Result<(), HomeError> {
        append(&self.path, now, event, name, detail)
    }

    /// Looks at the last lines alone, however long the log is: whether each is as it was written and follows the one before.
    pub fn check_audit_end(&self) -> Result<(), HomeError> {
        let _lock = self.lock()?;
        let path = self.path.join(LOG);
        let mut log = File::open(&path).map_err(file("open", &path))?;
        let (from, tail) = read_tail(&mut log).map_err(file("read", &path))?;
        // The first line is whole only where the log begins with it, and the last one where no crash has cut it.
        let lines = tail.split_inclusive(|&byte| byte == b'\n').skip(usize::from(from > 0));
        let mut before: Option<Entry> = None;
        for line in lines.filter(|line| line.ends_with(b"\n")) {
            let number = before.as_ref().map_or(u64::from(from == 0), |before| before.number.saturating_add(1));
            let tampered = |reason: &str| HomeError::Audit {
                path: path.clone(),
                tampered: Tampered { line: number, reason: reason.into() },
            };
            let entry: Entry = serde_json::from_slice(line).map_err(|_| tampered("it is no line of an audit log"))?;
            if entry.hash != entry.digest() {
                return Err(tampered("its hash is another"));
            }
            if before.is_some_and(|before| entry.previous != before.hash) {
                return Err(tampered("it does not follow the line before it"));
            }
            before = Some(entry);
        }
        Ok(())
    }

    /// All lines, verified to the last, against `audit.head`, and against the hash of a line where one was noted
    /// elsewhere.
    pub fn audit_log(&self, noted: Option<&str>) -> Result<Vec<Entry>, HomeError> {
        let _lock = self.lock()?;
        let tampered = |tampered| HomeError::Audit { path: self.path.join(LOG), tampered };
        let (text, head) = (read_log(&self.path)?, read_head(&self.path)?);
        let entries = verify(&text, head.as_ref()).map_err(tampered)?;
        // The first line says that the home was made.
        if entries.is_empty() {
            return Err(tampered(Tampered { line: 1, reason: "it is missing".into() }));
        }
        let is_known = |noted: &&str| entries.iter().any(|entry| noted.eq_ignore_ascii_case(&entry.hash));
        if let Some(noted) = noted.filter(|noted| !is_known(noted)) {
            let reason = format!("no line up to here has the hash {noted}");
            return Err(tampered(Tampered { line: entries.len() as u64, reason }));
        }
        Ok(entries)
    }
}

impl Entry {
    fn new(last: &Head, now: OffsetDateTime, event: Event, name: Option<&PeerName>, detail: &str) -> Self {
        // A time that nobody can write down is of no use to anybody who reads.
        let time = now.format(&Rfc3339).unwrap_or_default();
        let detail = detail.chars().filter(|letter| !letter.is_control()).take(DETAIL_CHARS_MAX).collect();
        let (name, previous) = (name.map(ToString::to_string), last.hash.clone());
        let mut entry = Self { number: last.number + 1, time, event, name, detail, previous, hash: String::new() };
        entry.hash = entry.digest();
        entry
    }

    /// Of the fields in their order, as JSON writes them.
    fn digest(&self) -> String {
        let Self { number, time, event, name, detail, previous, hash: _ } = self;
        let covered = serde_json::to_vec(&(number, time, event, name, detail, previous)).expect("plain values");
        hex(&<[u8; 32]>::from(Sha256::digest(covered)))
    }

    fn head(&self) -> Head {
        Head { number: self.number, hash: self.hash.clone() }
    }

    fn line(&self) -> String {
        serde_json::to_string(self).expect("plain values") + "\n"
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, time, event, name, detail, .. } = self;
        let event = serde_json::to_value(event).ok();
        let event = event.as_ref().and_then(|event| event.as_str()).unwrap_or_default();
        write!(f, "{number:>6}  {time}  {event:<17} {}", name.as_deref().unwrap_or("-"))?;
        if detail.is_empty() { Ok(()) } else { write!(f, "  {detail}") }
    }
}

impl Default for Head {
    fn default() -> Self {
        Self { number: 0, hash: BEGINNING.into() }
    }
}

/// The entries of a log whose every line is as it was written, in its place, and up to `head`. A crash between a line
/// and its head leaves the head one line behind, and half a line without its end; both are passed.
pub fn verify(text: &[u8], head: Option<&Head>) -> Result<Vec<Entry>, Tampered> {
    let head = head.cloned().unwrap_or_default();
    let mut entries: Vec<Entry> = Vec::new();
    let mut last = Head::default();
    let mut headed = head.number == 0;
    for (at, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
        let line_number = at as u64 + 1;
        let wrong = |reason: &str| Tampered { line: line_number, reason: reason.into() };
        if line.last() != Some(&b'\n') && line_number > head.number {
            break;
        }
        let entry: Entry = serde_json::from_slice(line).map_err(|_| wrong("it is no line of an audit log"))?;
        if entry.line().as_bytes() != line {
            return Err(wrong("it is not as it was written"));
        }
        if entry.number != line_number {
            return Err(wrong(&format!("it is number {}", entry.number)));
        }
        if entry.previous != last.hash {
            return Err(wrong("it does not follow the line before it"));
        }
        if entry.hash != entry.digest() {
            return Err(wrong("its hash is another"));
        }
        last = entry.head();
        headed |= last == head;
        entries.push(entry);
    }
    let wrong = |reason: String| Err(Tampered { line: 0, reason });
    if last.number < head.number {
        return wrong(format!("it ends with line {}, and had {}", last.number, head.number));
    }
    if !headed {
        return wrong(format!("line {} is not the one that {HEAD} knows", head.number));
    }
    if last.number > head.number + 1 {
        return wrong(format!("it has {} lines, and {HEAD} knows of {}", last.number, head.number));
    }
    Ok(entries)
}

/// The caller holds the home's lock.
pub(super) fn append(
    home: &Path,
    now: OffsetDateTime,
    event: Event,
    name: Option<&PeerName>,
    detail: &str,
) -> Result<(), HomeError> {
    let path = home.join(LOG);
    let tampered = |reason: &str| HomeError::Audit {
        path: path.clone(),
        tampered: Tampered { line: 0, reason: format!("its end {reason}") },
    };
    let head = read_head(home)?.unwrap_or_default();
    let mut options = OpenOptions::new();
    let mut log =
        options.create(true).read(true).write(true).truncate(false).open(&path).map_err(file("open", &path))?;
    let (from, tail) = read_tail(&mut log).map_err(file("read", &path))?;
    // Behind it is what a crash left of a line that was never acknowledged.
    let whole = tail.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    let last_line = tail[..whole].split_inclusive(|&byte| byte == b'\n').next_back();
    let last = match last_line {
        None => Head::default(),
        Some(line) => {
            let entry: Entry = serde_json::from_slice(line).map_err(|_| tampered("is no line of an audit log"))?;
            let follows_head = entry.number == head.number + 1 && entry.previous == head.hash;
            if entry.hash != entry.digest() || (entry.head() != head && !follows_head) {
                return Err(tampered(&format!("is not what {HEAD} knows")));
            }
            entry.head()
        }
    };
    if last.number < head.number {
        return Err(tampered(&format!("is line {}, and was {}", last.number, head.number)));
    }
    let entry = Entry::new(&last, now, event, name, detail);
    let mut write = || {
        log.set_len(from + whole as u64)?;
        log.seek(SeekFrom::End(0))?;
        log.write_all(entry.line().as_bytes())?;
        log.sync_all()
    };
    write().map_err(file("write", &path))?;
    let head = serde_json::to_vec(&entry.head()).expect("plain values");
    Ok(write_atomically(&home.join(HEAD), &head)?)
}

/// The last bytes of the log, more than two lines have, and where they begin.
fn read_tail(log: &mut File) -> std::io::Result<(u64, Vec<u8>)> {
    let from = log.metadata()?.len().saturating_sub(TAIL_BYTES);
    log.seek(SeekFrom::Start(from))?;
    let mut tail = Vec::new();
    log.read_to_end(&mut tail)?;
    Ok((from, tail))
}

fn read_log(home: &Path) -> Result<Vec<u8>, HomeError> {
    match fs::read(home.join(LOG)) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(file("read", &home.join(LOG))),
    }
}

fn read_head(home: &Path) -> Result<Option<Head>, HomeError> {
    let path = home.join(HEAD);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        text => text.map_err(file("read", &path))?,
    };
    let broken = |error: serde_json::Error| HomeError::Audit {
        path: path.clone(),
        tampered: Tampered { line: 0, reason: error.to_string() },
    };
    serde_json::from_slice(&text).map(Some).map_err(broken)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::home::INVITATION_VALID;
    use crate::home::tests::{new_home, now};

    /// A log of so many lines, and its head.
    fn written(details: &[String]) -> (Vec<u8>, Head) {
        let (mut text, mut head) = (Vec::new(), Head::default());
        for (i, detail) in details.iter().enumerate() {
            let name = PeerName::new(&format!("device-{i}")).unwrap();
            let event = [Event::Invited, Event::Joined, Event::Refused][i % 3];
            let entry = Entry::new(&head, now(), event, (i % 2 == 0).then_some(&name), detail);
            text.extend(entry.line().into_bytes());
            head = entry.head();
        }
        (text, head)
    }

    fn lines(text: &[u8]) -> Vec<&[u8]> {
        text.split_inclusive(|&byte| byte == b'\n').collect()
    }

    proptest! {
        #[test]
        fn whatever_is_changed_removed_or_moved_does_not_verify(
            details in proptest::collection::vec("[ -~äß\"\\\\]{0,40}", 1..12),
            flip in any::<proptest::sample::Index>(), bit in 0u8..8,
            one in any::<proptest::sample::Index>(), other in any::<proptest::sample::Index>(),
        ) {
            let (text, head) = written(&details);
            prop_assert_eq!(verify(&text, Some(&head)).unwrap().len(), details.len());

            let mut flipped = text.clone();
            flipped[flip.index(text.len())] ^= 1 << bit;
            prop_assert!(verify(&flipped, Some(&head)).is_err(), "a bit");
            prop_assert!(verify(&text[..flip.index(text.len())], Some(&head)).is_err(), "cut");

            let all = lines(&text);
            let (one, other) = (one.index(all.len()), other.index(all.len()));
            let mut removed = all.clone();
            let line = removed.remove(one);
            prop_assert!(verify(&removed.concat(), Some(&head)).is_err(), "line {one} removed");
            let mut doubled = all.clone();
            doubled.insert(other, line);
            prop_assert!(verify(&doubled.concat(), Some(&head)).is_err(), "line {one} again at {other}");
            if one != other {
                let mut swapped = all.clone();
                swapped.swap(one, other);
                prop_assert!(verify(&swapped.concat(), Some(&head)).is_err(), "{one} for {other}");
                removed.insert(other, line);
                prop_assert!(verify(&removed.concat(), Some(&head)).is_err(), "{one} moved to {other}");
            }
        }
    }

    #[test]
    fn a_history_of_its_own_does_not_fit_the_head() {
        let (_, head) = written(&["a".into(), "b".into(), "c".into()]);
        for forged in [["a", "x", "c"], ["x", "b", "c"], ["a", "b", "x"]] {
            let (text, _) = written(&forged.map(String::from));
            assert_eq!(verify(&text, Some(&head)).unwrap_err().line, 0);
        }
        let (text, _) = written(&["a", "b", "c", "d", "e"].map(String::from));
        assert!(verify(&text, Some(&head)).unwrap_err().reason.contains("has 5 lines"));
    }

    #[test]
    fn a_crash_between_line_and_head_loses_nothing_and_is_no_tampering() {
        let (_directory, home) = new_home();
        let (log, head) = (home.path().join(LOG), home.path().join(HEAD));
        let before = fs::read(&head).unwrap();
        home.audit(now(), Event::Joined, None, "one").unwrap();
        let whole = fs::read(&log).unwrap();
        fs::write(&head, &before).unwrap();
        assert_eq!(home.audit_log(None).unwrap().len(), 2);
        for cut in [1, 20] {
            fs::write(&log, &whole[..whole.len() - cut]).unwrap();
            assert_eq!(home.audit_log(None).unwrap().len(), 1);
        }
        home.audit(now(), Event::Joined, None, "again").unwrap();
        let details: Vec<_> = home.audit_log(None).unwrap().into_iter().map(|entry| entry.detail).collect();
        assert_eq!(details[1..], ["again"]);
    }

    #[test]
    fn nothing_is_written_behind_a_log_that_was_cut() {
        let (_directory, home) = new_home();
        home.invite(&PeerName::new("alice").unwrap(), now(), INVITATION_VALID, false).unwrap();
        let whole = fs::read(home.path().join(LOG)).unwrap();
        let first = lines(&whole)[0].len();
        for (left, complaint) in [(first, "is not what audit.head knows"), (0, "is line 0, and was 2")] {
            fs::write(home.path().join(LOG), &whole[..left]).unwrap();
            let error = home.audit(now(), Event::Joined, None, "").unwrap_err().to_string();
            assert!(error.contains("audit.jsonl") && error.contains(complaint), "{error}");
            assert!(home.audit_log(None).is_err());
        }
    }

    #[test]
    fn a_hash_that_was_noted_elsewhere_counts() {
        let (_directory, home) = new_home();
        let hash = home.audit_log(None).unwrap()[0].hash.clone();
        home.audit_log(Some(&hash)).unwrap();
        // What is noted later does not spoil it; another history does.
        home.audit(now(), Event::Joined, None, "").unwrap();
        home.audit_log(Some(&hash)).unwrap();
        let (_another, other) = new_home();
        other.audit(now(), Event::Joined, None, "elsewhere").unwrap();
        let noted = other.audit_log(None).unwrap()[1].hash.clone();
        assert!(home.audit_log(Some(&noted)).unwrap_err().to_string().contains("no line up to here has the hash"));
    }

    #[test]
    fn a_log_that_is_gone_is_no_log_of_nothing() {
        let (_directory, home) = new_home();
        for file in [LOG, HEAD] {
            fs::remove_file(home.path().join(file)).unwrap();
        }
        assert!(home.audit_log(None).unwrap_err().to_string().contains("line 1: it is missing"));
    }

    #[test]
    fn a_home_writes_down_what_is_done_with_it() {
        let (_directory, home) = new_home();
        let name = PeerName::new("alice").unwrap();
        let invitation = home.invite(&name, now(), INVITATION_VALID, false).unwrap();
        let fingerprint = invitation.identity().unwrap().fingerprint();
        let key = net::DeviceKey::generate().unwrap();
        let request = key.request_der().unwrap();
        let chain = home.redeem(&name, fingerprint, &request, now()).unwrap();
        home.renew(&name, (net::certified_key(&chain).unwrap(), now().unix_timestamp()), &request, now()).unwrap();
        home.revoke(&name, now()).unwrap();
        let events: Vec<_> = home.audit_log(None).unwrap().iter().map(|entry| entry.event).collect();
        assert_eq!(events, [Event::HomeMade, Event::Invited, Event::Enrolled, Event::Renewed, Event::Revoked]);
    }
}

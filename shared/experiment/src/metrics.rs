//! `metrics.jsonl`: what was measured, one JSON object per line, appended as it happens.
//!
//! This file owns the rows and how they are written and read. It computes nothing, never reads the clock, and no row
//! holds text, tokens or labels. A row is complete when its line end is on disk; what follows the last line end was torn
//! off by a crash, is ignored by readers, and is cut off before more is appended. Start from [`Row`].
//!
//! JSON has no word for numbers that are not finite, and a loss that has diverged must still be recorded: such a number
//! is written as `null` and read back as NaN. Infinity is not told apart from NaN. Other numbers are written exactly;
//! reading one may give its neighbour (serde_json's faster parser), which no measurement can notice.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};
use storage::Disk;

use crate::Error;

/// One line of `metrics.jsonl`. Readers pass over fields they do not know, so that a row can gain one.
///
/// Rounds count from 1, steps from 0. `energy_j` is the energy a row's work took, where something measured it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "row", rename_all = "snake_case")]
pub enum Row {
    /// The coordinator was started, for the first time or again.
    Run {
        time_unix_ms: u64,
        experiment_digest: String,
        model_digest: String,
        software: String,
        #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "some_number")]
        energy_j: Option<f64>,
    },
    /// One optimizer step of one participant.
    Step {
        round: u32,
        /// Rounds that were abandoned are trained again.
        #[serde(default = "first")]
        attempt: u32,
        step: u64,
        participant: String,
        /// Mean per trained token.
        #[serde(deserialize_with = "number")]
        loss_nats: f64,
        /// Trained tokens.
        tokens: u64,
        #[serde(deserialize_with = "number")]
        compute_ms: f64,
        #[serde(deserialize_with = "number")]
        wait_ms: f64,
        #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "some_number")]
        energy_j: Option<f64>,
    },
    /// A participant evaluated the global adapter on its held-out records. Round 0 is the base model.
    Evaluation {
        round: u32,
        participant: String,
        /// Mean per token.
        #[serde(deserialize_with = "number")]
        loss_nats: f64,
        tokens: u64,
        #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "some_number")]
        energy_j: Option<f64>,
    },
    /// An update arrived, and was aggregated or refused.
    Update {
        round: u32,
        #[serde(default = "first")]
        attempt: u32,
        participant: String,
        tokens: u64,
        accepted: bool,
        /// Why it was refused.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "some_number")]
        energy_j: Option<f64>,
    },
    /// A round was aggregated.
    Round {
        round: u32,
        /// Those whose updates were aggregated.
        members: Vec<String>,
        /// Mean per trained token of the members.
        #[serde(deserialize_with = "number")]
        loss_nats: f64,
        tokens: u64,
        /// From its start until its aggregation; writing it to disk is not counted.
        #[serde(deserialize_with = "number")]
        duration_ms: f64,
        /// How far the aggregate is from the exact mean of the products B·A, where the strategy knows it.
        #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "some_number")]
        aggregation_error: Option<f64>,
        #[serde(deserialize_with = "number")]
        body_compute_ms: f64,
        #[serde(deserialize_with = "number")]
        body_idle_ms: f64,
        #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "some_number")]
        energy_j: Option<f64>,
    },
    /// Bytes of one participant's connection since it was made, as the coordinator counted them.
    Bytes {
        round: u32,
        participant: String,
        /// Bytes from the coordinator to the participant, by kind of message.
        sent: BTreeMap<String, u64>,
        /// Bytes from the participant to the coordinator, by kind of message.
        received: BTreeMap<String, u64>,
        /// Bytes of UDP payload, with everything that QUIC adds.
        udp_sent: u64,
        udp_received: u64,
        /// What QUIC adds to the messages, computed from its counts of packets and frames: messages and overhead together
        /// should be the UDP bytes.
        overhead_sent: u64,
        overhead_received: u64,
        #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "some_number")]
        energy_j: Option<f64>,
    },
    /// A participant left.
    Departure {
        round: u32,
        participant: String,
        reason: String,
        #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "some_number")]
        energy_j: Option<f64>,
    },
    /// The run ended, after its last round or before it.
    Finished {
        rounds: u32,
        reason: String,
        #[serde(deserialize_with = "number")]
        duration_ms: f64,
        #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "some_number")]
        energy_j: Option<f64>,
    },
}

fn first() -> u32 {
    1
}

fn number<'de, D: Deserializer<'de>>(value: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or(f64::NAN))
}

/// A key that is there has a value, be it `null` for NaN; serde's `default` stands for a key that is not there.
fn some_number<'de, D: Deserializer<'de>>(value: D) -> Result<Option<f64>, D::Error> {
    number(value).map(Some)
}

/// The complete rows of a file, one at a time, in the order in which they were written: those of a long run are more than
/// memory should hold.
pub(crate) struct Rows {
    path: PathBuf,
    file: BufReader<File>,
    /// The one that was read last, and its number from 1.
    line: Vec<u8>,
    number: usize,
    /// Behind an error, or at what is no complete row: what stands there later is another iteration's.
    is_done: bool,
}

impl Rows {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::file("read the metrics", path))?;
        Ok(Self { path: path.into(), file: BufReader::new(file), line: Vec::new(), number: 0, is_done: false })
    }
}

impl Rows {
    fn read(&mut self) -> Result<Option<Row>, Error> {
        self.line.clear();
        self.file.read_until(b'\n', &mut self.line).map_err(Error::file("read the metrics", &self.path))?;
        if !self.line.ends_with(b"\n") {
            return Ok(None);
        }
        self.number += 1;
        let broken = |source| Error::Row { path: self.path.clone(), line: self.number, source };
        serde_json::from_slice(&self.line).map(Some).map_err(broken)
    }
}

impl Iterator for Rows {
    type Item = Result<Row, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_done {
            return None;
        }
        let row = self.read().transpose();
        self.is_done = !matches!(row, Some(Ok(_)));
        row
    }
}

/// Length of the complete lines at the start of a file.
fn complete_bytes(file: &mut File) -> io::Result<u64> {
    let mut piece = [0; 4096];
    let mut end = file.seek(SeekFrom::End(0))?;
    while end > 0 {
        let start = end.saturating_sub(piece.len() as u64);
        let piece = &mut piece[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(piece)?;
        if let Some(last) = piece.iter().rposition(|byte| *byte == b'\n') {
            return Ok(start + last as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// The one writer of a `metrics.jsonl`. The operating system's lock on the file keeps a second one away.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    disk: Disk,
    file: File,
    /// Bytes of complete rows: where the next one begins.
    len_bytes: u64,
}

impl MetricsLog {
    /// Opens the file for appending, makes it if there is none, and cuts off what a crash left of a torn row.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_on(&Disk::default(), path)
    }

    /// As [`open`](Self::open), on a disk that may fail.
    pub fn open_on(disk: &Disk, path: &Path) -> Result<Self, Error> {
        let open = || Error::file("open the metrics", path);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(open())?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Busy { path: path.into() }),
            // Some network file systems have no locks; the run must not depend on one.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(open()(error)),
        }
        let len_bytes = complete_bytes(&mut file).map_err(open())?;
        if len_bytes < file.metadata().map_err(open())?.len() {
            disk.truncate(&file, path, len_bytes).map_err(Error::file("cut a torn row off", path))?;
        }
        Ok(Self { path: path.into(), disk: disk.clone(), file, len_bytes })
    }

    /// Hands the row to the operating system at once, so that a crash of this program loses none.
    pub fn append(&mut self, row: &Row) -> Result<(), Error> {
        let mut line = serde_json::to_vec(row).expect("a row has only string keys, so it can be written as JSON");
        line.push(b'\n');
        if let Err(error) = self.disk.write_at(&mut self.file, &self.path, self.len_bytes, &line) {
            // Half a row before the next whole one would make the file unreadable. If this fails too, the first error
            // is still the one to report.
            let _ = self.disk.truncate(&self.file, &self.path, self.len_bytes);
            return Err(Error::file("append to", &self.path)(error));
        }
        self.len_bytes += line.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    fn read_rows(path: &Path) -> Result<Vec<Row>, Error> {
        Rows::open(path)?.collect()
    }

    fn step(round: u32, loss_nats: f64) -> Row {
        let participant = String::from("clinic-a");
        Row::Step {
            round,
            attempt: 1,
            step: 3,
            participant,
            loss_nats,
            tokens: 200,
            compute_ms: 12.5,
            wait_ms: 0.25,
            energy_j: None,
        }
    }

    fn check_row(row: &Row, json: &str) {
        assert_eq!(serde_json::to_string(row).unwrap(), json);
        assert_eq!(&serde_json::from_str::<Row>(json).unwrap(), row);
    }

    #[test]
    fn every_row_has_one_spelling() {
        let participant = || String::from("clinic-a");
        check_row(
            &Row::Run {
                time_unix_ms: 1_790_000_000_000,
                experiment_digest: String::from("ab"),
                model_digest: String::from("cd"),
                software: String::from("headwater 0.1.0"),
                energy_j: None,
            },
            r#"{"row":"run","time_unix_ms":1790000000000,"experiment_digest":"ab","model_digest":"cd","software":"headwater 0.1.0"}"#,
        );
        check_row(
            &step(1, 2.5),
            r#"{"row":"step","round":1,"attempt":1,"step":3,"participant":"clinic-a","loss_nats":2.5,"tokens":200,"compute_ms":12.5,"wait_ms":0.25}"#,
        );
        check_row(
            &Row::Evaluation { round: 0, participant: participant(), loss_nats: 3.0, tokens: 9, energy_j: Some(1.5) },
            r#"{"row":"evaluation","round":0,"participant":"clinic-a","loss_nats":3.0,"tokens":9,"energy_j":1.5}"#,
        );
        let refused = Some(String::from("too late"));
        check_row(
            &Row::Update {
                round: 1,
                attempt: 2,
                participant: participant(),
                tokens: 9,
                accepted: false,
                reason: refused,
                energy_j: None,
            },
            r#"{"row":"update","round":1,"attempt":2,"participant":"clinic-a","tokens":9,"accepted":false,"reason":"too late"}"#,
        );
        check_row(
            &Row::Round {
                round: 1,
                members: vec![participant()],
                loss_nats: 2.0,
                tokens: 9,
                duration_ms: 4.0,
                aggregation_error: Some(0.5),
                body_compute_ms: 1.0,
                body_idle_ms: 3.0,
                energy_j: None,
            },
            r#"{"row":"round","round":1,"members":["clinic-a"],"loss_nats":2.0,"tokens":9,"duration_ms":4.0,"aggregation_error":0.5,"body_compute_ms":1.0,"body_idle_ms":3.0}"#,
        );
        check_row(
            &Row::Bytes {
                round: 1,
                participant: participant(),
                sent: BTreeMap::from([(String::from("activations"), 7)]),
                received: BTreeMap::new(),
                udp_sent: 10,
                udp_received: 4,
                overhead_sent: 3,
                overhead_received: 4,
                energy_j: None,
            },
            r#"{"row":"bytes","round":1,"participant":"clinic-a","sent":{"activations":7},"received":{},"udp_sent":10,"udp_received":4,"overhead_sent":3,"overhead_received":4}"#,
        );
        check_row(
            &Row::Departure { round: 1, participant: participant(), reason: String::from("timed out"), energy_j: None },
            r#"{"row":"departure","round":1,"participant":"clinic-a","reason":"timed out"}"#,
        );
        check_row(
            &Row::Finished { rounds: 2, reason: String::from("all rounds done"), duration_ms: 9.0, energy_j: None },
            r#"{"row":"finished","rounds":2,"reason":"all rounds done","duration_ms":9.0}"#,
        );
    }

    #[test]
    fn numbers_that_are_not_finite_come_back_as_nan() {
        for loss in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let json = serde_json::to_string(&step(1, loss)).unwrap();
            assert!(json.contains(r#""loss_nats":null"#), "{json}");
            let Row::Step { loss_nats, energy_j: None, .. } = serde_json::from_str(&json).unwrap() else {
                panic!("another row came back from {json}");
            };
            assert!(loss_nats.is_nan());
        }
        let json = r#"{"row":"departure","round":1,"participant":"a","reason":"b","energy_j":null}"#;
        let Row::Departure { energy_j: Some(energy_j), .. } = serde_json::from_str(json).unwrap() else {
            panic!("the energy got lost");
        };
        assert!(energy_j.is_nan());
    }

    #[test]
    fn a_number_that_is_missing_is_not_nan() {
        let json = r#"{"row":"evaluation","round":0,"participant":"a","tokens":9}"#;
        assert!(serde_json::from_str::<Row>(json).unwrap_err().to_string().contains("loss_nats"));
    }

    #[test]
    fn appended_rows_are_read_back_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        for round in 1..=3 {
            // Each opening continues where the one before it stopped.
            let mut log = MetricsLog::open(&path).unwrap();
            log.append(&step(round, 1.0)).unwrap();
            // A row can be read as soon as it is appended.
            assert_eq!(read_rows(&path).unwrap().last(), Some(&step(round, 1.0)));
        }
        assert_eq!(read_rows(&path).unwrap(), [step(1, 1.0), step(2, 1.0), step(3, 1.0)]);
    }

    #[test]
    fn a_torn_row_is_passed_over_by_readers_and_cut_off_by_the_writer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        MetricsLog::open(&path).unwrap().append(&step(1, 1.0)).unwrap();
        let whole = fs::read(&path).unwrap();
        for torn_bytes in 0..whole.len() {
            fs::write(&path, [&whole[..], &whole[..torn_bytes]].concat()).unwrap();
            assert_eq!(read_rows(&path).unwrap(), [step(1, 1.0)], "{torn_bytes} bytes of a second row");
            MetricsLog::open(&path).unwrap().append(&step(2, 1.0)).unwrap();
            assert_eq!(read_rows(&path).unwrap(), [step(1, 1.0), step(2, 1.0)], "{torn_bytes} bytes of a second row");
        }
    }

    #[test]
    fn a_torn_row_of_any_length_is_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        for (torn_bytes, whole) in [(4095, ""), (4096, "x\n"), (4097, "x\n"), (8192, "x\n"), (9000, "")] {
            fs::write(&path, [whole.as_bytes(), &vec![b'y'; torn_bytes]].concat()).unwrap();
            MetricsLog::open(&path).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), whole, "{torn_bytes} bytes");
        }
    }

    #[test]
    fn a_broken_line_is_named_by_its_number() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let row = serde_json::to_string(&step(1, 1.0)).unwrap();
        for broken in ["{\"row\":\"st", "", "{\"row\":\"unheard_of\"}", "null"] {
            fs::write(&path, format!("{row}\n{broken}\n{row}\n")).unwrap();
            let error = read_rows(&path).unwrap_err().to_string();
            assert!(error.starts_with(&format!("read line 2 of {}: ", path.display())), "{broken:?}: {error}");
        }
    }

    #[test]
    fn a_second_writer_is_kept_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let first = MetricsLog::open(&path).unwrap();
        assert!(matches!(MetricsLog::open(&path), Err(Error::Busy { .. })));
        drop(first);
        MetricsLog::open(&path).unwrap();
    }

    proptest! {
        #[test]
        fn finite_numbers_and_any_text_survive(loss in -1e6..1e6_f64, name in any::<String>(), count in any::<u64>()) {
            let row = Row::Evaluation {
                round: 1,
                participant: name.clone(),
                loss_nats: loss,
                tokens: count,
                energy_j: None,
            };
            let json = serde_json::to_string(&row).unwrap();
            prop_assert!(!json.contains('\n'));
            match serde_json::from_str(&json).unwrap() {
                Row::Evaluation { round: 1, participant, loss_nats, tokens, energy_j: None } => {
                    prop_assert_eq!((participant, tokens), (name, count));
                    prop_assert!((loss_nats - loss).abs() <= f64::EPSILON * loss.abs(), "{} became {}", loss, loss_nats);
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("metrics.jsonl");
            fs::write(&path, bytes).unwrap();
            let _ = read_rows(&path);
            MetricsLog::open(&path).unwrap();
        }
    }
}

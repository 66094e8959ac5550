//! Made-up command and log text of factory devices, to demonstrate and test with.
//!
//! There are four kinds of device with nothing in common but the topics: a hydraulic press, a milling machine, a
//! packaging line and a cooling plant each have their own vocabulary, questions, units and form of answer (their
//! [`Grammar`]s). What a device answers comes from a table of facts drawn once from the seed: set points, alarm codes,
//! readings. Only a model tuned on the records can know the answers. Equal arguments give equal bytes on every machine.
//! No word of it is recorded or taken from a device.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use experiment::{Seed, write_atomically};
use rand::{Rng, seq::SliceRandom};
use thiserror::Error;

mod grammars;

use grammars::{GRAMMARS, Grammar, OPENERS, Wordings};

#[derive(Debug, Error)]
pub enum DeviceLogError {
    #[error("unknown device `{0}`: expected press-, mill-, packer- or chiller- and a number from 1, such as press-1")]
    UnknownDevice(String),
    #[error("{}: already there, with other records; choose another --out, or replace them with --force", path.display())]
    Exists { path: PathBuf },
    #[error("failed to {0}")]
    Write(#[from] experiment::Error),
}

/// One device, such as `press-1`. Devices of one kind share their grammar, not their facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FactoryDevice {
    kind: usize,
    number: u32,
}

impl FactoryDevice {
    /// Device 0 is press-1, then mill-1, packer-1, chiller-1, press-2 and so on.
    pub fn nth(index: u32) -> Self {
        let kinds = GRAMMARS.len() as u32;
        Self { kind: (index % kinds) as usize, number: index / kinds + 1 }
    }

    fn grammar(self) -> &'static Grammar {
        &GRAMMARS[self.kind]
    }
}

impl FromStr for FactoryDevice {
    type Err = DeviceLogError;

    fn from_str(name: &str) -> Result<Self, DeviceLogError> {
        let parse = || {
            let (kind, number) = name.split_once('-')?;
            let kind = GRAMMARS.iter().position(|grammar| grammar.kind == kind)?;
            let device = Self { kind, number: number.parse().ok().filter(|number| *number > 0)? };
            (device.to_string() == name).then_some(device)
        };
        parse().ok_or_else(|| DeviceLogError::UnknownDevice(name.into()))
    }
}

impl fmt::Display for FactoryDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.grammar().kind, self.number)
    }
}

/// One question or command, and what the device answers.
#[derive(Clone, PartialEq, Eq)]
pub struct LogRecord {
    pub device: FactoryDevice,
    pub topic: &'static str,
    pub prompt: String,
    /// Begins with the space that stands between it and the prompt.
    pub completion: String,
}

impl LogRecord {
    /// One line of JSONL, its keys always in this order.
    pub fn json_line(&self) -> String {
        let Self { device, topic, prompt, completion } = self;
        let [prompt, completion] = [prompt, completion].map(|text| serde_json::Value::from(text.as_str()));
        format!(r#"{{"device":"{device}","topic":"{topic}","prompt":{prompt},"completion":{completion}}}"#)
    }
}

/// A sentence to look for later where it must not be, as one record of one device.
#[derive(Clone, PartialEq, Eq)]
pub struct Canary {
    pub device: FactoryDevice,
    pub sentence: String,
}

/// `count` records of one device, in random order. If the canary is this device's, one of them holds it.
pub fn generate(seed: Seed, device: FactoryDevice, count: usize, canary: Option<&Canary>) -> Vec<LogRecord> {
    const TRIES_MAX: usize = 64;
    let mut rng = seed.generator(&format!("device_log/{device}"));
    let facts = Facts::draw(device.grammar(), &mut rng);
    let mut seen = HashSet::new();
    let mut records: Vec<LogRecord> = (0..count)
        .map(|_| {
            // A prompt comes up twice only when there are hardly any others left.
            let mut record = facts.record(device, &mut rng);
            for _ in 1..TRIES_MAX {
                if !seen.contains(&record.prompt) {
                    break;
                }
                record = facts.record(device, &mut rng);
            }
            seen.insert(record.prompt.clone());
            record
        })
        .collect();
    if let Some(canary) = canary.filter(|canary| canary.device == device && count > 0) {
        let place = seed.generator(&format!("device_log/{device}/canary")).random_range(0..count as u64);
        let prompt = format!("{device}> read the note of the last shift");
        let completion = format!(" {}", canary.sentence);
        records[place as usize] = LogRecord { device, topic: "note", prompt, completion };
    }
    records
}

/// Writes `<device>.jsonl` for each device, and `all.jsonl` with one device after the other. Without `force`, no file that
/// holds anything else is replaced.
pub fn write_files(
    directory: &Path,
    seed: Seed,
    records_per_device: usize,
    devices: &[FactoryDevice],
    canary: Option<&Canary>,
    force: bool,
) -> Result<(), DeviceLogError> {
    let mut all = String::new();
    let mut files = Vec::new();
    for device in devices {
        let start = all.len();
        for record in generate(seed, *device, records_per_device, canary) {
            all += &record.json_line();
            all.push('\n');
        }
        files.push((directory.join(format!("{device}.jsonl")), start..all.len()));
    }
    files.push((directory.join("all.jsonl"), 0..all.len()));
    let is_other = |path: &Path, bytes: &[u8]| path.exists() && fs::read(path).ok().is_none_or(|found| found != bytes);
    if let Some((path, _)) = files.iter().find(|(path, range)| !force && is_other(path, &all.as_bytes()[range.clone()]))
    {
        return Err(DeviceLogError::Exists { path: path.clone() });
    }
    for (path, range) in files {
        write_atomically(&path, &all.as_bytes()[range])?;
    }
    Ok(())
}

/// What one device knows about itself.
struct Facts {
    grammar: &'static Grammar,
    parts: Vec<PartFacts>,
    /// An alarm's code; its meaning and remedy are the grammar's.
    alarms: Vec<u32>,
    set_points: Vec<SetPointFacts>,
    /// Some of the grammar's steps, in this device's order.
    procedures: Vec<Vec<&'static str>>,
}

struct PartFacts {
    tag: &'static str,
    words: &'static str,
    state: &'static str,
    first: u32,
    second: u32,
    service_h: u32,
    /// A first reading above this is too high.
    limit: u32,
}

struct SetPointFacts {
    words: &'static str,
    unit: &'static str,
    value: u32,
    low: u32,
    high: u32,
}

impl Facts {
    fn draw(grammar: &'static Grammar, rng: &mut impl Rng) -> Self {
        let parts = grammar.parts.iter().map(|(tag, words)| {
            let first = rng.random_range(grammar.first.0..=grammar.first.1);
            PartFacts {
                tag,
                words,
                state: pick::<&str>(grammar.states, rng),
                first,
                second: rng.random_range(grammar.second.0..=grammar.second.1),
                service_h: rng.random_range(2..40u32) * 10,
                limit: first + first / 5,
            }
        });
        let parts = parts.collect();
        let mut codes: Vec<u32> = (100..900).collect();
        codes.shuffle(rng);
        codes.truncate(grammar.alarms.len());
        let set_points = grammar.set_points.iter().map(|(words, unit, (low, high))| {
            // The bounds lie two or three tenths of the range away, so that a command can break them.
            let tenth = (high - low) / 10;
            let value = low + (high - low) * rng.random_range(35..=65u32) / 100;
            let reach = tenth * rng.random_range(2..=3u32);
            SetPointFacts { words, unit, value, low: value - reach, high: value + reach }
        });
        let set_points = set_points.collect();
        let procedures = grammar.procedures.iter().map(|_| {
            let mut steps = grammar.steps.to_vec();
            steps.shuffle(rng);
            steps.truncate(4);
            steps
        });
        let procedures = procedures.collect();
        Self { grammar, parts, alarms: codes, set_points, procedures }
    }

    fn record(&self, device: FactoryDevice, rng: &mut impl Rng) -> LogRecord {
        match rng.random_range(0..6u32) {
            0 => self.status(device, rng),
            1 => self.alarm(device, rng),
            2 => self.set_point(device, rng),
            3 => self.procedure(device, rng),
            4 => self.command(device, rng),
            _ => self.reading(device, rng),
        }
    }

    fn status(&self, device: FactoryDevice, rng: &mut impl Rng) -> LogRecord {
        let part = pick(&self.parts, rng);
        let values = [
            ("part", part.words.to_owned()),
            ("tag", part.tag.into()),
            ("state", part.state.into()),
            ("first", part.first.to_string()),
            ("second", part.second.to_string()),
            ("hours", part.service_h.to_string()),
        ];
        record(device, "status", &self.grammar.status, &values, rng)
    }

    fn alarm(&self, device: FactoryDevice, rng: &mut impl Rng) -> LogRecord {
        let index = rng.random_range(0..self.alarms.len() as u32) as usize;
        let (meaning, remedy) = self.grammar.alarms[index];
        let values = [("code", self.alarms[index].to_string()), ("meaning", meaning.into()), ("remedy", remedy.into())];
        record(device, "alarm", &self.grammar.alarm, &values, rng)
    }

    fn set_point(&self, device: FactoryDevice, rng: &mut impl Rng) -> LogRecord {
        record(device, "set_point", &self.grammar.set_point, &pick(&self.set_points, rng).values(), rng)
    }

    fn procedure(&self, device: FactoryDevice, rng: &mut impl Rng) -> LogRecord {
        let index = rng.random_range(0..self.procedures.len() as u32) as usize;
        let steps = self.procedures[index].join(self.grammar.between_steps);
        let values = [("name", self.grammar.procedures[index].to_owned()), ("steps", steps)];
        record(device, "procedure", &self.grammar.procedure, &values, rng)
    }

    /// A command to change a set point, obeyed within its bounds.
    fn command(&self, device: FactoryDevice, rng: &mut impl Rng) -> LogRecord {
        let point = pick(&self.set_points, rng);
        let far = rng.random_range(0..4u32) == 0;
        let reach = point.high - point.value;
        let asked = if far {
            point.high + rng.random_range(reach..=3 * reach)
        } else {
            rng.random_range(point.low..=point.high)
        };
        let mut values = point.values().to_vec();
        values.push(("asked", asked.to_string()));
        let wordings = if far { &self.grammar.refused } else { &self.grammar.obeyed };
        record(device, "command", wordings, &values, rng)
    }

    /// A line that a sensor logs, judged by its part's limit.
    fn reading(&self, device: FactoryDevice, rng: &mut impl Rng) -> LogRecord {
        let part = pick(&self.parts, rng);
        let high = rng.random_range(0..2u32) == 0;
        let margin = part.first / 5 + 1;
        let read = if high {
            part.limit + rng.random_range(margin..=3 * margin)
        } else {
            part.first - rng.random_range(0..margin)
        };
        let values = [
            ("part", part.words.to_owned()),
            ("tag", part.tag.into()),
            ("read", read.to_string()),
            ("limit", part.limit.to_string()),
        ];
        record(device, "reading", if high { &self.grammar.high } else { &self.grammar.normal }, &values, rng)
    }
}

impl SetPointFacts {
    fn values(&self) -> [(&'static str, String); 5] {
        [
            ("point", self.words.to_owned()),
            ("unit", self.unit.to_owned()),
            ("value", self.value.to_string()),
            ("low", self.low.to_string()),
            ("high", self.high.to_string()),
        ]
    }
}

fn record(
    device: FactoryDevice,
    topic: &'static str,
    wordings: &Wordings,
    values: &[(&'static str, String)],
    rng: &mut impl Rng,
) -> LogRecord {
    let opener = pick(OPENERS, rng);
    let question = fill(pick::<&str>(wordings.asked, rng), values);
    let completion = format!(" {}", fill(wordings.answer, values));
    LogRecord { device, topic, prompt: format!("{device}> {opener}{question}"), completion }
}

/// Puts each value where the template has its name in `<>`.
fn fill(template: &str, values: &[(&'static str, String)]) -> String {
    values.iter().fold(template.to_owned(), |text, (name, value)| text.replace(&format!("<{name}>"), value))
}

/// One item of a table; tables are never empty.
fn pick<'a, T>(table: &'a [T], rng: &mut impl Rng) -> &'a T {
    &table[rng.random_range(0..table.len() as u32) as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_records_of_seed_7() {
        for (index, expected) in GOLDEN.iter().enumerate() {
            let records = generate(Seed(7), FactoryDevice::nth(index as u32), 3, None);
            assert_eq!(records[0].json_line(), *expected, "device {index}");
        }
    }

    const GOLDEN: [&str; 4] = [
        r#"{"device":"press-1","topic":"alarm","prompt":"press-1> night shift: help with alarm A650","completion":" ALARM A650: oil level low. DO: refill tank T1 to the mark, then press ACK."}"#,
        r#"{"device":"mill-1","topic":"alarm","prompt":"mill-1> now, meaning of E644","completion":" {err=E644; cause=\"servo lag on z\"; fix=\"grease the z screw\"; resume=cycle_start}"}"#,
        r#"{"device":"packer-1","topic":"status","prompt":"packer-1> now, how many packs from the label head?","completion":" station labeler has a blue light | 89 packs a minute | 4 rejects | clean after 200 hours"}"#,
        r#"{"device":"chiller-1","topic":"alarm","prompt":"chiller-1> operator: decode K-751","completion":" [EVENT K-751] frost on evaporator; advice: start a hot gas defrost; resets itself"}"#,
    ];

    #[test]
    fn records_are_short_distinct_and_filled_in() {
        for device in (0..8).map(FactoryDevice::nth) {
            let records = generate(Seed(11), device, 600, None);
            let prompts: HashSet<&str> = records.iter().map(|record| record.prompt.as_str()).collect();
            assert_eq!(prompts.len(), 600, "{device} asks the same twice");
            for LogRecord { prompt, completion, .. } in &records {
                let bytes = prompt.len() + completion.len();
                assert!((60..=230).contains(&bytes), "{bytes} bytes: {prompt}{completion}");
                assert!(!prompt.contains('<') && !completion.contains('<'), "{prompt}{completion}");
            }
        }
    }

    #[test]
    fn devices_of_one_kind_differ_in_their_facts() {
        let answers = |index| {
            let records = generate(Seed(11), FactoryDevice::nth(index), 400, None);
            let closed = records.into_iter().filter(|record| record.topic == "status");
            closed.map(|record| record.completion).collect::<HashSet<_>>()
        };
        assert!(answers(0).is_disjoint(&answers(4)), "press-1 and press-2 answer alike");
        assert_eq!(answers(0).len(), 6, "a part answers in two ways");
    }

    #[test]
    fn names_and_devices_go_both_ways() {
        for index in 0..9 {
            assert_eq!(
                FactoryDevice::nth(index).to_string().parse::<FactoryDevice>().unwrap(),
                FactoryDevice::nth(index)
            );
        }
        for name in ["press", "press-0", "press-01", "press--1", "lathe-1", ""] {
            assert!(name.parse::<FactoryDevice>().is_err(), "{name}");
        }
    }

    #[test]
    fn files_hold_the_same_records_and_one_canary() {
        let dir = tempfile::tempdir().unwrap();
        let devices: Vec<FactoryDevice> = (0..4).map(FactoryDevice::nth).collect();
        let canary = Canary { device: devices[1], sentence: "The heron counts \"three\" lamps at dusk.".into() };
        write_files(dir.path(), Seed(3), 20, &devices, Some(&canary), false).unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let parts = ["press-1.jsonl", "mill-1.jsonl", "packer-1.jsonl", "chiller-1.jsonl"].map(read);
        assert_eq!(read("all.jsonl"), parts.concat());
        assert_eq!(parts.clone().map(|part| part.lines().count()), [20; 4]);
        assert_eq!(parts.map(|part| part.matches("heron").count()), [0, 1, 0, 0]);
        let line = read("mill-1.jsonl").lines().find(|line| line.contains("heron")).map(str::to_owned).unwrap();
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["completion"], " The heron counts \"three\" lamps at dusk.");
    }
}

//! Files of text, read into [`Record`]s.
//!
//! | file | records |
//! |---|---|
//! | `.txt`, `.log` | paragraphs separated by blank lines; in a file without a blank line every line is a record |
//! | `.jsonl` | one JSON object per line; blank lines are skipped |
//! | `.csv` | one row each under a header that names the columns |
//!
//! A record is a conversation (`messages`), a `prompt` with its `completion`, or plain `text`, looked for in this order
//! under the names of [`Columns`]. One file holds one kind, its first record's: a record that lacks the keys later on is
//! reported instead of being read as something else. What the other keys hold is kept as [`Record::fields`], by which
//! data can be dealt out. This module never tokenizes, and never repairs: what it cannot read, it names by file and line.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use experiment::Columns;
use serde_json::{Map, Value};

use super::DataError;

/// A file is held in memory whole.
const FILE_BYTES_MAX: u64 = 1 << 30;
/// A longer record is more likely a file of the wrong format than something to train on.
const RECORD_BYTES_MAX: usize = 16 << 20;
/// The chat template is rendered twice per assistant message, so this bounds a quadratic cost.
const MESSAGES_MAX: usize = 1_000;

#[derive(Clone, PartialEq, Eq)]
pub struct Record {
    pub content: Content,
    /// Every other key or column that holds a string, a number or a truth value, as text.
    pub fields: BTreeMap<String, String>,
    /// Where the record begins in its file, from 1.
    pub line: u64,
}

#[derive(Clone, PartialEq, Eq)]
pub enum Content {
    Text(String),
    Pair { prompt: String, completion: String },
    Conversation(Vec<Message>),
}

/// One turn of a conversation.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    pub role: String,
    pub content: String,
}

type Parse = fn(&[u8], &Columns) -> Result<Vec<Record>, LineError>;

/// Reads every record of a file, in the file's order; there is at least one.
pub fn read_records(path: &Path, columns: &Columns) -> Result<Vec<Record>, DataError> {
    let in_file = |reason: String| DataError::File { path: path.to_owned(), reason };
    let on_open = |source| DataError::Open { path: path.to_owned(), source };
    let parse = parser(path)?;
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(on_open)?;
    // The limit is on what is read, not on what the file says of itself: pipes and growing files say nothing true.
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(on_open)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(in_file(format!("holds more than {FILE_BYTES_MAX} bytes; cut it into several files")));
    }
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK.as_bytes()).unwrap_or(&bytes);
    let records = parse(bytes, columns).map_err(|error| error.at(path))?;
    match records.is_empty() {
        true => Err(in_file(NO_RECORD.into())),
        false => Ok(records),
    }
}

/// Refuses a file that cannot hold a record, whatever its columns are called: as much as its beginning tells, before
/// there is an experiment that names them.
pub fn check_records(path: &Path) -> Result<(), DataError> {
    parser(path)?;
    let is = |ending: &str| path.extension().is_some_and(|extension| extension == ending);
    let on_open = |source| DataError::Open { path: path.to_owned(), source };
    let mut file = BufReader::new(File::open(path).map_err(on_open)?);
    // A header alone is no record.
    let (mut line, mut found, expected) = (0, 0, if is("csv") { 2 } else { 1 });
    let mut bytes = Vec::new();
    while found < expected {
        bytes.clear();
        line += 1;
        let mut limited = file.by_ref().take(RECORD_BYTES_MAX as u64 + 1);
        if limited.read_until(b'\n', &mut bytes).map_err(on_open)? == 0 {
            return Err(DataError::File { path: path.to_owned(), reason: NO_RECORD.into() });
        }
        if bytes.len() > RECORD_BYTES_MAX {
            // Reading all of it tells what is wrong.
            return Ok(());
        }
        let text = line_text(&bytes, line).map_err(|error| error.at(path))?;
        let text = text.trim_start_matches(BYTE_ORDER_MARK).trim_end_matches(['\n', '\r']);
        if text.trim().is_empty() {
            continue;
        }
        found += 1;
        if is("jsonl") {
            json_object(text, line).map_err(|error| error.at(path))?;
        }
    }
    Ok(())
}

const BYTE_ORDER_MARK: &str = "\u{feff}";
const NO_RECORD: &str = "holds no record; put at least one into it";

/// What reads a file of its ending.
fn parser(path: &Path) -> Result<Parse, DataError> {
    let refused = |reason: &str| DataError::File { path: path.to_owned(), reason: reason.into() };
    let parse: Parse = match path.extension().and_then(|extension| extension.to_str()) {
        _ if path.is_dir() => return Err(refused("is a directory; name one file in it")),
        Some("txt" | "log") => parse_text,
        Some("jsonl") => parse_jsonl,
        Some("csv") => parse_csv,
        _ => return Err(refused("has an unknown ending; expected .txt, .log, .jsonl or .csv")),
    };
    Ok(parse)
}

/// What is wrong with one line; the path is added where it is known.
struct LineError {
    line: u64,
    reason: String,
}

impl LineError {
    fn new(line: u64, reason: impl Into<String>) -> Self {
        Self { line, reason: reason.into() }
    }

    fn at(self, path: &Path) -> DataError {
        let Self { line, reason } = self;
        DataError::Line { path: path.to_owned(), line, reason }
    }
}

fn parse_text(bytes: &[u8], _: &Columns) -> Result<Vec<Record>, LineError> {
    let lines = numbered_lines(bytes)?;
    let first = lines.iter().position(|(_, line)| !line.trim().is_empty()).unwrap_or(0);
    let last = lines.iter().rposition(|(_, line)| !line.trim().is_empty()).map_or(0, |last| last + 1);
    let lines = &lines[first..last];
    // Blank lines before and after the text separate nothing.
    let paragraphs: Vec<&[(u64, &str)]> = if lines.iter().any(|(_, line)| line.trim().is_empty()) {
        lines.split(|(_, line)| line.trim().is_empty()).filter(|paragraph| !paragraph.is_empty()).collect()
    } else {
        lines.chunks(1).collect()
    };
    paragraphs
        .into_iter()
        .map(|paragraph| {
            let line = paragraph[0].0;
            let text = paragraph.iter().map(|(_, line)| *line).collect::<Vec<_>>().join("\n");
            check_length(line, text.len())?;
            Ok(Record { content: Content::Text(text), fields: BTreeMap::new(), line })
        })
        .collect()
}

fn parse_jsonl(bytes: &[u8], columns: &Columns) -> Result<Vec<Record>, LineError> {
    let mut kind = None;
    let mut records = Vec::new();
    for (line, text) in numbered_lines(bytes)? {
        if text.trim().is_empty() {
            continue;
        }
        check_length(line, text.len())?;
        let mut object = json_object(text, line)?;
        // A key that holds null says that there is nothing under it.
        object.retain(|_, value| !value.is_null());
        let has = |key: &str| object.contains_key(key);
        let kind = match kind {
            Some(kind) => check_keys(kind, columns, line, has).map(|()| kind)?,
            None => *kind.insert(find_kind(columns, line, has, object.keys().map(String::as_str))?),
        };
        let content = match kind {
            Kind::Text => Content::Text(take_string(&mut object, &columns.text, line)?),
            Kind::Pair => Content::Pair {
                prompt: take_string(&mut object, &columns.prompt, line)?,
                completion: take_string(&mut object, &columns.completion, line)?,
            },
            Kind::Conversation => Content::Conversation(take_messages(&mut object, &columns.messages, line)?),
        };
        check_not_empty(&content, columns, line)?;
        let fields = object.into_iter().filter_map(|(key, value)| Some((key, scalar(value)?))).collect();
        records.push(Record { content, fields, line });
    }
    Ok(records)
}

fn json_object(text: &str, line: u64) -> Result<Map<String, Value>, LineError> {
    // Only the column is taken from serde's message: the rest would count lines from this one.
    let value: Value = serde_json::from_str(text)
        .map_err(|error| LineError::new(line, format!("is not JSON from column {} on", error.column())))?;
    match value {
        Value::Object(object) => Ok(object),
        other => Err(LineError::new(line, format!("expected a JSON object, found {}", type_name(&other)))),
    }
}

fn parse_csv(bytes: &[u8], columns: &Columns) -> Result<Vec<Record>, LineError> {
    let mut reader = csv::Reader::from_reader(bytes);
    let header = reader.headers().map_err(|error| csv_error(&error, 1))?.clone();
    if header.iter().all(|name| name.trim().is_empty()) {
        return Ok(Vec::new());
    }
    if let Some(twice) = header.iter().enumerate().find_map(|(i, a)| header.iter().skip(i + 1).find(|b| a == *b)) {
        return Err(LineError::new(1, format!("the header names the column {} twice", quoted(twice))));
    }
    let has = |key: &str| header.iter().any(|name| name == key);
    let kind = find_kind(columns, 1, has, header.iter())?;
    let mut records = Vec::new();
    for row in reader.records() {
        let row = row.map_err(|error| csv_error(&error, 1))?;
        // Rows read from a file always carry their position.
        let line = row.position().map_or(1, csv::Position::line);
        check_length(line, row.as_slice().len())?;
        let mut fields: BTreeMap<String, String> =
            header.iter().zip(row.iter()).map(|(name, cell)| (name.to_owned(), cell.to_owned())).collect();
        // The header has the columns, and a row is as long as the header: csv refuses others.
        let mut take = |name: &str| fields.remove(name).unwrap_or_default();
        let content = match kind {
            Kind::Text => Content::Text(take(&columns.text)),
            Kind::Pair => Content::Pair { prompt: take(&columns.prompt), completion: take(&columns.completion) },
            Kind::Conversation => {
                let reason = format!(
                    "the column {} would hold conversations, which do not fit into CSV; use .jsonl",
                    quoted(&columns.messages)
                );
                return Err(LineError::new(1, reason));
            }
        };
        check_not_empty(&content, columns, line)?;
        records.push(Record { content, fields, line });
    }
    Ok(records)
}

/// What the records of one file are.
#[derive(Clone, Copy)]
enum Kind {
    Conversation,
    Pair,
    Text,
}

impl Kind {
    fn keys(self, columns: &Columns) -> Vec<&str> {
        match self {
            Self::Conversation => vec![&columns.messages],
            Self::Pair => vec![&columns.prompt, &columns.completion],
            Self::Text => vec![&columns.text],
        }
    }
}

fn find_kind<'a>(
    columns: &Columns,
    line: u64,
    has: impl Fn(&str) -> bool,
    found: impl Iterator<Item = &'a str>,
) -> Result<Kind, LineError> {
    let kinds = [Kind::Conversation, Kind::Pair, Kind::Text];
    kinds.into_iter().find(|kind| kind.keys(columns).into_iter().all(&has)).ok_or_else(|| {
        let Columns { text, prompt, completion, messages } = columns;
        let [text, prompt, completion, messages] = [text, prompt, completion, messages].map(|name| quoted(name));
        let expected = format!("{text}, or {prompt} and {completion}, or {messages}");
        LineError::new(
            line,
            format!("found {}; expected {expected} (the experiment's [data.columns] set other names)", list(found)),
        )
    })
}

fn check_keys(kind: Kind, columns: &Columns, line: u64, has: impl Fn(&str) -> bool) -> Result<(), LineError> {
    match kind.keys(columns).into_iter().find(|key| !has(key)) {
        Some(key) => Err(LineError::new(line, format!("has no {}, which the file's first record has", quoted(key)))),
        None => Ok(()),
    }
}

fn take_string(object: &mut Map<String, Value>, key: &str, line: u64) -> Result<String, LineError> {
    match object.remove(key) {
        Some(Value::String(text)) => Ok(text),
        other => {
            let found = other.as_ref().map_or("nothing", type_name);
            Err(LineError::new(line, format!("expected a string under {}, found {found}", quoted(key))))
        }
    }
}

/// Keys of a message other than `role` and `content` (a name, an id) do not reach the chat template.
fn take_messages(object: &mut Map<String, Value>, key: &str, line: u64) -> Result<Vec<Message>, LineError> {
    let Some(Value::Array(turns)) = object.remove(key) else {
        return Err(LineError::new(line, format!("expected an array of messages under {}", quoted(key))));
    };
    if turns.len() > MESSAGES_MAX {
        return Err(LineError::new(line, format!("{} messages; at most {MESSAGES_MAX} are read", turns.len())));
    }
    let turns = turns.into_iter().enumerate().map(|(index, turn)| match turn {
        Value::Object(mut turn) => match (turn.remove("role"), turn.remove("content")) {
            (Some(Value::String(role)), Some(Value::String(content))) => Ok(Message { role, content }),
            _ => Err(LineError::new(line, format!("message {index} needs the strings `role` and `content`"))),
        },
        other => Err(LineError::new(line, format!("message {index} is {}, not an object", type_name(&other)))),
    });
    turns.collect()
}

fn check_not_empty(content: &Content, columns: &Columns, line: u64) -> Result<(), LineError> {
    let empty = match content {
        Content::Text(text) => text.trim().is_empty().then_some(&columns.text),
        // A completion may answer an empty prompt; an empty completion would teach nothing.
        Content::Pair { completion, .. } => completion.trim().is_empty().then_some(&columns.completion),
        Content::Conversation(messages) => messages.is_empty().then_some(&columns.messages),
    };
    match empty {
        Some(key) => Err(LineError::new(line, format!("{} is empty; remove the record or fill it", quoted(key)))),
        None => Ok(()),
    }
}

fn check_length(line: u64, record_bytes: usize) -> Result<(), LineError> {
    if record_bytes > RECORD_BYTES_MAX {
        let reason = format!("a record of {record_bytes} bytes; at most {RECORD_BYTES_MAX} are read, so cut it up");
        return Err(LineError::new(line, reason));
    }
    Ok(())
}

/// The lines of a file with their numbers from 1, without `\n` or `\r\n`.
fn numbered_lines(bytes: &[u8]) -> Result<Vec<(u64, &str)>, LineError> {
    let lines = bytes.split(|byte| *byte == b'\n').zip(1..).map(|(line_bytes, line)| {
        let text = line_text(line_bytes, line)?;
        Ok((line, text.strip_suffix('\r').unwrap_or(text)))
    });
    lines.collect()
}

fn line_text(bytes: &[u8], line: u64) -> Result<&str, LineError> {
    std::str::from_utf8(bytes).map_err(|error| {
        LineError::new(line, format!("is not UTF-8 from byte {} of the line on", error.valid_up_to() + 1))
    })
}

fn csv_error(error: &csv::Error, line: u64) -> LineError {
    let line = error.position().map_or(line, csv::Position::line);
    match error.kind() {
        csv::ErrorKind::Utf8 { err, .. } => LineError::new(line, format!("column {} is not UTF-8", err.field() + 1)),
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            LineError::new(line, format!("found {len} columns where the header has {expected_len}; check the quotes"))
        }
        other => LineError::new(line, format!("is not CSV: {}", io_reason(other))),
    }
}

fn io_reason(kind: &csv::ErrorKind) -> String {
    match kind {
        csv::ErrorKind::Io(error) => error.to_string(),
        _ => "malformed row".into(),
    }
}

fn scalar(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Names in an error message, few and short: a file without a header would otherwise print its text here.
fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const NAMES_MAX: usize = 12;
    let mut names: Vec<String> = names.take(NAMES_MAX + 1).map(quoted).collect();
    if names.len() > NAMES_MAX {
        names[NAMES_MAX] = "…".into();
    }
    if names.is_empty() { "no key".into() } else { names.join(", ") }
}

pub(super) fn quoted(name: &str) -> String {
    const CHARS_MAX: usize = 24;
    let shown: String = name.chars().take(CHARS_MAX).collect();
    if shown.len() < name.len() {
        format!("`{}…`", shown.escape_debug())
    } else {
        format!("`{}`", shown.escape_debug())
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fields: Vec<_> = self.fields.keys().collect();
        f.debug_struct("Record")
            .field("line", &self.line)
            .field("content", &self.content)
            .field("fields", &fields)
            .finish()
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "Text({} bytes)", text.len()),
            Self::Pair { prompt, completion } => {
                write!(f, "Pair({} and {} bytes)", prompt.len(), completion.len())
            }
            Self::Conversation(messages) => write!(f, "Conversation({} messages)", messages.len()),
        }
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Message({} bytes)", self.content.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paragraphs_are_records() {
        let records = read("a.txt", "\n\nFirst line,\r\nsecond.\n\n \nAnother.\n").unwrap();
        assert_eq!(texts(&records), ["First line,\nsecond.", "Another."]);
        assert_eq!([records[0].line, records[1].line], [3, 7]);
    }

    #[test]
    fn lines_are_records_where_no_line_is_blank() {
        assert_eq!(texts(&read("a.log", "one\ntwo\n").unwrap()), ["one", "two"]);
    }

    #[test]
    fn jsonl_holds_any_of_three_kinds() {
        let [pair] = &read("a.jsonl", r#"{"prompt":"p","completion":"c","text":"t","n":3,"x":[1]}"#).unwrap()[..]
        else {
            panic!("one record expected");
        };
        assert_eq!(pair.content, Content::Pair { prompt: "p".into(), completion: "c".into() });
        assert_eq!(pair.fields, BTreeMap::from([("n".into(), "3".into()), ("text".into(), "t".into())]));

        let chat = read("a.jsonl", r#"{"messages":[{"role":"user","content":"hi"}],"home":"h"}"#).unwrap();
        let message = Message { role: "user".into(), content: "hi".into() };
        assert_eq!(chat[0].content, Content::Conversation(vec![message]));
        assert_eq!(chat[0].fields["home"], "h");
        assert_eq!(texts(&read("a.jsonl", "\n{\"text\":\"a\"}\r\n\n{\"text\":\"b\"}").unwrap()), ["a", "b"]);
    }

    #[test]
    fn csv_columns_go_by_the_header() {
        let records = read("a.csv", "\u{feff}device,text\npress,\"two\nlines\"\nmill,\"a, b\"\n").unwrap();
        assert_eq!(texts(&records), ["two\nlines", "a, b"]);
        assert_eq!(records[1].fields["device"], "mill");
        assert_eq!([records[0].line, records[1].line], [2, 4]);
    }

    #[test]
    fn other_names_are_set_in_the_columns() {
        let columns = Columns { prompt: "question".into(), completion: "answer".into(), ..Columns::default() };
        let records = read_with("a.jsonl", br#"{"question":"q","answer":"a"}"#, &columns).unwrap();
        assert_eq!(records[0].content, Content::Pair { prompt: "q".into(), completion: "a".into() });
    }

    #[test]
    fn errors_name_the_file_the_line_and_the_key() {
        check_error("a.txt", "", "a.txt: holds no record");
        check_error("a.txt", " \n\n", "holds no record");
        check_error("a.csv", "", "holds no record");
        check_error("a.csv", "text\n", "holds no record");
        check_error("a.bin", "x", "unknown ending; expected .txt, .log, .jsonl or .csv");
        check_error("a.jsonl", "{\"text\":\"a\"}\n{\"text\":", "a.jsonl, line 2: is not JSON from column 8 on");
        check_error("a.jsonl", "[1]", "line 1: expected a JSON object, found an array");
        check_error(
            "a.jsonl",
            "{\"a\":1,\"b\":2}",
            "line 1: found `a`, `b`; expected `text`, or `prompt` and `completion`",
        );
        check_error("a.jsonl", "{\"text\":null}", "found no key");
        check_error("a.jsonl", "{\"text\":7}", "expected a string under `text`, found a number");
        check_error("a.jsonl", "{\"text\":\"a\"}\n{\"body\":\"b\"}", "line 2: has no `text`, which the file's first");
        check_error("a.jsonl", "{\"text\":\" \"}", "line 1: `text` is empty");
        check_error("a.jsonl", "{\"messages\":[]}", "`messages` is empty");
        check_error("a.jsonl", "{\"messages\":[{\"role\":\"user\"}]}", "message 0 needs the strings");
        check_error("a.csv", "a,b\n1,2\n", "line 1: found `a`, `b`; expected `text`");
        check_error("a.csv", "a,text\n1,2\n3\n", "line 3: found 1 columns where the header has 2");
        check_error("a.csv", "text,text\n1,2\n", "the column `text` twice");
        check_error("a.csv", "messages\n1\n", "use .jsonl");
    }

    #[test]
    fn bytes_that_are_not_utf8_are_found_by_line() {
        for (name, bytes) in
            [("a.txt", &b"one\ntwo \xff\n"[..]), ("a.jsonl", b"{\"text\":\"a\"}\n\xff"), ("a.csv", b"text\n\xff\n")]
        {
            let message = read_with(name, bytes, &Columns::default()).unwrap_err().to_string();
            assert!(message.contains("line 2") && message.contains("not UTF-8"), "{message}");
        }
    }

    #[test]
    fn a_file_without_a_record_is_told_by_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let check = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            check_records(&path).map_err(|error| error.to_string())
        };
        for (name, text, expected) in [
            ("a.txt", " \n\n", "holds no record"),
            ("a.csv", "text\n", "holds no record"),
            ("a.jsonl", "", "holds no record"),
            ("a.jsonl", "\n{\"text\":", "line 2: is not JSON from column 8 on"),
            ("a.jsonl", "[1]", "found an array"),
            ("a.bin", "x", "unknown ending"),
        ] {
            let told = check(name, text.as_bytes()).unwrap_err();
            assert!(told.contains(expected), "{told}");
        }
        assert!(check("a.txt", b"one \xff").unwrap_err().contains("not UTF-8"));
        // What its columns are called, and what comes later, is for whoever reads all of it.
        for (name, text) in [("a.txt", "one"), ("a.csv", "other\n1\n"), ("a.jsonl", "\u{feff}\n{\"other\":1}\n{")] {
            check(name, text.as_bytes()).unwrap();
        }
    }

    #[test]
    fn missing_files_and_directories_are_said_to_be_so() {
        let dir = tempfile::tempdir().unwrap();
        let missing = read_records(&dir.path().join("no.txt"), &Columns::default()).unwrap_err();
        assert!(matches!(missing, DataError::Open { .. }), "{missing}");
        let directory = read_records(dir.path(), &Columns::default()).unwrap_err().to_string();
        assert!(directory.contains("is a directory"), "{directory}");
    }

    #[test]
    fn a_record_over_the_limit_is_refused() {
        check_error("a.txt", &"x".repeat(RECORD_BYTES_MAX + 1), "line 1: a record of 16777217 bytes");
    }

    #[test]
    fn debug_shows_no_text() {
        let records = read("a.jsonl", r#"{"prompt":"secret","completion":"secret","owner":"secret"}"#).unwrap();
        let shown = format!("{records:?}");
        assert!(
            shown.contains("Pair(6 and 6 bytes)") && shown.contains("owner") && !shown.contains("secret"),
            "{shown}"
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            for parse in [parse_text, parse_jsonl, parse_csv] {
                let _ = parse(&bytes, &Columns::default());
            }
        }

        #[test]
        fn lines_of_json_like_text_never_panic(text in "([{}\\[\\]\":,a-c\n]|text|prompt|completion|messages|role|null|1){0,40}") {
            let _ = parse_jsonl(text.as_bytes(), &Columns::default());
        }
    }

    fn read(name: &str, text: &str) -> Result<Vec<Record>, DataError> {
        read_with(name, text.as_bytes(), &Columns::default())
    }

    fn read_with(name: &str, bytes: &[u8], columns: &Columns) -> Result<Vec<Record>, DataError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        read_records(&path, columns)
    }

    fn texts(records: &[Record]) -> Vec<&str> {
        let text = |record: &'_ Record| matches!(record.content, Content::Text(_));
        assert!(records.iter().all(text), "{records:?}");
        records
            .iter()
            .filter_map(|record| if let Content::Text(text) = &record.content { Some(&**text) } else { None })
            .collect()
    }

    fn check_error(name: &str, text: &str, expected: &str) {
        let message = read(name, text).unwrap_err().to_string();
        assert!(message.contains(expected), "expected \"{expected}\" in \"{message}\"");
    }
}

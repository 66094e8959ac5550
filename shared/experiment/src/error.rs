//! What can go wrong with an experiment's file and with its run directory.
//!
//! Every message finishes the sentence "failed to …", names the file, and says what to do next.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is not TOML, or a key is unknown, missing or of the wrong type; the source shows the line.
    #[error("parse {origin}: {source}")]
    Syntax {
        origin: String,
        // Boxed, because toml's error would make every `Result` of this crate large.
        source: Box<toml::de::Error>,
    },
    #[error("accept {origin}: {key} is {value}; allowed: {allowed}")]
    Value { origin: String, key: &'static str, value: String, allowed: String },
    /// The split does not fit the model that was loaded.
    #[error(
        "split the model: split.head_blocks = {head_blocks} and split.tail_blocks = {tail_blocks} leave no body block \
         of the {total_blocks} blocks; lower them until their sum is less than {total_blocks}"
    )]
    Blocks { head_blocks: u32, tail_blocks: u32, total_blocks: u32 },
    #[error(
        "use the model: data.sequence_tokens_max is {sequence_tokens_max}, but the model's context is {context} tokens; \
         lower it to {context}"
    )]
    Context { sequence_tokens_max: u32, context: usize },
    #[error("{action} {}: {source}{}", path.display(), storage::remedy(source))]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "look at a run in {}: it has no {lacks}, so it is no run directory; check the path, and name the directory of a run, \
         such as runs/NAME", path.display()
    )]
    NotARun { path: PathBuf, lacks: &'static str },
    /// What is on the disk is not known any more. A second fsync may succeed without the bytes, so that none is tried.
    #[error("bring {} to the disk: {source}; check that disk, then start again", path.display())]
    Unsynced { path: PathBuf, source: io::Error },
    /// A finished round whose files are not those that were written.
    #[error("go on from {}: {what}", path.display())]
    Damaged { path: PathBuf, what: String },
    #[error(
        "continue the run in {}: it belongs to another experiment (digest {found}, this one is {expected}; first \
         difference: {difference}); give this experiment another name, or move that directory away", path.display()
    )]
    OtherExperiment { path: PathBuf, found: String, expected: String, difference: String },
    #[error("append to {}: another process is writing it; stop that one first", path.display())]
    Busy { path: PathBuf },
    #[error("begin round {round}: {} is already complete; begin the round after it", path.display())]
    RoundComplete { round: u32, path: PathBuf },
    #[error(
        "read line {line} of {}: {source}; it was not written by this version: delete that line or use the program \
         that wrote it", path.display()
    )]
    Row { path: PathBuf, line: usize, source: serde_json::Error },
}

impl Error {
    /// Whether the same may succeed once there is room, or the disk has recovered.
    pub fn may_pass(&self) -> bool {
        const EIO: i32 = 5;
        let passes = |source: &io::Error| {
            matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
                || source.raw_os_error() == Some(EIO)
        };
        matches!(self, Self::File { source, .. } if passes(source))
    }

    /// For `map_err`: `action` is a verb that `path` completes.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::File { action, path, source }
    }
}

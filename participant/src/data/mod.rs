//! A participant's own data, from a file to optimizer steps.
//!
//! The way through: [`read_records`] turns a file into [`Record`]s, [`partition`] deals them out to the participants
//! of a swarm, [`hold_out`] keeps some for evaluation, [`encode_records`] makes token [`Sequence`]s with a mark on every
//! trained token, and [`Batches`] packs those into micro-batches, for ever.
//!
//! Nothing in here reaches a socket or a tensor, nothing implements `Serialize`, and no error and no `Debug` output
//! shows text or token ids: they name files, lines, counts, and columns (a header's cells, cut short).

use std::path::PathBuf;

use thiserror::Error;

mod batches;
mod encode;
mod hold_out;
mod partition;
mod records;

pub use batches::{Batches, MicroBatch, Position, evaluation_batches};
pub use encode::{Encoded, Sequence, TextEncoder, encode_record, encode_records};
pub use hold_out::hold_out;
pub use partition::partition;
pub use records::{Content, Message, Record, check_records, read_records};

/// Why data cannot be used. All of these are for the participant's owner to mend; none blames another machine.
#[derive(Debug, Error)]
pub enum DataError {
    #[error("read {path}: {source}; check the path and the disk")]
    Open { path: PathBuf, source: std::io::Error },
    #[error("read {path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("read {path}, line {line}: {reason}")]
    Line { path: PathBuf, line: u64, reason: String },
    #[error("encode the record of line {line}: {reason}")]
    Encode { line: u64, reason: String },
    #[error("deal out the data: {0}")]
    Partition(String),
    #[error("make batches: {0}")]
    Batches(String),
}

//! What survives a crash: an append-only [`Journal`] and [`Generations`] of snapshots, each proof against a kill at any
//! instant, torn writes, a full disk and damaged bytes. [FORMAT.md](../FORMAT.md) is the byte map. A [`Replacement`] is a
//! large file that is whole or not there.
//!
//! This crate knows files and bytes. It does not know what is kept in them, never retries a failed fsync, and never
//! believes a byte that a checksum does not cover. What a journal writes goes through [`Disk`], where tests let it fail.

mod disk;
mod error;
mod generations;
mod journal;
mod pack;
mod replacement;
mod target;

pub use disk::{Disk, Fault, Operation};
pub use error::{StorageError, remedy};
pub use generations::{Generation, Generations};
pub use journal::{Journal, Opened, RECORD_BYTES_MAX};
pub use pack::{pack, unpack};
pub use replacement::Replacement;
pub use target::replaceable;

/// What a file belongs to: a journal or a snapshot of anything else is not read.
pub type Identity = [u8; 32];

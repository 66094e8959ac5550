//! GGUF, version 3: one file with typed metadata and quantized tensors.
//!
//! [`Reader`] opens a file that may be hostile: it holds the checked header, and reads a tensor's bytes only when asked.
//! [`Writer`] streams a file whose [`Header`] was declared first. Nothing here knows what a model is, except
//! [`Vocabulary`], which knows how the tokenizer's keys must agree with each other. Files are little-endian, never mapped
//! into memory and never read before a length has been compared with the bytes that are left.

mod header;
mod reader;
mod strings;
mod tensors;
mod value;
mod vocabulary;
mod writer;

pub use header::Header;
pub use reader::Reader;
pub use strings::Strings;
pub use tensors::{ForeignType, TensorInfo, TensorType};
pub use value::{Array, FromValue, Value};
pub use vocabulary::{TokenType, Vocabulary};
pub use writer::Writer;

/// Where the data section and every tensor in it begin, unless the file's `general.alignment` says otherwise.
pub const ALIGNMENT: u64 = 32;

/// Bounds on a header, far above any real model and far below what could exhaust memory. No array takes more at once than
/// twice its bytes in the file.
pub const KEYS_MAX: i64 = 4_096;
pub const TENSORS_MAX: i64 = 65_536;
pub const KEY_BYTES_MAX: u64 = 1_024;
pub const STRING_BYTES_MAX: u64 = 16 << 20;
pub const ARRAY_ELEMENTS_MAX: u64 = 16_000_000;
pub const HEADER_BYTES_MAX: u64 = 256 << 20;

#[cfg(test)]
mod holes;
#[cfg(test)]
mod tests;

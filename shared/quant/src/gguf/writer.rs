//! A GGUF file being written.

use std::io::Write;
use std::path::Path;

use storage::Replacement;

use super::{ALIGNMENT, Header, TensorInfo, header};
use crate::Error;

/// Streams tensors behind a header that was declared first. The file appears under its name only when it is complete
/// and on the disk; until then, and after any failure, there is nothing there but what was there before.
#[derive(Debug)]
pub struct Writer {
    file: Replacement,
    remaining: std::vec::IntoIter<TensorInfo>,
    /// A failed write leaves an unknown number of bytes behind, so nothing may follow it.
    broken: bool,
}

impl Writer {
    /// Writes the header. Refuses one that our own reader would refuse.
    pub fn create(path: &Path, header: Header) -> Result<Writer, Error> {
        let bytes = header.encode();
        let file_bytes = (bytes.len() as u64).saturating_add(header.table().padded_bytes());
        let (reread, data_start) = header::parse(path, bytes.as_slice(), file_bytes).map_err(|error| match error {
            Error::Malformed { reason, .. } => Error::Refused { reason },
            other => other,
        })?;
        // This also catches a NaN in the metadata, which equals nothing, and no reader could use.
        if reread != header || data_start != bytes.len() as u64 {
            let reason = format!("its metadata changes when read back; alignment must stay {ALIGNMENT}");
            return Err(Error::Refused { reason });
        }

        let mut writer = Writer::begin(path, header.tensors().to_vec())?;
        writer.put(&bytes)?;
        Ok(writer)
    }

    /// Writes all bytes of a file at once.
    pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
        let mut writer = Writer::begin(path, Vec::new())?;
        writer.put(bytes)?;
        writer.finish()
    }

    fn begin(path: &Path, tensors: Vec<TensorInfo>) -> Result<Writer, Error> {
        let file = Replacement::begin(path).map_err(|source| Error::Write { path: path.to_owned(), source })?;
        Ok(Writer { file, remaining: tensors.into_iter(), broken: false })
    }

    /// Writes the blocks of the next declared tensor, whose name and size must be these.
    pub fn write_tensor(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let next = self.remaining.as_slice().first().map(|info| (info.name.as_str(), info.bytes));
        if next != Some((name, bytes.len() as u64)) {
            let expected = match next {
                Some((name, bytes)) => format!("`{name}` of {bytes}"),
                None => "nothing more".to_owned(),
            };
            let reason = format!("tensor `{name}` of {} bytes came where {expected} was declared", bytes.len());
            return Err(Error::Refused { reason });
        }
        self.put(bytes)?;
        self.put(&[0; ALIGNMENT as usize][..bytes.len().next_multiple_of(ALIGNMENT as usize) - bytes.len()])?;
        self.remaining.next();
        Ok(())
    }

    /// Gives the file its name, after all tensors have been written and have reached the disk.
    pub fn finish(self) -> Result<(), Error> {
        if let Some(missing) = self.remaining.as_slice().first() {
            return Err(Error::Refused { reason: format!("tensor `{}` was declared but not written", missing.name) });
        }
        let path = self.file.path().to_owned();
        self.file.finish().map_err(|source| Error::Write { path, source })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if self.broken {
            return Err(Error::Refused { reason: "an earlier write failed; start again".to_owned() });
        }
        self.file.write_all(bytes).map_err(|source| {
            self.broken = true;
            Error::Write { path: self.file.path().to_owned(), source }
        })
    }
}

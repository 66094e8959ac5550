//! A GGUF file being written.

use super::{ALIGNMENT, Header, TensorInfo, header};
use crate::Error;
use std::{
    ffi::OsString,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

/// Streams tensors behind a header that was declared first. The file appears under its name only when it is complete
/// and on the disk; until then, and after any failure, there is nothing there but what was there before.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    partial_path: PathBuf,
    file: BufWriter<File>,
    remaining: std::vec::IntoIter<TensorInfo>,
    /// A failed write leaves an unknown number of bytes behind, so nothing may follow it.
    broken: bool,
    finished: bool,
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
        let path = storage::replaceable(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let partial_path = partial_path(&path);
        let io = |source| Error::Io { path: partial_path.clone(), source };
        let file = BufWriter::new(File::create_new(&partial_path).map_err(io)?);
        let remaining = tensors.into_iter();
        Ok(Writer { path, partial_path, file, remaining, broken: false, finished: false })
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
    pub fn finish(mut self) -> Result<(), Error> {
        if let Some(missing) = self.remaining.as_slice().first() {
            return Err(Error::Refused { reason: format!("tensor `{}` was declared but not written", missing.name) });
        }
        let named = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        let named = named.and_then(|()| fs::rename(&self.partial_path, &self.path));
        named.map_err(|source| Error::Io { path: self.path.clone(), source })?;
        self.finished = true;
        sync_directory(&self.path)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if self.broken {
            return Err(Error::Refused { reason: "an earlier write failed; start again".to_owned() });
        }
        self.file.write_all(bytes).map_err(|source| {
            self.broken = true;
            Error::Io { path: self.partial_path.clone(), source }
        })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished {
            // The failure that led here has been reported; a leftover file is not worth another.
            let _ = fs::remove_file(&self.partial_path);
        }
    }
}

/// Beside the final path, so that renaming stays within one file system; with our process id, so that two exports of
/// the same file never write into each other.
fn partial_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.partial", std::process::id()));
    path.with_file_name(name)
}

/// Makes the rename itself durable, where directories can be synced.
fn sync_directory(path: &Path) -> Result<(), Error> {
    if cfg!(unix) {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let synced = File::open(parent).and_then(|directory| directory.sync_all());
        synced.map_err(|source| Error::Io { path: parent.to_owned(), source })?;
    }
    Ok(())
}

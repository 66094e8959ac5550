//! A safetensors file of f32 tensors being written.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::ExportError;

/// Streams tensors behind a header that declared them all. The file appears under its name only when it is complete and
/// on the disk; after a failure there is nothing there but what was there before.
pub(super) struct SafetensorsWriter {
    path: PathBuf,
    partial_path: PathBuf,
    file: BufWriter<File>,
    /// Declared and not yet written.
    bytes_left: u64,
}

impl SafetensorsWriter {
    /// Declares the tensors, which must then be written in this order.
    pub fn create(path: &Path, tensors: &[(String, Vec<usize>)]) -> Result<Self, ExportError> {
        let (header, data_bytes) = header(tensors);
        let path = storage::replaceable(path).map_err(ExportError::io(path))?;
        let partial_path = partial_path(&path);
        let file = File::create_new(&partial_path).map_err(ExportError::io(&partial_path))?;
        let file = BufWriter::new(file);
        let mut writer = Self { path, partial_path, file, bytes_left: data_bytes };
        writer.put(&header)?;
        Ok(writer)
    }

    /// The next tensor's values, little-endian.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        let left = self.bytes_left.checked_sub(bytes.len() as u64);
        self.bytes_left = left.expect("a tensor is written as it was declared");
        self.put(bytes)
    }

    /// Gives the file its name, when all of it has reached the disk.
    pub fn finish(mut self) -> Result<(), ExportError> {
        assert_eq!(self.bytes_left, 0, "every declared tensor is written");
        let written = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        let named = written.and_then(|()| fs::rename(&self.partial_path, &self.path));
        named.and_then(|()| sync_directory(&self.path)).map_err(ExportError::io(&self.path))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        self.file.write_all(bytes).map_err(ExportError::io(&self.partial_path))
    }
}

impl Drop for SafetensorsWriter {
    fn drop(&mut self) {
        // Once renamed it is no longer there; after a failure, which has been reported, it is not worth another.
        let _ = fs::remove_file(&self.partial_path);
    }
}

/// The header's bytes, and how many must follow them: u64 length, JSON, spaces up to a multiple of 8.
fn header(tensors: &[(String, Vec<usize>)]) -> (Vec<u8>, u64) {
    let mut entries = Map::new();
    // transformers refuses files that do not say which framework's layout they have.
    entries.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += 4 * shape.iter().map(|&n| n as u64).product::<u64>();
        entries.insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]}));
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    (header, end)
}

/// Beside the final path, so that renaming stays within one file system; with our process id, so that two exports never
/// write into each other.
fn partial_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.partial", std::process::id()));
    path.with_file_name(name)
}

/// Makes the rename itself durable, where directories can be synced.
fn sync_directory(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if cfg!(unix) => File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_declares_every_tensor_behind_the_one_before() {
        let (header, data_bytes) = header(&[("b".into(), vec![2, 3]), ("a".into(), vec![1])]);
        let json: Value = serde_json::from_slice(&header[8..]).unwrap();
        let expected = json!({
            "__metadata__": {"format": "pt"},
            "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [24, 28]},
        });
        assert_eq!((json, data_bytes), (expected, 28));
        assert_eq!(header[..8], (header.len() as u64 - 8).to_le_bytes());
        assert_eq!(header.len() % 8, 0);
    }

    #[test]
    fn a_file_that_was_not_finished_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        let mut writer = SafetensorsWriter::create(&path, &[("a".into(), vec![2])]).unwrap();
        writer.write(&[0; 4]).unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

//! A safetensors file of f32 tensors being written.

use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};
use storage::Replacement;

use super::ExportError;

/// Streams tensors behind a header that declared them all. The file appears under its name only when it is complete and
/// on the disk; after a failure there is nothing there but what was there before.
pub(super) struct SafetensorsWriter {
    file: Replacement,
    /// Declared and not yet written.
    bytes_left: u64,
}

impl SafetensorsWriter {
    /// Declares the tensors, which must then be written in this order.
    pub fn create(path: &Path, tensors: &[(String, Vec<usize>)]) -> Result<Self, ExportError> {
        let (header, data_bytes) = header(tensors);
        let file = Replacement::begin(path).map_err(ExportError::io(path))?;
        let mut writer = Self { file, bytes_left: data_bytes };
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
    pub fn finish(self) -> Result<(), ExportError> {
        assert_eq!(self.bytes_left, 0, "every declared tensor is written");
        let path = self.file.path().to_owned();
        self.file.finish().map_err(ExportError::io(&path))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        self.file.write_all(bytes).map_err(ExportError::io(self.file.path()))
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
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

//! Everything before the data section: metadata and tensor infos, parsed and encoded.
//!
//! [`parse`] takes any bytes and either returns a header whose parts agree with each other and with the file's length,
//! or says what is wrong. [`Header::encode`] is its inverse. Memory is reserved for no more
//! elements than the bytes that are left can hold.

use super::{
    ALIGNMENT, ARRAY_ELEMENTS_MAX, Array, HEADER_BYTES_MAX, KEY_BYTES_MAX, KEYS_MAX, STRING_BYTES_MAX, Strings,
    TENSORS_MAX, TensorInfo, TensorType, Value,
    tensors::{DIMENSIONS_MAX, NAME_BYTES_MAX, TensorTable, is_name},
};
use crate::{BlockType, Error};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt::Arguments,
    io::Read,
    path::Path,
};

/// Metadata, kept sorted by key so that equal headers are equal bytes, and tensors in the order of their data.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Header {
    metadata: BTreeMap<String, Value>,
    tensors: TensorTable,
}

impl Header {
    /// An empty header for a [`Writer`](super::Writer).
    pub fn new() -> Header {
        Header::default()
    }

    /// Sets or replaces a metadata key.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.metadata.insert(key.to_owned(), value.into());
    }

    /// Declares the next tensor; `shape` is row-major, `[out, in]`.
    pub fn add_tensor(&mut self, name: &str, shape: &[usize], ty: BlockType) -> Result<(), Error> {
        match self.tensors.push(name, shape, TensorType::Block(ty)) {
            Ok(_) => Ok(()),
            Err(reason) => Err(Error::Refused { reason }),
        }
    }

    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    pub fn tensors(&self) -> &[TensorInfo] {
        self.tensors.infos()
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.find(name)
    }

    /// Of a file with this header.
    pub fn file_bytes(&self) -> u64 {
        (self.encode().len() as u64).saturating_add(self.tensors.padded_bytes())
    }

    pub(super) fn table(&self) -> &TensorTable {
        &self.tensors
    }

    /// The header's bytes, padded to where the data section begins.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(self.tensors.infos().len() as u64).to_le_bytes());
        out.extend_from_slice(&(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut out, key);
            put_value(&mut out, value);
        }
        for info in self.tensors.infos() {
            put_string(&mut out, &info.name);
            out.extend_from_slice(&(info.shape.len() as u32).to_le_bytes());
            for &n in info.shape.iter().rev() {
                out.extend_from_slice(&(n as u64).to_le_bytes());
            }
            out.extend_from_slice(&info.ty.ggml_id().to_le_bytes());
            out.extend_from_slice(&info.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(self.tensors.alignment() as usize), 0);
        out
    }
}

/// Reads a header from the beginning of a file of `file_bytes` bytes. Also returns where its data section begins; every
/// tensor lies within the file, and nothing but padding lies after the last. `path` only names the file in errors.
pub(super) fn parse(path: &Path, input: impl Read, file_bytes: u64) -> Result<(Header, u64), Error> {
    let mut source = Source { path, input, at: 0, file_bytes };
    let magic = source.bytes(format_args!("the magic number"))?;
    if magic != MAGIC {
        return Err(source.malformed(format!("it begins with {magic:02x?}, not with \"GGUF\"")));
    }
    let version = u32::from_le_bytes(source.bytes(format_args!("the version"))?);
    if !(2..=VERSION).contains(&version) {
        return Err(source.malformed(format!("gguf version {version} is not supported, only 2 and 3 (little-endian)")));
    }
    let tensors = source.count("tensors", TENSORS_MAX)?;
    let keys = source.count("metadata keys", KEYS_MAX)?;
    // The padding of the last may be missing.
    let tensor_bytes = (tensors * TENSOR_BYTES_MIN).saturating_sub(PADDING_MIN);
    source.check_left(format_args!("the last of {tensors} tensors"), tensor_bytes)?;

    let mut metadata = BTreeMap::new();
    for index in 0..keys {
        let key = source.name(format_args!("the name of metadata key {index}"), KEY_BYTES_MAX)?;
        let ty = u32::from_le_bytes(source.bytes(format_args!("metadata key `{key}`"))?);
        let value = source.value(&key, ty)?;
        match metadata.entry(key) {
            Entry::Vacant(entry) => entry.insert(value),
            Entry::Occupied(entry) => {
                return Err(source.malformed(format!("metadata key `{}` occurs twice", entry.key())));
            }
        };
    }

    let alignment = match metadata.get("general.alignment") {
        None => ALIGNMENT,
        Some(&Value::U32(alignment)) => u64::from(alignment),
        Some(other) => {
            return Err(source.malformed(format!("`general.alignment` holds {}, expected u32", other.type_name())));
        }
    };
    let Some(mut table) = TensorTable::new(alignment) else {
        return Err(source.malformed(format!("`general.alignment` {alignment} is not a power of two from 8 up")));
    };
    source.check_left(format_args!("the last of {tensors} tensors"), tensor_bytes)?;
    table.reserve(tensors as usize);
    for index in 0..tensors {
        source.tensor(index, &mut table)?;
    }

    let data_start = source.at.next_multiple_of(alignment); // Both are far below 2^63.
    check_extent(&source, &table, data_start)?;
    Ok((Header { metadata, tensors: table }, data_start))
}

/// The file must reach to the end of its last tensor, and at most to the end of that one's padding.
fn check_extent<R: Read>(source: &Source<'_, R>, table: &TensorTable, data_start: u64) -> Result<(), Error> {
    // A file without tensors may end right behind its header.
    let (inside, relative) = match table.infos().last() {
        Some(last) => (format!("tensor `{}`", last.name), Some((last.offset, last.bytes))),
        None => ("the header".to_owned(), None),
    };
    let bytes_needed = match relative {
        Some((offset, bytes)) => data_start.checked_add(offset).and_then(|start| start.checked_add(bytes)),
        None => Some(source.at),
    };
    let bytes_max = data_start.checked_add(table.padded_bytes());
    let (Some(bytes_needed), Some(bytes_max)) = (bytes_needed, bytes_max) else {
        return Err(source.malformed(format!("{inside} ends beyond any file")));
    };
    let bytes_found = source.file_bytes;
    if bytes_found < bytes_needed {
        return Err(Error::Truncated { path: source.path.to_owned(), inside, bytes_needed, bytes_found });
    }
    if bytes_found > bytes_max {
        return Err(source.malformed(format!("{} bytes follow {inside}, the last", bytes_found - bytes_max)));
    }
    Ok(())
}

/// A file being read from its beginning: it knows how many bytes are left before it asks for any.
struct Source<'a, R> {
    path: &'a Path,
    input: R,
    at: u64,
    file_bytes: u64,
}

impl<R: Read> Source<'_, R> {
    fn tensor(&mut self, index: u64, table: &mut TensorTable) -> Result<(), Error> {
        let name = self.name(format_args!("the name of tensor {index}"), NAME_BYTES_MAX as u64)?;
        let inside = format!("the description of tensor `{name}`");
        let dimensions = u32::from_le_bytes(self.bytes(format_args!("{inside}"))?);
        if dimensions > DIMENSIONS_MAX as u32 {
            let reason = format!("tensor `{name}` has {dimensions} dimensions, not 1 to {DIMENSIONS_MAX}");
            return Err(self.malformed(reason));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let n = i64::from_le_bytes(self.bytes(format_args!("{inside}"))?);
            let Some(n) = usize::try_from(n).ok().filter(|&n| n > 0) else {
                return Err(self.malformed(format!("tensor `{name}` has a dimension of {n}")));
            };
            shape.push(n);
        }
        shape.reverse(); // The file lists the contiguous dimension first.
        let id = u32::from_le_bytes(self.bytes(format_args!("{inside}"))?);
        let Some(ty) = TensorType::from_ggml_id(id) else {
            return Err(self.malformed(format!("tensor `{name}` has the unknown type id {id}")));
        };
        let declared = u64::from_le_bytes(self.bytes(format_args!("{inside}"))?);
        let offset = table.push(&name, &shape, ty).map_err(|reason| self.malformed(reason))?.offset;
        if declared != offset {
            return Err(self.malformed(format!("tensor `{name}` lies at offset {declared}, expected {offset}")));
        }
        Ok(())
    }

    fn value(&mut self, key: &str, ty: u32) -> Result<Value, Error> {
        let inside = format_args!("metadata key `{key}`");
        Ok(match ty {
            0 => Value::U8(u8::from_le_bytes(self.bytes(inside)?)),
            1 => Value::I8(i8::from_le_bytes(self.bytes(inside)?)),
            2 => Value::U16(u16::from_le_bytes(self.bytes(inside)?)),
            3 => Value::I16(i16::from_le_bytes(self.bytes(inside)?)),
            4 => Value::U32(u32::from_le_bytes(self.bytes(inside)?)),
            5 => Value::I32(i32::from_le_bytes(self.bytes(inside)?)),
            6 => Value::F32(f32::from_le_bytes(self.bytes(inside)?)),
            7 => Value::Bool(self.bools(inside, 1)?[0]),
            8 => Value::String(self.string(inside, STRING_BYTES_MAX)?),
            9 => Value::Array(self.array(key)?),
            10 => Value::U64(u64::from_le_bytes(self.bytes(inside)?)),
            11 => Value::I64(i64::from_le_bytes(self.bytes(inside)?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes(inside)?)),
            _ => return Err(self.malformed(format!("metadata key `{key}` has the unknown type {}", ty as i32))),
        })
    }

    fn array(&mut self, key: &str) -> Result<Array, Error> {
        let inside = format_args!("metadata key `{key}`");
        let ty = u32::from_le_bytes(self.bytes(inside)?);
        let count = u64::from_le_bytes(self.bytes(inside)?);
        if count > ARRAY_ELEMENTS_MAX {
            let reason = format!("metadata key `{key}` has {count} elements, more than {ARRAY_ELEMENTS_MAX}");
            return Err(self.malformed(reason));
        }
        Ok(match ty {
            0 => Array::U8(self.numbers(inside, count, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(inside, count, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(inside, count, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(inside, count, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(inside, count, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(inside, count, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(inside, count, f32::from_le_bytes)?),
            7 => Array::Bool(self.bools(inside, count)?),
            8 => Array::String(self.strings(inside, count)?),
            9 => return Err(self.malformed(format!("metadata key `{key}` nests an array in an array"))),
            10 => Array::U64(self.numbers(inside, count, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(inside, count, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(inside, count, f64::from_le_bytes)?),
            _ => return Err(self.malformed(format!("metadata key `{key}` is an array of unknown type {}", ty as i32))),
        })
    }

    fn numbers<const N: usize, T>(
        &mut self,
        inside: Arguments<'_>,
        count: u64,
        decode: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, Error> {
        let bytes = self.take(inside, count.saturating_mul(N as u64))?;
        Ok(bytes.as_chunks::<N>().0.iter().map(|&chunk| decode(chunk)).collect())
    }

    fn bools(&mut self, inside: Arguments<'_>, count: u64) -> Result<Vec<bool>, Error> {
        let bytes = self.take(inside, count)?;
        match bytes.iter().find(|&&byte| byte > 1) {
            Some(byte) => Err(self.malformed(format!("{inside} holds {byte} as a bool, not 0 or 1"))),
            None => Ok(bytes.iter().map(|&byte| byte == 1).collect()),
        }
    }

    fn strings(&mut self, inside: Arguments<'_>, count: u64) -> Result<Strings, Error> {
        self.check_left(inside, count.saturating_mul(8))?; // Even empty strings have a length.
        let mut ends = Vec::with_capacity(count as usize); // Half the bytes that are left, just checked.
        let mut text = Vec::new();
        for _ in 0..count {
            let length = self.string_length(inside, STRING_BYTES_MAX)?;
            self.take_onto(&mut text, inside, length)?;
            ends.push(text.len() as u32); // At most HEADER_BYTES_MAX.
        }
        Strings::from_utf8(text, ends).ok_or_else(|| self.no_utf8(inside))
    }

    fn name(&mut self, inside: Arguments<'_>, limit: u64) -> Result<String, Error> {
        let name = self.string(inside, limit)?;
        if is_name(&name) {
            return Ok(name);
        }
        let beginning: String = name.chars().take(40).collect();
        Err(self.malformed(format!("{inside} is not visible ASCII: {beginning:?}")))
    }

    fn string(&mut self, inside: Arguments<'_>, limit: u64) -> Result<String, Error> {
        let length = self.string_length(inside, limit)?;
        let bytes = self.take(inside, length)?;
        String::from_utf8(bytes).map_err(|_| self.no_utf8(inside))
    }

    fn string_length(&mut self, inside: Arguments<'_>, limit: u64) -> Result<u64, Error> {
        let length = u64::from_le_bytes(self.bytes(inside)?);
        if length > limit {
            return Err(self.malformed(format!("{inside} has a string of {length} bytes, more than {limit}")));
        }
        Ok(length)
    }

    fn no_utf8(&self, inside: Arguments<'_>) -> Error {
        self.malformed(format!("{inside} has a string that is not UTF-8"))
    }

    fn count(&mut self, what: &str, limit: i64) -> Result<u64, Error> {
        let count = i64::from_le_bytes(self.bytes(format_args!("the number of {what}"))?);
        match u64::try_from(count) {
            Ok(count) if count <= limit as u64 => Ok(count),
            _ => Err(self.malformed(format!("it declares {count} {what}, not 0 to {limit}"))),
        }
    }

    fn bytes<const N: usize>(&mut self, inside: Arguments<'_>) -> Result<[u8; N], Error> {
        self.check_left(inside, N as u64)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(|source| self.io(source))?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn take(&mut self, inside: Arguments<'_>, count: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.take_onto(&mut bytes, inside, count)?;
        Ok(bytes)
    }

    fn take_onto(&mut self, all: &mut Vec<u8>, inside: Arguments<'_>, count: u64) -> Result<(), Error> {
        self.check_left(inside, count)?;
        let before = all.len();
        all.resize(before + count as usize, 0); // At most HEADER_BYTES_MAX, just checked.
        self.input.read_exact(&mut all[before..]).map_err(|source| self.io(source))?;
        self.at += count;
        Ok(())
    }

    fn check_left(&self, inside: Arguments<'_>, count: u64) -> Result<(), Error> {
        // Saturating is enough: no file and no header has 2^64 bytes.
        let bytes_needed = self.at.saturating_add(count);
        if bytes_needed > self.file_bytes {
            let (path, inside) = (self.path.to_owned(), inside.to_string());
            return Err(Error::Truncated { path, inside, bytes_needed, bytes_found: self.file_bytes });
        }
        if bytes_needed > HEADER_BYTES_MAX {
            return Err(self.malformed(format!("{inside} makes its header larger than {HEADER_BYTES_MAX} bytes")));
        }
        Ok(())
    }

    fn malformed(&self, reason: String) -> Error {
        Error::Malformed { path: self.path.to_owned(), reason }
    }

    fn io(&self, source: std::io::Error) -> Error {
        Error::Io { path: self.path.to_owned(), source }
    }
}

/// A name of one character, one dimension, type and offset, and padded data: what a tensor costs a file at least.
const TENSOR_BYTES_MIN: u64 = 8 + 1 + 4 + 8 + 4 + 8 + PADDING_MIN;
const PADDING_MIN: u64 = 8;

const MAGIC: [u8; 4] = *b"GGUF";
const VERSION: u32 = 3;

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let mut put = |ty: u32, bytes: &[u8]| {
        out.extend_from_slice(&ty.to_le_bytes());
        out.extend_from_slice(bytes);
    };
    match value {
        Value::U8(value) => put(0, &value.to_le_bytes()),
        Value::I8(value) => put(1, &value.to_le_bytes()),
        Value::U16(value) => put(2, &value.to_le_bytes()),
        Value::I16(value) => put(3, &value.to_le_bytes()),
        Value::U32(value) => put(4, &value.to_le_bytes()),
        Value::I32(value) => put(5, &value.to_le_bytes()),
        Value::F32(value) => put(6, &value.to_le_bytes()),
        Value::Bool(value) => put(7, &[u8::from(*value)]),
        Value::U64(value) => put(10, &value.to_le_bytes()),
        Value::I64(value) => put(11, &value.to_le_bytes()),
        Value::F64(value) => put(12, &value.to_le_bytes()),
        Value::String(text) => {
            put(8, &[]);
            put_string(out, text);
        }
        Value::Array(array) => {
            put(9, &[]);
            put_array(out, array);
        }
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    match array {
        Array::U8(elements) => put_elements(out, 0, elements, |value| value.to_le_bytes()),
        Array::I8(elements) => put_elements(out, 1, elements, |value| value.to_le_bytes()),
        Array::U16(elements) => put_elements(out, 2, elements, |value| value.to_le_bytes()),
        Array::I16(elements) => put_elements(out, 3, elements, |value| value.to_le_bytes()),
        Array::U32(elements) => put_elements(out, 4, elements, |value| value.to_le_bytes()),
        Array::I32(elements) => put_elements(out, 5, elements, |value| value.to_le_bytes()),
        Array::F32(elements) => put_elements(out, 6, elements, |value| value.to_le_bytes()),
        Array::Bool(elements) => put_elements(out, 7, elements, |&value| [u8::from(value)]),
        Array::U64(elements) => put_elements(out, 10, elements, |value| value.to_le_bytes()),
        Array::I64(elements) => put_elements(out, 11, elements, |value| value.to_le_bytes()),
        Array::F64(elements) => put_elements(out, 12, elements, |value| value.to_le_bytes()),
        Array::String(elements) => {
            put_elements_start(out, 8, elements.len());
            elements.iter().for_each(|text| put_string(out, text));
        }
    }
}

fn put_elements<T, const N: usize>(out: &mut Vec<u8>, ty: u32, elements: &[T], encode: impl Fn(&T) -> [u8; N]) {
    put_elements_start(out, ty, elements.len());
    elements.iter().for_each(|element| out.extend_from_slice(&encode(element)));
}

fn put_elements_start(out: &mut Vec<u8>, ty: u32, count: usize) {
    out.extend_from_slice(&ty.to_le_bytes());
    out.extend_from_slice(&(count as u64).to_le_bytes());
}

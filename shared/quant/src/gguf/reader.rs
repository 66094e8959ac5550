//! A GGUF file opened for reading.

use super::{FromValue, Header, TensorInfo, TensorType, Vocabulary, header};
use crate::{BlockType, Error, dequantize};
use std::{
    fs::File,
    io::{self, BufReader},
    path::{Path, PathBuf},
};

/// Holds the checked header and the open file. Tensors are read when asked for, at their own position, so one reader
/// serves several threads.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    data: Data,
    header: Header,
    data_start: u64,
}

#[derive(Debug)]
enum Data {
    File(File),
    Memory(Vec<u8>),
}

impl Reader {
    /// Refuses a file whose header breaks the format or whose data is not all there. A tensor of a type that we cannot
    /// decode does not stop it: only reading that tensor does.
    pub fn open(path: &Path) -> Result<Reader, Error> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let file_bytes = file.metadata().map_err(io)?.len();
        let (header, data_start) = header::parse(path, BufReader::new(&file), file_bytes)?;
        Ok(Reader { path: path.to_owned(), data: Data::File(file), header, data_start })
    }

    /// A file that is in memory; `name` stands for it in errors.
    pub fn of_bytes(name: &str, bytes: Vec<u8>) -> Result<Reader, Error> {
        let path = PathBuf::from(name);
        let (header, data_start) = header::parse(&path, bytes.as_slice(), bytes.len() as u64)?;
        Ok(Reader { path, data: Data::Memory(bytes), header, data_start })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The value of `key`, which must be there and of exactly this type: `let n: u32 = reader.required(…)?`.
    pub fn required<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, Error> {
        self.optional(key)?.ok_or_else(|| Error::MissingKey { path: self.path.clone(), key: key.to_owned() })
    }

    /// As [`required`](Self::required), with `None` for a missing key. A wrong type is still refused.
    pub fn optional<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, Error> {
        let Some(value) = self.header.value(key) else { return Ok(None) };
        match T::from_value(value) {
            Some(value) => Ok(Some(value)),
            None => Err(Error::WrongType {
                path: self.path.clone(),
                key: key.to_owned(),
                expected: T::EXPECTED,
                found: value.type_name().to_owned(),
            }),
        }
    }

    /// The tokenizer's keys, if they agree with each other.
    pub fn vocabulary(&self) -> Result<Vocabulary, Error> {
        Vocabulary::read(self)
    }

    pub fn tensors(&self) -> &[TensorInfo] {
        self.header.tensors()
    }

    pub fn tensor(&self, name: &str) -> Result<&TensorInfo, Error> {
        let missing = || Error::MissingTensor { path: self.path.clone(), tensor: name.to_owned() };
        self.header.tensor(name).ok_or_else(missing)
    }

    /// Refuses a file with a tensor of a block, or a bias, that is none of `used`: a decoder without it computes something
    /// else than the model. What is computed from keys instead, and what has no part in decoding, may be there.
    pub fn check_used(&self, used: impl Fn(&str) -> bool) -> Result<(), Error> {
        let counts = |name: &str| name.starts_with("blk.") || name.ends_with(".bias");
        // Old files repeat the rotary frequencies in every block.
        let is_left = |name: &str| counts(name) && !name.contains(".attn_rot_embd") && !used(name);
        match self.tensors().iter().find(|info| is_left(&info.name)) {
            Some(info) => Err(self.malformed(format!(
                "tensor `{}` belongs to no decoder that is supported, and answers without it would be wrong; \
                 use a model that does not have it",
                info.name
            ))),
            None => Ok(()),
        }
    }

    /// The raw blocks of a tensor.
    pub fn read_tensor(&self, name: &str) -> Result<Vec<u8>, Error> {
        Ok(self.read_blocks(name)?.1)
    }

    /// The values of a tensor, row-major and all finite.
    pub fn read_values(&self, name: &str) -> Result<Vec<f32>, Error> {
        let (ty, bytes) = self.read_blocks(name)?;
        let mut values = vec![0.0; self.tensor(name)?.elements()];
        // Lengths follow from the same shape, so only a scale can be at fault, and with it the file.
        dequantize(ty, &bytes, &mut values)
            .map_err(|error| self.malformed(format!("tensor `{name}`: cannot {error}")))?;
        Ok(values)
    }

    pub(crate) fn malformed(&self, reason: String) -> Error {
        Error::Malformed { path: self.path.clone(), reason }
    }

    /// The raw blocks of some rows of a matrix, into `bytes`, whose memory is used again.
    pub fn read_rows(&self, name: &str, first: usize, rows: usize, bytes: &mut Vec<u8>) -> Result<(), Error> {
        let info = self.tensor(name)?;
        let all: usize = info.shape[..info.shape.len() - 1].iter().product();
        if first.checked_add(rows).is_none_or(|end| end > all) {
            return Err(Error::WrongLength { what: "a matrix", unit: "rows", expected: all, found: first + rows });
        }
        // Rows are whole blocks, and the tensor is all there: `open` has compared it with the length of the file.
        let row_bytes = info.bytes / all as u64;
        let (start, length) = (self.data_start + info.offset + first as u64 * row_bytes, rows as u64 * row_bytes);
        let length = usize::try_from(length)
            .map_err(|_| self.malformed(format!("tensor `{name}` does not fit in this machine's memory")))?;
        bytes.resize(length, 0);
        self.read_at(start, bytes)
    }

    fn read_blocks(&self, name: &str) -> Result<(BlockType, Vec<u8>), Error> {
        let info = self.tensor(name)?;
        let TensorType::Block(ty) = info.ty else {
            let (path, tensor) = (self.path.clone(), name.to_owned());
            return Err(Error::UnsupportedType { path, tensor, found: info.ty.name() });
        };
        let Ok(byte_len) = usize::try_from(info.bytes) else {
            return Err(self.malformed(format!("tensor `{name}` does not fit in this machine's memory")));
        };
        // The sum cannot wrap: `open` has compared it with the length of the file.
        let start = self.data_start + info.offset;
        let mut bytes = vec![0; byte_len];
        self.read_at(start, &mut bytes)?;
        Ok((ty, bytes))
    }

    /// The caller has found that the data reaches so far.
    fn read_at(&self, start: u64, to: &mut [u8]) -> Result<(), Error> {
        match &self.data {
            Data::File(file) => {
                read_exact_at(file, to, start).map_err(|source| Error::Io { path: self.path.clone(), source })
            }
            Data::Memory(all) => {
                to.copy_from_slice(&all[start as usize..][..to.len()]);
                Ok(())
            }
        }
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = std::os::windows::fs::FileExt::seek_read(file, bytes, at)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes = &mut bytes[count..];
        at += count as u64;
    }
    Ok(())
}

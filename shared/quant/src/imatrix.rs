//! Importance matrices: how much each column of each weight matrix matters, measured on text.
//!
//! An [`Imatrix`] holds, by the GGUF name of a weight matrix, the sum over tokens of the squares of what its columns were
//! multiplied with, and how many tokens these were. Sums of several texts or devices simply add. It is stored as
//! llama-imatrix stores it, in a GGUF file: `NAME.in_sum2` F32 `[1, in]` and `NAME.counts` F32 `[1, 1]`.

use crate::gguf::{ALIGNMENT, Header, Reader, Strings, Writer};
use crate::{BlockType, Error, quantize};
use std::collections::BTreeMap;
use std::path::Path;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    sums: BTreeMap<String, Sums>,
    /// Where the text came from, for whoever reads the file.
    pub datasets: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Sums {
    squares: Vec<f32>,
    tokens: f32,
}

const SQUARES: &str = ".in_sum2";
const COUNTS: &str = ".counts";

impl Imatrix {
    pub fn open(path: &Path) -> Result<Imatrix, Error> {
        Imatrix::read(&Reader::open(path)?)
    }

    /// A file that is in memory; `name` stands for it in errors.
    pub fn of_bytes(name: &str, bytes: Vec<u8>) -> Result<Imatrix, Error> {
        Imatrix::read(&Reader::of_bytes(name, bytes)?)
    }

    fn read(reader: &Reader) -> Result<Imatrix, Error> {
        let refused = |reason: String| Error::Malformed { path: reader.path().to_owned(), reason };
        let kind: Option<&str> = reader.optional("general.type")?;
        if kind != Some("imatrix") {
            let found = kind.map_or("no general.type".to_owned(), |kind| format!("general.type `{kind}`"));
            return Err(refused(format!("it is no importance matrix: it has {found}, not `imatrix`")));
        }
        let datasets = reader.optional::<&Strings>("imatrix.datasets")?;
        let datasets = datasets.map_or(Vec::new(), |names| names.iter().map(str::to_owned).collect());
        let mut imatrix = Imatrix { sums: BTreeMap::new(), datasets };
        for info in reader.header().tensors() {
            let Some(name) = info.name.strip_suffix(SQUARES) else { continue };
            let counts = format!("{name}{COUNTS}");
            let [tokens] = reader.read_values(&counts)?[..] else {
                return Err(refused(format!("`{counts}` counts several matrices; only one of each name is supported")));
            };
            let squares = reader.read_values(&info.name)?;
            imatrix.add(name, &squares, tokens).map_err(|error| refused(format!("`{name}`: cannot {error}")))?;
        }
        if imatrix.sums.is_empty() {
            return Err(refused("it holds no sums of squares".to_owned()));
        }
        Ok(imatrix)
    }

    /// Writes the file; one that is there is replaced.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        Writer::replace(path, &self.to_bytes()?)
    }

    /// The bytes of the file, for who has a way of its own to write one.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let mut bytes = self.header()?.encode();
        for sums in self.sums.values() {
            for tensor in [&sums.squares[..], &[sums.tokens]] {
                bytes.extend(quantize(BlockType::F32, tensor)?);
                bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
            }
        }
        Ok(bytes)
    }

    fn header(&self) -> Result<Header, Error> {
        let mut header = Header::new();
        header.set("general.type", "imatrix");
        header.set("imatrix.datasets", self.datasets.clone());
        // Tokens of several devices come in no common chunks; one token each is what can be said of all.
        let most = self.sums.values().map(|sums| sums.tokens).fold(0.0, f32::max);
        header.set("imatrix.chunk_count", most as u32);
        header.set("imatrix.chunk_size", 1u32);
        for (name, sums) in &self.sums {
            header.add_tensor(&format!("{name}{SQUARES}"), &[1, sums.squares.len()], BlockType::F32)?;
            header.add_tensor(&format!("{name}{COUNTS}"), &[1, 1], BlockType::F32)?;
        }
        Ok(header)
    }

    /// Adds sums of squares over `tokens`; each must be finite and none negative, and a matrix has its columns for good.
    pub fn add(&mut self, name: &str, squares: &[f32], tokens: f32) -> Result<(), Error> {
        let wrong = |value: &f32| !value.is_finite() || *value < 0.0;
        if let Some(column) = squares.iter().position(wrong) {
            return Err(Error::Importance { column });
        }
        if wrong(&tokens) {
            return Err(Error::Refused { reason: format!("sums over {tokens} tokens") });
        }
        let empty = || Sums { squares: vec![0.0; squares.len()], tokens: 0.0 };
        let sums = self.sums.entry(name.to_owned()).or_insert_with(empty);
        if sums.squares.len() != squares.len() {
            let (expected, found) = (sums.squares.len(), squares.len());
            return Err(Error::WrongLength { what: "importance", unit: "numbers", expected, found });
        }
        sums.tokens += tokens;
        for (sum, square) in sums.squares.iter_mut().zip(squares) {
            *sum += square;
        }
        if !sums.tokens.is_finite() {
            return Err(Error::Refused { reason: "sums over too many tokens".to_owned() });
        }
        match sums.squares.iter().position(wrong) {
            Some(column) => Err(Error::Importance { column }),
            None => Ok(()),
        }
    }

    /// Adds everything that `other` knows.
    pub fn merge(&mut self, other: &Imatrix) -> Result<(), Error> {
        for (name, sums) in &other.sums {
            self.add(name, &sums.squares, sums.tokens)?;
        }
        self.datasets.extend(other.datasets.iter().cloned());
        Ok(())
    }

    /// Mean squares of the columns of a matrix, by its GGUF name. A matrix that saw no token counts every column alike, as
    /// in llama.cpp.
    pub fn columns(&self, name: &str) -> Option<Vec<f32>> {
        let sums = self.sums.get(name)?;
        Some(match sums.tokens > 0.0 {
            true => sums.squares.iter().map(|square| square / sums.tokens).collect(),
            false => vec![1.0; sums.squares.len()],
        })
    }

    /// Names of the matrices, with their columns.
    pub fn matrices(&self) -> impl Iterator<Item = (&str, usize)> {
        self.sums.iter().map(|(name, sums)| (name.as_str(), sums.squares.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_reads_back_as_it_was_written_and_sums_add() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("imatrix.gguf");
        let mut one = Imatrix { datasets: vec!["a.txt".to_owned()], ..Default::default() };
        one.add("blk.0.attn_q.weight", &[1.0, 0.0, 6.0], 2.0).unwrap();
        one.write(&path).unwrap();
        assert_eq!(Imatrix::open(&path).unwrap(), one);
        assert_eq!(one.to_bytes().unwrap(), std::fs::read(&path).unwrap());
        let mut both = one.clone();
        both.merge(&one).unwrap();
        both.add("blk.1.attn_q.weight", &[3.0], 0.0).unwrap();
        assert_eq!(both.columns("blk.0.attn_q.weight"), Some(vec![0.5, 0.0, 3.0]));
        assert_eq!(both.columns("blk.1.attn_q.weight"), Some(vec![1.0]));
        assert_eq!(both.columns("blk.2.attn_q.weight"), None);
        both.write(&path).unwrap();
        assert_eq!(Imatrix::open(&path).unwrap(), both);
    }

    #[test]
    fn impossible_sums_are_refused() {
        let mut imatrix = Imatrix::default();
        for bad in [f32::NAN, f32::INFINITY, -1.0] {
            assert!(matches!(imatrix.add("m", &[1.0, bad], 1.0), Err(Error::Importance { column: 1 })), "{bad}");
            assert!(matches!(imatrix.add("m", &[1.0, 1.0], bad), Err(Error::Refused { .. })), "{bad}");
        }
        imatrix.add("m", &[1.0, f32::MAX], 1.0).unwrap();
        assert!(matches!(imatrix.add("m", &[1.0, f32::MAX], 1.0), Err(Error::Importance { column: 1 })));
        assert!(matches!(imatrix.add("m", &[1.0], 1.0), Err(Error::WrongLength { expected: 2, found: 1, .. })));
    }

    #[test]
    fn files_of_another_kind_are_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        let write = |kind: &str, tensors: &[(&str, &[f32])]| {
            let mut header = Header::new();
            header.set("general.type", kind);
            for (name, values) in tensors {
                header.add_tensor(name, &[1, values.len()], BlockType::F32).unwrap();
            }
            let mut writer = Writer::create(&path, header).unwrap();
            for (name, values) in tensors {
                writer.write_tensor(name, &quantize(BlockType::F32, values).unwrap()).unwrap();
            }
            writer.finish().unwrap();
            Imatrix::open(&path).unwrap_err().to_string()
        };
        assert!(write("model", &[]).contains("`model`, not `imatrix`"));
        assert!(write("imatrix", &[]).contains("no sums"));
        assert!(write("imatrix", &[("m.in_sum2", &[1.0])]).contains("m.counts"));
        assert!(write("imatrix", &[("m.in_sum2", &[1.0]), ("m.counts", &[1.0, 2.0])]).contains("several"));
        assert!(write("imatrix", &[("m.in_sum2", &[-1.0]), ("m.counts", &[1.0])]).contains("negative"));
    }
}

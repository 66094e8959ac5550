//! The tensors that a file declares: names, shapes, types, and where each one lies in the data section.
//!
//! A [`TensorTable`] can only be built one valid tensor at a time, so its offsets leave no gap, never overlap and never
//! wrap. Reader and writer build it the same way; it never sees a file.

use super::ALIGNMENT;
use crate::BlockType;
use std::collections::{BTreeMap, btree_map::Entry};

#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    pub name: String,
    /// Row-major, `[out, in]` for a projection: the reverse of the order in the file. Blocks run along the last one.
    pub shape: Vec<usize>,
    pub ty: TensorType,
    /// From the beginning of the data section.
    pub offset: u64,
    pub bytes: u64,
}

impl TensorInfo {
    pub fn elements(&self) -> usize {
        self.shape.iter().product() // Cannot wrap: `TensorTable::push` has multiplied it in checked steps.
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TensorType {
    Block(BlockType),
    /// A file may hold such a tensor, and only reading it fails.
    Foreign(&'static ForeignType),
}

/// A ggml type that this crate cannot decode. Its geometry is known, so the tensors after it are found and bounded.
#[derive(Debug, PartialEq)]
pub struct ForeignType {
    pub ggml_id: u32,
    pub name: &'static str,
    block_elements: u64,
    block_bytes: u64,
}

impl TensorType {
    /// `None` for ids that ggml never used, has retired, or has assigned since.
    pub fn from_ggml_id(id: u32) -> Option<TensorType> {
        let foreign = || FOREIGN.iter().find(|ty| ty.ggml_id == id).map(TensorType::Foreign);
        BlockType::from_ggml_id(id).map(TensorType::Block).or_else(foreign)
    }

    pub fn ggml_id(self) -> u32 {
        match self {
            TensorType::Block(ty) => ty.ggml_id(),
            TensorType::Foreign(ty) => ty.ggml_id,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            TensorType::Block(ty) => ty.name(),
            TensorType::Foreign(ty) => ty.name,
        }
    }

    fn block_elements(self) -> u64 {
        match self {
            TensorType::Block(ty) => ty.block_elements() as u64,
            TensorType::Foreign(ty) => ty.block_elements,
        }
    }

    fn block_bytes(self) -> u64 {
        match self {
            TensorType::Block(ty) => ty.block_bytes() as u64,
            TensorType::Foreign(ty) => ty.block_bytes,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct TensorTable {
    alignment: u64,
    infos: Vec<TensorInfo>,
    by_name: BTreeMap<String, usize>,
    /// Where the next tensor begins: the padded sum of all so far.
    next_offset: u64,
}

impl TensorTable {
    /// `None` if `alignment` is not a power of two of at least eight, which the format demands.
    pub(super) fn new(alignment: u64) -> Option<TensorTable> {
        let sound = alignment.is_power_of_two() && alignment >= 8;
        sound.then(|| TensorTable { alignment, infos: Vec::new(), by_name: BTreeMap::new(), next_offset: 0 })
    }

    /// Makes room for so many tensors; the caller has found that the file has bytes for them.
    pub(super) fn reserve(&mut self, tensors: usize) {
        self.infos.reserve_exact(tensors);
    }

    /// Places a tensor behind the others, or says why no file can hold it.
    pub(super) fn push(&mut self, name: &str, shape: &[usize], ty: TensorType) -> Result<&TensorInfo, String> {
        if !is_name(name) || name.len() > NAME_BYTES_MAX {
            return Err(format!("tensor name {name:?} is not 1 to {NAME_BYTES_MAX} visible ASCII characters"));
        }
        if shape.is_empty() || shape.len() > DIMENSIONS_MAX {
            return Err(format!("tensor `{name}` has {} dimensions, not 1 to {DIMENSIONS_MAX}", shape.len()));
        }
        let row = shape[shape.len() - 1] as u64;
        if shape.contains(&0) || !row.is_multiple_of(ty.block_elements()) {
            return Err(format!("tensor `{name}` of shape {shape:?} has no whole blocks of {} per row", ty.name()));
        }
        let elements = shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n as u64));
        let elements = elements.filter(|&n| i64::try_from(n).is_ok() && usize::try_from(n).is_ok());
        let bytes = elements.and_then(|n| (n / ty.block_elements()).checked_mul(ty.block_bytes()));
        let padded = bytes.and_then(|bytes| bytes.checked_next_multiple_of(self.alignment));
        let end = padded.and_then(|padded| self.next_offset.checked_add(padded));
        let (Some(bytes), Some(end)) = (bytes, end) else {
            return Err(format!("tensor `{name}` of shape {shape:?} is larger than any file"));
        };

        match self.by_name.entry(name.to_owned()) {
            Entry::Occupied(_) => return Err(format!("tensor name `{name}` occurs twice")),
            Entry::Vacant(entry) => entry.insert(self.infos.len()),
        };
        let info = TensorInfo { name: name.to_owned(), shape: shape.to_vec(), ty, offset: self.next_offset, bytes };
        self.next_offset = end;
        self.infos.push(info);
        Ok(&self.infos[self.infos.len() - 1])
    }

    pub(super) fn alignment(&self) -> u64 {
        self.alignment
    }

    pub(super) fn infos(&self) -> &[TensorInfo] {
        &self.infos
    }

    pub(super) fn find(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&index| &self.infos[index])
    }

    /// Bytes of the data section with the padding of its last tensor.
    pub(super) fn padded_bytes(&self) -> u64 {
        self.next_offset
    }
}

impl Default for TensorTable {
    fn default() -> TensorTable {
        TensorTable::new(ALIGNMENT).expect("32 is a power of two above eight")
    }
}

pub(super) const NAME_BYTES_MAX: usize = 63;
pub(super) const DIMENSIONS_MAX: usize = 4;

/// Whether `name` can name a tensor or a key: visible ASCII, so that an error may print it to a terminal.
pub(super) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Every ggml type in use that `BlockType` lacks.
const FOREIGN: &[ForeignType] = &[
    foreign(9, "Q8_1", 32, 36),
    foreign(15, "Q8_K", 256, 292),
    foreign(16, "IQ2_XXS", 256, 66),
    foreign(17, "IQ2_XS", 256, 74),
    foreign(18, "IQ3_XXS", 256, 98),
    foreign(19, "IQ1_S", 256, 50),
    foreign(21, "IQ3_S", 256, 110),
    foreign(22, "IQ2_S", 256, 82),
    foreign(23, "IQ4_XS", 256, 136),
    foreign(24, "I8", 1, 1),
    foreign(25, "I16", 1, 2),
    foreign(26, "I32", 1, 4),
    foreign(27, "I64", 1, 8),
    foreign(28, "F64", 1, 8),
    foreign(29, "IQ1_M", 256, 56),
    foreign(39, "MXFP4", 32, 17),
    foreign(40, "NVFP4", 64, 36),
    foreign(41, "Q1_0", 128, 18),
    foreign(42, "Q2_0", 64, 18),
];

const fn foreign(ggml_id: u32, name: &'static str, block_elements: u64, block_bytes: u64) -> ForeignType {
    ForeignType { ggml_id, name, block_elements, block_bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_id_has_one_meaning() {
        for ty in FOREIGN {
            assert_eq!(BlockType::from_ggml_id(ty.ggml_id), None, "{} is decoded, so it is not foreign", ty.name);
            assert_eq!(TensorType::from_ggml_id(ty.ggml_id), Some(TensorType::Foreign(ty)));
        }
        for retired in [4, 5, 31, 32, 33, 36, 37, 38, 43, u32::MAX] {
            assert_eq!(TensorType::from_ggml_id(retired), None);
        }
    }

    #[test]
    fn tensors_lie_at_the_padded_sum_of_those_before() {
        let mut table = TensorTable::default();
        table.push("a", &[3], TensorType::Block(BlockType::F32)).unwrap();
        table.push("b", &[2, 64], TensorType::Block(BlockType::Q8_0)).unwrap();
        let last = table.push("c", &[1], TensorType::Block(BlockType::F16)).unwrap();
        assert_eq!((last.offset, last.bytes), (32 + 160, 2));
        assert_eq!(table.padded_bytes(), 32 + 160 + 32);
        assert_eq!(table.find("b").map(|info| info.offset), Some(32));
    }
}

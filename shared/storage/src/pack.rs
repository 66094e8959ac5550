//! A header and tensors in one run of bytes: what records and snapshots hold.

/// `u32` length of the header, the header, `u32` number of tensors, `u64` size of each, then their values: little-endian.
pub fn pack<'a>(header: &[u8], tensors: impl Iterator<Item = &'a [f32]> + Clone) -> Vec<u8> {
    let count = tensors.clone().count();
    let values: usize = tensors.clone().map(<[f32]>::len).sum();
    let mut bytes = Vec::with_capacity(8 + header.len() + 8 * count + 4 * values);
    bytes.extend((header.len() as u32).to_le_bytes());
    bytes.extend(header);
    bytes.extend((count as u32).to_le_bytes());
    tensors.clone().for_each(|tensor| bytes.extend((tensor.len() as u64).to_le_bytes()));
    tensors.flatten().for_each(|value| bytes.extend(value.to_le_bytes()));
    bytes
}

/// The inverse of [`pack`], bit for bit; none where a byte is missing or left over. Takes memory only for bytes that are
/// there.
pub fn unpack(bytes: &[u8]) -> Option<(&[u8], Vec<Vec<f32>>)> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (header, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    let (count, rest) = rest.split_first_chunk::<4>()?;
    let (sizes, mut values) = rest.split_at_checked((u32::from_le_bytes(*count) as usize).checked_mul(8)?)?;
    let mut tensors = Vec::new();
    for size in sizes.chunks_exact(8) {
        let size = u64::from_le_bytes(std::array::from_fn(|i| size[i]));
        let (tensor, behind) = values.split_at_checked(usize::try_from(size.checked_mul(4)?).ok()?)?;
        tensors.push(tensor.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect());
        values = behind;
    }
    values.is_empty().then_some((header, tensors))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_come_back_bit_for_bit() {
        let tensors = [vec![1.5, -0.0, f32::MIN_POSITIVE / 2.0, f32::NAN], Vec::new(), vec![f32::MAX]];
        let bytes = pack(b"{}", tensors.iter().map(Vec::as_slice));
        let (header, found) = unpack(&bytes).unwrap();
        assert_eq!(header, b"{}");
        let bits = |tensors: &[Vec<f32>]| -> Vec<Vec<u32>> {
            tensors.iter().map(|tensor| tensor.iter().map(|value| value.to_bits()).collect()).collect()
        };
        assert_eq!(bits(&found), bits(&tensors));
        for length in 0..bytes.len() {
            assert!(unpack(&bytes[..length]).is_none(), "{length}");
        }
        assert!(unpack(&[&bytes[..], &[0]].concat()).is_none());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = unpack(&bytes);
        }
    }
}

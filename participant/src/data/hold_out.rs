//! The records kept for evaluation.

use rand::{Rng, seq::index};

use super::Record;

/// Divides records into those to train on and those held out, both in their old order.
///
/// Whole records are divided, so that no piece of a held-out record is trained on; equal records may land on both sides.
/// Of two records or more, a share above 0 holds out at least one and leaves at least one. `share` is in [0, 1), which
/// the experiment has checked.
pub fn hold_out(records: Vec<Record>, share: f64, rng: &mut impl Rng) -> (Vec<Record>, Vec<Record>) {
    let count = records.len();
    if share <= 0.0 || count < 2 {
        return (records, Vec::new());
    }
    // A float cast saturates, so the clamp holds for any share.
    let held_count = ((count as f64 * share).round() as usize).clamp(1, count - 1);
    let mut held = vec![false; count];
    for number in index::sample(rng, count, held_count) {
        held[number] = true;
    }
    let mut marks = held.into_iter();
    // There is a mark for every record.
    let (held_out, train) = records.into_iter().partition(|_| marks.next() == Some(true));
    (train, held_out)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::{super::Content, *};

    proptest! {
        #[test]
        fn every_record_is_on_one_side(count in 0usize..80, share in 0.0f64..1.0, seed: u64) {
            let divide = || hold_out(records(count), share, &mut ChaCha20Rng::seed_from_u64(seed));
            let (train, held_out) = divide();
            prop_assert!(divide() == (train.clone(), held_out.clone()), "two runs differ");
            let mut lines: Vec<u64> = train.iter().chain(&held_out).map(|record| record.line).collect();
            lines.sort_unstable();
            prop_assert_eq!(lines, (0..count as u64).collect::<Vec<_>>());
            prop_assert!(train.is_sorted_by_key(|record| record.line) && held_out.is_sorted_by_key(|record| record.line));
            if count >= 2 && share > 0.0 {
                prop_assert!(!train.is_empty() && !held_out.is_empty());
            }
        }
    }

    #[test]
    fn the_share_is_kept() {
        let (train, held_out) = hold_out(records(200), 0.1, &mut ChaCha20Rng::seed_from_u64(5));
        assert_eq!((train.len(), held_out.len()), (180, 20));
    }

    #[test]
    fn nothing_is_held_out_of_one_record_or_at_share_0() {
        assert_eq!(hold_out(records(1), 0.5, &mut ChaCha20Rng::seed_from_u64(5)).1.len(), 0);
        assert_eq!(hold_out(records(9), 0.0, &mut ChaCha20Rng::seed_from_u64(5)).1.len(), 0);
    }

    fn records(count: usize) -> Vec<Record> {
        let record = |line| Record { content: Content::Text("text".into()), fields: BTreeMap::new(), line };
        (0..count as u64).map(record).collect()
    }
}

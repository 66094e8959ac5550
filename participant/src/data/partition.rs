//! One file dealt out to the participants of a swarm.
//!
//! Every record goes to exactly one participant and nobody goes without. What a record says is never looked at: only the
//! fields beside it are.

use std::collections::BTreeMap;

use experiment::Partition;
use rand::{Rng, seq::SliceRandom};
use rand_distr::{Distribution, Gamma, Open01};

use super::{DataError, Record, records::quoted};

/// One part per participant, each in the file's order.
///
/// `Iid` shuffles and deals round-robin. `Key` gives participant i the i-th value in sorted order; where there are more
/// values than participants, they are dealt round-robin from the one with most records to the one with fewest.
/// `Dirichlet` draws each value's shares anew, and whoever it leaves without a record is given one by whoever has most.
pub fn partition(
    records: Vec<Record>,
    partition: &Partition,
    count: usize,
    rng: &mut impl Rng,
) -> Result<Vec<Vec<Record>>, DataError> {
    if count == 0 || records.len() < count {
        let reason = format!("{} records for {count} participants; each needs at least one", records.len());
        return Err(DataError::Partition(reason));
    }
    let mut owners = match partition {
        Partition::Iid => deal_evenly(records.len(), count, rng),
        Partition::Key { column } => deal_by_key(&values(&records, column)?, column, records.len(), count)?,
        Partition::Dirichlet { column, alpha } => {
            let gamma = Gamma::new(alpha + 1.0, 1.0).ok().filter(|_| *alpha > 0.0 && alpha.is_finite());
            let Some(gamma) = gamma else {
                let reason = format!("data.partition.alpha = {alpha}; it must be a finite number above 0");
                return Err(DataError::Partition(reason));
            };
            deal_by_shares(&values(&records, column)?, records.len(), count, rng, |rng| {
                // Gamma(alpha) as Gamma(alpha + 1) · U^(1 / alpha), in logarithms: a small alpha would underflow.
                gamma.sample(rng).ln() + rng.sample::<f64, _>(Open01).ln() / alpha
            })
        }
    };
    give_everyone_one(&mut owners, count);

    let mut parts: Vec<Vec<Record>> = (0..count).map(|_| Vec::new()).collect();
    for (record, owner) in records.into_iter().zip(owners) {
        parts[owner].push(record);
    }
    Ok(parts)
}

/// The record numbers under each value of a column, which every record must have.
fn values<'a>(records: &'a [Record], column: &str) -> Result<BTreeMap<&'a str, Vec<usize>>, DataError> {
    let mut values: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (number, record) in records.iter().enumerate() {
        let Some(value) = record.fields.get(column) else {
            let found: Vec<String> = record.fields.keys().take(12).map(|name| quoted(name)).collect();
            let found = if found.is_empty() { "none".into() } else { found.join(", ") };
            return Err(DataError::Partition(format!(
                "the record of line {} has no column {} (data.partition.column); its columns beside the text: {found}",
                record.line,
                quoted(column)
            )));
        };
        values.entry(value).or_default().push(number);
    }
    Ok(values)
}

fn deal_evenly(records: usize, count: usize, rng: &mut impl Rng) -> Vec<usize> {
    let mut owners: Vec<usize> = (0..records).map(|number| number % count).collect();
    owners.shuffle(rng);
    owners
}

fn deal_by_key(
    values: &BTreeMap<&str, Vec<usize>>,
    column: &str,
    records: usize,
    count: usize,
) -> Result<Vec<usize>, DataError> {
    if values.len() < count {
        return Err(DataError::Partition(format!(
            "the column {} has {} values for {count} participants; start fewer, or deal out by dirichlet",
            quoted(column),
            values.len()
        )));
    }
    let mut groups: Vec<&Vec<usize>> = values.values().collect();
    if groups.len() > count {
        // The sort is stable: values of one size stay in sorted order.
        groups.sort_by_key(|group| std::cmp::Reverse(group.len()));
    }
    let mut owners = vec![0; records];
    for (group, owner) in groups.into_iter().zip((0..count).cycle()) {
        for number in group {
            owners[*number] = owner;
        }
    }
    Ok(owners)
}

/// Cuts each value's records, shuffled, at the cumulated shares of the participants. `log_weight` draws one share's
/// logarithm before normalization.
fn deal_by_shares<R: Rng>(
    values: &BTreeMap<&str, Vec<usize>>,
    records: usize,
    count: usize,
    rng: &mut R,
    log_weight: impl Fn(&mut R) -> f64,
) -> Vec<usize> {
    let mut owners = vec![0; records];
    for group in values.values() {
        let logs: Vec<f64> = (0..count).map(|_| log_weight(rng)).collect();
        let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        // The largest weight becomes 1, so the sum is at least 1.
        let weights: Vec<f64> = logs.iter().map(|log| (log - largest).exp()).collect();
        let total: f64 = weights.iter().sum();

        let mut numbers = group.clone();
        numbers.shuffle(rng);
        let mut cumulated = 0.0;
        let mut start = 0;
        for (owner, weight) in weights.iter().enumerate() {
            cumulated += weight;
            let last = owner + 1 == count;
            let end = if last { numbers.len() } else { (cumulated / total * numbers.len() as f64).round() as usize };
            let end = end.clamp(start, numbers.len());
            for number in &numbers[start..end] {
                owners[*number] = owner;
            }
            start = end;
        }
    }
    owners
}

/// Each participant without a record takes the last one of the participant with most, the first such of equals. There
/// are at least as many records as participants, so the one with most has two while anybody has none.
fn give_everyone_one(owners: &mut [usize], count: usize) {
    let mut sizes = vec![0usize; count];
    for owner in owners.iter() {
        sizes[*owner] += 1;
    }
    for poor in 0..count {
        if sizes[poor] > 0 {
            continue;
        }
        let richest = (0..count).rev().max_by_key(|owner| sizes[*owner]);
        let taken = richest.and_then(|rich| Some((rich, owners.iter().rposition(|owner| *owner == rich)?)));
        if let Some((rich, number)) = taken {
            owners[number] = poor;
            sizes[rich] -= 1;
            sizes[poor] += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::{super::Content, *};

    #[test]
    fn iid_parts_differ_by_one_record_at_most() {
        let parts = partition(records("aaaaaaaaaaa"), &Partition::Iid, 4, &mut rng(1)).unwrap();
        let mut sizes: Vec<usize> = parts.iter().map(Vec::len).collect();
        sizes.sort_unstable();
        assert_eq!(sizes, [2, 3, 3, 3]);
    }

    #[test]
    fn a_key_makes_natural_clients_in_sorted_order() {
        check_homes("cabbcc", 3, &["a", "bb", "ccc"]);
    }

    #[test]
    fn more_values_than_participants_are_dealt_by_size() {
        // Sizes: c 4, a 2, d 2, b 1. The first gets c and d, the second a and b.
        check_homes("ccccaaddb", 2, &["ccccdd", "aab"]);
    }

    #[test]
    fn fewer_values_than_participants_are_refused_with_both_numbers() {
        check_error(Partition::Key { column: "home".into() }, 3, "the column `home` has 2 values for 3 participants");
    }

    #[test]
    fn a_column_that_is_missing_is_named_with_those_that_are_there() {
        check_error(
            Partition::Key { column: "house".into() },
            2,
            "line 1 has no column `house` (data.partition.column)",
        );
        check_error(Partition::Key { column: "house".into() }, 2, "beside the text: `home`");
    }

    #[test]
    fn fewer_records_than_participants_are_refused() {
        check_error(Partition::Iid, 5, "4 records for 5 participants");
        check_error(Partition::Iid, 0, "4 records for 0 participants");
    }

    #[test]
    fn an_alpha_that_is_no_concentration_is_refused() {
        for alpha in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            check_error(Partition::Dirichlet { column: "home".into(), alpha }, 2, "data.partition.alpha");
        }
    }

    #[test]
    fn a_small_alpha_keeps_values_together_and_a_large_one_spreads_them() {
        let largest_share = |alpha| {
            let homes = "a".repeat(1000);
            let dirichlet = Partition::Dirichlet { column: "home".into(), alpha };
            let parts = partition(records(&homes), &dirichlet, 4, &mut rng(3)).unwrap();
            parts.iter().map(Vec::len).max().unwrap()
        };
        assert_eq!(largest_share(1e-6), 997, "one has all, but for one record each of the others");
        assert!((240..=260).contains(&largest_share(1e5)), "{}", largest_share(1e5));
    }

    proptest! {
        #[test]
        fn every_record_has_one_owner_and_nobody_is_empty(
            homes in "[a-f]{1,60}", count in 1usize..20, log_alpha in -8.0f64..8.0, seed: u64,
        ) {
            let column = || "home".to_owned();
            let dirichlet = Partition::Dirichlet { column: column(), alpha: log_alpha.exp() };
            for by in [Partition::Iid, Partition::Key { column: column() }, dirichlet] {
                let deal = || partition(records(&homes), &by, count, &mut rng(seed));
                let Ok(parts) = deal() else {
                    let values = homes.chars().collect::<std::collections::BTreeSet<_>>().len();
                    let by_key = matches!(by, Partition::Key { .. });
                    prop_assert!(homes.len() < count || (by_key && values < count));
                    continue;
                };
                prop_assert!(deal().unwrap() == parts, "two runs differ");
                prop_assert_eq!(parts.len(), count);
                prop_assert!(parts.iter().all(|part| !part.is_empty() && part.is_sorted_by_key(|record| record.line)));
                let mut lines: Vec<u64> = parts.iter().flatten().map(|record| record.line).collect();
                lines.sort_unstable();
                prop_assert_eq!(lines, (1..=homes.len() as u64).collect::<Vec<_>>());
            }
        }
    }

    fn rng(seed: u64) -> ChaCha20Rng {
        ChaCha20Rng::seed_from_u64(seed)
    }

    /// One record per letter, which is its home.
    fn records(homes: &str) -> Vec<Record> {
        let record = |(home, line): (char, u64)| Record {
            content: Content::Text("text".into()),
            fields: BTreeMap::from([("home".into(), home.to_string())]),
            line,
        };
        homes.chars().zip(1..).map(record).collect()
    }

    fn check_homes(homes: &str, count: usize, expected: &[&str]) {
        let by = Partition::Key { column: "home".into() };
        let parts = partition(records(homes), &by, count, &mut rng(1)).unwrap();
        let found: Vec<String> =
            parts.iter().map(|part| part.iter().map(|record| &*record.fields["home"]).collect()).collect();
        assert_eq!(found, expected);
    }

    fn check_error(by: Partition, count: usize, expected: &str) {
        let message = partition(records("aabb"), &by, count, &mut rng(1)).unwrap_err().to_string();
        assert!(message.contains(expected), "expected \"{expected}\" in \"{message}\"");
    }
}

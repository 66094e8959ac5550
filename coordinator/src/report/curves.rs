//! Losses over the course of a run, ready to be drawn: per optimizer step and per evaluated round.

use std::collections::{BTreeMap, BTreeSet};

use experiment::Row;

/// A number line position and a loss in nats per token; only finite losses are kept.
pub(super) type Points = Vec<(u32, f64)>;

#[derive(Debug, Default)]
pub(super) struct Curves {
    /// Positions count the optimizer steps of the whole run from 1.
    pub training: Curve,
    /// Positions are rounds; 0 is the base model.
    pub held_out: Curve,
}

#[derive(Debug, Default)]
pub(super) struct Curve {
    pub by_participant: BTreeMap<String, Points>,
    /// Unweighted, over those that have a loss there.
    pub mean: Points,
}

impl Curves {
    pub(super) fn new(rows: &[Row]) -> Self {
        // Whether steps count on from round to round or from 0 in each, (round, step) orders them. What was repeated
        // after a crash replaces what was there.
        let mut training = BTreeMap::<&str, BTreeMap<(u32, u64), f64>>::new();
        let mut held_out = BTreeMap::<&str, BTreeMap<(u32, u64), f64>>::new();
        for row in rows {
            match row {
                Row::Step { round, step, participant, loss_nats, .. } => {
                    training.entry(participant).or_default().insert((*round, *step), *loss_nats);
                }
                Row::Evaluation { round, participant, loss_nats, .. } => {
                    held_out.entry(participant).or_default().insert((*round, 0), *loss_nats);
                }
                _ => {}
            }
        }
        let steps: BTreeSet<_> = training.values().flat_map(|losses| losses.keys().copied()).collect();
        let position: BTreeMap<_, _> = steps.into_iter().zip(1..).collect();
        Self {
            training: Curve::new(training, |key| position[&key]),
            held_out: Curve::new(held_out, |(round, _)| round),
        }
    }
}

impl Curve {
    fn new(losses: BTreeMap<&str, BTreeMap<(u32, u64), f64>>, position: impl Fn((u32, u64)) -> u32) -> Self {
        let mut by_participant = BTreeMap::new();
        let mut sums = BTreeMap::<u32, (f64, u32)>::new();
        for (participant, losses) in losses {
            let finite = losses.into_iter().filter(|(_, loss)| loss.is_finite());
            let points: Points = finite.map(|(key, loss)| (position(key), loss)).collect();
            for (at, loss) in &points {
                let (sum, count) = sums.entry(*at).or_default();
                *sum += loss;
                *count += 1;
            }
            by_participant.insert(participant.to_owned(), points);
        }
        let mean = sums.into_iter().map(|(at, (sum, count))| (at, sum / f64::from(count))).collect();
        Self { by_participant, mean }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.mean.is_empty()
    }
}

/// At most about `points_max` points: neighbours are replaced by their mean.
pub(super) fn thinned(points: &[(u32, f64)], points_max: usize) -> Points {
    let together = points.len().div_ceil(points_max).max(1);
    let mean = |chunk: &[(u32, f64)]| chunk.iter().map(|(_, loss)| loss).sum::<f64>() / chunk.len() as f64;
    points.chunks(together).map(|chunk| (chunk[chunk.len() / 2].0, mean(chunk))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(round: u32, step: u64, participant: &str, loss_nats: f64) -> Row {
        let (participant, energy_j) = (participant.to_owned(), None);
        Row::Step {
            round,
            attempt: 1,
            step,
            participant,
            loss_nats,
            tokens: 1,
            compute_ms: 1.0,
            wait_ms: 1.0,
            energy_j,
        }
    }

    #[test]
    fn steps_are_counted_through_the_run_however_they_are_numbered() {
        let again = [step(1, 0, "a", 4.0), step(1, 1, "a", 3.0), step(2, 0, "a", 2.0), step(2, 0, "b", 1.0)];
        let on = [step(1, 0, "a", 4.0), step(1, 1, "a", 3.0), step(2, 2, "a", 2.0), step(2, 2, "b", 1.0)];
        for rows in [again, on] {
            let curves = Curves::new(&rows);
            assert_eq!(curves.training.by_participant["a"], [(1, 4.0), (2, 3.0), (3, 2.0)]);
            assert_eq!(curves.training.mean, [(1, 4.0), (2, 3.0), (3, 1.5)]);
        }
    }

    #[test]
    fn a_repeated_step_replaces_the_first_and_a_diverged_one_is_left_out() {
        let curves = Curves::new(&[step(1, 0, "a", 4.0), step(1, 0, "a", 5.0), step(1, 1, "a", f64::NAN)]);
        assert_eq!(curves.training.mean, [(1, 5.0)]);
    }

    #[test]
    fn thinning_keeps_few_points_as_they_are_and_averages_many() {
        let points: Points = (0..10).map(|at| (at, f64::from(at))).collect();
        assert_eq!(thinned(&points, 10), points);
        assert_eq!(thinned(&points, 5), [(1, 0.5), (3, 2.5), (5, 4.5), (7, 6.5), (9, 8.5)]);
        assert_eq!(thinned(&[], 5), []);
    }
}

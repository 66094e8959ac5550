//! Sequences packed into micro-batches, and micro-batches into optimizer steps.
//!
//! A micro-batch is made of whole sequences, one after the other, and of nothing else: there is no padding, and no
//! sequence is cut here. [`Batches`] goes on for ever, each epoch in another order, and can be taken up again from a
//! [`Position`]; [`evaluation_batches`] is one pass in a fixed order.

use std::fmt;

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha20Rng;

use super::{DataError, Sequence};

/// At most `batch_tokens` tokens for one forward pass.
#[derive(Clone, PartialEq, Eq)]
pub struct MicroBatch {
    pub tokens: Vec<u32>,
    /// Per token the one after it, where that is trained. A segment's last token has none: segments do not see each other.
    pub targets: Vec<Option<u32>>,
    /// Tokens of each sequence; they add up to `tokens.len()`.
    pub segments: Vec<u32>,
    /// How many targets there are.
    pub trained_tokens: u32,
}

impl MicroBatch {
    fn pack<'a>(sequences: impl Iterator<Item = &'a Sequence>) -> Self {
        let mut packed = Self { tokens: Vec::new(), targets: Vec::new(), segments: Vec::new(), trained_tokens: 0 };
        for sequence in sequences {
            let next = sequence.tokens().iter().zip(sequence.trained()).skip(1);
            packed.targets.extend(next.map(|(token, trained)| trained.then_some(*token)));
            packed.targets.push(None);
            packed.tokens.extend(sequence.tokens());
            // Both counts are at most batch_tokens, a u32.
            packed.segments.push(sequence.tokens().len() as u32);
            packed.trained_tokens += sequence.trained().iter().filter(|trained| **trained).count() as u32;
        }
        packed
    }
}

/// Where [`Batches`] stands: the next micro-batch it gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    pub epoch: u64,
    pub micro_batch: u64,
}

/// An endless run of optimizer steps of exactly `accumulate` micro-batches each. In every epoch each sequence appears
/// once; a step may hold the end of one epoch and the start of the next.
pub struct Batches {
    sequences: Vec<Sequence>,
    batch_tokens: usize,
    accumulate: u32,
    /// The order of epoch e comes from stream e of this generator, so that any epoch can be made without those before.
    order: ChaCha20Rng,
    epoch: u64,
    /// Sequence numbers of each micro-batch of the epoch.
    packed: Vec<Vec<usize>>,
    /// The next of `packed`; short of its length between calls, save right after a `seek` to an epoch's end.
    micro_batch: usize,
}

impl Batches {
    /// Draws the key of all its orders from `rng`, and nothing after that.
    pub fn new(
        sequences: Vec<Sequence>,
        batch_tokens: u32,
        accumulate: u32,
        rng: &mut impl Rng,
    ) -> Result<Self, DataError> {
        if sequences.is_empty() {
            return Err(DataError::Batches("no sequence has a token to train; add records".into()));
        }
        if accumulate == 0 {
            return Err(DataError::Batches("accumulate = 0 makes empty steps; set at least 1".into()));
        }
        check_fit(&sequences, batch_tokens)?;
        let order = ChaCha20Rng::from_seed(rng.random());
        let batch_tokens = batch_tokens as usize;
        let mut batches =
            Self { sequences, batch_tokens, accumulate, order, epoch: 0, packed: Vec::new(), micro_batch: 0 };
        batches.start_epoch(0);
        Ok(batches)
    }

    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, micro_batch: self.micro_batch as u64 }
    }

    /// How many sequences there are, and how many tokens in them.
    pub fn size(&self) -> [u64; 2] {
        let tokens: usize = self.sequences.iter().map(|sequence| sequence.tokens().len()).sum();
        [self.sequences.len() as u64, tokens as u64]
    }

    /// A draw of whole sequences of at most `tokens_max` tokens together, which leaves the steps and their position alone.
    pub fn sample(&self, tokens_max: u64) -> Vec<MicroBatch> {
        let mut rng = self.order.clone();
        // No epoch has this number.
        rng.set_stream(u64::MAX);
        let mut order: Vec<usize> = (0..self.sequences.len()).collect();
        order.shuffle(&mut rng);
        let mut tokens = 0;
        order.retain(|number| {
            let more = tokens + self.sequences[*number].tokens().len() as u64;
            let fits = more <= tokens_max;
            tokens = if fits { more } else { tokens };
            fits
        });
        let packed = first_fit(&self.sequences, order, self.batch_tokens);
        packed.iter().map(|numbers| self.pack(numbers)).collect()
    }

    fn pack(&self, numbers: &[usize]) -> MicroBatch {
        MicroBatch::pack(numbers.iter().map(|number| &self.sequences[*number]))
    }

    /// Goes on from a position that the same data and settings gave.
    pub fn seek(&mut self, position: Position) -> Result<(), DataError> {
        self.start_epoch(position.epoch);
        self.micro_batch = usize::try_from(position.micro_batch)
            .ok()
            .filter(|micro_batch| *micro_batch <= self.packed.len())
            .ok_or_else(|| {
                let Position { epoch, micro_batch } = position;
                let found = self.packed.len();
                DataError::Batches(format!(
                    "micro-batch {micro_batch} of epoch {epoch}, which has {found}: the data or its settings have changed"
                ))
            })?;
        Ok(())
    }

    fn start_epoch(&mut self, epoch: u64) {
        let mut rng = self.order.clone();
        rng.set_stream(epoch);
        let mut order: Vec<usize> = (0..self.sequences.len()).collect();
        order.shuffle(&mut rng);
        self.packed = first_fit(&self.sequences, order, self.batch_tokens);
        self.epoch = epoch;
        self.micro_batch = 0;
    }
}

impl Iterator for Batches {
    type Item = Vec<MicroBatch>;

    /// One optimizer step; never `None`.
    fn next(&mut self) -> Option<Vec<MicroBatch>> {
        let mut step = Vec::new();
        for _ in 0..self.accumulate {
            if self.micro_batch == self.packed.len() {
                self.start_epoch(self.epoch + 1);
            }
            step.push(self.pack(&self.packed[self.micro_batch]));
            self.micro_batch += 1;
        }
        Some(step)
    }
}

/// Every sequence once, in an order that depends on nothing else.
pub fn evaluation_batches(sequences: &[Sequence], batch_tokens: u32) -> Result<Vec<MicroBatch>, DataError> {
    check_fit(sequences, batch_tokens)?;
    let packed = first_fit(sequences, (0..sequences.len()).collect(), batch_tokens as usize);
    Ok(packed.iter().map(|numbers| MicroBatch::pack(numbers.iter().map(|number| &sequences[*number]))).collect())
}

fn check_fit(sequences: &[Sequence], batch_tokens: u32) -> Result<(), DataError> {
    let longest = sequences.iter().map(|sequence| sequence.tokens().len()).max().unwrap_or(0);
    if longest > batch_tokens as usize {
        return Err(DataError::Batches(format!(
            "a sequence of {longest} tokens does not fit into batch_tokens = {batch_tokens}; \
             raise it, or lower sequence_tokens_max"
        )));
    }
    Ok(())
}

/// Puts each sequence into the first micro-batch with room for it, of those opened last: looking at all of them would be
/// quadratic, and older ones are full but for a few tokens.
fn first_fit(sequences: &[Sequence], order: Vec<usize>, batch_tokens: usize) -> Vec<Vec<usize>> {
    const OPEN_MAX: usize = 64;
    let mut packed: Vec<Vec<usize>> = Vec::new();
    let mut room: Vec<usize> = Vec::new();
    for number in order {
        let tokens = sequences[number].tokens().len();
        let oldest = room.len().saturating_sub(OPEN_MAX);
        match (oldest..room.len()).find(|micro_batch| room[*micro_batch] >= tokens) {
            Some(micro_batch) => {
                packed[micro_batch].push(number);
                room[micro_batch] -= tokens;
            }
            None => {
                packed.push(vec![number]);
                room.push(batch_tokens - tokens);
            }
        }
    }
    packed
}

impl fmt::Debug for MicroBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tokens, segments, trained_tokens, .. } = self;
        write!(f, "MicroBatch({} tokens, {} segments, {trained_tokens} trained)", tokens.len(), segments.len())
    }
}

impl fmt::Debug for Batches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Batches({} sequences, at {:?})", self.sequences.len(), self.position())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn targets_are_the_next_tokens_of_the_same_segment() {
        let sequences = [
            Sequence::new(vec![1, 2, 3], vec![false, false, true]).unwrap(),
            Sequence::new(vec![4, 5], vec![false, true]).unwrap(),
        ];
        let expected = MicroBatch {
            tokens: vec![1, 2, 3, 4, 5],
            targets: vec![None, Some(3), None, Some(5), None],
            segments: vec![3, 2],
            trained_tokens: 2,
        };
        assert!(evaluation_batches(&sequences, 5).unwrap() == [expected]);
    }

    #[test]
    fn epochs_differ_and_equal_seeds_do_not() {
        let mut one = batches(&[4; 50], 16, 2, 7);
        let mut other = batches(&[4; 50], 16, 2, 7);
        let steps: Vec<_> = one.by_ref().take(14).collect();
        assert!(steps == other.by_ref().take(14).collect::<Vec<_>>());
        // 13 micro-batches of 4 sequences make an epoch, so the 14th begins the second.
        let flat: Vec<_> = steps.into_iter().flatten().collect();
        assert!(flat[0] != flat[13], "the second epoch begins like the first");
        assert!(flat[0] != batches(&[4; 50], 16, 2, 8).next().unwrap()[0], "two seeds give one order");
    }

    #[test]
    fn a_position_of_other_data_is_refused() {
        let error = batches(&[4; 50], 16, 2, 7).seek(Position { epoch: 3, micro_batch: 14 }).unwrap_err();
        assert!(error.to_string().contains("micro-batch 14 of epoch 3, which has 13"), "{error}");
    }

    #[test]
    fn what_cannot_be_batched_is_refused_with_numbers() {
        let rng = &mut ChaCha20Rng::seed_from_u64(1);
        assert!(Batches::new(Vec::new(), 16, 1, rng).is_err());
        assert!(Batches::new(sequences(&[4]), 16, 0, rng).is_err());
        let error = Batches::new(sequences(&[4, 17]), 16, 1, rng).unwrap_err().to_string();
        assert!(error.contains("17 tokens does not fit into batch_tokens = 16"), "{error}");
    }

    #[test]
    fn debug_shows_no_tokens() {
        let mut batches = batches(&[4; 3], 16, 1, 7);
        assert_eq!(format!("{batches:?}"), "Batches(3 sequences, at Position { epoch: 0, micro_batch: 0 })");
        assert_eq!(format!("{:?}", batches.next().unwrap()[0]), "MicroBatch(12 tokens, 3 segments, 9 trained)");
    }

    proptest! {
        #[test]
        fn an_epoch_holds_every_sequence_once(
            lengths in prop::collection::vec(2usize..20, 1..60), spare in 0u32..40, accumulate in 1u32..5, seed: u64,
        ) {
            let batch_tokens = 19 + spare;
            let mut batches = batches(&lengths, batch_tokens, accumulate, seed);
            let mut stream = Vec::new();
            for epoch in 0..3 {
                let count = batches.packed.len();
                while stream.len() < count {
                    let step = batches.next().unwrap();
                    prop_assert_eq!(step.len(), accumulate as usize);
                    stream.extend(step);
                }
                // A step that crosses into a later epoch repacks; sequences of this one are all in the stream by then.
                let mut seen: Vec<u32> = stream.drain(..count).flat_map(|batch| check_sound(&batch, batch_tokens)).collect();
                seen.sort_unstable();
                prop_assert_eq!(seen, (0..lengths.len() as u32).collect::<Vec<_>>(), "epoch {}", epoch);
                batches.seek(Position { epoch: epoch + 1, micro_batch: 0 }).unwrap();
                stream.clear();
            }
        }

        #[test]
        fn a_sample_holds_sequences_once_and_no_more_tokens_than_it_may(
            lengths in prop::collection::vec(2usize..20, 1..60), tokens_max in 20u64..400, before in 0usize..30, seed: u64,
        ) {
            let mut batches = batches(&lengths, 40, 2, seed);
            let sample = batches.sample(tokens_max);
            let mut seen: Vec<u32> = sample.iter().flat_map(|batch| check_sound(batch, 40)).collect();
            let tokens: u64 = sample.iter().map(|batch| batch.tokens.len() as u64).sum();
            let all = lengths.iter().sum::<usize>() as u64;
            prop_assert!(tokens <= tokens_max && tokens + 19 > tokens_max.min(all), "{} of {} tokens", tokens, all);
            let count = seen.len();
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), count);
            let _ = batches.by_ref().take(before).count();
            prop_assert!(batches.sample(tokens_max) == sample, "the sample depends on the position");
        }

        #[test]
        fn steps_go_on_from_a_saved_position(
            lengths in prop::collection::vec(2usize..20, 1..40), accumulate in 1u32..5, before in 0usize..30, seed: u64,
        ) {
            let mut one = batches(&lengths, 40, accumulate, seed);
            let _ = one.by_ref().take(before).count();
            let mut other = batches(&lengths, 40, accumulate, seed);
            other.seek(one.position()).unwrap();
            prop_assert!(one.take(10).collect::<Vec<_>>() == other.take(10).collect::<Vec<_>>());
        }

        #[test]
        fn evaluation_holds_every_sequence_once(lengths in prop::collection::vec(2usize..20, 0..60)) {
            let packed = evaluation_batches(&sequences(&lengths), 40).unwrap();
            let mut seen: Vec<u32> = packed.iter().flat_map(|batch| check_sound(batch, 40)).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len() as u32).collect::<Vec<_>>());
        }
    }

    /// Sequence i is made of the tokens 1000·i, 1000·i + 1, …, all trained but the first.
    fn sequences(lengths: &[usize]) -> Vec<Sequence> {
        let sequence = |(length, number): (&usize, u32)| {
            let tokens = (0..*length as u32).map(|position| 1000 * number + position).collect();
            Sequence::new(tokens, vec![true; *length]).unwrap()
        };
        lengths.iter().zip(0..).map(sequence).collect()
    }

    fn batches(lengths: &[usize], batch_tokens: u32, accumulate: u32, seed: u64) -> Batches {
        Batches::new(sequences(lengths), batch_tokens, accumulate, &mut ChaCha20Rng::seed_from_u64(seed)).unwrap()
    }

    /// Asserts what holds for every micro-batch, and returns the numbers of its sequences.
    fn check_sound(batch: &MicroBatch, batch_tokens: u32) -> Vec<u32> {
        let total: u32 = batch.segments.iter().sum();
        assert!(total <= batch_tokens, "{total} tokens in a micro-batch of {batch_tokens}");
        assert_eq!([batch.tokens.len(), batch.targets.len()], [total as usize; 2]);
        assert_eq!(batch.targets.iter().flatten().count(), batch.trained_tokens as usize);
        let mut start = 0;
        let segments = batch.segments.iter().map(|segment| {
            let range = start..start + *segment as usize;
            start = range.end;
            let (tokens, targets) = (&batch.tokens[range.clone()], &batch.targets[range]);
            assert_eq!(*targets.last().unwrap(), None, "the last token of a segment has a target");
            for (index, target) in targets.iter().enumerate().filter_map(|(index, target)| Some((index, (*target)?))) {
                assert_eq!(target, tokens[index + 1], "a target is not the next token");
            }
            assert!(tokens.iter().enumerate().all(|(index, token)| token % 1000 == index as u32), "a cut sequence");
            tokens[0] / 1000
        });
        segments.collect()
    }
}

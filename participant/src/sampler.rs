//! Which token comes next: a draw from logits, narrowed as asked for.
//!
//! In transformers' order: the penalty of tokens that occurred, the temperature, then what is cut off: all but the `top_k`
//! likeliest; all but the likeliest that together reach `top_p` (Holtzman et al. 2020, "The curious case of neural text
//! degeneration", section 3.1); all below `min_p` of the likeliest (Nguyen et al. 2024, "Turning up the heat", section 3).
//! This module reads no clock: the same seed draws the same tokens.

use experiment::Seed;
use rand::Rng;
use rand_chacha::ChaCha20Rng;

use crate::ParticipantError;

/// How to draw. The default always takes the likeliest token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 always takes the likeliest token.
    pub temperature: f64,
    /// 0 keeps all.
    pub top_k: usize,
    /// Over 0 to 1, which keeps all.
    pub top_p: f64,
    /// 0, which keeps all, to 1.
    pub min_p: f64,
    /// Over 0; 1 is none (Keskar et al. 2019, "CTRL", section 4.1). Counts are not: a token occurred, or it did not, in the
    /// prompt or the answer.
    pub repetition_penalty: f64,
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// # Errors
    /// If a number is none that it can be.
    pub fn check(&self) -> Result<(), ParticipantError> {
        match self.out_of_range() {
            Some((field, value, range)) => {
                // Large and small ones with a power of ten, and not with hundreds of digits.
                let value = format!("{value:?}");
                let value = value.trim_end_matches(".0");
                Err(ParticipantError::Usage(format!("{field} is {value}; give {range}")))
            }
            None => Ok(()),
        }
    }

    /// The first field whose number is none that it can be, that number, and those that it can be.
    pub(crate) fn out_of_range(&self) -> Option<(&'static str, f64, &'static str)> {
        let Self { temperature, top_k: _, top_p, min_p, repetition_penalty, seed: _ } = *self;
        let checks = [
            ("temperature", temperature, temperature >= 0.0 && temperature.is_finite(), "0 or more"),
            ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "more than 0 and at most 1"),
            ("min_p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1"),
            (
                "repetition_penalty",
                repetition_penalty,
                repetition_penalty > 0.0 && repetition_penalty.is_finite(),
                "more than 0; 1 is none",
            ),
        ];
        let wrong = checks.into_iter().find(|&(_, _, holds, _)| !holds);
        wrong.map(|(field, value, _, range)| (field, value, range))
    }
}

/// Draws the tokens of one answer.
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha20Rng,
    /// By token, whether it occurred; empty where nobody asks.
    occurred: Vec<bool>,
    /// Room for the tokens that are left, and their weights.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// The numbers of `sampling` have been [checked](Sampling::check).
    pub fn new(sampling: Sampling, vocabulary: usize) -> Self {
        let random = Seed(sampling.seed).generator("generate");
        let occurred = if sampling.repetition_penalty == 1.0 { Vec::new() } else { vec![false; vocabulary] };
        Self { sampling, random, occurred, candidates: Vec::new() }
    }

    /// Takes note of tokens of the prompt, or of the answer.
    pub fn note(&mut self, tokens: &[u32]) {
        for &token in tokens {
            if let Some(occurred) = self.occurred.get_mut(token as usize) {
                *occurred = true;
            }
        }
    }

    /// The next token. A logit that is no number is never drawn, unless all are.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        let Self { sampling, random, occurred, candidates } = self;
        let penalty = sampling.repetition_penalty as f32;
        let penalized = |(token, &logit): (usize, &f32)| match occurred.get(token) {
            Some(true) if logit > 0.0 => logit / penalty,
            Some(true) => logit * penalty,
            _ => logit,
        };
        let (mut best, mut max) = (0, f32::NEG_INFINITY);
        for (token, logit) in logits.iter().enumerate().map(|at| (at.0, penalized(at))) {
            if logit > max {
                (best, max) = (token as u32, logit);
            }
        }
        if sampling.temperature == 0.0 || max == f32::NEG_INFINITY {
            return best;
        }
        // Weights are e^((logit - max) / temperature): the likeliest has 1, whatever the temperature.
        let weight = |logit: f32| ((f64::from(logit) - f64::from(max)) / sampling.temperature).exp() as f32;
        candidates.clear();
        candidates
            .extend(logits.iter().enumerate().map(|at| (at.0 as u32, penalized(at))).filter(|at| at.1 > f32::MIN));
        // By likelihood, and in the order of the vocabulary among equals.
        let likelier = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if (1..candidates.len()).contains(&sampling.top_k) {
            candidates.select_nth_unstable_by(sampling.top_k - 1, likelier);
            candidates.truncate(sampling.top_k);
        }
        candidates.iter_mut().for_each(|(_, value)| *value = weight(*value));
        if sampling.top_p < 1.0 {
            let sum: f64 = candidates.iter().map(|&(_, weight)| f64::from(weight)).sum();
            // Tokens below this weight have less than 1 - top_p together, so the likeliest reach top_p without them: they
            // need not be sorted.
            let least = (1.0 - sampling.top_p) * sum / candidates.len() as f64;
            candidates.retain(|&(_, weight)| f64::from(weight) >= least);
            candidates.sort_unstable_by(likelier);
            let mut reached = 0.0;
            let whole = candidates.iter().position(|&(_, weight)| {
                reached += f64::from(weight);
                reached >= sampling.top_p * sum
            });
            candidates.truncate(whole.map_or(candidates.len(), |last| last + 1));
        }
        if sampling.min_p > 0.0 {
            candidates.retain(|&(_, weight)| f64::from(weight) >= sampling.min_p);
        }
        // One order, so that a seed draws the same token however the others were cut off.
        if sampling.top_k > 0 || sampling.top_p < 1.0 {
            candidates.sort_unstable_by_key(|&(token, _)| token);
        }
        let mut left = random.random::<f64>() * candidates.iter().map(|&(_, weight)| f64::from(weight)).sum::<f64>();
        let drawn = candidates.iter().find(|&&(_, weight)| {
            left -= f64::from(weight);
            left < 0.0
        });
        drawn.map_or(best, |&(token, _)| token)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DRAWS: usize = 4_000;

    /// How often each token is drawn.
    fn shares(logits: &[f32], sampling: Sampling, noted: &[u32]) -> Vec<f64> {
        let mut sampler = Sampler::new(sampling, logits.len());
        sampler.note(noted);
        let mut counts = vec![0.0; logits.len()];
        (0..DRAWS).for_each(|_| counts[sampler.choose(logits) as usize] += 1.0 / DRAWS as f64);
        counts
    }

    /// The distribution by the definitions, in f64, over a sorted list.
    fn expected(logits: &[f32], sampling: &Sampling, noted: &[u32]) -> Vec<f64> {
        let penalized = |token: usize| {
            let (logit, penalty) = (f64::from(logits[token]), sampling.repetition_penalty);
            match noted.contains(&(token as u32)) {
                true if logit > 0.0 => logit / penalty,
                true => logit * penalty,
                false => logit,
            }
        };
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| penalized(b).total_cmp(&penalized(a)));
        let keep = if sampling.top_k == 0 { logits.len() } else { sampling.top_k.min(logits.len()) };
        order.truncate(keep);
        let share = |order: &[usize]| -> Vec<f64> {
            // Relative to the likeliest: e to the others' power alone may be beyond all numbers.
            let below = |token: usize| (penalized(token) - penalized(order[0])) / sampling.temperature;
            let weights: Vec<f64> = order.iter().map(|&token| below(token).exp()).collect();
            let sum: f64 = weights.iter().sum();
            weights.iter().map(|weight| weight / sum).collect()
        };
        let of_all = share(&order);
        let reached = |count: usize| of_all[..count].iter().sum::<f64>();
        let count = (1..=order.len()).find(|&count| reached(count) >= sampling.top_p).unwrap_or(order.len());
        order.truncate(count);
        let of_most = share(&order);
        order.truncate(of_most.iter().filter(|&&share| share >= sampling.min_p * of_most[0]).count());
        let mut all = vec![0.0; logits.len()];
        order.iter().zip(share(&order)).for_each(|(&token, share)| all[token] = share);
        all
    }

    fn check(logits: &[f32], sampling: Sampling, noted: &[u32]) {
        let (found, expected) = (shares(logits, sampling.clone(), noted), expected(logits, &sampling, noted));
        for (token, (found, expected)) in found.iter().zip(&expected).enumerate() {
            // Five standard deviations of a count.
            let room = 5.0 * (expected * (1.0 - expected) / DRAWS as f64).sqrt();
            assert!((found - expected).abs() <= room, "{sampling:?}: token {token} {found}, not {expected}");
        }
    }

    #[test]
    fn shares_are_those_of_the_definitions() {
        let logits = [0.3, 2.5, -1.0, 1.9, 0.0, -4.0, 2.1, 1.1];
        let plain = Sampling { temperature: 1.0, seed: 3, ..Sampling::default() };
        check(&logits, plain.clone(), &[]);
        check(&logits, Sampling { temperature: 0.4, ..plain.clone() }, &[]);
        check(&logits, Sampling { temperature: 3.0, top_k: 3, ..plain.clone() }, &[]);
        check(&logits, Sampling { top_p: 0.7, ..plain.clone() }, &[]);
        check(&logits, Sampling { min_p: 0.3, ..plain.clone() }, &[]);
        check(&logits, Sampling { repetition_penalty: 1.8, ..plain.clone() }, &[1, 5, 3]);
        check(&logits, Sampling { repetition_penalty: 0.5, top_k: 5, top_p: 0.9, min_p: 0.1, ..plain }, &[6, 2]);
    }

    #[test]
    fn impossible_numbers_are_named() {
        let default = Sampling::default();
        for (sampling, name) in [
            (Sampling { temperature: -1.0, ..default.clone() }, "temperature"),
            (Sampling { temperature: f64::NAN, ..default.clone() }, "temperature"),
            (Sampling { top_p: 0.0, ..default.clone() }, "top_p"),
            (Sampling { top_p: 1.1, ..default.clone() }, "top_p"),
            (Sampling { min_p: -0.1, ..default.clone() }, "min_p"),
            (Sampling { repetition_penalty: 0.0, ..default.clone() }, "repetition_penalty"),
        ] {
            let error = sampling.check().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name} is ")), "{error}");
        }
        assert!(default.check().is_ok());
    }

    proptest! {
        #[test]
        fn a_seed_draws_the_same_and_nothing_that_is_cut_off(
            logits in prop::collection::vec(-20.0f32..20.0, 1..80),
            temperature in 0.01f64..5.0,
            top_k in 0usize..90,
            top_p in 0.01f64..=1.0,
            min_p in 0.0f64..=1.0,
            repetition_penalty in 0.5f64..2.0,
            seed: u64,
        ) {
            let sampling = Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed };
            let draw = || {
                let mut sampler = Sampler::new(sampling.clone(), logits.len());
                (0..20).map(|_| { let token = sampler.choose(&logits); sampler.note(&[token]); token }).collect::<Vec<_>>()
            };
            let tokens = draw();
            prop_assert_eq!(&tokens, &draw());
            for (i, &token) in tokens.iter().enumerate() {
                let of_definition = expected(&logits, &sampling, &tokens[..i]);
                // What is about as likely as what is kept may fall to either side by rounding.
                let least = of_definition.iter().copied().filter(|&share| share > 0.0).fold(1.0, f64::min);
                prop_assert!(
                    of_definition[token as usize] > 0.0 || least < 1e-5 || kept_nearly(&logits, &sampling, &tokens[..i], token),
                    "token {} of {:?}", token, of_definition
                );
            }
        }

        #[test]
        fn the_likeliest_token_is_what_is_left_of_every_narrow_choice(
            logits in prop::collection::vec(-20.0f32..20.0, 1..80), seed: u64,
        ) {
            let greedy = Sampler::new(Sampling { seed, ..Sampling::default() }, logits.len()).choose(&logits);
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(Some(greedy as usize), logits.iter().position(|&logit| logit == max));
            let warm = Sampling { temperature: 1.0, seed, ..Sampling::default() };
            for narrow in [
                Sampling { top_k: 1, ..warm.clone() },
                Sampling { top_p: 1e-9, ..warm.clone() },
                Sampling { min_p: 1.0, top_k: 1, ..warm.clone() },
                Sampling { temperature: 1e-9, ..warm },
            ] {
                prop_assert_eq!(Sampler::new(narrow, logits.len()).choose(&logits), greedy);
            }
        }
    }

    /// Whether a slightly wider choice holds the token.
    fn kept_nearly(logits: &[f32], sampling: &Sampling, noted: &[u32], token: u32) -> bool {
        let wider = Sampling {
            top_p: (sampling.top_p + 1e-5).min(1.0),
            min_p: (sampling.min_p - 1e-5).max(0.0),
            ..sampling.clone()
        };
        expected(logits, &wider, noted)[token as usize] > 0.0
    }

    #[test]
    fn what_is_no_number_is_not_drawn() {
        let logits = [f32::NAN, 1.0, f32::NEG_INFINITY, 0.5];
        for temperature in [0.0, 1.0] {
            let shares = shares(&logits, Sampling { temperature, ..Sampling::default() }, &[]);
            assert_eq!((shares[0], shares[2]), (0.0, 0.0));
        }
    }
}

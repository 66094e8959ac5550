//! Bytes that are nearly right, the same on every machine, and what a decoder takes for them.
//!
//! `HEADWATER_MUTATIONS` sets how often each decoder is run, 20,000 times unless it is set; scripts/check/hostile.sh asks for more.

use std::time::{Duration, Instant};

use kernels::CountingAllocator;

/// What any input may cost beside twice its size.
const SLACK_BYTES: usize = 64 * 1024;

/// Runs `decode` on mutations of `seeds` and on noise, and returns how many were accepted. Nothing may panic, hang, or
/// have more memory at a time than twice the input and 64 KiB.
pub fn check(memory: &CountingAllocator, what: &str, seeds: &[Vec<u8>], mut decode: impl FnMut(&[u8]) -> bool) -> u64 {
    let executions: u64 =
        std::env::var("HEADWATER_MUTATIONS").map_or(20_000, |number| number.parse().expect("a number"));
    for seed in seeds {
        assert!(decode(seed), "{what}: a seed that is refused");
    }
    let (mut accepted, mut worst) = (0, 0);
    for execution in 0..executions {
        let mut random = Random(execution.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let bytes = match random.below(16) {
            0 => (0..random.below(200)).map(|_| random.next() as u8).collect(),
            1 => (0..random.below(60)).map(|_| random.below(6) as u8).collect(),
            _ => mutated(&seeds[random.below(seeds.len())], &mut random),
        };
        let begun = Instant::now();
        memory.reset();
        accepted += u64::from(decode(&bytes));
        let found = memory.since_reset();
        worst = worst.max(found.peak.saturating_sub(2 * bytes.len()));
        assert!(
            found.peak <= 2 * bytes.len() + SLACK_BYTES,
            "{what}, execution {execution}: {} bytes at a time for {}",
            found.peak,
            bytes.len()
        );
        assert!(begun.elapsed() < Duration::from_secs(5), "{what}, execution {execution}: a hang");
    }
    println!("{executions} executions: {what}: {accepted} accepted, at most {worst} bytes beside twice the input");
    assert!(accepted < executions, "{what}: everything is accepted");
    accepted
}

fn mutated(sound: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len().max(1));
        match random.below(9) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at.min(bytes.len()), random.next() as u8),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            3 => {
                let numbers = [0, 1, 0x7f, 0xff, 1 << 31, u64::MAX, i64::MAX as u64, 1 << 61, 33];
                let number = numbers[random.below(numbers.len())].to_le_bytes();
                bytes.iter_mut().skip(at).zip(number).for_each(|(byte, new)| *byte = new);
            }
            // A length as messages have them, that claims what is not there.
            4 => {
                let claims: [&[u8]; 5] = [
                    &[250],
                    &[0xfb, 0xff, 0xff],
                    &[0xfc, 0, 0, 1, 0],
                    &[0xfc, 255, 255, 255, 255],
                    &[0xfd, 0, 0, 0, 0, 1, 0, 0, 0],
                ];
                let at = at.min(bytes.len());
                bytes.splice(at..at, claims[random.below(claims.len())].iter().copied());
            }
            5 => {
                let from = random.below(bytes.len().max(1));
                let some: Vec<u8> = bytes.iter().skip(from).take(random.below(40)).copied().collect();
                let at = at.min(bytes.len());
                bytes.splice(at..at, some);
            }
            _ if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            _ => {}
        }
    }
    bytes
}

/// Xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n
    }
}

//! How fast this machine reads memory: what bounds a model's tokens one after another.

use std::time::{Duration, Instant};

use crate::engine::{Engine, Task};
use crate::region::Region;
use crate::simd::Simd;

/// More than any last-level cache that a few cores share.
const BYTES: usize = 512 << 20;
/// What a task reads.
const PART: usize = 1 << 20;

/// Bytes per second in units of 10⁹, on all threads: the best of `samples` passes over half a gigabyte.
pub fn gigabytes_per_second(engine: &Engine, samples: usize) -> f64 {
    struct Read {
        start: usize,
        sums: std::sync::atomic::AtomicU32,
    }
    impl Task for Read {
        const KERNEL: &'static str = "bandwidth";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, i: usize) {
            let from = (self.start + i * PART) as *const f32;
            // SAFETY: the part lies within the memory; a sum of zeros, which the compiler does not know.
            unsafe {
                let mut sums = [S::splat(0.0); 8];
                let mut at = 0;
                while at < PART / 4 {
                    for (j, sum) in sums.iter_mut().enumerate() {
                        *sum = S::add(*sum, S::load(from.add(at + j * S::LANES)));
                    }
                    at += 8 * S::LANES;
                }
                let all = sums.into_iter().fold(0.0, |all, sum| all + S::sum(sum));
                self.sums.fetch_add(all as u32, std::sync::atomic::Ordering::Relaxed);
            }
        }
    }
    let memory = Region::new(BYTES, true);
    // Pages that were never written are all the same page of zeros.
    // SAFETY: the memory is this function's.
    unsafe { memory.start().as_ptr().write_bytes(1, BYTES) };
    let read = Read { start: memory.start().as_ptr() as usize, sums: Default::default() };
    let mut best = Duration::MAX;
    for _ in 0..samples.max(1) {
        let begun = Instant::now();
        engine.parallel(BYTES / PART, &read);
        best = best.min(begun.elapsed());
    }
    BYTES as f64 / best.as_secs_f64() / 1e9
}

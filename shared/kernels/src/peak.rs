//! What this machine can do at most: the tile alone, on numbers that stay in the first-level cache.

use std::time::{Duration, Instant};

use crate::engine::{Engine, Task};
use crate::product::Scratch;
use crate::simd::Simd;
use crate::tile::Tile;

/// Steps of the tile's sum: A and B fill some 14 KiB.
const DEPTH: usize = 64;
/// Tiles between two looks at the clock.
const TILES: usize = 200;

/// Multiply-adds, counted twice, per second in units of 10⁹: the median of `samples` short runs on all threads.
pub fn gflops(engine: &Engine, samples: usize) -> f64 {
    struct Tiles {
        pairs: bool,
        until: Instant,
        done: std::sync::atomic::AtomicU64,
    }
    impl Task for Tiles {
        const KERNEL: &'static str = "peak";

        #[inline(always)]
        unsafe fn run<S: Simd>(&self, _: usize) {
            let width = S::NV * S::LANES;
            let mut scratch = Scratch::new(DEPTH * (S::MR + width) + S::MR * width);
            let a = scratch.start();
            // SAFETY: the scratch is divided in three; all of it is initialized.
            unsafe {
                let b = a.add(DEPTH * S::MR);
                let c = b.add(DEPTH * width);
                let mut done = 0;
                while Instant::now() < self.until {
                    for _ in 0..TILES {
                        let apart = if self.pairs && S::PAIRS_BY_ROW { DEPTH } else { S::MR };
                        let tile = Tile::new(DEPTH, a, apart, b, width).into(c, width, S::MR, width, false);
                        match self.pairs {
                            true => S::tile::<true>(S::NV, &tile),
                            false => S::tile::<false>(S::NV, &tile),
                        }
                    }
                    let per_step = if self.pairs { 4 } else { 2 };
                    done += (TILES * DEPTH * S::MR * width * per_step) as u64;
                }
                self.done.fetch_add(done, std::sync::atomic::Ordering::Relaxed);
            }
        }
    }
    let mut rates: Vec<f64> = (0..samples.max(1))
        .map(|_| {
            let begun = Instant::now();
            let until = begun + Duration::from_millis(60);
            let tiles = Tiles { pairs: engine.multiplies_bf16(), until, done: Default::default() };
            engine.parallel(engine.threads(), &tiles);
            tiles.done.into_inner() as f64 / begun.elapsed().as_secs_f64() / 1e9
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

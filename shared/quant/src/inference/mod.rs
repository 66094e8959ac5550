//! Text from a GGUF file, in integers: reads it once, repacking as it reads, and runs it on [`kernels`].
//!
//! Start from [`Model::load`]. Weights keep the values that the file gives them; only activations are rounded, to a signed
//! byte under one scale for 32. What computes is [`kernels::inference`]; here is what a file's names, keys, block types
//! and row order mean for it.

mod config;
mod model;
mod pack;
#[cfg(test)]
mod tests;

pub use kernels::inference::{Adapter, CacheType, Layer, LayerFactors, RANK_MAX, Session};
pub use kernels::{Engine, Path as KernelPath, ask_for_shortest_turns};
pub use model::Model;

/// What this machine reads at most, in units of 10⁹ bytes per second: half a gigabyte, on all the engine's threads.
pub fn bandwidth_gb_per_s(engine: &Engine) -> f64 {
    kernels::bandwidth::gigabytes_per_second(engine, 5)
}

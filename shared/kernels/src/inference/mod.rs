//! Tokens through a decoder of [`quantized`](crate::quantized) weights: prompts in batches, then one token after another.
//!
//! Start from a [`Decoder`], which is weights alone and shared, and a [`Session`], which is one sequence: keys and values,
//! and room that is allocated once. A token passes through five *phases* a block, a prompt through eleven; within a phase
//! threads take tasks, and a phase begins when the one before is done. Nothing is allocated for a token.
//!
//! A token's normed activations are computed by every thread for itself: that is cheaper than one more phase.

mod adapter;
mod attention;
mod batch;
mod cache;
mod codes;
mod decoder;
mod numbers;
mod phases;
mod room;
mod rows;
mod session;
#[cfg(test)]
mod tests;
mod token;

pub use adapter::{Adapter, Layer, LayerFactors, RANK_MAX};
pub use cache::CacheType;
pub use decoder::{Decoder, DecoderBlock, Shape};
pub use session::Session;

//! Arithmetic of a decoder with frozen weights and trained adapters, on CPUs.
//!
//! A [`Block`] goes forwards and back over the rows of a [`Pass`], which may belong to several participants, each with its
//! adapter; [`Head`] is the loss behind the last block. What runs where is the [`Engine`]'s: a [`Path`] of instructions,
//! threads, and memory. This crate knows no files, no names and no tensors: plain slices enter and leave, and sizes that
//! do not agree are the caller's bug and panic.
//!
//! Invariants: a row's results depend on that row's segment and adapter alone, not on the batch around it nor on the number
//! of threads; the weights exist once, as they are stored.

mod adapter;
mod attention;
pub mod bandwidth;
mod block;
mod buffer;
mod counting;
mod decode;
mod engine;
mod frozen;
mod gate;
mod head;
pub mod inference;
mod kept;
mod measure;
mod norm;
mod pages;
mod path;
pub mod peak;
mod pool;
mod product;
pub mod quantized;
mod region;
mod rope;
mod rows;
mod simd;
mod tile;
mod turns;

pub use adapter::{BlockAdapter, LAYERS, Masks, Pair, PairGradients};
pub use block::{Block, BlockGradients, BlockWeights, GroupSaved, Keep, Pass, Saved, Stream};
pub use counting::{Allocations, CountingAllocator};
pub use decode::Cache;
pub use engine::Engine;
pub use frozen::{Frozen, FrozenBuilder, WeightType};
pub use head::Head;
pub use measure::{Inputs, add_second_moments};
pub use path::{PATH_VARIABLE, Path};
pub use rope::{HEAD_MAX, Rotation};
pub use turns::ask_for_shortest_turns;

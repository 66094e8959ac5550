//! The language model: a Llama-family decoder that can be cut into head, body and tail, its LoRA adapters and their
//! optimizer, its tokenizer, and the places its weights come from.
//!
//! Numbers enter and leave a [`Stage`] as plain [`Matrix`] buffers, so that nobody outside this crate sees the tensor
//! library, and this crate never sees a socket, a clock or a global random generator.
#![recursion_limit = "512"]

pub mod adapter;
pub mod bench;
mod channel_sums;
mod config;
mod error;
mod matrix;
mod moments;
pub mod optimizer;
mod part;
pub mod source;
pub mod stage;
pub mod tokenizer;
mod walk;

pub use adapter::{Adapter, AdapterConfig, AdapterTensor, Gradients};
pub use channel_sums::ChannelSums;
pub use config::{Family, Llama3Scaling, ModelConfig};
pub use error::ModelError;
pub use matrix::{Matrix, Segments};
pub use moments::{LayerInput, Moments};
pub use optimizer::AdamW;
pub use part::{Cut, Part};
pub use source::{Manifest, Source};
pub use stage::{ComputeDevice, Stage};
pub use tokenizer::Tokenizer;
pub use walk::{LmHead, Walk};

//! Quantized weights: ggml's block formats and the GGUF container they travel in.
//!
//! Start from [`gguf::Reader`] for a file of weights, [`gguf::Writer`] to make one, and [`BlockType`] for the numbers
//! inside. This crate never sees a tensor library, a socket or a tokenizer; it turns bytes into checked metadata and
//! finite `f32` values, and back. Every byte it reads is hostile until a constructor has checked it. FORMAT.md, beside
//! this code, is the byte map of what is read and written here.

pub mod blocks;
mod error;
pub mod gguf;
mod imatrix;
pub mod inference;
mod mix;
mod quantizer;
mod rope_rows;

pub use blocks::{BlockType, dequantize};
pub use error::Error;
pub use imatrix::Imatrix;
pub use mix::{Layout, Mix};
pub use quantizer::{Feedback, Method, quantize, quantize_row, quantize_row_with_feedback};
pub use rope_rows::{permute_rows, unpermute_rows};

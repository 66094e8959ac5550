//! A participant: a device that keeps its data, trains the head and tail of a model on it, and leaves the body to the
//! coordinator.
//!
//! Text, token ids and labels live in this crate alone; nothing here serializes them for the network, but for [`serve`],
//! which answers the programs that its owner lets ask. Start from
//! [`join`] for a device, [`trainer`] for what a step is, and [`cli`] for the commands.
#![recursion_limit = "512"]

pub mod answer;
pub mod bench_adapters;
pub mod bench_deadline;
pub mod bench_infer;
pub mod body_link;
pub mod calibrate;
pub mod cli;
pub mod data;
pub mod dataset;
pub mod device;
pub mod device_choice;
pub mod device_log;
mod encoder;
mod error;
pub mod evaluate;
pub mod grammar;
pub mod integer;
pub mod join;
pub mod keep;
pub mod local;
mod outgoing;
mod output;
mod parts;
mod progress;
pub mod runner;
pub mod sampler;
pub mod sequences;
pub mod serve;
pub mod session;
pub mod stages;
mod stop;
pub mod swarm;
pub mod trainer;

pub use error::ParticipantError;

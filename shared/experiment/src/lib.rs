//! An experiment: what is trained, how it is split, and how the rounds go.
//!
//! This crate turns a TOML file into a checked [`Experiment`], derives every random generator from its one seed by a
//! label, and owns the run directory and the metric rows written into it. It never sees a tensor or a socket, never
//! reads the clock, and an experiment never names a corpus: data belongs to the participant alone.

mod check;
mod config;
mod error;
mod metrics;
mod parse;
mod run_directory;
mod schedule;
mod seed;

pub use config::*;
pub use error::Error;
pub use metrics::{MetricsLog, Row};
pub use parse::{hex, skeleton};
pub use run_directory::{RunDirectory, write_atomically};
pub use seed::Seed;

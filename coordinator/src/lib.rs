//! The coordinator: hosts the body of the model, decides the rounds, and aggregates the adapters.
//!
//! It never sees text, labels or a corpus, and has no name for one. Decisions are pure ([`round`], [`barrier`],
//! [`strategy`], [`witness`]); [`run`] performs them, [`serve`] talks to one participant, [`body`] computes. Start from
//! [`cli`] for the commands.
#![recursion_limit = "512"]

pub mod aggregate;
pub mod barrier;
pub mod body;
mod checkpoint;
pub mod cli;
pub mod export;
pub mod factors;
pub mod fetch;
pub mod home;
pub mod journal;
pub mod report;
pub mod round;
pub mod run;
pub mod serve;
pub mod status;
pub mod strategy;
pub mod witness;

//! Whole runs: coordinator and participants in one process over in-memory connections, and once as real processes.
#![recursion_limit = "512"]

mod certificates;
mod datagrams;
mod durability;
mod hostile;
mod identities;
mod measuring;
mod oracle;
mod privacy;
mod processes;
mod scenarios;
mod world;

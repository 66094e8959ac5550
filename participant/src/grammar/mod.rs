//! Answers in a form that programs can read: JSON, or JSON that a schema allows.
//!
//! A [`Grammar`] is compiled once from a schema; a [`Matcher`] follows one answer byte by byte; a [`Spelling`] is what the
//! model's tokens spell, and says with a matcher which of them may come next. Everything that ends in time is valid: what the
//! schema language can say and we cannot promise is refused, never ignored.
//!
//! No crate does it: `llguidance` would switch `serde_json` for the whole workspace to maps in the order of insertion.

mod matcher;
mod place;
mod schema;
mod spelling;
#[cfg(test)]
mod tests;

pub use matcher::Matcher;
pub use schema::Grammar;
pub use spelling::{Allowed, Spelling};

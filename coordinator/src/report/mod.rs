//! What a run achieved and what it cost, from its directory alone: a summary, tables of it, and one page.
//!
//! Nothing here touches a socket, a tensor or the clock; a run may still be going on, or have been broken off, and its
//! report says so. Start from [`Report`].

mod curves;
mod figure;
mod page;
mod summary;
pub mod table;
mod traffic;
pub mod units;

use std::path::Path;

use experiment::RunDirectory;

pub use summary::{BodyTime, HeldOut, Loss, Participant, Round, Summary};
pub use traffic::{Directions, Traffic};

/// A run's summary in three forms.
#[derive(Debug)]
pub struct Report {
    /// `Serialize`, for `--json`.
    pub summary: Summary,
    /// Tables for a terminal.
    pub text: String,
    /// One HTML page that needs nothing but itself.
    pub page: String,
}

impl Report {
    /// The page's name in a run directory.
    pub const PAGE: &str = "report.html";

    pub fn of_run(run: &Path) -> Result<Self, ReportError> {
        let run = RunDirectory::open(run)?;
        let rows = run.rows()?.collect::<Result<Vec<_>, _>>()?;
        let summary = Summary::new(run.experiment(), &rows);
        let text = table::to_text(&summary);
        let page = page::to_html(&summary, &curves::Curves::new(&rows))?;
        Ok(Self { summary, text, page })
    }

    pub fn write_page(&self, path: &Path) -> Result<(), ReportError> {
        Ok(experiment::write_atomically(path, self.page.as_bytes())?)
    }
}

/// Why a run could not be reported on.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error(transparent)]
    Run(#[from] experiment::Error),
    /// A mistake of ours: the drawing goes into memory.
    #[error("draw a figure: {0}; please report it, and use --json meanwhile")]
    Figure(String),
}

#[cfg(test)]
mod tests;

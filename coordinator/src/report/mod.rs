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

use std::collections::BTreeSet;
use std::path::Path;

use experiment::{Row, RunDirectory};

use crate::checkpoint::load_row;

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
        // Before the rows are read, so that a round that ends meanwhile is not missed in them.
        let finished = run.finished_rounds()?;
        let mut rows = run.rows()?.collect::<Result<Vec<_>, _>>()?;
        let lost = lost_rounds(&rows, finished);
        // Where a round's directory has no row either, what it was is not known.
        rows.extend(lost.iter().filter_map(|round| load_row(&run, *round).ok().flatten()));
        let summary = Summary { lost_rounds: lost, ..Summary::new(run.experiment(), &rows) };
        let text = table::to_text(&summary);
        let page = page::to_html(&summary, &curves::Curves::new(&rows))?;
        Ok(Self { summary, text, page })
    }

    pub fn write_page(&self, path: &Path) -> Result<(), ReportError> {
        Ok(experiment::write_atomically(path, self.page.as_bytes())?)
    }
}

/// Finished rounds that the rows do not tell of.
fn lost_rounds(rows: &[Row], finished: u32) -> Vec<u32> {
    let mut lost: BTreeSet<u32> = (1..=finished).collect();
    for row in rows {
        if let Row::Round { round, .. } = row {
            lost.remove(round);
        }
    }
    lost.into_iter().collect()
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

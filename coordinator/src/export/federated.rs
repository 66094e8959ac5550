//! The importance matrices that lie in a run's directory, a file for each device.
//!
//! Devices' owners put them there, or the run has collected them itself; then whoever was in its last round is missed.

use std::fs;
use std::io;
use std::path::PathBuf;

use experiment::{Row, RunDirectory};

use super::ExportError;

/// The devices' files, in order of their names.
pub(super) fn files(run: &RunDirectory) -> Result<Vec<PathBuf>, ExportError> {
    let directory = run.imatrix_directory();
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries.collect::<Result<Vec<_>, _>>().map_err(ExportError::reading(&directory))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(ExportError::reading(&directory)(error)),
    };
    let mut files: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "gguf"));
    files.sort();
    if files.is_empty() {
        return Err(ExportError::NoImatrix { directory });
    }
    let missing = missing(run)?;
    match missing.is_empty() {
        true => Ok(files),
        false => Err(ExportError::MissingImatrix { directory, missing: missing.join(", ") }),
    }
}

/// Who was in the last round of a run that collects importance matrices, and has left none.
fn missing(run: &RunDirectory) -> Result<Vec<String>, ExportError> {
    if run.experiment().federation.imatrix_tokens == 0 {
        return Ok(Vec::new());
    }
    // Rows that were lost and found again stand behind later ones.
    let (mut last, mut members) = (0, Vec::new());
    for row in run.rows()? {
        match row? {
            Row::Round { round, members: those, .. } if round >= last => (last, members) = (round, those),
            _ => {}
        }
    }
    members.retain(|member| !run.imatrix_path(member).is_file());
    Ok(members)
}

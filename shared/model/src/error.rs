use std::path::PathBuf;

/// What can be wrong with a model, an adapter or numbers handed to them.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be read or written: mend the path, the rights or the disk.
    #[error("{path}: {source}; check the path and the disk")]
    Io { path: PathBuf, source: std::io::Error },
    /// A file's content is damaged, or is something this crate does not read: fetch or convert it again.
    #[error("{path}: {what}")]
    File { path: PathBuf, what: String },
    /// The same of a GGUF file, which the error names itself.
    #[error("failed to {0}")]
    Gguf(#[from] quant::Error),
    /// A file cannot be brought to the disk.
    #[error("failed to {0}")]
    Write(#[from] experiment::Error),
    /// The model's shape does not fit what is asked of it: change the experiment.
    #[error("{0}")]
    Mismatch(String),
    /// This program was built without that backend.
    #[error("backend `{0}` is not compiled in; build with `--features {0}`")]
    Backend(&'static str),
}

impl ModelError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn file(path: impl Into<PathBuf>, what: impl std::fmt::Display) -> Self {
        Self::File { path: path.into(), what: what.to_string() }
    }
}

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Every message finishes the sentence "failed to …" and names the file.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// Nothing of what was to be written counts, and what was there before still does: it may be tried again.
    #[error("write {}: {source}; free space on that disk, or check it", path.display())]
    Write { path: PathBuf, source: io::Error },
    /// What is on the disk is not known any more. Never tried again: a second fsync may succeed without the bytes (Rebello
    /// et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020). Start again from what is there.
    #[error("bring {} to the disk: {source}; check that disk, then start again", path.display())]
    Sync { path: PathBuf, source: io::Error },
    #[error("read {}: {source}; check the path and the disk", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// It is whole, but another run's, or of another version of this program.
    #[error("go on from {}: {what}; move it away to start without it", path.display())]
    Foreign { path: PathBuf, what: String },
}

impl StorageError {
    /// Whether the same may succeed once there is room, or the disk has recovered.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Write { source, .. } if source.kind() != ErrorKind::InvalidInput)
    }

    /// Whether the disk is full.
    pub fn is_full(&self) -> bool {
        let full = |source: &io::Error| matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
        matches!(self, Self::Write { source, .. } if full(source))
    }

    pub(crate) fn write(path: &Path) -> impl Fn(io::Error) -> Self {
        |source| Self::Write { path: path.to_owned(), source }
    }

    pub(crate) fn sync(path: &Path) -> impl Fn(io::Error) -> Self {
        |source| Self::Sync { path: path.to_owned(), source }
    }

    pub(crate) fn read(path: &Path) -> impl Fn(io::Error) -> Self {
        |source| Self::Read { path: path.to_owned(), source }
    }
}

/// What to do about a file's error, behind a semicolon; nothing where the error is one of ours, which says so itself.
pub fn remedy(error: &io::Error) -> &'static str {
    if error.get_ref().is_some() {
        return "";
    }
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "; free space on that disk, then start again",
        ErrorKind::NotFound => "; check the path and the directory this program was started in",
        ErrorKind::PermissionDenied => "; check who may use it, or start as the user it belongs to",
        ErrorKind::ReadOnlyFilesystem => "; name a place that can be written to",
        ErrorKind::IsADirectory => "; name a file in it, or move it away",
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
            "; something else has that name: name another path, or move it away"
        }
        ErrorKind::InvalidData => "; check that it is a text file in UTF-8",
        _ => "; check the path and the disk",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_says_what_to_do_is_not_corrected() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(remedy(&crate::replaceable(directory.path()).unwrap_err()), "");
        let missing = std::fs::read(directory.path().join("missing")).unwrap_err();
        assert_eq!(remedy(&missing), "; check the path and the directory this program was started in");
    }
}

//! Where a file that replaces another one goes.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// The path to rename a finished file to, so that `path` names it: a link stays, and what it leads to is replaced.
///
/// # Errors
/// If something is there that is no regular file (a rename would put a file in the place of a device or a pipe), if a
/// link leads nowhere, or if there is no directory for it.
pub fn replaceable(path: &Path) -> io::Result<PathBuf> {
    let refused = |kind, what| Err(io::Error::new(kind, what));
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => {
            refused(ErrorKind::IsADirectory, "it is a directory; name a file in it, or another path")
        }
        Ok(found) if !found.is_file() => {
            refused(ErrorKind::AlreadyExists, "something is there that is no regular file; choose another path")
        }
        Ok(_) if path.is_symlink() => fs::canonicalize(path),
        Ok(_) => Ok(path.to_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound && path.is_symlink() => {
            refused(ErrorKind::NotFound, "it is a link that leads nowhere; delete it, or choose another path")
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            match parent.is_none_or(Path::is_dir) {
                true => Ok(path.to_owned()),
                false => refused(ErrorKind::NotFound, "its directory is not there; make it, or choose another path"),
            }
        }
        Err(error) => Err(error),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn files_are_replaced_links_are_followed_and_nothing_else_is_touched() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("file"), "old").unwrap();
        symlink(path("file"), path("link")).unwrap();
        symlink(path("nowhere"), path("dangling")).unwrap();
        assert_eq!(replaceable(&path("file")).unwrap(), path("file"));
        assert_eq!(replaceable(&path("new")).unwrap(), path("new"));
        assert_eq!(replaceable(Path::new("new")).unwrap(), Path::new("new"));
        assert_eq!(replaceable(&path("link")).unwrap(), fs::canonicalize(path("file")).unwrap());
        for (path, complaint) in [
            (path("dangling"), "leads nowhere"),
            (path("missing/file"), "its directory is not there"),
            (directory.path().to_owned(), "it is a directory"),
            (PathBuf::from("/dev/null"), "no regular file"),
        ] {
            let error = replaceable(&path).unwrap_err().to_string();
            assert!(error.contains(complaint), "{error}");
        }
    }
}

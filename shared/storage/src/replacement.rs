//! A large file that appears under its name only once it is complete.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::replaceable;

/// Bytes on their way to a path. Until [`finish`](Self::finish), and after any failure, there is at the path what was there
/// before. They are kept beside it, so that renaming stays within one file system, in a file `.NAME.partial` that goes when
/// this is dropped; what a killed process left of one, the next one for the same path removes.
#[derive(Debug)]
pub struct Replacement {
    path: PathBuf,
    partial: PathBuf,
    /// Locked as long as it is written.
    file: BufWriter<File>,
    named: bool,
}

impl Replacement {
    /// # Errors
    /// If nothing can be put at `path` (see [`replaceable`]), or somebody else is about to.
    pub fn begin(path: &Path) -> io::Result<Self> {
        let path = replaceable(path)?;
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(".partial");
        let partial = path.with_file_name(name);
        let file = loop {
            match File::create_new(&partial) {
                Ok(file) => {
                    lock(&file)?;
                    // Before it was locked, somebody could take it for an abandoned one.
                    if is_at(&file, &partial)? {
                        break file;
                    }
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => remove_abandoned(&partial)?,
                Err(error) => return Err(error),
            }
        };
        Ok(Self { path, partial, file: BufWriter::new(file), named: false })
    }

    /// Where the bytes go; where a link leads, if the path was one.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file its name, when all of it has reached the disk.
    pub fn finish(mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        // Without locks somebody else may have begun anew.
        if !is_at(self.file.get_ref(), &self.partial)? {
            return Err(busy());
        }
        fs::rename(&self.partial, &self.path)?;
        self.named = true;
        // Makes the rename itself durable, where directories can be synced.
        if cfg!(unix) {
            let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
        }
        Ok(())
    }
}

impl Write for Replacement {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if !self.named && is_at(self.file.get_ref(), &self.partial).unwrap_or(false) {
            // The failure that led here has been reported; a leftover file is not worth another.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

/// Where the file system knows no locks, nobody is kept out.
fn lock(file: &File) -> io::Result<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => Ok(()),
        Err(TryLockError::Error(error)) => Err(error),
        Err(TryLockError::WouldBlock) => Err(busy()),
    }
}

fn busy() -> io::Error {
    io::Error::new(ErrorKind::ResourceBusy, "another program is writing this file; let it end, or choose another path")
}

/// Removes a partial file that nobody is writing. A new one is made instead of going on with this one, which may have got
/// its final name meanwhile.
fn remove_abandoned(partial: &Path) -> io::Result<()> {
    match partial.symlink_metadata() {
        Ok(found) if found.is_file() => {}
        Ok(_) => {
            let what = format!("{} is in the way and no file; move it", partial.display());
            return Err(io::Error::new(ErrorKind::AlreadyExists, what));
        }
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    match File::options().write(true).open(partial) {
        Ok(file) => {
            lock(&file)?;
            // Since it was opened it may have got its final name, and somebody may have begun anew.
            if !is_at(&file, partial)? {
                return Ok(());
            }
            match fs::remove_file(partial) {
                Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether the path still leads to this very file.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let opened = file.metadata()?;
    match path.symlink_metadata() {
        Ok(found) => Ok((found.dev(), found.ino()) == (opened.dev(), opened.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> io::Result<bool> {
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<OsString> {
        let mut names: Vec<OsString> =
            fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_has_its_old_content_until_the_new_one_is_complete() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "old").unwrap();
        let mut dropped = Replacement::begin(&path).unwrap();
        dropped.write_all(b"half").unwrap();
        dropped.flush().unwrap();
        drop(dropped);
        assert_eq!((fs::read(&path).unwrap(), names(directory.path())), (b"old".to_vec(), vec!["file".into()]));
        let mut finished = Replacement::begin(&path).unwrap();
        finished.write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        finished.finish().unwrap();
        assert_eq!((fs::read(&path).unwrap(), names(directory.path())), (b"new".to_vec(), vec!["file".into()]));
    }

    #[test]
    fn what_a_killed_process_left_is_replaced_and_what_a_living_one_writes_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(directory.path().join(".file.partial"), "long, and not the end of anything").unwrap();
        let mut first = Replacement::begin(&path).unwrap();
        first.write_all(b"first").unwrap();
        let second = Replacement::begin(&path).unwrap_err();
        assert!(second.to_string().contains("another program is writing"), "{second}");
        first.finish().unwrap();
        assert_eq!((fs::read(&path).unwrap(), names(directory.path())), (b"first".to_vec(), vec!["file".into()]));
        fs::create_dir(directory.path().join(".file.partial")).unwrap();
        let blocked = Replacement::begin(&path).unwrap_err().to_string();
        assert!(blocked.contains(".file.partial is in the way"), "{blocked}");
    }
}

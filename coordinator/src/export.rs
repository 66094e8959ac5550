//! Export: what a run has learned, as files that other programs open.
//!
//! This module owns which files there are, where they lie, and that none is replaced unasked. It finds the adapter of a
//! finished round and the base model the experiment names, and hands both to the writer of each format; a merged model
//! goes from disk to disk tensor by tensor and is never held whole, but to write a text. It trains nothing.
//! Start from [`export`].

mod budget;
mod calibration;
mod check;
mod error;
mod federated;
mod gguf;
mod huggingface;
mod importance;
mod merged;
mod safetensors;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use experiment::{Experiment, Row, RunDirectory};
use model::adapter::peft;
use model::{Adapter, Manifest, ModelConfig, Source};
use quant::{Imatrix, Method, Mix};
use serde::{Serialize, Serializer};

pub use budget::Budget;
pub use calibration::Calibration;
use calibration::Guide;
pub use check::Check;
pub use error::ExportError;
use merged::Merged;

/// How files are written.
#[derive(Debug, Clone)]
pub struct Options {
    /// How GGUF files choose their codes.
    pub method: Method,
    /// What [`Method::Search`] measures activations on.
    pub calibration: Calibration,
    /// Importance matrices, whose sums are added up; none for an export without. The single path `federated` stands for all
    /// files in the run's directory `imatrix/`.
    pub imatrix: Vec<PathBuf>,
    /// Replace files that are there.
    pub force: bool,
    pub check: Checks,
    /// Also write a GGUF file of so many bytes at most, whose types are chosen tensor by tensor.
    pub budget: Option<Budget>,
}

/// What happens once the files are written.
#[derive(Debug, Clone, PartialEq)]
pub enum Checks {
    Skip,
    /// Every file is read back, and its predictions are compared with the merged model's: on our own text and with the
    /// format's limit, unless others are given.
    Compare {
        text: Option<PathBuf>,
        limit_nats: Option<f64>,
    },
}

impl Default for Checks {
    fn default() -> Self {
        Self::Compare { text: None, limit_nats: None }
    }
}

impl Options {
    /// The files that are read beside the model.
    fn inputs(&self) -> impl Iterator<Item = &Path> {
        let calibration = match &self.calibration {
            Calibration::Text(path) => Some(path),
            Calibration::None | Calibration::Own => None,
        };
        let check = match &self.check {
            Checks::Compare { text, .. } => text.as_ref(),
            Checks::Skip => None,
        };
        self.imatrix.iter().chain(calibration).chain(check).map(PathBuf::as_path)
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            method: Method::Search,
            calibration: Calibration::Own,
            imatrix: Vec::new(),
            force: false,
            check: Checks::default(),
            budget: None,
        }
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
    let mut options = options.clone();
    if options.imatrix == [Path::new(FEDERATED)] {
        options.imatrix = federated::files(&run)?;
    } else if names_federated(&options) {
        return Err(ExportError::FederatedAndOthers { directory: run.imatrix_directory() });
    }
    let base = model::source::of_experiment(experiment)?;
    if !options.force {
        refuse_existing(formats, &options, out)?;
    }
    refuse_inputs(formats, &options, out, &[experiment.model.path.as_deref()])?;
    check_digest(&run, &*base)?;
    run.verify_round(round).map_err(|error| match error {
        experiment::Error::Damaged { .. } => ExportError::DamagedRound { round, source: error },
        // A file that cannot be read, which says itself what to do.
        error => ExportError::Run(error),
    })?;
    let adapter = Adapter::load(&run.round_path(round).join("adapter"), base.config())?;
    let name = format!("{}, round {round}", experiment.name);
    let job = Job { base: &*base, base_name: base_name(experiment), adapter: &adapter, name, seed: experiment.seed };
    job.write(formats, &options, out)
}

/// In place of importance matrices: those in the run directory.
const FEDERATED: &str = "federated";

fn names_federated(options: &Options) -> bool {
    options.imatrix.iter().any(|path| path == Path::new(FEDERATED))
}

/// The same for a model that nobody trained here: a Hugging Face directory or a GGUF file.
pub fn quantize(
    model: &Path,
    adapter: Option<&Path>,
    formats: &[Format],
    options: &Options,
    out: &Path,
) -> Result<Vec<Exported>, ExportError> {
    if adapter.is_none() && formats.contains(&Format::Peft) {
        return Err(ExportError::NoAdapter { model: model.to_owned() });
    }
    if names_federated(options) {
        return Err(ExportError::NoFederation { model: model.to_owned() });
    }
    if !options.force {
        refuse_existing(formats, options, out)?;
    }
    refuse_inputs(formats, options, out, &[Some(model), adapter])?;
    let base = model::source::open(model)?;
    let adapter = match adapter {
        Some(directory) => Adapter::load(directory, base.config())?,
        None => Adapter::none(),
    };
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
            let path = format.path(out);
            if let Format::Gguf(mix) = *format
                && wanted.iter().all(|file| file.path != path)
            {
                wanted.push(gguf::Wanted { choice: gguf::TypeChoice::Mix(mix), path });
            }
        }
        let told = !options.imatrix.is_empty();
        let searched = options.budget.is_some() || gguf::any_searched(merged.config(), &wanted, told);
        refuse_idle(formats, options, searched)?;
        // A text that cannot be read is better found now than behind all the work.
        let check = match &options.check {
            Checks::Skip => None,
            Checks::Compare { text: Some(path), limit_nats } => Some((check::read_text(&merged, path)?, *limit_nats)),
            Checks::Compare { text: None, limit_nats } => Some((check::own_text(&merged)?, *limit_nats)),
        };
        let mut formats: Vec<Format> = formats.to_vec();
        if let Some(budget) = options.budget {
            let types = budget::choose(&merged, &self.name, budget, options.method, self.seed)?;
            let path = Format::Budget.path(out);
            wanted.push(gguf::Wanted { choice: gguf::TypeChoice::Each(types), path });
            formats.push(Format::Budget);
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
                Format::Gguf(_) | Format::Budget => {
                    let written = wanted.iter().position(|file| file.path == path);
                    worst_errors[written.expect("it was wanted a few lines ago")]
                }
            };
            let sizes = format.files(out).into_iter().map(|file| match fs::metadata(&file) {
                Ok(metadata) => Ok(metadata.len()),
                Err(source) => Err(ExportError::Io { path: file, source }),
            });
            Ok(Exported { format, path, bytes: sizes.sum::<Result<u64, _>>()?, worst_error, check: None })
        };
        let mut exported = formats.iter().map(write).collect::<Result<Vec<_>, ExportError>>()?;
        if let Some((text, limit_nats)) = check {
            self.check(&merged, &mut exported, &text, limit_nats)?;
        }
        Ok(exported)
    }

    /// Reads back what was written, and compares its predictions on `text`.
    fn check(
        &self,
        merged: &Merged<'_>,
        exported: &mut [Exported],
        text: &[Vec<u32>],
        limit_nats: Option<f64>,
    ) -> Result<(), ExportError> {
        for adapter in exported.iter().filter(|exported| exported.format == Format::Peft) {
            if Adapter::load(&adapter.path, self.base.config())? != *self.adapter {
                return Err(ExportError::NotReadBack { path: adapter.path.clone(), what: "the adapter" });
            }
        }
        let models: Vec<&mut Exported> = exported.iter_mut().filter(|file| file.format != Format::Peft).collect();
        let limit = |format: Format| limit_nats.unwrap_or(format.limit_nats());
        let expected: Vec<_> = models
            .iter()
            .map(|file| check::Expected { path: file.path.clone(), limit_nats: limit(file.format) })
            .collect();
        if expected.is_empty() {
            return Ok(());
        }
        for (file, check) in models.into_iter().zip(check::check(merged, &expected, text)?) {
            file.check = Some(check);
        }
        Ok(())
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
    /// `model-budget.gguf`: the same, in types that [`Options::budget`] allows; not a format to ask for by name.
    Budget,
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

    /// The KL that a file of this format may lose per token before something must be wrong with it, or with the format for
    /// this model: several times what the format costs a small model.
    pub fn limit_nats(self) -> f64 {
        match self {
            Self::HuggingFace | Self::Peft | Self::Gguf(Mix::F32) => 1e-5,
            Self::Budget => 3.0,
            Self::Gguf(mix) => match mix {
                Mix::F32 | Mix::F16 | Mix::BF16 => 0.01,
                Mix::Q8_0 => 0.05,
                Mix::Q6_K => 0.1,
                Mix::Q5_K_M | Mix::Q5_K_S | Mix::Q5_1 | Mix::Q5_0 => 0.3,
                Mix::Q4_K_M | Mix::Q4_K_S | Mix::Q4_1 | Mix::Q4_0 | Mix::IQ4_NL => 0.8,
                Mix::Q3_K_L | Mix::Q3_K_M | Mix::Q3_K_S => 1.5,
                Mix::Q2_K | Mix::Q2_K_S | Mix::TQ2_0 | Mix::TQ1_0 => 3.0,
            },
        }
    }

    /// The file, or the directory of the files.
    fn path(self, out: &Path) -> PathBuf {
        match self {
            Self::HuggingFace => out.join("hf"),
            Self::Peft => out.join("peft"),
            Self::Gguf(mix) => out.join(format!("model-{}.gguf", mix.name().to_lowercase())),
            Self::Budget => out.join("model-budget.gguf"),
        }
    }

    fn files(self, out: &Path) -> Vec<PathBuf> {
        let path = self.path(out);
        match self {
            Self::HuggingFace => huggingface::FILES.map(|file| path.join(file)).to_vec(),
            Self::Peft => [peft::CONFIG_FILE, peft::WEIGHTS_FILE].map(|file| path.join(file)).to_vec(),
            Self::Gguf(_) | Self::Budget => vec![path],
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HuggingFace => f.write_str("hf"),
            Self::Peft => f.write_str("peft"),
            Self::Gguf(mix) => write!(f, "gguf:{}", mix.name().to_lowercase()),
            Self::Budget => f.write_str("gguf:budget"),
        }
    }
}

impl FromStr for Format {
    /// What to give instead.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|format| format.to_string() == text);
        found.ok_or_else(|| format!("the formats are {}", Self::ALL.map(|format| format.to_string()).join(", ")))
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
    /// How well its predictions are those of the merged model; nothing for an adapter, or where nobody asked.
    pub check: Option<Check>,
}

impl Exported {
    /// # Errors
    /// If the check found that the file loses more than its limit.
    pub fn verdict(&self) -> Result<(), ExportError> {
        match &self.check {
            Some(check) if !check.passed() => Err(ExportError::TooLossy {
                path: self.path.clone(),
                kl_nats: check.kl_nats,
                limit_nats: check.limit_nats,
            }),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { format, path, bytes, worst_error, check } = self;
        write!(f, "{format}: {}, {bytes} bytes, worst error {worst_error}", path.display())?;
        match check {
            Some(check) => write!(f, "\n  {check}"),
            None => Ok(()),
        }
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

fn refuse_existing(formats: &[Format], options: &Options, out: &Path) -> Result<(), ExportError> {
    let budget = options.budget.map(|_| &Format::Budget);
    for path in formats.iter().chain(budget).flat_map(|format| format.files(out)) {
        if path.try_exists().map_err(ExportError::io(&path))? {
            return Err(ExportError::Exists { path });
        }
    }
    Ok(())
}

/// Refuses what would be given for nothing; `searched` if any file has types whose codes are searched for.
fn refuse_idle(formats: &[Format], options: &Options, searched: bool) -> Result<(), ExportError> {
    let idle = |option, why| Err(ExportError::Idle { option, why });
    let measured = options.method == Method::Search && searched;
    if matches!(options.calibration, Calibration::Text(_)) && !measured {
        return idle("--calibrate", "it tells --quantizer search how to round, which none of these files needs");
    }
    if !options.imatrix.is_empty() && !searched {
        return idle("--imatrix", "it tells how to round to few bits, which none of these files needs");
    }
    let compared = options.budget.is_some() || formats.iter().any(|format| *format != Format::Peft);
    match &options.check {
        Checks::Compare { text: Some(_), .. } if !compared => {
            idle("--check-text", "an adapter alone is read back and compared value by value")
        }
        Checks::Compare { limit_nats: Some(_), .. } if !compared => {
            idle("--limit-kl", "an adapter alone is read back and compared value by value")
        }
        _ => Ok(()),
    }
}

/// Not even with --force.
fn refuse_inputs(
    formats: &[Format],
    options: &Options,
    out: &Path,
    models: &[Option<&Path>],
) -> Result<(), ExportError> {
    let budget = options.budget.map(|_| &Format::Budget);
    for path in formats.iter().chain(budget).flat_map(|format| format.files(out)) {
        let Ok(written) = path.canonicalize() else { continue };
        let is_read = |input: &&Path| input.canonicalize().is_ok_and(|input| written.starts_with(input));
        if let Some(input) = models.iter().flatten().copied().chain(options.inputs()).find(is_read) {
            return Err(ExportError::Input { path, input: input.to_owned() });
        }
    }
    Ok(())
}

/// Refuses another model than that of the experiment and that of the run's last start.
fn check_digest(run: &RunDirectory, base: &dyn Source) -> Result<(), ExportError> {
    let mut trained = None;
    for row in run.rows()? {
        if let Row::Run { model_digest, .. } = row? {
            trained = Some(model_digest);
        }
    }
    let expected = run.experiment().model.sha256.clone().into_iter().chain(trained).collect::<Vec<_>>();
    if expected.is_empty() {
        return Ok(());
    }
    let found = experiment::hex(&Manifest::of(base)?.digest());
    match expected.into_iter().find(|expected| *expected != found) {
        Some(expected) => Err(ExportError::OtherModel { origin: base.origin().to_owned(), expected, found }),
        None => Ok(()),
    }
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

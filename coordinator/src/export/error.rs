//! Why an export fails, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use model::{ModelError, tokenizer::TokenizerError};

use super::FEDERATED;

/// Why nothing, or not everything, was exported. Messages finish the sentence "failed to …".
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("export from {}: no round has finished yet; let the run finish one", run.display())]
    NoRound { run: PathBuf },
    #[error("export round {round}: the finished rounds are 1 to {finished}")]
    UnfinishedRound { round: u32, finished: u32 },
    #[error("export round {round}: failed to {source}; `coordinator run` makes it again, or give --round another one")]
    DamagedRound { round: u32, source: experiment::Error },
    #[error("write {}: it is already there; replace it with --force, or choose another directory", path.display())]
    Exists { path: PathBuf },
    #[error("write {}: it is part of {}, which is read; choose another --out", path.display(), input.display())]
    Input { path: PathBuf, input: PathBuf },
    /// The adapter would be merged into weights that it was not trained on.
    #[error(
        "use the model {}: its digest is {found}, but the run was made with that of digest {expected}; \
         bring back that model", origin.display()
    )]
    OtherModel { origin: PathBuf, expected: String, found: String },
    /// No GGUF runtime opens such a file.
    #[error("write a gguf file: the tokenizer has {tokens} tokens, but the embedding only {rows} rows")]
    Vocabulary { tokens: usize, rows: usize },
    #[error("export {} as peft: it is a whole model and has no adapter", model.display())]
    NoAdapter { model: PathBuf },
    #[error("keep to a budget of {bytes_max} bytes: the smallest choice of types takes {bytes_min}; allow that much")]
    SmallBudget { bytes_max: u64, bytes_min: u64 },
    #[error(
        "use the devices' importance matrices: {} holds none; put there (`mkdir -p` makes it) what `participant calibrate` \
         writes on each device", directory.display()
    )]
    NoImatrix { directory: PathBuf },
    #[error(
        "add up the devices' importance matrices: {} has none of {missing}, in the run's last round; put there what \
         `participant calibrate` gives their owners, or name the files to add with --imatrix", directory.display()
    )]
    MissingImatrix { directory: PathBuf, missing: String },
    #[error(
        "use `{FEDERATED}` beside other importance matrices: it stands for all files in {}; put the others there too, or \
         name every file", directory.display()
    )]
    FederatedAndOthers { directory: PathBuf },
    #[error(
        "use `{FEDERATED}`: {} is no run, whose devices it would stand for; name the files, or take `coordinator export` \
         for a run", model.display()
    )]
    NoFederation { model: PathBuf },
    /// Who gives an option and is not told that nothing came of it, believes that something did.
    #[error("use {option}: {why}; leave it out, or ask for a format that takes it")]
    Idle { option: &'static str, why: &'static str },
    #[error("use the importance matrix {}: {what}; collect it on this model", path.display())]
    OtherImatrix { path: PathBuf, what: String },
    #[error("calibrate on {}: {what}; give another text", path.display())]
    Text { path: PathBuf, what: String },
    #[error("read back {}: {what} differs from what was written; export again, and report this", path.display())]
    NotReadBack { path: PathBuf, what: &'static str },
    #[error(
        "trust {}: its predictions are {kl_nats:.4} nats per token (KL) from the merged model's, beyond the limit of \
         {limit_nats}; take a wider format, or allow it with --limit-kl", path.display()
    )]
    TooLossy { path: PathBuf, kl_nats: f64, limit_nats: f64 },
    #[error("export {tensor}: cannot {source}")]
    Tensor { tensor: String, source: quant::Error },
    #[error("read {}: {source}; check the path", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("write {}: {source}{}", path.display(), storage::remedy(source))]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Run(#[from] experiment::Error),
    /// The base model or the round's adapter.
    #[error("use the model: {0}")]
    Model(#[from] ModelError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Gguf(#[from] quant::Error),
}

impl ExportError {
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    pub(super) fn reading(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Read { path, source }
    }

    pub(super) fn tensor(tensor: &str) -> impl FnOnce(quant::Error) -> Self {
        let tensor = tensor.to_owned();
        move |source| Self::Tensor { tensor, source }
    }
}

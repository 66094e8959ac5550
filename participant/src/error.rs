use std::path::PathBuf;

use crate::data::DataError;
use crate::device_log::DeviceLogError;

/// Why a participant cannot go on. Whose fault it is decides what happens next: only what is
/// [retryable](Self::is_retryable) leads to another attempt.
#[derive(Debug, thiserror::Error)]
pub enum ParticipantError {
    /// The network or the coordinator.
    #[error(transparent)]
    Net(#[from] net::NetError),
    /// Nobody has answered in time where the coordinator should be.
    #[error(
        "the coordinator is not reachable: {address} did not answer within {waited_s:.1} s; check that it runs, and that \
         UDP gets there, or give another --address"
    )]
    Unreachable { address: String, waited_s: f64 },
    /// The owner's data.
    #[error("failed to {0}")]
    Data(#[from] DataError),
    /// A model, an adapter, or numbers that do not fit them.
    #[error(transparent)]
    Model(#[from] model::ModelError),
    /// A GGUF file that the integer engine cannot run.
    #[error("failed to {0}")]
    Gguf(#[from] quant::Error),
    /// An experiment's file or text.
    #[error("failed to {0}")]
    Experiment(#[from] experiment::Error),
    #[error(transparent)]
    Identity(#[from] net::IdentityError),
    #[error(transparent)]
    Invitation(#[from] net::InvitationError),
    #[error(transparent)]
    DeviceLog(#[from] DeviceLogError),
    #[error(transparent)]
    Tokenizer(#[from] model::tokenizer::TokenizerError),
    #[error("{}: {source}{}", path.display(), storage::remedy(source))]
    Io { path: PathBuf, source: std::io::Error },
    /// This device's state cannot be kept.
    #[error("failed to {0}")]
    Storage(#[from] storage::StorageError),
    /// The coordinator broke the protocol.
    #[error("the coordinator misbehaved: {0}")]
    Coordinator(String),
    /// The coordinator will not have this participant.
    #[error("the coordinator refused: {0}")]
    Refused(String),
    /// Another process has this device's identity, and has come later.
    #[error(
        "superseded: the same identity has connected from elsewhere and goes on in this one's place; stop that process \
         to go on here, or invite this device under a name of its own"
    )]
    Superseded,
    /// The owner pressed Ctrl-C, or sent SIGTERM.
    #[error("the device was stopped")]
    Stopped,
    /// A bug, which a panic has told of.
    #[error("a bug has ended it; the log says why")]
    Panicked,
    #[error("the loss is {loss_nats} at step {step}: lower training.learning_rate; nothing of it is kept")]
    Diverged { step: u64, loss_nats: f64 },
    #[error(
        "values of the adapter are not finite after {steps} steps: lower training.learning_rate; nothing of it is kept"
    )]
    DivergedAdapter { steps: u64 },
    /// The owner asked for something that does not go.
    #[error("{0}")]
    Usage(String),
}

impl ParticipantError {
    /// Whether connecting again may help.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Net(error) => error.is_retryable(),
            Self::Unreachable { .. } => true,
            _ => false,
        }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

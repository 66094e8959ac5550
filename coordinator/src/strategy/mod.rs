//! How the updates of a round become the next adapter: one small trait, one strategy per file.
//!
//! A [`Strategy`] sees flat vectors and weights, nothing else: which tensor a value belongs to, who sent it and whether it
//! is finite has been settled before. Sums are made in `f64` and in the order of `updates`, which the caller keeps by
//! name, so that a run can be repeated bit by bit. Start from [`from_experiment`].

mod adaptive;
mod fedadam;
mod fedavg;
mod fedavgm;
mod fedprox;
mod fedyogi;
mod median;
mod trimmed_mean;

pub use fedadam::FedAdam;
pub use fedavg::FedAvg;
pub use fedavgm::FedAvgM;
pub use fedprox::FedProx;
pub use fedyogi::FedYogi;
pub use median::Median;
pub use trimmed_mean::TrimmedMean;

/// One strategy aggregates one vector round after round: what it remembers belongs to that vector.
pub trait Strategy {
    /// The next global vector, from the present one and the vectors that the participants made of it. An error changes
    /// nothing of what the strategy remembers.
    fn aggregate(&mut self, global: &[f32], updates: &[Update<'_>]) -> Result<Vec<f32>, StrategyError>;

    /// What has to be written down for the run to be continued; empty where nothing is remembered.
    fn state(&self) -> Vec<(&'static str, &[f32])> {
        Vec::new()
    }

    /// Takes back what `state` gave, to be called before the first `aggregate`.
    fn restore(&mut self, state: Vec<(String, Vec<f32>)>) -> Result<(), StrategyError> {
        match state.into_iter().next() {
            None => Ok(()),
            Some((name, _)) => Err(StrategyError::UnknownState { name }),
        }
    }
}

/// A participant's vector and its weight in the mean, which is its trained tokens.
#[derive(Clone, Copy)]
pub struct Update<'a> {
    pub weight: f64,
    pub values: &'a [f32],
}

/// The caller handed over what cannot be aggregated, or the state of another strategy.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StrategyError {
    #[error("aggregate no updates: at least one is needed")]
    NoUpdates,
    #[error("aggregate update {index} of {found} values where the adapter has {expected}")]
    WrongLength { index: usize, expected: usize, found: usize },
    #[error("aggregate update {index} of weight {weight}: a weight is finite and not negative")]
    BadWeight { index: usize, weight: f64 },
    #[error("average {updates} updates whose weights sum to 0: one must have trained on some tokens")]
    NoWeight { updates: usize },
    #[error("trim the {trim} smallest and {trim} largest of {updates} updates: set `trim` below half of the quorum")]
    TooFewToTrim { updates: usize, trim: usize },
    #[error("restore a strategy that knows no state `{name}`: was the run started with another strategy?")]
    UnknownState { name: String },
    #[error("restore a strategy without its state `{name}`: was the run started with another strategy?")]
    MissingState { name: &'static str },
    #[error("continue from state `{name}` of {found} values where the adapter has {expected}")]
    WrongStateLength { name: &'static str, expected: usize, found: usize },
}

/// The strategy that the experiment names, at the start of its run.
pub fn from_experiment(strategy: &experiment::Strategy) -> Box<dyn Strategy + Send + Sync> {
    use experiment::Strategy as Named;
    match *strategy {
        Named::FedAvg => Box::new(FedAvg),
        Named::FedProx { mu: _ } => Box::new(FedProx),
        Named::FedAvgM { learning_rate, momentum } => Box::new(FedAvgM::new(learning_rate, momentum)),
        Named::FedAdam { learning_rate, beta1, beta2, tau } => Box::new(FedAdam::new(learning_rate, beta1, beta2, tau)),
        Named::FedYogi { learning_rate, beta1, beta2, tau } => Box::new(FedYogi::new(learning_rate, beta1, beta2, tau)),
        Named::TrimmedMean { trim } => Box::new(TrimmedMean::new(trim as usize)),
        Named::Median => Box::new(Median),
    }
}

/// What every strategy requires of its input.
fn check_updates(global: &[f32], updates: &[Update<'_>]) -> Result<(), StrategyError> {
    if updates.is_empty() {
        return Err(StrategyError::NoUpdates);
    }
    for (index, update) in updates.iter().enumerate() {
        let (expected, found) = (global.len(), update.values.len());
        if found != expected {
            return Err(StrategyError::WrongLength { index, expected, found });
        }
        let weight = update.weight;
        if !weight.is_finite() || weight < 0.0 {
            return Err(StrategyError::BadWeight { index, weight });
        }
    }
    Ok(())
}

/// Takes the vectors called `names` out of a state that must hold them and nothing else. An empty state is that of a
/// strategy which has not aggregated yet, and gives empty vectors.
fn take_state<const N: usize>(
    names: [&'static str; N],
    state: Vec<(String, Vec<f32>)>,
) -> Result<[Vec<f32>; N], StrategyError> {
    let mut taken = [const { None }; N];
    let is_fresh = state.is_empty();
    for (name, values) in state {
        match names.iter().position(|known| *known == name) {
            Some(index) => taken[index] = Some(values),
            None => return Err(StrategyError::UnknownState { name }),
        }
    }
    let mut vectors = [const { Vec::new() }; N];
    for ((vector, taken), name) in vectors.iter_mut().zip(taken).zip(names) {
        match taken {
            Some(values) => *vector = values,
            None if is_fresh => {}
            None => return Err(StrategyError::MissingState { name }),
        }
    }
    Ok(vectors)
}

#[cfg(test)]
mod tests;

//! `participant swarm`: many participants in one process, for experiments on one machine. Each has its own records,
//! identity and connection; they share the base weights in memory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use experiment::Experiment;
use model::source::BlobStore;
use net::Invitation;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::ParticipantError;
use crate::data::{Record, partition, read_records};
use crate::join::{Join, default_state};
use crate::session::{Keep, Participant, Records, Reporter};
use crate::stages::Stages;

/// A participant's name, and how it has ended.
pub type Ended = (String, Result<String, ParticipantError>);

pub struct Swarm {
    pub experiment: Experiment,
    pub count: usize,
    pub data: PathBuf,
    /// A directory of invitations, one per participant.
    pub invitations: PathBuf,
    pub address: Option<String>,
    pub store: BlobStore,
    pub patience: std::time::Duration,
    /// Becomes true when the devices are to leave the run.
    pub stop: watch::Receiver<bool>,
}

impl Swarm {
    /// Returns each participant's name, and the coordinator's last words to it or why it could not go on. Then the others
    /// still do: they end as the run does.
    ///
    /// # Errors
    /// If nobody could begin.
    pub async fn run(&self, reporter: impl Fn(&str) -> Arc<dyn Reporter>) -> Result<Vec<Ended>, ParticipantError> {
        let invitations = self.invitations()?;
        let records = read_records(&self.data, &self.experiment.data.columns)?;
        let mut generator = self.experiment.generator("partition");
        let parts = partition(records, &self.experiment.data.partition, self.count, &mut generator)?;
        let stages = Arc::new(Stages::default());
        let (mut running, mut names) = (JoinSet::new(), HashMap::new());
        for ((path, invitation), records) in invitations.into_iter().zip(parts) {
            let name = invitation.name.to_string();
            let mut participant = Participant {
                name: name.clone(),
                records: given(records),
                store: self.store.clone(),
                model: None,
                device: Default::default(),
                prepared: None,
                keep: None,
                measured: Default::default(),
                welcomes: 0,
                stages: stages.clone(),
                reporter: reporter(&name),
            };
            let state = default_state(&path);
            participant.keep = Some(Keep::in_state(&state));
            let join = Join {
                invitation,
                address: self.address.clone(),
                state,
                patience: self.patience,
                stop: self.stop.clone(),
            };
            let task = running.spawn(async move { join.run(&mut participant).await });
            names.insert(task.id(), name);
        }
        let mut ended = Vec::new();
        while let Some(joined) = running.join_next_with_id().await {
            let (task, result) = match joined {
                Ok((task, result)) => (task, result),
                Err(error) => (error.id(), Err(ParticipantError::Panicked)),
            };
            let name = names.remove(&task).expect("every task has a name");
            match &result {
                Ok(_) | Err(ParticipantError::Stopped) => {}
                Err(error) => tracing::error!(participant = %name, %error, "a participant cannot go on; the others do"),
            }
            ended.push((name, result));
        }
        ended.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(ended)
    }

    fn invitations(&self) -> Result<Vec<(PathBuf, Invitation)>, ParticipantError> {
        let directory = &self.invitations;
        let entries = std::fs::read_dir(directory).map_err(ParticipantError::io(directory))?;
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.map_err(ParticipantError::io(directory))?.path();
            if path.extension().is_some_and(|extension| extension == "invite") {
                paths.push(path);
            }
        }
        paths.sort_by_key(|path| natural_order(path));
        if paths.len() < self.count {
            return Err(ParticipantError::Usage(format!(
                "{} holds {} invitations for {} participants; make them with `coordinator invite HOME NAME --count {} --out {}`",
                directory.display(),
                paths.len(),
                self.count,
                self.count,
                directory.display()
            )));
        }
        paths.truncate(self.count);
        paths.into_iter().map(|path| Ok((path.clone(), Invitation::read(&path)?))).collect()
    }
}

/// `device-10` comes behind `device-9`.
fn natural_order(path: &Path) -> (String, u64) {
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let letters = stem.trim_end_matches(|c: char| c.is_ascii_digit()).to_owned();
    let number = stem[letters.len()..].parse().unwrap_or(0);
    (letters, number)
}

fn given(records: Vec<Record>) -> Records {
    Box::new(move |_| Ok(records.clone()))
}

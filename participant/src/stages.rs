//! Base weights in memory, loaded once per process: the participants of a swarm share them.

use std::sync::{Arc, Mutex, MutexGuard};

use model::{ComputeDevice, Part, Source, Stage};

use crate::ParticipantError;

#[derive(Default)]
pub struct Stages {
    loaded: Mutex<Vec<([u8; 32], Arc<Stage>)>>,
}

/// The stages of one model. Others wait until it is dropped, so that nothing is loaded twice.
pub struct LoadedStages<'a> {
    model_digest: [u8; 32],
    loaded: MutexGuard<'a, Vec<([u8; 32], Arc<Stage>)>>,
}

impl Stages {
    pub fn of_model(&self, model_digest: [u8; 32]) -> LoadedStages<'_> {
        // A poisoned list is whole: a load that panicked has added nothing.
        let loaded = self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        LoadedStages { model_digest, loaded }
    }
}

impl LoadedStages<'_> {
    pub fn load(
        &mut self,
        source: &dyn Source,
        part: Part,
        device: &ComputeDevice,
    ) -> Result<Arc<Stage>, ParticipantError> {
        let mut same_model =
            self.loaded.iter().filter(|(digest, _)| *digest == self.model_digest).map(|(_, stage)| stage);
        let on_device = |stage: &&Arc<Stage>| stage.device().keeps_weights_as(device);
        if let Some(stage) = same_model.clone().find(|stage| *stage.part() == part && on_device(stage)) {
            return Ok(stage.clone());
        }
        // A head or a tail can lend the embedding.
        let lend = same_model.find(|stage| (stage.part().embedding || stage.part().lm_head) && on_device(stage));
        let stage = Arc::new(Stage::load(source, part, device, lend.map(|stage| &**stage))?);
        self.loaded.push((self.model_digest, stage.clone()));
        Ok(stage)
    }
}

//! What a device decides for itself about its arithmetic.

use experiment::{Backend, Device, WeightType};

/// Absent: as the experiment says.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceChoice {
    pub backend: Option<Backend>,
    pub threads: Option<u32>,
    pub weights: Option<WeightType>,
    pub recompute: Option<bool>,
}

impl DeviceChoice {
    pub fn over(self, experiment: &Device) -> Device {
        Device {
            backend: self.backend.unwrap_or(experiment.backend),
            threads: self.threads.unwrap_or(experiment.threads),
            weights: self.weights.unwrap_or(experiment.weights),
            recompute: self.recompute.unwrap_or(experiment.recompute),
        }
    }
}

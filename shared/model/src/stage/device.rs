use burn::tensor::Device;
use experiment::Backend;

use crate::ModelError;

/// Where tensors live: one of the backends that were compiled in, chosen by the experiment.
#[derive(Clone, Debug)]
pub struct ComputeDevice {
    device: Device,
    backend: Backend,
}

impl ComputeDevice {
    /// # Errors
    /// If the backend was not compiled in.
    pub fn new(backend: Backend) -> Result<Self, ModelError> {
        let device = match backend {
            #[cfg(feature = "flex")]
            Backend::Flex => Device::flex(),
            #[cfg(feature = "ndarray")]
            #[allow(deprecated)] // Our user named burn-ndarray; burn keeps it as a second opinion.
            Backend::Ndarray => Device::ndarray(),
            #[cfg(feature = "cuda")]
            Backend::Cuda => Device::cuda(0),
            #[cfg(feature = "wgpu")]
            Backend::Wgpu => Device::wgpu(Default::default()),
            #[allow(unreachable_patterns)]
            missing => return Err(ModelError::Backend(feature(missing))),
        };
        Ok(Self { device, backend })
    }

    /// Limits the threads of all tensor work in this process; 0 leaves all cores. Only the first call counts.
    pub fn limit_threads(threads: u32) {
        // An error says that the pool exists already; then its size stays.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads as usize).build_global();
    }

    /// All backends of this build.
    pub fn compiled() -> Vec<Self> {
        [Backend::Flex, Backend::Ndarray, Backend::Cuda, Backend::Wgpu]
            .into_iter()
            .filter_map(|backend| Self::new(backend).ok())
            .collect()
    }

    pub fn backend(&self) -> Backend {
        self.backend
    }

    pub(super) fn inner(&self) -> &Device {
        &self.device
    }
}

/// The cargo feature that compiles a backend in; also its name in TOML.
fn feature(backend: Backend) -> &'static str {
    match backend {
        Backend::Flex => "flex",
        Backend::Ndarray => "ndarray",
        Backend::Cuda => "cuda",
        Backend::Wgpu => "wgpu",
    }
}

use burn::tensor::Device;
use experiment::{Backend, WeightType};
use kernels::{Engine, Path};

use crate::ModelError;

/// Where and how a stage computes: on our own kernels, or on one of the tensor library's backends that were compiled in.
#[derive(Clone)]
pub struct ComputeDevice {
    place: Place,
    backend: Backend,
}

#[derive(Clone)]
pub(super) enum Place {
    Native(Native),
    Tensor(Device),
}

/// Our own kernels: instructions, threads and memory, and how weights and activations are kept.
#[derive(Clone)]
pub(super) struct Native {
    pub engine: Engine,
    pub weights: kernels::WeightType,
    pub recompute: bool,
}

impl ComputeDevice {
    /// Threads of the tensor library are the process', set by the first call.
    ///
    /// # Errors
    /// If the backend was not compiled in, keeps no weights of that type, or the kernels are told to use instructions
    /// that this CPU lacks.
    pub fn new(device: &experiment::Device) -> Result<Self, ModelError> {
        let experiment::Device { backend, threads, weights, recompute } = *device;
        if backend == Backend::Native {
            let path = Path::detect().map_err(ModelError::Mismatch)?;
            let ty = match weights {
                WeightType::F32 => kernels::WeightType::F32,
                WeightType::Bf16 => kernels::WeightType::Bf16,
                WeightType::Int8 => kernels::WeightType::Int8,
            };
            let engine = Engine::new(path, threads as usize, weights != WeightType::F32);
            return Ok(Self { place: Place::Native(Native { engine, weights: ty, recompute }), backend });
        }
        if weights != WeightType::F32 || recompute {
            let what = "keeps f32 weights and all activations; `weights` and `recompute` need the backend `native`";
            return Err(ModelError::Mismatch(format!("the backend `{}` {what}", backend.name())));
        }
        let tensors = match backend {
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
            missing => return Err(ModelError::Backend(missing.name())),
        };
        // An error says that the pool exists already; then its size stays.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads as usize).build_global();
        Ok(Self { place: Place::Tensor(tensors), backend })
    }

    /// All backends of this build, the native one first.
    pub fn compiled() -> Vec<Self> {
        let device = |backend| experiment::Device { backend, ..Default::default() };
        Backend::ALL.into_iter().filter_map(|backend| Self::new(&device(backend)).ok()).collect()
    }

    /// The same, measuring how long each kernel takes.
    pub fn timed(&self) -> Self {
        let mut timed = self.clone();
        if let Place::Native(native) = &mut timed.place {
            native.engine = native.engine.timed();
        }
        timed
    }

    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Whether stages of both keep their weights in the same way, so that one can lend to the other.
    pub fn keeps_weights_as(&self, other: &Self) -> bool {
        match (&self.place, &other.place) {
            (Place::Native(one), Place::Native(other)) => one.weights == other.weights,
            (Place::Tensor(_), Place::Tensor(_)) => self.backend == other.backend,
            _ => false,
        }
    }

    /// The kernels' instructions, where stages run on our own.
    pub fn kernels(&self) -> Option<&Engine> {
        match &self.place {
            Place::Native(native) => Some(&native.engine),
            Place::Tensor(_) => None,
        }
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }
}

impl std::fmt::Debug for ComputeDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.place {
            Place::Native(Native { engine, weights, .. }) => {
                write!(f, "native ({:?}, {} threads, {weights:?} weights)", engine.path(), engine.threads())
            }
            Place::Tensor(_) => f.write_str(self.backend.name()),
        }
    }
}

//! What a finished round leaves in its directory, so that the run continues from it: the global adapter in PEFT's format,
//! and `state.safetensors` with the body's optimizer moments and what the strategy remembers.

use std::collections::BTreeMap;
use std::path::Path;

use experiment::RunDirectory;
use model::{AdamW, Adapter, AdapterConfig, ModelConfig, ModelError};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

/// Strategy vectors by name.
pub type StrategyState = Vec<(String, Vec<f32>)>;

pub struct Checkpoint {
    pub adapter: Adapter,
    /// By participant; the shared body's has the empty name.
    pub optimizers: Vec<(String, AdamW)>,
    pub strategy: StrategyState,
}

const STATE_FILE: &str = "state.safetensors";

impl Checkpoint {
    /// Writes it into `directory`, which is a round's of `run`.
    pub fn save(&self, run: &RunDirectory, directory: &Path, base: &str) -> Result<(), ModelError> {
        self.adapter.save_with(&directory.join("adapter"), base, |path, bytes| run.write(path, bytes))?;
        let mut values: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        let mut steps: BTreeMap<String, [i64; 1]> = BTreeMap::new();
        for (name, optimizer) in &self.optimizers {
            let (taken, first, second) = optimizer.state();
            steps.insert(format!("optimizer/{name}/steps"), [taken as i64]);
            for (which, moments) in [("first", first), ("second", second)] {
                values.extend(
                    moments.iter().enumerate().map(|(i, m)| (format!("optimizer/{name}/{which}/{i}"), m.clone())),
                );
            }
        }
        values.extend(self.strategy.iter().map(|(name, vector)| (format!("strategy/{name}"), vector.clone())));
        let mut views: BTreeMap<&str, TensorView<'_>> = BTreeMap::new();
        for (name, vector) in &values {
            let view = TensorView::new(Dtype::F32, vec![vector.len()], bytemuck::cast_slice(vector));
            views.insert(name, view.expect("a vector has its own length"));
        }
        for (name, count) in &steps {
            let view = TensorView::new(Dtype::I64, vec![1], bytemuck::cast_slice(count));
            views.insert(name, view.expect("one count"));
        }
        let bytes = safetensors::serialize(views, None).expect("names are unique");
        let path = directory.join(STATE_FILE);
        Ok(run.write(&path, &bytes)?)
    }

    /// Reads what [`save`](Self::save) wrote. `body` is the shape of the body's share of the adapter.
    pub fn load(
        directory: &Path,
        config: AdapterConfig,
        model: &ModelConfig,
        training: &experiment::Training,
        body: impl Fn(&Adapter) -> Adapter,
    ) -> Result<Self, ModelError> {
        let adapter = Adapter::load_for(&directory.join("adapter"), config, model)?;
        let path = directory.join(STATE_FILE);
        let damaged = |what: String| ModelError::File { path: path.clone(), what };
        let bytes = std::fs::read(&path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| damaged(error.to_string()))?;
        let floats = |name: &str| -> Option<Vec<f32>> {
            let data = file.tensor(name).ok()?;
            Some(data.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let body = body(&adapter);
        let (mut optimizers, mut strategy) = (Vec::new(), Vec::new());
        for name in file.names() {
            if let Some(vector) = name.strip_prefix("strategy/") {
                strategy.push((vector.to_owned(), floats(name).unwrap_or_default()));
            }
            let Some(owner) = name.strip_prefix("optimizer/").and_then(|rest| rest.strip_suffix("/steps")) else {
                continue;
            };
            let count = file.tensor(name).ok().and_then(|view| view.data().try_into().ok()).map(i64::from_le_bytes);
            let count = count.and_then(|count| u64::try_from(count).ok());
            let count = count.ok_or_else(|| damaged(format!("{name} is no count")))?;
            let moments = |which: &str| -> Result<Vec<Vec<f32>>, ModelError> {
                let tensors = 0..body.tensors().len();
                let read = tensors.map(|i| {
                    let name = format!("optimizer/{owner}/{which}/{i}");
                    floats(&name).ok_or_else(|| damaged(format!("has no tensor {name}")))
                });
                read.collect()
            };
            let mut optimizer = AdamW::new(training, &body);
            optimizer.restore(count, moments("first")?, moments("second")?)?;
            optimizers.push((owner.to_owned(), optimizer));
        }
        optimizers.sort_by(|a, b| a.0.cmp(&b.0));
        strategy.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(Self { adapter, optimizers, strategy })
    }
}

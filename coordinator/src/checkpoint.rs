//! What a finished round leaves in its directory, so that the run continues from it: the global adapter in PEFT's format,
//! `state.safetensors` with the body's optimizer moments and what the strategy remembers, and the round's row in
//! `row.json`, in case the coordinator ends before that is in the metrics.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use experiment::{Row, RunDirectory};
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
const ROW_FILE: &str = "row.json";

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

/// Writes the row of a round that has begun into its directory.
pub fn save_row(run: &RunDirectory, round: u32, row: &Row) -> Result<(), experiment::Error> {
    let json = serde_json::to_vec(row).expect("a row has only string keys, so it can be written as JSON");
    run.write(&run.round_path(round).join(ROW_FILE), &json)
}

/// Reads what [`save_row`] wrote, if the round's files are still those that it was finished with. None where there is no
/// such file: an earlier version of this program has finished the round, or its directory was deleted.
pub fn load_row(run: &RunDirectory, round: u32) -> Result<Option<Row>, experiment::Error> {
    let path = run.round_path(round).join(ROW_FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(experiment::Error::File { action: "read", path, source }),
    };
    run.verify_round(round)?;
    let what = match serde_json::from_slice::<Row>(&bytes) {
        Ok(row) if matches!(row, Row::Round { round: of, .. } if of == round) => return Ok(Some(row)),
        Ok(_) => format!("it is another row than that of round {round}"),
        Err(error) => format!("it is no row of this version: {error}"),
    };
    let next_step = "bring back what was written, or use the program that wrote it";
    Err(experiment::Error::Damaged { path, what: format!("{what}; {next_step}") })
}

#[cfg(test)]
mod tests {
    use experiment::Experiment;

    use super::*;

    #[test]
    fn what_is_not_the_row_of_its_round_is_named() {
        let root = tempfile::tempdir().unwrap();
        let experiment = Experiment::from_toml(include_str!("../../configs/smoke.toml"), "smoke.toml").unwrap();
        let run = RunDirectory::create(root.path(), &experiment).unwrap();
        run.begin_round(1).unwrap();
        assert_eq!(load_row(&run, 1).unwrap(), None);
        let row = |round| Row::Round {
            round,
            members: vec!["press-1".into()],
            loss_nats: 2.0,
            tokens: 9,
            duration_ms: 4.0,
            aggregation_error: None,
            body_compute_ms: 1.0,
            body_idle_ms: 3.0,
            energy_j: None,
        };
        save_row(&run, 1, &row(1)).unwrap();
        run.finish_round(1).unwrap();
        assert_eq!(load_row(&run, 1).unwrap(), Some(row(1)));

        let check_refused = |expected: &str| {
            let error = load_row(&run, 1).unwrap_err().to_string();
            assert!(error.contains("rounds/0001") && error.contains(expected), "{error}");
        };
        save_row(&run, 1, &row(2)).unwrap();
        check_refused("row.json is not what was written");
        run.finish_round(1).unwrap();
        check_refused("another row than that of round 1");
        std::fs::write(run.round_path(1).join(ROW_FILE), "{\"row\":\"round\"").unwrap();
        run.finish_round(1).unwrap();
        check_refused("no row of this version");
    }
}

//! Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`, as Hugging Face PEFT writes and reads them.

use std::collections::BTreeMap;
use std::path::Path;

use experiment::{Factors, write_atomically};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use super::{Adapter, AdapterConfig, TARGETS, target_index};
use crate::{ModelConfig, ModelError};

pub const CONFIG_FILE: &str = "adapter_config.json";
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// An adapter's files are refused beyond this size: rank 256 on every layer of a 7 B model takes 2.6 GB.
const WEIGHTS_BYTES_MAX: u64 = 4 << 30;

impl Adapter {
    /// Writes both files into `directory`, which is created. `base` names the base model for PEFT's users.
    pub fn save(&self, directory: &Path, base: &str) -> Result<(), ModelError> {
        self.save_with(directory, base, write_atomically)
    }

    /// As [`save`](Self::save), by another writer of files.
    pub fn save_with(
        &self,
        directory: &Path,
        base: &str,
        write: impl Fn(&Path, &[u8]) -> Result<(), experiment::Error>,
    ) -> Result<(), ModelError> {
        std::fs::create_dir_all(directory).map_err(ModelError::io(directory))?;
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "target_modules": self.config.targets,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "use_rslora": false,
            "use_dora": false,
        });
        let text = serde_json::to_string_pretty(&config).expect("JSON of plain values");
        write(&directory.join(CONFIG_FILE), text.as_bytes())?;
        Ok(write(&directory.join(WEIGHTS_FILE), &self.to_safetensors())?)
    }

    /// The bytes of `adapter_model.safetensors`.
    pub fn to_safetensors(&self) -> Vec<u8> {
        let views: BTreeMap<&str, TensorView<'_>> = self
            .tensors
            .iter()
            .map(|tensor| {
                let bytes = bytemuck::cast_slice(&tensor.values);
                let view = TensorView::new(Dtype::F32, tensor.shape.to_vec(), bytes);
                (tensor.name.as_str(), view.expect("an adapter's shapes fit its values"))
            })
            .collect();
        safetensors::serialize(views, None).expect("an adapter's names are unique")
    }

    /// Reads an adapter for all blocks of `model`. Which factors train is the experiment's business, not the file's.
    pub fn load(directory: &Path, model: &ModelConfig) -> Result<Self, ModelError> {
        let path = directory.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path).map_err(ModelError::io(&path))?;
        let config: Value = serde_json::from_str(&text).map_err(|error| ModelError::file(&path, error))?;
        let config = parse_config(&config).map_err(|what| ModelError::file(&path, what))?;

        let path = directory.join(WEIGHTS_FILE);
        let length = std::fs::metadata(&path).map_err(ModelError::io(&path))?.len();
        if length > WEIGHTS_BYTES_MAX {
            return Err(ModelError::file(&path, format!("has {length} bytes; at most {WEIGHTS_BYTES_MAX} are read")));
        }
        let bytes = std::fs::read(&path).map_err(ModelError::io(&path))?;
        Self::from_safetensors(config, model, &bytes).map_err(|what| {
            let next = "copy it again, or give an adapter that was trained on this model";
            ModelError::file(&path, format!("{what}; {next}"))
        })
    }

    /// Reads an adapter to go on with in an experiment whose adapters look like `config`.
    pub fn load_for(directory: &Path, config: AdapterConfig, model: &ModelConfig) -> Result<Self, ModelError> {
        let mut adapter = Self::load(directory, model)?;
        let AdapterConfig { rank, alpha, ref targets, .. } = adapter.config;
        if (rank, alpha, targets) != (config.rank, config.alpha, &config.targets) {
            return Err(ModelError::Mismatch(format!(
                "{} has rank {rank}, alpha {alpha}, targets {targets:?}; the experiment wants rank {}, alpha {}, targets {:?}: \
                 change one of them",
                directory.display(),
                config.rank,
                config.alpha,
                config.targets
            )));
        }
        adapter.config = config;
        Ok(adapter)
    }

    /// The inverse of [`to_safetensors`](Self::to_safetensors), checked against the shapes of `model`.
    pub fn from_safetensors(config: AdapterConfig, model: &ModelConfig, bytes: &[u8]) -> Result<Self, String> {
        let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
        let mut failure = None;
        let read = |name: &str, shape: [usize; 2]| -> Result<Vec<f32>, String> {
            let view = file.tensor(name).map_err(|_| format!("has no tensor {name}"))?;
            if view.shape() != shape {
                return Err(format!("{name} has shape {:?}; expected {shape:?}", view.shape()));
            }
            let values = crate::source::floats(view.dtype(), view.data())
                .ok_or_else(|| format!("{name} has type {:?}; expected F32, F16 or BF16", view.dtype()))?;
            match values.iter().position(|value| !value.is_finite()) {
                Some(at) => Err(format!("{name} holds {} at {at}", values[at])),
                None => Ok(values),
            }
        };
        let adapter = Self::build(config, model, 0..model.blocks, |name, shape, _| {
            read(name, shape).unwrap_or_else(|what| {
                failure.get_or_insert(what);
                vec![0.0; shape[0] * shape[1]]
            })
        })
        .map_err(|error| error.to_string())?;
        match failure {
            Some(what) => Err(what),
            None if file.len() != adapter.tensors.len() => {
                Err(format!("holds {} tensors; expected {}", file.len(), adapter.tensors.len()))
            }
            None => Ok(adapter),
        }
    }
}

fn parse_config(config: &Value) -> Result<AdapterConfig, String> {
    let kind = config["peft_type"].as_str().unwrap_or("none");
    if kind != "LORA" {
        return Err(format!("peft_type is {kind}; only LORA is supported"));
    }
    for (key, neutral) in [("use_rslora", json!(false)), ("use_dora", json!(false)), ("fan_in_fan_out", json!(false))] {
        if !config[key].is_null() && config[key] != neutral {
            return Err(format!("{key} = {} is not supported", config[key]));
        }
    }
    for key in ["rank_pattern", "alpha_pattern"] {
        if config[key].as_object().is_some_and(|pattern| !pattern.is_empty()) {
            return Err(format!("{key} is not supported: all layers have one rank and one alpha"));
        }
    }
    let rank = config["r"].as_u64().filter(|rank| (1..=4096).contains(rank)).ok_or("r must be 1 to 4096")?;
    let alpha = config["lora_alpha"].as_f64().filter(|alpha| alpha.is_finite()).ok_or("has no number lora_alpha")?;
    let mut targets = Vec::new();
    for target in config["target_modules"].as_array().ok_or("target_modules is no list of names")? {
        match target.as_str() {
            Some(target) if target_index(target).is_some() => targets.push(target.to_owned()),
            _ => return Err(format!("target module {target} is not supported; use {}", TARGETS.join(", "))),
        }
    }
    targets.sort_by_key(|target| target_index(target));
    targets.dedup();
    let dropout = config["lora_dropout"].as_f64().unwrap_or(0.0);
    Ok(AdapterConfig { rank: rank as u32, alpha, dropout, targets, factors: Factors::Both })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::random::tests::tiny_config;

    fn adapter() -> Adapter {
        let targets = vec!["q_proj".into(), "up_proj".into()];
        let config = AdapterConfig { rank: 2, alpha: 4.0, dropout: 0.0, targets, factors: Factors::Both };
        Adapter::seeded(config, &tiny_config(2), 0..2, experiment::Seed(3)).unwrap()
    }

    #[test]
    fn an_adapter_survives_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        adapter().save(directory.path(), "tiny").unwrap();
        assert_eq!(Adapter::load(directory.path(), &tiny_config(2)).unwrap(), adapter());
    }

    #[test]
    fn damaged_adapters_are_refused_by_name() {
        let bytes = adapter().to_safetensors();
        let check_refused = |bytes: &[u8], blocks: usize, expected: &str| {
            let error = Adapter::from_safetensors(adapter().config, &tiny_config(blocks), bytes).unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
        check_refused(&bytes[..bytes.len() - 1], 2, "");
        check_refused(&bytes, 3, "layers.2.self_attn.q_proj");
        check_refused(&bytes, 1, "expected 4");
        let mut nan = bytes.clone();
        let end = nan.len();
        nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        check_refused(&nan, 2, "NaN");
    }
}

//! `participant train`: the same fine-tuning, unsplit and on this machine alone. What users compare a run with.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use experiment::{Experiment, Seed, hex};
use model::{Adapter, AdapterConfig, ComputeDevice, Manifest, Source};
use serde_json::{Value, json};

use crate::ParticipantError;
use crate::data::read_records;
use crate::dataset::Dataset;
use crate::device_choice::DeviceChoice;
use crate::output::{check_adapter_output, check_output, reserve};
use crate::stages::Stages;
use crate::trainer::{StepReport, Trainer};

pub struct LocalTraining {
    pub experiment: PathBuf,
    pub data: PathBuf,
    /// Names the generators of data order and dropout, as a participant's name does.
    pub name: String,
    pub out: Option<PathBuf>,
    /// Replace an adapter that is there.
    pub force: bool,
    pub init_adapter: Option<PathBuf>,
    pub dump_batches: Option<PathBuf>,
    /// Stop after this many steps; the learning rate's schedule stays the experiment's.
    pub steps: Option<u64>,
    pub device: DeviceChoice,
}

/// Of an adapter's files beside its weights, generously: names and shapes of up to a thousand tensors, its configuration.
const ADAPTER_BYTES_BESIDE: u64 = 256 << 10;

/// What happens, in order.
pub enum Happened {
    /// Mean loss on the held-out records, of the adapter after `step` steps.
    Evaluated {
        step: u64,
        loss_nats: f64,
        tokens: usize,
    },
    Stepped(StepReport),
    Saved(PathBuf),
}

impl LocalTraining {
    pub async fn run(&self, mut tell: impl FnMut(Happened) + Send) -> Result<(), ParticipantError> {
        let experiment = Arc::new(Experiment::from_file(&self.experiment)?);
        let out = self.out.clone().unwrap_or_else(|| Path::new("runs").join(format!("{}-local", experiment.name)));
        let inputs = [
            ("--data", Some(&self.data)),
            ("EXPERIMENT", Some(&self.experiment)),
            ("--init-adapter", self.init_adapter.as_ref()),
        ];
        check_adapter_output(&out, self.force, &inputs)?;
        if let Some(path) = &self.dump_batches {
            check_output("--dump-batches", path, &inputs)?;
        }
        let device = ComputeDevice::new(&self.device.over(&experiment.device))?;
        let source = model::source::of_experiment(&experiment)?;
        check_digest(&experiment, &*source)?;
        experiment.check_context(source.config().context)?;
        let records = read_records(&self.data, &experiment.data.columns)?;
        let mut data = Dataset::new(records, &experiment, &self.name, source.tokenizer())?;
        let steps = self.steps.unwrap_or(u64::MAX).min(experiment.total_steps());
        if let Some(path) = &self.dump_batches {
            dump_batches(&mut data, steps, path)?;
        }
        let adapter = initial_adapter(&experiment, &*source, self.init_adapter.as_deref())?;
        let stages = Stages::default();
        let mut trainer = {
            let mut stages = stages.of_model([0; 32]);
            Trainer::new(experiment.clone(), &self.name, &*source, None, &device, data, &mut stages)?
        };
        // Tokenizer, text and stored weights have done their work.
        let origin = source.origin().display().to_string();
        drop(source);
        if let Some(kernels) = device.kernels() {
            kernels.trim();
        }
        // What hours of training have made shall not be lost to a full disk.
        let reserved = reserve(&out, adapter.flat().len() as u64 * 4 + ADAPTER_BYTES_BESIDE)?;
        trainer.begin_round((1, 1), 0, &adapter).await?;
        let evaluate = async |trainer: &Trainer, step, tell: &mut (dyn FnMut(Happened) + Send)| {
            let loss = trainer.evaluate(None).await?;
            if loss.tokens > 0 {
                tell(Happened::Evaluated { step, loss_nats: loss.nats / loss.tokens as f64, tokens: loss.tokens });
            }
            Ok::<_, ParticipantError>(())
        };
        evaluate(&trainer, 0, &mut tell).await?;
        for step in 0..steps {
            let report = trainer.step(step, None).await?;
            if !report.loss_nats.is_finite() {
                return Err(ParticipantError::Diverged { step, loss_nats: report.loss_nats });
            }
            tell(Happened::Stepped(report));
        }
        let adapter = trainer.adapter();
        // What the last step made of it, no loss has told.
        if !adapter.flat().iter().all(|value| value.is_finite()) {
            return Err(ParticipantError::DivergedAdapter { steps });
        }
        evaluate(&trainer, steps, &mut tell).await?;
        drop(reserved);
        adapter.save(&out, &origin)?;
        tell(Happened::Saved(out));
        Ok(())
    }
}

/// Refuses another model than the one whose digest the experiment names.
pub fn check_digest(experiment: &Experiment, source: &dyn Source) -> Result<(), ParticipantError> {
    let Some(expected) = &experiment.model.sha256 else { return Ok(()) };
    let found = hex(&Manifest::of(source)?.digest());
    if found == *expected {
        return Ok(());
    }
    Err(ParticipantError::Usage(format!(
        "the model {} has digest {found}; the experiment's `model.sha256` is {expected}: correct it, or bring that model",
        source.origin().display()
    )))
}

/// The adapter an experiment starts from.
pub fn initial_adapter(
    experiment: &Experiment,
    source: &dyn Source,
    directory: Option<&Path>,
) -> Result<Adapter, ParticipantError> {
    let config = AdapterConfig::new(&experiment.adapter);
    Ok(match directory {
        Some(directory) => Adapter::load_for(directory, config, source.config())?,
        None => Adapter::seeded(config, source.config(), 0..source.config().blocks, Seed(experiment.seed))?,
    })
}

/// Writes the micro-batches of the first `steps` steps, so that another framework can train on the very same ones. The
/// file holds token ids of the owner's data: it is written on request, and nothing else ever writes any.
fn dump_batches(data: &mut Dataset, steps: u64, path: &Path) -> Result<(), ParticipantError> {
    let start = data.batches.position();
    let file = std::fs::File::create(path).map_err(ParticipantError::io(path))?;
    let mut file = std::io::BufWriter::new(file);
    for step in 0..steps {
        for (micro, batch) in data.batches.next().expect("batches never end").into_iter().enumerate() {
            let line: Value = json!({
                "step": step, "micro": micro,
                "tokens": batch.tokens, "targets": batch.targets, "segments": batch.segments,
            });
            writeln!(file, "{line}").map_err(ParticipantError::io(path))?;
        }
    }
    file.flush().map_err(ParticipantError::io(path))?;
    Ok(data.batches.seek(start)?)
}

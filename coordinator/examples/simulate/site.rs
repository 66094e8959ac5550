//! What all simulated runs share: experiments, base models, records, and what a calm run of each experiment ends with.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use coordinator::home::Home;
use experiment::Experiment;
use model::Source;
use participant::data::Record;
use participant::stages::Stages;
use tempfile::TempDir;

use crate::plan::Plan;
use crate::run::simulate;

/// An experiment in brief.
pub struct Variant {
    pub name: &'static str,
    pub devices: usize,
    pub is_split: bool,
    mode: &'static str,
    adapters: &'static str,
    strategy: &'static str,
}

pub const VARIANTS: [Variant; 5] = [
    Variant {
        name: "a shared body",
        devices: 2,
        is_split: true,
        mode: "u",
        adapters: "shared",
        strategy: "{ name = \"fedavg\" }",
    },
    Variant {
        name: "a body for everybody",
        devices: 2,
        is_split: true,
        mode: "u",
        adapters: "per_participant",
        strategy: "{ name = \"fedadam\", learning_rate = 0.01, beta1 = 0.9, beta2 = 0.99, tau = 0.001 }",
    },
    Variant {
        name: "forward only",
        devices: 2,
        is_split: true,
        mode: "forward_only",
        adapters: "shared",
        strategy: "{ name = \"fedavgm\", learning_rate = 1.0, momentum = 0.5 }",
    },
    Variant {
        name: "whole",
        devices: 2,
        is_split: false,
        mode: "whole",
        adapters: "shared",
        strategy: "{ name = \"fedprox\", mu = 0.1 }",
    },
    Variant {
        name: "three devices",
        devices: 3,
        is_split: true,
        mode: "u",
        adapters: "shared",
        strategy: "{ name = \"fedavg\" }",
    },
];

pub const ROUNDS: u32 = 2;
pub const LOCAL_STEPS: u64 = 3;
pub const NAMES: [&str; 3] = ["anna", "bert", "cleo"];

pub struct Site {
    directory: TempDir,
    pub stages: Arc<Stages>,
    sources: Vec<Arc<dyn Source>>,
    records: Vec<Vec<Record>>,
}

/// What a run ends with that nothing befalls.
pub struct Calm {
    /// The last round's adapter, as its file.
    pub adapter: Vec<u8>,
    /// Importance matrices, as their files, of those who have left one.
    pub imatrices: BTreeMap<String, Vec<u8>>,
    /// Points and how often they are passed: of the coordinator, and of each device.
    pub points: Vec<BTreeMap<String, u64>>,
}

impl Calm {
    pub fn passages(&self, machine: usize) -> u64 {
        self.points[machine].values().sum()
    }
}

impl Site {
    pub fn new() -> Self {
        // In memory, where there is such a place: an fsync of a file that is to be deleted anyway is not worth waiting for.
        let memory = Path::new("/dev/shm");
        let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let directory = directory.expect("a temporary directory can be made");
        let now = time::OffsetDateTime::now_utc();
        Home::init(&directory.path().join("home"), vec!["127.0.0.1:4433".into()], now).expect("a home can be made");
        let lines = |name: &str| -> String { (0..12).map(|i| format!("{name} has made {} parts\n", i * i)).collect() };
        let records = NAMES.map(|name| {
            let path = directory.path().join(format!("{name}.txt"));
            std::fs::write(&path, lines(name)).expect("a file can be written");
            participant::data::read_records(&path, &experiment(0, 0, false).data.columns).expect("lines are records")
        });
        let sources = (0..VARIANTS.len()).map(|variant| {
            model::source::of_experiment(&experiment(variant, 0, false)).expect("a random model has no file")
        });
        Self { sources: sources.collect(), directory, stages: Arc::default(), records: records.into() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn source(&self, variant: usize) -> Arc<dyn Source> {
        self.sources[variant].clone()
    }

    pub fn records(&self, device: usize) -> Vec<Record> {
        self.records[device].clone()
    }

    /// Runs every experiment once without faults. It fills the devices' store of the model's parts, too.
    pub fn calm(&self) -> Vec<Calm> {
        let run = |variant| {
            // Delays change nothing: whatever the seed, it ends the same.
            for seed in 0..2 {
                let ended = simulate(self, &Plan::calm(variant, seed), None, false);
                assert!(ended.violations.is_empty(), "a calm run: {:?}", ended.violations);
            }
            let ended = simulate(self, &Plan::calm(variant, 1), None, false);
            assert_eq!(ended.imatrices.len(), VARIANTS[variant].devices, "a calm run has not measured");
            Calm { adapter: ended.adapter, imatrices: ended.imatrices, points: ended.points }
        };
        (0..VARIANTS.len()).map(run).collect()
    }
}

/// `liars` are devices beyond the variant's own.
pub fn experiment(variant: usize, liars: usize, measures: bool) -> Experiment {
    let Variant { devices, is_split, mode, adapters, strategy, .. } = &VARIANTS[variant];
    let (ends, cohort) = (usize::from(*is_split), devices + liars);
    let imatrix_tokens = if measures { 150 } else { 0 };
    let text = format!(
        r#"
name = "simulated"
seed = 1
[model.random]
blocks = 3
width = 16
ffn = 16
heads = 2
kv_heads = 1
[split]
mode = "{mode}"
head_blocks = {ends}
tail_blocks = {ends}
[body]
adapters = "{adapters}"
[adapter]
rank = 2
alpha = 4.0
targets = ["q_proj", "v_proj"]
[training]
batch_tokens = 64
accumulate = 2
learning_rate = 0.01
warmup_steps = 0
schedule = "constant"
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.999
epsilon = 1e-8
clip_norm = 1.0
[data]
sequence_tokens_max = 32
held_out = 0.2
[device]
threads = 1
[federation]
rounds = {ROUNDS}
cohort = {cohort}
quorum = {devices}
local_steps = {LOCAL_STEPS}
evaluate_every = 1
imatrix_tokens = {imatrix_tokens}
strategy = {strategy}
"#
    );
    Experiment::from_toml(&text, "the simulator's experiment").expect("an experiment of this file's")
}

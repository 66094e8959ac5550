//! From TOML to an [`Experiment`] and back: the resolved text and its digest.
//!
//! Everything that reads or writes experiment files is here; which values are allowed is in `check.rs`.

use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::{Device, Error, Experiment, TARGETS};

/// The commented experiment that `coordinator init` writes: every key, with what it means and may be.
pub fn skeleton() -> &'static str {
    include_str!("skeleton.toml")
}

impl Experiment {
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let text = fs::read_to_string(path).map_err(Error::file("read the experiment", path))?;
        Self::from_toml(&text, &path.display().to_string())
    }

    /// `origin` says in errors where the text comes from: a path, or the peer that sent it.
    pub fn from_toml(text: &str, origin: &str) -> Result<Self, Error> {
        let mut experiment: Self = toml::from_str(text)
            .map_err(|source| Error::Syntax { origin: origin.to_string(), source: Box::new(source) })?;
        experiment.check(origin)?;
        // The order of targets means nothing, so it must not change the digest either.
        experiment.adapter.targets.sort_by_key(|target| TARGETS.iter().position(|known| known == target));
        Ok(experiment)
    }

    /// The experiment as TOML with every default written out, in one fixed order: parsing it gives the same experiment.
    pub fn resolved_toml(&self) -> String {
        toml::to_string(self).expect("checking limits integers to what TOML can hold, and TOML's strings are UTF-8")
    }

    /// SHA-256 of the resolved text. Both sides compare it when a participant joins.
    ///
    /// What may differ from machine to machine is left out: the whole `[device]` section, and `model.path`; whether both
    /// sides loaded the same weights is seen from the model's own digest, which they compare beside this one.
    pub fn digest(&self) -> [u8; 32] {
        let resolved = self.without_machine().resolved_toml();
        // [device] is the last section. Cut off, it may get new keys without changing any digest.
        let (shared, _) = resolved.split_once("\n[device]\n").expect("every section is written");
        Sha256::digest(shared).into()
    }

    pub(crate) fn without_machine(&self) -> Self {
        let mut experiment = self.clone();
        experiment.device = Device::default();
        experiment.model.path = None;
        experiment
    }
}

/// A digest as people compare it: lowercase hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;
    use crate::{Backend, Strategy as Aggregation};

    pub(crate) const SMOKE: &str = include_str!("../../../configs/smoke.toml");

    pub(crate) fn smoke() -> Experiment {
        Experiment::from_toml(SMOKE, "smoke.toml").unwrap()
    }

    fn check_same(experiment: &Experiment) {
        let text = experiment.resolved_toml();
        let again = Experiment::from_toml(&text, "resolved").unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(&again, experiment, "{text}");
        assert_eq!(again.resolved_toml(), text);
        assert_eq!(again.digest(), experiment.digest());
    }

    fn check_syntax(text: &str, expected: &[&str]) {
        let error = Experiment::from_toml(text, "lab.toml").unwrap_err();
        assert!(matches!(error, Error::Syntax { .. }), "{error}");
        let message = error.to_string();
        for part in expected {
            assert!(message.contains(part), "{part:?} is not in:\n{message}");
        }
    }

    fn line_of(text: &str, part: &str) -> String {
        format!("line {}", text.lines().position(|line| line.contains(part)).unwrap() + 1)
    }

    #[test]
    fn resolved_text_writes_every_default() {
        assert_eq!(smoke().resolved_toml(), RESOLVED_SMOKE);
    }

    #[test]
    fn digest_does_not_change_between_versions() {
        assert_eq!(hex(&smoke().digest()), "96f85ec517793dde028eb5f4c95b01b00dcaa2f30ef28179b3680ed25ae17882");
    }

    #[test]
    fn resolved_text_parses_to_the_same_experiment() {
        check_same(&smoke());
        check_same(&Experiment::from_toml(skeleton(), "skeleton").unwrap());
    }

    #[test]
    fn every_shipped_experiment_is_valid() {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
        let mut seen = 0;
        for entry in fs::read_dir(&configs).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                let experiment = Experiment::from_file(&path).unwrap_or_else(|error| panic!("failed to {error}"));
                assert_eq!(Some(experiment.name.as_str()), path.file_stem().unwrap().to_str());
                check_same(&experiment);
                seen += 1;
            }
        }
        assert!(seen >= 2, "found {seen} files in {}", configs.display());
    }

    #[test]
    fn skeleton_has_every_key() {
        fn keys(table: &toml::Table, prefix: &str, found: &mut Vec<String>) {
            for (key, value) in table {
                match value {
                    toml::Value::Table(table) => keys(table, &format!("{prefix}{key}."), found),
                    _ => found.push(format!("{prefix}{key}")),
                }
            }
            found.sort();
        }
        let resolved = Experiment::from_toml(skeleton(), "skeleton").unwrap().resolved_toml();
        let [mut written, mut all] = [Vec::new(), Vec::new()];
        keys(&skeleton().parse().unwrap(), "", &mut written);
        keys(&resolved.parse().unwrap(), "", &mut all);
        assert_eq!(written, all);
    }

    #[test]
    fn digest_ignores_order_and_formatting() {
        let mut lines: Vec<&str> = SMOKE.lines().collect();
        let training = lines.iter().position(|line| *line == "[training]").unwrap();
        let keys: Vec<&str> = lines[training + 1..].iter().copied().take_while(|line| !line.is_empty()).collect();
        // The section moves to the end, its keys in reverse order, with comments and other spacing.
        lines.drain(training..=training + keys.len());
        let mut text = lines.join("\n") + "\n\n# moved\n[ training ]\n";
        for key in keys.iter().rev() {
            text += &format!("  {}  # a comment\n", key.replace(" = ", "="));
        }
        let text = text.replace("[\"q_proj\", \"v_proj\"]", "[\n 'v_proj',\n 'q_proj', ]");
        assert_ne!(text, SMOKE);
        let reordered = Experiment::from_toml(&text, "reordered").unwrap();
        assert_eq!(reordered, smoke());
        assert_eq!(reordered.digest(), smoke().digest());
    }

    #[test]
    fn digest_ignores_what_differs_between_machines() {
        let mut experiment = Experiment::from_toml(skeleton(), "skeleton").unwrap();
        let digest = experiment.digest();
        experiment.device.backend = Backend::Cuda;
        experiment.device.threads = 3;
        experiment.model.path = Some(PathBuf::from("/elsewhere/model.gguf"));
        assert_eq!(experiment.digest(), digest);
        experiment.model.sha256 = Some("0".repeat(64));
        assert_ne!(experiment.digest(), digest);
    }

    #[test]
    fn unknown_key_is_named_with_its_line() {
        let text = SMOKE.replace("rank = 4", "rank = 4\nrnak = 4");
        check_syntax(&text, &["parse lab.toml", "rnak", &line_of(&text, "rnak")]);
        let text = SMOKE.replace("[training]", "[trainign]");
        check_syntax(&text, &["trainign", &line_of(&text, "trainign")]);
    }

    #[test]
    fn missing_key_is_named() {
        check_syntax(&SMOKE.replace("rank = 4\n", ""), &["rank", &line_of(SMOKE, "[adapter]")]);
    }

    #[test]
    fn wrong_type_is_named_with_its_line() {
        check_syntax(&SMOKE.replace("rank = 4", "rank = \"4\""), &["rank = \"4\"", &line_of(SMOKE, "rank = 4")]);
        check_syntax(&SMOKE.replace("rank = 4", "rank = -4"), &["rank = -4", &line_of(SMOKE, "rank = 4")]);
    }

    #[test]
    fn a_setting_of_another_strategy_is_refused() {
        for (strategy, key) in [
            ("{ name = \"fedavg\", mu = 0.1 }", "mu"),
            ("{ name = \"median\", trim = 1 }", "trim"),
            ("{ name = \"fedprox\", mu = 0.1, momentum = 0.9 }", "momentum"),
        ] {
            let text = SMOKE.replace("{ name = \"fedavg\" }", strategy);
            check_syntax(&text, &[key, "unknown field", &line_of(&text, strategy)]);
        }
    }

    #[test]
    fn a_setting_of_another_partition_is_refused() {
        let text = SMOKE.replace("[training]", "[data.partition]\nby = \"iid\"\nalpha = 0.5\n\n[training]");
        check_syntax(&text, &["alpha"]);
    }

    #[test]
    fn integers_are_read_where_numbers_are_meant() {
        let experiment =
            Experiment::from_toml(&SMOKE.replace("{ name = \"fedavg\" }", "{ name = \"fedprox\", mu = 1 }"), "");
        assert_eq!(experiment.unwrap().federation.strategy, Aggregation::FedProx { mu: 1.0 });
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Experiment::from_file(Path::new("no/such.toml")).unwrap_err().to_string();
        assert!(error.starts_with("read the experiment no/such.toml: "), "{error}");
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "\\PC*") {
            let _ = Experiment::from_toml(&text, "arbitrary");
        }

        #[test]
        fn any_accepted_numbers_survive_the_round_trip(
            seed in any::<i64>(),
            [alpha, learning_rate, epsilon] in [of_any_size(), of_any_size(), of_any_size()],
            dropout in 0.0..1.0,
        ) {
            let mut experiment = smoke();
            experiment.seed = seed as u64;
            experiment.adapter.alpha = alpha;
            experiment.adapter.dropout = dropout;
            experiment.training.learning_rate = learning_rate;
            experiment.training.epsilon = epsilon;
            if experiment.check("arbitrary").is_ok() {
                check_same(&experiment);
            }
        }
    }

    /// From 1e-31 to 1e31, in all the digits of an f64.
    fn of_any_size() -> impl Strategy<Value = f64> {
        any::<f64>().prop_map(|number| number.abs().powf(0.1))
    }

    const RESOLVED_SMOKE: &str = r#"name = "smoke"
seed = 1

[model.random]
blocks = 4
width = 64
ffn = 176
heads = 4
kv_heads = 2

[split]
mode = "u"
head_blocks = 1
tail_blocks = 1

[body]
adapters = "shared"

[adapter]
rank = 4
alpha = 8.0
dropout = 0.0
targets = ["q_proj", "v_proj"]
factors = "both"

[training]
batch_tokens = 256
accumulate = 1
learning_rate = 0.01
warmup_steps = 0
schedule = "constant"
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.999
epsilon = 0.00000001
clip_norm = 1.0

[data]
sequence_tokens_max = 128
held_out = 0.2

[data.columns]
text = "text"
prompt = "prompt"
completion = "completion"
messages = "messages"

[data.partition]
by = "iid"

[federation]
rounds = 2
cohort = 2
quorum = 2
deadline_s = 60
local_steps = 5
evaluate_every = 1
average = "factors"

[federation.strategy]
name = "fedavg"

[wire]
dtype = "f32"

[device]
backend = "native"
threads = 0
weights = "f32"
recompute = false
"#;
}

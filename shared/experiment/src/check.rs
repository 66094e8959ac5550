//! Which values an experiment may have.
//!
//! The first value out of its range becomes an [`Error::Value`] with its key path and what is allowed. Upper bounds are
//! far above any real experiment: they stop a slip of the finger, and keep later arithmetic from overflowing.

use std::fmt::Debug;
use std::ops::RangeInclusive;

use crate::{
    Adapter, Average, Backend, BodyAdapters, Data, Error, Experiment, Factors, Federation, Model, Partition,
    RandomModel, Split, SplitMode, Strategy, TARGETS, Training,
};

impl Experiment {
    pub(crate) fn check(&self, origin: &str) -> Result<(), Error> {
        let check = Check { origin };
        check.name(&self.name)?;
        // TOML's integers are signed, so a greater seed could not be written into the run directory.
        check.count("seed", self.seed, 0..=i64::MAX as u64)?;
        check.model(&self.model)?;
        check.split(&self.split, self.body.adapters)?;
        if let Some(random) = &self.model.random {
            let outside = u64::from(self.split.head_blocks) + u64::from(self.split.tail_blocks);
            check.that(
                outside < u64::from(random.blocks),
                "split.head_blocks + split.tail_blocks",
                outside,
                format!("less than model.random.blocks = {}, so that a body block remains", random.blocks),
            )?;
        }
        check.adapter(&self.adapter)?;
        check.training(&self.training, &self.data)?;
        check.data(&self.data)?;
        check.federation(&self.federation, self.adapter.factors)?;
        check.count("device.threads", self.device.threads, 0..=1024)?;
        check.that(
            self.training.warmup_steps <= self.total_steps(),
            "training.warmup_steps",
            self.training.warmup_steps,
            format!("at most federation.rounds × federation.local_steps = {}", self.total_steps()),
        )?;
        check.that(
            self.federation.evaluate_every == 0 || self.data.held_out > 0.0,
            "data.held_out",
            self.data.held_out,
            "more than 0, because federation.evaluate_every asks for evaluations (0 switches them off)",
        )?;
        self.check_measuring(check)
    }

    fn check_measuring(&self, check: Check<'_>) -> Result<(), Error> {
        let (key, tokens) = ("federation.imatrix_tokens", self.federation.imatrix_tokens);
        // Sums in f64 and their wire format in f32 are far from their ends here.
        check.count(key, tokens, 0..=1 << 30)?;
        let longest = self.data.sequence_tokens_max;
        let allowed = format!("0, or at least data.sequence_tokens_max = {longest}, so that a sequence fits");
        check.that(tokens == 0 || tokens >= u64::from(longest), key, tokens, allowed)?;
        let allowed = "0, unless device.backend is \"native\": only our own kernels show what they multiply";
        check.that(tokens == 0 || self.device.backend == Backend::Native, key, tokens, allowed)
    }

    /// Whether the split fits a model of `total_blocks` blocks: at least one must be left for the body.
    pub fn check_blocks(&self, total_blocks: u32) -> Result<(), Error> {
        let Split { head_blocks, tail_blocks, .. } = self.split;
        match head_blocks.checked_add(tail_blocks) {
            Some(outside) if outside < total_blocks => Ok(()),
            _ => Err(Error::Blocks { head_blocks, tail_blocks, total_blocks }),
        }
    }

    /// Whether the model knows the positions of the longest sequence.
    pub fn check_context(&self, context: usize) -> Result<(), Error> {
        let sequence_tokens_max = self.data.sequence_tokens_max;
        match sequence_tokens_max as usize <= context {
            true => Ok(()),
            false => Err(Error::Context { sequence_tokens_max, context }),
        }
    }
}

struct Check<'a> {
    origin: &'a str,
}

impl Check<'_> {
    fn name(&self, name: &str) -> Result<(), Error> {
        let allowed = "1 to 64 ASCII letters, digits, `-` and `_`, of which the first is a letter or a digit";
        let starts_well = name.starts_with(|first: char| first.is_ascii_alphanumeric());
        let goes_on_well = name.chars().all(|char| char.is_ascii_alphanumeric() || char == '-' || char == '_');
        self.that(starts_well && goes_on_well && name.len() <= 64, "name", name, allowed)
    }

    fn model(&self, model: &Model) -> Result<(), Error> {
        let Model { path, sha256, random } = model;
        match (path, random) {
            (None, None) => self.fail("model", "without path and random", "exactly one of model.path and model.random"),
            (Some(_), Some(_)) => {
                self.fail("model", "with path and random", "exactly one of model.path and model.random")
            }
            (Some(path), None) => {
                self.that(!path.as_os_str().is_empty(), "model.path", path, "a Hugging Face directory or a GGUF file")
            }
            (None, Some(random)) => self.random_model(random),
        }?;
        let Some(sha256) = sha256 else { return Ok(()) };
        let is_digest = sha256.len() == 64 && sha256.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        self.that(is_digest, "model.sha256", sha256, "64 lowercase hexadecimal digits")
    }

    fn random_model(&self, model: &RandomModel) -> Result<(), Error> {
        let &RandomModel { blocks, width, ffn, heads, kv_heads } = model;
        self.count("model.random.blocks", blocks, 1..=1024)?;
        self.count("model.random.width", width, 2..=65_536)?;
        self.count("model.random.ffn", ffn, 1..=262_144)?;
        self.count("model.random.heads", heads, 1..=1024)?;
        self.count("model.random.kv_heads", kv_heads, 1..=1024)?;
        // Rotary embeddings turn pairs of a head's coordinates.
        self.that(
            width % heads == 0 && (width / heads) % 2 == 0,
            "model.random.heads",
            heads,
            format!("a divisor of model.random.width = {width} that leaves heads of an even size"),
        )?;
        let allowed = format!("a divisor of model.random.heads = {heads}");
        self.that(heads % kv_heads == 0, "model.random.kv_heads", kv_heads, allowed)
    }

    fn split(&self, split: &Split, body_adapters: BodyAdapters) -> Result<(), Error> {
        let &Split { mode, head_blocks, tail_blocks } = split;
        // A number that does nothing would only mislead, so `whole` wants zeros instead of ignoring what it finds.
        let (head_allowed, tail_allowed) = match mode {
            SplitMode::U => (1..=1024, 0..=1024),
            SplitMode::ForwardOnly => (1..=1024, 1..=1024),
            SplitMode::Whole => (0..=0, 0..=0),
        };
        self.count("split.head_blocks", head_blocks, head_allowed)?;
        self.count("split.tail_blocks", tail_blocks, tail_allowed)?;
        self.that(
            mode == SplitMode::U || body_adapters == BodyAdapters::Shared,
            "body.adapters",
            "per_participant",
            "\"shared\" (or no [body] section): no body trains on the coordinator unless split.mode is \"u\"",
        )
    }

    fn adapter(&self, adapter: &Adapter) -> Result<(), Error> {
        let Adapter { rank, alpha, dropout, targets, factors: _ } = adapter;
        self.count("adapter.rank", *rank, 1..=1024)?;
        self.positive("adapter.alpha", *alpha)?;
        self.below_one("adapter.dropout", *dropout)?;
        let allowed = format!("one or more of {}, each once", TARGETS.join(", "));
        let known = targets.iter().all(|target| TARGETS.contains(&target.as_str()));
        let unique = (1..targets.len()).all(|index| !targets[..index].contains(&targets[index]));
        self.that(!targets.is_empty() && known && unique, "adapter.targets", targets, allowed)
    }

    fn training(&self, training: &Training, data: &Data) -> Result<(), Error> {
        let Training { batch_tokens, accumulate, learning_rate, warmup_steps, schedule: _, .. } = training;
        self.count("data.sequence_tokens_max", data.sequence_tokens_max, 2..=1 << 20)?;
        self.count("training.batch_tokens", *batch_tokens, 1..=1 << 20)?;
        self.that(
            *batch_tokens >= data.sequence_tokens_max,
            "training.batch_tokens",
            batch_tokens,
            format!("at least data.sequence_tokens_max = {}, so that a sequence fits", data.sequence_tokens_max),
        )?;
        self.count("training.accumulate", *accumulate, 1..=4096)?;
        self.positive("training.learning_rate", *learning_rate)?;
        self.count("training.warmup_steps", *warmup_steps, 0..=1 << 40)?;
        self.not_negative("training.weight_decay", training.weight_decay)?;
        self.below_one("training.beta1", training.beta1)?;
        self.below_one("training.beta2", training.beta2)?;
        self.positive("training.epsilon", training.epsilon)?;
        self.not_negative("training.clip_norm", training.clip_norm)
    }

    fn data(&self, data: &Data) -> Result<(), Error> {
        self.below_one("data.held_out", data.held_out)?;
        let columns = &data.columns;
        for (key, column) in [
            ("data.columns.text", &columns.text),
            ("data.columns.prompt", &columns.prompt),
            ("data.columns.completion", &columns.completion),
            ("data.columns.messages", &columns.messages),
        ] {
            self.column(key, column)?;
        }
        match &data.partition {
            Partition::Iid => Ok(()),
            Partition::Key { column } => self.column("data.partition.column", column),
            Partition::Dirichlet { column, alpha } => {
                self.column("data.partition.column", column)?;
                self.positive("data.partition.alpha", *alpha)
            }
        }
    }

    fn column(&self, key: &'static str, column: &str) -> Result<(), Error> {
        self.that(!column.is_empty(), key, column, "the name of a column")
    }

    fn federation(&self, federation: &Federation, factors: Factors) -> Result<(), Error> {
        let Federation { rounds, cohort, quorum, deadline_s, local_steps, .. } = *federation;
        self.count("federation.rounds", rounds, 1..=1_000_000)?;
        self.count("federation.cohort", cohort, 1..=65_536)?;
        self.count("federation.quorum", quorum, 1..=65_536)?;
        self.that(
            quorum <= cohort,
            "federation.quorum",
            quorum,
            format!("at most federation.cohort = {cohort}: a round has no more updates"),
        )?;
        // A month: long enough for any round, short enough to add to any clock.
        if let Some(deadline_s) = deadline_s {
            self.count("federation.deadline_s", deadline_s, 1..=30 * 24 * 3600)?;
        }
        self.count("federation.local_steps", local_steps, 1..=1_000_000)?;
        self.count("federation.evaluate_every", federation.evaluate_every, 0..=1_000_000)?;
        self.that(
            federation.average == Average::Factors || factors == Factors::Both,
            "federation.average",
            "product",
            "\"factors\", which is exact where adapter.factors = \"freeze_a\": factoring anew would change A",
        )?;
        self.that(
            federation.average == Average::Factors
                || matches!(federation.strategy, Strategy::FedAvg | Strategy::FedProx { .. }),
            "federation.average",
            "product",
            "\"factors\", unless the strategy is fedavg or fedprox: the others do not take the mean of the updates",
        )?;
        self.strategy(&federation.strategy, quorum)
    }

    fn strategy(&self, strategy: &Strategy, quorum: u32) -> Result<(), Error> {
        match *strategy {
            Strategy::FedAvg | Strategy::Median => Ok(()),
            Strategy::FedProx { mu } => self.not_negative("federation.strategy.mu", mu),
            Strategy::FedAvgM { learning_rate, momentum } => {
                self.positive("federation.strategy.learning_rate", learning_rate)?;
                self.below_one("federation.strategy.momentum", momentum)
            }
            Strategy::FedAdam { learning_rate, beta1, beta2, tau }
            | Strategy::FedYogi { learning_rate, beta1, beta2, tau } => {
                self.positive("federation.strategy.learning_rate", learning_rate)?;
                self.below_one("federation.strategy.beta1", beta1)?;
                self.below_one("federation.strategy.beta2", beta2)?;
                self.positive("federation.strategy.tau", tau)
            }
            Strategy::TrimmedMean { trim } => self.that(
                u64::from(trim) * 2 < u64::from(quorum),
                "federation.strategy.trim",
                trim,
                format!("less than half of federation.quorum = {quorum}, so that a value remains"),
            ),
        }
    }

    fn count(&self, key: &'static str, value: impl Into<u64>, allowed: RangeInclusive<u64>) -> Result<(), Error> {
        let value = value.into();
        let (least, most) = (allowed.start(), allowed.end());
        let allowed_text = if least == most { format!("{least}") } else { format!("{least} to {most}") };
        self.that(allowed.contains(&value), key, value, allowed_text)
    }

    /// Much of the arithmetic is in f32, in which a greater number is infinite and a smaller one is no normal number.
    fn positive(&self, key: &'static str, value: f64) -> Result<(), Error> {
        let is_normal = (f32::MIN_POSITIVE..=f32::MAX).contains(&(value as f32));
        self.that(is_normal, key, value, "a number from 1.2e-38 to 3.4e38")
    }

    /// The sign is looked at, not only the value: -0.0 would be equal to 0.0 and yet have another digest.
    fn not_negative(&self, key: &'static str, value: f64) -> Result<(), Error> {
        let holds = (value as f32).is_finite() && value.is_sign_positive();
        self.that(holds, key, value, "a number from 0 to 3.4e38")
    }

    fn below_one(&self, key: &'static str, value: f64) -> Result<(), Error> {
        let holds = value.is_sign_positive() && (value as f32) < 1.0;
        self.that(holds, key, value, "0 or greater, and less than 1 (at most 0.9999999)")
    }

    fn that(&self, holds: bool, key: &'static str, value: impl Debug, allowed: impl Into<String>) -> Result<(), Error> {
        if holds { Ok(()) } else { self.fail(key, format!("{value:?}"), allowed) }
    }

    fn fail(&self, key: &'static str, value: impl Into<String>, allowed: impl Into<String>) -> Result<(), Error> {
        Err(Error::Value { origin: self.origin.to_string(), key, value: value.into(), allowed: allowed.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::tests::{SMOKE, smoke};

    /// Replaces a line of the smoke experiment and expects the complaint about `key`, with `value`.
    fn check_refused(line: &str, replacement: &str, key: &str, value: &str) {
        assert!(SMOKE.lines().any(|found| found == line), "no line {line:?}");
        let text = SMOKE.replace(&format!("{line}\n"), &format!("{replacement}\n"));
        match Experiment::from_toml(&text, "lab.toml") {
            Err(error) => {
                let expected = format!("accept lab.toml: {key} is {value}; allowed: ");
                assert!(error.to_string().starts_with(&expected), "{replacement}: {error}, expected {expected}");
            }
            Ok(_) => panic!("{replacement} was accepted"),
        }
    }

    fn check_accepted(line: &str, replacement: &str) {
        assert!(SMOKE.lines().any(|found| found == line), "no line {line:?}");
        let text = SMOKE.replace(&format!("{line}\n"), &format!("{replacement}\n"));
        if let Err(error) = Experiment::from_toml(&text, "lab.toml") {
            panic!("{replacement}: {error}");
        }
    }

    #[test]
    fn a_name_is_a_plain_directory_name() {
        for name in ["", "..", "a/b", "a b", "-a", "größe", ".hidden"] {
            check_refused("name = \"smoke\"", &format!("name = {name:?}"), "name", &format!("{name:?}"));
        }
        check_refused(
            "name = \"smoke\"",
            &format!("name = {:?}", "a".repeat(65)),
            "name",
            &format!("{:?}", "a".repeat(65)),
        );
        check_accepted("name = \"smoke\"", "name = \"3rd-try_B\"");
    }

    #[test]
    fn a_model_has_one_source() {
        check_refused("[model.random]", "[model]\npath = \"m\"\n[model.random]", "model", "with path and random");
        let empty = SMOKE.replace("[model.random]", "[model]").replace("blocks = 4\n", "");
        let empty = empty.lines().filter(|line| !MODEL_KEYS.iter().any(|key| line.starts_with(key)));
        let error = Experiment::from_toml(&empty.collect::<Vec<_>>().join("\n"), "lab.toml").unwrap_err();
        assert!(error.to_string().contains("model is without path and random"), "{error}");
    }

    const MODEL_KEYS: [&str; 4] = ["width = ", "ffn = ", "heads = ", "kv_heads = "];

    #[test]
    fn a_model_digest_is_lowercase_hexadecimal() {
        for digest in ["", "abc", &"A".repeat(64), &"g".repeat(64), &"0".repeat(65)] {
            let section = format!("[model]\nsha256 = {digest:?}\n[model.random]");
            check_refused("[model.random]", &section, "model.sha256", &format!("{digest:?}"));
        }
        check_accepted("[model.random]", &format!("[model]\nsha256 = {:?}\n[model.random]", "0a".repeat(32)));
    }

    #[test]
    fn random_models_have_whole_even_heads() {
        check_refused("heads = 4", "heads = 3", "model.random.heads", "3");
        check_refused("heads = 4", "heads = 64", "model.random.heads", "64");
        check_refused("kv_heads = 2", "kv_heads = 3", "model.random.kv_heads", "3");
        check_refused("kv_heads = 2", "kv_heads = 8", "model.random.kv_heads", "8");
        for key in ["blocks = 4", "width = 64", "ffn = 176", "heads = 4", "kv_heads = 2"] {
            let name = key.split(' ').next().unwrap();
            for value in ["0", "999999999"] {
                check_refused(key, &format!("{name} = {value}"), &format!("model.random.{name}"), value);
            }
        }
    }

    #[test]
    fn a_split_leaves_a_body() {
        check_refused("tail_blocks = 1", "tail_blocks = 3", "split.head_blocks + split.tail_blocks", "4");
        check_accepted("tail_blocks = 1", "tail_blocks = 2");
        check_accepted("tail_blocks = 1", "tail_blocks = 0");
        check_refused("head_blocks = 1", "head_blocks = 0", "split.head_blocks", "0");

        let experiment = smoke();
        assert!(experiment.check_blocks(3).is_ok());
        assert!(experiment.check_context(128).is_ok());
        let error = experiment.check_context(127).unwrap_err().to_string();
        assert!(error.contains("data.sequence_tokens_max is 128, but the model's context is 127"), "{error}");
        assert_eq!(
            experiment.check_blocks(2).unwrap_err().to_string(),
            "split the model: split.head_blocks = 1 and split.tail_blocks = 1 leave no body block of the 2 blocks; \
             lower them until their sum is less than 2"
        );
    }

    #[test]
    fn every_mode_has_its_own_block_counts() {
        let mode = "mode = \"u\"\nhead_blocks = 1\ntail_blocks = 1\n";
        let check = |replacement: &str, expected: Option<&str>| {
            assert!(SMOKE.contains(mode));
            let found = Experiment::from_toml(&SMOKE.replace(mode, replacement), "lab.toml").map_err(|e| e.to_string());
            match (&found, expected) {
                (Ok(_), None) => {}
                (Err(error), Some(part)) if error.contains(part) => {}
                _ => panic!("{replacement}: {found:?}, expected {expected:?}"),
            }
        };
        check("mode = \"forward_only\"\nhead_blocks = 1\ntail_blocks = 1\n", None);
        check(
            "mode = \"forward_only\"\nhead_blocks = 1\ntail_blocks = 0\n",
            Some("split.tail_blocks is 0; allowed: 1 to"),
        );
        check(
            "mode = \"forward_only\"\nhead_blocks = 0\ntail_blocks = 1\n",
            Some("split.head_blocks is 0; allowed: 1 to"),
        );
        check("mode = \"whole\"\nhead_blocks = 0\ntail_blocks = 0\n", None);
        check("mode = \"whole\"\nhead_blocks = 1\ntail_blocks = 0\n", Some("split.head_blocks is 1; allowed: 0"));
        check("mode = \"whole\"\nhead_blocks = 0\ntail_blocks = 1\n", Some("split.tail_blocks is 1; allowed: 0"));
        check(&format!("{mode}\n[body]\nadapters = \"per_participant\"\n"), None);
        check(
            "mode = \"whole\"\nhead_blocks = 0\ntail_blocks = 0\n[body]\nadapters = \"per_participant\"\n",
            Some("body.adapters is \"per_participant\""),
        );
    }

    #[test]
    fn targets_are_known_and_unique() {
        let line = "targets = [\"q_proj\", \"v_proj\"]";
        check_refused(line, "targets = []", "adapter.targets", "[]");
        check_refused(line, "targets = [\"q\"]", "adapter.targets", "[\"q\"]");
        check_refused(line, "targets = [\"q_proj\", \"q_proj\"]", "adapter.targets", "[\"q_proj\", \"q_proj\"]");
    }

    #[test]
    fn numbers_stay_in_their_ranges() {
        for (line, key, refused) in [
            ("seed = 1", "seed", &["9223372036854775808"][..]),
            ("rank = 4", "adapter.rank", &["0", "1025"]),
            ("alpha = 8.0", "adapter.alpha", &["0.0", "-1.0", "NaN", "inf", "1e39"]),
            ("learning_rate = 0.01", "training.learning_rate", &["0.0", "-0.001", "NaN", "inf", "1e300", "1e-39"]),
            ("beta1 = 0.9", "training.beta1", &["1.0", "-0.1", "NaN", "0.99999999"]),
            ("beta2 = 0.999", "training.beta2", &["1.0", "-0.0", "NaN"]),
            ("epsilon = 1e-8", "training.epsilon", &["0.0", "inf"]),
            ("weight_decay = 0.0", "training.weight_decay", &["-0.1", "inf", "NaN", "1e39"]),
            ("clip_norm = 1.0", "training.clip_norm", &["-1.0", "inf", "NaN", "1e39"]),
            ("batch_tokens = 256", "training.batch_tokens", &["0", "127", "1048577"]),
            ("accumulate = 1", "training.accumulate", &["0", "4097"]),
            ("warmup_steps = 0", "training.warmup_steps", &["11", "9223372036854775807"]),
            ("sequence_tokens_max = 128", "data.sequence_tokens_max", &["0", "1", "4294967295"]),
            ("held_out = 0.2", "data.held_out", &["0.0", "1.0", "-0.5", "NaN"]),
            ("rounds = 2", "federation.rounds", &["0", "4294967295"]),
            ("cohort = 2", "federation.cohort", &["0", "65537"]),
            ("quorum = 2", "federation.quorum", &["0", "3"]),
            ("deadline_s = 60", "federation.deadline_s", &["0", "2592001"]),
            ("local_steps = 5", "federation.local_steps", &["0", "1000001"]),
            ("evaluate_every = 1", "federation.evaluate_every", &["1000001"]),
        ] {
            for value in refused {
                let name = key.rsplit('.').next().unwrap();
                check_refused(line, &format!("{name} = {}", value.to_lowercase()), key, value);
            }
        }
        let line = "strategy = { name = \"fedavg\" }";
        let threads = |count: &str| format!("{line}\n[device]\nthreads = {count}");
        check_refused(line, &threads("1025"), "device.threads", "1025");
        check_accepted(line, &threads("1024"));
    }

    #[test]
    fn measured_tokens_are_none_or_a_sequence_on_our_own_kernels() {
        let (line, key) = ("evaluate_every = 1", "federation.imatrix_tokens");
        for tokens in ["127", "1073741825"] {
            check_refused(line, &format!("{line}\nimatrix_tokens = {tokens}"), key, tokens);
        }
        let other_backend = format!("{line}\nimatrix_tokens = 128\n[device]\nbackend = \"flex\"");
        let text = SMOKE.replace(&format!("{line}\nstrategy"), "strategy");
        assert_eq!(text, SMOKE.replace(&format!("{line}\n"), ""));
        let text = text.replace(
            "strategy = { name = \"fedavg\" }",
            &format!("strategy = {{ name = \"fedavg\" }}\n{other_backend}"),
        );
        let error = Experiment::from_toml(&text, "lab.toml").unwrap_err().to_string();
        assert!(error.starts_with("accept lab.toml: federation.imatrix_tokens is 128"), "{error}");
        check_accepted(line, &format!("{line}\nimatrix_tokens = 0"));
        check_accepted(line, &format!("{line}\nimatrix_tokens = 128"));
    }

    #[test]
    fn strategies_stay_in_their_ranges() {
        let line = "strategy = { name = \"fedavg\" }";
        for (strategy, key, value) in [
            ("name = \"fedprox\", mu = -1.0", "mu", "-1.0"),
            ("name = \"fedavgm\", learning_rate = 0.0, momentum = 0.9", "learning_rate", "0.0"),
            ("name = \"fedavgm\", learning_rate = 1.0, momentum = 1.0", "momentum", "1.0"),
            ("name = \"fedadam\", learning_rate = 0.1, beta1 = 0.9, beta2 = 0.99, tau = 0.0", "tau", "0.0"),
            ("name = \"fedyogi\", learning_rate = 0.1, beta1 = 1.5, beta2 = 0.99, tau = 0.1", "beta1", "1.5"),
            ("name = \"fedyogi\", learning_rate = 0.1, beta1 = 0.9, beta2 = nan, tau = 0.1", "beta2", "NaN"),
            ("name = \"trimmed_mean\", trim = 1", "trim", "1"),
        ] {
            let replacement = format!("strategy = {{ {strategy} }}");
            check_refused(line, &replacement, &format!("federation.strategy.{key}"), value);
        }
        check_accepted(line, "strategy = { name = \"trimmed_mean\", trim = 0 }");
        check_accepted(line, "strategy = { name = \"fedavgm\", learning_rate = 1, momentum = 0 }");
    }

    #[test]
    fn a_partition_has_a_column_and_a_positive_alpha() {
        let partition = |keys: &str| format!("held_out = 0.2\n[data.partition]\n{keys}");
        check_refused("held_out = 0.2", &partition("by = \"key\"\ncolumn = \"\""), "data.partition.column", "\"\"");
        let dirichlet = partition("by = \"dirichlet\"\ncolumn = \"label\"\nalpha = 0.0");
        check_refused("held_out = 0.2", &dirichlet, "data.partition.alpha", "0.0");
        check_accepted("held_out = 0.2", &dirichlet.replace("0.0", "0.5"));
    }

    #[test]
    fn the_mean_of_products_goes_with_strategies_that_take_a_mean() {
        let text = SMOKE.replace("rounds = 2\n", "rounds = 2\naverage = \"product\"\n");
        assert!(Experiment::from_toml(&text, "lab.toml").is_ok());
        let text = text.replace("\"fedavg\"", "\"median\"");
        let error = Experiment::from_toml(&text, "lab.toml").unwrap_err().to_string();
        assert!(error.starts_with("accept lab.toml: federation.average is \"product\""), "{error}");
    }

    #[test]
    fn factoring_products_anew_contradicts_a_frozen_factor() {
        let text = SMOKE.replace("rank = 4\n", "rank = 4\nfactors = \"freeze_a\"\n");
        let text = text.replace("rounds = 2\n", "rounds = 2\naverage = \"product\"\n");
        let error = Experiment::from_toml(&text, "lab.toml").unwrap_err().to_string();
        assert!(error.starts_with("accept lab.toml: federation.average is \"product\""), "{error}");
    }
}

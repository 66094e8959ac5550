mod guides;

use std::sync::Arc;

use experiment::{Experiment, Factors, Seed};
use model::source::TensorInfo;
use model::source::random::RandomModel;
use model::{AdapterConfig, Family, Llama3Scaling, ModelConfig, Tokenizer};
use quant::BlockType;
use tempfile::TempDir;

use super::*;

const SMOKE: &str = include_str!("../../../configs/smoke.toml");

/// A run of two finished rounds with different adapters, and a third round that was begun.
struct Run {
    root: TempDir,
    directory: RunDirectory,
}

impl Run {
    fn new() -> Self {
        Self::of(&Experiment::from_toml(SMOKE, "smoke").unwrap())
    }

    fn of(experiment: &Experiment) -> Self {
        let root = tempfile::tempdir().unwrap();
        let directory = RunDirectory::create(root.path(), experiment).unwrap();
        let run = Self { root, directory };
        for round in 1..=3 {
            let path = run.directory.begin_round(round).unwrap();
            let config = AdapterConfig::new(&experiment.adapter);
            trained(config, run.base().config(), round).save(&path.join("adapter"), "base").unwrap();
        }
        run.directory.finish_round(1).unwrap();
        run.directory.finish_round(2).unwrap();
        run
    }

    fn base(&self) -> Arc<dyn Source> {
        model::source::of_experiment(self.directory.experiment()).unwrap()
    }

    fn adapter(&self, round: u32) -> Adapter {
        Adapter::load(&self.directory.round_path(round).join("adapter"), self.base().config()).unwrap()
    }

    fn out(&self) -> PathBuf {
        self.root.path().join("out")
    }

    fn export(&self, round: Option<u32>, formats: &[&str], force: bool) -> Result<Vec<Exported>, ExportError> {
        let formats: Vec<Format> = formats.iter().map(|format| format.parse().unwrap()).collect();
        let options = Options { force, ..Options::default() };
        export(self.directory.path(), round, &formats, &options, &self.out())
    }
}

/// An adapter whose every factor is far from zero.
fn trained(config: AdapterConfig, model: &ModelConfig, round: u32) -> Adapter {
    let start = Adapter::seeded(config, model, 0..model.blocks, Seed(1)).unwrap();
    let values: Vec<f32> = (0..start.parameters()).map(|i| ((i as u32 + round) as f32 * 0.7).sin() * 0.2).collect();
    start.with_flat(&values).unwrap()
}

/// Compares every tensor that is read back with what was merged; `bound` maps a tensor's name and the 32 merged values
/// of a block to the distance allowed in that block. Returns the largest distance found.
fn check_weights(found: &dyn Source, merged: &Merged<'_>, bound: impl Fn(&str, &[f32]) -> f32) -> f32 {
    let mut worst = 0f32;
    for TensorInfo { name, shape, .. } in merged.tensors() {
        let expected = merged.tensor(name, shape).unwrap();
        let found = found.tensor(name, shape).unwrap();
        for (block, (found, expected)) in found.chunks(32).zip(expected.chunks(32)).enumerate() {
            let bound = bound(name, expected);
            for (found, expected) in found.iter().zip(expected) {
                let error = (found - expected).abs();
                assert!(error <= bound, "{name}, block {block}: {found}, merged {expected}, allowed {bound}");
                worst = worst.max(error);
            }
        }
    }
    worst
}

fn exact(_: &str, _: &[f32]) -> f32 {
    0.0
}

/// Same ids for texts that meet special tokens, bytes and a chat; same special ids and template.
fn check_tokenizer(found: &Tokenizer, expected: &Tokenizer) {
    assert_eq!(found.settings(), expected.settings());
    for text in ["", "plain text, 12345", "Grüße\n\t你好 🦀", "<|im_start|>user\nhello<|im_end|>\n"] {
        for parse_special in [false, true] {
            let [found, expected] = [found, expected].map(|tokenizer| tokenizer.encode(text, parse_special).unwrap());
            assert_eq!(found, expected, "{text:?}, special tokens {parse_special}");
        }
    }
}

#[test]
fn formats_are_read_as_they_are_printed() {
    for format in Format::ALL {
        assert_eq!(format.to_string().parse::<Format>().unwrap(), format);
    }
    assert_eq!("gguf:q8_0".parse::<Format>().unwrap(), Format::Gguf(Mix::Q8_0));
    for unknown in ["", "gguf", "gguf:q4_k", "gguf:Q4_K_M", "GGUF:F32", "safetensors"] {
        let error = unknown.parse::<Format>().unwrap_err();
        assert!(error.contains("hf, peft, gguf:f32"), "{unknown}: {error}");
    }
}

#[test]
fn a_gguf_file_in_f32_holds_the_merged_model_exactly() {
    let run = Run::new();
    let [exported] = run.export(None, &["gguf:f32"], false).unwrap().try_into().unwrap();
    assert_eq!(exported.path, run.out().join("model-f32.gguf"));
    assert_eq!(exported.bytes, fs::metadata(&exported.path).unwrap().len());
    assert_eq!(exported.worst_error, 0.0);

    let (base, adapter) = (run.base(), run.adapter(2));
    let found = model::source::open(&exported.path).unwrap();
    assert_eq!(found.config(), base.config());
    check_weights(&*found, &Merged::new(&*base, &adapter), exact);
    check_tokenizer(found.tokenizer(), base.tokenizer());
}

#[test]
fn quantized_weights_err_by_half_a_scale_at_most() {
    // The widths are whole blocks, so that nothing falls back to F16.
    let experiment = Experiment::from_toml(&SMOKE.replace("ffn = 176", "ffn = 96"), "smoke").unwrap();
    let run = Run::of(&experiment);
    let (base, adapter) = (run.base(), run.adapter(2));
    // The stored scale is rounded to 11 bits, which moves a code of 127 by another sixteenth of a scale.
    let scale = |block: &[f32]| block.iter().fold(0f32, |largest, value| largest.max(value.abs())) / 127.0;
    let [exported] = run.export(None, &["gguf:q8_0"], false).unwrap().try_into().unwrap();
    let found = model::source::open(&exported.path).unwrap();
    let worst = check_weights(&*found, &Merged::new(&*base, &adapter), |name, block| {
        if name.ends_with("norm.weight") { 0.0 } else { scale(block) * (0.5 + 1.0 / 16.0) }
    });
    assert!(worst > 0.0);
    assert_eq!(exported.worst_error, worst);
}

#[test]
fn every_gguf_type_is_read_back_with_the_error_it_reports() {
    let run = Run::new();
    let formats: Vec<String> = Format::ALL[2..].iter().map(Format::to_string).collect();
    let formats: Vec<&str> = formats.iter().map(String::as_str).collect();
    let (base, adapter) = (run.base(), run.adapter(2));
    for exported in run.export(None, &formats, false).unwrap() {
        let found = model::source::open(&exported.path).unwrap();
        let worst = check_weights(&*found, &Merged::new(&*base, &adapter), |_, _| f32::INFINITY);
        assert_eq!(exported.worst_error, worst, "{exported}");
        for info in found.tensors() {
            let Format::Gguf(mix) = exported.format else { unreachable!("the first two formats are left out") };
            let expected = gguf::stored_type(mix, found.config(), &info.name, &info.shape, false);
            assert_eq!(info.dtype, expected, "{} of {exported}", info.name);
        }
    }
}

/// Wide enough for superblocks.
fn wide_shape() -> ModelConfig {
    ModelConfig { width: 256, ffn: 256, head_size: 64, qkv_bias: false, ..odd_shape(Family::Llama) }
}

#[test]
fn every_mix_of_a_wide_model_is_read_back_and_searching_loses_less() {
    let config = wide_shape();
    let base = RandomModel::of_shape(config.clone(), Tokenizer::bytes(), Seed(5)).unwrap();
    let targets = model::adapter::TARGETS.map(str::to_owned).to_vec();
    let adapter = AdapterConfig { rank: 2, alpha: 3.0, dropout: 0.0, targets, factors: Factors::Both };
    let adapter = trained(adapter, &config, 1);
    let merged = Merged::new(&base, &adapter);
    let name = "model.layers.1.mlp.up_proj.weight";
    let expected = merged.tensor(name, &[config.ffn, config.width]).unwrap();
    let importance = importance::Importance::of(&merged).unwrap();
    let columns = importance.columns(name).unwrap();

    let directory = tempfile::tempdir().unwrap();
    for mix in Mix::ALL {
        let losses = [Method::Reference, Method::Search].map(|method| {
            let path = directory.path().join(format!("{mix}-{method:?}.gguf"));
            let calibration = Calibration::None;
            let mut guide = match method {
                Method::Search => Guide::new(&merged, &calibration, None, 1).unwrap(),
                Method::Reference => Guide::told(&merged, None),
            };
            let wanted = [gguf::Wanted { choice: gguf::TypeChoice::Mix(mix), path: path.clone() }];
            let [worst] = gguf::write("wide", &wanted, method, &mut guide, false).unwrap()[..] else { unreachable!() };
            let found = model::source::open(&path).unwrap();
            assert_eq!(check_weights(&*found, &merged, |_, _| f32::INFINITY), worst, "{mix}");
            let found = found.tensor(name, &[config.ffn, config.width]).unwrap();
            let losses = found.iter().zip(&expected).enumerate();
            losses.map(|(i, (found, x))| columns[i % config.width] * (found - x).powi(2)).sum::<f32>()
        });
        let [reference, searched] = losses;
        match mix {
            Mix::F32 | Mix::F16 | Mix::BF16 | Mix::Q8_0 => assert_eq!(searched, reference, "{mix}"),
            _ => assert!(searched < reference * 0.99, "{mix}: {searched}, ggml {reference}"),
        }
    }
}

#[test]
fn a_hugging_face_directory_holds_the_merged_model_exactly() {
    let run = Run::new();
    let [exported] = run.export(None, &["hf"], false).unwrap().try_into().unwrap();
    assert_eq!((&exported.path, exported.worst_error), (&run.out().join("hf"), 0.0));
    let mut files: Vec<_> = fs::read_dir(&exported.path).unwrap().map(|file| file.unwrap().file_name()).collect();
    files.sort();
    let mut expected = huggingface::FILES;
    expected.sort_unstable();
    assert_eq!(files, expected);

    let (base, adapter) = (run.base(), run.adapter(2));
    let found = model::source::open(&exported.path).unwrap();
    assert_eq!(found.config(), base.config());
    check_weights(&*found, &Merged::new(&*base, &adapter), exact);
    check_tokenizer(found.tokenizer(), base.tokenizer());
}

#[test]
fn the_adapter_of_the_asked_round_is_exported_alone() {
    let run = Run::new();
    for (round, expected) in [(None, 2), (Some(1), 1), (Some(2), 2)] {
        let [exported] = run.export(round, &["peft"], true).unwrap().try_into().unwrap();
        let found = Adapter::load(&exported.path, run.base().config()).unwrap();
        assert_eq!(found, run.adapter(expected), "round {round:?}");
    }
}

#[test]
fn merging_adds_the_scaled_product_to_adapted_layers_and_to_nothing_else() {
    let run = Run::new();
    let (base, adapter) = (run.base(), run.adapter(1));
    let merged = Merged::new(&*base, &adapter);
    let scale = adapter.config.alpha / f64::from(adapter.config.rank);
    let mut adapted = 0;
    for TensorInfo { name, shape, .. } in merged.tensors() {
        let (before, after) = (base.tensor(name, shape).unwrap(), merged.tensor(name, shape).unwrap());
        let layer = name.trim_end_matches(".weight");
        let factor = |factor: &str| {
            let wanted = format!("base_model.model.{layer}.lora_{factor}.weight");
            adapter.tensors().iter().find(|tensor| tensor.name == wanted)
        };
        let (Some(a), Some(b)) = (factor("A"), factor("B")) else {
            assert_eq!(before, after, "{name}");
            continue;
        };
        adapted += 1;
        let ([rank, columns], [rows, _]) = (a.shape, b.shape);
        for (row, column) in [(0, 0), (rows - 1, columns - 1), (1, columns / 2)] {
            let product: f64 = (0..rank)
                .map(|r| f64::from(b.values[row * rank + r]) * f64::from(a.values[r * columns + column]))
                .sum();
            let expected = f64::from(before[row * columns + column]) + scale * product;
            let found = f64::from(after[row * columns + column]);
            assert!((found - expected).abs() < 1e-6, "{name}[{row}, {column}]: {found}, expected {expected}");
        }
    }
    assert_eq!(adapted, base.config().blocks * adapter.config.targets.len());
}

fn write_gguf(merged: &Merged<'_>, mix: Mix, path: &Path) -> Result<Vec<f32>, ExportError> {
    let wanted = [gguf::Wanted { choice: gguf::TypeChoice::Mix(mix), path: path.to_owned() }];
    gguf::write("a model", &wanted, Method::Search, &mut Guide::told(merged, None), false)
}

/// Writes a model of this shape as GGUF and as a Hugging Face directory and reads both back.
fn check_shape_survives(config: ModelConfig) {
    let base = RandomModel::of_shape(config.clone(), Tokenizer::bytes(), Seed(5)).unwrap();
    let targets = model::adapter::TARGETS.map(str::to_owned).to_vec();
    let adapter = AdapterConfig { rank: 2, alpha: 3.0, dropout: 0.0, targets, factors: Factors::Both };
    let adapter = trained(adapter, &config, 1);
    let merged = Merged::new(&base, &adapter);

    let directory = tempfile::tempdir().unwrap();
    let gguf_path = directory.path().join("model.gguf");
    assert_eq!(write_gguf(&merged, Mix::F32, &gguf_path).unwrap(), [0.0]);
    huggingface::write(&merged, &directory.path().join("hf")).unwrap();
    for path in [gguf_path, directory.path().join("hf")] {
        let found = model::source::open(&path).unwrap();
        assert_eq!(found.config(), &config, "{}", path.display());
        check_weights(&*found, &merged, exact);
        check_tokenizer(found.tokenizer(), base.tokenizer());
    }
}

/// More embedding rows than tokens, an LM head of its own, biases, heads wider than their share of the width.
fn odd_shape(family: Family) -> ModelConfig {
    ModelConfig {
        family,
        vocabulary: 300,
        width: 32,
        ffn: 40,
        blocks: 2,
        heads: 4,
        kv_heads: 2,
        head_size: 16,
        rms_epsilon: 1e-6,
        rope_base: 500_000.0,
        rope_scaling: None,
        tied_embeddings: false,
        qkv_bias: family != Family::Qwen3,
        context: 512,
    }
}

#[test]
fn models_of_every_family_survive() {
    for family in Family::ALL {
        check_shape_survives(odd_shape(family));
    }
}

#[test]
fn the_frequency_scaling_of_llama_3_survives() {
    let scaling =
        Llama3Scaling { factor: 32.0, low_frequency_factor: 1.0, high_frequency_factor: 4.0, original_context: 8192 };
    check_shape_survives(ModelConfig { rope_scaling: Some(scaling), ..odd_shape(Family::Llama) });
}

#[test]
fn a_tokenizer_larger_than_the_embedding_is_refused() {
    let config = ModelConfig { vocabulary: 258, ..odd_shape(Family::Llama) };
    let base = RandomModel::of_shape(config.clone(), Tokenizer::bytes(), Seed(5)).unwrap();
    let targets = vec!["q_proj".to_owned()];
    let adapter = AdapterConfig { rank: 2, alpha: 3.0, dropout: 0.0, targets, factors: Factors::Both };
    let adapter = trained(adapter, &config, 1);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let refused = write_gguf(&Merged::new(&base, &adapter), Mix::F32, &path);
    assert!(matches!(refused, Err(ExportError::Vocabulary { tokens: 259, rows: 258 })), "{refused:?}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_weight_too_large_for_the_type_is_named_and_leaves_no_file() {
    let run = Run::new();
    let adapter = run.adapter(1);
    let huge = adapter.with_flat(&vec![1e4; adapter.parameters()]).unwrap();
    let base = run.base();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let refused = write_gguf(&Merged::new(&*base, &huge), Mix::F16, &path);
    let error = refused.unwrap_err().to_string();
    assert!(error.starts_with("export model.layers.0.self_attn.q_proj.weight: cannot use block"), "{error}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_file_that_is_there_is_replaced_only_when_forced() {
    let run = Run::new();
    run.export(Some(1), &["hf"], false).unwrap();
    let weights = run.out().join("hf/model.safetensors");
    let before = fs::read(&weights).unwrap();

    let refused = run.export(Some(2), &["gguf:f16", "hf"], false);
    assert!(matches!(&refused, Err(ExportError::Exists { path }) if *path == weights), "{refused:?}");
    assert_eq!(fs::read(&weights).unwrap(), before);
    assert!(!run.out().join("model-f16.gguf").exists(), "nothing is written when anything is refused");

    run.export(Some(2), &["gguf:f16", "hf"], true).unwrap();
    assert_ne!(fs::read(&weights).unwrap(), before);
}

#[test]
fn only_finished_rounds_are_exported() {
    let run = Run::new();
    for round in [0, 3, 9] {
        let refused = run.export(Some(round), &["peft"], false);
        assert!(matches!(refused, Err(ExportError::UnfinishedRound { finished: 2, .. })), "{round}: {refused:?}");
    }
    let root = tempfile::tempdir().unwrap();
    let fresh = RunDirectory::create(root.path(), run.directory.experiment()).unwrap();
    fresh.begin_round(1).unwrap();
    for round in [None, Some(1)] {
        let refused = export(fresh.path(), round, &[Format::Peft], &Options::default(), &run.out());
        assert!(matches!(refused, Err(ExportError::NoRound { .. })), "{refused:?}");
    }
    assert!(!run.out().exists());
}

#[test]
fn an_adapter_is_not_merged_into_another_model() {
    let mut experiment = Experiment::from_toml(SMOKE, "smoke").unwrap();
    let base = model::source::of_experiment(&experiment).unwrap();
    let digest = experiment::hex(&Manifest::of(&*base).unwrap().digest());
    experiment.model.sha256 = Some(digest.clone());
    let run = Run::of(&experiment);
    run.export(None, &["peft"], false).unwrap();

    let other = "0".repeat(64);
    experiment.model.sha256 = Some(other.clone());
    let named = Run::of(&experiment);
    experiment.model.sha256 = None;
    let trained = Run::of(&experiment);
    let row = Row::Run {
        time_unix_ms: 1,
        experiment_digest: "ab".into(),
        model_digest: other.clone(),
        software: "headwater".into(),
        energy_j: None,
    };
    trained.directory.metrics_log().unwrap().append(&row).unwrap();
    for run in [named, trained] {
        match run.export(None, &["peft"], false) {
            Err(ExportError::OtherModel { expected, found, .. }) => assert_eq!((&expected, &found), (&other, &digest)),
            unexpected => panic!("{unexpected:?}"),
        }
    }
}

#[test]
fn a_result_is_printed_on_one_line_and_as_json() {
    let exported = Exported {
        format: Format::Gguf(Mix::Q8_0),
        path: PathBuf::from("out/model-q8_0.gguf"),
        bytes: 1234,
        worst_error: 0.5,
        check: None,
    };
    assert_eq!(exported.to_string(), "gguf:q8_0: out/model-q8_0.gguf, 1234 bytes, worst error 0.5");
    let json = r#"{"format":"gguf:q8_0","path":"out/model-q8_0.gguf","bytes":1234,"worst_error":0.5,"check":null}"#;
    assert_eq!(serde_json::to_string(&exported).unwrap(), json);
}

#[test]
fn every_export_is_read_back_and_a_limit_that_it_exceeds_is_an_error() {
    let run = Run::new();
    let exported = run.export(None, &["hf", "peft", "gguf:f32", "gguf:q4_0"], false).unwrap();
    let [hf, peft, f32, q4_0] = &exported[..] else { unreachable!() };
    assert_eq!(peft.check, None);
    for exact in [hf, f32] {
        let check = exact.check.as_ref().unwrap();
        assert!(check.kl_nats.abs() < 1e-9 && check.same_top == 1.0 && check.tokens > 500, "{check}");
        assert_eq!(check.perplexity, check.merged_perplexity);
    }
    let check = q4_0.check.as_ref().unwrap();
    assert!(check.kl_nats > 1e-7 && check.passed(), "{check}");
    assert_eq!(check.bytes.iter().map(|(_, bytes)| bytes).sum::<u64>(), q4_0.bytes);
    assert!(q4_0.to_string().contains("\n  KL 0.") && q4_0.to_string().contains("embedding 0."), "{q4_0}");
    q4_0.verdict().unwrap();

    let options =
        Options { force: true, check: Checks::Compare { text: None, limit_nats: Some(1e-8) }, ..Options::default() };
    let strict = export(run.directory.path(), None, &[Format::Gguf(Mix::Q4_0)], &options, &run.out()).unwrap();
    let error = strict[0].verdict().unwrap_err().to_string();
    assert!(
        error.contains("model-q4_0.gguf") && error.contains("0.00000001") && error.contains("--limit-kl"),
        "{error}"
    );
}

#[test]
fn a_budget_is_kept_to_and_spent_where_it_saves_most() {
    let config = wide_shape();
    let base = RandomModel::of_shape(config, Tokenizer::bytes(), Seed(5)).unwrap();
    let adapter = Adapter::none();
    let merged = Merged::new(&base, &adapter);
    let [metadata, f16] = gguf::sizes(&merged, "m").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let text = check::own_text(&merged).unwrap();
    let mut divergences = Vec::new();
    for percent in [25.0, 40.0, 100.0] {
        let types = budget::choose(&merged, "m", Budget::Percent(percent), Method::Search, 1).unwrap();
        let path = directory.path().join(format!("{percent}.gguf"));
        let wanted = [gguf::Wanted { choice: gguf::TypeChoice::Each(types), path: path.clone() }];
        let mut guide = Guide::new(&merged, &Calibration::None, None, 1).unwrap();
        gguf::write("m", &wanted, Method::Search, &mut guide, false).unwrap();
        let (bytes, most) = (fs::metadata(&path).unwrap().len() as f64, f16 as f64 * percent / 100.0);
        assert!(bytes <= most && bytes > 0.9 * most, "{percent} %: {bytes} of {most}");
        let expected = [check::Expected { path, limit_nats: 1.0 }];
        divergences.push(check::check(&merged, &expected, &text).unwrap()[0].kl_nats);
    }
    assert!(divergences.is_sorted_by(|a, b| a > b), "{divergences:?}");
    let small = budget::choose(&merged, "m", Budget::Bytes(metadata + 1), Method::Search, 1).unwrap_err().to_string();
    assert!(small.contains("allow that much"), "{small}");
}

#[test]
fn what_an_export_reads_it_never_replaces() {
    let run = Run::new();
    run.export(None, &["hf", "gguf:q8_0"], false).unwrap();
    let options = Options { force: true, ..Options::default() };
    for (file, format) in [("hf", Format::HuggingFace), ("model-q8_0.gguf", Format::Gguf(Mix::Q8_0))] {
        let mut experiment = Experiment::from_toml(SMOKE, "smoke").unwrap();
        let base = run.out().join(file);
        experiment.model = experiment::Model { path: Some(base.clone()), random: None, ..experiment.model };
        let on_it = Run::of(&experiment);
        match export(on_it.directory.path(), None, &[format], &options, &run.out()) {
            Err(ExportError::Input { input, .. }) => assert_eq!(input, base),
            unexpected => panic!("{unexpected:?}"),
        }
        // Elsewhere it is written.
        export(on_it.directory.path(), None, &[format], &options, &on_it.out()).unwrap();
    }
    let text = run.out().join("hf").join("tokenizer.json");
    let check = Checks::Compare { text: Some(text.clone()), limit_nats: None };
    let options = Options { check, ..options };
    match export(run.directory.path(), None, &[Format::HuggingFace], &options, &run.out()) {
        Err(ExportError::Input { path, .. }) => assert_eq!(path, text),
        unexpected => panic!("{unexpected:?}"),
    }
}

#[test]
fn a_block_is_rounded_by_its_own_activations_whatever_types_are_before_it() {
    let base = RandomModel::of_shape(wide_shape(), Tokenizer::bytes(), Seed(5)).unwrap();
    let adapter = Adapter::none();
    let merged = Merged::new(&base, &adapter);
    let directory = tempfile::tempdir().unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let shape = &merged.tensors().iter().find(|info| info.name == name).unwrap().shape;
    // Types that are rounded to the nearest code ask for nobody's activations.
    let written = [BlockType::Q4_0, BlockType::F16].map(|first| {
        let layers = merged.tensors().iter().filter(|info| info.shape.len() == 2 && info.name.contains(".layers."));
        let ty = |name: &str| if name.contains(".layers.0.") { first } else { BlockType::Q4_0 };
        let types = layers.map(|info| (info.name.clone(), ty(&info.name))).collect();
        let path = directory.path().join(format!("{first}.gguf"));
        let wanted = [gguf::Wanted { choice: gguf::TypeChoice::Each(types), path: path.clone() }];
        let mut guide = Guide::new(&merged, &Calibration::Own, None, 1).unwrap();
        gguf::write("m", &wanted, Method::Search, &mut guide, false).unwrap();
        model::source::open(&path).unwrap().tensor(name, shape).unwrap()
    });
    assert!(written[0] == written[1]);
}

/// What `complete` does not vouch for is never shipped.
#[test]
fn a_damaged_round_is_not_exported() {
    let run = Run::of(&Experiment::from_toml(SMOKE, "smoke").unwrap());
    let options = Options { check: Checks::Skip, force: true, ..Options::default() };
    let exported = || export(run.directory.path(), None, &[Format::Peft], &options, &run.out());
    exported().unwrap();
    let round = run.directory.finished_rounds().unwrap();
    let path = run.directory.round_path(round).join("adapter/adapter_model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = exported().unwrap_err().to_string();
    assert!(
        error.contains("adapter_model.safetensors is not what was written") && error.contains("--round"),
        "{error}"
    );
}

#[test]
fn who_is_told_what_to_do_is_told_once() {
    let run = Run::new();
    let marker = run.directory.round_path(2).join("complete");
    fs::remove_file(&marker).unwrap();
    fs::create_dir(&marker).unwrap();
    let unread = run.export(Some(2), &["peft"], false).unwrap_err();
    let unwritten = ExportError::io(&marker)(storage::replaceable(&marker).unwrap_err());
    for error in [unread.to_string(), unwritten.to_string()] {
        assert_eq!(error.matches("; ").count(), 1, "{error}");
    }
}

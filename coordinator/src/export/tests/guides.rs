//! What guides the choice of codes: norms, measured activations, importance matrices of a run's devices.

use super::*;

#[test]
fn importance_follows_the_norms_and_is_known_for_what_they_feed() {
    let config = wide_shape();
    let base = RandomModel::of_shape(config.clone(), Tokenizer::bytes(), Seed(5)).unwrap();
    let targets = vec!["q_proj".to_owned()];
    let adapter = AdapterConfig { rank: 2, alpha: 3.0, dropout: 0.0, targets, factors: Factors::Both };
    let adapter = trained(adapter, &config, 1);
    let importance = importance::Importance::of(&Merged::new(&base, &adapter)).unwrap();
    for layer in
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    {
        let columns = importance.columns(&format!("model.layers.1.{layer}.weight")).unwrap();
        assert_eq!(columns.len(), 256, "{layer}");
        assert!(columns.iter().all(|v| v.is_finite() && *v >= 0.0) && columns.iter().any(|v| *v > 0.0), "{layer}");
    }
    // A norm makes the mean square one; the gains of a random model are one.
    let columns = importance.columns("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert!((columns.iter().sum::<f32>() / 256.0 - 1.0).abs() < 1e-3);
    for unknown in ["model.layers.0.self_attn.o_proj.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"] {
        assert!(importance.columns(unknown).is_none(), "{unknown}");
    }
}

/// The distance of the outputs of a layer's rounded weights from those of its true ones, on a text.
fn output_loss(found: &dyn Source, merged: &Merged<'_>, name: &str, text: &[Vec<u32>]) -> f64 {
    let (block, input) = model::LayerInput::of_tensor(name).unwrap();
    let shape = &merged.tensors().iter().find(|info| info.name == name).unwrap().shape;
    let mut walk = model::Walk::begin(merged, text).unwrap();
    while walk.block() < block {
        walk.moments().unwrap();
    }
    let moments = walk.moments().unwrap();
    let (moments, columns) = (moments.of(input), shape[1]);
    let (expected, found) = (merged.tensor(name, shape).unwrap(), found.tensor(name, shape).unwrap());
    let rows = expected.chunks(columns).zip(found.chunks(columns)).map(|(expected, found)| {
        let off: Vec<f64> = expected.iter().zip(found).map(|(x, y)| f64::from(y - x)).collect();
        let products = moments.iter().enumerate().map(|(i, m)| off[i / columns] * f64::from(*m) * off[i % columns]);
        products.sum::<f64>()
    });
    rows.sum()
}

#[test]
fn measured_activations_lose_less_in_the_layers_outputs_than_the_reference() {
    let config = wide_shape();
    let base = RandomModel::of_shape(config, Tokenizer::bytes(), Seed(5)).unwrap();
    let adapter = Adapter::none();
    let merged = Merged::new(&base, &adapter);
    let text = calibration::own_text(&merged, [3, 40], Seed(77)).unwrap();
    assert_eq!(text.iter().map(Vec::len).collect::<Vec<_>>(), [40; 3]);
    let directory = tempfile::tempdir().unwrap();
    let wanted =
        |name: &str| [gguf::Wanted { choice: gguf::TypeChoice::Mix(Mix::Q4_0), path: directory.path().join(name) }];
    let mut told = Guide::told(&merged, None);
    gguf::write("m", &wanted("reference"), Method::Reference, &mut told, false).unwrap();
    let mut own = Guide::new(&merged, &Calibration::Own, None, 1).unwrap();
    gguf::write("m", &wanted("own.gguf"), Method::Search, &mut own, false).unwrap();
    fs::rename(directory.path().join("reference"), directory.path().join("reference.gguf")).unwrap();
    for layer in ["0.self_attn.q_proj", "0.self_attn.o_proj", "1.mlp.up_proj", "1.mlp.down_proj"] {
        let name = format!("model.layers.{layer}.weight");
        let [reference, own] = ["reference.gguf", "own.gguf"].map(|file| {
            let found = model::source::open(&directory.path().join(file)).unwrap();
            output_loss(&*found, &merged, &name, &text)
        });
        assert!(own < 0.9 * reference, "{name}: {own}, ggml {reference}");
    }
}

#[test]
fn an_importance_matrix_of_another_model_is_refused() {
    let run = Run::new();
    let path = run.root.path().join("imatrix.gguf");
    for (name, columns, expected) in
        [("blk.0.attn_q.weight", 3, "has 3 columns"), ("blk.9.attn_q.weight", 64, "no matrix")]
    {
        let mut imatrix = Imatrix::default();
        imatrix.add(name, &vec![1.0; columns], 1.0).unwrap();
        imatrix.write(&path).unwrap();
        let options = Options { imatrix: vec![path.clone()], ..Options::default() };
        let refused = export(run.directory.path(), None, &[Format::Gguf(Mix::Q4_0)], &options, &run.out());
        let error = refused.unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("imatrix.gguf"), "{error}");
    }
}

#[test]
fn the_devices_matrices_add_up() {
    let run = Run::new();
    let federated =
        Options { imatrix: vec!["federated".into()], check: Checks::Skip, force: true, ..Options::default() };
    let formats = [Format::Gguf(Mix::Q4_0)];
    let written = |options: &Options| {
        let [exported] = export(run.directory.path(), None, &formats, options, &run.out())?.try_into().unwrap();
        Ok::<_, ExportError>(fs::read(exported.path).unwrap())
    };
    let none = written(&federated).unwrap_err().to_string();
    assert!(none.contains("imatrix holds none") && none.contains("participant calibrate"), "{none}");

    let (devices, name) = (run.directory.path().join("imatrix"), "blk.0.attn_q.weight");
    let mut sum = Imatrix::default();
    for device in 0..3 {
        let squares: Vec<f32> = (0..64).map(|i| ((i * 7 + device * 5) % 11) as f32).collect();
        let mut one = Imatrix::default();
        one.add(name, &squares, 1.0 + device as f32).unwrap();
        one.write(&devices.join(format!("{device}.gguf"))).unwrap();
        sum.merge(&one).unwrap();
    }
    let path = run.root.path().join("sum.gguf");
    sum.write(&path).unwrap();
    let together = written(&federated).unwrap();
    // Where the run itself collects them, whoever was in its last round is missed.
    check_members_are_missed(&devices);
    assert_eq!(together, written(&Options { imatrix: vec![path], ..federated.clone() }).unwrap());
    assert_ne!(together, written(&Options { imatrix: Vec::new(), ..federated }).unwrap());
}

/// In a run of the devices 0 to 3 with the matrices of 0 to 2.
fn check_members_are_missed(devices: &Path) {
    let text = SMOKE.replace("evaluate_every = 1", "evaluate_every = 1\nimatrix_tokens = 4096");
    let run = Run::of(&Experiment::from_toml(&text, "smoke").unwrap());
    let mine = run.directory.path().join("imatrix");
    for device in 0..3 {
        let file = format!("{device}.gguf");
        fs::copy(devices.join(&file), mine.join(&file)).unwrap();
    }
    let row = |round, members: &[&str]| experiment::Row::Round {
        round,
        members: members.iter().map(ToString::to_string).collect(),
        loss_nats: 1.0,
        tokens: 1,
        duration_ms: 1.0,
        aggregation_error: None,
        body_compute_ms: 0.0,
        body_idle_ms: 0.0,
        energy_j: None,
    };
    let export = || {
        let options =
            Options { imatrix: vec!["federated".into()], check: Checks::Skip, force: true, ..Options::default() };
        export(run.directory.path(), None, &[Format::Gguf(Mix::Q4_0)], &options, &run.out())
    };
    let mut rows = run.directory.metrics_log().unwrap();
    rows.append(&row(2, &["0", "3", "4"])).unwrap();
    // It was lost, and found again.
    rows.append(&row(1, &["0", "1"])).unwrap();
    let error = export().unwrap_err().to_string();
    assert!(error.contains("has none of 3, 4, in the run's last round"), "{error}");
    rows.append(&row(2, &["0", "2"])).unwrap();
    export().unwrap();
}

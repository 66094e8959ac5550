//! A run equals the arithmetic it stands for, bit for bit on the same backend.

use std::sync::{Arc, Mutex};

use experiment::{Backend, Seed};
use model::adapter::gradients::clip_factor;
use model::stage::{Dropout, Input};
use model::{AdamW, Adapter, AdapterConfig, ComputeDevice, Gradients, Part, Segments, Stage};
use participant::ParticipantError;
use participant::dataset::Dataset;
use participant::local::{Happened, LocalTraining};
use participant::trainer::StepReport;

use crate::world::{StepBits, World, alone, loss_bits, run_to_the_end};

fn per_participant(text: &str) -> String {
    format!("{text}\n[body]\nadapters = \"per_participant\"\n")
}

fn whole(text: &str) -> String {
    text.replace("mode = \"u\"", "mode = \"whole\"")
        .replace("head_blocks = 1", "head_blocks = 0")
        .replace("tail_blocks = 1", "tail_blocks = 0")
}

/// Every hard setting at once: accumulation, dropout, clipping that bites, all seven targets.
fn demanding(text: &str) -> String {
    text.replace("accumulate = 1", "accumulate = 3")
        .replace("clip_norm = 1.0", "clip_norm = 0.05")
        .replace("rank = 4", "rank = 4\ndropout = 0.1")
        .replace(
            "targets = [\"q_proj\", \"v_proj\"]",
            "targets = [\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\", \"gate_proj\", \"up_proj\", \"down_proj\"]",
        )
}

fn on_backend(backend: Backend) -> impl Fn(&str) -> String {
    let name = backend.name();
    move |text| {
        let text: String =
            text.lines().filter(|line| !line.starts_with("backend")).map(|line| format!("{line}\n")).collect();
        match text.contains("[device]") {
            true => text.replace("[device]", &format!("[device]\nbackend = \"{name}\"")),
            false => format!("{text}\n[device]\nbackend = \"{name}\"\n"),
        }
    }
}

fn local_training(world: &World, name: &str) -> LocalTraining {
    let _ = world.participant(name);
    LocalTraining {
        experiment: world.path("test.toml"),
        data: world.path(&format!("{name}.jsonl")),
        name: name.into(),
        out: Some(world.path("local")),
        force: false,
        init_adapter: None,
        dump_batches: None,
        steps: None,
        device: Default::default(),
    }
}

async fn train_locally(world: &World, name: &str) -> (Vec<StepReport>, Adapter) {
    let steps = Mutex::new(Vec::new());
    let tell = |happened| {
        if let Happened::Stepped(report) = happened {
            steps.lock().unwrap().push(report);
        }
    };
    local_training(world, name).run(tell).await.unwrap();
    let adapter = Adapter::load(&world.path("local"), world.source.config()).unwrap();
    (steps.into_inner().unwrap(), adapter)
}

async fn check_one_participant_equals_local_training(change: impl Fn(&str) -> String) {
    for device in ComputeDevice::compiled() {
        let world = World::new(|text| on_backend(device.backend())(&change(&alone(text))));
        let federated = run_to_the_end(&world, &["press-1"]).await;
        let (local, adapter) = train_locally(&world, "press-1").await;
        assert_eq!(loss_bits(&federated["press-1"]), loss_bits(&local), "{device:?}");
        assert_eq!(world.adapter(world.experiment.federation.rounds), adapter, "{device:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_participant_with_a_shared_body_equals_local_training() {
    check_one_participant_equals_local_training(|text| text.to_owned()).await;
    check_one_participant_equals_local_training(demanding).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_participant_with_its_own_body_equals_local_training() {
    check_one_participant_equals_local_training(|text| per_participant(&demanding(text))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_participant_with_the_whole_model_equals_local_training() {
    check_one_participant_equals_local_training(|text| whole(&demanding(text))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_that_the_last_step_ruined_is_not_saved() {
    let world = World::new(|text| alone(text).replace("learning_rate = 0.01", "learning_rate = 3e38"));
    let training = LocalTraining { steps: Some(1), ..local_training(&world, "press-1") };
    let error = training.run(|_| {}).await.unwrap_err();
    assert!(matches!(error, ParticipantError::DivergedAdapter { steps: 1 }), "{error}");
    assert!(!world.path("local").join("adapter_config.json").exists());
}

const THREE: [&str; 3] = ["chiller-1", "mill-1", "press-1"];

fn of_three(text: &str) -> String {
    text.replace("cohort = 2", "cohort = 3").replace("quorum = 2", "quorum = 3")
}

/// With a body of its own for everybody, cutting the model changes nothing: federated LoRA is the oracle.
#[tokio::test(flavor = "multi_thread")]
async fn three_split_participants_with_their_own_bodies_equal_three_whole_ones() {
    for device in ComputeDevice::compiled() {
        let backend = on_backend(device.backend());
        let split = World::new(|text| backend(&per_participant(&demanding(&of_three(text)))));
        let whole = World::new(|text| backend(&whole(&demanding(&of_three(text)))));
        let split_steps = run_to_the_end(&split, &THREE).await;
        let whole_steps = run_to_the_end(&whole, &THREE).await;
        for name in THREE {
            assert_eq!(loss_bits(&split_steps[name]), loss_bits(&whole_steps[name]), "{name} {device:?}");
        }
        let last = split.experiment.federation.rounds;
        assert_eq!(split.adapter(last), whole.adapter(last), "{device:?}");
    }
}

/// The shared body against its definition, written out with the unsplit model: every step each participant computes the
/// gradient of the whole model, clips it, steps its own ends, and the body steps by the token-weighted mean.
#[tokio::test(flavor = "multi_thread")]
async fn three_participants_with_a_shared_body_equal_its_definition() {
    let world = World::new(|text| demanding(&of_three(text)));
    let steps = run_to_the_end(&world, &THREE).await;
    let (losses, adapter) = tokio::task::block_in_place(|| shared_body_by_definition(&world));
    for (name, losses) in THREE.iter().zip(losses) {
        assert_eq!(loss_bits(&steps[*name]), losses, "{name}");
    }
    assert_eq!(world.adapter(world.experiment.federation.rounds), adapter);
}

struct Side {
    ends: Adapter,
    optimizer: AdamW,
    data: Dataset,
    losses: Vec<StepBits>,
    tokens: u64,
}

fn shared_body_by_definition(world: &World) -> (Vec<Vec<StepBits>>, Adapter) {
    let experiment = &world.experiment;
    let (training, federation) = (&experiment.training, &experiment.federation);
    let model = world.source.config();
    let device = ComputeDevice::new(&experiment.device).unwrap();
    let stage = Stage::load(&*world.source, Part::whole(model.blocks), &device, None).unwrap();
    let seed = Seed(experiment.seed);
    let config = AdapterConfig::new(&experiment.adapter);
    let mut global = Adapter::seeded(config, model, 0..model.blocks, seed).unwrap();
    let last = model.blocks - 1;
    let (is_end, is_body) = (move |block| block == 0 || block == last, move |block| block != 0 && block != last);
    let mut body = global.filtered(is_body);
    let mut body_optimizer = AdamW::new(training, &body);
    let mut sides: Vec<Side> = THREE
        .iter()
        .map(|name| {
            let (participant, _) = world.participant(name);
            let records = (participant.records)(experiment).unwrap();
            let data = Dataset::new(records, experiment, name, world.source.tokenizer()).unwrap();
            let ends = global.filtered(is_end);
            Side { optimizer: AdamW::new(training, &ends), ends, data, losses: Vec::new(), tokens: 0 }
        })
        .collect();
    for round in 0..u64::from(federation.rounds) {
        for side in &mut sides {
            side.ends = global.filtered(is_end);
            side.tokens = 0;
        }
        for step in round * federation.local_steps..(round + 1) * federation.local_steps {
            let rate = training.learning_rate_at(step, experiment.total_steps());
            let mut body_gradients = Vec::new();
            for (side, name) in sides.iter_mut().zip(THREE) {
                let adapter = Adapter::join([side.ends.clone(), body.clone()]).unwrap();
                let (gradients, nats, tokens) = whole_step(&stage, &adapter, &mut side.data, seed, name, step);
                side.losses.push((step, (nats / tokens as f64).to_bits(), tokens));
                side.tokens += tokens;
                let factor = clip_factor(gradients.squared_norms(&adapter), training.clip_norm);
                let share = |keep: &dyn Fn(usize) -> bool| {
                    let kept = adapter.tensors().iter().zip(gradients.tensors());
                    let mut share =
                        Gradients::new(kept.filter(|(t, _)| keep(t.block)).map(|(_, g)| g.clone()).collect());
                    share.scale(factor);
                    share
                };
                body_gradients.push((share(&is_body), tokens));
                side.optimizer.step(&mut side.ends, &share(&is_end), rate);
            }
            let total: u64 = body_gradients.iter().map(|(_, tokens)| tokens).sum();
            let mut shares = body_gradients.into_iter().map(|(g, tokens)| (g, (tokens as f64 / total as f64) as f32));
            let (mut mean, share) = shares.next().unwrap();
            mean.scale(share);
            shares.for_each(|(gradients, share)| mean.add_scaled(&gradients, share));
            body_optimizer.step(&mut body, &mean, rate);
        }
        let total: u64 = sides.iter().map(|side| side.tokens).sum();
        let mut sum = vec![0.0f64; global.filtered(is_end).parameters()];
        for side in &sides {
            for (sum, value) in sum.iter_mut().zip(side.ends.flat()) {
                *sum += side.tokens as f64 * f64::from(value);
            }
        }
        let mean: Vec<f32> = sum.into_iter().map(|sum| (sum / total as f64) as f32).collect();
        let ends = global.filtered(is_end).with_flat(&mean).unwrap();
        global = Adapter::join([ends, body.clone()]).unwrap();
    }
    (sides.into_iter().map(|side| side.losses).collect(), global)
}

/// One step's gradient of the unsplit model.
fn whole_step(
    stage: &Stage,
    adapter: &Adapter,
    data: &mut Dataset,
    seed: Seed,
    name: &str,
    step: u64,
) -> (Gradients, f64, u64) {
    let micro_batches = data.batches.next().unwrap();
    let tokens: usize = micro_batches.iter().map(|batch| batch.trained_tokens as usize).sum();
    let lora = stage.attach(adapter).unwrap();
    let mut sum: Option<Gradients> = None;
    let mut nats = 0.0;
    for (micro, batch) in micro_batches.iter().enumerate() {
        let dropout = Dropout { seed: seed.bytes(&format!("dropout/{name}/{step}/{micro}")) };
        let segments = Segments::new(batch.segments.iter().map(|&length| length as usize).collect()).unwrap();
        let input = Input::Tokens(&batch.tokens);
        let (loss, backward) =
            stage.loss_backward(input, &segments, &batch.targets, tokens, &lora, &dropout, false).unwrap();
        nats += loss.nats;
        match &mut sum {
            Some(sum) => sum.add(&backward.adapter),
            none => *none = Some(backward.adapter),
        }
    }
    (sum.unwrap(), nats, tokens as u64)
}

/// Where the order of joining changes nothing, neither does which thread was faster.
#[tokio::test(flavor = "multi_thread")]
async fn the_order_of_joining_changes_nothing() {
    let adapters = Arc::new(Mutex::new(Vec::new()));
    for names in [["press-1", "mill-1"], ["mill-1", "press-1"]] {
        let world = World::new(str::to_owned);
        run_to_the_end(&world, &names).await;
        adapters.lock().unwrap().push(world.adapter(2));
    }
    let adapters = adapters.lock().unwrap();
    assert_eq!(adapters[0], adapters[1]);
}

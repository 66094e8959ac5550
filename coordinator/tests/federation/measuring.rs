//! Importance matrices that a run collects: they are what `participant calibrate` gives, and no split changes them.

use std::path::{Path, PathBuf};

use clap::Parser;
use coordinator::export::{Checks, Format, Options, export};
use experiment::{Row, RunDirectory};
use model::{ChannelSums, Walk};
use participant::calibrate::CalibrateArguments;
use participant::dataset::Dataset;
use quant::{Imatrix, Mix};

use crate::identities::{Site, within_a_minute};
use crate::world::{World, alone, run_to_the_end};

const NAME: &str = "press-1";

/// All records are trained on, and all of them measured.
fn measuring(text: &str) -> String {
    text.replace("held_out = 0.2", "held_out = 0.0")
        .replace("evaluate_every = 1", "evaluate_every = 0\nimatrix_tokens = 1000000")
}

fn in_mode(mode: &str, ends: u32) -> impl Fn(&str) -> String {
    let (mode, ends) = (mode.to_owned(), ends.to_string());
    move |text| {
        measuring(&alone(text))
            .replace("mode = \"u\"", &format!("mode = \"{mode}\""))
            .replace("head_blocks = 1", &format!("head_blocks = {ends}"))
            .replace("tail_blocks = 1", &format!("tail_blocks = {ends}"))
    }
}

fn run_of(world: &World) -> PathBuf {
    world.path("runs").join(&world.experiment.name)
}

/// What the run has kept of a device, read as any reader would.
fn collected(world: &World, name: &str) -> Imatrix {
    Imatrix::open(&RunDirectory::open(&run_of(world)).unwrap().imatrix_path(name)).unwrap()
}

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    calibrate: CalibrateArguments,
}

/// What `participant calibrate` gives on the model that the run has made.
fn calibrated(world: &World, name: &str) -> Imatrix {
    let options = Options { check: Checks::Skip, ..Options::default() };
    let [merged] = export(&run_of(world), None, &[Format::Gguf(Mix::F32)], &options, &world.path("exports"))
        .unwrap()
        .try_into()
        .unwrap();
    let (data, out) = (world.path(&format!("{name}.jsonl")), world.path("calibrated.gguf"));
    let path = |path: &Path| path.display().to_string();
    let flags = ["--model", &path(&merged.path), "--data", &path(&data), "--out", &path(&out)].map(str::to_owned);
    let rest = ["--sequence-tokens-max", "128", "--tokens-max", "1000000"].map(str::to_owned);
    let line = ["calibrate".to_owned()].into_iter().chain(flags).chain(rest);
    Line::try_parse_from(line).unwrap().calibrate.run().unwrap();
    Imatrix::open(&out).unwrap()
}

fn check_alike(found: &Imatrix, expected: &Imatrix) {
    let names = |imatrix: &Imatrix| imatrix.matrices().map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
    assert_eq!(names(found), names(expected));
    for name in names(found) {
        let [found, expected] = [found, expected].map(|imatrix| imatrix.columns(&name).unwrap());
        let mean = expected.iter().sum::<f32>() / expected.len() as f32;
        for (column, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let error = (found - expected).abs();
            assert!(error <= 1e-4 * (expected + mean), "{name}, column {column}: {found}, {expected}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sums_of_a_split_run_are_those_of_calibrate_on_its_merged_model() {
    for (mode, ends) in [("u", 1), ("forward_only", 1)] {
        let world = World::new(in_mode(mode, ends));
        run_to_the_end(&world, &[NAME]).await;
        check_alike(&collected(&world, NAME), &calibrated(&world, NAME));
    }
}

/// Of the whole model in one piece, with the adapter beside it.
fn walked(world: &World) -> ChannelSums {
    let columns = world.experiment.data.columns.clone();
    let records = participant::data::read_records(&world.path(&format!("{NAME}.jsonl")), &columns).unwrap();
    let data = Dataset::new(records, &world.experiment, NAME, world.source.tokenizer()).unwrap();
    let mut sequences = Vec::new();
    for batch in data.batches.sample(world.experiment.federation.imatrix_tokens) {
        let mut rest = &batch.tokens[..];
        for segment in batch.segments {
            let (sequence, behind) = rest.split_at(segment as usize);
            sequences.push(sequence.to_vec());
            rest = behind;
        }
    }
    let blocks = world.source.config().blocks;
    let mut sums = ChannelSums::new(world.source.config(), 0..blocks);
    let mut walk = Walk::with_adapter(&*world.source, world.adapter(2), &sequences).unwrap();
    for block in 0..blocks {
        walk.step(|inputs| sums.add(block, &inputs)).unwrap();
    }
    sums
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_split_nor_the_wire_changes_a_bit_of_the_sums() {
    let mut found = Vec::new();
    for (mode, ends) in [("whole", 0), ("u", 1)] {
        // Less than there is, so that a sample is drawn.
        let world = World::new(|text| in_mode(mode, ends)(text).replace("= 1000000", "= 1000"));
        run_to_the_end(&world, &[NAME]).await;
        let imatrix = collected(&world, NAME);
        let sums = walked(&world);
        assert!(sums.tokens().is_some_and(|tokens| tokens <= 1000));
        assert!(sums.imatrix(imatrix.datasets[0].clone()).unwrap() == imatrix, "{mode}");
        found.push(imatrix);
    }
    assert!(found[0] == found[1]);
}

/// Another backend does not show what it multiplies.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_cannot_measure_says_so() {
    let world = World::new(in_mode("u", 1));
    let coordinator = world.coordinator();
    let (mut participant, _) = world.participant(NAME);
    participant.device.backend = Some(experiment::Backend::Flex);
    let joined = coordinator.join(participant).await;
    assert!(!coordinator.end().await.unwrap().stopped);
    assert_eq!(joined.await.unwrap().1.unwrap(), "completed");
    assert_eq!(std::fs::read_dir(run_of(&world).join("imatrix")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_devices_over_quic_leave_what_an_export_takes() {
    within_a_minute(async {
        let site = Site::new(measuring);
        let mut running = site.start().await;
        let joined = [NAME, "mill-1"].map(|name| site.join(&site.invite(name), name, site.world.participant(name).0));
        running.until_noted("importance matrices of 2 of 2 devices are in").await;
        for name in ["mill-1", NAME] {
            let sent = |row: &Row| match row {
                Row::Bytes { participant, received, .. } if participant == name => {
                    received.get("channel_sums").is_some_and(|bytes| *bytes > 2 * 4 * (3 * 64 + 176))
                }
                _ => false,
            };
            running.until_wrote(sent).await;
        }
        for joined in joined {
            assert_eq!(joined.await.unwrap().unwrap(), "completed");
        }
        running.end().await.unwrap();
        let world = &site.world;
        let options = |imatrix| Options { imatrix, check: Checks::Skip, force: true, ..Options::default() };
        let written = |imatrix: Vec<PathBuf>| {
            let formats = [Format::Gguf(Mix::Q4_0)];
            let exported = export(&run_of(world), None, &formats, &options(imatrix), &world.path("exports")).unwrap();
            std::fs::read(&exported[0].path).unwrap()
        };
        let sum = world.path("sum.gguf");
        let mut both = collected(world, "mill-1");
        both.merge(&collected(world, NAME)).unwrap();
        both.write(&sum).unwrap();
        let federated = written(vec!["federated".into()]);
        assert!(federated == written(vec![sum]));
        assert!(federated != written(Vec::new()));
    })
    .await;
}

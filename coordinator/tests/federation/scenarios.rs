//! Runs in which something happens: departures, restarts, other modes and strategies.

use std::collections::BTreeSet;
use std::sync::Arc;

use experiment::{Row, RunDirectory};
use model::Adapter;
use net::NetError;
use participant::ParticipantError;
use tokio::task::JoinHandle;
use wire::CloseCode;

use crate::world::{Coordinator, Holding, Joined, World, loss_bits, run_to_the_end};

const TWO: [&str; 2] = ["mill-1", "press-1"];

fn with_quorum(quorum: u32) -> impl Fn(&str) -> String {
    move |text| text.replace("quorum = 2", &format!("quorum = {quorum}")).replace("rounds = 2", "rounds = 3")
}

/// Long enough that whatever a test does to it after a few steps still finds it running.
fn long(text: &str) -> String {
    text.replace("rounds = 2", "rounds = 8")
}

fn is_step(row: &Row, of: &str, wanted: u64) -> bool {
    matches!(row, Row::Step { participant, step, .. } if participant == of && *step == wanted)
}

async fn join_both(coordinator: &Coordinator, world: &World) -> Vec<JoinHandle<Joined>> {
    let mut joined = Vec::new();
    for name in TWO {
        joined.push(coordinator.join(world.participant(name).0).await);
    }
    joined
}

/// Mean held-out loss after a round.
fn held_out(rows: &[Row], wanted: u32) -> f64 {
    let losses: Vec<f64> = rows
        .iter()
        .filter_map(|row| match row {
            Row::Evaluation { round, loss_nats, .. } if *round == wanted => Some(*loss_nats),
            _ => None,
        })
        .collect();
    assert!(!losses.is_empty(), "nobody evaluated round {wanted}");
    losses.iter().sum::<f64>() / losses.len() as f64
}

#[tokio::test(flavor = "multi_thread")]
async fn the_round_goes_on_at_quorum_without_a_participant_that_departs() {
    let world = World::new(with_quorum(1));
    let mut coordinator = world.coordinator();
    let (press, _) = world.participant("press-1");
    let (mill, _) = world.participant("mill-1");
    let (press, mill) = (coordinator.join(press).await, coordinator.join(mill).await);
    coordinator.until(|row| is_step(row, "mill-1", 1)).await;
    mill.abort();
    let rows = coordinator.rows.clone();
    assert_eq!(coordinator.end().await.unwrap().rounds, 3);
    assert_eq!(press.await.unwrap().1.unwrap(), "completed");
    let rows = rows.lock().unwrap();
    assert!(rows.iter().any(|row| matches!(row, Row::Departure { participant, .. } if participant == "mill-1")));
    let members = |wanted| {
        rows.iter().find_map(|row| match row {
            Row::Round { round, members, .. } if *round == wanted => Some(members.clone()),
            _ => None,
        })
    };
    assert_eq!(members(1).unwrap(), ["press-1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_was_stopped_goes_on_as_if_it_never_had_been() {
    for adapters in ["shared", "per_participant"] {
        let change = |text: &str| format!("{}\n[body]\nadapters = \"{adapters}\"\n", long(text));
        let calm = World::new(change);
        let calm_steps = run_to_the_end(&calm, &TWO).await;

        let world = World::new(change);
        let mut coordinator = world.coordinator();
        let joined = join_both(&coordinator, &world).await;
        coordinator.until(|row| is_step(row, "press-1", 7)).await;
        let stopped = coordinator.stop().await.unwrap();
        assert!(stopped.stopped && (1..8).contains(&stopped.rounds), "{stopped:?}");

        // The devices keep their state and join again.
        let coordinator = world.coordinator();
        let mut again = Vec::new();
        for joined in joined {
            let (mut participant, _) = joined.await.unwrap();
            let seen = std::sync::Arc::new(crate::world::Seen::default());
            participant.reporter = seen.clone();
            again.push((participant.name.clone(), seen, coordinator.join(participant).await));
        }
        assert_eq!(coordinator.end().await.unwrap().rounds, 8);
        for (name, seen, joined) in again {
            assert_eq!(joined.await.unwrap().1.unwrap(), "completed");
            let seen = seen.steps.lock().unwrap().clone();
            // Within the round that was open, and at most one step is done again.
            let calm = &calm_steps[&name];
            assert!((1..=calm.len() - stopped.rounds as usize * 5).contains(&seen.len()), "{name}, {adapters}");
            assert_eq!(loss_bits(&seen), loss_bits(&calm[calm.len() - seen.len()..]), "{name}, {adapters}");
        }
        assert_eq!(world.adapter(8), calm.adapter(8), "{adapters}");
    }
}

/// The rows of finished rounds on the disk, in brief: a number that is read may be the neighbour of what was written.
fn recorded_rounds(run: &RunDirectory) -> Vec<String> {
    let mut recorded = Vec::new();
    for row in run.rows().unwrap() {
        if let Row::Round { round, members, loss_nats, tokens, .. } = row.unwrap() {
            recorded.push(format!("round {round} of {members:?}: {loss_nats:.6} over {tokens} tokens"));
        }
    }
    recorded
}

/// As after a kill between the end of a round and its row; a power loss may take the rows before it, too.
fn lose_rounds(run: &RunDirectory) {
    let metrics = std::fs::read_to_string(run.metrics_path()).unwrap();
    let kept: String = metrics.split_inclusive('\n').filter(|line| !line.contains("\"row\":\"round\"")).collect();
    std::fs::write(run.metrics_path(), kept).unwrap();
    assert!(recorded_rounds(run).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_finished_rounds_that_were_lost_are_recorded_again() {
    let world = World::new(long);
    let mut coordinator = world.coordinator();
    let joined = join_both(&coordinator, &world).await;
    // The second step of the third round.
    coordinator.until(|row| is_step(row, "press-1", 11)).await;
    let stopped = coordinator.stop().await.unwrap();
    for joined in joined {
        drop(joined.await.unwrap());
    }
    let run = RunDirectory::open(&stopped.directory).unwrap();
    let recorded = recorded_rounds(&run);
    assert!((2..8).contains(&recorded.len()) && recorded.len() == stopped.rounds as usize, "{recorded:?}");

    lose_rounds(&run);
    // Once is enough.
    for _ in 0..2 {
        world.coordinator().stop().await.unwrap();
        assert_eq!(recorded_rounds(&run), recorded);
    }

    // A damaged row is not believed, and holds nobody up.
    let row = run.round_path(1).join("row.json");
    std::fs::write(&row, "{}").unwrap();
    lose_rounds(&run);
    world.coordinator().stop().await.unwrap();
    assert_eq!(recorded_rounds(&run), recorded[1..]);

    // As an earlier version left its rounds.
    std::fs::remove_file(&row).unwrap();
    lose_rounds(&run);
    world.coordinator().stop().await.unwrap();
    assert_eq!(recorded_rounds(&run), recorded[1..]);
}

/// What the rows on the disk say of rounds, steps and accepted updates: each of them once, or it is named.
fn recorded_twice(run: &RunDirectory) -> Vec<String> {
    let (mut known, mut twice) = (BTreeSet::new(), Vec::new());
    for row in run.rows().unwrap() {
        let what = match row.unwrap() {
            Row::Round { round, .. } => format!("round {round}"),
            Row::Step { round, attempt, step, participant, .. } => {
                format!("step {step} of round {round}, attempt {attempt}, of {participant}")
            }
            Row::Update { round, attempt, participant, accepted: true, .. } => {
                format!("the update of {participant} for round {round}, attempt {attempt}")
            }
            _ => continue,
        };
        if !known.insert(what.clone()) {
            twice.push(what);
        }
    }
    twice
}

fn duration_ms(run: &RunDirectory, wanted: u32) -> f64 {
    let row = std::fs::read(run.round_path(wanted).join("row.json")).unwrap();
    match serde_json::from_slice::<Row>(&row).unwrap() {
        Row::Round { round, duration_ms, .. } if round == wanted => duration_ms,
        row => panic!("{row:?} is not that of round {wanted}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_round_that_is_made_again_is_on_record_once() {
    let calm = World::new(long);
    run_to_the_end(&calm, &TWO).await;
    for journal_is_lost in [false, true] {
        let world = World::new(long);
        let mut coordinator = world.coordinator();
        let joined = join_both(&coordinator, &world).await;
        // The second step of the third round.
        coordinator.until(|row| is_step(row, "press-1", 11)).await;
        let stopped = coordinator.stop().await.unwrap();
        let mut devices = Vec::new();
        for joined in joined {
            devices.push(joined.await.unwrap().0);
        }
        let run = RunDirectory::open(&stopped.directory).unwrap();
        let newest = stopped.rounds;
        assert!((2..8).contains(&newest), "{stopped:?}");
        let before_ms = duration_ms(&run, newest);
        std::fs::write(run.round_path(newest).join("state.safetensors"), "damaged").unwrap();
        if journal_is_lost {
            std::fs::remove_dir_all(run.path().join("journal")).unwrap();
        }

        let coordinator = world.coordinator();
        let mut again = Vec::new();
        for device in devices {
            again.push(coordinator.join(device).await);
        }
        assert_eq!(coordinator.end().await.unwrap().rounds, 8);
        for joined in again {
            assert_eq!(joined.await.unwrap().1.unwrap(), "completed");
        }
        assert!(run.round_path(newest).with_extension("damaged").exists());
        assert_eq!(recorded_twice(&run), Vec::<String>::new(), "{journal_is_lost}");
        assert_eq!(recorded_rounds(&run).len(), 8, "{journal_is_lost}");
        assert!((duration_ms(&run, newest) - before_ms).abs() < 1e-6, "{journal_is_lost}");
        assert_eq!(world.adapter(8), calm.adapter(8), "{journal_is_lost}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abandoned_round_is_trained_again_to_the_same_end() {
    let calm = World::new(long);
    run_to_the_end(&calm, &TWO).await;

    let world = World::new(long);
    let mut coordinator = world.coordinator();
    let press = coordinator.join(world.participant("press-1").0).await;
    let (mut mill, _) = world.participant("mill-1");
    let connection = coordinator.connect("mill-1").await;
    let cut = connection.clone();
    let first = tokio::spawn(async move {
        let ended = mill.run(&connection).await;
        (mill, ended)
    });
    coordinator.until(|row| is_step(row, "mill-1", 6)).await;
    cut.close(wire::CloseCode::GoingAway, "the cable is pulled");
    let (mill, ended) = first.await.unwrap();
    assert!(ended.is_err());
    coordinator.until(|row| matches!(row, Row::Departure { .. })).await;
    let mill = coordinator.join(mill).await;
    assert_eq!(coordinator.end().await.unwrap().rounds, 8);
    for joined in [press, mill] {
        assert_eq!(joined.await.unwrap().1.unwrap(), "completed");
    }
    assert_eq!(world.adapter(8), calm.adapter(8));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_device_that_connects_again_within_a_step_takes_its_place_back() {
    let calm = World::new(str::to_owned);
    run_to_the_end(&calm, &TWO).await;

    let world = World::new(str::to_owned);
    let mut coordinator = world.coordinator();
    let press = coordinator.join(world.participant("press-1").0).await;
    let (mut lost, _) = world.participant("mill-1");
    let (holding, mut reached, release) = Holding::at(1);
    lost.reporter = Arc::new(holding);
    let lost = coordinator.join(lost).await;
    reached.recv().await.unwrap();
    // The coordinator has no other sign that the first connection is of no use any more.
    let mill = coordinator.join(world.participant("mill-1").0).await;
    coordinator.until(|row| matches!(row, Row::Departure { participant, .. } if participant == "mill-1")).await;
    drop((reached, release));
    let superseded = lost.await.unwrap().1.unwrap_err();
    assert!(
        matches!(superseded, ParticipantError::Net(NetError::Closed { code: Some(CloseCode::Superseded), .. })),
        "{superseded}"
    );
    assert_eq!(coordinator.end().await.unwrap().rounds, 2);
    for joined in [press, mill] {
        assert_eq!(joined.await.unwrap().1.unwrap(), "completed");
    }
    // The round was trained again from its beginning, by both.
    assert_eq!(world.adapter(2), calm.adapter(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_mode_learns() {
    type Change = fn(&str) -> String;
    let modes: [(&str, Change); 3] = [
        ("u", |text| text.to_owned()),
        ("forward_only", |text| text.replace("mode = \"u\"", "mode = \"forward_only\"")),
        ("whole", |text| text.replace("mode = \"u\"", "mode = \"whole\"").replace("_blocks = 1", "_blocks = 0")),
    ];
    for (mode, change) in modes {
        let world = World::new(change);
        let coordinator = world.coordinator();
        let rows = coordinator.rows.clone();
        let joined = join_both(&coordinator, &world).await;
        coordinator.end().await.unwrap();
        for joined in joined {
            joined.await.unwrap().1.unwrap();
        }
        let rows = rows.lock().unwrap();
        assert!(held_out(&rows, 2) < held_out(&rows, 0), "{mode}");
        check_crossed(mode, &rows);
    }
}

/// Which kinds of message a mode needs, and which it promises never to send.
fn check_crossed(mode: &str, rows: &[Row]) {
    let crossed = |kind: &str| {
        rows.iter().any(|row| match row {
            Row::Bytes { sent, received, .. } => sent.contains_key(kind) || received.contains_key(kind),
            _ => false,
        })
    };
    assert_eq!(crossed("activations"), mode != "whole", "{mode}");
    assert_eq!(crossed("cut_gradient"), mode == "u", "{mode}");
    assert!(crossed("update"), "{mode}");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_forward_only_mode_head_and_body_stay() {
    let world = World::new(|text| text.replace("mode = \"u\"", "mode = \"forward_only\""));
    run_to_the_end(&world, &TWO).await;
    let (first, last): (Adapter, Adapter) = (world.adapter(1), world.adapter(2));
    assert_eq!(first.part(0..3), last.part(0..3));
    assert_ne!(first.part(3..4), last.part(3..4));
    assert!(last.part(0..3).pairs().all(|[_, b]| b.values.iter().all(|&value| value == 0.0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_strategy_and_wire_type_finishes_a_run() {
    let strategies = [
        "{ name = \"fedprox\", mu = 0.1 }",
        "{ name = \"fedavgm\", learning_rate = 1.0, momentum = 0.5 }",
        "{ name = \"fedadam\", learning_rate = 0.01, beta1 = 0.9, beta2 = 0.99, tau = 0.001 }",
        "{ name = \"fedyogi\", learning_rate = 0.01, beta1 = 0.9, beta2 = 0.99, tau = 0.001 }",
        "{ name = \"trimmed_mean\", trim = 0 }",
        "{ name = \"median\" }",
    ];
    for (i, strategy) in strategies.into_iter().enumerate() {
        let dtype = ["f16", "bf16"][i % 2];
        let world = World::new(|text| {
            let text = text.replace("{ name = \"fedavg\" }", strategy);
            format!("{text}\n[wire]\ndtype = \"{dtype}\"\n")
        });
        let steps = run_to_the_end(&world, &TWO).await;
        assert!(steps.values().flatten().all(|report| report.loss_nats.is_finite()), "{strategy}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_factor_stays_and_its_mean_is_exact() {
    let world = World::new(|text| text.replace("rank = 4", "rank = 4\nfactors = \"freeze_a\""));
    let coordinator = world.coordinator();
    let rows = coordinator.rows.clone();
    let joined = join_both(&coordinator, &world).await;
    coordinator.end().await.unwrap();
    for joined in joined {
        joined.await.unwrap().1.unwrap();
    }
    for row in rows.lock().unwrap().iter() {
        if let Row::Round { aggregation_error: Some(error), .. } = row {
            assert!(*error < 1e-6, "{error}");
        }
    }
    let (first, last) = (world.adapter(1), world.adapter(2));
    assert!(first.pairs().zip(last.pairs()).all(|([a, _], [b, _])| a == b));
}

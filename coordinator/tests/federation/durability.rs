//! Runs whose coordinator or devices are stopped by their disks, at every operation in turn, and go on: the final adapter is
//! that of a run to which nothing happened. Kills of real processes are in `processes` and in `scripts/check/faults.sh`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use coordinator::journal::Settings;
use model::Adapter;
use participant::session::Keep;
use storage::{Disk, Fault, Operation};
use tokio::task::JoinSet;

use crate::world::{World, run_to_the_end};

const TWO: [&str; 2] = ["mill-1", "press-1"];
const EIO: i32 = 5;
const ENOSPC: i32 = 28;
/// Small enough that a round's journal begins a new segment every few commits.
const SNAPSHOT_BYTES: usize = 40_000;

/// Fails at its operation `at` on a journal or a snapshot, once. Counts operations in `count`.
fn failing_disk(at: usize, errno: i32, torn: bool, count: Arc<AtomicUsize>) -> Disk {
    let counts = |path: &Path| ["journal", "state"].iter().any(|of| path.to_string_lossy().contains(of));
    Disk::with_faults(Arc::new(move |operation, path| match counts(path) && count.fetch_add(1, SeqCst) == at {
        true if torn && operation == Operation::Write => Fault::Tears { written: 11, errno },
        true => Fault::Fails { errno },
        false => Fault::None,
    }))
}

/// Starts coordinator and devices again, whoever is stopped, until the run is over. Devices are new processes every time:
/// what they know, they know from their disks. Returns how often somebody was stopped.
async fn run_over(world: &World, settings: &Settings, keep: impl Fn(&str) -> Keep) -> usize {
    for stops in 0..20 {
        let coordinator = world.coordinator_with(settings.clone());
        let mut devices = JoinSet::new();
        for name in TWO {
            let (mut participant, _) = world.participant(name);
            participant.keep = Some(keep(name));
            let joined = coordinator.join(participant).await;
            devices.spawn(async move { usize::from(joined.await.unwrap().1.is_err()) });
        }
        let mut stopped = 0;
        while stopped == 0
            && let Some(device) = devices.join_next().await
        {
            stopped += device.unwrap();
        }
        // A device that its own disk has stopped leaves the others waiting for it.
        let ended = if stopped > 0 { coordinator.stop().await } else { coordinator.end().await };
        while devices.join_next().await.is_some() {}
        if let (Ok(_), 0) = (ended, stopped) {
            return stops;
        }
    }
    panic!("it never ends");
}

fn kept(world: &World, name: &str, disk: Disk) -> Keep {
    Keep { directory: world.path(&format!("{name}-state")), disk }
}

async fn calm(change: fn(&str) -> String) -> Adapter {
    let world = World::new(change);
    run_to_the_end(&world, &TWO).await;
    world.adapter(world.experiment.federation.rounds)
}

fn shared(text: &str) -> String {
    text.to_owned()
}

fn per_participant(text: &str) -> String {
    format!("{text}\n[body]\nadapters = \"per_participant\"\n")
}

fn forward_only(text: &str) -> String {
    text.replace("mode = \"u\"", "mode = \"forward_only\"")
}

fn whole(text: &str) -> String {
    text.replace("mode = \"u\"", "mode = \"whole\"").replace("_blocks = 1", "_blocks = 0")
}

/// Every third operation of the coordinator's journal fails in one way or another.
async fn check_coordinator(change: fn(&str) -> String, stride: usize) {
    let expected = calm(change).await;
    let (mut stops, mut at) = (0, 0);
    loop {
        let world = World::new(change);
        let (errno, torn) = [(EIO, false), (ENOSPC, true)][at % 2];
        let count = Arc::new(AtomicUsize::new(0));
        let disk = failing_disk(at, errno, torn, count.clone());
        let settings = Settings { disk, snapshot_bytes: SNAPSHOT_BYTES, ..Settings::default() };
        stops += run_over(&world, &settings, |name| kept(&world, name, Disk::default())).await;
        assert_eq!(world.adapter(2), expected, "operation {at}");
        if count.load(SeqCst) <= at {
            break;
        }
        at += stride;
    }
    assert!(stops > 0 && at > 10, "{stops} stops in {at} operations");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_coordinator_stopped_by_its_disk_goes_on_with_a_shared_body() {
    check_coordinator(shared, 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_coordinator_stopped_by_its_disk_goes_on_with_a_body_for_everybody() {
    check_coordinator(per_participant, 5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_coordinator_stopped_by_its_disk_goes_on_in_forward_only_mode() {
    check_coordinator(forward_only, 7).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_coordinator_stopped_by_its_disk_goes_on_in_whole_mode() {
    check_coordinator(whole, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_device_whose_disk_is_full_for_a_while_waits_for_it() {
    let expected = calm(shared).await;
    let world = World::new(shared);
    let count = Arc::new(AtomicUsize::new(0));
    // A write, the second operation of a snapshot: a failed fsync would end the device.
    let disk = failing_disk(11, ENOSPC, true, count.clone());
    let keep = |name: &str| kept(&world, name, if name == TWO[0] { disk.clone() } else { Disk::default() });
    run_over(&world, &Settings::default(), keep).await;
    assert!(count.load(SeqCst) > 11);
    assert_eq!(world.adapter(2), expected);
}

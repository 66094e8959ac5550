//! Simulated runs: the coordinator's and the devices' own code on one thread, under a clock that jumps to whatever is due
//! next, with faults drawn from a seed.
//!
//!     cargo run --release -p coordinator --example simulate -- --seeds 1000
//!
//! A seed decides an experiment, the network's delays, and what goes wrong: kills of the coordinator and of devices at any
//! operation of a disk, any piece of bytes, any finished step; power that goes with them, so that files lose what was not
//! synced; full and failing disks, cut connections, partitions, clocks that jump, a device that lies. Whatever it is, the
//! run must finish, with the calm run's adapter to the last bit. `--seed N` runs one seed again and prints what happens.

use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use clap::Parser;

use plan::Plan;
use run::{Ended, simulate};
use site::{Calm, Site, VARIANTS};

mod device;
mod liar;
mod machine;
mod network;
mod plan;
mod run;
mod site;
mod trace;

thread_local! {
    /// What a panic of this thread's present run has said.
    pub static PANIC: Cell<Option<String>> = const { Cell::new(None) };
}

/// Runs whole federations in simulated time, with faults drawn from seeds.
#[derive(Parser)]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Runs this one alone, twice, and prints its trace.
    #[arg(long)]
    seed: Option<u64>,
    /// Kills at every named point, with so many seeds of each of the coordinator's, and four fifths of each device's.
    #[arg(long, value_name = "SEEDS")]
    points: Option<u64>,
    /// Runs at a time; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    jobs: usize,
}

fn main() {
    let arguments = Arguments::parse();
    std::panic::set_hook(Box::new(|panic| PANIC.set(Some(panic.to_string()))));
    let site = Site::new();
    let calm = site.calm();
    let is_clean = match (arguments.seed, arguments.points) {
        (Some(seed), _) => replay(&site, &calm, seed),
        (None, Some(seeds)) => check_points(&site, &calm, seeds, arguments.jobs),
        (None, None) => {
            let plan = |seed| Plan::of_seed(arguments.from + seed, &calm);
            check("seeds", &site, &calm, arguments.seeds, arguments.jobs, plan)
        }
    };
    std::process::exit(if is_clean { 0 } else { 1 });
}

fn replay(site: &Site, calm: &[Calm], seed: u64) -> bool {
    let plan = Plan::of_seed(seed, calm);
    println!("{}: {plan:?}", VARIANTS[plan.variant].name);
    let again = simulate(site, &plan, Some(&calm[plan.variant]), false);
    let ended = simulate(site, &plan, Some(&calm[plan.variant]), true);
    println!("trace {:016x}, and {:016x} when it was run before", ended.trace, again.trace);
    ended.violations.is_empty() && ended.trace == again.trace
}

/// One kill at each named point. Where several experiments pass it, they take turns.
fn check_points(site: &Site, calm: &[Calm], seeds: u64, jobs: usize) -> bool {
    let mut is_clean = true;
    for (whose, machine, seeds) in [("coordinator", 0, seeds), ("device", 1, seeds * 4 / 5)] {
        let mut points: Vec<(String, Vec<(usize, u64)>)> = Vec::new();
        for (variant, calm) in calm.iter().enumerate() {
            for (name, passages) in &calm.points[machine] {
                match points.iter_mut().find(|(known, _)| known == name) {
                    Some((_, of)) => of.push((variant, *passages)),
                    None => points.push((name.clone(), vec![(variant, *passages)])),
                }
            }
        }
        let names: Vec<&str> = points.iter().map(|(name, _)| name.as_str()).collect();
        println!("{} points of a {whose}: {}", points.len(), names.join(", "));
        let plan = |number: u64| {
            let (name, of) = &points[(number / seeds) as usize];
            let seed = number % seeds;
            let (variant, passages) = of[seed as usize % of.len()];
            Plan::kill(variant, seed, machine, name, passages)
        };
        let what = format!("kills of a {whose}");
        is_clean &= check(&what, site, calm, points.len() as u64 * seeds, jobs, plan);
    }
    is_clean
}

/// Runs plans 0 to `count`, and says which of them have failed.
fn check(
    what: &str,
    site: &Site,
    calm: &[Calm],
    count: u64,
    jobs: usize,
    plan: impl Fn(u64) -> Plan + Sync,
) -> bool {
    let jobs = if jobs == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { jobs };
    let (next, failed, begun) = (AtomicU64::new(0), AtomicUsize::new(0), Instant::now());
    let virtual_s = Mutex::new(0.0);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Relaxed);
                    if number >= count {
                        return;
                    }
                    let plan = plan(number);
                    let Ended { violations, virtual_time, .. } =
                        simulate(site, &plan, Some(&calm[plan.variant]), false);
                    *virtual_s.lock().expect("nobody panics with it") += virtual_time.as_secs_f64();
                    if !violations.is_empty() && failed.fetch_add(1, Relaxed) < 20 {
                        println!("seed {} ({}): {}", plan.seed, VARIANTS[plan.variant].name, violations.join("; "));
                        println!("   {plan:?}");
                    }
                }
            });
        }
    });
    let (seconds, failed) = (begun.elapsed().as_secs_f64(), failed.into_inner());
    let hours = virtual_s.into_inner().expect("nobody panics with it") / 3600.0;
    println!(
        "{what}: {count} runs, {failed} failed, {:.1} a second, {hours:.1} simulated hours in {seconds:.1} s",
        count as f64 / seconds
    );
    failed == 0
}

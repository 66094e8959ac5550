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
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use clap::Parser;
use planted::Bug;

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

/// Failures that are printed at most.
const PRINTED_MAX: usize = 20;

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
    /// Of the trace, its hash alone.
    #[arg(long, requires = "seed")]
    hash: bool,
    /// Kills at every named point, with so many seeds of each of the coordinator's, and four fifths of each device's.
    #[arg(long, value_name = "SEEDS")]
    points: Option<u64>,
    /// Plants one bug after the other, and looks for the first of --seeds that shows it. Needs `--features planted-bugs`.
    #[arg(long)]
    bugs: bool,
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
        _ if arguments.bugs => find_bugs(&site, &calm, arguments.seeds, arguments.jobs),
        (Some(seed), _) => replay(&site, &calm, seed, !arguments.hash),
        (None, Some(seeds)) => check_points(&site, &calm, seeds, arguments.jobs),
        (None, None) => {
            let plan = |seed| Plan::of_seed(arguments.from + seed, &calm);
            report("seeds", &check(&site, &calm, arguments.seeds, arguments.jobs, plan))
        }
    };
    std::process::exit(if is_clean { 0 } else { 1 });
}

fn replay(site: &Site, calm: &[Calm], seed: u64, shown: bool) -> bool {
    let plan = Plan::of_seed(seed, calm);
    println!("{}: {plan:?}", VARIANTS[plan.variant].name);
    let again = simulate(site, &plan, Some(&calm[plan.variant]), false);
    let ended = simulate(site, &plan, Some(&calm[plan.variant]), shown);
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
        is_clean &= report(&what, &check(site, calm, points.len() as u64 * seeds, jobs, plan));
    }
    is_clean
}

/// Plants each bug, and looks for a seed that shows it.
fn find_bugs(site: &Site, calm: &[Calm], seeds: u64, jobs: usize) -> bool {
    let mut found = 0;
    for bug in Bug::ALL {
        if !planted::choose(Some(bug)) {
            eprintln!("no bug can be planted: build with --features planted-bugs");
            return false;
        }
        let checked = check_until(site, calm, seeds, jobs, |seed| Plan::of_seed(seed, calm), 1);
        found += usize::from(checked.failed > 0);
        match checked.first {
            Some(first) => println!("{bug:?}: found by {first}"),
            None => println!("{bug:?}: NOT FOUND in {seeds} seeds"),
        }
    }
    planted::choose(None);
    println!("bugs: {found} of {} found within {seeds} seeds each", Bug::ALL.len());
    found == Bug::ALL.len()
}

/// What became of many runs.
struct Checked {
    runs: u64,
    failed: usize,
    /// The first that failed, as far as its thread knew.
    first: Option<String>,
    seconds: f64,
    virtual_s: f64,
}

fn report(what: &str, checked: &Checked) -> bool {
    let Checked { runs, failed, seconds, virtual_s, .. } = checked;
    let (rate, hours) = (*runs as f64 / seconds, virtual_s / 3600.0);
    println!("{what}: {runs} runs, {failed} failed, {rate:.1} a second, {hours:.1} simulated hours in {seconds:.1} s");
    *failed == 0
}

/// Runs plans 0 to `count`, and prints those that have failed.
fn check(site: &Site, calm: &[Calm], count: u64, jobs: usize, plan: impl Fn(u64) -> Plan + Sync) -> Checked {
    check_until(site, calm, count, jobs, plan, usize::MAX)
}

/// The same until so many have failed; one that is looked for is not printed.
fn check_until(
    site: &Site,
    calm: &[Calm],
    count: u64,
    jobs: usize,
    plan: impl Fn(u64) -> Plan + Sync,
    enough: usize,
) -> Checked {
    let jobs = if jobs == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { jobs };
    let (next, begun) = (AtomicU64::new(0), Instant::now());
    let checked = Mutex::new(Checked { runs: 0, failed: 0, first: None, seconds: 0.0, virtual_s: 0.0 });
    let work = || {
        loop {
            let number = next.fetch_add(1, Relaxed);
            if number >= count || locked(&checked).failed >= enough {
                return;
            }
            let plan = plan(number);
            let Ended { violations, virtual_time, .. } = simulate(site, &plan, Some(&calm[plan.variant]), false);
            let mut checked = locked(&checked);
            checked.runs += 1;
            checked.virtual_s += virtual_time.as_secs_f64();
            if violations.is_empty() {
                continue;
            }
            checked.failed += 1;
            let what = format!("seed {} ({}): {}", plan.seed, VARIANTS[plan.variant].name, violations.join("; "));
            if enough > 1 && checked.failed <= PRINTED_MAX {
                println!("{what}\n   {plan:?}");
            }
            checked.first.get_or_insert(what);
        }
    };
    std::thread::scope(|scope| (0..jobs).for_each(|_| drop(scope.spawn(work))));
    let checked = checked.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    Checked { seconds: begun.elapsed().as_secs_f64(), ..checked }
}

fn locked(checked: &Mutex<Checked>) -> MutexGuard<'_, Checked> {
    checked.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_end_as_calm_runs_and_repeat_themselves() {
        let site = Site::new();
        let calm = site.calm();
        for seed in 0..20 {
            let plan = Plan::of_seed(seed, &calm);
            let [first, again] = [(); 2].map(|()| simulate(&site, &plan, Some(&calm[plan.variant]), false));
            assert_eq!(first.violations, Vec::<String>::new(), "seed {seed}");
            assert_eq!(first.trace, again.trace, "seed {seed}");
        }
    }
}

//! Steps of one piece of work that several threads take together, one after the other.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

/// Turns of a waiting thread before it offers its core to others.
const SPINS: u32 = 20_000;

/// Each phase has numbered tasks, and ends when all of them are done: a thread that comes late, or not at all, is not
/// waited for, and finds the phases behind it closed.
///
/// Tasks that are next to each other are a thread's share, so that it reads memory in order; when it is through, it takes
/// what others have not begun. Of many threads some have a share together.
///
/// Where a time is set, no phase begins behind it, and those that have begun are not ended: what they were to write is then
/// worth nothing.
pub(super) struct Phases {
    phases: Box<[Phase]>,
    shares: usize,
    until: Option<Instant>,
    over: AtomicBool,
}

/// Shares at most: who is through looks into each.
const SHARES_MAX: usize = 16;

struct Phase {
    /// Of each share, how many tasks are taken.
    taken: Box<[Counter]>,
    done: Counter,
}

/// On a line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Counter(AtomicUsize);

impl Phases {
    pub(super) fn new(count: usize, threads: usize) -> Self {
        let shares = threads.min(SHARES_MAX);
        let counters = || (0..shares).map(|_| Counter::default()).collect();
        let phases = (0..count).map(|_| Phase { taken: counters(), done: Counter::default() }).collect();
        Self { phases, shares, until: None, over: AtomicBool::new(false) }
    }

    /// Before threads begin.
    pub(super) fn reset(&mut self, until: Option<Instant>) {
        // They are begun in their order: behind the first of which nothing is done nothing was taken.
        for phase in self.phases.iter_mut().take_while(|phase| phase.done.0.load(Ordering::Relaxed) > 0) {
            phase.taken.iter_mut().for_each(|taken| *taken.0.get_mut() = 0);
            *phase.done.0.get_mut() = 0;
        }
        self.until = until;
        *self.over.get_mut() = false;
    }

    /// Whether time was over before all was done.
    pub(super) fn is_over(&self) -> bool {
        // Relaxed: who acts on it touches nothing that others write.
        self.until.is_some() && self.over.load(Ordering::Relaxed)
    }

    /// Takes tasks of this phase until there are no more, those of its own share first, and waits until all are done.
    pub(super) fn run(&self, phase: usize, thread: usize, tasks: usize, task: impl FnMut(usize)) {
        let place =
            |of: usize, i: usize| Some(share(tasks, self.shares, of)).filter(|s| i < s.len()).map(|s| s.start + i);
        self.run_shares(phase, thread, tasks, place, task);
    }

    /// The same of tasks in order of their length: with n shares, every n-th of them is of one share.
    pub(super) fn run_dealt(&self, phase: usize, thread: usize, tasks: usize, task: impl FnMut(usize)) {
        let place = |of: usize, i: usize| Some(i * self.shares + of).filter(|&place| place < tasks);
        self.run_shares(phase, thread, tasks, place, task);
    }

    /// `place` is the number of a share's task.
    fn run_shares(
        &self,
        phase: usize,
        thread: usize,
        tasks: usize,
        place: impl Fn(usize, usize) -> Option<usize>,
        mut task: impl FnMut(usize),
    ) {
        let phase = &self.phases[phase];
        let is_done = || phase.done.0.load(Ordering::Acquire) >= tasks;
        if is_done() {
            return;
        }
        if self.until.is_some_and(|until| Instant::now() >= until) {
            self.over.store(true, Ordering::Relaxed);
        }
        let first = thread % self.shares;
        for of in (first..self.shares).chain(0..first) {
            let taken = &phase.taken[of].0;
            // A look costs others nothing, taking does.
            while !self.is_over() && place(of, taken.load(Ordering::Relaxed)).is_some() {
                let Some(place) = place(of, taken.fetch_add(1, Ordering::Relaxed)) else { break };
                // A task that panics is never done, but must not leave the others waiting.
                let _done = Done(&phase.done.0);
                task(place);
            }
        }
        let mut spins = 0u32;
        while !is_done() {
            // A task that nobody takes any more is never done.
            if self.is_over() {
                return;
            }
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

struct Done<'a>(&'a AtomicUsize);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

/// Part `i` of `parts` nearly equal ones of `0..all`.
pub(super) fn share(all: usize, parts: usize, i: usize) -> std::ops::Range<usize> {
    i * all / parts..(i + 1) * all / parts
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often each task of each phase ran, on threads that are all there, or come one after the other.
    fn counts(tasks: &[usize], threads: usize, dealt: bool, together: bool) -> Vec<Vec<usize>> {
        let mut phases = Phases::new(tasks.len() + 1, threads);
        let ran: Vec<Vec<AtomicUsize>> =
            tasks.iter().map(|&tasks| (0..tasks).map(|_| AtomicUsize::new(0)).collect()).collect();
        for _ in 0..2 {
            phases.reset(None);
            let work = |thread: usize| {
                for (phase, ran) in ran.iter().enumerate() {
                    let task = |i: usize| {
                        ran[i].fetch_add(1, Ordering::Relaxed);
                    };
                    match dealt {
                        true => phases.run_dealt(phase, thread, ran.len(), task),
                        false => phases.run(phase, thread, ran.len(), task),
                    }
                }
            };
            match together {
                true => std::thread::scope(|scope| (0..threads).for_each(|i| drop(scope.spawn(move || work(i))))),
                // The first does everything; whoever comes later finds all of it done.
                false => (0..threads).for_each(work),
            }
        }
        ran.into_iter().map(|ran| ran.into_iter().map(AtomicUsize::into_inner).collect()).collect()
    }

    #[test]
    fn every_task_runs_once_however_many_threads_come() {
        let tasks = [3, 1, 7, 2, 40, 33];
        for threads in [1, 2, 3, 8, 20] {
            for (dealt, together) in [(false, false), (false, true), (true, false), (true, true)] {
                let counts = counts(&tasks, threads, dealt, together);
                assert!(counts.iter().flatten().all(|&ran| ran == 2), "{threads} threads: {counts:?}");
            }
        }
    }

    #[test]
    fn nothing_begins_behind_its_time_and_the_next_pass_begins_anew() {
        let mut phases = Phases::new(3, 2);
        phases.reset(None);
        let mut ran = 0;
        phases.run(0, 1, 5, |_| ran += 1);
        phases.reset(Some(Instant::now()));
        phases.run(0, 0, 5, |_| unreachable!("its time is over"));
        assert!(phases.is_over() && ran == 5);
        phases.reset(None);
        phases.run(0, 1, 5, |_| ran += 1);
        assert_eq!(ran, 10);
    }
}

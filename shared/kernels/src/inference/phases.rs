//! Steps of one piece of work that several threads take together, one after the other.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

/// Turns of a waiting thread before it offers its core to others.
const SPINS: u32 = 20_000;

/// Each phase has numbered tasks, and ends when all of them are done: a thread that comes late, or not at all, is not
/// waited for, and finds the phases behind it closed.
///
/// Tasks that are next to each other are a thread's share, so that it reads memory in order; when it is through, it takes
/// what others have not begun.
///
/// Where a time is set, no phase begins behind it, and those that have begun are not ended: what they were to write is then
/// worth nothing.
pub(super) struct Phases {
    phases: Box<[Phase]>,
    threads: usize,
    until: Option<Instant>,
    over: AtomicBool,
}

struct Phase {
    /// Of each thread's share, how many tasks are taken.
    taken: Box<[Counter]>,
    done: Counter,
}

/// On a line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Counter(AtomicUsize);

impl Phases {
    pub(super) fn new(count: usize, threads: usize) -> Self {
        let counters = || (0..threads).map(|_| Counter::default()).collect();
        let phases = (0..count).map(|_| Phase { taken: counters(), done: Counter::default() }).collect();
        Self { phases, threads, until: None, over: AtomicBool::new(false) }
    }

    /// Before threads begin.
    pub(super) fn reset(&mut self, until: Option<Instant>) {
        for phase in &mut self.phases {
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
    pub(super) fn run(&self, phase: usize, thread: usize, tasks: usize, mut task: impl FnMut(usize)) {
        let phase = &self.phases[phase];
        if self.until.is_some_and(|until| Instant::now() >= until) {
            self.over.store(true, Ordering::Relaxed);
        }
        for of in (thread..self.threads).chain(0..thread) {
            let share = share(tasks, self.threads, of);
            while !self.is_over() {
                let i = share.start + phase.taken[of].0.fetch_add(1, Ordering::Relaxed);
                if i >= share.end {
                    break;
                }
                // A task that panics is never done, but must not leave the others waiting.
                let _done = Done(&phase.done.0);
                task(i);
            }
        }
        let mut spins = 0u32;
        while phase.done.0.load(Ordering::Acquire) < tasks {
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

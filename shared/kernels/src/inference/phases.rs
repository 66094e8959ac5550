//! Steps of one piece of work that several threads take together, one after the other.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

/// Turns of a waiting thread before it offers its core to others.
const SPINS: u32 = 20_000;

/// Each phase has numbered tasks, and ends when all of them are done: a thread that comes late, or not at all, is not
/// waited for, and finds the phases behind it closed.
///
/// Where a time is set, no phase begins behind it, and those that have begun are not ended: what they were to write is then
/// worth nothing.
pub(super) struct Phases {
    phases: Box<[Phase]>,
    until: Option<Instant>,
    over: AtomicBool,
}

#[derive(Default)]
#[repr(align(128))]
struct Phase {
    next: AtomicUsize,
    done: AtomicUsize,
}

impl Phases {
    pub(super) fn new(count: usize) -> Self {
        let phases = (0..count).map(|_| Phase::default()).collect();
        Self { phases, until: None, over: AtomicBool::new(false) }
    }

    /// Before threads begin.
    pub(super) fn reset(&mut self, until: Option<Instant>) {
        for phase in &mut self.phases {
            *phase.next.get_mut() = 0;
            *phase.done.get_mut() = 0;
        }
        self.until = until;
        *self.over.get_mut() = false;
    }

    /// Whether time was over before all was done.
    pub(super) fn is_over(&self) -> bool {
        // Relaxed: who acts on it touches nothing that others write.
        self.until.is_some() && self.over.load(Ordering::Relaxed)
    }

    /// Takes tasks of this phase until there are no more, and waits until all are done.
    pub(super) fn run(&self, phase: usize, tasks: usize, mut task: impl FnMut(usize)) {
        let phase = &self.phases[phase];
        if self.until.is_some_and(|until| Instant::now() >= until) {
            self.over.store(true, Ordering::Relaxed);
        }
        while !self.is_over() {
            let i = phase.next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                break;
            }
            // A task that panics is never done, but must not leave the others waiting.
            let _done = Done(&phase.done);
            task(i);
        }
        let mut spins = 0u32;
        while phase.done.load(Ordering::Acquire) < tasks {
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

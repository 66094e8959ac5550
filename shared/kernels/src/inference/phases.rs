//! Steps of one piece of work that several threads take together, one after the other.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Turns of a waiting thread before it offers its core to others.
const SPINS: u32 = 20_000;

/// Each phase has numbered tasks, and ends when all of them are done: a thread that comes late, or not at all, is not
/// waited for, and finds the phases behind it closed.
pub(super) struct Phases(Box<[Phase]>);

#[derive(Default)]
#[repr(align(128))]
struct Phase {
    next: AtomicUsize,
    done: AtomicUsize,
}

impl Phases {
    pub(super) fn new(count: usize) -> Self {
        Self((0..count).map(|_| Phase::default()).collect())
    }

    /// Before threads begin.
    pub(super) fn reset(&mut self) {
        for phase in &mut self.0 {
            *phase.next.get_mut() = 0;
            *phase.done.get_mut() = 0;
        }
    }

    /// Takes tasks of this phase until there are no more, and waits until all are done.
    pub(super) fn run(&self, phase: usize, tasks: usize, mut task: impl FnMut(usize)) {
        let phase = &self.0[phase];
        loop {
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

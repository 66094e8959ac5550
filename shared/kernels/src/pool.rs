//! Threads that share the tasks of one piece of work.
//!
//! Tasks are numbered; which thread takes which is left to chance, and never changes a result: a task writes where no
//! other does, and no sum is split over tasks.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;

/// Turns of an idle thread before it sleeps: some 20 µs, about the gap between two kernels of a pass.
const SPINS: u32 = 2_000;

pub(crate) struct Pool {
    shared: Arc<Shared>,
    /// Threads to start beside the caller's.
    more: usize,
    /// Started by the first piece of work: many devices never have one.
    workers: OnceLock<Vec<JoinHandle<()>>>,
    /// One piece of work at a time.
    turn: Mutex<()>,
}

struct Shared {
    /// Which piece of work, whether it is open to workers, and how many are at it: see [`State`].
    state: AtomicU64,
    work: UnsafeCell<Option<Piece>>,
    next: AtomicUsize,
    panicked: AtomicUsize,
    sleeping: Mutex<usize>,
    wake: Condvar,
}

#[derive(Clone, Copy)]
struct Piece {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

/// One number, so that a worker enters a piece of work, or finds it closed, in one step.
///
/// A worker that comes late, because another process had its core, is not waited for: the piece is closed by then.
struct State;

impl State {
    /// The lower bits count the workers at work.
    const WORKERS: u64 = (1 << 16) - 1;
    const OPEN: u64 = 1 << 16;
    const END: u64 = 1 << 17;
    /// The upper bits count pieces of work.
    const NEXT: u64 = 1 << 18;

    fn piece(state: u64) -> u64 {
        state / Self::NEXT
    }
}

// SAFETY: `work` is written by the owner of `turn` alone, while no piece is open and no worker is at one, before the state
// is opened with release ordering; workers read it after they have entered with acquire ordering.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in a piece leads to a `Sync` closure that outlives the piece, see `Pool::run`.
unsafe impl Send for Shared {}

/// The pool's state has room to count more workers than these.
const THREADS_MAX: usize = 1024;

impl Pool {
    /// `threads` of 0 takes as many as the machine has cores; none takes more than [`THREADS_MAX`].
    pub(crate) fn new(threads: usize) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { cores() } else { threads }.min(THREADS_MAX);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            work: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panicked: AtomicUsize::new(0),
            sleeping: Mutex::new(0),
            wake: Condvar::new(),
        });
        Self { shared, more: threads - 1, workers: OnceLock::new(), turn: Mutex::new(()) }
    }

    fn workers(&self) -> &[JoinHandle<()>] {
        let spawn = |i: usize| {
            let shared = self.shared.clone();
            std::thread::Builder::new().name(format!("kernels-{i}")).spawn(move || shared.work_until_the_end()).ok()
        };
        // Where the system gives no more threads, those there are do the work.
        self.workers.get_or_init(|| (1..=self.more).map_while(spawn).collect())
    }

    pub(crate) fn threads(&self) -> usize {
        self.more + 1
    }

    /// Calls `task` with every number below `tasks`, on all threads, and returns when all are done.
    pub(crate) fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.workers().is_empty() {
            (0..tasks).for_each(task);
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        let task: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: only the lifetime changes; `Closing` below does not let this function end, by a panic either, before
        // every worker that has entered has left.
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        let piece = Piece { task, tasks };
        // SAFETY: this thread has the turn, no piece is open and no worker at one, so nobody reads.
        unsafe { *shared.work.get() = Some(piece) };
        shared.next.store(0, Ordering::Relaxed);
        // Where this thread's task panicked as well, nobody has looked at the count.
        shared.panicked.store(0, Ordering::Relaxed);
        shared.state.fetch_add(State::NEXT | State::OPEN, Ordering::Release);
        shared.wake_all();
        {
            let _closing = Closing(shared);
            piece.work_off(&shared.next);
        }
        assert!(shared.panicked.load(Ordering::Relaxed) == 0, "a kernel's task panicked");
    }
}

/// Closes the piece of work on leaving its scope, and waits until no worker is at it.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.fetch_and(!State::OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while state & State::WORKERS > 0 {
            spins += 1;
            // A worker that has lost its core to another process gets this one.
            if spins < SPINS {
                std::hint::spin_loop()
            } else {
                std::thread::yield_now()
            }
            state = self.0.state.load(Ordering::Acquire);
        }
    }
}

impl Piece {
    fn work_off(&self, next: &AtomicUsize) {
        // SAFETY: the closure lives until all workers have finished, see `Pool::run`.
        let task = unsafe { &*self.task };
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= self.tasks {
                return;
            }
            task(i);
        }
    }
}

impl Shared {
    fn wake_all(&self) {
        let sleeping = self.sleeping.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if *sleeping > 0 {
            self.wake.notify_all();
        }
    }

    fn work_until_the_end(&self) {
        let mut seen = 0;
        loop {
            let state = self.next_state(seen);
            if state & State::END != 0 {
                return;
            }
            seen = State::piece(state);
            let entered = state & State::OPEN != 0
                && self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok();
            if !entered {
                // Closed, or another worker entered at the same time: look again.
                seen -= u64::from(state & State::OPEN != 0);
                continue;
            }
            // SAFETY: the piece was written before it was opened, and stays until this worker has left.
            let piece = unsafe { *self.work.get() }.expect("work comes before it is opened");
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| piece.work_off(&self.next))).is_err() {
                self.panicked.fetch_add(1, Ordering::Relaxed);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// The first state that belongs to another piece of work than `seen`.
    fn next_state(&self, seen: u64) -> u64 {
        let news = |state: u64| State::piece(state) != seen || state & State::END != 0;
        for _ in 0..SPINS {
            let state = self.state.load(Ordering::Acquire);
            if news(state) {
                return state;
            }
            std::hint::spin_loop();
        }
        let mut sleeping = self.sleeping.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *sleeping += 1;
        let state = loop {
            let state = self.state.load(Ordering::Acquire);
            if news(state) {
                break state;
            }
            sleeping = self.wake.wait(sleeping).unwrap_or_else(|poisoned| poisoned.into_inner());
        };
        *sleeping -= 1;
        state
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.fetch_or(State::END, Ordering::Release);
        self.shared.wake_all();
        for worker in self.workers.take().into_iter().flatten() {
            // A worker catches its tasks' panics.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 100] {
                let ran: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |i| {
                    ran[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(ran.iter().all(|ran| ran.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn a_task_that_panics_is_reported_and_leaves_the_pool_usable() {
        let pool = Pool::new(2);
        let both = std::sync::Barrier::new(2);
        let one_panics = || pool.run(8, |i| assert!(i != 5, "on purpose"));
        let both_panic = || {
            pool.run(2, |_| {
                both.wait();
                panic!("on purpose");
            });
        };
        for panics in [&one_panics as &dyn Fn(), &both_panic] {
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
            let ran = AtomicUsize::new(0);
            pool.run(8, |_| {
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.load(Ordering::Relaxed), 8);
        }
    }
}

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
    /// Counts pieces of work; odd numbers never occur, the highest bit says that the pool ends.
    generation: AtomicU64,
    work: UnsafeCell<Option<Piece>>,
    next: AtomicUsize,
    /// Workers that have not finished the present piece.
    busy: AtomicUsize,
    panicked: AtomicUsize,
    sleeping: Mutex<usize>,
    wake: Condvar,
}

#[derive(Clone, Copy)]
struct Piece {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: `work` is written by the owner of `turn` alone, while no worker is busy, before `generation` is raised with
// release ordering; workers read it after they have seen that with acquire ordering.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in a piece leads to a `Sync` closure that outlives the piece, see `Pool::run`.
unsafe impl Send for Shared {}

const END: u64 = 1 << 63;

impl Pool {
    /// `threads` of 0 takes as many as the machine has cores.
    pub(crate) fn new(threads: usize) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { cores() } else { threads };
        let shared = Arc::new(Shared {
            generation: AtomicU64::new(0),
            work: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
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
        // SAFETY: only the lifetime changes; `Waiting` below does not let this function end, by a panic either, before
        // every worker has finished with the closure.
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        let piece = Piece { task, tasks };
        // SAFETY: this thread has the turn and no worker is busy, so nobody reads.
        unsafe { *shared.work.get() = Some(piece) };
        shared.next.store(0, Ordering::Relaxed);
        shared.busy.store(self.workers().len(), Ordering::Relaxed);
        shared.generation.fetch_add(2, Ordering::Release);
        shared.wake_all();
        {
            let _waiting = Waiting(shared);
            piece.work_off(&shared.next);
        }
        assert!(shared.panicked.swap(0, Ordering::Relaxed) == 0, "a kernel's task panicked");
    }
}

/// Waits, on leaving its scope, until no worker is busy.
struct Waiting<'a>(&'a Shared);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut spins = 0;
        while self.0.busy.load(Ordering::Acquire) > 0 {
            spins += 1;
            // A worker that has lost its core to another process gets this one.
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
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
            seen = self.next_generation(seen);
            if seen & END != 0 {
                return;
            }
            // SAFETY: the generation was raised after the work was written, and it stays until this worker is not busy.
            let piece = unsafe { *self.work.get() }.expect("work comes before its generation");
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| piece.work_off(&self.next))).is_err() {
                self.panicked.fetch_add(1, Ordering::Relaxed);
            }
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }

    fn next_generation(&self, seen: u64) -> u64 {
        for _ in 0..SPINS {
            let now = self.generation.load(Ordering::Acquire);
            if now != seen {
                return now;
            }
            std::hint::spin_loop();
        }
        let mut sleeping = self.sleeping.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *sleeping += 1;
        let now = loop {
            let now = self.generation.load(Ordering::Acquire);
            if now != seen {
                break now;
            }
            sleeping = self.wake.wait(sleeping).unwrap_or_else(|poisoned| poisoned.into_inner());
        };
        *sleeping -= 1;
        now
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.generation.fetch_or(END, Ordering::Release);
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
        let panics = || pool.run(8, |i| assert!(i != 5, "on purpose"));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
        let ran = AtomicUsize::new(0);
        pool.run(8, |_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.load(Ordering::Relaxed), 8);
    }
}

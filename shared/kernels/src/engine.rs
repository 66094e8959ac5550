//! What all kernels of a device share: the instructions, the threads and the memory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::Path;
use crate::buffer::{Buffer, Number, Spare};
use crate::path::Work;
use crate::pool::Pool;
use crate::simd::Simd;

/// Cheap to clone; clones share threads and memory.
#[derive(Clone)]
pub struct Engine {
    path: Path,
    /// Activations are multiplied as bf16, and those kept for the backward pass are stored as bf16.
    narrow: bool,
    pool: Arc<Pool>,
    spare: Arc<Spare>,
    /// Time by kernel, for who wants to know.
    clock: Option<Arc<Mutex<BTreeMap<&'static str, Duration>>>>,
}

impl Engine {
    /// `threads` of 0 takes all cores. With `narrow`, products are made of bf16 numbers where `path` has instructions
    /// for them; sums are f32 always.
    pub fn new(path: Path, threads: usize, narrow: bool) -> Self {
        Self { path, narrow, pool: Arc::new(Pool::new(threads)), spare: Arc::default(), clock: None }
    }

    pub fn path(&self) -> Path {
        self.path
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Whether products are made of pairs of bf16.
    pub fn multiplies_bf16(&self) -> bool {
        self.narrow && self.path.multiplies_bf16()
    }

    pub(crate) fn keeps_bf16(&self) -> bool {
        self.narrow
    }

    /// The same, measuring how long each kernel takes.
    pub fn timed(&self) -> Self {
        Self { clock: Some(Arc::default()), ..self.clone() }
    }

    /// Takes the time of every kernel since the last call; none unless [`timed`](Self::timed).
    pub fn take_times(&self) -> BTreeMap<&'static str, Duration> {
        let clock = self.clock.as_ref().map(|clock| clock.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        clock.map(|mut times| std::mem::take(&mut *times)).unwrap_or_default()
    }

    /// Gives memory back to the system: that of passes that are over, and what the allocator keeps of all that this
    /// process has freed.
    pub fn trim(&self) {
        self.spare.clear();
        crate::buffer::trim_heap();
    }

    /// Contents are left from earlier use.
    pub(crate) fn take<T: Number>(&self, length: usize) -> Buffer<T> {
        self.spare.take(length)
    }

    pub(crate) fn zeros(&self, length: usize) -> Buffer<f32> {
        let mut buffer = self.take(length);
        buffer.fill(0.0);
        buffer
    }

    pub(crate) fn copy_of(&self, values: &[f32]) -> Buffer<f32> {
        let mut buffer = self.take(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    /// Some numbers of each, one after the other.
    pub(crate) fn gathered(&self, parts: &[(&Buffer<f32>, Range<usize>)]) -> Buffer<f32> {
        let mut buffer = self.take(parts.iter().map(|(_, numbers)| numbers.len()).sum());
        let mut at = 0;
        for (from, numbers) in parts {
            buffer[at..at + numbers.len()].copy_from_slice(&from[numbers.clone()]);
            at += numbers.len();
        }
        buffer
    }

    /// Calls `work` once for each thread, with its number; threads that are late are left out, and another does theirs.
    pub(crate) fn together(&self, work: impl Fn(usize) + Sync) {
        self.pool.run(self.threads(), work);
    }

    /// Every task of `tasks` on some thread, compiled for this path.
    pub(crate) fn parallel<T: Task>(&self, tasks: usize, task: &T) {
        struct One<'a, T>(&'a T, usize);
        impl<T: Task> Work for One<'_, T> {
            type Output = ();
            #[inline(always)]
            unsafe fn run<S: Simd>(self) {
                // SAFETY: the CPU has `S`, as this function's caller promises.
                unsafe { self.0.run::<S>(self.1) }
            }
        }
        let begun = self.clock.as_ref().map(|_| Instant::now());
        self.pool.run(tasks, |i| self.path.run(One(task, i)));
        if let (Some(clock), Some(begun)) = (&self.clock, begun) {
            let mut times = clock.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            *times.entry(T::KERNEL).or_default() += begun.elapsed();
        }
    }
}

/// One of several pieces of work that may run at the same time: each writes where no other reads or writes.
pub(crate) trait Task: Sync {
    /// What it is called where time is measured.
    const KERNEL: &'static str;

    /// # Safety
    /// The CPU has `S`.
    unsafe fn run<S: Simd>(&self, i: usize);
}

/// A pointer that tasks of one kernel share; each writes its own places.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub(crate) *mut T);

// SAFETY: whoever dereferences it keeps to the places of their own task.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

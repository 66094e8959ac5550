//! An allocator that counts, for tests of how much memory something takes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The system's allocator, with counts since the last [`reset`](Self::reset). Made the program's with
/// `#[global_allocator]`; counts of all threads are added up.
#[derive(Debug)]
pub struct CountingAllocator {
    live: AtomicUsize,
    peak: AtomicUsize,
    largest: AtomicUsize,
    count: AtomicUsize,
}

/// What was allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocations {
    pub count: usize,
    /// Of a single allocation, in bytes.
    pub largest: usize,
    /// Bytes that were live at the same time, beyond those live at the reset.
    pub peak: usize,
}

impl CountingAllocator {
    #[allow(clippy::new_without_default)] // A static needs a constant.
    pub const fn new() -> Self {
        let [live, peak, largest, count] = [const { AtomicUsize::new(0) }; 4];
        Self { live, peak, largest, count }
    }

    /// Begins to count anew.
    pub fn reset(&self) {
        self.live.store(usize::MAX / 2, Relaxed);
        self.peak.store(usize::MAX / 2, Relaxed);
        self.largest.store(0, Relaxed);
        self.count.store(0, Relaxed);
    }

    pub fn since_reset(&self) -> Allocations {
        Allocations {
            count: self.count.load(Relaxed),
            largest: self.largest.load(Relaxed),
            // Counting begins in the middle, so that freeing what is older never wraps.
            peak: self.peak.load(Relaxed).saturating_sub(usize::MAX / 2),
        }
    }

    fn allocated(&self, bytes: usize) {
        self.count.fetch_add(1, Relaxed);
        self.largest.fetch_max(bytes, Relaxed);
        let live = self.live.fetch_add(bytes, Relaxed).wrapping_add(bytes);
        self.peak.fetch_max(live, Relaxed);
    }
}

// SAFETY: every call is handed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.allocated(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.allocated(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        self.live.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.live.fetch_sub(layout.size(), Relaxed);
        self.allocated(size);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

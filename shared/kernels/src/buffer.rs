//! Memory for activations that is used again and again: fresh pages cost more than the arithmetic on them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard};

/// Numbers that any bits are valid for.
pub(crate) trait Number: Copy + Send + Sync + 'static {}
impl Number for f32 {}
impl Number for u16 {}
impl Number for u32 {}

/// A slice of its own on the heap, aligned to a cache line. Its contents are left from earlier use.
///
/// Behind the end lies a vector's worth of readable memory, so that a kernel may load whole vectors. What stands there is
/// for no sum and no store; debug builds take exactly this memory, make it not-a-number, and watch the end of it.
pub(crate) struct Buffer<T: Number> {
    memory: Option<Memory>,
    length: usize,
    home: Arc<Spare>,
    numbers: PhantomData<T>,
}

/// Buffers that are free.
#[derive(Default)]
pub(crate) struct Spare(Mutex<Free>);

#[derive(Default)]
struct Free {
    /// Each with how many had been taken when it became free, the smallest number first.
    memories: Vec<(Memory, u64)>,
    /// Buffers taken so far.
    taken: u64,
}

/// What nobody has wanted for as long goes back to the system: otherwise every size would be kept as often as it was ever
/// needed at once, which grows for days where batches vary.
const KEPT_TAKES: u64 = 50_000;
/// From one look for such memory to the next.
const SWEEP_TAKES: u64 = 1_000;
/// From so much on, the allocator is asked to give back what it has got.
const TRIM_BYTES: usize = 4 << 20;

/// Bytes, aligned to a cache line.
pub(crate) struct Memory {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for Memory {}
// SAFETY: a shared reference gives nothing but the numbers `start` and `bytes`.
unsafe impl Sync for Memory {}

const ALIGNMENT: usize = 64;
/// The longest tile reads this far behind a row's last number.
const TAIL_BYTES: usize = 256;

impl Spare {
    pub(crate) fn take<T: Number>(self: &Arc<Self>, length: usize) -> Buffer<T> {
        // Sizes of four steps an octave, so that batches of nearly equal size share memory.
        let needed = length * size_of::<T>() + TAIL_BYTES;
        let step = if SPOILED { 1 } else { (needed.next_power_of_two() / 8).max(ALIGNMENT) };
        let bytes = needed.div_ceil(step) * step;
        let mut free = self.lock();
        // The one used last may still be in the cache.
        let found = free.memories.iter().rposition(|(memory, _)| memory.bytes == bytes);
        let memory = found.map(|i| free.memories.remove(i).0);
        free.taken += 1;
        let unwanted = if free.taken.is_multiple_of(SWEEP_TAKES) { free.unwanted() } else { Vec::new() };
        drop(free);
        let unwanted_bytes: usize = unwanted.iter().map(|(memory, _)| memory.bytes).sum();
        drop(unwanted);
        if unwanted_bytes >= TRIM_BYTES {
            trim_heap();
        }
        let mut memory = memory.unwrap_or_else(|| Memory::new(bytes));
        memory.spoil();
        Buffer { memory: Some(memory), length, home: self.clone(), numbers: PhantomData }
    }

    /// Gives all free memory back to the system.
    pub(crate) fn clear(&self) {
        self.lock().memories.clear();
    }

    fn give(&self, memory: Memory) {
        let mut free = self.lock();
        let taken = free.taken;
        free.memories.push((memory, taken));
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Free {
    /// Those that have been free for long, which come first.
    fn unwanted(&mut self) -> Vec<(Memory, u64)> {
        let oldest = self.taken.saturating_sub(KEPT_TAKES);
        let count = self.memories.partition_point(|&(_, freed)| freed < oldest);
        self.memories.drain(..count).collect()
    }
}

/// Whether memory begins as numbers that spoil every sum they enter: what is read too early or too far shows.
pub(crate) const SPOILED: bool = cfg!(debug_assertions);
const SPOILED_BYTE: u8 = 0xff;

impl Memory {
    pub(crate) fn new(bytes: usize) -> Self {
        let layout = Self::layout(bytes);
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        Self { start: NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout)), bytes }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn start(&mut self) -> NonNull<u8> {
        self.start
    }

    /// In debug builds: as f32 and as bf16, these bytes are not-a-number.
    pub(crate) fn spoil(&mut self) {
        if SPOILED {
            // SAFETY: this memory, which nobody else has.
            unsafe { self.start.as_ptr().write_bytes(SPOILED_BYTE, self.bytes) }
        }
    }

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, ALIGNMENT).expect("a size that was allocated before")
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.bytes)) }
    }
}

impl<T: Number> Buffer<T> {
    fn start(&self) -> NonNull<T> {
        self.memory.as_ref().expect("taken by drop alone").start.cast()
    }

    /// The first number; a kernel may read a vector's worth of memory behind the last.
    pub(crate) fn pointer(&self) -> *const T {
        self.start().as_ptr()
    }
}

impl<T: Number> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the memory holds `length` numbers, initialized since it was allocated zeroed.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.length) }
    }
}

impl<T: Number> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and this value is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), self.length) }
    }
}

impl<T: Number> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            if SPOILED && !std::thread::panicking() {
                // SAFETY: the tail lies behind the numbers, initialized as they are.
                let tail = unsafe {
                    let end = memory.start.as_ptr().add(self.length * size_of::<T>());
                    std::slice::from_raw_parts(end, TAIL_BYTES)
                };
                assert!(tail.iter().all(|&byte| byte == SPOILED_BYTE), "a kernel wrote behind a buffer's end");
            }
            self.home.give(memory);
        }
    }
}

/// glibc keeps pages of small pieces that were freed, until asked.
#[cfg(all(target_os = "linux", target_env = "gnu", not(miri)))]
pub(crate) fn trim_heap() {
    // SAFETY: declared as malloc_trim(3) has it; it may be called at any time, by any thread.
    unsafe extern "C" {
        /// Takes the bytes to keep at the end of the heap; says whether it gave any back.
        safe fn malloc_trim(pad: usize) -> std::ffi::c_int;
    }
    malloc_trim(0);
}

#[cfg(not(all(target_os = "linux", target_env = "gnu", not(miri))))]
pub(crate) fn trim_heap() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_and_is_aligned() {
        let spare = Arc::new(Spare::default());
        let first = spare.take::<f32>(1000);
        let address = first.as_ptr();
        assert_eq!(address as usize % ALIGNMENT, 0);
        drop(first);
        let second = spare.take::<u16>(2000);
        assert_eq!(second.as_ptr().cast(), address);
        assert_eq!(second.len(), 2000);
        assert_ne!(spare.take::<u16>(2000).as_ptr(), second.as_ptr());
    }

    #[test]
    fn memory_that_nobody_wants_is_given_back() {
        let spare = Arc::new(Spare::default());
        let often = || drop(spare.take::<f32>(1000));
        drop([spare.take::<f32>(1000), spare.take::<f32>(1000), spare.take::<f32>(100_000)]);
        let kept = || spare.lock().memories.len();
        // As if others had been taken all the time.
        let later = |taken: u64| spare.lock().taken += taken;
        later(KEPT_TAKES - 2 * SWEEP_TAKES);
        (0..SWEEP_TAKES).for_each(|_| often());
        assert_eq!(kept(), 3);
        later(SWEEP_TAKES);
        (0..SWEEP_TAKES).for_each(|_| often());
        assert_eq!(kept(), 1);
    }
}

//! Memory for activations that is used again and again: fresh pages cost more than the arithmetic on them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

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
pub(crate) struct Spare {
    free: Mutex<Vec<Memory>>,
}

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
        let mut free = self.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // The one used last may still be in the cache.
        let found = free.iter().rposition(|memory| memory.bytes == bytes);
        let memory = found.map(|i| free.swap_remove(i));
        drop(free);
        let mut memory = memory.unwrap_or_else(|| Memory::new(bytes));
        memory.spoil();
        Buffer { memory: Some(memory), length, home: self.clone(), numbers: PhantomData }
    }

    /// Gives all free memory back to the system.
    pub(crate) fn clear(&self) {
        self.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clear();
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
            self.home.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(memory);
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
}

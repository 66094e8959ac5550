//! Memory for activations that is used again and again: fresh pages cost more than the arithmetic on them.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard};

use range_alloc::RangeAllocator;

use crate::region::{LINE, Region};

/// Numbers that any bits are valid for.
pub(crate) trait Number: Copy + Send + Sync + 'static {}
impl Number for f32 {}
impl Number for u16 {}
impl Number for u32 {}

/// A slice of its own, aligned to a cache line. Its contents are left from earlier use.
///
/// Behind the end lies a vector's worth of readable memory, so that a kernel may load whole vectors. What stands there is
/// for no sum and no store; debug builds take exactly this memory, make it not-a-number, and watch the end of it.
pub(crate) struct Buffer<T: Number> {
    start: NonNull<T>,
    length: usize,
    home: Arc<Spare>,
}

// SAFETY: the numbers belong to this value alone, and its home is shared behind a lock.
unsafe impl<T: Number> Send for Buffer<T> {}
// SAFETY: a shared reference gives nothing but the numbers.
unsafe impl<T: Number> Sync for Buffer<T> {}

/// Memory that buffers of all sizes are cut out of, and come back to. It is as large as what was ever needed at once, and
/// stays so until it is [cleared](Spare::clear): buffers kept by size would add up to more, and to ever more where batches
/// vary.
#[derive(Default)]
pub(crate) struct Spare(Mutex<Vec<Arena>>);

struct Arena {
    region: Region,
    free: RangeAllocator<usize>,
}

/// Of which only what is used costs anything. Above the 32 MiB up to which glibc may zero memory by hand. In debug builds
/// every buffer has an arena of its own.
const ARENA_BYTES: usize = 64 << 20;
/// The longest tile reads this far behind a row's last number.
const TAIL_BYTES: usize = 256;

/// Whether memory begins as numbers that spoil every sum they enter: what is read too early or too far shows.
pub(crate) const SPOILED: bool = cfg!(debug_assertions);
const SPOILED_BYTE: u8 = 0xff;

/// In debug builds: as f32 and as bf16, these bytes are not-a-number.
///
/// # Safety
/// The bytes may be written, and belong to the caller.
pub(crate) unsafe fn spoil(start: NonNull<u8>, bytes: usize) {
    if SPOILED {
        // SAFETY: the caller's promise.
        unsafe { start.as_ptr().write_bytes(SPOILED_BYTE, bytes) }
    }
}

impl Spare {
    pub(crate) fn take<T: Number>(self: &Arc<Self>, length: usize) -> Buffer<T> {
        let bytes = bytes_of::<T>(length);
        let mut arenas = self.lock();
        let start = arenas.iter_mut().find_map(|arena| arena.take(bytes));
        let start = start.unwrap_or_else(|| {
            arenas.push(Arena::new(if SPOILED { bytes } else { bytes.max(ARENA_BYTES) }));
            arenas.last_mut().and_then(|arena| arena.take(bytes)).expect("it is large enough")
        });
        drop(arenas);
        // SAFETY: this buffer's bytes, which nobody else has.
        unsafe { spoil(start, bytes) };
        Buffer { start: start.cast(), length, home: self.clone() }
    }

    /// Gives memory of which nothing is used back to the system.
    pub(crate) fn clear(&self) {
        self.lock().retain(|arena| !arena.is_free());
    }

    fn give(&self, start: NonNull<u8>, bytes: usize) {
        let mut arenas = self.lock();
        let i = arenas.iter().position(|arena| arena.holds(start)).expect("an arena stays while a buffer of it lives");
        arenas[i].give(start, bytes);
        if SPOILED {
            arenas.remove(i);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arena>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn bytes_of<T>(length: usize) -> usize {
    let bytes = length * size_of::<T>() + TAIL_BYTES;
    if SPOILED { bytes } else { bytes.next_multiple_of(LINE) }
}

impl Arena {
    fn new(bytes: usize) -> Self {
        Self { region: Region::new(bytes, true), free: RangeAllocator::new(0..bytes) }
    }

    fn take(&mut self, bytes: usize) -> Option<NonNull<u8>> {
        let range = self.free.allocate_range(bytes).ok()?;
        // SAFETY: within the region.
        Some(unsafe { self.region.start().add(range.start) })
    }

    fn give(&mut self, start: NonNull<u8>, bytes: usize) {
        let at = start.addr().get() - self.region.start().addr().get();
        self.free.free_range(at..at + bytes);
    }

    fn holds(&self, start: NonNull<u8>) -> bool {
        let from = self.region.start().addr().get();
        (from..from + self.region.bytes()).contains(&start.addr().get())
    }

    fn is_free(&self) -> bool {
        self.free.total_available() == self.region.bytes()
    }
}

impl<T: Number> Buffer<T> {
    /// The first number; a kernel may read a vector's worth of memory behind the last.
    pub(crate) fn pointer(&self) -> *const T {
        self.start.as_ptr()
    }
}

impl<T: Number> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the memory holds `length` numbers, initialized since it was allocated zeroed.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl<T: Number> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and this value is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl<T: Number> Drop for Buffer<T> {
    fn drop(&mut self) {
        if SPOILED && !std::thread::panicking() {
            // SAFETY: the tail lies behind the numbers, initialized as they are.
            let tail = unsafe { std::slice::from_raw_parts(self.start.add(self.length).cast().as_ptr(), TAIL_BYTES) };
            assert!(tail.iter().all(|&byte: &u8| byte == SPOILED_BYTE), "a kernel wrote behind a buffer's end");
        }
        self.home.give(self.start.cast(), bytes_of::<T>(self.length));
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
        assert_eq!(address as usize % LINE, 0);
        drop(first);
        let second = spare.take::<u16>(2000);
        assert!(SPOILED || std::ptr::eq(second.as_ptr().cast(), address));
        assert_eq!(second.len(), 2000);
        assert_ne!(spare.take::<u16>(2000).as_ptr(), second.as_ptr());
    }

    #[test]
    fn buffers_of_all_sizes_share_memory_and_never_overlap() {
        let spare = Arc::new(Spare::default());
        let mut held: Vec<Buffer<u32>> = Vec::new();
        // Every buffer says whose it is, and is asked when it goes.
        let tell = |buffer: &Buffer<u32>| assert!(buffer.iter().all(|&x| x as usize == buffer.len()));
        // An interpreter is slow.
        let (count, longest) = if cfg!(miri) { (100, 30) } else { (2000, 3000) };
        for i in 0..count {
            let mut buffer = spare.take::<u32>(1 + i * 7919 % longest);
            let length = buffer.len() as u32;
            buffer.fill(length);
            held.push(buffer);
            if held.len() > 40 {
                tell(&held.swap_remove(i * 31 % 40));
            }
        }
        held.iter().for_each(tell);
        assert_eq!(spare.lock().len(), if SPOILED { held.len() } else { 1 });
        held.truncate(1);
        spare.clear();
        assert_eq!(spare.lock().len(), 1);
        held.clear();
        spare.clear();
        assert_eq!(spare.lock().len(), 0);
    }
}

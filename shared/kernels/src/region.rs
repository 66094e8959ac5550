//! Memory that nobody pays for before it is written.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use crate::buffer::SPOILED;

/// Zeros, aligned to a cache line, or to a huge page where there are several.
///
/// An aligned allocation would be zeroed by hand; here the system's own zero pages stay untouched until they are used.
/// Debug builds take one all the same: it ends where it says, so that a sanitizer sees what is read behind it.
pub(crate) struct Region {
    allocation: NonNull<u8>,
    layout: Layout,
    start: NonNull<u8>,
    bytes: usize,
}

/// Of a cache.
pub(crate) const LINE: usize = 64;
const HUGE_PAGE: usize = 2 << 20;

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for Region {}
// SAFETY: a shared reference gives nothing but an address.
unsafe impl Sync for Region {}

impl Region {
    /// With `huge`, asks for huge pages: for memory that will all be used, and read again and again.
    ///
    /// # Panics
    /// If there is no such memory.
    pub(crate) fn new(bytes: usize, huge: bool) -> Self {
        let alignment = if huge && bytes >= 2 * HUGE_PAGE { HUGE_PAGE } else { LINE };
        let layout = match SPOILED {
            true => Layout::from_size_align(bytes, alignment).ok(),
            false => bytes.checked_add(alignment).and_then(|all| Layout::from_size_align(all, 16).ok()),
        };
        let layout = layout.expect("a size in memory");
        // SAFETY: the layout is not empty.
        let allocation = unsafe { alloc_zeroed(layout) };
        let Some(allocation) = NonNull::new(allocation) else { handle_alloc_error(layout) };
        let offset = allocation.align_offset(alignment);
        // SAFETY: there is room for the alignment, if it is not aligned already.
        let start = unsafe { allocation.add(offset) };
        if alignment == HUGE_PAGE {
            ask_for_huge_pages(start.as_ptr(), bytes / HUGE_PAGE * HUGE_PAGE);
        }
        Self { allocation, layout, start, bytes }
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.allocation.as_ptr(), self.layout) }
    }
}

/// Fewer page faults while loading, and fewer address translations afterwards. A system that refuses does without.
fn ask_for_huge_pages(start: *mut u8, bytes: usize) {
    #[cfg(all(target_os = "linux", not(miri)))]
    {
        // SAFETY: declared as madvise(2) has it.
        unsafe extern "C" {
            fn madvise(start: *mut std::ffi::c_void, bytes: usize, advice: std::ffi::c_int) -> std::ffi::c_int;
        }
        const MADV_HUGEPAGE: std::ffi::c_int = 14;
        // SAFETY: whole pages of our own allocation; the advice changes no byte.
        unsafe { madvise(start.cast(), bytes, MADV_HUGEPAGE) };
    }
    #[cfg(not(all(target_os = "linux", not(miri))))]
    let _ = (start, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_zeros_and_aligned() {
        for (bytes, huge, alignment) in [(1, false, LINE), (100_000, true, LINE), (5 * HUGE_PAGE, true, HUGE_PAGE)] {
            let region = Region::new(bytes, huge);
            assert_eq!(region.start().as_ptr() as usize % alignment, 0);
            // SAFETY: the region's own bytes.
            let all = unsafe { std::slice::from_raw_parts(region.start().as_ptr(), bytes) };
            assert!(all.iter().all(|&byte| byte == 0));
        }
    }
}

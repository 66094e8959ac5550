//! Memory that nobody pays for before it is written.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use crate::buffer::SPOILED;
use crate::pages::{Pages, ask_for_huge_pages};

/// Zeros, aligned to a cache line, or to a huge page where there are several.
///
/// Large ones are the system's own zero pages, untouched until they are used, and go back to it with the region: an
/// allocator keeps what was freed, and zeroes it by hand for the next. Debug builds allocate all the same: a region ends
/// where it says, so that a sanitizer sees what is read behind it.
pub(crate) struct Region {
    /// Held for what it does when it is dropped.
    _origin: Origin,
    start: NonNull<u8>,
    bytes: usize,
}

enum Origin {
    Pages { _pages: Pages },
    Allocator { allocation: NonNull<u8>, layout: Layout },
}

/// Of a cache.
pub(crate) const LINE: usize = 64;
const HUGE_PAGE: usize = 2 << 20;
/// Smaller regions come from the allocator, which is quicker than the system.
const PAGES_MIN: usize = 1 << 20;

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for Region {}
// SAFETY: a shared reference gives nothing but an address.
unsafe impl Sync for Region {}

impl Region {
    /// With `huge`, asks for huge pages: for memory that will all be used, and read again and again.
    ///
    /// Ends the program if there is no such memory, as every allocation does.
    pub(crate) fn new(bytes: usize, huge: bool) -> Self {
        let alignment = if huge && bytes >= 2 * HUGE_PAGE { HUGE_PAGE } else { LINE };
        let layout = match SPOILED {
            true => Layout::from_size_align(bytes, alignment).ok(),
            false => bytes.checked_add(alignment).and_then(|all| Layout::from_size_align(all, 16).ok()),
        };
        let layout = layout.expect("a size in memory");
        let pages = if !SPOILED && bytes >= PAGES_MIN { Pages::new(layout.size()) } else { None };
        let (origin, first) = match pages {
            Some(pages) => {
                let first = pages.start();
                (Origin::Pages { _pages: pages }, first)
            }
            None => {
                // SAFETY: the layout is not empty.
                let allocation = unsafe { alloc_zeroed(layout) };
                let Some(allocation) = NonNull::new(allocation) else { handle_alloc_error(layout) };
                (Origin::Allocator { allocation, layout }, allocation)
            }
        };
        let offset = first.align_offset(alignment);
        // SAFETY: there is room for the alignment, if it is not aligned already.
        let start = unsafe { first.add(offset) };
        if alignment == HUGE_PAGE {
            ask_for_huge_pages(start, bytes / HUGE_PAGE * HUGE_PAGE);
        }
        Self { _origin: origin, start, bytes }
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        if let Self::Allocator { allocation, layout } = self {
            // SAFETY: allocated in `Region::new` with this layout.
            unsafe { dealloc(allocation.as_ptr(), *layout) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_zeros_and_aligned() {
        // Miri takes minutes for megabytes.
        let step = if cfg!(miri) { 999 } else { 1 };
        for (bytes, huge, alignment) in [(1, false, LINE), (100_000, true, LINE), (5 * HUGE_PAGE, true, HUGE_PAGE)] {
            let region = Region::new(bytes, huge);
            assert_eq!(region.start().as_ptr() as usize % alignment, 0);
            // SAFETY: the region's own bytes.
            let all = unsafe { std::slice::from_raw_parts(region.start().as_ptr(), bytes) };
            assert!(all.iter().step_by(step).all(|&byte| byte == 0));
        }
    }
}

//! Pages from the system itself, on Linux with pointers of 64 bits; elsewhere, and under Miri, there are none.

pub(crate) use self::system::{Pages, ask_for_huge_pages};

#[cfg(all(target_os = "linux", target_pointer_width = "64", not(miri)))]
mod system {
    use std::ffi::{c_int, c_void};
    use std::ptr::NonNull;

    // SAFETY: declared as mmap(2), munmap(2) and madvise(2) have them where pointers have 64 bits.
    unsafe extern "C" {
        fn mmap(
            at: *mut c_void,
            bytes: usize,
            protection: c_int,
            flags: c_int,
            file: c_int,
            offset: i64,
        ) -> *mut c_void;
        fn munmap(start: *mut c_void, bytes: usize) -> c_int;
        fn madvise(start: *mut c_void, bytes: usize, advice: c_int) -> c_int;
    }
    const READ_AND_WRITE: c_int = 1 | 2;
    /// `MAP_PRIVATE | MAP_ANONYMOUS`, whose numbers are others on MIPS alone.
    const OF_NO_FILE: c_int = 0x02 | 0x20;
    const MADV_HUGEPAGE: c_int = 14;

    /// Zeros that take memory once they are written to, a page each.
    pub(crate) struct Pages {
        start: NonNull<u8>,
        bytes: usize,
    }

    impl Pages {
        /// None if the system has none to give.
        pub(crate) fn new(bytes: usize) -> Option<Self> {
            // SAFETY: asks for memory that nobody has.
            let start = unsafe { mmap(std::ptr::null_mut(), bytes, READ_AND_WRITE, OF_NO_FILE, -1, 0) };
            // A failure is the address -1.
            let start = if start.addr() == usize::MAX { None } else { NonNull::new(start.cast()) };
            Some(Self { start: start?, bytes })
        }

        pub(crate) fn start(&self) -> NonNull<u8> {
            self.start
        }
    }

    impl Drop for Pages {
        fn drop(&mut self) {
            // SAFETY: mapped in `new` with this size, and nobody's any more.
            unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        }
    }

    /// Fewer page faults while loading, and fewer address translations afterwards. A system that refuses does without.
    pub(crate) fn ask_for_huge_pages(start: NonNull<u8>, bytes: usize) {
        // SAFETY: whole pages of our own memory; the advice changes no byte.
        unsafe { madvise(start.as_ptr().cast(), bytes, MADV_HUGEPAGE) };
    }
}

#[cfg(not(all(target_os = "linux", target_pointer_width = "64", not(miri))))]
mod system {
    use std::ptr::NonNull;

    pub(crate) enum Pages {}

    impl Pages {
        pub(crate) fn new(_: usize) -> Option<Self> {
            None
        }

        pub(crate) fn start(&self) -> NonNull<u8> {
            match *self {}
        }
    }

    pub(crate) fn ask_for_huge_pages(_: NonNull<u8>, _: usize) {}
}

#[cfg(all(test, target_os = "linux", target_pointer_width = "64", not(miri)))]
mod tests {
    use super::Pages;

    /// Of this process, in the system's own words.
    fn resident_bytes() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        kib.and_then(|kib| kib.parse::<usize>().ok()).expect("a number of KiB") << 10
    }

    #[test]
    fn pages_take_memory_once_they_are_written_to_and_give_it_back() {
        const BYTES: usize = 256 << 20;
        // Other tests take memory meanwhile, but not as much.
        const MUCH: usize = BYTES / 2;
        let before = resident_bytes();
        let pages = Pages::new(BYTES).expect("addresses");
        assert!(resident_bytes() < before + MUCH, "untouched");
        // SAFETY: within the pages.
        unsafe { pages.start().as_ptr().write_bytes(1, BYTES) };
        assert!(resident_bytes() > before + MUCH, "written to");
        drop(pages);
        assert!(resident_bytes() < before + MUCH, "given back");
    }
}

//! Pages from the system itself, on Linux and Android with pointers of 64 bits; elsewhere, and under Miri, there are none.

pub(crate) use self::system::{Pages, ask_for_huge_pages};

#[cfg(all(any(target_os = "linux", target_os = "android"), target_pointer_width = "64", not(miri)))]
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

#[cfg(not(all(any(target_os = "linux", target_os = "android"), target_pointer_width = "64", not(miri))))]
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

#[cfg(all(test, any(target_os = "linux", target_os = "android"), target_pointer_width = "64", not(miri)))]
mod tests {
    use super::Pages;

    /// Of the mapping that an address lies in, in the system's own words.
    fn resident_bytes(address: usize) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("Linux has it");
        let mut is_here = false;
        for line in maps.lines() {
            let first = line.split(' ').next().unwrap_or_default();
            if let Some((start, end)) = first.split_once('-') {
                let of = |text| usize::from_str_radix(text, 16).expect("an address");
                is_here = (of(start)..of(end)).contains(&address);
            } else if let (true, Some(kib)) = (is_here, line.strip_prefix("Rss:")) {
                return kib.trim().trim_end_matches(" kB").parse::<usize>().expect("a number of KiB") << 10;
            }
        }
        panic!("no mapping has this address");
    }

    #[test]
    fn pages_take_memory_once_they_are_written_to() {
        const BYTES: usize = 64 << 20;
        let pages = Pages::new(BYTES).expect("addresses");
        let start = pages.start().as_ptr();
        let untouched = resident_bytes(start.addr());
        // SAFETY: within the pages.
        unsafe { start.write_bytes(1, BYTES) };
        let written = resident_bytes(start.addr());
        // The system joins neighbouring mappings, and another thread may unmap one meanwhile, but none as large.
        assert!(untouched + BYTES / 2 <= written, "{untouched} bytes before, {written} after");
    }
}

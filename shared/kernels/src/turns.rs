//! How long a thread keeps a core while others want it, and so how long it waits for its next turn.
//!
//! Work with a deadline needs many short turns rather than few long ones. Linux's scheduler takes a thread's wish for the
//! length of its turns (since 6.12: `sched_setattr(2)`, `sched_runtime` of a `SCHED_OTHER` thread) without special rights,
//! because its share of the core stays what it is.

use std::cell::Cell;

/// Of a thread that computes: shorter, and changing threads begins to cost.
const SHORT_NS: u64 = 500_000;
/// The shortest that Linux grants.
const SHORTEST_NS: u64 = 100_000;

thread_local! {
    static ASKED_NS: Cell<u64> = const { Cell::new(0) };
}

/// Asks for short turns of the calling thread, from now on. Costs nothing when it has asked before; a system that refuses,
/// or knows no such wish, does without.
pub fn ask_for_short_turns() {
    ask(SHORT_NS);
}

/// The same, for a thread that sleeps and has little to do when it wakes: it takes the core from one that computes with short
/// turns, too, which would otherwise keep it until the system's next tick.
pub fn ask_for_shortest_turns() {
    ask(SHORTEST_NS);
}

fn ask(turn_ns: u64) {
    if ASKED_NS.replace(turn_ns) != turn_ns {
        #[cfg(all(target_os = "linux", not(miri)))]
        linux::ask(turn_ns);
    }
}

#[cfg(all(target_os = "linux", not(miri)))]
mod linux {
    use std::ffi::{c_int, c_long};

    /// The kernel's `struct sched_attr` in its first version, which all later kernels read.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }

    const SIZE: u32 = size_of::<Attributes>() as u32;
    #[cfg(target_arch = "x86_64")]
    const NUMBERS: Option<[c_long; 2]> = Some([314, 315]);
    #[cfg(target_arch = "aarch64")]
    const NUMBERS: Option<[c_long; 2]> = Some([274, 275]);
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    const NUMBERS: Option<[c_long; 2]> = None;
    /// `SCHED_OTHER` and `SCHED_BATCH`: the classes without rights.
    const FAIR: [u32; 2] = [0, 3];
    const CALLING_THREAD: c_int = 0;

    // SAFETY: the declaration of syscall(2) in the C library; what each call passes is at the call.
    unsafe extern "C" {
        fn syscall(number: c_long, ...) -> c_long;
    }

    pub(super) fn ask(turn_ns: u64) {
        let Some([set, get]) = NUMBERS else { return };
        let mut attributes = Attributes { size: SIZE, ..Attributes::default() };
        // SAFETY: the kernel writes at most `SIZE` bytes, which are there, and numbers alone.
        let got = unsafe { syscall(get, CALLING_THREAD, &raw mut attributes, SIZE, 0u32) };
        if got == 0 && FAIR.contains(&attributes.policy) {
            attributes.size = SIZE;
            attributes.runtime = turn_ns;
            // SAFETY: the kernel reads `SIZE` bytes; nothing but this thread's turns changes.
            unsafe { syscall(set, CALLING_THREAD, &raw const attributes, 0u32) };
        }
    }

    #[cfg(test)]
    mod tests {
        use super::super::{SHORT_NS, SHORTEST_NS, ask_for_short_turns, ask_for_shortest_turns};
        use super::*;

        /// What the kernel has noted, where it notes anything.
        #[test]
        fn a_thread_s_share_stays_what_it_was() {
            std::thread::spawn(|| {
                let read = || {
                    let mut attributes = Attributes { size: SIZE, ..Attributes::default() };
                    let get = NUMBERS?[1];
                    // SAFETY: as in `ask`.
                    let got = unsafe { syscall(get, CALLING_THREAD, &raw mut attributes, SIZE, 0u32) };
                    (got == 0).then_some(attributes)
                };
                let before = read();
                for (ask, turn_ns) in [
                    (ask_for_short_turns as fn(), SHORT_NS),
                    (ask_for_shortest_turns, SHORTEST_NS),
                    (ask_for_short_turns, SHORT_NS),
                ] {
                    ask();
                    if let (Some(before), Some(after)) = (&before, read()) {
                        assert_eq!((before.policy, before.nice), (after.policy, after.nice));
                        // Since 6.12 Linux notes the wish.
                        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
                        let version: Vec<u32> =
                            release.split('.').take(2).filter_map(|part| part.parse().ok()).collect();
                        let expected = if version >= vec![6, 12] { turn_ns } else { before.runtime };
                        assert_eq!(after.runtime, expected, "Linux {release}");
                    }
                }
            })
            .join()
            .unwrap();
        }
    }
}

//! Which instructions the kernels use on this machine.

use crate::simd::Simd;
#[cfg(target_arch = "x86_64")]
use crate::simd::amx;
use crate::simd::portable::Portable;

/// A set of instructions that kernels are compiled for and this CPU has: [`available`](Self::available) and
/// [`detect`](Self::detect) are the only ways to get one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Path(Set);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Avx512Amx,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "aarch64")]
    NeonDot,
    #[cfg(target_arch = "aarch64")]
    NeonBf16,
}

/// Forces a path, by its name.
pub const PATH_VARIABLE: &str = "HEADWATER_KERNELS";

/// Work that is compiled for every path.
pub(crate) trait Work {
    type Output;
    /// # Safety
    /// The CPU has `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

impl Path {
    /// Every path this CPU has, the best one last. Miri has no instructions but those of plain Rust.
    pub fn available() -> Vec<Self> {
        let mut sets = vec![Set::Portable];
        if cfg!(miri) {
            return sets.into_iter().map(Self).collect();
        }
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                sets.push(Set::Avx2);
                if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                    sets.push(Set::Avx512);
                    if has!("avx512vnni") {
                        sets.push(Set::Avx512Vnni);
                        if has!("avx512bf16") {
                            // Intel's multiply pairs of bf16 no faster than two f32 numbers (measured on a Xeon with AMX:
                            // at 0.6 times the speed), AMD's at twice the speed.
                            let at = if is_intel() { sets.len() - 1 } else { sets.len() };
                            sets.insert(at, Set::Avx512Bf16);
                        }
                        if amx::usable() {
                            sets.push(Set::Avx512Amx);
                        }
                    }
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            // NEON is part of every aarch64.
            sets.push(Set::Neon);
            use std::arch::is_aarch64_feature_detected as has;
            if has!("dotprod") {
                sets.push(Set::NeonDot);
                if has!("bf16") {
                    sets.push(Set::NeonBf16);
                }
            }
        }
        sets.into_iter().map(Self).collect()
    }

    /// The path of AMX on a CPU that has none: plain loops stand in for its tiles. For tests.
    #[cfg(target_arch = "x86_64")]
    pub fn emulated() -> Option<Self> {
        let possible = !amx::usable() && Self::available().contains(&Self(Set::Avx512Bf16));
        possible.then(|| {
            amx::emulate();
            Self(Set::Avx512Amx)
        })
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub fn emulated() -> Option<Self> {
        None
    }

    /// The path that [`PATH_VARIABLE`] names, or the best one.
    ///
    /// # Errors
    /// If the variable names none of the available paths.
    pub fn detect() -> Result<Self, String> {
        let available = Self::available();
        match std::env::var(PATH_VARIABLE) {
            Ok(name) if !name.is_empty() => Self::named(&name, &available),
            _ => Ok(available[available.len() - 1]),
        }
    }

    fn named(name: &str, available: &[Self]) -> Result<Self, String> {
        let found = available.iter().find(|path| path.name() == name).copied();
        found.ok_or_else(|| {
            let names: Vec<&str> = available.iter().map(|path| path.name()).collect();
            format!("{PATH_VARIABLE} is `{name}`; this CPU has {}", names.join(", "))
        })
    }

    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Vnni => "avx512vnni",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => "avx512bf16",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Amx => "avx512amx",
            #[cfg(target_arch = "aarch64")]
            Set::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Set::NeonDot => "neondot",
            #[cfg(target_arch = "aarch64")]
            Set::NeonBf16 => "neonbf16",
        }
    }

    /// Whether bf16 is multiplied in hardware; elsewhere bf16 weights are widened to f32 first.
    pub fn multiplies_bf16(self) -> bool {
        struct Ask;
        impl Work for Ask {
            type Output = bool;
            #[inline(always)]
            unsafe fn run<S: Simd>(self) -> bool {
                S::BF16
            }
        }
        self.run(Ask)
    }

    /// Rows of a tile.
    pub(crate) fn tile_rows(self) -> usize {
        struct Ask;
        impl Work for Ask {
            type Output = usize;
            #[inline(always)]
            unsafe fn run<S: Simd>(self) -> usize {
                S::MR
            }
        }
        self.run(Ask)
    }

    /// Runs `work` as it was compiled for this path.
    ///
    /// Sound because a `Path` exists only where the CPU has it.
    #[inline]
    pub(crate) fn run<W: Work>(self, work: W) -> W::Output {
        match self.0 {
            // SAFETY: plain Rust runs everywhere.
            Set::Portable => unsafe { work.run::<Portable>() },
            // SAFETY: `available` has found the features.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { on_avx2(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { on_avx512(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Vnni => unsafe { on_avx512_vnni(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => unsafe { on_avx512_bf16(work) },
            // SAFETY: as above; `emulated` leaves the tiles alone.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Amx => unsafe { on_avx512_amx(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Set::Neon => unsafe { work.run::<crate::simd::neon::Neon>() },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Set::NeonDot => unsafe { on_neon_dot(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Set::NeonBf16 => unsafe { on_neon_bf16(work) },
        }
    }
}

impl std::fmt::Debug for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn on_avx2<W: Work>(work: W) -> W::Output {
    // SAFETY: the caller has checked these features.
    unsafe { work.run::<crate::simd::avx2::Avx2>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn on_avx512<W: Work>(work: W) -> W::Output {
    // SAFETY: the caller has checked these features.
    unsafe { work.run::<crate::simd::avx512::Avx512>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn on_avx512_vnni<W: Work>(work: W) -> W::Output {
    // SAFETY: the caller has checked these features.
    unsafe { work.run::<crate::simd::avx512::Avx512Vnni>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
unsafe fn on_avx512_bf16<W: Work>(work: W) -> W::Output {
    // SAFETY: the caller has checked these features.
    unsafe { work.run::<crate::simd::avx512::Avx512Bf16>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
unsafe fn on_avx512_amx<W: Work>(work: W) -> W::Output {
    // SAFETY: the caller has checked these features.
    unsafe { work.run::<crate::simd::avx512::Avx512Amx>() }
}

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let name = std::arch::x86_64::__cpuid(0);
    [name.ebx, name.edx, name.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon,dotprod")]
unsafe fn on_neon_dot<W: Work>(work: W) -> W::Output {
    // SAFETY: the caller has checked these features.
    unsafe { work.run::<crate::simd::neon::NeonDot>() }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon,dotprod,bf16")]
unsafe fn on_neon_bf16<W: Work>(work: W) -> W::Output {
    // SAFETY: the caller has checked these features.
    unsafe { work.run::<crate::simd::neon::NeonBf16>() }
}

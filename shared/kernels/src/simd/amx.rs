//! Intel's matrix tiles (AMX-BF16): sixteen rows times sixteen columns in one instruction, sixteen pairs of bf16 deep.
//!
//! They multiply pairs of bf16 alone; everything else on this path is AVX-512. The standard library has no stable names for
//! these instructions, so they are written out here. Where the CPU lacks them [`emulate`] puts plain loops in their place:
//! all but the instructions themselves is tested everywhere. Source: Intel 64 and IA-32 Architectures Software Developer's
//! Manual, volume 1, chapter 18.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Simd;
use super::avx512::Avx512Amx;
use crate::tile::{Tile, tile};

/// Rows of a tile.
pub(crate) const ROWS: usize = 16;
/// Numbers across three tiles.
const COLUMNS: usize = 48;
/// Pairs that one instruction takes of every row.
const PAIRS: usize = 16;

static EMULATED: AtomicBool = AtomicBool::new(false);

/// From now on, plain loops stand in for the instructions.
pub(crate) fn emulate() {
    EMULATED.store(true, Ordering::Relaxed);
}

/// Whether the CPU has AMX-BF16 and the system lets this process use it; the first call asks the system to.
pub(crate) fn usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| {
        const TILE_STATE: u64 = 0b11 << 17;
        if !is_x86_feature_detected!("avx512bf16") || !is_x86_feature_detected!("xsave") || __cpuid(0).eax < 7 {
            return false;
        }
        let features = __cpuid_count(7, 0).edx;
        let [bf16, tiles] = [22, 24].map(|bit| features >> bit & 1 == 1);
        // SAFETY: the CPU has XSAVE.
        let enabled = unsafe { enabled_state() };
        bf16 && tiles && enabled & TILE_STATE == TILE_STATE && permitted()
    })
}

#[target_feature(enable = "xsave")]
unsafe fn enabled_state() -> u64 {
    // SAFETY: the caller has found XSAVE; register 0 always exists.
    unsafe { _xgetbv(0) }
}

/// Linux saves the tiles of processes alone that have asked for them: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    let (arch_prctl, request_permission, tile_data) = (158u64, 0x1023u64, 18u64);
    let result: i64;
    // SAFETY: a system call that takes no pointer; it clobbers rcx and r11.
    unsafe {
        asm!("syscall", inlateout("rax") arch_prctl => result, in("rdi") request_permission, in("rsi") tile_data,
            out("rcx") _, out("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// As [`tile`], of pairs that stand row by row (`a [rows][lda]`), sixteen rows of them.
///
/// # Safety
/// As [`tile`]; A reaches sixteen rows. The CPU has AMX unless it is emulated.
#[inline(always)]
pub(crate) unsafe fn tile_of_pairs(vectors: usize, t: &Tile) {
    type S = Avx512Amx;
    let mut products = Products([0.0; ROWS * COLUMNS]);
    let (whole, rest) = (t.depth / PAIRS, t.depth % PAIRS);
    // SAFETY: every access is within what the caller promises.
    unsafe {
        if whole > 0 {
            match EMULATED.load(Ordering::Relaxed) {
                true => emulated(whole, t, vectors, &mut products),
                false => multiplied(whole, t, vectors, &mut products),
            }
        }
        let done = whole * PAIRS;
        for r in 0..t.rows {
            let (a, u) = (t.a.add(r * t.lda + done), t.u);
            let mut column = 0;
            for v in 0..vectors {
                let mut acc = S::load(products.0.as_ptr().add(r * COLUMNS + column));
                for k in 0..rest {
                    let pair = S::splat_bits(a.add(k).cast::<u32>().read());
                    acc = S::dot_pairs(acc, pair, S::load(t.b.add((done + k) * t.ldb + column)));
                }
                for m in 0..t.more {
                    let e = S::load(t.e.add(m * t.lde + column));
                    acc = S::fma(S::splat(*u.add(m * t.ldu + r)), e, acc);
                }
                let at = r * t.ldc + column;
                let n = t.columns.saturating_sub(v * S::LANES).min(S::LANES);
                if n > 0 {
                    let acc = if t.plus.is_null() { acc } else { S::add(acc, S::load_n(t.plus.add(at), n)) };
                    S::store_n(t.c.add(at), acc, n);
                }
                column += S::LANES;
            }
        }
    }
}

/// As [`tile`] of f32 numbers, for sixteen rows: the registers hold eight at a time.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
pub(crate) unsafe fn tile_of_numbers(vectors: usize, t: &Tile) {
    const HALF: usize = ROWS / 2;
    let mut done = 0;
    while done < t.rows {
        // SAFETY: within what the caller promises of sixteen rows; null pointers stay null.
        unsafe {
            let half = Tile {
                a: t.a.wrapping_add(done),
                u: t.u.wrapping_add(done),
                c: t.c.add(done * t.ldc),
                rows: (t.rows - done).min(HALF),
                plus: if t.plus.is_null() { t.plus } else { t.plus.add(done * t.ldc) },
                ..*t
            };
            match vectors {
                1 => tile::<Avx512Amx, HALF, 1, false>(&half),
                2 => tile::<Avx512Amx, HALF, 2, false>(&half),
                _ => tile::<Avx512Amx, HALF, 3, false>(&half),
            }
        }
        done += HALF;
    }
}

/// `[ROWS][COLUMNS]`
#[repr(align(64))]
struct Products([f32; ROWS * COLUMNS]);

/// What LDTILECFG reads: all tiles have sixteen rows of 64 bytes.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

thread_local! {
    static SHAPED: Cell<bool> = const { Cell::new(false) };
}

/// # Safety
/// The CPU has AMX and the system has permitted it.
#[cold]
unsafe fn shape_tiles() {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    row_bytes[..8].fill(64);
    rows[..8].fill(16);
    let shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
    // SAFETY: 64 bytes are read.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly)) }
}

/// Products of the first `16 · whole` pairs.
///
/// # Safety
/// As [`tile_of_pairs`].
#[inline(always)]
unsafe fn multiplied(whole: usize, t: &Tile, vectors: usize, products: &mut Products) {
    if !SHAPED.get() {
        // SAFETY: the caller's promise.
        unsafe { shape_tiles() }
        SHAPED.set(true);
    }
    let (row_a, row_b) = (t.lda * size_of::<f32>(), t.ldb * size_of::<f32>());
    let (step_b, row_c) = (PAIRS * row_b, COLUMNS * size_of::<f32>());
    let to = products.0.as_mut_ptr();
    // Tiles 0 to 2 are the sums, 3 to 5 come of B, and 6 is A's.
    macro_rules! multiply {
        ($($sum:literal $b:literal $at:literal),*) => {
            // SAFETY: sixteen rows of A and of every step of B are there, and of the products; the compiler uses no tiles.
            unsafe {
                asm!(
                    $(concat!("tilezero tmm", $sum),)*
                    "2:",
                    "tileloadd tmm6, [{a} + {row_a}]",
                    $(
                        concat!("tileloadd tmm", $b, ", [{b} + {row_b} + ", $at, "]"),
                        concat!("tdpbf16ps tmm", $sum, ", tmm6, tmm", $b),
                    )*
                    "add {a}, 64",
                    "add {b}, {step_b}",
                    "dec {whole}",
                    "jnz 2b",
                    $(concat!("tilestored [{to} + {row_c} + ", $at, "], tmm", $sum),)*
                    a = inout(reg) t.a => _,
                    b = inout(reg) t.b => _,
                    whole = inout(reg) whole => _,
                    row_a = in(reg) row_a,
                    row_b = in(reg) row_b,
                    step_b = in(reg) step_b,
                    to = in(reg) to,
                    row_c = in(reg) row_c,
                    options(nostack),
                )
            }
        };
    }
    match vectors {
        1 => multiply!(0 3 0),
        2 => multiply!(0 3 0, 1 4 64),
        _ => multiply!(0 3 0, 1 4 64, 2 5 128),
    }
}

/// The same without the instructions.
///
/// # Safety
/// As [`tile_of_pairs`].
unsafe fn emulated(whole: usize, t: &Tile, vectors: usize, products: &mut Products) {
    let wide = |pair: u32| [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)];
    for k in 0..whole * PAIRS {
        for r in 0..ROWS {
            for c in 0..vectors * Avx512Amx::LANES {
                // SAFETY: the caller's promise.
                let (a, b) = unsafe { (*t.a.add(r * t.lda + k), *t.b.add(k * t.ldb + c)) };
                let ([a, more_a], [b, more_b]) = (wide(a.to_bits()), wide(b.to_bits()));
                products.0[r * COLUMNS + c] += a * b + more_a * more_b;
            }
        }
    }
}

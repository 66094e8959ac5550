//! Plain arrays, for every CPU, and for Miri.

use super::{Integers, from_f16, to_f16};
use crate::quantized::{Format, Strip, strip};
use crate::simd::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Plain;

const LANES: usize = 4;

fn each(a: [u8; 16], b: [u8; 16], f: impl Fn(u8, u8) -> u8) -> [u8; 16] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

fn lanes(v: [u8; 16]) -> [i32; LANES] {
    std::array::from_fn(|i| i32::from_le_bytes([v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]]))
}

fn bytes(lanes: [i32; LANES]) -> [u8; 16] {
    std::array::from_fn(|i| lanes[i / 4].to_le_bytes()[i % 4])
}

// SAFETY, for every block below: pointers reach the lanes that are read or written, which is the caller's promise.
impl Integers for Plain {
    type V = [f32; LANES];
    type I = [u8; 16];
    const PAIRED: bool = false;
    const SIGNED: bool = false;
    const STRIP_ROWS: usize = 2;
    const STRIP_VECTORS: usize = 1;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self::I {
        // SAFETY: as above.
        unsafe { from.cast::<Self::I>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut u8, v: Self::I) {
        // SAFETY: as above.
        unsafe { to.cast::<Self::I>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> Self::I {
        bytes([x; LANES])
    }
    #[inline(always)]
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        each(a, b, |a, b| a & b)
    }
    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        each(a, b, |a, b| a | b)
    }
    #[inline(always)]
    unsafe fn xor(a: Self::I, b: Self::I) -> Self::I {
        each(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    unsafe fn left<const N: u32>(v: Self::I) -> Self::I {
        bytes(lanes(v).map(|lane| lane << N))
    }
    #[inline(always)]
    unsafe fn right<const N: u32>(v: Self::I) -> Self::I {
        bytes(lanes(v).map(|lane| (lane as u32 >> N) as i32))
    }
    #[inline(always)]
    unsafe fn add(a: Self::I, b: Self::I) -> Self::I {
        let (a, b) = (lanes(a), lanes(b));
        bytes(std::array::from_fn(|i| a[i] + b[i]))
    }
    #[inline(always)]
    unsafe fn to_f32(v: Self::I) -> Self::V {
        lanes(v).map(|lane| lane as f32)
    }
    #[inline(always)]
    unsafe fn look_up(table: &[u8; 16], codes: Self::I) -> Self::I {
        codes.map(|code| table[usize::from(code & 15)])
    }
    #[inline(always)]
    unsafe fn mul_add<const BITS: u32>(sum: Self::I, codes: Self::I, x: Self::I) -> Self::I {
        let mut lanes = lanes(sum);
        for (i, (code, x)) in codes.into_iter().zip(x).enumerate() {
            lanes[i / 4] += i32::from(code) * i32::from(x as i8);
        }
        bytes(lanes)
    }
    #[inline(always)]
    unsafe fn widen(sum: Self::I) -> Self::I {
        sum
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::V {
        // SAFETY: as above.
        std::array::from_fn(|i| from_f16(unsafe { *from.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::V {
        // SAFETY: as above.
        std::array::from_fn(|i| f32::from(unsafe { *from.add(i) }))
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut u16, v: Self::V) {
        for (i, x) in v.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { *to.add(i) = to_f16(x) }
        }
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, v: Self::V) {
        for (i, x) in v.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { *to.add(i) = x as i8 }
        }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn strip<S: Simd<V = Self::V, Int = Self>, F: Format>(s: &Strip) {
        // SAFETY: as above.
        unsafe { strip::<S, F, 2, 2, 1>(s) }
    }
}

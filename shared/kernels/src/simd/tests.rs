//! Every operation of a vector on every path of this machine, lane by lane, against plain Rust.

use super::{LANES_MAX, Simd, exp, from_bf16, to_bf16};
use crate::Path;
use crate::path::Work;

/// Numbers of every size and sign, none denormal.
fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 1.37 + 0.3).sin() * 2f32.powi((i * 7 % 41) as i32 - 20)).collect()
}

#[inline(always)]
unsafe fn vector<S: Simd>(values: &[f32]) -> S::V {
    // SAFETY: no more lanes than there are numbers; the CPU has `S`, as for every function here.
    unsafe { S::load(values[..S::LANES].as_ptr()) }
}

#[inline(always)]
unsafe fn lanes<S: Simd>(v: S::V) -> Vec<f32> {
    let mut lanes = vec![0.0; S::LANES];
    // SAFETY: there is room for every lane.
    unsafe { S::store(lanes.as_mut_ptr(), v) }
    lanes
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// `check!(test_name, S, { … })`: runs the block for every path `S`.
macro_rules! check {
    ($name:ident, $S:ident, $body:block) => {
        #[test]
        fn $name() {
            struct Check;
            impl Work for Check {
                type Output = ();
                #[inline(always)]
                unsafe fn run<$S: Simd>(self) {
                    // SAFETY: `Path::run` has checked the CPU; pointers come from slices that are long enough.
                    unsafe { $body }
                }
            }
            for path in Path::available().into_iter().chain(Path::emulated()) {
                println!("path {path:?}");
                path.run(Check);
            }
        }
    };
}

check!(arithmetic_is_that_of_single_numbers, S, {
    let all = numbers(3 * LANES_MAX);
    let [a, b, c] = [&all[..16], &all[16..32], &all[32..]];
    let [va, vb, vc] = [a, b, c].map(|x| vector::<S>(x));
    let each = |f: &dyn Fn(usize) -> f32| (0..S::LANES).map(f).collect::<Vec<f32>>();
    assert_eq!(lanes::<S>(S::splat(a[1])), each(&|_| a[1]));
    assert_eq!(lanes::<S>(S::add(va, vb)), each(&|i| a[i] + b[i]));
    assert_eq!(lanes::<S>(S::sub(va, vb)), each(&|i| a[i] - b[i]));
    assert_eq!(lanes::<S>(S::mul(va, vb)), each(&|i| a[i] * b[i]));
    assert_eq!(lanes::<S>(S::div(va, vb)), each(&|i| a[i] / b[i]));
    assert_eq!(lanes::<S>(S::max(va, vb)), each(&|i| a[i].max(b[i])));
    let fma = lanes::<S>(S::fma(va, vb, vc));
    let (twice, once) = (each(&|i| a[i] * b[i] + c[i]), each(&|i| a[i].mul_add(b[i], c[i])));
    assert!(fma == twice || fma == once, "{fma:?} is neither {twice:?} nor {once:?}");
    let sum: f64 = a[..S::LANES].iter().map(|&x| f64::from(x)).sum();
    let size: f64 = a[..S::LANES].iter().map(|&x| f64::from(x.abs())).sum();
    assert!((f64::from(S::sum(va)) - sum).abs() <= 1e-6 * size);
    let below_zero = S::sub(va, S::splat(1e9));
    let largest = |v: S::V| lanes::<S>(v).into_iter().fold(f32::NEG_INFINITY, f32::max);
    assert_eq!(S::maximum(va), largest(va));
    assert_eq!(S::maximum(below_zero), largest(below_zero));
});

check!(partial_vectors_touch_their_lanes_alone, S, {
    for n in 0..=S::LANES {
        // Behind these slices another allocation may begin: AddressSanitizer and Miri watch.
        let values = numbers(n).into_boxed_slice();
        let narrow: Box<[u16]> = values.iter().map(|&x| to_bf16(x)).collect();
        let whole: Box<[i8]> = (0..n).map(|i| (37 * i as i32 - 128) as i8).collect();
        let zeros = vec![0.0; S::LANES - n];
        assert_eq!(lanes::<S>(S::load_n(values.as_ptr(), n)), [&values, &zeros[..]].concat());
        let widened: Vec<f32> = narrow.iter().map(|&x| from_bf16(x)).collect();
        assert_eq!(lanes::<S>(S::load_bf16(narrow.as_ptr(), n)), [&widened, &zeros[..]].concat());
        let floats: Vec<f32> = whole.iter().map(|&x| f32::from(x)).collect();
        assert_eq!(lanes::<S>(S::load_i8(whole.as_ptr(), n)), [&floats, &zeros[..]].concat());

        let all = numbers(LANES_MAX);
        let mut to = vec![7.0f32; S::LANES];
        S::store_n(to.as_mut_ptr(), vector::<S>(&all), n);
        assert!(to[..n] == all[..n] && to[n..].iter().all(|&x| x == 7.0), "{n} lanes");
        S::store_n(values.to_vec().as_mut_ptr(), vector::<S>(&all), n);
        let mut to = vec![7u16; S::LANES];
        S::store_bf16(to.as_mut_ptr(), vector::<S>(&all), n);
        assert!(to[..n].iter().zip(&all).all(|(&to, &x)| to == to_bf16(x)) && to[n..].iter().all(|&x| x == 7));
        S::store_bf16(narrow.to_vec().as_mut_ptr(), vector::<S>(&all), n);
    }
});

check!(a_square_is_transposed, S, {
    let mut rows = [S::splat(0.0); LANES_MAX];
    for (i, row) in rows.iter_mut().enumerate() {
        let values: Vec<f32> = (0..S::LANES).map(|j| (100 * i + j) as f32).collect();
        *row = vector::<S>(&values);
    }
    S::transpose(&mut rows);
    for (i, &row) in rows.iter().enumerate().take(S::LANES) {
        let expected: Vec<f32> = (0..S::LANES).map(|j| (100 * j + i) as f32).collect();
        assert_eq!(lanes::<S>(row), expected);
    }
});

check!(whole_numbers_and_powers_of_two_are_exact, S, {
    for (x, expected) in [(0.5, 0.0), (1.5, 2.0), (-2.5, -2.0), (2.500001, 3.0), (-126.49, -126.0), (127.4, 127.0)] {
        assert_eq!(lanes::<S>(S::round(S::splat(x)))[0], expected);
    }
    for n in -126..=127 {
        let power = f32::from_bits(((n + 127) as u32) << 23);
        assert_eq!(lanes::<S>(S::scale(S::splat(1.5), S::splat(n as f32)))[0], 1.5 * power);
    }
});

check!(exp_errs_by_less_than_2e_7, S, {
    let steps = if cfg!(miri) { 100 } else { 100_000 };
    for i in 0..=steps {
        let x = -87.0 + 175.0 * i as f32 / steps as f32;
        let found = f64::from(lanes::<S>(exp::<S>(S::splat(x)))[0]);
        let expected = f64::from(x).exp();
        assert!((found / expected - 1.0).abs() < 2e-7, "e^{x} is {expected}, not {found}");
    }
    for x in [f32::NEG_INFINITY, -1e30, -100.0] {
        let found = lanes::<S>(exp::<S>(S::splat(x)))[0];
        assert!((0.0..1.3e-38).contains(&found), "e^{x} is not {found}");
    }
    for x in [89.0, 1e30, f32::INFINITY] {
        assert!(lanes::<S>(exp::<S>(S::splat(x)))[0].is_finite());
    }
});

check!(bf16_is_rounded_as_single_numbers_are, S, {
    let mut to = [0u16; LANES_MAX];
    for high in (0..=u16::MAX).step_by(if cfg!(miri) { 999 } else { 1 }) {
        for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let x = f32::from_bits(u32::from(high) << 16 | low);
            S::store_bf16(to.as_mut_ptr(), S::splat(x), S::LANES);
            let rounded = to_bf16(x);
            assert_eq!(to[S::LANES - 1], rounded, "{x:e}");
            let narrow = from_bf16(rounded);
            if x.is_nan() {
                assert!(narrow.is_nan());
            } else if narrow.is_finite() {
                // Of the two neighbours the nearer one, and of two equally near ones that with an even last bit.
                let other = if narrow.abs() > x.abs() { rounded - 1 } else { rounded + 1 };
                let [error, of_other] = [rounded, other].map(|bits| (f64::from(from_bf16(bits)) - f64::from(x)).abs());
                let tie = error == of_other && rounded.is_multiple_of(2);
                assert!(error < of_other || tie || from_bf16(other).is_infinite(), "{x:e} is not {narrow:e}");
            }
        }
    }
});

check!(pairs_hold_neighbours_and_are_multiplied, S, {
    if S::BF16 {
        let all = numbers(6 * LANES_MAX);
        let narrow = |x: f32| u32::from(to_bf16(x));
        let (low, high) = (vector::<S>(&all), vector::<S>(&all[S::LANES..]));
        let expected = |i: usize| narrow(all[2 * i]) | narrow(all[2 * i + 1]) << 16;
        assert_eq!(bits(&lanes::<S>(S::pairs(low, high))), (0..S::LANES).map(expected).collect::<Vec<_>>());
        let zipped = |i: usize| narrow(all[i]) | narrow(all[S::LANES + i]) << 16;
        assert_eq!(bits(&lanes::<S>(S::zip_pairs(low, high))), (0..S::LANES).map(zipped).collect::<Vec<_>>());
        let all_narrow: Vec<u16> = all.iter().map(|&x| to_bf16(x)).collect();
        for n in 0..=S::LANES {
            let [a, b] = [0, S::LANES].map(|at| all_narrow[at..at + n].to_vec().into_boxed_slice());
            let zipped: Vec<u32> = (0..S::LANES).map(|i| if i < n { zipped(i) } else { 0 }).collect();
            assert_eq!(bits(&lanes::<S>(S::zip_bf16(a.as_ptr(), b.as_ptr(), n))), zipped);
        }
        assert!(bits(&lanes::<S>(S::splat_bits(0x1234_5678))).iter().all(|&bits| bits == 0x1234_5678));

        let halves = |v: S::V| -> Vec<[f64; 2]> {
            let both = |bits: u32| [bits as u16, (bits >> 16) as u16].map(|half| f64::from(from_bf16(half)));
            bits(&lanes::<S>(v)).into_iter().map(both).collect()
        };
        let (a, b) = (S::pairs(low, high), S::pairs(vector::<S>(&all[50..]), vector::<S>(&all[50 + S::LANES..])));
        let sums = vector::<S>(&all[80..]);
        let found = lanes::<S>(S::dot_pairs(sums, a, b));
        for (i, found) in found.into_iter().enumerate() {
            let products = [0, 1].map(|half| halves(a)[i][half] * halves(b)[i][half]);
            let sum = f64::from(all[80 + i]);
            let size = products[0].abs() + products[1].abs() + sum.abs();
            let error = (f64::from(found) - (sum + products[0] + products[1])).abs() / size;
            assert!(error < 2e-7, "lane {i} errs by {error:e}");
        }
    }
});

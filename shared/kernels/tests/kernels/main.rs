//! Every kernel on every path of this machine, against plain f64 loops that share nothing with it.

mod blocks;
mod heads;
mod reference;
mod shapes;

use kernels::{Engine, Frozen, Path, WeightType};

/// Numbers that depend on the seed alone, evenly in ±`scale`.
pub struct Draw(pub u64);

impl Draw {
    pub fn fraction(&mut self) -> f64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.fraction() * n as f64) as usize
    }

    pub fn values(&mut self, n: usize, scale: f64) -> Vec<f32> {
        (0..n).map(|_| ((2.0 * self.fraction() - 1.0) * scale) as f32).collect()
    }
}

/// Every path, AMX's too where only its tiles have to be emulated.
pub fn paths() -> impl Iterator<Item = Path> {
    Path::available().into_iter().chain(Path::emulated())
}

/// Every path, on one thread and on three.
pub fn engines(narrow: bool) -> Vec<Engine> {
    paths().flat_map(|path| [1, 3].map(|threads| Engine::new(path, threads, narrow))).collect()
}

/// The matrix as it is kept, row-major, in f32.
pub fn kept(matrix: &Frozen) -> Vec<f32> {
    let mut values = vec![0.0; matrix.rows() * matrix.columns()];
    for (row, to) in values.chunks_exact_mut(matrix.columns()).enumerate() {
        matrix.row(row, to);
    }
    values
}

/// The norm of the difference, relative to the norm.
pub fn relative_error(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let squared = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let difference = squared(&mut found.iter().zip(expected).map(|(f, e)| f64::from(*f) - e));
    (difference / squared(&mut expected.iter().copied()).max(1e-30)).sqrt()
}

#[test]
fn kept_weights_are_as_near_as_their_type_allows() {
    let (rows, columns) = (7, 33);
    let values = Draw(1).values(rows * columns, 2.0);
    let check = |ty, error_max: f64| {
        let found = kept(&Frozen::new(rows, columns, values.clone(), ty));
        for (found, expected) in found.iter().zip(&values) {
            assert!(f64::from((found - expected).abs()) <= error_max, "{ty:?}: {found} for {expected}");
        }
    };
    check(WeightType::F32, 0.0);
    check(WeightType::Bf16, 2.0 / 256.0);
    // Half a step of the largest row's scale.
    check(WeightType::Int8, 2.0 / 127.0 / 2.0 + 1e-6);
}

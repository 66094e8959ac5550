//! The two factors of one LoRA pair, averaged as what they are for: their product B·A.
//!
//! The mean of the products is not the product of the means. [`product_mean`] makes the former and factors it again at
//! the adapter's rank; [`aggregation_error`] says how far the latter is off. Neither ever forms a product, which is as
//! large as the base weight: the largest matrix here is everybody's factors side by side. This module knows no tensor
//! names and no strategies; start from [`Pair`].

mod jacobi;

use std::fmt;

use nalgebra::{DMatrix, DVector};

use self::jacobi::Component;

/// Singular values below this share of the largest are rounding of the arithmetic here, and taken for 0.
const NEGLIGIBLE_SHARE: f64 = 1e-12;

/// One participant's factors, checked: finite, and of a shape that can be multiplied.
#[derive(Clone)]
pub struct Pair {
    weight: f64,
    /// [rank, in]
    a: DMatrix<f64>,
    /// [out, rank]
    b: DMatrix<f64>,
}

/// The factors that are the same for everybody: row-major `a` [rank, in] and `b` [out, rank].
#[derive(Clone, PartialEq)]
pub struct Factors {
    pub a: Vec<f32>,
    pub b: Vec<f32>,
}

/// The caller handed over factors that have no mean.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FactorsError {
    #[error("read a factor of {values} values as rows of rank {rank}")]
    NotOfRank { values: usize, rank: usize },
    #[error("read a factor whose value {index} is not finite")]
    NotFinite { index: usize },
    #[error("weigh a pair with {weight}: a weight is finite and not negative")]
    BadWeight { weight: f64 },
    #[error("average {pairs} pairs whose weights sum to 0: one must have trained on some tokens")]
    NoWeight { pairs: usize },
    #[error("average pair {index}, whose [rank, in, out] are {found:?}, with pairs of {expected:?}")]
    WrongShape { index: usize, expected: [usize; 3], found: [usize; 3] },
}

impl Pair {
    /// `a` [rank, in] and `b` [out, rank] are row-major; `in` and `out` follow from their lengths.
    pub fn new(weight: f64, rank: usize, a: &[f32], b: &[f32]) -> Result<Self, FactorsError> {
        if !weight.is_finite() || weight < 0.0 {
            return Err(FactorsError::BadWeight { weight });
        }
        for values in [a, b] {
            if rank == 0 || values.is_empty() || !values.len().is_multiple_of(rank) {
                return Err(FactorsError::NotOfRank { values: values.len(), rank });
            }
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                return Err(FactorsError::NotFinite { index });
            }
        }
        Ok(Self {
            weight,
            a: DMatrix::from_row_iterator(rank, a.len() / rank, a.iter().copied().map(f64::from)),
            b: DMatrix::from_row_iterator(b.len() / rank, rank, b.iter().copied().map(f64::from)),
        })
    }

    /// [rank, in, out]
    fn shape(&self) -> [usize; 3] {
        [self.a.nrows(), self.a.ncols(), self.b.nrows()]
    }
}

/// Weights of an adapter are not for logs.
impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [rank, inputs, outputs] = self.shape();
        write!(f, "Pair(weight {}, A [{rank}, {inputs}], B [{outputs}, {rank}])", self.weight)
    }
}

impl fmt::Debug for Factors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Factors({} values of A, {} values of B)", self.a.len(), self.b.len())
    }
}

/// The weighted mean of the products B·A, exact but for rounding, and of that the best approximation of the pairs' rank
/// (in the Frobenius norm; Eckart and Young, 1936).
///
/// Each singular value is split evenly: column j of B and row j of A have the same norm. Their sign is such that the
/// entry of B's column that is largest in magnitude, the first of equals, is positive. Where the mean has a lower rank,
/// B's spare columns are 0, and A's spare rows are those of the mean of the A factors: were they 0 too, neither factor
/// would ever have a gradient again.
pub fn product_mean(pairs: &[Pair]) -> Result<Factors, FactorsError> {
    let shares = shares(pairs)?;
    let [rank, inputs, outputs] = pairs[0].shape();

    // mean = left · right, left [out, pairs·rank] and right [pairs·rank, in]. A share's root on either side keeps both
    // sides of the same size.
    let left = side_by_side(pairs.iter().zip(&shares).map(|(pair, share)| &pair.b * share.sqrt()));
    let right_transposed =
        side_by_side(pairs.iter().zip(&shares).map(|(pair, share)| pair.a.transpose() * share.sqrt()));

    // left = Q₁·R₁ and rightᵀ = Q₂·R₂, so that mean = Q₁·(R₁·R₂ᵀ)·Q₂ᵀ, and only the small core has to be decomposed.
    let (left_basis, left_core) = left.qr().unpack();
    let (right_basis, right_core) = right_transposed.qr().unpack();
    let components = jacobi::components(&(left_core * right_core.transpose()));

    let mut a = weighted_sum(pairs.iter().zip(&shares).map(|(pair, share)| (&pair.a, *share)), rank, inputs);
    let mut b = DMatrix::zeros(outputs, rank);
    let negligible = components[0].singular_value * NEGLIGIBLE_SHARE;
    for (index, Component { singular_value, left, right }) in components.iter().take(rank).enumerate() {
        if *singular_value <= negligible {
            break;
        }
        let column = &left_basis * left;
        let root = singular_value.sqrt().copysign(column[column.icamax()]);
        b.set_column(index, &(column / root));
        a.set_row(index, &((&right_basis * right).transpose() * root));
    }
    // nalgebra stores columns, so that the transpose's storage is the row-major matrix.
    let row_major = |matrix: DMatrix<f64>| matrix.transpose().iter().map(|value| *value as f32).collect();
    Ok(Factors { a: row_major(a), b: row_major(b) })
}

/// How far the product of the mean factors is from the mean product, relative to the latter:
/// ‖mean(B·A) - B̄·Ā‖ / ‖mean(B·A)‖ in the Frobenius norm, and 0 where the mean product is 0.
pub fn aggregation_error(pairs: &[Pair]) -> Result<f64, FactorsError> {
    let [error_norm, mean_norm] = aggregation_norms(pairs)?;
    Ok(if mean_norm == 0.0 { 0.0 } else { error_norm / mean_norm })
}

/// Numerator and denominator of [`aggregation_error`], to be put together over many layers.
pub fn aggregation_norms(pairs: &[Pair]) -> Result<[f64; 2], FactorsError> {
    let shares = shares(pairs)?;
    let [rank, inputs, outputs] = pairs[0].shape();
    let mean_a = weighted_sum(pairs.iter().zip(&shares).map(|(pair, share)| (&pair.a, *share)), rank, inputs);
    let mean_b = weighted_sum(pairs.iter().zip(&shares).map(|(pair, share)| (&pair.b, *share)), outputs, rank);

    let mean_norm = norm_of_sum(pairs.iter().zip(&shares).map(|(pair, share)| (&pair.b * *share, pair.a.clone())));
    // The difference is the covariance of the factors, mean((B - B̄)·(A - Ā)): nothing large cancels in this form, so that
    // equal factors have an error of rounding's size and not of its root's.
    let error_norm =
        norm_of_sum(pairs.iter().zip(&shares).map(|(pair, share)| ((&pair.b - &mean_b) * *share, &pair.a - &mean_a)));
    Ok([error_norm, mean_norm])
}

/// The weights as shares of 1, for pairs that can be averaged at all.
fn shares(pairs: &[Pair]) -> Result<Vec<f64>, FactorsError> {
    let total: f64 = pairs.iter().map(|pair| pair.weight).sum();
    if total <= 0.0 {
        return Err(FactorsError::NoWeight { pairs: pairs.len() });
    }
    let expected = pairs[0].shape();
    for (index, pair) in pairs.iter().enumerate() {
        let found = pair.shape();
        if found != expected {
            return Err(FactorsError::WrongShape { index, expected, found });
        }
    }
    Ok(pairs.iter().map(|pair| pair.weight / total).collect())
}

fn weighted_sum<'a>(terms: impl Iterator<Item = (&'a DMatrix<f64>, f64)>, rows: usize, columns: usize) -> DMatrix<f64> {
    terms.fold(DMatrix::zeros(rows, columns), |sum, (matrix, share)| sum + matrix * share)
}

fn side_by_side(blocks: impl Iterator<Item = DMatrix<f64>>) -> DMatrix<f64> {
    let columns: Vec<DVector<f64>> =
        blocks.flat_map(|block| block.column_iter().map(|column| column.into_owned()).collect::<Vec<_>>()).collect();
    DMatrix::from_columns(&columns)
}

/// ‖Σ Lᵢ·Rᵢ‖ for L [out, rank] and R [rank, in]: its square is the trace of (LᵀL)·(RRᵀ) over the stacked factors, two
/// Gram matrices of (pairs × rank) rows.
fn norm_of_sum(products: impl Iterator<Item = (DMatrix<f64>, DMatrix<f64>)>) -> f64 {
    let (lefts, rights): (Vec<_>, Vec<_>) = products.map(|(left, right)| (left, right.transpose())).unzip();
    let left = side_by_side(lefts.into_iter());
    let right_transposed = side_by_side(rights.into_iter());
    let left_gram = left.tr_mul(&left);
    let right_gram = right_transposed.tr_mul(&right_transposed);
    // The sum is a square; rounding may leave it a little below 0.
    left_gram.dot(&right_gram).max(0.0).sqrt()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The mean product, formed in full: what this module must never do, and is compared with.
    fn dense_mean(pairs: &[Pair]) -> DMatrix<f64> {
        let total: f64 = pairs.iter().map(|pair| pair.weight).sum();
        let [_, inputs, outputs] = pairs[0].shape();
        pairs.iter().fold(DMatrix::zeros(outputs, inputs), |sum, pair| sum + &pair.b * &pair.a * (pair.weight / total))
    }

    fn dense_error(pairs: &[Pair]) -> f64 {
        let total: f64 = pairs.iter().map(|pair| pair.weight).sum();
        let [rank, inputs, outputs] = pairs[0].shape();
        let mean_a = pairs.iter().fold(DMatrix::zeros(rank, inputs), |sum, pair| sum + &pair.a * (pair.weight / total));
        let mean_b =
            pairs.iter().fold(DMatrix::zeros(outputs, rank), |sum, pair| sum + &pair.b * (pair.weight / total));
        let mean = dense_mean(pairs);
        if mean.norm() == 0.0 { 0.0 } else { (&mean - mean_b * mean_a).norm() / mean.norm() }
    }

    fn product(factors: &Factors, [rank, inputs, outputs]: [usize; 3]) -> DMatrix<f64> {
        let matrix = |rows, columns, values: &[f32]| {
            DMatrix::from_row_iterator(rows, columns, values.iter().copied().map(f64::from))
        };
        matrix(outputs, rank, &factors.b) * matrix(rank, inputs, &factors.a)
    }

    /// No approximation of rank r is closer to a matrix than the root of the sum of its squared singular values beyond r.
    #[track_caller]
    fn check_best_approximation(pairs: &[Pair]) {
        let [rank, inputs, outputs] = pairs[0].shape();
        let mean = dense_mean(pairs);
        let factors = product_mean(pairs).expect("the pairs can be averaged");
        assert_eq!((factors.a.len(), factors.b.len()), (rank * inputs, outputs * rank));
        let error = (product(&factors, [rank, inputs, outputs]) - &mean).norm();
        let mut squares: Vec<f64> =
            mean.tr_mul(&mean).symmetric_eigenvalues().iter().map(|square| square.max(0.0)).collect();
        squares.sort_by(|one, other| other.total_cmp(one));
        let best = squares.iter().skip(rank).sum::<f64>().sqrt();
        let slack = 1e-6 * mean.norm() + f64::MIN_POSITIVE;
        assert!(error <= best + slack, "error {error:e} where {best:e} is possible, norm {:e}", mean.norm());
    }

    fn pair(weight: f64, rank: usize, a: &[f32], b: &[f32]) -> Pair {
        Pair::new(weight, rank, a, b).expect("the pair is in order")
    }

    const SHAPES: [[usize; 3]; 7] = [[1, 1, 1], [1, 5, 3], [2, 7, 5], [4, 9, 12], [4, 3, 12], [3, 8, 2], [8, 40, 24]];

    fn any_values(len: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-2.0f32..2.0, len)
    }

    fn any_pair([rank, inputs, outputs]: [usize; 3]) -> impl Strategy<Value = Pair> {
        (1..10_000u32, any_values(rank * inputs), any_values(outputs * rank))
            .prop_map(move |(tokens, a, b)| pair(f64::from(tokens), rank, &a, &b))
    }

    fn any_pairs() -> impl Strategy<Value = Vec<Pair>> {
        prop::sample::select(&SHAPES[..]).prop_flat_map(|shape| prop::collection::vec(any_pair(shape), 1..5))
    }

    proptest! {
        #[test]
        fn the_mean_of_products_is_approximated_as_well_as_the_rank_allows(pairs in any_pairs()) {
            check_best_approximation(&pairs);
        }

        #[test]
        fn the_error_is_that_of_the_dense_computation(pairs in any_pairs()) {
            let (found, dense) = (aggregation_error(&pairs).unwrap(), dense_error(&pairs));
            prop_assert!((found - dense).abs() <= 1e-6 * (1.0 + dense), "found {}, dense {}", found, dense);
        }

        #[test]
        fn one_participant_keeps_its_product_and_has_no_error(
            pair in prop::sample::select(&SHAPES[..]).prop_flat_map(any_pair),
        ) {
            let pairs = [pair];
            prop_assert_eq!(aggregation_error(&pairs), Ok(0.0));
            let mean = dense_mean(&pairs);
            let found = product(&product_mean(&pairs).unwrap(), pairs[0].shape());
            prop_assert!((found - &mean).norm() <= 1e-6 * mean.norm());
        }

        #[test]
        fn equal_updates_keep_their_product_and_have_no_error(
            pair in prop::sample::select(&SHAPES[..]).prop_flat_map(any_pair),
            weights in prop::collection::vec(1.0f64..1e6, 1..5),
        ) {
            let pairs: Vec<Pair> = weights.iter().map(|weight| Pair { weight: *weight, ..pair.clone() }).collect();
            prop_assert!(aggregation_error(&pairs).unwrap() <= 1e-6);
            let mean = dense_mean(&pairs[..1]);
            let found = product(&product_mean(&pairs).unwrap(), pair.shape());
            prop_assert!((found - &mean).norm() <= 1e-6 * mean.norm());
        }

        #[test]
        fn with_a_frozen_the_mean_of_the_factors_is_exact(pairs in any_pairs()) {
            let frozen: Vec<Pair> = pairs.iter().map(|pair| Pair { a: pairs[0].a.clone(), ..pair.clone() }).collect();
            prop_assert!(aggregation_error(&frozen).unwrap() <= 1e-6);
            check_best_approximation(&frozen);
        }

        #[test]
        fn factors_are_balanced_and_their_sign_is_fixed(pairs in any_pairs()) {
            let [rank, inputs, outputs] = pairs[0].shape();
            let factors = product_mean(&pairs).unwrap();
            for component in 0..rank {
                let column: Vec<f32> = (0..outputs).map(|output| factors.b[output * rank + component]).collect();
                let row = &factors.a[component * inputs..(component + 1) * inputs];
                let norm = |values: &[f32]| values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
                let largest = column.iter().copied().fold(0.0f32, |largest, value| {
                    if value.abs() > largest.abs() { value } else { largest }
                });
                prop_assert!(largest >= 0.0);
                let is_spare = norm(&column) == 0.0;
                prop_assert!(is_spare || (norm(&column) - norm(row)).abs() <= 1e-4 * norm(row));
            }
        }
    }

    #[test]
    fn two_products_by_hand() {
        // B·A is [[4, 0], [0, 0]] and [[0, 0], [0, 4]] with equal shares, the mean [[2, 0], [0, 2]]. The mean factors are
        // B̄ = (1, 1) and Ā = (1, 1), their product [[1, 1], [1, 1]]: the error is ‖[[1, -1], [-1, 1]]‖ / ‖[[2, 0], [0, 2]]‖.
        let pairs = [pair(3.0, 1, &[2.0, 0.0], &[2.0, 0.0]), pair(3.0, 1, &[0.0, 2.0], &[0.0, 2.0])];
        let error = aggregation_error(&pairs).unwrap();
        assert!((error - 0.5f64.sqrt()).abs() < 1e-12, "{error}");
        check_best_approximation(&pairs);
    }

    #[test]
    fn the_singular_value_is_split_evenly() {
        // B·A = [[-6, 0], [0, 0]] has the singular value 6.
        let factors = product_mean(&[pair(1.0, 1, &[-3.0, 0.0], &[2.0, 0.0])]).unwrap();
        let root = 6.0f32.sqrt();
        let close = |found: &[f32], expected: [f32; 2]| found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 1e-6);
        assert!(close(&factors.b, [root, 0.0]) && close(&factors.a, [-root, 0.0]), "{:?}, {:?}", factors.b, factors.a);
    }

    #[test]
    fn what_the_rank_leaves_over_can_still_be_trained() {
        // Both rows of A are the same, so that the product has rank 1 where the adapter has rank 2.
        let deficient = pair(1.0, 2, &[1.0, 2.0, 3.0, 1.0, 2.0, 3.0], &[1.0, 1.0, 0.0, 2.0]);
        check_best_approximation(&[deficient.clone(), deficient.clone()]);
        let factors = product_mean(&[deficient]).unwrap();
        assert_eq!([factors.b[1], factors.b[3]], [0.0, 0.0]);
        assert_eq!(factors.a[3..], [1.0, 2.0, 3.0]);
    }

    #[test]
    fn adapters_that_nobody_has_trained_keep_their_mean_a() {
        let pairs = [pair(1.0, 1, &[1.0, 2.0], &[0.0, 0.0, 0.0]), pair(3.0, 1, &[5.0, 2.0], &[0.0, 0.0, 0.0])];
        assert_eq!(aggregation_error(&pairs), Ok(0.0));
        assert_eq!(product_mean(&pairs), Ok(Factors { a: vec![4.0, 2.0], b: vec![0.0; 3] }));
    }

    #[test]
    fn a_pair_without_weight_does_not_count() {
        let counted = pair(2.0, 1, &[1.0, 2.0], &[3.0]);
        let weightless = pair(0.0, 1, &[-9.0, 7.0], &[5.0]);
        assert!(aggregation_error(&[counted.clone(), weightless.clone()]).unwrap() <= 1e-12);
        let mean = product(&product_mean(&[weightless, counted.clone()]).unwrap(), [1, 2, 1]);
        assert!((mean - dense_mean(&[counted])).norm() <= 1e-6);
    }

    #[test]
    fn what_has_no_mean_is_refused() {
        assert_eq!(Pair::new(1.0, 2, &[1.0; 3], &[1.0; 2]).err(), Some(FactorsError::NotOfRank { values: 3, rank: 2 }));
        assert_eq!(Pair::new(1.0, 0, &[1.0], &[1.0]).err(), Some(FactorsError::NotOfRank { values: 1, rank: 0 }));
        assert_eq!(Pair::new(1.0, 2, &[1.0; 2], &[]).err(), Some(FactorsError::NotOfRank { values: 0, rank: 2 }));
        let infinite = Pair::new(1.0, 1, &[1.0], &[1.0, f32::INFINITY]).err();
        assert_eq!(infinite, Some(FactorsError::NotFinite { index: 1 }));
        assert_eq!(Pair::new(-1.0, 1, &[1.0], &[1.0]).err(), Some(FactorsError::BadWeight { weight: -1.0 }));
        assert_eq!(product_mean(&[]), Err(FactorsError::NoWeight { pairs: 0 }));
        assert_eq!(aggregation_error(&[pair(0.0, 1, &[1.0], &[1.0])]), Err(FactorsError::NoWeight { pairs: 1 }));
        let unlike = [pair(1.0, 1, &[1.0], &[1.0]), pair(1.0, 1, &[1.0, 1.0], &[1.0])];
        let wrong_shape = FactorsError::WrongShape { index: 1, expected: [1, 1, 1], found: [1, 2, 1] };
        assert_eq!(product_mean(&unlike), Err(wrong_shape));
    }
}

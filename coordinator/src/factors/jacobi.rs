//! The singular value decomposition of a small matrix by one-sided Jacobi rotations (Hestenes, 1958).
//!
//! nalgebra's own decomposition goes wrong on some matrices of deficient rank (its issue 1172), and those are what equal
//! updates lead to. Here every rotation keeps the matrix that is decomposed, so that the components always sum to it:
//! were the sweeps stopped too early, the first components would be a little worse than the best, and never wrong.

use nalgebra::{DMatrix, DVector};

/// Ten are plenty for matrices of hundreds of columns: convergence is quadratic in the end.
const SWEEPS_MAX: usize = 60;

/// `left` · `right`ᵀ is one term of the matrix. `right` has length 1, and `left` the length `singular_value`.
pub struct Component {
    pub singular_value: f64,
    pub left: DVector<f64>,
    pub right: DVector<f64>,
}

/// As many components as the matrix has columns, from the largest singular value to the smallest.
pub fn components(matrix: &DMatrix<f64>) -> Vec<Component> {
    let columns = matrix.ncols();
    let mut lefts: Vec<DVector<f64>> = matrix.column_iter().map(|column| column.into_owned()).collect();
    let mut rights: Vec<DVector<f64>> =
        DMatrix::identity(columns, columns).column_iter().map(|column| column.into_owned()).collect();
    // Columns whose cosine is below the rounding of a dot product are as good as orthogonal.
    let cosine_min = f64::EPSILON * matrix.nrows() as f64;
    for _sweep in 0..SWEEPS_MAX {
        let mut is_orthogonal = true;
        for second in 1..columns {
            for first in 0..second {
                let (norm_first, norm_second) = (lefts[first].norm(), lefts[second].norm());
                let dot = lefts[first].dot(&lefts[second]);
                if dot.abs() <= cosine_min * norm_first * norm_second {
                    continue;
                }
                is_orthogonal = false;
                // The smaller of the two angles that make the pair orthogonal.
                let cotangent_doubled = (norm_second - norm_first) * (norm_second + norm_first) / (2.0 * dot);
                let tangent = cotangent_doubled.signum() / (cotangent_doubled.abs() + cotangent_doubled.hypot(1.0));
                let cosine = 1.0 / tangent.hypot(1.0);
                rotate(&mut lefts, first, second, cosine, cosine * tangent);
                rotate(&mut rights, first, second, cosine, cosine * tangent);
            }
        }
        if is_orthogonal {
            break;
        }
    }
    let mut components: Vec<Component> = lefts
        .into_iter()
        .zip(rights)
        .map(|(left, right)| Component { singular_value: left.norm(), left, right })
        .collect();
    components.sort_by(|first, second| second.singular_value.total_cmp(&first.singular_value));
    components
}

fn rotate(vectors: &mut [DVector<f64>], first: usize, second: usize, cosine: f64, sine: f64) {
    let (before, after) = vectors.split_at_mut(second);
    for (one, other) in before[first].iter_mut().zip(after[0].iter_mut()) {
        (*one, *other) = (cosine * *one - sine * *other, sine * *one + cosine * *other);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check_decomposition(matrix: &DMatrix<f64>) {
        let components = components(matrix);
        let tolerance = 1e-13 * matrix.norm();
        let mut sum = DMatrix::zeros(matrix.nrows(), matrix.ncols());
        for (index, component) in components.iter().enumerate() {
            sum += &component.left * component.right.transpose();
            assert!((component.right.norm() - 1.0).abs() < 1e-12);
            for other in &components[..index] {
                assert!(other.singular_value >= component.singular_value);
                assert!(component.right.dot(&other.right).abs() < 1e-12, "the right vectors are orthogonal");
                let dot = component.left.dot(&other.left).abs();
                assert!(dot <= tolerance * other.singular_value, "the left vectors are orthogonal, not {dot:e}");
            }
        }
        assert!((sum - matrix).norm() <= tolerance, "the components of {matrix} sum to it");
    }

    #[test]
    fn a_diagonal_is_sorted() {
        let found: Vec<f64> = components(&DMatrix::from_diagonal(&DVector::from_vec(vec![2.0, -7.0, 0.0, 3.0])))
            .iter()
            .map(|component| component.singular_value)
            .collect();
        assert_eq!(found, [7.0, 3.0, 2.0, 0.0]);
    }

    #[test]
    fn singular_values_by_hand() {
        // MᵀM = [[25, 20], [20, 25]] has the eigenvalues 45 and 5.
        let matrix = DMatrix::from_row_slice(2, 2, &[3.0, 0.0, 4.0, 5.0]);
        let [first, second] = &components(&matrix)[..] else { panic!("two columns have two components") };
        assert!((first.singular_value - 45f64.sqrt()).abs() < 1e-14);
        assert!((second.singular_value - 5f64.sqrt()).abs() < 1e-14);
    }

    #[test]
    fn zeros_and_tiny_numbers_are_decomposed() {
        check_decomposition(&DMatrix::zeros(3, 2));
        check_decomposition(&DMatrix::from_element(4, 4, 1.0));
        let tiny = DMatrix::from_row_slice(2, 2, &[3.0, 0.0, 4.0, 5.0]) * 1e-90;
        check_decomposition(&tiny);
    }

    proptest! {
        #[test]
        fn any_matrix_is_the_sum_of_its_components(
            (rows, columns, rank) in (1..9usize, 1..9usize, 1..9usize),
            values in prop::collection::vec(-2.0f64..2.0, 2 * 8 * 8),
        ) {
            let left = DMatrix::from_column_slice(rows, rank, &values[..rows * rank]);
            let right = DMatrix::from_column_slice(rank, columns, &values[64..64 + rank * columns]);
            check_decomposition(&(left * right));
        }
    }
}

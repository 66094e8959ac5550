//! Plain numbers at the edges of a stage.

use crate::ModelError;

/// Row-major `[rows, columns]` values in f32; at a cut a row is a token and a column a channel of the residual stream.
#[derive(Clone, PartialEq)]
pub struct Matrix {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    /// # Panics
    /// If `values` does not hold `rows × columns` numbers; what comes from a peer is checked before it gets here.
    pub fn new(rows: usize, columns: usize, values: Vec<f32>) -> Self {
        assert_eq!(rows * columns, values.len(), "matrix of {rows} × {columns}");
        Self { rows, columns, values }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    pub fn values(&self) -> &[f32] {
        &self.values
    }

    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns..(row + 1) * self.columns]
    }

    /// Appends the rows of `below`, which has as many columns.
    pub(crate) fn on_top_of(mut self, below: Self) -> Self {
        self.values.extend(below.values);
        Self::new(self.rows + below.rows, self.columns, self.values)
    }

    pub fn into_values(self) -> Vec<f32> {
        self.values
    }
}

/// Prints the shape alone: activations and gradients never reach a log.
impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matrix[{}, {}]", self.rows, self.columns)
    }
}

/// Lengths of the sequences that are packed into one micro-batch: each attends to itself alone and counts its
/// positions from 0, and there is no padding between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    lengths: Vec<usize>,
}

impl Segments {
    pub fn new(lengths: Vec<usize>) -> Result<Self, ModelError> {
        if lengths.is_empty() || lengths.contains(&0) {
            return Err(ModelError::Mismatch("a micro-batch needs segments of at least one token".into()));
        }
        Ok(Self { lengths })
    }

    pub fn one(length: usize) -> Self {
        Self { lengths: vec![length] }
    }

    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// `(start, length)` of every segment.
    pub fn spans(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.lengths.iter().scan(0, |start, &length| {
            let span = (*start, length);
            *start += length;
            Some(span)
        })
    }
}

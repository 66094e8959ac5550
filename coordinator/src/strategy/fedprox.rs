//! FedProx (Li et al., arXiv 1812.06127, algorithm 2): on the coordinator, this is FedAvg and nothing more.
//!
//! What makes it FedProx happens at the participants, whose loss has the term `mu / 2 · ‖w - w_global‖²`, that is, whose
//! gradient has `mu · (w - w_global)` in every local step. The mean then needs no `mu`.

use super::{FedAvg, Strategy, StrategyError, Update};

pub struct FedProx;

impl Strategy for FedProx {
    fn aggregate(&mut self, global: &[f32], updates: &[Update<'_>]) -> Result<Vec<f32>, StrategyError> {
        FedAvg.aggregate(global, updates)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::strategy::tests::check_aggregate;

    #[test]
    fn the_coordinators_part_is_the_weighted_mean() {
        // (1·1 + 4·6) / 5 = 5
        check_aggregate(&mut FedProx, &[0.0], &[(1.0, &[1.0]), (4.0, &[6.0])], &[5.0]);
    }
}

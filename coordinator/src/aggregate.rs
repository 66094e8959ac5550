//! A round's updates become the next global adapter.

use experiment::{Average, Experiment};
use model::{Adapter, ModelError};

use crate::factors::{self, FactorsError, Pair};
use crate::strategy::{self, Strategy, StrategyError, Update};

pub struct Aggregator {
    strategy: Box<dyn Strategy + Send + Sync>,
    average: Average,
}

/// One member's adapter: the blocks it trained itself, and the body trained for it alone if there is one.
pub struct Member {
    /// Its trained tokens.
    pub weight: f64,
    pub adapter: Adapter,
}

pub struct Aggregate {
    /// Of all blocks.
    pub adapter: Adapter,
    /// ‖mean(B·A) − B̄·Ā‖ / ‖mean(B·A)‖ over all layers the members trained.
    pub error: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum AggregateError {
    #[error("failed to {0}")]
    Strategy(#[from] StrategyError),
    #[error("failed to {0}")]
    Factors(#[from] FactorsError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("the members trained different blocks")]
    DifferentBlocks,
    #[error(
        "failed to aggregate: the updates are so large that values of the aggregate are not finite, or above {}; a smaller \
         `training.learning_rate` keeps updates small, and the strategies `median` and `trimmed_mean` bear single absurd ones",
        wire::limits::VALUE_MAX
    )]
    TooLarge,
}

impl Aggregator {
    pub fn new(experiment: &Experiment) -> Self {
        let federation = &experiment.federation;
        Self { strategy: strategy::from_experiment(&federation.strategy), average: federation.average }
    }

    pub fn strategy(&self) -> &dyn Strategy {
        &*self.strategy
    }

    pub fn strategy_mut(&mut self) -> &mut dyn Strategy {
        &mut *self.strategy
    }

    /// `global` is the adapter the round began with; `body` replaces its blocks where the members shared one. Blocks that
    /// nobody trained stay.
    pub fn aggregate(
        &mut self,
        global: &Adapter,
        members: &[Member],
        body: Option<Adapter>,
    ) -> Result<Aggregate, AggregateError> {
        let blocks = members.first().map(|member| member.adapter.blocks()).unwrap_or_default();
        if members.iter().any(|member| member.adapter.blocks() != blocks) {
            return Err(AggregateError::DifferentBlocks);
        }
        let trained = global.filtered(|block| blocks.contains(&block));
        let pairs = pairs_by_layer(members)?;
        let mut squares = [0.0, 0.0];
        for layer in &pairs {
            for (sum, norm) in squares.iter_mut().zip(factors::aggregation_norms(layer)?) {
                *sum += norm * norm;
            }
        }
        let error = if squares[1] == 0.0 { 0.0 } else { (squares[0] / squares[1]).sqrt() };
        let trained = match self.average {
            Average::Factors => {
                let flats: Vec<Vec<f32>> = members.iter().map(|member| member.adapter.flat()).collect();
                let updates: Vec<Update<'_>> = members
                    .iter()
                    .zip(&flats)
                    .map(|(member, values)| Update { weight: member.weight, values })
                    .collect();
                trained.with_flat(&self.strategy.aggregate(&trained.flat(), &updates)?)?
            }
            Average::Product => {
                let means = pairs.iter().map(|layer| factors::product_mean(layer));
                let means: Vec<factors::Factors> = means.collect::<Result<_, _>>()?;
                trained.with_tensors(means.into_iter().flat_map(|mean| [mean.a, mean.b]).collect())?
            }
        };
        let mut replaced = blocks;
        let mut parts = vec![trained];
        if let Some(body) = body {
            replaced.extend(body.blocks());
            parts.push(body);
        }
        parts.push(global.filtered(|block| !replaced.contains(&block)));
        let adapter = Adapter::join(parts)?;
        // A round that could not be read again, or not be sent, must not be written.
        if wire::first_not_finite(&adapter.flat()).is_some() {
            return Err(AggregateError::TooLarge);
        }
        Ok(Aggregate { adapter, error })
    }
}

/// The members' factors, layer by layer.
fn pairs_by_layer(members: &[Member]) -> Result<Vec<Vec<Pair>>, FactorsError> {
    let mut layers: Vec<Vec<Pair>> = Vec::new();
    for member in members {
        let rank = member.adapter.config.rank as usize;
        for (layer, [a, b]) in member.adapter.pairs().enumerate() {
            let pair = Pair::new(member.weight, rank, &a.values, &b.values)?;
            match layers.get_mut(layer) {
                Some(pairs) => pairs.push(pair),
                None => layers.push(vec![pair]),
            }
        }
    }
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use experiment::Seed;
    use model::source::random::RandomModel;
    use model::{AdapterConfig, Source};

    use super::*;

    fn experiment(change: fn(&mut experiment::Federation)) -> Experiment {
        let mut experiment = Experiment::from_toml(include_str!("../../configs/smoke.toml"), "smoke.toml").unwrap();
        change(&mut experiment.federation);
        experiment
    }

    fn adapter(experiment: &Experiment, seed: u64) -> Adapter {
        let shape = experiment.model.random.as_ref().unwrap();
        let model = RandomModel::new(shape, Seed(1)).unwrap();
        let config = AdapterConfig::new(&experiment.adapter);
        let adapter = Adapter::seeded(config, model.config(), 0..model.config().blocks, Seed(seed)).unwrap();
        // Every factor away from zero.
        let away = |i: usize| ((i as u64 * (seed + 3)) % 7) as f32 * 0.01 - 0.03;
        let flat: Vec<f32> = adapter.flat().iter().enumerate().map(|(i, x)| x + away(i)).collect();
        adapter.with_flat(&flat).unwrap()
    }

    #[test]
    fn one_member_becomes_the_global_adapter_bit_for_bit() {
        let experiment = experiment(|_| ());
        let (global, update) = (adapter(&experiment, 1), adapter(&experiment, 2));
        let members = [Member { weight: 17.0, adapter: update.clone() }];
        let aggregate = Aggregator::new(&experiment).aggregate(&global, &members, None).unwrap();
        assert_eq!(aggregate.adapter, update);
        assert_eq!(aggregate.error, 0.0);
    }

    #[test]
    fn untrained_blocks_stay_and_a_shared_body_takes_its_place() {
        let experiment = experiment(|_| ());
        let (global, update, body) = (adapter(&experiment, 1), adapter(&experiment, 2), adapter(&experiment, 3));
        let ends = update.filtered(|block| block == 0 || block == 3);
        let members = [Member { weight: 1.0, adapter: ends }];
        let mut aggregator = Aggregator::new(&experiment);
        let kept = aggregator.aggregate(&global, &members, None).unwrap().adapter;
        assert_eq!(kept.part(1..3), global.part(1..3));
        let shared = aggregator.aggregate(&global, &members, Some(body.part(1..3))).unwrap().adapter;
        assert_eq!((shared.part(0..1), shared.part(1..3)), (update.part(0..1), body.part(1..3)));
    }

    #[test]
    fn the_mean_of_products_has_the_product_that_the_mean_of_factors_misses() {
        let experiment = experiment(|federation| federation.average = Average::Product);
        let global = adapter(&experiment, 1);
        let members = [2, 3].map(|seed| Member { weight: 1.0, adapter: adapter(&experiment, seed) });
        let aggregate = Aggregator::new(&experiment).aggregate(&global, &members, None).unwrap();
        assert!(aggregate.error > 0.01, "{}", aggregate.error);
        // Two members of half the adapter's rank fit into it exactly.
        let deltas = |adapter: &Adapter| adapter.pairs().map(|pair| adapter.delta(pair)).collect::<Vec<_>>();
        let (a, b, mean) = (deltas(&members[0].adapter), deltas(&members[1].adapter), deltas(&aggregate.adapter));
        let expected: f64 =
            a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| f64::from((a + b) / 2.0).powi(2)).sum();
        let found: f64 = mean.iter().flatten().map(|x| f64::from(*x).powi(2)).sum();
        assert!(found <= expected * 1.000001 && found > expected * 0.5, "{found} of {expected}");
    }

    /// All that each of them sent is within the wire's limits.
    #[test]
    fn an_aggregate_that_nobody_could_fetch_is_none() {
        let experiment = experiment(|federation| federation.average = Average::Product);
        let global = adapter(&experiment, 1);
        let huge = global.with_flat(&vec![1e18; global.flat().len()]).unwrap();
        let members = [Member { weight: 1.0, adapter: huge }, Member { weight: 1.0, adapter: global.clone() }];
        let refused = Aggregator::new(&experiment).aggregate(&global, &members, None).err().unwrap();
        assert!(matches!(refused, AggregateError::TooLarge), "{refused}");
        assert!(
            refused.to_string().contains("1000000000000000000") && refused.to_string().contains("median"),
            "{refused}"
        );
    }

    #[test]
    fn members_of_different_blocks_are_refused() {
        let experiment = experiment(|_| ());
        let whole = adapter(&experiment, 1);
        let members = [whole.part(0..1), whole.part(0..2)].map(|adapter| Member { weight: 1.0, adapter });
        let refused = Aggregator::new(&experiment).aggregate(&whole, &members, None);
        assert!(matches!(refused, Err(AggregateError::DifferentBlocks)));
    }
}

//! The numbers of a run: what its rows add up to.
//!
//! Tokens, times and bytes count all the work that was done, also what a crash or a refused update made useless. Losses
//! and rounds count once: what was repeated after a crash replaces what was there.

use std::collections::BTreeMap;

use experiment::{Experiment, Row, SplitMode};
use serde::Serialize;

use super::traffic::{Connections, Directions, Traffic};

/// Numbers that are not finite become `null` in JSON.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    pub experiment: String,
    pub split: SplitMode,
    pub software: Option<String>,
    pub experiment_digest: Option<String>,
    pub model_digest: Option<String>,
    /// How often the coordinator was started.
    pub starts: usize,
    pub rounds_planned: u32,
    /// Finished rounds whose rows the metrics lack: of what they have cost, only what their directories say is known.
    pub lost_rounds: Vec<u32>,
    /// Why the run ended; none while it goes on, or when it was broken off.
    pub finished: Option<String>,
    /// From the start to the end of a finished run, of all rounds otherwise.
    pub duration_ms: f64,
    /// Mean of the devices' held-out losses, over those that evaluated both before and after.
    pub held_out: Option<HeldOut>,
    /// The participants behind that mean.
    pub held_out_participants: usize,
    pub tokens: u64,
    /// Of all participants together, over the duration of the rounds.
    pub tokens_per_s: Option<f64>,
    pub participants: Vec<Participant>,
    pub rounds: Vec<Round>,
    pub body: Option<BodyTime>,
    pub traffic: Traffic,
    pub bytes_per_token: Option<f64>,
    pub overhead_percent: Option<f64>,
    pub gap_percent: Option<f64>,
    pub departures: Vec<Departure>,
    /// Of the participants' rows and of the coordinator's, where anything measured it.
    pub energy_j: Option<f64>,
    pub coordinator_energy_j: Option<f64>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Participant {
    pub name: String,
    pub held_out: Option<HeldOut>,
    pub steps: u64,
    /// Trained tokens.
    pub tokens: u64,
    /// Over the time of its steps, computing and waiting.
    pub tokens_per_s: Option<f64>,
    pub compute_ms: f64,
    pub wait_ms: f64,
    pub updates_accepted: u32,
    pub updates_refused: u32,
    pub departures: u32,
    pub traffic: Traffic,
    pub down_bytes_per_token: Option<f64>,
    pub up_bytes_per_token: Option<f64>,
    pub energy_j: Option<f64>,
}

/// Held-out loss of the base and of the newest adapter that was evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HeldOut {
    pub before: Loss,
    pub after: Loss,
    /// The round whose adapter `after` is; of a mean, the earliest.
    pub after_round: u32,
    /// Of the loss in nats; negative is better.
    pub change_percent: f64,
}

/// Mean per token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Loss {
    pub nats: f64,
    pub perplexity: f64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Round {
    pub round: u32,
    pub members: Vec<String>,
    pub loss_nats: f64,
    pub tokens: u64,
    pub duration_ms: f64,
    pub aggregation_error: Option<f64>,
    pub body: BodyTime,
    /// Mean of the held-out losses of those who evaluated this round's adapter.
    pub held_out_nats: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BodyTime {
    pub compute_ms: f64,
    pub idle_ms: f64,
    pub compute_percent: f64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Departure {
    pub round: u32,
    pub participant: String,
    pub reason: String,
}

impl Summary {
    pub fn new(experiment: &Experiment, rows: &[Row]) -> Self {
        let mut sums = Sums::default();
        rows.iter().for_each(|row| sums.add(row));
        let Sums { run, starts, finished, participants, rounds, departures, coordinator_energy_j } = sums;

        let mut losses_by_round = BTreeMap::<u32, Vec<f64>>::new();
        for (round, nats) in participants.values().flat_map(|participant| &participant.held_out) {
            losses_by_round.entry(*round).or_default().push(*nats);
        }
        let rounds: Vec<Round> = rounds
            .into_values()
            .map(|round| {
                let losses = losses_by_round.get(&round.round);
                Round { held_out_nats: losses.map(|losses| mean(losses.iter().copied())), ..round }
            })
            .collect();
        let participants: Vec<_> = participants.into_iter().map(|(name, sums)| sums.finish(name)).collect();

        let rounds_ms: f64 = rounds.iter().map(|round| round.duration_ms).fold(0.0, |sum, ms| sum + ms);
        let mut traffic = Traffic::default();
        participants.iter().for_each(|participant| traffic.add(&participant.traffic));
        let tokens = participants.iter().map(|participant| participant.tokens).fold(0, u64::saturating_add);
        // Where the rows of steps are lost, the rounds were trained all the same.
        let tokens = tokens.max(rounds.iter().map(|round| round.tokens).fold(0, u64::saturating_add));
        let held_out: Vec<_> = participants.iter().filter_map(|participant| participant.held_out).collect();
        let energies = participants.iter().filter_map(|participant| participant.energy_j).chain(coordinator_energy_j);
        let some_udp = traffic.udp.total_bytes() > 0;
        let (software, experiment_digest, model_digest) = run.unwrap_or_default();
        Self {
            experiment: experiment.name.clone(),
            split: experiment.split.mode,
            software,
            experiment_digest,
            model_digest,
            starts,
            rounds_planned: experiment.federation.rounds,
            lost_rounds: Vec::new(),
            duration_ms: finished.as_ref().map_or(rounds_ms, |(_, duration_ms)| *duration_ms),
            finished: finished.map(|(reason, _)| reason),
            held_out: HeldOut::mean(&held_out),
            held_out_participants: held_out.len(),
            tokens,
            tokens_per_s: share(rounds.iter().map(|round| round.tokens as f64).sum::<f64>() * 1e3, rounds_ms),
            body: BodyTime::sum(rounds.iter().map(|round| round.body)),
            bytes_per_token: share(traffic.messages.total_bytes() as f64, tokens as f64),
            overhead_percent: some_udp.then(|| traffic.overhead_percent()),
            gap_percent: some_udp.then(|| traffic.gap_percent()),
            energy_j: energies.reduce(|sum, energy_j| sum + energy_j),
            participants,
            rounds,
            traffic,
            departures,
            coordinator_energy_j,
        }
    }
}

type RunIdentity = (Option<String>, Option<String>, Option<String>);

/// What is known after some of the rows.
#[derive(Default)]
struct Sums {
    run: Option<RunIdentity>,
    starts: usize,
    finished: Option<(String, f64)>,
    participants: BTreeMap<String, ParticipantSums>,
    rounds: BTreeMap<u32, Round>,
    departures: Vec<Departure>,
    coordinator_energy_j: Option<f64>,
}

impl Sums {
    fn add(&mut self, row: &Row) {
        match row {
            Row::Run { experiment_digest, model_digest, software, energy_j, .. } => {
                let [software, experiment, model] =
                    [software, experiment_digest, model_digest].map(|text| Some(text.clone()));
                self.run = Some((software, experiment, model));
                self.starts += 1;
                // A run that was continued has not finished yet, and nobody is connected to its new coordinator.
                self.finished = None;
                self.participants.values_mut().for_each(|participant| participant.connections.close());
                add_energy(&mut self.coordinator_energy_j, *energy_j);
            }
            Row::Step { participant, loss_nats: _, tokens, compute_ms, wait_ms, energy_j, .. } => {
                let sums = self.participant(participant);
                sums.steps += 1;
                sums.tokens = sums.tokens.saturating_add(*tokens);
                sums.compute_ms += compute_ms;
                sums.wait_ms += wait_ms;
                add_energy(&mut sums.energy_j, *energy_j);
            }
            Row::Evaluation { round, participant, loss_nats, energy_j, .. } => {
                let sums = self.participant(participant);
                sums.held_out.insert(*round, *loss_nats);
                add_energy(&mut sums.energy_j, *energy_j);
            }
            Row::Update { participant, accepted, energy_j, .. } => {
                let sums = self.participant(participant);
                *if *accepted { &mut sums.updates_accepted } else { &mut sums.updates_refused } += 1;
                add_energy(&mut sums.energy_j, *energy_j);
            }
            Row::Round {
                round,
                members,
                loss_nats,
                tokens,
                duration_ms,
                aggregation_error,
                body_compute_ms,
                body_idle_ms,
                energy_j,
            } => {
                let (round, loss_nats, tokens, duration_ms) = (*round, *loss_nats, *tokens, *duration_ms);
                let (members, aggregation_error) = (members.clone(), *aggregation_error);
                let body = BodyTime::new(*body_compute_ms, *body_idle_ms);
                let held_out_nats = None;
                let done =
                    Round { round, members, loss_nats, tokens, duration_ms, aggregation_error, body, held_out_nats };
                self.rounds.insert(round, done);
                add_energy(&mut self.coordinator_energy_j, *energy_j);
            }
            Row::Bytes {
                participant,
                sent,
                received,
                udp_sent,
                udp_received,
                overhead_sent,
                overhead_received,
                energy_j,
                ..
            } => {
                let udp = Directions { down_bytes: *udp_sent, up_bytes: *udp_received };
                let overhead = Directions { down_bytes: *overhead_sent, up_bytes: *overhead_received };
                let sums = self.participant(participant);
                sums.connections.count(Traffic::new(sent, received, udp, overhead));
                add_energy(&mut sums.energy_j, *energy_j);
            }
            Row::Departure { round, participant, reason, energy_j } => {
                let (round, participant, reason) = (*round, participant.clone(), reason.clone());
                let sums = self.participant(&participant);
                sums.departures += 1;
                add_energy(&mut sums.energy_j, *energy_j);
                self.departures.push(Departure { round, participant, reason });
            }
            Row::Finished { reason, duration_ms, energy_j, .. } => {
                self.finished = Some((reason.clone(), *duration_ms));
                add_energy(&mut self.coordinator_energy_j, *energy_j);
            }
        }
    }

    fn participant(&mut self, name: &str) -> &mut ParticipantSums {
        self.participants.entry(name.to_owned()).or_default()
    }
}

#[derive(Default)]
struct ParticipantSums {
    /// Nats by round.
    held_out: BTreeMap<u32, f64>,
    steps: u64,
    tokens: u64,
    compute_ms: f64,
    wait_ms: f64,
    updates_accepted: u32,
    updates_refused: u32,
    departures: u32,
    connections: Connections,
    energy_j: Option<f64>,
}

impl ParticipantSums {
    fn finish(self, name: String) -> Participant {
        let Self {
            steps, tokens, compute_ms, wait_ms, updates_accepted, updates_refused, departures, energy_j, ..
        } = self;
        let base = self.held_out.get(&0).copied();
        let newest = self.held_out.range(1..).next_back();
        let held_out = base.zip(newest).map(|(before, (round, after))| HeldOut::new(before, *after, *round));
        let traffic = self.connections.total();
        let Directions { down_bytes, up_bytes } = traffic.messages;
        Participant {
            name,
            held_out,
            steps,
            tokens,
            tokens_per_s: share(tokens as f64 * 1e3, compute_ms + wait_ms),
            compute_ms,
            wait_ms,
            updates_accepted,
            updates_refused,
            departures,
            down_bytes_per_token: share(down_bytes as f64, tokens as f64),
            up_bytes_per_token: share(up_bytes as f64, tokens as f64),
            traffic,
            energy_j,
        }
    }
}

impl HeldOut {
    fn new(before_nats: f64, after_nats: f64, after_round: u32) -> Self {
        let change_percent = 100.0 * (after_nats - before_nats) / before_nats;
        Self { before: Loss::new(before_nats), after: Loss::new(after_nats), after_round, change_percent }
    }

    /// Of the losses in nats; the perplexity is that of the mean loss.
    fn mean(devices: &[Self]) -> Option<Self> {
        let after_round = devices.iter().map(|device| device.after_round).min()?;
        let before = mean(devices.iter().map(|device| device.before.nats));
        Some(Self::new(before, mean(devices.iter().map(|device| device.after.nats)), after_round))
    }
}

impl Loss {
    fn new(nats: f64) -> Self {
        Self { nats, perplexity: nats.exp() }
    }
}

impl BodyTime {
    fn new(compute_ms: f64, idle_ms: f64) -> Self {
        Self { compute_ms, idle_ms, compute_percent: 100.0 * compute_ms / (compute_ms + idle_ms) }
    }

    /// None where no body worked here: with `whole`, there is none.
    fn sum(times: impl Iterator<Item = Self>) -> Option<Self> {
        let (compute_ms, idle_ms) = times
            .fold((0.0, 0.0), |(compute_ms, idle_ms), time| (compute_ms + time.compute_ms, idle_ms + time.idle_ms));
        (compute_ms > 0.0).then(|| Self::new(compute_ms, idle_ms))
    }
}

fn add_energy(sum: &mut Option<f64>, energy_j: Option<f64>) {
    if let Some(energy_j) = energy_j {
        *sum = Some(sum.unwrap_or(0.0) + energy_j);
    }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0u32), |(sum, count), value| (sum + value, count + 1));
    sum / f64::from(count)
}

fn share(part: f64, of: f64) -> Option<f64> {
    (of > 0.0).then(|| part / of)
}

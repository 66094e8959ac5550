//! A simulated device's lives.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use model::source::BlobStore;
use participant::ParticipantError;
use participant::data::Record;
use participant::join::{Persistence, finish};
use participant::session::{Keep, Participant, Reporter};
use participant::stages::Stages;
use participant::trainer::StepReport;
use storage::Disk;
use tokio::time::sleep;

use crate::run::Sim;
use crate::site::LOCAL_STEPS;

/// How long a device tries to reach the coordinator.
const PATIENCE: Duration = Duration::from_secs(3600);

pub async fn live(sim: Arc<Sim>, i: usize, records: Vec<Record>, stages: Arc<Stages>, store: PathBuf) {
    let machine = sim.devices[i].clone();
    let store = if sim.plan.fetches { sim.directory.join("store") } else { store }.join(&machine.name);
    loop {
        let disk = machine.boot();
        let participant = participant(&sim, i, disk, records.clone(), stages.clone(), store.clone());
        let mut process = tokio::spawn(take_part(sim.clone(), i, participant));
        let ended = tokio::select! {
            biased;
            restart = machine.killed() => Err(restart),
            ended = &mut process => Ok(ended),
        };
        match ended {
            Ok(Ok(Ok(reason))) if reason == "completed" => {
                sim.trace.say(&machine.name, "is done");
                return machine.halt();
            }
            Ok(Ok(Ok(reason))) => {
                sim.trace.say(&machine.name, format_args!("is sent home: {reason}"));
                machine.halt();
                sleep(Duration::from_millis(machine.draw(50..3000))).await;
            }
            Ok(Ok(Err(error))) => {
                // Its disk is the one thing that may stop a device.
                if !matches!(error, ParticipantError::Storage(_)) {
                    sim.trace.violated(format_args!("{} gives up: {error}", machine.name));
                    return;
                }
                sim.trace.say(&machine.name, format_args!("has failed: {error}"));
                machine.halt();
                sleep(Duration::from_millis(machine.draw(50..3000))).await;
            }
            Ok(Err(_)) => sleep(machine.killed().await).await,
            Err(restart) => {
                process.abort();
                let _ = process.await;
                sleep(restart).await;
            }
        }
    }
}

async fn take_part(sim: Arc<Sim>, i: usize, mut participant: Participant) -> Result<String, ParticipantError> {
    let mut persistence = Persistence::new(PATIENCE);
    loop {
        let welcomes = participant.welcomes;
        let name = participant.name.clone();
        let ended = match sim.connect(i, &name).await {
            Ok(connection) => {
                sim.devices[i].pass("a connection is made");
                let ran = participant.run(&connection).await;
                finish(&connection, ran).await
            }
            Err(error) => Err(error.into()),
        };
        match ended {
            Ok(reason) => return Ok(reason),
            Err(error) => {
                sim.trace.say(&name, format_args!("is not connected: {error}"));
                sim.devices[i].pass("a connection is lost");
                persistence.after(error, participant.welcomes != welcomes).await?;
            }
        }
    }
}

fn participant(
    sim: &Arc<Sim>,
    i: usize,
    disk: Disk,
    records: Vec<Record>,
    stages: Arc<Stages>,
    store: PathBuf,
) -> Participant {
    let name = sim.devices[i].name.clone();
    Participant {
        keep: Some(Keep { directory: sim.directory.join(&name).join("training"), disk }),
        name,
        records: Box::new(move |_| Ok(records.clone())),
        store: BlobStore::open(store).expect("a store can be made"),
        model: None,
        device: Default::default(),
        prepared: None,
        measured: Default::default(),
        welcomes: 0,
        stages,
        reporter: Arc::new(Reports { sim: sim.clone(), i }),
    }
}

struct Reports {
    sim: Arc<Sim>,
    i: usize,
}

impl Reporter for Reports {
    fn step(&self, round: u32, report: &StepReport) {
        let machine = &self.sim.devices[self.i];
        let StepReport { step, loss_nats, .. } = report;
        self.sim.trace.say(&machine.name, format_args!("round {round} step {step} loss {:x}", loss_nats.to_bits()));
        let mut seen = self.sim.seen();
        seen.steps[self.i] += 1;
        let acknowledged = (round, step + 1 - u64::from(round - 1) * LOCAL_STEPS);
        let known = seen.acknowledged.entry(machine.name.clone()).or_insert(acknowledged);
        *known = acknowledged.max(*known);
        drop(seen);
        machine.pass("a step is done");
    }

    fn evaluated(&self, round: u32, loss_nats: f64, _: u64) {
        let machine = &self.sim.devices[self.i];
        self.sim.trace.say(&machine.name, format_args!("round {round} evaluated {:x}", loss_nats.to_bits()));
        machine.pass("an adapter is evaluated");
    }

    fn round_closed(&self, round: u32, outcome: &str) {
        let machine = &self.sim.devices[self.i];
        self.sim.trace.say(&machine.name, format_args!("round {round} {outcome}"));
        let mut seen = self.sim.seen();
        match outcome {
            "aggregated" => seen.told = seen.told.max(round),
            // The coordinator had given it up before it said so.
            _ => _ = seen.acknowledged.remove(&machine.name),
        }
        drop(seen);
        machine.pass("a round is closed");
    }
}

//! A device of the cohort that says what is not so. Nothing of it may end up in the weights.

use std::sync::Arc;
use std::time::Duration;

use experiment::Seed;
use net::{Connection, NetError, StreamKind};
use rand::Rng;
use rand_chacha::ChaCha20Rng;
use tokio::time::{sleep, timeout};
use wire::{
    CODEC_PLAIN, DType, FrameKind, FromCoordinator, FromParticipant, MessageKind, Purpose, Request, Shape, TensorHeader,
};

use crate::run::Sim;

const NAME: &str = "liar";
const WIDTH: u32 = 16;

pub async fn live(sim: Arc<Sim>) {
    let mut random = Seed(sim.plan.seed).generator("liar");
    let mut told = 0;
    while told < sim.plan.lies {
        if let Ok(connection) = sim.connect(usize::MAX, NAME).await {
            // The evaluation after the last round waits for whoever is connected.
            let lied = timeout(Duration::from_secs(600), lie(&sim, &connection, &mut random, &mut told)).await;
            sim.trace.say(NAME, format_args!("has lied: {lied:?}"));
        }
        sleep(Duration::from_millis(random.random_range(100..5000))).await;
    }
}

async fn lie(sim: &Sim, connection: &Connection, random: &mut ChaCha20Rng, told: &mut usize) -> Result<(), NetError> {
    let (mut send, mut receive) = connection.open(StreamKind::Control).await?;
    let software = "a liar".into();
    send.message(&FromParticipant::Hello {
        minor: wire::MINOR,
        dtypes: vec![DType::F32],
        codecs: vec![CODEC_PLAIN],
        software,
    })
    .await?;
    let FromCoordinator::Welcome { session, experiment_digest, .. } = receive.message().await? else { return Ok(()) };
    send.message(&FromParticipant::Ready { experiment_digest }).await?;
    let (round, attempt, first_step) = loop {
        match receive.message().await? {
            FromCoordinator::StartRound { round, attempt, first_step, train: true, .. }
            | FromCoordinator::ResumeRound { round, attempt, first_step, .. } => break (round, attempt, first_step),
            FromCoordinator::Measure { round } => {
                *told += 1;
                sim.trace.say(NAME, format_args!("claims to have measured round {round}"));
                let (mut ask, mut answer) = connection.open(StreamKind::Bulk).await?;
                ask.message(&Request::ChannelSums { round, tokens: 8, tensors: Vec::new() }).await?;
                ask.finish();
                let _: wire::UpdateReply = answer.message().await?;
            }
            FromCoordinator::Finish { .. } | FromCoordinator::Refused { .. } => return Ok(()),
            _ => {}
        }
    };
    let which = random.random_range(0..9);
    *told += 1;
    sim.trace.say(NAME, format_args!("tells lie {which} in round {round}"));
    let step = |session, step| Request::Step {
        session,
        round,
        attempt,
        step,
        micro: 0,
        micros: 2,
        purpose: Purpose::Train,
        segments: vec![8],
        trained_tokens: 8,
        step_tokens: 16,
    };
    let header = |kind| TensorHeader {
        kind,
        dtype: DType::F32,
        session,
        round,
        step: first_step,
        micro: 0,
        shape: Shape::new(&[8, WIDTH]).expect("a small shape"),
    };
    let values = |value: f32| vec![value; 8 * WIDTH as usize];
    let mut streams = Vec::new();
    match which {
        // Steps that it has never done.
        0 => {
            let (mut ask, mut answer) = connection.open(StreamKind::Bulk).await?;
            let update = Request::Update { round, attempt, tokens: 1 << 20, loss_nats: 0.1, tensors: Vec::new() };
            ask.message(&update).await?;
            ask.finish();
            let _: wire::UpdateReply = answer.message().await?;
        }
        // Numbers that are none.
        1 => {
            let (mut ask, answer) = connection.open(StreamKind::Step { age: 0 }).await?;
            ask.message(&step(session, first_step)).await?;
            let bytes: Vec<u8> = values(f32::NAN).iter().flat_map(|value| value.to_le_bytes()).collect();
            let header = header(FrameKind::Activations).encode(wire::crc32c(&bytes));
            ask.bytes(MessageKind::Activations, &header).await?;
            ask.bytes(MessageKind::Activations, &bytes).await?;
            streams.push((ask, answer));
        }
        // Another session's step, and one that is not due.
        2 | 3 => {
            let (mut ask, answer) = connection.open(StreamKind::Step { age: 0 }).await?;
            ask.message(&if which == 2 { step(session + 1, first_step) } else { step(session, first_step + 1) })
                .await?;
            ask.tensor(&header(FrameKind::Activations), &values(0.5)).await?;
            streams.push((ask, answer));
        }
        // A gradient that overflows.
        4 => {
            let (mut ask, mut answer) = connection.open(StreamKind::Step { age: 0 }).await?;
            ask.message(&step(session, first_step)).await?;
            ask.tensor(&header(FrameKind::Activations), &values(0.5)).await?;
            answer.tensor(&header(FrameKind::Activations)).await?;
            ask.tensor(&header(FrameKind::CutGradient), &values(3e38)).await?;
            streams.push((ask, answer));
        }
        // A step on record that never was.
        5 => {
            let (step, tokens) = (first_step, 16);
            let report =
                FromParticipant::StepFinished { round, step, loss_nats: 1.0, tokens, compute_ms: 1.0, wait_ms: 1.0 };
            send.message(&report).await?;
        }
        6 => {
            send.message(&FromParticipant::Evaluated { round: round - 1, loss_nats: 1e-9, tokens: 1 << 30 }).await?;
        }
        // A second hello.
        7 => send.message(&FromParticipant::Ready { experiment_digest }).await?,
        // Nothing at all, for a while.
        _ => {}
    }
    let _ = timeout(Duration::from_secs(60), connection.closed()).await;
    drop(streams);
    Ok(())
}

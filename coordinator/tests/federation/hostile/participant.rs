//! A participant by hand: it speaks the protocol up to the point where a test lets it break it.

use model::Adapter;
use net::{Connection, NetError, RecvStream, SendStream, StreamKind};
use wire::{
    BlobRef, CODEC_PLAIN, CloseCode, Commit, DType, FrameKind, FromCoordinator, FromParticipant, Purpose,
    RefusalReason, Request, Shape, SquaredNorms, TensorHeader, TensorInfo, UpdateReply,
};

use super::{HOSTILE, TOKENS, check_closed};
use crate::world::{Coordinator, World};

/// A participant by hand. Its hidden states are invented; a coordinator cannot know that.
pub struct Hostile {
    pub connection: Connection,
    pub send: SendStream,
    pub receive: RecvStream,
    pub session: u64,
    pub experiment_digest: [u8; 32],
    pub experiment_toml: String,
    pub manifest: BlobRef,
    pub width: u32,
    pub local_steps: u64,
    /// Names and shapes of the tensors that an update holds.
    pub trained: Vec<TensorInfo>,
}

/// One micro-batch, the only one of its step. Tests change the field that is to be wrong.
#[derive(Clone)]
pub struct Step {
    pub session: u64,
    pub round: u32,
    pub attempt: u32,
    pub step: u64,
    pub micro: u32,
    pub micros: u32,
    pub segments: Vec<u32>,
    pub trained_tokens: u32,
    pub step_tokens: u32,
    pub width: u32,
}

/// A frame as its header says, whatever its values are.
pub fn frame(header: &TensorHeader, values: &[f32]) -> Vec<u8> {
    let payload: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    [&header.encode(wire::crc32c(&payload))[..], &payload].concat()
}

pub fn hello() -> FromParticipant {
    hello_of(wire::MINOR)
}

fn hello_of(minor: u16) -> FromParticipant {
    let (dtypes, codecs) = (vec![DType::F32], vec![CODEC_PLAIN]);
    FromParticipant::Hello { minor, dtypes, codecs, software: "by hand".into() }
}

impl Hostile {
    /// As far as the welcome.
    pub async fn greet(world: &World, coordinator: &Coordinator) -> Self {
        Self::greet_as(world, coordinator, wire::MINOR).await
    }

    /// The same, speaking this minor version.
    pub async fn greet_as(world: &World, coordinator: &Coordinator, minor: u16) -> Self {
        let connection = coordinator.connect(HOSTILE).await;
        let (mut send, mut receive) = connection.open(StreamKind::Control).await.unwrap();
        send.message(&hello_of(minor)).await.unwrap();
        let welcome = receive.message().await.unwrap();
        let FromCoordinator::Welcome { session, experiment_digest, experiment_toml, manifest, .. } = welcome else {
            panic!("no welcome");
        };
        let config = model::AdapterConfig::new(&world.experiment.adapter);
        let blocks = world.source.config().blocks;
        let all = Adapter::seeded(config, world.source.config(), 0..blocks, experiment::Seed(1)).unwrap();
        let trained = all.filtered(|block| block == 0 || block == blocks - 1);
        let info = |tensor: &model::AdapterTensor| TensorInfo {
            name: tensor.name.clone(),
            shape: tensor.shape.map(|size| size as u32).to_vec(),
        };
        let trained = trained.tensors().iter().map(info).collect();
        let width = world.source.config().width as u32;
        let local_steps = world.experiment.federation.local_steps;
        Self {
            connection,
            send,
            receive,
            session,
            experiment_digest,
            experiment_toml,
            manifest,
            width,
            local_steps,
            trained,
        }
    }

    pub async fn ready(&mut self) {
        let experiment_digest = self.experiment_digest;
        self.send.message(&FromParticipant::Ready { experiment_digest }).await.unwrap();
    }

    /// As far as the start of round 1.
    pub async fn join(world: &World, coordinator: &Coordinator) -> Self {
        let mut hostile = Self::greet(world, coordinator).await;
        hostile.ready().await;
        assert!(matches!(hostile.control().await, FromCoordinator::StartRound { round: 1, attempt: 1, .. }));
        hostile
    }

    pub async fn control(&mut self) -> FromCoordinator {
        self.receive.message().await.unwrap()
    }

    /// A step of round 1 that is in order.
    pub fn step(&self, step: u64) -> Step {
        let (session, width) = (self.session, self.width);
        let (round, attempt, micro, micros) = (1, 1, 0, 1);
        let (segments, trained_tokens, step_tokens) = (vec![TOKENS], TOKENS, TOKENS);
        Step { session, round, attempt, step, micro, micros, segments, trained_tokens, step_tokens, width }
    }

    pub async fn ask(&self, step: &Step) -> (SendStream, RecvStream) {
        self.ask_for(Purpose::Train, step).await
    }

    pub async fn ask_for(&self, purpose: Purpose, step: &Step) -> (SendStream, RecvStream) {
        let (mut send, receive) = self.connection.open(StreamKind::Step { age: 0 }).await.unwrap();
        let Step { session, round, attempt, step, micro, micros, ref segments, trained_tokens, step_tokens, .. } =
            *step;
        let segments = segments.clone();
        let request = Request::Step {
            session,
            round,
            attempt,
            step,
            micro,
            micros,
            purpose,
            segments,
            trained_tokens,
            step_tokens,
        };
        send.message(&request).await.unwrap();
        (send, receive)
    }

    pub async fn request_forward(&self, step: &Step) -> (SendStream, RecvStream) {
        let (mut send, receive) = self.ask(step).await;
        send.tensor(&step.header(FrameKind::Activations), &step.values()).await.unwrap();
        (send, receive)
    }

    pub async fn forward(&self, step: &Step) -> (SendStream, RecvStream) {
        let (send, mut receive) = self.request_forward(step).await;
        receive.tensor(&step.header(FrameKind::Activations)).await.unwrap();
        (send, receive)
    }

    pub async fn backward(&self, step: &Step, send: &mut SendStream, receive: &mut RecvStream) {
        let header = step.header(FrameKind::CutGradient);
        send.tensor(&header, &step.values()).await.unwrap();
        receive.tensor(&header).await.unwrap();
        let SquaredNorms { blocks } = receive.message().await.unwrap();
        assert_eq!(blocks.len(), 2);
    }

    pub async fn report(&mut self, round: u32, step: u64, tokens: u64) {
        let (loss_nats, compute_ms, wait_ms) = (1.0, 1.0, 1.0);
        let report = FromParticipant::StepFinished { round, step, loss_nats, tokens, compute_ms, wait_ms };
        // The coordinator may have closed the connection over an earlier one.
        let _ = self.send.message(&report).await;
    }

    /// A whole step, in order.
    pub async fn train(&self, step: u64) {
        let step = self.step(step);
        let (mut send, mut receive) = self.forward(&step).await;
        self.backward(&step, &mut send, &mut receive).await;
        let commit = Commit { squared_norms_head: vec![1.0], squared_norms_tail: vec![1.0] };
        send.message(&commit).await.unwrap();
        send.finish();
        receive.end().await.unwrap();
    }

    /// The coordinator gives up the stream, and goes on listening.
    pub async fn check_stale(&self, step: &Step) {
        let (_send, mut receive) = self.request_forward(step).await;
        let error = receive.tensor(&step.header(FrameKind::Activations)).await.unwrap_err();
        assert_eq!(error, NetError::Reset { code: Some(CloseCode::Stale), number: 3 });
        let (mut send, mut receive) = self.connection.open(StreamKind::Bulk).await.unwrap();
        let BlobRef { sha256, length } = self.manifest;
        send.message(&Request::FetchBlob { sha256, offset: length }).await.unwrap();
        send.finish();
        assert_eq!(receive.message::<wire::BlobHeader>().await.unwrap().length, 0);
    }

    pub async fn check_blob_refused(&self, sha256: [u8; 32], offset: u64, complaint: &str) {
        let (mut send, _receive) = self.connection.open(StreamKind::Bulk).await.unwrap();
        send.message(&Request::FetchBlob { sha256, offset }).await.unwrap();
        send.finish();
        check_closed(&self.connection.closed().await, CloseCode::Unexpected, complaint);
    }

    pub async fn announce_update(
        &self,
        round: u32,
        attempt: u32,
        tokens: u64,
        tensors: &[TensorInfo],
    ) -> (SendStream, RecvStream) {
        let (mut send, receive) = self.connection.open(StreamKind::Bulk).await.unwrap();
        let tensors = tensors.to_vec();
        send.message(&Request::Update { round, attempt, tokens, loss_nats: 1.0, tensors }).await.unwrap();
        (send, receive)
    }

    /// A whole update; the coordinator's reply to it.
    pub async fn update(
        &self,
        round: u32,
        attempt: u32,
        tokens: u64,
        tensors: &[TensorInfo],
    ) -> Result<(), (RefusalReason, String)> {
        let (mut send, mut receive) = self.announce_update(round, attempt, tokens, tensors).await;
        for (i, tensor) in tensors.iter().enumerate() {
            let header = self.update_header(round, i as u32, tensor);
            // A listing that is wrong is not read on.
            let _ = send.tensor(&header, &vec![0.5; header.shape.elements()]).await;
        }
        send.finish();
        match receive.message().await.unwrap() {
            UpdateReply::Accepted => Ok(()),
            UpdateReply::Refused { reason, text } => Err((reason, text)),
        }
    }

    pub fn update_header(&self, round: u32, micro: u32, tensor: &TensorInfo) -> TensorHeader {
        let (kind, dtype, shape) = (FrameKind::Adapter, DType::F32, tensor.shape().unwrap());
        TensorHeader { kind, dtype, session: self.session, round, step: 0, micro, shape }
    }
}

impl Step {
    pub fn header(&self, kind: FrameKind) -> TensorHeader {
        self.checked_header(kind).unwrap()
    }

    /// None where the step has no tokens, or more than fit a tensor.
    pub fn checked_header(&self, kind: FrameKind) -> Option<TensorHeader> {
        let tokens = self.segments.iter().try_fold(0u32, |sum, &length| sum.checked_add(length))?;
        let shape = Shape::new(&[tokens, self.width]).ok()?;
        let Self { session, round, step, micro, .. } = *self;
        Some(TensorHeader { kind, dtype: DType::F32, session, round, step, micro, shape })
    }

    pub fn values(&self) -> Vec<f32> {
        let elements = self.checked_header(FrameKind::Activations).map_or(0, |header| header.shape.elements());
        (0..elements).map(|i| (i % 7) as f32 / 7.0 - 0.5).collect()
    }
}

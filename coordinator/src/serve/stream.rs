//! One stream that a participant opened: a step, an update, or something to fetch.
//!
//! It refuses requests of another session, beyond the experiment's sizes, or for what the run does not have. Whether work
//! counts is decided behind it: by the body, and by the run loop.

use std::sync::{Arc, Mutex};

use experiment::SplitMode;
use model::{Adapter, Matrix, Segments};
use net::{Connection, NetError, RecvStream, SendStream, StreamKind};
use tokio::sync::oneshot;
use wire::{
    AdapterListing, BlobHeader, CloseCode, Commit, DType, FrameKind, MessageKind, Purpose, RefusalReason, Request,
    Shape, SquaredNorms, TensorHeader, TensorInfo, UpdateReply,
};

use super::{Incoming, ServeError, Shared, locked, misbehaved};
use crate::body::{self, BodyError, Forward, Place, RoundKey};
use crate::round::ParticipantName;
use crate::witness::{Micro, Witness, Work};

const BLOB_CHUNK_BYTES: usize = 256 << 10;

/// Held for reading by streams whose answer must be there before the run's end is told.
pub(super) type Answering = tokio::sync::RwLock<()>;

/// One stream that a participant opened. Dropped before its end, because it or the run is no longer wanted, it is given
/// up: merely ended, it would look like an answer that breaks off.
pub(super) struct Stream {
    pub(super) session: u64,
    pub(super) participant: ParticipantName,
    pub(super) connection: Connection,
    pub(super) shared: Arc<Shared>,
    pub(super) witness: Arc<Mutex<Witness>>,
    pub(super) answering: Arc<Answering>,
    pub(super) send: SendStream,
    pub(super) receive: RecvStream,
    pub(super) finished: bool,
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.finished {
            self.send.reset(CloseCode::Stale);
            self.receive.stop(CloseCode::Stale);
        }
    }
}

/// A step request, checked as far as it can be by itself.
struct Step {
    place: Place,
    purpose: Purpose,
    segments: Segments,
    trained_tokens: u32,
    step_tokens: u32,
}

impl Step {
    fn micro(&self) -> Micro {
        let Place { step, micro, micros, .. } = self.place;
        Micro { step, micro, micros, trained_tokens: self.trained_tokens, step_tokens: self.step_tokens }
    }
}

impl Stream {
    pub(super) fn finish(&mut self) {
        self.send.finish();
        self.finished = true;
    }

    pub(super) async fn serve(mut self) -> Result<(), ServeError> {
        match self.receive.message().await? {
            Request::Step {
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
            } => {
                let place = Place {
                    key: RoundKey { round, attempt },
                    session: self.session,
                    participant: self.participant.clone(),
                    step,
                    micro,
                    micros,
                };
                if session != self.session {
                    return Err(misbehaved(format!("a step of session {session} in session {}", self.session)));
                }
                let segments = self.check_segments(&segments)?;
                if trained_tokens as usize > segments.tokens() {
                    let tokens = segments.tokens();
                    return Err(misbehaved(format!("{trained_tokens} trained tokens in a micro-batch of {tokens}")));
                }
                if purpose == Purpose::Train {
                    self.check_size(micros, step_tokens)?;
                }
                if micro >= micros {
                    return Err(misbehaved(format!("micro-batch {micro} of a step of {micros}")));
                }
                let served = self.step(&Step { place, purpose, segments, trained_tokens, step_tokens }).await;
                match served {
                    Err(StepError::Serve(error)) => Err(error),
                    Ok(()) | Err(StepError::Stale) => Ok(()),
                }
            }
            Request::FetchAdapter { round } => self.fetch_adapter(round).await,
            Request::Update { round, attempt, tokens, loss_nats, tensors } => {
                self.update(RoundKey { round, attempt }, tokens, loss_nats, tensors).await
            }
            Request::FetchBlob { sha256, offset } => self.fetch_blob(sha256, offset).await,
            Request::Renew { csr_der } => self.renew(csr_der).await,
            Request::ChannelSums { round, tokens, tensors } => self.channel_sums(round, tokens, tensors).await,
            Request::Enrol { .. } => Err(misbehaved("an enrolment by a participant that is enrolled".into())),
        }
    }

    fn check_segments(&self, segments: &[u32]) -> Result<Segments, ServeError> {
        let experiment::Training { batch_tokens, .. } = self.shared.experiment.training;
        let tokens: u64 = segments.iter().map(|&length| u64::from(length)).sum();
        if tokens > u64::from(batch_tokens) {
            let what = format!("a micro-batch of {tokens} tokens; the experiment allows {batch_tokens}");
            return Err(ServeError::Close(CloseCode::OverLimit, what));
        }
        let lengths = segments.iter().map(|&length| length as usize).collect();
        Segments::new(lengths).map_err(|error| misbehaved(error.to_string()))
    }

    /// A step that trains is of the experiment's size: its trained tokens are its weight in the cohort.
    fn check_size(&self, micros: u32, step_tokens: u32) -> Result<(), ServeError> {
        let experiment::Training { batch_tokens, accumulate, .. } = self.shared.experiment.training;
        if micros != accumulate {
            return Err(misbehaved(format!("a step of {micros} micro-batches; the experiment has {accumulate}")));
        }
        let allowed = u64::from(batch_tokens) * u64::from(accumulate);
        if step_tokens == 0 {
            return Err(misbehaved("a step of 0 trained tokens".into()));
        }
        if u64::from(step_tokens) > allowed {
            let what = format!("a step of {step_tokens} trained tokens; the experiment allows {allowed}");
            return Err(ServeError::Close(CloseCode::OverLimit, what));
        }
        Ok(())
    }

    /// The same of an update, whose weight is that of all its steps.
    fn check_work(&self, key: RoundKey, tokens: u64) -> Result<(), String> {
        let work = locked(&self.witness).work_of(key);
        let experiment::Training { batch_tokens, accumulate, .. } = self.shared.experiment.training;
        let step_allowed = u64::from(batch_tokens) * u64::from(accumulate);
        let allowed = step_allowed.saturating_mul(self.shared.experiment.federation.local_steps);
        match work {
            Work::Unfinished => Err("its steps are not complete".into()),
            Work::Finished { tokens: trained } if tokens != trained => {
                Err(format!("it claims {tokens} trained tokens; its steps had {trained}"))
            }
            Work::Uncounted if tokens > allowed => {
                Err(format!("it claims {tokens} trained tokens; a round has at most {allowed}"))
            }
            Work::Finished { .. } | Work::Uncounted => Ok(()),
        }
    }

    /// PROTOCOL.md, "Step": four tensors and a commit, or two tensors.
    async fn step(&mut self, step: &Step) -> Result<(), StepError> {
        let Some(body) = self.shared.body.clone() else {
            return Err(misbehaved("a step through a body that this run does not have".into()).into());
        };
        let Step { place, purpose, segments, step_tokens, .. } = step;
        let width = self.shared.manifest.config.width;
        let header = TensorHeader {
            kind: FrameKind::Activations,
            dtype: self.shared.dtype(),
            session: self.session,
            round: place.key.round,
            step: place.step,
            micro: place.micro,
            shape: Shape::new(&[segments.tokens() as u32, width as u32])
                .map_err(|error| misbehaved(error.to_string()))?,
        };
        let x = Matrix::new(segments.tokens(), width, self.receive.tensor(&header).await?);
        if !locked(&self.witness).has_given(place.key) {
            return Err(StepError::Stale);
        }
        if *purpose == Purpose::Evaluate && !locked(&self.witness).owes_evaluation(place.key) {
            return Err(misbehaved("an evaluation that nobody asked for, or that is reported already".into()).into());
        }
        let forward = match purpose {
            Purpose::Train => Forward::Train,
            Purpose::Evaluate => Forward::Evaluate,
            Purpose::Measure => Forward::Measure,
        };
        let y = body.forward(place.clone(), forward, segments.clone(), x).await?;
        let is_whole = match purpose {
            Purpose::Train => locked(&self.witness).trained(place.key, step.micro()).map_err(misbehaved)?,
            Purpose::Evaluate => {
                locked(&self.witness).evaluated(place.key, step.trained_tokens);
                false
            }
            // The body counts these itself.
            Purpose::Measure => false,
        };
        self.send.tensor(&header, y.values()).await.map_err(overflowed)?;
        if *purpose != Purpose::Train || self.shared.experiment.split.mode != SplitMode::U {
            self.receive.end().await?;
            // Once for every step, by whichever of its streams was the last to go through the body.
            if is_whole {
                let (squared_norms_head, squared_norms_tail) = (Vec::new(), Vec::new());
                let tokens = u64::from(*step_tokens);
                body.commit(place.clone(), body::Commit { squared_norms_head, squared_norms_tail, tokens }).await?;
                locked(&self.witness).finished(place.key, step.micro());
            }
            self.finish();
            return Ok(());
        }
        let header = TensorHeader { kind: FrameKind::CutGradient, ..header };
        let gradient = Matrix::new(segments.tokens(), width, self.receive.tensor(&header).await?);
        let body::Backward { gradient, squared_norms } = body.backward(place.clone(), gradient).await?;
        self.send.tensor(&header, gradient.values()).await.map_err(overflowed)?;
        if let Some(blocks) = squared_norms {
            self.send.message(&SquaredNorms { blocks }).await?;
            let Commit { squared_norms_head, squared_norms_tail } = self.receive.message().await?;
            let commit = body::Commit { squared_norms_head, squared_norms_tail, tokens: u64::from(*step_tokens) };
            body.commit(place.clone(), commit).await?;
            locked(&self.witness).finished(place.key, step.micro());
        }
        self.receive.end().await?;
        self.finish();
        Ok(())
    }

    async fn fetch_adapter(mut self, round: u32) -> Result<(), ServeError> {
        self.receive.end().await?;
        self.send.prioritize(StreamKind::Bulk);
        let published = self.shared.published.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        let Some((_, adapter)) = published.filter(|(published, _)| *published == round) else { return Ok(()) };
        let [held, _] = self.shared.blocks();
        let share = adapter.filtered(|block| held.contains(&block));
        let tensors = listing_of(&share);
        self.send.message(&AdapterListing { round, adapter: "default".into(), tensors: tensors.clone() }).await?;
        for (i, (tensor, info)) in share.tensors().iter().zip(&tensors).enumerate() {
            let header = self.header(FrameKind::Adapter, round, i, info)?;
            self.send.tensor(&header, &tensor.values).await?;
        }
        self.finish();
        Ok(())
    }

    async fn update(
        mut self,
        key: RoundKey,
        tokens: u64,
        loss_nats: f64,
        tensors: Vec<TensorInfo>,
    ) -> Result<(), ServeError> {
        let published = self.shared.published.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        let Some((_, global)) = published else {
            return Err(misbehaved("an update before the first round".into()));
        };
        let like = self.shared.trained_share(&global);
        let (expected, session) = (listing_of(&like), self.session);
        let adapter = if tensors != expected {
            let (found, expected) = (tensors.len(), expected.len());
            self.receive.stop(CloseCode::Unexpected);
            let text = format!("the update lists {found} tensors that are not the {expected} that this run trains");
            Err((RefusalReason::WrongTensors, text))
        } else {
            let mut values = Vec::with_capacity(tensors.len());
            for (i, info) in tensors.iter().enumerate() {
                let header = self.header(FrameKind::Adapter, key.round, i, info)?;
                values.push(self.receive.tensor(&header).await?);
            }
            self.receive.end().await?;
            like.with_tensors(values).map_err(|error| (RefusalReason::WrongTensors, error.to_string()))
        };
        let adapter = match self.check_work(key, tokens) {
            Ok(()) => adapter,
            Err(text) => adapter.and(Err((RefusalReason::WrongCount, text))),
        };
        let (answer, answered) = oneshot::channel();
        let participant = self.participant.clone();
        let update = Incoming::Update { participant, session, key, tokens, loss_nats, adapter, answer };
        let over = ServeError::Close(CloseCode::GoingAway, "the run is over".into());
        if self.shared.incoming.send(update).await.is_err() {
            return Err(over);
        }
        let reply = answered
            .await
            .unwrap_or(UpdateReply::Refused { reason: RefusalReason::Late, text: "the run is over".into() });
        self.send.message(&reply).await?;
        self.finish();
        Ok(())
    }

    async fn fetch_blob(mut self, sha256: [u8; 32], offset: u64) -> Result<(), ServeError> {
        self.receive.end().await?;
        self.send.prioritize(StreamKind::Bulk);
        let shared = self.shared.clone();
        let read = offload::beside(move || shared.blobs.open(&sha256, &*shared.source)).await;
        let internal = |error: String| {
            tracing::error!(%error, "a part of the model cannot be read");
            ServeError::Close(CloseCode::Internal, "the coordinator cannot read the model".into())
        };
        let bytes = match read.map_err(|error| internal(error.to_string()))? {
            Some(Ok(bytes)) => bytes,
            Some(Err(error)) => return Err(internal(error.to_string())),
            None => return Err(misbehaved("a blob that is no part of this run's model".into())),
        };
        let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
        let rest = rest.ok_or_else(|| misbehaved(format!("offset {offset} in a blob of {} bytes", bytes.len())))?;
        self.send.message(&BlobHeader { length: rest.len() as u64 }).await?;
        for chunk in rest.chunks(BLOB_CHUNK_BYTES) {
            self.send.bytes(MessageKind::Blob, chunk).await?;
        }
        self.finish();
        Ok(())
    }

    /// Of the `i`th tensor of a listing.
    pub(super) fn header(
        &self,
        kind: FrameKind,
        round: u32,
        i: usize,
        tensor: &TensorInfo,
    ) -> Result<TensorHeader, ServeError> {
        let shape = tensor.shape().map_err(|error| misbehaved(error.to_string()))?;
        let (dtype, session) = (DType::F32, self.session);
        Ok(TensorHeader { kind, dtype, session, round, step: 0, micro: i as u32, shape })
    }
}

enum StepError {
    Stale,
    Serve(ServeError),
}

impl From<NetError> for StepError {
    fn from(error: NetError) -> Self {
        Self::Serve(error.into())
    }
}

impl From<ServeError> for StepError {
    fn from(error: ServeError) -> Self {
        Self::Serve(error)
    }
}

impl From<BodyError> for StepError {
    fn from(error: BodyError) -> Self {
        match error {
            BodyError::Stale => Self::Stale,
            BodyError::Order(_) | BodyError::Misplaced(_) => Self::Serve(misbehaved(error.to_string())),
            BodyError::Model(_) => {
                tracing::error!(%error, "the body failed");
                Self::Serve(ServeError::Close(CloseCode::Internal, "the body failed".into()))
            }
        }
    }
}

/// What the body makes of finite values is finite, unless these are beyond all measure.
fn overflowed(error: NetError) -> ServeError {
    match error {
        NetError::Unsendable { error } => {
            let what = format!("the values that it sent overflow in the body: {error}");
            ServeError::Close(CloseCode::NotFinite, what)
        }
        error => error.into(),
    }
}

fn listing_of(adapter: &Adapter) -> Vec<TensorInfo> {
    let info = |tensor: &model::AdapterTensor| TensorInfo {
        name: tensor.name.clone(),
        shape: tensor.shape.iter().map(|&size| size as u32).collect(),
    };
    adapter.tensors().iter().map(info).collect()
}

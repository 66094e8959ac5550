//! Every message of the protocol, in the order in which PROTOCOL.md lists them.
//!
//! Enums are appended to and never reordered: a variant's place is its number on the wire. `Debug` prints the variant, ids and sizes, never
//! text, digests or keys, so that a logged message gives nothing away.

use crate::{
    codec::{CodecError, Decode, Encode, Message},
    limits,
};

/// On the control stream, from the participant.
#[derive(Clone, PartialEq, Encode, Decode)]
pub enum FromParticipant {
    /// The first message of a session.
    Hello { minor: u16, dtypes: Vec<DType>, codecs: Vec<u8>, software: String },
    /// The experiment has been parsed (its digest proves which) and the model's parts are loaded.
    Ready { experiment_digest: [u8; 32] },
    /// The round's global adapter on the participant's held-out records; `loss_nats` is the mean over `tokens`.
    Evaluated { round: u32, loss_nats: f64, tokens: u64 },
    /// An optimizer step has been applied.
    StepFinished { round: u32, step: u64, loss_nats: f64, tokens: u64, compute_ms: f64, wait_ms: f64 },
    /// The participant departs; it will close the connection.
    Leaving { reason: String },
    /// Answers a `ResumeRound` that this device cannot follow: it has not kept what it needs for that.
    CannotResume { round: u32, attempt: u32 },
    /// Answers a `Measure` that this device cannot follow.
    CannotMeasure { round: u32, reason: String },
}

/// On the control stream, from the coordinator.
#[derive(Clone, PartialEq, Encode, Decode)]
pub enum FromCoordinator {
    /// Answers a hello that is acceptable.
    Welcome {
        minor: u16,
        session: u64,
        dtype: DType,
        codec: u8,
        head_blocks: u32,
        tail_blocks: u32,
        experiment_toml: String,
        experiment_digest: [u8; 32],
        manifest: BlobRef,
    },
    /// The participant is in the round's cohort. `attempt` tells a round that is trained again from its abandoned predecessor.
    StartRound { round: u32, attempt: u32, first_step: u64, local_steps: u64, evaluate: bool, train: bool },
    /// What became of the round, as far as this participant is concerned.
    RoundClosed { round: u32, outcome: Outcome },
    /// The run is over; the participant closes the connection.
    Finish { reason: String },
    /// The participant may not take part. `code` is a close code; the connection is closed with it.
    Refused { code: u32, reason: String },
    /// The participant is back within a round: it goes on with `step`, or with the one before it, of which it may not have had the
    /// answer. Its reports of steps from `reported` on are not on record.
    ResumeRound {
        round: u32,
        attempt: u32,
        first_step: u64,
        local_steps: u64,
        evaluate: bool,
        step: u64,
        reported: u64,
    },
    /// The participant takes its training records through the model once more, with the adapter of this round, and sends its
    /// channel sums.
    Measure { round: u32 },
}

/// The first message of every stream that a participant opens after the control stream.
#[derive(Clone, PartialEq, Encode, Decode)]
pub enum Request {
    /// One micro-batch through the body. `segments` are the lengths of its sequences, `trained_tokens` the trained tokens of this
    /// micro-batch and `step_tokens` those of the whole step, by which the loss is divided.
    Step {
        session: u64,
        round: u32,
        attempt: u32,
        step: u64,
        micro: u32,
        micros: u32,
        purpose: Purpose,
        segments: Vec<u32>,
        trained_tokens: u32,
        step_tokens: u32,
    },
    /// The global adapter with which `round` starts; answered by an [`AdapterListing`] and its frames.
    FetchAdapter { round: u32 },
    /// The participant's adapter at the end of its local steps; one frame per tensor follows. `loss_nats` is the mean over `tokens`.
    Update { round: u32, attempt: u32, tokens: u64, loss_nats: f64, tensors: Vec<TensorInfo> },
    /// The bytes of a blob from `offset` on; answered by a [`BlobHeader`] and those bytes.
    FetchBlob { sha256: [u8; 32], offset: u64 },
    /// A certificate request; answered by [`Enrolled`]. The name comes from the enrolment certificate, never from here.
    Enrol { csr_der: Vec<u8> },
    /// A certificate request by a participant whose certificate is about to expire, for the same name and key; answered by [`Enrolled`].
    Renew { csr_der: Vec<u8> },
    /// What the linear layers of the participant's own blocks were multiplied with: for every input its channels' squares, summed over
    /// `tokens`; one frame per tensor follows. Answered by an [`UpdateReply`].
    ChannelSums { round: u32, tokens: u64, tensors: Vec<TensorInfo> },
}

/// Answers [`Request::FetchAdapter`]; one frame per tensor follows, in this order.
#[derive(Clone, PartialEq, Encode, Decode)]
pub struct AdapterListing {
    pub round: u32,
    /// Which adapter this is; `default` where a run has only one.
    pub adapter: String,
    pub tensors: Vec<TensorInfo>,
}

/// Answers [`Request::FetchBlob`]: `length` bytes follow, those from the requested offset to the blob's end.
#[derive(Clone, PartialEq, Encode, Decode)]
pub struct BlobHeader {
    pub length: u64,
}

/// Answers [`Request::Update`] and [`Request::ChannelSums`], once the last frame has arrived.
#[derive(Clone, PartialEq, Encode, Decode)]
pub enum UpdateReply {
    /// Counted towards the quorum.
    Accepted,
    Refused {
        reason: RefusalReason,
        text: String,
    },
}

/// Answers [`Request::Enrol`] and [`Request::Renew`]: the device's certificate and those above it.
#[derive(Clone, PartialEq, Encode, Decode)]
pub struct Enrolled {
    pub chain_pem: String,
}

/// From the coordinator after the step's last gradient: the squared gradient norm of each body block, over the whole step.
#[derive(Clone, PartialEq, Encode, Decode)]
pub struct SquaredNorms {
    pub blocks: Vec<f64>,
}

/// From the participant, after [`SquaredNorms`]: the same of its own blocks. Both sides now compute the same clipping coefficient, and the
/// coordinator may apply the step.
#[derive(Clone, PartialEq, Encode, Decode)]
pub struct Commit {
    pub squared_norms_head: Vec<f64>,
    pub squared_norms_tail: Vec<f64>,
}

/// Type of a value inside a tensor frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum DType {
    F32,
    F16,
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Purpose {
    Train,
    Evaluate,
    /// As `Evaluate`, and the coordinator sums the squares of what its own layers are multiplied with.
    Measure,
}

/// A file named by its digest.
#[derive(Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct BlobRef {
    pub sha256: [u8; 32],
    pub length: u64,
}

/// One tensor of an adapter, or the sums of one input.
#[derive(Clone, PartialEq, Eq, Encode)]
pub struct TensorInfo {
    pub name: String,
    pub shape: Vec<u32>,
}

#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub enum Outcome {
    /// The update is part of the new global adapter.
    Aggregated,
    /// The round was aggregated without this participant.
    Refused { reason: RefusalReason, text: String },
    /// The round was not aggregated; the global adapter is what it was.
    Abandoned,
}

/// Why an update does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum RefusalReason {
    /// It came after the round was closed.
    Late,
    /// The participant is not in the round's cohort.
    NotInCohort,
    /// It has been sent before.
    Duplicate,
    /// Names or shapes are not those of the adapter.
    WrongTensors,
    /// It does not rest on as many tokens or steps as it says.
    WrongCount,
    /// Channel sums whose names, widths or values are not those of the participant's own blocks.
    WrongSums,
}

/// The rows of the byte ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MessageKind {
    Hello,
    Welcome,
    /// Every other message of the control stream.
    Control,
    /// Step requests, squared norms and commits.
    Step,
    Activations,
    CutGradient,
    /// The global adapter, towards the participant.
    Adapter,
    /// A participant's adapter, towards the coordinator.
    Update,
    Blob,
    Enrol,
    /// A participant's channel sums, towards the coordinator.
    ChannelSums,
}

impl MessageKind {
    pub const ALL: [Self; 11] = [
        Self::Hello,
        Self::Welcome,
        Self::Control,
        Self::Step,
        Self::Activations,
        Self::CutGradient,
        Self::Adapter,
        Self::Update,
        Self::Blob,
        Self::Enrol,
        Self::ChannelSums,
    ];

    /// The name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Welcome => "welcome",
            Self::Control => "control",
            Self::Step => "step",
            Self::Activations => "activations",
            Self::CutGradient => "cut_gradient",
            Self::Adapter => "adapter",
            Self::Update => "update",
            Self::Blob => "blob",
            Self::Enrol => "enrol",
            Self::ChannelSums => "channel_sums",
        }
    }
}

impl DType {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The number in a frame header, which is also the variant's number in messages.
    pub(crate) fn code(self) -> u8 {
        self as u8
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        [Self::F32, Self::F16, Self::Bf16].into_iter().find(|dtype| dtype.code() == code)
    }
}

impl TensorInfo {
    /// The shape, checked.
    pub fn shape(&self) -> Result<crate::Shape, crate::FrameError> {
        crate::Shape::new(&self.shape)
    }
}

impl Message for FromParticipant {
    const NAME: &'static str = "participant's control message";

    fn kind(&self) -> MessageKind {
        match self {
            Self::Hello { .. } => MessageKind::Hello,
            _ => MessageKind::Control,
        }
    }

    fn check(&self) -> Result<(), CodecError> {
        match self {
            Self::Hello { minor: _, dtypes, codecs, software } => {
                within("hello.dtypes", dtypes.len(), limits::OFFERS_MAX)?;
                within("hello.codecs", codecs.len(), limits::OFFERS_MAX)?;
                within("hello.software", software.len(), limits::TEXT_BYTES_MAX)
            }
            Self::Leaving { reason } => within("leaving.reason", reason.len(), limits::TEXT_BYTES_MAX),
            Self::Evaluated { loss_nats, .. } => check_loss("evaluated.loss_nats", *loss_nats),
            Self::StepFinished { loss_nats, compute_ms, wait_ms, .. } => {
                check_loss("step_finished.loss_nats", *loss_nats)?;
                up_to("step_finished.compute_ms", *compute_ms, limits::STEP_MS_MAX)?;
                up_to("step_finished.wait_ms", *wait_ms, limits::STEP_MS_MAX)
            }
            Self::CannotMeasure { round: _, reason } => {
                within("cannot_measure.reason", reason.len(), limits::TEXT_BYTES_MAX)
            }
            Self::Ready { .. } | Self::CannotResume { .. } => Ok(()),
        }
    }
}

impl Message for FromCoordinator {
    const NAME: &'static str = "coordinator's control message";

    fn kind(&self) -> MessageKind {
        match self {
            Self::Welcome { .. } => MessageKind::Welcome,
            _ => MessageKind::Control,
        }
    }

    fn check(&self) -> Result<(), CodecError> {
        match self {
            Self::Welcome { head_blocks, tail_blocks, experiment_toml, manifest, .. } => {
                within("welcome.head_blocks", *head_blocks as usize, limits::BLOCKS_MAX)?;
                within("welcome.tail_blocks", *tail_blocks as usize, limits::BLOCKS_MAX)?;
                within("welcome.experiment_toml", experiment_toml.len(), limits::EXPERIMENT_BYTES_MAX)?;
                within_u64("welcome.manifest.length", manifest.length, limits::BLOB_BYTES_MAX)
            }
            Self::RoundClosed { round: _, outcome: Outcome::Refused { reason: _, text } } => {
                within("round_closed.text", text.len(), limits::TEXT_BYTES_MAX)
            }
            Self::Finish { reason } => within("finish.reason", reason.len(), limits::TEXT_BYTES_MAX),
            Self::Refused { code: _, reason } => within("refused.reason", reason.len(), limits::TEXT_BYTES_MAX),
            Self::StartRound { .. } | Self::RoundClosed { .. } | Self::ResumeRound { .. } | Self::Measure { .. } => {
                Ok(())
            }
        }
    }
}

impl Message for Request {
    const NAME: &'static str = "request";
    const BODY_BYTES_MAX: usize = limits::LISTING_BYTES_MAX;

    fn kind(&self) -> MessageKind {
        match self {
            Self::Step { .. } => MessageKind::Step,
            Self::FetchAdapter { .. } => MessageKind::Adapter,
            Self::Update { .. } => MessageKind::Update,
            Self::FetchBlob { .. } => MessageKind::Blob,
            Self::Enrol { .. } | Self::Renew { .. } => MessageKind::Enrol,
            Self::ChannelSums { .. } => MessageKind::ChannelSums,
        }
    }

    fn check(&self) -> Result<(), CodecError> {
        match self {
            Self::Step { segments, micros, .. } => {
                within("step.micros", *micros as usize, limits::MICROS_MAX as usize)?;
                within("step.segments", segments.len(), limits::SEGMENTS_MAX)
            }
            Self::Update { loss_nats, tensors, .. } => {
                check_loss("update.loss_nats", *loss_nats)?;
                check_tensors("update.tensors", tensors)
            }
            Self::ChannelSums { tensors, .. } => check_tensors("channel_sums.tensors", tensors),
            Self::Renew { csr_der } => within("renew.csr_der", csr_der.len(), limits::CERTIFICATE_BYTES_MAX),
            Self::Enrol { csr_der } => within("enrol.csr_der", csr_der.len(), limits::CERTIFICATE_BYTES_MAX),
            Self::FetchBlob { offset, .. } => within_u64("fetch_blob.offset", *offset, limits::BLOB_BYTES_MAX),
            Self::FetchAdapter { .. } => Ok(()),
        }
    }
}

impl Message for AdapterListing {
    const NAME: &'static str = "adapter listing";
    const BODY_BYTES_MAX: usize = limits::LISTING_BYTES_MAX;

    fn kind(&self) -> MessageKind {
        MessageKind::Adapter
    }

    fn check(&self) -> Result<(), CodecError> {
        within("listing.adapter", self.adapter.len(), limits::NAME_BYTES_MAX)?;
        check_tensors("listing.tensors", &self.tensors)
    }
}

impl Message for BlobHeader {
    const NAME: &'static str = "blob header";

    fn kind(&self) -> MessageKind {
        MessageKind::Blob
    }

    fn check(&self) -> Result<(), CodecError> {
        within_u64("blob.length", self.length, limits::BLOB_BYTES_MAX)
    }
}

impl Message for UpdateReply {
    const NAME: &'static str = "update reply";

    fn kind(&self) -> MessageKind {
        MessageKind::Update
    }

    fn check(&self) -> Result<(), CodecError> {
        match self {
            Self::Accepted => Ok(()),
            Self::Refused { reason: _, text } => within("update_reply.text", text.len(), limits::TEXT_BYTES_MAX),
        }
    }
}

impl Message for Enrolled {
    const NAME: &'static str = "enrolment reply";

    fn kind(&self) -> MessageKind {
        MessageKind::Enrol
    }

    fn check(&self) -> Result<(), CodecError> {
        within("enrolled.chain_pem", self.chain_pem.len(), limits::CERTIFICATE_BYTES_MAX)
    }
}

impl Message for SquaredNorms {
    const NAME: &'static str = "squared norms";

    fn kind(&self) -> MessageKind {
        MessageKind::Step
    }

    fn check(&self) -> Result<(), CodecError> {
        check_norms("squared_norms.blocks", &self.blocks)
    }
}

impl Message for Commit {
    const NAME: &'static str = "commit";

    fn kind(&self) -> MessageKind {
        MessageKind::Step
    }

    fn check(&self) -> Result<(), CodecError> {
        check_norms("commit.squared_norms_head", &self.squared_norms_head)?;
        check_norms("commit.squared_norms_tail", &self.squared_norms_tail)
    }
}

fn check_tensors(field: &'static str, tensors: &[TensorInfo]) -> Result<(), CodecError> {
    within(field, tensors.len(), limits::TENSORS_MAX)?;
    for tensor in tensors {
        within("tensor.name", tensor.name.len(), limits::NAME_BYTES_MAX)?;
        tensor
            .shape()
            .map_err(|error| CodecError::Malformed { message: "tensor's shape", reason: error.to_string() })?;
    }
    Ok(())
}

fn check_norms(field: &'static str, norms: &[f64]) -> Result<(), CodecError> {
    within(field, norms.len(), limits::BLOCKS_MAX)?;
    if norms.iter().any(|&norm| norm < 0.0) {
        return Err(CodecError::Malformed { message: field, reason: "a squared norm is negative".into() });
    }
    finite(field, norms)
}

/// A cross-entropy is not negative, but for what rounding makes of 0.
fn check_loss(field: &'static str, nats: f64) -> Result<(), CodecError> {
    up_to(field, if (-1e-3..0.0).contains(&nats) { 0.0 } else { nats }, limits::LOSS_NATS_MAX)
}

fn up_to(field: &'static str, value: f64, limit: u64) -> Result<(), CodecError> {
    finite(field, &[value])?;
    if value < 0.0 {
        return Err(CodecError::Malformed { message: field, reason: format!("{value} is negative") });
    }
    // The next whole number is what it shows, as far as those reach.
    within_u64(field, value.ceil() as u64, limit)
}

fn finite(field: &'static str, values: &[f64]) -> Result<(), CodecError> {
    match values.iter().find(|value| !value.is_finite()) {
        Some(value) => Err(CodecError::Malformed { message: field, reason: format!("{value} is not finite") }),
        None => Ok(()),
    }
}

fn within(field: &'static str, found: usize, limit: usize) -> Result<(), CodecError> {
    within_u64(field, found as u64, limit as u64)
}

fn within_u64(field: &'static str, found: u64, limit: u64) -> Result<(), CodecError> {
    if found > limit {
        return Err(CodecError::OverLimit { field, found, limit });
    }
    Ok(())
}

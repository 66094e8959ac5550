//! `Debug` of messages: the variant, ids and counts; of text, digests, keys and lists only their sizes.
//!
//! Each pattern names every field, so that a new field does not compile until somebody has decided how much of it may be logged.

use std::fmt::{Debug, Formatter, Result};

use crate::message::{
    AdapterListing, BlobHeader, BlobRef, Commit, Enrolled, FromCoordinator, FromParticipant, Outcome, Request,
    SquaredNorms, TensorInfo, UpdateReply,
};

/// Stands for something that is not shown.
struct Size(usize, &'static str);

impl Debug for Size {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "<{} {}>", self.0, self.1)
    }
}

fn bytes(hidden: impl AsRef<[u8]>) -> Size {
    Size(hidden.as_ref().len(), "bytes")
}

impl Debug for FromParticipant {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Self::Hello { minor, dtypes, codecs, software } => f
                .debug_struct("Hello")
                .field("minor", minor)
                .field("dtypes", dtypes)
                .field("codecs", codecs)
                .field("software", &bytes(software))
                .finish(),
            Self::Ready { experiment_digest } => {
                f.debug_struct("Ready").field("experiment_digest", &bytes(experiment_digest)).finish()
            }
            Self::Evaluated { round, loss_nats, tokens } => f
                .debug_struct("Evaluated")
                .field("round", round)
                .field("loss_nats", loss_nats)
                .field("tokens", tokens)
                .finish(),
            Self::StepFinished { round, step, loss_nats, tokens, compute_ms, wait_ms } => f
                .debug_struct("StepFinished")
                .field("round", round)
                .field("step", step)
                .field("loss_nats", loss_nats)
                .field("tokens", tokens)
                .field("compute_ms", compute_ms)
                .field("wait_ms", wait_ms)
                .finish(),
            Self::Leaving { reason } => f.debug_struct("Leaving").field("reason", &bytes(reason)).finish(),
            Self::CannotResume { round, attempt } => {
                f.debug_struct("CannotResume").field("round", round).field("attempt", attempt).finish()
            }
            Self::CannotMeasure { round, reason } => {
                f.debug_struct("CannotMeasure").field("round", round).field("reason", &bytes(reason)).finish()
            }
        }
    }
}

impl Debug for FromCoordinator {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Self::Welcome {
                minor,
                session,
                dtype,
                codec,
                head_blocks,
                tail_blocks,
                experiment_toml,
                experiment_digest,
                manifest,
            } => f
                .debug_struct("Welcome")
                .field("minor", minor)
                .field("session", session)
                .field("dtype", dtype)
                .field("codec", codec)
                .field("head_blocks", head_blocks)
                .field("tail_blocks", tail_blocks)
                .field("experiment_toml", &bytes(experiment_toml))
                .field("experiment_digest", &bytes(experiment_digest))
                .field("manifest", manifest)
                .finish(),
            Self::StartRound { round, attempt, first_step, local_steps, evaluate, train } => f
                .debug_struct("StartRound")
                .field("round", round)
                .field("attempt", attempt)
                .field("first_step", first_step)
                .field("local_steps", local_steps)
                .field("evaluate", evaluate)
                .field("train", train)
                .finish(),
            Self::ResumeRound { round, attempt, first_step, local_steps, evaluate, step, reported } => f
                .debug_struct("ResumeRound")
                .field("round", round)
                .field("attempt", attempt)
                .field("first_step", first_step)
                .field("local_steps", local_steps)
                .field("evaluate", evaluate)
                .field("step", step)
                .field("reported", reported)
                .finish(),
            Self::Measure { round } => f.debug_struct("Measure").field("round", round).finish(),
            Self::RoundClosed { round, outcome } => {
                f.debug_struct("RoundClosed").field("round", round).field("outcome", outcome).finish()
            }
            Self::Finish { reason } => f.debug_struct("Finish").field("reason", &bytes(reason)).finish(),
            Self::Refused { code, reason } => {
                f.debug_struct("Refused").field("code", code).field("reason", &bytes(reason)).finish()
            }
        }
    }
}

impl Debug for Request {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Self::Step {
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
            } => f
                .debug_struct("Step")
                .field("session", session)
                .field("round", round)
                .field("attempt", attempt)
                .field("step", step)
                .field("micro", micro)
                .field("micros", micros)
                .field("purpose", purpose)
                .field("segments", &Size(segments.len(), "sequences"))
                .field("trained_tokens", trained_tokens)
                .field("step_tokens", step_tokens)
                .finish(),
            Self::FetchAdapter { round } => f.debug_struct("FetchAdapter").field("round", round).finish(),
            Self::Update { round, attempt, tokens, loss_nats, tensors } => f
                .debug_struct("Update")
                .field("round", round)
                .field("attempt", attempt)
                .field("tokens", tokens)
                .field("loss_nats", loss_nats)
                .field("tensors", &Size(tensors.len(), "tensors"))
                .finish(),
            Self::FetchBlob { sha256, offset } => {
                f.debug_struct("FetchBlob").field("sha256", &bytes(sha256)).field("offset", offset).finish()
            }
            Self::ChannelSums { round, tokens, tensors } => f
                .debug_struct("ChannelSums")
                .field("round", round)
                .field("tokens", tokens)
                .field("tensors", &Size(tensors.len(), "tensors"))
                .finish(),
            Self::Renew { csr_der } => f.debug_struct("Renew").field("csr_der", &bytes(csr_der)).finish(),
            Self::Enrol { csr_der } => f.debug_struct("Enrol").field("csr_der", &bytes(csr_der)).finish(),
        }
    }
}

impl Debug for AdapterListing {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self { round, adapter, tensors } = self;
        f.debug_struct("AdapterListing")
            .field("round", round)
            .field("adapter", &bytes(adapter))
            .field("tensors", &Size(tensors.len(), "tensors"))
            .finish()
    }
}

impl Debug for BlobHeader {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self { length } = self;
        f.debug_struct("BlobHeader").field("length", length).finish()
    }
}

impl Debug for BlobRef {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self { sha256, length } = self;
        f.debug_struct("BlobRef").field("sha256", &bytes(sha256)).field("length", length).finish()
    }
}

impl Debug for UpdateReply {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Self::Accepted => f.write_str("Accepted"),
            Self::Refused { reason, text } => {
                f.debug_struct("Refused").field("reason", reason).field("text", &bytes(text)).finish()
            }
        }
    }
}

impl Debug for Outcome {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Self::Aggregated => f.write_str("Aggregated"),
            Self::Refused { reason, text } => {
                f.debug_struct("Refused").field("reason", reason).field("text", &bytes(text)).finish()
            }
            Self::Abandoned => f.write_str("Abandoned"),
        }
    }
}

impl Debug for Enrolled {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self { chain_pem } = self;
        f.debug_struct("Enrolled").field("chain_pem", &bytes(chain_pem)).finish()
    }
}

impl Debug for SquaredNorms {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self { blocks } = self;
        f.debug_struct("SquaredNorms").field("blocks", &Size(blocks.len(), "norms")).finish()
    }
}

impl Debug for Commit {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self { squared_norms_head, squared_norms_tail } = self;
        f.debug_struct("Commit")
            .field("squared_norms_head", &Size(squared_norms_head.len(), "norms"))
            .field("squared_norms_tail", &Size(squared_norms_tail.len(), "norms"))
            .finish()
    }
}

impl Debug for TensorInfo {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self { name, shape } = self;
        f.debug_struct("TensorInfo").field("name", &bytes(name)).field("shape", shape).finish()
    }
}

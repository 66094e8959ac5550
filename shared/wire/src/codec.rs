//! Message bodies to bytes and back; the only file that names the serializer behind it.
//!
//! A body decodes only if it is within its type's limit, leaves no byte over and passes the type's own [`Message::check`]. Memory taken while
//! decoding follows the bytes that are there, never a length that they claim.

use bincode::config;
use bincode::de::Decoder;
pub use bincode::{Decode, Encode};

use crate::{MessageKind, TensorInfo, limits};

/// A message: what the two sides send each other, apart from tensor frames and blobs.
pub trait Message: Encode + Decode<()> + std::fmt::Debug {
    /// What the type is called in errors.
    const NAME: &'static str;

    /// Longest body of this type.
    const BODY_BYTES_MAX: usize = limits::MESSAGE_BYTES_MAX;

    /// The row of the byte ledger that this message belongs to.
    fn kind(&self) -> MessageKind;

    /// Checks what the types of the fields cannot: counts and lengths against [`limits`].
    fn check(&self) -> Result<(), CodecError>;
}

/// Why bytes are not a message, or a value cannot become one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("a {message} of {found} bytes exceeds the limit of {limit}")]
    TooLong { message: &'static str, found: usize, limit: usize },
    #[error("{left} bytes are left over after a {message}")]
    LeftOver { message: &'static str, left: usize },
    #[error("the bytes are not a {message}: {reason}")]
    Malformed { message: &'static str, reason: String },
    #[error("{field} holds {found}, the limit is {limit}")]
    OverLimit { field: &'static str, found: u64, limit: u64 },
}

/// The body of `message`. Fails where a field is over its limit: a reason too long to send must be shortened by whoever writes it.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, CodecError> {
    message.check()?;
    let body = bincode::encode_to_vec(message, config::standard())
        .map_err(|error| CodecError::Malformed { message: M::NAME, reason: error.to_string() })?;
    check_length::<M>(body.len())?;
    Ok(body)
}

/// The message whose body is exactly `body`.
pub fn decode<M: Message>(body: &[u8]) -> Result<M, CodecError> {
    check_length::<M>(body.len())?;
    let decoded = decode_within(body, 2 * body.len() + SLACK_BYTES, M::BODY_BYTES_MAX > limits::MESSAGE_BYTES_MAX);
    let (message, used): (M, usize) =
        decoded.map_err(|error| CodecError::Malformed { message: M::NAME, reason: error.to_string() })?;
    if used != body.len() {
        return Err(CodecError::LeftOver { message: M::NAME, left: body.len() - used });
    }
    message.check()?;
    Ok(message)
}

/// What a message may take in memory beside twice its length.
const SLACK_BYTES: usize = 63 * 1024;

/// The serializer counts what a value takes in memory, a container before it takes memory for it, and refuses more than its limit, which is a
/// constant. This takes the largest of a row of constants that is within `bytes`; neighbours differ by less than what an honest listing (1.8 times
/// its length in memory, of names as PEFT has them) leaves of twice its length.
fn decode_within<M: Message>(
    body: &[u8],
    bytes: usize,
    is_long: bool,
) -> Result<(M, usize), bincode::error::DecodeError> {
    macro_rules! within {
        ($($limit:literal)*) => {
            $(if $limit <= bytes {
                return bincode::decode_from_slice(body, config::standard().with_limit::<{ $limit }>());
            })*
        };
    }
    if is_long {
        within!(
            2_160_000 1_960_000 1_780_000 1_620_000 1_470_000 1_330_000 1_210_000 1_100_000 1_000_000 910_000 830_000 755_000
            690_000 627_000 570_000 518_000 471_000 428_000 390_000 354_000 322_000 293_000 266_000 242_000 220_000
        );
    }
    within!(193_000 160_000 128_000 100_000 80_000);
    bincode::decode_from_slice(body, config::standard().with_limit::<64_500>())
}

/// Counted for what it takes in memory: derived, the struct itself would be counted for nothing once its fields are read.
impl<Context> Decode<Context> for TensorInfo {
    fn decode<D: Decoder<Context = Context>>(decoder: &mut D) -> Result<Self, bincode::error::DecodeError> {
        let info = Self { name: String::decode(decoder)?, shape: Vec::decode(decoder)? };
        // The two lengths have been counted as 8 bytes each.
        decoder.claim_bytes_read(size_of::<Self>() - 2 * size_of::<u64>())?;
        Ok(info)
    }
}

bincode::impl_borrow_decode!(TensorInfo);

fn check_length<M: Message>(found: usize) -> Result<(), CodecError> {
    if found > M::BODY_BYTES_MAX {
        return Err(CodecError::TooLong { message: M::NAME, found, limit: M::BODY_BYTES_MAX });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::*;

    /// Decodes `bytes` as every message there is; what is accepted must encode to the same bytes.
    fn check_decoders(bytes: &[u8]) {
        fn check<M: Message>(bytes: &[u8]) {
            if let Ok(message) = decode::<M>(bytes) {
                // Integers may be written longer than need be, so that only our own encoding is the same again.
                let encoded = encode(&message).unwrap();
                assert_eq!(encode(&decode::<M>(&encoded).unwrap()).unwrap(), encoded, "{message:?}");
            }
        }
        check::<FromParticipant>(bytes);
        check::<FromCoordinator>(bytes);
        check::<Request>(bytes);
        check::<AdapterListing>(bytes);
        check::<BlobHeader>(bytes);
        check::<UpdateReply>(bytes);
        check::<Enrolled>(bytes);
        check::<SquaredNorms>(bytes);
        check::<Commit>(bytes);
    }

    #[test]
    fn claimed_lengths_take_no_memory() {
        // A listing of 2^63 tensors, a text of 2^63 bytes, and lengths that fit the largest message but not these few bytes.
        for claimed in [1u64 << 63, 1 << 30, 1 << 20, 1 << 16, 5000] {
            let length = [&[0xfd][..], &claimed.to_le_bytes()].concat();
            assert!(decode::<AdapterListing>(&[&[0, 0], &length[..]].concat()).is_err(), "{claimed} tensors");
            assert!(decode::<Enrolled>(&length).is_err(), "{claimed} bytes");
            assert!(decode::<SquaredNorms>(&length).is_err(), "{claimed} norms");
        }
    }

    #[test]
    fn largest_honest_messages_fit() {
        let name = "base_model.model.model.layers.291.self_attn.q_proj.lora_A.weight";
        let tensors = vec![TensorInfo { name: name.into(), shape: vec![64, 28_672] }; limits::TENSORS_MAX];
        let listing = AdapterListing { round: 1, adapter: "default".into(), tensors };
        assert_eq!(decode::<AdapterListing>(&encode(&listing).unwrap()).unwrap(), listing);
        // Shorter names than any adapter of ours has, and as many short ones as are within the slack.
        for (name_bytes, count) in [(50, limits::TENSORS_MAX), (1, 1000)] {
            let tensors = vec![TensorInfo { name: "n".repeat(name_bytes), shape: vec![8, 576] }; count];
            let listing = AdapterListing { round: 1, adapter: String::new(), tensors };
            assert_eq!(decode::<AdapterListing>(&encode(&listing).unwrap()).unwrap(), listing);
        }
        let segments = vec![1; limits::SEGMENTS_MAX];
        let (purpose, step) = (Purpose::Train, 1);
        let request = Request::Step {
            session: 1,
            round: 1,
            attempt: 1,
            step,
            micro: 0,
            micros: 1,
            purpose,
            segments,
            trained_tokens: 1,
            step_tokens: 1,
        };
        assert_eq!(decode::<Request>(&encode(&request).unwrap()).unwrap(), request);
        let norms = SquaredNorms { blocks: vec![1.0; limits::BLOCKS_MAX] };
        assert_eq!(decode::<SquaredNorms>(&encode(&norms).unwrap()).unwrap(), norms);
    }

    #[test]
    fn messages_above_a_limit_are_refused_by_both_sides() {
        let leaving = FromParticipant::Leaving { reason: "x".repeat(limits::TEXT_BYTES_MAX + 1) };
        let over = CodecError::OverLimit { field: "leaving.reason", found: 1025, limit: 1024 };
        assert_eq!(encode(&leaving).unwrap_err(), over);
        let body = [&[4, 0xfb, 1, 4][..], "x".repeat(1025).as_bytes()].concat();
        assert_eq!(decode::<FromParticipant>(&body).unwrap_err(), over);
        assert!(matches!(
            decode::<BlobHeader>(&[0; 70_000]),
            Err(CodecError::TooLong { found: 70_000, limit: 65_536, .. })
        ));
    }

    #[test]
    fn losses_and_norms_are_finite() {
        for value in [f64::NAN, f64::INFINITY] {
            assert!(encode(&FromParticipant::Evaluated { round: 0, loss_nats: value, tokens: 1 }).is_err());
            assert!(encode(&SquaredNorms { blocks: vec![0.0, value] }).is_err());
        }
        assert!(encode(&SquaredNorms { blocks: vec![-1.0] }).is_err());
    }

    #[test]
    fn losses_and_times_are_possible() {
        let step = |loss_nats, compute_ms, wait_ms| {
            let (round, step, tokens) = (1, 2, 3);
            encode(&FromParticipant::StepFinished { round, step, loss_nats, tokens, compute_ms, wait_ms })
        };
        let update =
            |loss_nats| encode(&Request::Update { round: 1, attempt: 1, tokens: 1, loss_nats, tensors: Vec::new() });
        let evaluated = |loss_nats| encode(&FromParticipant::Evaluated { round: 0, loss_nats, tokens: 1 });
        for possible in [0.0, -1e-9, 2.5, 10_000.0] {
            assert!(step(possible, 1.0, 2.0).is_ok() && update(possible).is_ok() && evaluated(possible).is_ok());
        }
        for impossible in [-1.0, 10_000.1, 1e300] {
            assert!(step(impossible, 1.0, 2.0).is_err(), "{impossible}");
            assert!(update(impossible).is_err() && evaluated(impossible).is_err(), "{impossible}");
        }
        for impossible in [-1.0, 1e300, f64::NAN] {
            assert!(step(1.0, impossible, 1.0).is_err() && step(1.0, 1.0, impossible).is_err(), "{impossible}");
        }
        let over = CodecError::OverLimit { field: "update.loss_nats", found: 10_001, limit: 10_000 };
        assert_eq!(update(10_000.1).unwrap_err(), over);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            check_decoders(&bytes);
        }

        #[test]
        fn small_numbers_never_panic(bytes in proptest::collection::vec(0u8..5, 0..60)) {
            check_decoders(&bytes);
        }

        #[test]
        fn requests_round_trip(
            session: u64, round: u32, attempt: u32, step: u64, micro in 0u32..9, micros in 0u32..9, evaluate: bool,
            segments in proptest::collection::vec(any::<u32>(), 0..50), trained_tokens: u32, step_tokens: u32,
        ) {
            let purpose = if evaluate { Purpose::Evaluate } else { Purpose::Train };
            let request =
                Request::Step { session, round, attempt, step, micro, micros, purpose, segments, trained_tokens, step_tokens };
            prop_assert_eq!(decode::<Request>(&encode(&request).unwrap()).unwrap(), request);
        }

        #[test]
        fn listings_round_trip(
            round: u32,
            tensors in proptest::collection::vec(("[a-z.]{0,80}", proptest::collection::vec(1u32..60, 1..=4)), 0..40),
        ) {
            let tensors = tensors.into_iter().map(|(name, shape)| TensorInfo { name, shape }).collect();
            let listing = AdapterListing { round, adapter: "default".into(), tensors };
            prop_assert_eq!(decode::<AdapterListing>(&encode(&listing).unwrap()).unwrap(), listing);
        }
    }
}

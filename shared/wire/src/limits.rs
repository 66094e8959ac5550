//! Every maximum of the protocol. A value above one of these is refused before memory is taken for it.

/// A message body on the control stream, and of every message without a longer limit of its own.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// A message body that lists tensors: names and shapes of one adapter.
pub const LISTING_BYTES_MAX: usize = 1024 * 1024;

/// Tensors in one adapter: 4,096 are 292 blocks with both factors of all seven targets.
pub const TENSORS_MAX: usize = 4096;

/// Bytes of a tensor's name.
pub const NAME_BYTES_MAX: usize = 256;

/// Dimensions of a tensor.
pub const DIMS_MAX: usize = 4;

/// Payload of one tensor frame: 16,384 tokens of width 4,096 in f32 are exactly this.
pub const PAYLOAD_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Magnitude of a value in a tensor. Activations reach thousands; squares of what is above this have no sum in f32, so that a norm of them would
/// be infinite, and a network of them NaN.
pub const VALUE_MAX: f32 = 1e18;

/// A file that travels by its digest, such as the manifest or a part of the base model.
pub const BLOB_BYTES_MAX: u64 = 64 * 1024 * 1024 * 1024;

/// Sequences packed into one micro-batch.
pub const SEGMENTS_MAX: usize = 4096;

/// Micro-batches of one optimizer step.
pub const MICROS_MAX: u32 = 4096;

/// Blocks of one part of the model, hence squared norms in one message.
pub const BLOCKS_MAX: usize = 1024;

/// Payload codecs, or dtypes, that a hello may offer.
pub const OFFERS_MAX: usize = 16;

/// Text that explains something to a person: a reason, a software name.
pub const TEXT_BYTES_MAX: usize = 1024;

/// The experiment in TOML.
pub const EXPERIMENT_BYTES_MAX: usize = 48 * 1024;

/// A certificate request in DER, or a certificate chain in PEM.
pub const CERTIFICATE_BYTES_MAX: usize = 16 * 1024;

/// A mean loss per token. A uniform guess among 4 billion tokens has 22.
pub const LOSS_NATS_MAX: u64 = 10_000;

/// What a step computed or waited: 31 days.
pub const STEP_MS_MAX: u64 = 31 * 24 * 3600 * 1000;

/// Micro-batches that one participant may have in flight.
pub const IN_FLIGHT_MAX: u32 = 8;

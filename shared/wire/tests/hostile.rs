//! Hostile bytes for every decoder of the protocol: messages, headers, and frames whole.

mod mutation;

use kernels::CountingAllocator;
use wire::*;

#[global_allocator]
static MEMORY: CountingAllocator = CountingAllocator::new();

/// One test, so that nobody else allocates meanwhile.
#[test]
fn hostile_bytes_are_refused_within_twice_their_size() {
    let tensors = |count: usize| -> Vec<TensorInfo> {
        let name = |i| format!("base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight");
        (0..count).map(|i| TensorInfo { name: name(i), shape: vec![8, 576] }).collect()
    };
    let manifest = BlobRef { sha256: [7; 32], length: 1 << 20 };
    messages(&[
        FromParticipant::Hello {
            minor: 2,
            dtypes: vec![DType::F32, DType::Bf16],
            codecs: vec![0],
            software: "headwater".into(),
        },
        FromParticipant::Ready { experiment_digest: [3; 32] },
        FromParticipant::Evaluated { round: 1, loss_nats: 2.5, tokens: 1000 },
        FromParticipant::StepFinished {
            round: 1,
            step: 300,
            loss_nats: 2.5,
            tokens: 508,
            compute_ms: 1.5,
            wait_ms: 0.5,
        },
        FromParticipant::Leaving { reason: "the device was stopped".into() },
        FromParticipant::CannotResume { round: 3, attempt: 1 },
        FromParticipant::CannotMeasure { round: 3, reason: "another backend".into() },
    ]);
    messages(&[
        FromCoordinator::Welcome {
            minor: 2,
            session: 1 << 40,
            dtype: DType::F16,
            codec: 0,
            head_blocks: 1,
            tail_blocks: 1,
            experiment_toml: "[federation]\nrounds = 2\n".repeat(20),
            experiment_digest: [4; 32],
            manifest,
        },
        FromCoordinator::StartRound {
            round: 1,
            attempt: 1,
            first_step: 0,
            local_steps: 5,
            evaluate: true,
            train: true,
        },
        FromCoordinator::RoundClosed {
            round: 1,
            outcome: Outcome::Refused { reason: RefusalReason::Late, text: "late".into() },
        },
        FromCoordinator::Finish { reason: "completed".into() },
        FromCoordinator::Refused { code: 0x30, reason: "no".into() },
        FromCoordinator::ResumeRound {
            round: 1,
            attempt: 2,
            first_step: 5,
            local_steps: 5,
            evaluate: false,
            step: 7,
            reported: 6,
        },
        FromCoordinator::Measure { round: 4 },
    ]);
    let step = |segments| Request::Step {
        session: 1 << 41,
        round: 1,
        attempt: 1,
        step: 3,
        micro: 0,
        micros: 1,
        purpose: Purpose::Train,
        segments,
        trained_tokens: 508,
        step_tokens: 508,
    };
    messages(&[
        step(vec![128; 4]),
        step(vec![1; 4096]),
        Request::FetchAdapter { round: 2 },
        Request::Update { round: 1, attempt: 1, tokens: 2540, loss_nats: 2.5, tensors: tensors(8) },
        Request::Update { round: 1, attempt: 1, tokens: 2540, loss_nats: 2.5, tensors: tensors(200) },
        Request::FetchBlob { sha256: [9; 32], offset: 1 << 33 },
        Request::Enrol { csr_der: vec![0x30; 300] },
        Request::Renew { csr_der: vec![0x30; 300] },
        Request::ChannelSums { round: 4, tokens: 16_000, tensors: tensors(8) },
    ]);
    messages(&[
        AdapterListing { round: 4, adapter: "default".into(), tensors: tensors(8) },
        AdapterListing { round: 4, adapter: "default".into(), tensors: tensors(500) },
        AdapterListing {
            round: 4,
            adapter: String::new(),
            tensors: vec![TensorInfo { name: "n".into(), shape: vec![1] }; 900],
        },
    ]);
    messages(&[BlobHeader { length: 1 << 30 }]);
    messages(&[
        UpdateReply::Accepted,
        UpdateReply::Refused { reason: RefusalReason::WrongCount, text: "7 of 8".into() },
    ]);
    messages(&[Enrolled { chain_pem: "-----BEGIN CERTIFICATE-----\n".repeat(60) }]);
    messages(&[SquaredNorms { blocks: vec![1.5; 28] }, SquaredNorms { blocks: vec![0.0; 1024] }]);
    messages(&[Commit { squared_norms_head: vec![1.0, 2.0], squared_norms_tail: vec![3.0] }]);
    frames();
}

fn messages<M: Message>(sound: &[M]) {
    let seeds: Vec<_> = sound.iter().map(|message| encode(message).unwrap()).collect();
    mutation::check(&MEMORY, M::NAME, &seeds, |bytes| match decode::<M>(bytes) {
        Ok(message) => {
            // What is accepted is within every limit, so that it may be sent.
            drop(message);
            true
        }
        Err(error) => {
            assert!(error.to_string().len() < 500, "a long story: {error}");
            false
        }
    });
}

/// A header that is accepted is followed by a payload, as far as that is there; memory is taken for the one that is waited for alone.
fn frames() {
    let shape = Shape::new(&[16, 32]).unwrap();
    let values: Vec<f32> = (0..shape.elements()).map(|i| i as f32 / 7.0).collect();
    let headers = [DType::F32, DType::F16, DType::Bf16].map(|dtype| TensorHeader {
        kind: FrameKind::Activations,
        dtype,
        session: 1,
        round: 2,
        step: 3,
        micro: 4,
        shape,
    });
    let seeds = headers.map(|header| {
        let payload = Payload::new(&header, &values).unwrap();
        [&header.encode(payload.crc32c)[..], payload.bytes()].concat()
    });
    mutation::check(&MEMORY, "tensor frame", &seeds, |bytes| {
        let Some((header, payload)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return false };
        let Ok(header) = FrameHeader::decode(header) else { return false };
        let expected = headers.iter().find(|expected| expected.dtype == header.tensor.dtype);
        if expected.is_none_or(|expected| expected.check_expected(&header.tensor).is_err()) {
            return false;
        }
        let mut buffer = PayloadBuffer::new(&header);
        let room = buffer.bytes_mut();
        if payload.len() != room.len() {
            return false;
        }
        room.copy_from_slice(payload);
        buffer.into_values(&header).is_ok_and(|values| values.iter().all(|value| value.is_finite()))
    });
    // The header by itself, so that most executions do not end at a payload that is cut.
    let seeds: Vec<_> = seeds.iter().map(|frame| frame[..HEADER_BYTES].to_vec()).collect();
    mutation::check(&MEMORY, "tensor header", &seeds, |bytes| {
        let Ok(header) = bytes.try_into() else { return false };
        FrameHeader::decode(header).is_ok_and(|header| {
            assert_eq!(header.payload_bytes, header.tensor.payload_bytes());
            assert!(header.payload_bytes <= limits::PAYLOAD_BYTES_MAX);
            true
        })
    });
}

//! Golden bytes of every message and of the frame header. A failure here means that the wire has changed: then PROTOCOL.md, this file and the
//! version change together, or not at all.

use crate::*;

/// Checks that `message` encodes to these bytes and that they decode to it. `#` starts a comment.
fn check_golden<M: Message + PartialEq>(message: M, annotated: &str) {
    let golden = unhex(annotated);
    let encoded = encode(&message).unwrap();
    assert_eq!(hex(&encoded), hex(&golden), "encoding of {message:?}");
    assert_eq!(decode::<M>(&golden).as_ref(), Ok(&message), "decoding of {message:?}");
    for cut in 0..golden.len() {
        assert!(decode::<M>(&golden[..cut]).is_err(), "{cut} of {} bytes were accepted as {message:?}", golden.len());
    }
    let longer = [&golden[..], &[0]].concat();
    let left_over = CodecError::LeftOver { message: M::NAME, left: 1 };
    assert_eq!(decode::<M>(&longer).unwrap_err(), left_over, "with a byte more: {message:?}");
}

fn unhex(annotated: &str) -> Vec<u8> {
    let digits: String =
        annotated.lines().flat_map(|line| line.split('#').next()).flat_map(str::split_whitespace).collect();
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x} ")).collect()
}

const DIGEST: [u8; 32] = [0xab; 32];
const DIGEST_HEX: &str = "abababababababab abababababababab abababababababab abababababababab";

fn tensors() -> Vec<TensorInfo> {
    vec![TensorInfo { name: "a.lora_A".into(), shape: vec![8, 576] }, TensorInfo { name: "b".into(), shape: vec![3] }]
}

const TENSORS_HEX: &str = "
    02                      # two tensors
    08 612e6c6f72615f41     # name: 8 bytes, a.lora_A
    02 08 fb4002            # shape: 2 dimensions, 8 and 576
    01 62                   # name: 1 byte, b
    01 03                   # shape: 1 dimension, 3
";

#[test]
fn hello() {
    check_golden(
        FromParticipant::Hello {
            minor: 0,
            dtypes: vec![DType::F32, DType::Bf16],
            codecs: vec![0],
            software: "hw 0.1".into(),
        },
        "00              # variant
         00              # minor
         02 00 02        # two dtypes: f32, bf16
         01 00           # one codec: plain
         06 687720302e31 # software: 6 bytes, hw 0.1",
    );
}

#[test]
fn ready() {
    check_golden(FromParticipant::Ready { experiment_digest: DIGEST }, &format!("01 # variant\n{DIGEST_HEX} # digest"));
}

#[test]
fn evaluated() {
    check_golden(
        FromParticipant::Evaluated { round: 3, loss_nats: 1.5, tokens: 70_000 },
        "02               # variant
         03               # round
         000000000000f83f # mean loss, f64
         fc 70110100      # tokens, as u32 after fc",
    );
}

#[test]
fn step_finished() {
    check_golden(
        FromParticipant::StepFinished {
            round: 1,
            step: 5_000_000_000,
            loss_nats: 2.0,
            tokens: 512,
            compute_ms: 0.5,
            wait_ms: 0.25,
        },
        "03                   # variant
         01                   # round
         fd 00f2052a01000000  # step, as u64 after fd
         0000000000000040     # mean loss
         fb 0002              # tokens, as u16 after fb
         000000000000e03f     # compute_ms
         000000000000d03f     # wait_ms",
    );
}

#[test]
fn leaving() {
    check_golden(
        FromParticipant::Leaving { reason: "bye".into() },
        "04        # variant
         03 627965 # reason: 3 bytes",
    );
}

#[test]
fn cannot_resume() {
    check_golden(
        FromParticipant::CannotResume { round: 3, attempt: 2 },
        "05 # variant
         03 # round
         02 # attempt",
    );
}

#[test]
fn measuring() {
    check_golden(FromCoordinator::Measure { round: 8 }, "06 08 # variant, round");
    check_golden(
        FromParticipant::CannotMeasure { round: 8, reason: "no".into() },
        "06      # variant
         08      # round
         02 6e6f # reason: 2 bytes",
    );
    check_golden(
        Request::ChannelSums { round: 8, tokens: 300, tensors: tensors() },
        &format!("06 08 fb2c01 # variant, round, tokens\n {TENSORS_HEX}"),
    );
}

#[test]
fn purposes_keep_their_numbers() {
    for (number, purpose) in [Purpose::Train, Purpose::Evaluate, Purpose::Measure].into_iter().enumerate() {
        let (session, round, attempt, step, micro, micros) = (1, 1, 1, 1, 0, 1);
        let (segments, trained_tokens, step_tokens) = (vec![], 0, 0);
        let step = Request::Step {
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
        check_golden(step, &format!("00 01 01 01 01 00 01 {number:02x} 00 00 00"));
    }
}

#[test]
fn resume_round() {
    check_golden(
        FromCoordinator::ResumeRound {
            round: 3,
            attempt: 2,
            first_step: 10,
            local_steps: 5,
            evaluate: true,
            step: 300,
            reported: 13,
        },
        "05      # variant
         03      # round
         02      # attempt
         0a      # first step
         05      # local steps
         01      # evaluate
         fb 2c01 # step, as u16 after fb
         0d      # reported",
    );
}

#[test]
fn welcome() {
    check_golden(
        FromCoordinator::Welcome {
            minor: 0,
            session: 7,
            dtype: DType::F16,
            codec: 0,
            head_blocks: 4,
            tail_blocks: 2,
            experiment_toml: "x=1".into(),
            experiment_digest: DIGEST,
            manifest: BlobRef { sha256: DIGEST, length: 300 },
        },
        &format!(
            "00           # variant
             00           # minor
             07           # session
             01           # dtype: f16
             00           # codec: plain
             04 02        # blocks of head and tail
             03 783d31    # experiment: 3 bytes
             {DIGEST_HEX} # its digest
             {DIGEST_HEX} # manifest: digest
             fb 2c01      # manifest: length"
        ),
    );
}

#[test]
fn start_round() {
    check_golden(
        FromCoordinator::StartRound {
            round: 2,
            attempt: 1,
            first_step: 40,
            local_steps: 20,
            evaluate: true,
            train: false,
        },
        "01    # variant
         02 01 # round, attempt
         28 14 # first step, local steps
         01 00 # evaluate, train",
    );
}

#[test]
fn round_closed() {
    check_golden(
        FromCoordinator::RoundClosed { round: 2, outcome: Outcome::Aggregated },
        "02 02 00 # variant, round, outcome",
    );
    check_golden(
        FromCoordinator::RoundClosed {
            round: 2,
            outcome: Outcome::Refused { reason: RefusalReason::Late, text: "3 s late".into() },
        },
        "02 02               # variant, round
         01 00               # outcome refused: late
         08 332073206c617465 # text: 8 bytes",
    );
    check_golden(
        FromCoordinator::RoundClosed { round: 2, outcome: Outcome::Abandoned },
        "02 02 02 # variant, round, outcome",
    );
}

#[test]
fn finish_and_refused() {
    check_golden(FromCoordinator::Finish { reason: "done".into() }, "03 04 646f6e65 # variant, reason");
    check_golden(
        FromCoordinator::Refused { code: CloseCode::ExperimentDiffers.code(), reason: "no".into() },
        "04 21 02 6e6f # variant, close code, reason",
    );
}

#[test]
fn refusal_reasons_keep_their_numbers() {
    use RefusalReason::*;
    for (number, reason) in [Late, NotInCohort, Duplicate, WrongTensors, WrongCount, WrongSums].into_iter().enumerate()
    {
        check_golden(UpdateReply::Refused { reason, text: String::new() }, &format!("01 {number:02x} 00"));
    }
}

#[test]
fn step_request() {
    check_golden(
        Request::Step {
            session: 7,
            round: 1,
            attempt: 3,
            step: 9,
            micro: 0,
            micros: 2,
            purpose: Purpose::Evaluate,
            segments: vec![128, 300],
            trained_tokens: 100,
            step_tokens: 251,
        },
        "00              # variant
         07 01 03 09     # session, round, attempt, step
         00 02           # micro-batch 0 of 2
         01              # purpose: evaluate
         02 80 fb2c01    # two segments: 128 and 300 tokens
         64 fb fb00      # trained tokens of the micro-batch, of the step",
    );
}

#[test]
fn fetch_adapter() {
    check_golden(Request::FetchAdapter { round: 4 }, "01 04 # variant, round");
}

#[test]
fn update() {
    check_golden(
        Request::Update { round: 4, attempt: 1, tokens: 12, loss_nats: -0.0, tensors: tensors() },
        &format!("02 04 01 0c # variant, round, attempt, tokens\n 0000000000000080 # mean loss\n {TENSORS_HEX}"),
    );
    check_golden(UpdateReply::Accepted, "00 # variant");
}

#[test]
fn fetch_blob() {
    check_golden(
        Request::FetchBlob { sha256: DIGEST, offset: 65_536 },
        &format!("03 # variant\n{DIGEST_HEX} # digest\nfc 00000100 # offset"),
    );
    check_golden(BlobHeader { length: 250 }, "fa # length");
}

#[test]
fn enrol() {
    check_golden(Request::Enrol { csr_der: vec![0x30, 0] }, "04 02 3000 # variant, request of 2 bytes");
    check_golden(Request::Renew { csr_der: vec![0x30, 0] }, "05 02 3000 # variant, request of 2 bytes");
    check_golden(Enrolled { chain_pem: "PEM".into() }, "03 50454d # chain of 3 bytes");
}

#[test]
fn adapter_listing() {
    check_golden(
        AdapterListing { round: 4, adapter: "default".into(), tensors: tensors() },
        &format!("04 # round\n07 64656661756c74 # adapter: default\n{TENSORS_HEX}"),
    );
}

#[test]
fn norms() {
    check_golden(SquaredNorms { blocks: vec![1.0] }, "01 000000000000f03f # one block");
    check_golden(
        Commit { squared_norms_head: vec![], squared_norms_tail: vec![0.5, 2.0] },
        "00                                 # no head blocks
         02 000000000000e03f 0000000000000040 # two tail blocks",
    );
}

#[test]
fn frame_header() {
    let header = TensorHeader {
        kind: FrameKind::CutGradient,
        dtype: DType::Bf16,
        session: 7,
        round: 2,
        step: 9,
        micro: 1,
        shape: Shape::new(&[1, 512, 576]).unwrap(),
    };
    let golden = unhex(
        "48575446                              # magic HWTF
         01                                    # version
         01                                    # kind: cut gradient
         00                                    # codec: plain
         02                                    # dtype: bf16
         0700000000000000                      # session
         0900000000000000                      # step
         02000000                              # round
         01000000                              # micro-batch
         01000000 00020000 40020000 00000000   # shape, unused dimensions 0
         0000090000000000                      # payload bytes: 512 · 576 · 2
         efbeadde                              # CRC-32C of the payload
         03                                    # dimensions
         000000                                # reserved",
    );
    assert_eq!(hex(&header.encode(0xdeadbeef)), hex(&golden));
    let decoded = FrameHeader::decode(&golden.try_into().unwrap()).unwrap();
    assert_eq!(
        decoded,
        FrameHeader { tensor: header, codec: CODEC_PLAIN, payload_bytes: 589_824, payload_crc32c: 0xdeadbeef }
    );
}

#[test]
fn close_codes_keep_their_numbers() {
    let numbers = CloseCode::ALL.map(CloseCode::code);
    let golden = [0, 1, 2, 3, 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x20, 0x21, 0x30, 0x31, 0x32, 0x40];
    assert_eq!(numbers, golden);
    for code in CloseCode::ALL {
        assert_eq!(CloseCode::from_code(u64::from(code.code())), Some(code));
    }
    assert_eq!(CloseCode::from_code(0x1_0000_0000), None);
}

#[test]
fn debug_shows_no_contents() {
    let secret = "a secret sentence";
    let shown = [
        format!("{:?}", FromParticipant::Leaving { reason: secret.into() }),
        format!("{:?}", Request::Enrol { csr_der: secret.into() }),
        format!("{:?}", Request::Renew { csr_der: secret.into() }),
        format!("{:?}", Enrolled { chain_pem: secret.into() }),
        format!("{:?}", AdapterListing { round: 1, adapter: secret.into(), tensors: tensors() }),
        format!("{:?}", UpdateReply::Refused { reason: RefusalReason::Late, text: secret.into() }),
    ];
    for line in &shown {
        assert!(!line.contains("secret") && !line.contains("115"), "{line}");
    }
    assert_eq!(shown[0], "Leaving { reason: <17 bytes> }");
}

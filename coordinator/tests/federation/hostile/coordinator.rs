//! A coordinator by hand that turns on its participant: the participant ends with an error that says what was wrong.

use std::collections::HashMap;

use model::{Adapter, AdapterConfig, Manifest};
use net::{Connection, NetError, PeerIdentity, PeerName, RecvStream, SendStream};
use participant::ParticipantError;
use participant::session::{Keep, Participant};
use wire::{
    AdapterListing, BlobHeader, BlobRef, CODEC_PLAIN, CloseCode, DType, FrameKind, FromCoordinator, FromParticipant,
    MessageKind, Outcome, Request, Shape, TensorHeader, TensorInfo, UpdateReply,
};

use super::participant::frame;
use super::{HONEST, one_alone, within_a_minute};
use crate::world::World;

const SESSION: u64 = 4711;

struct Fake {
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
    welcome: Welcome,
    /// Everything a participant may fetch, by its digest.
    blobs: HashMap<[u8; 32], Vec<u8>>,
    manifest: Manifest,
    /// The participant's share of the adapter.
    adapter: Adapter,
    first_step: u64,
    local_steps: u64,
}

/// The fields of a welcome that tests change.
struct Welcome {
    dtype: DType,
    cut: (u32, u32),
    experiment_toml: String,
    experiment_digest: [u8; 32],
    manifest: BlobRef,
}

/// `script` plays the coordinator until the participant has ended.
async fn participate(script: impl AsyncFnOnce(&mut Fake)) -> Result<String, ParticipantError> {
    let world = World::new(one_alone);
    participate_as(&mut world.participant(HONEST).0, &world, script).await
}

/// The same, with a participant that may have been here before.
async fn participate_as(
    participant: &mut Participant,
    world: &World,
    script: impl AsyncFnOnce(&mut Fake),
) -> Result<String, ParticipantError> {
    within_a_minute(async {
        let peer = PeerIdentity::Participant { name: PeerName::new(HONEST).unwrap() };
        let (ours, theirs) = Connection::pair(peer, PeerIdentity::Coordinator);
        let play = async {
            let mut fake = Fake::greeted(world, theirs).await;
            script(&mut fake).await;
            // The participant has the last word: nothing is closed before it has ended.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            ended = participant.run(&ours) => ended,
            () = play => unreachable!("it never ends by itself"),
        }
    })
    .await
}

async fn check_participant_refuses(complaint: &str, script: impl AsyncFnOnce(&mut Fake)) {
    let error = participate(script).await.unwrap_err();
    assert!(error.to_string().contains(complaint), "{error}");
    assert!(!error.is_retryable(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_whose_experiment_is_not_the_one_it_names_is_refused() {
    check_participant_refuses("its experiment has digest", async |fake| {
        fake.welcome.experiment_digest[0] ^= 1;
        fake.welcome().await;
    })
    .await;
    check_participant_refuses("the coordinator's experiment", async |fake| {
        fake.welcome.experiment_toml += "\nsurprise = 1\n";
        fake.welcome().await;
    })
    .await;
}

/// Whatever the experiment says of privacy rests on where the model is cut.
#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_cuts_elsewhere_than_its_experiment_is_refused() {
    for (head, tail) in [(0, 1), (2, 1), (1, 2), (1024, 1)] {
        check_participant_refuses("the experiment's cut", async |fake| {
            fake.welcome.cut = (head, tail);
            fake.welcome().await;
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_with_another_dtype_than_its_experiment_is_refused() {
    check_participant_refuses("F16", async |fake| {
        fake.welcome.dtype = DType::F16;
        fake.welcome().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_lies_is_refused() {
    check_participant_refuses("not the one it was announced with", async |fake| {
        let bytes = fake.blobs.get_mut(&fake.welcome.manifest.sha256).unwrap();
        *bytes.last_mut().unwrap() = b' ';
        fake.welcome().await;
        fake.serve_until_ready().await;
    })
    .await;
    check_participant_refuses("tensors; expected", async |fake| {
        fake.manifest.tensors.pop();
        fake.announce_manifest();
        fake.welcome().await;
        fake.serve_until_ready().await;
    })
    .await;
    check_participant_refuses("its manifest has 34359738368 bytes", async |fake| {
        fake.welcome.manifest.length = 32 << 30;
        fake.welcome().await;
    })
    .await;
    check_participant_refuses("bytes of a blob that lacks", async |fake| {
        fake.welcome.manifest.length += 1;
        fake.welcome().await;
        fake.serve_until_ready().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_that_are_not_the_manifests_are_refused() {
    check_participant_refuses("not the one it was announced with", async |fake| {
        let embedding = fake.manifest.tensors[0].blob.sha256;
        fake.blobs.get_mut(&embedding).unwrap()[0] ^= 1;
        fake.welcome().await;
        fake.serve_until_ready().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_does_not_welcome_is_refused() {
    check_participant_refuses("StartRound", async |fake| fake.start_round(1, true).await).await;
    check_participant_refuses("it welcomed us twice", async |fake| {
        fake.welcome().await;
        fake.serve_until_ready().await;
        fake.welcome().await;
    })
    .await;
    check_participant_refuses("the coordinator refused: too late", async |fake| {
        fake.send.message(&FromCoordinator::Refused { code: 0x40, reason: "too late".into() }).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_that_is_not_the_experiments_is_refused() {
    let check = async |round: u32, first_step: u64, local_steps: u64| {
        check_participant_refuses(&format!("round {round} with steps from {first_step}"), async |fake| {
            fake.welcome().await;
            fake.serve_until_ready().await;
            (fake.first_step, fake.local_steps) = (first_step, local_steps);
            fake.start_round(round, true).await;
            fake.serve_adapter(|_| ()).await;
        })
        .await;
    };
    check(0, 0, 5).await;
    check(1, 1, 5).await;
    check(1, 0, u64::MAX).await;
    check(1, 0, 0).await;
    check(u32::MAX, 0, 5).await;
    check(2, 5, 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_that_goes_on_where_the_experiment_is_not_is_refused() {
    let check = async |first_step: u64, step: u64| {
        check_participant_refuses(&format!("round 1 with steps from {first_step}"), async |fake| {
            fake.welcome().await;
            fake.serve_until_ready().await;
            let resume = FromCoordinator::ResumeRound {
                round: 1,
                attempt: 1,
                first_step,
                local_steps: fake.local_steps,
                evaluate: false,
                step,
                reported: 0,
            };
            fake.send.message(&resume).await.unwrap();
        })
        .await;
    };
    check(u64::MAX, u64::MAX).await;
    check(0, 6).await;
    check(0, u64::MAX).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_within_a_round_is_refused() {
    check_participant_refuses("it started round 1 within a round", async |fake| {
        fake.start().await;
        fake.start_round(1, true).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_of_other_tensors_is_refused() {
    let check = async |change: fn(&mut Vec<TensorInfo>)| {
        check_participant_refuses("tensors that are not the 8 of this device's parts", async |fake| {
            fake.welcome().await;
            fake.serve_until_ready().await;
            fake.start_round(1, true).await;
            fake.serve_adapter(change).await;
        })
        .await;
    };
    check(|tensors| tensors[0].shape = vec![4, 65]).await;
    check(|tensors| tensors[0].name += "s").await;
    check(|tensors| tensors.truncate(4)).await;
    check(|tensors| tensors.swap(0, 1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_that_is_not_finite_is_refused() {
    check_participant_refuses("value 9 of the tensor is not finite", async |fake| {
        let mut values = fake.adapter.flat();
        values[9] = f32::NAN;
        fake.adapter = fake.adapter.with_flat(&values).unwrap();
        fake.start().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_answers_wrongly_is_refused() {
    let check = async |complaint: &str, change: fn(&mut TensorHeader, &mut Vec<f32>)| {
        check_participant_refuses(complaint, async |fake| {
            fake.start().await;
            let (mut send, _receive, mut header) = fake.step().await;
            let mut values = vec![0.5; header.shape.elements()];
            change(&mut header, &mut values);
            send.bytes(MessageKind::Activations, &frame(&header, &values)).await.unwrap();
        })
        .await;
    };
    check("value 2 of the tensor is not finite", |_, values| values[2] = f32::NAN).await;
    check("the frame's shape is [1, 64]", |header, values| {
        header.shape = Shape::new(&[1, 64]).unwrap();
        values.truncate(64);
    })
    .await;
    check("the frame's session is 1, expected 4711", |header, _| header.session = 1).await;
    check("the frame's step is 1, expected 0", |header, _| header.step = 1).await;
    check("the frame's kind is CutGradient", |header, _| header.kind = FrameKind::CutGradient).await;
}

/// The run's only round is 1, its final evaluation 2.
const MEASURING: u32 = 3;

fn measuring(text: &str) -> String {
    one_alone(text).replace("evaluate_every = 1", "evaluate_every = 1\nimatrix_tokens = 1000")
}

async fn check_measuring_refused(complaint: &str, script: impl AsyncFnOnce(&mut Fake)) {
    let world = World::new(measuring);
    let error = participate_as(&mut world.participant(HONEST).0, &world, script).await.unwrap_err();
    assert!(error.to_string().contains(complaint), "{error}");
    assert!(!error.is_retryable(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn measuring_within_a_round_is_refused() {
    let complaint = "the coordinator misbehaved: it asked for channel sums within a round";
    check_measuring_refused(complaint, async |fake| {
        fake.start().await;
        fake.measure().await;
    })
    .await;
    // Nor twice at once.
    check_measuring_refused(complaint, async |fake| {
        fake.welcome().await;
        fake.serve_until_ready().await;
        fake.measure().await;
        fake.measure().await;
    })
    .await;
}

/// With ever other adapters a coordinator would learn ever more of the records.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_measures_with_one_adapter() {
    let world = World::new(measuring);
    let device = || {
        let (mut participant, _) = world.participant(HONEST);
        participant.keep = Some(Keep::in_state(&world.path("device")));
        participant
    };
    let measured = async |participant: &mut Participant, scale: f32| {
        let ended = participate_as(participant, &world, async |fake| {
            fake.welcome().await;
            fake.serve_until_ready().await;
            let values: Vec<f32> = fake.adapter.flat().iter().map(|value| value * scale).collect();
            fake.adapter = fake.adapter.with_flat(&values).unwrap();
            fake.measure().await;
            fake.serve_adapter(|_| ()).await;
            fake.serve_sums().await;
            fake.send.message(&FromCoordinator::Finish { reason: "enough".into() }).await.unwrap();
        });
        (ended.await, participant.measured.is_kept(&world.experiment))
    };
    let mut participant = device();
    // Of the answer and the run's end, which are here at once, both are heard.
    assert!(matches!(measured(&mut participant, 1.0).await, (Ok(_), true)));
    assert!(matches!(measured(&mut participant, 1.0).await, (Ok(_), true)));
    // Nor does a device forget when it is started again, or a file of it is damaged.
    for damaged in ["nothing", "measured.b"] {
        std::fs::write(world.path("device/training").join(damaged), "damaged").unwrap();
        let mut restarted = device();
        for participant in [&mut participant, &mut restarted] {
            let error = measured(participant, 2.0).await.0.unwrap_err().to_string();
            let expected = "the coordinator misbehaved: it asks for channel sums with another adapter";
            assert!(error.contains(expected), "{damaged}: {error}");
        }
        assert!(matches!(measured(&mut restarted, 1.0).await, (Ok(_), true)));
    }
}

/// The coordinator gives up streams of a round before it says on the control stream what became of the round.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_was_given_up_is_explained_by_the_control_stream() {
    let ended = participate(async |fake| {
        fake.start().await;
        let (mut send, mut receive, _) = fake.step().await;
        send.reset(CloseCode::Stale);
        // Once it gives up its own direction, the participant has noticed.
        let noticed = receive.end().await;
        assert!(matches!(noticed, Err(NetError::Reset { code: Some(CloseCode::Stale), .. })), "{noticed:?}");
        fake.send.message(&FromCoordinator::RoundClosed { round: 1, outcome: Outcome::Abandoned }).await.unwrap();
        fake.send.message(&FromCoordinator::Finish { reason: "enough".into() }).await.unwrap();
    })
    .await;
    assert_eq!(ended.unwrap(), "enough");
}

impl Fake {
    /// As far as the participant's hello; the welcome is ready to be changed.
    async fn greeted(world: &World, connection: Connection) -> Self {
        let (send, mut receive) = connection.accept().await.unwrap();
        assert!(matches!(receive.message().await.unwrap(), FromParticipant::Hello { .. }));
        let (experiment, source) = (&world.experiment, &world.source);
        let manifest = Manifest::of(&**source).unwrap();
        let mut blobs = HashMap::from([(manifest.tokenizer_json.sha256, source.tokenizer().json())]);
        for (entry, info) in manifest.tensors.iter().zip(source.tensors()) {
            blobs.insert(entry.blob.sha256, source.read(info).unwrap());
        }
        let blocks = source.config().blocks;
        let config = AdapterConfig::new(&experiment.adapter);
        let adapter = Adapter::seeded(config, source.config(), 0..blocks, experiment::Seed(experiment.seed)).unwrap();
        let welcome = Welcome {
            dtype: DType::F32,
            cut: (1, 1),
            experiment_toml: experiment.resolved_toml(),
            experiment_digest: experiment.digest(),
            manifest: BlobRef { sha256: [0; 32], length: 0 },
        };
        let mut fake = Self {
            connection,
            send,
            receive,
            welcome,
            blobs,
            manifest,
            adapter: adapter.filtered(|block| block == 0 || block == blocks - 1),
            first_step: 0,
            local_steps: experiment.federation.local_steps,
        };
        fake.announce_manifest();
        fake
    }

    fn announce_manifest(&mut self) {
        let bytes = self.manifest.to_bytes();
        self.welcome.manifest = BlobRef { sha256: self.manifest.digest(), length: bytes.len() as u64 };
        self.blobs.insert(self.manifest.digest(), bytes);
    }

    async fn welcome(&mut self) {
        let Welcome { dtype, cut: (head_blocks, tail_blocks), experiment_digest, manifest, .. } = self.welcome;
        let welcome = FromCoordinator::Welcome {
            minor: wire::MINOR,
            session: SESSION,
            dtype,
            codec: CODEC_PLAIN,
            head_blocks,
            tail_blocks,
            experiment_toml: self.welcome.experiment_toml.clone(),
            experiment_digest,
            manifest,
        };
        self.send.message(&welcome).await.unwrap();
    }

    /// Gives out blobs, as they are here, until the participant has what it needs.
    async fn serve_until_ready(&mut self) {
        loop {
            tokio::select! {
                message = self.receive.message() => {
                    assert!(matches!(message.unwrap(), FromParticipant::Ready { .. }));
                    return;
                }
                stream = self.connection.accept() => {
                    let (mut send, mut receive) = stream.unwrap();
                    let Request::FetchBlob { sha256, offset } = receive.message().await.unwrap() else { panic!() };
                    let blob = &self.blobs[&sha256][offset as usize..];
                    send.message(&BlobHeader { length: blob.len() as u64 }).await.unwrap();
                    // The participant may be gone before the last byte.
                    let _ = send.bytes(MessageKind::Blob, blob).await;
                }
            }
        }
    }

    async fn start_round(&mut self, round: u32, train: bool) {
        let Self { first_step, local_steps, .. } = *self;
        let start = FromCoordinator::StartRound { round, attempt: 1, first_step, local_steps, evaluate: true, train };
        self.send.message(&start).await.unwrap();
    }

    async fn serve_adapter(&mut self, change: impl FnOnce(&mut Vec<TensorInfo>)) {
        let (mut send, mut receive) = self.connection.accept().await.unwrap();
        let Request::FetchAdapter { round } = receive.message().await.unwrap() else { panic!("no fetching") };
        let info = |tensor: &model::AdapterTensor| TensorInfo {
            name: tensor.name.clone(),
            shape: tensor.shape.map(|size| size as u32).to_vec(),
        };
        let mut tensors: Vec<TensorInfo> = self.adapter.tensors().iter().map(info).collect();
        change(&mut tensors);
        let listing = AdapterListing { round, adapter: "default".into(), tensors: tensors.clone() };
        send.message(&listing).await.unwrap();
        for (i, (tensor, info)) in self.adapter.tensors().iter().zip(&tensors).enumerate() {
            let (kind, dtype, shape, micro) = (FrameKind::Adapter, DType::F32, info.shape().unwrap(), i as u32);
            let header = TensorHeader { kind, dtype, session: SESSION, round, step: 0, micro, shape };
            // The participant may have stopped reading.
            let _ = send.bytes(MessageKind::Adapter, &frame(&header, &tensor.values)).await;
        }
    }

    /// Into the first round, in order.
    async fn start(&mut self) {
        self.welcome().await;
        self.serve_until_ready().await;
        self.start_round(1, true).await;
        self.serve_adapter(|_| ()).await;
    }

    async fn measure(&mut self) {
        self.send.message(&FromCoordinator::Measure { round: MEASURING }).await.unwrap();
    }

    /// Answers a participant that measures until its sums are here, and accepts them. The body hands back what it gets.
    async fn serve_sums(&mut self) {
        loop {
            let (mut send, mut receive) = self.connection.accept().await.unwrap();
            let frame_header = |kind, micro, shape| {
                let (session, round) = (SESSION, MEASURING);
                TensorHeader { kind, dtype: DType::F32, session, round, step: 0, micro, shape }
            };
            match receive.message().await.unwrap() {
                Request::Step { micro, segments, .. } => {
                    let shape = Shape::new(&[segments.iter().sum(), self.manifest.config.width as u32]).unwrap();
                    let header = frame_header(FrameKind::Activations, micro, shape);
                    let values = receive.tensor(&header).await.unwrap();
                    send.tensor(&header, &values).await.unwrap();
                    send.finish();
                }
                Request::ChannelSums { tensors, .. } => {
                    for (i, tensor) in tensors.iter().enumerate() {
                        let header = frame_header(FrameKind::ChannelSums, i as u32, tensor.shape().unwrap());
                        receive.tensor(&header).await.unwrap();
                    }
                    receive.end().await.unwrap();
                    send.message(&UpdateReply::Accepted).await.unwrap();
                    return send.finish();
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// The next step stream, as far as its activations; the header of the answer.
    async fn step(&mut self) -> (SendStream, RecvStream, TensorHeader) {
        let (send, mut receive) = self.connection.accept().await.unwrap();
        let Request::Step { session, round, step, micro, segments, .. } = receive.message().await.unwrap() else {
            panic!("no step")
        };
        let shape = Shape::new(&[segments.iter().sum(), self.manifest.config.width as u32]).unwrap();
        let header =
            TensorHeader { kind: FrameKind::Activations, dtype: DType::F32, session, round, step, micro, shape };
        receive.tensor(&header).await.unwrap();
        (send, receive, header)
    }
}

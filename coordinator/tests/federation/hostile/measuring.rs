//! Channel sums that are not those of the device that sends them: each refused with its reason, and the others' stay.

use model::ChannelSums;
use wire::Purpose;

use super::*;
use wire::UpdateReply;

fn measuring(text: &str) -> String {
    either(text).replace("evaluate_every = 1", "evaluate_every = 0\nimatrix_tokens = 1000")
}

/// Behind the only round, whose final evaluation would be round 2.
const ROUND: u32 = 3;

/// Both are connected behind the last round, and asked for their sums; then the hostile one does as it likes.
async fn check_measuring(misbehave: impl AsyncFnOnce(&World, &mut Hostile)) {
    within_a_minute(async {
        let world = World::new(measuring);
        let coordinator = world.coordinator();
        let honest = coordinator.join(world.participant(HONEST).0).await;
        let mut hostile = Hostile::join(&world, &coordinator).await;
        let early = hostile.channel_sums(ROUND, 8, &listing(&world), 1.0).await;
        assert_eq!(early.unwrap_err().0, RefusalReason::Late);
        // Out of the round, and connected still.
        hostile.update(1, 1, 10, &hostile.trained).await.unwrap_err();
        while !matches!(hostile.control().await, FromCoordinator::Measure { round: ROUND }) {}
        misbehave(&world, &mut hostile).await;
        drop(hostile);
        assert!(!coordinator.end().await.unwrap().stopped);
        assert_eq!(honest.await.unwrap().1.unwrap(), "completed");
        assert!(imatrix(&world, HONEST).is_file());
    })
    .await;
}

fn imatrix(world: &World, name: &str) -> std::path::PathBuf {
    world.path("runs/smoke/imatrix").join(format!("{name}.gguf"))
}

/// Names and widths of a device's own blocks, the first and the last.
fn listing(world: &World) -> Vec<TensorInfo> {
    let config = world.source.config();
    let named = ChannelSums::new(config, [0, config.blocks - 1]).named();
    named.into_iter().map(|(name, sums)| TensorInfo { name, shape: vec![sums.len() as u32] }).collect()
}

/// Sums over 8 tokens, which have gone through the body, but for `change`.
async fn check_sums_refused(
    expected: RefusalReason,
    complaint: &str,
    change: impl FnOnce(&mut u64, &mut Vec<TensorInfo>, &mut f32),
) {
    check_measuring(async |world, hostile| {
        hostile.measure(ROUND, TOKENS).await;
        let (mut tokens, mut tensors, mut value) = (u64::from(TOKENS), listing(world), 1.0);
        change(&mut tokens, &mut tensors, &mut value);
        let (reason, text) = hostile.channel_sums(ROUND, tokens, &tensors, value).await.unwrap_err();
        assert_eq!(reason, expected, "{text}");
        assert!(text.contains(complaint), "{text}");
        assert!(!imatrix(world, HOSTILE).exists());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sums_of_other_inputs_are_refused() {
    let wrong = RefusalReason::WrongSums;
    check_sums_refused(wrong, "it has 64 channels", |_, tensors, _| tensors[0].shape = vec![63]).await;
    check_sums_refused(wrong, "it has 64 channels", |_, tensors, _| tensors[0].shape = vec![1, 64]).await;
    check_sums_refused(wrong, "another input than model.layers.0.self_attn.q_proj.weight", |_, tensors, _| {
        tensors[0].name = "model.embed_tokens.weight".into();
    })
    .await;
    // A block of the body is not this device's to sum.
    check_sums_refused(wrong, "another input than model.layers.3", |_, tensors, _| {
        tensors[4].name = tensors[4].name.replace("layers.3", "layers.1");
    })
    .await;
    check_sums_refused(wrong, "sums of 80 inputs; this device's blocks have 8", |_, tensors, _| {
        *tensors = (0..10).flat_map(|_| tensors.clone()).collect();
    })
    .await;
    check_sums_refused(wrong, "sums of 0 inputs", |_, tensors, _| tensors.clear()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sums_that_no_tokens_give_are_refused() {
    check_sums_refused(RefusalReason::WrongSums, "channel 0 of model.layers.0.self_attn.q_proj.weight is negative", {
        |_, _, value: &mut f32| *value = -1.0
    })
    .await;
    // The squares of a normed row add up to its width at most.
    check_sums_refused(RefusalReason::WrongSums, "are 10.0 times what a norm can leave", |_, _, value| *value = 80.8)
        .await;
    let count = RefusalReason::WrongCount;
    check_sums_refused(count, "sums over 80 tokens, of which 8 have", |tokens, _, _| *tokens *= 10).await;
    check_sums_refused(count, "sums over 0 tokens; the experiment allows", |tokens, _, _| *tokens = 0).await;
    check_sums_refused(count, "sums over 1001 tokens; the experiment", |tokens, _, _| *tokens = 1001).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sum_that_is_not_finite_is_refused() {
    for value in [f32::NAN, f32::INFINITY, 1e19] {
        check_measuring(async |world, hostile| {
            hostile.measure(ROUND, TOKENS).await;
            let tensors = listing(world);
            let (mut send, _receive) = hostile.announce_sums(ROUND, 8, &tensors).await;
            let header = hostile.sums_header(ROUND, 0, &tensors[0]);
            let mut values = vec![1.0; header.shape.elements()];
            values[2] = value;
            send.bytes(MessageKind::ChannelSums, &frame(&header, &values)).await.unwrap();
            let complaint = "value 2 of the tensor is not finite, or above 1e18";
            check_closed(&hostile.connection.closed().await, CloseCode::NotFinite, complaint);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sums_in_order_are_kept() {
    check_measuring(async |world, hostile| {
        hostile.measure(ROUND, TOKENS).await;
        hostile.measure(ROUND, TOKENS).await;
        assert_eq!(hostile.channel_sums(ROUND, 16, &listing(world), 1.0).await, Ok(()));
        // Accepted is what is on the disk.
        assert!(imatrix(world, HOSTILE).is_file());
    })
    .await;
}

/// Whoever hears that the run is over leaves, and would never know.
#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_the_last_sums_is_there_before_the_end_is_told() {
    check_measuring(async |world, hostile| {
        hostile.measure(ROUND, TOKENS).await;
        let mut answer = hostile.send_sums(ROUND, 8, &listing(world), 1.0).await;
        while !matches!(hostile.control().await, FromCoordinator::Finish { .. }) {}
        tokio::select! {
            biased;
            answer = answer.message() => assert!(matches!(answer.unwrap(), UpdateReply::Accepted)),
            () = std::future::ready(()) => panic!("the end came first"),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_tokens_than_the_experiment_measures_are_refused() {
    check_measuring(async |_, hostile| {
        for _ in 0..3 {
            hostile.measure(ROUND, 256).await;
        }
        let _streams = hostile.request_measure(ROUND, 256).await;
        let complaint = "1024 tokens to measure on; the experiment allows 1000";
        check_closed(&hostile.connection.closed().await, CloseCode::Unexpected, complaint);
    })
    .await;
    // Nor is anything measured while it is trained.
    check_refused(CloseCode::Unexpected, "a step that measures came in round 1", async |hostile| {
        let _streams = hostile.request_measure(1, TOKENS).await;
        hostile.connection.closed().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_leaves_or_will_not_measure_is_not_waited_for() {
    check_measuring(async |_, hostile| {
        hostile.measure(ROUND, TOKENS).await;
        hostile.send.message(&FromParticipant::Leaving { reason: "no reason".into() }).await.unwrap();
        hostile.connection.closed().await;
    })
    .await;
    check_measuring(async |world, hostile| {
        let reason = "no wish".to_owned();
        hostile.send.message(&FromParticipant::CannotMeasure { round: ROUND, reason }).await.unwrap();
        assert!(matches!(hostile.control().await, FromCoordinator::Finish { .. }));
        assert!(!imatrix(world, HOSTILE).exists());
    })
    .await;
}

/// It would refuse an experiment with a key that it does not know or without one that it demands, and a message that it
/// does not know.
#[tokio::test(flavor = "multi_thread")]
async fn a_participant_of_an_older_minor_version_takes_part_and_is_not_asked() {
    within_a_minute(async {
        let world = World::new(|text| measuring(text).replace("deadline_s = 3600\n", ""));
        assert_eq!(world.experiment.federation.deadline_s, None);
        let coordinator = world.coordinator();
        let honest = coordinator.join(world.participant(HONEST).0).await;
        let mut old = Hostile::greet_as(&world, &coordinator, 2).await;
        let told = experiment::Experiment::from_toml(&old.experiment_toml, "the welcome's").unwrap();
        assert!(!old.experiment_toml.contains("imatrix_tokens"));
        assert_eq!(told.federation.deadline_s, Some(24 * 3600));
        assert_eq!(told.digest(), old.experiment_digest);
        old.ready().await;
        assert!(matches!(old.control().await, FromCoordinator::StartRound { round: 1, .. }));
        old.update(1, 1, 10, &old.trained).await.unwrap_err();
        let end = loop {
            match old.control().await {
                FromCoordinator::RoundClosed { .. } => {}
                message => break message,
            }
        };
        assert!(matches!(end, FromCoordinator::Finish { .. }), "{end:?}");
        drop(old);
        assert!(!coordinator.end().await.unwrap().stopped);
        assert_eq!(honest.await.unwrap().1.unwrap(), "completed");
        assert!(imatrix(&world, HONEST).is_file() && !imatrix(&world, HOSTILE).exists());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_was_stopped_while_it_measured_goes_on_there() {
    within_a_minute(async {
        let world = World::new(measuring);
        let coordinator = world.coordinator();
        let honest = coordinator.join(world.participant(HONEST).0).await;
        let mut hostile = Hostile::join(&world, &coordinator).await;
        hostile.update(1, 1, 10, &hostile.trained).await.unwrap_err();
        while !matches!(hostile.control().await, FromCoordinator::Measure { round: ROUND }) {}
        let leave = async {
            while !matches!(hostile.control().await, FromCoordinator::Finish { .. }) {}
            drop(hostile);
        };
        let (stopped, ()) = tokio::join!(coordinator.stop(), leave);
        assert!(stopped.unwrap().stopped);
        let (honest, reason) = honest.await.unwrap();
        assert_eq!(reason.unwrap(), "stopped after round 1 of 1");

        let coordinator = world.coordinator();
        let honest = coordinator.join(honest).await;
        let mut hostile = Hostile::greet(&world, &coordinator).await;
        hostile.ready().await;
        assert!(matches!(hostile.control().await, FromCoordinator::Measure { round: ROUND }));
        hostile.measure(ROUND, TOKENS).await;
        assert_eq!(hostile.channel_sums(ROUND, 8, &listing(&world), 1.0).await, Ok(()));
        drop(hostile);
        assert!(!coordinator.end().await.unwrap().stopped);
        assert_eq!(honest.await.unwrap().1.unwrap(), "completed");
        assert!(imatrix(&world, HONEST).is_file() && imatrix(&world, HOSTILE).is_file());
    })
    .await;
}

impl Hostile {
    /// A micro-batch to be measured, up to the body's answer.
    async fn request_measure(&self, round: u32, tokens: u32) -> (net::SendStream, net::RecvStream) {
        let step = Step { round, segments: vec![tokens], trained_tokens: 0, step_tokens: 0, ..self.step(0) };
        let (mut send, receive) = self.ask_for(Purpose::Measure, &step).await;
        send.tensor(&step.header(FrameKind::Activations), &step.values()).await.unwrap();
        send.finish();
        (send, receive)
    }

    async fn measure(&self, round: u32, tokens: u32) {
        let step = Step { round, segments: vec![tokens], ..self.step(0) };
        let (_send, mut receive) = self.request_measure(round, tokens).await;
        receive.tensor(&step.header(FrameKind::Activations)).await.unwrap();
        receive.end().await.unwrap();
    }

    async fn announce_sums(
        &self,
        round: u32,
        tokens: u64,
        tensors: &[TensorInfo],
    ) -> (net::SendStream, net::RecvStream) {
        let (mut send, receive) = self.connection.open(StreamKind::Bulk).await.unwrap();
        send.message(&Request::ChannelSums { round, tokens, tensors: tensors.to_vec() }).await.unwrap();
        (send, receive)
    }

    fn sums_header(&self, round: u32, i: u32, tensor: &TensorInfo) -> TensorHeader {
        TensorHeader { kind: FrameKind::ChannelSums, ..self.update_header(round, i, tensor) }
    }

    /// A whole upload, all of whose values are `value`; where the coordinator's reply to it comes.
    async fn send_sums(&self, round: u32, tokens: u64, tensors: &[TensorInfo], value: f32) -> net::RecvStream {
        let (mut send, receive) = self.announce_sums(round, tokens, tensors).await;
        for (i, tensor) in tensors.iter().enumerate() {
            let header = self.sums_header(round, i as u32, tensor);
            // A listing that is wrong is not read on.
            let _ = send.tensor(&header, &vec![value; header.shape.elements()]).await;
        }
        send.finish();
        receive
    }

    async fn channel_sums(
        &self,
        round: u32,
        tokens: u64,
        tensors: &[TensorInfo],
        value: f32,
    ) -> Result<(), (RefusalReason, String)> {
        match self.send_sums(round, tokens, tensors, value).await.message().await.unwrap() {
            UpdateReply::Accepted => Ok(()),
            UpdateReply::Refused { reason, text } => Err((reason, text)),
        }
    }
}

//! Participants that break the protocol, written by hand up to the point where they do: each is refused by name, and an
//! honest one beside it trains as if it had been alone. The other direction, a hostile coordinator, is in `coordinator`.

mod coordinator;
mod measuring;
mod participant;
mod resumed;

use std::sync::Arc;
use std::time::Duration;

use ::coordinator::serve::CONNECTIONS_OF_PEER_MAX;
use model::Adapter;
use net::{NetError, StreamKind};
use tokio::sync::OnceCell;
use tokio::task::JoinHandle;
use wire::{
    BlobRef, CloseCode, DType, FrameKind, FromCoordinator, FromParticipant, Message, MessageKind, RefusalReason,
    Request, Shape, TensorHeader, TensorInfo,
};

use self::participant::{Hostile, Step, frame, hello};
use crate::world::{CONNECTIONS_MAX, Coordinator, Holding, Joined, World, alone, run_to_the_end};

const HONEST: &str = "press-1";
const HOSTILE: &str = "mill-1";
const TOKENS: u32 = 8;

/// One round in which either of two is enough.
fn either(text: &str) -> String {
    text.replace("quorum = 2", "quorum = 1").replace("rounds = 2", "rounds = 1")
}

fn one_alone(text: &str) -> String {
    alone(text).replace("rounds = 2", "rounds = 1")
}

/// A guard against hanging, and no measure of anything.
async fn within_a_minute<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(600), what).await.expect("somebody waits for ever")
}

pub fn check_closed(error: &NetError, expected: CloseCode, complaint: &str) {
    let NetError::Closed { code, reason, .. } = error else { panic!("{error}") };
    assert_eq!(*code, Some(expected), "{reason}");
    assert!(reason.contains(complaint), "{reason}");
}

/// What the honest participant leaves where there was never anybody else.
async fn check_ends_as_alone(world: &World, coordinator: Coordinator, honest: JoinHandle<Joined>) {
    static ALONE: OnceCell<Adapter> = OnceCell::const_new();
    let expected = ALONE.get_or_init(async || {
        let world = World::new(one_alone);
        run_to_the_end(&world, &[HONEST]).await;
        world.adapter(1)
    });
    assert!(!coordinator.end().await.unwrap().stopped);
    assert_eq!(honest.await.unwrap().1.unwrap(), "completed");
    assert_eq!(world.adapter(1), *expected.await);
}

/// Both are in the round; `misbehave` must come before the hostile one commits a step.
async fn check_beside(misbehave: impl AsyncFnOnce(&mut Hostile)) {
    within_a_minute(async {
        let world = World::new(either);
        let coordinator = world.coordinator();
        let honest = coordinator.join(world.participant(HONEST).0).await;
        let mut hostile = Hostile::join(&world, &coordinator).await;
        misbehave(&mut hostile).await;
        drop(hostile);
        check_ends_as_alone(&world, coordinator, honest).await;
    })
    .await;
}

/// Both are in the round, and the coordinator closes the hostile one's connection.
async fn check_refused(code: CloseCode, complaint: &str, misbehave: impl AsyncFnOnce(&mut Hostile)) {
    check_beside(async |hostile| {
        misbehave(hostile).await;
        check_closed(&hostile.connection.closed().await, code, complaint);
    })
    .await;
}

/// The hostile one has the coordinator to itself; the honest one comes when it is gone.
async fn check_before(misbehave: impl AsyncFnOnce(&World, &Coordinator)) {
    within_a_minute(async {
        let world = World::new(one_alone);
        let coordinator = world.coordinator();
        misbehave(&world, &coordinator).await;
        let honest = coordinator.join(world.participant(HONEST).0).await;
        check_ends_as_alone(&world, coordinator, honest).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tensor_that_is_not_finite_is_refused() {
    check_refused(CloseCode::NotFinite, "value 3 of the tensor is not finite", async |hostile| {
        let step = hostile.step(0);
        let (mut send, _receive) = hostile.ask(&step).await;
        let mut values = step.values();
        values[3] = f32::NAN;
        let activations = frame(&step.header(FrameKind::Activations), &values);
        send.bytes(MessageKind::Activations, &activations).await.unwrap();
    })
    .await;
    check_refused(CloseCode::NotFinite, "value 5 of the tensor is not finite", async |hostile| {
        let step = hostile.step(0);
        let (mut send, _receive) = hostile.forward(&step).await;
        let mut values = step.values();
        values[5] = f32::INFINITY;
        let gradient = frame(&step.header(FrameKind::CutGradient), &values);
        send.bytes(MessageKind::CutGradient, &gradient).await.unwrap();
    })
    .await;
    check_refused(CloseCode::NotFinite, "value 0 of the tensor is not finite", async |hostile| {
        let (mut send, _receive) = hostile.announce_update(1, 1, 10, &hostile.trained).await;
        let header = hostile.update_header(1, 0, &hostile.trained[0]);
        let mut values = vec![0.0; header.shape.elements()];
        values[0] = f32::NAN;
        send.bytes(MessageKind::Update, &frame(&header, &values)).await.unwrap();
    })
    .await;
}

/// Above what the protocol allows, and below it but so that nothing finite comes of it.
#[tokio::test(flavor = "multi_thread")]
async fn values_beyond_all_measure_are_refused() {
    for (value, complaint) in [(1e38, "above 1e18 in magnitude"), (-3.4e38, "above 1e18 in magnitude")] {
        check_refused(CloseCode::NotFinite, complaint, async |hostile| {
            let step = hostile.step(0);
            let (mut send, _receive) = hostile.ask(&step).await;
            let mut values = step.values();
            values[2] = value;
            let activations = frame(&step.header(FrameKind::Activations), &values);
            send.bytes(MessageKind::Activations, &activations).await.unwrap();
        })
        .await;
        check_refused(CloseCode::NotFinite, complaint, async |hostile| {
            let (mut send, _receive) = hostile.announce_update(1, 1, 10, &hostile.trained).await;
            let header = hostile.update_header(1, 0, &hostile.trained[0]);
            let mut values = vec![0.0; header.shape.elements()];
            values[0] = value;
            send.bytes(MessageKind::Update, &frame(&header, &values)).await.unwrap();
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_opened_and_given_up_all_the_time_end_the_connection() {
    check_refused(CloseCode::OverLimit, "streams were opened and given up in a row", async |hostile| {
        for _ in 0..400 {
            let Ok((mut send, _receive)) = hostile.connection.open(StreamKind::Bulk).await else { return };
            // Half a length, so that the stream is there at all.
            let _ = send.bytes(MessageKind::Control, &[1, 0]).await;
            send.reset(CloseCode::Stale);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tensor_that_was_not_due_is_refused() {
    let check = async |complaint: &str, change: fn(&mut TensorHeader)| {
        check_refused(CloseCode::Unexpected, complaint, async |hostile| {
            let step = hostile.step(0);
            let (mut send, _receive) = hostile.ask(&step).await;
            let mut header = step.header(FrameKind::Activations);
            change(&mut header);
            // The coordinator may stop reading at the header.
            let _ = send.tensor(&header, &vec![0.5; header.shape.elements()]).await;
        })
        .await;
    };
    check("the frame's shape is [8, 63], expected [8, 64]", |h| h.shape = Shape::new(&[TOKENS, 63]).unwrap()).await;
    check("the frame's dtype is F16, expected F32", |h| h.dtype = DType::F16).await;
    check("the frame's session is 9, expected", |h| h.session = 9).await;
    check("the frame's round is 2, expected 1", |h| h.round = 2).await;
    check("the frame's step is 1, expected 0", |h| h.step = 1).await;
    check("the frame's micro-batch is 1, expected 0", |h| h.micro = 1).await;
    // A gradient whose forward pass never was.
    check("the frame's kind is CutGradient, expected Activations", |h| h.kind = FrameKind::CutGradient).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_does_not_fit_the_run_is_refused() {
    let check = async |code: CloseCode, complaint: &str, change: fn(&mut Step)| {
        check_refused(code, complaint, async |hostile| {
            let mut step = hostile.step(0);
            change(&mut step);
            let (mut send, _receive) = hostile.ask(&step).await;
            if let Some(header) = step.checked_header(FrameKind::Activations) {
                let _ = send.tensor(&header, &step.values()).await;
            }
        })
        .await;
    };
    let unexpected = CloseCode::Unexpected;
    check(unexpected, "a step of session 9 in session", |s| s.session = 9).await;
    check(unexpected, "step 1, micro-batch 0 came where step 0, micro-batch 0 was due", |s| s.step = 1).await;
    check(unexpected, "step 18446744073709551615, micro-batch 0 came", |s| s.step = u64::MAX).await;
    check(unexpected, "micro-batch 1 of a step of 1", |s| s.micro = 1).await;
    check(unexpected, "a step of 0 micro-batches", |s| s.micros = 0).await;
    check(unexpected, "a step of 2 micro-batches; the experiment has 1", |s| s.micros = 2).await;
    check(unexpected, "a step of 0 trained tokens", |s| s.step_tokens = 0).await;
    check(CloseCode::OverLimit, "a step of 257 trained tokens; the experiment allows 256", |s| s.step_tokens = 257)
        .await;
    check(CloseCode::OverLimit, "a micro-batch of 257 tokens; the experiment allows 256", |s| s.segments = vec![257])
        .await;
    check(CloseCode::OverLimit, "a micro-batch of 8589934590 tokens", |s| s.segments = vec![u32::MAX; 2]).await;
    check(unexpected, "segment", |s| s.segments = vec![8, 0]).await;
    check(unexpected, "segment", |s| s.segments = Vec::new()).await;
    check(unexpected, "9 trained tokens in a micro-batch of 8", |s| s.trained_tokens = 9).await;
    check(unexpected, "micro-batches of 7 trained tokens in step 0, which has 8", |s| s.trained_tokens = 7).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_of_another_round_or_attempt_ends_its_stream_alone() {
    for (round, attempt) in [(2, 1), (0, 1), (1, 2), (1, 0)] {
        check_beside(async |hostile| hostile.check_stale(&Step { round, attempt, ..hostile.step(0) }).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_before_the_round_starts_ends_its_stream_alone() {
    within_a_minute(async {
        let world = World::new(either);
        let coordinator = world.coordinator();
        let mut hostile = Hostile::greet(&world, &coordinator).await;
        hostile.check_stale(&hostile.step(0)).await;
        hostile.ready().await;
        hostile.check_stale(&hostile.step(0)).await;
        let honest = coordinator.join(world.participant(HONEST).0).await;
        assert!(matches!(hostile.control().await, FromCoordinator::StartRound { round: 1, .. }));
        drop(hostile);
        check_ends_as_alone(&world, coordinator, honest).await;
    })
    .await;
}

/// An answer that merely ended would be a broken peer's.
#[tokio::test(flavor = "multi_thread")]
async fn streams_under_way_when_the_run_is_stopped_are_given_up() {
    within_a_minute(async {
        let world = World::new(one_alone);
        let coordinator = world.coordinator();
        let mut hostile = Hostile::join(&world, &coordinator).await;
        let (_send, mut receive) = hostile.forward(&hostile.step(0)).await;
        let leave = async {
            assert!(matches!(hostile.control().await, FromCoordinator::Finish { .. }));
            let given_up = receive.end().await;
            assert_eq!(given_up, Err(NetError::Reset { code: Some(CloseCode::Stale), number: 3 }));
            drop(hostile);
        };
        let (stopped, ()) = tokio::join!(coordinator.stop(), leave);
        assert!(stopped.unwrap().stopped);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_sent_twice_is_refused() {
    check_refused(CloseCode::Unexpected, "step 0, micro-batch 0 came", async |hostile| {
        let _first = hostile.forward(&hostile.step(0)).await;
        let _second = hostile.request_forward(&hostile.step(0)).await;
        // Ending either stream now would be another mistake.
        hostile.connection.closed().await;
    })
    .await;
    check_before(async |world, coordinator| {
        let hostile = Hostile::join(world, coordinator).await;
        hostile.train(0).await;
        let _streams = hostile.request_forward(&hostile.step(0)).await;
        let complaint = "step 0, micro-batch 0 came where step 1, micro-batch 0 was due";
        check_closed(&hostile.connection.closed().await, CloseCode::Unexpected, complaint);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_never_comes_holds_nobody_up_once_its_sender_has_left() {
    check_beside(async |hostile| {
        let step = hostile.step(0);
        let (mut send, mut receive) = hostile.forward(&step).await;
        hostile.backward(&step, &mut send, &mut receive).await;
        hostile.send.message(&FromParticipant::Leaving { reason: "no reason".into() }).await.unwrap();
        check_closed(&hostile.connection.closed().await, CloseCode::Done, "the participant left: no reason");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_without_its_steps_is_refused() {
    check_beside(async |hostile| {
        let (reason, text) = hostile.update(1, 1, 10, &hostile.trained).await.unwrap_err();
        assert_eq!((reason, text.as_str()), (RefusalReason::WrongCount, "its steps are not complete"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_of_other_tensors_is_refused() {
    let check = async |change: fn(&mut Vec<TensorInfo>)| {
        check_beside(async |hostile| {
            let mut tensors = hostile.trained.clone();
            change(&mut tensors);
            let (reason, text) = hostile.update(1, 1, 10, &tensors).await.unwrap_err();
            assert_eq!(reason, RefusalReason::WrongTensors);
            assert!(text.contains("tensors that are not the 8 that this run trains"), "{text}");
        })
        .await;
    };
    check(|tensors| tensors.truncate(7)).await;
    check(|tensors| tensors.clear()).await;
    check(|tensors| tensors.swap(0, 1)).await;
    check(|tensors| tensors[0].shape = vec![5, 64]).await;
    // A block of the body is nobody's to send.
    check(|tensors| tensors[0].name = tensors[0].name.replace("layers.0", "layers.1")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_of_another_round_or_attempt_is_refused() {
    check_beside(async |hostile| {
        for (round, attempt) in [(2, 1), (0, 1), (1, 2), (1, 0)] {
            let (reason, text) = hostile.update(round, attempt, 10, &hostile.trained).await.unwrap_err();
            assert_eq!(reason, RefusalReason::Late, "{text}");
        }
    })
    .await;
}

/// The weight of an update is what its sender has trained on, not what it claims.
#[tokio::test(flavor = "multi_thread")]
async fn an_update_that_claims_more_tokens_than_it_has_trained_on_is_refused() {
    for claimed in [0, 5 * u64::from(TOKENS) + 1, u64::MAX] {
        check_before(async |world, coordinator| {
            let hostile = Hostile::join(world, coordinator).await;
            for step in 0..hostile.local_steps {
                hostile.train(step).await;
            }
            let (reason, text) = hostile.update(1, 1, claimed, &hostile.trained).await.unwrap_err();
            assert_eq!(reason, RefusalReason::WrongCount, "{text}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_of_a_step_that_is_not_the_rounds_is_refused() {
    for (round, step) in [(1, 5), (1, u64::MAX), (0, 0), (2, 5), (u32::MAX, 0)] {
        check_refused(CloseCode::Unexpected, "in a report of round", async |hostile| {
            hostile.report(round, step, 1).await;
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_that_contradicts_the_step_is_refused() {
    let check = async |complaint: &str, reports: &[u64]| {
        check_before(async |world, coordinator| {
            let mut hostile = Hostile::join(world, coordinator).await;
            hostile.train(0).await;
            for &tokens in reports {
                hostile.report(1, 0, tokens).await;
            }
            check_closed(&hostile.connection.closed().await, CloseCode::Unexpected, complaint);
        })
        .await;
    };
    check("a report of 9 trained tokens in step 0, which had 8", &[9]).await;
    check("a second report of step 0", &[8, 8]).await;
    check_refused(CloseCode::Unexpected, "a report of step 0, which is not complete", async |hostile| {
        hostile.report(1, 0, 8).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_of_an_evaluation_that_was_not_is_refused() {
    for (round, tokens, complaint) in
        [(0, 5, "an evaluation on 5 tokens, of which 0 have come"), (1, 5, "an evaluation after round 1")]
    {
        check_refused(CloseCode::Unexpected, complaint, async |hostile| {
            let report = FromParticipant::Evaluated { round, loss_nats: 1.0, tokens };
            hostile.send.message(&report).await.unwrap();
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_figure_that_cannot_be_is_refused() {
    let figures = [
        (f64::NAN, CloseCode::MalformedMessage, "NaN is not finite"),
        (-1.0, CloseCode::MalformedMessage, "-1 is negative"),
        (1e12, CloseCode::OverLimit, "holds 1000000000000, the limit is"),
    ];
    for (figure, code, complaint) in figures {
        let step = |loss_nats, compute_ms, wait_ms| {
            let (round, step, tokens) = (1, 0, 8);
            forged(&FromParticipant::StepFinished { round, step, loss_nats, tokens, compute_ms, wait_ms }, figure)
        };
        let evaluated = FromParticipant::Evaluated { round: 0, loss_nats: HONEST_FIGURE, tokens: 0 };
        for report in [
            step(HONEST_FIGURE, 1.0, 1.0),
            step(1.0, HONEST_FIGURE, 1.0),
            step(1.0, 1.0, HONEST_FIGURE),
            forged(&evaluated, figure),
        ] {
            check_refused(code, complaint, async |hostile| {
                hostile.send.bytes(MessageKind::Control, &report).await.unwrap();
            })
            .await;
        }
        check_refused(code, complaint, async |hostile| {
            let (mut send, _receive) = hostile.connection.open(StreamKind::Bulk).await.unwrap();
            let (loss_nats, tensors) = (HONEST_FIGURE, hostile.trained.clone());
            let update = Request::Update { round: 1, attempt: 1, tokens: 10, loss_nats, tensors };
            send.bytes(MessageKind::Update, &forged(&update, figure)).await.unwrap();
            hostile.connection.closed().await;
        })
        .await;
    }
}

/// Where no gradient crosses, the body does not look at what number a micro-batch has.
#[tokio::test(flavor = "multi_thread")]
async fn in_forward_only_mode_too_a_micro_batch_is_one_of_its_step() {
    within_a_minute(async {
        let world = World::new(|text| one_alone(text).replace("mode = \"u\"", "mode = \"forward_only\""));
        let coordinator = world.coordinator();
        let hostile = Hostile::join(&world, &coordinator).await;
        let mut step = hostile.step(0);
        step.micro = u32::MAX;
        let _streams = hostile.ask(&step).await;
        let complaint = "micro-batch 4294967295 of a step of 1";
        check_closed(&hostile.connection.closed().await, CloseCode::Unexpected, complaint);
        coordinator.stop().await.unwrap();
    })
    .await;
}

/// A device may lose some connections before the first of them times out, and no more.
#[tokio::test(flavor = "multi_thread")]
async fn one_peer_has_a_few_connections() {
    check_before(async |world, coordinator| {
        let mut greeted = Vec::new();
        for _ in 0..CONNECTIONS_OF_PEER_MAX {
            greeted.push(Hostile::greet(world, coordinator).await);
        }
        let one_more = coordinator.connect(HOSTILE).await;
        check_closed(&one_more.closed().await, CloseCode::NoRoom, "8 connections of this peer are served already");
    })
    .await;
}

/// Where no gradient crosses, the body keeps no count of a member's steps.
#[tokio::test(flavor = "multi_thread")]
async fn in_forward_only_mode_an_update_rests_on_the_steps_that_came() {
    let check = async |steps: u64, claimed: u64, expected: Result<(), &str>| {
        within_a_minute(async {
            let world = World::new(|text| one_alone(text).replace("mode = \"u\"", "mode = \"forward_only\""));
            let coordinator = world.coordinator();
            let mut hostile = Hostile::join(&world, &coordinator).await;
            hostile.trained.retain(|tensor| tensor.name.contains("layers.3."));
            for step in 0..steps {
                let step = hostile.step(step);
                let (mut send, mut receive) = hostile.forward(&step).await;
                send.finish();
                receive.end().await.unwrap();
            }
            let refused = hostile.update(1, 1, claimed, &hostile.trained).await;
            let expected = expected.map_err(|text| (RefusalReason::WrongCount, text.to_owned()));
            assert_eq!(refused, expected);
            // It goes once the coordinator takes leave.
            let (stopped, ()) = tokio::join!(coordinator.stop(), async { drop(hostile) });
            stopped.unwrap();
        })
        .await;
    };
    check(4, 32, Err("its steps are not complete")).await;
    check(5, 41, Err("it claims 41 trained tokens; its steps had 40")).await;
    check(5, 40, Ok(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_not_the_runs_is_refused() {
    check_before(async |world, coordinator| {
        let hostile = Hostile::greet(world, coordinator).await;
        hostile.check_blob_refused([7; 32], 0, "a blob that is no part of this run's model").await;
    })
    .await;
    check_before(async |world, coordinator| {
        let hostile = Hostile::greet(world, coordinator).await;
        let BlobRef { sha256, length } = hostile.manifest;
        let complaint = format!("offset {} in a blob of {length} bytes", length + 1);
        hostile.check_blob_refused(sha256, length + 1, &complaint).await;
    })
    .await;
}

/// Both honest ones are in the round; then a crowd comes that never says hello.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_connection_more_than_there_is_room_for_is_turned_away() {
    within_a_minute(async {
        let world = World::new(|text| text.replace("rounds = 2", "rounds = 1"));
        let coordinator = world.coordinator();
        let (mut press, _) = world.participant(HONEST);
        let (holding, mut reached, release) = Holding::at(0);
        press.reporter = Arc::new(holding);
        let honest = [coordinator.join(press).await, coordinator.join(world.participant("mill-1").0).await];
        reached.recv().await.unwrap();
        let mut crowd = Vec::new();
        for number in 2..CONNECTIONS_MAX {
            crowd.push(coordinator.connect(&format!("packer-{number}")).await);
        }
        let late = coordinator.connect("packer-1").await.closed().await;
        check_closed(&late, CloseCode::NoRoom, &format!("{CONNECTIONS_MAX} connections are served already"));
        assert!(late.is_retryable());
        drop((crowd, reached, release));
        for joined in honest {
            assert_eq!(joined.await.unwrap().1.unwrap(), "completed");
        }
        assert_eq!(coordinator.end().await.unwrap().rounds, 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_hello_is_refused() {
    check_refused(CloseCode::Unexpected, "a second hello", async |hostile| {
        hostile.send.message(&hello()).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn being_ready_twice_is_refused() {
    check_refused(CloseCode::Unexpected, "a second ready", async |hostile| hostile.ready().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn being_ready_for_another_experiment_is_refused() {
    check_before(async |world, coordinator| {
        let mut hostile = Hostile::greet(world, coordinator).await;
        hostile.experiment_digest[0] ^= 1;
        hostile.ready().await;
        let error = hostile.connection.closed().await;
        check_closed(&error, CloseCode::ExperimentDiffers, "the experiments differ");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn anything_but_a_hello_first_is_refused() {
    check_before(async |_, coordinator| {
        let connection = coordinator.connect(HOSTILE).await;
        let (mut send, _receive) = connection.open(StreamKind::Control).await.unwrap();
        send.message(&FromParticipant::Ready { experiment_digest: [0; 32] }).await.unwrap();
        check_closed(&connection.closed().await, CloseCode::Incompatible, "came where a hello was due");
    })
    .await;
}

const HONEST_FIGURE: f64 = 0.25;

/// A message with another figure where the honest one stands: our own encoder refuses to write it.
fn forged(message: &impl Message, figure: f64) -> Vec<u8> {
    let mut body = wire::encode(message).unwrap();
    let at = body.windows(8).position(|bytes| bytes == HONEST_FIGURE.to_le_bytes()).unwrap();
    body[at..at + 8].copy_from_slice(&figure.to_le_bytes());
    [&(body.len() as u32).to_le_bytes()[..], &body].concat()
}

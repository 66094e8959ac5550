//! Participants that lose their connection within a round and come back: what they have left undone does not count.

use experiment::Row;

use super::*;

/// One round of one member, with steps of two micro-batches that only the tail trains on.
fn forward_only_in_two(text: &str) -> String {
    one_alone(text).replace("mode = \"u\"", "mode = \"forward_only\"").replace("accumulate = 1", "accumulate = 2")
}

/// The hostile one loses its connection and is back: how it is received.
async fn come_back(world: &World, coordinator: &mut Coordinator, lost: Hostile) -> (Hostile, FromCoordinator) {
    lost.connection.close(CloseCode::GoingAway, "the cable is pulled");
    coordinator.until(|row| matches!(row, Row::Departure { .. })).await;
    let mut hostile = Hostile::greet(world, coordinator).await;
    hostile.ready().await;
    let received = hostile.control().await;
    (hostile, received)
}

/// A session counts what earlier ones have committed: by one micro-batch of each, steps would come at half their price.
#[tokio::test(flavor = "multi_thread")]
async fn in_forward_only_mode_a_step_is_committed_with_all_of_its_micro_batches() {
    let check = async |micros: &[u32], next: u64, expected: Result<(), &str>| {
        within_a_minute(async {
            let world = World::new(forward_only_in_two);
            let mut coordinator = world.coordinator();
            let hostile = Hostile::join(&world, &coordinator).await;
            for step in 0..hostile.local_steps {
                for &micro in micros {
                    let step = Step { micro, micros: 2, step_tokens: 2 * TOKENS, ..hostile.step(step) };
                    let (mut send, mut receive) = hostile.forward(&step).await;
                    send.finish();
                    receive.end().await.unwrap();
                }
            }
            let (mut hostile, received) = come_back(&world, &mut coordinator, hostile).await;
            let is_next = matches!(received, FromCoordinator::ResumeRound { step, .. } if step == next);
            assert!(is_next, "{micros:?}: {received:?}");
            hostile.trained.retain(|tensor| tensor.name.contains("layers.3."));
            let refused = hostile.update(1, 1, 80, &hostile.trained).await;
            let expected = expected.map_err(|text| (RefusalReason::WrongCount, text.to_owned()));
            assert_eq!(refused, expected, "{micros:?}");
            // It goes once the coordinator takes leave.
            let (stopped, ()) = tokio::join!(coordinator.stop(), async { drop(hostile) });
            stopped.unwrap();
        })
        .await;
    };
    check(&[1], 0, Err("its steps are not complete")).await;
    check(&[0], 0, Err("its steps are not complete")).await;
    check(&[0, 1], 5, Ok(())).await;
    check(&[1, 0], 5, Ok(())).await;
}

/// Nobody has asked it to go on with the round; or somebody has, and it has answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_round_given_up_unasked_or_twice_is_refused() {
    let cannot = FromParticipant::CannotResume { round: 1, attempt: 1 };
    let complaint = "giving up round 1, attempt 1, which was not resumed or is given up already";
    check_refused(CloseCode::Unexpected, complaint, async |hostile| {
        hostile.send.message(&cannot).await.unwrap();
    })
    .await;
    within_a_minute(async {
        let world = World::new(one_alone);
        let mut coordinator = world.coordinator();
        let hostile = Hostile::join(&world, &coordinator).await;
        let (mut hostile, received) = come_back(&world, &mut coordinator, hostile).await;
        assert!(matches!(received, FromCoordinator::ResumeRound { round: 1, attempt: 1, .. }), "{received:?}");
        hostile.send.message(&cannot).await.unwrap();
        assert!(matches!(hostile.control().await, FromCoordinator::RoundClosed { round: 1, .. }));
        hostile.send.message(&cannot).await.unwrap();
        check_closed(&hostile.connection.closed().await, CloseCode::Unexpected, complaint);
        coordinator.stop().await.unwrap();
    })
    .await;
}

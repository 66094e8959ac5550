//! Scenarios of a run as lists of events and the actions they lead to, and random schedules against the machine's
//! promises. Failure is a broken promise: an aggregate below the quorum, a member counted twice, a round number that
//! comes again, a run of well-behaved members that gets stuck. A failed run is no failure where members spoil it.

use proptest::prelude::*;

use super::*;

mod measuring;

const SECOND_MS: u64 = 1000;
/// Anything that is not meant to be late happens well before this.
const DEADLINE_MS: u64 = 10 * SECOND_MS;

fn federation(rounds: u32, cohort: u32, quorum: u32) -> Federation {
    Federation {
        rounds,
        cohort,
        quorum,
        deadline_s: Some(DEADLINE_MS / SECOND_MS),
        local_steps: 5,
        evaluate_every: 0,
        imatrix_tokens: 0,
        average: experiment::Average::Factors,
        strategy: experiment::Strategy::FedAvg,
    }
}

fn evaluating(evaluate_every: u32, federation: Federation) -> Federation {
    Federation { evaluate_every, ..federation }
}

fn name(name: &str) -> ParticipantName {
    ParticipantName::new(name)
}

fn names(list: &str) -> Vec<ParticipantName> {
    list.split_whitespace().map(name).collect()
}

fn joined(participant: &str) -> Event {
    joined_with(0, participant)
}

fn joined_with(key: u8, participant: &str) -> Event {
    Event::Joined { participant: name(participant), device: DeviceId([key; 32]) }
}

fn departed(participant: &str) -> Event {
    Event::Departed { participant: name(participant) }
}

fn lost(participant: &str) -> Event {
    Event::Lost { participant: name(participant) }
}

fn resume(participant: &str, round: u32) -> Action {
    let first_step = u64::from(round - 1) * 5;
    Action::ResumeMember { participant: name(participant), round, attempt: 1, first_step, evaluate: false }
}

/// An update of 7 tokens for the first attempt of `round`.
fn update(participant: &str, round: u32) -> Event {
    update_of(participant, round, 1)
}

fn update_of(participant: &str, round: u32, attempt: u32) -> Event {
    Event::UpdateArrived { participant: name(participant), round, attempt, tokens: 7 }
}

fn evaluated(participant: &str, round: u32) -> Event {
    Event::Evaluated { participant: name(participant), round }
}

fn supersede(participant: &str) -> Action {
    Action::Supersede { participant: name(participant) }
}

fn start(round: u32, cohort: &str) -> Action {
    start_again(round, 1, cohort)
}

fn start_again(round: u32, attempt: u32, cohort: &str) -> Action {
    let first_step = u64::from(round - 1) * 5;
    Action::StartRound { round, attempt, cohort: names(cohort), first_step, evaluate: false }
}

fn accept(participant: &str, round: u32) -> Action {
    Action::AcceptUpdate { participant: name(participant), round }
}

fn refuse(participant: &str, round: u32, reason: Refusal) -> Action {
    Action::RefuseUpdate { participant: name(participant), round, reason }
}

fn remove(participant: &str) -> Action {
    Action::RemoveMember { participant: name(participant) }
}

fn aggregate(round: u32, members: &str) -> Action {
    let members = names(members).into_iter().map(|participant| Contribution { participant, tokens: 7 }).collect();
    Action::Aggregate { round, members }
}

fn abandon(round: u32, attempt: u32, why: Abandonment) -> Action {
    Action::AbandonRound { round, attempt, why }
}

fn wait_for(round: u32, missing: usize) -> Action {
    Action::WaitFor { round, missing }
}

fn finish(reason: FinishReason) -> Action {
    Action::Finish { reason }
}

/// Feeds each event at its time and compares the actions.
#[track_caller]
fn check_scenario(federation: Federation, ops: Vec<(u64, Event, Vec<Action>)>) {
    check_continued(Rounds::new(federation, 1, Seed(0)), ops);
}

#[track_caller]
fn check_continued(mut rounds: Rounds, ops: Vec<(u64, Event, Vec<Action>)>) {
    for (index, (now_ms, event, expected)) in ops.into_iter().enumerate() {
        let described = format!("{event:?}");
        assert_eq!(rounds.handle(event, now_ms), expected, "operation {index}, at {now_ms} ms: {described}");
    }
}

#[test]
fn rounds_follow_each_other_until_the_last() {
    check_scenario(
        federation(2, 2, 1),
        vec![
            (0, joined("bert"), vec![wait_for(1, 1)]),
            (1, joined("anna"), vec![start(1, "anna bert")]),
            (2, update("bert", 1), vec![accept("bert", 1)]),
            (3, update("anna", 1), vec![accept("anna", 1), aggregate(1, "anna bert"), start(2, "anna bert")]),
            (4, update("anna", 2), vec![accept("anna", 2)]),
            (5, update("bert", 2), vec![accept("bert", 2), aggregate(2, "anna bert"), finish(FinishReason::Completed)]),
            (6, Event::Ticked, vec![]),
            (7, Event::StopRequested, vec![]),
            (8, joined("cleo"), vec![Action::RefuseJoin { participant: name("cleo"), reason: JoinRefusal::Finished }]),
        ],
    );
}

#[test]
fn the_base_every_other_round_and_the_last_are_evaluated() {
    let mut rounds = Rounds::new(evaluating(2, federation(4, 1, 1)), 1, Seed(0));
    let mut evaluates = Vec::new();
    let mut actions = rounds.handle(joined("anna"), 0);
    for now_ms in 1..=4 {
        let Some(&Action::StartRound { round, evaluate, .. }) = actions.last() else { panic!("{actions:?}") };
        evaluates.push((round, evaluate));
        actions = rounds.handle(update("anna", round), now_ms);
    }
    assert_eq!(evaluates, [(1, true), (2, false), (3, true), (4, false)]);
    let last = Action::Evaluate { round: 4, participants: names("anna") };
    assert_eq!(actions, [accept("anna", 4), aggregate(4, "anna"), last]);
    assert_eq!(rounds.handle(evaluated("anna", 2), 5), [], "an old evaluation is not the awaited one");
    assert_eq!(rounds.handle(evaluated("anna", 4), 6), [finish(FinishReason::Completed)]);
}

#[test]
fn the_final_evaluation_waits_neither_for_the_departed_nor_beyond_the_deadline() {
    let opening = || {
        vec![
            (0, joined("anna"), vec![wait_for(1, 2)]),
            (0, joined("bert"), vec![wait_for(1, 1)]),
            (
                0,
                joined("cleo"),
                vec![Action::StartRound {
                    round: 1,
                    attempt: 1,
                    cohort: names("anna bert cleo"),
                    first_step: 0,
                    evaluate: true,
                }],
            ),
            (1, departed("cleo"), vec![remove("cleo")]),
            (2, update("anna", 1), vec![accept("anna", 1)]),
            (
                3,
                update("bert", 1),
                vec![
                    accept("bert", 1),
                    aggregate(1, "anna bert"),
                    Action::Evaluate { round: 1, participants: names("anna bert") },
                ],
            ),
            (4, joined("cleo"), vec![]),
            (5, evaluated("anna", 1), vec![]),
        ]
    };
    let mut with_departure = opening();
    with_departure.push((6, departed("bert"), vec![finish(FinishReason::Completed)]));
    check_scenario(evaluating(1, federation(1, 3, 1)), with_departure);

    let mut with_deadline = opening();
    with_deadline.push((2 + DEADLINE_MS, Event::Ticked, vec![]));
    with_deadline.push((3 + DEADLINE_MS, Event::Ticked, vec![finish(FinishReason::Completed)]));
    check_scenario(evaluating(1, federation(1, 3, 1)), with_deadline);
}

#[test]
fn a_round_goes_on_without_a_member_that_departs_before_its_update() {
    check_scenario(
        federation(2, 3, 2),
        vec![
            (0, joined("anna"), vec![wait_for(1, 2)]),
            (0, joined("bert"), vec![wait_for(1, 1)]),
            (0, joined("cleo"), vec![start(1, "anna bert cleo")]),
            (1, update("anna", 1), vec![accept("anna", 1)]),
            (2, departed("bert"), vec![remove("bert")]),
            (3, update("cleo", 1), vec![accept("cleo", 1), aggregate(1, "anna cleo"), wait_for(2, 1)]),
            (4, Event::Ticked, vec![]),
            (3 + DEADLINE_MS, Event::Ticked, vec![start(2, "anna cleo")]),
        ],
    );
}

#[test]
fn an_accepted_update_counts_after_its_sender_departed() {
    check_scenario(
        federation(1, 2, 2),
        vec![
            (0, joined("anna"), vec![wait_for(1, 1)]),
            (0, joined("bert"), vec![start(1, "anna bert")]),
            (1, update("anna", 1), vec![accept("anna", 1)]),
            (2, departed("anna"), vec![]),
            (3, update("bert", 1), vec![accept("bert", 1), aggregate(1, "anna bert"), finish(FinishReason::Completed)]),
        ],
    );
}

#[test]
fn the_deadline_closes_a_round_with_a_quorum_and_a_late_update_is_refused() {
    check_scenario(
        federation(2, 3, 2),
        vec![
            (0, joined("anna"), vec![wait_for(1, 2)]),
            (0, joined("bert"), vec![wait_for(1, 1)]),
            (5, joined("cleo"), vec![start(1, "anna bert cleo")]),
            (6, update("bert", 1), vec![accept("bert", 1)]),
            (7, update("anna", 1), vec![accept("anna", 1)]),
            (4 + DEADLINE_MS, Event::Ticked, vec![]),
            // The update itself is what shows that the deadline has passed.
            (
                5 + DEADLINE_MS,
                update("cleo", 1),
                vec![
                    remove("cleo"),
                    aggregate(1, "anna bert"),
                    refuse("cleo", 1, Refusal::Late),
                    start(2, "anna bert cleo"),
                ],
            ),
            (6 + DEADLINE_MS, update("cleo", 1), vec![refuse("cleo", 1, Refusal::Late)]),
        ],
    );
}

#[test]
fn an_update_counts_only_once_and_only_for_the_open_round_of_a_member() {
    let wrong_round = Refusal::WrongRound { expected: 1 };
    check_scenario(
        federation(2, 2, 2),
        vec![
            (0, update("anna", 1), vec![refuse("anna", 1, wrong_round), wait_for(1, 2)]),
            (0, joined("anna"), vec![wait_for(1, 1)]),
            (0, joined("bert"), vec![start(1, "anna bert")]),
            (0, joined("cleo"), vec![]),
            (1, update("anna", 2), vec![refuse("anna", 2, wrong_round)]),
            (1, update_of("anna", 1, 2), vec![refuse("anna", 1, wrong_round)]),
            (1, update("anna", 0), vec![refuse("anna", 0, Refusal::Late)]),
            (2, update("anna", 1), vec![accept("anna", 1)]),
            (3, update("anna", 1), vec![refuse("anna", 1, Refusal::Duplicate)]),
            (4, update("cleo", 1), vec![refuse("cleo", 1, Refusal::NotInCohort)]),
            (5, update("dora", 1), vec![refuse("dora", 1, Refusal::NotInCohort)]),
        ],
    );
}

#[test]
fn a_member_whose_update_is_bad_is_removed_but_stays_connected() {
    let rejected = Event::UpdateRejected { participant: name("anna"), round: 1, attempt: 1 };
    let empty = Event::UpdateArrived { participant: name("bert"), round: 1, attempt: 1, tokens: 0 };
    check_scenario(
        federation(2, 3, 1),
        vec![
            (0, joined("anna"), vec![wait_for(1, 2)]),
            (0, joined("bert"), vec![wait_for(1, 1)]),
            (0, joined("cleo"), vec![start(1, "anna bert cleo")]),
            (1, rejected.clone(), vec![refuse("anna", 1, Refusal::Content), remove("anna")]),
            (2, update("anna", 1), vec![refuse("anna", 1, Refusal::Removed)]),
            (2, rejected, vec![refuse("anna", 1, Refusal::Removed)]),
            (3, empty, vec![refuse("bert", 1, Refusal::NoTokens), remove("bert")]),
            (4, update("cleo", 1), vec![accept("cleo", 1), aggregate(1, "cleo"), start(2, "anna bert cleo")]),
        ],
    );
}

#[test]
fn another_device_of_the_same_name_may_not_join_while_the_first_is_connected() {
    let refused = || vec![Action::RefuseJoin { participant: name("anna"), reason: JoinRefusal::NameTaken }];
    check_scenario(
        federation(2, 2, 1),
        vec![
            (0, joined("anna"), vec![wait_for(1, 1)]),
            (1, joined_with(1, "anna"), refused()),
            (2, joined("bert"), vec![start(1, "anna bert")]),
            (3, joined_with(1, "anna"), refused()),
            (4, departed("anna"), vec![remove("anna")]),
            (5, joined_with(1, "anna"), vec![]),
            (6, joined("anna"), refused()),
        ],
    );
}

#[test]
fn a_device_that_connects_again_takes_its_place_back() {
    check_scenario(
        federation(2, 3, 2),
        vec![
            (0, joined("anna"), vec![wait_for(1, 2)]),
            (1, joined("anna"), vec![supersede("anna")]),
            (2, joined("bert"), vec![wait_for(1, 1)]),
            (3, joined("cleo"), vec![start(1, "anna bert cleo")]),
            (4, joined("anna"), vec![supersede("anna"), resume("anna", 1)]),
            // Who has delivered may not know it.
            (6, update("bert", 1), vec![accept("bert", 1)]),
            (7, joined("bert"), vec![supersede("bert"), resume("bert", 1)]),
            (8, update("cleo", 1), vec![accept("cleo", 1)]),
            (9, update("anna", 1), vec![accept("anna", 1), aggregate(1, "anna bert cleo"), start(2, "anna bert cleo")]),
        ],
    );
}

#[test]
fn a_member_that_is_lost_keeps_its_place_until_it_is_back_or_late() {
    let long = Federation { deadline_s: Some(3600), ..federation(2, 3, 2) };
    check_scenario(
        long,
        vec![
            (0, joined("anna"), vec![wait_for(1, 2)]),
            (0, joined("bert"), vec![wait_for(1, 1)]),
            (0, joined("cleo"), vec![start(1, "anna bert cleo")]),
            (1, lost("anna"), vec![]),
            (2, lost("bert"), vec![]),
            (3, update("cleo", 1), vec![accept("cleo", 1)]),
            (RETURN_MS, joined("anna"), vec![resume("anna", 1)]),
            (1 + RETURN_MS, Event::Ticked, vec![]),
            (2 + RETURN_MS, Event::Ticked, vec![remove("bert")]),
            (3 + RETURN_MS, joined("bert"), vec![]),
            (4 + RETURN_MS, update("bert", 1), vec![refuse("bert", 1, Refusal::Removed)]),
            (
                5 + RETURN_MS,
                update("anna", 1),
                vec![accept("anna", 1), aggregate(1, "anna cleo"), start(2, "anna bert cleo")],
            ),
        ],
    );
}

/// Nobody waits for whoever takes leave, unless the round could not go on without it: a device is updated and started again.
#[test]
fn a_member_that_leaves_keeps_its_place_where_it_is_needed() {
    let left = |participant| Event::Left { participant: name(participant) };
    let why = Abandonment::TooFewMembers { remaining: 1, quorum: 2 };
    let long = Federation { deadline_s: Some(3600), ..federation(1, 3, 2) };
    check_scenario(
        long,
        vec![
            (0, joined("anna"), vec![wait_for(1, 2)]),
            (0, joined("bert"), vec![wait_for(1, 1)]),
            (0, joined("cleo"), vec![start(1, "anna bert cleo")]),
            (1, left("anna"), vec![remove("anna")]),
            (2, left("bert"), vec![]),
            (3, joined("bert"), vec![resume("bert", 1)]),
            (4, left("cleo"), vec![]),
            (4 + RETURN_MS, Event::Ticked, vec![remove("cleo"), abandon(1, 1, why), wait_for(1, 2)]),
        ],
    );
}

#[test]
fn a_member_that_cannot_go_on_is_removed_and_stays_connected() {
    let why = Abandonment::TooFewMembers { remaining: 1, quorum: 2 };
    let cannot = |attempt| Event::CannotResume { participant: name("anna"), round: 1, attempt };
    check_scenario(
        federation(1, 2, 2),
        vec![
            (0, joined("anna"), vec![wait_for(1, 1)]),
            (0, joined("bert"), vec![start(1, "anna bert")]),
            (1, lost("anna"), vec![]),
            (2, joined("anna"), vec![resume("anna", 1)]),
            (3, cannot(2), vec![]),
            (4, cannot(1), vec![remove("anna"), abandon(1, 1, why), start_again(1, 2, "anna bert")]),
            (5, cannot(1), vec![]),
        ],
    );
}

#[test]
fn an_interrupted_round_goes_on_with_what_was_accepted() {
    let members = [("anna", Member::Delivered { tokens: 7 }), ("bert", Member::Training), ("cleo", Member::Removed)];
    let members = members.into_iter().map(|(member, standing)| (name(member), standing)).collect();
    let interrupted = Interrupted { round: 2, attempt: 1, evaluate: false, members };
    let rounds = Rounds::resume(federation(2, 3, 1), Seed(0), interrupted, 5);
    assert_eq!(rounds.next_deadline_ms(), Some(5 + DEADLINE_MS));
    check_continued(
        rounds,
        vec![
            (6, joined("bert"), vec![resume("bert", 2)]),
            (7, joined("cleo"), vec![]),
            (8, joined("anna"), vec![resume("anna", 2)]),
            (9, update("bert", 2), vec![accept("bert", 2), aggregate(2, "anna bert"), finish(FinishReason::Completed)]),
        ],
    );
}

#[test]
fn a_round_that_was_interrupted_when_all_had_delivered_is_aggregated_at_once() {
    let members = [(name("anna"), Member::Delivered { tokens: 7 }), (name("bert"), Member::Delivered { tokens: 7 })];
    let interrupted = Interrupted { round: 1, attempt: 1, evaluate: false, members: members.into() };
    let mut rounds = Rounds::resume(federation(2, 2, 2), Seed(0), interrupted, 0);
    assert_eq!(rounds.handle(Event::Ticked, 0), [aggregate(1, "anna bert"), wait_for(2, 2)]);
}

#[test]
fn a_last_round_that_was_interrupted_is_evaluated_by_those_who_come_back() {
    let interrupted = Interrupted {
        round: 1,
        attempt: 1,
        evaluate: false,
        members: [(name("anna"), Member::Delivered { tokens: 7 })].into(),
    };
    let mut rounds = Rounds::resume(evaluating(1, federation(1, 1, 1)), Seed(0), interrupted, 0);
    assert_eq!(rounds.handle(Event::Ticked, 0), [aggregate(1, "anna"), wait_for(2, 1)]);
    let evaluate = Action::Evaluate { round: 1, participants: names("anna") };
    assert_eq!(rounds.handle(joined("anna"), 1), [evaluate]);
    assert_eq!(rounds.handle(evaluated("anna", 1), 2), [finish(FinishReason::Completed)]);
}

#[test]
fn nobody_is_waited_for_without_end_when_all_rounds_are_trained() {
    let mut rounds = Rounds::new(evaluating(1, federation(1, 2, 2)), 2, Seed(0));
    assert_eq!(rounds.handle(Event::Ticked, 0), [wait_for(2, 2)]);
    assert_eq!(rounds.handle(joined("anna"), 1), [wait_for(2, 1)]);
    assert_eq!(rounds.next_deadline_ms(), Some(LAST_CALL_MS));
    let evaluate = Action::Evaluate { round: 1, participants: names("anna") };
    assert_eq!(rounds.handle(Event::Ticked, LAST_CALL_MS), [evaluate]);
}

#[test]
fn the_final_evaluation_waits_for_who_delivered_to_a_coordinator_before_this_one() {
    let members = ["anna", "bert"].map(|who| (name(who), Member::Delivered { tokens: 7 })).into();
    let interrupted = Interrupted { round: 1, attempt: 1, evaluate: false, members };
    let mut federation = federation(1, 2, 2);
    federation.quorum = 1;
    let resumed = || {
        let mut rounds = Rounds::resume(evaluating(1, federation.clone()), Seed(0), interrupted.clone(), 0);
        assert_eq!(rounds.handle(joined("anna"), 0), [aggregate(1, "anna bert"), wait_for(2, 1)]);
        rounds
    };
    let evaluate = |who: &str| Action::Evaluate { round: 1, participants: names(who) };
    assert_eq!(resumed().handle(joined("bert"), 1), [evaluate("anna bert")]);
    let mut rounds = resumed();
    assert_eq!(rounds.next_deadline_ms(), Some(REJOIN_MS));
    assert_eq!(rounds.handle(Event::Ticked, REJOIN_MS), [evaluate("anna")]);
}

#[test]
fn the_final_evaluation_waits_for_a_device_that_connects_again() {
    let evaluate = || Action::Evaluate { round: 1, participants: names("anna") };
    let mut rounds = Rounds::new(evaluating(1, federation(1, 1, 1)), 1, Seed(0));
    let _starts = rounds.handle(joined("anna"), 0);
    assert_eq!(rounds.handle(update("anna", 1), 1), [accept("anna", 1), aggregate(1, "anna"), evaluate()]);
    assert_eq!(rounds.handle(joined("anna"), 2), [supersede("anna"), evaluate()]);
    assert_eq!(rounds.handle(lost("anna"), 3), []);
    assert_eq!(rounds.handle(joined("anna"), 4), [evaluate()]);
    assert_eq!(rounds.handle(evaluated("anna", 1), 5), [finish(FinishReason::Completed)]);
}

#[test]
fn who_rejoins_trains_again_from_the_next_start() {
    check_scenario(
        federation(2, 3, 2),
        vec![
            (0, joined("anna"), vec![wait_for(1, 2)]),
            (0, joined("bert"), vec![wait_for(1, 1)]),
            (0, joined("cleo"), vec![start(1, "anna bert cleo")]),
            (1, departed("anna"), vec![remove("anna")]),
            (2, joined("anna"), vec![]),
            (3, update("anna", 1), vec![refuse("anna", 1, Refusal::Removed)]),
            (4, update("bert", 1), vec![accept("bert", 1)]),
            // Who has delivered may come and go.
            (5, departed("bert"), vec![]),
            (6, joined("bert"), vec![resume("bert", 1)]),
            (7, update("bert", 1), vec![refuse("bert", 1, Refusal::Duplicate)]),
            (8, update("cleo", 1), vec![accept("cleo", 1), aggregate(1, "bert cleo"), start(2, "anna bert cleo")]),
        ],
    );
}

#[test]
fn an_abandoned_round_is_run_again_under_its_number() {
    let why = Abandonment::TooFewMembers { remaining: 1, quorum: 2 };
    check_scenario(
        federation(1, 2, 2),
        vec![
            (0, joined("anna"), vec![wait_for(1, 1)]),
            (0, joined("bert"), vec![start(1, "anna bert")]),
            (1, update("bert", 1), vec![accept("bert", 1)]),
            (2, departed("anna"), vec![remove("anna"), abandon(1, 1, why), wait_for(1, 1)]),
            (3, update("bert", 1), vec![refuse("bert", 1, Refusal::Abandoned)]),
            (4, joined("anna"), vec![start_again(1, 2, "anna bert")]),
            (5, update("bert", 1), vec![refuse("bert", 1, Refusal::Abandoned)]),
            (6, update_of("bert", 1, 2), vec![accept("bert", 1)]),
            (
                7,
                update_of("anna", 1, 2),
                vec![accept("anna", 1), aggregate(1, "anna bert"), finish(FinishReason::Completed)],
            ),
        ],
    );
}

#[test]
fn a_round_without_a_quorum_at_its_deadline_is_abandoned_and_the_run_fails_after_the_last_attempt() {
    let mut ops = vec![(0, joined("anna"), vec![wait_for(1, 1)]), (0, joined("bert"), vec![start(1, "anna bert")])];
    let why = Abandonment::TooFewUpdates { updates: 1, quorum: 2 };
    for attempt in 1..=ATTEMPTS_MAX {
        let start_ms = u64::from(attempt - 1) * DEADLINE_MS;
        ops.push((start_ms + 1, update_of("anna", 1, attempt), vec![accept("anna", 1)]));
        let next = if attempt < ATTEMPTS_MAX {
            start_again(1, attempt + 1, "anna bert")
        } else {
            finish(FinishReason::Failed { round: 1, attempts: ATTEMPTS_MAX })
        };
        ops.push((start_ms + DEADLINE_MS, Event::Ticked, vec![abandon(1, attempt, why), next]));
    }
    ops.push((u64::MAX, update_of("anna", 1, ATTEMPTS_MAX), vec![refuse("anna", 1, Refusal::Late)]));
    check_scenario(federation(1, 2, 2), ops);
}

#[test]
fn a_run_never_begins_without_a_full_cohort() {
    check_scenario(
        federation(1, 2, 1),
        vec![
            (0, joined("anna"), vec![wait_for(1, 1)]),
            (100 * DEADLINE_MS, Event::Ticked, vec![]),
            (101 * DEADLINE_MS, joined("bert"), vec![start(1, "anna bert")]),
        ],
    );
}

#[test]
fn a_continued_run_waits_one_deadline_for_a_full_cohort_and_then_for_a_quorum() {
    let resumed = Rounds::new(federation(9, 3, 2), 4, Seed(0));
    check_continued(
        resumed,
        vec![
            (50, joined("anna"), vec![wait_for(4, 2)]),
            (50 + DEADLINE_MS, Event::Ticked, vec![wait_for(4, 1)]),
            (60 + DEADLINE_MS, joined("cleo"), vec![start(4, "anna cleo")]),
        ],
    );
}

#[test]
fn a_run_whose_rounds_are_all_finished_only_evaluates() {
    let finished = || Rounds::new(evaluating(1, federation(3, 1, 1)), 4, Seed(0));
    let evaluate = Action::Evaluate { round: 3, participants: names("anna") };
    check_continued(
        finished(),
        vec![
            (0, Event::Ticked, vec![wait_for(4, 1)]),
            (1, joined("anna"), vec![evaluate]),
            (2, evaluated("anna", 3), vec![finish(FinishReason::Completed)]),
        ],
    );
}

#[test]
fn stopping_leaves_the_open_round_unfinished() {
    check_scenario(
        federation(1, 2, 1),
        vec![
            (0, joined("anna"), vec![wait_for(1, 1)]),
            (0, joined("bert"), vec![start(1, "anna bert")]),
            (1, update("anna", 1), vec![accept("anna", 1)]),
            (2, Event::StopRequested, vec![finish(FinishReason::Stopped)]),
            (3, update("bert", 1), vec![refuse("bert", 1, Refusal::Late)]),
            (4, departed("bert"), vec![]),
        ],
    );
}

#[test]
fn the_next_deadline_is_named_whenever_time_alone_can_change_something() {
    let mut rounds = Rounds::new(federation(2, 2, 1), 1, Seed(0));
    assert_eq!(rounds.next_deadline_ms(), None);
    let _waits = rounds.handle(joined("anna"), 1);
    assert_eq!(rounds.next_deadline_ms(), None, "the first start waits for as long as it takes");
    let _starts = rounds.handle(joined("bert"), 2);
    assert_eq!(rounds.next_deadline_ms(), Some(2 + DEADLINE_MS));
    let _removes = rounds.handle(departed("bert"), 3);
    let _aggregates = rounds.handle(update("anna", 1), 4);
    assert_eq!(rounds.next_deadline_ms(), Some(4 + DEADLINE_MS), "the second round waits for a full cohort");
    let _waits = rounds.handle(departed("anna"), 5);
    assert_eq!(rounds.next_deadline_ms(), None, "there is no quorum to start with");
}

#[test]
fn cohorts_differ_between_rounds_and_seeds_but_not_with_the_order_of_joining() {
    let cohorts = |order: &[usize], seed| -> Vec<Vec<ParticipantName>> {
        let mut crowded = Rounds::new(federation(8, 3, 1), 1, Seed(seed));
        let device = |number: &usize| (name(&format!("participant-{number:02}")), DeviceId([0; 32]));
        crowded.connected = order.iter().map(device).collect();
        (1..=8)
            .map(|round| {
                crowded.round = round;
                crowded.draw_cohort()
            })
            .collect()
    };
    let forwards: Vec<usize> = (0..20).collect();
    let backwards: Vec<usize> = (0..20).rev().collect();
    let drawn = cohorts(&forwards, 7);
    assert_eq!(drawn, cohorts(&backwards, 7));
    assert_ne!(drawn, cohorts(&forwards, 8));
    assert!(drawn.iter().all(|cohort| cohort.len() == 3 && cohort.is_sorted()));
    let distinct: BTreeSet<_> = drawn.into_iter().collect();
    assert!(distinct.len() > 4, "the cohort of one round says little about the next");
}

const CROWD: [&str; 5] = ["anna", "bert", "cleo", "dora", "emil"];

/// An event relative to the machine's present state, so that random schedules get deep into a run.
#[derive(Debug, Clone)]
enum Op {
    Join(usize, u8),
    Depart(usize),
    Lose(usize),
    GiveUp(usize),
    Deliver(usize),
    DeliverAnything(usize, u32, u32, u64),
    Reject(usize),
    Evaluate(usize),
    SendSums(usize, bool),
    HasNoSums(usize),
    Step(usize, u64),
    Move(usize, u64),
    Wait(u64),
    Stop,
}

fn op() -> impl Strategy<Value = Op> {
    let participant = || 0..CROWD.len();
    prop_oneof![
        60 => (participant(), 0..2u8).prop_map(|(p, key)| Op::Join(p, key)),
        20 => participant().prop_map(Op::Depart),
        20 => participant().prop_map(Op::Lose),
        5 => participant().prop_map(Op::GiveUp),
        120 => participant().prop_map(Op::Deliver),
        20 => (participant(), 0..6u32, 0..4u32, 0..3u64).prop_map(|(p, round, attempt, tokens)| {
            Op::DeliverAnything(p, round, attempt, tokens)
        }),
        10 => participant().prop_map(Op::Reject),
        20 => participant().prop_map(Op::Evaluate),
        20 => (participant(), any::<bool>()).prop_map(|(p, good)| Op::SendSums(p, good)),
        5 => participant().prop_map(Op::HasNoSums),
        40 => (participant(), 0..5u64).prop_map(|(p, step)| Op::Step(p, step)),
        10 => (participant(), 0..10_000_000u64).prop_map(|(p, bytes)| Op::Move(p, bytes)),
        20 => (0..2 * DEADLINE_MS).prop_map(Op::Wait),
        5 => (0..1_000_000u64).prop_map(Op::Wait),
        1 => Just(Op::Stop),
    ]
}

fn any_federation() -> impl Strategy<Value = Federation> {
    (1..5u32, 1..5u32, 0..3u32, 0..2u64, any::<bool>())
        .prop_flat_map(|(rounds, cohort, every, tokens, ends)| {
            (Just((rounds, cohort, every, tokens, ends)), 1..=cohort)
        })
        .prop_map(|((rounds, cohort, every, imatrix_tokens, ends), quorum)| {
            let federation = federation(rounds, cohort, quorum);
            let deadline_s = federation.deadline_s.filter(|_| ends);
            evaluating(every, Federation { deadline_s, imatrix_tokens, ..federation })
        })
}

/// What the actions so far have promised.
#[derive(Debug, Default)]
struct Ledger {
    open: Option<(u32, BTreeMap<ParticipantName, bool>)>,
    last_aggregated: u32,
    attempts: BTreeMap<u32, u32>,
    measuring: BTreeSet<ParticipantName>,
    finished: bool,
}

impl Ledger {
    fn check(&mut self, action: &Action, federation: &Federation) {
        let quorum = federation.quorum as usize;
        match action {
            Action::StartRound { round, attempt, cohort, .. } => {
                assert!(!self.finished && self.open.is_none(), "at most one round is open");
                assert_eq!(*round, self.last_aggregated + 1);
                assert!(cohort.len() >= quorum && cohort.len() <= federation.cohort as usize);
                let attempts = self.attempts.entry(*round).or_default();
                *attempts += 1;
                assert_eq!(attempts, attempt);
                assert!(*attempts <= ATTEMPTS_MAX);
                self.open = Some((*round, cohort.iter().map(|member| (member.clone(), false)).collect()));
            }
            Action::AcceptUpdate { participant, round } => {
                let (open, members) = self.open.as_mut().expect("an update is accepted into an open round");
                assert_eq!(open, round);
                assert_eq!(members.insert(participant.clone(), true), Some(false), "a member delivers once");
            }
            Action::RemoveMember { participant } => {
                let (_, members) = self.open.as_mut().expect("a member is removed from an open round");
                assert_eq!(members.remove(participant), Some(false), "only who has not delivered is removed");
            }
            Action::ResumeMember { participant, round, .. } => {
                let (open, members) = self.open.as_ref().expect("a member resumes an open round");
                assert!(open == round && members.contains_key(participant), "only who has a place resumes");
            }
            Action::Aggregate { round, members } => {
                let (open, accepted) = self.open.take().expect("an open round is aggregated");
                assert_eq!(open, *round);
                assert!(members.len() >= quorum, "never below the quorum");
                assert!(members.iter().map(|member| &member.participant).eq(accepted.keys()));
                assert!(accepted.values().all(|accepted| *accepted));
                assert!(*round > self.last_aggregated && *round <= federation.rounds);
                self.last_aggregated = *round;
            }
            Action::AbandonRound { round, .. } => {
                let (open, _) = self.open.take().expect("an open round is abandoned");
                assert_eq!(open, *round);
            }
            Action::Finish { reason } => {
                assert!(!self.finished, "a run finishes once");
                self.finished = true;
                assert!(*reason != FinishReason::Completed || self.last_aggregated == federation.rounds);
            }
            Action::Evaluate { round, participants } => {
                assert!(self.open.is_none() && *round == self.last_aggregated && !participants.is_empty());
            }
            Action::Measure { participants } => {
                let is_due = federation.imatrix_tokens > 0 && self.last_aggregated == federation.rounds;
                assert!(is_due && !self.finished && !participants.is_empty());
                self.measuring.extend(participants.iter().cloned());
            }
            Action::AcceptSums { participant } => {
                assert!(self.measuring.remove(participant), "only who was asked sends sums, and once");
            }
            Action::RefuseJoin { .. }
            | Action::RefuseSums { .. }
            | Action::Supersede { .. }
            | Action::WaitFor { .. }
            | Action::NoteLate { .. }
            | Action::RefuseUpdate { .. } => {}
        }
    }
}

proptest! {
    #[test]
    fn no_schedule_breaks_a_promise(
        federation in any_federation(),
        ops in prop::collection::vec(op(), 1..200),
        seed: u64,
    ) {
        let sizes = Sizes { in_step: true, local_steps: 5, step_bytes: 1_000_000, adapter_bytes: 100_000 };
        let mut rounds = Rounds::new(federation.clone(), 1, Seed(seed)).with_sizes(sizes);
        let mut ledger = Ledger::default();
        let mut now_ms = 0;
        for op in ops {
            let (round, attempt) = (rounds.round, rounds.attempt);
            let event = match op {
                Op::Join(p, key) => joined_with(key, CROWD[p]),
                Op::Depart(p) => departed(CROWD[p]),
                Op::Lose(p) => lost(CROWD[p]),
                Op::GiveUp(p) => Event::CannotResume { participant: name(CROWD[p]), round, attempt },
                Op::Deliver(p) => update_of(CROWD[p], round, attempt),
                Op::DeliverAnything(p, round, attempt, tokens) => {
                    Event::UpdateArrived { participant: name(CROWD[p]), round, attempt, tokens }
                }
                Op::Reject(p) => Event::UpdateRejected { participant: name(CROWD[p]), round, attempt },
                Op::Evaluate(p) => evaluated(CROWD[p], federation.rounds),
                Op::SendSums(p, true) => Event::SumsArrived { participant: name(CROWD[p]) },
                Op::SendSums(p, false) => Event::SumsRejected { participant: name(CROWD[p]) },
                Op::HasNoSums(p) => Event::NothingToMeasure { participant: name(CROWD[p]) },
                Op::Step(p, step) => {
                    let step = u64::from(round - 1) * 5 + step;
                    Event::StepFinished { participant: name(CROWD[p]), round, step }
                }
                Op::Move(p, bytes) => Event::Moved { participant: name(CROWD[p]), bytes },
                Op::Wait(wait_ms) => {
                    now_ms += wait_ms;
                    Event::Ticked
                }
                Op::Stop => Event::StopRequested,
            };
            for action in rounds.handle(event, now_ms) {
                ledger.check(&action, &federation);
            }
            prop_assert!(rounds.next_deadline_ms().is_none_or(|deadline_ms| deadline_ms > now_ms));
        }
        prop_assert_eq!(rounds.handle(Event::Ticked, now_ms), [], "what is due is done at once");
    }

    #[test]
    fn members_that_behave_always_complete_the_run(
        federation in any_federation(),
        seed: u64,
        order in Just(CROWD.to_vec()).prop_shuffle(),
    ) {
        let mut rounds = Rounds::new(federation.clone(), 1, Seed(seed));
        let mut inbox: Vec<Event> = order.into_iter().map(joined).collect();
        let mut ledger = Ledger::default();
        // The last event comes first, so that joins and updates interleave.
        while let Some(event) = inbox.pop() {
            for action in rounds.handle(event, 0) {
                ledger.check(&action, &federation);
                match action {
                    Action::StartRound { round, attempt, cohort, .. } => inbox.extend(
                        cohort.iter().map(|member| update_of(member.as_str(), round, attempt)),
                    ),
                    Action::Evaluate { round, participants } => {
                        inbox.extend(participants.iter().map(|participant| evaluated(participant.as_str(), round)));
                    }
                    Action::Measure { participants } => {
                        inbox.extend(participants.into_iter().map(|participant| Event::SumsArrived { participant }));
                    }
                    _ => {}
                }
            }
        }
        prop_assert!(ledger.measuring.is_empty());
        prop_assert!(ledger.finished);
        prop_assert_eq!(ledger.last_aggregated, federation.rounds);
    }
}

#[test]
fn a_departed_participant_holds_the_next_round_up_for_seconds_and_not_for_a_deadline() {
    let long = Federation { deadline_s: Some(3600), ..federation(2, 2, 1) };
    let mut rounds = Rounds::new(long, 1, Seed(0));
    let _joins = [rounds.handle(joined("anna"), 1), rounds.handle(joined("bert"), 2)];
    let _removes = rounds.handle(departed("bert"), 3);
    let _aggregates = rounds.handle(update("anna", 1), 4);
    assert_eq!(rounds.next_deadline_ms(), Some(4 + REJOIN_MS));
    assert_eq!(rounds.handle(Event::Ticked, 4 + REJOIN_MS), vec![start(2, "anna")]);
}

#[test]
fn without_a_deadline_a_member_that_gets_nowhere_is_given_up_and_one_that_gets_on_is_not() {
    let no_deadline = Federation { deadline_s: None, ..federation(1, 2, 1) };
    let mut rounds = Rounds::new(no_deadline, 1, Seed(0));
    let _joins = [rounds.handle(joined("anna"), 0), rounds.handle(joined("bert"), 0)];
    assert_eq!(rounds.next_deadline_ms(), Some(pace::UNMEASURED_MS));
    let late_ms = pace::UNMEASURED_MS;
    let step = |step| Event::StepFinished { participant: name("anna"), round: 1, step };
    assert_eq!(rounds.handle(step(0), late_ms - 10), vec![]);
    let late = Action::NoteLate { participant: name("bert") };
    assert_eq!(rounds.handle(Event::Ticked, late_ms), vec![late, remove("bert")]);
    // Many times longer than any deadline, and step by step.
    for done in 1..5 {
        assert_eq!(rounds.handle(step(done), (late_ms - 10) * (1 + done)), vec![]);
    }
    let ended = rounds.handle(update("anna", 1), 6 * late_ms - 100);
    assert_eq!(ended, vec![accept("anna", 1), aggregate(1, "anna"), finish(FinishReason::Completed)]);
}

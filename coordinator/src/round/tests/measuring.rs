//! What comes behind the last round where a run collects channel sums.

use super::*;

fn measuring(federation: Federation) -> Federation {
    Federation { imatrix_tokens: 4096, ..federation }
}

fn measure(participants: &str) -> Action {
    Action::Measure { participants: names(participants) }
}

fn sums(participant: &str) -> Event {
    Event::SumsArrived { participant: name(participant) }
}

fn accept_sums(participant: &str) -> Action {
    Action::AcceptSums { participant: name(participant) }
}

fn refuse_sums(participant: &str, reason: SumsRefusal) -> Action {
    Action::RefuseSums { participant: name(participant), reason }
}

/// One round of a and b, up to its end.
fn trained(behind: Vec<Action>) -> Vec<(u64, Event, Vec<Action>)> {
    vec![
        (0, joined("a"), vec![wait_for(1, 1)]),
        (1, joined("b"), vec![start(1, "a b")]),
        (2, update("a", 1), vec![accept("a", 1)]),
        (3, update("b", 1), [vec![accept("b", 1), aggregate(1, "a b")], behind].concat()),
    ]
}

/// The same, where the first round begins with an evaluation.
fn evaluating_first(mut ops: Vec<(u64, Event, Vec<Action>)>) -> Vec<(u64, Event, Vec<Action>)> {
    for action in ops.iter_mut().flat_map(|(_, _, actions)| actions) {
        if let Action::StartRound { evaluate, .. } = action {
            *evaluate = true;
        }
    }
    ops
}

#[test]
fn sums_are_awaited_of_everybody_behind_the_last_round() {
    let mut ops = trained(vec![measure("a b")]);
    ops.push((4, sums("a"), vec![accept_sums("a")]));
    ops.push((5, sums("a"), vec![refuse_sums("a", SumsRefusal::NotAwaited)]));
    ops.push((6, sums("b"), vec![accept_sums("b"), finish(FinishReason::Completed)]));
    ops.push((7, sums("b"), vec![refuse_sums("b", SumsRefusal::NotAwaited)]));
    check_scenario(measuring(federation(1, 2, 2)), ops);
}

#[test]
fn who_is_lost_behind_its_evaluation_measures_when_it_is_back() {
    let evaluation = Action::Evaluate { round: 1, participants: names("a b") };
    let mut ops = trained(vec![evaluation]);
    ops.push((4, evaluated("a", 1), vec![]));
    ops.push((5, lost("a"), vec![]));
    // Who was never here is not waited for, nor heard.
    ops.push((5, lost("c"), vec![]));
    ops.push((6, evaluated("b", 1), vec![measure("b")]));
    ops.push((6, sums("c"), vec![refuse_sums("c", SumsRefusal::NotAwaited)]));
    ops.push((6, sums("a"), vec![refuse_sums("a", SumsRefusal::NotAwaited)]));
    ops.push((7, sums("b"), vec![accept_sums("b")]));
    ops.push((8, joined("a"), vec![measure("a")]));
    ops.push((9, sums("a"), vec![accept_sums("a"), finish(FinishReason::Completed)]));
    check_scenario(measuring(evaluating(2, federation(1, 2, 2))), evaluating_first(ops));
}

#[test]
fn sums_come_behind_the_evaluation_and_not_before() {
    let evaluation = Action::Evaluate { round: 1, participants: names("a b") };
    let mut ops = trained(vec![evaluation]);
    ops.push((4, sums("a"), vec![refuse_sums("a", SumsRefusal::NotAwaited)]));
    ops.push((5, evaluated("a", 1), vec![]));
    ops.push((6, evaluated("b", 1), vec![measure("a b")]));
    ops.push((7, evaluated("b", 1), vec![]));
    ops.push((8, sums("b"), vec![accept_sums("b")]));
    ops.push((9, sums("a"), vec![accept_sums("a"), finish(FinishReason::Completed)]));
    check_scenario(measuring(evaluating(2, federation(1, 2, 2))), evaluating_first(ops));
}

#[test]
fn nobody_is_waited_for_who_leaves_has_nothing_or_sent_bad_sums() {
    let mut ops = trained(vec![measure("a b")]);
    ops.push((4, departed("a"), vec![]));
    ops.push((5, Event::NothingToMeasure { participant: name("b") }, vec![finish(FinishReason::Completed)]));
    check_scenario(measuring(federation(1, 2, 2)), ops);

    let mut ops = trained(vec![measure("a b")]);
    let rejected = |participant: &str| Event::SumsRejected { participant: name(participant) };
    ops.push((4, rejected("a"), vec![refuse_sums("a", SumsRefusal::Content)]));
    ops.push((5, sums("a"), vec![refuse_sums("a", SumsRefusal::NotAwaited)]));
    let last = vec![refuse_sums("b", SumsRefusal::Content), finish(FinishReason::Completed)];
    ops.push((6, rejected("b"), last));
    check_scenario(measuring(federation(1, 2, 2)), ops);
}

#[test]
fn whoever_is_lost_while_it_measures_is_asked_again_or_given_up() {
    let mut ops = trained(vec![measure("a b")]);
    ops.push((4, lost("a"), vec![]));
    ops.push((5, sums("b"), vec![accept_sums("b")]));
    ops.push((6, joined("a"), vec![measure("a")]));
    ops.push((7, sums("a"), vec![accept_sums("a"), finish(FinishReason::Completed)]));
    check_scenario(measuring(federation(1, 2, 2)), ops);

    let mut ops = trained(vec![measure("a b")]);
    ops.push((4, sums("b"), vec![accept_sums("b")]));
    ops.push((5, Event::Ticked, vec![]));
    ops.push((3 + DEADLINE_MS, Event::Ticked, vec![finish(FinishReason::Completed)]));
    check_scenario(measuring(federation(1, 2, 2)), ops);
}

#[test]
fn a_run_that_was_started_again_behind_its_last_round_measures() {
    let federation = measuring(federation(1, 2, 2));
    let ops = vec![
        (0, Event::Ticked, vec![wait_for(2, 2)]),
        (1, joined("a"), vec![wait_for(2, 1)]),
        (2, joined("b"), vec![measure("a b")]),
        (3, Event::NothingToMeasure { participant: name("a") }, vec![]),
        (4, sums("b"), vec![accept_sums("b"), finish(FinishReason::Completed)]),
    ];
    check_continued(Rounds::new(federation, 2, Seed(0)), ops);
}

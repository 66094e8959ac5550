//! Reports on synthetic runs: what the rows add up to, and that no run, however broken off, breaks its report.

use std::collections::BTreeMap;
use std::fs;

use experiment::{Experiment, Row, RunDirectory, skeleton};
use tempfile::TempDir;

use super::{HeldOut, Loss, Report, Summary};
use crate::checkpoint::save_row;

fn experiment() -> Experiment {
    Experiment::from_toml(skeleton(), "the skeleton").unwrap()
}

/// Two rounds of two clinics, in which everything happens that a row can say.
fn rows() -> Vec<Row> {
    let mut rows = vec![start()];
    rows.extend([evaluation(0, "clinic-a", 4.0), evaluation(0, "clinic-b", 2.0)]);
    for round in 1..=2 {
        for step in 0..8 {
            rows.extend(["clinic-a", "clinic-b"].map(|name| self::step(round, step, name)));
        }
        rows.extend(["clinic-a", "clinic-b"].map(|name| bytes(round, name, u64::from(round) * 1000)));
        rows.push(update(round, "clinic-a", None));
        rows.push(update(round, "clinic-b", (round == 2).then_some("too late")));
        rows.push(aggregated(round));
    }
    rows.extend([evaluation(2, "clinic-a", 3.0), evaluation(2, "clinic-b", 1.5)]);
    let (participant, reason) = (String::from("clinic-b"), String::from("timed out"));
    rows.push(Row::Departure { round: 2, participant, reason, energy_j: None });
    let reason = String::from("all rounds done");
    rows.push(Row::Finished { rounds: 2, reason, duration_ms: 5_000.0, energy_j: None });
    rows
}

fn start() -> Row {
    let [experiment_digest, model_digest, software] = ["ab", "cd", "headwater 0.1.0"].map(String::from);
    Row::Run { time_unix_ms: 1, experiment_digest, model_digest, software, energy_j: None }
}

fn evaluation(round: u32, name: &str, loss_nats: f64) -> Row {
    Row::Evaluation { round, participant: name.to_owned(), loss_nats, tokens: 50, energy_j: None }
}

fn step(round: u32, step: u64, name: &str) -> Row {
    let loss_nats = 4.0 - 0.1 * (step as f64 + 8.0 * f64::from(round));
    let (participant, energy_j) = (name.to_owned(), Some(0.5));
    Row::Step {
        round,
        attempt: 1,
        step,
        participant,
        loss_nats,
        tokens: 100,
        compute_ms: 60.0,
        wait_ms: 40.0,
        energy_j,
    }
}

fn update(round: u32, name: &str, refused: Option<&str>) -> Row {
    let (accepted, reason) = (refused.is_none(), refused.map(String::from));
    Row::Update { round, attempt: 1, participant: name.to_owned(), tokens: 800, accepted, reason, energy_j: None }
}

fn aggregated(round: u32) -> Row {
    Row::Round {
        round,
        members: vec![String::from("clinic-a")],
        loss_nats: 3.0,
        tokens: 800,
        duration_ms: 2_000.0,
        aggregation_error: Some(0.01),
        body_compute_ms: 500.0,
        body_idle_ms: 1_500.0,
        energy_j: Some(2.0),
    }
}

/// `total` bytes of messages in each direction, a tenth of which QUIC adds.
fn bytes(round: u32, name: &str, total: u64) -> Row {
    let activations = BTreeMap::from([(String::from("activations"), total - 10), (String::from("commit"), 10)]);
    Row::Bytes {
        round,
        participant: name.to_owned(),
        sent: activations.clone(),
        received: activations,
        udp_sent: total + total / 10,
        udp_received: total + total / 10,
        overhead_sent: total / 10,
        overhead_received: total / 10,
        energy_j: None,
    }
}

fn run_with(rows: &[Row]) -> (TempDir, RunDirectory) {
    let root = tempfile::tempdir().unwrap();
    let run = RunDirectory::create(root.path(), &experiment()).unwrap();
    let mut log = run.metrics_log().unwrap();
    rows.iter().for_each(|row| log.append(row).unwrap());
    (root, run)
}

#[test]
fn rows_add_up() {
    let summary = Summary::new(&experiment(), &rows());
    let [a, b] = &summary.participants[..] else { panic!("two clinics took part: {:?}", summary.participants) };
    let loss = |nats: f64| Loss { nats, perplexity: nats.exp() };
    let expected = HeldOut { before: loss(4.0), after: loss(3.0), after_round: 2, change_percent: -25.0 };
    assert_eq!(a.held_out, Some(expected));
    assert_eq!((a.steps, a.tokens, a.compute_ms, a.wait_ms), (16, 1600, 960.0, 640.0));
    assert_eq!((a.tokens_per_s, a.energy_j), (Some(1000.0), Some(8.0)));
    assert_eq!((b.updates_accepted, b.updates_refused, b.departures), (1, 1, 1));
    assert_eq!((a.traffic.messages.up_bytes, a.up_bytes_per_token), (2000, Some(1.25)));

    let mean = summary.held_out.unwrap();
    assert_eq!((mean.before.nats, mean.after.nats, mean.change_percent), (3.0, 2.25, -25.0));
    assert_eq!((summary.held_out_participants, summary.tokens), (2, 3200));
    assert_eq!(summary.tokens_per_s, Some(400.0));
    assert_eq!(summary.body.unwrap().compute_percent, 25.0);
    assert_eq!(summary.traffic.by_kind["commit"].total_bytes(), 40);
    assert_eq!((summary.traffic.udp.total_bytes(), summary.gap_percent), (8800, Some(0.0)));
    assert_eq!((summary.energy_j, summary.coordinator_energy_j), (Some(20.0), Some(4.0)));
    assert_eq!(summary.rounds[1].held_out_nats, Some(2.25));
    assert_eq!((summary.duration_ms, summary.finished.as_deref()), (5_000.0, Some("all rounds done")));
}

#[test]
fn a_run_that_was_continued_counts_both_connections_and_repeated_rounds_once() {
    let continued = [rows(), vec![start(), bytes(3, "clinic-a", 5000), aggregated(2)]].concat();
    let summary = Summary::new(&experiment(), &continued);
    assert_eq!((summary.starts, summary.rounds.len()), (2, 2));
    assert_eq!(summary.finished, None);
    assert_eq!(summary.participants[0].traffic.messages.up_bytes, 7000);
}

#[test]
fn a_device_that_never_evaluated_the_base_is_not_in_the_mean() {
    let rows = [rows(), vec![evaluation(2, "clinic-c", 100.0)]].concat();
    let summary = Summary::new(&experiment(), &rows);
    assert_eq!((summary.held_out_participants, summary.held_out.unwrap().after.nats), (2, 2.25));
}

#[test]
fn every_beginning_of_a_run_has_a_report() {
    let rows = rows();
    for count in 0..=rows.len() {
        let (_root, run) = run_with(&rows[..count]);
        let report = Report::of_run(run.path()).unwrap();
        serde_json::to_string(&report.summary).unwrap();
        assert!(report.text.contains("rounds") && report.page.ends_with("</html>\n"), "after {count} rows");
    }
}

#[test]
fn rounds_whose_rows_are_lost_are_taken_from_their_directories() {
    let (_root, run) = run_with(&[]);
    for round in 1..=3 {
        run.begin_round(round).unwrap();
        // Of a round that an earlier version has finished, nothing is known.
        if round < 3 {
            save_row(&run, round, &aggregated(round)).unwrap();
        }
        run.finish_round(round).unwrap();
    }
    let report = Report::of_run(run.path()).unwrap();
    let summary = &report.summary;
    assert_eq!((summary.rounds.len(), summary.tokens, &summary.lost_rounds[..]), (2, 1_600, &[1, 2, 3][..]));
    for told in [&report.text, &report.page] {
        assert!(told.contains("metrics.jsonl lacks the row of 3 finished rounds from 1 to 3"), "{told}");
    }

    let mut log = run.metrics_log().unwrap();
    (1..=3).for_each(|round| log.append(&aggregated(round)).unwrap());
    let report = Report::of_run(run.path()).unwrap();
    assert_eq!((report.summary.rounds.len(), report.summary.lost_rounds.len()), (3, 0));
    assert!(!report.text.contains("lacks") && !report.page.contains("lacks"));
}

#[test]
fn a_torn_last_row_and_a_diverged_loss_are_reported_on() {
    let (_root, run) = run_with(&[rows(), vec![evaluation(2, "clinic-a", f64::NAN), evaluation(0, "d", 0.0)]].concat());
    let mut metrics = fs::read(run.metrics_path()).unwrap();
    metrics.extend(br#"{"row":"step","round":3,"st"#);
    fs::write(run.metrics_path(), metrics).unwrap();
    let report = Report::of_run(run.path()).unwrap();
    assert!(report.text.contains("diverged"), "{}", report.text);
    assert!(serde_json::to_string(&report.summary).unwrap().contains(r#""nats":null"#));
}

#[test]
fn foreign_strings_neither_mark_up_the_page_nor_command_the_terminal() {
    let hostile = "<script>alert(\"1\" & '2')</script>\u{1b}[31m";
    let mut rows =
        [rows(), vec![step(1, 0, hostile), evaluation(0, hostile, 2.0), evaluation(1, hostile, 1.0)]].concat();
    let (participant, reason) = (hostile.to_owned(), hostile.to_owned());
    rows.push(Row::Departure { round: 1, participant, reason, energy_j: None });
    let (_root, run) = run_with(&rows);
    let report = Report::of_run(run.path()).unwrap();
    assert!(!report.page.contains("<script") && report.page.contains("&lt;script&gt;"));
    assert!(!report.page.contains('\u{1b}') && !report.text.contains('\u{1b}'));
}

#[test]
fn page_needs_nothing_but_itself() {
    let (_root, run) = run_with(&rows());
    let page = Report::of_run(run.path()).unwrap().page;
    for forbidden in ["<script", "<link", "<img", "@import", "url(", "href", "src=", "https:"] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
    // The name space is a name; nothing is loaded from it.
    assert_eq!(page.matches("http:").count(), page.matches("xmlns=\"http://www.w3.org/2000/svg\"").count());
    assert_eq!(page.matches("<svg ").count(), 4);
}

#[test]
fn a_swarm_is_drawn_as_a_crowd() {
    let names: Vec<_> = (0..100).map(|index| format!("device-{index:03}")).collect();
    let rows: Vec<_> = (0..50).flat_map(|at| names.iter().map(move |name| step(1, at, name))).collect();
    let (_root, run) = run_with(&rows);
    let page = Report::of_run(run.path()).unwrap().page;
    assert!(page.contains("40 of 100 participants"));
    assert!(page.len() < 1 << 20, "{} bytes", page.len());
}

//! A summary as tables for a terminal.

use std::fmt::Write;

use comfy_table::{Cell, CellAlignment, Table, TableComponent, presets};

use super::summary::{HeldOut, Loss, Summary};
use super::traffic::Directions;
use super::units::{bytes, change, count, counted, duration, energy, loss, percent, perplexity, printable, rate};

/// Everything in a summary, in the order in which one asks for it.
pub fn to_text(summary: &Summary) -> String {
    let mut text = headline(summary);
    let tables = [
        ("Held-out loss", held_out(summary)),
        ("Training", training(summary)),
        ("Messages by participant", messages(summary)),
        ("Messages by kind", kinds(summary)),
        ("Rounds", rounds(summary)),
        ("Departures", departures(summary)),
    ];
    for (title, table) in tables.iter().filter(|(_, table)| !table.is_empty()) {
        // Writing into a string cannot fail; neither here nor below.
        let _ = writeln!(text, "\n{title}\n{table}");
    }
    text
}

/// An empty table with these headings: the first column is a name, the others are numbers.
pub fn new(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY).set_header(headings);
    table.remove_style(TableComponent::HorizontalLines).remove_style(TableComponent::MiddleIntersections);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// How far the run came, in a few words.
pub(super) fn progress(summary: &Summary) -> String {
    let done = summary.rounds.len();
    match &summary.finished {
        Some(reason) => format!("{done} of {} rounds, finished: {}", summary.rounds_planned, printable(reason)),
        None => format!("{done} of {} rounds, not finished", summary.rounds_planned),
    }
}

/// That the metrics are not all there, and what to do.
pub(super) fn lost(summary: &Summary) -> Option<String> {
    let rounds = &summary.lost_rounds;
    let (first, last) = (rounds.first()?, rounds.last()?);
    let which = match rounds.len() {
        1 => format!("round {first}"),
        count => format!("{count} finished rounds from {first} to {last}"),
    };
    Some(format!(
        "metrics.jsonl lacks the row of {which}, which is taken from rounds/ if it is there; steps, bytes and evaluations may \
         be missing, too: bring metrics.jsonl back from a backup"
    ))
}

fn headline(summary: &Summary) -> String {
    let mut text =
        format!("{}: {}, {}\n", printable(&summary.experiment), progress(summary), duration(summary.duration_ms));
    if let Some(lost) = lost(summary) {
        let _ = writeln!(text, "{lost}");
    }
    match &summary.held_out {
        Some(mean) => {
            let HeldOut { before, after, change_percent, .. } = mean;
            let _ = writeln!(
                text,
                "held-out loss, mean of {}: {} -> {} nats/token ({})",
                counted(summary.held_out_participants as u64, "device"),
                loss(before.nats),
                loss(after.nats),
                change(*change_percent)
            );
        }
        None => text.push_str("held-out loss: no device has evaluated both before and after training\n"),
    }
    let _ = write!(text, "trained {} tokens", count(summary.tokens));
    if let Some(tokens_per_s) = summary.tokens_per_s {
        let _ = write!(text, ", {} tokens/s over all rounds", rate(tokens_per_s));
    }
    if let Some(bytes_per_token) = summary.bytes_per_token {
        let _ = write!(text, ", {} of messages per trained token", bytes(bytes_per_token as u64));
    }
    text.push('\n');
    if let Some(body) = summary.body {
        let [compute, idle] = [body.compute_ms, body.idle_ms].map(duration);
        let _ = writeln!(text, "body: computing {compute} ({}), idle {idle}", percent(body.compute_percent));
    }
    if let Some(ledger) = ledger(summary) {
        let _ = writeln!(text, "bytes: {ledger}");
    }
    if let Some(energy_j) = summary.energy_j {
        let _ = writeln!(text, "energy measured: {}", energy(energy_j));
    }
    text
}

/// The books: messages and overhead beside what UDP carried.
pub(super) fn ledger(summary: &Summary) -> Option<String> {
    let (overhead_percent, gap_percent) = summary.overhead_percent.zip(summary.gap_percent)?;
    let traffic = &summary.traffic;
    let [messages, overhead, udp] =
        [traffic.messages, traffic.overhead, traffic.udp].map(|directions| bytes(directions.total_bytes()));
    let overhead_percent = percent(overhead_percent);
    Some(format!(
        "{messages} of messages + {overhead} of overhead ({overhead_percent}) against {udp} of UDP: gap {gap_percent:.3} %"
    ))
}

fn held_out(summary: &Summary) -> Table {
    let mut table =
        new(&["participant", "before (nats/token)", "perplexity", "after", "perplexity", "round", "change"]);
    for participant in &summary.participants {
        let Some(HeldOut { before, after, after_round, change_percent }) = participant.held_out else { continue };
        let [[before, before_perplexity], [after, after_perplexity]] =
            [before, after].map(|Loss { nats, perplexity: of_loss }| [loss(nats), perplexity(of_loss)]);
        let name = printable(&participant.name);
        let [round, change] = [after_round.to_string(), change(change_percent)];
        table.add_row([name, before, before_perplexity, after, after_perplexity, round, change]);
    }
    table
}

fn training(summary: &Summary) -> Table {
    let measured = summary.participants.iter().any(|participant| participant.energy_j.is_some());
    let mut headings = vec!["participant", "steps", "tokens", "tokens/s", "computing", "waiting", "updates", "refused"];
    headings.extend(measured.then_some("energy"));
    let mut table = new(&headings);
    for participant in &summary.participants {
        let mut row = vec![
            printable(&participant.name),
            count(participant.steps),
            count(participant.tokens),
            participant.tokens_per_s.map_or(NOTHING.into(), rate),
            duration(participant.compute_ms),
            duration(participant.wait_ms),
            participant.updates_accepted.to_string(),
            participant.updates_refused.to_string(),
        ];
        row.extend(measured.then(|| participant.energy_j.map_or(NOTHING.into(), energy)));
        table.add_row(row);
    }
    table
}

fn messages(summary: &Summary) -> Table {
    let mut table = new(&["participant", "up", "down", "up per token", "down per token", "UDP up", "UDP down"]);
    for participant in &summary.participants {
        let Directions { down_bytes, up_bytes } = participant.traffic.messages;
        let per_token = [participant.up_bytes_per_token, participant.down_bytes_per_token];
        let [up_per_token, down_per_token] = per_token.map(|bytes_each| bytes_each.map_or(NOTHING.into(), whole_bytes));
        let udp = participant.traffic.udp;
        let [up, down, udp_up, udp_down] = [up_bytes, down_bytes, udp.up_bytes, udp.down_bytes].map(bytes);
        table.add_row([printable(&participant.name), up, down, up_per_token, down_per_token, udp_up, udp_down]);
    }
    table
}

fn kinds(summary: &Summary) -> Table {
    let mut table = new(&["kind", "up", "down", "share"]);
    let total = summary.traffic.messages.total_bytes();
    for (kind, directions) in &summary.traffic.by_kind {
        let share = percent(100.0 * directions.total_bytes() as f64 / total as f64);
        table.add_row([printable(kind), bytes(directions.up_bytes), bytes(directions.down_bytes), share]);
    }
    table
}

fn rounds(summary: &Summary) -> Table {
    let headings =
        ["round", "members", "loss (nats/token)", "held-out", "tokens", "duration", "body busy", "aggregation error"];
    let mut table = new(&headings);
    for round in &summary.rounds {
        table.add_row([
            Cell::new(round.round),
            Cell::new(round.members.len()),
            Cell::new(loss(round.loss_nats)),
            Cell::new(round.held_out_nats.map_or(NOTHING.into(), loss)),
            Cell::new(count(round.tokens)),
            Cell::new(duration(round.duration_ms)),
            Cell::new(percent(round.body.compute_percent)),
            Cell::new(round.aggregation_error.map_or(NOTHING.into(), error)),
        ]);
    }
    table
}

fn departures(summary: &Summary) -> Table {
    let mut table = new(&["participant", "round", "reason"]);
    for departure in &summary.departures {
        let [participant, reason] = [&departure.participant, &departure.reason].map(|text| printable(text));
        table.add_row([participant, departure.round.to_string(), reason]);
    }
    table
}

/// What stands for a number that was not measured.
pub(super) const NOTHING: &str = "-";

pub(super) fn whole_bytes(bytes_each: f64) -> String {
    bytes(bytes_each.round() as u64)
}

/// Aggregation errors span many magnitudes.
pub(super) fn error(error: f64) -> String {
    if error.is_finite() { format!("{error:.2e}") } else { NOTHING.into() }
}

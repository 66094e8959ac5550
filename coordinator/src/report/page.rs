//! A run's report as one HTML page: no scripts, no fonts, nothing from anywhere else.
//!
//! Every foreign string goes through [`escaped`] on its way into the page. The content policy in its head forbids
//! what should not be there, should one ever get through.

use experiment::SplitMode;

use super::ReportError;
use super::curves::{Curve, Curves};
use super::figure::{self, Axes, Bar, LINES_MAX, bars, lines};
use super::summary::{HeldOut, Loss, Summary};
use super::table::{NOTHING, error, ledger, lost, progress, whole_bytes};
use super::units::{bytes, change, count, counted, duration, energy, loss, percent, perplexity, printable, rate};

pub(super) fn to_html(summary: &Summary, curves: &Curves) -> Result<String, ReportError> {
    let mut main = header(summary);
    main += &cards(summary);
    main += "<div class=\"figures\">\n";
    main += &training_figure(curves)?;
    main += &held_out_figure(curves)?;
    main += &kinds_figure(summary)?;
    main += &time_figure(summary)?;
    main += "</div>\n";
    main += &participants(summary);
    main += &messages(summary);
    main += &rounds(summary);
    main += &departures(summary);
    main += &footer(summary);
    let title = escaped(&summary.experiment);
    let style = figure::style();
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
        <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
        <meta name=\"color-scheme\" content=\"light dark\">\n\
        <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
        <title>{title} \u{2013} run report</title>\n<style>\n{STYLE}{style}</style>\n</head>\n\
        <body>\n<main>\n{main}</main>\n</body>\n</html>\n"
    ))
}

const STYLE: &str = include_str!("page.css");

fn header(summary: &Summary) -> String {
    let split = match summary.split {
        SplitMode::U => "U-shaped split: head and tail on the devices, body on the coordinator",
        SplitMode::ForwardOnly => "forward-only split: the tail trains, no gradient crosses",
        SplitMode::Whole => "no split: only adapters cross",
    };
    let (title, progress) = (escaped(&summary.experiment), escaped(&progress(summary)));
    let lost = lost(summary).map(|lost| format!("<p>{}.</p>\n", escaped(&lost))).unwrap_or_default();
    format!("<header>\n<h1>{title}</h1>\n<p>{progress}. {split}.</p>\n{lost}</header>\n")
}

/// The handful of numbers that one looks for first.
fn cards(summary: &Summary) -> String {
    let mut cards = Vec::new();
    if let Some(HeldOut { before, after, change_percent, .. }) = summary.held_out {
        let detail = format!(
            "{} \u{2192} {} nats per token, mean of {}",
            loss(before.nats),
            loss(after.nats),
            counted(summary.held_out_participants as u64, "device")
        );
        cards.push(("held-out loss", change(change_percent), detail));
    }
    let speed = summary.tokens_per_s.map(|tokens_per_s| format!("{} tokens per second", rate(tokens_per_s)));
    cards.push(("trained tokens", count(summary.tokens), speed.unwrap_or_default()));
    let participants = counted(summary.participants.len() as u64, "participant");
    cards.push(("duration", duration(summary.duration_ms), participants));
    if let Some(bytes_per_token) = summary.bytes_per_token {
        let total = format!("{} of messages in all", bytes(summary.traffic.messages.total_bytes()));
        cards.push(("traffic per trained token", whole_bytes(bytes_per_token), total));
    }
    if let Some(body) = summary.body {
        let idle = format!("computing {}, idle {}", duration(body.compute_ms), duration(body.idle_ms));
        cards.push(("body busy", percent(body.compute_percent), idle));
    }
    if let Some(energy_j) = summary.energy_j {
        cards.push(("energy", energy(energy_j), String::from("where it was measured")));
    }
    let card = |(name, value, detail): &(&str, String, String)| {
        format!("<div class=\"card\"><span>{name}</span><strong>{value}</strong><span>{detail}</span></div>\n")
    };
    format!("<section class=\"cards\">\n{}</section>\n", cards.iter().map(card).collect::<String>())
}

fn training_figure(curves: &Curves) -> Result<String, ReportError> {
    let axes = Axes { x: "optimizer step of the run", y: "nats per token", marked: false };
    let caption = "Mean loss of each optimizer step over its trained tokens; neighbouring steps are averaged where they \
        outnumber the pixels.";
    curve_figure("Training loss per step", &curves.training, &axes, caption)
}

fn held_out_figure(curves: &Curves) -> Result<String, ReportError> {
    let axes = Axes { x: "round (0: the base model)", y: "nats per token", marked: true };
    let caption = "Loss of the aggregated adapter on records that each device kept out of training.";
    curve_figure("Held-out loss per round", &curves.held_out, &axes, caption)
}

fn curve_figure(title: &str, curve: &Curve, axes: &Axes, caption: &str) -> Result<String, ReportError> {
    if curve.is_empty() {
        return Ok(figure(title, "", "<p class=\"none\">Nothing was recorded yet.</p>\n", caption));
    }
    let of_all = curve.by_participant.len();
    let drawn = of_all.min(LINES_MAX);
    let mut legend = String::new();
    if drawn > 8 {
        let crowd =
            if drawn < of_all { format!("{drawn} of {of_all} participants") } else { format!("{of_all} participants") };
        legend += &key(&figure::key(0, drawn), &crowd);
    } else {
        for (index, name) in curve.by_participant.keys().enumerate() {
            legend += &key(&figure::key(index, drawn), name);
        }
    }
    legend += &key("mean", "mean of all");
    Ok(figure(title, &legend, &lines(curve, axes)?, caption))
}

fn kinds_figure(summary: &Summary) -> Result<String, ReportError> {
    let title = "Bytes by kind of message";
    let mut kinds: Vec<_> = summary.traffic.by_kind.iter().collect();
    kinds.sort_by_key(|(_, directions)| std::cmp::Reverse(directions.total_bytes()));
    let bar = |(kind, directions): &(&String, &super::Directions)| Bar {
        label: kind.to_string(),
        value: format!("{} up, {} down", bytes(directions.up_bytes), bytes(directions.down_bytes)),
        parts: [directions.up_bytes as f64, directions.down_bytes as f64],
    };
    let legend = key("key0", "up: participant to coordinator") + &key("key1", "down: coordinator to participant");
    let caption = match ledger(summary) {
        Some(ledger) => format!("All participants together. {ledger}."),
        None => String::from("All participants together."),
    };
    bar_figure(title, &legend, &kinds.iter().take(LINES_MAX).map(bar).collect::<Vec<_>>(), &caption)
}

fn time_figure(summary: &Summary) -> Result<String, ReportError> {
    let bar = |participant: &super::Participant| Bar {
        label: participant.name.clone(),
        value: format!("{} + {}", duration(participant.compute_ms), duration(participant.wait_ms)),
        parts: [participant.compute_ms, participant.wait_ms],
    };
    let shown: Vec<_> = summary.participants.iter().take(LINES_MAX).map(bar).collect();
    let legend = key("key0", "computing") + &key("key1", "waiting for the network and the coordinator");
    let of_all = summary.participants.len();
    let caption = match of_all > shown.len() {
        true => format!("Computing + waiting in each participant's steps; {} of {of_all} are shown.", shown.len()),
        false => String::from("Computing + waiting in each participant's steps."),
    };
    bar_figure("Computing and waiting", &legend, &shown, &caption)
}

fn bar_figure(title: &str, legend: &str, shown: &[Bar], caption: &str) -> Result<String, ReportError> {
    if shown.is_empty() {
        return Ok(figure(title, "", "<p class=\"none\">Nothing was recorded yet.</p>\n", caption));
    }
    Ok(figure(title, legend, &bars(shown)?, caption))
}

fn figure(title: &str, legend: &str, content: &str, caption: &str) -> String {
    // The drawing is read out as its title; the numbers are in the tables.
    let content = content.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{title}\" "), 1);
    format!(
        "<figure>\n<h2>{title}</h2>\n<div class=\"legend\">{legend}</div>\n{content}<figcaption>{}</figcaption>\n</figure>\n",
        escaped(caption)
    )
}

fn key(class: &str, name: &str) -> String {
    format!("<span><i class=\"{class}\"></i>{}</span>", escaped(name))
}

fn participants(summary: &Summary) -> String {
    let headings = [
        "participant",
        "held-out before (nats/token)",
        "perplexity",
        "held-out after (nats/token)",
        "perplexity",
        "change",
        "tokens",
        "tokens/s",
        "updates",
        "refused",
    ];
    let unknown = || NOTHING.to_owned();
    let row = |participant: &super::Participant| {
        let losses = participant.held_out.map_or_else(
            || [(); 5].map(|()| unknown()),
            |HeldOut { before, after, change_percent, .. }| {
                let Loss { nats: before, perplexity: before_perplexity } = before;
                let Loss { nats: after, perplexity: after_perplexity } = after;
                let [before_perplexity, after_perplexity] = [before_perplexity, after_perplexity].map(perplexity);
                [loss(before), before_perplexity, loss(after), after_perplexity, change(change_percent)]
            },
        );
        let work = [
            count(participant.tokens),
            participant.tokens_per_s.map_or_else(unknown, rate),
            participant.updates_accepted.to_string(),
            participant.updates_refused.to_string(),
        ];
        [participant.name.clone()].into_iter().chain(losses).chain(work).collect()
    };
    table("Participants", &headings, summary.participants.iter().map(row))
}

fn messages(summary: &Summary) -> String {
    let headings =
        ["participant", "up", "down", "up per trained token", "down per trained token", "UDP up", "UDP down"];
    let row = |participant: &super::Participant| {
        let (traffic, udp) = (participant.traffic.messages, participant.traffic.udp);
        let per_token = |bytes_each: Option<f64>| bytes_each.map_or_else(|| NOTHING.to_owned(), whole_bytes);
        vec![
            participant.name.clone(),
            bytes(traffic.up_bytes),
            bytes(traffic.down_bytes),
            per_token(participant.up_bytes_per_token),
            per_token(participant.down_bytes_per_token),
            bytes(udp.up_bytes),
            bytes(udp.down_bytes),
        ]
    };
    table("Bytes by participant", &headings, summary.participants.iter().map(row))
}

fn rounds(summary: &Summary) -> String {
    let headings = [
        "round",
        "members",
        "training loss (nats/token)",
        "held-out (nats/token)",
        "tokens",
        "duration",
        "body busy",
        "aggregation error",
    ];
    let row = |round: &super::Round| {
        vec![
            round.round.to_string(),
            round.members.len().to_string(),
            loss(round.loss_nats),
            round.held_out_nats.map_or_else(|| NOTHING.to_owned(), loss),
            count(round.tokens),
            duration(round.duration_ms),
            percent(round.body.compute_percent),
            round.aggregation_error.map_or_else(|| NOTHING.to_owned(), error),
        ]
    };
    table("Rounds", &headings, summary.rounds.iter().map(row))
}

fn departures(summary: &Summary) -> String {
    let rows = summary
        .departures
        .iter()
        .map(|departure| vec![departure.participant.clone(), departure.round.to_string(), departure.reason.clone()]);
    table("Departures", &["participant", "round", "reason"], rows)
}

/// Nothing at all where there are no rows.
fn table(title: &str, headings: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut body = String::new();
    for row in rows {
        body += "<tr>";
        row.iter().for_each(|cell| body += &format!("<td>{}</td>", escaped(cell)));
        body += "</tr>\n";
    }
    if body.is_empty() {
        return String::new();
    }
    let head: String = headings.iter().map(|heading| format!("<th>{heading}</th>")).collect();
    format!(
        "<section>\n<h2>{title}</h2>\n<div class=\"wide\"><table>\n<thead><tr>{head}</tr></thead>\n\
        <tbody>\n{body}</tbody>\n</table></div>\n</section>\n"
    )
}

fn footer(summary: &Summary) -> String {
    let facts =
        [("software", &summary.software), ("experiment", &summary.experiment_digest), ("model", &summary.model_digest)];
    let known = facts.iter().filter_map(|(name, fact)| fact.as_ref().map(|fact| format!("{name} {}", escaped(fact))));
    let again = (summary.starts > 1).then(|| format!("coordinator started {} times", summary.starts));
    format!("<footer>{}</footer>\n", known.chain(again).collect::<Vec<_>>().join("<br>\n"))
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in printable(text).chars() {
        match char {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            other => escaped.push(other),
        }
    }
    escaped
}

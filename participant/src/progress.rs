//! Progress for a person: bars on a terminal, nothing elsewhere (plain log lines tell the same).

use indicatif::{ProgressBar, ProgressStyle};

pub fn bytes(what: &'static str, total: u64) -> ProgressBar {
    let template = "{msg:12} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    styled(ProgressBar::new(total), template).with_message(what)
}

pub fn steps(total: u64) -> ProgressBar {
    styled(ProgressBar::new(total), "{bar:30} {pos}/{len} steps {msg} {eta}")
}

fn styled(bar: ProgressBar, template: &str) -> ProgressBar {
    bar.with_style(ProgressStyle::with_template(template).expect("a template of ours"))
}

//! Numbers as people read them: each with its unit, in as many digits as mean something.

/// Decimal multiples: `1.50 MB` is 1 500 000 bytes.
pub fn bytes(bytes: u64) -> String {
    scaled(bytes as f64, &[(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")])
}

pub fn duration(duration_ms: f64) -> String {
    let whole_s = (duration_ms / 1e3).round();
    match duration_ms {
        _ if !duration_ms.is_finite() => String::from("-"),
        3_600_000.0.. => format!("{} h {:02} min", (whole_s / 3600.0).floor(), (whole_s % 3600.0 / 60.0).floor()),
        60_000.0.. => format!("{} min {:02} s", (whole_s / 60.0).floor(), whole_s % 60.0),
        _ => scaled(duration_ms, &[(1e3, "s"), (1.0, "ms")]),
    }
}

pub fn energy(energy_j: f64) -> String {
    scaled(energy_j, &[(1e6, "MJ"), (1e3, "kJ"), (1.0, "J")])
}

/// Grouped in threes by a narrow space, which no line breaks at.
pub fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// So many of them: `noun` is what one is called.
pub fn counted(number: u64, noun: &str) -> String {
    let ending = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{ending}")
}

/// Nats per token; the unit stands in the heading.
pub fn loss(nats: f64) -> String {
    if nats.is_finite() { format!("{nats:.4}") } else { String::from("diverged") }
}

pub fn perplexity(perplexity: f64) -> String {
    if perplexity.is_finite() { significant(perplexity) } else { String::from("diverged") }
}

pub fn percent(percent: f64) -> String {
    if percent.is_finite() { format!("{percent:.1} %") } else { String::from("-") }
}

/// A change, with its sign.
pub fn change(percent: f64) -> String {
    if percent.is_finite() { format!("{percent:+.1} %").replace('-', "\u{2212}") } else { String::from("-") }
}

pub fn rate(per_second: f64) -> String {
    if per_second.is_finite() { significant(per_second) } else { String::from("-") }
}

/// A foreign string without what a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { '\u{fffd}' } else { char }).collect()
}

/// `steps` are units with their sizes, largest first.
fn scaled(value: f64, steps: &[(f64, &str)]) -> String {
    let Some((size, unit)) = steps.iter().find(|(size, _)| value.abs() >= *size).or(steps.last()) else {
        return value.to_string();
    };
    let scaled = value / size;
    let whole_unit = *size == 1.0 && value.fract() == 0.0;
    if whole_unit { format!("{value} {unit}") } else { format!("{} {unit}", significant(scaled)) }
}

/// Three digits or all digits before the point.
fn significant(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        assert_eq!([0, 999, 1_500, 98_362_432].map(bytes), ["0 B", "999 B", "1.50 kB", "98.4 MB"]);
        assert_eq!([0.0, 12.5, 1500.0].map(duration), ["0 ms", "12.5 ms", "1.50 s"]);
        assert_eq!([59_999.0, 61_000.0, 7_260_000.0].map(duration), ["60.0 s", "1 min 01 s", "2 h 01 min"]);
        assert_eq!([7, 1_234, 1_234_567].map(count), ["7", "1\u{202f}234", "1\u{202f}234\u{202f}567"]);
        assert_eq!([-12.34, 0.5].map(change), ["\u{2212}12.3 %", "+0.5 %"]);
        assert_eq!([0, 1, 2].map(|number| counted(number, "device")), ["0 devices", "1 device", "2 devices"]);
    }

    #[test]
    fn numbers_that_are_not_finite_have_a_word() {
        assert_eq!([loss(f64::NAN), percent(f64::NAN), duration(f64::NAN)], ["diverged", "-", "-"]);
    }
}

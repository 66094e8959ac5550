//! Strings that end an answer. They may arrive in pieces, so what may become one is held back until it cannot any more.

/// Invariants: no stop string is empty, and `held` is the beginning of some stop string, and not the whole of any.
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// None of `stops` is empty: such a one would end every answer at once.
    pub fn new(stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        Self { stops, held: String::new() }
    }

    /// What may be shown after this piece, and whether a stop string has come. Of that nothing is shown, nor what is behind
    /// it.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let first = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = first {
            let shown = self.held[..at].to_owned();
            self.held.clear();
            return (shown, true);
        }
        let begins = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let from = self.held.char_indices().map(|(at, _)| at).find(begins).unwrap_or(self.held.len());
        let held = self.held.split_off(from);
        (std::mem::replace(&mut self.held, held), false)
    }

    /// What was held back, where the answer ends for another reason.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stop_string_in_pieces_is_not_shown() {
        let mut stops = StopStrings::new(vec!["</s>".into()]);
        assert_eq!(stops.push("a<"), ("a".into(), false));
        assert_eq!(stops.push("b</"), ("<b".into(), false));
        assert_eq!(stops.push("s"), (String::new(), false));
        assert_eq!(stops.push(">c"), (String::new(), true));
    }

    proptest! {
        #[test]
        fn pieces_show_what_the_whole_text_shows(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{1,4}", 0..3),
        ) {
            let whole = pieces.concat();
            let mut strings = StopStrings::new(stops.clone());
            let (mut shown, mut stopped) = (String::new(), false);
            for piece in &pieces {
                let (text, stop) = strings.push(piece);
                shown.push_str(&text);
                if stop {
                    stopped = true;
                    break;
                }
            }
            if !stopped {
                shown.push_str(&strings.finish());
            }
            // The stop string that is whole first.
            let ends = stops.iter().filter_map(|stop| whole.find(stop.as_str()).map(|at| (at + stop.len(), at)));
            prop_assert_eq!(stopped, ends.clone().next().is_some());
            match stopped {
                true => prop_assert!(ends.clone().any(|(_, at)| shown == whole[..at]), "{:?} of {:?}", shown, whole),
                false => prop_assert_eq!(shown, whole),
            }
        }
    }
}

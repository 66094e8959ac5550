//! Where in a schema something stands.

use std::fmt;

use crate::ParticipantError;

/// A part of a schema, by the way to it; spelled out only to refuse it.
pub(super) enum At<'a> {
    /// What a reference names.
    Pointer(&'a str),
    Keyword(&'a At<'a>, &'static str),
    /// Of a keyword's list.
    Item(&'a At<'a>, &'static str, usize),
    Property(&'a At<'a>, &'a str),
}

impl fmt::Display for At<'_> {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pointer(pointer) => write!(to, "#{}", shown(pointer)),
            Self::Keyword(within, keyword) => write!(to, "{within}/{keyword}"),
            Self::Item(within, keyword, place) => write!(to, "{within}/{keyword}/{place}"),
            Self::Property(within, name) => write!(to, "{within}/properties/{}", shown(name)),
        }
    }
}

/// A beginning of what a schema's author wrote.
pub(super) fn shown(text: &str) -> &str {
    &text[..text.floor_char_boundary(64)]
}

pub(super) fn refused(at: &At<'_>, what: impl fmt::Display) -> ParticipantError {
    ParticipantError::Usage(format!("the schema, {at}: {what}"))
}

//! Sequences that outlive their answers: a prompt that begins like one of theirs goes on behind what they share.
//!
//! Kept are the tokens of prompts alone, whose keys and values are the same to the last bit however a prompt is divided: an
//! answer never tells what was kept, only how soon it comes. An answer's own tokens are made one at a time, where sums have
//! another order; as part of the conversation's next prompt they are made again.

use std::cmp::Reverse;
use std::sync::Arc;

use quant::inference::{Adapter, Session};

use crate::runner::{Runner, Running, Sequence};

/// A sequence, and the tokens that it begins with.
pub struct Kept {
    pub(crate) session: Box<Session>,
    pub(crate) tokens: Vec<u32>,
}

pub struct Sequences {
    most: usize,
    /// The last used last.
    kept: Vec<Kept>,
}

impl Sequences {
    /// Keeps at most so many.
    pub fn new(most: usize) -> Self {
        Self { most, kept: Vec::new() }
    }

    /// A sequence of at most `tokens` for a prompt, and how many of the prompt's tokens it holds: never the last, whose logits
    /// are wanted. With the `lent` ones that others have, there are no more than are kept at most, unless all are lent.
    pub(crate) fn begin<'a>(
        &mut self,
        runner: &'a Runner,
        prompt: &[u32],
        tokens: usize,
        adapter: Option<usize>,
        lent: usize,
    ) -> (Sequence<'a>, usize) {
        let (model, adapter) = match &runner.engine {
            Running::Integer { model, adapters } if self.most > 0 => (model, adapter.map(|i| &adapters[i])),
            _ => return (runner.sequence(tokens, adapter), 0),
        };
        let full = self.kept.len() + lent >= self.most;
        let found = self.find(prompt, tokens, adapter, full).map(|at| self.kept.remove(at));
        let fitting = found.filter(|kept| kept.session.context() >= tokens);
        let Some(Kept { mut session, tokens }) = fitting else {
            let mut session = Box::new(model.session(model.context().min(ROOM.max(2 * tokens))));
            session.adapt(adapter.cloned());
            return (Sequence::Integer(session), 0);
        };
        let shared = shared(&tokens, prompt);
        match is_same(session.adapter(), adapter) {
            true => session.truncate(shared),
            false => session.adapt(adapter.cloned()),
        }
        let cached = session.tokens();
        (Sequence::Integer(session), cached)
    }

    /// The place of the sequence that shares most with the prompt, the least recently used of several, unless it would lose more
    /// than half; or of the least recently used one, where there is no room for another.
    fn find(&self, prompt: &[u32], tokens: usize, adapter: Option<&Arc<Adapter>>, full: bool) -> Option<usize> {
        let usable = |kept: &Kept| kept.session.context() >= tokens && is_same(kept.session.adapter(), adapter);
        let usable = self.kept.iter().enumerate().filter(|(_, kept)| usable(kept));
        let shares = usable.map(|(at, kept)| (shared(&kept.tokens, prompt), Reverse(at)));
        // A few words in common, as of a template, are not worth the rest of a long conversation.
        let worth = |(shared, Reverse(at)): &(usize, Reverse<usize>)| 2 * shared >= self.kept[*at].tokens.len();
        let best = shares.filter(worth).max().map(|(_, Reverse(at))| at);
        best.or((full && !self.kept.is_empty()).then_some(0))
    }

    /// Takes one back; the least recently used goes where there are too many.
    pub fn keep(&mut self, kept: Kept) {
        if self.most == 0 {
            return;
        }
        if self.kept.len() == self.most {
            self.kept.remove(0);
        }
        self.kept.push(kept);
    }
}

/// Tokens that a kept sequence has room for, at least: conversations grow. Memory is taken as they do.
const ROOM: usize = 4096;

/// Keys and values depend on the adapter: one that was loaded again is another.
fn is_same(one: Option<&Arc<Adapter>>, other: Option<&Arc<Adapter>>) -> bool {
    one.map(Arc::as_ptr) == other.map(Arc::as_ptr)
}

/// Tokens that both begin with, less the prompt's last.
fn shared(tokens: &[u32], prompt: &[u32]) -> usize {
    tokens.iter().zip(&prompt[..prompt.len() - 1]).take_while(|(one, other)| one == other).count()
}

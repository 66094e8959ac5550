//! One sequence on its way through a decoder.

use std::sync::Arc;
use std::time::Instant;

use super::batch::BatchPass;
use super::cache::{Cache, CacheType};
use super::phases::Phases;
use super::room::{BATCH, Room, Slot, SlotPlaces, StripRows};
use super::token::TokenPass;
use super::{Adapter, Decoder, batch, token};
use crate::engine::Engine;
use crate::turns::ask_for_short_turns;

/// Keys and values of the tokens so far, and room for the next. After the first prompt no call allocates.
pub struct Session {
    engine: Engine,
    decoder: Arc<Decoder>,
    adapter: Option<Arc<Adapter>>,
    cache: Cache,
    tokens: usize,
    context: usize,
    strip: StripRows,
    room: Room,
    /// For several tokens at a time; made by the first prompt.
    batch: Option<Room>,
    slots: Vec<Slot>,
    places: Vec<SlotPlaces>,
    phases: Phases,
}

/// Rows whose logits are kept at a time.
const SCORED: usize = 16;

impl Session {
    /// For at most `context` tokens.
    pub fn new(engine: &Engine, decoder: &Arc<Decoder>, context: usize, cache: CacheType) -> Self {
        let shape = decoder.shape();
        let strip = StripRows::of(engine.path());
        let mut slots: Vec<Slot> = (0..engine.threads()).map(|_| Slot::new(engine, decoder, context)).collect();
        let places = slots.iter_mut().enumerate().map(|(thread, slot)| slot.places(thread)).collect();
        let blocks = decoder.blocks.len();
        Self {
            engine: engine.clone(),
            decoder: decoder.clone(),
            adapter: None,
            cache: Cache::new(shape, blocks, context, cache),
            tokens: 0,
            context,
            strip,
            room: Room::new(engine, shape, 1, 1, strip),
            batch: None,
            slots,
            places,
            phases: Phases::new(token::phases(blocks).max(batch::phases(blocks)), engine.threads()),
        }
    }

    /// Tokens whose keys and values are held.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub fn context(&self) -> usize {
        self.context
    }

    /// Forgets all but the first `tokens`.
    pub fn truncate(&mut self, tokens: usize) {
        self.tokens = self.tokens.min(tokens);
    }

    /// The one that is applied.
    pub fn adapter(&self) -> Option<&Arc<Adapter>> {
        self.adapter.as_ref()
    }

    /// Applies an adapter from now on, or none, and forgets all tokens: their keys and values were another's.
    ///
    /// # Panics
    /// If the adapter is another decoder's.
    pub fn adapt(&mut self, adapter: Option<Arc<Adapter>>) {
        let Self { decoder, .. } = self;
        let fits = |adapter: &Arc<Adapter>| adapter.fits(&decoder.shape, decoder.blocks.len());
        assert!(adapter.iter().all(fits), "an adapter of this decoder");
        self.adapter = adapter;
        self.truncate(0);
    }

    /// Appends tokens and returns the logits behind the last, `[vocabulary]`: a single one the fastest way, several as a
    /// [`prompt`](Self::prompt_until).
    ///
    /// # Panics
    /// If there is no token, one that is none of the vocabulary, or more than the context holds.
    pub fn next(&mut self, tokens: &[u32]) -> &[f32] {
        self.next_until(tokens, None).expect("no time is set")
    }

    /// The same, but gives up at a time, within one phase of one block: then nothing has been appended.
    ///
    /// # Panics
    /// As [`next`](Self::next).
    pub fn next_until(&mut self, tokens: &[u32], until: Option<Instant>) -> Option<&[f32]> {
        let &[token] = tokens else { return self.prompt_until(tokens, until) };
        self.check(tokens);
        self.token(token, until).then_some(&self.room.logits)
    }

    /// The same, but a single token goes the way of several, where sums have another order: however a prompt is divided, its
    /// keys, values and logits are the same to the last bit.
    ///
    /// # Panics
    /// As [`next`](Self::next).
    pub fn prompt_until(&mut self, tokens: &[u32], until: Option<Instant>) -> Option<&[f32]> {
        self.check(tokens);
        let before = self.tokens;
        let mut rest = tokens;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(BATCH.min(rest.len()));
            if !self.pass(now, later.is_empty(), until) {
                self.truncate(before);
                return None;
            }
            rest = later;
        }
        Some(&self.room.logits)
    }

    /// Appends tokens and shows the logits behind each, `[vocabulary]`, in order.
    ///
    /// # Panics
    /// As [`next`](Self::next).
    pub fn score(&mut self, tokens: &[u32], mut show: impl FnMut(usize, &[f32])) {
        self.check(tokens);
        let vocabulary = self.decoder.shape.vocabulary;
        for (at, now) in tokens.chunks(BATCH).enumerate() {
            self.pass(now, false, None);
            for first in (0..now.len()).step_by(SCORED) {
                let rows = first..now.len().min(first + SCORED);
                self.logits(rows.clone());
                let logits = &self.batch.as_ref().expect("a batch has been passed").logits;
                for (row, logits) in rows.zip(logits.chunks_exact(vocabulary)) {
                    show(at * BATCH + row, logits);
                }
            }
        }
    }

    fn check(&self, tokens: &[u32]) {
        let vocabulary = self.decoder.shape.vocabulary;
        assert!(!tokens.is_empty() && tokens.iter().all(|&token| (token as usize) < vocabulary), "tokens of the model");
        assert!(self.tokens + tokens.len() <= self.context, "a sequence that fits its context");
    }

    /// Whether there was time.
    fn token(&mut self, token: u32, until: Option<Instant>) -> bool {
        let Self { engine, decoder, adapter, cache, room, places, phases, tokens, .. } = self;
        decoder.embedding.row(token as usize, &mut room.x);
        room.rotate_from(&decoder.shape.frequencies, *tokens, 1);
        phases.reset(until);
        let at = *tokens;
        let pass = TokenPass {
            path: engine.path(),
            threads: engine.threads(),
            decoder,
            adapter: adapter.as_deref(),
            cache,
            phases,
            at,
            room: room.places(),
        };
        engine.together(|i| {
            in_time(until);
            pass.run(&places[i]);
        });
        if self.phases.is_over() {
            return false;
        }
        self.tokens += 1;
        true
    }

    /// A batch, and the logits behind its last row if asked for; whether there was time.
    fn pass(&mut self, tokens: &[u32], logits: bool, until: Option<Instant>) -> bool {
        let Self {
            engine, decoder, adapter, cache, room: single, batch, strip, places, phases, tokens: before, ..
        } = self;
        let shape = &decoder.shape;
        let room = batch.get_or_insert_with(|| Room::new(engine, shape, BATCH, 0, *strip));
        for (&token, x) in tokens.iter().zip(room.x.chunks_exact_mut(shape.width)) {
            decoder.embedding.row(token as usize, x);
        }
        room.rotate_from(&shape.frequencies, *before, tokens.len());
        phases.reset(until);
        let (path, rows) = (engine.path(), tokens.len());
        let (adapter, cache, phases) = (adapter.as_deref(), &*cache, &*phases);
        let room = room.places();
        let pass = BatchPass { path, decoder, adapter, cache, phases, before: *before, rows, strip: *strip, room };
        let last = TokenPass {
            path,
            threads: engine.threads(),
            decoder,
            adapter,
            cache,
            phases,
            at: *before + rows - 1,
            room: single.places().with_x(room.x, (rows - 1) * shape.width),
        };
        engine.together(|i| {
            in_time(until);
            let mut phase = pass.blocks(&places[i]);
            if logits {
                last.logits(&mut phase, &places[i]);
            }
        });
        if self.phases.is_over() {
            return false;
        }
        self.tokens += tokens.len();
        true
    }

    /// The logits behind some rows of the batch that was passed last.
    fn logits(&mut self, rows: std::ops::Range<usize>) {
        let Self { engine, decoder, adapter, cache, batch, strip, places, phases, .. } = self;
        let room = batch.as_mut().expect("a batch has been passed");
        if room.logits.is_empty() {
            room.logits = engine.zeros(SCORED * decoder.shape.vocabulary);
        }
        phases.reset(None);
        let pass = BatchPass {
            path: engine.path(),
            decoder,
            adapter: adapter.as_deref(),
            cache,
            phases,
            before: 0,
            rows: rows.end,
            strip: *strip,
            room: room.places(),
        };
        engine.together(|i| pass.logits(&mut 0, &places[i], rows.clone()));
    }
}

/// A thread that waits for its next turn behind another program's longest one, would be late by that.
fn in_time(until: Option<Instant>) {
    if until.is_some() {
        ask_for_short_turns();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Their memory goes back to the engine's spare.
        self.slots.clear();
    }
}

//! How many bytes of which kind have crossed one connection: messages with their length prefixes, frames with their headers.
//!
//! What QUIC adds below that is counted by `overhead`; the two together are what the network interface sees.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use wire::MessageKind;

const KINDS: usize = MessageKind::ALL.len();

/// Counts of one connection, shared by its streams.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    sent: [AtomicU64; KINDS],
    received: [AtomicU64; KINDS],
}

/// A ledger at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LedgerSnapshot {
    sent: [u64; KINDS],
    received: [u64; KINDS],
}

impl Ledger {
    pub(crate) fn count_sent(&self, kind: MessageKind, bytes: usize) {
        self.sent[row(kind)].fetch_add(bytes as u64, Relaxed);
    }

    pub(crate) fn count_received(&self, kind: MessageKind, bytes: usize) {
        self.received[row(kind)].fetch_add(bytes as u64, Relaxed);
    }

    pub(crate) fn snapshot(&self) -> LedgerSnapshot {
        LedgerSnapshot {
            sent: std::array::from_fn(|row| self.sent[row].load(Relaxed)),
            received: std::array::from_fn(|row| self.received[row].load(Relaxed)),
        }
    }
}

impl LedgerSnapshot {
    pub fn sent(&self, kind: MessageKind) -> u64 {
        self.sent[row(kind)]
    }

    pub fn received(&self, kind: MessageKind) -> u64 {
        self.received[row(kind)]
    }

    pub fn sent_total(&self) -> u64 {
        self.sent.iter().sum()
    }

    pub fn received_total(&self) -> u64 {
        self.received.iter().sum()
    }

    /// Every kind with the bytes sent and received.
    pub fn rows(&self) -> impl Iterator<Item = (MessageKind, u64, u64)> + '_ {
        MessageKind::ALL.into_iter().map(|kind| (kind, self.sent(kind), self.received(kind)))
    }
}

fn row(kind: MessageKind) -> usize {
    kind as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_row_of_its_own() {
        let ledger = Ledger::default();
        for (index, kind) in MessageKind::ALL.into_iter().enumerate() {
            ledger.count_sent(kind, 10 + index);
            ledger.count_received(kind, 100 + index);
        }
        let snapshot = ledger.snapshot();
        for (index, (kind, sent, received)) in snapshot.rows().enumerate() {
            assert_eq!((sent, received), (10 + index as u64, 100 + index as u64), "{}", kind.name());
        }
    }
}

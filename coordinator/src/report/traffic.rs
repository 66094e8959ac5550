//! The ledger of bytes: what crossed the network, by kind of message, beside what UDP carried.
//!
//! Rows count from the beginning of a connection. This file adds the connections of a participant up; it notices a new
//! one by a counter that fell, or is told that the coordinator was started again.

use std::collections::BTreeMap;

use serde::Serialize;

/// Bytes in both directions, as a participant names them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Directions {
    /// From the coordinator to the participant.
    pub down_bytes: u64,
    /// From the participant to the coordinator.
    pub up_bytes: u64,
}

impl Directions {
    pub fn total_bytes(self) -> u64 {
        self.down_bytes.saturating_add(self.up_bytes)
    }

    fn add(&mut self, other: Self) {
        self.down_bytes = self.down_bytes.saturating_add(other.down_bytes);
        self.up_bytes = self.up_bytes.saturating_add(other.up_bytes);
    }

    fn is_below(self, other: Self) -> bool {
        self.down_bytes < other.down_bytes || self.up_bytes < other.up_bytes
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    pub by_kind: BTreeMap<String, Directions>,
    /// Sum over the kinds.
    pub messages: Directions,
    /// What QUIC adds: headers, acknowledgements, handshakes, repeated packets.
    pub overhead: Directions,
    /// UDP payloads.
    pub udp: Directions,
}

impl Traffic {
    pub(super) fn new(
        sent: &BTreeMap<String, u64>,
        received: &BTreeMap<String, u64>,
        udp: Directions,
        overhead: Directions,
    ) -> Self {
        let mut by_kind = BTreeMap::<String, Directions>::new();
        for (kind, bytes) in sent {
            by_kind.entry(kind.clone()).or_default().down_bytes = *bytes;
        }
        for (kind, bytes) in received {
            by_kind.entry(kind.clone()).or_default().up_bytes = *bytes;
        }
        let mut messages = Directions::default();
        by_kind.values().for_each(|bytes| messages.add(*bytes));
        Self { by_kind, messages, overhead, udp }
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (kind, bytes) in &other.by_kind {
            self.by_kind.entry(kind.clone()).or_default().add(*bytes);
        }
        self.messages.add(other.messages);
        self.overhead.add(other.overhead);
        self.udp.add(other.udp);
    }

    /// Share of the UDP bytes that is overhead.
    pub fn overhead_percent(&self) -> f64 {
        100.0 * self.overhead.total_bytes() as f64 / self.udp.total_bytes() as f64
    }

    /// What the ledger misses of the UDP bytes (or, negative, counts twice), as a share of them.
    pub fn gap_percent(&self) -> f64 {
        let booked = self.messages.total_bytes() as f64 + self.overhead.total_bytes() as f64;
        let udp = self.udp.total_bytes() as f64;
        100.0 * (udp - booked) / udp
    }

    fn is_below(&self, other: &Self) -> bool {
        let missing = Directions::default();
        let kind_fell =
            |(kind, bytes): (&String, &Directions)| self.by_kind.get(kind).unwrap_or(&missing).is_below(*bytes);
        self.udp.is_below(other.udp) || other.by_kind.iter().any(kind_fell)
    }
}

/// The connections of one participant, one after the other.
#[derive(Debug, Default)]
pub(super) struct Connections {
    closed: Traffic,
    open: Traffic,
}

impl Connections {
    pub(super) fn count(&mut self, row: Traffic) {
        if row.is_below(&self.open) {
            self.close();
        }
        self.open = row;
    }

    /// What is counted from now on belongs to another connection.
    pub(super) fn close(&mut self) {
        self.closed.add(&std::mem::take(&mut self.open));
    }

    pub(super) fn total(mut self) -> Traffic {
        self.close();
        self.closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn activations(down_bytes: u64, udp: u64) -> Traffic {
        let sent = BTreeMap::from([(String::from("activations"), down_bytes)]);
        let directions = |down_bytes| Directions { down_bytes, up_bytes: 0 };
        Traffic::new(&sent, &BTreeMap::new(), directions(udp), directions(udp - down_bytes))
    }

    fn check_total(rows: &[(u64, u64)], expected: u64) {
        let mut connections = Connections::default();
        rows.iter().for_each(|&(down_bytes, udp)| connections.count(activations(down_bytes, udp)));
        let total = connections.total();
        assert_eq!(total.by_kind["activations"].down_bytes, expected, "{rows:?}");
        assert_eq!(total.messages.down_bytes, expected, "{rows:?}");
        assert_eq!(total.gap_percent(), 0.0, "{rows:?}");
    }

    #[test]
    fn growing_counters_are_one_connection() {
        check_total(&[(10, 12), (10, 15), (30, 40)], 30);
    }

    #[test]
    fn a_counter_that_fell_begins_another_connection() {
        check_total(&[(10, 12), (30, 40), (5, 6), (7, 9)], 37);
        check_total(&[(10, 40), (11, 12)], 21);
    }

    #[test]
    fn a_gap_is_a_share_of_the_udp_bytes() {
        let mut traffic = activations(60, 100);
        traffic.overhead.down_bytes = 30;
        assert_eq!(traffic.gap_percent(), 10.0);
        assert_eq!(traffic.overhead_percent(), 30.0);
    }
}

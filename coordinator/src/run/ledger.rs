//! A connection's bytes as a metric row.

use std::collections::BTreeMap;

use experiment::Row;
use net::Connection;

use crate::round::ParticipantName;

/// Bytes by kind of message, as this side has written and read them, beside what QUIC says went over UDP. The overhead is
/// computed from QUIC's counts of packets and frames, not from the difference, so that the two sides of the sum are
/// independent of each other.
pub(super) fn bytes_row(round: u32, participant: &ParticipantName, connection: &Connection) -> Row {
    let ledger = connection.ledger();
    let (mut sent, mut received) = (BTreeMap::new(), BTreeMap::new());
    for (kind, sent_bytes, received_bytes) in ledger.rows() {
        for (rows, bytes) in [(&mut sent, sent_bytes), (&mut received, received_bytes)] {
            if bytes > 0 {
                rows.insert(kind.name().to_owned(), bytes);
            }
        }
    }
    let stats = connection.transport_stats();
    let of = |value: fn(&net::DirectionStats) -> u64| {
        stats.as_ref().map_or((0, 0), |stats| (value(&stats.sent), value(&stats.received)))
    };
    let (udp_sent, udp_received) = of(|direction| direction.udp_bytes);
    let (overhead_sent, overhead_received) = of(net::DirectionStats::overhead_bytes);
    let participant = participant.to_string();
    Row::Bytes {
        round,
        participant,
        sent,
        received,
        udp_sent,
        udp_received,
        overhead_sent,
        overhead_received,
        energy_j: None,
    }
}

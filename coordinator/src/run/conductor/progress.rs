//! Tells the round machine what its members get on with, and when the disk keeps everybody waiting.

use std::time::Duration;

use net::Connection;
use tokio::time::Instant;

use super::Conductor;
use crate::round::{Action, Event};

/// How often it is looked at what has crossed the connections, at most.
const LOOK_EVERY: Duration = Duration::from_secs(5);

impl Conductor {
    /// What the machine makes of the time that has passed: called before anything else that has happened is told.
    pub(super) fn note_progress(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.held != self.degraded {
            self.held = self.degraded;
            actions.extend(self.handle(if self.held { Event::Held } else { Event::Released }));
        }
        if self.looked.elapsed() < LOOK_EVERY {
            return actions;
        }
        self.looked = Instant::now();
        let mut moved = Vec::new();
        for (participant, connected) in &mut self.connections {
            let bytes = bytes_of(&connected.connection);
            let more = bytes.saturating_sub(std::mem::replace(&mut connected.moved_bytes, bytes));
            if more > 0 {
                moved.push((participant.clone(), more));
            }
        }
        for (participant, bytes) in moved {
            actions.extend(self.handle(Event::Moved { participant, bytes }));
        }
        actions
    }
}

/// Those of half a message, too, where QUIC counts them.
fn bytes_of(connection: &Connection) -> u64 {
    let ledger = || {
        let ledger = connection.ledger();
        ledger.sent_total() + ledger.received_total()
    };
    connection.transport_stats().map_or_else(ledger, |stats| stats.sent.udp_bytes + stats.received.udp_bytes)
}

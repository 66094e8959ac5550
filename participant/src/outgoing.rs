use std::ops::{Deref, DerefMut};

use net::SendStream;
use wire::CloseCode;

/// The writing half of a step or an update. Dropped before its end it is reset: given up midway is not ended early, which
/// the coordinator would take for a broken peer.
pub struct Outgoing {
    send: SendStream,
    finished: bool,
}

impl Outgoing {
    pub fn new(send: SendStream) -> Self {
        Self { send, finished: false }
    }

    pub fn finish(&mut self) {
        self.finished = true;
        self.send.finish();
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if !self.finished {
            self.send.reset(CloseCode::Stale);
        }
    }
}

impl Deref for Outgoing {
    type Target = SendStream;

    fn deref(&self) -> &SendStream {
        &self.send
    }
}

impl DerefMut for Outgoing {
    fn deref_mut(&mut self) -> &mut SendStream {
        &mut self.send
    }
}

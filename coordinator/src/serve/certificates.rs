//! Certificates over the wire: the first one for an invitation, and the next one for a participant that holds one.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use net::{Connection, PeerIdentity};
use time::OffsetDateTime;
use tokio::time::Instant;
use wire::{CloseCode, Enrolled, Request};

use super::{Control, HELLO_DEADLINE, ServeError, Shared, Stream, locked, misbehaved, within};
use crate::home::RedeemError;

/// When a session last asked for a certificate.
pub(super) type LastRenewal = Mutex<Option<Instant>>;

/// Between two renewals of a session. A device that gets none, or cannot keep what it got, asks again a minute later.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(30);

pub(super) async fn enrol(
    connection: &Connection,
    shared: &Arc<Shared>,
    control: &mut Control,
) -> Result<(), ServeError> {
    let PeerIdentity::Enrol { name, fingerprint } = connection.peer().clone() else {
        return Err(ServeError::Close(CloseCode::Internal, "no invitation".into()));
    };
    let (send, receive) = control.insert(within(HELLO_DEADLINE, connection.accept()).await??);
    let Request::Enrol { csr_der } = within(HELLO_DEADLINE, receive.message()).await?? else {
        return Err(ServeError::Close(CloseCode::Unexpected, "an invitation is good for enrolling alone".into()));
    };
    receive.end().await?;
    let (redeemer, of) = (shared.clone(), name.clone());
    let redeem = move || redeemer.home.redeem(&of, fingerprint, &csr_der, OffsetDateTime::now_utc());
    let chain_pem = issued(redeem).await?;
    tracing::info!(participant = %name, "enrolled");
    send.message(&Enrolled { chain_pem }).await?;
    send.finish();
    Ok(send.delivered().await?)
}

impl Stream {
    pub(super) async fn renew(mut self, csr_der: Vec<u8>) -> Result<(), ServeError> {
        if !may_renew(&mut locked(&self.renewed), Instant::now()) {
            let what = format!("a renewal less than {} s after the one before", RENEWAL_INTERVAL.as_secs());
            return Err(ServeError::Close(CloseCode::OverLimit, what));
        }
        self.receive.end().await?;
        let PeerIdentity::Participant { name } = self.connection.peer().clone() else {
            return Err(misbehaved("a renewal by somebody who is no participant".into()));
        };
        let (renewer, of) = (self.shared.clone(), name.clone());
        let proved = (self.connection.peer_key(), self.connection.issued_unix());
        let renew = move || renewer.home.renew(&of, proved, &csr_der, OffsetDateTime::now_utc());
        let chain_pem = match issued(renew).await {
            // The one it has is still good, and it asks again.
            Err(ServeError::Close(CloseCode::Internal, _)) => {
                self.send.reset(CloseCode::Internal);
                self.finished = true;
                return Ok(());
            }
            issued => issued?,
        };
        tracing::info!(participant = %name, "certificate renewed");
        self.send.message(&Enrolled { chain_pem }).await?;
        self.finish();
        Ok(())
    }
}

/// Whether a session may ask for a certificate now; that it has is noted.
fn may_renew(last: &mut Option<Instant>, now: Instant) -> bool {
    last.replace(now).is_none_or(|before| now.duration_since(before) >= RENEWAL_INTERVAL)
}

/// A certificate chain, if the home issues one.
async fn issued(issue: impl FnOnce() -> Result<String, RedeemError> + Send + 'static) -> Result<String, ServeError> {
    match offload::beside(issue).await {
        Ok(Ok(chain_pem)) => Ok(chain_pem),
        // Paths of the home are for the log alone.
        Ok(Err(RedeemError::Home(error))) => {
            tracing::error!(%error, "no certificate can be issued");
            Err(ServeError::Close(CloseCode::Internal, "the coordinator cannot read its home".into()))
        }
        Ok(Err(error)) => Err(ServeError::Close(CloseCode::NotAuthorized, error.to_string())),
        Err(error) => Err(ServeError::Close(CloseCode::Internal, error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_renews_once_in_a_while() {
        let (begun, mut last) = (Instant::now(), None);
        let mut asks = |seconds| may_renew(&mut last, begun + Duration::from_secs(seconds));
        assert!(asks(0));
        assert!(asks(30));
        assert!(!asks(59));
        // Two at once, the later of which has the lock first.
        assert!(!asks(58));
    }
}

//! Certificates over the wire: the first one for an invitation, and the next one for a participant that holds one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use net::{Connection, PeerIdentity};
use time::OffsetDateTime;
use tokio::time::Instant;
use wire::{CloseCode, Enrolled, Request};

use super::{Control, HELLO_DEADLINE, ServeError, Shared, Stream, locked, misbehaved, within};
use crate::home::RedeemError;
use crate::round::ParticipantName;

/// Those who have asked for another certificate of late: since when, and how often.
#[derive(Default)]
pub struct Renewals(Mutex<BTreeMap<ParticipantName, (Instant, u32)>>);

/// Renewals of a participant within the interval. A device that gets none, or cannot keep what it got, asks again a
/// minute later; one that has lost its connection before the answer came, as soon as it is back.
const RENEWALS_MAX: u32 = 4;
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
        if !self.shared.renewals.admit(&self.participant, Instant::now()) {
            let what = format!("more than {RENEWALS_MAX} renewals within {} s", RENEWAL_INTERVAL.as_secs());
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

impl Renewals {
    /// Whether a participant may ask for a certificate now; that it has is noted.
    fn admit(&self, participant: &ParticipantName, now: Instant) -> bool {
        let mut recent = locked(&self.0);
        recent.retain(|_, (since, _)| now.duration_since(*since) < RENEWAL_INTERVAL);
        let (_, count) = recent.entry(participant.clone()).or_insert((now, 0));
        *count += 1;
        *count <= RENEWALS_MAX
    }
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
    fn a_participant_renews_once_in_a_while() {
        let (begun, renewals) = (Instant::now(), Renewals::default());
        let at = |seconds| begun + Duration::from_secs(seconds);
        let asks = |name: &str, seconds| renewals.admit(&ParticipantName::new(name), at(seconds));
        assert!([0, 1, 2, 29].into_iter().all(|seconds| asks("press-1", seconds)));
        assert!(!asks("press-1", 29));
        assert!(asks("press-2", 29));
        assert!(asks("press-1", 30));
    }
}

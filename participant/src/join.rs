//! `participant join`: from an invitation to the end of the run, over as many connections as it takes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use net::{Congestion, Connection, Dialer, Identity, Invitation, NetError, Transport, TransportLimits};
use tokio::sync::watch;
use tokio::time::Instant;
use wire::CloseCode;

use crate::ParticipantError;
use crate::device::Device;
use crate::session::Participant;

/// A coordinator that is there answers sooner.
const ATTEMPT_MIN: Duration = Duration::from_millis(500);

pub struct Join {
    pub invitation: Invitation,
    /// Overrides the invitation's addresses.
    pub address: Option<String>,
    /// Where the device keeps its identity.
    pub state: PathBuf,
    /// How long an unreachable coordinator is tried.
    pub patience: Duration,
    /// Becomes true when the device is to leave the run.
    pub stop: watch::Receiver<bool>,
}

impl Join {
    pub async fn run(&self, participant: &mut Participant) -> Result<String, ParticipantError> {
        let device = Device::open(&self.state)?;
        let mut persistence = Persistence::new(self.patience);
        loop {
            let welcomes = participant.welcomes;
            match self.attempt(&device, participant, persistence.left()).await {
                Ok(reason) => return Ok(reason),
                Err(error) => persistence.after(error, participant.welcomes != welcomes).await?,
            }
        }
    }

    /// A connection must be there after `patience`.
    async fn attempt(
        &self,
        device: &Device,
        participant: &mut Participant,
        patience: Duration,
    ) -> Result<String, ParticipantError> {
        let transport = transport();
        let mut failure = None;
        for address in self.address.iter().chain(self.invitation.addresses.iter().filter(|_| self.address.is_none())) {
            let connected = tokio::time::timeout(patience, self.connect(device, address, &transport)).await;
            let connected = connected.unwrap_or_else(|_| {
                Err(ParticipantError::Unreachable { address: address.clone(), waited_s: patience.as_secs_f64() })
            });
            match connected {
                Ok((dialer, connection)) => {
                    let mut stop = self.stop.clone();
                    let stopped = async {
                        // Whoever could ask for it may be gone; then nobody does.
                        if stop.wait_for(|stop| *stop).await.is_err() {
                            std::future::pending::<()>().await;
                        }
                    };
                    let ran = tokio::select! {
                        biased;
                        ran = participant.run_until(&connection, stopped) => ran,
                        never = device.keep_renewed(&connection) => match never {},
                    };
                    let ran = finish(&connection, ran).await;
                    dialer.close().await;
                    return ran;
                }
                Err(error) => failure = Some(graver(failure, error)),
            }
        }
        Err(failure
            .unwrap_or_else(|| ParticipantError::Usage("the invitation names no address; give --address".into())))
    }

    async fn connect(
        &self,
        device: &Device,
        address: &str,
        transport: &Transport,
    ) -> Result<(Dialer, Connection), ParticipantError> {
        let identity: Identity = match device.identity()? {
            Some(identity) if !device.is_invited_anew(&self.invitation)? => identity,
            _ => device.enrol(&self.invitation, address, transport).await?,
        };
        let dialer = Dialer::new(&identity, transport)?;
        let connection = dialer.connect(address).await?;
        Ok((dialer, connection))
    }
}

/// Of what went wrong at two addresses. A refusal is not mended by trying again, whatever became of the others; that
/// somebody else answers at one of them says nothing of the coordinator.
fn graver(before: Option<ParticipantError>, error: ParticipantError) -> ParticipantError {
    let weight = |error: &ParticipantError| match error {
        ParticipantError::Net(NetError::PeerUntrusted { .. }) => 0,
        error if error.is_retryable() => 1,
        _ => 2,
    };
    before.filter(|before| weight(before) >= weight(&error)).unwrap_or(error)
}

/// Waits longer after every failure, up to a quarter of a minute.
struct BackOff {
    next: Duration,
}

impl BackOff {
    fn new() -> Self {
        Self { next: Duration::from_millis(250) }
    }

    fn next_delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (delay * 2).min(Duration::from_secs(15));
        delay
    }
}

/// When a device tries again, and when it gives up.
pub struct Persistence {
    patience: Duration,
    back_off: BackOff,
    /// When it began to try, and nobody has welcomed it since.
    trying_since: Instant,
}

impl Persistence {
    /// `patience` is how long an unreachable coordinator is tried.
    pub fn new(patience: Duration) -> Self {
        Self { patience, back_off: BackOff::new(), trying_since: Instant::now() }
    }

    /// How long the next attempt may take.
    pub fn left(&self) -> Duration {
        self.patience.saturating_sub(self.trying_since.elapsed()).max(ATTEMPT_MIN)
    }

    /// Returns when it is time for another attempt, or the error where there is none.
    pub async fn after(&mut self, error: ParticipantError, was_welcomed: bool) -> Result<(), ParticipantError> {
        if !error.is_retryable() {
            return Err(error);
        }
        // A coordinator that was there starts the patience anew.
        if was_welcomed {
            (self.trying_since, self.back_off) = (Instant::now(), BackOff::new());
        }
        if self.trying_since.elapsed() >= self.patience {
            return Err(error);
        }
        let delay = self.back_off.next_delay();
        tracing::warn!(%error, retry_in_ms = delay.as_millis() as u64, "the coordinator is not reachable; trying again");
        tokio::time::sleep(delay).await;
        Ok(())
    }
}

/// Closes what is still open with the right words. Where a stream broke because the coordinator closed the connection,
/// its reason is the better error.
pub async fn finish(
    connection: &Connection,
    ran: Result<String, ParticipantError>,
) -> Result<String, ParticipantError> {
    let ran = match ran {
        Err(ParticipantError::Net(
            error @ (NetError::Lost { .. } | NetError::Reset { .. } | NetError::Closed { .. }),
        )) => {
            let closed = tokio::time::timeout(Duration::from_secs(1), connection.closed()).await;
            match closed.unwrap_or(error) {
                // To come again would only drive the other one out in turn.
                NetError::Closed { code: Some(CloseCode::Superseded), .. } => Err(ParticipantError::Superseded),
                error => Err(error.into()),
            }
        }
        ran => ran,
    };
    match &ran {
        Ok(_) => connection.close(CloseCode::Done, "the run is over"),
        Err(ParticipantError::Net(error)) => connection.close(error.close_code(), &error.to_string()),
        Err(ParticipantError::Stopped) => connection.close(CloseCode::GoingAway, "the device was stopped"),
        Err(_) => connection.close(CloseCode::Internal, "the device cannot go on"),
    }
    ran
}

pub fn transport() -> Transport {
    // One micro-batch of 8,192 tokens of a 4,096-wide model in f32, and one behind it.
    let limits = TransportLimits { tensor_bytes_max: 128 << 20, in_flight: 2 };
    Transport { limits, congestion: Congestion::Cubic }
}

/// Where an invitation's device keeps its state unless the owner says otherwise: beside the invitation.
pub fn default_state(invitation: &Path) -> PathBuf {
    invitation.with_extension("device")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_at_one_address_counts_more_than_silence_at_another() {
        let refusal = || ParticipantError::Refused("it is full".into());
        let silence = || NetError::Lost { reason: "nobody answers".into(), retryable: true }.into();
        let stranger = || NetError::PeerUntrusted { reason: "another root".into() }.into();
        let gravest = |errors: [ParticipantError; 3]| {
            errors.into_iter().fold(None, |failure, error| Some(graver(failure, error))).unwrap()
        };
        for errors in [[refusal(), silence(), stranger()], [stranger(), silence(), refusal()]] {
            assert_eq!(gravest(errors).to_string(), "the coordinator refused: it is full");
        }
        for errors in [[silence(), stranger(), silence()], [stranger(), silence(), stranger()]] {
            assert!(gravest(errors).is_retryable());
        }
        assert!(!gravest([stranger(), stranger(), stranger()]).is_retryable());
    }
}

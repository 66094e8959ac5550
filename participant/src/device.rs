//! What a device keeps between runs: its key, its certificate, and whom it trusts. The key never leaves this directory.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::time::Duration;

use experiment::{hex, write_atomically};
use net::{Connection, DeviceKey, Dialer, Identity, Invitation, StreamKind, Transport};
use time::OffsetDateTime;
use wire::{CloseCode, Enrolled, Request};

use crate::ParticipantError;
use crate::output::check_no_file;

const CERTIFICATE: &str = "device.pem";
const KEY: &str = "device.key";
/// The key of an enrolment with another invitation, until that has succeeded.
const NEXT_KEY: &str = "device.key.next";
/// The fingerprint of the invitation that the device has enrolled with.
const ENROLLED: &str = "enrolled";

/// How often a device asks whether it is time for another certificate: a clock may jump, and a machine may sleep.
const RENEWAL_CHECK: Duration = Duration::from_secs(600);
const RENEWAL_RETRY: Duration = Duration::from_secs(60);

pub struct Device {
    directory: PathBuf,
}

impl Device {
    pub fn open(directory: &Path) -> Result<Self, ParticipantError> {
        check_no_file(directory)?;
        std::fs::create_dir_all(directory).map_err(ParticipantError::io(directory))?;
        // Killed with the old certificate gone and the new one not there: what the invitation was used with is the next key.
        let next = directory.join(NEXT_KEY);
        if next.is_file() && !directory.join(CERTIFICATE).is_file() {
            std::fs::rename(&next, directory.join(KEY)).map_err(ParticipantError::io(next))?;
        }
        Ok(Self { directory: directory.to_owned() })
    }

    /// The identity from an earlier enrolment, if there was one.
    pub fn identity(&self) -> Result<Option<Identity>, ParticipantError> {
        let read = |name: &str| {
            let path = self.directory.join(name);
            std::fs::read_to_string(&path).map_err(ParticipantError::io(path))
        };
        if !self.directory.join(CERTIFICATE).is_file() {
            return Ok(None);
        }
        let identity = Identity::from_pem(&read(CERTIFICATE)?, &read(KEY)?, &read("ca.pem")?);
        identity.map(Some).map_err(|error| {
            let path = self.directory.join(if error.is_of_key() { KEY } else { CERTIFICATE });
            let next_step = format!("move {CERTIFICATE} and {KEY} away, and join with a new invitation");
            ParticipantError::Usage(format!("{}: {error}; {next_step}", path.display()))
        })
    }

    /// Whether this is another invitation than the one that the device has enrolled with: then what it holds has expired, or was revoked.
    pub fn is_invited_anew(&self, invitation: &Invitation) -> Result<bool, ParticipantError> {
        let path = self.directory.join(ENROLLED);
        // A device that has not enrolled yet, or did so before this was kept.
        if !path.is_file() || !self.directory.join(CERTIFICATE).is_file() {
            return Ok(false);
        }
        let enrolled = std::fs::read_to_string(&path).map_err(ParticipantError::io(&path))?;
        Ok(enrolled != hex(&invitation.identity()?.fingerprint()))
    }

    /// Gets another certificate over `connection` whenever two thirds of the present one's time are over. A coordinator that does not know
    /// how is not asked.
    pub async fn keep_renewed(&self, connection: &Connection) -> Infallible {
        if connection.agreed_minor().await < wire::RENEWING_MINOR {
            std::future::pending::<()>().await;
        }
        loop {
            let due = self
                .identity()
                .ok()
                .flatten()
                .is_some_and(|identity| identity.renewal_due() <= OffsetDateTime::now_utc());
            let pause = match due {
                false => RENEWAL_CHECK,
                true => match self.renew(connection).await {
                    Ok(until) => {
                        tracing::info!(%until, "the device's certificate is renewed");
                        RENEWAL_CHECK
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the device's certificate is not renewed; it is tried again");
                        RENEWAL_RETRY
                    }
                },
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// When the new certificate expires. The connection goes on with the one that it has begun with.
    async fn renew(&self, connection: &Connection) -> Result<OffsetDateTime, ParticipantError> {
        let present = self.identity()?.ok_or_else(|| ParticipantError::Usage("the device has no identity".into()))?;
        let key = DeviceKey::from_pem(present.key_pem())?;
        let chain = Self::request(connection, &Request::Renew { csr_der: key.request_der()? }).await?;
        let renewed = Identity::from_pem(&chain, key.pem(), present.ca_pem())?;
        if renewed.peer() != present.peer() || renewed.not_after() <= present.not_after() {
            return Err(ParticipantError::Coordinator("it renewed the certificate with one that is no better".into()));
        }
        write_atomically(&self.directory.join(CERTIFICATE), chain.as_bytes())?;
        Ok(renewed.not_after())
    }

    /// Turns an invitation into an identity of this device's own. The invitation is used up by this.
    pub async fn enrol(
        &self,
        invitation: &Invitation,
        address: &str,
        transport: &Transport,
    ) -> Result<Identity, ParticipantError> {
        let enrolling = invitation.identity()?;
        // Whoever had a hold of an earlier key has none of the next one.
        let is_anew = self.is_invited_anew(invitation)?;
        let key = self.key(if is_anew { NEXT_KEY } else { KEY })?;
        let dialer = Dialer::new(&enrolling, transport)?;
        let connection = dialer.connect(address).await?;
        let request = Request::Enrol { csr_der: key.request_der()? };
        let enrolled = Self::request(&connection, &request).await;
        let chain = match enrolled {
            Ok(chain) => chain,
            // The coordinator's own words say more than the stream that broke off.
            Err(ParticipantError::Net(_)) => return Err(connection.closed().await.into()),
            Err(error) => return Err(error),
        };
        connection.close(CloseCode::Done, "enrolled");
        let identity = Identity::from_pem(&chain, key.pem(), &invitation.ca_pem)?;
        if is_anew {
            // The certificate goes first and comes last, so that it never stands beside another one's key.
            let (certificate, next) = (self.directory.join(CERTIFICATE), self.directory.join(NEXT_KEY));
            std::fs::remove_file(&certificate).map_err(ParticipantError::io(certificate))?;
            std::fs::rename(&next, self.directory.join(KEY)).map_err(ParticipantError::io(next))?;
        }
        let used = hex(&enrolling.fingerprint());
        for (name, text) in [("ca.pem", invitation.ca_pem.as_str()), (ENROLLED, &used), (CERTIFICATE, &chain)] {
            write_atomically(&self.directory.join(name), text.as_bytes())?;
        }
        dialer.close().await;
        Ok(identity)
    }

    async fn request(connection: &Connection, request: &Request) -> Result<String, ParticipantError> {
        let (mut send, mut receive) = connection.open(StreamKind::Control).await?;
        send.message(request).await?;
        send.finish();
        let Enrolled { chain_pem } = receive.message().await?;
        receive.end().await?;
        Ok(chain_pem)
    }

    /// Kept from the first attempt on, so that an enrolment that broke off does not leave a certificate without its key.
    fn key(&self, name: &str) -> Result<DeviceKey, ParticipantError> {
        let path = self.directory.join(name);
        if path.is_file() {
            let pem = std::fs::read_to_string(&path).map_err(ParticipantError::io(&path))?;
            return DeviceKey::from_pem(&pem).map_err(|error| {
                let what = "move that file away, and join with a new invitation";
                ParticipantError::Usage(format!("{}: {error}; {what}", path.display()))
            });
        }
        let key = DeviceKey::generate()?;
        write_secret(&path, key.pem())?;
        Ok(key)
    }
}

/// Readable by the owner alone from the first byte on; under its name it is whole, or not there.
fn write_secret(path: &Path, text: &str) -> Result<(), ParticipantError> {
    use std::io::Write;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".unfinished");
    let unfinished = Path::new(&unfinished);
    // What a full disk or a cut has left of an earlier attempt.
    let _ = std::fs::remove_file(unfinished);
    let mut file = options.open(unfinished).map_err(ParticipantError::io(unfinished))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| std::fs::rename(unfinished, path))
        .map_err(ParticipantError::io(path))
}

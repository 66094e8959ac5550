//! What a device keeps between runs: its key, its certificate, and whom it trusts. The key never leaves this directory.

use std::path::{Path, PathBuf};

use experiment::write_atomically;
use net::{Connection, DeviceKey, Dialer, Identity, Invitation, StreamKind, Transport};
use wire::{CloseCode, Enrolled, Request};

use crate::ParticipantError;

pub struct Device {
    directory: PathBuf,
}

impl Device {
    pub fn open(directory: &Path) -> Result<Self, ParticipantError> {
        std::fs::create_dir_all(directory).map_err(ParticipantError::io(directory))?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// The identity from an earlier enrolment, if there was one.
    pub fn identity(&self) -> Result<Option<Identity>, ParticipantError> {
        let read = |name: &str| {
            let path = self.directory.join(name);
            std::fs::read_to_string(&path).map_err(ParticipantError::io(path))
        };
        if !self.directory.join("device.pem").is_file() {
            return Ok(None);
        }
        Ok(Some(Identity::from_pem(&read("device.pem")?, &read("device.key")?, &read("ca.pem")?)?))
    }

    /// Turns an invitation into an identity of this device's own. The invitation is used up by this.
    pub async fn enrol(
        &self,
        invitation: &Invitation,
        address: &str,
        transport: &Transport,
    ) -> Result<Identity, ParticipantError> {
        let key = self.key()?;
        let dialer = Dialer::new(&invitation.identity()?, transport)?;
        let connection = dialer.connect(address).await?;
        let enrolled = Self::request(&connection, &key).await;
        let chain = match enrolled {
            Ok(chain) => chain,
            // The coordinator's own words say more than the stream that broke off.
            Err(ParticipantError::Net(_)) => return Err(connection.closed().await.into()),
            Err(error) => return Err(error),
        };
        connection.close(CloseCode::Done, "enrolled");
        let identity = Identity::from_pem(&chain, key.pem(), &invitation.ca_pem)?;
        for (name, text) in [("ca.pem", invitation.ca_pem.as_str()), ("device.pem", &chain)] {
            write_atomically(&self.directory.join(name), text.as_bytes())?;
        }
        dialer.close().await;
        Ok(identity)
    }

    async fn request(connection: &Connection, key: &DeviceKey) -> Result<String, ParticipantError> {
        let (mut send, mut receive) = connection.open(StreamKind::Control).await?;
        send.message(&Request::Enrol { csr_der: key.request_der()? }).await?;
        send.finish();
        let Enrolled { chain_pem } = receive.message().await?;
        receive.end().await?;
        Ok(chain_pem)
    }

    /// Kept from the first attempt on, so that an enrolment that broke off does not leave a certificate without its key.
    fn key(&self) -> Result<DeviceKey, ParticipantError> {
        let path = self.directory.join("device.key");
        if path.is_file() {
            let pem = std::fs::read_to_string(&path).map_err(ParticipantError::io(&path))?;
            return Ok(DeviceKey::from_pem(&pem)?);
        }
        let key = DeviceKey::generate()?;
        write_secret(&path, key.pem())?;
        Ok(key)
    }
}

/// Readable by the owner alone from the first byte on.
fn write_secret(path: &Path, text: &str) -> Result<(), ParticipantError> {
    use std::io::Write;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path).map_err(ParticipantError::io(path))?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(ParticipantError::io(path))
}

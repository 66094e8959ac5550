//! Where a coordinator is reached: `home.toml`, read and checked.

use std::net::SocketAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{ADDRESS_DEFAULT, HomeError};

/// As many as an invitation may hold.
const ADDRESSES_MAX: usize = 16;

/// `home.toml`, before it has been checked.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Settings {
    pub addresses: Vec<String>,
}

/// Checked `host:port`s, at least one of which participants can dial.
pub(super) struct Addresses {
    pub listen: String,
    pub dialled: Vec<String>,
}

impl Addresses {
    pub fn read(settings: &Settings, path: &Path) -> Result<Self, HomeError> {
        Self::new(&settings.addresses).map_err(|reason| HomeError::Addresses { path: path.to_owned(), reason })
    }

    fn new(addresses: &[String]) -> Result<Self, String> {
        if addresses.len() > ADDRESSES_MAX {
            return Err(format!("there are {}; leave at most {ADDRESSES_MAX}", addresses.len()));
        }
        for address in addresses {
            net::check_address(address)?;
        }
        let everywhere = |address: &str| address.parse().is_ok_and(|address: SocketAddr| address.ip().is_unspecified());
        let [listen, others @ ..] = addresses else {
            return Err(format!("there are none; add one such as {ADDRESS_DEFAULT:?}"));
        };
        if let Some(wrong) = others.iter().find(|address| everywhere(address)) {
            return Err(format!("nobody can connect to {wrong:?}; only the first may mean every interface"));
        }
        let dialled = if everywhere(listen) { others } else { addresses };
        if dialled.is_empty() {
            return Err(format!("nobody can connect to {listen:?}; add after it one that participants can reach"));
        }
        Ok(Self { listen: listen.clone(), dialled: dialled.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_addresses(addresses: &[&str], expected: Result<(&str, &[&str]), &str>) {
        let addresses: Vec<_> = addresses.iter().map(|address| String::from(*address)).collect();
        match (Addresses::new(&addresses), expected) {
            (Ok(found), Ok((listen, dialled))) => {
                assert_eq!((&*found.listen, found.dialled), (listen, dialled.iter().map(|a| a.to_string()).collect()))
            }
            (Err(found), Err(expected)) => assert!(found.contains(expected), "{found}"),
            (found, expected) => panic!("{addresses:?}: {:?}, not {expected:?}", found.map(|found| found.dialled)),
        }
    }

    #[test]
    fn addresses_are_host_and_port() {
        check_addresses(&["a.example:1", "[::1]:2"], Ok(("a.example:1", &["a.example:1", "[::1]:2"])));
        check_addresses(&["0.0.0.0:1", "a.example:1"], Ok(("0.0.0.0:1", &["a.example:1"])));
        check_addresses(&["[::]:1"], Err("add after it one that participants can reach"));
        check_addresses(&["a:1", "0.0.0.0:1"], Err("only the first may mean every interface"));
        check_addresses(&[], Err("there are none"));
        check_addresses(&["a:1"; ADDRESSES_MAX + 1], Err("there are 17"));
        check_addresses(&["a b:1"], Err("is not host:port"));
    }
}

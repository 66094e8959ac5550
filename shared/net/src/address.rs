//! How people write where a coordinator is reached.

use std::net::SocketAddr;

/// Refuses what is not `host:port`, where an IPv6 host stands in brackets: neither protocol nor path belong to it.
///
/// # Errors
/// What is wrong, with the address quoted.
pub fn check_address(address: &str) -> Result<(), String> {
    let port = match address.parse::<SocketAddr>() {
        Ok(address) => address.port(),
        Err(_) => {
            let is_name = |host: &str| {
                let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
                !host.is_empty() && host.len() <= 253 && host.bytes().all(allowed)
            };
            let (_, port) = address.rsplit_once(':').filter(|(host, _)| is_name(host)).unwrap_or_default();
            port.parse().unwrap_or(0)
        }
    };
    if port == 0 {
        return Err(format!("{address:?} is not host:port with a port from 1 to 65535, such as \"192.0.2.7:4433\""));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_address;

    #[test]
    fn an_address_is_host_and_port() {
        for right in ["a.example:1", "[::1]:2", "192.0.2.7:4433", "0.0.0.0:1"] {
            check_address(right).unwrap();
        }
        for wrong in ["", "a", ":1", "a:", "a:0", "a:65536", "a:+", "::1:1", "[::1]", "a b:1", "https://a:1", "a:1/"] {
            assert!(check_address(wrong).unwrap_err().contains("is not host:port"), "{wrong}");
        }
    }
}

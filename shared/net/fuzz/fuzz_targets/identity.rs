//! Any bytes as a certificate request, a certificate and an invitation: a request certifies its own key alone.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use net::{Authority, Invitation, PeerName};
use time::OffsetDateTime;

static AUTHORITY: LazyLock<Authority> = LazyLock::new(|| Authority::create(OffsetDateTime::UNIX_EPOCH).unwrap());

fuzz_target!(|bytes: &[u8]| {
    let name = PeerName::new("fuzz").unwrap();
    if let Ok(chain) = AUTHORITY.issue_participant(&name, bytes, OffsetDateTime::UNIX_EPOCH) {
        net::certified_key(&chain).expect("a certificate that was just issued");
    }
    let _ = net::certified_key_der(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = Invitation::parse(text);
    }
});

//! Any bytes as every message, the first byte saying which: what is accepted can be sent, and decodes to itself.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wire::{
    AdapterListing, BlobHeader, Commit, Enrolled, FromCoordinator, FromParticipant, Message, Request, SquaredNorms,
    UpdateReply, decode, encode,
};

fuzz_target!(|bytes: &[u8]| {
    let Some((which, body)) = bytes.split_first() else { return };
    match which % 9 {
        0 => check::<FromParticipant>(body),
        1 => check::<FromCoordinator>(body),
        2 => check::<Request>(body),
        3 => check::<AdapterListing>(body),
        4 => check::<BlobHeader>(body),
        5 => check::<UpdateReply>(body),
        6 => check::<Enrolled>(body),
        7 => check::<SquaredNorms>(body),
        _ => check::<Commit>(body),
    }
});

fn check<M: Message>(body: &[u8]) {
    let Ok(message) = decode::<M>(body) else { return };
    // Integers may be written longer than need be, so that only our own encoding is the same again.
    let encoded = encode(&message).expect("it is within the limits");
    let again = encode(&decode::<M>(&encoded).expect("ours")).expect("ours");
    assert_eq!(again, encoded);
}

//! Invitations and keys, as a person may paste them.

#![no_main]

use coldspare_transport::{Identity, Invitation, PeerKey};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(invitation) = text.parse::<Invitation>() {
        assert_eq!(invitation.to_string().parse::<Invitation>().expect("ours"), invitation);
    }
    if let Ok(key) = text.parse::<PeerKey>() {
        assert_eq!(key.to_string().parse::<PeerKey>().expect("ours"), key);
    }
    let _ = Identity::parse(text);
});

//! The invitation: all that an active needs to find, recognise and be admitted by a new standby, on one line.
//!
//! Decides how it is written and that a mistyped one is noticed. Whether its secret was used already is the standby's
//! affair.
//!
//! Invariants: a secret never appears in debug output; the last four bytes check all before them.

use std::fmt;
use std::str::FromStr;

use coldspare_core::{ClusterId, Epoch, codec};
use serde::{Deserialize, Serialize};

use crate::base32;
use crate::identity::PeerKey;

/// What `init standby` prints and `init active` takes. Its `Display` shows the secret: that is its purpose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invitation {
    /// Where the standby listens, as `host:port`.
    pub address: String,
    /// The standby's key, pinned from the first packet on.
    pub standby: PeerKey,
    /// The pair of hosts.
    pub cluster: ClusterId,
    /// The epoch that the active opens: above all that the standby promised, so that an active of before is fenced.
    pub epoch: Epoch,
    /// Proves to the standby, once, that the active was invited.
    pub secret: Secret,
}

/// A word known to both hosts; compared in constant time, never shown by `Debug`.
#[derive(Clone, Serialize, Deserialize)]
pub struct Secret(pub(crate) [u8; 16]);

/// Why a text is not an invitation that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InviteError {
    /// It doesn't begin as one.
    #[error("not an invitation: one line that begins with `coldspare1-` is expected, as `coldspare init standby` prints it")]
    NotAnInvitation,
    /// Another release wrote it.
    #[error("the invitation is of version {0}, this coldspare reads version 1; install the same coldspare on both hosts")]
    Version(String),
    /// Characters are missing, added or changed.
    #[error("the invitation is damaged: copy it whole")]
    Damaged,
    /// The address can't be one.
    #[error("'{0}' is not an address: HOST:PORT is expected")]
    Address(String),
}

impl Invitation {
    /// Checks what the types don't say: an address with a host and a port.
    ///
    /// # Errors
    /// `Address`.
    pub fn check(&self) -> Result<(), InviteError> {
        check_address(&self.address)
    }
}

/// Checks that an address has a host and a port.
///
/// # Errors
/// `Address`.
pub fn check_address(address: &str) -> Result<(), InviteError> {
    let fits = address.len() <= ADDRESS_BYTES_MAX && address.bytes().all(|b| b.is_ascii_graphic());
    let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
    if !fits || port.is_none_or(|port| port == 0) {
        return Err(InviteError::Address(address.escape_debug().collect()));
    }
    Ok(())
}

impl Secret {
    /// Makes one from the system's randomness.
    pub fn generate() -> Secret {
        let mut bytes = [0; 16];
        aws_lc_rs::rand::fill(&mut bytes).expect("the system's source of randomness works");
        Secret(bytes)
    }

    /// Whether both are the same, in a time that doesn't depend on where they differ.
    pub fn matches(&self, other: &Secret) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        self.matches(other)
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What the letters stand for, with the check behind it; frozen for version 1.
#[derive(Serialize, Deserialize)]
struct Content {
    address: String,
    standby: [u8; 32],
    cluster: ClusterId,
    epoch: Epoch,
    secret: Secret,
}

impl fmt::Display for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Invitation { address, standby, cluster, epoch, secret } = self.clone();
        let mut bytes = codec::encode(&Content { address, standby: *standby.as_bytes(), cluster, epoch, secret });
        bytes.extend_from_slice(&check_bytes(&bytes));
        write!(f, "{WORD}1-{}", base32::encode(&bytes))
    }
}

impl FromStr for Invitation {
    type Err = InviteError;

    fn from_str(text: &str) -> Result<Invitation, InviteError> {
        let rest = text.trim().strip_prefix(WORD).ok_or(InviteError::NotAnInvitation)?;
        let (version, code) = rest.split_once('-').ok_or(InviteError::NotAnInvitation)?;
        if version.is_empty() || version.len() > 4 || !version.bytes().all(|b| b.is_ascii_digit()) {
            return Err(InviteError::NotAnInvitation);
        }
        if version != "1" {
            return Err(InviteError::Version(version.into()));
        }
        if code.len() > CODE_CHARS_MAX {
            return Err(InviteError::Damaged);
        }
        let bytes = base32::decode(code).ok_or(InviteError::Damaged)?;
        let (content, check) = bytes.split_last_chunk().ok_or(InviteError::Damaged)?;
        if check_bytes(content) != *check {
            return Err(InviteError::Damaged);
        }
        let Content { address, standby, cluster, epoch, secret } = codec::decode(content).map_err(|_| InviteError::Damaged)?;
        let invitation = Invitation { address, standby: PeerKey::from_bytes(standby), cluster, epoch, secret };
        invitation.check()?;
        Ok(invitation)
    }
}

fn check_bytes(content: &[u8]) -> [u8; 4] {
    let hash = blake3::hash(content);
    *hash.as_bytes().first_chunk().expect("a BLAKE3 hash has 32 bytes")
}

const WORD: &str = "coldspare";

/// LIMIT: bytes of an address: a DNS name, brackets, a colon, a port.
const ADDRESS_BYTES_MAX: usize = 255 + 8;

/// LIMIT: letters of an invitation; one with the longest address has 545.
const CODE_CHARS_MAX: usize = 600;

#[cfg(test)]
mod tests {
    use super::*;

    fn invitation(address: &str) -> Invitation {
        let standby = PeerKey::from_bytes(*b"0123456789abcdefghijklmnopqrstuv");
        Invitation { address: address.into(), standby, cluster: ClusterId([7; 16]), epoch: Epoch(1), secret: Secret(*b"sixteen letters!") }
    }

    fn check(text: &str, expected: Result<Invitation, InviteError>) {
        assert_eq!(text.parse(), expected, "{text}");
    }

    #[test]
    fn an_invitation_survives_the_line() {
        for address in ["standby.example.org:7420", "192.0.2.7:1", "[2001:db8::1]:65535", &format!("{}:7420", "x".repeat(258))] {
            let text = invitation(address).to_string();
            check(&text, Ok(invitation(address)));
            check(&format!("  {text}\n"), Ok(invitation(address)));
        }
    }

    #[test]
    fn version_1_is_frozen() {
        assert_eq!(invitation("a.example:7420").to_string(), GOLDEN);
    }

    #[test]
    fn every_single_typo_is_noticed() {
        let text = invitation("a.example:7420").to_string();
        for at in 0..text.len() {
            for letter in "abcdefghijklmnopqrstuvwxyz0123456789-A ".chars() {
                let mut typo = text.clone();
                typo.replace_range(at..=at, letter.encode_utf8(&mut [0; 4]));
                assert!(typo == text || typo.parse::<Invitation>().is_err(), "{typo}");
            }
            let missing = format!("{}{}", &text[..at], &text[at + 1..]);
            assert!(missing == text || missing.parse::<Invitation>().is_err(), "{missing}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let text = invitation("a.example:7420").to_string();
        check("", Err(InviteError::NotAnInvitation));
        check("coldspare-key-1 abc", Err(InviteError::NotAnInvitation));
        check(&text.replace("coldspare1-", "coldspare2-"), Err(InviteError::Version("2".into())));
        check(&text[..text.len() - 9], Err(InviteError::Damaged));
        check(&text.replace("coldspare1-", "coldspare1-a"), Err(InviteError::Damaged));
        check(&format!("coldspare1-{}", "a".repeat(100_000)), Err(InviteError::Damaged));
        for address in ["", "host", "host:", ":7420", "host:0", "host:65536", "ho st:1", "ho\u{202e}st:1"] {
            let unusable = invitation(address);
            assert!(matches!(unusable.check(), Err(InviteError::Address(_))), "{address}");
            assert!(matches!(unusable.to_string().parse::<Invitation>(), Err(InviteError::Address(_))), "{address}");
        }
    }

    #[test]
    fn secrets_are_compared_and_never_shown() {
        let secret = Secret::generate();
        assert!(secret.matches(&secret.clone()));
        assert!(!secret.matches(&Secret::generate()));
        assert_eq!(format!("{:?}", Secret(*b"sixteen letters!")), "Secret(…)");
        assert!(!format!("{:?}", invitation("a:1")).contains("115"), "the bytes of the secret in debug output");
    }

    const GOLDEN: &str = "coldspare1-bzqs4zlymfwxa3dfhi3timrqgaytemzugu3doobzmfrggzdfmztwq2lknnwg23tpobyxe43uov3aobyha4dqobyha4dqobyha4dqoaltnf4hizlfnyqgyzluorsxe4zbjcshati";
}

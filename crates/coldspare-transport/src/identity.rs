//! Who a host is: an Ed25519 key without certificate, name or expiry (RFC 7250).
//!
//! Decides what a key looks like in a file, on a screen and in TLS. It doesn't know which keys are trusted.
//!
//! Invariants: a `PeerKey` is the key itself, not a fingerprint of it; a key file that others can read is never used.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::base32;

/// A host's private key.
#[derive(Clone)]
pub struct Identity {
    pkcs8: Vec<u8>,
    key: PeerKey,
}

/// A host's public key: what the other host pins. Written as `ed25519:` and 52 letters and digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerKey([u8; 32]);

/// Why a private key can't be had.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The text isn't a key of this version, or was damaged.
    #[error("not a coldspare key: one line `coldspare-key-1 …` is expected")]
    Malformed,
    /// The file holds something else.
    #[error("{path}: not a coldspare key; restore the file, or remove it and pair the hosts anew")]
    MalformedFile {
        /// The key file.
        path: PathBuf,
    },
    /// Group or others may read the file.
    #[error("{path}: the private key is open to other users (mode {mode:04o}); if none of them can have read it, `chmod 600 {path}`")]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file operation failed.
    #[error("{path}: can't {operation} the private key: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The key file or its folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// The text isn't a public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a public key: `ed25519:` and 52 lower-case letters and digits are expected")]
pub struct PeerKeyError;

impl Identity {
    /// Makes a new key from the system's randomness.
    pub fn generate() -> Identity {
        let pair = Ed25519KeyPair::generate().expect("the system's source of randomness works");
        let pkcs8 = pair.to_pkcs8().expect("a key that was just made can be written");
        Identity { pkcs8: pkcs8.as_ref().to_vec(), key: public_key(&pair) }
    }

    /// The public half.
    pub fn key(&self) -> PeerKey {
        self.key
    }

    /// The key for QUIC's stateless resets, which only this host can make (RFC 9000, 10.3).
    pub(crate) fn reset_key(&self) -> [u8; 32] {
        blake3::derive_key("coldspare 2026-11 stateless reset key", &self.pkcs8)
    }

    /// Reads what [`Identity::to_text`] wrote; white space around it is ignored.
    ///
    /// # Errors
    /// `Malformed`: anything else, and a public half that doesn't belong to the private one.
    pub fn parse(text: &str) -> Result<Identity, IdentityError> {
        let code = text.trim().strip_prefix(FILE_PREFIX).ok_or(IdentityError::Malformed)?;
        let pkcs8 = BASE64URL_NOPAD.decode(code.as_bytes()).map_err(|_| IdentityError::Malformed)?;
        let pair = Ed25519KeyPair::from_pkcs8(&pkcs8).map_err(|_| IdentityError::Malformed)?;
        let key = public_key(&pair);
        Ok(Identity { pkcs8, key })
    }

    /// The private key as one line of text, PKCS#8 in base64url.
    pub fn to_text(&self) -> String {
        format!("{FILE_PREFIX}{}\n", BASE64URL_NOPAD.encode(&self.pkcs8))
    }

    /// Writes the key to a new file that only its owner can read, durably.
    ///
    /// # Errors
    /// `Io`: the file exists already, or can't be written; a file that was begun stays behind.
    pub fn store(&self, path: &Path) -> Result<(), IdentityError> {
        let io_error = |operation| move |source| IdentityError::Io { operation, path: path.into(), source };
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io_error("create"))?;
        file.write_all(self.to_text().as_bytes()).map_err(io_error("write"))?;
        file.sync_all().map_err(io_error("sync"))?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error("sync the folder of"))
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// `Exposed`: group or others have any right to it. `MalformedFile`: it holds no key. `Io`: it can't be read.
    pub fn load(path: &Path) -> Result<Identity, IdentityError> {
        let io_error = |operation| move |source| IdentityError::Io { operation, path: path.into(), source };
        let file = File::open(path).map_err(io_error("open"))?;
        let mode = file.metadata().map_err(io_error("examine"))?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::Exposed { path: path.into(), mode });
        }
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(io_error("read"))?;
        let malformed = || IdentityError::MalformedFile { path: path.into() };
        let text = std::str::from_utf8(&bytes).map_err(|_| malformed())?;
        Identity::parse(text).map_err(|_| malformed())
    }

    /// An identity that shows `key` without holding its private half.
    #[cfg(test)]
    pub(crate) fn pretending(self, key: PeerKey) -> Identity {
        Identity { key, ..self }
    }

    /// The private key as PKCS#8, for TLS.
    pub(crate) fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }
}

impl PeerKey {
    /// Reads a SubjectPublicKeyInfo (RFC 8410); `None` for any algorithm but Ed25519.
    pub fn from_spki(spki: &[u8]) -> Option<PeerKey> {
        let raw = spki.strip_prefix(&SPKI_PREFIX)?;
        Some(PeerKey(raw.try_into().ok()?))
    }

    /// The SubjectPublicKeyInfo, as TLS carries it.
    pub fn spki(&self) -> [u8; SPKI_BYTES] {
        let mut spki = [0; SPKI_BYTES];
        spki[..SPKI_PREFIX.len()].copy_from_slice(&SPKI_PREFIX);
        spki[SPKI_PREFIX.len()..].copy_from_slice(&self.0);
        spki
    }

    /// The 32 bytes of the key.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key with these 32 bytes; whether anyone holds its private half shows in a handshake only.
    pub fn from_bytes(raw: [u8; 32]) -> PeerKey {
        PeerKey(raw)
    }
}

fn public_key(pair: &Ed25519KeyPair) -> PeerKey {
    PeerKey(pair.public_key().as_ref().try_into().expect("an Ed25519 public key has 32 bytes"))
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.key)
    }
}

impl fmt::Display for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{KEY_PREFIX}{}", base32::encode(&self.0))
    }
}

impl fmt::Debug for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PeerKey {
    type Err = PeerKeyError;

    fn from_str(text: &str) -> Result<PeerKey, PeerKeyError> {
        let code = text.trim().strip_prefix(KEY_PREFIX).ok_or(PeerKeyError)?;
        let raw = base32::decode(code).ok_or(PeerKeyError)?;
        Ok(PeerKey(raw.try_into().map_err(|_| PeerKeyError)?))
    }
}

impl Serialize for PeerKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PeerKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PeerKey, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Bytes of the SubjectPublicKeyInfo of an Ed25519 key.
const SPKI_BYTES: usize = 44;

/// The DER in front of the raw key: SEQUENCE, algorithm 1.3.101.112, BIT STRING of 32 bytes (RFC 8410 §4).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

const KEY_PREFIX: &str = "ed25519:";

const FILE_PREFIX: &str = "coldspare-key-1 ";

/// LIMIT: bytes read of a key file; a key has about 130.
const FILE_BYTES_MAX: u64 = 4096;

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use super::*;

    #[test]
    fn a_key_survives_text_and_file() {
        let identity = Identity::generate();
        assert_eq!(Identity::parse(&identity.to_text()).unwrap().key(), identity.key());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        identity.store(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(Identity::load(&path).unwrap().key(), identity.key());
        assert!(matches!(identity.store(&path), Err(IdentityError::Io { operation: "create", .. })), "never overwrites");
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        Identity::generate().store(&path).unwrap();
        for mode in [0o640, 0o604, 0o620, 0o601] {
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            match Identity::load(&path) {
                Err(IdentityError::Exposed { mode: seen, .. }) => assert_eq!(seen, mode),
                other => panic!("mode {mode:o}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_damaged_key_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let half = Identity::generate().to_text()[..60].to_string();
        for text in ["", "x", "coldspare-key-2 abc", half.as_str()] {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            assert!(matches!(Identity::load(&path), Err(IdentityError::MalformedFile { .. })), "{text:?}");
        }
    }

    #[test]
    fn a_public_key_is_one_word() {
        let key = Identity::generate().key();
        let text = key.to_string();
        assert_eq!(text.len(), 8 + 52);
        assert_eq!(text.parse(), Ok(key));
        assert_eq!(PeerKey::from_spki(&key.spki()), Some(key));
        assert_eq!(text.to_uppercase().parse::<PeerKey>(), Err(PeerKeyError));
        assert_eq!(text[..59].parse::<PeerKey>(), Err(PeerKeyError));
        assert_eq!(PeerKey::from_spki(&key.spki()[..43]), None);
        let mut other_algorithm = key.spki();
        other_algorithm[8] = 0x6e;
        assert_eq!(PeerKey::from_spki(&other_algorithm), None);
    }

    #[test]
    fn debug_output_holds_no_private_key() {
        let identity = Identity::generate();
        assert_eq!(format!("{identity:?}"), format!("Identity({})", identity.key()));
    }
}

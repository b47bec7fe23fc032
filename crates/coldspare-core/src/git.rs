//! What coldspare knows of git: the layout of a bare repository, the order of its parts, and what its files say.
//!
//! - the layout: parts by the shape of a path, when they are captured and applied, names that are never carried.
//! - [`mod@reference`]: what a reference file and `packed-refs` say.
//! - [`object`]: whether a loose object, a pack or an LFS file is what its name says.
//! - [`pack`]: object ids in a pack index.
//! - [`derived`]: what a multi-pack index and a commit graph name.
//! - [`family`]: repositories tied by alternates.
//!
//! It never opens a repository: bytes and paths are arguments. Sources: git's `Documentation/technical`,
//! `gitrepository-layout(5)`, `docs/git.md`.

pub mod derived;
pub mod family;
mod layout;
pub mod object;
pub mod pack;
pub mod reference;

use std::fmt;

pub use layout::*;

/// Bytes of a SHA-1 object id.
pub const SHA1_BYTES: usize = 20;
/// Bytes of a SHA-256 object id.
pub const SHA256_BYTES: usize = 32;

/// The name of an object: SHA-1 or SHA-256, by its length.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    bytes: [u8; SHA256_BYTES],
    len: u8,
}

impl ObjectId {
    /// An id of 20 or 32 raw bytes; `None` for any other length.
    pub fn new(raw: &[u8]) -> Option<ObjectId> {
        if raw.len() != SHA1_BYTES && raw.len() != SHA256_BYTES {
            return None;
        }
        let mut bytes = [0; SHA256_BYTES];
        bytes[..raw.len()].copy_from_slice(raw);
        Some(ObjectId { bytes, len: raw.len() as u8 })
    }

    /// Reads 40 or 64 hexadecimal digits, lower case as git writes them; `None` for anything else.
    pub fn parse(hex: &[u8]) -> Option<ObjectId> {
        if hex.len() != 2 * SHA1_BYTES && hex.len() != 2 * SHA256_BYTES {
            return None;
        }
        data_encoding::HEXLOWER_PERMISSIVE.decode(hex).ok().and_then(|raw| ObjectId::new(&raw))
    }

    /// The raw bytes, 20 or 32.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// Whether all bytes are zero, git's way to say "none".
    pub fn is_null(&self) -> bool {
        self.bytes == [0; SHA256_BYTES]
    }

    /// Where a loose object of this name is, below `objects/`.
    pub fn loose_path(&self) -> String {
        let hex = self.to_string();
        format!("{}/{}", &hex[..2], &hex[2..])
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(self.as_bytes()))
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A file that can't be what git wrote, in words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Damage(pub String);

impl Damage {
    fn new(what: impl Into<String>) -> Damage {
        Damage(what.into())
    }
}

//! Entries: what a tree says of one path.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::path::RelPath;

/// BLAKE3 of a file's whole content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Digest(pub [u8; 32]);

/// A time of the filesystem: seconds since 1970, nanoseconds below 1,000,000,000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Time {
    /// Seconds since 1970; negative before.
    pub secs: i64,
    /// Nanoseconds after `secs`.
    pub nanos: u32,
}

/// One extended attribute, POSIX ACLs included, as the kernel gives it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Xattr {
    /// Full name, such as `user.note` or `system.posix_acl_access`.
    #[serde(with = "crate::codec::bytes")]
    pub name: Vec<u8>,
    /// Raw value.
    #[serde(with = "crate::codec::bytes")]
    pub value: Vec<u8>,
}

/// What every kind of entry carries beside its body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Permission bits, at most `0o7777`; setuid and setgid only on directories; 0o777 for symlinks.
    pub mode: u16,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Time of the last modification of the content.
    pub mtime: Time,
    /// Sorted by name; only those of [`xattr_is_carried`].
    pub xattrs: Vec<Xattr>,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// A directory.
    Dir,
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// BLAKE3 of the content.
        digest: Digest,
        /// Whether runs of zeros are to be holes.
        sparse: bool,
    },
    /// A symbolic link; the target is opaque bytes and never followed.
    Symlink {
        /// 1 to 4,095 bytes without NUL.
        #[serde(with = "crate::codec::bytes")]
        target: Vec<u8>,
    },
    /// Another name of the file at `to`, which is a `File` of the same root and tree.
    Hardlink {
        /// The first name of the file.
        to: RelPath,
    },
}

/// One path's state in a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Owner, mode, time, attributes.
    pub meta: Meta,
    /// Kind and content.
    pub body: Body,
}

/// LIMIT: bytes of all extended attributes of one entry; more is held back.
pub const XATTR_BYTES_MAX: usize = 128 << 10;

/// LIMIT: bytes of a symlink's target, as in the kernel.
pub const SYMLINK_BYTES_MAX: usize = 4095;

/// Whether an extended attribute is replicated: `user.*` and POSIX ACLs, nothing that grants privileges.
pub fn xattr_is_carried(name: &[u8]) -> bool {
    name.starts_with(b"user.") || name == b"system.posix_acl_access" || name == b"system.posix_acl_default"
}

/// Why an entry from a peer or a store is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Mode bits beyond the permissions, or set-id bits on anything but a directory.
    #[error("mode {0:o} isn't carried")]
    Mode(u16),
    /// Nanoseconds of 1,000,000,000 or more.
    #[error("a time with {0} nanoseconds")]
    Nanos(u32),
    /// An attribute of a name that isn't carried, or too many bytes of them.
    #[error("an extended attribute that isn't carried, or over the limit")]
    Xattr,
    /// An empty or over-long target, or one with NUL.
    #[error("a symlink with an impossible target")]
    Symlink,
    /// An owner of `u32::MAX`, which the kernel takes for "unchanged".
    #[error("an impossible owner")]
    Owner,
    /// A hard link to the root itself.
    #[error("a hard link to the root itself")]
    Hardlink,
    /// The root itself is anything but a directory.
    #[error("the root itself is anything but a directory")]
    Root,
}

impl Entry {
    /// Checks what the types don't say; called where an entry comes from a peer.
    ///
    /// # Errors
    /// [`EntryError`]: the first rule that is broken.
    pub fn check(&self, path: &RelPath) -> Result<(), EntryError> {
        let Meta { mode, uid, gid, mtime, xattrs } = &self.meta;
        if mode & !0o7777 != 0 || (mode & 0o6000 != 0 && !self.is_dir()) {
            return Err(EntryError::Mode(*mode));
        }
        if mtime.nanos >= 1_000_000_000 {
            return Err(EntryError::Nanos(mtime.nanos));
        }
        if *uid == u32::MAX || *gid == u32::MAX {
            return Err(EntryError::Owner);
        }
        let xattr_bytes: usize = xattrs.iter().map(|x| x.name.len() + x.value.len()).sum();
        let names_fit = xattrs.iter().all(|x| xattr_is_carried(&x.name) && x.name.len() <= 255 && !x.name.contains(&0));
        if !names_fit || xattr_bytes > XATTR_BYTES_MAX || !xattrs.is_sorted_by(|a, b| a.name < b.name) {
            return Err(EntryError::Xattr);
        }
        match &self.body {
            Body::Symlink { target } if target.is_empty() || target.len() > SYMLINK_BYTES_MAX || target.contains(&0) => {
                return Err(EntryError::Symlink);
            }
            Body::Hardlink { to } if to.is_root() || to == path => return Err(EntryError::Hardlink),
            _ => {}
        }
        if path.is_root() && !self.is_dir() {
            return Err(EntryError::Root);
        }
        Ok(())
    }

    /// Whether this is a directory.
    pub fn is_dir(&self) -> bool {
        matches!(self.body, Body::Dir)
    }

    /// Bytes of content; 0 for all but files.
    pub fn size(&self) -> u64 {
        match self.body {
            Body::File { size, .. } => size,
            _ => 0,
        }
    }

    /// The digest of the content; `None` for all but files.
    pub fn digest(&self) -> Option<Digest> {
        match self.body {
            Body::File { digest, .. } => Some(digest),
            _ => None,
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0[..6]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(mode: u16) -> Meta {
        Meta { mode, uid: 0, gid: 0, mtime: Time::default(), xattrs: Vec::new() }
    }

    fn check(path: &str, meta: Meta, body: Body, expected: Result<(), EntryError>) {
        let path = RelPath::new(path.as_bytes()).unwrap();
        assert_eq!(Entry { meta, body }.check(&path), expected);
    }

    #[test]
    fn entries_that_grant_or_confuse_are_refused() {
        let xattr = |name: &str, bytes| Xattr { name: name.into(), value: vec![0; bytes] };
        check("a", meta(0o2755), Body::Dir, Ok(()));
        check("a", meta(0o4755), Body::Symlink { target: b"x".to_vec() }, Err(EntryError::Mode(0o4755)));
        check("a", meta(0o10000), Body::Dir, Err(EntryError::Mode(0o10000)));
        check("a", Meta { uid: u32::MAX, ..meta(0) }, Body::Dir, Err(EntryError::Owner));
        check("a", Meta { mtime: Time { secs: 0, nanos: 1_000_000_000 }, ..meta(0) }, Body::Dir, Err(EntryError::Nanos(1_000_000_000)));
        check("a", Meta { xattrs: vec![xattr("user.a", 9)], ..meta(0) }, Body::Dir, Ok(()));
        check("a", Meta { xattrs: vec![xattr("security.capability", 9)], ..meta(0) }, Body::Dir, Err(EntryError::Xattr));
        check("a", Meta { xattrs: vec![xattr("user.a", XATTR_BYTES_MAX)], ..meta(0) }, Body::Dir, Err(EntryError::Xattr));
        check("a", Meta { xattrs: vec![xattr("user.b", 1), xattr("user.a", 1)], ..meta(0) }, Body::Dir, Err(EntryError::Xattr));
        check("a", meta(0), Body::Symlink { target: Vec::new() }, Err(EntryError::Symlink));
        check("a", meta(0), Body::Hardlink { to: RelPath::root() }, Err(EntryError::Hardlink));
        check("a", meta(0), Body::Hardlink { to: RelPath::new(*b"a").unwrap() }, Err(EntryError::Hardlink));
        check("", meta(0), Body::Symlink { target: b"x".to_vec() }, Err(EntryError::Root));
    }
}

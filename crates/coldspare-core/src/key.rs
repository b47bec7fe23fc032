//! The order of paths in both stores: a directory's entries stand together, sorted by name.
//!
//! A key is the root's number, the bytes of the parent, NUL, the name. NUL occurs in no path, so that the entries of
//! one directory are one range. Everything below a directory is two ranges: its own entries, and those of its
//! subdirectories.

use std::ops::Range;

use crate::id::RootId;
use crate::path::{PathError, RelPath};

/// The key of `path`; the root itself has an empty parent and an empty name.
pub fn encode(root: RootId, path: &RelPath) -> Vec<u8> {
    let (parent, name) = (path.parent_bytes(), path.name());
    let mut key = Vec::with_capacity(2 + parent.len() + name.len());
    key.push(root.0);
    key.extend_from_slice(parent);
    key.push(0);
    key.extend_from_slice(name);
    key
}

/// The path of a key.
///
/// # Errors
/// As for a path; a key without NUL is `Forbidden`, an empty one `Empty`.
pub fn decode(key: &[u8]) -> Result<(RootId, RelPath), PathError> {
    let (&root, rest) = key.split_first().ok_or(PathError::Empty)?;
    let at = rest.iter().position(|&b| b == 0).ok_or(PathError::Forbidden)?;
    let (parent, name) = (&rest[..at], &rest[at + 1..]);
    let path = if rest.len() == 1 { RelPath::root() } else { RelPath::new(parent)?.join(name)? };
    Ok((RootId(root), path))
}

/// The keys of the entries directly in the directory `path`.
pub fn children(root: RootId, path: &RelPath) -> Range<Vec<u8>> {
    let mut start = Vec::with_capacity(path.as_bytes().len() + 3);
    start.push(root.0);
    start.extend_from_slice(path.as_bytes());
    start.push(0);
    let mut end = start.clone();
    *end.last_mut().expect("not empty") = 1;
    if path.is_root() {
        start.push(0); // the root's own row is no child of it; names don't start with NUL
    }
    start..end
}

/// The keys of all that stands in subdirectories of the directory `path`, at any depth.
///
/// Together with [`children`] this is everything below `path`.
pub fn deeper(root: RootId, path: &RelPath) -> Range<Vec<u8>> {
    let mut start = Vec::with_capacity(path.as_bytes().len() + 2);
    start.push(root.0);
    if path.is_root() {
        // Every parent that isn't empty sorts after the root's own entries.
        start.push(1);
        return start..vec![root.0 + 1];
    }
    start.extend_from_slice(path.as_bytes());
    start.push(b'/');
    let mut end = start.clone();
    *end.last_mut().expect("not empty") = b'/' + 1;
    start..end
}

/// The name in a key.
pub fn name(key: &[u8]) -> &[u8] {
    let at = key.iter().skip(1).position(|&b| b == 0).map_or(key.len(), |p| p + 2);
    key.get(at..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(s: &str) -> RelPath {
        RelPath::new(s.as_bytes()).unwrap()
    }

    #[test]
    fn a_key_has_one_form() {
        // Found by fuzzing: a slash in the name made a second key for a path.
        assert_eq!(decode(b"\0\0a/b"), Err(PathError::Forbidden));
        assert_eq!(decode(b"\0a\0"), Err(PathError::Empty));
        assert_eq!(decode(b"\0"), Err(PathError::Forbidden));
        assert_eq!(decode(b""), Err(PathError::Empty));
        assert_eq!(decode(b"\0\0"), Ok((RootId(0), RelPath::root())));
    }

    #[test]
    fn ranges_hold_exactly_what_is_below() {
        let all =
            ["", "a", "a/b", "a/b/c", "a/b/c/d", "a/b-c", "a/b-c/x", "a/b.git", "a/b.git/y", "a/b0", "a/b0/z", "b", "\u{1}", "\u{1}/x"];
        for base in all {
            let base = path(base);
            for other in all {
                let other = path(other);
                let key = encode(RootId(3), &other);
                assert_eq!(decode(&key), Ok((RootId(3), other.clone())));
                assert_eq!(name(&key), other.name());
                let is_child = children(RootId(3), &base).contains(&key);
                let is_deeper = deeper(RootId(3), &base).contains(&key);
                assert_eq!(is_child, other.parent().as_ref() == Some(&base), "{other} child of {base}");
                let below = other != base && other.is_within(&base);
                assert_eq!(is_child || is_deeper, below, "{other} below {base}");
                assert!(!(is_child && is_deeper));
                assert!(!deeper(RootId(2), &base).contains(&key) && !children(RootId(4), &base).contains(&key));
            }
        }
    }
}

//! Paths relative to a root, as lists of byte components.
//!
//! Decides which paths may exist at all: a `RelPath` can't name anything outside its root, nor coldspare's own
//! folder. It knows nothing of the filesystem.
//!
//! Invariants: no component is empty, `.`, `..`, longer than 255 bytes or contains `/` or NUL; the first component
//! is never `.coldspare`; the whole is at most 4,095 bytes.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The folder that each root keeps for coldspare itself; never replicated.
pub const CONTROL_DIR: &[u8] = b".coldspare";

/// LIMIT: bytes of one component, as in every Linux filesystem.
pub const COMPONENT_BYTES_MAX: usize = 255;

/// LIMIT: bytes of a whole path, so that the kernel takes it in one call (`PATH_MAX` less its NUL).
pub const PATH_BYTES_MAX: usize = 4095;

/// A path below a root; the empty path is the root itself.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelPath(Box<[u8]>);

/// One component of a path.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Box<[u8]>);

/// Why bytes are not a path below a root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// A component is empty, which includes a leading or trailing `/`.
    #[error("a path has an empty component")]
    Empty,
    /// A component is `.` or `..`.
    #[error("a path has a component '.' or '..'")]
    Dots,
    /// A component contains NUL or `/`.
    #[error("a path has a component with NUL or '/'")]
    Forbidden,
    /// A component or the whole is over the limit.
    #[error("a path is too long")]
    TooLong,
    /// The path names coldspare's own folder.
    #[error("a path names coldspare's own folder")]
    Control,
}

impl Name {
    /// Checks `bytes` as one component.
    ///
    /// # Errors
    /// As [`PathError`], except `Control`: whether a name is forbidden depends on where it stands.
    pub fn new(bytes: impl Into<Box<[u8]>>) -> Result<Name, PathError> {
        let bytes = bytes.into();
        check_component(&bytes)?;
        Ok(Name(bytes))
    }

    /// The bytes of the component.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl RelPath {
    /// The root itself.
    pub fn root() -> RelPath {
        RelPath(Box::default())
    }

    /// Checks `bytes`, components joined by `/`, as a path below a root; empty bytes are the root itself.
    ///
    /// # Errors
    /// As [`PathError`].
    pub fn new(bytes: impl Into<Box<[u8]>>) -> Result<RelPath, PathError> {
        let bytes = bytes.into();
        if bytes.is_empty() {
            return Ok(RelPath(bytes));
        }
        if bytes.len() > PATH_BYTES_MAX {
            return Err(PathError::TooLong);
        }
        for component in bytes.split(|&b| b == b'/') {
            check_component(component)?;
        }
        if bytes.split(|&b| b == b'/').next() == Some(CONTROL_DIR) {
            return Err(PathError::Control);
        }
        Ok(RelPath(bytes))
    }

    /// Whether this is the root itself.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The components joined by `/`.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The path of what is at `below` in this folder; the folder itself when that is empty: the reverse of [`RelPath::below`].
    ///
    /// # Errors
    /// As [`RelPath::new`].
    pub fn join_path(&self, below: &[u8]) -> Result<RelPath, PathError> {
        match (self.is_root(), below) {
            (_, b"") => Ok(self.clone()),
            (true, _) => RelPath::new(below),
            (false, _) => RelPath::new([&self.0, &b"/"[..], below].concat()),
        }
    }

    /// The components, outermost first; none for the root.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|&b| b == b'/').filter(|c| !c.is_empty())
    }

    /// The folder that holds this path; `None` for the root.
    pub fn parent(&self) -> Option<RelPath> {
        if self.is_root() {
            return None;
        }
        Some(RelPath(self.parent_bytes().into()))
    }

    /// The bytes of the folder that holds this path; empty for the root and for what stands directly below it.
    pub fn parent_bytes(&self) -> &[u8] {
        match self.0.iter().rposition(|&b| b == b'/') {
            Some(at) => &self.0[..at],
            None => &[],
        }
    }

    /// The last component; empty for the root.
    pub fn name(&self) -> &[u8] {
        match self.0.iter().rposition(|&b| b == b'/') {
            Some(at) => &self.0[at + 1..],
            None => &self.0,
        }
    }

    /// This path with `name` below it.
    ///
    /// # Errors
    /// `Control` for coldspare's folder below the root, `TooLong` when the whole grows over its limit, else as for a component.
    pub fn join(&self, name: &[u8]) -> Result<RelPath, PathError> {
        check_component(name)?;
        if self.is_root() {
            if name == CONTROL_DIR {
                return Err(PathError::Control);
            }
            return Ok(RelPath(name.into()));
        }
        if self.0.len() + 1 + name.len() > PATH_BYTES_MAX {
            return Err(PathError::TooLong);
        }
        let mut bytes = Vec::with_capacity(self.0.len() + 1 + name.len());
        bytes.extend_from_slice(&self.0);
        bytes.push(b'/');
        bytes.extend_from_slice(name);
        Ok(RelPath(bytes.into()))
    }

    /// Whether this path is `ancestor` or stands below it.
    pub fn is_within(&self, ancestor: &RelPath) -> bool {
        match self.0.strip_prefix(&*ancestor.0) {
            Some(rest) => ancestor.is_root() || rest.is_empty() || rest[0] == b'/',
            None => false,
        }
    }

    /// The part of this path below `ancestor`, empty when they are equal; `None` when it isn't within it.
    pub fn below(&self, ancestor: &RelPath) -> Option<&[u8]> {
        if !self.is_within(ancestor) {
            return None;
        }
        let rest = &self.0[ancestor.0.len()..];
        Some(rest.strip_prefix(b"/").unwrap_or(rest))
    }

    /// The folders above this path, the root first, this path excluded.
    pub fn ancestors(&self) -> impl Iterator<Item = RelPath> + '_ {
        let root = (!self.is_root()).then(RelPath::root);
        let inner = self.0.iter().enumerate().filter(|&(_, &b)| b == b'/').map(|(at, _)| RelPath(self.0[..at].into()));
        root.into_iter().chain(inner)
    }
}

fn check_component(component: &[u8]) -> Result<(), PathError> {
    if component.is_empty() {
        return Err(PathError::Empty);
    }
    if component == b"." || component == b".." {
        return Err(PathError::Dots);
    }
    if component.len() > COMPONENT_BYTES_MAX {
        return Err(PathError::TooLong);
    }
    if component.iter().any(|&b| b == 0 || b == b'/') {
        return Err(PathError::Forbidden);
    }
    Ok(())
}

/// Writes bytes for a person or a log: printable text as it is, everything else escaped as `\xNN`, a backslash doubled.
pub fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                c if c.is_control() || is_invisible(c) => out.extend(c.escape_unicode()),
                c => out.push(c),
            }
        }
        for b in chunk.invalid() {
            out.push_str(&format!("\\x{b:02x}"));
        }
    }
    out
}

/// Characters that reorder or hide text on a terminal.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_root() { f.write_str(".") } else { f.write_str(&escape(&self.0)) }
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&escape(&self.0))
    }
}

impl Serialize for RelPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for RelPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RelPath, D::Error> {
        let bytes = crate::codec::bytes::deserialize(deserializer)?;
        RelPath::new(bytes).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8], expected: Result<(), PathError>) {
        assert_eq!(RelPath::new(bytes).map(|_| ()), expected, "{}", escape(bytes));
    }

    #[test]
    fn paths_outside_the_root_do_not_exist() {
        check(b"", Ok(()));
        check(b"a/b", Ok(()));
        check(b"a\nb/\xff", Ok(()));
        check(b"/a", Err(PathError::Empty));
        check(b"a/", Err(PathError::Empty));
        check(b"a//b", Err(PathError::Empty));
        check(b"..", Err(PathError::Dots));
        check(b"a/../b", Err(PathError::Dots));
        check(b"a/./b", Err(PathError::Dots));
        check(b"a\0b", Err(PathError::Forbidden));
        check(&[b'x'; 255], Ok(()));
        check(&[b'x'; 256], Err(PathError::TooLong));
        check(b"ab/".repeat(2000).as_slice(), Err(PathError::TooLong));
        check(b".coldspare", Err(PathError::Control));
        check(b".coldspare/stage", Err(PathError::Control));
        check(b"a/.coldspare", Ok(()));
    }

    #[test]
    fn relations_go_by_components() {
        let p = |s: &str| RelPath::new(s.as_bytes()).unwrap();
        assert!(p("a/b").is_within(&p("a")));
        assert!(p("a/b").is_within(&p("")));
        assert!(!p("ab").is_within(&p("a")));
        assert_eq!(p("a/b/c").below(&p("a")), Some(&b"b/c"[..]));
        assert_eq!(p("a").below(&p("a")), Some(&b""[..]));
        assert_eq!(p("a/b").below(&p("")), Some(&b"a/b"[..]));
        for (path, above) in [("a/b/c", "a"), ("a", "a"), ("a/b", ""), ("", "")] {
            assert_eq!(p(above).join_path(p(path).below(&p(above)).unwrap()).unwrap(), p(path));
        }
        assert_eq!(p("a/b/c").parent(), Some(p("a/b")));
        assert_eq!(p("a").parent(), Some(p("")));
        assert_eq!(p("").parent(), None);
        assert_eq!(p("a/b/c").ancestors().collect::<Vec<_>>(), [p(""), p("a"), p("a/b")]);
        assert_eq!(p("").ancestors().count(), 0);
        assert_eq!(p("").components().count(), 0);
        assert_eq!(p("").join(b".coldspare"), Err(PathError::Control));
    }

    #[test]
    fn escaped_names_are_safe_to_print() {
        assert_eq!(escape(b"a\nb"), "a\\u{a}b");
        assert_eq!(escape(b"\xffx\\"), "\\xffx\\\\");
        assert_eq!(escape("ü\u{202e}".as_bytes()), "ü\\u{202e}");
    }
}

//! What reference files say.
//!
//! Invariants: what git itself would refuse to read as a reference is refused here.

use super::{Damage, ObjectId};

/// What one reference says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// It names an object.
    Object(ObjectId),
    /// It names another reference.
    Symbolic(Vec<u8>),
}

/// Reads a loose reference, or `HEAD`.
///
/// # Errors
/// [`Damage`]: empty, zeros, or neither an object's name nor `ref: …`.
pub fn parse_loose(content: &[u8]) -> Result<Reference, Damage> {
    if content.is_empty() {
        return Err(Damage::new("the reference is empty"));
    }
    if let Some(target) = content.strip_prefix(b"ref:") {
        let target = target.trim_ascii();
        if target.is_empty() || target.contains(&0) {
            return Err(Damage::new("a symbolic reference to nothing"));
        }
        return Ok(Reference::Symbolic(target.to_vec()));
    }
    let end = content.iter().position(u8::is_ascii_whitespace).unwrap_or(content.len());
    match ObjectId::parse(&content[..end]) {
        Some(id) if !id.is_null() => Ok(Reference::Object(id)),
        Some(_) => Err(Damage::new("the reference names no object (all zeros)")),
        None => Err(Damage::new("the reference names no object: it is neither a hash nor `ref: …`")),
    }
}

/// Reads `packed-refs` as its bytes arrive, in pieces of any size.
///
/// Memory: one line.
#[derive(Debug, Default)]
pub struct PackedRefs {
    line: Vec<u8>,
}

/// LIMIT: bytes of one line of `packed-refs`: a path's limit, a hash, and some.
const LINE_BYTES_MAX: usize = 8192;

impl PackedRefs {
    /// Takes the next bytes and calls `each` with every reference: its full name and what it names.
    ///
    /// # Errors
    /// [`Damage`]: a line that git would refuse.
    pub fn push(&mut self, bytes: &[u8], each: &mut dyn FnMut(&[u8], ObjectId)) -> Result<(), Damage> {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&b| b == b'\n') {
            let (now, later) = (&rest[..end], &rest[end + 1..]);
            if self.line.is_empty() {
                take_line(now, each)?;
            } else {
                self.line.extend_from_slice(now);
                take_line(&std::mem::take(&mut self.line), each)?;
            }
            rest = later;
        }
        if self.line.len() + rest.len() > LINE_BYTES_MAX {
            return Err(Damage::new("a line of packed-refs without an end"));
        }
        self.line.extend_from_slice(rest);
        Ok(())
    }

    /// The file has ended.
    ///
    /// # Errors
    /// [`Damage`]: within a line.
    pub fn finish(&self) -> Result<(), Damage> {
        if self.line.is_empty() { Ok(()) } else { Err(Damage::new("packed-refs breaks off within a line")) }
    }
}

fn take_line(line: &[u8], each: &mut dyn FnMut(&[u8], ObjectId)) -> Result<(), Damage> {
    let damaged = || Damage::new("packed-refs has a line that is neither a reference nor a comment");
    if line.starts_with(b"#") {
        return Ok(());
    }
    if let Some(peeled) = line.strip_prefix(b"^") {
        return ObjectId::parse(peeled).map(drop).ok_or_else(damaged);
    }
    let space = line.iter().position(|&b| b == b' ').ok_or_else(damaged)?;
    let id = ObjectId::parse(&line[..space]).ok_or_else(damaged)?;
    let name = &line[space + 1..];
    if name.is_empty() || name.contains(&0) {
        return Err(damaged());
    }
    each(name, id);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    fn check_loose(content: &str, expected: Option<Reference>) {
        assert_eq!(parse_loose(content.as_bytes()).ok(), expected, "{content:?}");
    }

    #[test]
    fn a_reference_is_an_object_or_a_symbol() {
        let id = ObjectId::parse(A.as_bytes()).unwrap();
        check_loose(&format!("{A}\n"), Some(Reference::Object(id)));
        check_loose(A, Some(Reference::Object(id)));
        check_loose("ref: refs/heads/main\n", Some(Reference::Symbolic(b"refs/heads/main".to_vec())));
        for damaged in ["", "\n", "\0\0\0\0", "abc\n", "ref: \n", &"0".repeat(40), &format!("{A}x\n"), &A[..39]] {
            check_loose(damaged, None);
        }
        check_loose(&"ab".repeat(32), Some(Reference::Object(ObjectId::new(&[0xab; 32]).unwrap())));
    }

    fn packed(content: &str, piece: usize) -> Result<Vec<(String, ObjectId)>, Damage> {
        let mut out = Vec::new();
        let mut reader = PackedRefs::default();
        for bytes in content.as_bytes().chunks(piece) {
            reader.push(bytes, &mut |name, id| out.push((String::from_utf8_lossy(name).into_owned(), id)))?;
        }
        reader.finish().map(|()| out)
    }

    #[test]
    fn packed_references_are_read_whatever_the_pieces() {
        let b = A.replace('a', "b");
        let content = format!("# pack-refs with: peeled fully-peeled sorted \n{A} refs/heads/main\n{b} refs/tags/v1\n^{A}\n");
        for piece in 1..content.len() + 1 {
            let names: Vec<_> = packed(&content, piece).unwrap().into_iter().map(|(n, _)| n).collect();
            assert_eq!(names, ["refs/heads/main", "refs/tags/v1"]);
        }
        assert!(packed("", 1).unwrap().is_empty());
        for damaged in [&content[..content.len() - 1], "\0\0\0\n", &format!("{A}\n"), "^\n", &format!("{A} \n"), &"x".repeat(9000)] {
            assert!(packed(damaged, 100).is_err(), "{damaged:?}");
        }
    }
}

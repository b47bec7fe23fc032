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
        let mut parts = target.split(|&b| b == b'/');
        let is_name = matches!(parts.next(), Some(b"refs" | b"stash-refs")) && parts.clone().next().is_some();
        if !is_name || parts.any(|part| part.is_empty() || part.starts_with(b".")) && !target.ends_with(b"/.invalid") {
            return Err(Damage::new("a symbolic reference to what is no name of a reference"));
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

/// Looks at a table of references (reftable) as its bytes arrive, in pieces of any size: it begins and ends as one, and
/// its footer has the checksum that it says. Source: git's `Documentation/technical/reftable`.
///
/// Memory: one footer.
#[derive(Debug, Default)]
pub struct TableCheck {
    head: Vec<u8>,
    tail: Vec<u8>,
}

/// The magic number and the version.
const TABLE_HEAD_BYTES: usize = 5;
/// Bytes of the footer of versions 1 and 2.
const FOOTER_BYTES: [usize; 2] = [68, 72];

impl TableCheck {
    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        let wanted = TABLE_HEAD_BYTES.saturating_sub(self.head.len()).min(bytes.len());
        self.head.extend_from_slice(&bytes[..wanted]);
        self.tail.extend_from_slice(&bytes[bytes.len().saturating_sub(FOOTER_BYTES[1])..]);
        self.tail.drain(..self.tail.len().saturating_sub(FOOTER_BYTES[1]));
    }

    /// The file has ended.
    ///
    /// # Errors
    /// [`Damage`]: it is no whole table.
    pub fn finish(self) -> Result<(), Damage> {
        let [b'R', b'E', b'F', b'T', version @ 1..=2] = self.head[..] else {
            return Err(Damage::new("it doesn't begin as a table of references"));
        };
        let bytes = FOOTER_BYTES[usize::from(version) - 1];
        let footer = self.tail.len().checked_sub(bytes).map(|at| &self.tail[at..]);
        let is_whole = footer.and_then(|footer| footer.split_last_chunk::<4>()).is_some_and(|(covered, sum)| {
            let mut crc = flate2::Crc::new();
            crc.update(covered);
            covered.starts_with(&self.head) && crc.sum() == u32::from_be_bytes(*sum)
        });
        if is_whole { Ok(()) } else { Err(Damage::new("the table of references is cut off, or its footer is damaged")) }
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
    fn a_symbolic_reference_names_a_reference() {
        for good in ["refs/heads/main", "refs/heads/a/b.c", "refs/heads/.invalid", "stash-refs/pull-requests/1/from"] {
            assert_eq!(parse_loose(format!("ref: {good}\n").as_bytes()), Ok(Reference::Symbolic(good.into())));
        }
        for bad in ["", "foo/bar", "refs", "refs/", "../../etc", "refs/../HEAD", "refs/heads/.x", "refs//x", "refs/\0"] {
            assert!(parse_loose(format!("ref: {bad}\n").as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_table_of_references_has_the_checksum_of_its_footer() {
        for (version, bytes) in [(1, 68), (2, 72)] {
            let mut table = vec![b'R', b'E', b'F', b'T', version];
            table.extend(vec![7; 300]);
            let mut footer = vec![b'R', b'E', b'F', b'T', version];
            footer.resize(bytes - 4, 3);
            let mut crc = flate2::Crc::new();
            crc.update(&footer);
            table.extend(footer);
            table.extend(crc.sum().to_be_bytes());
            let check = |table: &[u8]| {
                let results = [1, 7, 1000].map(|piece| {
                    let mut check = TableCheck::default();
                    table.chunks(piece).for_each(|bytes| check.update(bytes));
                    check.finish().is_ok()
                });
                assert!(results.iter().all(|is_ok| *is_ok == results[0]));
                results[0]
            };
            assert!(check(&table));
            assert!(!check(&table[..table.len() - 5]) && !check(&[]) && !check(&vec![0; table.len()]));
            let end = table.len() - 10;
            table[end] ^= 1;
            assert!(!check(&table));
        }
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

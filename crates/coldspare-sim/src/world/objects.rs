//! git's objects and packs, written and read: real ones, so that every checker of coldspare takes them for what they are.
//!
//! It shares no code with what it judges.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use sha1::{Digest, Sha1};

/// The name of an object: the SHA-1 of its kind, size and content.
pub(super) type ObjectName = [u8; 20];

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Names a tree and earlier commits.
    Commit,
    /// Names blobs.
    Tree,
    /// Content.
    Blob,
}

/// One object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Object {
    /// What it is.
    pub(super) kind: Kind,
    /// Its content.
    pub(super) body: Vec<u8>,
}

impl Object {
    /// A commit of `tree` after `parents`.
    pub(super) fn commit(tree: ObjectName, parents: &[ObjectName], text: &str) -> Object {
        let mut body = format!("tree {}\n", hex(&tree));
        for parent in parents {
            body += &format!("parent {}\n", hex(parent));
        }
        body += &format!("author A <a@b.c> 1767225600 +0000\ncommitter A <a@b.c> 1767225600 +0000\n\n{text}\n");
        Object { kind: Kind::Commit, body: body.into_bytes() }
    }

    /// A tree of one blob.
    pub(super) fn tree(blob: ObjectName) -> Object {
        Object { kind: Kind::Tree, body: [b"100644 file\0".as_slice(), &blob].concat() }
    }

    /// A blob.
    pub(super) fn blob(body: Vec<u8>) -> Object {
        Object { kind: Kind::Blob, body }
    }

    fn plain(&self) -> Vec<u8> {
        let kind = match self.kind {
            Kind::Commit => "commit",
            Kind::Tree => "tree",
            Kind::Blob => "blob",
        };
        [format!("{kind} {}\0", self.body.len()).as_bytes(), &self.body].concat()
    }

    /// Its name.
    pub(super) fn name(&self) -> ObjectName {
        sha1(&self.plain())
    }

    /// The file of a loose object.
    pub(super) fn loose(&self) -> Vec<u8> {
        deflate(&self.plain())
    }

    /// Reads the file of a loose object; `None` when it isn't one, whole and alone.
    pub(super) fn of_loose(file: &[u8]) -> Option<Object> {
        let (plain, used) = inflate(file)?;
        let end = plain.iter().position(|&b| b == 0).filter(|_| used == file.len())?;
        let head = std::str::from_utf8(&plain[..end]).ok()?;
        let (kind, size) = head.split_once(' ')?;
        let kind = match kind {
            "commit" => Kind::Commit,
            "tree" => Kind::Tree,
            "blob" => Kind::Blob,
            _ => return None,
        };
        let body = plain[end + 1..].to_vec();
        (size.parse() == Ok(body.len())).then_some(Object { kind, body })
    }

    /// The objects that it can't do without.
    pub(super) fn needs(&self) -> Vec<ObjectName> {
        match self.kind {
            Kind::Blob => Vec::new(),
            Kind::Tree => self.body.get(self.body.len().saturating_sub(20)..).and_then(|n| n.try_into().ok()).into_iter().collect(),
            Kind::Commit => {
                let text = String::from_utf8_lossy(&self.body);
                let lines = text.lines().take_while(|l| !l.is_empty());
                lines.filter_map(|l| l.strip_prefix("tree ").or_else(|| l.strip_prefix("parent "))).filter_map(unhex).collect()
            }
        }
    }
}

/// A pack of these objects and its index of version 2; the name of both is `pack-<trailer of the pack>`.
pub(super) fn pack(objects: &BTreeMap<ObjectName, Object>) -> (Vec<u8>, Vec<u8>, String) {
    let mut pack = b"PACK\0\0\0\x02".to_vec();
    pack.extend_from_slice(&(objects.len() as u32).to_be_bytes());
    let mut places = Vec::new();
    for (name, object) in objects {
        let at = pack.len();
        let mut size = object.body.len();
        let mut byte = (entry_kind(object.kind) << 4) | (size & 15) as u8;
        size >>= 4;
        while size > 0 {
            pack.push(byte | 0x80);
            byte = (size & 127) as u8;
            size >>= 7;
        }
        pack.push(byte);
        pack.extend_from_slice(&deflate(&object.body));
        let mut crc = flate2::Crc::new();
        crc.update(&pack[at..]);
        places.push((*name, crc.sum(), at as u32));
    }
    let trailer = sha1(&pack);
    pack.extend_from_slice(&trailer);

    let mut index = b"\xfftOc\0\0\0\x02".to_vec();
    for first in 0..=255u8 {
        let count = places.iter().filter(|(name, ..)| name[0] <= first).count();
        index.extend_from_slice(&(count as u32).to_be_bytes());
    }
    places.iter().for_each(|(name, ..)| index.extend_from_slice(name));
    places.iter().for_each(|(_, crc, _)| index.extend_from_slice(&crc.to_be_bytes()));
    places.iter().for_each(|(.., at)| index.extend_from_slice(&at.to_be_bytes()));
    index.extend_from_slice(&trailer);
    let own = sha1(&index);
    index.extend_from_slice(&own);
    (pack, index, format!("pack-{}", hex(&trailer)))
}

/// Reads a pack by its index; `None` when either is not whole.
pub(super) fn unpack(pack: &[u8], index: &[u8]) -> Option<BTreeMap<ObjectName, Object>> {
    let (body, trailer) = pack.split_at_checked(pack.len().checked_sub(20)?)?;
    let (of_index, index_trailer) = index.split_at_checked(index.len().checked_sub(20)?)?;
    if sha1(body) != trailer || sha1(of_index) != index_trailer || !of_index.ends_with(trailer) {
        return None;
    }
    let word = |at: usize| Some(u32::from_be_bytes(index.get(at..at + 4)?.try_into().ok()?) as usize);
    let count = word(8 + 255 * 4)?;
    let mut out = BTreeMap::new();
    for n in 0..count {
        let name: ObjectName = index.get(1032 + n * 20..1052 + n * 20)?.try_into().ok()?;
        let at = word(1032 + count * 24 + n * 4)?;
        let object = entry(&pack[at..])?;
        if object.name() != name {
            return None;
        }
        out.insert(name, object);
    }
    Some(out)
}

fn entry(bytes: &[u8]) -> Option<Object> {
    let (mut at, first) = (1, *bytes.first()?);
    let mut more = first;
    while more & 0x80 != 0 {
        more = *bytes.get(at)?;
        at += 1;
    }
    let kind = match (first >> 4) & 7 {
        1 => Kind::Commit,
        2 => Kind::Tree,
        3 => Kind::Blob,
        _ => return None,
    };
    Some(Object { kind, body: inflate(&bytes[at..])?.0 })
}

fn entry_kind(kind: Kind) -> u8 {
    match kind {
        Kind::Commit => 1,
        Kind::Tree => 2,
        Kind::Blob => 3,
    }
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut out = ZlibEncoder::new(Vec::new(), Compression::fast());
    out.write_all(bytes).expect("memory");
    out.finish().expect("memory")
}

/// What the stream at the start of `bytes` holds, and its length.
fn inflate(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut out = Vec::new();
    let mut stream = ZlibDecoder::new(bytes);
    stream.read_to_end(&mut out).ok()?;
    Some((out, stream.total_in() as usize))
}

fn sha1(bytes: &[u8]) -> ObjectName {
    Sha1::digest(bytes).into()
}

/// Hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// An object's name from its 40 digits.
pub(super) fn unhex(text: &str) -> Option<ObjectName> {
    let digit = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..20).map(|n| digit(n * 2)).collect();
    bytes?.try_into().ok().filter(|_| text.len() == 40)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked_and_damage_is_seen() {
        let blob = Object::blob(vec![b'x'; 300]);
        let tree = Object::tree(blob.name());
        let commit = Object::commit(tree.name(), &[], "first");
        assert_eq!(hex(&Object::blob(b"hello\n".to_vec()).name()), "ce013625030ba8dba906f756967f9e9ca394464a");
        assert_eq!(commit.needs(), [tree.name()]);
        assert_eq!(tree.needs(), [blob.name()]);
        assert_eq!(Object::of_loose(&commit.loose()), Some(commit.clone()));
        let objects: BTreeMap<_, _> = [blob, tree, commit].into_iter().map(|o| (o.name(), o)).collect();
        let (pack, index, _) = pack(&objects);
        assert_eq!(unpack(&pack, &index), Some(objects));
        let mut torn = pack.clone();
        torn[20] ^= 1;
        assert_eq!(unpack(&torn, &index), None);
        assert_eq!(unpack(&pack[..pack.len() - 1], &index), None);
    }
}

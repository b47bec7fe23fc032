//! Whether the bytes of an object file are what its name says.
//!
//! A loose object and an LFS file are checked against the hash that is their name, a pack's index against the hash at
//! its end; a pack by its head and its trailer, since hashing terabytes again would cost more than it finds.
//!
//! Invariants: bytes may come in pieces of any size; what is checked takes constant memory.

use flate2::{Decompress, FlushDecompress, Status};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::{Damage, ObjectId, SHA1_BYTES};
use crate::path::RelPath;

/// What a file has to be, by its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// A loose object of this name.
    Loose(ObjectId),
    /// A pack.
    Pack,
    /// The index of a pack.
    PackIndex,
    /// A file whose SHA-256 is its name.
    Lfs([u8; 32]),
}

impl Promise {
    /// What a file below `objects/` of a repository has to be; `None` when nothing is known of it.
    pub fn of_object(inside_objects: &[u8]) -> Option<Promise> {
        let mut parts = inside_objects.split(|&b| b == b'/');
        let (dir, name) = (parts.next()?, parts.next()?);
        if parts.next().is_some() {
            return None;
        }
        if dir == b"pack" {
            return match name {
                name if name.ends_with(b".pack") => Some(Promise::Pack),
                name if name.ends_with(b".idx") => Some(Promise::PackIndex),
                _ => None,
            };
        }
        if dir.len() != 2 {
            return None;
        }
        ObjectId::parse(&[dir, name].concat()).map(Promise::Loose)
    }

    /// Whether a path is one of the LFS store's, and the hash that it promises.
    pub fn of_lfs(path: &RelPath) -> Option<Promise> {
        let mut up = path.components().rev();
        let (name, dir) = (up.next()?, up.next()?);
        if name.len() != 62 || dir.len() != 2 || !up.any(|c| c == b"git-lfs") {
            return None;
        }
        let hash = data_encoding::HEXLOWER.decode(&[dir, name].concat()).ok()?;
        Some(Promise::Lfs(hash.try_into().ok()?))
    }
}

/// Reads a file's bytes in order and says at the end whether its promise holds.
pub struct Check {
    promise: Promise,
    size: u64,
    head: Vec<u8>,
    tail: Vec<u8>,
    hash: Hash,
    inflate: Option<Inflate>,
    /// Of an index: its own is one of them.
    sealed: Option<(Sealed<Sha1>, Sealed<Sha256>)>,
}

enum Hash {
    None,
    Sha1(Sha1),
    Sha256(Sha256),
}

/// Hashes a file but for the hash at its end.
#[derive(Default)]
struct Sealed<H> {
    hash: H,
    /// The last bytes so far, as many as the hash has.
    last: Vec<u8>,
}

struct Inflate {
    stream: Decompress,
    out: Vec<u8>,
    is_over: bool,
    failed: bool,
}

/// What a pack or its index says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackSeal {
    /// Objects in it.
    pub objects: u32,
    /// The pack's trailer: the hash of all before it.
    pub trailer: ObjectId,
}

/// Bytes of the head that are kept: the fan-out of an index.
const HEAD_BYTES: usize = 8 + 256 * 4;
/// Bytes of the tail that are kept: two hashes.
const TAIL_BYTES: usize = 64;

impl Check {
    /// Begins to check a file.
    pub fn new(promise: Promise) -> Check {
        let hash = match promise {
            Promise::Loose(id) if id.as_bytes().len() == SHA1_BYTES => Hash::Sha1(Sha1::new()),
            Promise::Loose(_) | Promise::Lfs(_) => Hash::Sha256(Sha256::new()),
            Promise::Pack | Promise::PackIndex => Hash::None,
        };
        let inflate = matches!(promise, Promise::Loose(_)).then(|| Inflate {
            stream: Decompress::new(true),
            out: vec![0; 16 << 10],
            is_over: false,
            failed: false,
        });
        let sealed = (promise == Promise::PackIndex).then(Default::default);
        Check { promise, size: 0, head: Vec::new(), tail: Vec::new(), hash, inflate, sealed }
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.size += bytes.len() as u64;
        match self.promise {
            Promise::Lfs(_) => self.hash.update(bytes),
            Promise::Loose(_) => self.inflate(bytes),
            Promise::Pack | Promise::PackIndex => {
                let wanted = HEAD_BYTES.saturating_sub(self.head.len()).min(bytes.len());
                self.head.extend_from_slice(&bytes[..wanted]);
                let kept = TAIL_BYTES.saturating_sub(bytes.len()).min(self.tail.len());
                self.tail.drain(..self.tail.len() - kept);
                self.tail.extend_from_slice(&bytes[bytes.len().saturating_sub(TAIL_BYTES)..]);
                if let Some((sha1, sha256)) = &mut self.sealed {
                    sha1.update(bytes);
                    sha256.update(bytes);
                }
            }
        }
    }

    fn inflate(&mut self, bytes: &[u8]) {
        let Some(inflate) = &mut self.inflate else { return };
        let mut rest = bytes;
        while !inflate.is_over && !inflate.failed {
            let (read, written) = (inflate.stream.total_in(), inflate.stream.total_out());
            let status = inflate.stream.decompress(rest, &mut inflate.out, FlushDecompress::None);
            let used = (inflate.stream.total_in() - read) as usize;
            let made = (inflate.stream.total_out() - written) as usize;
            self.hash.update(&inflate.out[..made]);
            rest = &rest[used..];
            match status {
                Ok(Status::StreamEnd) => inflate.is_over = true,
                Ok(_) if used == 0 && made == 0 => break, // wants more
                Ok(_) => {}
                Err(_) => inflate.failed = true,
            }
        }
        // git takes nothing behind the stream.
        inflate.failed |= inflate.is_over && !rest.is_empty();
    }

    /// The file has ended; `Ok` with what a pack or an index says of itself.
    ///
    /// # Errors
    /// [`Damage`]: the file is not what its name says.
    pub fn finish(self) -> Result<Option<PackSeal>, Damage> {
        if self.size == 0 {
            return Err(Damage::new("the file is empty"));
        }
        match self.promise {
            Promise::Loose(id) => {
                if !self.inflate.is_some_and(|i| i.is_over && !i.failed) {
                    return Err(Damage::new("the object can't be unpacked: it is cut off, or not an object"));
                }
                self.hash.expect(id.as_bytes(), "the object's content doesn't have the hash that is its name")
            }
            Promise::Lfs(hash) => self.hash.expect(&hash, "the content doesn't have the SHA-256 that is its name"),
            Promise::Pack => pack_seal(&self.head, &self.tail, self.size).map(Some),
            Promise::PackIndex => {
                let seal = index_seal(&self.head, &self.tail, self.size)?;
                if self.sealed.is_some_and(|(sha1, sha256)| !sha1.ends_intact() && !sha256.ends_intact()) {
                    return Err(Damage::new("the pack index doesn't have the hash that is at its end"));
                }
                Ok(Some(seal))
            }
        }
    }
}

impl<H: Digest> Sealed<H> {
    fn update(&mut self, bytes: &[u8]) {
        self.last.extend_from_slice(bytes);
        let passed = self.last.len().saturating_sub(<H as Digest>::output_size());
        self.hash.update(&self.last[..passed]);
        self.last.drain(..passed);
    }

    fn ends_intact(self) -> bool {
        self.hash.finalize()[..] == self.last[..]
    }
}

impl Hash {
    fn update(&mut self, bytes: &[u8]) {
        match self {
            Hash::None => {}
            Hash::Sha1(hash) => hash.update(bytes),
            Hash::Sha256(hash) => hash.update(bytes),
        }
    }

    fn expect(self, expected: &[u8], otherwise: &str) -> Result<Option<PackSeal>, Damage> {
        let fits = match self {
            Hash::None => true,
            Hash::Sha1(hash) => hash.finalize()[..] == *expected,
            Hash::Sha256(hash) => hash.finalize()[..] == *expected,
        };
        if fits { Ok(None) } else { Err(Damage::new(otherwise)) }
    }
}

/// Reads what a pack says of itself from its first 12 bytes and its end.
///
/// The hash's length can't be told from a pack alone: the last 20 bytes stand for the trailer here, and
/// where a pack index is read.
///
/// # Errors
/// [`Damage`]: no pack, or one that was cut off before its trailer.
pub fn pack_seal(head: &[u8], tail: &[u8], size: u64) -> Result<PackSeal, Damage> {
    let version = head.get(4..8);
    if !head.starts_with(b"PACK") || !matches!(version, Some([0, 0, 0, 2 | 3])) {
        return Err(Damage::new("the pack doesn't begin as a pack"));
    }
    if size < 12 + SHA1_BYTES as u64 {
        return Err(Damage::new("the pack is cut off"));
    }
    let objects = u32_at(head, 8).ok_or_else(|| Damage::new("the pack is cut off"))?;
    seal(objects, tail.get(tail.len().wrapping_sub(SHA1_BYTES)..), "the pack ends in zeros")
}

/// Reads what a pack's index says of its pack, from its head with the fan-out and its end.
///
/// # Errors
/// [`Damage`]: no index of version 2, or one whose size doesn't fit its count.
fn index_seal(head: &[u8], tail: &[u8], size: u64) -> Result<PackSeal, Damage> {
    let fanout = super::pack::Fanout::parse(head)?;
    let objects = fanout.objects();
    let hash = super::pack::hash_bytes(objects, size).ok_or_else(|| Damage::new("the pack index is cut off or too long"))?;
    // The last 20 bytes of the pack's trailer, before the index's own.
    let end = tail.len().checked_sub(hash);
    let trailer = end.and_then(|end| tail.get(end.checked_sub(SHA1_BYTES)?..end));
    seal(objects, trailer, "the pack index ends in zeros")
}

fn seal(objects: u32, trailer: Option<&[u8]>, otherwise: &str) -> Result<PackSeal, Damage> {
    match trailer.and_then(ObjectId::new) {
        Some(trailer) if !trailer.is_null() => Ok(PackSeal { objects, trailer }),
        _ => Err(Damage::new(otherwise)),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn deflate(content: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(content).unwrap();
        out.finish().unwrap()
    }

    fn check(promise: Promise, bytes: &[u8], expected: Result<(), &str>) {
        for piece in [1, 7, bytes.len().max(1)] {
            let mut check = Check::new(promise);
            bytes.chunks(piece).for_each(|b| check.update(b));
            match (check.finish(), expected) {
                (Ok(_), Ok(())) => {}
                (Err(Damage(found)), Err(expected)) => assert!(found.contains(expected), "{found} instead of {expected}"),
                (found, expected) => panic!("{found:?} instead of {expected:?}"),
            }
        }
    }

    #[test]
    fn a_loose_object_is_what_its_name_says_or_damaged() {
        // `printf 'hello\n' | git hash-object --stdin`
        let id = ObjectId::parse(b"ce013625030ba8dba906f756967f9e9ca394464a").unwrap();
        let promise = Promise::of_object(id.loose_path().as_bytes()).unwrap();
        assert_eq!(promise, Promise::Loose(id));
        let good = deflate(b"blob 6\0hello\n");
        check(promise, &good, Ok(()));
        check(promise, &deflate(b"blob 6\0hellO\n"), Err("hash"));
        check(promise, &[], Err("empty"));
        check(promise, &vec![0; good.len()], Err("unpacked"));
        check(promise, &good[..good.len() - 1], Err("unpacked"));
        check(promise, &[&good[..], b"x"].concat(), Err("unpacked"));
        let large = [b"blob 300000\0".to_vec(), b"x".repeat(300_000)].concat();
        let id = ObjectId::new(&Sha1::digest(&large)).unwrap();
        check(Promise::Loose(id), &deflate(&large), Ok(()));
        let sha256 = ObjectId::new(&Sha256::digest(b"blob 6\0hello\n")).unwrap();
        check(Promise::Loose(sha256), &good, Ok(()));
        assert_eq!(Promise::of_object(b"ab/short"), None);
        assert_eq!(Promise::of_object(b"info/alternates"), None);
    }

    #[test]
    fn an_lfs_file_has_the_hash_that_is_its_name() {
        let hex = data_encoding::HEXLOWER.encode(&Sha256::digest(b"large"));
        let path = RelPath::new(format!("shared/data/git-lfs/storage/1/{}/{}", &hex[..2], &hex[2..]).into_bytes()).unwrap();
        let promise = Promise::of_lfs(&path).unwrap();
        check(promise, b"large", Ok(()));
        check(promise, b"larg", Err("SHA-256"));
        check(promise, b"", Err("empty"));
        let elsewhere = RelPath::new(format!("shared/data/{}/{}", &hex[..2], &hex[2..]).into_bytes()).unwrap();
        assert_eq!(Promise::of_lfs(&elsewhere), None);
    }

    #[test]
    fn a_pack_begins_and_ends_as_one() {
        let pack = [b"PACK\0\0\0\x02\0\0\0\x05".to_vec(), vec![9; 100], vec![7; 20]].concat();
        let mut c = Check::new(Promise::Pack);
        pack.chunks(33).for_each(|b| c.update(b));
        let seal = c.finish().unwrap().unwrap();
        assert_eq!(seal, PackSeal { objects: 5, trailer: ObjectId::new(&[7; 20]).unwrap() });
        check(Promise::Pack, &[0; 132], Err("begin"));
        check(Promise::Pack, b"PACK\0\0\0\x02\0\0\0\x05", Err("cut off"));
        check(Promise::Pack, &[b"PACK\0\0\0\x02\0\0\0\x05".to_vec(), vec![0; 120]].concat(), Err("zeros"));
        check(Promise::Pack, b"", Err("empty"));
    }

    #[test]
    fn a_pack_index_has_the_hash_that_is_at_its_end() {
        // One object, of the name 0xff…: all counts but the last are 0.
        let body = |hash: usize| {
            let fanout = [vec![0; 255 * 4], vec![0, 0, 0, 1]].concat();
            [b"\xfftOc\0\0\0\x02".to_vec(), fanout, vec![0xff; hash], vec![1; 8], vec![7; hash]].concat()
        };
        let sha1 = [body(20), Sha1::digest(body(20)).to_vec()].concat();
        let sha256 = [body(32), Sha256::digest(body(32)).to_vec()].concat();
        for good in [sha1, sha256] {
            check(Promise::PackIndex, &good, Ok(()));
            for at in [1032, 1053, good.len() - 1] {
                let mut altered = good.clone();
                altered[at] ^= 1;
                check(Promise::PackIndex, &altered, Err("hash"));
            }
            check(Promise::PackIndex, &good[..good.len() - 1], Err("cut off"));
        }
    }
}

//! A pack's index of version 2 and its reverse index of version 1 (`gitformat-pack(5)`), read whole and written as git does.
//!
//! Both follow from the pack and the names of its objects. That is how a standby makes them by itself: what is written here
//! counts only once its digest was compared with that of the file on the active.
//!
//! Invariants: of an index that was read the names rise, no two entries start at one place, and each offset is there.

use sha1::Digest as _;

use crate::pack_index::{LARGE, PACK_HEADER_BYTES, PackHash};

/// LIMIT: objects of an index that is held in memory, about 80 bytes each at the most; those of larger packs travel as they are.
pub const INDEX_OBJECTS_MAX: usize = 1 << 20;

/// LIMIT: bytes of such an index: fan-out, and of each object the longest name, its CRC-32 and both its offsets.
pub const INDEX_BYTES_MAX: u64 = FANOUT_BYTES as u64 + INDEX_OBJECTS_MAX as u64 * (32 + 4 + 4 + 8) + 64;

/// Why bytes are not an index that can be made anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IndexFileError {
    /// Another version, or a size that fits no number of objects.
    #[error("a pack index of another form")]
    Form,
    /// More than [`INDEX_OBJECTS_MAX`].
    #[error("a pack index over the limit")]
    TooMany,
    /// Names out of order, two entries at one place, or an offset that isn't there.
    #[error("a pack index that contradicts itself")]
    Content,
}

/// An index, and its objects in the order of the pack.
#[derive(Debug, Clone)]
pub struct IndexFile<'a> {
    bytes: &'a [u8],
    hash: PackHash,
    names: &'a [u8],
    /// By name.
    offsets: Vec<u64>,
    /// Which object by name each one of the pack is.
    order: Vec<u32>,
}

/// What an index says, from which it is written.
pub(crate) struct IndexParts<'a> {
    pub(crate) hash: PackHash,
    /// In any order; the others are in the same.
    pub(crate) names: &'a [u8],
    pub(crate) crcs: &'a [u32],
    pub(crate) offsets: &'a [u64],
    /// The numbers of the objects by name.
    pub(crate) by_name: &'a [u32],
    pub(crate) pack_checksum: &'a [u8],
}

impl<'a> IndexFile<'a> {
    /// Reads an index. Its checksums are not looked at: [`IndexFile::is_as_written`] does.
    ///
    /// Memory: 12 bytes an object.
    ///
    /// # Errors
    /// [`IndexFileError`].
    pub fn parse(bytes: &'a [u8]) -> Result<IndexFile<'a>, IndexFileError> {
        let head = bytes.split_at_checked(FANOUT_BYTES).filter(|(head, _)| head.starts_with(MAGIC)).ok_or(IndexFileError::Form)?.0;
        let counts = head[MAGIC.len()..].as_chunks::<4>().0;
        let objects = u32::from_be_bytes(counts[255]) as usize;
        if objects > INDEX_OBJECTS_MAX {
            return Err(IndexFileError::TooMany);
        }
        let hash = hash_of(objects, bytes.len()).ok_or(IndexFileError::Form)?;
        let (names, rest) = bytes[FANOUT_BYTES..].split_at(objects * hash.bytes());
        let (small, large) = rest[objects * 4..rest.len() - 2 * hash.bytes()].split_at(objects * 4);
        let large = large.as_chunks::<8>().0;
        let mut offsets = Vec::with_capacity(objects);
        for &small in small.as_chunks::<4>().0 {
            let small = u64::from(u32::from_be_bytes(small));
            offsets.push(match small & LARGE {
                0 => small,
                _ => u64::from_be_bytes(*large.get((small & !LARGE) as usize).ok_or(IndexFileError::Content)?),
            });
        }
        let mut order: Vec<u32> = (0..objects as u32).collect();
        order.sort_unstable_by_key(|&number| offsets[number as usize]);
        let index = IndexFile { bytes, hash, names, offsets, order };
        let is_sorted = index.names().is_sorted_by(|one, next| one < next);
        let is_apart = index.order.is_sorted_by(|&one, &next| index.offsets[one as usize] < index.offsets[next as usize]);
        if is_sorted && is_apart { Ok(index) } else { Err(IndexFileError::Content) }
    }

    /// How many objects the pack has.
    pub fn objects(&self) -> usize {
        self.order.len()
    }

    /// The hash of the pack's repository.
    pub fn hash(&self) -> PackHash {
        self.hash
    }

    /// Whether the index is, byte for byte, what this module writes: with its fan-out, its table of large offsets and its
    /// own checksum. That the CRC-32 of each entry, and the checksum of the pack, are the pack's is not known from here.
    ///
    /// Cost: one pass of the repository's hash over the index.
    pub fn is_as_written(&self) -> bool {
        let by_name: Vec<u32> = (0..self.objects() as u32).collect();
        let crcs: Vec<u32> = self.crcs().map(u32::from_be_bytes).collect();
        let parts = IndexParts {
            hash: self.hash,
            names: self.names,
            crcs: &crcs,
            offsets: &self.offsets,
            by_name: &by_name,
            pack_checksum: self.pack_checksum(),
        };
        let mut rest = self.bytes;
        let compared = parts.write::<()>(&mut |part| {
            rest = rest.strip_prefix(part).ok_or(())?;
            Ok(())
        });
        compared.is_ok() && rest.is_empty()
    }

    /// Gives `write` the reverse index of the pack, in parts.
    ///
    /// # Errors
    /// Those of `write`.
    pub fn write_reverse<E>(&self, write: &mut dyn FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut out = Checked::new(self.hash, write);
        out.put(b"RIDX\0\0\0\x01")?;
        let hash_id: u32 = match self.hash {
            PackHash::Sha1 => 1,
            PackHash::Sha256 => 2,
        };
        out.put(&hash_id.to_be_bytes())?;
        self.order.iter().try_for_each(|number| out.put(&number.to_be_bytes()))?;
        out.put(self.pack_checksum())?;
        out.finish()
    }

    /// The checksum at the end of the pack that this is of.
    pub(crate) fn pack_checksum(&self) -> &'a [u8] {
        let end = self.bytes.len() - self.hash.bytes();
        &self.bytes[end - self.hash.bytes()..end]
    }

    /// The name of the entry with this number, counted in the pack's order.
    pub(crate) fn name(&self, number: usize) -> &'a [u8] {
        let at = self.order[number] as usize * self.hash.bytes();
        &self.names[at..at + self.hash.bytes()]
    }

    /// Bytes from the start of an entry to the next one; 0 for the last, whose end no index knows.
    pub(crate) fn len(&self, number: usize) -> u64 {
        let start = self.offset(number);
        self.order.get(number + 1).map_or(0, |&next| self.offsets[next as usize] - start)
    }

    /// Where the entry with this number starts.
    pub(crate) fn offset(&self, number: usize) -> u64 {
        self.offsets[self.order[number] as usize]
    }

    /// Whether entries start where those of a pack do: right behind its header, if there are any.
    pub(crate) fn starts_at_the_front(&self) -> bool {
        self.order.is_empty() || self.offset(0) == PACK_HEADER_BYTES
    }

    fn names(&self) -> impl Iterator<Item = &'a [u8]> {
        self.names.chunks_exact(self.hash.bytes())
    }

    fn crcs(&self) -> impl Iterator<Item = [u8; 4]> {
        let start = FANOUT_BYTES + self.names.len();
        self.bytes[start..start + 4 * self.objects()].as_chunks::<4>().0.iter().copied()
    }
}

impl IndexParts<'_> {
    /// Gives `write` the index, in parts.
    pub(crate) fn write<E>(&self, write: &mut dyn FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let hash_bytes = self.hash.bytes();
        let name = |number: u32| &self.names[number as usize * hash_bytes..][..hash_bytes];
        let mut counts = [0u32; 256];
        self.by_name.iter().for_each(|&number| counts[usize::from(name(number)[0])] += 1);
        let mut out = Checked::new(self.hash, write);
        out.put(MAGIC)?;
        let mut count = 0;
        for more in counts {
            count += more;
            out.put(&u32::to_be_bytes(count))?;
        }
        self.by_name.iter().try_for_each(|&number| out.put(name(number)))?;
        self.by_name.iter().try_for_each(|&number| out.put(&self.crcs[number as usize].to_be_bytes()))?;
        let mut large = Vec::new();
        for &number in self.by_name {
            let offset = self.offsets[number as usize];
            let small = if offset < LARGE {
                offset
            } else {
                large.push(offset);
                LARGE | (large.len() as u64 - 1)
            };
            out.put(&(small as u32).to_be_bytes())?;
        }
        large.iter().try_for_each(|offset| out.put(&offset.to_be_bytes()))?;
        out.put(self.pack_checksum)?;
        out.finish()
    }
}

/// Bytes on their way out in parts, with the checksum that ends them.
struct Checked<'w, E> {
    checksum: Checksum,
    hash: PackHash,
    part: Vec<u8>,
    write: &'w mut dyn FnMut(&[u8]) -> Result<(), E>,
}

enum Checksum {
    Sha1(sha1::Sha1),
    Sha256(sha2::Sha256),
}

impl<'w, E> Checked<'w, E> {
    fn new(hash: PackHash, write: &'w mut dyn FnMut(&[u8]) -> Result<(), E>) -> Checked<'w, E> {
        let checksum = match hash {
            PackHash::Sha1 => Checksum::Sha1(sha1::Sha1::new()),
            PackHash::Sha256 => Checksum::Sha256(sha2::Sha256::new()),
        };
        Checked { checksum, hash, part: Vec::with_capacity(PART_BYTES + 64), write }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), E> {
        self.part.extend_from_slice(bytes);
        if self.part.len() >= PART_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), E> {
        match &mut self.checksum {
            Checksum::Sha1(hasher) => hasher.update(&self.part),
            Checksum::Sha256(hasher) => hasher.update(&self.part),
        }
        (self.write)(&self.part)?;
        self.part.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<(), E> {
        self.flush()?;
        let sum = match self.checksum {
            Checksum::Sha1(hasher) => hasher.finalize().to_vec(),
            Checksum::Sha256(hasher) => hasher.finalize().to_vec(),
        };
        assert_eq!(sum.len(), self.hash.bytes(), "a checksum is of the repository's hash");
        (self.write)(&sum)
    }
}

/// The hash of an index of so many objects and bytes; as for other readers the shorter one fits first.
fn hash_of(objects: usize, bytes: usize) -> Option<PackHash> {
    [PackHash::Sha1, PackHash::Sha256].into_iter().find(|hash| {
        let least = FANOUT_BYTES + objects * (hash.bytes() + 8) + 2 * hash.bytes();
        bytes.checked_sub(least).is_some_and(|large| large.is_multiple_of(8) && large / 8 <= objects)
    })
}

const MAGIC: &[u8] = b"\xfftOc\0\0\0\x02";

/// Bytes of an index before its names: magic, version, fan-out.
const FANOUT_BYTES: usize = 8 + 4 * 256;

/// Bytes that go out at once.
const PART_BYTES: usize = 256 << 10;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::noise::noise;

    /// An index of entries, each a name and where it starts, in any order.
    pub(crate) fn index_of(entries: &[(Vec<u8>, u64)], hash: PackHash) -> Vec<u8> {
        let names: Vec<u8> = entries.iter().flat_map(|(name, _)| name.clone()).collect();
        let offsets: Vec<u64> = entries.iter().map(|(_, offset)| *offset).collect();
        let crcs: Vec<u32> = offsets.iter().map(|offset| *offset as u32 ^ 0x5555).collect();
        let mut by_name: Vec<u32> = (0..entries.len() as u32).collect();
        by_name.sort_by_key(|&number| &entries[number as usize].0);
        let parts =
            IndexParts { hash, names: &names, crcs: &crcs, offsets: &offsets, by_name: &by_name, pack_checksum: &vec![7; hash.bytes()] };
        written(|write| parts.write::<()>(write))
    }

    pub(crate) fn written(give: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<(), ()>) -> Result<(), ()>) -> Vec<u8> {
        let mut out = Vec::new();
        give(&mut |part| {
            out.extend_from_slice(part);
            Ok(())
        })
        .unwrap();
        out
    }

    pub(crate) fn name(seed: u64, hash: PackHash) -> Vec<u8> {
        noise(seed, hash.bytes())
    }

    const SHA1: PackHash = PackHash::Sha1;

    #[test]
    fn entries_come_in_the_order_of_the_pack_with_their_lengths() {
        for hash in [SHA1, PackHash::Sha256] {
            let entries: Vec<_> =
                [(900, 1), (12, 2), (40, 3), (1 << 31, 4), (1 << 40, 5)].map(|(at, seed)| (name(seed, hash), at)).to_vec();
            let bytes = index_of(&entries, hash);
            let index = IndexFile::parse(&bytes).unwrap();
            assert!(index.is_as_written() && index.starts_at_the_front());
            assert_eq!((index.objects(), index.hash()), (5, hash));
            let found: Vec<_> = (0..5).map(|number| (index.name(number).to_vec(), index.offset(number), index.len(number))).collect();
            let of = |seed| name(seed, hash);
            let expected = [
                (of(2), 12, 28),
                (of(3), 40, 860),
                (of(1), 900, (1 << 31) - 900),
                (of(4), 1 << 31, (1 << 40) - (1 << 31)),
                (of(5), 1 << 40, 0),
            ];
            assert_eq!(found, expected);
        }
        let none = index_of(&[], SHA1);
        assert!(IndexFile::parse(&none).is_ok_and(|index| index.is_as_written() && index.starts_at_the_front()));
    }

    #[test]
    fn an_index_of_another_form_is_not_made_anew() {
        let entries: Vec<_> = (1..20u64).map(|seed| (name(seed, SHA1), 12 + seed * 100)).collect();
        let bytes = index_of(&entries, SHA1);
        let form = |bytes: &[u8]| IndexFile::parse(bytes).map(|index| index.is_as_written());
        assert_eq!(form(&bytes), Ok(true));
        assert!(!IndexFile::parse(&bytes).unwrap().starts_at_the_front());
        assert_eq!(form(&bytes[..bytes.len() - 1]), Err(IndexFileError::Form));
        assert_eq!(form(&bytes[..1000]), Err(IndexFileError::Form));
        assert_eq!(form(&[&b"PACK"[..], &bytes[4..]].concat()), Err(IndexFileError::Form));
        let with = |at: usize, byte: u8| {
            let mut changed = bytes.clone();
            changed[at] = byte;
            form(&changed)
        };
        assert_eq!(with(8, 9), Ok(false), "a fan-out that isn't that of the names");
        assert_eq!(with(bytes.len() - 1, bytes[bytes.len() - 1] ^ 1), Ok(false), "another checksum");
        assert_eq!(with(FANOUT_BYTES, 255), Err(IndexFileError::Content), "names out of order");
        assert_eq!(with(FANOUT_BYTES + 19 * 24, 0x80), Err(IndexFileError::Content), "an offset that isn't there");
        let mut many = bytes[..FANOUT_BYTES].to_vec();
        many[FANOUT_BYTES - 4..].copy_from_slice(&(INDEX_OBJECTS_MAX as u32 + 1).to_be_bytes());
        assert_eq!(form(&many), Err(IndexFileError::TooMany));
        let twice = index_of(&[(name(1, SHA1), 12), (name(2, SHA1), 12)], SHA1);
        assert_eq!(form(&twice), Err(IndexFileError::Content), "two entries at one place");
    }
}

//! Where a pack's entries start, from its index of version 2 (`gitformat-pack(5)`), read front to back in parts.
//!
//! An index sorts objects by id, so the order in the pack is known only once every offset was read. What is held is
//! 8 bytes an object; ids and checksums are never looked at.
//!
//! A damaged index costs matches, never content: what is cut at wrong places is still described byte by byte.
//!
//! Invariants: offsets that were read rise, the first is behind the pack's header, the last before its trailer.

use std::ops::Range;

use rayon::slice::ParallelSliceMut;

/// The hash that a repository names its objects with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackHash {
    /// 20 bytes.
    Sha1,
    /// 32 bytes.
    Sha256,
}

/// Why offsets can't be read from an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PackIndexError {
    /// So many objects don't make an index of this size, or other bytes came than its offsets.
    #[error("a pack index of impossible size")]
    Size,
    /// An offset that is there twice, points outside the pack, or to a large offset that isn't there.
    #[error("a pack index with impossible offsets")]
    Offset,
}

/// Reader of an index's offsets.
///
/// Give [`push`](PackIndexReader::push) all of [`range`](PackIndexReader::range) in parts of any size, then call
/// [`finish`](PackIndexReader::finish). Memory: 8 bytes an object.
#[derive(Debug)]
pub struct PackIndexReader {
    range: Range<u64>,
    hash: PackHash,
    objects: usize,
    large_objects: usize,
    /// How many offsets of 4 bytes came; some of them say only that one of 8 bytes follows.
    seen: usize,
    large_wanted: usize,
    offsets: Vec<u64>,
    /// The front of a number that the last part ended in.
    carried: Vec<u8>,
}

/// Where the entries of one pack start, in the pack's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackOffsets {
    offsets: Vec<u64>,
    pack_bytes: u64,
    hash: PackHash,
}

impl PackHash {
    /// Bytes of an id, and of a pack's trailer.
    pub fn bytes(self) -> usize {
        match self {
            PackHash::Sha1 => 20,
            PackHash::Sha256 => 32,
        }
    }
}

impl PackIndexReader {
    /// A reader for an index of `index_bytes` that lists `objects`: the last number of its fan-out, whose magic and
    /// version the caller has checked.
    ///
    /// # Errors
    /// `Size`: the index is of other objects, or of another hash.
    pub fn new(objects: u32, hash: PackHash, index_bytes: u64) -> Result<PackIndexReader, PackIndexError> {
        // Ids and CRCs come before the offsets of 4 bytes, those of 8 after, two checksums last.
        let start = FANOUT_BYTES + u64::from(objects) * (hash.bytes() as u64 + 4);
        let large_start = start + u64::from(objects) * 4;
        let end = index_bytes.checked_sub(2 * hash.bytes() as u64).filter(|&end| end >= large_start).ok_or(PackIndexError::Size)?;
        let large_bytes = end - large_start;
        if !large_bytes.is_multiple_of(8) || large_bytes / 8 > u64::from(objects) {
            return Err(PackIndexError::Size);
        }
        Ok(PackIndexReader {
            range: start..end,
            hash,
            objects: objects as usize,
            large_objects: (large_bytes / 8) as usize,
            seen: 0,
            large_wanted: 0,
            offsets: Vec::new(),
            carried: Vec::new(),
        })
    }

    /// The bytes of the index that are to be pushed.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Takes the next bytes of the range.
    ///
    /// # Errors
    /// `Size`: more than the range has. `Offset`: one that points to a large offset that isn't there.
    pub fn push(&mut self, mut part: &[u8]) -> Result<(), PackIndexError> {
        while !part.is_empty() {
            let number_bytes = if self.seen < self.objects { 4 } else { 8 };
            if self.carried.is_empty() && part.len() >= number_bytes {
                let (number, rest) = part.split_at(number_bytes);
                self.take(number)?;
                part = rest;
                continue;
            }
            let (more, rest) = part.split_at(part.len().min(number_bytes - self.carried.len()));
            self.carried.extend_from_slice(more);
            part = rest;
            if self.carried.len() == number_bytes {
                let number = std::mem::take(&mut self.carried);
                self.take(&number)?;
            }
        }
        Ok(())
    }

    /// The offsets, now that all of the range was pushed, of a pack of `pack_bytes`.
    ///
    /// # Errors
    /// `Size`: the range was not pushed whole. `Offset`: the offsets are not those of such a pack.
    pub fn finish(self, pack_bytes: u64) -> Result<PackOffsets, PackIndexError> {
        if self.seen != self.objects || self.offsets.len() != self.objects || !self.carried.is_empty() {
            return Err(PackIndexError::Size);
        }
        PackOffsets::new(self.offsets, pack_bytes, self.hash)
    }

    fn take(&mut self, number: &[u8]) -> Result<(), PackIndexError> {
        let value = number.iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
        if self.seen == self.objects {
            // Which object a large offset is of doesn't matter here, so they are taken as they lie.
            if self.offsets.len() == self.objects {
                return Err(PackIndexError::Size);
            }
            self.offsets.push(value);
            return Ok(());
        }
        self.seen += 1;
        if value & LARGE == 0 {
            self.offsets.push(value);
        } else {
            self.large_wanted += 1;
            if (value & !LARGE) >= self.large_objects as u64 {
                return Err(PackIndexError::Offset);
            }
        }
        let whole = self.seen < self.objects || self.large_wanted == self.large_objects;
        if whole { Ok(()) } else { Err(PackIndexError::Offset) }
    }
}

impl PackOffsets {
    /// The entries that start at `offsets`, in any order, of a pack of `pack_bytes`.
    ///
    /// # Errors
    /// `Offset`: one is there twice, or lies in the pack's header or trailer.
    pub fn new(mut offsets: Vec<u64>, pack_bytes: u64, hash: PackHash) -> Result<PackOffsets, PackIndexError> {
        offsets.par_sort_unstable();
        let entries = PACK_HEADER_BYTES..pack_bytes.saturating_sub(hash.bytes() as u64);
        let within = [offsets.first(), offsets.last()].into_iter().flatten().all(|offset| entries.contains(offset));
        if !within || offsets.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(PackIndexError::Offset);
        }
        Ok(PackOffsets { offsets, pack_bytes, hash })
    }

    /// How many entries the pack has.
    pub fn entries(&self) -> usize {
        self.offsets.len()
    }

    /// Bytes of the pack.
    pub fn pack_bytes(&self) -> u64 {
        self.pack_bytes
    }

    /// The hash of the pack's repository.
    pub fn hash(&self) -> PackHash {
        self.hash
    }

    /// Where the entry with this number, counted in the pack's order, lies.
    pub(crate) fn entry(&self, number: usize) -> Option<Range<u64>> {
        let start = *self.offsets.get(number)?;
        let end = self.offsets.get(number + 1).copied().unwrap_or(self.pack_bytes - self.hash.bytes() as u64);
        Some(start..end)
    }
}

/// Bytes of an index before its ids: magic, version, fan-out.
const FANOUT_BYTES: u64 = 8 + 4 * 256;

/// Bytes of a pack before its first entry: magic, version, number of objects.
pub(crate) const PACK_HEADER_BYTES: u64 = 12;

/// Set in an offset of 4 bytes that says where the one of 8 bytes is.
pub(crate) const LARGE: u64 = 1 << 31;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The bytes of the range of an index that lists `offsets`.
    fn table(offsets: &[u64]) -> Vec<u8> {
        let (mut small, mut large) = (Vec::new(), Vec::new());
        for &offset in offsets {
            if offset < LARGE {
                small.extend((offset as u32).to_be_bytes());
            } else {
                small.extend((LARGE as u32 + large.len() as u32 / 8).to_be_bytes());
                large.extend(offset.to_be_bytes());
            }
        }
        [small, large].concat()
    }

    fn index_bytes(objects: usize, table: &[u8], hash: PackHash) -> u64 {
        FANOUT_BYTES + (objects * (hash.bytes() + 4) + table.len() + 2 * hash.bytes()) as u64
    }

    fn read(objects: usize, table: &[u8], pack_bytes: u64, part_bytes: usize) -> Result<PackOffsets, PackIndexError> {
        let hash = PackHash::Sha1;
        let mut reader = PackIndexReader::new(objects as u32, hash, index_bytes(objects, table, hash))?;
        assert_eq!(reader.range().end - reader.range().start, table.len() as u64);
        table.chunks(part_bytes).try_for_each(|part| reader.push(part))?;
        reader.finish(pack_bytes)
    }

    fn check(offsets: &[u64], pack_bytes: u64, expected: Result<&[u64], PackIndexError>) {
        for part_bytes in [1, 3, 4, 7, 1000] {
            let actual = read(offsets.len(), &table(offsets), pack_bytes, part_bytes);
            assert_eq!(actual.as_ref().map(|offsets| &offsets.offsets[..]), expected.as_ref().copied(), "{offsets:?} in {part_bytes}");
        }
    }

    #[test]
    fn offsets_come_in_the_order_of_the_pack() {
        check(&[], 32, Ok(&[]));
        check(&[900, 12, 40], 1000, Ok(&[12, 40, 900]));
        check(&[1 << 40, 12, 1 << 31, 1 << 30], 2 << 40, Ok(&[12, 1 << 30, 1 << 31, 1 << 40]));
        check(&[12, 12], 1000, Err(PackIndexError::Offset));
        check(&[11, 12], 1000, Err(PackIndexError::Offset));
        check(&[12, 980], 1000, Err(PackIndexError::Offset));
        check(&[12, 979], 1000, Ok(&[12, 979]));
        check(&[12], 3, Err(PackIndexError::Offset));
    }

    #[test]
    fn an_entry_ends_where_the_next_starts() {
        let offsets = PackOffsets::new(vec![50, 12], 100, PackHash::Sha256).unwrap();
        assert_eq!([0, 1, 2].map(|number| offsets.entry(number)), [Some(12..50), Some(50..68), None]);
        assert_eq!((offsets.entries(), offsets.pack_bytes(), offsets.hash()), (2, 100, PackHash::Sha256));
    }

    #[test]
    fn impossible_indexes_are_refused() {
        let new = |objects, index_bytes| PackIndexReader::new(objects, PackHash::Sha1, index_bytes).map(|reader| reader.range());
        assert_eq!(new(2, FANOUT_BYTES + 2 * 28 + 40), Ok(FANOUT_BYTES + 48..FANOUT_BYTES + 56));
        for index_bytes in [0, FANOUT_BYTES, FANOUT_BYTES + 2 * 28 + 39, FANOUT_BYTES + 2 * 28 + 41, FANOUT_BYTES + 2 * 28 + 40 + 24] {
            assert_eq!(new(2, index_bytes), Err(PackIndexError::Size));
        }
        let refuse = |table: &[u32], error| {
            let table: Vec<u8> = table.iter().flat_map(|number| number.to_be_bytes()).collect();
            assert_eq!(read(2, &table, 1 << 40, 4), Err(error), "{table:x?}");
        };
        refuse(&[12, 1 << 31], PackIndexError::Offset); // no large offset
        refuse(&[12, 1 << 31 | 1, 0, 40], PackIndexError::Offset); // not that one
        refuse(&[12, 40, 0, 50], PackIndexError::Offset); // a large offset of nothing
        refuse(&[1 << 31, 1 << 31, 0, 50], PackIndexError::Offset); // two need one
        let mut reader = PackIndexReader::new(1, PackHash::Sha1, index_bytes(1, &[0; 4], PackHash::Sha1)).unwrap();
        assert_eq!(reader.push(&[0; 3]), Ok(()));
        assert_eq!(reader.push(&[12, 0, 0, 0, 0, 0, 0, 0, 0]), Err(PackIndexError::Size));
        let unread = PackIndexReader::new(1, PackHash::Sha1, index_bytes(1, &[0; 4], PackHash::Sha1)).unwrap();
        assert_eq!(unread.finish(100), Err(PackIndexError::Size));
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_a_pack(table in prop::collection::vec(any::<u8>(), 0..80), objects in 0usize..12, pack_bytes: u64) {
            let offsets = read(objects, &table[..table.len() - table.len() % 4], pack_bytes, 5);
            if let Ok(offsets) = offsets {
                let ends: Vec<_> = (0..objects).map(|number| offsets.entry(number).unwrap()).collect();
                prop_assert!(ends.iter().all(|entry| entry.start < entry.end && entry.start >= 12 && entry.end <= pack_bytes - 20));
            }
        }
    }
}

//! What is known of an index that was sent: the fronts of the names and the lengths of the entries, so that later indexes
//! can be described by it.
//!
//! As bytes: the version; the hash (0 SHA-1, 1 SHA-256); how many entries (LEB128); of each but the last its length (LEB128);
//! then of each the first 8 bytes of its name. All in the order of the pack. 9 to 11 bytes an object.
//!
//! A match goes by the front of a name: two names that share it cost a wrong index, which its digest tells, and the index
//! travels.
//!
//! Invariants: a table that was decoded has at most [`INDEX_OBJECTS_MAX`] entries, each with a length of 1 to 2³² − 1.

use crate::index_file::{INDEX_OBJECTS_MAX, IndexFile};
use crate::pack_base::SOURCES_MAX;
use crate::pack_index::PackHash;
use crate::varint;

/// The entries of a pack by the fronts of their names, in the order of the pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameTable {
    hash: PackHash,
    /// The last is 0: no index knows it.
    lens: Vec<u32>,
    fronts: Vec<[u8; FRONT_BYTES]>,
}

/// Why bytes are not a table of names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameTableError {
    /// A version, or a hash, that this one doesn't know.
    #[error("a table of names of another version")]
    Version,
    /// The bytes end within the table or go on after it, or a number is impossible.
    #[error("a table of names breaks off or is malformed")]
    Malformed,
}

/// The indexes that the standby has, each known by its number; searchable by the front of a name.
///
/// Memory: 16 bytes an entry.
#[derive(Debug, Default)]
pub struct NameBases {
    tables: Vec<NameTable>,
    /// The number that the first entry of each table has among all.
    firsts: Vec<u32>,
    /// All entries by front, those with equal ones by number.
    order: Vec<u32>,
}

/// An entry of one of the indexes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) source: u16,
    pub(crate) number: u32,
    pub(crate) len: u64,
}

impl NameTable {
    /// The table of an index; `None` when it has an entry of 4 GiB or more.
    pub fn of(index: &IndexFile<'_>) -> Option<NameTable> {
        let lens = (0..index.objects()).map(|number| u32::try_from(index.len(number)).ok()).collect::<Option<_>>()?;
        let fronts = (0..index.objects()).map(|number| front_of(index.name(number))).collect();
        Some(NameTable { hash: index.hash(), lens, fronts })
    }

    /// A table without entries; it stands for one that can't be had.
    pub fn empty() -> NameTable {
        NameTable { hash: PackHash::Sha1, lens: Vec::new(), fronts: Vec::new() }
    }

    /// How many entries the table has.
    pub fn entries(&self) -> usize {
        self.fronts.len()
    }

    /// The table as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(12 + self.entries() * (FRONT_BYTES + 3));
        out.extend([VERSION, u8::from(self.hash == PackHash::Sha256)]);
        varint::put(&mut out, self.entries() as u64);
        self.lens.iter().take(self.entries().saturating_sub(1)).for_each(|&len| varint::put(&mut out, u64::from(len)));
        out.extend_from_slice(self.fronts.as_flattened());
        out
    }

    /// Reads all of `bytes` as a table; allocates at most twice their length.
    ///
    /// # Errors
    /// [`NameTableError`]: anything that [`NameTable::encode`] doesn't produce.
    pub fn decode(bytes: &[u8]) -> Result<NameTable, NameTableError> {
        let (hash, mut rest) = match bytes {
            [VERSION, 0, rest @ ..] => (PackHash::Sha1, rest),
            [VERSION, 1, rest @ ..] => (PackHash::Sha256, rest),
            _ => return Err(NameTableError::Version),
        };
        let malformed = NameTableError::Malformed;
        let entries = varint::take(&mut rest).and_then(|entries| usize::try_from(entries).ok()).ok_or(malformed)?;
        if entries > INDEX_OBJECTS_MAX || entries * FRONT_BYTES > rest.len() {
            return Err(malformed);
        }
        let mut lens = Vec::with_capacity(entries);
        for _ in 1..entries {
            let len = varint::take(&mut rest).and_then(|len| u32::try_from(len).ok()).filter(|&len| len > 0);
            lens.push(len.ok_or(malformed)?);
        }
        lens.extend((entries > 0).then_some(0));
        let (fronts, []) = rest.as_chunks() else { return Err(malformed) };
        if fronts.len() != entries {
            return Err(malformed);
        }
        Ok(NameTable { hash, lens, fronts: fronts.to_vec() })
    }
}

impl NameBases {
    /// Makes `tables` searchable for an index of that hash, on the calling thread; the position of each is its number.
    ///
    /// LIMIT: a table that would make it more than `entries_max`, or of more than [`SOURCES_MAX`] indexes, or of another hash,
    /// is let go, but keeps its number: what only that one names travels.
    pub fn new(tables: impl IntoIterator<Item = NameTable>, hash: PackHash, entries_max: usize) -> NameBases {
        let entries_max = entries_max.min(u32::MAX as usize);
        let (mut entries, mut kept, mut firsts) = (0, Vec::new(), Vec::new());
        for table in tables.into_iter().take(SOURCES_MAX) {
            firsts.push(entries as u32);
            let fits = table.hash == hash && entries + table.entries() <= entries_max;
            let table = if fits { table } else { NameTable::empty() };
            entries += table.entries();
            kept.push(table);
        }
        let mut bases = NameBases { tables: kept, firsts, order: Vec::new() };
        let mut order: Vec<u32> = (0..entries as u32).collect();
        order.sort_unstable_by_key(|&number| (bases.front(number), number));
        bases.order = order;
        bases
    }

    /// How many entries of all indexes are searched.
    pub fn entries(&self) -> usize {
        self.order.len()
    }

    /// The first entry with a name of this front.
    pub(crate) fn find(&self, name: &[u8]) -> Option<Named> {
        let front = front_of(name);
        let at = self.order.partition_point(|&number| self.front(number) < front);
        let number = *self.order.get(at).filter(|&&number| self.front(number) == front)?;
        let (source, number) = self.split(number);
        self.at(source as u16, number)
    }

    /// The entry of an index with this number, if its name has this front.
    pub(crate) fn named(&self, source: u16, number: u32, name: &[u8]) -> Option<Named> {
        let table = self.tables.get(usize::from(source))?;
        table.fronts.get(number as usize).filter(|front| **front == front_of(name))?;
        self.at(source, number)
    }

    fn at(&self, source: u16, number: u32) -> Option<Named> {
        let len = *self.tables.get(usize::from(source))?.lens.get(number as usize)?;
        Some(Named { source, number, len: u64::from(len) })
    }

    fn front(&self, number: u32) -> [u8; FRONT_BYTES] {
        let (source, number) = self.split(number);
        self.tables[source].fronts[number as usize]
    }

    /// The table, and the number within it, of an entry's number among all.
    fn split(&self, number: u32) -> (usize, u32) {
        // Of tables that start at the same entry all but the last are empty.
        let source = self.firsts.partition_point(|&first| first <= number) - 1;
        (source, number - self.firsts[source])
    }
}

fn front_of(name: &[u8]) -> [u8; FRONT_BYTES] {
    *name.first_chunk().expect("a name is longer than its front")
}

/// Bytes of a name that a table has: of a million objects no two share them but by a chance of one in 30 million.
const FRONT_BYTES: usize = 8;

/// Version of a table; no list of chunks begins with it.
const VERSION: u8 = 0x81;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chunk::ChunkList;
    use crate::index_file::tests::{index_of, name};

    fn table(seeds: &[u64], hash: PackHash) -> NameTable {
        let entries: Vec<_> = seeds.iter().enumerate().map(|(n, seed)| (name(*seed, hash), 12 + 300 * n as u64)).collect();
        NameTable::of(&IndexFile::parse(&index_of(&entries, hash)).unwrap()).unwrap()
    }

    #[test]
    fn tables_keep_their_bytes() {
        let table = NameTable { hash: PackHash::Sha256, lens: vec![300, 1, 0], fronts: vec![[1; 8], [2; 8], [3; 8]] };
        let golden = [&[0x81, 1, 3, 0xac, 0x02, 1][..], &[1; 8], &[2; 8], &[3; 8]].concat();
        assert_eq!(table.encode(), golden);
        assert_eq!(NameTable::decode(&golden), Ok(table));
        (2..golden.len()).for_each(|len| assert_eq!(NameTable::decode(&golden[..len]), Err(NameTableError::Malformed), "{len} bytes"));
        assert_eq!(NameTable::decode(&[&golden[..], &[0]].concat()), Err(NameTableError::Malformed));
        assert_eq!(NameTable::decode(&[0x81, 2, 0]), Err(NameTableError::Version));
        assert_eq!(NameTable::decode(&[&[0x81, 0, 2, 0][..], &[0; 16]].concat()), Err(NameTableError::Malformed), "a length of 0");
        assert_eq!(NameTable::decode(&[0x81, 0, 0xff, 0xff, 0x7f]), Err(NameTableError::Malformed));
        assert_eq!(NameTable::empty().encode(), [0x81, 0, 0]);
        assert!(ChunkList::decode(&golden).is_err(), "it is no list of chunks");
    }

    #[test]
    fn a_name_is_found_at_its_first_place() {
        let hash = PackHash::Sha1;
        let tables = [table(&[], hash), table(&[5, 6, 7], hash), table(&[6, 8], PackHash::Sha256), table(&[8, 6], hash)];
        let bases = NameBases::new(tables.clone(), hash, usize::MAX);
        let find = |bases: &NameBases, seed| bases.find(&name(seed, hash)).map(|found| (found.source, found.number, found.len));
        let expected = [Some((1, 0, 300)), Some((1, 1, 300)), Some((1, 2, 0)), Some((3, 0, 300)), None];
        assert_eq!([5, 6, 7, 8, 9].map(|seed| find(&bases, seed)), expected);
        assert_eq!(bases.named(3, 1, &name(6, hash)), Some(Named { source: 3, number: 1, len: 0 }));
        assert_eq!(
            (bases.named(3, 1, &name(7, hash)), bases.named(3, 2, &name(6, hash)), bases.named(9, 0, &name(6, hash))),
            (None, None, None)
        );
        // Over the limit a table keeps its number.
        assert_eq!(find(&NameBases::new(tables, hash, 2), 8), Some((3, 0, 300)));
        assert_eq!(find(&NameBases::default(), 5), None);
    }

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_the_same_bytes(lens in prop::collection::vec(any::<u8>(), 0..20), count in 0u8..4, hash in 0u8..2) {
            let bytes = [&[VERSION, hash, count][..], &lens, &[7; 8].repeat(usize::from(count))].concat();
            if let Ok(table) = NameTable::decode(&bytes) {
                prop_assert_eq!(table.encode(), bytes);
            }
        }
    }
}

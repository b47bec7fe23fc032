//! Pack tables: what a pack consists of, entry by entry, so that later packs can be described by it.
//!
//! As bytes: the version, the offset of the first entry, the number of entries (LEB128 both); per entry the number
//! `body length << 6 | header length` (LEB128) and the header; then per entry 16 bytes of BLAKE3 of the body, in the same
//! order. Of a header of more than 8 bytes, as of a delta that names its base by id, the first 8 bytes of its BLAKE3
//! stand for it. Entries follow each other without a gap, so offsets need not be said.
//!
//! A later part of a large body counts as an entry without a header.
//!
//! Invariants: a table that was decoded or built has at most [`PACK_ENTRIES_MAX`] entries, each with a body of 1 byte
//! to 1 MiB, and ends below 2⁶³.

use crate::chunk::short_digest;
use crate::pack_entry::BODY_BYTES_MAX;
use crate::varint;

/// Version of everything that decides how packs are cut and hashed; tables of another one are of no use.
pub const PACK_TABLE_VERSION: u8 = 1;

/// LIMIT: entries of one pack. A pack of more has no table: no later pack can be described by it.
pub const PACK_ENTRIES_MAX: usize = 1 << 24;

/// The entries of a pack, in order.
///
/// Memory: 16 bytes an entry for the digest, 6 to 7 for header and lengths (at most 12), a quarter for finding them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackTable {
    start: u64,
    /// Lengths and headers, as they are coded.
    records: Vec<u8>,
    digests: Vec<[u8; 16]>,
    /// Where every [`STRIDE`]th entry is.
    marks: Vec<Mark>,
    end: Mark,
}

/// Why bytes are not a pack table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PackTableError {
    /// A version that this one doesn't know.
    #[error("a pack table of version {0}")]
    Version(u8),
    /// The bytes end within the table or go on after it, or a number has an overlong coding.
    #[error("a pack table breaks off or is malformed")]
    Malformed,
    /// A body without bytes or of too many, or an offset beyond 2⁶³.
    #[error("a pack entry of impossible length")]
    Length,
    /// More than [`PACK_ENTRIES_MAX`].
    #[error("a pack table over the limit")]
    TooMany,
}

/// One entry of a table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PackEntry {
    /// Where in the pack the header starts.
    pub(crate) offset: u64,
    pub(crate) header: KeptHeader,
    pub(crate) body_len: usize,
    pub(crate) digest: [u8; 16],
    /// Where the entry after it is.
    pub(crate) next: Spot,
}

/// What a table keeps of a header, by which two can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KeptHeader {
    len: u8,
    /// The header, or the first bytes of its digest when it is longer; 0 behind a shorter one.
    bytes: [u8; HEADER_KEPT_MAX],
}

/// A place in a table from which entries can be read one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spot {
    number: u32,
    mark: Mark,
}

/// Where an entry is: in the table, and in the pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    offset: u64,
    at: u32,
}

impl KeptHeader {
    /// What is kept of `header`, of less than 64 bytes.
    pub(crate) fn of(header: &[u8]) -> KeptHeader {
        let digest;
        let kept = if header.len() <= HEADER_KEPT_MAX {
            header
        } else {
            digest = short_digest(header);
            &digest[..HEADER_KEPT_MAX]
        };
        KeptHeader::from_parts(header.len(), kept)
    }

    /// Bytes that the header has in the pack.
    pub(crate) fn len_bytes(self) -> usize {
        usize::from(self.len)
    }

    fn from_parts(len: usize, kept: &[u8]) -> KeptHeader {
        assert!(len < 1 << HEADER_LEN_BITS, "a header is that long at most");
        let mut bytes = [0; HEADER_KEPT_MAX];
        bytes[..kept.len()].copy_from_slice(kept);
        KeptHeader { len: len as u8, bytes }
    }

    fn kept(&self) -> &[u8] {
        &self.bytes[..self.len_bytes().min(HEADER_KEPT_MAX)]
    }
}

impl PackTable {
    /// The table of a pack without entries; it stands for one that can't be had.
    pub fn empty() -> PackTable {
        PackTable { start: 0, records: Vec::new(), digests: Vec::new(), marks: Vec::new(), end: Mark { offset: 0, at: 0 } }
    }

    /// How many entries the table has.
    pub fn entries(&self) -> usize {
        self.digests.len()
    }

    /// Bytes of memory that the table holds.
    pub fn memory_bytes(&self) -> usize {
        self.records.capacity() + self.digests.capacity() * 16 + self.marks.capacity() * size_of::<Mark>()
    }

    /// The table as bytes; 22 to 23 an entry.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(21 + self.records.len() + self.digests.len() * 16);
        out.push(PACK_TABLE_VERSION);
        varint::put(&mut out, self.start);
        varint::put(&mut out, self.digests.len() as u64);
        out.extend_from_slice(&self.records);
        out.extend_from_slice(self.digests.as_flattened());
        out
    }

    /// Reads all of `bytes` as a table; allocates little more than their length.
    ///
    /// # Errors
    /// [`PackTableError`]: anything that [`PackTable::encode`] doesn't produce.
    pub fn decode(bytes: &[u8]) -> Result<PackTable, PackTableError> {
        let (&version, mut rest) = bytes.split_first().ok_or(PackTableError::Malformed)?;
        if version != PACK_TABLE_VERSION {
            return Err(PackTableError::Version(version));
        }
        let start = varint::take(&mut rest).ok_or(PackTableError::Malformed)?;
        let entries = varint::take(&mut rest).ok_or(PackTableError::Malformed)?;
        let entries = usize::try_from(entries).ok().filter(|&entries| entries <= PACK_ENTRIES_MAX).ok_or(PackTableError::TooMany)?;
        let records_len = rest.len().checked_sub(entries * 16).ok_or(PackTableError::Malformed)?;
        let (records, digests) = rest.split_at(records_len);
        let mut table = PackTable::new(start)?;
        table.marks.reserve_exact(entries.div_ceil(STRIDE));
        let mut rest = records;
        for number in 0..entries {
            let (lens, _) = take_record(&mut rest).ok_or(PackTableError::Malformed)?;
            table.mark(number, &lens)?;
        }
        if !rest.is_empty() {
            return Err(PackTableError::Malformed);
        }
        table.records = records.to_vec();
        table.digests = digests.as_chunks().0.to_vec();
        Ok(table)
    }

    /// The digests of all entries, in order.
    pub(crate) fn digests(&self) -> &[[u8; 16]] {
        &self.digests
    }

    /// The place of the entry with this number, which exists. Cost: up to 63 entries are passed over.
    pub(crate) fn spot(&self, number: u32) -> Spot {
        let mark = number as usize / STRIDE;
        let mut spot = Spot { number: (mark * STRIDE) as u32, mark: self.marks[mark] };
        while spot.number < number {
            let record = Lens::take(&mut &self.records[spot.mark.at as usize..]).expect("records are checked when they are read");
            spot = Spot { number: spot.number + 1, mark: spot.mark.behind(&record) };
        }
        spot
    }

    /// The entry at `spot`; `None` at the end.
    pub(crate) fn entry(&self, spot: Spot) -> Option<PackEntry> {
        let digest = *self.digests.get(spot.number as usize)?;
        let mut rest = &self.records[spot.mark.at as usize..];
        let (lens, header) = take_record(&mut rest).expect("records are checked when they are read");
        let next = Spot { number: spot.number + 1, mark: spot.mark.behind(&lens) };
        Some(PackEntry { offset: spot.mark.offset, header, body_len: lens.body_len as usize, digest, next })
    }

    fn new(start: u64) -> Result<PackTable, PackTableError> {
        if start > OFFSET_MAX {
            return Err(PackTableError::Length);
        }
        Ok(PackTable { start, end: Mark { offset: start, at: 0 }, ..PackTable::empty() })
    }

    /// Counts the entry with this number.
    fn mark(&mut self, number: usize, lens: &Lens) -> Result<(), PackTableError> {
        let end = self.end.behind(lens);
        let fits = (1..=BODY_BYTES_MAX as u64).contains(&lens.body_len) && end.offset <= OFFSET_MAX;
        if !fits {
            return Err(PackTableError::Length);
        }
        if number.is_multiple_of(STRIDE) {
            self.marks.push(self.end);
        }
        self.end = end;
        Ok(())
    }
}

impl Mark {
    /// The place behind an entry that is here.
    fn behind(self, lens: &Lens) -> Mark {
        let offset = self.offset.saturating_add(lens.header_len as u64).saturating_add(lens.body_len);
        // 2²⁴ entries of at most 18 bytes fit 32 bits.
        Mark { offset, at: self.at + lens.record_len as u32 }
    }
}

/// Makes the table of a pack that is being cut.
#[derive(Debug, Default)]
pub(crate) struct PackTableBuilder {
    /// `None` before the first entry.
    table: Option<PackTable>,
    full: bool,
}

impl PackTableBuilder {
    /// Lists the entry at `offset`, which follows the one before. What is over a limit makes the table useless.
    pub(crate) fn push(&mut self, offset: u64, header: KeptHeader, body_len: usize, digest: [u8; 16]) {
        self.full = self.full || self.try_push(offset, header, body_len, digest).is_none();
        if self.full {
            self.table = None;
        }
    }

    /// The table of the entries; `None` when they were too many.
    pub(crate) fn finish(self) -> Option<PackTable> {
        if self.full {
            return None;
        }
        let mut table = self.table.unwrap_or_else(PackTable::empty);
        table.records.shrink_to_fit();
        table.digests.shrink_to_fit();
        table.marks.shrink_to_fit();
        Some(table)
    }

    fn try_push(&mut self, offset: u64, header: KeptHeader, body_len: usize, digest: [u8; 16]) -> Option<()> {
        if self.table.is_none() {
            self.table = PackTable::new(offset).ok();
        }
        let table = self.table.as_mut().filter(|table| table.digests.len() < PACK_ENTRIES_MAX)?;
        assert_eq!(table.end.offset, offset, "entries follow each other");
        let record_start = table.records.len();
        varint::put(&mut table.records, (body_len as u64) << HEADER_LEN_BITS | u64::from(header.len));
        table.records.extend_from_slice(header.kept());
        let record_len = table.records.len() - record_start;
        let lens = Lens { header_len: header.len_bytes(), body_len: body_len as u64, record_len };
        table.mark(table.digests.len(), &lens).ok()?;
        table.digests.push(digest);
        Some(())
    }
}

/// The lengths of an entry: of its parts in the pack, and as it is coded, without its digest.
struct Lens {
    header_len: usize,
    body_len: u64,
    record_len: usize,
}

impl Lens {
    /// Takes the lengths alone; what is kept of the header comes next.
    fn take(rest: &mut &[u8]) -> Option<Lens> {
        let before = rest.len();
        let lens = varint::take(rest)?;
        let header_len = (lens & ((1 << HEADER_LEN_BITS) - 1)) as usize;
        let record_len = before - rest.len() + header_len.min(HEADER_KEPT_MAX);
        Some(Lens { header_len, body_len: lens >> HEADER_LEN_BITS, record_len })
    }
}

/// Takes an entry, without its digest.
fn take_record(rest: &mut &[u8]) -> Option<(Lens, KeptHeader)> {
    let lens = Lens::take(rest)?;
    let (kept, after) = rest.split_at_checked(lens.header_len.min(HEADER_KEPT_MAX))?;
    *rest = after;
    let header = KeptHeader::from_parts(lens.header_len, kept);
    Some((lens, header))
}

/// A header is at most 63 bytes long.
const HEADER_LEN_BITS: u32 = 6;

/// A longer header is kept as a digest; those without the id of a base are seldom longer.
const HEADER_KEPT_MAX: usize = 8;

/// How many entries may have to be passed over to find one.
const STRIDE: usize = 64;

/// No pack ends beyond this.
const OFFSET_MAX: u64 = i64::MAX as u64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(start: u64, entries: &[(&[u8], usize, u8)]) -> PackTable {
        let mut builder = PackTableBuilder::default();
        let mut offset = start;
        for &(header, body_len, digest) in entries {
            builder.push(offset, KeptHeader::of(header), body_len, [digest; 16]);
            offset += (header.len() + body_len) as u64;
        }
        builder.finish().unwrap()
    }

    fn check(bytes: &[u8], expected: Result<usize, PackTableError>) {
        assert_eq!(PackTable::decode(bytes).map(|table| table.entries()), expected, "{bytes:02x?}");
    }

    #[test]
    fn tables_keep_their_bytes() {
        let table = table(12, &[(&[0x35], 3, 0xaa), (&[0x61, 0x04], 300, 0xbb), (&[], 1 << 20, 0xcc), (&[0x71; 21], 1, 0xdd)]);
        let mut golden = vec![1, 12, 4];
        golden.extend([0xc1, 0x01, 0x35]);
        golden.extend([0x82, 0x96, 0x01, 0x61, 0x04]);
        golden.extend([0x80, 0x80, 0x80, 0x20]);
        golden.extend([0x55, 0xc5, 0x6f, 0xc6, 0xef, 0x03, 0x7b, 0x28, 0x40]);
        for digest in [0xaa, 0xbb, 0xcc, 0xdd] {
            golden.extend([digest; 16]);
        }
        assert_eq!(table.encode(), golden);
        assert_eq!(PackTable::decode(&golden), Ok(table));
        for len in 0..golden.len() {
            assert!(PackTable::decode(&golden[..len]).is_err(), "{len} bytes");
        }
        golden.push(0);
        check(&golden, Err(PackTableError::Malformed));
        check(&[1, 0, 0], Ok(0));
        assert_eq!(PackTableBuilder::default().finish().unwrap().encode(), [1, 0, 0]);
    }

    #[test]
    fn impossible_tables_are_refused() {
        let one = |record: &[u8]| [&[1, 12, 1][..], record, &[0; 16]].concat();
        check(&one(&[0x40]), Ok(1));
        check(&one(&[0x00]), Err(PackTableError::Length));
        check(&one(&[0x41]), Err(PackTableError::Malformed));
        check(&one(&[0x40, 0x40]), Err(PackTableError::Malformed));
        check(&one(&[0xc0, 0x00]), Err(PackTableError::Malformed));
        check(&one(&[0xc0, 0x80, 0x80, 0x20]), Err(PackTableError::Length));
        check(&[0, 12, 0], Err(PackTableError::Version(0)));
        check(&[2], Err(PackTableError::Version(2)));
        check(&[1, 12, 0x81, 0x80, 0x80, 0x08], Err(PackTableError::TooMany));
        check(&[1, 12, 0xff, 0xff, 0xff, 0x07], Err(PackTableError::Malformed));
        check(&[&[1][..], &[0xff; 8], &[0x7f, 1, 0x40], &[0; 16]].concat(), Err(PackTableError::Length));
        check(&[&[1][..], &[0xff; 9], &[0x01, 0]].concat(), Err(PackTableError::Length));
    }

    #[test]
    fn headers_that_differ_are_kept_apart() {
        let headers: Vec<Vec<u8>> = (0..64).flat_map(|len| [vec![0; len], vec![1; len]]).collect();
        for (n, one) in headers.iter().enumerate().skip(1) {
            for other in &headers[..n] {
                assert_eq!(KeptHeader::of(one) == KeptHeader::of(other), one == other, "{one:?} {other:?}");
            }
        }
    }

    #[test]
    fn entries_are_found_by_their_number() {
        let headers: Vec<Vec<u8>> = (0..300).map(|n| vec![n as u8; n % 43]).collect();
        let entries: Vec<(&[u8], usize, u8)> = headers.iter().enumerate().map(|(n, header)| (&header[..], n * n + 1, n as u8)).collect();
        let table = table(12, &entries);
        let (mut offset, mut spot) = (12, table.spot(0));
        for (number, &(header, body_len, digest)) in entries.iter().enumerate() {
            assert_eq!(table.spot(number as u32), spot);
            let entry = table.entry(spot).unwrap();
            assert_eq!(
                (entry.offset, entry.header, entry.body_len, entry.digest),
                (offset, KeptHeader::of(header), body_len, [digest; 16])
            );
            offset += (header.len() + body_len) as u64;
            spot = entry.next;
        }
        assert!(table.entry(spot).is_none());
        assert!(table.memory_bytes() >= table.encode().len());
    }

    #[test]
    fn too_many_entries_have_no_table() {
        let mut builder = PackTableBuilder::default();
        (0..PACK_ENTRIES_MAX as u64).for_each(|offset| builder.push(offset, KeptHeader::of(&[]), 1, [0; 16]));
        assert!(!builder.full);
        builder.push(PACK_ENTRIES_MAX as u64, KeptHeader::of(&[]), 1, [0; 16]);
        builder.push(PACK_ENTRIES_MAX as u64 + 9, KeptHeader::of(&[]), 1, [0; 16]);
        assert_eq!(builder.finish(), None);
    }

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_the_same_bytes(records in prop::collection::vec(any::<u8>(), 0..60), count in 0u8..4) {
            let bytes = [&[1, 12, count][..], &records, &[7; 16].repeat(usize::from(count))].concat();
            for bytes in [&bytes[..], &records] {
                if let Ok(table) = PackTable::decode(bytes) {
                    prop_assert_eq!(table.encode(), bytes);
                    (0..table.entries()).for_each(|number| assert!(table.entry(table.spot(number as u32)).is_some()));
                }
            }
        }
    }
}

//! Pack bases: the packs that the standby has, searchable by the body of an entry.
//!
//! All packs of a family are searched at once, so that a search costs the same for one pack as for hundreds. Digests
//! are spread evenly, so entries are grouped by their first bits, about eight to a group, each group sorted.
//!
//! Invariant: of equal bodies only the first is found, by the number of its pack and by its place there.

use crate::pack_table::{PackEntry, PackTable, Spot};

/// LIMIT: packs that one can be described by; the tables of more are not searched.
pub const SOURCES_MAX: usize = 4_096;

/// The packs that the standby has, each known by its number.
///
/// Memory: the tables, and 4.5 bytes an entry: about 27 in all, 33 at most. What makes it needs little more.
#[derive(Debug, Default)]
pub struct PackBases {
    tables: Vec<PackTable>,
    /// The number that the first entry of each table has among all.
    firsts: Vec<u32>,
    /// Where in `order` each group starts, and where the last ends.
    groups: Vec<u32>,
    /// The entries of each group by digest, without repetitions.
    order: Vec<u32>,
}

/// A place in one of the packs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) source: u16,
    spot: Spot,
}

/// An entry that the standby has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found {
    pub(crate) source: u16,
    pub(crate) entry: PackEntry,
}

impl Found {
    /// The place after the entry.
    pub(crate) fn next(&self) -> Place {
        Place { source: self.source, spot: self.entry.next }
    }
}

impl PackBases {
    /// Makes `tables` searchable; the position of each is its source number, so the most useful come first.
    ///
    /// LIMIT: a table that would make it more than `entries_max`, or of more than [`SOURCES_MAX`] packs, is let go as soon
    /// as `tables` gives it, but keeps its number: with the limit, and one table, memory is bounded however large a
    /// family is. What only that pack has is sent.
    ///
    /// Cost: two passes over the digests, and sorting within groups; 1 to 4 seconds for 10 million entries.
    pub fn new(tables: impl IntoIterator<Item = PackTable>, entries_max: usize) -> PackBases {
        let entries_max = entries_max.min(u32::MAX as usize);
        let mut entries = 0;
        let (mut kept, mut firsts) = (Vec::new(), Vec::new());
        for table in tables.into_iter().take(SOURCES_MAX) {
            firsts.push(entries as u32);
            kept.push(if entries + table.entries() <= entries_max { table } else { PackTable::empty() });
            entries += kept[firsts.len() - 1].entries();
        }
        let mut bases = PackBases { tables: kept, firsts, groups: Vec::new(), order: Vec::new() };
        bases.group(entries);
        bases
    }

    /// Bytes of memory that is held.
    pub fn memory_bytes(&self) -> usize {
        let tables: usize = self.tables.iter().map(PackTable::memory_bytes).sum();
        tables + 4 * (self.firsts.capacity() + self.groups.capacity() + self.order.capacity())
    }

    /// How many entries of all packs are searched.
    pub fn entries(&self) -> usize {
        self.tables.iter().map(PackTable::entries).sum()
    }

    /// The first entry with this body.
    pub(crate) fn find(&self, body_len: usize, digest: [u8; 16]) -> Option<Found> {
        let group = group_of(digest, self.groups.len().checked_sub(1)?);
        let order = &self.order[self.groups[group] as usize..self.groups[group + 1] as usize];
        let at = order.binary_search_by_key(&digest, |&number| self.digest(number)).ok()?;
        let (source, number) = self.split(order[at]);
        let spot = self.tables[source].spot(number);
        self.at(Place { source: source as u16, spot }).filter(|found| found.entry.body_len == body_len)
    }

    /// The entry at `place`; `None` at the end of a pack.
    pub(crate) fn at(&self, place: Place) -> Option<Found> {
        let entry = self.tables[usize::from(place.source)].entry(place.spot)?;
        Some(Found { source: place.source, entry })
    }

    /// Sorts all entries into groups by counting, then each group.
    fn group(&mut self, entries: usize) {
        let groups = entries.div_ceil(GROUP_ENTRIES).max(1);
        let mut ends = vec![0u32; groups + 1];
        let digests = || self.tables.iter().flat_map(PackTable::digests);
        digests().for_each(|&digest| ends[group_of(digest, groups)] += 1);
        let mut end = 0;
        for count in &mut ends {
            end += *count;
            *count = end;
        }
        let mut order = vec![0u32; entries];
        // Filled from behind, each end becomes the start of its group.
        for (number, &digest) in (0..entries as u32).rev().zip(digests().rev()) {
            let place = &mut ends[group_of(digest, groups)];
            *place -= 1;
            order[*place as usize] = number;
        }
        let (mut kept, mut group_digests) = (0, Vec::new());
        for group in 0..groups {
            let (start, end) = (ends[group] as usize, ends[group + 1] as usize);
            // Digests lie far apart, so each is fetched only once.
            group_digests.extend(order[start..end].iter().map(|&number| (self.digest(number), number)));
            group_digests.sort_unstable();
            group_digests.dedup_by_key(|(digest, _)| *digest);
            ends[group] = kept as u32;
            for (_, number) in group_digests.drain(..) {
                order[kept] = number;
                kept += 1;
            }
        }
        ends[groups] = kept as u32;
        order.truncate(kept);
        order.shrink_to_fit();
        (self.groups, self.order) = (ends, order);
    }

    fn digest(&self, number: u32) -> [u8; 16] {
        let (source, number) = self.split(number);
        self.tables[source].digests()[number as usize]
    }

    /// The table, and the number within it, of an entry's number among all.
    fn split(&self, number: u32) -> (usize, u32) {
        // Of tables that start at the same entry all but the last are empty.
        let source = self.firsts.partition_point(|&first| first <= number) - 1;
        (source, number - self.firsts[source])
    }
}

fn group_of(digest: [u8; 16], groups: usize) -> usize {
    let front = u64::from(u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]));
    ((front * groups as u64) >> 32) as usize
}

/// How many entries share a group, about.
const GROUP_ENTRIES: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::short_digest;
    use crate::pack_table::{KeptHeader, PackTableBuilder};

    /// A table of bodies that are each known by a number and as long as that.
    fn table(bodies: &[usize]) -> PackTable {
        let mut builder = PackTableBuilder::default();
        let mut offset = 12;
        for &body in bodies {
            builder.push(offset, KeptHeader::of(&[1]), body, short_digest(&body.to_le_bytes()));
            offset += 1 + body as u64;
        }
        builder.finish().unwrap()
    }

    fn find(bases: &PackBases, body: usize) -> Option<(u16, u64)> {
        bases.find(body, short_digest(&body.to_le_bytes())).map(|found| (found.source, found.entry.offset))
    }

    #[test]
    fn the_first_of_equal_bodies_is_found() {
        let bases = PackBases::new([table(&[]), table(&[5, 6, 5]), table(&[]), table(&[7, 5, 8])], usize::MAX);
        assert_eq!([5, 6, 7, 8, 9].map(|body| find(&bases, body)), [Some((1, 12)), Some((1, 18)), Some((3, 12)), Some((3, 26)), None]);
        assert!(bases.find(6, short_digest(&5usize.to_le_bytes())).is_none(), "of another length");
        assert_eq!(find(&PackBases::new([], usize::MAX), 5), None);
        assert_eq!(find(&PackBases::new([table(&[])], usize::MAX), 5), None);
        assert_eq!(find(&PackBases::default(), 5), None);
    }

    #[test]
    fn every_entry_is_found_and_goes_on_to_the_next() {
        let all: Vec<usize> = (1..=1000).collect();
        let bases = PackBases::new(all.chunks(77).map(table), usize::MAX);
        assert_eq!(bases.entries(), 1000);
        for (body, after) in all.iter().zip(&all[1..]) {
            let found = bases.find(*body, short_digest(&body.to_le_bytes())).unwrap();
            let next = bases.at(found.next());
            assert_eq!(next.is_none(), body % 77 == 0, "at the end of a pack");
            next.iter().for_each(|next| assert_eq!((next.entry.body_len, next.source), (*after, found.source)));
        }
        assert_eq!(find(&bases, 1001), None);
    }

    #[test]
    fn many_equal_bodies_are_one() {
        let bases = PackBases::new([table(&[3; 5000]), table(&[4])], usize::MAX);
        assert_eq!((find(&bases, 3), find(&bases, 4), bases.order.len()), (Some((0, 12)), Some((1, 12)), 2));
    }

    #[test]
    fn tables_over_the_limit_keep_their_numbers() {
        let bases = PackBases::new([table(&[1, 2]), table(&[3, 4]), table(&[5])], 3);
        assert_eq!([1, 3, 5].map(|body| find(&bases, body)), [Some((0, 12)), None, Some((2, 12))]);
    }

    /// `cargo test --release -p coldspare-delta -- --ignored --nocapture ten_million`
    #[test]
    #[ignore = "prints figures, claims nothing"]
    #[expect(clippy::disallowed_methods, reason = "a stopwatch around pure work")]
    fn ten_million_entries() {
        let mut builder = PackTableBuilder::default();
        let mut offset = 12;
        for number in 0..10_000_000u64 {
            let header = &[0xe5, 0x1a, 0x95, 0x80, 0x33][..2 + number as usize % 4];
            let body_len = 40 + number as usize % 1500;
            builder.push(offset, KeptHeader::of(header), body_len, short_digest(&number.to_le_bytes()));
            offset += (header.len() + body_len) as u64;
        }
        let bytes = builder.finish().unwrap().encode();
        let start = std::time::Instant::now();
        let table = PackTable::decode(&bytes).unwrap();
        let decoded = start.elapsed();
        let bases = PackBases::new([table], usize::MAX);
        let searchable = start.elapsed();
        let found = (0..1_000_000u64).filter(|n| bases.find(40, short_digest(&(n * 1500).to_le_bytes())).is_some()).count();
        let per_find_ns = (start.elapsed() - searchable).as_nanos() / 1_000_000;
        assert_eq!(found, 6667);
        let per_entry = |bytes: usize| bytes as f64 / 1e7;
        println!(
            "{:.1} bytes an entry, {:.1} in memory; decoded in {decoded:.1?}, searchable after {searchable:.1?}, {per_find_ns} ns a search",
            per_entry(bytes.len()),
            per_entry(bases.memory_bytes()),
        );
    }
}

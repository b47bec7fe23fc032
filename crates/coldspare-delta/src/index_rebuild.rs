//! Rebuild of an index: from its recipe, the indexes that the standby has, and the pack itself.
//!
//! Names and lengths come from the recipe and the other indexes; the lengths say where the entries of the pack start, and
//! one pass over the pack gives the CRC-32 of each, and the checksum at its end. It knows nothing of files.
//!
//! Nothing tells here whether the result is right: whoever writes it compares it with its digest.

use crate::index_file::{IndexFile, IndexParts};
use crate::index_recipe::{IndexRecipe, Names};
use crate::pack_index::{PACK_HEADER_BYTES, PackHash};

/// An index that is being made, until all the names are there.
///
/// [`take_base`](IndexRebuild::take_base) each index that the recipe names, in any order, then
/// [`walk`](IndexRebuild::walk) over the pack. Memory: name and 8 bytes an object; of the recipe 12 bytes a run.
#[derive(Debug)]
pub struct IndexRebuild {
    recipe: IndexRecipe,
    /// In the order of the pack.
    names: Vec<u8>,
    /// As far as the bases say.
    lens: Vec<u64>,
    /// Runs of entries of other indexes, by index.
    runs: Vec<Placed>,
    /// How many objects have no name yet.
    missing: usize,
}

/// A run of entries of another index, and where they are in the pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Placed {
    source: u16,
    /// The number of the first in the pack.
    at: u32,
    /// The number of the first in the other pack.
    first: u32,
    count: u32,
}

/// An index that is being made while its pack is read.
///
/// Memory: name and 20 bytes an object.
#[derive(Debug)]
pub struct PackWalk {
    hash: PackHash,
    names: Vec<u8>,
    offsets: Vec<u64>,
    crcs: Vec<u32>,
    crc: crc32fast::Hasher,
    /// How much of the pack was read.
    at: u64,
    pack_bytes: u64,
    pack_checksum: Vec<u8>,
}

/// An index that was made.
#[derive(Debug)]
pub struct RebuiltIndex {
    walk: PackWalk,
    /// The numbers of the objects by name.
    by_name: Vec<u32>,
}

/// Why an index can't be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IndexRebuildError {
    /// The recipe takes names from an index that wasn't given, that has fewer, or that is of another hash.
    #[error("an index that names are to be taken from isn't the one that is meant")]
    Base,
    /// The lengths of the entries don't make a pack of that size.
    #[error("a pack of another size than its index is to be of")]
    Pack,
}

impl IndexRebuild {
    /// Begins with the names that the recipe brings.
    pub fn new(recipe: IndexRecipe) -> IndexRebuild {
        let hash_bytes = recipe.hash.bytes();
        let mut names = vec![0; recipe.objects * hash_bytes];
        let (mut runs, mut rest, mut at, mut missing) = (Vec::new(), &recipe.names[..], 0usize, 0);
        for run in &recipe.runs {
            let count = run.count as usize;
            match run.from {
                Names::Recipe => {
                    let (own, after) = rest.split_at(count * hash_bytes);
                    names[at * hash_bytes..][..own.len()].copy_from_slice(own);
                    rest = after;
                }
                Names::Index { source, first } => {
                    runs.push(Placed { source, at: at as u32, first, count: run.count });
                    missing += count;
                }
            }
            at += count;
        }
        runs.sort_unstable();
        let lens = vec![0; recipe.objects];
        IndexRebuild { recipe, names, lens, runs, missing }
    }

    /// Takes the names, and the lengths of the entries, that the recipe takes from the index of this number.
    ///
    /// # Errors
    /// `Base`: it has fewer entries, or is of another hash.
    pub fn take_base(&mut self, source: u16, index: &IndexFile<'_>) -> Result<(), IndexRebuildError> {
        if index.hash() != self.recipe.hash {
            return Err(IndexRebuildError::Base);
        }
        let hash_bytes = self.recipe.hash.bytes();
        let start = self.runs.partition_point(|run| run.source < source);
        let end = self.runs.partition_point(|run| run.source <= source);
        for Placed { at, first, count, .. } in self.runs.drain(start..end) {
            let (at, first, count) = (at as usize, first as usize, count as usize);
            if first + count > index.objects() {
                return Err(IndexRebuildError::Base);
            }
            for number in 0..count {
                self.names[(at + number) * hash_bytes..][..hash_bytes].copy_from_slice(index.name(first + number));
                self.lens[at + number] = index.len(first + number);
            }
            self.missing -= count;
        }
        Ok(())
    }

    /// Goes on with the pack, which has so many bytes, now that all the names are there.
    ///
    /// # Errors
    /// `Base`: names are missing. `Pack`: no pack of that size has such entries.
    pub fn walk(self, pack_bytes: u64) -> Result<PackWalk, IndexRebuildError> {
        if self.missing > 0 {
            return Err(IndexRebuildError::Base);
        }
        let IndexRebuild { recipe, names, mut lens, .. } = self;
        for (number, longer) in recipe.differences() {
            lens[number] = lens[number].checked_add_signed(longer).ok_or(IndexRebuildError::Pack)?;
        }
        // Each length makes room for the offset that it leads to.
        let mut next = PACK_HEADER_BYTES;
        let entries_end = pack_bytes.checked_sub(recipe.hash.bytes() as u64).ok_or(IndexRebuildError::Pack)?;
        let last = lens.len().saturating_sub(1);
        for (number, len) in lens.iter_mut().enumerate() {
            let offset = next;
            if number < last {
                next = offset.checked_add(*len).filter(|&next| next > offset).ok_or(IndexRebuildError::Pack)?;
            }
            *len = offset;
        }
        let fits = if lens.is_empty() { entries_end >= next } else { entries_end > next };
        if !fits {
            return Err(IndexRebuildError::Pack);
        }
        Ok(PackWalk {
            hash: recipe.hash,
            names,
            crcs: Vec::with_capacity(lens.len()),
            offsets: lens,
            crc: crc32fast::Hasher::new(),
            at: 0,
            pack_bytes,
            pack_checksum: Vec::new(),
        })
    }
}

impl PackWalk {
    /// Takes the next bytes of the pack, from its front on.
    pub fn push(&mut self, mut bytes: &[u8]) {
        let entries_end = self.pack_bytes - self.hash.bytes() as u64;
        while !bytes.is_empty() {
            let next = self.crcs.len();
            // Up to the first entry, then entry by entry, then the checksum.
            let (start, end) = match self.offsets.get(next) {
                Some(&start) if self.at < start => (start, start),
                Some(&start) => (start, self.offsets.get(next + 1).copied().unwrap_or(entries_end)),
                None => (u64::MAX, if self.at < entries_end { entries_end } else { u64::MAX }),
            };
            let len = usize::try_from(end - self.at).unwrap_or(usize::MAX).min(bytes.len());
            let (part, rest) = bytes.split_at(len);
            let is_entry = self.at >= start;
            if is_entry {
                self.crc.update(part);
            } else if self.at >= entries_end && self.pack_checksum.len() < self.hash.bytes() {
                self.pack_checksum.extend_from_slice(&part[..part.len().min(self.hash.bytes() - self.pack_checksum.len())]);
            }
            self.at += len as u64;
            bytes = rest;
            if is_entry && self.at == end {
                self.crcs.push(std::mem::take(&mut self.crc).finalize());
            }
        }
    }

    /// The index, now that all of the pack was pushed.
    ///
    /// Cost: sorts the names.
    ///
    /// # Errors
    /// `Pack`: other bytes came than those of a pack of that size.
    pub fn finish(self) -> Result<RebuiltIndex, IndexRebuildError> {
        if self.at != self.pack_bytes || self.crcs.len() != self.offsets.len() || self.pack_checksum.len() != self.hash.bytes() {
            return Err(IndexRebuildError::Pack);
        }
        let hash_bytes = self.hash.bytes();
        let name = |number: u32| &self.names[number as usize * hash_bytes..][..hash_bytes];
        let mut by_name: Vec<u32> = (0..self.offsets.len() as u32).collect();
        by_name.sort_unstable_by(|&one, &other| name(one).cmp(name(other)));
        Ok(RebuiltIndex { walk: self, by_name })
    }
}

impl RebuiltIndex {
    /// Gives `write` the index, in parts.
    ///
    /// # Errors
    /// Those of `write`.
    pub fn write<E>(&self, write: &mut dyn FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let PackWalk { hash, names, offsets, crcs, pack_checksum, .. } = &self.walk;
        IndexParts { hash: *hash, names, crcs, offsets, by_name: &self.by_name, pack_checksum }.write(write)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::index_file::tests::{index_of, name, written};
    use crate::index_names::{NameBases, NameTable};
    use crate::noise::noise;

    /// A pack of these objects, each a seed and the length of its entry, and the index of it.
    fn pack(objects: &[(u64, usize)], hash: PackHash) -> (Vec<u8>, Vec<u8>) {
        let mut pack = vec![1; PACK_HEADER_BYTES as usize];
        let (mut entries, mut crcs) = (Vec::new(), Vec::new());
        for &(seed, len) in objects {
            entries.push((name(seed, hash), pack.len() as u64));
            let body = noise(seed + 1000, len);
            crcs.push(crc32fast::hash(&body));
            pack.extend(body);
        }
        let checksum = noise(7777, hash.bytes());
        pack.extend(&checksum);
        let names: Vec<u8> = entries.iter().flat_map(|(name, _)| name.clone()).collect();
        let offsets: Vec<u64> = entries.iter().map(|(_, offset)| *offset).collect();
        let mut by_name: Vec<u32> = (0..entries.len() as u32).collect();
        by_name.sort_by_key(|&number| &entries[number as usize].0);
        let parts = IndexParts { hash, names: &names, crcs: &crcs, offsets: &offsets, by_name: &by_name, pack_checksum: &checksum };
        (pack, written(|write| parts.write::<()>(write)))
    }

    fn rebuilt(bytes: &[u8], bases: &[&[u8]], pack: &[u8], window: usize) -> Result<Vec<u8>, IndexRebuildError> {
        let mut rebuild = IndexRebuild::new(IndexRecipe::decode(bytes).unwrap());
        for (number, base) in bases.iter().enumerate() {
            rebuild.take_base(number as u16, &IndexFile::parse(base).unwrap())?;
        }
        let mut walk = rebuild.walk(pack.len() as u64)?;
        pack.chunks(window).for_each(|part| walk.push(part));
        let index = walk.finish()?;
        Ok(written(|write| index.write::<()>(write)))
    }

    /// Describes the pack of `new` by those of `old` and makes its index from that; returns the bytes that it takes.
    fn check(old: &[&[(u64, usize)]], new: &[(u64, usize)], hash: PackHash) -> usize {
        let old: Vec<Vec<u8>> = old.iter().map(|objects| pack(objects, hash).1).collect();
        let tables = old.iter().map(|index| NameTable::of(&IndexFile::parse(index).unwrap()).unwrap());
        let tables = tables.map(|table| NameTable::decode(&table.encode()).unwrap());
        let bases = NameBases::new(tables, hash, usize::MAX);
        let (pack, index) = pack(new, hash);
        let parsed = IndexFile::parse(&index).unwrap();
        assert!(parsed.is_as_written());
        let (recipe, used) = IndexRecipe::of(&parsed, &bases).unwrap();
        let bytes = recipe.encode();
        assert_eq!(IndexRecipe::decode(&bytes).as_ref(), Ok(&recipe));
        assert_eq!(recipe.sources(), used.len());
        let used: Vec<&[u8]> = used.iter().map(|&number| &old[usize::from(number)][..]).collect();
        for window in [1, 7, 1 << 20] {
            assert!(rebuilt(&bytes, &used, &pack, window).as_ref() == Ok(&index), "another index came about");
        }
        bytes.len()
    }

    const SHA1: PackHash = PackHash::Sha1;

    #[test]
    fn what_moved_as_it_was_costs_next_to_nothing() {
        let old: Vec<(u64, usize)> = (1..400).map(|seed| (seed, 30 + seed as usize % 90)).collect();
        for hash in [SHA1, PackHash::Sha256] {
            assert!(check(&[&old[..150], &old[150..]], &old, hash) < 20);
            assert!(check(&[&old], &old[100..], hash) < 20);
        }
        // The last entry of an old pack is as long as nobody knows; what is new brings its name.
        assert!(check(&[&old[..150], &old[160..]], &old, SHA1) < 20 + 10 * 23);
        assert!(check(&[], &old, SHA1) < 399 * 23 + 10);
    }

    #[test]
    fn the_smallest_packs_have_an_index_too() {
        for new in [&[][..], &[(1, 1)], &[(1, 40), (2, 1)]] {
            check(&[], new, SHA1);
            check(&[&[(2, 9), (1, 9)]], new, PackHash::Sha256);
        }
    }

    #[test]
    fn what_does_not_fit_makes_no_index() {
        let old = [(1, 40), (2, 50), (3, 60)];
        let new = [(1, 40), (2, 52), (3, 60), (4, 70)];
        let old_index = pack(&old, SHA1).1;
        let (pack_bytes, index) = pack(&new, SHA1);
        let bases = NameBases::new([NameTable::of(&IndexFile::parse(&old_index).unwrap()).unwrap()], SHA1, usize::MAX);
        let recipe = IndexRecipe::of(&IndexFile::parse(&index).unwrap(), &bases).unwrap().0.encode();
        assert_eq!(rebuilt(&recipe, &[&old_index], &pack_bytes, 9), Ok(index));
        assert_eq!(rebuilt(&recipe, &[], &pack_bytes, 9), Err(IndexRebuildError::Base));
        let fewer = pack(&old[..2], SHA1).1;
        assert_eq!(rebuilt(&recipe, &[&fewer], &pack_bytes, 9), Err(IndexRebuildError::Base));
        let other_hash = pack(&old, PackHash::Sha256).1;
        assert_eq!(rebuilt(&recipe, &[&other_hash], &pack_bytes, 9), Err(IndexRebuildError::Base));
        for len in [0, 19, 12 + 40 + 52 + 60 + 20] {
            assert_eq!(rebuilt(&recipe, &[&old_index], &pack_bytes[..len], 9), Err(IndexRebuildError::Pack), "a pack of {len}");
        }
        let mut walk = IndexRebuild::new(IndexRecipe::decode(&[0, 0, 0, 0]).unwrap()).walk(32).unwrap();
        walk.push(&[0; 31]);
        assert!(walk.finish().is_err(), "less came");
        let shrunk = index_of(&[(name(1, SHA1), 12), (name(2, SHA1), 13), (name(3, SHA1), 14)], SHA1);
        let longer = IndexRecipe::decode(&[0, 3, 1, 0x0d, 2, 0, 3]).unwrap(); // the first by 2 less
        let mut rebuild = IndexRebuild::new(longer);
        rebuild.take_base(0, &IndexFile::parse(&shrunk).unwrap()).unwrap();
        assert!(matches!(rebuild.walk(100), Err(IndexRebuildError::Pack)), "an entry of less than nothing");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn any_repack_has_its_index(
            packs in prop::collection::vec(prop::collection::vec((1u64..60, 1usize..200), 0..30), 0..5),
            new in prop::collection::vec((1u64..90, 1usize..200), 0..60),
            moved in 0usize..3,
            is_long: bool,
        ) {
            let distinct = |objects: &Vec<(u64, usize)>| {
                let mut seen = std::collections::BTreeSet::new();
                objects.iter().copied().filter(|(seed, _)| seen.insert(*seed)).collect::<Vec<_>>()
            };
            let old: Vec<Vec<(u64, usize)>> = packs.iter().map(distinct).collect();
            // Some packs as they are, then what is mixed.
            let new: Vec<(u64, usize)> = old.iter().take(moved).flatten().copied().chain(new).collect();
            let old: Vec<&[(u64, usize)]> = old.iter().map(|objects| &objects[..]).collect();
            check(&old, &distinct(&new), if is_long { PackHash::Sha256 } else { SHA1 });
        }
    }
}

//! Recipes: where a standby finds the names of a pack's objects, and how long its entries are.
//!
//! A repack writes objects of old packs into a new one, many of them in the order that they had. So a recipe is runs: from
//! this entry of that index on, so many entries; and the names themselves of what no index has. An entry is mostly as long as
//! it was, but for a few bytes of its header.
//!
//! As bytes: the hash (0 SHA-1, 1 SHA-256); how many objects; then length and bytes of the runs, length and bytes of the
//! differences, and the names. A run is a number `count << 2 | kind`. Kind 0: names that follow; 1: entries of the index that
//! the last run was of, at first index 0, where that ended; 2: of the same index, followed by how far from there they start
//! (zigzag); 3: of another index, followed by its number, and by how far they start from where the last run of it ended
//! (zigzag). A difference is how many entries are as long as expected, then by how much the next one is longer (zigzag, not 0).
//! Expected is the length in the index, and 0 of what has none, and of the last entry of an index. The last length isn't said.
//! All numbers are LEB128.
//!
//! Invariants: a recipe that was decoded has at most [`INDEX_OBJECTS_MAX`] objects, runs that cover each of them once, and
//! as many names as those ask for. Equal recipes are equal bytes.

use crate::index_file::{INDEX_OBJECTS_MAX, IndexFile};
use crate::index_names::NameBases;
use crate::pack_base::SOURCES_MAX;
use crate::pack_index::PackHash;
use crate::varint;

/// How an index is made from others and from its pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexRecipe {
    pub(crate) hash: PackHash,
    pub(crate) objects: usize,
    pub(crate) runs: Vec<Run>,
    /// As they are coded.
    differences: Vec<u8>,
    /// Of what no index has, joined.
    pub(crate) names: Vec<u8>,
}

/// Entries that follow each other in the pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) from: Names,
    pub(crate) count: u32,
}

/// Where their names are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Names {
    /// The next of the recipe.
    Recipe,
    /// From this entry on in the index of this number.
    Index { source: u16, first: u32 },
}

/// Why bytes are not a recipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IndexRecipeError {
    /// The bytes end within the recipe or go on after it, or a number has another coding than its own.
    #[error("a recipe of an index breaks off or is malformed")]
    Malformed,
    /// More than [`INDEX_OBJECTS_MAX`] objects, or an index beyond [`SOURCES_MAX`].
    #[error("a recipe of an index over the limit")]
    TooMany,
}

impl IndexRecipe {
    /// The recipe of `index`, with the numbers of the bases that it takes names from, in the order of the numbers that it
    /// gives them; `None` for an index that it can't tell.
    ///
    /// Cost: a search for each entry that doesn't follow the one before it in its base too.
    pub fn of(index: &IndexFile<'_>, bases: &NameBases) -> Option<(IndexRecipe, Vec<u16>)> {
        if !index.starts_at_the_front() {
            return None;
        }
        let objects = index.objects();
        let mut recipe = IndexRecipe { hash: index.hash(), objects, runs: Vec::new(), differences: Vec::new(), names: Vec::new() };
        let mut used: Vec<u16> = Vec::new();
        let mut numbers: Vec<Option<u16>> = Vec::new();
        let mut differences = Differences::default();
        let mut last: Option<(u16, u32)> = None;
        for number in 0..objects {
            let name = index.name(number);
            let follows = last.and_then(|(source, number)| bases.named(source, number + 1, name));
            let found = follows.or_else(|| bases.find(name));
            last = found.map(|found| (found.source, found.number));
            let from = match found {
                None => {
                    recipe.names.extend_from_slice(name);
                    Names::Recipe
                }
                Some(found) => {
                    let slot = usize::from(found.source);
                    numbers.resize(numbers.len().max(slot + 1), None);
                    let source = *numbers[slot].get_or_insert_with(|| {
                        used.push(found.source);
                        (used.len() - 1) as u16
                    });
                    Names::Index { source, first: found.number }
                }
            };
            match recipe.runs.last_mut() {
                Some(run) if run.goes_on_with(from) => run.count += 1,
                _ => recipe.runs.push(Run { from, count: 1 }),
            }
            if number + 1 < objects {
                let expected = found.map_or(0, |found| found.len);
                differences.push(i64::try_from(index.len(number)).ok()? - expected.cast_signed(), &mut recipe.differences);
            }
        }
        Some((recipe, used))
    }

    /// How many objects the index has.
    pub fn objects(&self) -> usize {
        self.objects
    }

    /// The hash of the repository.
    pub fn hash(&self) -> PackHash {
        self.hash
    }

    /// How many indexes it takes names from: the highest number, and 1.
    pub fn sources(&self) -> usize {
        let number = |run: &Run| if let Names::Index { source, .. } = run.from { usize::from(source) + 1 } else { 0 };
        self.runs.iter().map(number).max().unwrap_or(0)
    }

    /// The recipe as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut runs = Vec::with_capacity(self.runs.len() * 4);
        let mut expected = Expected::default();
        for &Run { from, count } in &self.runs {
            let count = u64::from(count) << KIND_BITS;
            match from {
                Names::Recipe => varint::put(&mut runs, count | KIND_NAMES),
                Names::Index { source, first } => {
                    let (is_same, at) = (source == expected.source, *expected.of(source));
                    let away = varint::zigzag(i64::from(first) - i64::from(at));
                    let kind = match (is_same, away) {
                        (true, 0) => KIND_NEXT,
                        (true, _) => KIND_SAME,
                        (false, _) => KIND_OTHER,
                    };
                    varint::put(&mut runs, count | kind);
                    if !is_same {
                        varint::put(&mut runs, u64::from(source));
                    }
                    if !is_same || away != 0 {
                        varint::put(&mut runs, away);
                    }
                    *expected.of(source) = first + (count >> KIND_BITS) as u32;
                }
            }
        }
        let mut out = vec![u8::from(self.hash == PackHash::Sha256)];
        varint::put(&mut out, self.objects as u64);
        for part in [&runs, &self.differences] {
            varint::put(&mut out, part.len() as u64);
            out.extend_from_slice(part);
        }
        out.extend_from_slice(&self.names);
        out
    }

    /// Reads all of `bytes` as a recipe; allocates at most 13 times their length.
    ///
    /// # Errors
    /// [`IndexRecipeError`]: anything that [`IndexRecipe::encode`] doesn't produce.
    pub fn decode(bytes: &[u8]) -> Result<IndexRecipe, IndexRecipeError> {
        let malformed = IndexRecipeError::Malformed;
        let (hash, mut rest) = match bytes {
            [0, rest @ ..] => (PackHash::Sha1, rest),
            [1, rest @ ..] => (PackHash::Sha256, rest),
            _ => return Err(malformed),
        };
        let objects = varint::take(&mut rest).ok_or(malformed)?;
        let objects = usize::try_from(objects).ok().filter(|&objects| objects <= INDEX_OBJECTS_MAX).ok_or(IndexRecipeError::TooMany)?;
        let mut part = || {
            let len = varint::take(&mut rest).and_then(|len| usize::try_from(len).ok())?;
            let (part, after) = rest.split_at_checked(len)?;
            rest = after;
            Some(part)
        };
        let (runs, differences) = (part().ok_or(malformed)?, part().ok_or(malformed)?);
        let runs = decode_runs(runs, objects)?;
        if !is_differences(differences, objects.saturating_sub(1)) {
            return Err(malformed);
        }
        let named: usize = runs.iter().filter(|run| run.from == Names::Recipe).map(|run| run.count as usize).sum();
        if rest.len() != named * hash.bytes() {
            return Err(malformed);
        }
        Ok(IndexRecipe { hash, objects, runs, differences: differences.to_vec(), names: rest.to_vec() })
    }

    /// The entries that are not as long as expected: their numbers, rising, and by how much each is longer.
    pub(crate) fn differences(&self) -> impl Iterator<Item = (usize, i64)> {
        let mut rest = &self.differences[..];
        let mut next = 0;
        std::iter::from_fn(move || {
            let same = varint::take(&mut rest)? as usize;
            let longer = varint::unzigzag(varint::take(&mut rest)?);
            next += same + 1;
            Some((next - 1, longer))
        })
    }
}

impl Run {
    /// Whether an entry named by `from` is the next one of this run.
    fn goes_on_with(&self, from: Names) -> bool {
        match (self.from, from) {
            (Names::Recipe, Names::Recipe) => true,
            (Names::Index { source, first }, Names::Index { source: next_source, first: next }) => {
                source == next_source && first + self.count == next
            }
            _ => false,
        }
    }
}

/// The coding of differences.
#[derive(Default)]
struct Differences {
    /// How many entries in a row were as long as expected.
    same: u64,
}

impl Differences {
    fn push(&mut self, longer: i64, out: &mut Vec<u8>) {
        if longer == 0 {
            self.same += 1;
            return;
        }
        varint::put(out, std::mem::take(&mut self.same));
        varint::put(out, varint::zigzag(longer));
    }
}

/// Whether `bytes` are differences of at most so many entries.
fn is_differences(mut bytes: &[u8], entries: usize) -> bool {
    let mut left = entries as u64;
    while !bytes.is_empty() {
        let same = varint::take(&mut bytes).filter(|&same| same < left);
        let longer = varint::take(&mut bytes).filter(|&longer| longer != 0);
        let (Some(same), Some(_)) = (same, longer) else { return false };
        left -= same + 1;
    }
    true
}

fn decode_runs(mut bytes: &[u8], objects: usize) -> Result<Vec<Run>, IndexRecipeError> {
    let malformed = IndexRecipeError::Malformed;
    let mut left = objects as u64;
    let mut runs: Vec<Run> = Vec::with_capacity(bytes.len().min(objects));
    let mut expected = Expected::default();
    while !bytes.is_empty() {
        let mut number = || varint::take(&mut bytes).ok_or(malformed);
        let head = number()?;
        let count = u32::try_from(head >> KIND_BITS).ok().filter(|&count| count > 0 && u64::from(count) <= left).ok_or(malformed)?;
        left -= u64::from(count);
        let kind = head & ((1 << KIND_BITS) - 1);
        let from = if kind == KIND_NAMES {
            Names::Recipe
        } else {
            let source = if kind == KIND_OTHER { number()? } else { u64::from(expected.source) };
            let source = u16::try_from(source).ok().filter(|&source| usize::from(source) < SOURCES_MAX);
            let source = source.ok_or(IndexRecipeError::TooMany)?;
            if kind == KIND_OTHER && source == expected.source {
                return Err(malformed);
            }
            let away = if kind == KIND_NEXT { 0 } else { varint::unzigzag(number()?) };
            if kind == KIND_SAME && away == 0 {
                return Err(malformed);
            }
            let first = i64::from(*expected.of(source)).checked_add(away);
            let within = |first: &i64| (0..=INDEX_OBJECTS_MAX as i64 - i64::from(count)).contains(first);
            let first = first.filter(within).ok_or(IndexRecipeError::TooMany)? as u32;
            *expected.of(source) = first + count;
            Names::Index { source, first }
        };
        if runs.last().is_some_and(|last| last.goes_on_with(from)) {
            return Err(malformed); // it would be one run
        }
        runs.push(Run { from, count });
    }
    if left == 0 { Ok(runs) } else { Err(malformed) }
}

/// Where the next run would start, had nothing moved.
#[derive(Default)]
struct Expected {
    /// The index that the last run was of.
    source: u16,
    /// By index; at most [`SOURCES_MAX`].
    numbers: Vec<u32>,
}

impl Expected {
    /// The number expected of `source`, which is the index of the last run from now on.
    fn of(&mut self, source: u16) -> &mut u32 {
        self.source = source;
        let source = usize::from(source);
        if self.numbers.len() <= source {
            self.numbers.resize(source + 1, 0);
        }
        &mut self.numbers[source]
    }
}

const KIND_BITS: u32 = 2;
const KIND_NAMES: u64 = 0;
const KIND_NEXT: u64 = 1;
const KIND_SAME: u64 = 2;
const KIND_OTHER: u64 = 3;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn index(source: u16, first: u32, count: u32) -> Run {
        Run { from: Names::Index { source, first }, count }
    }

    fn names(count: u32) -> Run {
        Run { from: Names::Recipe, count }
    }

    fn check(bytes: &[u8], expected: Result<usize, IndexRecipeError>) {
        assert_eq!(IndexRecipe::decode(bytes).map(|recipe| recipe.runs.len()), expected, "{bytes:02x?}");
    }

    #[test]
    fn recipes_keep_their_bytes() {
        let runs = vec![index(0, 0, 3), index(0, 5, 1), names(2), index(0, 6, 1), index(7, 2, 40), index(0, 1, 1)];
        let recipe = IndexRecipe {
            hash: PackHash::Sha1,
            objects: 48,
            runs,
            differences: vec![3, 0x90, 0x03, 0, 1],
            names: [[0xaa; 20], [0xbb; 20]].concat(),
        };
        let mut golden = vec![0, 48, 12];
        golden.extend([0x0d, 0x06, 0x04, 0x08, 0x05, 0xa3, 0x01, 7, 4, 0x07, 0, 11]);
        golden.extend([5, 3, 0x90, 0x03, 0, 1]);
        golden.extend([[0xaa; 20], [0xbb; 20]].concat());
        assert_eq!(recipe.encode(), golden);
        assert_eq!(IndexRecipe::decode(&golden).as_ref(), Ok(&recipe));
        assert_eq!(recipe.differences().collect::<Vec<_>>(), [(3, 200), (4, -1)]);
        assert_eq!((recipe.sources(), recipe.objects()), (8, 48));
        (0..golden.len()).for_each(|len| assert!(IndexRecipe::decode(&golden[..len]).is_err(), "{len} bytes"));
        check(&[&golden[..], &[0]].concat(), Err(IndexRecipeError::Malformed));
        check(&[0, 0, 0, 0], Ok(0));
        check(&[1, 0, 0, 0], Ok(0));
    }

    #[test]
    fn hostile_recipes_are_refused() {
        use IndexRecipeError::{Malformed, TooMany};
        check(&[0, 2, 1, 0x09, 0], Ok(1));
        check(&[2, 2, 1, 0x09, 0], Err(Malformed));
        check(&[0, 0xff, 0xff, 0xff, 0x7f, 0, 0], Err(TooMany)); // objects
        check(&[0, 2, 1, 0x05, 0], Err(Malformed)); // too few
        check(&[0, 2, 1, 0x0d, 0], Err(Malformed)); // too many
        check(&[0, 2, 2, 0x09, 0x01, 0], Err(Malformed)); // a run of none
        check(&[0, 2, 2, 0x05, 0x05, 0], Err(Malformed)); // two that are one
        check(&[0, 2, 2, 0x0a, 0x00, 0], Err(Malformed)); // not elsewhere
        check(&[0, 2, 2, 0x0a, 0x01, 0], Err(TooMany)); // before the first
        check(&[0, 2, 3, 0x0b, 0x00, 0x00, 0], Err(Malformed)); // no other
        check(&[0, 2, 4, 0x0b, 0x80, 0x20, 0x00, 0], Err(TooMany)); // index 4,096
        check(&[0, 2, 4, 0x0b, 0xff, 0x1f, 0x00, 0], Ok(1));
        check(&[0, 2, 5, 0x0a, 0xfe, 0xff, 0xff, 0x01, 0], Err(TooMany)); // beyond the limit
        check(&[0, 2, 1, 0x09, 2, 0, 2], Ok(1));
        check(&[0, 2, 1, 0x09, 2, 0, 0], Err(Malformed)); // no difference
        check(&[0, 2, 1, 0x09, 2, 1, 2], Err(Malformed)); // of the last entry
        check(&[0, 2, 1, 0x09, 1, 0], Err(Malformed));
        check(&[0, 2, 0xff, 0xff, 0x7f, 0x09, 0], Err(Malformed)); // a length of what isn't there
        check(&[0, 1, 1, 0x04, 0], Err(Malformed)); // no name
        check(&[&[0, 1, 1, 0x04, 0][..], &[1; 20]].concat(), Ok(1));
        check(&[&[1, 1, 1, 0x04, 0][..], &[1; 20]].concat(), Err(Malformed));
    }

    proptest! {
        #[test]
        fn whatever_decodes_encodes_to_the_same_bytes(bytes in prop::collection::vec(any::<u8>(), 0..12), objects in 0u8..6, names in 0usize..3) {
            for split in 0..=bytes.len() {
                let (runs, differences) = bytes.split_at(split);
                let parts = [&[0, objects, runs.len() as u8], runs, &[differences.len() as u8], differences, &[9; 20].repeat(names)];
                let bytes = parts.concat();
                if let Ok(recipe) = IndexRecipe::decode(&bytes) {
                    prop_assert_eq!(recipe.encode(), bytes);
                    prop_assert!(recipe.differences().all(|(number, longer)| number + 1 < recipe.objects && longer != 0));
                }
            }
        }
    }
}

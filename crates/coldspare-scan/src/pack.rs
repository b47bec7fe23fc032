//! Packs: cut at their entries, and described by the packs that the standby has.
//!
//! A repack writes the entries of old packs into a new one. The index keeps, for each pack that was sent, what its entries
//! are ([`PackTable`]): so a pack that is already gone here still serves, as long as the standby has it.
//!
//! Invariants: what a pack is described by is in the tree that the changeset starts from; the standby checks the whole.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use coldspare_core::changeset::SOURCES_MAX;
use coldspare_core::git::family::{Alternate, Repository};
use coldspare_core::git::pack::{FANOUT_BYTES, Fanout, hash_bytes};
use coldspare_core::{Entry, RelPath, RootId, git};
use coldspare_delta::{
    Follows, PackBases, PackEncoder, PackHash, PackIndexReader, PackOffsets, PackPiece, PackTable, Piece, Segment, encode_pack_pieces,
    encode_pieces,
};
use coldspare_os::Disk;

use crate::capture::CaptureError;
use crate::derived::ALTERNATES_DEPTH_MAX;
use crate::index::IndexError;
use crate::run::{Run, lock};

const _: () = assert!(SOURCES_MAX == coldspare_delta::SOURCES_MAX, "the wire takes what the encoder uses");

/// How long git may take to put an index beside a new pack, in pauses.
const INDEX_PAUSES: u32 = 100;
const INDEX_PAUSE: Duration = Duration::from_millis(2);

/// LIMIT: entries of all packs that packs under way are described by, about 27 bytes each; beyond, a pack is sent whole.
const ENTRIES_MAX: usize = 4_000_000;
/// LIMIT: bytes of the paths of the packs that one is described by.
const PATHS_BYTES_MAX: usize = 400 << 10;
/// Packs are looked at up to so many times the bytes of the new one: more is not what it was made of, and a push must not wait
/// for it.
pub(crate) const CONTENT_RATIO_MAX: u64 = 8;
const CONTENT_BYTES_MIN: u64 = 1 << 20;
/// Bytes of an entry in a table, at least.
const ENTRY_BYTES_MIN: usize = 18;
/// Bytes of an index that are read at once.
const WINDOW_BYTES: usize = 1 << 20;

/// A pack, behind its size.
type SizedPack = (u64, (RootId, RelPath));

/// The packs that one is described by.
pub(crate) struct Bases<'a> {
    pub(crate) packs: PackBases,
    paths: Vec<(RootId, RelPath)>,
    /// What they count against.
    budget: &'a AtomicUsize,
    entries: usize,
}

impl Drop for Bases<'_> {
    fn drop(&mut self) {
        self.budget.fetch_sub(self.entries, Ordering::Relaxed);
    }
}

impl Bases<'_> {
    /// The packs that a segment takes copies from, and its pieces as they travel.
    pub(crate) fn part_of(&self, pieces: &[PackPiece]) -> (Vec<(RootId, RelPath)>, Vec<u8>) {
        let mut numbers: Vec<Option<u16>> = vec![None; self.paths.len()];
        let mut sources = Vec::new();
        let mut renumbered = |source: u16| {
            let slot = usize::from(source);
            *numbers[slot].get_or_insert_with(|| {
                sources.push(self.paths[slot].clone());
                (sources.len() - 1) as u16
            })
        };
        let pieces: Vec<PackPiece> = pieces
            .iter()
            .map(|piece| match *piece {
                PackPiece::Copy { source, offset, len } => PackPiece::Copy { source: renumbered(source), offset, len },
                literal @ PackPiece::Literal { .. } => literal,
            })
            .collect();
        if sources.is_empty() {
            let literal: Vec<Piece> = pieces.iter().map(|piece| Piece::Literal { len: piece.len_bytes() }).collect();
            return (sources, encode_pieces(&literal));
        }
        (sources, encode_pack_pieces(&pieces))
    }
}

impl<D: Disk> Run<'_, D> {
    /// Where the entries of the pack at `path` start, as the index beside it says; `None` when none fits it.
    ///
    /// Cost: reads a third of the index, holds 8 bytes an entry.
    pub(crate) fn pack_offsets(&self, root: RootId, path: &RelPath, pack_bytes: u64) -> Option<PackOffsets> {
        let index = git::beside(path, "idx")?;
        let disk = &self.capture.disk;
        let dir = disk.open_dir(&self.root(root).dir, index.parent_bytes()).ok()?;
        self.wait_for_index(&dir, path.name(), index.name());
        let file = disk.open_file(&dir, index.name()).ok()?;
        let size = disk.stat_file(&file).ok()?.size;
        let mut head = vec![0; FANOUT_BYTES];
        (disk.read_at(&file, 0, &mut head).ok()? == head.len()).then_some(())?;
        let objects = Fanout::parse(&head).ok()?.objects();
        let hash = if hash_bytes(objects, size)? == PackHash::Sha1.bytes() { PackHash::Sha1 } else { PackHash::Sha256 };
        let mut reader = PackIndexReader::new(objects, hash, size).ok()?;
        let range = reader.range();
        let mut at = range.start;
        let mut window = vec![0; WINDOW_BYTES.min(usize::try_from(range.end - range.start).ok()?)];
        while at < range.end {
            let want = window.len().min(usize::try_from(range.end - at).ok()?);
            let read = disk.read_at(&file, at, &mut window[..want]).ok()?;
            if read == 0 {
                return None;
            }
            reader.push(&window[..read]).ok()?;
            at += read as u64;
        }
        reader.finish(pack_bytes).ok()
    }

    /// Gives git some time to put the index beside a pack that it has just put there: without one nothing is known of what is
    /// in the pack, and git itself doesn't read it.
    fn wait_for_index(&self, dir: &D::Dir, pack: &[u8], index: &[u8]) {
        let disk = &self.capture.disk;
        let is_missing = || disk.stat(dir, index).is_err_and(|e| e.kind() == ErrorKind::NotFound);
        let is_fresh = || {
            let born = disk.stat(dir, pack).map_or(0, |stat| u64::try_from(stat.ctime.0).unwrap_or_default());
            disk.now_ms() / 1000 <= born + 1
        };
        let mut pauses = 0;
        while pauses < INDEX_PAUSES && is_missing() && is_fresh() {
            disk.pause(INDEX_PAUSE);
            pauses += 1;
        }
    }

    /// What the entries of a pack are, of which all the content is at hand.
    pub(crate) fn pack_table(&self, root: RootId, path: &RelPath, content: &[u8]) -> Option<PackTable> {
        let offsets = self.pack_offsets(root, path, content.len() as u64)?;
        let none = PackBases::default();
        let mut encoder = PackEncoder::new(offsets, &none);
        encoder.push(content, Follows::Nothing, &mut |_: Segment<PackPiece>| ());
        encoder.finish().table
    }

    /// The packs of a repository, and of those that it borrows objects from, that the standby has, as far as they may be what a
    /// pack of `pack_bytes` was made of.
    ///
    /// Cost: reads and searches their tables, one pack at a time; about 27 bytes an entry while it is held.
    pub(crate) fn pack_bases(&self, at: Option<&Repository>, pack_bytes: u64) -> Result<Bases<'_>, CaptureError> {
        let paths = self.family_files(at, b".pack", pack_bytes.saturating_mul(CONTENT_RATIO_MAX).saturating_add(CONTENT_BYTES_MIN))?;
        let _one_at_a_time = lock(&self.pack_bases);
        let budget = &self.pack_entries;
        let free = ENTRIES_MAX.saturating_sub(budget.load(Ordering::Relaxed));
        let mut failed: Option<IndexError> = None;
        let tables = paths.iter().map(|(root, path)| match self.snapshot.chunks(*root, path) {
            Ok(table) => {
                let table = table.filter(|bytes| bytes.len() / ENTRY_BYTES_MIN <= free);
                table.and_then(|bytes| PackTable::decode(&bytes).ok()).unwrap_or_else(PackTable::empty)
            }
            Err(e) => {
                failed.get_or_insert(e);
                PackTable::empty()
            }
        });
        let packs = PackBases::new(tables, free);
        if let Some(e) = failed {
            return Err(e.into());
        }
        let entries = packs.entries();
        budget.fetch_add(entries, Ordering::Relaxed);
        Ok(Bases { packs, paths, budget, entries })
    }

    /// The files with this ending beside the packs of a repository, and of those that it borrows objects from, that the standby
    /// has: the smallest first, as long as they have `bytes_max` together.
    pub(crate) fn family_files(
        &self,
        at: Option<&Repository>,
        ending: &[u8],
        bytes_max: u64,
    ) -> Result<Vec<(RootId, RelPath)>, CaptureError> {
        let mut paths: Vec<SizedPack> = Vec::new();
        let mut seen = BTreeSet::new();
        let mut family: Vec<(Repository, usize)> = at.into_iter().map(|at| (at.clone(), 0)).collect();
        while let Some((at, depth)) = family.pop() {
            if !seen.insert(at.clone()) {
                continue;
            }
            paths.extend(self.packs_of(&at, ending)?);
            if depth < ALTERNATES_DEPTH_MAX {
                let alternates = self.alternates_of(&at).into_iter();
                family.extend(alternates.filter_map(|alternate| match alternate {
                    Alternate::Replicated(other) => Some((other, depth + 1)),
                    Alternate::Elsewhere => None,
                }));
            }
        }
        // The smallest first: what a repack joined, and pushes bring packs that are like no other.
        paths.sort();
        let (mut bytes, mut content) = (0, 0u64);
        paths.retain(|(size, (_, path))| {
            bytes += path.as_bytes().len() + 8;
            content = content.saturating_add(*size);
            bytes <= PATHS_BYTES_MAX && content <= bytes_max
        });
        paths.truncate(SOURCES_MAX);
        Ok(paths.into_iter().map(|(_, at)| at).collect())
    }

    /// The files with this ending beside the packs of one repository that the standby has, with their sizes.
    fn packs_of(&self, (root, repository): &Repository, ending: &[u8]) -> Result<Vec<SizedPack>, CaptureError> {
        let Ok(dir) = repository.join_path(b"objects/pack") else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for (name, row) in self.snapshot.children(*root, &dir)? {
            let size = row.entry().filter(|_| row.version <= self.acked && name.ends_with(ending)).map(Entry::size);
            if let (Some(size), Ok(path)) = (size, dir.join(&name)) {
                found.push((size, (*root, path)));
            }
        }
        Ok(found)
    }
}

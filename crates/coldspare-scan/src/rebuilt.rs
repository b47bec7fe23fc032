//! Indexes that the standby makes by itself: an index of a pack from the indexes that it has, a reverse index from the index.
//!
//! A repack costs little but for the new index, which names each object anew. So the index store keeps, for each index that was
//! sent, the fronts of its names ([`NameTable`]), and a new one travels as a recipe that says where its names are.
//!
//! Invariants: what a recipe takes names from is in the tree that the changeset starts from; an index of another form than git
//! writes today travels as it is; the standby compares what it made with the digest.

use std::sync::atomic::Ordering;

use coldspare_core::changeset::{RECIPE_BYTES_MAX, RECIPE_COST_BYTES, RECIPES_BYTES_MAX, Recipe};
use coldspare_core::git::{self, Part};
use coldspare_core::{Body, Digest, Entry, RelPath, RootId, Seq, codec};
use coldspare_delta::{INDEX_BYTES_MAX, IndexFile, IndexRecipe, NameBases, NameTable, PackHash};
use coldspare_os::Disk;

use crate::batch::Builder;
use crate::capture::CaptureError;
use crate::index::Row;
use crate::inspect::Inspection;
use crate::pack::CONTENT_RATIO_MAX;
use crate::read::{Opened, Outcome};
use crate::run::{Run, lock};

/// LIMIT: entries of all indexes that one is described by, 16 bytes each.
const ENTRIES_MAX: usize = 2 << 20;
/// Indexes are looked at up to so many bytes, however small the new one is.
const CONTENT_BYTES_MIN: u64 = 256 << 10;
/// Bytes of an object in an index, at least.
const OBJECT_BYTES_MIN: u64 = 28;
/// Bytes of an object in a table of names, about.
const TABLE_BYTES: usize = 10;
/// Bytes of an index that are in each, whatever it lists.
const FANOUT_BYTES: usize = 8 + 4 * 256;
/// A reverse index of fewer bytes is not worth looking at the index for.
const REVERSE_BYTES_MIN: usize = 1 << 10;

/// What is known of a file whose content is at hand; nothing of what is no index.
#[derive(Default)]
pub(crate) struct Described {
    /// What later indexes are described by.
    pub(crate) names: Option<Vec<u8>>,
    /// How the standby makes it, where it can and where that takes less.
    pub(crate) recipe: Option<Vec<u8>>,
}

/// How the standby makes a file.
pub(crate) struct Rebuilt {
    /// What later indexes are described by.
    pub(crate) names: Option<Vec<u8>>,
    pub(crate) recipe: Vec<u8>,
}

/// The indexes that one is described by.
struct IndexBases {
    names: NameBases,
    paths: Vec<(RootId, RelPath)>,
}

/// An index of fewer bytes, of some 36 objects, is sent: a push brings one each time, and others would be searched for it.
const INDEX_BYTES_MIN: usize = 2 << 10;

impl<D: Disk> Run<'_, D> {
    /// What `content`, all of the file at `path`, is known by from now on, and how the standby makes it.
    pub(crate) fn describe(&self, root: RootId, path: &RelPath, content: &[u8]) -> Result<Described, CaptureError> {
        if git::is_reverse_index(path) {
            return Ok(Described { names: None, recipe: self.recipe_of_reverse(root, path, content) });
        }
        if git::part(path) != Part::PackIndex {
            return Ok(Described::default());
        }
        let Ok(index) = IndexFile::parse(content) else { return Ok(Described::default()) };
        let names = NameTable::of(&index).map(|table| table.encode());
        Ok(Described { names, recipe: self.recipe_of_index(root, path, &index, content.len())? })
    }

    /// Hands over a large file that the standby can make by itself; `None` for any other.
    pub(crate) fn hand_over_rebuilt(
        &self,
        file: &Opened<'_, D>,
        row: Option<&Row>,
        builder: &mut Builder,
    ) -> Result<Option<Outcome>, CaptureError> {
        let Some((digest, inspection, rebuilt)) = self.rebuilt(file)? else { return Ok(None) };
        if let Some(damage) = self.damage(file, inspection, row, digest) {
            self.hold_damaged(file.root, file.path, row, damage);
            return Ok(Some(Outcome::Held));
        }
        let body = Body::File { size: file.before.size, digest, sparse: file.is_sparse() };
        let Some(entry) = self.checked(file.root, file.path, Entry { meta: file.meta().clone(), body }) else {
            return Ok(Some(Outcome::Held));
        };
        let meta = entry.meta.clone();
        let row = self.row(None, entry.clone(), &file.before, file.at_ms());
        self.push_rebuilt(builder, file.root, file.path.clone(), row, entry, rebuilt)?;
        Ok(Some(Outcome::Content(meta)))
    }

    /// Reads a large file, and says how the standby makes it; `None` where it can't, or where the file changed meanwhile.
    ///
    /// LIMIT: memory as for [`coldspare_delta::INDEX_OBJECTS_MAX`] objects and [`ENTRIES_MAX`] others, one file at a time.
    pub(crate) fn rebuilt(&self, file: &Opened<'_, D>) -> Result<Option<(Digest, Inspection, Rebuilt)>, CaptureError> {
        // Where the standby has nothing, an index is made of nothing; a reverse index is, of the index beside it.
        let is_index = git::is_reverse_index(file.path) || git::part(file.path) == Part::PackIndex && self.acked != Seq(0);
        if !is_index || self.is_literal(file.root, file.path) {
            return Ok(None);
        }
        let _one_at_a_time = lock(&self.index_turn);
        let Some(content) = self.whole(file) else { return Ok(None) };
        let Described { names, recipe: Some(recipe) } = self.describe(file.root, file.path, &content)? else { return Ok(None) };
        self.count_read(content.len() as u64);
        let mut inspection = file.promise.begin();
        inspection.update(&content);
        Ok(Some((Digest(coldspare_delta::digest(&content)), inspection, Rebuilt { names, recipe })))
    }

    /// What later indexes are described by, of a large index that was sent.
    pub(crate) fn name_table(&self, file: &Opened<'_, D>) -> Option<Vec<u8>> {
        if git::part(file.path) != Part::PackIndex {
            return None;
        }
        let _one_at_a_time = lock(&self.index_turn);
        let content = self.whole(file)?;
        NameTable::of(&IndexFile::parse(&content).ok()?).map(|table| table.encode())
    }

    /// Whether the standby has indexes that may well name most of what the index at `path` does.
    pub(crate) fn has_names_for(&self, root: RootId, path: &RelPath) -> bool {
        let Some(size) = self.stat_of(root, path).map(|stat| stat.size).filter(|size| *size <= INDEX_BYTES_MAX) else { return false };
        let Ok(paths) = self.index_paths(root, path, size) else { return false };
        let table_bytes =
            |(root, path): &(RootId, RelPath)| self.snapshot.chunks(*root, path).ok().flatten().map_or(0, |table| table.len());
        let names = paths.iter().map(table_bytes).sum::<usize>() / TABLE_BYTES;
        !self.is_literal(root, path) && names as u64 * OBJECT_BYTES_MIN * 2 > size
    }

    fn recipe_of_index(
        &self,
        root: RootId,
        path: &RelPath,
        index: &IndexFile<'_>,
        index_bytes: usize,
    ) -> Result<Option<Vec<u8>>, CaptureError> {
        if index_bytes < INDEX_BYTES_MIN || self.acked == Seq(0) || self.is_literal(root, path) {
            return Ok(None); // not worth a look at others, or the standby has nothing to make it of
        }
        let bases = self.index_bases(root, path, index_bytes as u64, index.hash())?;
        if bases.names.entries() == 0 {
            return Ok(None);
        }
        let Some((entries, used)) = IndexRecipe::of(index, &bases.names) else { return Ok(None) };
        let sources = used.iter().map(|&number| bases.paths[usize::from(number)].clone()).collect();
        let entries = entries.encode();
        // What an index says doesn't shrink much, and making it takes the standby a pass over the pack.
        if 2 * entries.len() >= index_bytes.saturating_sub(FANOUT_BYTES) || !index.is_as_written() {
            return Ok(None);
        }
        let recipe = codec::encode(&Recipe::PackIndex { sources, entries });
        Ok((2 * recipe.len() < index_bytes && self.takes_recipe(&recipe)).then_some(recipe))
    }

    fn recipe_of_reverse(&self, root: RootId, path: &RelPath, content: &[u8]) -> Option<Vec<u8>> {
        if content.len() < REVERSE_BYTES_MIN || self.is_literal(root, path) {
            return None;
        }
        let (bytes, size) = self.head_of(root, &git::beside(path, "idx")?, INDEX_BYTES_MAX as usize)?;
        let index = IndexFile::parse(&bytes).ok().filter(|_| bytes.len() as u64 == size)?;
        let mut rest = content;
        let compared = index.write_reverse::<()>(&mut |part| {
            rest = rest.strip_prefix(part).ok_or(())?;
            Ok(())
        });
        let recipe = codec::encode(&Recipe::ReverseIndex);
        (compared == Ok(()) && rest.is_empty() && self.takes_recipe(&recipe)).then_some(recipe)
    }

    /// The indexes that one of `index_bytes` is described by.
    fn index_bases(&self, root: RootId, path: &RelPath, index_bytes: u64, hash: PackHash) -> Result<IndexBases, CaptureError> {
        let paths = self.index_paths(root, path, index_bytes)?;
        let mut failed = None;
        let tables = paths.iter().map(|(root, path)| match self.snapshot.chunks(*root, path) {
            Ok(table) => table.and_then(|bytes| NameTable::decode(&bytes).ok()).unwrap_or_else(NameTable::empty),
            Err(e) => {
                failed.get_or_insert(e);
                NameTable::empty()
            }
        });
        let names = NameBases::new(tables, hash, ENTRIES_MAX);
        failed.map_or(Ok(IndexBases { names, paths }), |e| Err(e.into()))
    }

    /// The indexes of a repository, and of those that it borrows objects from, that the standby has, as far as one of
    /// `index_bytes` may name the same.
    fn index_paths(&self, root: RootId, path: &RelPath, index_bytes: u64) -> Result<Vec<(RootId, RelPath)>, CaptureError> {
        let unit = self.units.of(root, path);
        let bytes_max = index_bytes.saturating_mul(CONTENT_RATIO_MAX).saturating_add(CONTENT_BYTES_MIN);
        self.family_files(unit.as_ref().map(|unit| &unit.at), b".idx", bytes_max)
    }

    /// Counts a recipe; `false` when the changeset has as many as the standby holds.
    fn takes_recipe(&self, recipe: &[u8]) -> bool {
        let more = recipe.len() + RECIPE_COST_BYTES;
        let add = |sum: usize| sum.checked_add(more).filter(|sum| *sum <= RECIPES_BYTES_MAX);
        recipe.len() <= RECIPE_BYTES_MAX as usize && self.recipe_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok()
    }

    /// Whether the standby could not make the file at `path` from what it has.
    fn is_literal(&self, root: RootId, path: &RelPath) -> bool {
        self.cycle.literal.contains(&(root, path.clone()))
    }

    /// All of an index; `None` when it is over the limit, can't be read, or changed meanwhile.
    fn whole(&self, file: &Opened<'_, D>) -> Option<Vec<u8>> {
        let size = usize::try_from(file.before.size).ok().filter(|size| *size as u64 <= INDEX_BYTES_MAX)?;
        let mut content = vec![0; size + 1]; // growth shows
        let read = self.capture.disk.read_at(&file.file, 0, &mut content).ok()?;
        content.truncate(read);
        self.is_stable(file, read as u64).then_some(content)
    }
}

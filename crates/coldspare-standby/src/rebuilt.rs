//! Rebuilt files: a pack's index and reverse index, made here instead of sent.
//!
//! Their recipes wait until all else is staged: an index is made from its pack, which may come behind it. A changeset that is cut
//! off loses its recipes, and is sent them again: they are small, and nothing of them is in the store.
//!
//! Invariants: what was made counts only with its digest; whatever it was to be made from and isn't as the active believes
//! fails the changeset before its commit, and the file comes whole (G2). Nothing is made at or below a kept path.

use std::collections::BTreeMap;

use coldspare_core::changeset::{RECIPE_COST_BYTES, RECIPES_BYTES_MAX, Recipe};
use coldspare_core::git::{self, Part};
use coldspare_core::{Entry, RelPath, RootId, codec, seeded_bug};
use coldspare_delta::{INDEX_BYTES_MAX, IndexFile, IndexRebuild, IndexRecipe};
use coldspare_os::Disk;

use crate::error::{StandbyError, io};
use crate::place::Places;
use crate::row::PendingRow;
use crate::stage::{create, insert_rows};
use crate::standby::{Changeset, Few, Standby, Unrecorded, lock};
use crate::store::{PENDING, View};
use crate::tree::Tree;

/// Bytes of a pack that are read at once.
const WINDOW_BYTES: usize = 1 << 20;

/// Files that are to be made when all else is staged.
#[derive(Default)]
pub(crate) struct Rebuilds {
    files: BTreeMap<(RootId, RelPath), Rebuild>,
    /// What they count for.
    bytes: usize,
}

struct Rebuild {
    entry: Entry,
    /// As it came; it is decoded when its turn has come.
    recipe: Vec<u8>,
}

/// Why a file isn't made.
enum Trouble {
    /// What it is to be made from is missing, or another than the active believes.
    Differs,
    Failed(StandbyError),
}

impl From<StandbyError> for Trouble {
    fn from(e: StandbyError) -> Trouble {
        Trouble::Failed(e)
    }
}

impl Rebuilds {
    pub(crate) fn paths(&self) -> Vec<(RootId, RelPath)> {
        self.files.keys().cloned().collect()
    }
}

impl<D: Disk> Changeset<D> {
    /// Takes the recipe of a file.
    ///
    /// LIMIT: [`RECIPES_BYTES_MAX`] of all of them; the active sends no more.
    pub(crate) fn put_rebuilt(&self, roots: u8, root: RootId, path: RelPath, entry: Entry, recipe: &[u8]) -> Result<(), StandbyError> {
        let decoded: Recipe = codec::decode(recipe).map_err(|e| malformed(&path, &e))?;
        let fits = match &decoded {
            Recipe::PackIndex { sources, .. } => git::part(&path) == Part::PackIndex && sources.iter().all(|(root, _)| root.0 < roots),
            Recipe::ReverseIndex => git::is_reverse_index(&path),
        };
        if !fits {
            return Err(StandbyError::Protocol(format!("{path}: a recipe of something else")));
        }
        let mut rebuilds = lock(&self.rebuilds);
        rebuilds.bytes += recipe.len() + RECIPE_COST_BYTES;
        if rebuilds.bytes > RECIPES_BYTES_MAX {
            return Err(StandbyError::Protocol(format!("{path}: recipes of more than {RECIPES_BYTES_MAX} bytes")));
        }
        if rebuilds.files.insert((root, path.clone()), Rebuild { entry, recipe: recipe.to_vec() }).is_some() {
            return Err(StandbyError::Protocol(format!("{path}: two recipes")));
        }
        Ok(())
    }
}

impl<D: Disk> Standby<D> {
    /// Makes the files of which recipes came, now that all else is staged and its rows are written.
    ///
    /// Cost: each pack is read once. Memory: as for [`coldspare_delta::INDEX_OBJECTS_MAX`] objects, one file at a time.
    ///
    /// # Errors
    /// `BaseDiffers`: one of them has to come whole; what is staged stays for the next try, durably. `Protocol`, `Io`,
    /// `OutOfSpace`, `Store`.
    pub(crate) fn rebuild_all(&self, changeset: &Changeset<D>, sync: &mut Unrecorded) -> Result<(), StandbyError> {
        let rebuilds = std::mem::take(&mut *lock(&changeset.rebuilds));
        if rebuilds.files.is_empty() {
            return Ok(());
        }
        let made = self.rebuild_each(changeset, &rebuilds, sync);
        if made.is_err() {
            *lock(&changeset.rebuilds) = rebuilds; // they are missing, though no row tells
        }
        made
    }

    fn rebuild_each(&self, changeset: &Changeset<D>, rebuilds: &Rebuilds, sync: &mut Unrecorded) -> Result<(), StandbyError> {
        let kept = self.kept()?;
        let is_kept = |root: RootId, path: &RelPath| path.ancestors().chain([path.clone()]).any(|at| kept.contains(&(root, at)));
        let rebuilds = rebuilds.files.iter().filter(|((root, path), _)| !is_kept(*root, path));
        // A reverse index is made from the index, which may be one of them.
        let (reverse, indexes): (Vec<_>, Vec<_>) = rebuilds.partition(|((_, path), _)| git::is_reverse_index(path));
        for files in [indexes, reverse] {
            let pending = self.store.view(PENDING)?;
            let next = Tree::next(self, &changeset.manifest, pending);
            let mut places = Places::new(self, changeset);
            let mut rows = Vec::new();
            for ((root, path), rebuild) in files {
                let row = match self.rebuild(&mut places, &next, &changeset.manifest, *root, path, rebuild) {
                    Ok(row) => row,
                    Err(Trouble::Failed(e)) => return Err(e),
                    Err(Trouble::Differs) => {
                        // What is staged, and what was made, is found by the next try.
                        self.store.write_lazily(|txn| insert_rows(txn, rows))?;
                        self.sync_staged(&Unrecorded { few: Few(None), ..Unrecorded::default() })?;
                        return Err(StandbyError::BaseDiffers { root: *root, path: path.clone() });
                    }
                };
                row.action.staged().into_iter().for_each(|at| sync.few.add(*root, at));
                rows.push((*root, path.clone(), row));
            }
            self.store.write_lazily(|txn| insert_rows(txn, rows))?;
        }
        // It took room that was not counted.
        self.make_room()
    }

    /// Makes one file and stages it.
    fn rebuild(
        &self,
        places: &mut Places<'_, D>,
        next: &Tree<'_, D>,
        manifest: &View,
        root: RootId,
        path: &RelPath,
        Rebuild { entry, recipe }: &Rebuild,
    ) -> Result<PendingRow, Trouble> {
        let disk = &self.disk;
        let (spot, name, action) = places.spot(root, path)?;
        let file = create(path, || disk.create_file(spot.dir(), &name), || disk.remove_file(spot.dir(), &name))?;
        let mut offset = 0;
        let mut write = |part: &[u8]| -> Result<(), StandbyError> {
            disk.write_at(&file, offset, part).map_err(io("writing", path.as_bytes()))?;
            offset += part.len() as u64;
            Ok(())
        };
        let made = match codec::decode(recipe).map_err(|e| malformed(path, &e))? {
            Recipe::PackIndex { sources, entries } => self.write_index(next, manifest, (root, path), &sources, &entries, &mut write),
            Recipe::ReverseIndex => self.write_reverse(next, root, path, &mut write),
        };
        let made = made.and_then(|()| match self.check_digest(&file, root, path, entry) {
            Err(StandbyError::ContentDiffers { .. }) if !seeded_bug!(RebuiltDigestsAreNotChecked) => Err(Trouble::Differs),
            Err(StandbyError::ContentDiffers { .. }) => Ok(()),
            checked => Ok(checked?),
        });
        if let Err(trouble) = made {
            disk.remove_file(spot.dir(), &name).map_err(io("removing the unfinished", path.as_bytes()))?;
            return Err(trouble);
        }
        let ino = self.set_file_attributes(&file, path, entry)?.ino;
        Ok(PendingRow::new(Some(entry.clone()), action, ino))
    }

    fn write_index(
        &self,
        next: &Tree<'_, D>,
        manifest: &View,
        (root, path): (RootId, &RelPath),
        sources: &[(RootId, RelPath)],
        entries: &[u8],
        write: &mut dyn FnMut(&[u8]) -> Result<(), StandbyError>,
    ) -> Result<(), Trouble> {
        let recipe = IndexRecipe::decode(entries).map_err(|e| malformed(path, &e))?;
        if recipe.sources() != sources.len() {
            return Err(StandbyError::Protocol(format!("{path}: names of an index that isn't told, or one of which none are")).into());
        }
        let mut rebuild = IndexRebuild::new(recipe);
        let now = Tree::now(self, manifest);
        for (number, (root, path)) in (0u16..).zip(sources) {
            let is_wanted = self.is_wanted(*root, path)?;
            let bytes = self.whole_index(&now, *root, path)?.filter(|_| !is_wanted).ok_or(Trouble::Differs)?;
            let index = IndexFile::parse(&bytes).map_err(|_| Trouble::Differs)?;
            rebuild.take_base(number, &index).map_err(|_| Trouble::Differs)?;
        }
        let pack = git::beside(path, "pack").map_or(Ok(None), |pack| next.open(root, &pack))?.ok_or(Trouble::Differs)?;
        let reading = || io("reading the pack of", path.as_bytes());
        let pack_bytes = self.disk.stat_file(&pack).map_err(reading())?.size;
        let mut walk = rebuild.walk(pack_bytes).map_err(|_| Trouble::Differs)?;
        let mut window = vec![0; WINDOW_BYTES];
        let mut offset = 0;
        loop {
            let read = self.disk.read_at(&pack, offset, &mut window).map_err(reading())?;
            walk.push(&window[..read]);
            offset += read as u64;
            if read < window.len() {
                break;
            }
        }
        let index = walk.finish().map_err(|_| Trouble::Differs)?;
        Ok(index.write(write)?)
    }

    fn write_reverse(
        &self,
        next: &Tree<'_, D>,
        root: RootId,
        path: &RelPath,
        write: &mut dyn FnMut(&[u8]) -> Result<(), StandbyError>,
    ) -> Result<(), Trouble> {
        let index = git::beside(path, "idx").ok_or(Trouble::Differs)?;
        let bytes = self.whole_index(next, root, &index)?.ok_or(Trouble::Differs)?;
        let index = IndexFile::parse(&bytes).map_err(|_| Trouble::Differs)?;
        Ok(index.write_reverse(write)?)
    }

    /// All of an index, of at most [`INDEX_BYTES_MAX`]; `None` when there is none that can be read: then the new one comes whole.
    fn whole_index(&self, tree: &Tree<'_, D>, root: RootId, path: &RelPath) -> Result<Option<Vec<u8>>, StandbyError> {
        let Some(file) = tree.open(root, path)? else { return Ok(None) };
        let size = self.disk.stat_file(&file).ok().and_then(|stat| usize::try_from(stat.size).ok());
        let Some(size) = size.filter(|size| *size as u64 <= INDEX_BYTES_MAX) else { return Ok(None) };
        let mut bytes = vec![0; size];
        let read = self.disk.read_at(&file, 0, &mut bytes);
        Ok(read.is_ok_and(|read| read == size).then_some(bytes))
    }
}

fn malformed(path: &RelPath, e: &dyn std::fmt::Display) -> StandbyError {
    StandbyError::Protocol(format!("{path}: {e}"))
}

//! Before a commit: every reference that changed names an object that is staged or present, here or by alternates.
//!
//! A repository of which that isn't true stays as it is, with its family, and is asked for again (G2). Objects behind
//! the one that is named are not looked at: the active's order of reading stands for them.
//!
//! Invariants: what is looked at is the tree as it will be: the manifest with the changeset's rows over it.

use std::collections::{BTreeMap, BTreeSet};

use coldspare_core::git::family::{Alternate, Repository, alternates, closure};
use coldspare_core::git::pack::{FANOUT_BYTES, Fanout, bucket_holds, hash_bytes};
use coldspare_core::git::reference::{PackedRefs, Reference, parse_loose};
use coldspare_core::git::{self, ObjectId, Part};
use coldspare_core::{Body, Entry, RelPath, RootId};
use coldspare_os::Disk;

use crate::error::StandbyError;
use crate::row::{Action, ManifestRow, PendingRow};
use crate::standby::{Changeset, Standby, Unrecorded};
use crate::store::{LINKS, PENDING, View};

/// LIMIT: alternates of alternates, as in git.
const ALTERNATES_DEPTH_MAX: usize = 5;
/// LIMIT: bytes of a loose reference, or of an alternates file, that are read.
const SMALL_BYTES_MAX: usize = 1 << 20;

/// Takes each packed reference: its name, and the object.
type EachPacked<'a> = dyn FnMut(&[u8], ObjectId) -> Result<(), StandbyError> + 'a;

/// What the tree will be.
struct Future<'a, D: Disk> {
    standby: &'a Standby<D>,
    manifest: &'a View,
    pending: View,
}

impl<D: Disk> Standby<D> {
    /// Finds the repositories whose references need what isn't there, and takes them back with their families.
    ///
    /// Cost: one pass over the changeset's rows; for each reference that changed a look at a loose object, or at one
    /// stretch of each pack index of the repository.
    pub(crate) fn take_back_incomplete(&self, changeset: &Changeset<D>, sync: &mut Unrecorded) -> Result<Vec<Repository>, StandbyError> {
        let future = Future { standby: self, manifest: &changeset.manifest, pending: self.store.view(PENDING)? };
        let changed = future.changed_repositories()?;
        let mut incomplete = BTreeSet::new();
        for at in &changed {
            if let Some(missing) = future.missing(at)? {
                tracing::error!(repository = %at.1, object = %missing, "a reference names an object that was neither sent nor there; the repository stays as it is");
                incomplete.insert(at.clone());
            }
        }
        if incomplete.is_empty() || coldspare_core::seeded_bug!(ReferencesAreNotChecked) {
            return Ok(Vec::new());
        }
        let mut ties = Vec::new();
        for at in &future.touched_repositories()? {
            for alternate in future.alternates(at)? {
                if let Alternate::Replicated(parent) = alternate {
                    ties.push((at.clone(), parent));
                }
            }
        }
        // A link and what it points to are one file: one can't be taken back without the other.
        self.store.for_each_key(LINKS, |k| {
            let (root, path) = future.pending.path_of(k)?;
            let row = future.pending.pending(root, &path)?;
            if let Some(PendingRow { entry: Some(Entry { body: Body::Hardlink { to }, .. }), .. }) = row
                && let (Some(own), Some(other)) = (future.repository_around(root, &path)?, future.repository_around(root, &to)?)
                && own != other
            {
                ties.push((own, other));
            }
            Ok(())
        })?;
        drop(future);
        let family = closure(&incomplete, &ties);
        self.take_back(changeset, family.clone(), sync)?;
        // All of them: what was taken back of the family has to be sent again too.
        Ok(family.into_iter().collect())
    }
}

impl<D: Disk> Future<'_, D> {
    /// The repositories of which the changeset brings references.
    fn changed_repositories(&self) -> Result<BTreeSet<Repository>, StandbyError> {
        let mut found = BTreeSet::new();
        self.pending.for_each_reversed(|root, path, row: PendingRow| {
            if row.action.staged().is_some()
                && row.entry.as_ref().and_then(Entry::digest).is_some()
                && let Some(repository) = repository_of(&path)
                && !found.contains(&(root, repository.clone()))
                && self.is_repository(root, &repository)?
            {
                found.insert((root, repository));
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The repositories of which the changeset brings, or takes, anything.
    fn touched_repositories(&self) -> Result<BTreeSet<Repository>, StandbyError> {
        let mut found = BTreeSet::new();
        self.pending.for_each_reversed(|root, path, _: PendingRow| {
            for base in git::possible_repositories(&path) {
                if !found.contains(&(root, base.clone())) && self.is_repository(root, &base)? {
                    found.insert((root, base));
                }
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The innermost repository that a path is in.
    fn repository_around(&self, root: RootId, path: &RelPath) -> Result<Option<Repository>, StandbyError> {
        for base in git::possible_repositories(path).into_iter().rev() {
            if self.is_repository(root, &base)? {
                return Ok(Some((root, base)));
            }
        }
        Ok(None)
    }

    fn is_repository(&self, root: RootId, path: &RelPath) -> Result<bool, StandbyError> {
        for name in [&b"HEAD"[..], b"objects", b"refs"] {
            if !path.join(name).is_ok_and(|path| self.entry(root, &path).is_ok_and(|e| e.is_some())) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// An object that a changed reference of the repository names and that isn't there.
    fn missing(&self, at: &Repository) -> Result<Option<ObjectId>, StandbyError> {
        let mut wanted = self.named_by_changes(at)?;
        self.remove_found(at, &mut wanted, 0)?;
        Ok(wanted.into_iter().next())
    }

    /// The objects that references name which the changeset brings, without those that were named before.
    fn named_by_changes(&self, (root, repository): &Repository) -> Result<BTreeSet<ObjectId>, StandbyError> {
        let mut wanted = BTreeSet::new();
        let mut loose = |_: RootId, path: RelPath, row: PendingRow| -> Result<bool, StandbyError> {
            if row.action.staged().is_some()
                && row.entry.as_ref().and_then(Entry::digest).is_some()
                && git::part(&path) == Part::LooseRef
                && let Some(content) = self.content(*root, &path, SMALL_BYTES_MAX)?
                && let Ok(Reference::Object(id)) = parse_loose(&content)
            {
                wanted.insert(id);
            }
            Ok(true)
        };
        for name in [&b"refs"[..], b"stash-refs"] {
            if let Ok(dir) = repository.join(name) {
                self.pending.for_each_below(*root, &dir, &mut loose)?;
            }
        }
        for name in [&b"packed-refs"[..], b"stash-packed-refs"] {
            let Ok(path) = repository.join(name) else { continue };
            if self.pending.pending(*root, &path)?.is_some_and(|row| row.action.staged().is_some()) {
                let mut old = BTreeSet::new();
                self.each_packed(*root, &path, Version::InTree, &mut |_, id| {
                    old.insert(id);
                    Ok(())
                })?;
                self.each_packed(*root, &path, Version::Staged, &mut |name, id| {
                    if !old.contains(&id) && !self.is_shadowed(*root, repository, name)? {
                        wanted.insert(id);
                    }
                    Ok(())
                })?;
            }
        }
        Ok(wanted)
    }

    /// Whether a reference is loose too, so that its packed value means nothing: git keeps no objects for that.
    fn is_shadowed(&self, root: RootId, repository: &RelPath, name: &[u8]) -> Result<bool, StandbyError> {
        let Ok(loose) = RelPath::new([repository.as_bytes(), b"/", name].concat()) else { return Ok(false) };
        Ok(self.entry(root, &loose)?.is_some_and(|entry| entry.digest().is_some()))
    }

    /// Removes from `wanted` what the repository has, by itself or by alternates.
    fn remove_found(&self, at: &Repository, wanted: &mut BTreeSet<ObjectId>, depth: usize) -> Result<(), StandbyError> {
        let (root, repository) = at;
        let below = |name: &str| RelPath::new([repository.as_bytes(), b"/", name.as_bytes()].concat()).ok();
        let mut lost = Vec::new();
        for id in wanted.iter() {
            let path = below(&format!("objects/{}", id.loose_path()));
            let is_there = path.map(|path| self.entry(*root, &path)).transpose()?.flatten().is_some();
            if !is_there {
                lost.push(*id);
            }
        }
        *wanted = lost.into_iter().collect();
        let Some(packs) = below("objects/pack").filter(|_| !wanted.is_empty()) else { return Ok(()) };
        for name in self.names_in(*root, &packs)? {
            if name.ends_with(b".idx")
                && !wanted.is_empty()
                && let Ok(index) = packs.join(&name)
            {
                self.remove_indexed(*root, &index, wanted)?;
            }
        }
        if wanted.is_empty() || depth >= ALTERNATES_DEPTH_MAX {
            return Ok(());
        }
        for alternate in self.alternates(at)? {
            match alternate {
                Alternate::Replicated(parent) => self.remove_found(&parent, wanted, depth + 1)?,
                // What lies outside can't be judged here.
                Alternate::Elsewhere => wanted.clear(),
            }
        }
        Ok(())
    }

    fn remove_indexed(&self, root: RootId, index: &RelPath, wanted: &mut BTreeSet<ObjectId>) -> Result<(), StandbyError> {
        let disk = &self.standby.disk;
        let Some(file) = self.open(root, index)? else { return Ok(()) };
        let read = |range: std::ops::Range<u64>| -> Option<Vec<u8>> {
            let mut bytes = vec![0; usize::try_from(range.end - range.start).ok()?];
            let read = disk.read_at(&file, range.start, &mut bytes).ok()?;
            (read == bytes.len()).then_some(bytes)
        };
        let size = disk.stat_file(&file).map_or(0, |stat| stat.size);
        // An index that can't be read has nothing.
        let Some(fanout) = read(0..FANOUT_BYTES as u64).and_then(|head| Fanout::parse(&head).ok()) else { return Ok(()) };
        let Some(hash) = hash_bytes(fanout.objects(), size) else { return Ok(()) };
        let mut bucket: (Option<u8>, Vec<u8>) = (None, Vec::new());
        wanted.retain(|id| {
            let first = id.as_bytes()[0];
            if bucket.0 != Some(first) {
                bucket = (Some(first), read(fanout.bucket(first, hash)).unwrap_or_default());
            }
            id.as_bytes().len() != hash || !bucket_holds(&bucket.1, id)
        });
        Ok(())
    }

    fn alternates(&self, at: &Repository) -> Result<Vec<Alternate>, StandbyError> {
        let Ok(path) = RelPath::new([at.1.as_bytes(), b"/objects/info/alternates"].concat()) else { return Ok(Vec::new()) };
        let Some(content) = self.content(at.0, &path, SMALL_BYTES_MAX)? else { return Ok(Vec::new()) };
        let roots: Vec<&[u8]> = self.standby.roots.iter().map(|root| root.path.as_os_str().as_encoded_bytes()).collect();
        Ok(alternates(&content, at, &roots))
    }

    /// What will be at `path`.
    fn entry(&self, root: RootId, path: &RelPath) -> Result<Option<Entry>, StandbyError> {
        if let Some(row) = self.pending.pending(root, path)? {
            return Ok(row.entry);
        }
        for above in path.ancestors() {
            if self.pending.pending(root, &above)?.is_some_and(|row| row.action == Action::Remove) {
                return Ok(None);
            }
        }
        Ok(self.manifest.manifest(root, path)?.map(|row| row.entry))
    }

    /// The names that will be in a folder.
    fn names_in(&self, root: RootId, dir: &RelPath) -> Result<BTreeSet<Box<[u8]>>, StandbyError> {
        let mut names: BTreeMap<Box<[u8]>, bool> = BTreeMap::new();
        if self.entry(root, dir)?.is_some() {
            names.extend(self.manifest.children::<ManifestRow>(root, dir)?.into_iter().map(|(name, _)| (name, true)));
        }
        names.extend(self.pending.children::<PendingRow>(root, dir)?.into_iter().map(|(name, row)| (name, row.entry.is_some())));
        Ok(names.into_iter().filter(|(_, is_there)| *is_there).map(|(name, _)| name).collect())
    }

    /// The file that will be at `path`, where it is now.
    fn open(&self, root: RootId, path: &RelPath) -> Result<Option<D::File>, StandbyError> {
        let mut path = path.clone();
        let mut row = self.pending.pending(root, &path)?;
        if let Some(PendingRow { entry: Some(Entry { body: Body::Hardlink { to }, .. }), .. }) = row {
            // Links are made once all else is staged.
            row = self.pending.pending(root, &to)?;
            path = to;
        }
        match row {
            None => Ok(self.open_in_tree(root, &path)),
            Some(PendingRow { entry: None, .. }) => Ok(None),
            Some(PendingRow { action, .. }) => match action.staged() {
                Some(at) => {
                    let (dir, name) = self.standby.staged_dir(root, at)?;
                    Ok(self.standby.disk.open_file(&dir, &name).ok())
                }
                None => Ok(self.open_in_tree(root, &path)),
            },
        }
    }

    fn open_in_tree(&self, root: RootId, path: &RelPath) -> Option<D::File> {
        let dir = self.standby.disk.open_dir(&self.standby.root(root).dir, path.parent_bytes()).ok()?;
        self.standby.disk.open_file(&dir, path.name()).ok()
    }

    fn content(&self, root: RootId, path: &RelPath, limit: usize) -> Result<Option<Vec<u8>>, StandbyError> {
        let Some(file) = self.open(root, path)? else { return Ok(None) };
        let size = self.standby.disk.stat_file(&file).map_or(0, |stat| stat.size);
        let mut bytes = vec![0; limit.min(usize::try_from(size).unwrap_or(limit))];
        match self.standby.disk.read_at(&file, 0, &mut bytes) {
            Ok(read) => {
                bytes.truncate(read);
                Ok(Some(bytes))
            }
            Err(_) => Ok(None),
        }
    }

    fn each_packed(&self, root: RootId, path: &RelPath, version: Version, each: &mut EachPacked<'_>) -> Result<(), StandbyError> {
        let file = match version {
            Version::InTree => self.open_in_tree(root, path),
            Version::Staged => self.open(root, path)?,
        };
        let Some(file) = file else { return Ok(()) };
        let mut reader = PackedRefs::default();
        let mut window = vec![0; 256 << 10];
        let mut offset = 0;
        loop {
            let Ok(read) = self.standby.disk.read_at(&file, offset, &mut window) else { return Ok(()) };
            offset += read as u64;
            let mut outcome = Ok(());
            let mut each_once = |name: &[u8], id| {
                if outcome.is_ok() {
                    outcome = each(name, id);
                }
            };
            // The active doesn't send what can't be read; an old one that can't be has named nothing.
            let is_over = read == 0 || reader.push(&window[..read], &mut each_once).is_err();
            outcome?;
            if is_over {
                return Ok(());
            }
        }
    }
}

/// Which of two files at one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    InTree,
    Staged,
}

/// The repository that a reference is of, by the shape of its path.
fn repository_of(path: &RelPath) -> Option<RelPath> {
    match git::part(path) {
        Part::PackedRefs | Part::Head => path.parent(),
        Part::LooseRef => git::possible_repositories(path).into_iter().next().filter(|base| base != path),
        _ => None,
    }
}

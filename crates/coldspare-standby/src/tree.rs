//! The tree as the manifest has it, or as it will be once the changeset under way is applied; and what repositories have
//! in it.
//!
//! Invariants: nothing is changed by looking at it. What can't be read has nothing: the caller asks whether it had before.

use std::collections::{BTreeMap, BTreeSet};

use coldspare_core::git::family::{Alternate, Repository, alternates};
use coldspare_core::git::pack::{FANOUT_BYTES, Fanout, bucket_holds, hash_bytes};
use coldspare_core::git::reference::PackedRefs;
use coldspare_core::git::{ALTERNATES, Kind, ObjectId, is_repository};
use coldspare_core::{Body, Entry, RelPath, RootId};
use coldspare_os::Disk;

use crate::error::StandbyError;
use crate::row::{ManifestRow, PendingRow};
use crate::standby::Standby;
use crate::store::View;

/// LIMIT: alternates of alternates, as in git.
pub(crate) const ALTERNATES_DEPTH_MAX: usize = 5;
/// LIMIT: bytes of a loose reference, or of an alternates file, that are read.
const SMALL_BYTES_MAX: usize = 1 << 20;

/// Takes each packed reference: its name, and the object.
pub(crate) type EachPacked<'a> = dyn FnMut(&[u8], ObjectId) -> Result<(), StandbyError> + 'a;

/// The tree at one instant.
pub(crate) struct Tree<'a, D: Disk> {
    standby: &'a Standby<D>,
    manifest: &'a View,
    /// The rows of the changeset, over the manifest.
    pending: Option<View>,
}

impl<'a, D: Disk> Tree<'a, D> {
    /// As it is.
    pub(crate) fn now(standby: &'a Standby<D>, manifest: &'a View) -> Tree<'a, D> {
        Tree { standby, manifest, pending: None }
    }

    /// As it will be.
    pub(crate) fn next(standby: &'a Standby<D>, manifest: &'a View, pending: View) -> Tree<'a, D> {
        Tree { standby, manifest, pending: Some(pending) }
    }

    /// The entry at `path`.
    pub(crate) fn entry(&self, root: RootId, path: &RelPath) -> Result<Option<Entry>, StandbyError> {
        if let Some(row) = self.row(root, path)? {
            return Ok(row.entry);
        }
        for above in path.ancestors() {
            // A folder that goes, or is replaced by a file, takes all below it with it.
            if self.row(root, &above)?.is_some_and(|row| !row.entry.is_some_and(|entry| entry.is_dir())) {
                return Ok(None);
            }
        }
        Ok(self.manifest.manifest(root, path)?.map(|row| row.entry))
    }

    fn row(&self, root: RootId, path: &RelPath) -> Result<Option<PendingRow>, StandbyError> {
        self.pending.as_ref().map_or(Ok(None), |pending| pending.pending(root, path))
    }

    /// The names in a folder.
    fn names_in(&self, root: RootId, dir: &RelPath) -> Result<BTreeSet<Box<[u8]>>, StandbyError> {
        let mut names: BTreeMap<Box<[u8]>, bool> = BTreeMap::new();
        if self.entry(root, dir)?.is_some_and(|entry| entry.is_dir()) {
            names.extend(self.manifest.children::<ManifestRow>(root, dir)?.into_iter().map(|(name, _)| (name, true)));
        }
        if let Some(pending) = &self.pending {
            names.extend(pending.children::<PendingRow>(root, dir)?.into_iter().map(|(name, row)| (name, row.entry.is_some())));
        }
        Ok(names.into_iter().filter(|(_, is_there)| *is_there).map(|(name, _)| name).collect())
    }

    /// Calls `each` with the paths of all files below a folder; with some of them twice.
    pub(crate) fn for_each_file_below(
        &self,
        root: RootId,
        dir: &RelPath,
        each: &mut dyn FnMut(&RelPath) -> Result<(), StandbyError>,
    ) -> Result<(), StandbyError> {
        let mut file = |path: &RelPath| -> Result<bool, StandbyError> {
            if self.entry(root, path)?.is_some_and(|entry| !entry.is_dir()) {
                each(path)?;
            }
            Ok(true)
        };
        self.manifest.for_each_below(root, dir, &mut |_, path, _: ManifestRow| file(&path))?;
        match &self.pending {
            Some(pending) => pending.for_each_below(root, dir, &mut |_, path, _: PendingRow| file(&path)),
            None => Ok(()),
        }
    }

    /// The file at `path`, or what will be that.
    pub(crate) fn open(&self, root: RootId, path: &RelPath) -> Result<Option<D::File>, StandbyError> {
        let mut path = path.clone();
        let Some(entry) = self.entry(root, &path)? else { return Ok(None) };
        if let (Body::Hardlink { to }, Some(_)) = (entry.body, self.row(root, &path)?) {
            path = to; // links are made once all else is staged
        }
        match self.row(root, &path)?.as_ref().and_then(|row| row.action.staged()) {
            Some(at) => {
                let (dir, name) = self.standby.staged_dir(root, at)?;
                Ok(self.standby.disk.open_file(&dir, &name).ok())
            }
            None => {
                let dir = self.standby.disk.open_dir(&self.standby.root(root).dir, path.parent_bytes()).ok();
                Ok(dir.and_then(|dir| self.standby.disk.open_file(&dir, path.name()).ok()))
            }
        }
    }

    /// The content of the small file at `path`; `None` when there is none, or it can't be read.
    pub(crate) fn content(&self, root: RootId, path: &RelPath) -> Result<Option<Vec<u8>>, StandbyError> {
        let Some(file) = self.open(root, path)? else { return Ok(None) };
        let size = self.standby.disk.stat_file(&file).map_or(0, |stat| stat.size);
        let mut bytes = vec![0; SMALL_BYTES_MAX.min(usize::try_from(size).unwrap_or(SMALL_BYTES_MAX))];
        Ok(self.standby.disk.read_at(&file, 0, &mut bytes).ok().map(|read| {
            bytes.truncate(read);
            bytes
        }))
    }

    /// Calls `each` with the bytes of the file at `path`, in pieces; `false` when there is none, or it can't be read to its end.
    pub(crate) fn read(&self, root: RootId, path: &RelPath, each: &mut dyn FnMut(&[u8])) -> Result<bool, StandbyError> {
        let Some(file) = self.open(root, path)? else { return Ok(false) };
        let mut window = vec![0; 256 << 10];
        let mut offset = 0;
        loop {
            let Ok(read) = self.standby.disk.read_at(&file, offset, &mut window) else { return Ok(false) };
            if read == 0 {
                return Ok(true);
            }
            each(&window[..read]);
            offset += read as u64;
        }
    }

    /// Calls `each` with the references of a file of packed ones, until one can't be read.
    pub(crate) fn each_packed(&self, root: RootId, path: &RelPath, each: &mut EachPacked<'_>) -> Result<(), StandbyError> {
        let Some(file) = self.open(root, path)? else { return Ok(()) };
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

    /// Whether a folder is what git takes for a repository.
    pub(crate) fn is_repository(&self, root: RootId, path: &RelPath) -> Result<bool, StandbyError> {
        let mut found = Vec::new();
        for name in [&b"HEAD"[..], b"objects", b"refs"] {
            let Ok(path) = path.join(name) else { return Ok(false) };
            let Some(entry) = self.entry(root, &path)? else { return Ok(false) };
            let kind = match entry.body {
                Body::Dir => Kind::Folder,
                Body::File { .. } | Body::Hardlink { .. } => Kind::File,
                Body::Symlink { .. } => Kind::Other,
            };
            found.push((name, kind));
        }
        Ok(is_repository(found.into_iter()))
    }

    /// The repositories that a repository borrows objects from.
    pub(crate) fn alternates(&self, at: &Repository) -> Result<Vec<Alternate>, StandbyError> {
        let Ok(path) = at.1.join_path(ALTERNATES) else { return Ok(Vec::new()) };
        let Some(content) = self.content(at.0, &path)? else { return Ok(Vec::new()) };
        let roots: Vec<&[u8]> = self.standby.roots.iter().map(|root| root.path.as_os_str().as_encoded_bytes()).collect();
        let mut found = alternates(&content, at, &roots);
        for alternate in &mut found {
            if let Alternate::Replicated((root, path)) = alternate
                && self.is_through_link(*root, path)?
            {
                *alternate = Alternate::Elsewhere;
            }
        }
        Ok(found)
    }

    /// Whether a path leads through a symbolic link, so that what it names stands at another.
    fn is_through_link(&self, root: RootId, path: &RelPath) -> Result<bool, StandbyError> {
        for part in path.ancestors().chain([path.clone()]).filter(|part| !part.is_root()) {
            if let Some(Entry { body: Body::Symlink { .. }, .. }) = self.entry(root, &part)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes from `wanted` what a repository has, by itself or by alternates.
    ///
    /// Cost: a look-up for each; for what is in packs all of each index, at most.
    pub(crate) fn remove_found(&self, at: &Repository, wanted: &mut BTreeSet<ObjectId>) -> Result<(), StandbyError> {
        self.remove_found_at(at, wanted, 0)
    }

    fn remove_found_at(&self, at: &Repository, wanted: &mut BTreeSet<ObjectId>, depth: usize) -> Result<(), StandbyError> {
        let (root, repository) = at;
        let mut lost = BTreeSet::new();
        for id in wanted.iter() {
            let path = repository.join_path(format!("objects/{}", id.loose_path()).as_bytes());
            if path.map_or(Ok(None), |path| self.entry(*root, &path))?.is_none() {
                lost.insert(*id);
            }
        }
        *wanted = lost;
        let Ok(packs) = repository.join_path(b"objects/pack") else { return Ok(()) };
        let names = if wanted.is_empty() { BTreeSet::new() } else { self.names_in(*root, &packs)? };
        for name in &names {
            if let Some(stem) = name.strip_suffix(b".idx")
                && !wanted.is_empty()
                && names.contains([stem, b".pack"].concat().as_slice())
                && let Ok(index) = packs.join(name)
            {
                self.remove_indexed(*root, &index, wanted)?;
            }
        }
        if wanted.is_empty() || depth >= ALTERNATES_DEPTH_MAX {
            return Ok(());
        }
        for alternate in self.alternates(at)? {
            match alternate {
                Alternate::Replicated(parent) => self.remove_found_at(&parent, wanted, depth + 1)?,
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
}

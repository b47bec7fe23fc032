//! What the tree will be once the changeset under way is applied: the manifest with the changeset's rows over it.
//!
//! Invariants: nothing of it is changed by looking at it.

use std::collections::{BTreeMap, BTreeSet};

use coldspare_core::git::ObjectId;
use coldspare_core::git::family::{Alternate, Repository, alternates};
use coldspare_core::git::reference::PackedRefs;
use coldspare_core::{Body, Entry, RelPath, RootId};
use coldspare_os::Disk;

use crate::error::StandbyError;
use crate::row::{Action, ManifestRow, PendingRow};
use crate::standby::Standby;
use crate::store::View;

/// LIMIT: bytes of a loose reference, or of an alternates file, that are read.
pub(crate) const SMALL_BYTES_MAX: usize = 1 << 20;

/// Takes each packed reference: its name, and the object.
pub(crate) type EachPacked<'a> = dyn FnMut(&[u8], ObjectId) -> Result<(), StandbyError> + 'a;

/// What the tree will be.
pub(crate) struct Future<'a, D: Disk> {
    pub(crate) standby: &'a Standby<D>,
    pub(crate) manifest: &'a View,
    pub(crate) pending: View,
}

impl<D: Disk> Future<'_, D> {
    /// The repositories that a repository will borrow objects from.
    pub(crate) fn alternates(&self, at: &Repository) -> Result<Vec<Alternate>, StandbyError> {
        let Ok(path) = RelPath::new([at.1.as_bytes(), b"/objects/info/alternates"].concat()) else { return Ok(Vec::new()) };
        let Some(content) = self.content(at.0, &path, SMALL_BYTES_MAX)? else { return Ok(Vec::new()) };
        let roots: Vec<&[u8]> = self.standby.roots.iter().map(|root| root.path.as_os_str().as_encoded_bytes()).collect();
        Ok(alternates(&content, at, &roots))
    }

    /// What will be at `path`.
    pub(crate) fn entry(&self, root: RootId, path: &RelPath) -> Result<Option<Entry>, StandbyError> {
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
    pub(crate) fn names_in(&self, root: RootId, dir: &RelPath) -> Result<BTreeSet<Box<[u8]>>, StandbyError> {
        let mut names: BTreeMap<Box<[u8]>, bool> = BTreeMap::new();
        if self.entry(root, dir)?.is_some() {
            names.extend(self.manifest.children::<ManifestRow>(root, dir)?.into_iter().map(|(name, _)| (name, true)));
        }
        names.extend(self.pending.children::<PendingRow>(root, dir)?.into_iter().map(|(name, row)| (name, row.entry.is_some())));
        Ok(names.into_iter().filter(|(_, is_there)| *is_there).map(|(name, _)| name).collect())
    }

    /// The file that will be at `path`, where it is now.
    pub(crate) fn open(&self, root: RootId, path: &RelPath) -> Result<Option<D::File>, StandbyError> {
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

    /// The first `limit` bytes of the file that will be at `path`; `None` when there is none, or it can't be read.
    pub(crate) fn content(&self, root: RootId, path: &RelPath, limit: usize) -> Result<Option<Vec<u8>>, StandbyError> {
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

    /// Calls `each` with the references of a file of packed ones, until one can't be read.
    pub(crate) fn each_packed(
        &self,
        root: RootId,
        path: &RelPath,
        version: Version,
        each: &mut EachPacked<'_>,
    ) -> Result<(), StandbyError> {
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
pub(crate) enum Version {
    InTree,
    Staged,
}

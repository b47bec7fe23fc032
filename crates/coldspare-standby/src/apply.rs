//! Apply: renames a committed changeset into place, in git's order.
//!
//! Invariants: every step may be taken again (a crash repeats all of them); nothing that the standby doesn't know is
//! removed, it goes to quarantine; the manifest changes only after every step is durable.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::sync::atomic::Ordering;

use coldspare_core::control::Applied;
use coldspare_core::{Body, Entry, RelPath, RootId, git::ApplyRank, seeded_bug};
use coldspare_os::{Disk, FileKind, Stat};

use crate::divergence::Divergence;
use crate::error::{StandbyError, io};
use crate::points::PointNo;
use crate::row::{Action, ManifestRow, PendingRow, Staged};
use crate::stage::{attributes, xattrs};
use crate::standby::Standby;
use crate::store::{LEFT, MANIFEST, ORDER, PENDING, View};

/// LIMIT: changed folders that are synced one by one; beyond, the whole filesystem is.
const TOUCHED_MAX: usize = 64;

/// What has to be made durable.
#[derive(Default)]
pub(crate) struct Touched {
    paths: BTreeSet<(RootId, RelPath)>,
    is_many: bool,
    /// What leaves the tree here is kept.
    divergence: Divergence,
    /// Folders whose attributes are set at the end though no row asks for it: those that were missing and those above
    /// them, since somebody else changed them; those that were exchanged, since XFS gives them a new time.
    unsettled: BTreeSet<(RootId, RelPath)>,
    /// Roots from whose trash something went: what comes back to it after a crash would be taken for somebody else's.
    emptied: BTreeSet<RootId>,
    /// Where folders go that leave the tree.
    point: Option<PointNo>,
    /// Roots to whose history folders went.
    shelved: BTreeSet<RootId>,
}

impl Touched {
    pub(crate) fn add(&mut self, root: RootId, path: RelPath) {
        if !self.is_many {
            self.paths.insert((root, path));
            self.is_many = self.paths.len() > TOUCHED_MAX;
        }
    }

    /// Takes note that something left the tree before a crash, and where it went may not be durable.
    fn took_before(&mut self, root: RootId) {
        self.emptied.insert(root);
        self.shelved.insert(root);
    }

    /// Takes note that `entry` stands at `path` now, which may have come there by an exchange.
    pub(crate) fn exchanged(&mut self, root: RootId, path: &RelPath, entry: &Entry) {
        self.add(root, path.parent().unwrap_or_else(RelPath::root));
        if entry.is_dir() {
            self.unsettled.insert((root, path.clone()));
        }
    }
}

impl<D: Disk> Standby<D> {
    /// Applies the committed changeset and makes it the manifest.
    pub(crate) fn apply(&self, committed: Applied) -> Result<(), StandbyError> {
        let _the_tree_changes = self.tree_lock.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let pending = self.store.view(PENDING)?;
        let manifest = self.store.view(MANIFEST)?;
        let divergence = if seeded_bug!(DivergenceIsNotKept) { Divergence::default() } else { self.divergence(committed)? };
        let point = self.next_kept()?;
        // What goes to quarantine touches folders there, too.
        let mut touched = Touched { is_many: divergence.is_any(), divergence, point, ..Touched::default() };
        self.store.for_each_key(ORDER, |k| {
            let Some((&[rank, _wave], k)) = k.split_first_chunk::<2>() else {
                return Err(self.store.damaged("an order key that is too short"));
            };
            let (root, path) = pending.path_of(k)?;
            let row = pending.pending(root, &path)?;
            if rank == ApplyRank::DirAttributes as u8 {
                self.set_dir_attributes(&manifest, root, &path, row, &mut touched)
            } else if let Some(row) = row {
                self.perform(&manifest, root, &path, row, &mut touched)
            } else {
                Ok(())
            }
        })?;
        for (root, path) in std::mem::take(&mut touched.unsettled) {
            let row = pending.pending(root, &path)?;
            self.set_dir_attributes(&manifest, root, &path, row, &mut touched)?;
        }
        if self.standing().rewind.is_some() {
            self.settle_restored(&pending, &mut touched)?;
        }
        self.synced(self.sync_touched(&touched))?;
        drop((pending, manifest));
        self.record_applied(committed, &touched.divergence)?;
        self.sweep();
        Ok(())
    }

    fn perform(&self, manifest: &View, root: RootId, path: &RelPath, row: PendingRow, touched: &mut Touched) -> Result<(), StandbyError> {
        match &row.action {
            Action::Place { from } => {
                let Some(entry) = &row.entry else { return Ok(()) };
                self.place(manifest, (root, path), entry, from, touched)
            }
            Action::Remove => self.remove(manifest, root, path, touched),
            Action::Rename { from } => {
                let Some(entry) = &row.entry else { return Ok(()) };
                self.rename_in_tree(root, from, path, entry, touched)
            }
            Action::Attributes => {
                let Some(entry) = &row.entry else { return Ok(()) };
                let dir = self.parent_of(root, path, touched)?;
                let xattrs = xattrs(entry);
                match self.disk.set_attributes(&dir, path.name(), &attributes(entry, &xattrs)) {
                    Ok(_) => touched.add(root, path.clone()),
                    // Somebody removed it here: the next verification says so. What was committed goes on.
                    Err(e) if e.kind() == ErrorKind::NotFound => tracing::error!(path = %path, "missing in the standby's tree"),
                    Err(e) => return Err(io("setting the attributes of", path.as_bytes())(e)),
                }
                Ok(())
            }
            Action::Carried { .. } | Action::Record => Ok(()),
        }
    }

    fn place(
        &self,
        manifest: &View,
        (root, path): (RootId, &RelPath),
        entry: &Entry,
        from: &Staged,
        touched: &mut Touched,
    ) -> Result<(), StandbyError> {
        let (stage, name) = self.staged_dir(root, from)?;
        let new = match self.disk.stat(&stage, &name) {
            Ok(stat) => stat,
            Err(e) if e.kind() == ErrorKind::NotFound => {
                // Taken before the crash, by an exchange perhaps: what left the tree for it may still be in the trash.
                touched.exchanged(root, path, entry);
                touched.took_before(root);
                return self.purge_left(manifest, root, path, touched);
            }
            Err(e) => return Err(io("examining the staged", path.as_bytes())(e)),
        };
        let dir = self.parent_of(root, path, touched)?;
        let row = manifest.manifest(root, path)?;
        let has_left = |kind: FileKind| (kind == FileKind::Dir) != entry.is_dir();
        if has_left(new.kind) {
            // Exchanged before the crash: what is staged is what was in the tree.
            self.discard_staged(root, (&stage, &name), path, touched)?;
            touched.exchanged(root, path, entry);
            return self.purge_left(manifest, root, path, touched);
        }
        match self.disk.stat(&dir, path.name()) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(io("examining", path.as_bytes())(e)),
            Ok(old) if !is_own(row.as_ref(), &old) && old.ino != new.ino => self.quarantine(root, &dir, path.name(), path)?,
            Ok(old) if has_left(old.kind) => {
                // One step for a reader: a branch that becomes a folder of branches, or the reverse.
                match self.disk.exchange(&stage, &name, &dir, path.name()) {
                    Ok(()) => {
                        self.discard_staged(root, (&stage, &name), path, touched)?;
                        touched.exchanged(root, path, entry);
                        return self.purge_left(manifest, root, path, touched);
                    }
                    // Not every filesystem can.
                    Err(e) if e.kind() == ErrorKind::InvalidInput => self.leave(root, &dir, path, touched)?,
                    Err(e) => return Err(io("putting in place", path.as_bytes())(e)),
                }
            }
            Ok(old) if old.kind == FileKind::Dir => self.leave(root, &dir, path, touched)?,
            // A rename replaces it atomically.
            Ok(old) => {
                let is_same = row.is_some_and(|row| row.entry.body == entry.body) || old.ino == new.ino;
                if let Some(committed) = touched.divergence.of(root, path).filter(|_| !is_same) {
                    self.keep_aside(committed, root, &dir, path)?;
                }
            }
        }
        self.disk.rename(&stage, &name, &dir, path.name()).map_err(io("putting in place", path.as_bytes()))?;
        // Two names of one file: the kernel renames nothing and says it did.
        match self.disk.remove_file(&stage, &name) {
            Err(e) if e.kind() != ErrorKind::NotFound && new.kind != FileKind::Dir => {
                return Err(io("removing the staged name of", path.as_bytes())(e));
            }
            _ => {}
        }
        touched.add(root, path.parent().unwrap_or_else(RelPath::root));
        self.purge_left(manifest, root, path, touched)
    }

    /// What was exchanged with the new tree, and stands where that was staged, leaves.
    fn discard_staged(&self, root: RootId, staged: (&D::Dir, &[u8]), path: &RelPath, touched: &mut Touched) -> Result<(), StandbyError> {
        if let Some(committed) = touched.divergence.of(root, path) {
            return self.set_aside(committed, root, staged, path);
        }
        // A file has a name in the history since before the commit.
        let is_dir = || self.disk.stat(staged.0, staged.1).is_ok_and(|stat| stat.kind == FileKind::Dir);
        match touched.point.filter(|_| is_dir()) {
            Some(point) => {
                touched.shelved.insert(root);
                self.shelve(root, point, staged, path)
            }
            None => self.discard(root, staged, path),
        }
    }

    /// Of what left the tree for the trash, or for the history, nothing stays there that shouldn't.
    fn purge_left(&self, manifest: &View, root: RootId, path: &RelPath, touched: &Touched) -> Result<(), StandbyError> {
        if let Some(point) = touched.point.filter(|_| touched.shelved.contains(&root)) {
            self.sort_out(manifest, root, path, point)?;
        }
        self.purge(manifest, root, path)
    }

    /// What the manifest knows at `path` leaves the tree.
    fn leave(&self, root: RootId, dir: &D::Dir, path: &RelPath, touched: &mut Touched) -> Result<(), StandbyError> {
        self.discard_staged(root, (dir, path.name()), path, touched)
    }

    fn remove(&self, manifest: &View, root: RootId, path: &RelPath, touched: &mut Touched) -> Result<(), StandbyError> {
        let dir = match self.disk.open_dir(&self.root(root).dir, path.parent_bytes()) {
            Ok(dir) => dir,
            // Its folder went first, or became a file.
            Err(e) if is_no_folder(&e) => return self.purge_left(manifest, root, path, touched),
            Err(e) => return Err(io("opening the folder of", path.as_bytes())(e)),
        };
        match self.disk.stat(&dir, path.name()) {
            // Gone before a crash: it may still be in the trash.
            Err(e) if e.kind() == ErrorKind::NotFound => touched.took_before(root),
            Err(e) => return Err(io("examining", path.as_bytes())(e)),
            Ok(stat) if !is_own(manifest.manifest(root, path)?.as_ref(), &stat) => self.quarantine(root, &dir, path.name(), path)?,
            Ok(stat) if stat.kind == FileKind::Dir => self.leave(root, &dir, path, touched)?,
            Ok(_) if touched.divergence.of(root, path).is_some() => self.leave(root, &dir, path, touched)?,
            Ok(_) => self.disk.remove_file(&dir, path.name()).map_err(io("removing", path.as_bytes()))?,
        }
        touched.add(root, path.parent().unwrap_or_else(RelPath::root));
        self.purge_left(manifest, root, path, touched)
    }

    fn set_dir_attributes(
        &self,
        manifest: &View,
        root: RootId,
        path: &RelPath,
        row: Option<PendingRow>,
        touched: &mut Touched,
    ) -> Result<(), StandbyError> {
        let entry = match row {
            Some(row) => row.entry,
            None => manifest.manifest(root, path)?.map(|row| row.entry),
        };
        let Some(entry) = entry.filter(|e| e.is_dir()) else { return Ok(()) };
        let dir = match self.disk.open_dir(&self.root(root).dir, path.as_bytes()) {
            Ok(dir) => dir,
            Err(e) if is_no_folder(&e) => return Ok(()),
            Err(e) => return Err(io("opening the folder", path.as_bytes())(e)),
        };
        let xattrs = xattrs(&entry);
        self.disk.set_attributes_of_dir(&dir, &attributes(&entry, &xattrs)).map_err(io("setting the attributes of", path.as_bytes()))?;
        touched.add(root, path.clone());
        Ok(())
    }

    /// The folder of `path`; made again where somebody removed it or put something else in its place, since what was
    /// committed has to be finished. Its attributes are set at the end.
    pub(crate) fn parent_of(&self, root: RootId, path: &RelPath, touched: &mut Touched) -> Result<D::Dir, StandbyError> {
        let held = &self.root(root).dir;
        let fail = || io("opening the folder of", path.as_bytes());
        match self.disk.open_dir(held, path.parent_bytes()) {
            Err(e) if is_no_folder(&e) => {}
            opened => return opened.map_err(fail()),
        }
        let mut dir = self.disk.open_dir(held, b"").map_err(fail())?;
        for above in path.ancestors().skip(1) {
            dir = match self.disk.open_dir(&dir, above.name()) {
                Err(e) if is_no_folder(&e) => {
                    if self.disk.stat(&dir, above.name()).is_ok() {
                        self.quarantine(root, &dir, above.name(), &above)?;
                    }
                    self.disk.create_dir(&dir, above.name()).map_err(fail())?;
                    touched.unsettled.extend(above.parent().into_iter().chain([above.clone()]).map(|path| (root, path)));
                    self.disk.open_dir(&dir, above.name()).map_err(fail())?
                }
                opened => opened.map_err(fail())?,
            };
        }
        Ok(dir)
    }

    /// Makes every changed folder and file durable (G3).
    fn sync_touched(&self, touched: &Touched) -> Result<(), StandbyError> {
        if touched.is_many {
            for root in self.roots.iter().filter(|_| !seeded_bug!(TouchedFilesystemIsNotSynced)) {
                self.disk.sync_fs(&root.dir).map_err(io("syncing the filesystem of", root.path.as_os_str().as_encoded_bytes()))?;
            }
            return Ok(());
        }
        for (root, path) in &touched.paths {
            let held = &self.root(*root).dir;
            let synced = match self.disk.open_dir(held, path.as_bytes()) {
                Ok(dir) => self.disk.sync_dir(&dir),
                Err(e) if e.kind() == ErrorKind::NotADirectory => {
                    let dir = self.disk.open_dir(held, path.parent_bytes()).map_err(io("opening the folder of", path.as_bytes()))?;
                    match self.disk.open_file(&dir, path.name()) {
                        Ok(file) => self.disk.sync_file(&file),
                        Err(_) => self.disk.sync_fs(held), // a symlink, or unreadable to us: all of it, then
                    }
                }
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(()), // removed later in the same changeset
                Err(e) => Err(e),
            };
            synced.map_err(io("syncing", path.as_bytes()))?;
        }
        for root in &touched.emptied {
            self.disk.sync_dir(&self.root(*root).trash).map_err(io("syncing", b"trash"))?;
        }
        if let Some(point) = touched.point {
            touched.shelved.iter().try_for_each(|root| self.sync_shelved(*root, point))?;
        }
        Ok(())
    }

    /// Removes what is left in the stage folders; trouble with it is told and costs only room.
    ///
    /// The list of it goes first: what is staged and in no list is removed when the standby is opened.
    pub(crate) fn sweep(&self) {
        let cleared = self.store.view(LEFT).and_then(|left| left.len()).and_then(|len| {
            if len == 0 {
                return Ok(());
            }
            self.store.write(|txn| {
                txn.delete_table(LEFT)?;
                txn.open_table(LEFT)?;
                Ok(())
            })
        });
        if let Err(e) = cleared {
            tracing::warn!(error = %e, "the list of staged content can't be emptied");
        }
        self.unfinished.store(0, Ordering::Relaxed);
        for root in &self.roots {
            for (dir, what) in [(&root.files, "f"), (&root.trees, "t"), (&root.trash, "trash")] {
                let Ok(names) = self.disk.list(dir) else { continue };
                for listed in names {
                    if let Err(e) = self.remove_all(dir, &listed.name) {
                        tracing::warn!(root = %root.path.display(), folder = what, error = %e, "staged content can't be removed");
                    }
                }
            }
        }
        // Behind the rest: what a changeset took and did not place has one name again.
        self.sweep_bulk();
    }
}

/// Whether what stands at a path is what the manifest says stands there: what is of another kind, or a file of another
/// inode, was not put there by us.
pub(crate) fn is_own(row: Option<&ManifestRow>, stat: &Stat) -> bool {
    let is_it = |row: &ManifestRow| {
        let kind = match row.entry.body {
            Body::Dir => FileKind::Dir,
            Body::File { .. } | Body::Hardlink { .. } => FileKind::File,
            Body::Symlink { .. } => FileKind::Symlink,
        };
        stat.kind == kind && (row.entry.is_dir() || row.ino == 0 || row.ino == stat.ino)
    };
    seeded_bug!(ForeignFilesAreTaken) || row.is_some_and(is_it)
}

/// Whether an error says that a folder, or one above it, is missing or is none; symlinks on the way are `ELOOP`.
pub(crate) fn is_no_folder(e: &std::io::Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) || e.raw_os_error() == Some(ELOOP)
}

const ELOOP: i32 = 40;

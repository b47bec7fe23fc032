//! Repair: puts right what a verification found to differ.
//!
//! What the manifest says in full is put right here: attributes, folders, symbolic links, further names of a file. What
//! doesn't belong there goes to quarantine (G5). Content can't be made up: it is noted as wanted, the active is told, and
//! the changeset that brings it replaces the damaged file by a rename; until then that stays, and a verification names it.
//!
//! Invariants: nothing is done that a look under the lock of the tree doesn't find to be so. What a file held when it was
//! found damaged stays in quarantine. A wanted path is wanted until a changeset brought it, or took it away.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;

use coldspare_core::{Body, Entry, Problem, ProblemKind, RelPath, RootId, key};
use coldspare_os::{Disk, FileKind};

use super::Pace;
use crate::apply::is_no_folder;
use crate::error::{StandbyError, io};
use crate::row::{ManifestRow, Record};
use crate::stage::{attributes, digest_file, xattrs};
use crate::standby::Standby;
use crate::store::{MANIFEST, Store, View, WANTED};

/// What a repair amounted to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Repair {
    /// Paths that were put right.
    pub healed: u64,
    /// Paths whose content was asked for.
    pub wanted: u64,
}

/// A repair under way; the lock of the tree is held.
struct Work<'a, D: Disk> {
    standby: &'a Standby<D>,
    manifest: View,
    /// Rows whose inode is another now.
    rows: Vec<(RootId, RelPath, ManifestRow)>,
    wanted: BTreeSet<(RootId, RelPath)>,
    known_wanted: BTreeSet<(RootId, RelPath)>,
    /// Folders in which something changed, which shows in their times.
    touched: BTreeSet<(RootId, RelPath)>,
    healed: u64,
}

impl<D: Disk> Standby<D> {
    /// Puts right what `problems` name, as far as the standby can by itself, and notes the content that it wants.
    ///
    /// No changeset is applied meanwhile; nothing is done while one is committed of which not all is in place, since the
    /// manifest doesn't know it yet. After a crash some of it is done; the same call does the rest.
    ///
    /// Cost: what it reads is the files that are named, and all of a repository that git finds fault with; one `syncfs` a
    /// root, one durable transaction.
    ///
    /// # Errors
    /// `Io`, `OutOfSpace`, `Store`, `Damaged`.
    pub fn repair(&self, problems: &[Problem]) -> Result<Repair, StandbyError> {
        let _the_tree_changes = self.tree_lock.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if self.standing().committed.is_some() {
            return Ok(Repair::default());
        }
        let mut work = Work {
            standby: self,
            manifest: self.store.view(MANIFEST)?,
            rows: Vec::new(),
            wanted: BTreeSet::new(),
            known_wanted: self.wanted()?.into_iter().collect(),
            touched: BTreeSet::new(),
            healed: 0,
        };
        // Folders before what is in them; the name that carries a file's content before the others.
        let mut paths: BTreeMap<(bool, RootId, RelPath), ProblemKind> = BTreeMap::new();
        for p in problems {
            paths.entry((p.kind == ProblemKind::Hardlink, p.root, p.path.clone())).or_insert(p.kind);
        }
        for ((_, root, path), kind) in paths {
            match kind {
                ProblemKind::Objects | ProblemKind::Alternate => work.look_for_damage(root, &path)?,
                _ => work.put_right(root, &path)?,
            }
        }
        work.settle_folders()?;
        for root in &self.roots {
            self.synced(self.disk.sync_fs(&root.dir).map_err(io("syncing the filesystem of", root.path.as_os_str().as_encoded_bytes())))?;
        }
        let Work { rows, wanted, healed, .. } = work;
        self.store.write(|txn| {
            let mut manifest = txn.open_table(MANIFEST)?;
            for (root, path, row) in &rows {
                let k = key::encode(*root, path);
                manifest.insert(k.as_slice(), row.seal(&k).as_slice())?;
            }
            let mut table = txn.open_table(WANTED)?;
            wanted.iter().try_for_each(|(root, path)| table.insert(key::encode(*root, path).as_slice(), ()).map(drop))?;
            Ok(())
        })?;
        Ok(Repair { healed, wanted: wanted.len() as u64 })
    }

    /// Drops the rows of the manifest that are not what was written; how many. Until a changeset names everything the
    /// standby says that it has nothing, so that the active compares all of it: what is there is not sent again. The store's
    /// pages are written anew, so that no other damage in them is met later.
    ///
    /// # Errors
    /// `Store`.
    pub fn drop_damaged_rows(&self) -> Result<u64, StandbyError> {
        let _the_tree_changes = self.tree_lock.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut damaged = Vec::new();
        self.store.view(MANIFEST)?.for_each_raw(|k, v| {
            if key::decode(k).is_err() || ManifestRow::read(k, v).is_err() {
                damaged.push(k.to_vec());
            }
            Ok(())
        })?;
        if damaged.is_empty() {
            return Ok(0);
        }
        tracing::error!(rows = damaged.len(), "rows of the manifest are damaged; the active has to name everything");
        self.store.write(|txn| {
            let mut manifest = txn.open_table(MANIFEST)?;
            damaged.iter().try_for_each(|k| manifest.remove(k.as_slice()).map(drop))?;
            drop(manifest);
            crate::history::cut(txn)?;
            Store::set_distrusted(txn, true)?;
            Store::write_anew(txn)
        })?;
        Ok(damaged.len() as u64)
    }

    /// Whether rows of the manifest were dropped since they were damaged, and the active has not named everything since.
    ///
    /// # Errors
    /// `Store`.
    pub fn is_distrusted(&self) -> Result<bool, StandbyError> {
        self.store.is_distrusted()
    }

    /// The files whose content on the standby is damaged or missing, and which the active has to send again.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn wanted(&self) -> Result<Vec<(RootId, RelPath)>, StandbyError> {
        let view = self.store.view(MANIFEST)?;
        let mut out = Vec::new();
        self.store.for_each_key(WANTED, |k| {
            out.push(view.path_of(k)?);
            Ok(())
        })?;
        Ok(out)
    }

    /// Whether the content at a path is damaged or missing.
    pub(crate) fn is_wanted(&self, root: RootId, path: &RelPath) -> Result<bool, StandbyError> {
        self.store.has_key(WANTED, &key::encode(root, path))
    }
}

impl<D: Disk> Work<'_, D> {
    fn disk(&self) -> &D {
        &self.standby.disk
    }

    fn put_right(&mut self, root: RootId, path: &RelPath) -> Result<(), StandbyError> {
        let row = self.manifest.manifest(root, path)?;
        if path.is_root() {
            self.touched.insert((root, path.clone()));
            return Ok(());
        }
        let Some(dir) = self.parent(root, path)? else { return Ok(()) };
        let stat = match self.disk().stat(&dir, path.name()) {
            Ok(stat) => Some(stat),
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(io("examining", path.as_bytes())(e)),
        };
        let Some(row) = row else {
            if stat.is_some() {
                self.set_aside(root, &dir, path)?;
                self.healed += 1;
            }
            return Ok(());
        };
        let expected = match row.entry.body {
            Body::Dir => FileKind::Dir,
            Body::Symlink { .. } => FileKind::Symlink,
            Body::File { .. } | Body::Hardlink { .. } => FileKind::File,
        };
        let is_there = match stat {
            Some(stat) if stat.kind != expected => {
                self.set_aside(root, &dir, path)?;
                false
            }
            stat => stat.is_some(),
        };
        match &row.entry.body {
            Body::Dir => self.folder(root, &dir, path, is_there),
            Body::Symlink { target } => self.symlink(root, &dir, path, &row, &target.clone(), is_there),
            Body::Hardlink { to } => self.link(root, &dir, path, &row, &to.clone(), is_there),
            Body::File { .. } => self.file(root, &dir, path, row, is_there),
        }
    }

    /// The folder of a path; `None` while it is missing: then it is put right with all in it.
    fn parent(&mut self, root: RootId, path: &RelPath) -> Result<Option<D::Dir>, StandbyError> {
        match self.disk().open_dir(&self.standby.root(root).dir, path.parent_bytes()) {
            Ok(dir) => Ok(Some(dir)),
            Err(e) if is_no_folder(&e) => Ok(None),
            Err(e) => Err(io("opening the folder of", path.as_bytes())(e)),
        }
    }

    fn set_aside(&mut self, root: RootId, dir: &D::Dir, path: &RelPath) -> Result<(), StandbyError> {
        self.touch(root, path);
        self.standby.quarantine(root, dir, path.name(), path)
    }

    fn touch(&mut self, root: RootId, path: &RelPath) {
        self.touched.insert((root, path.parent().unwrap_or_else(RelPath::root)));
    }

    fn folder(&mut self, root: RootId, dir: &D::Dir, path: &RelPath, is_there: bool) -> Result<(), StandbyError> {
        self.touched.insert((root, path.clone()));
        self.healed += 1;
        if is_there {
            return Ok(());
        }
        self.disk().create_dir(dir, path.name()).map_err(io("making the folder", path.as_bytes()))?;
        self.touch(root, path);
        for (name, _) in self.manifest.children::<ManifestRow>(root, path)? {
            let child = path.join(&name).map_err(|e| self.standby.store.damaged(e.to_string()))?;
            self.put_right(root, &child)?;
        }
        Ok(())
    }

    fn symlink(
        &mut self,
        root: RootId,
        dir: &D::Dir,
        path: &RelPath,
        row: &ManifestRow,
        target: &[u8],
        is_there: bool,
    ) -> Result<(), StandbyError> {
        if is_there && self.disk().read_link(dir, path.name()).is_ok_and(|found| found != target) {
            self.set_aside(root, dir, path)?;
        }
        if self.disk().stat(dir, path.name()).is_err() {
            self.disk().symlink(target, dir, path.name()).map_err(io("making the link", path.as_bytes()))?;
            self.touch(root, path);
        }
        let m = &row.entry.meta;
        let set = self.disk().set_attributes_of_symlink(dir, path.name(), m.uid, m.gid, (m.mtime.secs, m.mtime.nanos));
        let stat = set.map_err(io("setting the attributes of", path.as_bytes()))?;
        self.stands_at(root, path, row, stat.ino);
        Ok(())
    }

    fn link(
        &mut self,
        root: RootId,
        dir: &D::Dir,
        path: &RelPath,
        row: &ManifestRow,
        to: &RelPath,
        is_there: bool,
    ) -> Result<(), StandbyError> {
        let carrier = self.disk().open_dir(&self.standby.root(root).dir, to.parent_bytes()).ok();
        let found = carrier.as_ref().and_then(|dir| self.disk().stat(dir, to.name()).ok()).filter(|stat| stat.kind == FileKind::File);
        let (Some(carrier), Some(file)) = (carrier, found) else {
            self.want(root, to, None)?; // this name comes when that one is there
            return Ok(());
        };
        let own = if is_there { self.disk().stat(dir, path.name()).ok() } else { None };
        if own.is_some_and(|own| own.ino == file.ino) {
            return self.put_right(root, to); // one file: the attributes are those of its first name
        }
        if own.is_some() {
            self.set_aside(root, dir, path)?;
        }
        self.disk().link(&carrier, to.name(), dir, path.name()).map_err(io("making the link", path.as_bytes()))?;
        self.touch(root, path);
        self.stands_at(root, path, row, file.ino);
        Ok(())
    }

    fn file(&mut self, root: RootId, dir: &D::Dir, path: &RelPath, row: ManifestRow, is_there: bool) -> Result<(), StandbyError> {
        if !is_there {
            return self.want(root, path, None);
        }
        let opened = self.disk().open_file(dir, path.name());
        let read = opened.and_then(|file| digest_file(self.disk(), &file).map(|(digest, _)| digest));
        if read.ok() != row.entry.digest() {
            return self.want(root, path, Some(dir));
        }
        let xattrs = xattrs(&row.entry);
        let set = self.disk().set_attributes(dir, path.name(), &attributes(&row.entry, &xattrs));
        let stat = set.map_err(io("setting the attributes of", path.as_bytes()))?;
        self.stands_at(root, path, &row, stat.ino);
        Ok(())
    }

    /// A path is as it should be, and held by this inode.
    fn stands_at(&mut self, root: RootId, path: &RelPath, row: &ManifestRow, ino: u64) {
        self.healed += 1;
        if row.ino != ino {
            self.rows.push((root, path.clone(), ManifestRow { ino, ..row.clone() }));
        }
    }

    /// Notes that the content of a path is wanted; what is there, in `dir`, is kept beside.
    fn want(&mut self, root: RootId, path: &RelPath, dir: Option<&D::Dir>) -> Result<(), StandbyError> {
        let at = (root, path.clone());
        if self.known_wanted.contains(&at) || !self.wanted.insert(at) {
            return Ok(());
        }
        let Some(dir) = dir else { return Ok(()) };
        let quarantine = self.standby.open_quarantine(root)?;
        let name = self.standby.free_name(&quarantine, b"damaged-", path)?;
        let kept = self.disk().link(dir, path.name(), &quarantine, &name).and_then(|()| self.disk().sync_dir(&quarantine));
        kept.map_err(io("keeping in quarantine", path.as_bytes()))?;
        tracing::error!(path = %path, quarantine = %coldspare_core::path::escape(&name), "damaged; asked for again, the damaged content stays in .coldspare/quarantine");
        Ok(())
    }

    /// git finds fault with a repository, or with what is in it: every file there is read.
    fn look_for_damage(&mut self, root: RootId, path: &RelPath) -> Result<(), StandbyError> {
        let mut damaged = Vec::new();
        let standby = self.standby;
        self.manifest.for_each_below(root, path, &mut |root, path, row: ManifestRow| {
            if row.entry.digest().is_some() && standby.compare_content(root, &path, &row, &Pace::default()).is_err() {
                damaged.push((root, path));
            }
            Ok(true)
        })?;
        damaged.into_iter().try_for_each(|(root, path)| self.put_right(root, &path))
    }

    /// Gives the folders the attributes of the manifest, now that nothing changes in them.
    fn settle_folders(&mut self) -> Result<(), StandbyError> {
        for (root, path) in std::mem::take(&mut self.touched).into_iter().rev() {
            let entry: Option<Entry> = self.manifest.manifest(root, &path)?.map(|row| row.entry);
            let Some(entry) = entry.filter(Entry::is_dir) else { continue };
            let Ok(dir) = self.disk().open_dir(&self.standby.root(root).dir, path.as_bytes()) else { continue };
            let xattrs = xattrs(&entry);
            let set = self.disk().set_attributes_of_dir(&dir, &attributes(&entry, &xattrs));
            set.map_err(io("setting the attributes of", path.as_bytes()))?;
        }
        Ok(())
    }
}

//! A copy of a point that can be written into, for a drill, while replication goes on.
//!
//! A file shares its blocks with the standby's where the filesystem can do that. Else what git never writes into again,
//! objects and packs, gets a second name, and all the rest is copied.
//!
//! Changesets are applied meanwhile: files of the standby are replaced, never written into, so that one that is open stays
//! what it was; one that left the tree since the export began is in the history, of which nothing goes before its end.

use std::path::PathBuf;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use coldspare_core::git::{self, Part};
use coldspare_core::{Body, Entry, RelPath, RootId, key};
use coldspare_os::Disk;
use rayon::prelude::*;

use crate::error::{StandbyError, io};
use crate::history::{Kept, history_key};
use crate::points::PointNo;
use crate::rewind::Undone;
use crate::row::{HistoryRow, ManifestRow, Record};
use crate::stage::{attributes, is_content, xattrs};
use crate::standby::Standby;
use crate::store::{HISTORY, MANIFEST, View};

/// LIMIT: rows of files that are held in memory, and written at once.
const ROWS_AT_ONCE: usize = 8192;
/// Files of a folder that one thread writes at once.
const FILES_AT_ONCE: usize = 64;

/// What an export amounted to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Exported {
    /// Files, each name counted.
    pub files: u64,
    /// Bytes of their content.
    pub bytes: u64,
    /// Files that share their blocks with the standby's.
    pub cloned: u64,
    /// Files that are the standby's, under another name: they must not be written into.
    pub linked: u64,
    /// Files that were copied.
    pub copied: u64,
}

impl<D: Disk> Standby<D> {
    /// Writes the tree of a point into folders that are there and empty: one for each root, in their order.
    ///
    /// Changesets wait only while the beginning is fixed. After an error the folders hold a part.
    ///
    /// Cost: for each file one clone, link or copy and its attributes, by as many threads as there are cores; memory for each
    /// folder and each further name of a file.
    ///
    /// # Errors
    /// `UnknownPoint`; `NotKept` when the history lacks something; `Io`, `Store`, `Damaged`, `OutOfSpace`.
    pub fn export(&self, no: PointNo, folders: &[PathBuf]) -> Result<Exported, StandbyError> {
        let _nothing_goes = self.history_lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.point(no)?;
        let begun = {
            let _between_changesets = self.tree_lock.read().unwrap_or_else(PoisonError::into_inner);
            (self.store.view(MANIFEST)?, self.undone(no, &self.store.view(HISTORY)?)?, self.next_point()?)
        };
        let (manifest, undone, next) = begun;
        let mut targets = Vec::new();
        for folder in folders {
            let name = folder.as_os_str().as_encoded_bytes();
            targets.push(self.disk.open_root(folder).map_err(io("opening", name))?);
        }
        let clones = targets.iter().map(|_| AtomicBool::new(true)).collect();
        let export = Export { standby: self, point: no, next, targets, clones, counts: Default::default() };
        export.run(&manifest, &undone)
    }
}

/// A file that is to be written, and where the history has its content.
type Wanted = (RelPath, ManifestRow, Option<Kept>);

struct Export<'a, D: Disk> {
    standby: &'a Standby<D>,
    point: PointNo,
    /// The number of the next point when it began.
    next: PointNo,
    targets: Vec<D::Dir>,
    /// Whether the roots' files can share blocks with the target's.
    clones: Vec<AtomicBool>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    files: AtomicU64,
    bytes: AtomicU64,
    cloned: AtomicU64,
    linked: AtomicU64,
    copied: AtomicU64,
}

/// What is written after all files.
#[derive(Default)]
struct Later {
    folders: Vec<(RootId, RelPath, Entry)>,
    links: Vec<(RootId, RelPath, RelPath)>,
}

impl<D: Disk> Export<'_, D> {
    fn run(&self, manifest: &View, undone: &Undone) -> Result<Exported, StandbyError> {
        let mut later = Later::default();
        let mut files: Vec<(RootId, Wanted)> = Vec::new();
        let mut others = undone.iter().peekable();
        let mut take = |k: &[u8], row: ManifestRow, kept: Option<Kept>, files: &mut Vec<(RootId, Wanted)>| {
            let (root, path) = key::decode(k).map_err(|e| self.standby.store.damaged(e.to_string()))?;
            match &row.entry.body {
                // Folders come before what is in them.
                Body::Dir => {
                    if !path.is_root() {
                        let (dir, name) = self.target(root, &path)?;
                        self.standby.disk.create_dir(&dir, name).map_err(io("making the folder", path.as_bytes()))?;
                    }
                    later.folders.push((root, path, row.entry));
                }
                Body::Hardlink { to } => later.links.push((root, path, to.clone())),
                Body::File { .. } | Body::Symlink { .. } => files.push((root, (path, row, kept))),
            }
            if files.len() >= ROWS_AT_ONCE { self.write(std::mem::take(files)) } else { Ok(()) }
        };
        manifest.for_each_raw(|k, v| {
            while let Some((other, before)) = others.next_if(|(other, _)| other.as_slice() < k) {
                before.row.clone().map_or(Ok(()), |row| take(other, row, before.kept, &mut files))?;
            }
            if let Some((_, before)) = others.next_if(|(other, _)| other.as_slice() == k) {
                return before.row.clone().map_or(Ok(()), |row| take(k, row, before.kept, &mut files));
            }
            let row = ManifestRow::read(k, v).map_err(|e| self.standby.store.damaged(e))?;
            take(k, row, None, &mut files)
        })?;
        for (other, before) in others {
            before.row.clone().map_or(Ok(()), |row| take(other, row, before.kept, &mut files))?;
        }
        self.write(files)?;
        self.finish(later)?;
        let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let Counts { files, bytes, cloned, linked, copied } = &self.counts;
        Ok(Exported { files: count(files), bytes: count(bytes), cloned: count(cloned), linked: count(linked), copied: count(copied) })
    }

    /// The folder of a path in the copy, and the name in it.
    fn target<'p>(&self, root: RootId, path: &'p RelPath) -> Result<(D::Dir, &'p [u8]), StandbyError> {
        let dir = self.standby.disk.open_dir(&self.targets[usize::from(root.0)], path.parent_bytes());
        Ok((dir.map_err(io("opening in the copy the folder of", path.as_bytes()))?, path.name()))
    }

    fn write(&self, files: Vec<(RootId, Wanted)>) -> Result<(), StandbyError> {
        let same = |a: &(RootId, Wanted), b: &(RootId, Wanted)| a.0 == b.0 && a.1.0.parent_bytes() == b.1.0.parent_bytes();
        let parts: Vec<&[(RootId, Wanted)]> = files.chunk_by(same).flat_map(|folder| folder.chunks(FILES_AT_ONCE)).collect();
        parts.into_par_iter().try_for_each(|part| {
            let Some((root, (first, ..))) = part.first() else { return Ok(()) };
            let (to, _) = self.target(*root, first)?;
            let from = self.standby.disk.open_dir(&self.standby.root(*root).dir, first.parent_bytes()).ok();
            part.iter().try_for_each(|(root, wanted)| self.write_one(*root, wanted, from.as_ref(), &to))
        })
    }

    fn write_one(&self, root: RootId, (path, row, kept): &Wanted, from: Option<&D::Dir>, to: &D::Dir) -> Result<(), StandbyError> {
        let disk = &self.standby.disk;
        self.counts.files.fetch_add(1, Ordering::Relaxed);
        if let Body::Symlink { target } = &row.entry.body {
            let m = &row.entry.meta;
            let made = disk.symlink(target, to, path.name());
            let set = made.and_then(|()| disk.set_attributes_of_symlink(to, path.name(), m.uid, m.gid, (m.mtime.secs, m.mtime.nanos)));
            return set.map(drop).map_err(io("making in the copy", path.as_bytes()));
        }
        self.counts.bytes.fetch_add(row.entry.size(), Ordering::Relaxed);
        if kept.is_none()
            && let Some(from) = from
            && self.take(root, path, row, (from, path.name()), to, IsIt::ByInode)?
        {
            return Ok(());
        }
        if let Some(kept) = kept
            && let Ok((dir, name)) = self.standby.kept_place(root, path, *kept)
            && self.take(root, path, row, (&dir, &name), to, IsIt::ByPlace)?
        {
            return Ok(());
        }
        self.take_what_left(root, path, row, to)
    }

    /// Takes a file that isn't where it was when the export began.
    fn take_what_left(&self, root: RootId, path: &RelPath, row: &ManifestRow, to: &D::Dir) -> Result<(), StandbyError> {
        let standby = self.standby;
        let _between_changesets = standby.tree_lock.read().unwrap_or_else(PoisonError::into_inner);
        let history = standby.store.view(HISTORY)?;
        let k = key::encode(root, path);
        for point in (self.next.0..standby.next_point()?.0).map(PointNo) {
            let own = history_key(point, &k);
            let Some(value) = history.value(&own)? else { continue };
            let depth = HistoryRow::read(&own, &value).map_err(|e| standby.store.damaged(e))?.kept;
            if depth > 0
                && let Ok((dir, name)) = standby.kept_place(root, path, Kept { point, depth })
                && self.take(root, path, row, (&dir, &name), to, IsIt::ByPlace)?
            {
                return Ok(());
            }
        }
        // It was put right since, or only its attributes changed.
        let now = standby.store.view(MANIFEST)?.manifest(root, path)?.filter(|now| now.entry.body == row.entry.body);
        if now.is_some()
            && let Ok(from) = standby.disk.open_dir(&standby.root(root).dir, path.parent_bytes())
            && self.take(root, path, row, (&from, path.name()), to, IsIt::ByPlace)?
        {
            return Ok(());
        }
        Err(StandbyError::NotKept { point: self.point, path: path.clone() })
    }

    /// Takes the file at a place, if it is the one that is meant.
    fn take(
        &self,
        root: RootId,
        path: &RelPath,
        row: &ManifestRow,
        (from, name): (&D::Dir, &[u8]),
        to: &D::Dir,
        is_it: IsIt,
    ) -> Result<bool, StandbyError> {
        let disk = &self.standby.disk;
        let Ok(source) = disk.open_file(from, name) else { return Ok(false) };
        let fail = || io("writing in the copy", path.as_bytes());
        let found = disk.stat_file(&source).map_err(fail())?;
        if found.size != row.entry.size() || is_it == IsIt::ByInode && row.ino != 0 && found.ino != row.ino {
            return Ok(false);
        }
        // In the history nobody looked at it since.
        if is_it == IsIt::ByPlace && !is_content(disk, &source, &row.entry).map_err(fail())? {
            return Ok(false);
        }
        let clones = &self.clones[usize::from(root.0)];
        let is_final = matches!(git::part(path), Part::LooseObject | Part::Pack | Part::PackIndex);
        if is_final && !clones.load(Ordering::Relaxed) && disk.link(from, name, to, path.name()).is_ok() {
            if disk.stat(to, path.name()).map_err(fail())?.ino == found.ino {
                self.counts.linked.fetch_add(1, Ordering::Relaxed);
                return Ok(true);
            }
            disk.remove_file(to, path.name()).map_err(fail())?; // replaced in between
        }
        let file = disk.create_file(to, path.name()).map_err(fail())?;
        if clones.load(Ordering::Relaxed) && disk.clone_file(&source, &file).is_ok() {
            self.counts.cloned.fetch_add(1, Ordering::Relaxed);
        } else if is_final && clones.swap(false, Ordering::Relaxed) {
            disk.remove_file(to, path.name()).map_err(fail())?;
            return self.take(root, path, row, (from, name), to, is_it);
        } else {
            clones.store(false, Ordering::Relaxed);
            disk.copy_range(&source, 0, &file, 0, found.size).map_err(fail())?;
            self.counts.copied.fetch_add(1, Ordering::Relaxed);
        }
        self.standby.set_file_attributes(&file, path, &row.entry)?;
        Ok(true)
    }

    /// Further names of files, then the attributes of folders, now that nothing changes in them.
    fn finish(&self, later: Later) -> Result<(), StandbyError> {
        let disk = &self.standby.disk;
        for (root, path, to) in &later.links {
            let ((dir, name), (from, from_name)) = (self.target(*root, path)?, self.target(*root, to)?);
            disk.link(&from, from_name, &dir, name).map_err(io("linking in the copy", path.as_bytes()))?;
            self.counts.files.fetch_add(1, Ordering::Relaxed);
        }
        for (root, path, entry) in later.folders.iter().rev() {
            let dir = disk.open_dir(&self.targets[usize::from(root.0)], path.as_bytes());
            let xattrs = xattrs(entry);
            let set = dir.and_then(|dir| disk.set_attributes_of_dir(&dir, &attributes(entry, &xattrs)));
            set.map_err(io("setting in the copy the attributes of", path.as_bytes()))?;
        }
        Ok(())
    }
}

/// How a file is known to be the one that is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IsIt {
    /// Its inode is that of the row: the tree may have another one by now.
    ByInode,
    /// Nothing else comes there.
    ByPlace,
}

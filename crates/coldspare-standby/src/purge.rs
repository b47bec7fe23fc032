//! What leaves the tree: first one rename into the trash, then removal of exactly what the manifest knows.
//!
//! Invariants: an entry that the manifest doesn't know is moved to quarantine, never removed (G5).

use std::io::ErrorKind;

use coldspare_core::{RelPath, RootId, key};
use coldspare_os::{Disk, FileKind};

use crate::error::{StandbyError, io};
use crate::points::PointNo;
use crate::row::ManifestRow;
use crate::standby::Standby;
use crate::store::View;

pub(crate) const QUARANTINE: &[u8] = b"quarantine";

impl<D: Disk> Standby<D> {
    /// Moves a folder, or what stands where one is to be, into the trash.
    pub(crate) fn discard(&self, root: RootId, (dir, from): (&D::Dir, &[u8]), path: &RelPath) -> Result<(), StandbyError> {
        let trash = &self.root(root).trash;
        let name = trash_name(root, path);
        if self.disk.stat(trash, &name).is_ok() {
            // From before a crash; the same path can't be discarded twice in one changeset.
            self.quarantine(root, trash, &name, path)?;
        }
        self.disk.rename(dir, from, trash, &name).map_err(io("removing", path.as_bytes()))
    }

    /// Removes from the trash what the manifest knows of `path`; the rest goes to quarantine.
    pub(crate) fn purge(&self, manifest: &View, root: RootId, path: &RelPath) -> Result<(), StandbyError> {
        let trash = &self.root(root).trash;
        let name = trash_name(root, path);
        let kind = match self.disk.stat(trash, &name) {
            Ok(stat) => stat.kind,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(io("examining the removed", path.as_bytes())(e)),
        };
        if kind == FileKind::Dir {
            self.purge_below(manifest, root, path, &name)?;
        }
        let removed = if kind == FileKind::Dir { self.disk.remove_dir(trash, &name) } else { self.disk.remove_file(trash, &name) };
        match removed {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => self.quarantine(root, trash, &name, path),
            Err(e) => Err(io("removing", path.as_bytes())(e)),
        }
    }

    fn purge_below(&self, manifest: &View, root: RootId, dir: &RelPath, trash_path: &[u8]) -> Result<(), StandbyError> {
        let open = match self.disk.open_dir(&self.root(root).trash, trash_path) {
            Ok(open) => open,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(()),
            Err(e) => return Err(io("opening the removed", dir.as_bytes())(e)),
        };
        for (name, row) in manifest.children::<ManifestRow>(root, dir)? {
            let removed = if row.entry.is_dir() {
                let path = dir.join(&name).map_err(|e| self.store.damaged(e.to_string()))?;
                self.purge_below(manifest, root, &path, &[trash_path, b"/", &name].concat())?;
                self.disk.remove_dir(&open, &name)
            } else {
                self.disk.remove_file(&open, &name)
            };
            match removed {
                Ok(()) => {}
                // Gone before a crash, not empty, or of another kind than it should be: what stays goes to quarantine.
                Err(e) if is_left(&e) => {}
                Err(e) => return Err(io("removing", &[dir.as_bytes(), b"/", &name].concat())(e)),
            }
        }
        Ok(())
    }

    /// Leaves, of a folder that went to the history, what the manifest knows of it; the rest goes to quarantine.
    pub(crate) fn sort_out(&self, manifest: &View, root: RootId, path: &RelPath, point: PointNo) -> Result<(), StandbyError> {
        let Ok(folder) = self.disk.open_dir(&self.root(root).history, point.to_string().as_bytes()) else { return Ok(()) };
        let name = trash_name(root, path);
        if !self.disk.stat(&folder, &name).is_ok_and(|stat| stat.kind == FileKind::Dir) {
            return Ok(());
        }
        let mut dirs = vec![(path.clone(), name)];
        while let Some((path, at)) = dirs.pop() {
            let fail = || io("looking at what is kept of", path.as_bytes());
            let dir = self.disk.open_dir(&folder, &at).map_err(fail())?;
            for listed in self.disk.list(&dir).map_err(fail())? {
                let is_dir = listed.kind == FileKind::Dir;
                let below = path.join(&listed.name).ok();
                let row = below.as_ref().map_or(Ok(None), |below| manifest.manifest(root, below))?;
                match below {
                    Some(below) if row.is_some_and(|row| row.entry.is_dir() == is_dir) => {
                        if is_dir {
                            dirs.push((below, [&at, b"/".as_slice(), &listed.name].concat()));
                        }
                    }
                    _ => self.quarantine(root, &dir, &listed.name, &path)?,
                }
            }
        }
        Ok(())
    }

    /// Moves something that coldspare didn't put there out of the way, and says so.
    pub(crate) fn quarantine(&self, root: RootId, dir: &D::Dir, name: &[u8], path: &RelPath) -> Result<(), StandbyError> {
        let quarantine = self.open_quarantine(root)?;
        let to = self.free_name(&quarantine, b"", path)?;
        self.disk.rename(dir, name, &quarantine, &to).map_err(io("moving to quarantine", path.as_bytes()))?;
        // Out of the trash, say: nothing that is swept may come back there.
        self.disk.sync_dir(&quarantine).map_err(io("syncing the quarantine for", path.as_bytes()))?;
        tracing::error!(
            path = %path,
            quarantine = %coldspare_core::path::escape(&to),
            "something in the standby's tree was not put there by coldspare; it was moved to .coldspare/quarantine"
        );
        Ok(())
    }

    /// A name in the quarantine for what stood at `path`, which nothing there has: not even if the store that had given names
    /// before is lost.
    ///
    /// # Errors
    /// `Io`: nobody knows whether it is free.
    pub(crate) fn free_name(&self, quarantine: &D::Dir, what: &[u8], path: &RelPath) -> Result<Vec<u8>, StandbyError> {
        let mut last = path.name();
        last = &last[..last.len().min(200)];
        loop {
            let name = [&self.fresh_name(), b"-".as_slice(), what, last].concat();
            match self.disk.stat(quarantine, &name) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(name),
                Err(e) => return Err(io("looking into the quarantine for", path.as_bytes())(e)),
            }
        }
    }

    /// The folder of quarantines, made when it isn't there.
    pub(crate) fn open_quarantine(&self, root: RootId) -> Result<D::Dir, StandbyError> {
        let control = &self.root(root).control;
        match self.disk.create_dir(control, QUARANTINE) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            made => made.and_then(|()| self.disk.sync_dir(control)).map_err(io("making the folder", QUARANTINE))?,
        }
        self.disk.open_dir(control, QUARANTINE).map_err(io("opening the folder", QUARANTINE))
    }

    /// Removes a staged thing with all below it.
    pub(crate) fn remove_all(&self, dir: &D::Dir, name: &[u8]) -> std::io::Result<()> {
        match self.disk.remove_file(dir, name) {
            Err(e) if matches!(e.kind(), ErrorKind::IsADirectory | ErrorKind::PermissionDenied) => {
                let own = self.disk.open_dir(dir, name)?;
                for listed in self.disk.list(&own)? {
                    self.remove_all(&own, &listed.name)?;
                }
                self.disk.remove_dir(dir, name)
            }
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

fn is_left(e: &std::io::Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty | ErrorKind::IsADirectory | ErrorKind::NotADirectory)
}

pub(crate) fn trash_name(root: RootId, path: &RelPath) -> Vec<u8> {
    blake3::hash(&key::encode(root, path)).to_hex()[..32].as_bytes().to_vec()
}

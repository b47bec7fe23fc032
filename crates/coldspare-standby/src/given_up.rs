//! What a promotion to an earlier point gives up: told before, and kept in a quarantine.
//!
//! The history of a standby ends with its promotion, and goes once it is a standby again. So what the last tree of the active
//! had beyond the point gets second names in `quarantine/<time>-point-<n>/`, with a list, as divergence does (G5).
//!
//! Invariants: the tree and the history stay as they are; every step may be taken again.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::sync::PoisonError;

use coldspare_core::git::family::Repository;
use coldspare_core::{RelPath, RootId, key};
use coldspare_os::Disk;

use crate::divergence::{LIST, TREE, list_line};
use crate::error::{StandbyError, io};
use crate::missing::unit_of;
use crate::points::{Point, PointNo};
use crate::purge::QUARANTINE;
use crate::standby::Standby;
use crate::store::{HISTORY, MANIFEST};
use crate::tree::Tree;

/// What lies behind a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenUp {
    /// The points that the active brought later.
    pub points: Vec<Point>,
    /// The repositories, and the files outside of them, that changed since.
    pub repositories: BTreeSet<Repository>,
}

impl<D: Disk> Standby<D> {
    /// What going back to a point gives up; the same before and after.
    ///
    /// Cost: memory for each path that changed since.
    ///
    /// # Errors
    /// `UnknownPoint`, `Store`, `Damaged`.
    pub fn given_up(&self, to: PointNo) -> Result<GivenUp, StandbyError> {
        let _nothing_goes = self.history_lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.point(to)?;
        let points: Vec<Point> = self.points()?.into_iter().filter(|point| point.no > to && !point.is_rewind).collect();
        if points.is_empty() {
            return Ok(GivenUp { points, repositories: BTreeSet::new() });
        }
        let undone = self.undone(to, &self.store.view(HISTORY)?)?;
        let manifest = self.store.view(MANIFEST)?;
        let trees = [Tree::now(self, &manifest)];
        let mut units: BTreeSet<Repository> = BTreeSet::new();
        for (k, before) in &undone {
            let (root, path) = key::decode(k).map_err(|e| self.store.damaged(e.to_string()))?;
            // What is in a folder stands for it.
            if !before.row.as_ref().is_some_and(|row| row.entry.is_dir()) {
                units.insert((root, unit_of(&trees, root, &path)?));
            }
        }
        let is_in_another = |(root, path): &Repository| path.ancestors().any(|above| units.contains(&(*root, above)));
        let repositories = units.iter().filter(|unit| !is_in_another(unit)).cloned().collect();
        Ok(GivenUp { points, repositories })
    }

    /// Gives what the last tree of the active had, and the tree as it is lacks, a name in the quarantine, durably; the names of
    /// the folders, one a root that has any.
    ///
    /// The tree is an earlier point.
    ///
    /// Cost: a link for each file that differs; one sync a filesystem.
    ///
    /// # Errors
    /// `NotKept` when the history lacks something; `Store`, `Damaged`, `Io`.
    pub fn keep_given_up(&self) -> Result<Vec<String>, StandbyError> {
        let _nothing_goes = self.history_lock.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(last) = self.points()?.into_iter().rfind(|point| !point.is_rewind) else { return Ok(Vec::new()) };
        let undone = self.undone(last.no, &self.store.view(HISTORY)?)?;
        let manifest = self.store.view(MANIFEST)?;
        let mut kept = Vec::new();
        for number in 0..self.root_count() {
            let root = RootId(number);
            let mut list = String::new();
            for (k, before) in &undone {
                let (at, path) = key::decode(k).map_err(|e| self.store.damaged(e.to_string()))?;
                let (Some(row), true) = (&before.row, at == root) else { continue };
                let is_same = manifest.manifest(root, &path)?.is_some_and(|now| now.entry.body == row.entry.body);
                if row.entry.is_dir() || is_same {
                    continue;
                }
                let not_kept = || StandbyError::NotKept { point: last.no, path: path.clone() };
                let (from, name) = self.kept_place(root, &path, before.kept.ok_or_else(not_kept)?).map_err(|_| not_kept())?;
                let to = self.given_up_dir(root, &last, &path)?;
                match self.disk.link(&from, &name, &to, path.name()) {
                    Err(e) if e.kind() == ErrorKind::AlreadyExists => {} // of an earlier try
                    Err(e) if e.kind() == ErrorKind::NotFound => return Err(not_kept()),
                    linked => linked.map_err(io("keeping in quarantine", path.as_bytes()))?,
                }
                list.push_str(&list_line(&path, row, "given up", self.shown(&from, &name, &row.entry)));
                list.push('\n');
            }
            if !list.is_empty() {
                kept.push(self.list_given_up(root, &last, list.as_bytes())?);
            }
        }
        Ok(kept)
    }

    /// Writes the list, durably with all that it names.
    fn list_given_up(&self, root: RootId, last: &Point, list: &[u8]) -> Result<String, StandbyError> {
        let fail = || io("writing the list of", QUARANTINE);
        let dir = self.given_up_folder(root, last)?;
        match self.disk.remove_file(&dir, LIST) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(fail()(e)),
            _ => {}
        }
        let file = self.disk.create_file(&dir, LIST).map_err(fail())?;
        self.disk.write_at(&file, 0, list).map_err(fail())?;
        self.synced(self.disk.sync_fs(&self.root(root).dir).map_err(io("syncing", QUARANTINE)))?;
        let name = String::from_utf8_lossy(&self.given_up_name(last)).into_owned();
        Ok(self.root(root).path.join(".coldspare/quarantine").join(name).display().to_string())
    }

    fn given_up_name(&self, last: &Point) -> Vec<u8> {
        [self.time_name(last.applied.as_of_ms), format!("-point-{}", last.no).into_bytes()].concat()
    }

    fn given_up_folder(&self, root: RootId, last: &Point) -> Result<D::Dir, StandbyError> {
        let outer = self.open_quarantine(root)?;
        self.made_dir(&outer, &self.given_up_name(last), &RelPath::root())
    }

    fn given_up_dir(&self, root: RootId, last: &Point, path: &RelPath) -> Result<D::Dir, StandbyError> {
        let mut at = self.given_up_folder(root, last)?;
        let parents = path.parent().unwrap_or_else(RelPath::root);
        for name in std::iter::once(TREE).chain(parents.components()) {
            at = self.made_dir(&at, name, path)?;
        }
        Ok(at)
    }
}

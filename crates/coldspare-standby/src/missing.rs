//! What the active is known to have more than the tree: what a promotion without it loses for certain, or may.
//!
//! Any other repository may have changed too, since the time as of which the tree is; what is listed here is what the
//! active said before it fell silent.
//!
//! Invariants: what the active named is listed until a changeset brought it, or the active has nothing newer. Nothing here
//! decides what becomes of the tree.

use std::collections::{BTreeMap, BTreeSet};

use coldspare_core::git::{self, Part, family::Repository};
use coldspare_core::{RelPath, RootId, key};
use coldspare_os::Disk;
use redb::{ReadableTable, ReadableTableMetadata, WriteTransaction};

use crate::error::StandbyError;
use crate::row::PendingRow;
use crate::standby::{Changeset, Standby};
use crate::store::{KEPT, MANIFEST, NAMED, PENDING, View};
use crate::tree::Tree;

/// How it is known that the active has more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// It named something in a changeset that did not come to its end, left it to a later one, or began to send it as bulk.
    Unfinished,
    /// References came that lacked their objects: the repository stayed as it was.
    Incomplete,
    /// It holds something back.
    HeldBack,
    /// The tree's copy is damaged, and was asked for again.
    Damaged,
}

/// LIMIT: repositories and files that are noted; beyond, nothing but the time tells.
const NAMED_MAX: u64 = 10_000;

type Place = (RootId, RelPath);

impl Why {
    /// The word for status output.
    pub fn word(self) -> &'static str {
        match self {
            Why::Unfinished => "unfinished",
            Why::Incomplete => "incomplete",
            Why::HeldBack => "held-back",
            Why::Damaged => "damaged",
        }
    }
}

impl<D: Disk> Standby<D> {
    /// The repositories, and the files outside of them, of which the active is known to have more than the tree.
    ///
    /// Cost: a pass over what an unfinished changeset staged, with some look-ups a repository.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn missing(&self) -> Result<BTreeMap<Repository, BTreeSet<Why>>, StandbyError> {
        let mut found: BTreeMap<Repository, BTreeSet<Why>> = BTreeMap::new();
        let (manifest, pending) = (self.store.view(MANIFEST)?, self.store.view(PENDING)?);
        let standing = self.standing();
        let is_own = standing.committed.is_some() || standing.rewind.is_some_and(|rewind| !rewind.is_done);
        if !is_own {
            for unit in self.named_by_rows(&pending)? {
                found.entry(unit).or_default().insert(Why::Unfinished);
            }
        }
        let trees = [Tree::now(self, &manifest), Tree::next(self, &manifest, self.store.view(PENDING)?)];
        let mut named: Vec<(Place, Why)> = Vec::new();
        self.store.for_each_key(NAMED, |k| {
            named.push((pending.path_of(k)?, Why::Unfinished));
            Ok(())
        })?;
        let changeset = self.current().ok();
        named.extend(changeset.iter().flat_map(|changeset| Self::unfinished_paths(changeset)).map(|place| (place, Why::Unfinished)));
        named.extend(self.incomplete()?.into_iter().map(|place| (place, Why::Incomplete)));
        named.extend(self.held_back()?.into_iter().map(|problem| ((problem.root, problem.path), Why::HeldBack)));
        named.extend(self.wanted()?.into_iter().map(|place| (place, Why::Damaged)));
        for ((root, path), why) in named {
            found.entry((root, unit_of(&trees, root, &path)?)).or_default().insert(why);
        }
        Ok(found)
    }

    /// The active has nothing newer than the tree.
    ///
    /// # Errors
    /// `Store`.
    pub fn nothing_is_missing(&self) -> Result<(), StandbyError> {
        if self.store.is_empty(NAMED)? {
            return Ok(());
        }
        self.store.write_lazily(|txn| txn.open_table(NAMED)?.retain(|_, _| false).map_err(Into::into))
    }

    /// What an unfinished changeset names by its rows, and by what it keeps.
    pub(crate) fn named_by_rows(&self, pending: &View) -> Result<BTreeSet<Repository>, StandbyError> {
        let mut found = BTreeSet::new();
        if self.applied().is_none() {
            return Ok(found); // there is no tree to be promoted
        }
        let manifest = self.store.view(MANIFEST)?;
        let trees = [Tree::now(self, &manifest), Tree::next(self, &manifest, self.store.view(PENDING)?)];
        let mut last: Option<Place> = None;
        let mut each = |root: RootId, path: &RelPath| -> Result<(), StandbyError> {
            if !last.as_ref().is_some_and(|(r, unit)| *r == root && path.is_within(unit)) {
                let unit = (root, unit_of(&trees, root, path)?);
                found.insert(unit.clone());
                last = Some(unit);
            }
            Ok(())
        };
        pending.for_each_reversed(|root, path, row: PendingRow| match &row.entry {
            // Folders above what changed get new times.
            Some(entry) if entry.is_dir() && row.action.staged().is_none() => Ok(()),
            _ => each(root, &path),
        })?;
        self.store.for_each_key(KEPT, |k| {
            let (root, path) = pending.path_of(k)?;
            each(root, &path)
        })?;
        Ok(found)
    }

    /// Notes the large files that a changeset leaves unfinished.
    pub(crate) fn note_unfinished(&self, changeset: &Changeset<D>) -> Result<(), StandbyError> {
        let paths = Self::unfinished_paths(changeset);
        if paths.is_empty() || self.applied().is_none() {
            return Ok(());
        }
        self.store.write_lazily(|txn| note(txn, &paths.into_iter().collect()))
    }

    /// Notes that a file begins to come as bulk.
    pub(crate) fn note_bulk(&self, root: RootId, path: &RelPath) -> Result<(), StandbyError> {
        if self.applied().is_none() {
            return Ok(());
        }
        self.store.write_lazily(|txn| note(txn, &[(root, path.clone())].into()))
    }
}

/// Notes that the active has more of these.
pub(crate) fn note(txn: &WriteTransaction, named: &BTreeSet<Place>) -> Result<(), redb::Error> {
    let mut table = txn.open_table(NAMED)?;
    for (root, path) in named {
        if table.len()? >= NAMED_MAX {
            break;
        }
        table.insert(key::encode(*root, path).as_slice(), ())?;
    }
    Ok(())
}

/// Notes that the active has more of what the changeset under way leaves as it is.
pub(crate) fn note_kept(txn: &WriteTransaction) -> Result<(), redb::Error> {
    let (kept, mut named) = (txn.open_table(KEPT)?, txn.open_table(NAMED)?);
    for row in kept.iter()? {
        if named.len()? >= NAMED_MAX {
            break;
        }
        named.insert(row?.0.value(), ())?;
    }
    Ok(())
}

/// The repository that a path is, or is in; else the path itself.
pub(crate) fn unit_of<D: Disk>(trees: &[Tree<'_, D>], root: RootId, path: &RelPath) -> Result<RelPath, StandbyError> {
    for base in path.ancestors().chain([path.clone()]) {
        for tree in trees {
            if tree.is_repository(root, &base)? {
                return Ok(base);
            }
        }
    }
    // One of which not enough came to tell it by what it has.
    let by_shape = match git::part(path) {
        Part::Other => None,
        Part::PackedRefs | Part::Head => path.parent(),
        _ => git::possible_repositories(path).into_iter().next(),
    };
    Ok(by_shape.unwrap_or_else(|| path.clone()))
}

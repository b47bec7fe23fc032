//! Before a commit: references have the objects that they name, staged or present, here or by alternates.
//!
//! That is looked at for each reference that changed and, where a repository loses objects, or a way to borrow them, for
//! all of it and of those that borrow from it. A repository of which it isn't true stays as it is, with its family, and is
//! asked for again (G2). Objects behind the one that is named are not looked at: the active's order of reading stands for
//! them.
//!
//! A repository that was found incomplete before stays as it was, and may need anything: as long as it does, nothing goes
//! from those that it borrows from.
//!
//! Invariants: a reference that didn't change holds nothing back unless it has its object now.

use std::collections::BTreeSet;

use coldspare_core::git::family::{Alternate, Repository, closure};
use coldspare_core::git::reference::{Reference, parse_loose};
use coldspare_core::git::{self, ALTERNATES, ObjectId, Part};
use coldspare_core::{Body, Entry, RelPath, RootId, seeded_bug};
use coldspare_os::Disk;

use crate::error::StandbyError;
use crate::row::PendingRow;
use crate::standby::{Changeset, Standby, Unrecorded};
use crate::store::{LINKS, PENDING, View};
use crate::tree::{ALTERNATES_DEPTH_MAX, Tree};

const LOOSE_REFERENCES: [&[u8]; 2] = [b"refs", b"stash-refs"];
const PACKED_REFERENCES: [&[u8]; 2] = [b"packed-refs", b"stash-packed-refs"];

/// What is compared, and the changeset's rows.
struct Check<'a, D: Disk> {
    standby: &'a Standby<D>,
    manifest: &'a View,
    pending: View,
    now: Tree<'a, D>,
    next: Tree<'a, D>,
    /// Repositories that were incomplete before, and that the changeset says nothing of.
    kept: BTreeSet<Repository>,
}

/// Which repositories of the changeset can't change without another.
#[derive(Default)]
struct Ties {
    /// One that borrows objects, and what it borrows from.
    borrows: Vec<(Repository, Repository)>,
    /// Two that share a file.
    links: Vec<(Repository, Repository)>,
}

impl<D: Disk> Standby<D> {
    /// Finds the repositories whose references need what isn't there, and takes them back with their families.
    ///
    /// What a changeset takes away by not naming it must have its rows by now.
    ///
    /// Cost: a pass over the changeset's rows; for each reference that changed a look at a loose object, or at one stretch
    /// of each pack index of the repository; of a repository that loses objects all its references and indexes.
    pub(crate) fn take_back_incomplete(&self, changeset: &Changeset<D>, sync: &mut Unrecorded) -> Result<Vec<Repository>, StandbyError> {
        let manifest = &changeset.manifest;
        let check = Check {
            standby: self,
            manifest,
            pending: self.store.view(PENDING)?,
            now: Tree::now(self, manifest),
            next: Tree::next(self, manifest, self.store.view(PENDING)?),
            kept: self.incomplete_outside(changeset)?,
        };
        let mut losing = check.losing_repositories()?;
        let ties = if losing.is_empty() { None } else { Some(check.ties()?) };
        // LIMIT: alternates of alternates, as in git; each pass goes one further.
        for _ in 0..ALTERNATES_DEPTH_MAX {
            let borrows = ties.iter().flat_map(|ties| &ties.borrows);
            let more: Vec<_> = borrows.filter(|(_, lender)| losing.contains(lender)).map(|(borrower, _)| borrower.clone()).collect();
            losing.extend(more);
        }
        let mut incomplete = BTreeSet::new();
        for at in check.changed_repositories()?.union(&losing) {
            if check.kept.contains(at) {
                tracing::error!(repository = %at.1, "what it borrows from loses objects while it is incomplete; both stay as they are");
                incomplete.insert(at.clone());
            } else if check.next.is_repository(at.0, &at.1)?
                && let Some(missing) = check.missing(at, losing.contains(at))?
            {
                tracing::error!(repository = %at.1, object = %missing, "a reference names an object that was neither sent nor there, or that goes; the repository stays as it is");
                incomplete.insert(at.clone());
            }
        }
        if incomplete.is_empty() || seeded_bug!(ReferencesAreNotChecked) {
            return Ok(Vec::new());
        }
        let Ties { mut borrows, links } = ties.map_or_else(|| check.ties(), Ok)?;
        borrows.extend(links);
        drop(check);
        let family = closure(&incomplete, &borrows);
        self.take_back(changeset, family.clone(), sync)?;
        // All of them: what was taken back of the family has to be sent again too.
        Ok(family.into_iter().collect())
    }
}

impl<D: Disk> Check<'_, D> {
    /// The repositories of which the changeset brings references.
    fn changed_repositories(&self) -> Result<BTreeSet<Repository>, StandbyError> {
        let mut found = BTreeSet::new();
        self.pending.for_each_reversed(|root, path, row: PendingRow| {
            if is_brought(&row)
                && let Some(repository) = repository_of(&path)
            {
                found.insert((root, repository));
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The repositories from which the changeset takes objects, or a way to borrow them; some will be none.
    fn losing_repositories(&self) -> Result<BTreeSet<Repository>, StandbyError> {
        let mut found = BTreeSet::new();
        self.pending.for_each_reversed(|root, path, row: PendingRow| {
            if let Some(base) = self.taken_from(root, &path, &row)?.filter(|_| !seeded_bug!(LossesAreNotChecked)) {
                found.insert((root, base));
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The repository from which a row takes, or in which it replaces, something that objects are found by.
    fn taken_from(&self, root: RootId, path: &RelPath, row: &PendingRow) -> Result<Option<RelPath>, StandbyError> {
        let is_link = matches!(row.entry, Some(Entry { body: Body::Hardlink { .. }, .. }));
        if row.entry.is_some() && row.action.staged().is_none() && !is_link {
            return Ok(None); // it is what it was
        }
        let Some(old) = self.manifest.manifest(root, path)? else { return Ok(None) };
        let inside = git::possible_repositories(path).into_iter().rev().find(|base| path.below(base).is_some_and(holds_objects));
        if inside.is_some() || !old.entry.is_dir() {
            return Ok(inside);
        }
        let objects = path.join(b"objects").map_or(Ok(None), |path| self.manifest.manifest(root, &path))?;
        Ok(objects.map(|_| path.clone()))
    }

    /// The repositories of the changeset, and the kept ones, that are tied to others.
    fn ties(&self) -> Result<Ties, StandbyError> {
        let mut ties = Ties::default();
        for at in self.touched_repositories()?.union(&self.kept) {
            // By what it has too: that is what it borrows by if it stays as it is.
            for alternate in self.next.alternates(at)?.into_iter().chain(self.now.alternates(at)?) {
                if let Alternate::Replicated(lender) = alternate {
                    ties.borrows.push((at.clone(), lender));
                }
            }
        }
        // A link and what it points to are one file: one can't be taken back without the other.
        self.standby.store.for_each_key(LINKS, |k| {
            let (root, path) = self.pending.path_of(k)?;
            let row = self.pending.pending(root, &path)?;
            if let Some(PendingRow { entry: Some(Entry { body: Body::Hardlink { to }, .. }), .. }) = row
                && let (Some(own), Some(other)) = (self.repository_around(root, &path)?, self.repository_around(root, &to)?)
                && own != other
            {
                ties.links.push((own, other));
            }
            Ok(())
        })?;
        Ok(ties)
    }

    /// The repositories of which the changeset brings, or takes, anything.
    fn touched_repositories(&self) -> Result<BTreeSet<Repository>, StandbyError> {
        let mut found = BTreeSet::new();
        self.pending.for_each_reversed(|root, path, row: PendingRow| {
            let is_folder = row.entry.is_some_and(|entry| entry.is_dir());
            for base in git::possible_repositories(&path).into_iter().filter(|base| is_folder || *base != path) {
                let at = (root, base);
                if !found.contains(&at) && self.next.is_repository(root, &at.1)? {
                    found.insert(at);
                }
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The innermost repository that a path is in.
    fn repository_around(&self, root: RootId, path: &RelPath) -> Result<Option<Repository>, StandbyError> {
        for base in git::possible_repositories(path).into_iter().rev() {
            if self.next.is_repository(root, &base)? {
                return Ok(Some((root, base)));
            }
        }
        Ok(None)
    }

    /// An object that a reference of the repository names and that won't be there: of those that changed, or of any that
    /// have theirs now.
    fn missing(&self, at: &Repository, is_losing: bool) -> Result<Option<ObjectId>, StandbyError> {
        let mut wanted = self.named_by_changes(at)?;
        self.next.remove_found(at, &mut wanted)?;
        if !wanted.is_empty() || !is_losing {
            return Ok(wanted.pop_first());
        }
        let mut wanted = self.named(at)?;
        self.next.remove_found(at, &mut wanted)?;
        let mut never = wanted.clone();
        self.now.remove_found(at, &mut never)?;
        Ok(wanted.difference(&never).next().copied())
    }

    /// The objects that references name which the changeset brings, without those that were named before.
    fn named_by_changes(&self, at: &Repository) -> Result<BTreeSet<ObjectId>, StandbyError> {
        let (root, repository) = at;
        let mut wanted = BTreeSet::new();
        let mut loose = |path: &RelPath, row: &PendingRow| -> Result<(), StandbyError> {
            if is_brought(row) {
                wanted.extend(self.loose(*root, path)?);
            }
            Ok(())
        };
        if let Ok(head) = repository.join(b"HEAD")
            && let Some(row) = self.pending.pending(*root, &head)?
        {
            loose(&head, &row)?;
        }
        for name in LOOSE_REFERENCES {
            if let Ok(dir) = repository.join(name) {
                self.pending.for_each_below(*root, &dir, &mut |_, path, row| loose(&path, &row).map(|()| true))?;
            }
        }
        for name in PACKED_REFERENCES {
            let Ok(path) = repository.join(name) else { continue };
            if self.pending.pending(*root, &path)?.is_some_and(|row| is_brought(&row)) {
                let mut old = BTreeSet::new();
                self.now.each_packed(*root, &path, &mut |_, id| {
                    old.insert(id);
                    Ok(())
                })?;
                wanted.extend(self.unshadowed(at, &path)?.difference(&old));
            }
        }
        Ok(wanted)
    }

    /// The objects that all references name.
    fn named(&self, at: &Repository) -> Result<BTreeSet<ObjectId>, StandbyError> {
        let (root, repository) = at;
        let mut wanted = BTreeSet::new();
        if let Ok(head) = repository.join(b"HEAD") {
            wanted.extend(self.loose(*root, &head)?);
        }
        for name in LOOSE_REFERENCES {
            if let Ok(dir) = repository.join(name) {
                self.next.for_each_file_below(*root, &dir, &mut |path| {
                    wanted.extend(self.loose(*root, path)?);
                    Ok(())
                })?;
            }
        }
        for name in PACKED_REFERENCES {
            if let Ok(path) = repository.join(name) {
                wanted.append(&mut self.unshadowed(at, &path)?);
            }
        }
        Ok(wanted)
    }

    /// The object that a loose reference names.
    fn loose(&self, root: RootId, path: &RelPath) -> Result<Option<ObjectId>, StandbyError> {
        Ok(self.next.content(root, path)?.and_then(|content| match parse_loose(&content) {
            Ok(Reference::Object(id)) => Some(id),
            _ => None,
        }))
    }

    /// The objects of packed references that aren't loose too: a packed value behind a loose one means nothing, git keeps no
    /// objects for that.
    fn unshadowed(&self, at: &Repository, path: &RelPath) -> Result<BTreeSet<ObjectId>, StandbyError> {
        let (root, repository) = at;
        let mut found = BTreeSet::new();
        self.next.each_packed(*root, path, &mut |name, id| {
            let loose = repository.join_path(name).map_or(Ok(None), |loose| self.next.entry(*root, &loose))?;
            if loose.is_none_or(|entry| entry.is_dir()) {
                found.insert(id);
            }
            Ok(())
        })?;
        Ok(found)
    }
}

/// Whether a row brings a file with other content.
fn is_brought(row: &PendingRow) -> bool {
    row.action.staged().is_some() && row.entry.as_ref().and_then(Entry::digest).is_some()
}

/// Whether what is at `inside` in a repository is, holds or leads to objects.
fn holds_objects(inside: &[u8]) -> bool {
    match inside.strip_prefix(b"objects/pack/") {
        Some(name) => name.ends_with(b".pack") || name.ends_with(b".idx"),
        None => {
            let is_fan = |rest: &[u8]| matches!(RelPath::new(rest), Ok(path) if git::part(&path) == Part::LooseObject);
            matches!(inside, b"objects" | b"objects/pack" | b"objects/info") || inside == ALTERNATES || is_fan(inside)
        }
    }
}

/// The repository that a reference is of, by the shape of its path.
fn repository_of(path: &RelPath) -> Option<RelPath> {
    match git::part(path) {
        Part::PackedRefs | Part::Head => path.parent(),
        Part::LooseRef => git::possible_repositories(path).into_iter().next().filter(|base| base != path),
        _ => None,
    }
}

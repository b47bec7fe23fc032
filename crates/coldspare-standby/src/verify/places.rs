//! A look at some places: what somebody may have changed there.

use std::sync::Mutex;

use coldspare_core::{Body, Problem, ProblemKind, RelPath, RootId};
use coldspare_os::{Disk, FileKind};

use super::{Check, Depth, Progress};
use crate::error::StandbyError;
use crate::row::ManifestRow;
use crate::standby::{Standby, lock};
use crate::store::MANIFEST;

/// What to look at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The root.
    pub root: RootId,
    /// The path in it.
    pub path: RelPath,
    /// How much of it.
    pub extent: Extent,
}

/// How much of a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Extent {
    /// The entry alone.
    Itself,
    /// It, and when it is a folder all in it.
    Below,
}

impl<D: Disk> Standby<D> {
    /// What differs from the manifest at `places`; what is in something foreign is not named by itself. `None`: nothing can
    /// be said, since there is no changeset yet, or one of which not all is in place.
    ///
    /// What differs at first is looked at again between two changesets (G7). Folders are gone through by their metadata,
    /// whatever the depth.
    ///
    /// Cost: one `statx` an entry; `Deep` reads the entries that are named, and once more, while no changeset is applied,
    /// those that differ.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn verify_places(&self, places: &[Place], depth: Depth) -> Result<Option<Vec<Problem>>, StandbyError> {
        if self.is_in_between() {
            return Ok(None);
        }
        let progress = Progress::default();
        let manifest = self.store.view(MANIFEST)?;
        let check = Check {
            standby: self,
            manifest,
            depth: Depth::Quick,
            again: None,
            progress: &progress,
            suspects: Mutex::default(),
            failure: Mutex::default(),
        };
        rayon::scope(|scope| {
            for Place { root, path, extent } in places {
                let check = &check;
                scope.spawn(move |scope| {
                    if let Err(e) = self.look_at(check, scope, *root, path, *extent, depth) {
                        lock(&check.failure).get_or_insert(e);
                    }
                });
            }
        });
        if let Some(failure) = lock(&check.failure).take() {
            return Err(failure);
        }
        let mut suspects = std::mem::take(&mut *lock(&check.suspects));
        suspects.sort();
        suspects.dedup();
        let _between_changesets = self.tree_lock.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        if self.is_in_between() {
            return Ok(None);
        }
        let mut problems = self.judge_suspects(depth, suspects)?;
        let foreign: std::collections::BTreeSet<_> =
            problems.iter().filter(|p| p.kind == ProblemKind::Extra).map(|p| (p.root, p.path.clone())).collect();
        problems.retain(|p| !p.path.ancestors().any(|above| foreign.contains(&(p.root, above))));
        Ok(Some(problems))
    }

    /// Calls `each` with the folders of the manifest at and below a path.
    ///
    /// Cost: a pass over the rows there.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn for_each_folder(&self, root: RootId, path: &RelPath, mut each: impl FnMut(&RelPath)) -> Result<(), StandbyError> {
        let manifest = self.store.view(MANIFEST)?;
        if manifest.manifest(root, path)?.is_none_or(|row| !row.entry.is_dir()) {
            return Ok(());
        }
        each(path);
        manifest.for_each_below(root, path, &mut |_, path, row: ManifestRow| {
            if row.entry.is_dir() {
                each(&path);
            }
            Ok(true)
        })
    }

    /// Whether the manifest describes no tree, or not the one on disk.
    fn is_in_between(&self) -> bool {
        self.applied().is_none() || self.standing().committed.is_some()
    }

    fn look_at<'s>(
        &'s self,
        check: &'s Check<'s, D>,
        scope: &rayon::Scope<'s>,
        root: RootId,
        path: &RelPath,
        extent: Extent,
        depth: Depth,
    ) -> Result<(), StandbyError> {
        let row = check.manifest.manifest(root, path)?;
        if let Some(Body::Hardlink { to }) = row.as_ref().map(|row| &row.entry.body) {
            // The content is the other name's.
            self.look_at(check, scope, root, to, Extent::Itself, depth)?;
        }
        if extent == Extent::Below && row.as_ref().is_some_and(|row| row.entry.is_dir()) {
            let is_folder = self.disk.open_dir(&self.root(root).dir, path.as_bytes()).is_ok();
            if is_folder {
                check.folder(scope, root, path.clone(), row);
                return Ok(());
            }
        }
        let is_sound = depth == Depth::Deep && row.is_some_and(|row| self.scrub_entry(root, path, &row, &check.progress.pace).is_some());
        if !is_sound {
            check.suspect(root, path.clone());
        }
        Ok(())
    }

    /// Whether what the manifest lacks is none of the standby's business.
    pub(super) fn is_excluded(&self, root: RootId, path: &RelPath, kind: FileKind) -> bool {
        use coldspare_core::exclude::IsDir;
        self.root(root).exclude.covers(path, if kind == FileKind::Dir { IsDir::Yes } else { IsDir::No })
    }
}

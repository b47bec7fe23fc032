//! The repositories that a cycle meets, and what becomes of each: whole, left to the next changeset, or held back.
//!
//! A repository is shipped whole or not at all: when it can't be, the standby keeps what it has of it, and of all
//! repositories tied to it (G2).
//!
//! Invariants: a repository that is not `Whole` at the end of a cycle changes nothing on the standby with this
//! changeset, nor does any of its family that changed in the cycle.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use coldspare_core::git::family::Repository;
use coldspare_core::{RelPath, RootId, seeded_bug};

use crate::run::lock;

/// One repository of a cycle.
#[derive(Debug)]
pub(crate) struct Unit {
    pub(crate) at: Repository,
    /// How much of it is looked at.
    pub(crate) extent: Mutex<Extent>,
    /// Operations that were, or are about to be, handed over.
    pub(crate) ops: AtomicU64,
    /// Stands for all references as they were captured; 0 when only hinted ones were.
    pub(crate) references: AtomicU64,
    /// The inode of its directory, before anything of it was read.
    pub(crate) ino: Option<u64>,
    /// Objects, and folders of them, that were handed over as gone.
    removed: Mutex<Vec<RelPath>>,
    /// Objects that were seen, or hinted, and gone before they were read.
    vanished: Mutex<Vec<RelPath>>,
    /// Folders of objects that were met for the first time by a hint: what went before that is known to nobody.
    folders_met: AtomicUsize,
    /// The losses that packs were looked at after.
    accounted: AtomicUsize,
    /// Whether packs came: what is derived from them may be whole again.
    pub(crate) has_new_packs: AtomicBool,
    fate: Mutex<Fate>,
}

/// How much of a repository is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// What was hinted.
    Hinted,
    /// All of it.
    Full,
}

/// What becomes of a repository with this changeset.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is shipped as it was captured.
    #[default]
    Whole,
    /// A reference is held back: objects that only it may need are not removed.
    ReferenceHeld,
    /// It changed while it was read: the next changeset brings it.
    Again(String),
    /// Content of it is sent as bulk: a changeset brings it after that.
    Waits,
    /// Something of it can't be had: it stays as it is on the standby until that is mended.
    Held(String),
}

impl Unit {
    pub(crate) fn fate(&self) -> Fate {
        self.lock().clone()
    }

    /// It changed under the capture.
    pub(crate) fn again(&self, why: &str) {
        let mut fate = self.lock();
        if matches!(*fate, Fate::Whole | Fate::ReferenceHeld) {
            *fate = Fate::Again(why.into());
        }
    }

    /// Content of it has to be sent as bulk first.
    pub(crate) fn wait(&self) {
        let mut fate = self.lock();
        if !matches!(*fate, Fate::Held(_)) {
            *fate = Fate::Waits;
        }
    }

    pub(crate) fn waits(&self) -> bool {
        *self.lock() == Fate::Waits
    }

    /// A part that others need can't be had.
    pub(crate) fn hold(&self, why: &str) {
        *self.lock() = Fate::Held(why.into());
    }

    /// A reference of it is held back.
    pub(crate) fn hold_reference(&self) {
        let mut fate = self.lock();
        if *fate == Fate::Whole {
            *fate = Fate::ReferenceHeld;
        }
    }

    /// An object that was seen, or hinted, was gone when it was to be read.
    pub(crate) fn note_vanished(&self, path: RelPath) {
        tracing::trace!(%path, "vanished");
        lock(&self.vanished).extend(Some(path).filter(|_| !seeded_bug!(VanishedObjectsAreForgotten)));
    }

    pub(crate) fn vanished(&self) -> Vec<RelPath> {
        lock(&self.vanished).clone()
    }

    /// A folder of objects was met, of which nobody knows what was in it before.
    pub(crate) fn note_folder_met(&self) {
        self.folders_met.fetch_add(usize::from(!seeded_bug!(FoldersThatAreMetLostNothing)), Ordering::Relaxed);
    }

    /// How many objects went, seen or known before, or may have gone unseen.
    pub(crate) fn losses(&self) -> usize {
        lock(&self.vanished).len() + lock(&self.removed).len() + self.folders_met.load(Ordering::Relaxed)
    }

    /// Packs that were hinted are looked at from here on: that accounts for the losses so far.
    pub(crate) fn account_for_losses(&self) {
        self.accounted.store(self.losses(), Ordering::Relaxed);
    }

    /// Whether objects went since packs were looked at.
    pub(crate) fn has_new_losses(&self) -> bool {
        self.losses() > self.accounted.load(Ordering::Relaxed)
    }

    /// An object, or a folder of them, is handed over as gone.
    pub(crate) fn note_removed(&self, path: RelPath) {
        lock(&self.removed).push(path);
    }

    /// Whether any object goes from the standby.
    pub(crate) fn has_removed(&self) -> bool {
        !lock(&self.removed).is_empty()
    }

    pub(crate) fn removed(&self) -> Vec<RelPath> {
        lock(&self.removed).clone()
    }

    pub(crate) fn count_op(&self) {
        self.ops.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn has_ops(&self) -> bool {
        self.ops.load(Ordering::Relaxed) > 0
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Fate> {
        lock(&self.fate)
    }
}

/// The repositories of a cycle, by where they are. Memory: one small record a repository that is met.
#[derive(Debug, Default)]
pub(crate) struct Units(RwLock<BTreeMap<Repository, Arc<Unit>>>);

impl Units {
    /// Adds the repository at `at`, whose directory has this inode now; says whether more of it is to be looked at than was
    /// known before.
    pub(crate) fn add(&self, at: Repository, extent: Extent, ino: Option<u64>) -> (Arc<Unit>, IsMore) {
        let mut units = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = units.get(&at) {
            let mut mine = known.extent.lock().unwrap_or_else(PoisonError::into_inner);
            let is_more = *mine == Extent::Hinted && extent == Extent::Full;
            if is_more {
                *mine = extent;
            }
            drop(mine);
            return (known.clone(), if is_more { IsMore::Yes } else { IsMore::No });
        }
        let unit = Arc::new(Unit {
            at: at.clone(),
            extent: Mutex::new(extent),
            ops: AtomicU64::new(0),
            references: AtomicU64::new(0),
            ino,
            removed: Mutex::default(),
            vanished: Mutex::default(),
            folders_met: AtomicUsize::new(0),
            accounted: AtomicUsize::new(0),
            has_new_packs: AtomicBool::new(false),
            fate: Mutex::default(),
        });
        units.insert(at, unit.clone());
        (unit, IsMore::Yes)
    }

    /// The innermost repository that `path` is in, or is.
    pub(crate) fn of(&self, root: RootId, path: &RelPath) -> Option<Arc<Unit>> {
        let units = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if units.is_empty() {
            return None;
        }
        let mut at = path.clone();
        loop {
            if let Some(unit) = units.get(&(root, at.clone())) {
                return Some(unit.clone());
            }
            at = at.parent()?;
        }
    }

    /// The repository at `at`, if it was met.
    pub(crate) fn at(&self, at: &Repository) -> Option<Arc<Unit>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(at).cloned()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Unit>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

/// Whether something was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IsMore {
    Yes,
    No,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(s: &str) -> RelPath {
        RelPath::new(s.as_bytes()).unwrap()
    }

    #[test]
    fn a_path_belongs_to_the_innermost_repository() {
        let units = Units::default();
        units.add((RootId(0), path("r/1")), Extent::Hinted, None);
        units.add((RootId(0), path("r/1/modules/2")), Extent::Full, None);
        let of = |p: &str| units.of(RootId(0), &path(p)).map(|u| u.at.1.to_string());
        assert_eq!(of("r/1"), Some("r/1".into()));
        assert_eq!(of("r/1/refs/heads"), Some("r/1".into()));
        assert_eq!(of("r/1/modules/2/refs"), Some("r/1/modules/2".into()));
        assert_eq!(of("r/10/refs"), None);
        assert!(units.of(RootId(1), &path("r/1")).is_none());
    }

    #[test]
    fn what_is_held_back_is_not_merely_tried_again() {
        let (unit, _) = Units::default().add((RootId(0), path("r")), Extent::Hinted, None);
        unit.hold_reference();
        assert_eq!(unit.fate(), Fate::ReferenceHeld);
        unit.again("moved");
        unit.hold_reference();
        assert_eq!(unit.fate(), Fate::Again("moved".into()));
        unit.hold("broken");
        unit.again("moved");
        assert_eq!(unit.fate(), Fate::Held("broken".into()));
    }
}

//! The end of a cycle: which repositories changed under the capture, and what is kept on the standby because of it.
//!
//! References were read before objects, so that all they need was on disk then. Only what went since can be missing,
//! and git removes only what no reference needs any more, or what a pack has, which was looked at after that went: so
//! nothing is missing unless references changed, too. If they did, what goes from the objects stays on the standby until
//! the next changeset; and if an object went before it was read, and is in no pack either, the repository is left to the
//! next changeset as a whole. So is one that is no longer where it was found.
//!
//! Invariants: what is kept is kept with all below it, and with the family of a kept repository.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use coldspare_core::changeset::Totals;
use coldspare_core::git::family::{Alternate, Repository, closure};
use coldspare_core::git::object::Promise;
use coldspare_core::git::{self, CapturePass, ObjectId};
use coldspare_core::{Baseline, Op, Problem, ProblemKind, RelPath, RootId, seeded_bug};
use coldspare_os::Disk;

use crate::batch::Builder;
use crate::bulk::Item;
use crate::capture::{BARRIER_LIMIT, CaptureError, Certainty, Report};
use crate::dirty::Hint;
use crate::index::Row;
use crate::run::{Run, lock};
use crate::unit::{Extent, Fate, Unit};
use crate::writer::Change;

/// After so many cycles in a row in which a repository changed while it was read, it is reported as held back.
const AGAIN_MAX: u32 = 20;

/// What a cycle left undone.
#[derive(Debug, Default)]
pub(crate) struct Left {
    /// Repositories that the next cycle has to capture.
    pub(crate) again: BTreeMap<Repository, Extent>,
    /// Whether any of them is expected to come with the next cycle, so that the cycle doesn't count as complete.
    pub(crate) is_part: bool,
    /// Repositories that wait for content that is sent as bulk, theirs or that of one they are tied to.
    pub(crate) waits: BTreeMap<Repository, Extent>,
    /// That content.
    pub(crate) put_offs: Vec<Item>,
}

impl<D: Disk> Run<'_, D> {
    /// Finds the repositories that changed under the capture.
    pub(crate) fn validate(&self) -> Result<(), CaptureError> {
        let mut touched = self.units.all();
        touched.retain(|unit| unit.has_ops() || unit.fate() != Fate::Whole);
        for unit in touched.iter().filter(|unit| self.has_moved(unit)) {
            unit.again("it was moved or removed while it was read");
            *lock(&unit.extent) = Extent::Full; // what the next cycle finds under its name has nothing to do with what was hinted
        }
        if touched.is_empty() {
            return Ok(());
        }
        if let Some(watch) = &self.capture.watch {
            watch.barrier(BARRIER_LIMIT)?;
        }
        touched.iter().for_each(|unit| self.note_unseen_losses(unit));
        let at_risk = |unit: &Unit| !unit.removed().is_empty() || !unit.vanished().is_empty();
        for unit in touched.iter().filter(|unit| at_risk(unit) && !unit.waits()) {
            if self.have_references_changed(unit) {
                self.keep_what_went(unit);
            }
        }
        Ok(())
    }

    /// Takes note of objects that are gone by the hints that came meanwhile: they may have gone before they were seen.
    fn note_unseen_losses(&self, unit: &Unit) {
        let (root, repository) = &unit.at;
        let (Some(watch), Ok(objects)) = (&self.capture.watch, repository.join(b"objects")) else { return };
        let mut hinted = Vec::new();
        watch.dirty().for_each_within(*root, &objects, |dir, name| {
            if let Some((name, Hint::Replaced)) = name
                && !git::looks_transient(name)
                && let Ok(path) = dir.join(name)
                && path.below(&objects).and_then(Promise::of_object).is_some()
            {
                hinted.push(path);
            }
        });
        let disk = &self.capture.disk;
        for path in hinted.into_iter().filter(|_| !seeded_bug!(UnseenLossesAreNotNoted)) {
            let found = disk.open_dir(&self.root(*root).dir, path.parent_bytes()).and_then(|dir| disk.stat(&dir, path.name()));
            if found.is_err() {
                unit.note_vanished(path);
            }
        }
    }

    /// Whether a repository is no longer where it was found: what was missing may only have been elsewhere, and the folder
    /// above it may have been watched only since.
    fn has_moved(&self, unit: &Unit) -> bool {
        let now = self.ino_of(&unit.at);
        now.is_none() || now != unit.ino
    }

    /// Whether references of a repository changed since they were read.
    fn have_references_changed(&self, unit: &Unit) -> bool {
        let (root, path) = &unit.at;
        if let Some(watch) = &self.capture.watch {
            let dirty = watch.dirty();
            if !dirty.is_everything() {
                let mut changed = false;
                dirty.for_each_within(*root, path, |dir, name| {
                    let inside = dir.below(path).unwrap_or_default();
                    let (inside, name) = name.map_or((inside.to_vec(), &[][..]), |(name, _)| (crate::discover::join(inside, name), name));
                    changed |= CapturePass::of(&inside) == CapturePass::References && !git::looks_transient(name);
                });
                return changed;
            }
        }
        // Where only hinted references were read and the hints are lost, nothing is known of the others.
        let before = unit.references.load(Ordering::Relaxed);
        before == 0 || self.stamp_references(unit) != before
    }

    /// The references that were read may need what went.
    fn keep_what_went(&self, unit: &Unit) {
        let (root, repository) = &unit.at;
        let objects = repository.join(b"objects").ok();
        for path in self.not_packed(unit, objects.as_ref()).into_iter().filter(|_| !seeded_bug!(RemovedObjectsAreNotKept)) {
            self.keep(*root, &path);
            self.again(*root, &path);
        }
        let vanished = unit.vanished();
        let mut ids = Vec::new();
        for path in &vanished {
            let inside = objects.as_ref().and_then(|objects| path.below(objects)).unwrap_or_default();
            match Promise::of_object(inside) {
                Some(Promise::Loose(id)) => ids.push(id),
                // A pack: nobody knows what was in it.
                Some(_) => return unit.again("references changed and a pack went before it was read"),
                None if inside.len() == 2 => return unit.again("references changed and a folder of objects went before it was read"),
                None => {}
            }
        }
        ids.sort_unstable();
        let mut left: Vec<&[u8]> = ids.iter().map(ObjectId::as_bytes).collect();
        self.remove_found(&unit.at, &mut left, 0);
        if !left.is_empty() {
            unit.again("references changed and objects went before they were read");
        }
    }

    /// What went from the objects of a repository, but for loose ones that are in its packs now: those were there when they
    /// went, and so before packs were looked at. After a repack under load it is nearly all of them.
    fn not_packed(&self, unit: &Unit, objects: Option<&RelPath>) -> Vec<RelPath> {
        let id_of = |path: &RelPath| match Promise::of_object(path.below(objects?)?) {
            Some(Promise::Loose(id)) => Some(id),
            _ => None,
        };
        let (loose, mut others): (Vec<_>, Vec<_>) =
            unit.removed().into_iter().map(|path| (id_of(&path), path)).partition(|(id, _)| id.is_some());
        let mut loose: Vec<(ObjectId, RelPath)> = loose.into_iter().filter_map(|(id, path)| Some((id?, path))).collect();
        loose.sort_unstable();
        let mut left: Vec<&[u8]> = loose.iter().map(|(id, _)| id.as_bytes()).collect();
        self.remove_packed(&unit.at, &mut left);
        let left: BTreeSet<&[u8]> = left.into_iter().collect();
        others.extend(loose.iter().filter(|(id, _)| left.contains(id.as_bytes())).map(|(_, path)| (None, path.clone())));
        others.into_iter().map(|(_, path)| path).collect()
    }

    /// Hands over what is left, keeps what has to be kept, and counts.
    pub(crate) fn finish(&self, result: Result<(), CaptureError>) -> Result<(Report, Left), CaptureError> {
        result?;
        for mut builder in std::mem::take(&mut *lock(&self.builders)) {
            self.flush(&mut builder)?;
        }
        self.validate()?;
        let left = self.keep_families();
        let kept = std::mem::take(&mut *lock(&self.kept));
        let mut last = Builder::default();
        let has_ops = self.counters.ops.load(Ordering::Relaxed) > 0;
        for (root, path) in kept {
            last.change(Change::Unsent { root, path: path.clone(), acked: self.acked });
            // An operation for it, or below it, may have been handed over; without any there is nothing to take back.
            if self.cycle.baseline == Baseline::Full || has_ops {
                self.push(&mut last, Op::Keep { root, path })?;
            }
        }
        self.flush(&mut last)?;
        let count = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
        let c = &self.counters;
        let totals = Totals { ops: count(&c.ops), files_read: count(&c.files_read), bytes_read: count(&c.bytes_read) };
        let is_left = left.is_part || self.is_left.load(Ordering::Relaxed);
        Ok((Report { as_of_ms: 0, totals, entries: count(&c.entries), special: count(&c.special), is_left, is_put_off: false }, left))
    }

    /// Keeps every repository that can't be shipped as it was captured, with its family.
    ///
    /// One that is tied to a repository that is held back, now or since before, is held back too: it may need what that
    /// one has.
    fn keep_families(&self) -> Left {
        let units = self.units.all();
        let mut changed = BTreeSet::new();
        let mut left = Left { put_offs: std::mem::take(&mut *lock(&self.put_offs)), ..Left::default() };
        let mut waits = BTreeSet::new();
        // What is captured now isn't what it was.
        let held = &self.capture.held;
        let is_whole = |at: &Repository| self.units.at(at).is_some_and(|unit| unit.has_ops() && self.fate_of(&unit) == Fate::Whole);
        let are_gone = {
            let mut repositories = held.repositories();
            let before = repositories.len();
            repositories.retain(|at| self.ino_of(at).is_some());
            repositories.len() < before
        };
        let mut held_now: BTreeSet<Repository> =
            held.repositories().iter().filter(|at| !is_whole(at) && !seeded_bug!(EarlierHeldAreForgotten)).cloned().collect();
        for unit in &units {
            let (root, path) = &unit.at;
            match self.fate_of(unit) {
                Fate::Whole | Fate::ReferenceHeld => continue,
                Fate::Again(why) => {
                    tracing::debug!(repository = %path, why, "left to the next changeset");
                    let tries = self.capture.held.note_again(&unit.at);
                    if tries > AGAIN_MAX {
                        let detail = format!("{why}; {tries} times in a row");
                        self.capture.held.hold(Problem { root: *root, path: path.clone(), kind: ProblemKind::Unstable, detail });
                    }
                }
                Fate::Waits => drop(waits.insert(unit.at.clone())),
                Fate::Held(why) => {
                    let detail = format!("the repository stays as it is on the standby: {why}");
                    self.capture.held.hold(Problem { root: *root, path: path.clone(), kind: ProblemKind::Incomplete, detail });
                    self.capture.held.repositories().insert(unit.at.clone());
                    held_now.insert(unit.at.clone());
                }
            }
            changed.insert(unit.at.clone());
        }
        changed.extend(held_now.iter().cloned());
        // What is tied to one that waits, whether or not that was met now, waits with it.
        let parked = self.bulk.map(|bulk| bulk.parked()).unwrap_or_default();
        waits.extend(parked.into_iter().filter(|at| self.units.at(at).is_none_or(|unit| unit.waits())));
        changed.extend(waits.iter().cloned());
        // What waited for another comes with it or not at all: all of it has to be looked at in the same cycle.
        held.tied().retain(|at| self.ino_of(at).is_some());
        let is_looked_at = |at: &Repository| self.units.at(at).is_some_and(|unit| *lock(&unit.extent) == Extent::Full);
        let waiting: BTreeSet<Repository> = held.tied().iter().filter(|at| !is_looked_at(at)).cloned().collect();
        changed.extend(waiting.iter().cloned());
        let mut ties = if changed.is_empty() { Vec::new() } else { self.ties(&units) };
        for at in waits.iter().filter(|at| self.units.at(at).is_none()) {
            ties.extend(self.parents_of(at).map(|parent| (at.clone(), parent)));
        }
        let waits_family = closure(&waits, &ties);
        let (family, held_family, waiting_family) = (closure(&changed, &ties), closure(&held_now, &ties), closure(&waiting, &ties));
        let mut is_any_freed = are_gone;
        for unit in &units {
            if family.contains(&unit.at) {
                self.keep(unit.at.0, &unit.at.1);
                if held_family.contains(&unit.at) {
                    self.hold_with_family(unit);
                } else if waits_family.contains(&unit.at) {
                    left.waits.insert(unit.at.clone(), *lock(&unit.extent));
                    is_any_freed |= held.repositories().contains(&unit.at) || waiting_family.contains(&unit.at);
                } else {
                    left.is_part |= held.tries_of(&unit.at) <= AGAIN_MAX;
                    left.again.insert(unit.at.clone(), *lock(&unit.extent));
                    is_any_freed |= held.repositories().contains(&unit.at) || waiting_family.contains(&unit.at);
                }
            } else {
                if unit.has_ops() {
                    held.forget_again(&unit.at);
                    held.note_sent(&unit.at, self.cycle.seq);
                    is_any_freed |= held.repositories().remove(&unit.at) | held.tied().remove(&unit.at);
                } else if is_looked_at(&unit.at) {
                    held.tied().remove(&unit.at);
                }
                if self.fate_of(unit) == Fate::Whole && held.settle(&unit.at) && !is_looked_at(&unit.at) {
                    self.again(unit.at.0, &unit.at.1);
                }
                if !held.is_held(&unit.at) {
                    held.release(unit.at.0, &unit.at.1);
                }
            }
        }
        if is_any_freed {
            waiting.iter().filter(|at| !held_family.contains(at)).for_each(|(root, path)| self.again(*root, path));
        }
        left
    }

    /// Holds back a repository that is tied to one that is.
    fn hold_with_family(&self, unit: &Unit) {
        let (root, path) = &unit.at;
        if !self.capture.held.repositories().contains(&unit.at) && self.capture.held.tied().insert(unit.at.clone()) {
            let detail = "a repository that it shares objects with is held back; it stays as it is on the standby".to_string();
            self.capture.held.hold(Problem { root: *root, path: path.clone(), kind: ProblemKind::Incomplete, detail });
        }
    }

    /// What becomes of a repository, all considered.
    fn fate_of(&self, unit: &Unit) -> Fate {
        match unit.fate() {
            // Nothing that the standby has could be harmed: a repository with a broken object is better than none.
            Fate::Held(_) if !self.may_have(&unit.at) => Fate::Whole,
            // A changeset that names everything would remove what the reference on the standby needs.
            Fate::ReferenceHeld if self.cycle.baseline == Baseline::Full && self.may_have(&unit.at) => {
                Fate::Again("a reference is held back".into())
            }
            fate => fate,
        }
    }

    /// Whether the standby may have something of a repository.
    fn may_have(&self, (root, path): &Repository) -> bool {
        match self.cycle.baseline {
            Baseline::Full => self.cycle.certainty == Certainty::Ask,
            Baseline::Delta(acked) => {
                let row = self.snapshot.row(*root, path).ok().flatten();
                row.is_some_and(|row| row.version <= acked || row.version == Row::UNSENT)
            }
        }
    }

    /// Which of the repositories that changed borrow objects of each other, or share files.
    fn ties(&self, units: &[Arc<Unit>]) -> Vec<(Repository, Repository)> {
        let mut ties: Vec<_> = lock(&self.ties).iter().cloned().collect();
        for unit in units.iter().filter(|unit| unit.has_ops() || unit.fate() != Fate::Whole) {
            ties.extend(self.parents_of(&unit.at).map(|parent| (unit.at.clone(), parent)));
        }
        ties
    }

    /// The repositories that one borrows objects of.
    fn parents_of(&self, at: &Repository) -> impl Iterator<Item = Repository> {
        self.alternates_of(at).into_iter().filter_map(|alternate| match alternate {
            Alternate::Replicated(parent) => Some(parent),
            Alternate::Elsewhere => None,
        })
    }

    /// Notes that two paths are one file: their repositories can't be shipped one without the other.
    pub(crate) fn tie(&self, root: RootId, a: &RelPath, b: &RelPath) {
        if let (Some(a), Some(b)) = (self.units.of(root, a), self.units.of(root, b))
            && a.at != b.at
        {
            lock(&self.ties).insert((a.at.clone(), b.at.clone()));
        }
    }
}

//! The first pass: the references of each repository, as they stood at one instant (G2).
//!
//! When everything is looked at, all references of a repository are examined before and after they were read; what
//! differs is read anew. When hints are followed only those references are read; a barrier of the watch then tells
//! whether any other came meanwhile.
//!
//! Invariants: nothing of a repository's references is handed over before they are known to be of one instant.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use coldspare_core::git::{self, CapturePass};
use coldspare_core::{RelPath, RootId, seeded_bug};
use coldspare_os::{Disk, FileKind, Stat};

use crate::batch::Builder;
use crate::capture::{BARRIER_LIMIT, CaptureError, Work};
use crate::dirty::{Hint, Hints, Names};
use crate::run::{Run, lock};
use crate::unit::Unit;
use crate::visit::{Visit, What};

/// How often the references of a repository are read before it is left to the next cycle.
const TRIES: usize = 8;
/// LIMIT: depth of folders of references; deeper ones can't be named.
const DEPTH_MAX: usize = 256;

type Pending = BTreeMap<(RootId, RelPath), (Arc<Unit>, Vec<Visit>)>;

/// The references of one repository, while they are read.
struct Reading {
    unit: Arc<Unit>,
    /// What is still to be read.
    visits: Vec<Visit>,
    /// What was read.
    builder: Builder,
}

impl<D: Disk> Run<'_, D> {
    /// Captures the references of every registered repository.
    ///
    /// `taken` grows by the hints that came meanwhile for those repositories' references.
    pub(crate) fn references(&self, taken: &mut Hints) -> Result<(), CaptureError> {
        let pending = self.pending_references();
        if self.cycle.work == Work::Everything {
            return self.for_each(pending.into_values().collect(), |(unit, visits)| {
                let builder = self.read_whole(&unit, &visits)?;
                self.commit(builder)
            });
        }
        let mut pending: Vec<Reading> =
            pending.into_values().map(|(unit, visits)| Reading { unit, visits, builder: Builder::held() }).collect();
        for _ in 0..TRIES {
            let read = std::sync::Mutex::new(Vec::new());
            self.for_each(std::mem::take(&mut pending), |mut reading| {
                let visits = std::mem::take(&mut reading.visits);
                self.read_references(visits, &mut reading.builder)?;
                lock(&read).push(reading);
                Ok(())
            })?;
            let read = read.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            let (settled, changed) = self.changed_meanwhile(taken, read)?;
            // Nothing came for these up to the barrier: what was read is how all their references stood at one instant.
            settled.into_iter().try_for_each(|reading| self.commit(reading.builder))?;
            pending = changed;
            if pending.is_empty() {
                return Ok(());
            }
        }
        for reading in pending {
            reading.unit.again("its references kept changing while they were read");
            self.discard(reading.builder);
        }
        Ok(())
    }

    fn pending_references(&self) -> Pending {
        let mut pending = Pending::new();
        for visit in self.take_deferred(CapturePass::References) {
            if let Some(unit) = self.units.of(visit.root, &visit.path) {
                pending.entry(unit.at.clone()).or_insert_with(|| (unit, Vec::new())).1.push(visit);
            }
        }
        pending
    }

    fn for_each<T: Send>(&self, work: Vec<T>, body: impl Fn(T) -> Result<(), CaptureError> + Sync) -> Result<(), CaptureError> {
        let body = &body;
        self.capture.pool.scope(|scope| {
            for item in work {
                scope.spawn(move |_| {
                    if !self.is_stopped()
                        && let Err(e) = body(item)
                    {
                        self.fail(e);
                    }
                });
            }
        });
        self.outcome()
    }

    /// Reads the references in `visits`, one repository's, in one thread.
    fn read_references(&self, visits: Vec<Visit>, builder: &mut Builder) -> Result<(), CaptureError> {
        let mut left = visits;
        while let Some(visit) = left.pop() {
            self.look(visit, CapturePass::References, builder, &mut |more| left.push(more))?;
        }
        self.resolve_unsure(builder)
    }

    /// Reads all references of a repository, until they were the same before and after.
    fn read_whole(&self, unit: &Unit, visits: &[Visit]) -> Result<Builder, CaptureError> {
        let mut builder = Builder::held();
        for _ in 0..TRIES {
            self.discard(builder);
            self.forget_kept(|root, path| is_reference_of(unit, root, path));
            let before = self.stamp_references(unit);
            builder = Builder::held();
            self.read_references(visits.to_vec(), &mut builder)?;
            if self.stamp_references(unit) == before || seeded_bug!(ReferencesOfTwoInstants) {
                unit.references.store(before, Ordering::Relaxed);
                return Ok(builder);
            }
        }
        unit.again("its references kept changing while they were read");
        Ok(builder)
    }

    /// Waits for the watch and tells apart the repositories whose references changed since they were read: of those only
    /// what changed is left to be read again. Their hints move to `taken`.
    fn changed_meanwhile(&self, taken: &mut Hints, read: Vec<Reading>) -> Result<(Vec<Reading>, Vec<Reading>), CaptureError> {
        let Some(watch) = self.capture.watch.as_ref().filter(|_| !read.is_empty()) else { return Ok((read, Vec::new())) };
        watch.barrier(BARRIER_LIMIT)?;
        let mut dirty = watch.dirty();
        let is_lost = dirty.is_everything();
        let (mut settled, mut changed) = (Vec::new(), Vec::new());
        for mut reading in read {
            let (root, path) = reading.unit.at.clone();
            if is_lost {
                reading.unit.again("the watch lost events while it was read");
                settled.push(reading);
                continue;
            }
            // Locks come and go with every change, and before it: they are no change by themselves.
            let is_lock = |inside: &[u8]| git::looks_transient(inside.rsplit(|&b| b == b'/').next().unwrap_or_default());
            let late = dirty.take_names(root, &path, |inside| CapturePass::of(inside) == CapturePass::References && !is_lock(inside));
            let is_news = |names: &Names| !matches!(names, Names::Some(names) if names.is_empty());
            if !late.dirs.values().any(is_news) || seeded_bug!(ReferencesOfTwoInstants) {
                settled.push(reading); // what was taken is at most a folder that is there already
                continue;
            }
            self.forget(&mut reading.builder, |root, path| late.know(root, path));
            self.forget_kept(|root, path| is_reference_of(&reading.unit, root, path) && late.know(root, path));
            let visits = late.dirs.iter().flat_map(|((root, dir), names)| {
                // What was known of the folder itself is forgotten too: that it went, the folder above tells.
                let own = dir.parent().filter(|above| above.is_within(&path)).map(|above| {
                    let name = BTreeMap::from([(dir.name().into(), Hint::Changed)]);
                    Visit { root: *root, path: above, what: What::Names(name) }
                });
                own.into_iter().chain([Visit::hinted(*root, dir.clone(), names)])
            });
            reading.visits = visits.collect();
            taken.merge(late);
            changed.push(reading);
        }
        Ok((settled, changed))
    }

    /// A number that stands for all references of a repository as they are now: every file's identity, not the times of
    /// folders, which locks change too.
    pub(crate) fn stamp_references(&self, unit: &Unit) -> u64 {
        let mut hasher = DefaultHasher::new();
        let (root, path) = &unit.at;
        let disk = &self.capture.disk;
        let Ok(dir) = disk.open_dir(&self.root(*root).dir, path.as_bytes()) else { return 1 };
        for name in git::REFERENCE_NAMES {
            match disk.stat(&dir, name) {
                Ok(stat) if stat.kind == FileKind::Dir => self.stamp_below(&dir, name, 0, &mut hasher),
                Ok(stat) => stamp(name, &stat, &mut hasher),
                Err(e) => e.raw_os_error().hash(&mut hasher),
            }
        }
        hasher.finish().max(1)
    }

    fn stamp_below(&self, dir: &D::Dir, name: &[u8], depth: usize, hasher: &mut DefaultHasher) {
        let disk = &self.capture.disk;
        let listed = disk.open_dir(dir, name).and_then(|own| Ok((disk.list_stat(&own)?, own)));
        let Ok((mut listed, own)) = listed else { return name.hash(hasher) };
        listed.sort_by(|a, b| a.0.cmp(&b.0));
        name.hash(hasher);
        for (name, stat) in listed {
            if stat.kind == FileKind::Dir && depth < DEPTH_MAX {
                self.stamp_below(&own, &name, depth + 1, hasher);
            } else if !git::looks_transient(&name) {
                stamp(&name, &stat, hasher);
            }
        }
        0xffu8.hash(hasher);
    }
}

/// Whether `path` is a reference of a repository, or a folder of them.
fn is_reference_of(unit: &Unit, root: RootId, path: &RelPath) -> bool {
    let inside = path.below(&unit.at.1).filter(|_| root == unit.at.0);
    inside.is_some_and(|inside| CapturePass::of(inside) == CapturePass::References)
}

fn stamp(name: &[u8], stat: &Stat, hasher: &mut DefaultHasher) {
    (name, stat.ino, stat.ctime, stat.mtime, stat.size).hash(hasher);
}

//! Looks at directories, in parallel, and finds what differs from the index.
//!
//! Invariants:
//! - a directory is watched before it is read;
//! - a path is handed over at most once in a cycle: what is met twice is left to the next cycle;
//! - what can't be read is never taken for gone.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use coldspare_core::changeset::Totals;
use coldspare_core::exclude::IsDir;
use coldspare_core::git::{self, CapturePass};
use coldspare_core::{Baseline, Body, Op, PathError, Problem, ProblemKind, RelPath, RootId, Seq};
use coldspare_os::{Disk, FileKind, Stat};

use crate::capture::{Capture, CaptureError, Cycle, Outlet, Report, Work};
use crate::dirty::Hint;
use crate::index::{Row, Snapshot, State};
use crate::links::is_linked;
use crate::read::{Builder, Outcome};
use crate::writer::{Change, Writer};

/// A directory to look at.
#[derive(Debug, Clone)]
pub(crate) struct Visit {
    pub(crate) root: RootId,
    pub(crate) path: RelPath,
    pub(crate) what: What,
}

/// What to look at in a directory.
#[derive(Debug, Clone)]
pub(crate) enum What {
    /// All of it and all below it.
    Deep,
    /// These entries of it, and what is new below.
    Names(BTreeMap<Box<[u8]>, Hint>),
}

/// Whether the standby has a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It has, or will have.
    Known,
    /// It may not.
    Unknown,
}

/// A path that may have changed.
pub(crate) struct Candidate {
    pub(crate) root: RootId,
    pub(crate) path: RelPath,
    pub(crate) stat: Stat,
    /// When it was examined at the earliest, in milliseconds since 1970.
    pub(crate) at_ms: u64,
    pub(crate) row: Option<Row>,
}

/// One cycle under way; shared by its threads.
pub(crate) struct Run<'a, D: Disk> {
    pub(crate) capture: &'a Capture<D>,
    pub(crate) cycle: &'a Cycle,
    pub(crate) snapshot: Snapshot,
    pub(crate) writer: &'a Writer<'a>,
    pub(crate) outlet: &'a dyn Outlet,
    /// What the standby is known to have.
    pub(crate) acked: Seq,
    pub(crate) counters: Counters,
    pub(crate) next_file: AtomicU32,
    /// Files with several names.
    pub(crate) linked: Mutex<Vec<Candidate>>,
    deferred: Mutex<BTreeMap<(RootId, RelPath), What>>,
    /// What is held back in this cycle.
    pub(crate) kept: Mutex<BTreeSet<(RootId, RelPath)>>,
    /// What was to be handed over in this cycle, and wasn't in the end.
    pub(crate) untaken: Mutex<BTreeSet<(RootId, RelPath)>>,
    builders: Mutex<Vec<Builder>>,
    claims: Mutex<HashSet<u64>>,
    stopped: AtomicBool,
    failure: Mutex<Option<CaptureError>>,
    opened: AtomicU64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) ops: AtomicU64,
    pub(crate) files_read: AtomicU64,
    pub(crate) bytes_read: AtomicU64,
    entries: AtomicU64,
    special: AtomicU64,
}

/// How many directories are opened before the watch is waited for.
const PACE: u64 = 512;

pub(crate) fn is_objects(dir: &RelPath) -> bool {
    CapturePass::of(dir) != CapturePass::RefsAndRest
}

impl Visit {
    pub(crate) fn deep(root: RootId, path: RelPath) -> Visit {
        Visit { root, path, what: What::Deep }
    }
}

impl<'a, D: Disk> Run<'a, D> {
    pub(crate) fn new(
        capture: &'a Capture<D>,
        cycle: &'a Cycle,
        snapshot: Snapshot,
        writer: &'a Writer<'a>,
        outlet: &'a dyn Outlet,
    ) -> Run<'a, D> {
        let acked = match cycle.baseline {
            Baseline::Delta(seq) => seq,
            Baseline::Full => Seq(0),
        };
        Run {
            capture,
            cycle,
            snapshot,
            writer,
            outlet,
            acked,
            counters: Counters::default(),
            next_file: AtomicU32::new(0),
            linked: Mutex::default(),
            deferred: Mutex::default(),
            kept: Mutex::default(),
            untaken: Mutex::default(),
            builders: Mutex::default(),
            claims: Mutex::default(),
            stopped: AtomicBool::new(false),
            failure: Mutex::default(),
            opened: AtomicU64::new(0),
        }
    }

    /// The first pass: looks at `visits` and what is below; directories of objects are kept for the later passes.
    pub(crate) fn pass(&self, visits: Vec<Visit>) -> Result<(), CaptureError> {
        let (later, now): (Vec<_>, Vec<_>) = visits.into_iter().partition(|v| is_objects(&v.path));
        self.defer(later);
        self.look_at_all(now, CapturePass::RefsAndRest)
    }

    /// The later passes: loose objects, then packs.
    pub(crate) fn pass_deferred(&self) -> Result<(), CaptureError> {
        for pass in [CapturePass::LooseObjects, CapturePass::Packs] {
            let mut now = Vec::new();
            lock(&self.deferred).retain(|(root, path), what| {
                let is_due = CapturePass::of(path) <= pass;
                if is_due {
                    now.push(Visit { root: *root, path: path.clone(), what: what.clone() });
                }
                !is_due
            });
            self.look_at_all(now, pass)?;
        }
        self.capture_linked()
    }

    /// Leaves directories to a later pass; one that is found from above and by a hint is looked at once.
    pub(crate) fn defer(&self, visits: Vec<Visit>) {
        let mut deferred = lock(&self.deferred);
        for Visit { root, path, what } in visits {
            match (deferred.get_mut(&(root, path.clone())), what) {
                (Some(What::Deep), _) => {}
                (Some(What::Names(known)), What::Names(more)) => {
                    for (name, hint) in more {
                        known.entry(name).and_modify(|k| *k = hint.max(*k)).or_insert(hint);
                    }
                }
                (_, what) => drop(deferred.insert((root, path), what)),
            }
        }
    }

    fn look_at_all(&self, visits: Vec<Visit>, pass: CapturePass) -> Result<(), CaptureError> {
        self.capture.pool.scope(|scope| {
            for visit in visits {
                scope.spawn(move |scope| self.visit(scope, visit, pass));
            }
        });
        lock(&self.failure).take().map_or(Ok(()), Err)
    }

    /// Hands over what is left and counts.
    pub(crate) fn finish(&self, result: Result<(), CaptureError>) -> Result<Report, CaptureError> {
        result?;
        for mut builder in std::mem::take(&mut *lock(&self.builders)) {
            self.flush(&mut builder)?;
        }
        // Only now is known all that is held back.
        let mut last = Builder::default();
        for (root, path) in std::mem::take(&mut *lock(&self.kept)) {
            last.change(Change::Unsent { root, path: path.clone(), acked: self.acked });
            if self.cycle.baseline == Baseline::Full {
                self.push(&mut last, Op::Keep { root, path })?;
            }
        }
        self.flush(&mut last)?;
        let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let c = &self.counters;
        let totals = Totals { ops: count(&c.ops), files_read: count(&c.files_read), bytes_read: count(&c.bytes_read) };
        Ok(Report { as_of_ms: 0, totals, entries: count(&c.entries), special: count(&c.special) })
    }

    /// Whether `path` may be handed over in this cycle: it wasn't yet.
    pub(crate) fn claim(&self, root: RootId, path: &RelPath) -> bool {
        if self.cycle.work == Work::Everything {
            return true; // each directory is looked at once
        }
        let mut hasher = DefaultHasher::new();
        (root, path).hash(&mut hasher);
        lock(&self.claims).insert(hasher.finish())
    }

    /// Leaves `path` to the next cycle.
    pub(crate) fn again(&self, root: RootId, path: &RelPath) {
        if let Some(watch) = &self.capture.watch {
            let dir = path.parent().unwrap_or_else(RelPath::root);
            watch.dirty().add(root, dir, path.name(), Hint::Replaced, self.capture.disk.now_ms());
        }
    }

    /// Leaves the standby's copy of `path`, and of all below it, as it is.
    pub(crate) fn keep(&self, root: RootId, path: &RelPath) {
        lock(&self.kept).insert((root, path.clone()));
    }

    /// Holds `path` back with all below it: the standby's copy stays as it is.
    pub(crate) fn hold(&self, root: RootId, path: &RelPath, kind: ProblemKind, detail: String) {
        self.keep(root, path);
        self.capture.held.hold(Problem { root, path: path.clone(), kind, detail });
    }

    fn visit<'s>(&'s self, scope: &rayon::Scope<'s>, visit: Visit, pass: CapturePass) {
        if self.stopped.load(Ordering::Relaxed) {
            return;
        }
        let mut builder = lock(&self.builders).pop().unwrap_or_default();
        let result = self.look(scope, visit, &mut builder, pass);
        lock(&self.builders).push(builder);
        if let Err(e) = result {
            self.stopped.store(true, Ordering::Relaxed);
            lock(&self.failure).get_or_insert(e);
        }
    }

    fn look<'s>(&'s self, scope: &rayon::Scope<'s>, visit: Visit, builder: &mut Builder, pass: CapturePass) -> Result<(), CaptureError> {
        let Visit { root, path, what } = visit;
        let disk = &self.capture.disk;
        if let Some(watch) = &self.capture.watch {
            watch.cover(root, &path);
            if self.opened.fetch_add(1, Ordering::Relaxed) % PACE == PACE - 1 {
                watch.catch_up();
            }
        }
        let at_ms = self.capture.disk.now_ms();
        let dir = match disk.open_dir(&self.root(root).dir, path.as_bytes()) {
            Ok(dir) => dir,
            // Gone, or no directory any more: the directory above it, which changed with it, is looked at too.
            Err(e) if is_vanished(&e) => return Ok(()),
            Err(e) => {
                self.hold(root, &path, ProblemKind::Unreadable, format!("the folder can't be opened: {e}"));
                return Ok(());
            }
        };
        let stat = match disk.stat_dir(&dir) {
            Ok(stat) => stat,
            Err(e) => {
                self.hold(root, &path, ProblemKind::Unreadable, format!("the folder can't be examined: {e}"));
                return Ok(());
            }
        };
        let listed = match what {
            What::Names(_) => Ok(Vec::new()),
            What::Deep => disk.list_stat(&dir),
        };
        let listed = match listed {
            Ok(listed) => listed,
            Err(e) => {
                self.hold(root, &path, ProblemKind::Unreadable, format!("the folder can't be listed: {e}"));
                return Ok(());
            }
        };
        let row = self.snapshot.row(root, &path)?;
        let own = Candidate { root, path: path.clone(), stat, at_ms, row };
        if self.consider_dir(own, builder)? == Standing::Unknown {
            return Ok(()); // what is below has no place on the standby
        }
        let (found, known) = match &what {
            What::Names(names) => {
                let mut found = Vec::new();
                let mut known = Vec::new();
                for name in names.keys() {
                    match disk.stat(&dir, name) {
                        Ok(stat) => found.push((name.clone(), stat)),
                        Err(e) if is_vanished(&e) => {}
                        Err(e) => {
                            self.hold_name(root, &path, name, format!("can't be examined: {e}"));
                            continue;
                        }
                    }
                    if let Ok(below) = path.join(name)
                        && let Some(row) = self.snapshot.row(root, &below)?
                    {
                        known.push((name.clone(), row));
                    }
                }
                (found, known)
            }
            What::Deep => {
                let mut found = listed;
                found.sort_by(|a, b| a.0.cmp(&b.0));
                (found, self.snapshot.children(root, &path)?)
            }
        };
        self.counters.entries.fetch_add(found.len() as u64, Ordering::Relaxed);
        let dev = stat.dev;
        let mut known = known.into_iter().peekable();
        for (name, stat) in found {
            while let Some((gone, row)) = known.next_if(|(k, _)| *k < name) {
                self.gone((root, dev), &path, &gone, row, builder)?;
            }
            let row = known.next_if(|(k, _)| *k == name).map(|(_, row)| row);
            let Some(child) = self.carried(root, &path, &name, &stat) else {
                if let Some(row) = row {
                    self.gone((root, dev), &path, &name, row, builder)?;
                }
                continue;
            };
            let candidate = Candidate { root, path: child, stat, at_ms, row };
            self.leave_links(dev, &candidate)?;
            if stat.kind == FileKind::Dir {
                self.descend(scope, candidate, &what, &name, pass);
            } else {
                self.consider(candidate, builder)?;
            }
        }
        for (gone, row) in known {
            self.gone((root, dev), &path, &gone, row, builder)?;
        }
        Ok(())
    }

    /// The path of an entry, when it is replicated at all.
    fn carried(&self, root: RootId, dir_path: &RelPath, name: &[u8], stat: &Stat) -> Option<RelPath> {
        let path = match dir_path.join(name) {
            Ok(path) => path,
            Err(PathError::Control) => return None,
            Err(e) => {
                self.hold_name(root, dir_path, name, e.to_string());
                return None;
            }
        };
        let is_dir = if stat.kind == FileKind::Dir { IsDir::Yes } else { IsDir::No };
        if self.root(root).exclude.matches(&path, is_dir) {
            return None;
        }
        if git::looks_transient(name) && self.is_transient(root, &path) {
            return None;
        }
        match stat.kind {
            FileKind::File | FileKind::Dir | FileKind::Symlink => Some(path),
            FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice | FileKind::Unknown => {
                self.counters.special.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }

    /// Whether git never means `path` to last: asks which of the directories above it is a repository.
    fn is_transient(&self, root: RootId, path: &RelPath) -> bool {
        let disk = &self.capture.disk;
        let is_repository = |base: &RelPath| {
            let Ok(dir) = disk.open_dir(&self.root(root).dir, base.as_bytes()) else { return false };
            git::is_repository([&b"HEAD"[..], b"objects", b"refs"].into_iter().filter(|name| disk.stat(&dir, name).is_ok()))
        };
        let ancestors: Vec<_> = path.ancestors().collect();
        ancestors.iter().rev().find(|base| is_repository(base)).is_some_and(|base| path.below(base).is_some_and(git::never_carried))
    }

    fn descend<'s>(&'s self, scope: &rayon::Scope<'s>, child: Candidate, what: &What, name: &[u8], pass: CapturePass) {
        let Candidate { root, path, stat, row, .. } = child;
        let known = row.is_some_and(|row| row.is_dir() && row.ino() == Some(stat.ino));
        let what = match what {
            What::Names(names) if known && names.get(name) != Some(&Hint::Replaced) => What::Names(BTreeMap::new()), // itself
            What::Names(_) | What::Deep => What::Deep,
        };
        let visit = Visit { root, path, what };
        if CapturePass::of(&visit.path) > pass {
            self.defer(vec![visit]);
        } else {
            scope.spawn(move |scope| self.visit(scope, visit, pass));
        }
    }

    /// An entry that the index has and the directory doesn't.
    fn gone(&self, (root, dev): (RootId, u64), dir: &RelPath, name: &[u8], row: Row, builder: &mut Builder) -> Result<(), CaptureError> {
        let Ok(path) = dir.join(name) else { return Ok(()) };
        let is_news = matches!(row.state, State::Present { .. }) || row.version == Row::UNSENT;
        if !is_news && row.version <= self.acked {
            return Ok(());
        }
        if !self.claim(root, &path) {
            self.again(root, &path);
            return Ok(());
        }
        self.leave_links_of(root, dev, &path, &row)?;
        self.capture.held.release(root, &path);
        if is_news {
            builder.change(Change::Gone { root, path: path.clone(), version: self.cycle.seq });
        }
        // A changeset that names everything needs no removals.
        if self.cycle.baseline != Baseline::Full {
            self.push(builder, Op::Delete { root, path })?;
        }
        Ok(())
    }

    /// A directory that is looked at: whether the standby has it, or will have it with this changeset.
    fn consider_dir(&self, own: Candidate, builder: &mut Builder) -> Result<Standing, CaptureError> {
        let key = (own.root, own.path.clone());
        if let Some(row) = &own.row
            && row.version <= self.acked
            && is_unchanged(row, &own.stat)
        {
            return Ok(Standing::Known);
        }
        let is_held = if self.claim(own.root, &own.path) {
            matches!(self.capture_one(own, builder)?, Outcome::Held | Outcome::Vanished)
        } else {
            lock(&self.kept).contains(&key)
        };
        Ok(if is_held { Standing::Unknown } else { Standing::Known })
    }

    /// An entry that is there: nothing to do, or it is captured.
    fn consider(&self, candidate: Candidate, builder: &mut Builder) -> Result<(), CaptureError> {
        if let Some(row) = &candidate.row
            && row.version <= self.acked
            && is_unchanged(row, &candidate.stat)
        {
            return Ok(());
        }
        if !self.claim(candidate.root, &candidate.path) {
            self.again(candidate.root, &candidate.path);
            return Ok(());
        }
        if is_linked(&candidate.stat, candidate.row.as_ref()) {
            lock(&self.linked).push(candidate);
            return Ok(());
        }
        self.capture_one(candidate, builder).map(drop)
    }

    fn hold_name(&self, root: RootId, dir: &RelPath, name: &[u8], detail: String) {
        match dir.join(name) {
            Ok(path) => self.hold(root, &path, ProblemKind::Unreadable, detail),
            // No copy of a path that can't be named is anywhere: the folder stands for it in the report only.
            Err(_) => {
                let detail = format!("{:?} in it: {detail}", coldspare_core::path::escape(name));
                self.capture.held.hold(Problem { root, path: dir.clone(), kind: ProblemKind::Unsupported, detail });
            }
        }
    }

    pub(crate) fn root(&self, root: RootId) -> &crate::capture::Root<D> {
        &self.capture.roots[usize::from(root.0)]
    }
}

/// Whether an error says that the path is no longer what the caller saw.
pub(crate) fn is_vanished(e: &std::io::Error) -> bool {
    // A symlink or a file where a directory was: ELOOP, ENOTDIR.
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) || e.raw_os_error() == Some(ELOOP)
}

const ELOOP: i32 = 40;

/// Whether the row still tells the truth, as far as metadata can say.
pub(crate) fn is_unchanged(row: &Row, stat: &Stat) -> bool {
    let State::Present { entry, witness } = &row.state else { return false };
    let same_kind = match &entry.body {
        Body::Dir => stat.kind == FileKind::Dir,
        Body::File { size, .. } => stat.kind == FileKind::File && *size == stat.size,
        Body::Hardlink { .. } => stat.kind == FileKind::File && stat.nlink > 1,
        Body::Symlink { .. } => stat.kind == FileKind::Symlink,
    };
    let (mtime, ctime) = (entry.meta.mtime, witness.ctime);
    same_kind
        && !witness.racy
        && witness.ino == stat.ino
        && (ctime.secs, ctime.nanos) == stat.ctime
        && (mtime.secs, mtime.nanos) == stat.mtime
        && (entry.meta.uid, entry.meta.gid) == (stat.uid, stat.gid)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use coldspare_core::{Digest, Entry, Meta, Time};

    use super::*;
    use crate::index::Witness;

    const STAT: Stat = Stat {
        kind: FileKind::File,
        mode: 0o644,
        uid: 1,
        gid: 2,
        size: 3,
        blocks: 8,
        nlink: 1,
        dev: 4,
        ino: 5,
        mtime: (6, 7),
        ctime: (8, 9),
    };

    fn check(witness: Witness, stat: Stat, expected: bool) {
        let meta = Meta { mode: 0o644, uid: 1, gid: 2, mtime: Time { secs: 6, nanos: 7 }, xattrs: Vec::new() };
        let body = Body::File { size: 3, digest: Digest([0; 32]), sparse: false };
        let row = Row { version: Seq(1), state: State::Present { entry: Entry { meta, body }, witness } };
        assert_eq!(is_unchanged(&row, &stat), expected, "{witness:?} {stat:?}");
    }

    #[test]
    fn a_row_is_trusted_only_when_nothing_differs_and_its_time_tells() {
        let witness = Witness { ino: 5, ctime: Time { secs: 8, nanos: 9 }, racy: false };
        check(witness, STAT, true);
        check(Witness { racy: true, ..witness }, STAT, false);
        check(witness, Stat { ctime: (8, 10), ..STAT }, false);
        check(witness, Stat { mtime: (6, 8), ..STAT }, false);
        check(witness, Stat { ino: 6, ..STAT }, false);
        check(witness, Stat { size: 4, ..STAT }, false);
        check(witness, Stat { uid: 2, ..STAT }, false);
        check(witness, Stat { kind: FileKind::Dir, ..STAT }, false);
    }
}

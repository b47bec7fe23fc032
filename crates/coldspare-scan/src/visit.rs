//! Looks at directories, in parallel, and finds what differs from the index.
//!
//! Invariants:
//! - a directory is watched before it is read;
//! - a path is handed over at most once in a cycle: what is met twice is left to the next cycle;
//! - what can't be read is never taken for gone.

use std::collections::{BTreeMap, HashSet};
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
use crate::read::Builder;
use crate::watch::now_ms;
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
    /// All entries of it, and what is new below.
    All,
    /// These entries of it, and what is new below.
    Names(BTreeMap<Box<[u8]>, Hint>),
}

/// A path that may have changed.
pub(crate) struct Candidate {
    pub(crate) root: RootId,
    pub(crate) path: RelPath,
    pub(crate) stat: Stat,
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
    /// Files with several names, met in this pass.
    pub(crate) linked: Mutex<Vec<Candidate>>,
    deferred: Mutex<Vec<Visit>>,
    /// What is held back in this cycle.
    kept: Mutex<Vec<(RootId, RelPath)>>,
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
    CapturePass::of(dir) == CapturePass::Objects
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
            builders: Mutex::default(),
            claims: Mutex::default(),
            stopped: AtomicBool::new(false),
            failure: Mutex::default(),
            opened: AtomicU64::new(0),
        }
    }

    /// Looks at `visits` and what is below; directories of objects are kept for the second pass.
    pub(crate) fn pass(&self, visits: Vec<Visit>) -> Result<(), CaptureError> {
        let (later, now): (Vec<_>, Vec<_>) = visits.into_iter().partition(|v| is_objects(&v.path));
        self.defer(later);
        self.look_at_all(now)
    }

    /// The second pass.
    pub(crate) fn pass_deferred(&self) -> Result<(), CaptureError> {
        let mut visits = std::mem::take(&mut *lock(&self.deferred));
        // A directory may have been found from above and by a hint: the wider look wins.
        visits.sort_by(|a, b| (a.root, &a.path, a.what.width()).cmp(&(b.root, &b.path, b.what.width())));
        visits.dedup_by(|narrow, wide| (narrow.root, &narrow.path) == (wide.root, &wide.path) && wide.what.width() == 0);
        self.look_at_all(visits)
    }

    pub(crate) fn defer(&self, visits: Vec<Visit>) {
        lock(&self.deferred).extend(visits);
    }

    fn look_at_all(&self, visits: Vec<Visit>) -> Result<(), CaptureError> {
        let objects = visits.first().is_some_and(|v| is_objects(&v.path));
        self.capture.pool.scope(|scope| {
            for visit in visits {
                scope.spawn(move |scope| self.visit(scope, visit, objects));
            }
        });
        if let Some(failure) = lock(&self.failure).take() {
            return Err(failure);
        }
        self.capture_linked()
    }

    /// Hands over what is left and counts.
    pub(crate) fn finish(&self, result: Result<(), CaptureError>) -> Result<Report, CaptureError> {
        result?;
        let mut last = Builder::default();
        if self.cycle.baseline == Baseline::Full {
            for (root, path) in std::mem::take(&mut *lock(&self.kept)) {
                self.push(&mut last, Op::Keep { root, path })?;
            }
        }
        self.flush(&mut last)?;
        for mut builder in std::mem::take(&mut *lock(&self.builders)) {
            self.flush(&mut builder)?;
        }
        let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let c = &self.counters;
        let totals = Totals { ops: count(&c.ops), files_read: count(&c.files_read), bytes_read: count(&c.bytes_read) };
        Ok(Report { as_of_ms: 0, totals, entries: count(&c.entries), special: count(&c.special) })
    }

    /// Whether `path` may be handed over in this cycle; a second try is left to the next one.
    pub(crate) fn claim(&self, root: RootId, path: &RelPath) -> bool {
        if self.cycle.work == Work::Everything {
            return true; // each directory is looked at once
        }
        let mut hasher = DefaultHasher::new();
        (root, path).hash(&mut hasher);
        if lock(&self.claims).insert(hasher.finish()) {
            return true;
        }
        self.again(root, path);
        false
    }

    /// Leaves `path` to the next cycle.
    pub(crate) fn again(&self, root: RootId, path: &RelPath) {
        if let Some(watch) = &self.capture.watch {
            let dir = path.parent().unwrap_or_else(RelPath::root);
            watch.dirty().add(root, dir, path.name(), Hint::Replaced, now_ms());
        }
    }

    pub(crate) fn hold(&self, root: RootId, path: &RelPath, kind: ProblemKind, detail: String) {
        lock(&self.kept).push((root, path.clone()));
        self.capture.held.hold(Problem { root, path: path.clone(), kind, detail });
    }

    fn visit<'s>(&'s self, scope: &rayon::Scope<'s>, visit: Visit, objects: bool) {
        if self.stopped.load(Ordering::Relaxed) {
            return;
        }
        let mut builder = lock(&self.builders).pop().unwrap_or_default();
        let result = self.look(scope, visit, &mut builder, objects);
        lock(&self.builders).push(builder);
        if let Err(e) = result {
            self.stopped.store(true, Ordering::Relaxed);
            lock(&self.failure).get_or_insert(e);
        }
    }

    fn look<'s>(&'s self, scope: &rayon::Scope<'s>, visit: Visit, builder: &mut Builder, objects: bool) -> Result<(), CaptureError> {
        let Visit { root, path, what } = visit;
        let disk = &self.capture.disk;
        if let Some(watch) = &self.capture.watch {
            watch.cover(root, &path);
            if self.opened.fetch_add(1, Ordering::Relaxed) % PACE == PACE - 1 {
                watch.catch_up();
            }
        }
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
        let row = self.snapshot.row(root, &path)?;
        self.consider(Candidate { root, path: path.clone(), stat, row }, builder)?;

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
            What::Deep | What::All => match disk.list_stat(&dir) {
                Ok(mut found) => {
                    found.sort_by(|a, b| a.0.cmp(&b.0));
                    (found, self.snapshot.children(root, &path)?)
                }
                Err(e) => {
                    self.hold(root, &path, ProblemKind::Unreadable, format!("the folder can't be listed: {e}"));
                    return Ok(());
                }
            },
        };
        self.counters.entries.fetch_add(found.len() as u64, Ordering::Relaxed);
        let mut known = known.into_iter().peekable();
        for (name, stat) in found {
            while let Some((gone, row)) = known.next_if(|(k, _)| *k < name) {
                self.gone(root, &path, &gone, row, builder)?;
            }
            let row = known.next_if(|(k, _)| *k == name).map(|(_, row)| row);
            let Some(child) = self.carried(root, &path, &name, &stat) else {
                if let Some(row) = row {
                    self.gone(root, &path, &name, row, builder)?;
                }
                continue;
            };
            if stat.kind == FileKind::Dir {
                self.descend(scope, Candidate { root, path: child, stat, row }, &what, &name, objects);
            } else {
                self.consider(Candidate { root, path: child, stat, row }, builder)?;
            }
        }
        for (gone, row) in known {
            self.gone(root, &path, &gone, row, builder)?;
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

    fn descend<'s>(&'s self, scope: &rayon::Scope<'s>, child: Candidate, what: &What, name: &[u8], objects: bool) {
        let known = child.row.as_ref().is_some_and(|row| row.is_dir() && witness_ino(row) == Some(child.stat.ino));
        let hint = match what {
            What::Names(names) => names.get(name).copied(),
            What::Deep | What::All => None,
        };
        let Candidate { root, path, stat, row } = child;
        let what = if matches!(what, What::Deep) || !known || hint == Some(Hint::Replaced) {
            What::Deep
        } else if hint.is_some() || row.is_some_and(|row| !is_unchanged(&row, &stat)) {
            What::Names(BTreeMap::new()) // the directory itself
        } else {
            return;
        };
        let visit = Visit { root, path, what };
        if !objects && is_objects(&visit.path) {
            self.defer(vec![visit]);
        } else {
            scope.spawn(move |scope| self.visit(scope, visit, objects));
        }
    }

    /// An entry that the index has and the directory doesn't.
    fn gone(&self, root: RootId, dir: &RelPath, name: &[u8], row: Row, builder: &mut Builder) -> Result<(), CaptureError> {
        let Ok(path) = dir.join(name) else { return Ok(()) };
        let is_news = matches!(row.state, State::Present { .. });
        if !is_news && row.version <= self.acked {
            return Ok(());
        }
        if !self.claim(root, &path) {
            return Ok(());
        }
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

    /// An entry that is there: nothing to do, or it is captured.
    fn consider(&self, candidate: Candidate, builder: &mut Builder) -> Result<(), CaptureError> {
        if let Some(row) = &candidate.row
            && row.version <= self.acked
            && is_unchanged(row, &candidate.stat)
        {
            return Ok(());
        }
        if !self.claim(candidate.root, &candidate.path) {
            return Ok(());
        }
        if candidate.stat.kind == FileKind::File && candidate.stat.nlink > 1 {
            lock(&self.linked).push(candidate);
            return Ok(());
        }
        self.capture_one(candidate, builder).map(drop)
    }

    fn hold_name(&self, root: RootId, dir: &RelPath, name: &[u8], detail: String) {
        let path = dir.join(name).unwrap_or_else(|_| dir.clone());
        let detail = format!("{:?} {detail}", coldspare_core::path::escape(name));
        self.hold(root, &path, ProblemKind::Unsupported, detail);
    }

    pub(crate) fn root(&self, root: RootId) -> &crate::capture::Root<D> {
        &self.capture.roots[usize::from(root.0)]
    }
}

impl What {
    /// 0 for the widest look.
    fn width(&self) -> u8 {
        match self {
            What::Deep => 0,
            What::All => 1,
            What::Names(_) => 2,
        }
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

fn witness_ino(row: &Row) -> Option<u64> {
    match &row.state {
        State::Present { witness, .. } => Some(witness.ino),
        State::Gone => None,
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

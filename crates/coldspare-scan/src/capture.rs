//! One cycle of capture: looks at what may have changed, compares it with the index, hands over what did.
//!
//! The order is git's: references and everything else first, then, after a barrier of the watch, the folders of
//! objects. git writes objects before the references that need them, so that all that a captured reference needs is
//! on disk, and among the hints, when the objects are read (G2).
//!
//! It decides nothing about the link and keeps nothing in memory that grows with the home, but one path per
//! repository while everything is looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use coldspare_core::changeset::{Ask, Have, Totals};
use coldspare_core::exclude::Exclude;
use coldspare_core::{Baseline, Op, Problem, RelPath, RootId, Seq};
use coldspare_delta::Packed;
use coldspare_os::Disk;

use crate::dirty::{Hints, Names};
use crate::index::{Index, IndexError};
use crate::visit::{Run, Visit, What};
use crate::watch::{Watch, WatchError};
use crate::writer::Writer;

/// One root as capture sees it.
pub struct Root<D: Disk> {
    /// Where it is, absolute and resolved.
    pub path: PathBuf,
    /// A held descriptor of it.
    pub dir: D::Dir,
    /// What of it is not replicated.
    pub exclude: Exclude,
}

/// What capture needs for the life of a daemon.
pub struct Capture<D: Disk> {
    /// How files are reached.
    pub disk: D,
    /// The roots, in the order of their numbers.
    pub roots: Vec<Root<D>>,
    /// What was captured before.
    pub index: Index,
    /// The hints; without a watch only a look at everything is possible.
    pub watch: Option<Watch>,
    /// What is held back at present.
    pub held: HeldBack,
    /// The threads that look and read.
    pub pool: rayon::ThreadPool,
    /// zstd's level for what shrinks.
    pub zstd_level: i32,
}

/// One cycle's orders.
#[derive(Debug, Clone)]
pub struct Cycle {
    /// The changeset's number.
    pub seq: Seq,
    /// What it starts from.
    pub baseline: Baseline,
    /// Whether the standby may have content that the index doesn't know of.
    pub certainty: Certainty,
    /// What to look at.
    pub work: Work,
    /// Files whose old content on the standby is not to be relied on.
    pub literal: BTreeSet<(RootId, RelPath)>,
}

/// What to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Every directory of every root.
    Everything,
    /// What the watch reported.
    Hinted,
}

/// Whether to ask before content is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Certainty {
    /// The standby has what the index says and nothing else.
    Sure,
    /// The standby may have more, from an interrupted try or from before the index was made: ask first.
    Ask,
}

/// Where captured changes go. Called from several threads at once; may block: that is the backpressure.
pub trait Outlet: Sync {
    /// Takes operations with the inline content of their files, in order.
    ///
    /// # Errors
    /// [`Closed`]: the link is gone.
    fn batch(&self, ops: Vec<Op>, payload: Packed, raw_len: usize) -> Result<(), Closed>;

    /// Takes a part of a large file; `literal` is the content of its literal pieces.
    ///
    /// # Errors
    /// [`Closed`]: the link is gone.
    fn segment(&self, part: FilePart, literal: Packed, raw_len: usize) -> Result<(), Closed>;

    /// Asks whether the standby has these contents; the answers are in the order of the questions.
    ///
    /// # Errors
    /// [`Closed`]: the link is gone.
    fn ask(&self, items: Vec<Ask>) -> Result<Vec<Have>, Closed>;
}

/// A part of a large file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePart {
    /// The file's number in the changeset.
    pub file: u32,
    /// The root that holds `path`.
    pub root: RootId,
    /// The file, also the one that copies are taken from.
    pub path: RelPath,
    /// Where in the file it starts.
    pub offset: u64,
    /// As [`coldspare_delta::encode_pieces`] codes them.
    pub pieces: Vec<u8>,
}

/// The outlet takes no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

/// What a cycle amounted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// Milliseconds since 1970: what was written before then is in the changeset or held back.
    pub as_of_ms: u64,
    /// What was sent and read.
    pub totals: Totals,
    /// Entries that were looked at.
    pub entries: u64,
    /// Sockets, pipes and devices that were skipped.
    pub special: u64,
}

/// A cycle that could not be finished; nothing of it may be committed.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The link is gone.
    #[error("the link to the standby was lost")]
    Closed,
    /// The index failed.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The watch failed.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// A root is not what it was: unmounted, exchanged, or without its control folder.
    #[error("{path}: {detail}; nothing was captured")]
    Root {
        /// The root.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
}

impl From<Closed> for CaptureError {
    fn from(_: Closed) -> CaptureError {
        CaptureError::Closed
    }
}

/// How long the watch may take to answer.
const BARRIER_LIMIT: Duration = Duration::from_secs(20);

impl<D: Disk> Capture<D> {
    /// Runs one cycle; returns the hints that it took, to be put back should its changeset not be applied.
    ///
    /// After `Ok` all rows are durable in the index, so that the changeset's end may be sent.
    /// Cost: looking at everything is one `getdents` pass, one `statx` an entry and no read of what is unchanged.
    pub fn run(&self, cycle: Cycle, outlet: &dyn Outlet) -> (Hints, Result<Report, CaptureError>) {
        let as_of_ms = self.disk.now_ms();
        assert!(cycle.baseline != Baseline::Full || cycle.work == Work::Everything, "naming everything takes a look at everything");
        let mut taken = Hints { everything: cycle.work == Work::Everything, dirs: BTreeMap::new(), oldest_ms: None };
        let result = self.run_inner(cycle, outlet, as_of_ms, &mut taken);
        (taken, result)
    }

    fn run_inner(&self, cycle: Cycle, outlet: &dyn Outlet, as_of_ms: u64, taken: &mut Hints) -> Result<Report, CaptureError> {
        self.check_roots()?;
        let work = cycle.work;
        if let Some(watch) = &self.watch {
            if work == Work::Everything && watch.is_stale() {
                watch.rebuild()?;
            }
            watch.barrier(BARRIER_LIMIT)?;
            let mut dirty = watch.dirty();
            // RACE: events may have been lost since the work was chosen; that is left for a look at everything.
            if work == Work::Everything || !dirty.is_everything() {
                let everything = taken.everything;
                *taken = Hints { everything, ..dirty.take() };
            }
        }
        self.index.reserve(cycle.seq)?;
        self.held.begin();
        let snapshot = self.index.snapshot()?;
        let report = std::thread::scope(|scope| {
            let writer = Writer::start(scope, &self.index);
            let run = Run::new(self, &cycle, snapshot, &writer, outlet);
            let first = match work {
                Work::Everything => (0..self.roots.len()).map(|n| Visit::deep(root_id(n), RelPath::root())).collect(),
                Work::Hinted => visits(&taken.dirs),
            };
            let result = run.pass(first).and_then(|()| {
                // A look at everything reads all objects in the later passes anyway.
                if let Some(watch) = &self.watch
                    && work == Work::Hinted
                {
                    watch.barrier(BARRIER_LIMIT)?;
                    let late = watch.dirty().take_where(crate::visit::is_objects);
                    run.defer(visits(&late.dirs));
                    merge(taken, late);
                }
                run.pass_deferred()
            });
            let report = run.finish(result);
            // The rows of a cycle that failed may stay: their number is higher than what the standby acknowledged.
            writer.finish()?;
            report
        })?;
        if work == Work::Everything {
            self.held.forget_older();
        }
        Ok(Report { as_of_ms, ..report })
    }

    /// Refuses to capture from a root that lost its marker: an unmounted source looks like a mass deletion.
    fn check_roots(&self) -> Result<(), CaptureError> {
        for root in &self.roots {
            let fail = |detail: String| CaptureError::Root { path: root.path.clone(), detail };
            let now = self.disk.open_root(&root.path).map_err(|e| fail(format!("can't be opened: {e}")))?;
            let (held, found) = (self.disk.stat_dir(&root.dir), self.disk.stat_dir(&now));
            match (held, found) {
                (Ok(held), Ok(found)) if (held.dev, held.ino) == (found.dev, found.ino) => {}
                _ => return Err(fail("is another folder than at the start of the daemon (unmounted or exchanged)".into())),
            }
            self.disk
                .open_dir(&now, coldspare_core::path::CONTROL_DIR)
                .map_err(|e| fail(format!("has no folder .coldspare ({e}): is the right filesystem mounted?")))?;
        }
        Ok(())
    }
}

fn root_id(number: usize) -> RootId {
    RootId(u8::try_from(number).expect("roots are few"))
}

fn visits(dirs: &BTreeMap<(RootId, RelPath), Names>) -> Vec<Visit> {
    let what = |names: &Names| match names {
        Names::All => What::Deep,
        Names::Some(set) => What::Names(set.clone()),
    };
    dirs.iter().map(|((root, path), names)| Visit { root: *root, path: path.clone(), what: what(names) }).collect()
}

fn merge(taken: &mut Hints, late: Hints) {
    for (key, names) in late.dirs {
        match (taken.dirs.get_mut(&key), names) {
            (Some(Names::All), _) => {}
            (Some(Names::Some(mine)), Names::Some(more)) => {
                for (name, hint) in more {
                    mine.entry(name).and_modify(|known| *known = hint.max(*known)).or_insert(hint);
                }
            }
            (_, names) => drop(taken.dirs.insert(key, names)),
        }
    }
}

/// What is held back: not sent, the standby's copy kept, reported until it is captured after all.
#[derive(Debug, Default)]
pub struct HeldBack {
    problems: Mutex<BTreeMap<(RootId, RelPath), (Problem, u64)>>,
    cycle: AtomicU64,
    /// Problems beyond the limit.
    unlisted: AtomicU64,
}

/// LIMIT: problems that are listed; more are counted.
const HELD_MAX: usize = 10_000;

impl HeldBack {
    /// The problems that are listed, by path, and how many more there are.
    pub fn list(&self) -> (Vec<Problem>, u64) {
        (self.lock().values().map(|(p, _)| p.clone()).collect(), self.unlisted.load(Ordering::Relaxed))
    }

    pub(crate) fn hold(&self, problem: Problem) {
        let mut problems = self.lock();
        let key = (problem.root, problem.path.clone());
        if problems.len() >= HELD_MAX && !problems.contains_key(&key) {
            self.unlisted.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if !problems.contains_key(&key) {
            tracing::warn!(path = %problem.path, kind = problem.kind.word(), detail = problem.detail, "held back");
        }
        problems.insert(key, (problem, self.cycle.load(Ordering::Relaxed)));
    }

    pub(crate) fn release(&self, root: RootId, path: &RelPath) {
        let mut problems = self.lock();
        if !problems.is_empty() {
            problems.remove(&(root, path.clone()));
        }
    }

    fn begin(&self) {
        self.cycle.fetch_add(1, Ordering::Relaxed);
    }

    /// After a look at everything: what was not met again is no longer a problem.
    fn forget_older(&self) {
        let cycle = self.cycle.load(Ordering::Relaxed);
        let mut problems = self.lock();
        problems.retain(|_, (_, at)| *at == cycle);
        if problems.len() < HELD_MAX {
            self.unlisted.store(0, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(RootId, RelPath), (Problem, u64)>> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! One cycle of capture: looks at what may have changed, compares it with the index, hands over what did.
//!
//! The order is git's, over all repositories at once: references and what else names objects, then, after a barrier of the
//! watch, loose objects, packs, what is derived from them, and everything else. git writes objects before the references that need them, so
//! that all that a captured reference needs is on disk, and among the hints, when the objects are read (G2). A
//! repository that changes under the capture is left, whole, to the next cycle.
//!
//! It decides nothing about the link and keeps nothing in memory that grows with the home, but one record a repository
//! that is met, and one path a folder of objects while everything is looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub use coldspare_core::changeset::FilePart;
use coldspare_core::changeset::{Ask, Have, Totals};
use coldspare_core::exclude::Exclude;
use coldspare_core::git::family::Repository;
use coldspare_core::git::{self, CapturePass, Part};
use coldspare_core::{Baseline, Op, Problem, ProblemKind, RelPath, RootId, Seq, seeded_bug};
use coldspare_delta::Packed;
use coldspare_os::Disk;

use crate::bulk::Bulk;
use crate::dirty::{Dirty, Hint, Hints};
use crate::discover::When;
pub use crate::held::HeldBack;
use crate::index::{Index, IndexError};
use crate::proof::Turns;
use crate::run::{Run, lock};
use crate::settle::Left;
use crate::unit::Extent;
use crate::visit::Visit;
use crate::watch::{Watch, WatchError};
use crate::writer::{Change, Writer};

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
    /// The cycles so far.
    pub turns: Turns,
    /// The hints that the cycle under way took, without what they tell of: since when what it brings waits.
    pub under_way: Mutex<Hints>,
    /// Whether the last cycle brought renamed folders alone: what it left to the next must not wait for more of them.
    pub has_renamed: AtomicBool,
    /// What is put off until its content is on the standby; `None` where nothing is.
    pub bulk: Option<Bulk>,
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
    /// Whether a repository changed while it was read: another cycle has to bring it.
    pub is_left: bool,
    /// Whether something waits for its content to be sent as bulk: a cycle brings it after that.
    pub is_put_off: bool,
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

/// Whether what is at `inside`, below its repository, belongs to a pack that is whole: one under way has another name.
fn is_whole_pack(inside: &[u8]) -> bool {
    let name = inside.rsplit(|&b| b == b'/').next().unwrap_or_default();
    CapturePass::of(inside) == CapturePass::Packs && !git::looks_transient(name)
}

/// How long the watch may take to answer.
pub(crate) const BARRIER_LIMIT: Duration = Duration::from_secs(20);

impl<D: Disk> Capture<D> {
    /// Before the first cycle: nothing is held back.
    pub fn new(disk: D, roots: Vec<Root<D>>, index: Index, watch: Option<Watch>, pool: rayon::ThreadPool, zstd_level: i32) -> Capture<D> {
        let (held, turns, under_way) = (HeldBack::default(), Turns::default(), Mutex::default());
        Capture { disk, roots, index, watch, held, turns, under_way, has_renamed: AtomicBool::new(false), bulk: None, pool, zstd_level }
    }

    /// Runs one cycle; returns the hints that it took, to be put back should its changeset not be applied.
    ///
    /// After `Ok` all rows are durable in the index, so that the changeset's end may be sent.
    /// Cost: looking at everything is one `getdents` pass, one `statx` an entry and no read of what is unchanged.
    pub fn run(&self, cycle: Cycle, outlet: &dyn Outlet) -> (Hints, Result<Report, CaptureError>) {
        let _turn = self.turns.begin();
        let as_of_ms = self.disk.now_ms();
        assert!(cycle.baseline != Baseline::Full || cycle.work == Work::Everything, "naming everything takes a look at everything");
        let mut taken = Hints { everything: cycle.work == Work::Everything, ..Hints::default() };
        let looks_at_all = self.watch.as_ref().filter(|_| cycle.work == Work::Everything);
        if let Some(watch) = looks_at_all {
            watch.recount();
        }
        let result = self.run_inner(cycle, outlet, as_of_ms, &mut taken);
        if let Some(watch) = looks_at_all {
            watch.recounted(result.is_ok());
        }
        *lock(&self.under_way) = Hints::default();
        (taken, result)
    }

    fn run_inner(&self, cycle: Cycle, outlet: &dyn Outlet, as_of_ms: u64, taken: &mut Hints) -> Result<Report, CaptureError> {
        self.check_roots()?;
        let work = cycle.work;
        let mut is_lost = false;
        // Before hints are taken: what waits no longer is among them, or counts as waiting still.
        let was_put_off = self.bulk.as_ref().is_some_and(Bulk::is_any);
        if let (Some(bulk), Some(watch), Baseline::Full) = (&self.bulk, &self.watch, cycle.baseline) {
            bulk.clear(&mut watch.dirty());
        }
        if let Some(watch) = &self.watch {
            if work == Work::Everything && watch.is_stale() {
                watch.rebuild()?;
            }
            watch.barrier(BARRIER_LIMIT)?;
            let mut dirty = watch.dirty();
            // RACE: events may have been lost since the work was chosen; that is left for a look at everything, and a
            // checkpoint waits for that.
            is_lost = work == Work::Hinted && dirty.is_everything() && !seeded_bug!(LossesAreLeftAside);
            if work == Work::Everything || !dirty.is_everything() {
                let everything = taken.everything;
                *taken = Hints { everything, ..dirty.take() };
                *lock(&self.under_way) = Hints { oldest_ms: taken.oldest_ms, waiting: taken.waiting.clone(), ..Hints::default() };
            }
        }
        self.index.reserve(cycle.seq)?;
        let sent = self.bulk.as_ref().map(Bulk::take_sent).unwrap_or_default();
        if !sent.is_empty() {
            self.index.apply(sent)?;
        }
        self.held.begin();
        let snapshot = self.index.snapshot()?;
        let (report, mut left) = std::thread::scope(|scope| {
            let writer = Writer::start(scope, &self.index);
            let run = Run::new(self, &cycle, snapshot, &writer, outlet);
            let result = self.passes(&run, work, taken);
            let finished = run.finish(result);
            drop(run);
            // The rows of a cycle that failed may stay: their number is higher than what the standby acknowledged.
            writer.finish()?;
            finished
        })?;
        self.hint_again(&left.again, work, taken);
        let is_put_off = self.park(&mut left, work, taken) || (was_put_off && cycle.baseline != Baseline::Full);
        if work == Work::Everything {
            self.held.forget_older();
        }
        Ok(Report { as_of_ms, is_left: report.is_left || is_lost, is_put_off, ..report })
    }

    fn passes(&self, run: &Run<'_, D>, work: Work, taken: &mut Hints) -> Result<(), CaptureError> {
        match work {
            Work::Everything if matches!(run.cycle.baseline, Baseline::Delta(_)) => run.survey_everything()?,
            Work::Everything => {
                self.pool.scope(|scope| {
                    for number in 0..self.roots.len() {
                        scope.spawn(move |scope| run.discover(scope, root_id(number), RelPath::root()));
                    }
                });
                for number in 0..self.roots.len() {
                    run.defer(CapturePass::Rest, Visit::deep(root_id(number), RelPath::root()));
                }
            }
            Work::Hinted if !self.has_renamed.swap(false, Ordering::Relaxed) && run.renames(taken)? => {
                self.has_renamed.store(true, Ordering::Relaxed);
                if let Some(watch) = &self.watch {
                    watch.dirty().restore(taken.clone());
                }
                run.is_left.store(true, Ordering::Relaxed);
                return Ok(());
            }
            Work::Hinted => run.route(&taken.dirs, When::First)?,
        }
        if seeded_bug!(ObjectsBeforeReferences) {
            [CapturePass::LooseObjects, CapturePass::Packs].into_iter().try_for_each(|pass| run.pass(pass))?;
        }
        run.references(taken)?;
        if !seeded_bug!(MentionsAfterObjects) {
            run.pass(CapturePass::Mentions)?;
        }
        let watch = self.watch.as_ref().filter(|_| work == Work::Hinted && !run.units.is_empty());
        if let Some(watch) = watch {
            // The barrier behind the references brought every event that came before they were read.
            let late = watch.dirty().take_where(is_no_reference);
            run.route(&late.dirs, When::Late)?;
            taken.merge(late);
        }
        run.objects_from_ms.store(self.disk.now_ms(), Ordering::Relaxed);
        run.pass(CapturePass::LooseObjects)?;
        run.pass(CapturePass::Packs)?;
        if let Some(watch) = watch {
            self.late_packs(run, watch, taken)?;
        }
        run.revisit_derived();
        run.pass(CapturePass::Derived)?;
        run.capture_graphs()?;
        if seeded_bug!(MentionsAfterObjects) {
            run.pass(CapturePass::Mentions)?;
        }
        run.pass(CapturePass::Rest)?;
        run.capture_linked()
    }

    /// Objects that went before they were read may have moved to a pack, which was hinted before they went.
    fn late_packs(&self, run: &Run<'_, D>, watch: &Watch, taken: &mut Hints) -> Result<(), CaptureError> {
        for _ in 0..LATE_PACKS_MAX {
            let mut units = run.units.all();
            units.retain(|unit| unit.has_new_losses());
            if units.is_empty() {
                return Ok(());
            }
            units.iter().for_each(|unit| unit.account_for_losses());
            watch.barrier(BARRIER_LIMIT)?;
            for unit in units {
                let late = watch.dirty().take_names(unit.at.0, &unit.at.1, is_whole_pack);
                tracing::trace!(repository = %unit.at.1, ?late, "late packs");
                run.route(&late.dirs, When::Late)?;
                taken.merge(late);
            }
            run.pass(CapturePass::Packs)?;
        }
        let units = run.units.all();
        units.iter().filter(|unit| unit.has_new_losses()).for_each(|unit| unit.again("its packs kept changing while they were read"));
        Ok(())
    }

    /// What was left undone is hinted once more.
    fn hint_again(&self, again: &BTreeMap<Repository, Extent>, work: Work, taken: &Hints) {
        let Some(watch) = &self.watch else { return };
        for (at, extent) in again {
            let hints = self.hints_of(at, *extent, work, taken);
            watch.dirty().restore(hints);
        }
    }

    /// Has what was put off wait for its content; says whether anything was.
    fn park(&self, left: &mut Left, work: Work, taken: &Hints) -> bool {
        let (Some(bulk), Some(watch)) = (&self.bulk, &self.watch) else { return false };
        let items = std::mem::take(&mut left.put_offs);
        let mut units: Vec<_> = left.waits.iter().map(|(at, extent)| (at.clone(), self.hints_of(at, *extent, work, taken))).collect();
        let files = items.iter().filter(|item| item.unit.is_none());
        units.extend(files.map(|item| (item.at.clone(), self.hints_of(&item.at, Extent::Full, work, taken))));
        let is_any = !units.is_empty();
        if is_any {
            bulk.park(items, units, &mut watch.dirty());
        }
        is_any
    }

    /// The hints by which a repository, or a file, is looked at once more.
    fn hints_of(&self, (root, path): &Repository, extent: Extent, work: Work, taken: &Hints) -> Hints {
        if work == Work::Hinted && extent == Extent::Hinted {
            return taken.within(*root, path);
        }
        let mut dirty = Dirty::default();
        // It waits since the first of these came.
        let since_ms = taken.oldest_ms.unwrap_or_else(|| self.disk.now_ms());
        dirty.add(*root, path.parent().unwrap_or_else(RelPath::root), path.name(), Hint::Replaced, since_ms);
        dirty.take()
    }

    /// Takes note that the standby did not take these repositories with the changeset that follows `acked`: something
    /// that their references name was not there.
    ///
    /// They are asked for again as a whole, some times; then they count as held back until they change. A file among them,
    /// which the standby found damaged there, is sent again, whatever the index says; it is no trouble of this side's.
    ///
    /// # Errors
    /// `Index`.
    pub fn note_incomplete(&self, repositories: &[Repository], acked: Seq) -> Result<(), CaptureError> {
        let snapshot = self.index.snapshot()?;
        let mut files = Vec::new();
        for at in repositories {
            let row = snapshot.row(at.0, &at.1)?;
            files.push(row.is_some_and(|row| !row.is_dir() && row.ino().is_some()));
        }
        drop(snapshot);
        let changes: Vec<Change> =
            repositories.iter().map(|(root, path)| Change::Unsent { root: *root, path: path.clone(), acked }).collect();
        self.index.apply(changes)?;
        for (at, is_file) in repositories.iter().zip(files) {
            if is_file {
                if let Some(watch) = &self.watch {
                    let dir = at.1.parent().unwrap_or_else(RelPath::root);
                    watch.dirty().add(at.0, dir, at.1.name(), Hint::Replaced, self.disk.now_ms());
                }
                continue;
            }
            let tries = self.held.note_incomplete(at);
            let detail =
                "a reference of it, or of one that it shares objects with, names an object that is not there; it stays as it is on \
                the standby until that is mended (`git fsck` names it)"
                    .to_string();
            self.held.hold(Problem { root: at.0, path: at.1.clone(), kind: ProblemKind::Incomplete, detail });
            if let Some(watch) = self.watch.as_ref().filter(|_| tries <= INCOMPLETE_TRIES) {
                let dir = at.1.parent().unwrap_or_else(RelPath::root);
                watch.dirty().add(at.0, dir, at.1.name(), Hint::Replaced, self.disk.now_ms());
            }
        }
        Ok(())
    }

    /// Has the repositories that the standby found incomplete tried once more: what was wrong may have been mended in
    /// another, of which nothing tells these.
    pub fn retry_incomplete(&self) {
        let Some(watch) = &self.watch else { return };
        for (root, path) in self.held.incomplete() {
            let dir = path.parent().unwrap_or_else(RelPath::root);
            watch.dirty().add(root, dir, path.name(), Hint::Replaced, self.disk.now_ms());
        }
    }

    /// Refuses to capture from a root that lost its marker: an unmounted source looks like a mass deletion.
    fn check_roots(&self) -> Result<(), CaptureError> {
        for root in self.roots.iter().filter(|_| !seeded_bug!(UnmountedRootsAreCaptured)) {
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

pub(crate) fn root_id(number: usize) -> RootId {
    RootId(u8::try_from(number).expect("roots are few"))
}

/// Whether a hint, by its shape, tells of nothing that was read before objects.
fn is_no_reference(dir: &RelPath, name: Option<&[u8]>) -> bool {
    let mentions = |path: &RelPath| path.components().any(|name| git::MENTIONING_NAMES.contains(&name));
    let is_reference = |path: &RelPath| matches!(git::part(path), Part::LooseRef | Part::PackedRefs | Part::Head) || mentions(path);
    match name {
        None => !is_reference(dir),
        Some(name) => dir.join(name).is_ok_and(|path| !is_reference(&path)),
    }
}

/// How often packs that came meanwhile are looked at before a repository counts as changing too fast.
const LATE_PACKS_MAX: usize = 8;
/// How often a repository is captured anew that the standby found incomplete.
const INCOMPLETE_TRIES: u32 = 3;

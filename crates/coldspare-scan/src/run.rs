//! One cycle under way: what its threads share, and what of it is left to a later pass or to the next cycle.
//!
//! Invariants: a path is handed over at most once in a cycle: what is met again, and otherwise, is left to the next.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use coldspare_core::git::{CapturePass, family::Repository};
use coldspare_core::{Baseline, Problem, ProblemKind, RelPath, RootId, Seq};
use coldspare_os::{Disk, Stat};

use crate::batch::Builder;
use crate::bulk::{Bulk, Item};
use crate::capture::{Capture, CaptureError, Cycle, Outlet, Work};
use crate::dirty::Hint;
use crate::graphs::GraphFolder;
use crate::index::Snapshot;
use crate::unit::Units;
use crate::visit::{Candidate, Visit, What};
use crate::writer::Writer;

/// One cycle under way; shared by its threads.
pub(crate) struct Run<'a, D: Disk> {
    pub(crate) capture: &'a Capture<D>,
    pub(crate) cycle: &'a Cycle,
    pub(crate) snapshot: Snapshot,
    pub(crate) writer: &'a Writer<'a>,
    pub(crate) outlet: &'a dyn Outlet,
    /// The changeset that this one starts from: the standby has all up to it when this one is applied, or this one fails.
    pub(crate) acked: Seq,
    pub(crate) counters: Counters,
    pub(crate) next_file: AtomicU32,
    /// The repositories that were met.
    pub(crate) units: Units,
    /// Files with several names.
    pub(crate) linked: Mutex<Vec<Candidate>>,
    /// Folders of commit graphs that were met.
    pub(crate) graphs: Mutex<BTreeSet<GraphFolder>>,
    /// Repositories that share a file.
    pub(crate) ties: Mutex<BTreeSet<(Repository, Repository)>>,
    deferred: Mutex<BTreeMap<(CapturePass, RootId, RelPath), What>>,
    /// What is held back in this cycle.
    pub(crate) kept: Mutex<BTreeSet<(RootId, RelPath)>>,
    /// What was to be handed over in this cycle, and wasn't in the end.
    pub(crate) untaken: Mutex<BTreeSet<(RootId, RelPath)>>,
    pub(crate) builders: Mutex<Vec<Builder>>,
    pub(crate) claims: Mutex<HashSet<u64>>,
    /// What directories were met as, while hints are followed: one of which something was handed over can't be gone in
    /// the same changeset, nor the reverse.
    met: Mutex<BTreeMap<(RootId, RelPath), Met>>,
    /// Whether what is outside of repositories is visited by its names although everything is looked at: a path may be met
    /// more than once then.
    pub(crate) by_name: AtomicBool,
    stopped: AtomicBool,
    /// Whether something was left to the next cycle.
    pub(crate) is_left: AtomicBool,
    failure: Mutex<Option<CaptureError>>,
    /// Held while such are looked up.
    pub(crate) pack_bases: Mutex<()>,
    /// Entries of packs that packs under way are described by.
    pub(crate) pack_entries: AtomicUsize,
    /// Held while an index of many objects is in memory. Nothing under it may use the rayon pool: a thread that waits there
    /// begins with other visits, and would lock it twice.
    pub(crate) index_turn: Mutex<()>,
    /// Bytes that the recipes of this changeset count for.
    pub(crate) recipe_bytes: AtomicUsize,
    pub(crate) opened: AtomicU64,
    /// Where what is too large is put off to; `None` where nothing is.
    pub(crate) bulk: Option<&'a Bulk>,
    /// What was put off.
    pub(crate) put_offs: Mutex<Vec<Item>>,
    /// Bytes of segments that were handed over.
    pub(crate) segment_bytes: AtomicU64,
    /// When the first object was looked at, in milliseconds since 1970.
    pub(crate) objects_from_ms: AtomicU64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) ops: AtomicU64,
    pub(crate) files_read: AtomicU64,
    pub(crate) bytes_read: AtomicU64,
    pub(crate) entries: AtomicU64,
    pub(crate) special: AtomicU64,
}

/// What a path was met as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Met {
    /// A directory that was looked at.
    There,
    /// Not there any more.
    Gone,
    /// There, and no directory: what is below it can't be there too.
    NoDirectory,
}

/// What a path is claimed as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Seen {
    /// This inode, with these times of change and of content.
    There {
        ino: u64,
        ctime: (i64, u32),
        mtime: (i64, u32),
    },
    Gone,
}

/// Whose a path is that is to be handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// The caller's.
    Mine,
    /// Another's, who met it as the caller did: it is done, and meeting it again is no news.
    Same,
    /// Another's, who met it otherwise: it changed since.
    Other,
}

impl From<&Stat> for Seen {
    fn from(stat: &Stat) -> Seen {
        Seen::There { ino: stat.ino, ctime: stat.ctime, mtime: stat.mtime }
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
            units: Units::default(),
            linked: Mutex::default(),
            graphs: Mutex::default(),
            ties: Mutex::default(),
            deferred: Mutex::default(),
            kept: Mutex::default(),
            untaken: Mutex::default(),
            builders: Mutex::default(),
            claims: Mutex::default(),
            met: Mutex::default(),
            by_name: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            is_left: AtomicBool::new(false),
            failure: Mutex::default(),
            pack_bases: Mutex::default(),
            pack_entries: AtomicUsize::new(0),
            index_turn: Mutex::new(()),
            recipe_bytes: AtomicUsize::new(0),
            opened: AtomicU64::new(0),
            // What names everything is nothing that could be promoted before its end.
            bulk: capture.bulk.as_ref().filter(|_| cycle.baseline != Baseline::Full),
            put_offs: Mutex::default(),
            segment_bytes: AtomicU64::new(0),
            objects_from_ms: AtomicU64::new(0),
        }
    }

    /// Looks at what was left to `pass`, and at what is below.
    pub(crate) fn pass(&self, pass: CapturePass) -> Result<(), CaptureError> {
        let visits = self.take_deferred(pass);
        self.capture.pool.scope(|scope| {
            for visit in visits {
                scope.spawn(move |scope| self.visit(scope, visit, pass));
            }
        });
        self.outcome()?;
        // Rows reach the index in the order of the passes: what goes in a later one buries what an earlier one met below.
        lock(&self.builders).iter_mut().try_for_each(|builder| self.flush(builder))
    }

    /// Leaves a directory to a pass; one that is found from above and by a hint is looked at once.
    pub(crate) fn defer(&self, pass: CapturePass, visit: Visit) {
        let mut deferred = lock(&self.deferred);
        let Visit { root, path, what } = visit;
        match (deferred.get_mut(&(pass, root, path.clone())), what) {
            (Some(What::Deep), _) => {}
            (Some(What::Names(known)), What::Names(more)) => {
                for (name, hint) in more {
                    known.entry(name).and_modify(|k| *k = hint.max(*k)).or_insert(hint);
                }
            }
            (_, what) => drop(deferred.insert((pass, root, path), what)),
        }
    }

    pub(crate) fn take_deferred(&self, pass: CapturePass) -> Vec<Visit> {
        let mut out = Vec::new();
        lock(&self.deferred).retain(|(at, root, path), what| {
            if *at == pass {
                out.push(Visit { root: *root, path: path.clone(), what: what.clone() });
            }
            *at != pass
        });
        out
    }

    /// The first failure of the threads, if there was one.
    pub(crate) fn outcome(&self) -> Result<(), CaptureError> {
        lock(&self.failure).take().map_or(Ok(()), Err)
    }

    pub(crate) fn fail(&self, e: CaptureError) {
        self.stopped.store(true, Ordering::Relaxed);
        lock(&self.failure).get_or_insert(e);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Claims `path`, of which `seen` was seen, for the caller to hand over.
    pub(crate) fn claim(&self, root: RootId, path: &RelPath, seen: &Seen, builder: &mut Builder) -> Claim {
        let (claim, as_seen) = (hash_of(&(root, path)), hash_of(&(root, path, seen)));
        let mut claims = lock(&self.claims);
        if claims.insert(claim) {
            claims.insert(as_seen);
            drop(claims);
            builder.claimed(root, path, claim);
            return Claim::Mine;
        }
        if claims.contains(&as_seen) { Claim::Same } else { Claim::Other }
    }

    /// Whether `path` was handed over in this cycle, or is about to be.
    pub(crate) fn is_claimed(&self, root: RootId, path: &RelPath) -> bool {
        lock(&self.claims).contains(&hash_of(&(root, path)))
    }

    /// As [`Run::claim`], for what isn't a directory: where each entry is met once, nothing is kept of that.
    pub(crate) fn claim_entry(&self, root: RootId, path: &RelPath, seen: &Seen, builder: &mut Builder) -> Claim {
        if self.is_met_once(root, path) { Claim::Mine } else { self.claim(root, path, seen, builder) }
    }

    /// Leaves `path` to the next cycle, which belongs to this one: a checkpoint waits for it.
    pub(crate) fn again(&self, root: RootId, path: &RelPath) {
        if self.capture.watch.is_some() {
            self.is_left.store(true, Ordering::Relaxed);
        }
        self.hint(root, path);
    }

    /// Has `path`, which is reported as held back, tried again with the next cycle.
    pub(crate) fn hint(&self, root: RootId, path: &RelPath) {
        tracing::trace!(%path, "hint again");
        if let Some(watch) = &self.capture.watch {
            let dir = path.parent().unwrap_or_else(RelPath::root);
            watch.dirty().add(root, dir, path.name(), Hint::Replaced, self.capture.disk.now_ms());
        }
    }

    /// Leaves the standby's copy of `path`, and of all below it, as it is.
    pub(crate) fn keep(&self, root: RootId, path: &RelPath) {
        tracing::trace!(%path, "keep");
        lock(&self.kept).insert((root, path.clone()));
    }

    /// Forgets what paths were met as for which `is_stale` says so: they are looked at again.
    pub(crate) fn forget_met(&self, is_stale: impl Fn(RootId, &RelPath) -> bool) {
        lock(&self.met).retain(|(root, path), _| !is_stale(*root, path));
    }

    /// Forgets that paths are to be left as they are for which `is_stale` says so: they are looked at again.
    pub(crate) fn forget_kept(&self, is_stale: impl Fn(RootId, &RelPath) -> bool) {
        lock(&self.kept).retain(|(root, path)| !is_stale(*root, path));
    }

    /// Holds `path` back with all below it: the standby's copy stays as it is.
    ///
    /// A repository that loses an object that way is held back as a whole, and one that loses a reference keeps its
    /// objects: what the standby has stays complete.
    pub(crate) fn hold(&self, root: RootId, path: &RelPath, kind: ProblemKind, detail: String) {
        self.keep(root, path);
        if let Some(unit) = self.units.of(root, path) {
            match CapturePass::of(path.below(&unit.at.1).unwrap_or_default()) {
                CapturePass::References => unit.hold_reference(),
                CapturePass::LooseObjects | CapturePass::Packs => unit.hold(&format!("{path}: {detail}")),
                CapturePass::Mentions | CapturePass::Derived | CapturePass::Rest => {}
            }
        }
        self.capture.held.hold(Problem { root, path: path.clone(), kind, detail });
    }

    /// Notes what a path is met as; `false` when that contradicts what it, or one above or below it, was met as before.
    ///
    /// Where everything is looked at, a directory is met once.
    pub(crate) fn meet(&self, root: RootId, path: &RelPath, as_what: Met) -> bool {
        if self.is_met_once(root, path) {
            return true;
        }
        let mut met = lock(&self.met);
        // Of what is no directory there is much: a hash each.
        let no_directory = |path: &RelPath| hash_of(&(root, path, Met::NoDirectory));
        let is_none = |met: &BTreeMap<_, _>, path: RelPath| {
            met.get(&(root, path.clone())) == Some(&Met::Gone) || lock(&self.claims).contains(&no_directory(&path))
        };
        let contradicts = match as_what {
            Met::There => path.ancestors().chain([path.clone()]).any(|above| is_none(&met, above)),
            Met::Gone | Met::NoDirectory => {
                let near =
                    met.range((root, path.clone())..).take_while(|((r, p), _)| *r == root && p.as_bytes().starts_with(path.as_bytes()));
                near.into_iter().any(|((_, p), what)| p.is_within(path) && *what == Met::There)
            }
        };
        match as_what {
            _ if contradicts => {}
            Met::NoDirectory => drop(lock(&self.claims).insert(no_directory(path))),
            Met::There | Met::Gone => drop(met.insert((root, path.clone()), as_what)),
        }
        !contradicts
    }

    /// Whether `path` is met on one way only.
    fn is_met_once(&self, root: RootId, path: &RelPath) -> bool {
        let is_visited_by_name = || self.by_name.load(Ordering::Relaxed) && self.units.of(root, path).is_none();
        self.cycle.work == Work::Everything && !is_visited_by_name()
    }

    pub(crate) fn root(&self, root: RootId) -> &crate::capture::Root<D> {
        &self.capture.roots[usize::from(root.0)]
    }
}

pub(crate) fn hash_of(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

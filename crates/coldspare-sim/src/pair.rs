//! An active and a standby in one process, wired as the daemons wire them, without a network.
//!
//! Invariants: a number of a changeset is never used twice; the standby's store is cut off as a kill would, when asked.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use coldspare_core::changeset::{Ask, Have};
use coldspare_core::exclude::Exclude;
use coldspare_core::{Baseline, NodeId, Op, RelPath, RootId, Seq, SessionId};
use coldspare_delta::{Packed, unpack};
use coldspare_os::{Disk, RealDisk};
use coldspare_scan::capture::{Capture, CaptureError, Certainty, Closed, Cycle, FilePart, Outlet, Report, Root, Work};
use coldspare_scan::index::Index;
use coldspare_scan::watch::{Backend, Watch, make_cookie_dir};
use coldspare_standby::{Depth, OpenError, Progress, RootSetup, Standby, StandbyError, Store, Verification};
use tempfile::TempDir;

use crate::compare::{EXCLUDED, Tree};
use crate::fault::FaultyDisk;
use crate::sent::{Part, Sent};

/// How a pair is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setup {
    /// Only looks at everything are possible.
    Unwatched,
    /// With inotify.
    Watched,
}

/// How an interrupted cycle ends on the standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The link was lost: the standby abandons the changeset.
    Abandoned,
    /// The standby was killed and started again.
    Killed,
}

/// Why a cycle did not end with an acknowledgement.
#[derive(Debug)]
pub enum Stopped {
    /// The outlet closed, as it was told to.
    Interrupted,
    /// The capture failed by itself.
    Capture(CaptureError),
    /// The standby refused or failed.
    Standby(StandbyError),
}

/// Both ends.
pub struct Pair {
    dir: TempDir,
    standby_at: PathBuf,
    setup: Setup,
    capture: Option<Capture<RealDisk>>,
    standby: Option<Standby<FaultyDisk>>,
    disk: FaultyDisk,
    session: SessionId,
    last_seq: Seq,
    interrupt: Option<(u64, Ending)>,
    literal: BTreeSet<(RootId, RelPath)>,
    sent: Option<Sent>,
}

const NODE: NodeId = NodeId([7; 16]);
/// Threads of the capture: enough that the order of hand-overs varies.
const THREADS: usize = 3;

impl Pair {
    /// Makes both ends, with empty roots, below `place`.
    pub fn new(setup: Setup, place: &Path) -> Pair {
        let dir = tempfile::tempdir_in(place).expect("a folder for the pair");
        let standby_at = dir.path().to_path_buf();
        Pair::of(setup, dir, standby_at)
    }

    /// Makes both ends, with empty roots: the active below `place`, the standby's root and its store in `standby_at`,
    /// which may be another filesystem.
    pub fn with_standby_at(setup: Setup, place: &Path, standby_at: &Path) -> Pair {
        Pair::of(setup, tempfile::tempdir_in(place).expect("a folder for the pair"), standby_at.into())
    }

    fn of(setup: Setup, dir: TempDir, standby_at: PathBuf) -> Pair {
        let disk = FaultyDisk::default();
        let session = SessionId([1; 16]);
        let (capture, standby, interrupt, sent) = (None, None, None, None);
        let (literal, last_seq) = (BTreeSet::new(), Seq(0));
        let mut pair = Pair { dir, standby_at, setup, capture, standby, disk, session, last_seq, interrupt, literal, sent };
        make_root(&pair.active_root());
        if !pair.standby_root().exists() {
            make_root(&pair.standby_root());
        }
        make_cookie_dir(&pair.active_root()).expect("a folder for marks");
        pair.open_active();
        pair.open_standby();
        pair
    }

    /// The active's root.
    pub fn active_root(&self) -> PathBuf {
        self.dir.path().join("active")
    }

    /// The standby's root.
    pub fn standby_root(&self) -> PathBuf {
        standby_root(&self.standby_at)
    }

    /// The active's side.
    pub fn capture(&self) -> &Capture<RealDisk> {
        self.capture.as_ref().expect("the active is open")
    }

    /// The standby's side.
    pub fn standby(&self) -> &Standby<FaultyDisk> {
        self.standby.as_ref().expect("the standby is open")
    }

    /// The standby's disk.
    pub fn disk(&self) -> &FaultyDisk {
        &self.disk
    }

    /// The active's tree as it is now.
    pub fn active_tree(&self) -> Tree {
        Tree::read(&self.active_root())
    }

    /// The standby's tree as it is now.
    pub fn standby_tree(&self) -> Tree {
        Tree::read(&self.standby_root())
    }

    /// Sends what differs since the last acknowledgement, or everything when there was none.
    ///
    /// # Errors
    /// As [`Pair::cycle`].
    pub fn follow(&mut self, work: Work) -> Result<Report, Stopped> {
        let mut report = match self.standby().applied() {
            Some(applied) => self.cycle(work, Baseline::Delta(applied.seq), Certainty::Sure)?,
            None => self.cycle(Work::Everything, Baseline::Full, Certainty::Ask)?,
        };
        while report.is_left {
            let acked = self.standby().applied().expect("it was acknowledged").seq;
            report = self.cycle(Work::Hinted, Baseline::Delta(acked), Certainty::Sure)?;
        }
        Ok(report)
    }

    /// Runs one cycle: capture, stage, finish, acknowledge.
    ///
    /// # Errors
    /// [`Stopped`]; the standby is as after the last acknowledgement then, or, failed while it applied, to be restarted.
    pub fn cycle(&mut self, work: Work, baseline: Baseline, certainty: Certainty) -> Result<Report, Stopped> {
        let next = self.capture().index.next_seq().expect("a readable index");
        let seq = next.max(self.last_seq.next());
        self.last_seq = seq;
        let interrupt = self.interrupt.take();
        let literal = std::mem::take(&mut self.literal);
        let (capture, standby) = (self.capture(), self.standby());
        standby.begin(self.session, seq, baseline, seq).map_err(Stopped::Standby)?;
        let calls = AtomicU64::new(interrupt.map_or(u64::MAX, |(calls, _)| calls));
        let outlet = Direct { standby, seq, calls, failure: Mutex::default(), parts: Mutex::default() };
        let (taken, result) = capture.run(Cycle { seq, baseline, certainty, work, literal }, &outlet);
        let failure = outlet.failure.into_inner().expect("no panic");
        let parts = outlet.parts.into_inner().expect("no panic");
        let stopped = match (result, failure) {
            (_, Some(e)) => Stopped::Standby(e),
            (Ok(report), None) => match standby.finish(seq, report.as_of_ms, report.totals) {
                Ok(_) => {
                    capture.held.acknowledged(seq);
                    capture.index.record_acked(NODE, seq).expect("a writable index");
                    let (as_of_ms, totals) = (report.as_of_ms, report.totals);
                    self.sent = Some(Sent { session: self.session, seq, baseline, parts, as_of_ms, totals });
                    return Ok(report);
                }
                Err(e) => Stopped::Standby(e),
            },
            (Err(CaptureError::Closed), None) => Stopped::Interrupted,
            (Err(e), None) => Stopped::Capture(e),
        };
        if let Some(watch) = &capture.watch {
            watch.dirty().restore(taken);
        }
        match interrupt {
            Some((_, Ending::Killed)) => self.kill_standby(),
            _ => {
                let _ = self.standby().abandon();
            }
        }
        if let Stopped::Standby(StandbyError::BaseDiffers { root, path }) = &stopped {
            self.literal.insert((*root, path.clone()));
        }
        Err(stopped)
    }

    /// What was sent for the changeset that was acknowledged last.
    pub fn sent(&self) -> Option<&Sent> {
        self.sent.as_ref()
    }

    /// Lets the next cycle's outlet close after `calls` calls.
    pub fn interrupt_after(&mut self, calls: u64, ending: Ending) {
        self.interrupt = Some((calls, ending));
    }

    /// Verifies the standby's tree.
    pub fn verify(&self, depth: Depth) -> Verification {
        self.standby().verify(depth, &Progress::default()).expect("a readable manifest")
    }

    /// Stops the standby in good order and starts it again.
    pub fn restart_standby(&mut self) {
        self.standby = None;
        self.open_standby();
    }

    /// Kills the standby, so that nothing of its store counts that wasn't durable, and starts it again.
    pub fn kill_standby(&mut self) {
        // The store would save itself when it is closed: what is in the file now is what a killed process leaves.
        let (store, left) = (self.standby_store(), self.standby_at.join("killed.redb"));
        std::fs::copy(&store, &left).expect("a copy of the store");
        self.standby = None;
        std::fs::rename(left, store).expect("the store as it was");
        self.open_standby();
    }

    /// Stops the active and starts it again; the watch begins anew, so that everything has to be looked at.
    pub fn restart_active(&mut self) {
        self.capture = None;
        self.open_active();
    }

    /// Kills the active, loses its index and starts it again: a new session.
    pub fn lose_index(&mut self) {
        self.capture = None;
        std::fs::remove_file(self.index_path()).expect("an index");
        self.session.0[0] += 1;
        self.open_active();
    }

    fn index_path(&self) -> PathBuf {
        self.dir.path().join("index.redb")
    }

    fn standby_store(&self) -> PathBuf {
        standby_store(&self.standby_at)
    }

    fn open_active(&mut self) {
        let disk = RealDisk::staying();
        let path = self.active_root();
        let dir = disk.open_root(&path).expect("a root");
        let watch = match self.setup {
            Setup::Unwatched => None,
            Setup::Watched => Some(Watch::start(Backend::Inotify, vec![path.clone().into()], Box::new(|| ())).expect("a watch")),
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(THREADS).build().expect("threads");
        let roots = vec![Root { path, dir, exclude: exclude() }];
        let index = Index::open(&self.index_path()).expect("an index");
        self.capture = Some(Capture::new(disk, roots, index, watch, pool, 1));
    }

    fn open_standby(&mut self) {
        self.disk.fail_after(i64::MAX);
        self.standby = Some(open_standby_at(&self.standby_at, self.disk.clone()).expect("a standby"));
    }
}

/// Makes an empty root.
pub fn make_root(path: &Path) {
    std::fs::create_dir(path).expect("a root");
    std::fs::create_dir(path.join(".coldspare")).expect("a control folder");
}

/// Opens the standby that a pair keeps in `standby_at`, which finishes what it had committed.
///
/// # Errors
/// As [`Store::open`] and [`Standby::open`].
pub fn open_standby_at<D: Disk>(standby_at: &Path, disk: D) -> Result<Standby<D>, OpenError> {
    let store = Store::open(&standby_store(standby_at))?;
    Standby::open(disk, store, vec![RootSetup { path: standby_root(standby_at), way: None, exclude: exclude() }])
}

/// The root of the standby that a pair keeps in `standby_at`.
pub fn standby_root(standby_at: &Path) -> PathBuf {
    standby_at.join("standby")
}

fn standby_store(standby_at: &Path) -> PathBuf {
    standby_at.join("standby.redb")
}

fn exclude() -> Exclude {
    Exclude::new(EXCLUDED).expect("patterns that can be used")
}

/// Where pairs are made: in memory, or on the disk that `TMPDIR` names for every fourth seed.
pub fn place(seed: u64) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let usable = || {
        let probe = tempfile::NamedTempFile::new_in(memory).ok()?;
        rustix::fs::setxattr(probe.path(), "user.probe", b"x", rustix::fs::XattrFlags::empty()).ok()
    };
    if !seed.is_multiple_of(4) && usable().is_some() { memory.into() } else { std::env::temp_dir() }
}

/// Hands everything straight to the standby.
struct Direct<'a> {
    standby: &'a Standby<FaultyDisk>,
    seq: Seq,
    /// How many calls are still taken.
    calls: AtomicU64,
    failure: Mutex<Option<StandbyError>>,
    /// What the standby took, in the order in which it took it.
    parts: Mutex<Vec<Part>>,
}

impl Direct<'_> {
    fn part(&self, part: Part) -> Result<(), Closed> {
        self.pass(|| part.stage(self.standby, self.seq))?;
        self.parts.lock().expect("no panic").push(part);
        Ok(())
    }

    fn pass<T>(&self, call: impl FnOnce() -> Result<T, StandbyError>) -> Result<T, Closed> {
        let taken = self.calls.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        taken.map_err(|_| Closed)?;
        call().map_err(|e| {
            self.failure.lock().expect("no panic").get_or_insert(e);
            Closed
        })
    }
}

impl Outlet for Direct<'_> {
    fn batch(&self, ops: Vec<Op>, payload: Packed, raw_len: usize) -> Result<(), Closed> {
        self.part(Part::Batch { ops, payload: raw(payload, raw_len) })
    }

    fn segment(&self, part: FilePart, literal: Packed, raw_len: usize) -> Result<(), Closed> {
        self.part(Part::Segment { part, literal: raw(literal, raw_len) })
    }

    fn ask(&self, items: Vec<Ask>) -> Result<Vec<Have>, Closed> {
        self.pass(|| self.standby.have(&items))
    }
}

fn raw(packed: Packed, raw_len: usize) -> Vec<u8> {
    match packed {
        Packed::Raw(bytes) => {
            assert_eq!(bytes.len(), raw_len);
            bytes
        }
        Packed::Zstd(bytes) => unpack(&bytes, raw_len).expect("what was packed"),
    }
}

//! The watch: hints from the kernel, through fanotify or, where privileges are missing, through `notify` (inotify).
//!
//! fanotify tells of everything on the filesystems of the roots by one mark each. With inotify each directory is watched
//! by itself, by the scan that reads it, *before* it is read: whatever changes after the reading is reported. Excluded
//! directories give no hints.
//!
//! It decides nothing: an event becomes a hint, an overflow becomes "everything".
//!
//! Invariants:
//! - a directory counts as covered only when the kernel took the watch;
//! - [`Watch::barrier`] returns only when every event queued before it was called has become a hint.

mod fanotify;
mod helper;
mod inotify;
mod process;
mod records;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use coldspare_core::exclude::{Exclude, IsDir};
use coldspare_core::path::CONTROL_DIR;
use coldspare_core::{RelPath, RootId};

pub use fanotify::Helper;
pub use helper::{Told, run as run_helper};
use inotify::{Inotify, NotWatched};
pub use process::Process;

use crate::dirty::{Dirty, Hint};
use crate::run::hash_of;

/// The folder, in a root's control folder, whose files mark a place in the stream of events.
pub const COOKIES: &str = "cookies";
/// LIMIT: paths of which it is remembered who changed them.
const PROCESSES_MAX: usize = 10_000;

/// How well the watch covers the roots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coverage {
    /// What is watched: directories by inotify, filesystems by fanotify.
    pub watched: u64,
    /// What should be and isn't: the kernel's limit was reached, or a filesystem can't be marked.
    pub unwatched: u64,
    /// How often events were lost since the start.
    pub overflows: u64,
}

impl Coverage {
    /// The share that is watched, 0 to 1.
    pub fn share(&self) -> f64 {
        let all = self.watched + self.unwatched;
        if all == 0 { 0.0 } else { self.watched as f64 / all as f64 }
    }
}

/// A root to watch.
#[derive(Debug, Clone)]
pub struct WatchedRoot {
    /// Where it is, absolute and resolved; without its control folder [`Watch::barrier`] fails, and nothing else.
    pub path: PathBuf,
    /// What of it gives no hints.
    pub exclude: Exclude,
}

impl From<PathBuf> for WatchedRoot {
    fn from(path: PathBuf) -> WatchedRoot {
        WatchedRoot { path, exclude: Exclude::new::<&str>([]).expect("no patterns") }
    }
}

/// What the kernel is asked through.
#[derive(Clone)]
pub enum Backend {
    /// One mark a filesystem, by a helper that has the privileges.
    Fanotify(Arc<Helper>),
    /// A watch a directory.
    Inotify,
}

/// The watch of all roots.
pub struct Watch {
    shared: Arc<Shared>,
    mark: AtomicU64,
    source: Source,
}

/// Where hints come from.
enum Source {
    Fanotify(Arc<Helper>),
    Inotify(Mutex<Option<Inotify>>),
    Caller { deliver: Box<dyn Fn() + Send + Sync> },
}

struct Shared {
    roots: Vec<WatchedRoot>,
    dirty: Mutex<Dirty>,
    /// Who changed what, where that is told.
    processes: Mutex<BTreeMap<(RootId, RelPath), Process>>,
    covered: Mutex<BTreeSet<Vec<u8>>>,
    /// Filesystems that are marked.
    marked: AtomicU64,
    unwatched: AtomicU64,
    /// The same, as far as the look at everything that goes on has met it.
    recounted: Mutex<HashSet<u64>>,
    is_recounting: AtomicBool,
    overflows: AtomicU64,
    /// Set when the kernel lost events, until the watch is built anew.
    stale: AtomicBool,
    /// Set when nobody tells anything any more, for good.
    is_gone: AtomicBool,
    /// By root, the highest mark that came back.
    marks: Mutex<Vec<u64>>,
    mark_came: Condvar,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// The watch can't be had.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// No watch at all.
    #[error("the kernel gives no watch: {0}")]
    Unavailable(String),
    /// The helper of fanotify is gone.
    #[error("the watch's helper ended; another one has to be started")]
    Gone,
    /// A root can't be watched.
    #[error("{path} can't be watched: {detail}")]
    Root {
        /// The path.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// The barrier's mark did not come back.
    #[error("the watch did not answer within {0:?}")]
    Timeout(Duration),
}

impl Watch {
    /// Starts a watch; by inotify it covers nothing yet but the marks of [`Watch::barrier`].
    ///
    /// `roots` are in the order of their numbers. `wake` is called, from another thread, whenever a hint came; it must not
    /// block.
    ///
    /// # Errors
    /// [`WatchError`].
    pub fn start(backend: Backend, roots: Vec<WatchedRoot>, wake: Box<dyn Fn() + Send + Sync>) -> Result<Watch, WatchError> {
        let source = match backend {
            Backend::Fanotify(helper) => Source::Fanotify(helper),
            Backend::Inotify => Source::Inotify(Mutex::default()),
        };
        let watch = Watch { shared: Arc::new(Shared::new(roots, 0, wake)), mark: AtomicU64::new(0), source };
        watch.rebuild()?;
        Ok(watch)
    }

    /// A watch whose hints are put in by the caller, through [`Watch::tell`]; the barrier has `deliver` put in those of
    /// every change so far.
    pub fn told(roots: Vec<PathBuf>, deliver: impl Fn() + Send + Sync + 'static) -> Watch {
        let roots = roots.into_iter().map(WatchedRoot::from).collect();
        let shared = Shared::new(roots, u64::MAX, Box::new(|| ()));
        Watch { shared: Arc::new(shared), mark: AtomicU64::new(0), source: Source::Caller { deliver: Box::new(deliver) } }
    }

    /// What the kernel is asked through, as `status` says it.
    pub fn backend(&self) -> &'static str {
        match self.source {
            Source::Fanotify(_) => "fanotify",
            Source::Inotify(_) => "inotify",
            Source::Caller { .. } => "caller",
        }
    }

    /// Drops all watches and begins anew; to be followed by a scan of everything.
    ///
    /// # Errors
    /// [`WatchError`].
    pub fn rebuild(&self) -> Result<(), WatchError> {
        let shared = &self.shared;
        if let Source::Inotify(slot) = &self.source {
            *lock(slot) = None;
        }
        lock(&shared.covered).clear();
        shared.unwatched.store(0, Ordering::Relaxed);
        shared.stale.store(false, Ordering::Relaxed);
        match &self.source {
            Source::Fanotify(helper) => {
                let begun = helper.begin(shared.clone())?;
                for (path, why) in &begun.unwatched {
                    tracing::warn!(path = %path.escape_ascii(), why, "a filesystem below a root is not watched");
                }
                shared.marked.store(begun.filesystems.into(), Ordering::Relaxed);
                shared.unwatched.store(begun.unwatched.len() as u64, Ordering::Relaxed);
            }
            Source::Inotify(slot) => *lock(slot) = Some(Inotify::start(shared.clone())?),
            Source::Caller { .. } => {}
        }
        Ok(())
    }

    /// Watches the directory `path` from now on; called before it is read. Does nothing when it is watched.
    ///
    /// When the kernel's limit is reached the directory counts as unwatched.
    pub fn cover(&self, root: RootId, path: &RelPath) {
        let full = || self.full(root, path).into_os_string().into_encoded_bytes();
        let slot = match &self.source {
            Source::Fanotify(_) => return,
            Source::Caller { .. } => {
                lock(&self.shared.covered).insert(full());
                return;
            }
            Source::Inotify(slot) => slot,
        };
        let key = full();
        if lock(&self.shared.covered).contains(&key) {
            return;
        }
        let mut slot = lock(slot);
        let Some(inotify) = slot.as_mut() else { return };
        // RACE: the event of the directory's removal may be taken between these two lines; its hint then says
        // `Replaced`, and the next look covers the directory anew or finds it gone. Worst case: one look more.
        lock(&self.shared.covered).insert(key.clone());
        if let Err(e) = inotify.watch(&self.full(root, path)) {
            lock(&self.shared.covered).remove(&key);
            if let NotWatched::Refused(why) = e {
                if self.shared.is_recounting.load(Ordering::Relaxed) {
                    lock(&self.shared.recounted).insert(hash_of(&key)); // it may be opened more than once
                } else {
                    self.shared.unwatched.fetch_add(1, Ordering::Relaxed);
                }
                tracing::debug!(path = %path, why, "directory not watched");
            }
        }
    }

    /// Begins a look at everything: what isn't watched is counted anew, and until [`Watch::recounted`] the old count holds.
    pub(crate) fn recount(&self) {
        lock(&self.shared.recounted).clear();
        self.shared.is_recounting.store(matches!(self.source, Source::Inotify(_)), Ordering::Relaxed);
    }

    /// Ends a look at everything; one that failed may have met less than there is.
    pub(crate) fn recounted(&self, is_whole: bool) {
        if self.shared.is_recounting.swap(false, Ordering::Relaxed) {
            let counted = std::mem::take(&mut *lock(&self.shared.recounted)).len() as u64;
            if is_whole {
                self.shared.unwatched.store(counted, Ordering::Relaxed);
            } else {
                self.shared.unwatched.fetch_max(counted, Ordering::Relaxed);
            }
        }
    }

    /// Waits until the events that reading itself causes have been taken from the kernel's queue.
    ///
    /// A scan calls this every some hundred directories; else its own reading could overflow the queue.
    pub fn catch_up(&self) {
        if let (Source::Inotify(slot), Some(root)) = (&self.source, self.shared.roots.first())
            && let Some(inotify) = lock(slot).as_mut()
        {
            inotify.catch_up(&root.path);
        }
    }

    /// Returns once every event queued before the call has become a hint.
    ///
    /// # Errors
    /// `Root` when a mark can't be written, `Timeout` when one does not come back within `limit`, `Gone` when none will.
    pub fn barrier(&self, limit: Duration) -> Result<(), WatchError> {
        if let Source::Caller { deliver } = &self.source {
            deliver();
            return Ok(());
        }
        let deadline = Instant::now() + limit;
        // Marks grow, and so do the events: a higher mark that came back proves the lower ones as well.
        let mark = self.mark.fetch_add(1, Ordering::Relaxed) + 1;
        for root in &self.shared.roots {
            let path = cookie_dir(&root.path).join(mark.to_string());
            let fail = |e: std::io::Error| WatchError::Root { path: path.clone(), detail: e.to_string() };
            std::fs::write(&path, b"").map_err(fail)?;
            std::fs::remove_file(&path).map_err(fail)?;
        }
        let mut marks = lock(&self.shared.marks);
        while marks.iter().any(|&came| came < mark) {
            if self.shared.is_gone.load(Ordering::Relaxed) {
                return Err(WatchError::Gone);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(WatchError::Timeout(limit));
            }
            marks = self.shared.mark_came.wait_timeout(marks, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Puts in that `path` changed, as the kernel would tell it: only when its directory is watched. Says whether it was.
    pub fn tell(&self, root: RootId, path: &RelPath, hint: Hint, now_ms: u64) -> bool {
        let dir = path.parent().unwrap_or_else(RelPath::root);
        if !lock(&self.shared.covered).contains(self.full(root, &dir).as_os_str().as_bytes()) {
            return false;
        }
        if hint == Hint::Replaced {
            self.shared.forget(&self.full(root, path));
        }
        self.dirty().add(root, dir, path.name(), hint, now_ms);
        true
    }

    /// The hints so far.
    pub fn dirty(&self) -> std::sync::MutexGuard<'_, Dirty> {
        lock(&self.shared.dirty)
    }

    /// Takes who changed what, the last one of each path, where the helper tells; nobody is remembered for longer than its
    /// hint, nor for what comes beyond a limit.
    pub fn take_processes(&self) -> BTreeMap<(RootId, RelPath), Process> {
        std::mem::take(&mut *lock(&self.shared.processes))
    }

    /// Whether events were lost since the watch was built: only building it anew helps.
    pub fn is_stale(&self) -> bool {
        self.shared.stale.load(Ordering::Relaxed)
    }

    /// How well the roots are covered now.
    pub fn coverage(&self) -> Coverage {
        Coverage {
            watched: match self.source {
                Source::Fanotify(_) => self.shared.marked.load(Ordering::Relaxed),
                Source::Inotify(_) | Source::Caller { .. } => lock(&self.shared.covered).len() as u64,
            },
            unwatched: self.shared.unwatched.load(Ordering::Relaxed),
            overflows: self.shared.overflows.load(Ordering::Relaxed),
        }
    }

    fn full(&self, root: RootId, path: &RelPath) -> PathBuf {
        let root = &self.shared.roots[usize::from(root.0)].path;
        if path.is_root() { root.clone() } else { root.join(std::ffi::OsStr::from_bytes(path.as_bytes())) }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Source::Fanotify(helper) = &self.source {
            helper.forget(&self.shared);
        }
    }
}

impl Shared {
    fn new(roots: Vec<WatchedRoot>, mark: u64, wake: Box<dyn Fn() + Send + Sync>) -> Shared {
        Shared {
            marks: Mutex::new(vec![mark; roots.len()]),
            roots,
            dirty: Mutex::default(),
            processes: Mutex::default(),
            covered: Mutex::default(),
            marked: AtomicU64::new(0),
            unwatched: AtomicU64::new(0),
            recounted: Mutex::default(),
            is_recounting: AtomicBool::new(false),
            overflows: AtomicU64::new(0),
            stale: AtomicBool::new(false),
            is_gone: AtomicBool::new(false),
            mark_came: Condvar::new(),
            wake,
        }
    }

    /// Makes a hint of a change of `name` in `dir`, or of `dir` itself when the name is empty; says whether it is one.
    fn take(&self, dir: &Path, name: &[u8], hint: Hint, by: Option<Process>) -> bool {
        let Some((number, root, below)) =
            self.roots.iter().enumerate().find_map(|(n, root)| Some((n, root, dir.strip_prefix(&root.path).ok()?)))
        else {
            return false;
        };
        let below = below.as_os_str().as_bytes();
        if below.is_empty() && name == CONTROL_DIR || below.split(|&b| b == b'/').next() == Some(CONTROL_DIR) {
            if let Some(mark) = std::str::from_utf8(name).ok().and_then(|name| name.parse::<u64>().ok()) {
                let came = &mut lock(&self.marks)[number];
                *came = mark.max(*came);
                self.mark_came.notify_all();
            }
            return false;
        }
        // A name that no path may have is found, and reported, by the scan of its directory.
        let Ok(dir_below) = RelPath::new(below) else { return false };
        if !name.is_empty() && dir_below.join(name).is_err() || root.exclude.covers(&dir_below, IsDir::Yes) {
            return false;
        }
        if hint == Hint::Replaced && !name.is_empty() {
            self.forget(&dir.join(std::ffi::OsStr::from_bytes(name)));
        }
        let root = RootId(u8::try_from(number).expect("roots are few"));
        if let Some(process) = by {
            let path = if name.is_empty() { dir_below.clone() } else { dir_below.join(name).unwrap_or_else(|_| dir_below.clone()) };
            let mut processes = lock(&self.processes);
            if processes.len() < PROCESSES_MAX {
                processes.insert((root, path), process);
            }
        }
        lock(&self.dirty).add(root, dir_below, name, hint, now_ms());
        true
    }

    /// The directory at `path`, if it was one, is not the one that was watched.
    fn forget(&self, path: &Path) {
        let start = path.as_os_str().as_bytes().to_vec();
        let mut covered = lock(&self.covered);
        if !covered.remove(&start) {
            return;
        }
        let (mut low, mut high) = (start.clone(), start);
        low.push(b'/');
        high.push(b'/' + 1);
        let below: Vec<_> = covered.range(low..high).cloned().collect();
        for dir in below {
            covered.remove(&dir);
        }
    }

    /// Who told of changes does so no more; whoever waits for it is told.
    fn gone(&self, why: &str) {
        self.lost(why);
        let _marks = lock(&self.marks); // nobody is between its look and its wait
        self.is_gone.store(true, Ordering::Relaxed);
        self.mark_came.notify_all();
    }

    fn lost(&self, why: &str) {
        tracing::warn!(why, "the watch lost events; everything will be looked at");
        self.overflows.fetch_add(1, Ordering::Relaxed);
        self.stale.store(true, Ordering::Relaxed);
        lock(&self.dirty).add_everything(now_ms());
        (self.wake)();
    }
}

/// Makes the folder for marks below a root's control folder.
///
/// # Errors
/// As `mkdir`.
pub fn make_cookie_dir(root: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(cookie_dir(root))
}

fn cookie_dir(root: &Path) -> PathBuf {
    root.join(std::ffi::OsStr::from_bytes(CONTROL_DIR)).join(COOKIES)
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

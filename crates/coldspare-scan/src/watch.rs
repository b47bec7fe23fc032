//! The watch: hints from the kernel, through `notify` (inotify).
//!
//! Each directory is watched by itself, by the scan that reads it, *before* it is read: whatever changes after the
//! reading is reported. Excluded directories are never watched.
//!
//! It decides nothing: an event becomes a hint, an overflow becomes "everything".
//!
//! Invariants:
//! - a directory counts as covered only when the kernel took the watch;
//! - [`Watch::barrier`] returns only when every event queued before it was called has become a hint.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use coldspare_core::path::CONTROL_DIR;
use coldspare_core::{RelPath, RootId};
use notify::event::{EventKind, ModifyKind};
use notify::{RecursiveMode, Watcher};

use crate::dirty::{Dirty, Hint};

/// The folder, in a root's control folder, whose files mark a place in the stream of events.
pub const COOKIES: &str = "cookies";

/// How well the watch covers the roots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coverage {
    /// Directories that are watched.
    pub watched: u64,
    /// Directories that should be and aren't: the kernel's limit was reached.
    pub unwatched: u64,
    /// How often the kernel's queue overflowed since the start.
    pub overflows: u64,
}

impl Coverage {
    /// The share of directories that is watched, 0 to 1.
    pub fn share(&self) -> f64 {
        let all = self.watched + self.unwatched;
        if all == 0 { 0.0 } else { self.watched as f64 / all as f64 }
    }
}

/// The watch of all roots.
pub struct Watch {
    shared: Arc<Shared>,
    watcher: Mutex<Option<notify::RecommendedWatcher>>,
    mark: AtomicU64,
    source: Source,
}

/// Where hints come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Kernel,
    Caller,
}

struct Shared {
    roots: Vec<PathBuf>,
    dirty: Mutex<Dirty>,
    covered: Mutex<BTreeSet<Vec<u8>>>,
    unwatched: AtomicU64,
    overflows: AtomicU64,
    /// Set when the kernel lost events, until the watch is built anew.
    stale: AtomicBool,
    /// By root, the highest mark that came back.
    marks: Mutex<Vec<u64>>,
    mark_came: Condvar,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// The watch can't be had.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// No watch at all.
    #[error("the kernel gives no watch (inotify): {0}; raise fs.inotify.max_user_instances, or set watch = \"scan\"")]
    Unavailable(String),
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
    /// Starts a watch that covers nothing yet but the marks of [`Watch::barrier`].
    ///
    /// `roots` are absolute and resolved, in the order of their numbers; each has its control folder. `wake` is called,
    /// from another thread, whenever a hint came; it must not block.
    ///
    /// # Errors
    /// [`WatchError`].
    pub fn start(roots: Vec<PathBuf>, wake: Box<dyn Fn() + Send + Sync>) -> Result<Watch, WatchError> {
        let shared = Arc::new(Shared {
            marks: Mutex::new(vec![0; roots.len()]),
            roots,
            dirty: Mutex::default(),
            covered: Mutex::default(),
            unwatched: AtomicU64::new(0),
            overflows: AtomicU64::new(0),
            stale: AtomicBool::new(false),
            mark_came: Condvar::new(),
            wake,
        });
        let watch = Watch { shared, watcher: Mutex::new(None), mark: AtomicU64::new(0), source: Source::Kernel };
        watch.rebuild()?;
        Ok(watch)
    }

    /// A watch whose hints are put in by the caller, through [`Watch::tell`], before the change that they tell of is seen
    /// by anybody else; the barrier has nothing to wait for.
    pub fn told(roots: Vec<PathBuf>) -> Watch {
        let shared = Shared {
            marks: Mutex::new(vec![u64::MAX; roots.len()]),
            roots,
            dirty: Mutex::default(),
            covered: Mutex::default(),
            unwatched: AtomicU64::new(0),
            overflows: AtomicU64::new(0),
            stale: AtomicBool::new(false),
            mark_came: Condvar::new(),
            wake: Box::new(|| ()),
        };
        Watch { shared: Arc::new(shared), watcher: Mutex::new(None), mark: AtomicU64::new(0), source: Source::Caller }
    }

    /// Drops all watches and begins anew; to be followed by a scan of everything.
    ///
    /// # Errors
    /// [`WatchError`].
    pub fn rebuild(&self) -> Result<(), WatchError> {
        let mut slot = lock(&self.watcher);
        *slot = None;
        lock(&self.shared.covered).clear();
        self.shared.unwatched.store(0, Ordering::Relaxed);
        self.shared.stale.store(false, Ordering::Relaxed);
        if self.source == Source::Caller {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        let mut watcher =
            notify::recommended_watcher(move |event| shared.take_event(event)).map_err(|e| WatchError::Unavailable(e.to_string()))?;
        for root in &self.shared.roots {
            let cookies = cookie_dir(root);
            watcher.watch(&cookies, RecursiveMode::NonRecursive).map_err(|e| WatchError::Root { path: cookies, detail: e.to_string() })?;
        }
        *slot = Some(watcher);
        Ok(())
    }

    /// Watches the directory `path` from now on; called before it is read. Does nothing when it is watched.
    ///
    /// When the kernel's limit is reached the directory counts as unwatched.
    pub fn cover(&self, root: RootId, path: &RelPath) {
        let full = self.full(root, path);
        let key = full.as_os_str().as_bytes().to_vec();
        if lock(&self.shared.covered).contains(&key) {
            return;
        }
        if self.source == Source::Caller {
            lock(&self.shared.covered).insert(key);
            return;
        }
        let mut slot = lock(&self.watcher);
        let Some(watcher) = slot.as_mut() else { return };
        // RACE: the event of the directory's removal may be taken between these two lines; its hint then says
        // `Replaced`, and the next look covers the directory anew or finds it gone. Worst case: one look more.
        lock(&self.shared.covered).insert(key.clone());
        if let Err(e) = watcher.watch(&full, RecursiveMode::NonRecursive) {
            lock(&self.shared.covered).remove(&key);
            if !matches!(e.kind, notify::ErrorKind::PathNotFound) {
                self.shared.unwatched.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(path = %path, error = %e, "directory not watched");
            }
        }
    }

    /// Waits until the events that reading itself causes have been taken from the kernel's queue.
    ///
    /// A scan calls this every some hundred directories; else its own reading could overflow the queue.
    pub fn catch_up(&self) {
        let mut slot = lock(&self.watcher);
        if let (Some(watcher), Some(root)) = (slot.as_mut(), self.shared.roots.first()) {
            // The watching thread answers a request only after it has read what is queued.
            let _ = watcher.watch(&cookie_dir(root), RecursiveMode::NonRecursive);
        }
    }

    /// Returns once every event queued before the call has become a hint.
    ///
    /// # Errors
    /// `Root` when a mark can't be written, `Timeout` when one does not come back within `limit`.
    pub fn barrier(&self, limit: Duration) -> Result<(), WatchError> {
        if self.source == Source::Caller {
            return Ok(());
        }
        let deadline = Instant::now() + limit;
        // Marks grow, and so do the events: a higher mark that came back proves the lower ones as well.
        let mark = self.mark.fetch_add(1, Ordering::Relaxed) + 1;
        for root in &self.shared.roots {
            let path = cookie_dir(root).join(mark.to_string());
            let fail = |e: std::io::Error| WatchError::Root { path: path.clone(), detail: e.to_string() };
            std::fs::write(&path, b"").map_err(fail)?;
            std::fs::remove_file(&path).map_err(fail)?;
        }
        let mut marks = lock(&self.shared.marks);
        while marks.iter().any(|&came| came < mark) {
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

    /// Whether events were lost since the watch was built: only building it anew helps.
    pub fn is_stale(&self) -> bool {
        self.shared.stale.load(Ordering::Relaxed)
    }

    /// How well the roots are covered now.
    pub fn coverage(&self) -> Coverage {
        Coverage {
            watched: lock(&self.shared.covered).len() as u64,
            unwatched: self.shared.unwatched.load(Ordering::Relaxed),
            overflows: self.shared.overflows.load(Ordering::Relaxed),
        }
    }

    fn full(&self, root: RootId, path: &RelPath) -> PathBuf {
        let root = &self.shared.roots[usize::from(root.0)];
        if path.is_root() { root.clone() } else { root.join(std::ffi::OsStr::from_bytes(path.as_bytes())) }
    }
}

impl Shared {
    fn take_event(&self, event: notify::Result<notify::Event>) {
        let event = match event {
            Ok(event) if event.need_rescan() => return self.lost("the kernel's queue overflowed"),
            Ok(event) => event,
            Err(e) => return self.lost(&e.to_string()),
        };
        let hint = match event.kind {
            EventKind::Access(_) => return,
            EventKind::Modify(ModifyKind::Name(_)) | EventKind::Create(_) | EventKind::Remove(_) => Hint::Replaced,
            _ => Hint::Changed,
        };
        let mut came = false;
        for path in &event.paths {
            came |= self.take_path(path, hint);
        }
        if came {
            (self.wake)();
        }
    }

    fn take_path(&self, path: &Path, hint: Hint) -> bool {
        let Some((number, below)) = self.roots.iter().enumerate().find_map(|(n, root)| Some((n, path.strip_prefix(root).ok()?))) else {
            return false;
        };
        let below = below.as_os_str().as_bytes();
        if below.split(|&b| b == b'/').next() == Some(CONTROL_DIR) {
            if let Some(mark) = path.file_name().and_then(|n| n.to_str()?.parse::<u64>().ok()) {
                let came = &mut lock(&self.marks)[number];
                *came = mark.max(*came);
                self.mark_came.notify_all();
            }
            return false;
        }
        // A name that no path may have is found, and reported, by the scan of its directory.
        let Ok(path_below) = RelPath::new(below) else { return false };
        if hint == Hint::Replaced {
            self.forget(path);
        }
        let root = RootId(u8::try_from(number).expect("roots are few"));
        let dir = path_below.parent().unwrap_or_else(RelPath::root);
        lock(&self.dirty).add(root, dir, path_below.name(), hint, now_ms());
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
mod tests {
    use super::*;
    use crate::dirty::Names;

    const LIMIT: Duration = Duration::from_secs(10);

    fn watched() -> (tempfile::TempDir, Watch) {
        let dir = tempfile::tempdir().unwrap();
        make_cookie_dir(dir.path()).unwrap();
        let watch = Watch::start(vec![dir.path().into()], Box::new(|| ())).unwrap();
        (dir, watch)
    }

    fn names(watch: &Watch, dir: &str) -> Vec<(String, Hint)> {
        let hints = watch.dirty().take();
        match hints.dirs.get(&(RootId(0), RelPath::new(dir.as_bytes()).unwrap())) {
            Some(Names::Some(set)) => set.iter().map(|(n, h)| (String::from_utf8(n.to_vec()).unwrap(), *h)).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn after_the_barrier_every_change_is_a_hint() {
        let (dir, watch) = watched();
        watch.cover(RootId(0), &RelPath::root());
        for round in 0..50 {
            let name = format!("f{round}");
            std::fs::write(dir.path().join(&name), b"x").unwrap();
            watch.barrier(LIMIT).unwrap();
            assert_eq!(names(&watch, ""), [(name, Hint::Replaced)]);
        }
        std::fs::write(dir.path().join("f1"), b"y").unwrap();
        watch.barrier(LIMIT).unwrap();
        assert_eq!(names(&watch, ""), [("f1".into(), Hint::Changed)]);
    }

    #[test]
    fn a_replaced_directory_is_covered_anew() {
        let (dir, watch) = watched();
        let d = RelPath::new(*b"d").unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        watch.cover(RootId(0), &RelPath::root());
        watch.cover(RootId(0), &d);
        assert_eq!(watch.coverage().watched, 2);
        std::fs::rename(dir.path().join("d"), dir.path().join("e")).unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        watch.barrier(LIMIT).unwrap();
        assert_eq!(names(&watch, ""), [("d".into(), Hint::Replaced), ("e".into(), Hint::Replaced)]);
        assert_eq!(watch.coverage().watched, 1);
        watch.cover(RootId(0), &d);
        std::fs::write(dir.path().join("d/x"), b"x").unwrap();
        watch.barrier(LIMIT).unwrap();
        assert_eq!(names(&watch, "d"), [("x".into(), Hint::Replaced)]);
    }

    #[test]
    fn own_marks_are_no_hints() {
        let (_dir, watch) = watched();
        watch.cover(RootId(0), &RelPath::root());
        watch.barrier(LIMIT).unwrap();
        watch.barrier(LIMIT).unwrap();
        assert!(watch.dirty().is_empty());
    }
}

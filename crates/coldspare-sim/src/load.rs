//! Work as users of an application make it: pushes, forks, collections by git and LFS uploads, at the rates asked for.
//!
//! - [`Pusher`] (`repository.rs`): one bare repository, and a clone with commits that are still to be pushed to it.
//! - `pace.rs`: when what is due; pure.
//! - [`Report`] (`report.rs`): what was done, and how long each took.
//!
//! All of it is done by the real git. Of a home it writes only what has the load's name: repositories `NAME-1`, `NAME-2`, …,
//! their forks `NAME-fork-1`, …, and the LFS store `NAME`. A name that is taken is an error, so nothing is written that it
//! didn't make. The same seed makes the same commits and the same LFS objects.

mod pace;
mod report;
mod repository;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::Chance;
pub use pace::Pace;
pub use report::{Kind, Report, percentile};
pub use repository::Pusher;

/// Where repositories are, below a home.
pub const REPOSITORIES: &str = "shared/data/repositories";
/// Where LFS stores are, below a home.
pub const LFS: &str = "shared/data/git-lfs/storage";

/// What is made.
#[derive(Debug, Clone)]
pub struct Shape {
    /// What all of it is named by, one component.
    pub name: String,
    /// Repositories that are pushed to.
    pub repositories: usize,
    /// Commits of a push; each changes one file.
    pub commits: usize,
    /// Bytes of that file.
    pub file_bytes: usize,
    /// Bytes of an LFS object, none of which compress.
    pub lfs_bytes: u64,
    /// Decides all content.
    pub seed: u64,
}

/// How often; 0 is never.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    /// Pushes a second, to the repositories in turn.
    pub pushes_per_second: f64,
    /// How many pushes may be under way at once.
    pub pushers: usize,
    /// Forks an hour; each borrows from one of the repositories and takes one push.
    pub forks_per_hour: f64,
    /// Collections an hour, of the repositories in turn: references packed, all objects in one pack.
    pub gcs_per_hour: f64,
    /// LFS uploads an hour.
    pub lfs_per_hour: f64,
}

/// A load, its repositories made.
#[derive(Debug)]
pub struct Load {
    home: PathBuf,
    shape: Shape,
    pushers: Vec<Mutex<Pusher>>,
    /// Numbers of forks and of LFS objects, over all runs.
    forks: AtomicU64,
    uploads: AtomicU64,
}

impl Shape {
    /// Twenty repositories, five commits of 160 bytes a push, 10 MB an LFS object, by seed 1.
    pub fn named(name: &str) -> Shape {
        Shape { name: name.into(), repositories: 20, commits: 5, file_bytes: 160, lfs_bytes: 10_000_000, seed: 1 }
    }
}

impl Load {
    /// Makes the repositories in `home`, which exists, and their clones in `work`, an empty folder outside of it.
    ///
    /// # Errors
    /// `AlreadyExists`: the home has something of this name. Others: git failed, or the disk.
    pub fn new(home: &Path, work: &Path, shape: Shape) -> io::Result<Load> {
        let one_component = Path::new(&shape.name).components().count() == 1 && !shape.name.contains(['/', '\0']) && shape.name != "..";
        if !one_component || shape.name == "." || shape.repositories == 0 || shape.commits == 0 {
            return Err(io::Error::other("a load has a name of one component, repositories and commits"));
        }
        if let Some(path) = anything_named(home, &shape.name)? {
            return Err(taken(&path));
        }
        let made = (1..=shape.repositories).map(|no| {
            let bare = home.join(REPOSITORIES).join(format!("{}-{no}", shape.name));
            Pusher::new(&work.join(format!("clone-{no}")), &bare, &shape, no as u64).map(Mutex::new)
        });
        let pushers = made.collect::<io::Result<Vec<_>>>()?;
        Ok(Load { home: home.into(), shape, pushers, forks: AtomicU64::new(0), uploads: AtomicU64::new(0) })
    }

    /// Works at these rates for `duration`, or until `stop`; may be called again.
    ///
    /// What is due and could not begin within `duration`, because what came before took too long, is missed, and counted as
    /// such. The first failure ends all of it.
    ///
    /// # Errors
    /// git failed, or the disk.
    pub fn run(&self, rates: &Rates, duration: Duration, stop: &AtomicBool) -> io::Result<Report> {
        let (start, failed) = (Instant::now(), AtomicBool::new(false));
        let span = Span { start, duration, stop, failed: &failed };
        let (push, fork, collect) = (|no| self.push(no), |no| self.fork(no), |no| self.collect(no));
        let upload = |_| self.upload();
        let lanes = [
            Lane::new("pushes", rates.pushes_per_second, &push),
            Lane::new("forks", rates.forks_per_hour / 3_600.0, &fork),
            Lane::new("gcs", rates.gcs_per_hour / 3_600.0, &collect),
            Lane::new("lfs", rates.lfs_per_hour / 3_600.0, &upload),
        ];
        let error = std::thread::scope(|scope| {
            let beside = (1..rates.pushers).map(|_| &lanes[0]);
            let threads: Vec<_> = lanes.iter().chain(beside).map(|lane| scope.spawn(move || lane.drive(&span))).collect();
            threads
                .into_iter()
                .fold(None, |error, thread| error.or(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).err()))
        });
        match error {
            Some(error) => Err(error),
            None => Ok(Report::new(start.elapsed(), lanes.map(|lane| lane.kind.into_inner().unwrap_or_else(PoisonError::into_inner)))),
        }
    }

    /// The reference of each repository that pushes go to, below the home, with the commit that it names.
    pub fn tips(&self) -> Vec<(PathBuf, String)> {
        let tip = |pusher: &Mutex<Pusher>| {
            let pusher = locked(pusher);
            let below = pusher.reference().strip_prefix(&self.home).unwrap_or(Path::new("")).to_path_buf();
            (below, pusher.tip().to_string())
        };
        self.pushers.iter().map(tip).collect()
    }

    /// The one whose turn it is.
    fn pusher(&self, no: u64) -> MutexGuard<'_, Pusher> {
        locked(&self.pushers[(no % self.pushers.len() as u64) as usize])
    }

    /// Bytes of content.
    fn push(&self, no: u64) -> io::Result<u64> {
        self.pusher(no).push()?;
        Ok(self.shape.push_bytes())
    }

    fn fork(&self, no: u64) -> io::Result<u64> {
        let name = format!("{}-fork-{}", self.shape.name, self.forks.fetch_add(1, Ordering::Relaxed) + 1);
        self.pusher(no).fork(&self.home.join(REPOSITORIES).join(name))?;
        Ok(self.shape.push_bytes())
    }

    /// Bytes of the packs that came of it. Pushes go on meanwhile.
    fn collect(&self, no: u64) -> io::Result<u64> {
        let bare = self.pusher(no).bare().to_path_buf();
        repository::collect(&bare)
    }

    /// Writes an LFS object as the application does: beside, then renamed to the path that its content tells.
    fn upload(&self) -> io::Result<u64> {
        let no = self.uploads.fetch_add(1, Ordering::Relaxed);
        let store = self.home.join(LFS).join(&self.shape.name);
        fs::create_dir_all(&store)?;
        let beside = store.join(format!("upload-{no}"));
        let (mut file, mut digest, mut left) = (File::create_new(&beside)?, Sha256::new(), self.shape.lfs_bytes);
        let mut chance = Chance::new(self.shape.seed ^ (no.wrapping_add(1) << 32));
        while left > 0 {
            let part = chance.bytes(left.min(1 << 20) as usize);
            digest.update(&part);
            file.write_all(&part)?;
            left -= part.len() as u64;
        }
        file.sync_all()?;
        let name: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        fs::create_dir_all(store.join(&name[..2]))?;
        fs::rename(beside, store.join(&name[..2]).join(&name[2..]))?;
        Ok(self.shape.lfs_bytes)
    }
}

impl Shape {
    fn push_bytes(&self) -> u64 {
        (self.commits * self.file_bytes) as u64
    }
}

/// How long a load goes on.
#[derive(Clone, Copy)]
struct Span<'a> {
    start: Instant,
    duration: Duration,
    stop: &'a AtomicBool,
    failed: &'a AtomicBool,
}

/// One kind of work, which any number of threads drive.
struct Lane<'a> {
    pace: Pace,
    next: AtomicU64,
    /// Does the work of a number; its bytes.
    work: &'a (dyn Fn(u64) -> io::Result<u64> + Sync),
    kind: Mutex<Kind>,
}

impl<'a> Lane<'a> {
    fn new(what: &'static str, per_second: f64, work: &'a (dyn Fn(u64) -> io::Result<u64> + Sync)) -> Lane<'a> {
        Lane { pace: Pace::new(per_second), next: AtomicU64::new(0), work, kind: Mutex::new(Kind::new(what, per_second)) }
    }

    /// Does what is due when it is, until the end.
    fn drive(&self, span: &Span<'_>) -> io::Result<()> {
        loop {
            let no = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(due) = self.pace.due(no).filter(|due| *due < span.duration) else { return Ok(()) };
            if !span.wait_until(due) {
                return Ok(());
            }
            let begun = span.start.elapsed();
            if begun >= span.duration {
                locked(&self.kind).miss();
                continue;
            }
            match (self.work)(no) {
                Ok(bytes) => locked(&self.kind).add(bytes, span.start.elapsed() - begun, begun.saturating_sub(due)),
                Err(error) => {
                    span.failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    }
}

impl Span<'_> {
    /// Whether the load still goes on by then.
    fn wait_until(&self, due: Duration) -> bool {
        loop {
            if self.stop.load(Ordering::Relaxed) || self.failed.load(Ordering::Relaxed) {
                return false;
            }
            let left = due.saturating_sub(self.start.elapsed());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(LOOK));
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something in the home that a load of this name would make.
fn anything_named(home: &Path, name: &str) -> io::Result<Option<PathBuf>> {
    let store = home.join(LFS).join(name);
    if store.exists() {
        return Ok(Some(store));
    }
    let entries = match fs::read_dir(home.join(REPOSITORIES)) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().strip_prefix(name).is_some_and(|rest| rest.starts_with('-')) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

fn taken(path: &Path) -> io::Error {
    let text = format!("{} is there already: remove what an earlier load made, or give this one another name", path.display());
    io::Error::new(io::ErrorKind::AlreadyExists, text)
}

/// How often a waiting thread looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(50);

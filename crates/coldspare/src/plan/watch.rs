//! What really is written in a home, as the kernel tells it for a while: rewrites each time, and what goes.
//!
//! It writes nothing there: without a control folder there is no barrier, so what is queued when the time is over is waited for
//! a moment.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use coldspare_core::exclude::{Exclude, IsDir};
use coldspare_core::git::looks_transient;
use coldspare_core::{RelPath, RootId};
use coldspare_scan::dirty::{Hint, Names};
use coldspare_scan::watch::{Backend, Told, Watch, WatchedRoot};
use serde::Serialize;

use super::limits::{self, INOTIFY_WATCHES};
use super::survey::{Amount, DAY, Kind, kind_of};
use crate::demo::host::{INTERRUPTED, failed};
use crate::exit::Failure;
use crate::watching::HelperProcess;

/// Between two looks at what the kernel told.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A file counts once nothing was told of it for so long: what is written in several calls is one change.
const SETTLE: Duration = Duration::from_millis(200);
/// One that is written without a pause counts this often.
const UNSETTLED_MAX: Duration = Duration::from_secs(60);
/// The clock that files are stamped by may be so much behind.
const STAMP_LATE_NS: i128 = 20_000_000;
/// LIMIT: files whose last state is remembered; of the others only their times tell whether they changed.
const KNOWN_MAX: usize = 1_000_000;
/// Folders between two waits for the events that reading them causes.
const FOLDERS_AT_ONCE: usize = 256;

/// What was seen.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Watched {
    pub(crate) seconds: f64,
    /// What the kernel was asked through.
    pub(crate) backend: &'static str,
    /// Changes of files, and the bytes of each that was written: all of the file, each time.
    pub(crate) written: Amount,
    /// How many of them were of a file that had been written since the beginning.
    pub(crate) rewritten: u64,
    /// Names that went.
    pub(crate) removed: u64,
    /// How often the kernel's queue overflowed: what it would have told is missing.
    pub(crate) overflows: u64,
    /// Folders that the kernel refused to watch.
    pub(crate) unwatched: u64,
    /// What was written, and what went, in each minute since the beginning.
    #[serde(skip)]
    minutes: Vec<Amount>,
}

impl Watched {
    /// A day at an even rate of what was seen, with its busiest minute, the latest first.
    pub(crate) fn day(&self) -> Vec<Amount> {
        let all = self.minutes.iter().fold(Amount::default(), |sum, m| Amount { files: sum.files + m.files, bytes: sum.bytes + m.bytes });
        let minutes_seen = (self.seconds / 60.0).max(f64::MIN_POSITIVE);
        // Rates of less than one a minute mustn't round to none.
        let until = |total: u64, minute: usize| (total as f64 / minutes_seen * minute as f64).round() as u64;
        let between = |total: u64, minute: usize| until(total, minute + 1) - until(total, minute);
        let even = |minute| Amount { files: between(all.files, minute), bytes: between(all.bytes, minute) };
        let mut day: Vec<Amount> = (0..DAY).map(even).collect();
        if let Some(busiest) = self.minutes.iter().max_by_key(|m| m.bytes).filter(|m| m.bytes > day[DAY / 2].bytes) {
            day[DAY / 2] = *busiest;
        }
        day
    }
}

/// Watches `roots`, which have so many `folders`, for `duration`.
///
/// # Errors
/// `Usage`: a root can't be watched, and why. `Differs`: interrupted.
pub(crate) fn watch(roots: &[PathBuf], exclude: &Exclude, folders: u64, duration: Duration) -> Result<Watched, Failure> {
    let mut resolved = Vec::new();
    for root in roots {
        let fail = |e: std::io::Error| Failure::usage(format!("{}: {e}", root.display()));
        if let Some(kind) = coldspare_os::network_filesystem(root).map_err(fail)? {
            return Err(Failure::usage(format!("{} is on {kind}: other hosts' changes cause no event; leave --watch out", root.display())));
        }
        resolved.push(root.canonicalize().map_err(fail)?);
    }
    let helper = HelperProcess::start(&resolved, Told::Changes).map_err(Failure::usage)?;
    let by_fanotify = Counter::start(Backend::Fanotify(helper.helper()), &resolved, exclude);
    let mut counter = match by_fanotify {
        Ok(counter) => counter,
        Err(why) => {
            refuse_too_many(folders, &why)?;
            Counter::start(Backend::Inotify, &resolved, exclude).map_err(|e| Failure::usage(format!("{why}; {e}")))?
        }
    };
    let _ = writeln!(std::io::stderr(), "watching by {} for {} s", counter.watch.backend(), duration.as_secs_f64());
    while counter.started.elapsed() < duration {
        if INTERRUPTED.load(Ordering::Relaxed) {
            return Err(failed("interrupted"));
        }
        std::thread::sleep(LOOK_EVERY.min(duration.saturating_sub(counter.started.elapsed())));
        counter.look();
    }
    Ok(counter.end())
}

/// A home that takes more watches than this user has would leave none to the application.
fn refuse_too_many(folders: u64, why: &str) -> Result<(), Failure> {
    match limits::present(INOTIFY_WATCHES) {
        Some(limit) if folders >= limit => Err(Failure::usage(format!(
            "{why}; inotify would take {folders} watches, and {INOTIFY_WATCHES} is {limit}: raise it, run `plan` as root, or leave \
             --watch out"
        ))),
        _ => Ok(()),
    }
}

/// Counts what the watch tells.
struct Counter {
    watch: Watch,
    roots: Vec<PathBuf>,
    exclude: Exclude,
    started: Instant,
    /// The same, as files are stamped.
    started_ns: i128,
    /// What was hinted and isn't counted yet.
    pending: BTreeMap<(RootId, RelPath), Pending>,
    known: HashMap<(RootId, RelPath), Stamp>,
    seen: Watched,
}

#[derive(Debug, Clone, Copy)]
struct Pending {
    hint: Hint,
    first: Instant,
    last: Instant,
}

/// What tells whether a file was written, and whether it was touched at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified_ns: i128,
    changed_ns: i128,
    /// As `modified_ns` where the filesystem doesn't tell.
    created_ns: i128,
}

impl Stamp {
    fn of(meta: &fs::Metadata) -> Stamp {
        let ns = |s: i64, ns: i64| i128::from(s) * 1_000_000_000 + i128::from(ns);
        let modified_ns = ns(meta.mtime(), meta.mtime_nsec());
        let created = meta.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Stamp {
            created_ns: created.map_or(modified_ns, |time| time.as_nanos().cast_signed()),
            inode: meta.ino(),
            size: meta.len(),
            modified_ns,
            changed_ns: ns(meta.ctime(), meta.ctime_nsec()),
        }
    }
}

impl Counter {
    fn start(backend: Backend, roots: &[PathBuf], exclude: &Exclude) -> Result<Counter, String> {
        let watched = roots.iter().map(|path| WatchedRoot { path: path.clone(), exclude: exclude.clone() }).collect();
        let watch = Watch::start(backend, watched, Box::new(|| ())).map_err(|e| e.to_string())?;
        let mut counter = Counter {
            watch,
            roots: roots.to_vec(),
            exclude: exclude.clone(),
            started: Instant::now(),
            started_ns: 0,
            pending: BTreeMap::new(),
            known: HashMap::new(),
            seen: Watched::default(),
        };
        counter.cover_all();
        // What came while folders were covered is of before.
        counter.watch.dirty().take();
        counter.started = Instant::now();
        counter.started_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i128) - STAMP_LATE_NS;
        Ok(counter)
    }

    fn cover_all(&mut self) {
        for root in 0..self.roots.len() {
            self.walk(RootId(root as u8), RelPath::root(), &mut |_| ());
        }
    }

    /// Watches all folders from `from` on, each before it is read; tells of every file.
    fn walk(&self, root: RootId, from: RelPath, file: &mut dyn FnMut(RelPath)) {
        let (mut folders, mut count) = (vec![from], 0);
        while let Some(folder) = folders.pop().filter(|_| !INTERRUPTED.load(Ordering::Relaxed)) {
            self.watch.cover(root, &folder);
            count += 1;
            if count % FOLDERS_AT_ONCE == 0 {
                self.watch.catch_up();
            }
            for entry in fs::read_dir(self.full(root, &folder)).into_iter().flatten().filter_map(Result::ok) {
                let Ok(path) = folder.join(entry.file_name().as_bytes()) else { continue };
                let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
                if self.is_left_out(&path, is_dir) {
                    continue;
                }
                if is_dir { folders.push(path) } else { file(path) }
            }
        }
    }

    fn full(&self, root: RootId, path: &RelPath) -> PathBuf {
        self.roots[usize::from(root.0)].join(OsStr::from_bytes(path.as_bytes()))
    }

    fn is_left_out(&self, path: &RelPath, is_dir: bool) -> bool {
        path.components().any(looks_transient) || self.exclude.covers(path, if is_dir { IsDir::Yes } else { IsDir::No })
    }

    /// Takes what was told since the last look, and counts what has settled.
    fn look(&mut self) {
        if self.watch.is_stale() {
            self.seen.overflows += 1;
            // Where it can't be had again the kernel tells no more; the overflow says that something is missing.
            let _ = self.watch.rebuild();
            self.cover_all();
        }
        let (hints, now) = (self.watch.dirty().take(), Instant::now());
        for ((root, dir), names) in hints.dirs {
            match names {
                Names::Some(names) => {
                    for (name, hint) in names {
                        self.note(root, dir.join(&name).ok(), hint, now);
                    }
                }
                Names::All => {
                    for entry in fs::read_dir(self.full(root, &dir)).into_iter().flatten().filter_map(Result::ok) {
                        self.note(root, dir.join(entry.file_name().as_bytes()).ok(), Hint::Changed, now);
                    }
                }
            }
        }
        let is_due = |p: &Pending| now.duration_since(p.last) >= SETTLE || now.duration_since(p.first) >= UNSETTLED_MAX;
        let due: Vec<_> = self.pending.extract_if(.., |_, p| is_due(p)).collect();
        for ((root, path), pending) in due {
            self.count(root, path, pending.hint);
        }
    }

    fn note(&mut self, root: RootId, path: Option<RelPath>, hint: Hint, now: Instant) {
        let Some(path) = path else { return };
        let noted = self.pending.entry((root, path)).or_insert(Pending { hint, first: now, last: now });
        (noted.hint, noted.last) = (noted.hint.max(hint), now);
    }

    /// Counts what became of one path.
    fn count(&mut self, root: RootId, path: RelPath, hint: Hint) {
        let meta = match fs::symlink_metadata(self.full(root, &path)) {
            Ok(meta) => meta,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && hint == Hint::Replaced && !self.is_left_out(&path, false) => {
                self.known.remove(&(root, path));
                self.seen.removed += 1;
                return self.minute().files += 1;
            }
            Err(_) => return,
        };
        if self.is_left_out(&path, meta.is_dir()) {
            return;
        }
        if !meta.is_dir() {
            return self.count_file(root, path, hint, Stamp::of(&meta));
        }
        if hint == Hint::Replaced {
            let mut files = Vec::new();
            self.walk(root, path, &mut |file| files.push(file));
            for file in files.into_iter().filter(|file| !self.pending.contains_key(&(root, file.clone()))).collect::<Vec<_>>() {
                self.count(root, file, hint);
            }
        }
    }

    fn count_file(&mut self, root: RootId, path: RelPath, hint: Hint, stamp: Stamp) {
        let key = (root, path);
        let known = self.known.get(&key).copied();
        let (is_touched, is_written) = match known {
            Some(known) => (known != stamp, Stamp { changed_ns: stamp.changed_ns, ..known } != stamp),
            None => {
                // One that comes from elsewhere keeps its own time.
                let written_ns = if hint == Hint::Replaced { stamp.changed_ns } else { stamp.modified_ns };
                (stamp.changed_ns >= self.started_ns, written_ns >= self.started_ns)
            }
        };
        if !is_touched {
            return;
        }
        // Git sets the time of a pack or an object anew when it would write what is in it, and writes none again.
        let is_written = is_written && (hint == Hint::Replaced || stamp.created_ns >= self.started_ns || kind_of(&key.1) == Kind::Other);
        if known.is_some() || self.known.len() < KNOWN_MAX {
            self.known.insert(key, stamp);
        }
        let bytes = if is_written { stamp.size } else { 0 };
        self.seen.rewritten += u64::from(is_written && known.is_some());
        self.seen.written.files += 1;
        self.seen.written.bytes += bytes;
        let minute = self.minute();
        minute.files += 1;
        minute.bytes += bytes;
    }

    fn minute(&mut self) -> &mut Amount {
        let now = (self.started.elapsed().as_secs() / 60) as usize;
        if self.seen.minutes.len() <= now {
            self.seen.minutes.resize(now + 1, Amount::default());
        }
        &mut self.seen.minutes[now]
    }

    /// Waits for what is still queued, and counts it.
    fn end(mut self) -> Watched {
        let until = Instant::now() + 3 * SETTLE;
        while Instant::now() < until {
            std::thread::sleep(LOOK_EVERY);
            self.look();
        }
        self.seen.seconds = self.started.elapsed().as_secs_f64();
        for ((root, path), pending) in std::mem::take(&mut self.pending) {
            self.count(root, path, pending.hint);
        }
        self.seen.backend = self.watch.backend();
        self.seen.unwatched = self.watch.coverage().unwatched;
        self.seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn counting(home: &std::path::Path) -> Counter {
        Counter::start(Backend::Inotify, &[home.canonicalize().unwrap()], &Exclude::new(["left-out/"]).unwrap()).unwrap()
    }

    /// Looks until all that was told was counted, and that is so much.
    fn check(counter: &mut Counter, what: &str, holds: impl Fn(&Watched) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !holds(&counter.seen) {
            assert!(Instant::now() < deadline, "{what}: {:?}", counter.seen);
            std::thread::sleep(LOOK_EVERY);
            counter.look();
        }
    }

    #[test]
    fn each_rewrite_counts_and_so_does_what_goes() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        fs::create_dir(at("left-out")).unwrap();
        fs::create_dir_all(at("objects/pack")).unwrap();
        fs::write(at("old"), [0; 5_000]).unwrap();
        fs::write(at("objects/pack/old.pack"), [0; 7_000]).unwrap();
        fs::File::open(at("old")).unwrap().set_modified(SystemTime::now() - Duration::from_secs(3_600)).unwrap();
        // Files count as new for a while behind their making.
        let made = fs::metadata(at("objects/pack/old.pack")).unwrap().created().unwrap();
        while made.elapsed().unwrap_or_default().as_nanos().cast_signed() < 2 * STAMP_LATE_NS {
            std::thread::yield_now();
        }
        let mut counter = counting(home.path());
        for round in 1..=3 {
            fs::write(at("file"), vec![round as u8; 1_000]).unwrap();
            check(&mut counter, "a rewrite", |seen| seen.written == Amount { files: round, bytes: round * 1_000 });
        }
        assert_eq!(counter.seen.rewritten, 2);
        // A new folder with what is in it; a temporary name and what is left out are nothing.
        fs::write(at("left-out/much"), [0; 9_000]).unwrap();
        fs::write(at("refs.lock"), [0; 9_000]).unwrap();
        fs::create_dir_all(at("new/below")).unwrap();
        fs::write(at("new/below/file"), [1; 70]).unwrap();
        check(&mut counter, "a file in a new folder", |seen| seen.written == Amount { files: 4, bytes: 3_070 });
        // A change of the mode writes nothing.
        let mut mode = fs::metadata(at("old")).unwrap().permissions();
        mode.set_readonly(true);
        fs::set_permissions(at("old"), mode).unwrap();
        check(&mut counter, "a mode", |seen| seen.written == Amount { files: 5, bytes: 3_070 });
        // So does git when it would write an object that is in a pack.
        fs::File::open(at("objects/pack/old.pack")).unwrap().set_modified(SystemTime::now()).unwrap();
        check(&mut counter, "a pack's time", |seen| seen.written == Amount { files: 6, bytes: 3_070 });
        fs::remove_file(at("old")).unwrap();
        check(&mut counter, "a removal", |seen| seen.removed == 1);
        let seen = counter.end();
        assert_eq!((seen.written, seen.removed, seen.overflows), (Amount { files: 6, bytes: 3_070 }, 1, 0));
        assert_eq!(seen.minutes.iter().map(|m| m.files).sum::<u64>(), 7, "what went is work, too");
    }

    #[test]
    fn a_day_is_even_but_for_its_busiest_minute() {
        let minutes =
            vec![Amount { files: 1, bytes: 100 }, Amount { files: 5, bytes: 9_000 }, Amount::default(), Amount { files: 0, bytes: 500 }];
        let day = Watched { seconds: 240.0, minutes, ..Watched::default() }.day();
        assert_eq!(day.len(), DAY);
        assert_eq!(day[DAY / 2], Amount { files: 5, bytes: 9_000 });
        assert!(day.iter().enumerate().all(|(n, m)| n == DAY / 2 || m.bytes == 2_400), "{day:?}");
        // One and a half files a minute.
        assert_eq!(day.iter().map(|m| m.files).sum::<u64>(), DAY as u64 * 3 / 2 + 5 - (day[0].files.max(day[1].files)));
        // Ten seconds with one byte each: no minute is busier than the others.
        let short = Watched { seconds: 10.0, minutes: vec![Amount { files: 1, bytes: 10 }], ..Watched::default() }.day();
        assert!(short.iter().all(|m| *m == Amount { files: 6, bytes: 60 }));
    }
}

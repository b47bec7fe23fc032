//! What a home consists of, and when it changed: one pass over its metadata, no content.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use coldspare_core::RelPath;
use coldspare_core::exclude::{Exclude, IsDir};
use serde::Serialize;

use super::cycles::{Cycles, PackAges};
use super::watch::Watched;
use crate::demo::host::{INTERRUPTED, failed};
use crate::exit::Failure;

/// Files of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Amount {
    pub(crate) files: u64,
    pub(crate) bytes: u64,
}

/// What a file is, as far as its cost depends on that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A pack of git's, with its index and what belongs to it.
    Pack,
    /// A loose object of git's.
    Loose,
    /// All else.
    Other,
}

/// What was found.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Survey {
    /// Files, folders and links.
    pub(crate) entries: u64,
    pub(crate) folders: u64,
    pub(crate) repositories: u64,
    /// Repositories that borrow objects of others.
    pub(crate) forks: u64,
    pub(crate) packs: Amount,
    pub(crate) loose: Amount,
    pub(crate) other: Amount,
    pub(crate) largest_file_bytes: u64,
    /// Repositories that were repacked of late.
    pub(crate) repacked: Cycles,
    /// What was written in each of the last 1,440 minutes, the latest first, as far as times of files tell; or of a day of what
    /// was watched.
    #[serde(skip)]
    pub(crate) minutes: Vec<Amount>,
    /// What was seen while the home was watched, as large as it is.
    pub(crate) watched: Option<Watched>,
    /// How long it took.
    pub(crate) seconds: f64,
    /// What could not be looked at.
    pub(crate) unreadable: u64,
    /// Some files of each kind, from all over the home.
    #[serde(skip)]
    pub(crate) samples: Samples,
}

/// Files that a rehearsal may take.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples {
    pub(crate) small: Vec<PathBuf>,
    pub(crate) large: Vec<PathBuf>,
    /// Repositories that borrow nothing, with the bytes of their packs, if they have several.
    pub(crate) repositories: Vec<(u64, PathBuf)>,
    small_seen: u64,
    large_seen: u64,
}

/// Minutes of a day.
pub(crate) const DAY: usize = 1_440;
/// From this size on a file's cost is that of its bytes.
pub(crate) const LARGE_BYTES: u64 = 256 << 10;
/// LIMIT: samples of small files that are kept.
const SMALL_MAX: usize = 4_000;
/// Packs have an index each, at least.
const SEVERAL_PACKS_FILES: u64 = 4;
/// LIMIT: samples of large files that are kept.
const LARGE_MAX: usize = 200;

impl Survey {
    /// All files.
    pub(crate) fn files(&self) -> Amount {
        let kinds = [self.packs, self.loose, self.other];
        Amount { files: kinds.iter().map(|k| k.files).sum(), bytes: kinds.iter().map(|k| k.bytes).sum() }
    }

    /// The same home, so many times as large.
    pub(crate) fn scaled(&self, factor: f64) -> Survey {
        let times = |n: u64| (n as f64 * factor).round() as u64;
        let amount = |a: Amount| Amount { files: times(a.files), bytes: times(a.bytes) };
        Survey {
            entries: times(self.entries),
            folders: times(self.folders),
            repositories: times(self.repositories),
            forks: times(self.forks),
            packs: amount(self.packs),
            loose: amount(self.loose),
            other: amount(self.other),
            repacked: self.repacked.scaled(factor),
            minutes: self.minutes.iter().copied().map(amount).collect(),
            ..self.clone()
        }
    }
}

/// Looks at all of `roots`; a file with several names counts once for each.
///
/// # Errors
/// `Usage`: a root can't be read. `Differs`: interrupted.
pub(crate) fn survey(roots: &[PathBuf], exclude: &Exclude) -> Result<Survey, Failure> {
    let started = Instant::now();
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX));
    let sum = Mutex::new(Survey { minutes: vec![Amount::default(); DAY], ..Survey::default() });
    for root in roots {
        fs::read_dir(root).map_err(|e| Failure::usage(format!("{}: {e}", root.display())))?;
        let walk = Walk { root, exclude, now_s, sum: &sum };
        rayon::scope(|scope| walk.folder(scope, RelPath::root()));
    }
    if INTERRUPTED.load(Ordering::Relaxed) {
        return Err(failed("interrupted"));
    }
    let mut survey = sum.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    survey.seconds = started.elapsed().as_secs_f64();
    Ok(survey)
}

#[derive(Clone, Copy)]
struct Walk<'a> {
    root: &'a Path,
    exclude: &'a Exclude,
    now_s: i64,
    sum: &'a Mutex<Survey>,
}

impl<'a> Walk<'a> {
    fn folder(self, scope: &rayon::Scope<'a>, path: RelPath) {
        if INTERRUPTED.load(Ordering::Relaxed) {
            return;
        }
        let at = self.root.join(OsStr::from_bytes(path.as_bytes()));
        let mut found = Vec::new();
        let mut unreadable = 0;
        match fs::read_dir(&at) {
            Ok(entries) => {
                for entry in entries {
                    let Some((name, meta)) = entry.ok().and_then(|e| Some((e.file_name(), e.metadata().ok()?))) else {
                        unreadable += 1;
                        continue;
                    };
                    found.push((name, meta));
                }
            }
            Err(_) => unreadable += 1,
        }
        let has = |name: &str, is_dir: bool| found.iter().any(|(n, meta)| n == name && meta.is_dir() == is_dir);
        let is_repository = has("HEAD", false) && has("objects", true) && has("refs", true);
        let is_fork = is_repository && at.join("objects/info/alternates").exists();
        let mut folders = Vec::new();
        let mut part = Survey { minutes: Vec::new(), unreadable, ..Survey::default() };
        (part.repositories, part.forks) = (u64::from(is_repository), u64::from(is_fork));
        // Git sets a pack's time anew whenever it would write an object that is in it; its index keeps its own.
        let indexes: HashMap<&OsStr, i64> = found.iter().filter_map(|(name, meta)| Some((stem_of(name, "idx")?, meta.mtime()))).collect();
        let written_s =
            |name: &OsStr, meta: &fs::Metadata| stem_of(name, "pack").and_then(|stem| indexes.get(stem).copied()).unwrap_or(meta.mtime());
        let (mut written, mut ages): (Vec<(usize, u64)>, _) = (Vec::new(), PackAges::default());
        for (name, meta) in &found {
            let Ok(child) = path.join(name.as_bytes()) else { continue };
            let is_dir = if meta.is_dir() { IsDir::Yes } else { IsDir::No };
            if self.exclude.matches(&child, is_dir) {
                continue;
            }
            part.entries += 1;
            if meta.is_dir() {
                part.folders += 1;
                folders.push(child);
            } else if meta.is_file() {
                let (kind, age_s) = (kind_of(&child), self.now_s.saturating_sub(written_s(name, meta)));
                let amount = match kind {
                    Kind::Pack => &mut part.packs,
                    Kind::Loose => &mut part.loose,
                    Kind::Other => &mut part.other,
                };
                amount.files += 1;
                amount.bytes += meta.len();
                part.largest_file_bytes = part.largest_file_bytes.max(meta.len());
                let minutes_ago = usize::try_from(age_s / 60).unwrap_or(DAY);
                if minutes_ago < DAY && age_s >= 0 {
                    written.push((minutes_ago, meta.len()));
                }
                if kind == Kind::Pack {
                    ages.add(age_s, meta.len());
                }
                part.samples.add(at.join(name), meta.len());
            }
        }
        if path.as_bytes().ends_with(b"/objects/pack") && part.packs.files >= SEVERAL_PACKS_FILES {
            let repository = at.parent().and_then(Path::parent).filter(|at| !at.join("objects/info/alternates").exists());
            part.samples.repositories.extend(repository.map(|at| (part.packs.bytes, at.into())));
        }
        part.repacked = ages.cycles();
        self.add(part, &written);
        for folder in folders {
            scope.spawn(move |scope| self.folder(scope, folder));
        }
    }

    fn add(self, part: Survey, written: &[(usize, u64)]) {
        let mut sum = self.sum.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        sum.entries += part.entries;
        sum.folders += part.folders;
        sum.repositories += part.repositories;
        sum.forks += part.forks;
        sum.unreadable += part.unreadable;
        sum.repacked = sum.repacked.and(part.repacked);
        sum.largest_file_bytes = sum.largest_file_bytes.max(part.largest_file_bytes);
        let sum = &mut *sum;
        for (to, from) in [(&mut sum.packs, part.packs), (&mut sum.loose, part.loose), (&mut sum.other, part.other)] {
            to.files += from.files;
            to.bytes += from.bytes;
        }
        for (minute, bytes) in written {
            sum.minutes[*minute].files += 1;
            sum.minutes[*minute].bytes += bytes;
        }
        sum.samples.repositories.extend(part.samples.repositories);
        if sum.samples.repositories.len() > LARGE_MAX {
            sum.samples.repositories.sort_unstable_by(|a, b| b.cmp(a));
            sum.samples.repositories.truncate(LARGE_MAX / 2);
        }
        for path in part.samples.small {
            Samples::keep(&mut sum.samples.small, &mut sum.samples.small_seen, SMALL_MAX, path);
        }
        for path in part.samples.large {
            Samples::keep(&mut sum.samples.large, &mut sum.samples.large_seen, LARGE_MAX, path);
        }
    }
}

impl Samples {
    fn add(&mut self, path: PathBuf, bytes: u64) {
        if bytes < LARGE_BYTES { &mut self.small } else { &mut self.large }.push(path);
    }

    /// Keeps an even share of all that is seen: each new one takes the place of another as often as it has to.
    fn keep(kept: &mut Vec<PathBuf>, seen: &mut u64, limit: usize, path: PathBuf) {
        *seen += 1;
        if kept.len() < limit {
            return kept.push(path);
        }
        // A multiplicative hash of the number is chance enough.
        let at = (*seen).wrapping_mul(0x9E37_79B9_7F4A_7C15) % *seen;
        if let Some(place) = usize::try_from(at).ok().and_then(|at| kept.get_mut(at)) {
            *place = path;
        }
    }
}

/// A name without its ending, if it has that one.
fn stem_of<'a>(name: &'a OsStr, ending: &str) -> Option<&'a OsStr> {
    let path = Path::new(name);
    path.file_stem().filter(|_| path.extension().is_some_and(|found| found == ending))
}

/// What a path is by its shape.
pub(crate) fn kind_of(path: &RelPath) -> Kind {
    let parts: Vec<&[u8]> = path.components().collect();
    let is_hex = |part: &[u8], len: &[usize]| len.contains(&part.len()) && part.iter().all(u8::is_ascii_hexdigit);
    match parts.as_slice() {
        [.., b"objects", b"pack", _] => Kind::Pack,
        [.., b"objects", folder, name] if is_hex(folder, &[2]) && is_hex(name, &[38, 62]) => Kind::Loose,
        _ => Kind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::cycles::Repacked;

    #[test]
    fn a_home_is_counted_by_kind_without_what_is_left_out() {
        let home = tempfile::tempdir().unwrap();
        let write = |path: &str, bytes: usize| {
            let path = home.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, vec![0; bytes]).unwrap();
        };
        write("r/HEAD", 20);
        fs::create_dir_all(home.path().join("r/refs")).unwrap();
        write("r/objects/pack/pack-1.pack", 1_000);
        write(&format!("r/objects/ab/{}", "0".repeat(38)), 100);
        write("r/objects/info/alternates", 10);
        write("tmp/left-out", 5_000);
        let found = survey(&[home.path().into()], &Exclude::new(coldspare_core::exclude::BITBUCKET).unwrap()).unwrap();
        assert_eq!((found.packs, found.loose), (Amount { files: 1, bytes: 1_000 }, Amount { files: 1, bytes: 100 }));
        assert_eq!(found.other, Amount { files: 2, bytes: 30 });
        assert_eq!((found.repositories, found.forks, found.folders, found.entries), (1, 1, 6, 10));
        assert_eq!(found.minutes.iter().map(|m| m.files).sum::<u64>(), 4);
        assert_eq!(found.scaled(2.0).files(), Amount { files: 8, bytes: 2_260 });
        // Its one pack was written just now.
        assert_eq!(found.repacked.last_day, Repacked { repositories: 1, bytes: 1_000 });
        assert_eq!(found.scaled(2.0).repacked.last_seven_days, Repacked { repositories: 2, bytes: 2_000 });
    }

    #[test]
    fn a_pack_is_as_old_as_its_index() {
        let home = tempfile::tempdir().unwrap();
        let packs = home.path().join("r/objects/pack");
        fs::create_dir_all(&packs).unwrap();
        let old = SystemTime::now() - std::time::Duration::from_secs(30 * 86_400);
        for (name, bytes) in [("pack-1.pack", 9_000), ("pack-1.idx", 90)] {
            fs::write(packs.join(name), vec![0; bytes]).unwrap();
        }
        // As git leaves it when it would write an object that is in the pack; the pack's time is now.
        fs::File::options().write(true).open(packs.join("pack-1.idx")).unwrap().set_modified(old).unwrap();
        // A time that can't be.
        let odd = fs::File::create(home.path().join("odd")).unwrap();
        let _ = odd.set_modified(UNIX_EPOCH - std::time::Duration::from_secs(1 << 40));
        let found = survey(&[home.path().into()], &Exclude::new(coldspare_core::exclude::BITBUCKET).unwrap()).unwrap();
        assert_eq!((found.packs.bytes, found.repacked), (9_090, Cycles::default()));
        assert!(found.minutes.iter().all(|minute| minute.bytes == 0), "a pack counts as written");
    }
}

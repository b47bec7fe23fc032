//! Verify: compares the tree on disk with the manifest.
//!
//! It runs while changesets are applied: what differs is looked at a second time, between two changesets, before it is
//! reported, so that a changing home gives no false alarm (G7).

mod git;
mod pace;
mod places;
mod repair;
mod resumed;
mod scrub;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use coldspare_core::control::Applied;
use coldspare_core::git as git_layout;
use coldspare_core::{Body, Problem, ProblemKind, RelPath, RootId, key};
use coldspare_os::{Disk, FileKind, Stat};

use crate::error::StandbyError;
use crate::row::ManifestRow;
use crate::stage::digest_file_at;
use crate::standby::{Standby, lock};
use crate::store::{MANIFEST, View};

pub use git::{Git, GitFindings};
pub use pace::Pace;
pub use places::{Extent, Place};
pub use repair::Repair;
pub use resumed::Bookmark;
pub use scrub::Step;

/// How closely to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Metadata of every entry.
    Quick,
    /// Extended attributes and every byte too.
    Deep,
}

/// The answer in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The tree is what the manifest says.
    Consistent,
    /// It isn't.
    Differs,
    /// There is no changeset yet.
    Empty,
}

impl Verdict {
    fn of(applied: Option<Applied>, problems: &[Problem]) -> Verdict {
        match applied {
            None => Verdict::Empty,
            Some(_) if problems.is_empty() => Verdict::Consistent,
            Some(_) => Verdict::Differs,
        }
    }

    /// The word in messages and JSON.
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Consistent => "consistent",
            Verdict::Differs => "differs",
            Verdict::Empty => "empty",
        }
    }
}

/// What a verification found.
#[derive(Debug, Clone)]
pub struct Verification {
    /// In one word.
    pub verdict: Verdict,
    /// The changeset that the tree is.
    pub applied: Option<Applied>,
    /// Entries that were compared.
    pub entries: u64,
    /// Files that were compared.
    pub files: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// What differs, by path.
    pub problems: Vec<Problem>,
}

/// How far a verification is, which is read by whoever shows it; and how fast it may go.
#[derive(Debug, Default)]
pub struct Progress {
    /// How fast it may read.
    pub pace: Pace,
    /// Entries in the manifest.
    pub entries_total: AtomicU64,
    /// Entries that were compared.
    pub entries: AtomicU64,
    /// Files that were compared.
    pub files: AtomicU64,
    /// Bytes that were read.
    pub bytes: AtomicU64,
}

impl Progress {
    /// Another look begins.
    pub(crate) fn begin(&self, entries: u64) {
        self.entries_total.store(entries, Ordering::Relaxed);
        for count in [&self.entries, &self.files, &self.bytes] {
            count.store(0, Ordering::Relaxed);
        }
    }
}

/// Files from this size on are a task of their own.
const TASK_BYTES: u64 = 256 << 10;

struct Check<'a, D: Disk> {
    standby: &'a Standby<D>,
    manifest: View,
    depth: Depth,
    /// Up to where content was read by an earlier run; what changed since is read though this is a quick look.
    again: Option<Bookmark>,
    progress: &'a Progress,
    suspects: Mutex<Vec<(RootId, RelPath)>>,
    failure: Mutex<Option<StandbyError>>,
}

impl<D: Disk> Standby<D> {
    /// Compares the whole tree with the manifest, in parallel.
    ///
    /// Cost: one `getdents` pass and one `statx` an entry; `Deep` reads every byte.
    ///
    /// # Errors
    /// `Store`, `Damaged`: the manifest itself can't be read.
    pub fn verify(&self, depth: Depth, progress: &Progress) -> Result<Verification, StandbyError> {
        let check = Check {
            standby: self,
            manifest: self.store.view(MANIFEST)?,
            depth,
            again: None,
            progress,
            suspects: Mutex::default(),
            failure: Mutex::default(),
        };
        progress.begin(check.manifest.len()?);
        check.everything();
        if let Some(failure) = lock(&check.failure).take() {
            return Err(failure);
        }
        let mut suspects = std::mem::take(&mut *lock(&check.suspects));
        suspects.sort();
        suspects.dedup();
        let (problems, applied) = self.examine_suspects(depth, suspects)?;
        let verdict = Verdict::of(applied, &problems);
        let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let (entries, files, bytes) = (count(&progress.entries), count(&progress.files), count(&progress.bytes));
        Ok(Verification { verdict, applied, entries, files, bytes, problems })
    }

    /// Looks at each suspect again while no changeset is being applied.
    fn examine_suspects(&self, depth: Depth, suspects: Vec<(RootId, RelPath)>) -> Result<(Vec<Problem>, Option<Applied>), StandbyError> {
        let _between_changesets = self.tree_lock.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut problems = self.judge_suspects(depth, suspects)?;
        // What a quick look can't see is known from before.
        for (root, path) in self.wanted()? {
            if !problems.iter().any(|p: &Problem| p.root == root && p.path == path) {
                let detail = "it was found damaged and has not come again from the active yet".into();
                problems.push(Problem { root, path, kind: ProblemKind::Content, detail });
            }
        }
        if self.store.is_distrusted()? {
            let detail = "rows of the manifest were damaged, or it was made of what the tree held; the active has not named everything since, so that nobody \
                 knows what is missing";
            problems.insert(0, Problem { root: RootId(0), path: RelPath::root(), kind: ProblemKind::Store, detail: detail.into() });
        }
        // Read under the lock: the problems are those of this very changeset.
        Ok((problems, self.applied()))
    }

    /// What of the suspects differs; the lock of the tree is held.
    fn judge_suspects(&self, depth: Depth, suspects: Vec<(RootId, RelPath)>) -> Result<Vec<Problem>, StandbyError> {
        let manifest = self.store.view(MANIFEST)?;
        let mut problems = Vec::new();
        for (root, path) in suspects {
            let row = manifest.manifest(root, &path)?;
            let found = self.disk.open_dir(&self.root(root).dir, path.parent_bytes());
            let stat = match (path.is_root(), found) {
                (true, _) => self.disk.stat_dir(&self.root(root).dir).ok(),
                (false, Ok(dir)) => self.disk.stat(&dir, path.name()).ok(),
                (false, Err(_)) => None,
            };
            let problem = match (row, stat) {
                (None, None) => None,
                (None, Some(stat)) if self.is_excluded(root, &path, stat.kind) => None,
                (None, Some(_)) => Some(extra(&path)),
                (Some(_), None) => Some((ProblemKind::Missing, "not on disk".to_string())),
                (Some(row), Some(stat)) => {
                    let quick = self.compare_metadata(root, &path, &row, &stat);
                    quick.or_else(|| {
                        (depth == Depth::Deep).then(|| self.compare_content(root, &path, &row, &Pace::default()).err()).flatten()
                    })
                }
            };
            if let Some((kind, detail)) = problem {
                problems.push(Problem { root, path, kind, detail });
            }
        }
        Ok(problems)
    }

    /// What differs between a row and what `stat` says; `None` when nothing does.
    pub(crate) fn compare_metadata(&self, root: RootId, path: &RelPath, row: &ManifestRow, stat: &Stat) -> Option<(ProblemKind, String)> {
        let differs = |kind, expected: String, found: String| Some((kind, format!("expected {expected}, found {found}")));
        let meta = &row.entry.meta;
        let expected_kind = match row.entry.body {
            Body::Dir => FileKind::Dir,
            Body::Symlink { .. } => FileKind::Symlink,
            Body::File { .. } | Body::Hardlink { .. } => FileKind::File,
        };
        if stat.kind != expected_kind {
            return differs(ProblemKind::Kind, format!("{expected_kind:?}"), format!("{:?}", stat.kind));
        }
        if let Body::File { size, .. } = row.entry.body
            && size != stat.size
        {
            return differs(ProblemKind::Content, format!("{size} bytes"), format!("{} bytes", stat.size));
        }
        if let Body::Symlink { target } = &row.entry.body {
            let dir = self.disk.open_dir(&self.root(root).dir, path.parent_bytes());
            let found = dir.and_then(|dir| self.disk.read_link(&dir, path.name())).unwrap_or_default();
            if found != *target {
                let text = coldspare_core::path::escape;
                return differs(ProblemKind::Target, text(target), text(&found));
            }
        }
        if let Body::Hardlink { to } = &row.entry.body {
            let dir = self.disk.open_dir(&self.root(root).dir, to.parent_bytes());
            let target = dir.and_then(|dir| self.disk.stat(&dir, to.name())).ok();
            if target.is_none_or(|t| (t.dev, t.ino) != (stat.dev, stat.ino)) {
                return Some((ProblemKind::Hardlink, format!("is no longer the same file as {to}")));
            }
        }
        if stat.kind != FileKind::Symlink && stat.mode != meta.mode {
            return differs(ProblemKind::Mode, format!("{:04o}", meta.mode), format!("{:04o}", stat.mode));
        }
        if (stat.uid, stat.gid) != (meta.uid, meta.gid) {
            return differs(ProblemKind::Owner, format!("{}:{}", meta.uid, meta.gid), format!("{}:{}", stat.uid, stat.gid));
        }
        if stat.mtime != (meta.mtime.secs, meta.mtime.nanos) {
            let (secs, nanos) = stat.mtime;
            return differs(ProblemKind::Time, format!("{}.{:09}", meta.mtime.secs, meta.mtime.nanos), format!("{secs}.{nanos:09}"));
        }
        if row.ino != 0 && row.ino != stat.ino && row.entry.digest().is_some() {
            return Some((ProblemKind::Content, "was replaced by another file of the same size and time".into()));
        }
        None
    }

    /// Reads an entry and compares attributes and content.
    pub(crate) fn compare_content(
        &self,
        root: RootId,
        path: &RelPath,
        row: &ManifestRow,
        pace: &Pace,
    ) -> Result<u64, (ProblemKind, String)> {
        let unreadable = |e: std::io::Error| (ProblemKind::Unreadable, e.to_string());
        let disk = &self.disk;
        if matches!(row.entry.body, Body::Symlink { .. }) {
            return Ok(0);
        }
        let xattrs = if path.is_root() {
            disk.xattrs(&self.root(root).dir, b"")
        } else {
            let dir = disk.open_dir(&self.root(root).dir, path.parent_bytes()).map_err(unreadable)?;
            disk.xattrs(&dir, path.name())
        };
        let found = xattrs.map_err(unreadable)?;
        let carried = found.iter().filter(|(name, _)| coldspare_core::entry::xattr_is_carried(name));
        if !carried.map(|(n, v)| (n.as_slice(), v.as_slice())).eq(crate::stage::xattrs(&row.entry)) {
            return Err((ProblemKind::Attributes, "extended attributes or ACLs differ".into()));
        }
        let Some(digest) = row.entry.digest() else { return Ok(0) };
        let dir = disk.open_dir(&self.root(root).dir, path.parent_bytes()).map_err(unreadable)?;
        let file = disk.open_file(&dir, path.name()).map_err(unreadable)?;
        let (found, bytes) = digest_file_at(disk, &file, |bytes| pace.read(bytes)).map_err(unreadable)?;
        if found != digest {
            return Err((ProblemKind::Content, format!("expected BLAKE3 {digest}, found {found}")));
        }
        Ok(bytes)
    }
}

/// What to say of something that no changeset put there.
fn extra(path: &RelPath) -> (ProblemKind, String) {
    let insides = || git_layout::possible_repositories(path).into_iter().filter_map(|base| path.below(&base)).filter(|i| !i.is_empty());
    if insides().any(git_layout::never_carried) && git_layout::looks_transient(path.name()) {
        return (
            ProblemKind::Leftover,
            "a lock or a temporary file of git's, which no changeset put there: the next push would fail".into(),
        );
    }
    let is_reference = git_layout::part(path) == git_layout::Part::LooseRef;
    let more = if is_reference { "; git takes it before packed-refs" } else { "" };
    (ProblemKind::Extra, format!("on disk, but no changeset put it there{more}"))
}

impl<'a, D: Disk> Check<'a, D> {
    fn everything(&self) {
        rayon::scope(|scope| {
            for number in 0..self.standby.root_count() {
                scope.spawn(move |scope| match self.manifest.manifest(RootId(number), &RelPath::root()) {
                    Ok(row) => self.folder(scope, RootId(number), RelPath::root(), row),
                    Err(e) => self.fail(e),
                });
            }
        });
    }

    /// Compares a folder, of which the manifest has `row`, with all below it.
    fn folder<'s>(&'s self, scope: &rayon::Scope<'s>, root: RootId, path: RelPath, row: Option<ManifestRow>) {
        let dir = self.standby.disk.open_dir(&self.standby.root(root).dir, path.as_bytes());
        match dir.and_then(|dir| self.standby.disk.stat_dir(&dir)) {
            Ok(stat) => row.map_or((), |row| self.compare(scope, root, path.clone(), row, &stat)),
            Err(_) => self.suspect(root, path.clone()),
        }
        self.inside(scope, root, path);
    }

    fn inside<'s>(&'s self, scope: &rayon::Scope<'s>, root: RootId, path: RelPath) {
        if let Err(e) = self.look(scope, root, &path) {
            self.fail(e);
        }
    }

    fn fail(&self, e: StandbyError) {
        lock(&self.failure).get_or_insert(e);
    }

    /// Compares what is in a folder.
    fn look<'s>(&'s self, scope: &rayon::Scope<'s>, root: RootId, path: &RelPath) -> Result<(), StandbyError> {
        let standby = self.standby;
        let known = self.manifest.children::<ManifestRow>(root, path)?;
        let dir = standby.disk.open_dir(&standby.root(root).dir, path.as_bytes());
        let Ok(mut found) = dir.and_then(|dir| standby.disk.list_stat(&dir)) else {
            self.suspect(root, path.clone());
            return Ok(());
        };
        found.sort_by(|a, b| a.0.cmp(&b.0));
        let mut known = known.into_iter().peekable();
        for (name, stat) in found {
            while let Some((missing, _)) = known.next_if(|(k, _)| *k < name) {
                self.suspect_name(root, path, &missing);
            }
            let row = known.next_if(|(k, _)| *k == name).map(|(_, row)| row);
            let Ok(child) = path.join(&name) else {
                continue; // coldspare's own folder; other names that can't be paths are held back by the active
            };
            match row {
                None => {
                    if !standby.is_excluded(root, &child, stat.kind) {
                        self.suspect(root, child);
                    }
                }
                Some(row) => {
                    if row.entry.is_dir() && stat.kind == FileKind::Dir {
                        let child = child.clone();
                        scope.spawn(move |scope| self.inside(scope, root, child));
                    }
                    self.compare(scope, root, child, row, &stat);
                }
            }
        }
        for (missing, _) in known {
            self.suspect_name(root, path, &missing);
        }
        Ok(())
    }

    fn compare<'s>(&'s self, scope: &rayon::Scope<'s>, root: RootId, path: RelPath, row: ManifestRow, stat: &Stat) {
        self.progress.entries.fetch_add(1, Ordering::Relaxed);
        if stat.kind == FileKind::File {
            self.progress.files.fetch_add(1, Ordering::Relaxed);
        }
        if self.standby.compare_metadata(root, &path, &row, stat).is_some() {
            self.suspect(root, path);
        } else if self.depth == Depth::Deep
            || self.again.as_ref().is_some_and(|mark| mark.is_to_be_read_again(&key::encode(root, &path), stat.ctime))
        {
            if row.entry.size() >= TASK_BYTES {
                scope.spawn(move |_| self.compare_content(root, path, &row));
            } else {
                self.compare_content(root, path, &row);
            }
        }
    }

    fn compare_content(&self, root: RootId, path: RelPath, row: &ManifestRow) {
        match self.standby.compare_content(root, &path, row, &self.progress.pace) {
            Ok(bytes) => drop(self.progress.bytes.fetch_add(bytes, Ordering::Relaxed)),
            Err(_) => self.suspect(root, path),
        }
    }

    fn suspect_name(&self, root: RootId, dir: &RelPath, name: &[u8]) {
        if let Ok(path) = dir.join(name) {
            self.suspect(root, path);
        }
    }

    fn suspect(&self, root: RootId, path: RelPath) {
        lock(&self.suspects).push((root, path));
    }
}

//! A new session may bring less than the standby has: an active that went down hard lost what it had not synced (R1).
//!
//! The tree follows the active; what it had beyond goes to `quarantine/<time>-<session>/`, with a list, for a person to
//! look at (G5). Nothing is copied: names are moved, and replaced files get a second name there first.
//!
//! Invariants: the list is durable before the commit; what would vanish has its name in the quarantine before it loses
//! the one in the tree; every step may be taken again.

use std::collections::BTreeSet;
use std::io::ErrorKind;

use coldspare_core::control::Applied;
use coldspare_core::{Body, Entry, RelPath, RootId, path::escape, seeded_bug};
use coldspare_os::Disk;
use serde_json::json;

use crate::error::{StandbyError, io};
use crate::purge::QUARANTINE;
use crate::row::{Action, ManifestRow, PendingRow};
use crate::standby::{Changeset, Standby};
use crate::store::{PENDING, UNSETTLED};

/// The list, in the quarantine of a session.
pub(crate) const LIST: &[u8] = b"LIST";
/// What was in the tree, below its own folders.
pub(crate) const TREE: &[u8] = b"tree";
/// Bytes of the list that are gathered before they are written.
const LIST_WINDOW_BYTES: usize = 256 << 10;
/// A file of up to so many bytes that is text, such as a reference, stands in the list itself.
const SHOWN_BYTES_MAX: u64 = 200;

/// Where what leaves the tree with a changeset is divergence.
#[derive(Debug, Default)]
pub(crate) struct Divergence {
    everywhere: Option<Applied>,
    /// At and below these paths.
    within: Option<(Applied, BTreeSet<(RootId, RelPath)>)>,
}

impl Divergence {
    pub(crate) fn is_any(&self) -> bool {
        self.everywhere.is_some() || self.within.is_some()
    }

    /// The changeset to whose quarantine it goes, if it is divergence at `path`.
    pub(crate) fn of(&self, root: RootId, path: &RelPath) -> Option<Applied> {
        let is_within = |paths: &BTreeSet<(RootId, RelPath)>| path.ancestors().chain([path.clone()]).any(|p| paths.contains(&(root, p)));
        self.everywhere.or_else(|| self.within.as_ref().filter(|(_, paths)| is_within(paths)).map(|(committed, _)| *committed))
    }
}

impl<D: Disk> Standby<D> {
    /// Whether the changeset is the first of a session that the tree is not of.
    pub(crate) fn is_first_of_session(&self, changeset: Applied) -> bool {
        self.standing().applied.is_some_and(|applied| applied.session != changeset.session)
    }

    /// Where what leaves the tree with this changeset is divergence: everywhere with the first of a session, and later in
    /// what that one left as it was, until it comes.
    pub(crate) fn divergence(&self, committed: Applied) -> Result<Divergence, StandbyError> {
        if self.standing().rewind.is_some() {
            return Ok(Divergence::default()); // a person's word
        }
        if self.is_first_of_session(committed) {
            return Ok(Divergence { everywhere: Some(committed), within: None });
        }
        let view = self.store.view(PENDING)?;
        let mut paths = BTreeSet::new();
        self.store.for_each_key(UNSETTLED, |k| {
            paths.insert(view.path_of(k)?);
            Ok(())
        })?;
        let is_any = !paths.is_empty() && !seeded_bug!(LaterDivergenceIsNotKept);
        Ok(Divergence { everywhere: None, within: is_any.then_some((committed, paths)) })
    }

    /// Writes, durably, the list of what the changeset takes away or replaces, where that is divergence.
    pub(crate) fn list_divergence(&self, changeset: &Changeset<D>, committed: Applied) -> Result<(), StandbyError> {
        let divergence = self.divergence(committed)?;
        if !divergence.is_any() {
            return Ok(());
        }
        for number in 0..self.root_count() {
            let root = RootId(number);
            let pending = self.store.view(PENDING)?;
            let mut list = None;
            let mut window = Vec::new();
            let mut count = 0u64;
            let mut each = |root: RootId, path: RelPath, row: PendingRow| -> Result<bool, StandbyError> {
                if divergence.of(root, &path).is_none() {
                    return Ok(true);
                }
                let why = match (&row.action, &row.entry) {
                    (Action::Remove, _) => "removed",
                    (Action::Place { .. } | Action::Carried { .. }, Some(_)) => "replaced",
                    _ => return Ok(true),
                };
                let mut line = |path: &RelPath, old: &ManifestRow, why: &str| -> Result<(), StandbyError> {
                    let dir = self.disk.open_dir(&self.root(root).dir, path.parent_bytes()).ok();
                    let was = dir.and_then(|dir| self.shown(&dir, path.name(), &old.entry));
                    let text = list_line(path, old, why, was);
                    count += 1;
                    window.extend_from_slice(text.as_bytes());
                    window.push(b'\n');
                    if window.len() >= LIST_WINDOW_BYTES {
                        self.append_to_list(root, committed, &mut list, &mut window)?;
                    }
                    Ok(())
                };
                let old = changeset.manifest.manifest(root, &path)?;
                let is_same = |old: &ManifestRow| row.entry.as_ref().is_some_and(|new| new.body == old.entry.body);
                if let Some(old) = old.filter(|old| !is_same(old)) {
                    line(&path, &old, why)?;
                    if old.entry.is_dir() && row.entry.as_ref().is_none_or(|new| !new.is_dir()) {
                        changeset.manifest.for_each_below(root, &path, &mut |_, path, old: ManifestRow| {
                            line(&path, &old, "removed")?;
                            Ok(true)
                        })?;
                    }
                }
                Ok(true)
            };
            pending.for_each_below(root, &RelPath::root(), &mut each)?;
            self.append_to_list(root, committed, &mut list, &mut window)?;
            if let Some(list) = list {
                if !seeded_bug!(DivergenceIsNotSynced) {
                    self.synced(self.disk.sync_file(&list.file).map_err(io("syncing the list of", QUARANTINE)))?;
                }
                for dir in [&list.dir, &self.open_quarantine(root)?, &self.root(root).control] {
                    self.synced(self.disk.sync_dir(dir).map_err(io("syncing", QUARANTINE)))?;
                }
                tracing::error!(
                    root = %self.root(root).path.display(),
                    folder = %escape(&self.session_name(committed)),
                    entries = count,
                    "the standby had more than the active brings with a new session; it goes to .coldspare/quarantine, see LIST there"
                );
            }
        }
        Ok(())
    }

    /// The content of a small text, such as a reference.
    pub(crate) fn shown(&self, dir: &D::Dir, name: &[u8], entry: &Entry) -> Option<String> {
        if entry.digest().is_none() || entry.size() > SHOWN_BYTES_MAX {
            return None;
        }
        let file = self.disk.open_file(dir, name).ok()?;
        let mut bytes = vec![0; SHOWN_BYTES_MAX as usize];
        let read = self.disk.read_at(&file, 0, &mut bytes).ok()?;
        let text = String::from_utf8(bytes[..read].to_vec()).ok()?;
        let text = text.trim_end();
        (!text.chars().any(char::is_control)).then(|| text.to_string())
    }

    fn append_to_list(
        &self,
        root: RootId,
        committed: Applied,
        list: &mut Option<List<D>>,
        window: &mut Vec<u8>,
    ) -> Result<(), StandbyError> {
        if window.is_empty() {
            return Ok(());
        }
        let fail = || io("writing the list of", QUARANTINE);
        if list.is_none() {
            let dir = self.session_quarantine(root, committed)?;
            match self.disk.remove_file(&dir, LIST) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(fail()(e)),
                _ => {}
            }
            let file = self.disk.create_file(&dir, LIST).map_err(fail())?;
            *list = Some(List { dir, file, bytes: 0 });
        }
        if let Some(list) = list {
            self.disk.write_at(&list.file, list.bytes, window).map_err(fail())?;
            list.bytes += window.len() as u64;
        }
        window.clear();
        Ok(())
    }

    /// Moves what stands at `path` to the session's quarantine, below its own folders.
    pub(crate) fn set_aside(
        &self,
        committed: Applied,
        root: RootId,
        (dir, name): (&D::Dir, &[u8]),
        path: &RelPath,
    ) -> Result<(), StandbyError> {
        let to = self.quarantined_dir(committed, root, path)?;
        match self.disk.rename(dir, name, &to, path.name()) {
            // Set aside before a crash under the same name: what is there now came after it.
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists | ErrorKind::IsADirectory | ErrorKind::NotADirectory
                ) =>
            {
                return self.quarantine(root, dir, name, path);
            }
            other => other.map_err(io("moving to quarantine", path.as_bytes()))?,
        }
        // Two names of one file, which came back from the history: the kernel renames nothing and says it did.
        match self.disk.remove_file(dir, name) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(io("moving to quarantine", path.as_bytes())(e)),
            _ => Ok(()),
        }
    }

    /// Gives the file at `path` a name in the session's quarantine, so that it can be replaced.
    pub(crate) fn keep_aside(&self, committed: Applied, root: RootId, dir: &D::Dir, path: &RelPath) -> Result<(), StandbyError> {
        let to = self.quarantined_dir(committed, root, path)?;
        match self.disk.link(dir, path.name(), &to, path.name()) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {} // before a crash
            other => other.map_err(io("keeping in quarantine", path.as_bytes()))?,
        }
        if seeded_bug!(ReplacedIsNotSynced) {
            return Ok(());
        }
        // The rename that replaces it may be durable before this name is.
        self.synced(self.disk.sync_dir(&to).map_err(io("syncing the quarantine for", path.as_bytes())))
    }

    /// The folder of `path` in the session's quarantine, made when it isn't there.
    fn quarantined_dir(&self, committed: Applied, root: RootId, path: &RelPath) -> Result<D::Dir, StandbyError> {
        let mut at = self.session_quarantine(root, committed)?;
        let parents = path.parent().unwrap_or_else(RelPath::root);
        for name in std::iter::once(TREE).chain(parents.components()) {
            at = self.made_dir(&at, name, path)?;
        }
        Ok(at)
    }

    fn session_quarantine(&self, root: RootId, committed: Applied) -> Result<D::Dir, StandbyError> {
        let outer = self.open_quarantine(root)?;
        self.made_dir(&outer, &self.session_name(committed), &RelPath::root())
    }

    /// `<time>-<session>`: the same for every try to apply a changeset.
    ///
    /// The time is that of the changeset, or of the one before where this one is a part of what the active had.
    fn session_name(&self, committed: Applied) -> Vec<u8> {
        let known = [committed.as_of_ms, self.standing().applied.map_or(0, |a| a.as_of_ms)].into_iter().find(|ms| *ms > 0);
        [self.time_name(known.unwrap_or_default()), format!("-{}", &committed.session.to_string()[..8]).into_bytes()].concat()
    }

    /// A time as the names of quarantines have it.
    pub(crate) fn time_name(&self, ms: u64) -> Vec<u8> {
        let ms = i64::try_from(ms).unwrap_or(i64::MAX);
        let time = jiff::Timestamp::from_millisecond(ms).map_or_else(|_| ms.to_string(), |t| t.strftime("%Y%m%dT%H%M%SZ").to_string());
        time.into_bytes()
    }

    pub(crate) fn made_dir(&self, at: &D::Dir, name: &[u8], path: &RelPath) -> Result<D::Dir, StandbyError> {
        match self.disk.create_dir(at, name) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            // What is moved below it must not get lost with its name.
            made => made.and_then(|()| self.disk.sync_dir(at)).map_err(io("making the quarantine for", path.as_bytes()))?,
        }
        self.disk.open_dir(at, name).map_err(io("opening the quarantine for", path.as_bytes()))
    }
}

/// A line of the list: what stood at a path, and what became of it.
pub(crate) fn list_line(path: &RelPath, old: &ManifestRow, why: &str, was: Option<String>) -> String {
    let kind = match old.entry.body {
        Body::Dir => "dir",
        Body::File { .. } => "file",
        Body::Symlink { .. } => "symlink",
        Body::Hardlink { .. } => "hardlink",
    };
    let digest = old.entry.digest().map(|digest| digest.to_string());
    json!({"path": path.to_string(), "kind": kind, "why": why, "bytes": old.entry.size(), "blake3": digest, "was": was}).to_string()
}

struct List<D: Disk> {
    dir: D::Dir,
    file: D::File,
    bytes: u64,
}

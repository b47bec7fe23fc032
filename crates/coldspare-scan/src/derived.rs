//! Files that git derives from others: shipped when all that they name is shipped too, else dropped on the standby.
//!
//! They are captured after objects and packs. What such a file names was there when it was written: if that was before
//! the objects were read, and is there still, it is on the standby with this changeset. Dropping one costs the standby
//! some speed, shipping a stale one makes `git fsck` fail.
//!
//! Invariants: none is shipped that names what the standby lacks; none stays there when objects go that it may name.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use coldspare_core::git::derived::{COMMIT_GRAPH_HEAD_BYTES, commit_graph, multi_pack_index_names};
use coldspare_core::git::family::{Alternate, alternates};
use coldspare_core::git::pack::{FANOUT_BYTES, Fanout, hash_bytes};
use coldspare_core::git::{CapturePass, ObjectId};
use coldspare_core::{RelPath, RootId};
use coldspare_os::{Disk, Stat};

use crate::batch::Builder;
use crate::capture::CaptureError;
use crate::dirty::Hint;
use crate::index::{Row, State};
use crate::read::{Outcome, RACY_MS};
use crate::run::Run;
use crate::unit::Unit;
use crate::visit::{Candidate, Visit, What};

/// LIMIT: bytes of a multi-pack index in which the names of its packs have to be.
const NAMES_BYTES_MAX: usize = 1 << 20;
/// LIMIT: bytes of the ids that a commit graph names; a larger one isn't carried.
const IDS_BYTES_MAX: u64 = 128 << 20;
/// LIMIT: alternates of alternates, as in git.
pub(crate) const ALTERNATES_DEPTH_MAX: usize = 5;
/// LIMIT: commits of a graph that are looked for among loose objects; with more it isn't carried.
const LOOSE_MAX: usize = 20_000;

impl<D: Disk> Run<'_, D> {
    /// Where objects go, what is derived from them has to be looked at, whether or not it changed; where packs come, what
    /// was not carried before may be whole.
    pub(crate) fn revisit_derived(&self) {
        for unit in self.units.all().iter().filter(|unit| unit.has_removed() || unit.has_new_packs.load(Ordering::Relaxed)) {
            let (root, path) = &unit.at;
            for (dir, names) in [("objects/pack", &[&b"multi-pack-index"[..]][..]), ("objects/info", &[b"commit-graph", b"commit-graphs"])]
            {
                let Ok(path) = RelPath::new([path.as_bytes(), b"/", dir.as_bytes()].concat()) else { continue };
                if self.stat_of(*root, &path).is_none() {
                    continue;
                }
                let names = names.iter().map(|name| ((*name).into(), Hint::Replaced)).collect::<BTreeMap<_, _>>();
                self.defer(CapturePass::Derived, Visit { root: *root, path, what: What::Names(names) });
            }
        }
    }

    /// Captures a derived file when it is consistent, and drops it on the standby when it isn't.
    pub(crate) fn capture_derived(&self, unit: &Unit, candidate: Candidate, builder: &mut Builder) -> Result<Outcome, CaptureError> {
        let (root, path) = (candidate.root, candidate.path.clone());
        if !self.is_older_than_objects(&candidate.stat) {
            // It may name objects that came after they were read: the next changeset brings it.
            self.again(root, &path);
            if !unit.has_removed() {
                self.keep(root, &path);
                return Ok(Outcome::Vanished);
            }
        } else if self.is_consistent(unit, &path) {
            let seen = candidate.stat;
            let outcome = self.capture_one(candidate, builder)?;
            if self.stat_of(root, &path).is_none_or(|now| (now.ino, now.ctime) != (seen.ino, seen.ctime)) {
                // Another than was looked into may have been read.
                if unit.has_removed() {
                    unit.again("what is derived from its objects changed while it was read");
                }
                self.keep(root, &path);
                self.again(root, &path);
            }
            return Ok(outcome);
        }
        tracing::debug!(path = %path, "not carried: it may name what the standby lacks");
        if let Some(row) = candidate.row {
            let is_news = matches!(row.state, State::Present { .. }) || row.version == Row::UNSENT;
            if is_news || row.version > self.acked {
                self.remove(root, path, is_news, builder)?;
            }
        }
        Ok(Outcome::Vanished)
    }

    /// Whether what `stat` tells of was there, as it is, before any object was looked at.
    pub(crate) fn is_older_than_objects(&self, stat: &Stat) -> bool {
        let objects_from_ms = i64::try_from(self.objects_from_ms.load(Ordering::Relaxed)).unwrap_or(i64::MAX);
        objects_from_ms - ctime_ms(stat) >= RACY_MS
    }

    fn is_consistent(&self, unit: &Unit, path: &RelPath) -> bool {
        let (root, repository) = &unit.at;
        let inside = path.below(repository).unwrap_or_default();
        match inside.strip_prefix(b"objects/").unwrap_or_default() {
            // A bitmap or a reverse index of it is of no use without it, and harmless.
            rest if rest.starts_with(b"pack/multi-pack-index-") => true,
            b"pack/multi-pack-index" => self.names_packs_that_are_there(*root, path).unwrap_or(false),
            b"info/commit-graph" => self.names_commits_that_are_there(unit, path).unwrap_or(false),
            _ => false, // such as incremental multi-pack indexes
        }
    }

    fn names_packs_that_are_there(&self, root: RootId, path: &RelPath) -> Option<bool> {
        let head = self.head_of(root, path, NAMES_BYTES_MAX)?.0;
        let dir = path.parent()?;
        let is_there = |name: &[u8]| dir.join(name).is_ok_and(|path| self.stat_of(root, &path).is_some());
        let names = multi_pack_index_names(&head).ok()?;
        Some(names.iter().all(|index| {
            let pack = index.strip_suffix(b".idx").map(|stem| [stem, b".pack"].concat());
            is_there(index) && pack.is_some_and(|pack| is_there(&pack))
        }))
    }

    /// Whether each commit that a graph names is in a pack or a loose object, here or by alternates.
    ///
    /// Cost: one pass over the ids of the graph and of the packs' indexes.
    pub(crate) fn names_commits_that_are_there(&self, unit: &Unit, path: &RelPath) -> Option<bool> {
        let root = path_root(unit);
        let (head, size) = self.head_of(root, path, COMMIT_GRAPH_HEAD_BYTES)?;
        let graph = commit_graph(&head, size).ok()?;
        if graph.ids.end - graph.ids.start > IDS_BYTES_MAX {
            return Some(false);
        }
        let bytes = self.range_of(root, path, graph.ids.start..graph.ids.end)?;
        let mut left: Vec<&[u8]> = bytes.chunks_exact(graph.hash_bytes).collect();
        self.remove_found(&unit.at.clone(), &mut left, 0);
        Some(left.is_empty())
    }

    /// Removes the ids that the repository at `at` has, by itself or by alternates.
    pub(crate) fn remove_found(&self, at: &(RootId, RelPath), left: &mut Vec<&[u8]>, depth: usize) {
        let (root, repository) = at;
        let below = |name: &str| RelPath::new([repository.as_bytes(), b"/", name.as_bytes()].concat()).ok();
        self.remove_packed(at, left);
        if left.is_empty() {
            return;
        }
        if depth < ALTERNATES_DEPTH_MAX {
            for alternate in self.alternates_of(at) {
                if let Alternate::Replicated(other) = alternate {
                    self.remove_found(&other, left, depth + 1);
                }
            }
        }
        if left.len() <= LOOSE_MAX {
            left.retain(|id| {
                let loose = ObjectId::new(id).and_then(|id| below(&format!("objects/{}", id.loose_path())));
                loose.is_none_or(|path| self.stat_of(*root, &path).is_none())
            });
        }
    }

    /// Removes the ids that are in packs of the repository at `at` itself.
    pub(crate) fn remove_packed(&self, (root, repository): &(RootId, RelPath), left: &mut Vec<&[u8]>) {
        let disk = &self.capture.disk;
        let Ok(packs) = repository.join_path(b"objects/pack") else { return };
        let Ok(listed) = disk.open_dir(&self.root(*root).dir, packs.as_bytes()).and_then(|dir| disk.list(&dir)) else { return };
        for index in listed.iter().filter(|l| l.name.ends_with(b".idx")) {
            if let Ok(index) = packs.join(&index.name) {
                let _ = self.remove_indexed(*root, &index, left);
            }
        }
    }

    fn remove_indexed(&self, root: RootId, index: &RelPath, left: &mut Vec<&[u8]>) -> Option<()> {
        let (head, size) = self.head_of(root, index, FANOUT_BYTES)?;
        let fanout = Fanout::parse(&head).ok()?;
        let hash = hash_bytes(fanout.objects(), size)?;
        let mut kept = Vec::with_capacity(left.len());
        let mut rest = &left[..];
        while let Some(first) = rest.first() {
            // Ids are sorted: those of one bucket stand together.
            let end = rest.iter().position(|id| id[0] != first[0]).unwrap_or(rest.len());
            let bucket = self.range_of(root, index, fanout.bucket(first[0], hash))?;
            let mut theirs = bucket.chunks_exact(hash).peekable();
            for id in &rest[..end] {
                while theirs.next_if(|their| their < id).is_some() {}
                if theirs.peek() != Some(id) {
                    kept.push(*id);
                }
            }
            rest = &rest[end..];
        }
        *left = kept;
        Some(())
    }

    /// What the alternates file of a repository names; nothing when there is none.
    pub(crate) fn alternates_of(&self, at: &(RootId, RelPath)) -> Vec<Alternate> {
        let Ok(path) = at.1.join_path(coldspare_core::git::ALTERNATES) else { return Vec::new() };
        let Some((content, _)) = self.head_of(at.0, &path, NAMES_BYTES_MAX) else { return Vec::new() };
        let roots: Vec<&[u8]> = self.capture.roots.iter().map(|root| root.path.as_os_str().as_encoded_bytes()).collect();
        alternates(&content, at, &roots)
    }

    /// The first bytes of a file, at most `limit`, and its size.
    pub(crate) fn head_of(&self, root: RootId, path: &RelPath, limit: usize) -> Option<(Vec<u8>, u64)> {
        let disk = &self.capture.disk;
        let dir = disk.open_dir(&self.root(root).dir, path.parent_bytes()).ok()?;
        let file = disk.open_file(&dir, path.name()).ok()?;
        let size = disk.stat_file(&file).ok()?.size;
        let mut head = vec![0; limit.min(usize::try_from(size).unwrap_or(usize::MAX))];
        let read = disk.read_at(&file, 0, &mut head).ok()?;
        head.truncate(read);
        Some((head, size))
    }

    fn range_of(&self, root: RootId, path: &RelPath, range: std::ops::Range<u64>) -> Option<Vec<u8>> {
        let disk = &self.capture.disk;
        let dir = disk.open_dir(&self.root(root).dir, path.parent_bytes()).ok()?;
        let file = disk.open_file(&dir, path.name()).ok()?;
        let mut bytes = vec![0; usize::try_from(range.end - range.start).ok()?];
        let read = disk.read_at(&file, range.start, &mut bytes).ok()?;
        (read == bytes.len()).then_some(bytes)
    }

    pub(crate) fn stat_of(&self, root: RootId, path: &RelPath) -> Option<Stat> {
        let disk = &self.capture.disk;
        let dir = disk.open_dir(&self.root(root).dir, path.parent_bytes()).ok()?;
        disk.stat(&dir, path.name()).ok()
    }
}

fn path_root(unit: &Unit) -> RootId {
    unit.at.0
}

fn ctime_ms(stat: &Stat) -> i64 {
    stat.ctime.0.saturating_mul(1000) + i64::from(stat.ctime.1) / 1_000_000
}

//! A look at all of a home beside the cycles, one folder at a time, that proves that the watch misses nothing.
//!
//! What differs from the index and is neither hinted, nor in the hands of a cycle, nor held back, was missed. The caller
//! sets the pace, counts what was missed and hints it.
//!
//! Invariants: it reads no content and changes nothing; what it can't tell is no miss.
//! Memory: one folder's entries.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use coldspare_core::exclude::IsDir;
use coldspare_core::git::{self, Part};
use coldspare_core::{RelPath, RootId};
use coldspare_os::{Disk, FileKind, Stat};

use crate::capture::{BARRIER_LIMIT, Capture, CaptureError};
use crate::index::{IndexError, Row, State};
use crate::visit::is_as_before;

/// How many cycles began, and how many of them ended.
#[derive(Debug, Default)]
pub struct Turns {
    begun: AtomicU64,
    ended: AtomicU64,
}

/// A cycle is under way while this lives.
pub(crate) struct Turn<'a>(&'a Turns);

/// What a step of a proof found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The folder; what the next step goes on behind.
    pub dir: (RootId, RelPath),
    /// Entries that were examined.
    pub entries: u64,
    /// Paths that are not as the index has them.
    pub differing: Vec<RelPath>,
}

/// What a path that differed amounts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is known: as the index has it by now, hinted, or held back; or the watch doesn't claim to know.
    Known,
    /// A cycle is under way and may have it.
    Unclear,
    /// Nobody knows of it.
    Missed,
}

impl Turns {
    pub(crate) fn begin(&self) -> Turn<'_> {
        self.begun.fetch_add(1, Ordering::AcqRel);
        Turn(self)
    }

    /// How many cycles ended; `None` while one is under way.
    pub fn ended(&self) -> Option<u64> {
        let ended = self.ended.load(Ordering::Acquire);
        (self.begun.load(Ordering::Acquire) == ended).then_some(ended)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::AcqRel);
    }
}

impl<D: Disk> Capture<D> {
    /// Compares the folder that follows `after` in the order of the index, or the first one; `None` after the last.
    ///
    /// Cost: one `getdents` pass and one `statx` an entry, and the folder's rows.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn prove_next(&self, after: Option<&(RootId, RelPath)>) -> Result<Option<Step>, IndexError> {
        let snapshot = self.index.snapshot()?;
        let Some((root, dir)) = snapshot.next_dir(after)? else { return Ok(None) };
        let mut step = Step { dir: (root, dir.clone()), entries: 1, differing: Vec::new() };
        // A root that was taken out of the configuration.
        let Some(own) = self.roots.get(usize::from(root.0)) else { return Ok(Some(step)) };
        // What can't be listed differs in the folder above, or is reported by the cycle that looks at it.
        let Ok(listed) = self.disk.open_dir(&own.dir, dir.as_bytes()).and_then(|open| self.disk.list_stat(&open)) else {
            return Ok(Some(step));
        };
        let mut known: BTreeMap<Box<[u8]>, Row> = snapshot.children(root, &dir)?.into_iter().collect();
        step.entries += listed.len() as u64;
        for (name, stat) in listed {
            let row = known.remove(&name);
            let Ok(path) = dir.join(&name) else { continue };
            if !self.is_left_out(root, &path, &stat) && !row.is_some_and(|row| is_as_before(&row, &stat)) {
                step.differing.push(path);
            }
        }
        let gone = known.into_iter().filter(|(_, row)| matches!(row.state, State::Present { .. }));
        step.differing.extend(gone.filter_map(|(name, _)| dir.join(&name).ok()));
        Ok(Some(step))
    }

    /// What is to be said of a path that differed.
    ///
    /// # Errors
    /// [`CaptureError`] of the index and of the watch.
    pub fn judge(&self, root: RootId, path: &RelPath) -> Result<Verdict, CaptureError> {
        let Some(watch) = &self.watch else { return Ok(Verdict::Known) };
        let Some(turn) = self.turns.ended() else { return Ok(Verdict::Unclear) };
        watch.barrier(BARRIER_LIMIT)?;
        let claims_to_know = !watch.is_stale() && watch.coverage().unwatched == 0;
        if !claims_to_know || watch.dirty().knows(root, path) || self.held.covers(root, path) || self.is_put_off(root, path) {
            return Ok(Verdict::Known);
        }
        let row = self.index.snapshot()?.row(root, path)?;
        let own = &self.roots[usize::from(root.0)];
        let found = self.disk.open_dir(&own.dir, path.parent_bytes()).and_then(|dir| self.disk.stat(&dir, path.name()));
        let is_known = match (row, found) {
            (Some(row), Ok(stat)) => is_as_before(&row, &stat),
            (None, Ok(stat)) => self.is_left_out(root, path, &stat),
            (row, Err(_)) => !row.is_some_and(|row| matches!(row.state, State::Present { .. })),
        };
        // A change since then has its hint, or its cycle.
        if is_known || watch.dirty().knows(root, path) || self.is_put_off(root, path) {
            return Ok(Verdict::Known);
        }
        Ok(if self.turns.ended() == Some(turn) { Verdict::Missed } else { Verdict::Unclear })
    }

    fn is_put_off(&self, root: RootId, path: &RelPath) -> bool {
        self.bulk.as_ref().is_some_and(|bulk| bulk.covers(root, path))
    }

    /// Whether a path may be there without the index having it.
    fn is_left_out(&self, root: RootId, path: &RelPath, stat: &Stat) -> bool {
        let is_dir = if stat.kind == FileKind::Dir { IsDir::Yes } else { IsDir::No };
        let is_kind = matches!(stat.kind, FileKind::File | FileKind::Dir | FileKind::Symlink);
        // What is derived may be dropped, and comes again when git writes it anew.
        let is_derived = matches!(git::part(path), Part::DerivedTop | Part::DerivedLayer);
        !is_kind || is_derived || git::looks_transient(path.name()) || self.roots[usize::from(root.0)].exclude.matches(path, is_dir)
    }
}

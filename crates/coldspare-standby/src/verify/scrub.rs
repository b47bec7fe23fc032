//! Scrub: a deep verification in steps, so that it can go on after a restart where it stood.
//!
//! Invariants: what differs is looked at again between two changesets before it counts (G7); nothing is held between two
//! steps.

use coldspare_core::{Problem, RelPath, RootId};
use coldspare_os::Disk;

use super::{Depth, Pace};
use crate::error::StandbyError;
use crate::row::{ManifestRow, Record};
use crate::standby::Standby;
use crate::store::MANIFEST;

/// What one step found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// Where the next one goes on; `None` at the end.
    pub next: Option<Vec<u8>>,
    /// Entries that were compared.
    pub entries: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// What differs, by path.
    pub problems: Vec<Problem>,
}

impl<D: Disk> Standby<D> {
    /// Compares the next entries of the manifest, `entries_max` at most, behind `after`; from the first on for `None`.
    ///
    /// What the manifest doesn't know is left to the other verifications. Cost: each byte of those entries.
    ///
    /// # Errors
    /// `Store`, `Damaged`: the manifest can't be read.
    pub fn scrub_step(&self, after: Option<&[u8]>, entries_max: u64, pace: &Pace) -> Result<Step, StandbyError> {
        let manifest = self.store.view(MANIFEST)?;
        let mut step = Step::default();
        let mut suspects: Vec<(RootId, RelPath)> = Vec::new();
        let mut last = None;
        manifest.for_each_raw_after(after, |k, value| {
            let (root, path) = manifest.path_of(k)?;
            let row = ManifestRow::read(k, value).map_err(|e| self.store.damaged(format!("{path}: {e}")))?;
            step.entries += 1;
            match self.scrub_entry(root, &path, &row, pace) {
                Some(bytes) => step.bytes += bytes,
                None => suspects.push((root, path)),
            }
            last = Some(k.to_vec());
            Ok(step.entries < entries_max)
        })?;
        step.next = last.filter(|_| step.entries == entries_max);
        drop(manifest);
        if !suspects.is_empty() {
            let _between_changesets = self.tree_lock.read().unwrap_or_else(std::sync::PoisonError::into_inner);
            step.problems = self.judge_suspects(Depth::Deep, suspects)?;
        }
        Ok(step)
    }

    /// The bytes that were read, when the entry is as its row says.
    pub(super) fn scrub_entry(&self, root: RootId, path: &RelPath, row: &ManifestRow, pace: &Pace) -> Option<u64> {
        let own = &self.root(root).dir;
        let stat = if path.is_root() {
            self.disk.stat_dir(own)
        } else {
            self.disk.open_dir(own, path.parent_bytes()).and_then(|dir| self.disk.stat(&dir, path.name()))
        };
        if self.compare_metadata(root, path, row, &stat.ok()?).is_some() {
            return None;
        }
        self.compare_content(root, path, row, pace).ok()
    }
}

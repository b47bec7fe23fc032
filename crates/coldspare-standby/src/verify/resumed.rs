//! A deep verification that goes on where an earlier one was broken off.
//!
//! Everything is compared by its metadata each time; content is read in the order of the manifest, a stretch at a time, in
//! parallel. What lies before the bookmark and changed since the first run began, by its change time, is read again.

use std::sync::Mutex;
use std::sync::atomic::Ordering;

use coldspare_core::{RelPath, RootId, codec};
use coldspare_os::Disk;
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use serde::{Deserialize, Serialize};

use super::{Check, Depth, Progress, Verdict, Verification};
use crate::error::StandbyError;
use crate::row::{ManifestRow, Record};
use crate::standby::{Standby, lock};
use crate::store::MANIFEST;

/// How far a deep verification is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bookmark {
    /// When its first run began, in milliseconds since 1970 by the clock of this host.
    began_ms: u64,
    /// The key of the last entry that was read, with all before it.
    position: Option<Vec<u8>>,
    /// Entries up to there.
    entries: u64,
    /// What differed so far; it is looked at again at the end.
    suspects: Vec<(RootId, RelPath)>,
}

/// LIMIT: entries of a stretch.
const STRETCH_ENTRIES: u64 = 500;
/// LIMIT: bytes of a stretch, but for its last entry.
const STRETCH_BYTES: u64 = 256 << 20;
/// LIMIT: suspects of a bookmark; beyond, it isn't moved any more.
const SUSPECTS_MAX: usize = 10_000;

impl Bookmark {
    /// At the beginning.
    pub fn new(now_ms: u64) -> Bookmark {
        Bookmark { began_ms: now_ms, ..Bookmark::default() }
    }

    /// Reads what [`Bookmark::to_bytes`] wrote; `None` for anything else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Bookmark> {
        codec::decode(bytes).ok()
    }

    /// As it is noted.
    pub fn to_bytes(&self) -> Vec<u8> {
        codec::encode(self)
    }

    /// Whether an entry was read, and may have changed since.
    pub(super) fn is_to_be_read_again(&self, key: &[u8], ctime: (i64, u32)) -> bool {
        let changed_ms = ctime.0.saturating_mul(1000).saturating_add(i64::from(ctime.1 / 1_000_000));
        self.position.as_deref().is_some_and(|position| key <= position) && i128::from(changed_ms) >= i128::from(self.began_ms)
    }
}

impl<D: Disk> Standby<D> {
    /// As [`Standby::verify`], `Deep`, from a bookmark on; `note` gets each later one, with all before it read.
    ///
    /// LIMIT: a clock that was set back between the runs hides what changed before the bookmark from this run; the scrub, or a
    /// run from the beginning, finds it.
    ///
    /// Cost: metadata of every entry, every byte behind the bookmark.
    ///
    /// # Errors
    /// `Store`, `Damaged`: the manifest itself can't be read.
    pub fn verify_from(
        &self,
        mut mark: Bookmark,
        progress: &Progress,
        mut note: impl FnMut(&Bookmark),
    ) -> Result<Verification, StandbyError> {
        let check = Check {
            standby: self,
            manifest: self.store.view(MANIFEST)?,
            depth: Depth::Quick,
            again: Some(mark.clone()),
            progress,
            suspects: Mutex::default(),
            failure: Mutex::default(),
        };
        progress.begin(check.manifest.len()?);
        check.everything();
        if let Some(failure) = lock(&check.failure).take() {
            return Err(failure);
        }
        let entries = progress.entries.swap(mark.entries, Ordering::Relaxed);
        let mut suspects = std::mem::take(&mut *lock(&check.suspects));
        while let Some((last, stretch)) = self.stretch(mark.position.as_deref())? {
            let differs = |(root, path, row): &(RootId, RelPath, ManifestRow)| {
                progress.entries.fetch_add(1, Ordering::Relaxed);
                match self.scrub_entry(*root, path, row, &progress.pace) {
                    Some(bytes) => {
                        progress.bytes.fetch_add(bytes, Ordering::Relaxed);
                        None
                    }
                    None => Some((*root, path.clone())),
                }
            };
            let found: Vec<_> = stretch.par_iter().filter_map(differs).collect();
            mark.suspects.extend(found);
            mark.position = Some(last);
            mark.entries += stretch.len() as u64;
            if mark.suspects.len() <= SUSPECTS_MAX {
                note(&mark);
            }
        }
        suspects.extend(mark.suspects);
        suspects.sort();
        suspects.dedup();
        let (problems, applied) = self.examine_suspects(Depth::Deep, suspects)?;
        let verdict = Verdict::of(applied, &problems);
        let (files, bytes) = (progress.files.load(Ordering::Relaxed), progress.bytes.load(Ordering::Relaxed));
        Ok(Verification { verdict, applied, entries, files, bytes, problems })
    }

    /// The next entries behind a key, and the key of the last one.
    #[allow(clippy::type_complexity)] // entries, with where they end
    fn stretch(&self, after: Option<&[u8]>) -> Result<Option<(Vec<u8>, Vec<(RootId, RelPath, ManifestRow)>)>, StandbyError> {
        let manifest = self.store.view(MANIFEST)?;
        let (mut last, mut out, mut bytes) = (None, Vec::new(), 0);
        manifest.for_each_raw_after(after, |k, value| {
            let (root, path) = manifest.path_of(k)?;
            let row = ManifestRow::read(k, value).map_err(|e| self.store.damaged(format!("{path}: {e}")))?;
            bytes += row.entry.size();
            out.push((root, path, row));
            last = Some(k.to_vec());
            Ok((out.len() as u64) < STRETCH_ENTRIES && bytes < STRETCH_BYTES)
        })?;
        Ok(last.map(|last| (last, out)))
    }
}

//! Large files that an interrupted changeset left unfinished: the next try goes on inside them.
//!
//! One is found by a name that follows from its path, and nothing is recorded of it: what it holds is told by reading it,
//! from the medium, whoever was killed and whatever the power took. It counts for nothing before all of it has its
//! digest.
//!
//! Invariants: the content that is told of is durable; after a sync that failed no such file is left.

use std::io::ErrorKind;
use std::sync::atomic::Ordering;

use coldspare_core::changeset::Ask;
use coldspare_core::{RelPath, RootId, key};
use coldspare_delta::{BLOCKS_MAX, BlockDigest, BlockHasher, block_bytes};
use coldspare_os::Disk;

use crate::error::{StandbyError, io};
use crate::standby::Standby;

const PREFIX: &[u8] = b"u-";

/// LIMIT: digests in one answer; they fit into one message.
pub(crate) const DIGESTS_MAX: usize = 2 * BLOCKS_MAX;

/// Bytes that are read at once.
const WINDOW_BYTES: usize = 1 << 20;

/// The name of what is assembled for a path.
pub(crate) fn name(root: RootId, path: &RelPath) -> Vec<u8> {
    let digest = coldspare_delta::digest(&key::encode(root, path));
    let hex: String = digest[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    [PREFIX, hex.as_bytes()].concat()
}

pub(crate) fn is_name(name: &[u8]) -> bool {
    name.starts_with(PREFIX)
}

impl<D: Disk> Standby<D> {
    /// The digests of the blocks of what was left of a file; `None` when nothing was, or `budget` digests don't suffice.
    ///
    /// Cost: one fsync, and all of it is read.
    pub(crate) fn unfinished_blocks(&self, ask: &Ask, budget: &mut usize) -> Result<Option<Vec<BlockDigest>>, StandbyError> {
        if self.unfinished.load(Ordering::Relaxed) == 0 {
            return Ok(None);
        }
        self.blocks_in(&self.root(ask.root).files, ask, budget)
    }

    /// As [`Standby::unfinished_blocks`], of what is in `dir`.
    pub(crate) fn blocks_in(&self, dir: &D::Dir, ask: &Ask, budget: &mut usize) -> Result<Option<Vec<BlockDigest>>, StandbyError> {
        let (disk, bytes) = (&self.disk, ask.path.as_bytes());
        let file = match disk.open_file(dir, &name(ask.root, &ask.path)) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io("opening the unfinished", bytes)(e)),
        };
        let there = disk.stat_file(&file).map_err(io("examining the unfinished", bytes))?.size.min(ask.size);
        let count = usize::try_from(there.div_ceil(block_bytes(ask.size))).unwrap_or(usize::MAX);
        if count == 0 || count > *budget {
            return Ok(None);
        }
        self.synced(disk.sync_file(&file).map_err(io("syncing the unfinished", bytes)))?;
        disk.forget_cached(&file);
        let mut hasher = BlockHasher::new(ask.size);
        let mut window = vec![0; WINDOW_BYTES];
        let mut offset = 0;
        while offset < there {
            let wanted = usize::try_from(there - offset).unwrap_or(usize::MAX).min(window.len());
            let read = disk.read_at(&file, offset, &mut window[..wanted]).map_err(io("reading the unfinished", bytes))?;
            hasher.update(&window[..read]);
            offset += read as u64;
            if read < wanted {
                break;
            }
        }
        let digests = hasher.finish();
        *budget -= digests.len();
        tracing::info!(path = %ask.path, bytes = offset, "an unfinished file is gone on with");
        Ok(Some(digests))
    }

    /// How many files are left unfinished.
    pub(crate) fn count_unfinished(&self) -> u64 {
        let names = self.roots.iter().map(|root| self.disk.list(&root.files).unwrap_or_default());
        names.map(|listed| listed.iter().filter(|listed| is_name(&listed.name)).count() as u64).sum()
    }

    /// Removes what is left unfinished; trouble with it costs room.
    pub(crate) fn drop_unfinished(&self) {
        self.unfinished.store(0, Ordering::Relaxed);
        for root in &self.roots {
            for listed in self.disk.list(&root.files).unwrap_or_default().iter().filter(|listed| is_name(&listed.name)) {
                if let Err(e) = self.disk.remove_file(&root.files, &listed.name) {
                    tracing::warn!(root = %root.path.display(), error = %e, "an unfinished file can't be removed");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_has_a_name_of_its_own() {
        let path = |s: &str| RelPath::new(s.as_bytes()).unwrap();
        let names = [name(RootId(0), &path("a/b")), name(RootId(1), &path("a/b")), name(RootId(0), &path("a"))];
        assert!(names.iter().all(|name| is_name(name) && name.len() == 34), "{names:?}");
        assert!(names[0] != names[1] && names[0] != names[2] && names[1] != names[2]);
        assert!(!is_name(b"12-3"));
    }
}

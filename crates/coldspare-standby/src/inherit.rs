//! From one role to the other: the manifest of a home that is there already, and the home that a manifest describes.
//!
//! A node that was active and becomes a standby has no manifest, but an index that knows the same: its rows become the
//! manifest. Under another name until it is whole, and durable before it takes the place of an older one, so that every
//! step may be taken again.

use std::path::Path;

use coldspare_core::control::Applied;
use coldspare_core::fingerprint::Fingerprint;
use coldspare_core::{Digest, Entry, RelPath, RootId, key};
use coldspare_os::{Disk, Stat};

use crate::error::{OpenError, StandbyError};
use crate::row::{ADOPTED, ManifestRow, Record, Standing};
use crate::standby::Standby;
use crate::store::{MANIFEST, Store};

/// Rows that are written to the store at once.
const ROWS_AT_ONCE: usize = 20_000;

/// What stands at a path.
pub type Found = (RootId, RelPath, ManifestRow);

impl Store {
    /// Makes the store at `path` anew: its manifest is `rows`, and the tree counts as that of `applied`; without one the
    /// standby says that it has nothing, until an active has named everything. An older one is there until this one is durable.
    ///
    /// `rows` name each path of the tree once, and nothing that isn't on disk as they say.
    ///
    /// Cost: a write of all rows, one fsync of the store.
    ///
    /// # Errors
    /// As [`Store::open`]; what `rows` says, in which case nothing changed.
    pub fn make_of<E: From<OpenError>>(
        path: &Path,
        applied: Option<Applied>,
        rows: impl Iterator<Item = Result<Found, E>>,
    ) -> Result<(), E> {
        Store::make_with(path, |store| {
            let mut some = Vec::with_capacity(ROWS_AT_ONCE);
            let mut rows = rows.peekable();
            while let Some(row) = rows.next() {
                some.push(row?);
                if some.len() == ROWS_AT_ONCE || rows.peek().is_none() {
                    let batch = std::mem::take(&mut some);
                    store.write_lazily(|txn| insert(txn, &batch)).map_err(OpenError::Recovery)?;
                }
            }
            let standing = Standing { applied: Some(applied.unwrap_or(ADOPTED)), ..Standing::default() };
            let written = store.write(|txn| {
                Store::set_distrusted(txn, applied.is_none())?;
                Store::set_standing(txn, &standing)
            });
            Ok(written.map_err(OpenError::Recovery)?)
        })
        .map(drop)
    }
}

fn insert(txn: &redb::WriteTransaction, rows: &[Found]) -> Result<(), redb::Error> {
    let mut manifest = txn.open_table(MANIFEST)?;
    for (root, path, row) in rows {
        let key = key::encode(*root, path);
        manifest.insert(key.as_slice(), row.seal(&key).as_slice())?;
    }
    Ok(())
}

impl<D: Disk> Standby<D> {
    /// The digest of all entries of the manifest, and the changeset that it is.
    ///
    /// Cost: one pass over the manifest; no changeset is applied meanwhile.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn fingerprint(&self) -> Result<(Option<Applied>, Digest), StandbyError> {
        let _between_changesets = self.tree_lock.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut fingerprint = Fingerprint::default();
        self.store.view(MANIFEST)?.for_each_raw(|key, value| {
            let row = ManifestRow::read(key, value).map_err(|e| self.store.damaged(e))?;
            fingerprint.add(key, &row.entry);
            Ok(())
        })?;
        Ok((self.applied(), fingerprint.finish()))
    }

    /// Calls `each` with every entry that is on disk as the manifest says, by its metadata, and what it is there.
    ///
    /// Cost: one `statx` an entry.
    ///
    /// # Errors
    /// `Store`, `Damaged`, and those of `each`.
    pub fn for_each_sound(
        &self,
        mut each: impl FnMut(RootId, RelPath, Entry, Stat) -> Result<(), StandbyError>,
    ) -> Result<(), StandbyError> {
        // The keys of a folder stand together.
        let (mut at, mut folder) = (None, None);
        self.store.view(MANIFEST)?.for_each_raw(|key, value| {
            let row = ManifestRow::read(key, value).map_err(|e| self.store.damaged(e))?;
            let (root, path) = key::decode(key).map_err(|e| self.store.damaged(e.to_string()))?;
            let stat = if path.is_root() {
                self.disk.stat_dir(&self.root(root).dir).ok()
            } else {
                let above = Some((root, path.parent().unwrap_or_else(RelPath::root)));
                if at != above {
                    folder = self.disk.open_dir(&self.root(root).dir, path.parent_bytes()).ok();
                    at = above;
                }
                folder.as_ref().and_then(|dir| self.disk.stat(dir, path.name()).ok())
            };
            match stat.filter(|stat| self.compare_metadata(root, &path, &row, stat).is_none()) {
                Some(stat) => each(root, path, row.entry, stat),
                None => Ok(()),
            }
        })
    }

    /// Writes back all that the roots hold.
    ///
    /// # Errors
    /// `Io`.
    pub fn sync_roots(&self) -> Result<(), StandbyError> {
        for root in &self.roots {
            self.synced(self.disk.sync_fs(&root.dir).map_err(crate::error::io("syncing", b"")))?;
        }
        Ok(())
    }
}

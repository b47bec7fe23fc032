//! Commit: from a staged changeset to one that will be applied whatever happens.
//!
//! Invariants: nothing is committed before all its content is durable; after the commit nothing may fail but for
//! trouble with the disk, and then the same steps are taken again at the next start.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use coldspare_core::changeset::Totals;
use coldspare_core::control::Applied;
use coldspare_core::{Baseline, Body, Entry, RelPath, RootId, Seq, codec, key};
use coldspare_os::Disk;

use crate::error::{StandbyError, io};
use crate::place::Places;
use crate::row::{Action, ManifestRow, PendingRow};
use crate::stage::{attributes, create, insert_rows, xattrs};
use crate::standby::{Changeset, Standby, Unrecorded, lock};
use crate::store::{LINKS, PENDING, Store, View};

/// Rows that are written to the store at once.
const ROWS_AT_ONCE: usize = 10_000;

impl<D: Disk> Standby<D> {
    /// Commits and applies the staged changeset; all its batches and segments were staged.
    ///
    /// After `Ok` the tree is the changeset's, durably, and the acknowledgement may be sent (G3). After an error before
    /// the commit the tree is untouched; after one behind it, [`Standby::open`] finishes the work (G1).
    ///
    /// Cost: a few fsyncs for a small changeset, two `syncfs` for a large one, two durable transactions.
    ///
    /// # Errors
    /// `Protocol` when something is missing; `OutOfSpace`, `Io`, `Store`.
    pub fn finish(&self, seq: Seq, as_of_ms: u64, totals: Totals) -> Result<Applied, StandbyError> {
        let changeset = self.current_as(seq)?;
        let ops = changeset.ops.load(Ordering::Relaxed);
        if ops != totals.ops {
            return Err(StandbyError::Protocol(format!("{ops} operations came, {} were sent", totals.ops)));
        }
        self.check_space()?;
        self.drop_unfinished(&changeset)?;
        let staged = std::mem::take(&mut *lock(&changeset.unrecorded));
        let mut sync = Unrecorded { few: staged.few, ..Unrecorded::default() };
        self.store.write_lazily(|txn| insert_rows(txn, staged.rows))?;
        if changeset.baseline == Baseline::Full {
            self.remove_unnamed(&changeset)?;
        }
        self.make_links(&changeset, &mut sync)?;
        self.finish_trees(&mut sync)?;
        self.sync_staged(&sync)?;
        let committed = Applied { session: changeset.session, seq, as_of_ms };
        let mut standing = self.standing();
        standing.committed = Some(committed);
        self.store.write(|txn| Store::set_standing(txn, &standing))?;
        self.set_standing(standing);
        self.end_changeset();
        drop::<Arc<Changeset<D>>>(changeset);
        self.apply(committed)?;
        Ok(committed)
    }

    /// A changeset that names everything: what the tree has beyond it goes.
    fn remove_unnamed(&self, changeset: &Changeset<D>) -> Result<(), StandbyError> {
        let pending = self.store.view(PENDING)?;
        let mut rows = Vec::new();
        for number in 0..self.root_count() {
            let mut dirs = vec![RelPath::root()];
            while let Some(dir) = dirs.pop() {
                let root = RootId(number);
                for (name, row) in changeset.manifest.children::<ManifestRow>(root, &dir)? {
                    let path = dir.join(&name).map_err(|e| self.store.damaged(e.to_string()))?;
                    let named = pending.pending(root, &path)?;
                    match named {
                        None => rows.push((root, path, PendingRow { entry: None, action: Action::Remove, ino: 0 })),
                        // What is kept is kept with all below it.
                        Some(PendingRow { entry: Some(entry), action, .. })
                            if row.entry.is_dir() && entry.is_dir() && action != Action::Record =>
                        {
                            dirs.push(path);
                        }
                        Some(_) => {}
                    }
                    if rows.len() >= ROWS_AT_ONCE {
                        let some = std::mem::take(&mut rows);
                        self.store.write_lazily(|txn| insert_rows(txn, some))?;
                    }
                }
            }
        }
        self.store.write_lazily(|txn| insert_rows(txn, rows))
    }

    /// Makes the hard links, now that every file that they point to is staged or in the tree.
    fn make_links(&self, changeset: &Changeset<D>, sync: &mut Unrecorded) -> Result<(), StandbyError> {
        let pending = self.store.view(PENDING)?;
        let mut places = Places::new(self, changeset);
        let mut rows = Vec::new();
        self.store.for_each_key(LINKS, |k| {
            let (root, path) = pending.path_of(k)?;
            let Some(PendingRow { entry: Some(entry), .. }) = pending.pending(root, &path)? else { return Ok(()) };
            let Body::Hardlink { to } = &entry.body else { return Ok(()) };
            let (action, ino) = self.make_link(changeset, &pending, &mut places, root, &path, to)?;
            if let Some(at) = action.staged() {
                sync.few.add(root, at);
            }
            rows.push((root, path, PendingRow { entry: Some(entry), action, ino }));
            if rows.len() >= ROWS_AT_ONCE {
                let some = std::mem::take(&mut rows);
                self.store.write_lazily(|txn| insert_rows(txn, some))?;
            }
            Ok(())
        })?;
        self.store.write_lazily(|txn| insert_rows(txn, rows))
    }

    fn make_link(
        &self,
        changeset: &Changeset<D>,
        pending: &View,
        places: &mut Places<'_, D>,
        root: RootId,
        path: &RelPath,
        to: &RelPath,
    ) -> Result<(Action, u64), StandbyError> {
        let unknown = || StandbyError::UnknownTarget { root, path: path.clone() };
        let disk = &self.disk;
        let target = pending.pending(root, to)?;
        if target.as_ref().is_some_and(|row| row.entry.as_ref().and_then(Entry::digest).is_none()) {
            return Err(unknown());
        }
        let staged = target.as_ref().and_then(|row| row.action.staged().cloned());
        let (from, from_name) = match &staged {
            Some(at) => self.staged_dir(root, at)?,
            None => {
                let known = changeset.manifest.manifest(root, to)?.ok_or_else(unknown)?;
                known.entry.digest().ok_or_else(unknown)?;
                let here = changeset.manifest.manifest(root, path)?;
                if here.is_some_and(|row| row.ino == known.ino && matches!(&row.entry.body, Body::Hardlink { to: old } if old == to)) {
                    return Ok((Action::Record, known.ino)); // tied already
                }
                let dir = disk.open_dir(&self.root(root).dir, to.parent_bytes()).map_err(io("opening the folder of", to.as_bytes()))?;
                (dir, to.name().to_vec())
            }
        };
        let (spot, name, action) = places.spot(root, path)?;
        create(path, || disk.link(&from, &from_name, spot.dir(), &name), || disk.remove_file(spot.dir(), &name))?;
        // The attributes are the file's, and set with it: it may be one of the tree, which is not touched before the commit.
        let stat = disk.stat(spot.dir(), &name).map_err(io("examining the link", path.as_bytes()))?;
        Ok((action, stat.ino))
    }

    /// Gives the folders of staged trees their attributes, the deepest first, now that nothing changes in them.
    fn finish_trees(&self, sync: &mut Unrecorded) -> Result<(), StandbyError> {
        let pending = self.store.view(PENDING)?;
        pending.for_each_reversed(|root, path, row: PendingRow| {
            let (Some(entry), Some(at)) = (&row.entry, row.action.staged()) else { return Ok(()) };
            if !entry.is_dir() {
                return Ok(());
            }
            let (dir, name) = self.staged_dir(root, at)?;
            let own = self.disk.open_dir(&dir, &name).map_err(io("opening the staged folder", path.as_bytes()))?;
            let xattrs = xattrs(entry);
            self.disk.set_attributes_of_dir(&own, &attributes(entry, &xattrs)).map_err(io("setting the attributes of", path.as_bytes()))?;
            sync.few.add(root, at);
            Ok(())
        })
    }

    /// Makes the changeset's rows the manifest and forgets the changeset, in one transaction.
    pub(crate) fn record_applied(&self, applied: Applied) -> Result<(), StandbyError> {
        let mut standing = self.standing();
        standing.committed = None;
        standing.applied = Some(applied);
        self.store.write(|txn| {
            {
                use redb::ReadableTable;
                let pending = txn.open_table(PENDING)?;
                let mut manifest = txn.open_table(crate::store::MANIFEST)?;
                for row in pending.iter()? {
                    let (k, v) = row?;
                    let decoded: Result<PendingRow, _> = codec::decode(v.value());
                    let row = decoded.map_err(|e| redb::Error::Corrupted(format!("a pending row: {e}")))?;
                    let was_dir = match &row.entry {
                        Some(entry) => {
                            let is_dir = entry.is_dir();
                            let new = codec::encode(&ManifestRow { entry: entry.clone(), ino: row.ino });
                            let old = manifest.insert(k.value(), new.as_slice())?;
                            old.is_some_and(|old| is_manifest_dir(old.value())) && !is_dir
                        }
                        None => manifest.remove(k.value())?.is_some_and(|old| is_manifest_dir(old.value())),
                    };
                    if was_dir && let Ok((root, path)) = key::decode(k.value()) {
                        for range in [key::children(root, &path), key::deeper(root, &path)] {
                            manifest.retain_in(range.start.as_slice()..range.end.as_slice(), |_, _| false)?;
                        }
                    }
                }
            }
            crate::standby::clear(txn)?;
            Store::set_standing(txn, &standing)
        })?;
        self.set_standing(standing);
        Ok(())
    }
}

fn is_manifest_dir(bytes: &[u8]) -> bool {
    matches!(codec::decode::<ManifestRow>(bytes), Ok(row) if row.entry.is_dir())
}

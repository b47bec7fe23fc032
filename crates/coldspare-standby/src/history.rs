//! History: what changesets take from the tree stays for a while, so that a point before can be had again.
//!
//! Before the commit a file that will be replaced or removed gets a second name below `.coldspare/history/<n>`; a folder
//! that goes as a whole is moved there when the changeset is applied, instead of into the trash. The transaction that makes
//! the changeset the manifest writes, for each path that changed, the row that the manifest had before. So there is, for
//! each point, what leads back to the one before it.
//!
//! Invariants: files of the tree are never written into, only replaced, so that a second name keeps what it named; what
//! would vanish has its name in the history, durably, before it loses the one in the tree; the rows are there exactly when
//! the changeset is the tree.

use std::collections::BTreeMap;
use std::io::ErrorKind;

use coldspare_core::control::Applied;
use coldspare_core::{Body, RelPath, RootId, key, seeded_bug};
use coldspare_os::{Disk, FileKind};
use redb::{ReadableTable, ReadableTableMetadata, WriteTransaction};

use crate::apply::is_own;
use crate::divergence::Divergence;
use crate::error::{StandbyError, io};
use crate::points::PointNo;
use crate::purge::trash_name;
use crate::row::{Action, HistoryRow, ManifestRow, PendingRow, PointRow};
use crate::standby::{Changeset, Few, Standby, Unrecorded};
use crate::store::{HISTORY, META, PENDING, POINTS};

/// In the table of numbers: the oldest point that can be had, and the number of the next one.
pub(crate) const FLOOR: &str = "history_floor";
pub(crate) const NEXT: &str = "history_next";

/// What a file takes at least, as it is counted.
const BLOCK_BYTES: u64 = 4096;
const EPERM: i32 = 1;
const EMLINK: i32 = 31;

impl<D: Disk> Standby<D> {
    /// Gives every file that the staged changeset replaces or removes a name in the history, before the commit.
    ///
    /// What a crash or a failure leaves of it is links to files of the tree, which go with the folder.
    ///
    /// Cost: a pass over the changeset's rows; for each file that leaves the tree one link; two fsyncs a root, which the
    /// journal of most filesystems makes one with those of the staged content.
    pub(crate) fn keep_replaced(&self, changeset: &Changeset<D>, committed: Applied, sync: &mut Unrecorded) -> Result<(), StandbyError> {
        let Some(point) = self.next_kept()? else { return Ok(()) };
        let divergence = self.divergence(committed)?;
        let manifest = &changeset.manifest;
        let mut keeper = Keeper { standby: self, point, folders: BTreeMap::new(), from: None, has_copied: false };
        self.store.view(PENDING)?.for_each_reversed(|root, path, row: PendingRow| {
            let below = match &row.action {
                Action::Rename { from } => from.clone(),
                Action::Place { .. } | Action::Remove => {
                    let Some(old) = manifest.manifest(root, &path)? else { return Ok(()) };
                    keeper.folder(root)?;
                    if !old.entry.is_dir() {
                        return keeper.keep(root, &path, &old);
                    }
                    // A folder goes as a whole, but for one that goes to quarantine.
                    if divergence.of(root, &path).is_none() {
                        return Ok(());
                    }
                    path
                }
                _ => return Ok(()),
            };
            manifest.for_each_below(root, &below, &mut |root, path, old: ManifestRow| {
                if !old.entry.is_dir() {
                    keeper.keep(root, &path, &old)?;
                }
                Ok(true)
            })
        })?;
        let Keeper { folders, has_copied, .. } = keeper;
        if has_copied {
            sync.few = Few(None);
        }
        if sync.few.0.is_some() && !seeded_bug!(HistoryIsNotSynced) {
            for (root, folder) in folders {
                self.synced(self.disk.sync_dir(&folder).map_err(io("syncing", HISTORY_DIR)))?;
                self.synced(self.disk.sync_dir(&self.root(root).history).map_err(io("syncing", HISTORY_DIR)))?;
            }
        }
        Ok(())
    }

    /// The number of the point that the next changeset leads to, if there is one before it to be had again.
    pub(crate) fn next_kept(&self) -> Result<Option<PointNo>, StandbyError> {
        if self.applied().is_none() || seeded_bug!(HistoryIsNotKept) {
            return Ok(None);
        }
        self.next_point().map(Some)
    }

    /// The folder of what a changeset replaced, made when it isn't there.
    fn kept_folder(&self, root: RootId, point: PointNo) -> Result<D::Dir, StandbyError> {
        let history = &self.root(root).history;
        let name = point.to_string();
        match self.disk.create_dir(history, name.as_bytes()) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            made => made.map_err(io("making the folder", HISTORY_DIR))?,
        }
        self.disk.open_dir(history, name.as_bytes()).map_err(io("opening the folder", HISTORY_DIR))
    }

    /// Moves a folder that leaves the tree to the history.
    pub(crate) fn shelve(&self, root: RootId, point: PointNo, (dir, name): (&D::Dir, &[u8]), path: &RelPath) -> Result<(), StandbyError> {
        let folder = self.kept_folder(root, point)?;
        let to = trash_name(root, path);
        if self.disk.stat(&folder, &to).is_ok() {
            // From before a crash; the same path can't leave twice in one changeset.
            self.quarantine(root, &folder, &to, path)?;
        }
        self.disk.rename(dir, name, &folder, &to).map_err(io("moving to the history", path.as_bytes()))
    }

    /// Makes durable what was moved to the history.
    pub(crate) fn sync_shelved(&self, root: RootId, point: PointNo) -> Result<(), StandbyError> {
        let folder = self.kept_folder(root, point)?;
        for dir in [&folder, &self.root(root).history] {
            self.disk.sync_dir(dir).map_err(io("syncing", HISTORY_DIR))?;
        }
        Ok(())
    }

    /// Where the history has what stood at `path`: a folder, and the name in it.
    ///
    /// # Errors
    /// `Io`, `NotFound` among them.
    pub(crate) fn kept_place(&self, root: RootId, path: &RelPath, kept: Kept) -> std::io::Result<(D::Dir, Vec<u8>)> {
        let folder = self.disk.open_dir(&self.root(root).history, kept.point.to_string().as_bytes())?;
        let top = top_of(path, kept.depth);
        let name = trash_name(root, &top);
        let below = path.below(&top).unwrap_or_default();
        match below.iter().rposition(|&b| b == b'/') {
            _ if below.is_empty() => Ok((folder, name)),
            None => Ok((self.disk.open_dir(&folder, &name)?, below.to_vec())),
            Some(at) => Ok((self.disk.open_dir(&folder, &[&name, b"/".as_slice(), &below[..at]].concat())?, below[at + 1..].to_vec())),
        }
    }
}

/// Where the history has the content of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kept {
    /// Whose changeset took it from the tree.
    pub(crate) point: PointNo,
    /// As [`HistoryRow::kept`].
    pub(crate) depth: u16,
}

/// The first `depth` components of a path.
pub(crate) fn top_of(path: &RelPath, depth: u16) -> RelPath {
    path.ancestors().chain([path.clone()]).find(|p| depth_of(p) == depth).unwrap_or_else(|| path.clone())
}

pub(crate) fn depth_of(path: &RelPath) -> u16 {
    u16::try_from(path.components().count()).unwrap_or(u16::MAX)
}

/// The folder of the history in the control folder of each root.
pub(crate) const HISTORY_DIR: &[u8] = b"history";

/// Makes the names in the history.
struct Keeper<'a, D: Disk> {
    standby: &'a Standby<D>,
    point: PointNo,
    folders: BTreeMap<RootId, D::Dir>,
    /// The folder of the tree that was opened last.
    from: Option<(RootId, RelPath, D::Dir)>,
    has_copied: bool,
}

impl<D: Disk> Keeper<'_, D> {
    fn folder(&mut self, root: RootId) -> Result<(), StandbyError> {
        if !self.folders.contains_key(&root) {
            self.folders.insert(root, self.standby.kept_folder(root, self.point)?);
        }
        Ok(())
    }

    fn keep(&mut self, root: RootId, path: &RelPath, old: &ManifestRow) -> Result<(), StandbyError> {
        self.folder(root)?;
        let disk = &self.standby.disk;
        let above = path.parent().unwrap_or_else(RelPath::root);
        if self.from.as_ref().is_none_or(|(r, p, _)| (*r, p) != (root, &above)) {
            // Somebody removed it here, or put something in its place: there is nothing of ours to keep.
            let Ok(dir) = disk.open_dir(&self.standby.root(root).dir, above.as_bytes()) else { return Ok(()) };
            self.from = Some((root, above, dir));
        }
        let (Some((_, _, dir)), Some(to)) = (&self.from, self.folders.get(&root)) else { return Ok(()) };
        let Ok(stat) = disk.stat(dir, path.name()) else { return Ok(()) };
        if !is_own(Some(old), &stat) {
            return Ok(());
        }
        let name = trash_name(root, path);
        let fail = || io("keeping in the history", path.as_bytes());
        match disk.link(dir, path.name(), to, &name) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                // Of an earlier try.
                if disk.stat(to, &name).map_err(fail())?.ino == stat.ino {
                    return Ok(());
                }
                disk.remove_file(to, &name).and_then(|()| disk.link(dir, path.name(), to, &name)).map_err(fail())
            }
            // LIMIT: names of a file, 65,000 on ext4; and not every filesystem has links.
            Err(e) if matches!(e.raw_os_error(), Some(EMLINK | EPERM)) && stat.kind == FileKind::File => {
                self.has_copied = true;
                self.standby.copy_file((dir, path.name()), (to, &name), path, old)
            }
            Err(e) => Err(fail()(e)),
        }
    }
}

impl<D: Disk> Standby<D> {
    /// Makes a file of its own of what `row` says; blocks are shared where the filesystem can.
    pub(crate) fn copy_file(
        &self,
        (dir, name): (&D::Dir, &[u8]),
        (to, to_name): (&D::Dir, &[u8]),
        path: &RelPath,
        row: &ManifestRow,
    ) -> Result<(), StandbyError> {
        let fail = || io("copying", path.as_bytes());
        let source = self.disk.open_file(dir, name).map_err(fail())?;
        let size = self.disk.stat_file(&source).map_err(fail())?.size;
        let file = crate::stage::create(path, || self.disk.create_file(to, to_name), || self.disk.remove_file(to, to_name))?;
        self.disk.copy_range(&source, 0, &file, 0, size).map_err(fail())?;
        self.set_file_attributes(&file, path, &row.entry).map(drop)
    }
}

/// Writes what a changeset replaces, in the transaction that makes it the manifest.
pub(crate) struct Undo<'a, 'txn> {
    rows: redb::Table<'txn, &'static [u8], &'static [u8]>,
    divergence: &'a Divergence,
    point: PointNo,
    changes: u64,
    bytes: u64,
}

impl<'a, 'txn> Undo<'a, 'txn> {
    pub(crate) fn new(txn: &'txn WriteTransaction, divergence: &'a Divergence, point: PointNo) -> Result<Undo<'a, 'txn>, redb::Error> {
        Ok(Undo { rows: txn.open_table(HISTORY)?, divergence, point, changes: 0, bytes: 0 })
    }

    /// Takes note that the manifest had `old` under `key`, and has something else now.
    pub(crate) fn changed(&mut self, key: &[u8], old: Option<&[u8]>, row: &PendingRow) -> Result<(), redb::Error> {
        let Ok((root, path)) = key::decode(key) else { return Ok(()) };
        let old = old.map(|old| read(key, old)).transpose()?;
        let leaves = matches!(row.action, Action::Place { .. } | Action::Remove);
        let kept = match &old {
            Some(old) if leaves && old.entry.is_dir() && self.divergence.of(root, &path).is_some() => 0,
            Some(_) if leaves => depth_of(&path),
            _ => 0,
        };
        let frees = kept > 0;
        self.note(key, HistoryRow { old, kept }, frees)
    }

    /// Takes note that what the manifest had under `key` went with the folder `top`.
    pub(crate) fn went_with(&mut self, top: &RelPath, key: &[u8], old: &[u8]) -> Result<(), redb::Error> {
        let Ok((root, path)) = key::decode(key) else { return Ok(()) };
        let old = read(key, old)?;
        let is_quarantined = self.divergence.of(root, top).is_some();
        let kept = match (is_quarantined, old.entry.is_dir()) {
            (false, _) => depth_of(top),
            (true, true) => 0,
            (true, false) => depth_of(&path),
        };
        self.note(key, HistoryRow { old: Some(old), kept }, true)
    }

    /// Takes note that a row went from one key to another, with what it tells of.
    pub(crate) fn moved(&mut self, from: &[u8], to: &[u8], old: &[u8]) -> Result<(), redb::Error> {
        let Ok((_, path)) = key::decode(from) else { return Ok(()) };
        let old = read(from, old)?;
        let kept = if old.entry.is_dir() { 0 } else { depth_of(&path) };
        self.note(from, HistoryRow { old: Some(old), kept }, false)?;
        self.note(to, HistoryRow { old: None, kept: 0 }, false)
    }

    fn note(&mut self, key: &[u8], row: HistoryRow, frees: bool) -> Result<(), redb::Error> {
        let own = history_key(self.point, key);
        if self.rows.get(own.as_slice())?.is_some() {
            return Ok(()); // known from the folder that it went or came with
        }
        let size = match row.old.as_ref().map(|old| &old.entry.body) {
            Some(Body::File { size, .. }) if frees => size.next_multiple_of(BLOCK_BYTES),
            _ => 0,
        };
        let value = row.seal(&own);
        self.changes += 1;
        self.bytes += size + (own.len() + value.len()) as u64;
        self.rows.insert(own.as_slice(), value.as_slice())?;
        Ok(())
    }

    /// Ends with the rows of the point itself, and of the one before it where there was none yet.
    pub(crate) fn finish(self, txn: &WriteTransaction, made: PointRow, before: Applied) -> Result<(), redb::Error> {
        let Undo { point: PointNo(no), changes, bytes, rows, .. } = self;
        drop(rows);
        let mut points = txn.open_table(POINTS)?;
        let mut meta = txn.open_table(META)?;
        let floor = meta.get(FLOOR)?.map_or(0, |v| v.value());
        if points.is_empty()? && floor < no {
            // The tree that was there before the first changeset of this store.
            let first = PointRow { applied: before, changes: 0, bytes: 0, is_rewind: false, ..made.clone() };
            points.insert(no - 1, coldspare_core::codec::encode(&first).as_slice())?;
            meta.insert(FLOOR, no - 1)?;
        }
        points.insert(no, coldspare_core::codec::encode(&PointRow { changes, bytes, ..made }).as_slice())?;
        meta.insert(NEXT, no + 1)?;
        Ok(())
    }
}

/// The first tree of a store is a point, with nothing before it.
pub(crate) fn begin(txn: &WriteTransaction, point: PointNo, made: &PointRow) -> Result<(), redb::Error> {
    txn.open_table(POINTS)?.insert(point.0, coldspare_core::codec::encode(made).as_slice())?;
    let mut meta = txn.open_table(META)?;
    meta.insert(FLOOR, point.0)?;
    meta.insert(NEXT, point.0 + 1)?;
    Ok(())
}

/// Nothing before the next changeset can be had again: the manifest changed in another way than by a changeset.
pub(crate) fn cut(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.delete_table(POINTS)?;
    txn.open_table(POINTS)?;
    let mut meta = txn.open_table(META)?;
    let next = meta.get(NEXT)?.map_or(FIRST, |v| v.value());
    meta.insert(FLOOR, next)?;
    Ok(())
}

/// The number of the first point.
pub(crate) const FIRST: u64 = 1;

/// The key of a path in the history of a changeset.
pub(crate) fn history_key(point: PointNo, key: &[u8]) -> Vec<u8> {
    [&point.0.to_be_bytes(), key].concat()
}

fn read(key: &[u8], value: &[u8]) -> Result<ManifestRow, redb::Error> {
    use crate::row::Record;
    ManifestRow::read(key, value).map_err(redb::Error::Corrupted)
}

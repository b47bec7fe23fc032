//! Going back to a point.
//!
//! What the changesets behind the point replaced is put together, for each path the row that it had then, and becomes one
//! changeset of this host's own: staged out of the history by links, committed and applied as any other. What it takes from
//! the tree goes to the history, so that it can be undone in turn.
//!
//! Invariants: that a person wants it is durable first, and it is finished at the next start whatever happens meanwhile;
//! afterwards no changeset of the active is taken until a person says so, or the tree is the last one that it brought.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;

use coldspare_core::control::Applied;
use coldspare_core::{Baseline, Body, Entry, RelPath, RootId, key};
use coldspare_os::Disk;

use crate::apply::Touched;
use crate::assemble::Assemblies;
use crate::error::{StandbyError, io};
use crate::history::{Kept, history_key};
use crate::place::Places;
use crate::points::{POINT_BYTES, Point, PointNo};
use crate::row::{Action, HistoryRow, ManifestRow, PendingRow, Rewind};
use crate::stage::{attributes, insert_rows, is_content, xattrs};
use crate::standby::{Changeset, Standby, Unrecorded};
use crate::store::{HISTORY, MANIFEST, Store, View};

/// Rows that are written to the store at once.
const ROWS_AT_ONCE: usize = 10_000;

/// What a path was at a point.
pub(crate) struct Before {
    /// Its row then; `None` where there was nothing.
    pub(crate) row: Option<ManifestRow>,
    /// Where the history has its content; `None` while that is in the tree.
    pub(crate) kept: Option<Kept>,
}

/// What was changed since a point, by the keys of the paths.
pub(crate) type Undone = BTreeMap<Vec<u8>, Before>;

impl<D: Disk> Standby<D> {
    /// Brings the tree back to a point, durably; what it is then.
    ///
    /// Nothing is staged or applied meanwhile. After an error before the commit the tree is as it was; after a kill the next
    /// [`Standby::open`] does the rest.
    ///
    /// Cost: as a changeset that changes as many paths, with links for content, which is read once; memory for each path that
    /// changed since.
    ///
    /// # Errors
    /// `UnknownPoint`; `NotKept` when the history lacks something, or has other content; `Io`, `Store`, `Damaged`, `OutOfSpace`.
    pub fn rewind(&self, to: PointNo) -> Result<Applied, StandbyError> {
        let _nothing_goes = self.history_lock.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(committed) = self.standing().committed {
            self.apply(committed)?;
        }
        let point = self.point(to)?;
        let before = self.standing().rewind;
        self.want_rewind(Some(Rewind { to: to.0, is_done: false }))?;
        let applied = self.go_back(&point);
        if applied.is_err() && self.standing().committed.is_none() {
            self.want_rewind(before)?;
        }
        applied
    }

    /// The point to which a person brought the standby, where it stays.
    pub fn rewound(&self) -> Option<PointNo> {
        self.standing().rewind.map(|rewind| PointNo(rewind.to))
    }

    /// Takes changesets again after the standby was brought back to a point: the active has to name everything.
    /// Whether it was.
    ///
    /// # Errors
    /// `Store`.
    pub fn resume(&self) -> Result<bool, StandbyError> {
        let mut standing = self.standing();
        if standing.rewind.take().is_none() {
            return Ok(false);
        }
        self.store.write(|txn| {
            Store::set_resumed(txn, true)?;
            Store::set_standing(txn, &standing)
        })?;
        self.set_standing(standing);
        Ok(true)
    }

    /// Finishes what a kill interrupted.
    pub(crate) fn finish_rewind(&self) -> Result<(), StandbyError> {
        let Some(rewind) = self.standing().rewind.filter(|rewind| !rewind.is_done) else { return Ok(()) };
        tracing::info!(point = rewind.to, "going back to a point");
        match self.rewind(PointNo(rewind.to)) {
            Ok(_) => Ok(()),
            Err(e @ (StandbyError::UnknownPoint(_) | StandbyError::NotKept { .. })) => {
                tracing::error!(error = %e, "the standby can't be brought back to the point");
                self.want_rewind(None)
            }
            Err(e) => Err(e),
        }
    }

    fn want_rewind(&self, rewind: Option<Rewind>) -> Result<(), StandbyError> {
        let standing = crate::row::Standing { rewind, ..self.standing() };
        self.store.write(|txn| Store::set_standing(txn, &standing))?;
        self.set_standing(standing);
        Ok(())
    }

    pub(crate) fn point(&self, no: PointNo) -> Result<Point, StandbyError> {
        self.points()?.into_iter().find(|point| point.no == no).ok_or(StandbyError::UnknownPoint(no))
    }

    /// What changed between a point and the tree as it is.
    pub(crate) fn undone(&self, to: PointNo, history: &View) -> Result<Undone, StandbyError> {
        let mut undone = Undone::new();
        let last = self.next_point()?.0 - 1;
        for point in (to.0 + 1..=last).rev().map(PointNo) {
            history.for_each_raw_in(history_key(point, b"")..history_key(PointNo(point.0 + 1), b""), |k, v| {
                let HistoryRow { old, kept } = HistoryRow::read(k, v).map_err(|e| self.store.damaged(e))?;
                let later = undone.remove(&k[POINT_BYTES..]).and_then(|before: Before| before.kept);
                let own = (kept > 0).then_some(Kept { point, depth: kept });
                // What didn't leave the tree with this changeset was there until a later one took it.
                let kept = own.or(later).filter(|_| old.is_some());
                undone.insert(k[POINT_BYTES..].to_vec(), Before { row: old, kept });
                Ok(true)
            })?;
        }
        Ok(undone)
    }

    fn go_back(&self, point: &Point) -> Result<Applied, StandbyError> {
        self.abandon()?;
        self.keep_left_over()?;
        let undone = self.undone(point.no, &self.store.view(HISTORY)?)?;
        let changeset = Changeset {
            session: point.applied.session,
            seq: point.applied.seq,
            tag: self.fresh_name(),
            baseline: Baseline::Delta(point.applied.seq),
            manifest: self.store.view(MANIFEST)?,
            left: None,
            taken: Default::default(),
            unrecorded: Default::default(),
            assemblies: Assemblies::default(),
            rebuilds: Default::default(),
            ops: AtomicU64::new(0),
            recorder: Default::default(),
        };
        let mut sync = Unrecorded::default();
        let staged = self.stage_undone(&changeset, point.no, &undone, &mut sync);
        drop(undone);
        let committed = staged.and_then(|()| self.commit_rewind(&changeset, point.applied, &mut sync));
        if committed.is_err() && self.standing().committed.is_none() {
            self.store.write(crate::standby::clear)?;
            self.sweep();
        }
        committed?;
        drop(changeset);
        self.apply(point.applied)?;
        Ok(point.applied)
    }

    fn commit_rewind(&self, changeset: &Changeset<D>, committed: Applied, sync: &mut Unrecorded) -> Result<(), StandbyError> {
        self.check_folders(changeset)?;
        self.finish_trees(sync)?;
        self.order_forks(changeset)?;
        self.keep_replaced(changeset, committed, sync)?;
        self.sync_staged(sync)?;
        let mut standing = self.standing();
        standing.committed = Some(committed);
        self.store.write(|txn| Store::set_standing(txn, &standing))?;
        self.set_standing(standing);
        Ok(())
    }

    /// Stages what differs from the point.
    fn stage_undone(&self, changeset: &Changeset<D>, to: PointNo, undone: &Undone, sync: &mut Unrecorded) -> Result<(), StandbyError> {
        let mut places = Places::new(self, changeset);
        let mut rows = Vec::new();
        // Folders come before what is in them.
        for (k, before) in undone {
            let (root, path) = key::decode(k).map_err(|e| self.store.damaged(e.to_string()))?;
            let now = changeset.manifest.manifest(root, &path)?;
            if now == before.row {
                continue;
            }
            let row = match &before.row {
                None => {
                    // With a folder that goes, or becomes a file, goes what it has.
                    let goes = |above: RelPath| {
                        undone.get(&key::encode(root, &above)).is_some_and(|b| !b.row.as_ref().is_some_and(|row| row.entry.is_dir()))
                    };
                    if path.ancestors().any(goes) {
                        continue;
                    }
                    PendingRow::new(None, Action::Remove, 0)
                }
                Some(row) => self.stage_before(&mut places, (root, &path), row, before.kept, now.as_ref(), to)?,
            };
            if let Some(at) = row.action.staged() {
                sync.few.add(root, at);
            }
            rows.push((root, path, row));
            if rows.len() >= ROWS_AT_ONCE {
                let some = std::mem::take(&mut rows);
                self.store.write_lazily(|txn| insert_rows(txn, some))?;
            }
        }
        self.store.write_lazily(|txn| insert_rows(txn, rows))
    }

    fn stage_before(
        &self,
        places: &mut Places<'_, D>,
        (root, path): (RootId, &RelPath),
        row: &ManifestRow,
        kept: Option<Kept>,
        now: Option<&ManifestRow>,
        to: PointNo,
    ) -> Result<PendingRow, StandbyError> {
        let entry = row.entry.clone();
        if entry.is_dir() {
            return Ok(PendingRow::new(Some(entry), self.stage_dir(places, root, path)?, 0));
        }
        let found = kept.and_then(|kept| {
            let (from, from_name) = self.kept_place(root, path, kept).ok()?;
            let stat = self.disk.stat(&from, &from_name).ok()?;
            Some((from, from_name, stat))
        });
        // Somebody may have written into it: before it left the tree, or since.
        let found = match found {
            Some((from, from_name, _))
                if matches!(entry.body, Body::File { .. }) && !self.is_as_kept(&from, &from_name, path, &entry)? =>
            {
                None
            }
            found => found,
        };
        let Some((from, from_name, found)) = found else {
            // Only its attributes changed, or the same content came again.
            let now = now.filter(|now| now.entry.body == entry.body);
            let now = now.ok_or_else(|| StandbyError::NotKept { point: to, path: path.clone() })?;
            let action = if matches!(entry.body, Body::Hardlink { .. }) { Action::Record } else { Action::Attributes };
            return Ok(PendingRow::new(Some(entry), action, now.ino));
        };
        let (spot, name, action) = places.spot(root, path)?;
        crate::stage::create(path, || self.disk.link(&from, &from_name, spot.dir(), &name), || self.disk.remove_file(spot.dir(), &name))?;
        // Its attributes are set once it is in place: it may be a name of a file of the tree.
        Ok(PendingRow::new(Some(entry), action, found.ino))
    }

    /// Whether what the history has under a name is a file of this content.
    fn is_as_kept(&self, dir: &D::Dir, name: &[u8], path: &RelPath, entry: &Entry) -> Result<bool, StandbyError> {
        let fail = || io("reading in the history", path.as_bytes());
        let file = self.disk.open_file(dir, name).map_err(fail())?;
        is_content(&self.disk, &file, entry).map_err(fail())
    }

    /// Gives what came out of the history the attributes that it had: another name of a file may have got others since.
    pub(crate) fn settle_restored(&self, pending: &View, touched: &mut Touched) -> Result<(), StandbyError> {
        pending.for_each_reversed(|root, path, row: PendingRow| {
            let (Some(entry), Some(_)) = (&row.entry, row.action.staged()) else { return Ok(()) };
            if !matches!(entry.body, Body::File { .. }) {
                return Ok(());
            }
            let Ok(dir) = self.disk.open_dir(&self.root(root).dir, path.parent_bytes()) else { return Ok(()) };
            let Ok(found) = self.disk.stat(&dir, path.name()) else { return Ok(()) };
            let xattrs = xattrs(entry);
            let set = self.disk.set_attributes(&dir, path.name(), &attributes(entry, &xattrs));
            if set.map_err(io("setting the attributes of", path.as_bytes()))?.ctime != found.ctime {
                touched.add(root, path);
            }
            Ok(())
        })
    }
}

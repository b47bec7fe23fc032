//! Commit: from a staged changeset to one that will be applied whatever happens.
//!
//! Invariants: nothing is committed before all its content is durable; after the commit nothing may fail but for
//! trouble with the disk, and then the same steps are taken again at the next start.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use coldspare_core::changeset::Totals;
use coldspare_core::control::Applied;
use coldspare_core::git::family::{Alternate, Repository, alternates};
use coldspare_core::git::{self, ALTERNATES, FIRST_WAVE};
use coldspare_core::{Baseline, Body, Entry, RelPath, RootId, Seq, codec, key, seeded_bug};
use coldspare_os::Disk;

use crate::divergence::Divergence;
use crate::error::{StandbyError, io};
use crate::history::{self, Undo};
use crate::place::Places;
use crate::points::PointNo;
use crate::row::{Action, ManifestRow, PendingRow, PointRow, Record};
use crate::stage::{attributes, create, insert_rows, order_of, xattrs};
use crate::standby::{Changeset, Standby, Unrecorded, lock};
use crate::store::{INCOMPLETE, KEPT, LINKS, NAMED, ORDER, PENDING, Store, UNSETTLED, View, WANTED};

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
    pub fn finish(&self, seq: Seq, as_of_ms: u64, totals: Totals) -> Result<Finished, StandbyError> {
        let changeset = self.current_as(seq)?;
        let ops = changeset.ops.load(Ordering::Relaxed);
        if ops != totals.ops {
            return Err(StandbyError::Protocol(format!("{ops} operations came, {} were sent", totals.ops)));
        }
        self.make_room()?;
        self.drop_given_up(&changeset)?;
        let staged = std::mem::take(&mut *lock(&changeset.unrecorded));
        let mut sync = Unrecorded { few: staged.few, ..Unrecorded::default() };
        self.store.write_lazily(|txn| insert_rows(txn, staged.rows))?;
        self.rebuild_all(&changeset, &mut sync)?;
        self.take_back_kept(&changeset, &mut sync)?;
        // Before references are looked at: what goes unnamed is not there then.
        if changeset.baseline == Baseline::Full && !seeded_bug!(UnnamedStays) {
            self.remove_unnamed(&changeset)?;
        }
        let incomplete = self.take_back_incomplete(&changeset, &mut sync)?;
        self.check_renames()?;
        if !seeded_bug!(FoldersAreNotChecked) {
            self.check_folders(&changeset)?;
        }
        let committed = Applied { session: changeset.session, seq, as_of_ms };
        // What the first changeset of a session takes away is kept in quarantine.
        let passed = if self.is_first_of_session(committed) { None } else { Some(self.check_brakes(&changeset)?) };
        self.make_links(&changeset, &mut sync)?;
        self.finish_trees(&mut sync)?;
        self.order_forks(&changeset)?;
        self.list_divergence(&changeset, committed)?;
        self.keep_replaced(&changeset, committed, &mut sync)?;
        self.sync_staged(&sync)?;
        if seeded_bug!(AppliedBeforeCommit) {
            self.apply(committed)?;
        }
        let mut standing = self.standing();
        standing.committed = Some(committed);
        let is_first = self.is_first_of_session(committed);
        let still_incomplete = self.still_incomplete(&changeset, &incomplete)?;
        self.store.write(|txn| {
            txn.delete_table(INCOMPLETE)?;
            let mut table = txn.open_table(INCOMPLETE)?;
            for (root, path) in &still_incomplete {
                table.insert(key::encode(*root, path).as_slice(), ())?;
            }
            drop(table);
            if is_first {
                begin_unsettled(txn)?;
            }
            if changeset.baseline == Baseline::Full {
                Store::set_distrusted(txn, false)?;
                Store::set_resumed(txn, false)?;
            }
            if let Some(passed) = &passed {
                passed.record(txn)?;
            }
            Store::set_standing(txn, &standing)
        })?;
        self.set_standing(standing);
        self.end_changeset();
        drop::<Arc<Changeset<D>>>(changeset);
        self.apply(committed)?;
        if !incomplete.is_empty() {
            self.left_out.store(seq.0, Ordering::Relaxed);
        }
        Ok(Finished { applied: committed, incomplete })
    }

    /// The repositories that stay incomplete: those found now, and those of before of which nothing came.
    fn still_incomplete(&self, changeset: &Changeset<D>, found: &[Repository]) -> Result<BTreeSet<Repository>, StandbyError> {
        let mut still = self.incomplete_outside(changeset)?;
        still.extend(found.iter().cloned());
        Ok(still)
    }

    /// The repositories that were incomplete before, and of which the changeset brings nothing; one that names everything
    /// leaves none out.
    pub(crate) fn incomplete_outside(&self, changeset: &Changeset<D>) -> Result<BTreeSet<Repository>, StandbyError> {
        let mut outside = BTreeSet::new();
        if changeset.baseline == Baseline::Full {
            return Ok(outside);
        }
        let pending = self.store.view(PENDING)?;
        for (root, path) in self.incomplete()? {
            let mut came = pending.pending(root, &path)?.is_some();
            pending.for_each_below(root, &path, &mut |_, _, _: PendingRow| {
                came = true;
                Ok(false)
            })?;
            if !came {
                outside.insert((root, path));
            }
        }
        Ok(outside)
    }

    /// Puts forks behind the repositories that they borrow objects from, and before them when they go, so that no
    /// reader meets one without the other.
    pub(crate) fn order_forks(&self, changeset: &Changeset<D>) -> Result<(), StandbyError> {
        let pending = self.store.view(PENDING)?;
        let roots: Vec<&[u8]> = self.roots.iter().map(|root| root.path.as_os_str().as_encoded_bytes()).collect();
        let mut parents: BTreeMap<Repository, Vec<Repository>> = BTreeMap::new();
        let mut moved = Vec::new();
        pending.for_each_reversed(|root, path, row: PendingRow| {
            if let (Action::Carried { at }, Some(repository)) = (&row.action, git::borrower(&path)) {
                let (dir, name) = self.staged_dir(root, at)?;
                let mut content = vec![0; 64 << 10];
                let read = self.disk.open_file(&dir, &name).and_then(|file| self.disk.read_at(&file, 0, &mut content));
                content.truncate(read.unwrap_or(0));
                let at = (root, repository);
                let found = alternates(&content, &at, &roots).into_iter().filter_map(|alternate| match alternate {
                    Alternate::Replicated(parent) => Some(parent),
                    Alternate::Elsewhere => None,
                });
                parents.insert(at.clone(), found.collect());
            }
            if row.action == Action::Remove
                && let Ok(alternates) = path.join_path(ALTERNATES)
                && changeset.manifest.manifest(root, &alternates)?.is_some()
            {
                moved.push((root, path, PendingRow { wave: FIRST_WAVE - 1, ..row }));
            }
            Ok(())
        })?;
        for at in parents.keys() {
            let depth = depth_of(at, &parents, 0);
            // The new tree that the fork comes with.
            let tops = at.1.ancestors().chain([at.1.clone()]);
            for top in tops {
                if let Some(row) = pending.pending(at.0, &top)?
                    && matches!(row.action, Action::Place { .. })
                {
                    moved.push((at.0, top, PendingRow { wave: FIRST_WAVE + depth, ..row }));
                    break;
                }
            }
        }
        if moved.is_empty() || seeded_bug!(ForksBeforeParents) {
            return Ok(());
        }
        self.store.write_lazily(|txn| {
            let mut order = txn.open_table(ORDER)?;
            for (root, path, row) in &moved {
                let k = key::encode(*root, path);
                if let Some(old) = order_of(path, &PendingRow { wave: FIRST_WAVE, ..row.clone() }, &k) {
                    order.remove(old.as_slice())?;
                }
            }
            drop(order);
            insert_rows(txn, moved)
        })
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
                        None => rows.push((root, path, PendingRow::new(None, Action::Remove, 0))),
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

    /// Refuses what comes without the folder that it is in: no row would tell of that folder.
    ///
    /// Cost: a pass over the changeset's rows, and look-ups for each folder in which something changes.
    pub(crate) fn check_folders(&self, changeset: &Changeset<D>) -> Result<(), StandbyError> {
        let pending = self.store.view(PENDING)?;
        let mut last = None;
        pending.for_each_reversed(|root, path, row: PendingRow| {
            let Some(dir) = path.parent().filter(|dir| row.entry.is_some() && !dir.is_root()) else { return Ok(()) };
            let dir = Some((root, dir));
            if last == dir {
                return Ok(());
            }
            last = dir;
            let Some((root, dir)) = &last else { return Ok(()) };
            let will_be = match pending.pending(*root, dir)? {
                Some(row) => row.entry,
                None => changeset.manifest.manifest(*root, dir)?.map(|row| row.entry),
            };
            if will_be.is_some_and(|entry| entry.is_dir()) && !pending.is_below_removed(*root, dir)? {
                Ok(())
            } else {
                Err(StandbyError::Protocol(format!("{path} came without the folder that it is in")))
            }
        })
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
            rows.push((root, path, PendingRow::new(Some(entry), action, ino)));
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
    pub(crate) fn finish_trees(&self, sync: &mut Unrecorded) -> Result<(), StandbyError> {
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
    pub(crate) fn record_applied(&self, applied: Applied, divergence: &Divergence) -> Result<(), StandbyError> {
        let mut standing = self.standing();
        let before = standing.applied;
        standing.committed = None;
        standing.applied = Some(applied);
        let is_rewind = standing.rewind.is_some();
        if let Some(rewind) = &mut standing.rewind {
            rewind.is_done = true;
        }
        if let Some(rewind) = standing.rewind
            && self.is_latest(PointNo(rewind.to))?
        {
            standing.rewind = None; // as the active has it
        }
        let point = self.next_point()?;
        let made = PointRow { applied, at_ms: self.disk.now_ms(), changes: 0, bytes: 0, is_rewind, position: None };
        let is_kept = self.next_kept()?.is_some();
        self.store.write(|txn| {
            let mut undo = if is_kept { Some(Undo::new(txn, divergence, point)?) } else { None };
            crate::rename::move_rows(txn, undo.as_mut())?;
            {
                use redb::ReadableTable;
                let pending = txn.open_table(PENDING)?;
                let mut manifest = txn.open_table(crate::store::MANIFEST)?;
                for row in pending.iter()? {
                    let (k, v) = row?;
                    let decoded: Result<PendingRow, _> = codec::decode(v.value());
                    let row = decoded.map_err(|e| redb::Error::Corrupted(format!("a pending row: {e}")))?;
                    let new = row.entry.as_ref().map(|entry| ManifestRow { entry: entry.clone(), ino: row.ino }.seal(k.value()));
                    let old = match &new {
                        Some(new) => manifest.insert(k.value(), new.as_slice())?.map(|old| old.value().to_vec()),
                        None => manifest.remove(k.value())?.map(|old| old.value().to_vec()),
                    };
                    if old != new
                        && let Some(undo) = &mut undo
                    {
                        undo.changed(k.value(), old.as_deref(), &row)?;
                    }
                    let is_dir = row.entry.as_ref().is_some_and(Entry::is_dir);
                    let was_dir = old.is_some_and(|old| is_manifest_dir(k.value(), &old)) && !is_dir;
                    if was_dir && let Ok((root, path)) = key::decode(k.value()) {
                        for range in [key::children(root, &path), key::deeper(root, &path)] {
                            let range = range.start.as_slice()..range.end.as_slice();
                            if let Some(undo) = &mut undo {
                                for row in manifest.range::<&[u8]>(range.clone())? {
                                    let (k, old) = row?;
                                    undo.went_with(&path, k.value(), old.value())?;
                                }
                            }
                            manifest.retain_in::<&[u8], _>(range, |_, _| false)?;
                        }
                    }
                }
            }
            match (undo, before) {
                (Some(undo), Some(before)) => undo.finish(txn, made, before)?,
                _ => history::begin(txn, point, &made)?,
            }
            settle(txn, UNSETTLED)?;
            if !is_rewind {
                settle(txn, NAMED)?;
                crate::missing::note_kept(txn)?;
            }
            forget_wanted(txn)?;
            crate::standby::clear(txn)?;
            Store::set_standing(txn, &standing)
        })?;
        self.set_standing(standing);
        Ok(())
    }
}

/// A new session: what its first changeset leaves as it is may hold more than the active, still.
fn begin_unsettled(txn: &redb::WriteTransaction) -> Result<(), redb::Error> {
    use redb::ReadableTable;
    txn.delete_table(UNSETTLED)?;
    let mut unsettled = txn.open_table(UNSETTLED)?;
    for table in [KEPT, INCOMPLETE] {
        for row in txn.open_table(table)?.iter()? {
            unsettled.insert(row?.0.value(), ())?;
        }
    }
    Ok(())
}

/// What came with the changeset under way, and was not left as it was, is as the active has it from now on.
fn settle(txn: &redb::WriteTransaction, of: redb::TableDefinition<'static, &'static [u8], ()>) -> Result<(), redb::Error> {
    use redb::ReadableTable;
    let paths_of = |table: &redb::Table<'_, &'static [u8], ()>| -> Result<Vec<(RootId, RelPath)>, redb::Error> {
        let keys: Result<Vec<_>, _> = table.iter()?.map(|row| row.map(|(k, _)| key::decode(k.value()).ok())).collect();
        Ok(keys?.into_iter().flatten().collect())
    };
    let mut unsettled = txn.open_table(of)?;
    let mut left = Vec::new();
    for table in [KEPT, INCOMPLETE] {
        left.extend(paths_of(&txn.open_table(table)?)?);
    }
    let pending = txn.open_table(PENDING)?;
    for (root, path) in paths_of(&unsettled)? {
        let is_left = left.iter().any(|(r, p)| *r == root && (p.is_within(&path) || path.is_within(p)));
        let own = key::encode(root, &path);
        // A folder that was renamed is as it was.
        let is_renamed = |row: &[u8]| matches!(codec::decode::<PendingRow>(row), Ok(PendingRow { action: Action::Rename { .. }, .. }));
        let mut came = pending.get(own.as_slice())?.is_some_and(|row| !is_renamed(row.value()));
        for range in [key::children(root, &path), key::deeper(root, &path)] {
            came |= pending.range(range.start.as_slice()..range.end.as_slice())?.next().is_some();
        }
        if came && !is_left {
            unsettled.remove(own.as_slice())?;
        }
    }
    Ok(())
}

/// What was wanted came with the changeset under way, or went.
fn forget_wanted(txn: &redb::WriteTransaction) -> Result<(), redb::Error> {
    let mut wanted = txn.open_table(WANTED)?;
    let (pending, manifest) = (txn.open_table(PENDING)?, txn.open_table(crate::store::MANIFEST)?);
    use redb::ReadableTable;
    let mut done = Vec::new();
    for row in wanted.iter()? {
        let k = row?.0.value().to_vec();
        let came = pending
            .get(k.as_slice())?
            .is_some_and(|row| matches!(codec::decode::<PendingRow>(row.value()), Ok(row) if row.action.staged().is_some()));
        if came || manifest.get(k.as_slice())?.is_none() {
            done.push(k);
        }
    }
    done.iter().try_for_each(|k| wanted.remove(k.as_slice()).map(drop))?;
    Ok(())
}

/// How many new forks stand between a fork and what is there already.
fn depth_of(at: &Repository, parents: &BTreeMap<Repository, Vec<Repository>>, depth: u8) -> u8 {
    let Some(above) = parents.get(at).filter(|_| depth < FORK_DEPTH_MAX) else { return depth };
    above.iter().map(|parent| depth_of(parent, parents, depth + 1)).max().unwrap_or(depth)
}

/// LIMIT: forks of forks that are told apart, as in git.
const FORK_DEPTH_MAX: u8 = 5;

/// What became of a changeset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// It is the tree now, durably.
    pub applied: Applied,
    /// Repositories that it left as they were, since a reference names an object that wouldn't be there.
    pub incomplete: Vec<Repository>,
}

fn is_manifest_dir(key: &[u8], value: &[u8]) -> bool {
    matches!(ManifestRow::read(key, value), Ok(row) if row.entry.is_dir())
}

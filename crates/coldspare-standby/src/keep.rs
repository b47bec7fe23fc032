//! What a changeset leaves as it is: paths that the active holds back, repositories that would be incomplete.
//!
//! Operations for such a path, or below it, may have been staged in any order before it is known that they don't count.
//!
//! Invariants: after this nothing of the changeset is at or below a kept path, and nothing below a removed folder.

use std::collections::BTreeSet;

use coldspare_core::{Body, Entry, RelPath, RootId, key};
use coldspare_os::Disk;

use crate::error::StandbyError;
use crate::row::{Action, PendingRow};
use crate::stage::{insert_rows, order_of};
use crate::standby::{Changeset, Few, Standby, Unrecorded};
use crate::store::{KEPT, LINKS, ORDER, PENDING, View};

/// Rows that are taken back in one transaction.
const ROWS_AT_ONCE: usize = 10_000;

type Path = (RootId, RelPath);

impl<D: Disk> Standby<D> {
    /// Takes back what was staged at or below the paths that the active keeps.
    ///
    /// `sync` then means the whole filesystem: what it lists one by one may no longer be there.
    pub(crate) fn take_back_kept(&self, changeset: &Changeset<D>, sync: &mut Unrecorded) -> Result<(), StandbyError> {
        let kept = self.kept()?;
        if !coldspare_core::seeded_bug!(KeepIsIgnored) {
            self.take_back(changeset, kept, sync)?;
        }
        self.drop_below_removed(sync)
    }

    /// The paths that the active keeps.
    pub(crate) fn kept(&self) -> Result<BTreeSet<Path>, StandbyError> {
        let (mut kept, view) = (BTreeSet::new(), self.store.view(PENDING)?);
        self.store.for_each_key(KEPT, |k| {
            kept.insert(view.path_of(k)?);
            Ok(())
        })?;
        Ok(kept)
    }

    /// Leaves all of `kept` as the tree has it, and what is tied to it by hard links.
    pub(crate) fn take_back(&self, changeset: &Changeset<D>, mut kept: BTreeSet<Path>, sync: &mut Unrecorded) -> Result<(), StandbyError> {
        if kept.is_empty() {
            return Ok(());
        }
        sync.few = Few(None);
        self.add_linked(&mut kept)?;
        let mut batch = TakenBack::default();
        for (root, path) in &kept {
            // With a folder above it, it is kept already.
            if path.ancestors().any(|above| kept.contains(&(*root, above))) {
                continue;
            }
            let pending = match &mut batch.pending {
                Some(pending) => &*pending,
                none => none.insert(self.store.view(PENDING)?),
            };
            let below = pending.some_below(*root, path, ROWS_AT_ONCE)?;
            if below.len() < ROWS_AT_ONCE {
                batch.gone.extend(below);
                batch.gone.extend(pending.pending(*root, path)?.map(|row| (*root, path.clone(), row)));
            } else {
                self.forget_rows(*root, path, Including::Itself)?;
            }
            // With a folder above it goes what it has: no row may stand below. In a changeset that names everything, what
            // isn't named would go, or has its row already.
            if !pending.is_below_removed(*root, path)?
                && let Some(row) = changeset.manifest.manifest(*root, path)?
            {
                batch.kept.push((*root, path.clone(), PendingRow::new(Some(row.entry), Action::Record, row.ino)));
            }
            if batch.gone.len() + batch.kept.len() >= ROWS_AT_ONCE {
                self.take_back_batch(std::mem::take(&mut batch))?;
            }
        }
        self.take_back_batch(batch)
    }

    /// Takes rows back and puts others in, in one transaction: there may be as many as a repository has objects.
    fn take_back_batch(&self, TakenBack { gone, kept, .. }: TakenBack) -> Result<(), StandbyError> {
        self.remove_staged(&gone)?;
        self.store.write_lazily(|txn| {
            remove_rows(txn, &gone)?;
            insert_rows(txn, kept)
        })
    }

    /// A link and the file that it names are kept together: they are one file.
    fn add_linked(&self, kept: &mut BTreeSet<Path>) -> Result<(), StandbyError> {
        let pending = self.store.view(PENDING)?;
        let mut links: Vec<(RootId, RelPath, RelPath)> = Vec::new();
        self.store.for_each_key(LINKS, |k| {
            let (root, path) = pending.path_of(k)?;
            if let Some(PendingRow { entry: Some(Entry { body: Body::Hardlink { to }, .. }), .. }) = pending.pending(root, &path)? {
                links.push((root, path, to));
            }
            Ok(())
        })?;
        let is_kept =
            |kept: &BTreeSet<Path>, root: RootId, path: &RelPath| path.ancestors().chain([path.clone()]).any(|p| kept.contains(&(root, p)));
        loop {
            let before = kept.len();
            for (root, path, to) in &links {
                match (is_kept(kept, *root, path), is_kept(kept, *root, to)) {
                    (true, false) => drop(kept.insert((*root, to.clone()))),
                    (false, true) => drop(kept.insert((*root, path.clone()))),
                    _ => {}
                }
            }
            if kept.len() == before {
                return Ok(());
            }
        }
    }

    /// What was met before its folder went is gone with it.
    fn drop_below_removed(&self, sync: &mut Unrecorded) -> Result<(), StandbyError> {
        let pending = self.store.view(PENDING)?;
        let mut removed = Vec::new();
        pending.for_each_reversed(|root, path, row: PendingRow| {
            if row.action == Action::Remove {
                removed.push((root, path));
            }
            Ok(())
        })?;
        for (root, path) in removed {
            if !pending.is_empty_below(root, &path)? {
                sync.few = Few(None);
                self.forget_rows(root, &path, Including::Below)?;
            }
        }
        Ok(())
    }

    /// Removes what is staged inside of new trees for these rows.
    fn remove_staged(&self, rows: &[Row]) -> Result<(), StandbyError> {
        // Folders go once they are empty.
        let mut staged: Vec<_> = rows
            .iter()
            .filter_map(|(root, path, row)| match &row.action {
                Action::Carried { at } | Action::Place { from: at } if at.0.starts_with(b"t/") => Some((*root, path, at)),
                _ => None,
            })
            .collect();
        staged.sort_by_key(|(_, path, _)| std::cmp::Reverse(path.components().count()));
        for (root, path, at) in staged {
            let gone = self.staged_dir(root, at).ok().map(|(dir, name)| self.remove_all(&dir, &name));
            if let Some(Err(e)) = gone {
                return Err(crate::error::io("taking back the staged", path.as_bytes())(e));
            }
        }
        Ok(())
    }

    /// Removes the rows of a path and of all below it, with what is staged inside of new trees for them; what is staged
    /// by itself is swept later.
    fn forget_rows(&self, root: RootId, path: &RelPath, including: Including) -> Result<(), StandbyError> {
        loop {
            let pending: View = self.store.view(PENDING)?;
            let mut rows = pending.some_below(root, path, ROWS_AT_ONCE)?;
            let is_last = rows.len() < ROWS_AT_ONCE;
            if is_last
                && including == Including::Itself
                && let Some(row) = pending.pending(root, path)?
            {
                rows.push((root, path.clone(), row));
            }
            self.remove_staged(&rows)?;
            self.store.write_lazily(|txn| remove_rows(txn, &rows))?;
            if is_last {
                return Ok(());
            }
        }
    }
}

/// What is taken back at once.
#[derive(Default)]
struct TakenBack {
    /// The rows as they are before.
    pending: Option<View>,
    gone: Vec<Row>,
    kept: Vec<Row>,
}

type Row = (RootId, RelPath, PendingRow);

/// Removes rows of the changeset, with what orders them.
fn remove_rows(txn: &redb::WriteTransaction, rows: &[Row]) -> Result<(), redb::Error> {
    let mut pending = txn.open_table(PENDING)?;
    let mut order = txn.open_table(ORDER)?;
    let mut links = txn.open_table(LINKS)?;
    for (root, path, row) in rows {
        let k = key::encode(*root, path);
        pending.remove(k.as_slice())?;
        links.remove(k.as_slice())?;
        if let Some(at) = order_of(path, row, &k) {
            order.remove(at.as_slice())?;
        }
    }
    Ok(())
}

/// Whether a path itself is meant too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Including {
    /// It and all below it.
    Itself,
    /// All below it.
    Below,
}

impl View {
    /// Whether a folder above `path` goes with the changeset.
    pub(crate) fn is_below_removed(&self, root: RootId, path: &RelPath) -> Result<bool, StandbyError> {
        for above in path.ancestors().filter(|above| !above.is_root()) {
            if self.pending(root, &above)?.is_some_and(|row| row.action == Action::Remove) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Up to `limit` rows below a folder.
    fn some_below(&self, root: RootId, path: &RelPath, limit: usize) -> Result<Vec<(RootId, RelPath, PendingRow)>, StandbyError> {
        let mut out = Vec::new();
        for range in [key::children(root, path), key::deeper(root, path)] {
            self.for_each_in(range, |root, path, row| {
                out.push((root, path, row));
                Ok(out.len() < limit)
            })?;
            if out.len() >= limit {
                break;
            }
        }
        Ok(out)
    }

    fn is_empty_below(&self, root: RootId, path: &RelPath) -> Result<bool, StandbyError> {
        Ok(self.some_below(root, path, 1)?.is_empty())
    }
}

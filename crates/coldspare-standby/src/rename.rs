//! Folders of the tree that get another path, with all below them.
//!
//! A changeset that renames does nothing else, but for the new folders that the renamed ones go into: so nothing that it
//! brings, keeps or removes is within one.
//!
//! Invariants: the manifest's rows move in the transaction that makes the changeset the tree.

use std::collections::BTreeSet;
use std::io::ErrorKind;

use coldspare_core::git::ApplyRank;
use coldspare_core::{Baseline, Entry, RelPath, RootId, codec, key};
use coldspare_os::{Disk, FileKind};
use redb::ReadableTable;

use crate::apply::{Touched, is_no_folder};
use crate::error::{StandbyError, io};
use crate::history::Undo;
use crate::row::{Action, ManifestRow, PendingRow, Record};
use crate::standby::{Changeset, Standby};
use crate::store::{KEPT, MANIFEST, ORDER, PENDING, UNSETTLED};

/// LIMIT: rows of a renamed folder that are held in memory.
const ROWS_AT_ONCE: usize = 10_000;

impl<D: Disk> Standby<D> {
    /// The row for a folder that is renamed from `from` to `to`.
    pub(crate) fn stage_rename(
        &self,
        changeset: &Changeset<D>,
        root: RootId,
        from: RelPath,
        to: RelPath,
    ) -> Result<(RootId, RelPath, PendingRow), StandbyError> {
        let refuse = |why: &str| StandbyError::Protocol(format!("{from} can't be renamed to {to}: {why}"));
        if changeset.baseline == Baseline::Full {
            return Err(refuse("the changeset names everything"));
        }
        if changeset.manifest.manifest(root, &to)?.is_some() {
            return Err(refuse("there is something"));
        }
        let Some(row) = changeset.manifest.manifest(root, &from)?.filter(|row| row.entry.is_dir()) else {
            return Err(refuse("it is no folder"));
        };
        Ok((root, to, PendingRow::new(Some(row.entry), Action::Rename { from }, row.ino)))
    }

    /// Refuses a changeset that renames and does something else that could meet what it renames.
    ///
    /// Cost: one look-up where there are no renames; else one pass over the changeset's rows.
    pub(crate) fn check_renames(&self) -> Result<(), StandbyError> {
        let renames = self.store.read(|txn| renames(&txn.open_table(ORDER)?, &txn.open_table(PENDING)?))?;
        if renames.is_empty() {
            return Ok(());
        }
        let paths: BTreeSet<(RootId, &RelPath)> = renames.iter().flat_map(|r| [(r.root, &r.from), (r.root, &r.to)]).collect();
        let is_within_one = |root: RootId, path: &RelPath| path.ancestors().any(|above| paths.contains(&(root, &above)));
        let mut is_clear = paths.len() == 2 * renames.len() && self.store.is_empty(KEPT)?;
        is_clear &= !paths.iter().any(|(root, path)| is_within_one(*root, path));
        self.store.view(PENDING)?.for_each_reversed(|root, path, row: PendingRow| {
            is_clear &= match row.action {
                Action::Rename { .. } => true,
                _ => row.entry.is_some_and(|entry| entry.is_dir()) && !paths.contains(&(root, &path)) && !is_within_one(root, &path),
            };
            Ok(())
        })?;
        if is_clear {
            Ok(())
        } else {
            Err(StandbyError::Protocol("a changeset that renames folders changes something else in their way".into()))
        }
    }

    /// Renames a folder of the tree.
    pub(crate) fn rename_in_tree(
        &self,
        root: RootId,
        from: &RelPath,
        to: &RelPath,
        entry: &Entry,
        touched: &mut Touched,
    ) -> Result<(), StandbyError> {
        let fail = || io("renaming", from.as_bytes());
        let dir = self.parent_of(root, to, touched)?;
        // After this the new path has it, and its times are set; where it was, they are, too.
        touched.exchanged(root, to, entry);
        touched.add(root, from.parent().unwrap_or_else(RelPath::root));
        let held = &self.root(root).dir;
        let source = match self.disk.open_dir(held, from.parent_bytes()) {
            Ok(source) => source,
            Err(e) if is_no_folder(&e) => return self.note_missing(&dir, from, to),
            Err(e) => return Err(fail()(e)),
        };
        match self.disk.stat(&source, from.name()) {
            Ok(stat) if stat.kind == FileKind::Dir => {}
            Ok(_) => {
                self.quarantine(root, &source, from.name(), from)?;
                return self.note_missing(&dir, from, to);
            }
            Err(e) if e.kind() == ErrorKind::NotFound => return self.note_missing(&dir, from, to),
            Err(e) => return Err(fail()(e)),
        }
        match self.disk.stat(&dir, to.name()) {
            Ok(_) => self.quarantine(root, &dir, to.name(), to)?,
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(fail()(e)),
        }
        self.disk.rename(&source, from.name(), &dir, to.name()).map_err(fail())
    }

    /// A folder that isn't where it was: it was renamed before a crash, or somebody removed it here.
    fn note_missing(&self, dir: &D::Dir, from: &RelPath, to: &RelPath) -> Result<(), StandbyError> {
        match self.disk.stat(dir, to.name()) {
            Ok(_) => {}
            // The next verification says so. What was committed goes on.
            Err(e) if e.kind() == ErrorKind::NotFound => tracing::error!(path = %from, "missing in the standby's tree"),
            Err(e) => return Err(io("examining", to.as_bytes())(e)),
        }
        Ok(())
    }
}

/// A folder that is renamed.
struct Rename {
    root: RootId,
    from: RelPath,
    to: RelPath,
}

/// The folders that the changeset under way renames.
fn renames(
    order: &impl ReadableTable<&'static [u8], ()>,
    pending: &impl ReadableTable<&'static [u8], &'static [u8]>,
) -> Result<Vec<Rename>, redb::Error> {
    let rank = ApplyRank::Rename as u8;
    let mut found = Vec::new();
    for row in order.range::<&[u8]>(&[rank][..]..&[rank + 1][..])? {
        let k = row?.0.value().get(2..).unwrap_or_default().to_vec(); // behind the rank and the wave
        let row = pending.get(k.as_slice())?.and_then(|row| codec::decode::<PendingRow>(row.value()).ok());
        let damaged = || redb::Error::Corrupted("a renamed folder has no row".into());
        let (root, to) = key::decode(&k).map_err(|_| damaged())?;
        let Some(PendingRow { action: Action::Rename { from }, .. }) = row else { return Err(damaged()) };
        found.push(Rename { root, from, to });
    }
    Ok(found)
}

/// Moves what the store knows below the renamed folders, and of them.
pub(crate) fn move_rows(txn: &redb::WriteTransaction, mut undo: Option<&mut Undo<'_, '_>>) -> Result<(), redb::Error> {
    for Rename { root, from, to } in renames(&txn.open_table(ORDER)?, &txn.open_table(PENDING)?)? {
        let own = key::encode(root, &from);
        let mut own_end = own.clone();
        own_end.push(0);
        for range in [own..own_end, key::children(root, &from), key::deeper(root, &from)] {
            let new_key = |k: &[u8]| -> Option<Vec<u8>> {
                let (_, path) = key::decode(k).ok()?;
                Some(key::encode(root, &to.join_path(path.below(&from)?).ok()?))
            };
            let mut manifest = txn.open_table(MANIFEST)?;
            loop {
                let mut some = Vec::new();
                for row in manifest.range(range.start.as_slice()..range.end.as_slice())?.take(ROWS_AT_ONCE) {
                    let (k, v) = row?;
                    some.push((k.value().to_vec(), v.value().to_vec()));
                }
                if some.is_empty() {
                    break;
                }
                for (k, v) in some {
                    manifest.remove(k.as_slice())?;
                    if let Some(new) = new_key(&k) {
                        if let Some(undo) = &mut undo {
                            undo.moved(&k, &new, &v)?;
                        }
                        let row = ManifestRow::read(&k, &v).map_err(redb::Error::Corrupted)?;
                        manifest.insert(new.as_slice(), row.seal(&new).as_slice())?;
                    }
                }
            }
            let mut unsettled = txn.open_table(UNSETTLED)?;
            let keys: Result<Vec<_>, redb::Error> =
                unsettled.range(range.start.as_slice()..range.end.as_slice())?.map(|row| Ok(row?.0.value().to_vec())).collect();
            for k in keys? {
                unsettled.remove(k.as_slice())?;
                if let Some(new) = new_key(&k) {
                    unsettled.insert(new.as_slice(), ())?;
                }
            }
        }
    }
    Ok(())
}

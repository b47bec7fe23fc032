//! The standby's store: the manifest, the changeset under way, and where the standby stands.
//!
//! It is no cache: losing it means a seed. Rows of a changeset are inserted only after their content is durable, and
//! become durable with the transaction that inserts them.

use std::path::{Path, PathBuf};

use coldspare_core::{RelPath, RootId, codec, key, seeded_bug};
use redb::{
    Database, Durability, ReadOnlyTable, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition, WriteTransaction,
};
use serde::de::DeserializeOwned;

use crate::error::{OpenError, StandbyError};
use crate::row::{ManifestRow, PendingRow, Record, Standing};

/// LIMIT: bytes of store pages held in memory.
const CACHE_BYTES: usize = 8 << 20;
const FORMAT: u64 = 4;
/// In the table of numbers: rows of the manifest were damaged, so that the active has to name everything.
const DISTRUSTED: &str = "distrusted";
/// In the table of numbers: the tree is an earlier one than the active knows of, so that it has to name everything.
const RESUMED: &str = "resumed";

type Bytes = &'static [u8];
pub(crate) const MANIFEST: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("manifest");
pub(crate) const PENDING: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("pending");
/// Rank and key of what is to be done, in the order in which it is done.
pub(crate) const ORDER: TableDefinition<'static, Bytes, ()> = TableDefinition::new("order");
/// Hard links of the changeset that are still to be made.
pub(crate) const LINKS: TableDefinition<'static, Bytes, ()> = TableDefinition::new("links");
/// Content left by an interrupted changeset: digest to root, place and size.
pub(crate) const LEFT: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("left");
/// Paths of the changeset that stay as the tree has them.
pub(crate) const KEPT: TableDefinition<'static, Bytes, ()> = TableDefinition::new("kept");
/// Paths that the first changeset of the session left as they were: what leaves them later is divergence as well.
pub(crate) const UNSETTLED: TableDefinition<'static, Bytes, ()> = TableDefinition::new("unsettled");
/// Repositories that the active has to send again.
pub(crate) const INCOMPLETE: TableDefinition<'static, Bytes, ()> = TableDefinition::new("incomplete");
/// Of what the active named something that is not in the tree yet: repositories, and files outside of them.
pub(crate) const NAMED: TableDefinition<'static, Bytes, ()> = TableDefinition::new("named");
/// Files whose content is damaged or missing, and which the active has to send again.
pub(crate) const WANTED: TableDefinition<'static, Bytes, ()> = TableDefinition::new("wanted");
/// What a person is asked, and what was taken from the roots lately.
pub(crate) const BRAKES: TableDefinition<'static, &str, Bytes> = TableDefinition::new("brakes");
/// What the active holds back.
pub(crate) const HELD: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("held");
/// What changesets replaced: the number of the point that each led to, and the key of the path.
pub(crate) const HISTORY: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("history");
/// The points, by number.
pub(crate) const POINTS: TableDefinition<'static, u64, Bytes> = TableDefinition::new("points");
const STANDING: TableDefinition<'static, &str, Bytes> = TableDefinition::new("standing");
pub(crate) const META: TableDefinition<'static, &str, u64> = TableDefinition::new("meta");
const VALUES: [TableDefinition<'static, Bytes, Bytes>; 5] = [MANIFEST, PENDING, LEFT, HELD, HISTORY];
const KEYS: [TableDefinition<'static, Bytes, ()>; 7] = [ORDER, LINKS, KEPT, INCOMPLETE, UNSETTLED, NAMED, WANTED];

/// The store.
#[derive(Debug)]
pub struct Store {
    db: Database,
    path: PathBuf,
}

/// A consistent view of one table.
pub(crate) struct View {
    rows: ReadOnlyTable<Bytes, Bytes>,
    path: PathBuf,
}

impl Store {
    /// Opens the store at `path`, making it when there is none.
    ///
    /// # Errors
    /// `InUse`, `Format`, `Recovery` with the store's failure.
    pub fn open(path: &Path) -> Result<Store, OpenError> {
        if path.exists() { Store::of(open_or_create(path)?, path) } else { Store::make(path) }
    }

    fn make(path: &Path) -> Result<Store, OpenError> {
        Store::make_with(path, |_| Ok(()))
    }

    /// Makes the store under another name, with what `fill` writes durably: one that a crash left half made can't be opened,
    /// and here it is made anew.
    pub(crate) fn make_with<E: From<OpenError>>(path: &Path, fill: impl FnOnce(&Store) -> Result<(), E>) -> Result<Store, E> {
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let io = |e: std::io::Error| OpenError::Recovery(fail(path)(e));
        match std::fs::remove_file(&new) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(e).into()),
            _ => {}
        }
        let store = Store::of(open_or_create(Path::new(&new))?, path)?;
        fill(&store)?;
        std::fs::rename(&new, path).map_err(io)?;
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(io)?;
        Ok(store)
    }

    /// Opens the store that `backend` holds, such as one in memory.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_in(backend: impl redb::StorageBackend) -> Result<Store, OpenError> {
        let path = Path::new("manifest");
        let db = redb::Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(backend);
        Store::of(db.map_err(|e| OpenError::Recovery(fail(path)(e)))?, path)
    }

    fn of(db: Database, path: &Path) -> Result<Store, OpenError> {
        let store = Store { db, path: path.into() };
        let found = store.write(|txn| {
            for table in VALUES {
                txn.open_table(table)?;
            }
            for table in KEYS {
                txn.open_table(table)?;
            }
            txn.open_table(STANDING)?;
            txn.open_table(BRAKES)?;
            txn.open_table(POINTS)?;
            let mut meta = txn.open_table(META)?;
            let found = meta.get("format")?.map(|v| v.value());
            if found.is_none() {
                meta.insert("format", FORMAT)?;
            }
            Ok(found.unwrap_or(FORMAT))
        })?;
        if found != FORMAT {
            return Err(OpenError::Format { path: path.into(), found });
        }
        Ok(store)
    }

    /// Runs one transaction; after `Ok` it is durable.
    pub(crate) fn write<T>(&self, body: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>) -> Result<T, StandbyError> {
        self.transact(if seeded_bug!(CommitsAreNotDurable) { Durability::None } else { Durability::Immediate }, body)
    }

    /// Runs one transaction that becomes durable with the next durable one, and is lost with a crash before that.
    pub(crate) fn write_lazily<T>(&self, body: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>) -> Result<T, StandbyError> {
        self.transact(Durability::None, body)
    }

    fn transact<T>(
        &self,
        durability: Durability,
        body: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StandbyError> {
        let run = || -> Result<T, redb::Error> {
            let mut txn = self.db.begin_write()?;
            txn.set_durability(durability)?;
            let out = body(&txn)?;
            txn.commit()?;
            Ok(out)
        };
        run().map_err(|e| fail(&self.path)(e))
    }

    /// Reads what is there now.
    pub(crate) fn read<T>(&self, body: impl FnOnce(&redb::ReadTransaction) -> Result<T, redb::Error>) -> Result<T, StandbyError> {
        let run = || -> Result<T, redb::Error> { body(&self.db.begin_read()?) };
        run().map_err(fail(&self.path))
    }

    /// Where the standby stands.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub(crate) fn standing(&self) -> Result<Standing, StandbyError> {
        match self.read(|txn| Ok(txn.open_table(STANDING)?.get("now")?.map(|v| v.value().to_vec())))? {
            None => Ok(Standing::default()),
            Some(bytes) => self.decode(&bytes),
        }
    }

    /// Whether rows of the manifest were dropped since they were damaged, and the active has not named everything since.
    pub(crate) fn is_distrusted(&self) -> Result<bool, StandbyError> {
        self.read(|txn| Ok(txn.open_table(META)?.get(DISTRUSTED)?.is_some()))
    }

    /// Says whether the manifest is all that the active sent.
    pub(crate) fn set_distrusted(txn: &WriteTransaction, is_distrusted: bool) -> Result<(), redb::Error> {
        let mut meta = txn.open_table(META)?;
        if is_distrusted {
            meta.insert(DISTRUSTED, 1)?;
        } else {
            meta.remove(DISTRUSTED)?;
        }
        Ok(())
    }

    /// Whether the standby was brought back to a point, and the active has not named everything since.
    pub(crate) fn is_resumed(&self) -> Result<bool, StandbyError> {
        self.read(|txn| Ok(txn.open_table(META)?.get(RESUMED)?.is_some()))
    }

    /// Says whether the tree is behind what the active knows of.
    pub(crate) fn set_resumed(txn: &WriteTransaction, is_resumed: bool) -> Result<(), redb::Error> {
        let mut meta = txn.open_table(META)?;
        if is_resumed {
            meta.insert(RESUMED, 1)?;
        } else {
            meta.remove(RESUMED)?;
        }
        Ok(())
    }

    /// Writes all tables anew, to pages that nothing happened to.
    ///
    /// redb compares a page with its checksum only after a crash, and then a single one that differs costs the whole store:
    /// what damaged some rows must not stay behind in the pages around them.
    ///
    /// Cost: time and space of the store's file, until the transaction ends.
    pub(crate) fn write_anew(txn: &WriteTransaction) -> Result<(), redb::Error> {
        VALUES.into_iter().try_for_each(|table| copy_anew(txn, table))?;
        KEYS.into_iter().try_for_each(|table| copy_anew(txn, table))?;
        copy_anew(txn, STANDING)?;
        copy_anew(txn, BRAKES)?;
        copy_anew(txn, POINTS)?;
        copy_anew(txn, META)
    }

    pub(crate) fn set_standing(txn: &WriteTransaction, standing: &Standing) -> Result<(), redb::Error> {
        txn.open_table(STANDING)?.insert("now", codec::encode(standing).as_slice())?;
        Ok(())
    }

    pub(crate) fn view(&self, table: TableDefinition<'static, Bytes, Bytes>) -> Result<View, StandbyError> {
        let open = || -> Result<_, redb::Error> { Ok(self.db.begin_read()?.open_table(table)?) };
        Ok(View { rows: open().map_err(fail(&self.path))?, path: self.path.clone() })
    }

    /// Calls `each` with every key of a table of keys, in order, without holding them all.
    pub(crate) fn for_each_key(
        &self,
        table: TableDefinition<'static, Bytes, ()>,
        mut each: impl FnMut(&[u8]) -> Result<(), StandbyError>,
    ) -> Result<(), StandbyError> {
        let open = || -> Result<_, redb::Error> { Ok(self.db.begin_read()?.open_table(table)?) };
        let rows = open().map_err(fail(&self.path))?;
        for row in rows.range::<&[u8]>(..).map_err(fail(&self.path))? {
            each(row.map_err(fail(&self.path))?.0.value())?;
        }
        Ok(())
    }

    /// Whether a table of keys has this one.
    pub(crate) fn has_key(&self, table: TableDefinition<'static, Bytes, ()>, key: &[u8]) -> Result<bool, StandbyError> {
        self.read(|txn| Ok(txn.open_table(table)?.get(key)?.is_some()))
    }

    /// Whether a table of keys has none.
    pub(crate) fn is_empty(&self, table: TableDefinition<'static, Bytes, ()>) -> Result<bool, StandbyError> {
        self.read(|txn| Ok(txn.open_table(table)?.is_empty()?))
    }

    pub(crate) fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, StandbyError> {
        codec::decode(bytes).map_err(|e| StandbyError::Damaged { path: self.path.clone(), detail: e.to_string() })
    }

    pub(crate) fn damaged(&self, detail: impl Into<String>) -> StandbyError {
        StandbyError::Damaged { path: self.path.clone(), detail: detail.into() }
    }
}

impl View {
    pub(crate) fn value(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StandbyError> {
        Ok(self.rows.get(key).map_err(fail(&self.path))?.map(|v| v.value().to_vec()))
    }

    pub(crate) fn row<T: Record>(&self, root: RootId, path: &RelPath) -> Result<Option<T>, StandbyError> {
        let k = key::encode(root, path);
        match self.rows.get(k.as_slice()).map_err(fail(&self.path))? {
            None => Ok(None),
            Some(v) => self.read(&k, v.value()).map(Some),
        }
    }

    pub(crate) fn manifest(&self, root: RootId, path: &RelPath) -> Result<Option<ManifestRow>, StandbyError> {
        self.row(root, path)
    }

    pub(crate) fn pending(&self, root: RootId, path: &RelPath) -> Result<Option<PendingRow>, StandbyError> {
        self.row(root, path)
    }

    /// The entries directly in a directory, sorted by name.
    #[allow(clippy::type_complexity)] // a name and its row
    pub(crate) fn children<T: Record>(&self, root: RootId, path: &RelPath) -> Result<Vec<(Box<[u8]>, T)>, StandbyError> {
        let range = key::children(root, path);
        let mut out = Vec::new();
        for row in self.rows.range(range.start.as_slice()..range.end.as_slice()).map_err(fail(&self.path))? {
            let (k, v) = row.map_err(fail(&self.path))?;
            out.push((key::name(k.value()).into(), self.read(k.value(), v.value())?));
        }
        Ok(out)
    }

    /// Calls `each` with every row, last first, without holding them all.
    pub(crate) fn for_each_reversed<T: Record>(
        &self,
        mut each: impl FnMut(RootId, RelPath, T) -> Result<(), StandbyError>,
    ) -> Result<(), StandbyError> {
        for row in self.rows.range::<&[u8]>(..).map_err(fail(&self.path))?.rev() {
            let (k, v) = row.map_err(fail(&self.path))?;
            let (root, path) = self.path_of(k.value())?;
            each(root, path, self.read(k.value(), v.value())?)?;
        }
        Ok(())
    }

    /// Calls `each` with every key and its value, in order, as they are stored.
    pub(crate) fn for_each_raw(&self, mut each: impl FnMut(&[u8], &[u8]) -> Result<(), StandbyError>) -> Result<(), StandbyError> {
        for row in self.rows.range::<&[u8]>(..).map_err(fail(&self.path))? {
            let (k, v) = row.map_err(fail(&self.path))?;
            each(k.value(), v.value())?;
        }
        Ok(())
    }

    /// As [`View::for_each_raw`], behind a key, until `each` says `false`.
    pub(crate) fn for_each_raw_after(
        &self,
        after: Option<&[u8]>,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<bool, StandbyError>,
    ) -> Result<(), StandbyError> {
        use std::ops::Bound::{Excluded, Unbounded};
        let range = (after.map_or(Unbounded, Excluded), Unbounded);
        for row in self.rows.range::<&[u8]>(range).map_err(fail(&self.path))? {
            let (k, v) = row.map_err(fail(&self.path))?;
            if !each(k.value(), v.value())? {
                break;
            }
        }
        Ok(())
    }

    /// As [`View::for_each_raw`], from one key on up to before another, or to the end where that is empty, until `each` says
    /// `false`.
    pub(crate) fn for_each_raw_from(
        &self,
        from: &[u8],
        to: &[u8],
        mut each: impl FnMut(&[u8], &[u8]) -> Result<bool, StandbyError>,
    ) -> Result<(), StandbyError> {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        let range = (Included(from), if to.is_empty() { Unbounded } else { Excluded(to) });
        for row in self.rows.range::<&[u8]>(range).map_err(fail(&self.path))? {
            let (k, v) = row.map_err(fail(&self.path))?;
            if !each(k.value(), v.value())? {
                break;
            }
        }
        Ok(())
    }

    /// As [`View::for_each_raw`], in a range of keys, until `each` says `false`.
    pub(crate) fn for_each_raw_in(
        &self,
        range: std::ops::Range<Vec<u8>>,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<bool, StandbyError>,
    ) -> Result<(), StandbyError> {
        for row in self.rows.range(range.start.as_slice()..range.end.as_slice()).map_err(fail(&self.path))? {
            let (k, v) = row.map_err(fail(&self.path))?;
            if !each(k.value(), v.value())? {
                break;
            }
        }
        Ok(())
    }

    /// Calls `each` with the rows of a range, until it says `false`.
    pub(crate) fn for_each_in<T: Record>(
        &self,
        range: std::ops::Range<Vec<u8>>,
        mut each: impl FnMut(RootId, RelPath, T) -> Result<bool, StandbyError>,
    ) -> Result<(), StandbyError> {
        for row in self.rows.range(range.start.as_slice()..range.end.as_slice()).map_err(fail(&self.path))? {
            let (k, v) = row.map_err(fail(&self.path))?;
            let (root, path) = self.path_of(k.value())?;
            if !each(root, path, self.read(k.value(), v.value())?)? {
                break;
            }
        }
        Ok(())
    }

    /// Calls `each` with every row below a folder, until it says `false`.
    pub(crate) fn for_each_below<T: Record>(
        &self,
        root: RootId,
        path: &RelPath,
        each: &mut dyn FnMut(RootId, RelPath, T) -> Result<bool, StandbyError>,
    ) -> Result<(), StandbyError> {
        for range in [key::children(root, path), key::deeper(root, path)] {
            self.for_each_in(range, &mut *each)?;
        }
        Ok(())
    }

    pub(crate) fn path_of(&self, key: &[u8]) -> Result<(RootId, RelPath), StandbyError> {
        key::decode(key).map_err(|e| StandbyError::Damaged { path: self.path.clone(), detail: e.to_string() })
    }

    pub(crate) fn len(&self) -> Result<u64, StandbyError> {
        self.rows.len().map_err(fail(&self.path))
    }

    pub(crate) fn damaged(&self, detail: String) -> StandbyError {
        StandbyError::Damaged { path: self.path.clone(), detail }
    }

    fn read<T: Record>(&self, key: &[u8], value: &[u8]) -> Result<T, StandbyError> {
        T::read(key, value).map_err(|e| {
            let place = key::decode(key).map_or_else(|_| "a key that is none".to_string(), |(_, path)| path.to_string());
            StandbyError::Damaged { path: self.path.clone(), detail: format!("{place}: {e}") }
        })
    }
}

fn copy_anew<K: redb::Key + 'static, V: redb::Value + 'static>(
    txn: &WriteTransaction,
    table: TableDefinition<'static, K, V>,
) -> Result<(), redb::Error> {
    let before: TableDefinition<'static, K, V> = TableDefinition::new("before");
    txn.rename_table(table, before)?;
    let (from, mut to) = (txn.open_table(before)?, txn.open_table(table)?);
    for row in from.iter()? {
        let (k, v) = row?;
        to.insert(k.value(), v.value())?;
    }
    drop((from, to));
    txn.delete_table(before)?;
    Ok(())
}

fn open_or_create(path: &Path) -> Result<Database, OpenError> {
    redb::Builder::new().set_cache_size(CACHE_BYTES).create(path).map_err(|e| match e {
        redb::DatabaseError::DatabaseAlreadyOpen => OpenError::InUse { path: path.into() },
        e => OpenError::Recovery(fail(path)(e)),
    })
}

fn fail<E: Into<redb::Error>>(path: &Path) -> impl FnOnce(E) -> StandbyError {
    let path = path.to_path_buf();
    move |e| {
        let source: redb::Error = e.into();
        match &source {
            redb::Error::Io(io) if io.kind() == std::io::ErrorKind::StorageFull => {
                StandbyError::OutOfSpace { detail: format!("writing {}", path.display()) }
            }
            redb::Error::Corrupted(detail) => StandbyError::Damaged { path, detail: detail.clone() },
            redb::Error::Io(io) if io.kind() == std::io::ErrorKind::InvalidData => StandbyError::Damaged { path, detail: io.to_string() },
            _ => StandbyError::Store { path, source: Box::new(source) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_a_crash_left_half_made_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (path, half) = (dir.path().join("manifest.redb"), dir.path().join("manifest.redb.new"));
        std::fs::write(&half, [0; 4096]).unwrap();
        drop(Store::open(&path).unwrap());
        assert!(!half.exists());
        Store::open(&path).unwrap().standing().unwrap();
    }
}

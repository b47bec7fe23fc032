//! The index: what the active last captured of each path, and in which changeset.
//!
//! A rebuildable cache: losing it costs a read of everything, never correctness. Each row carries the number of the
//! changeset in which it last changed, so that what a standby lacks is what has a higher number than it acknowledged;
//! a further standby is one more row of `standbys`.
//!
//! Invariants:
//! - `next_seq` is durable before a row carries that number, so that no number is used for two states;
//! - a path that is gone keeps its row until every standby acknowledged the removal.

use std::ops::Bound;
use std::path::{Path, PathBuf};

use coldspare_core::{Body, Entry, NodeId, RelPath, RootId, Seq, Time, codec, key, seeded_bug};
use redb::{Database, Durability, ReadOnlyTable, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::copies::SIZES;

/// What the index knows of one path; the row's bytes are a golden test.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The changeset in which it last changed.
    pub version: Seq,
    /// What it was then.
    pub state: State,
}

/// What a path was when it was captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// There.
    Present {
        /// As it was sent.
        entry: Entry,
        /// What tells whether it changed since.
        witness: Witness,
    },
    /// No longer there.
    Gone,
}

/// What tells, without reading the content, whether a path changed since it was captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// Inode number.
    pub ino: u64,
    /// Time of the last change of the inode.
    pub ctime: Time,
    /// The inode changed so shortly before it was captured that a further change could bear the same time: what the
    /// witness says is not enough, the content has to be read again (git's racy-timestamp rule).
    pub racy: bool,
}

/// The store.
#[derive(Debug)]
pub struct Index {
    db: Database,
    path: PathBuf,
}

/// The index can't be used.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// Another process has it open.
    #[error("the index {path} is in use by another coldspare; stop that one first")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It was written by another version.
    #[error("the index {path} has format {found}, this coldspare needs {FORMAT}; remove the file, it will be made anew")]
    Format {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: u64,
    },
    /// The store failed.
    #[error("the index {path}: {source}")]
    Store {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<redb::Error>,
    },
    /// A row is not what this version writes.
    #[error("the index {path} is damaged ({detail}); remove the file, it will be made anew")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
}

/// A consistent view for one cycle.
pub struct Snapshot {
    pub(crate) rows: ReadOnlyTable<&'static [u8], &'static [u8]>,
    chunks: ReadOnlyTable<&'static [u8], &'static [u8]>,
    links: ReadOnlyTable<&'static [u8], &'static [u8]>,
    pub(crate) sizes: ReadOnlyTable<&'static [u8], ()>,
    pub(crate) path: PathBuf,
}

/// LIMIT: bytes of store pages held in memory.
const CACHE_BYTES: usize = 16 << 20;
/// By then the kernel has written back what was written before (`vm.dirty_expire_centisecs`, the journal's interval), with
/// room to spare.
const WRITE_BACK_SECONDS: i64 = 300;
/// LIMIT: rows that are held in memory while they are distrusted.
const DISTRUSTED_AT_ONCE: usize = 10_000;
const FORMAT: u64 = 1;
pub(crate) const ROWS: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("rows");
pub(crate) const CHUNKS: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("chunks");
pub(crate) const LINKS: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("links");
pub(crate) const GONE: TableDefinition<'static, &[u8], u64> = TableDefinition::new("gone");
const STANDBYS: TableDefinition<'static, &[u8], u64> = TableDefinition::new("standbys");
pub(crate) const META: TableDefinition<'static, &str, u64> = TableDefinition::new("meta");

impl Index {
    /// Opens the index at `path`, making it when there is none.
    ///
    /// # Errors
    /// [`IndexError`]: in use, other format, store failure.
    pub fn open(path: &Path) -> Result<Index, IndexError> {
        let db = redb::Builder::new().set_cache_size(CACHE_BYTES).create(path).map_err(|e| match e {
            redb::DatabaseError::DatabaseAlreadyOpen => IndexError::InUse { path: path.into() },
            e => store_error(path, e.into()),
        })?;
        Index::of(db, path)
    }

    /// Opens the index that `backend` holds, such as one in memory.
    ///
    /// # Errors
    /// As [`Index::open`].
    pub fn open_in(backend: impl redb::StorageBackend) -> Result<Index, IndexError> {
        let path = Path::new("index");
        let db = redb::Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(backend).map_err(|e| store_error(path, e.into()))?;
        Index::of(db, path)
    }

    fn of(db: Database, path: &Path) -> Result<Index, IndexError> {
        let index = Index { db, path: path.into() };
        let found = index.write(Durability::Immediate, |txn| {
            for table in [ROWS, CHUNKS, LINKS] {
                txn.open_table(table)?;
            }
            txn.open_table(GONE)?;
            txn.open_table(SIZES)?;
            txn.open_table(STANDBYS)?;
            let mut meta = txn.open_table(META)?;
            let found = meta.get("format")?.map(|v| v.value());
            if found.is_none() {
                meta.insert("format", FORMAT)?;
            }
            Ok(found.unwrap_or(FORMAT))
        })?;
        if found != FORMAT {
            return Err(IndexError::Format { path: path.into(), found });
        }
        Ok(index)
    }

    /// A view that stays as it is now.
    ///
    /// # Errors
    /// `Store`.
    pub fn snapshot(&self) -> Result<Snapshot, IndexError> {
        let open = || -> Result<Snapshot, redb::Error> {
            let txn = self.db.begin_read()?;
            Ok(Snapshot {
                rows: txn.open_table(ROWS)?,
                chunks: txn.open_table(CHUNKS)?,
                links: txn.open_table(LINKS)?,
                sizes: txn.open_table(SIZES)?,
                path: self.path.clone(),
            })
        };
        open().map_err(|e| store_error(&self.path, e))
    }

    /// The lowest number that no row carries.
    ///
    /// # Errors
    /// `Store`.
    pub fn next_seq(&self) -> Result<Seq, IndexError> {
        let read = || -> Result<u64, redb::Error> {
            let meta = self.db.begin_read()?.open_table(META)?;
            Ok(meta.get("next_seq")?.map_or(1, |v| v.value()))
        };
        read().map(Seq).map_err(|e| store_error(&self.path, e))
    }

    /// Makes sure, durably, that no later cycle uses `seq` again.
    ///
    /// Cost: one durable transaction, none when it is so already.
    ///
    /// # Errors
    /// `Store`.
    pub fn reserve(&self, seq: Seq) -> Result<(), IndexError> {
        if self.next_seq()? > seq || seeded_bug!(NumbersAreUsedTwice) {
            return Ok(());
        }
        self.write(Durability::Immediate, |txn| {
            // A number is reserved with some to spare, so that a cycle costs no extra fsync.
            txn.open_table(META)?.insert("next_seq", seq.0 + RESERVED_AT_ONCE)?;
            Ok(())
        })
    }

    /// What `standby` acknowledged last; `None` when nothing is known of it.
    ///
    /// # Errors
    /// `Store`.
    pub fn acked(&self, standby: NodeId) -> Result<Option<Seq>, IndexError> {
        let read = || -> Result<Option<u64>, redb::Error> {
            let standbys = self.db.begin_read()?.open_table(STANDBYS)?;
            Ok(standbys.get(standby.0.as_slice())?.map(|v| v.value()))
        };
        read().map(|seq| seq.map(Seq)).map_err(|e| store_error(&self.path, e))
    }

    /// Records that `standby` has everything up to `seq`, and forgets what is gone since before that for all standbys.
    ///
    /// Not durable by itself: if it is lost, the standby says it again at the next connection.
    ///
    /// # Errors
    /// `Store`.
    pub fn record_acked(&self, standby: NodeId, seq: Seq) -> Result<(), IndexError> {
        self.write(Durability::None, |txn| {
            let mut standbys = txn.open_table(STANDBYS)?;
            let known = standbys.get(standby.0.as_slice())?.map_or(0, |v| v.value());
            standbys.insert(standby.0.as_slice(), seq.0.max(known))?; // whatever order they come in
            let mut lowest = seq.0;
            for row in standbys.iter()? {
                lowest = lowest.min(row?.1.value());
            }
            forget_gone(txn, lowest)
        })
    }

    /// The host went down: what files were shortly before says nothing of their content any more, since times and sizes may
    /// have survived without the bytes. Those are read again at the next look, and those from the future of `now_ms`, of
    /// which nothing can be told.
    ///
    /// Cost: two passes over all rows, one durable transaction.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn distrust_recent(&self, now_ms: u64) -> Result<(), IndexError> {
        let now = i64::try_from(now_ms / 1000).unwrap_or(i64::MAX);
        let of = |bytes: &[u8]| -> Option<(Seq, Entry, Witness)> {
            match codec::decode::<Row>(bytes) {
                Ok(Row { version, state: State::Present { entry, witness } }) => Some((version, entry, witness)),
                _ => None,
            }
        };
        self.write(Durability::Immediate, |txn| {
            let mut rows = txn.open_table(ROWS)?;
            let mut newest = i64::MIN;
            for row in rows.iter()? {
                let changed = of(row?.1.value()).map(|(_, _, witness)| witness.ctime.secs).filter(|secs| *secs <= now);
                newest = newest.max(changed.unwrap_or(i64::MIN));
            }
            let since = newest.saturating_sub(WRITE_BACK_SECONDS);
            let mut at: Vec<u8> = Vec::new();
            loop {
                let mut some = Vec::new();
                for row in rows.range::<&[u8]>((Bound::Excluded(at.as_slice()), Bound::Unbounded))?.take(DISTRUSTED_AT_ONCE) {
                    let (key, value) = row?;
                    some.push((key.value().to_vec(), of(value.value())));
                }
                let Some((last, _)) = some.last() else { return Ok(()) };
                at.clone_from(last);
                for (key, row) in some {
                    if let Some((version, entry, witness)) = row.filter(|(_, _, witness)| witness.ctime.secs >= since) {
                        let row = Row { version, state: State::Present { entry, witness: Witness { racy: true, ..witness } } };
                        rows.insert(key.as_slice(), row.encode().as_slice())?;
                    }
                }
            }
        })
    }

    /// Writes rows outside of a cycle, durably.
    pub(crate) fn apply(&self, changes: Vec<crate::writer::Change>) -> Result<(), IndexError> {
        self.write(Durability::Immediate, |txn| crate::writer::apply(txn, changes))
    }

    pub(crate) fn write<T>(
        &self,
        durability: Durability,
        body: impl FnOnce(&redb::WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, IndexError> {
        let run = || -> Result<T, redb::Error> {
            let mut txn = self.db.begin_write()?;
            txn.set_durability(durability)?;
            let out = body(&txn)?;
            txn.commit()?;
            Ok(out)
        };
        run().map_err(|e| store_error(&self.path, e))
    }
}

const RESERVED_AT_ONCE: u64 = 1024;

fn forget_gone(txn: &redb::WriteTransaction, acked: u64) -> Result<(), redb::Error> {
    let mut gone = txn.open_table(GONE)?;
    let done: Vec<Vec<u8>> = gone
        .iter()?
        .filter_map(|row| match row {
            Ok((key, version)) if version.value() <= acked => Some(Ok(key.value().to_vec())),
            Ok(_) => None,
            Err(e) => Some(Err(e)),
        })
        .collect::<Result<_, _>>()?;
    if done.is_empty() {
        return Ok(());
    }
    let mut rows = txn.open_table(ROWS)?;
    let is_gone = |bytes: &[u8]| matches!(codec::decode::<Row>(bytes), Ok(Row { version, state: State::Gone }) if version.0 <= acked);
    for top in done {
        gone.remove(top.as_slice())?;
        let Ok((root, path)) = key::decode(&top) else { continue };
        if rows.get(top.as_slice())?.is_some_and(|row| is_gone(row.value())) {
            rows.remove(top.as_slice())?;
        }
        for range in [key::children(root, &path), key::deeper(root, &path)] {
            rows.retain_in(range.start.as_slice()..range.end.as_slice(), |_, row| !is_gone(row))?;
        }
    }
    Ok(())
}

impl Snapshot {
    /// What the index knows of `path`.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn row(&self, root: RootId, path: &RelPath) -> Result<Option<Row>, IndexError> {
        let found = self.rows.get(key::encode(root, path).as_slice()).map_err(|e| self.store(e))?;
        found.map(|v| self.decode(v.value())).transpose()
    }

    /// What the index knows of the entries directly in the directory `path`, sorted by name.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    #[allow(clippy::type_complexity)] // a name and its row
    pub fn children(&self, root: RootId, path: &RelPath) -> Result<Vec<(Box<[u8]>, Row)>, IndexError> {
        let range = key::children(root, path);
        let rows = self.rows.range(range.start.as_slice()..range.end.as_slice()).map_err(|e| self.store(e))?;
        let mut out = Vec::new();
        for row in rows {
            let (key, value) = row.map_err(|e| self.store(e))?;
            out.push((key::name(key.value()).into(), self.decode(value.value())?));
        }
        Ok(out)
    }

    /// How many paths the index has, gone ones too.
    ///
    /// # Errors
    /// `Store`.
    pub fn path_count(&self) -> Result<u64, IndexError> {
        self.rows.len().map_err(|e| self.store(e))
    }

    /// The first directory behind `after`, in the order of keys; the first of all for `None`.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub(crate) fn next_dir(&self, after: Option<&(RootId, RelPath)>) -> Result<Option<(RootId, RelPath)>, IndexError> {
        let from = after.map(|(root, path)| key::encode(*root, path));
        let from = from.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
        for row in self.rows.range::<&[u8]>((from, Bound::Unbounded)).map_err(|e| self.store(e))? {
            let (key, value) = row.map_err(|e| self.store(e))?;
            if self.decode(value.value())?.is_dir() {
                return key::decode(key.value()).map(Some).map_err(|e| self.damaged(&e.to_string()));
            }
        }
        Ok(None)
    }

    /// Calls `each` with every row below the directory `path`.
    ///
    /// # Errors
    /// `Store`, `Damaged`, and those of `each`.
    pub(crate) fn for_each_below(
        &self,
        root: RootId,
        path: &RelPath,
        mut each: impl FnMut(RelPath, Row) -> Result<(), IndexError>,
    ) -> Result<(), IndexError> {
        for range in [key::children(root, path), key::deeper(root, path)] {
            for row in self.rows.range(range.start.as_slice()..range.end.as_slice()).map_err(|e| self.store(e))? {
                let (key, value) = row.map_err(|e| self.store(e))?;
                let (_, path) = key::decode(key.value()).map_err(|e| self.damaged(&e.to_string()))?;
                each(path, self.decode(value.value())?)?;
            }
        }
        Ok(())
    }

    /// Whether any file is known to have several names.
    ///
    /// # Errors
    /// `Store`.
    pub(crate) fn has_links(&self) -> Result<bool, IndexError> {
        Ok(self.links.first().map_err(|e| self.store(e))?.is_some())
    }

    /// The chunks of a large file as it was captured; `None` when none were kept.
    ///
    /// # Errors
    /// `Store`.
    pub fn chunks(&self, root: RootId, path: &RelPath) -> Result<Option<Vec<u8>>, IndexError> {
        let found = self.chunks.get(key::encode(root, path).as_slice()).map_err(|e| self.store(e))?;
        Ok(found.map(|v| v.value().to_vec()))
    }

    /// The names under which the file `ino` of `dev` was seen; some may be gone.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn names_of(&self, dev: u64, ino: u64) -> Result<Vec<(RootId, RelPath)>, IndexError> {
        let found = self.links.get(link_key(dev, ino).as_slice()).map_err(|e| self.store(e))?;
        match found {
            None => Ok(Vec::new()),
            Some(v) => codec::decode(v.value()).map_err(|e| self.damaged(&e.to_string())),
        }
    }

    fn decode(&self, bytes: &[u8]) -> Result<Row, IndexError> {
        Row::decode(bytes).map_err(|e| self.damaged(&e))
    }

    pub(crate) fn damaged(&self, detail: &str) -> IndexError {
        IndexError::Damaged { path: self.path.clone(), detail: detail.into() }
    }

    pub(crate) fn store(&self, e: impl Into<redb::Error>) -> IndexError {
        store_error(&self.path, e.into())
    }
}

impl Row {
    /// The version of a row of which the standby may have anything: higher than any that is acknowledged.
    pub(crate) const UNSENT: Seq = Seq(u64::MAX);

    /// The row as it is stored.
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(self)
    }

    /// Reads a row.
    ///
    /// # Errors
    /// In words, when the bytes are not one row.
    pub fn decode(bytes: &[u8]) -> Result<Row, String> {
        codec::decode(bytes).map_err(|e| e.to_string())
    }

    /// The entry, when the path was there.
    pub fn entry(&self) -> Option<&Entry> {
        match &self.state {
            State::Present { entry, .. } => Some(entry),
            State::Gone => None,
        }
    }

    /// The inode, when the path was there.
    pub(crate) fn ino(&self) -> Option<u64> {
        match &self.state {
            State::Present { witness, .. } => Some(witness.ino),
            State::Gone => None,
        }
    }

    /// Whether it was a directory.
    pub fn is_dir(&self) -> bool {
        matches!(&self.state, State::Present { entry: Entry { body: Body::Dir, .. }, .. })
    }
}

pub(crate) fn link_key(dev: u64, ino: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&dev.to_be_bytes());
    key[8..].copy_from_slice(&ino.to_be_bytes());
    key
}

pub(crate) fn store_error(path: &Path, source: redb::Error) -> IndexError {
    IndexError::Store { path: path.into(), source: Box::new(source) }
}

#[cfg(test)]
mod tests {
    use coldspare_core::{Digest, Meta, Xattr};

    use super::*;

    #[test]
    fn rows_keep_their_bytes() {
        let meta = Meta {
            mode: 0o644,
            uid: 2003,
            gid: 2003,
            mtime: Time { secs: 1_700_000_000, nanos: 123_456_789 },
            xattrs: vec![Xattr { name: b"user.a".to_vec(), value: b"v".to_vec() }],
        };
        let body = Body::File { size: 300, digest: Digest([7; 32]), sparse: false };
        let witness = Witness { ino: 70_000, ctime: Time { secs: -1, nanos: 5 }, racy: true };
        let row = Row { version: Seq(9), state: State::Present { entry: Entry { meta, body }, witness } };
        let hex = data_encoding_hex(&row.encode());
        assert_eq!(
            hex,
            concat!(
                "09",
                "00",
                "fba401",
                "fbd307",
                "fbd307",
                "fc00e2a7ca",
                "fc15cd5b07",
                "01",
                "06757365722e61",
                "0176",
                "01",
                "fb2c01",
                "0707070707070707070707070707070707070707070707070707070707070707",
                "00",
                "fc70110100",
                "01",
                "05",
                "01"
            )
        );
        assert_eq!(Row::decode(&row.encode()), Ok(row));
        assert_eq!(Row { version: Seq(1), state: State::Gone }.encode(), [1, 1]);
    }

    fn data_encoding_hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn a_number_is_never_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.redb");
        let index = Index::open(&path).unwrap();
        assert_eq!(index.next_seq().unwrap(), Seq(1));
        index.reserve(Seq(1)).unwrap();
        drop(index);
        let index = Index::open(&path).unwrap();
        assert!(index.next_seq().unwrap() > Seq(1));
    }

    #[test]
    fn a_second_process_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.redb");
        let _index = Index::open(&path).unwrap();
        assert!(matches!(Index::open(&path), Err(IndexError::InUse { .. })));
    }
}

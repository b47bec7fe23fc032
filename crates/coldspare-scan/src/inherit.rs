//! The index of a home that came about by replication: what the standby's manifest knew of it becomes what was captured.

use coldspare_core::fingerprint::Fingerprint;
use coldspare_core::{Digest, Entry, RelPath, RootId, Seq, Time, codec, key};
use coldspare_os::Stat;
use redb::{Durability, ReadableTable};

use crate::index::{Index, IndexError, META, ROWS, Row, State, Witness, store_error};
use crate::read::is_racy;

/// LIMIT: rows that are held in memory.
const ROWS_AT_ONCE: usize = 20_000;

/// Fills a new index.
#[derive(Debug)]
pub struct Heir<'a> {
    index: &'a Index,
    version: Seq,
    /// When the tree was given over, in milliseconds since 1970: what changed after that isn't what the manifest says.
    until_ms: u64,
    rows: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<'a> Heir<'a> {
    /// Begins to fill an index that has no rows: its paths were captured as changeset `version`, and nothing of before
    /// `until_ms` was written by anybody else.
    pub fn new(index: &'a Index, version: Seq, until_ms: u64) -> Heir<'a> {
        Heir { index, version, until_ms, rows: Vec::new() }
    }

    /// Takes what stands at a path, unless that may have changed since, or has several names: it is read then.
    ///
    /// # Errors
    /// `Store`.
    pub fn add(&mut self, root: RootId, path: &RelPath, entry: Entry, stat: &Stat) -> Result<(), IndexError> {
        if is_racy(stat.ctime, self.until_ms) || (stat.nlink > 1 && !entry.is_dir()) {
            return Ok(());
        }
        let (secs, nanos) = stat.ctime;
        let witness = Witness { ino: stat.ino, ctime: Time { secs, nanos }, racy: false };
        let row = Row { version: self.version, state: State::Present { entry, witness } };
        self.rows.push((key::encode(root, path), row.encode()));
        if self.rows.len() >= ROWS_AT_ONCE { self.write(Durability::None) } else { Ok(()) }
    }

    /// Writes the rest; after `Ok` all of it is durable, and no changeset will have a number up to `version`.
    ///
    /// # Errors
    /// `Store`.
    pub fn finish(mut self) -> Result<(), IndexError> {
        let next = self.version.next().0;
        self.index.write(Durability::None, |txn| {
            txn.open_table(META)?.insert("next_seq", next)?;
            Ok(())
        })?;
        self.write(Durability::Immediate)
    }

    fn write(&mut self, durability: Durability) -> Result<(), IndexError> {
        let rows = std::mem::take(&mut self.rows);
        self.index.write(durability, |txn| {
            let mut table = txn.open_table(ROWS)?;
            for (key, row) in &rows {
                table.insert(key.as_slice(), row.as_slice())?;
            }
            Ok(())
        })
    }
}

impl Index {
    /// Calls `each` with every path that is there, in the order of keys: its entry, and its inode.
    ///
    /// # Errors
    /// `Store`, `Damaged`, and those of `each`.
    pub fn for_each_present<E: From<IndexError>>(
        &self,
        mut each: impl FnMut(RootId, RelPath, Entry, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let snapshot = self.snapshot()?;
        for row in snapshot.rows.iter().map_err(|e| store_error(&snapshot.path, e.into()))? {
            let (key, value) = row.map_err(|e| store_error(&snapshot.path, e.into()))?;
            let damaged = |detail: String| IndexError::Damaged { path: snapshot.path.clone(), detail };
            let (root, path) = key::decode(key.value()).map_err(|e| damaged(e.to_string()))?;
            let row: Row = codec::decode(value.value()).map_err(|e| damaged(e.to_string()))?;
            if let State::Present { entry, witness } = row.state {
                each(root, path, entry, witness.ino)?;
            }
        }
        Ok(())
    }

    /// The digest of all entries that were captured.
    ///
    /// Cost: one pass over the index.
    ///
    /// # Errors
    /// `Store`, `Damaged`.
    pub fn fingerprint(&self) -> Result<Digest, IndexError> {
        let mut fingerprint = Fingerprint::default();
        self.for_each_present(|root, path, entry, _| {
            fingerprint.add(&key::encode(root, &path), &entry);
            Ok::<(), IndexError>(())
        })?;
        Ok(fingerprint.finish())
    }
}

//! Rows of the two stores made wrong as no disk makes them: each is one that its program would write.

use std::path::Path;

use coldspare_core::{RelPath, RootId, codec, key};
use coldspare_scan::index::{Row, State};
use coldspare_standby::ManifestRow;
use redb::{Database, ReadableTable, TableDefinition};

/// Which store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// The active's index.
    Index,
    /// The standby's manifest.
    Manifest,
}

/// What becomes of the row of a path.
#[derive(Debug, Clone, Copy)]
pub enum Edit<'a> {
    /// It has this mode.
    Mode(u16),
    /// There is none.
    Remove,
    /// There is one, as that of another path.
    As(&'a str),
}

/// Changes the row of `name`, in the first root, in the store at `path`; nobody else has it open.
///
/// # Panics
/// When the store can't be read or written, or has no such row.
pub fn tamper(path: &Path, of: Of, name: &str, edit: Edit<'_>) {
    let (table, key) = (TableDefinition::<&[u8], &[u8]>::new(if of == Of::Index { "rows" } else { "manifest" }), key_of(name));
    let db = Database::open(path).expect("a store");
    let txn = db.begin_write().expect("a transaction");
    {
        let mut rows = txn.open_table(table).expect("a table");
        let from = if let Edit::As(other) = edit { key_of(other) } else { key.clone() };
        let old = rows.get(from.as_slice()).expect("a readable store").expect("a row").value().to_vec();
        let mode = if let Edit::Mode(mode) = edit { Some(mode) } else { None };
        let new = if of == Of::Index { index_row(&old, mode) } else { manifest_row(&key, &old, mode) };
        if let Edit::Remove = edit {
            rows.remove(key.as_slice()).expect("a writable store");
        } else {
            rows.insert(key.as_slice(), new.as_slice()).expect("a writable store");
        }
    }
    txn.commit().expect("a writable store");
}

fn key_of(name: &str) -> Vec<u8> {
    key::encode(RootId(0), &RelPath::new(name.as_bytes()).expect("a path"))
}

fn index_row(old: &[u8], mode: Option<u16>) -> Vec<u8> {
    let mut row = Row::decode(old).expect("a row");
    if let State::Present { entry, .. } = &mut row.state {
        entry.meta.mode = mode.unwrap_or(entry.meta.mode);
    }
    row.encode()
}

fn manifest_row(key: &[u8], old: &[u8], mode: Option<u16>) -> Vec<u8> {
    let mut row: ManifestRow = codec::decode(&old[..old.len() - SEAL_BYTES]).expect("a row");
    row.entry.meta.mode = mode.unwrap_or(row.entry.meta.mode);
    let mut value = codec::encode(&row);
    let mut hasher = blake3::Hasher::new();
    hasher.update(key).update(&value);
    value.extend_from_slice(&hasher.finalize().as_bytes()[..SEAL_BYTES]);
    value
}

const SEAL_BYTES: usize = 8;

//! The records of the standby's store; their bytes are golden tests.

use coldspare_core::control::Applied;
use coldspare_core::git::FIRST_WAVE;
use coldspare_core::{Entry, RelPath, Seq, SessionId, codec};
use serde::{Deserialize, Serialize};

/// One path of the manifest: what the standby's tree holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestRow {
    /// As the active sent it.
    pub entry: Entry,
    /// The inode that holds it here; another one is drift.
    pub ino: u64,
}

impl ManifestRow {
    /// The value that the store has under `key`: the row, and the first bytes of BLAKE3 of key and row.
    ///
    /// The store checks nothing when it reads: a bit that flipped on the disk would be taken for what the active sent.
    pub(crate) fn seal(&self, key: &[u8]) -> Vec<u8> {
        sealed(key, self)
    }
}

fn sealed(key: &[u8], row: &impl Serialize) -> Vec<u8> {
    let mut value = codec::encode(row);
    let seal = seal(key, &value);
    value.extend_from_slice(&seal);
    value
}

fn unsealed<T: for<'de> Deserialize<'de>>(key: &[u8], value: &[u8]) -> Result<T, String> {
    match value.split_last_chunk::<SEAL_BYTES>() {
        Some((row, found)) if seal(key, row) == *found => codec::decode(row).map_err(|e| e.to_string()),
        _ => Err("the row doesn't have its seal".into()),
    }
}

/// Bytes of a row's seal.
const SEAL_BYTES: usize = 8;

fn seal(key: &[u8], row: &[u8]) -> [u8; SEAL_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(key).update(row);
    let mut out = [0; SEAL_BYTES];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..SEAL_BYTES]);
    out
}

/// A value of the store, as it is read.
pub(crate) trait Record: Sized {
    /// Reads what is stored under `key`.
    ///
    /// # Errors
    /// In words: it isn't what was written.
    fn read(key: &[u8], value: &[u8]) -> Result<Self, String>;
}

impl Record for ManifestRow {
    fn read(key: &[u8], value: &[u8]) -> Result<ManifestRow, String> {
        unsealed(key, value)
    }
}

impl Record for PendingRow {
    fn read(_: &[u8], value: &[u8]) -> Result<PendingRow, String> {
        codec::decode(value).map_err(|e| e.to_string())
    }
}

impl Record for coldspare_core::Problem {
    fn read(_: &[u8], value: &[u8]) -> Result<coldspare_core::Problem, String> {
        codec::decode(value).map_err(|e| e.to_string())
    }
}

/// What a changeset replaced at a path: a row of the history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HistoryRow {
    /// The row that the manifest had; `None` where there was nothing.
    pub old: Option<ManifestRow>,
    /// How many components of the path name what was moved or linked to the history with its content: all of them, or those
    /// of the folder that went as a whole; 0 where no content left the tree.
    pub kept: u16,
}

impl HistoryRow {
    /// The value that the store has under `key`, with its seal.
    pub(crate) fn seal(&self, key: &[u8]) -> Vec<u8> {
        sealed(key, self)
    }

    /// Reads what is stored under `key`.
    pub(crate) fn read(key: &[u8], value: &[u8]) -> Result<HistoryRow, String> {
        unsealed(key, value)
    }
}

/// A point: what the store has of a changeset that was the tree, or is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PointRow {
    /// The changeset.
    pub applied: Applied,
    /// Milliseconds since 1970 on the standby's clock: when it became the tree.
    pub at_ms: u64,
    /// Paths that it changed.
    pub changes: u64,
    /// Bytes that the history holds for the sake of the point before.
    pub bytes: u64,
    /// Whether it came about by going back to another.
    pub is_rewind: bool,
    /// What the database said soon after that.
    pub position: Option<String>,
}

/// Going back to a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rewind {
    /// The number of the point.
    pub to: u64,
    /// Whether the tree is that point: then no changeset is taken until a person says so.
    pub is_done: bool,
}

/// One path of the changeset that is being staged or applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingRow {
    /// What is to be there afterwards; `None` for a removal.
    pub entry: Option<Entry>,
    /// How it gets there.
    pub action: Action,
    /// The inode that holds it, as far as it is known.
    pub ino: u64,
    /// When, among actions of one rank: forks after the repositories that they borrow from, and before them when they go.
    pub wave: u8,
}

impl PendingRow {
    /// A row of the first wave.
    pub fn new(entry: Option<Entry>, action: Action, ino: u64) -> PendingRow {
        PendingRow { entry, action, ino, wave: FIRST_WAVE }
    }
}

/// How a path of a changeset gets to be what it is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// The staged file or tree is renamed into place.
    Place {
        /// Where it is staged.
        from: Staged,
    },
    /// It comes with the new tree above it.
    Carried {
        /// Where it is staged.
        at: Staged,
    },
    /// Owner, mode, times and attributes are set in place.
    Attributes,
    /// Nothing changes on disk.
    Record,
    /// It goes, with all below it.
    Remove,
    /// The folder comes here from where the tree has it, with all below it.
    Rename {
        /// Where the tree has it.
        from: RelPath,
    },
}

/// A place below a root's stage folder: `f/<name>`, or `t/<tree>[/…]`, as joined components.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staged(#[serde(with = "coldspare_core::codec::bytes")] pub Vec<u8>);

/// Where the standby stands; one value of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Standing {
    /// The last changeset that is the tree.
    pub applied: Option<Applied>,
    /// A changeset that will be applied, whatever happens.
    pub committed: Option<Applied>,
    /// How often the store was opened; part of the names of staged files, so that none is used twice.
    pub generation: u64,
    /// Going back to a point that a person chose, under way or done.
    pub rewind: Option<Rewind>,
}

/// Of a tree that was adopted: no active's, so that what the first changeset takes from it goes to quarantine.
pub(crate) const ADOPTED: Applied = Applied { session: SessionId([0; 16]), seq: Seq(0), as_of_ms: 0 };

#[cfg(test)]
mod tests {
    use coldspare_core::{Body, Digest, Meta, Time};

    use super::*;

    fn check<T: Serialize + for<'de> Deserialize<'de> + PartialEq + std::fmt::Debug>(value: T, golden: &str) {
        let bytes = codec::encode(&value);
        assert_eq!(bytes.iter().map(|b| format!("{b:02x}")).collect::<String>(), golden);
        assert_eq!(codec::decode::<T>(&bytes).unwrap(), value);
    }

    #[test]
    fn records_keep_their_bytes() {
        let meta = Meta { mode: 0o644, uid: 1, gid: 2, mtime: Time { secs: 3, nanos: 4 }, xattrs: Vec::new() };
        let entry = Entry { meta, body: Body::File { size: 5, digest: Digest([6; 32]), sparse: true } };
        let file = format!("fba40101020604000105{}", "06".repeat(32));
        check(ManifestRow { entry: entry.clone(), ino: 7 }, &format!("{file}0107"));
        let place = Action::Place { from: Staged(b"f/1".to_vec()) };
        check(PendingRow { wave: 3, ..PendingRow::new(Some(entry.clone()), place, 7) }, &format!("01{file}010003662f310703"));
        check(PendingRow::new(None, Action::Remove, 0), "00040001");
        check(PendingRow::new(None, Action::Rename { from: RelPath::new(*b"a").unwrap() }, 0), "000501610001");
        let applied = Applied { session: SessionId([1; 16]), seq: Seq(2), as_of_ms: 3 };
        let ones = "01".repeat(16);
        let standing = Standing { applied: Some(applied), committed: None, generation: 9, rewind: None };
        check(standing, &format!("01{ones}0203000900"));
        check(Standing { rewind: Some(Rewind { to: 4, is_done: true }), ..standing }, &format!("01{ones}02030009010401"));
        check(Standing::default(), "00000000");
        let point = PointRow { applied, at_ms: 5, changes: 6, bytes: 7, is_rewind: true, position: Some("8".into()) };
        check(point, &format!("{ones}020305060701010138"));
        check(HistoryRow { old: None, kept: 0 }, "0000");
        let link = Entry { body: Body::Hardlink { to: RelPath::new(*b"a").unwrap() }, ..entry };
        check(HistoryRow { old: Some(ManifestRow { entry: link, ino: 7 }), kept: 2 }, "01fba40101020604000301610702");
    }

    #[test]
    fn any_flipped_bit_of_a_manifest_row_or_its_key_is_noticed() {
        let meta = Meta { mode: 0o644, uid: 1, gid: 2, mtime: Time { secs: 3, nanos: 4 }, xattrs: Vec::new() };
        let row = ManifestRow { entry: Entry { meta, body: Body::Dir }, ino: 7 };
        let key = coldspare_core::key::encode(coldspare_core::RootId(0), &RelPath::new(*b"a/b").unwrap());
        let value = row.seal(&key);
        let hex: String = value.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "fba4010102060400000709301a9c5613faec");
        assert_eq!(ManifestRow::read(&key, &value), Ok(row));
        for bit in 0..value.len() * 8 {
            let mut flipped = value.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(ManifestRow::read(&key, &flipped).is_err(), "bit {bit} of the value");
        }
        for bit in 0..key.len() * 8 {
            let mut flipped = key.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(ManifestRow::read(&flipped, &value).is_err(), "bit {bit} of the key");
        }
        assert!(ManifestRow::read(&key, &value[..7]).is_err());
    }
}

//! The records of the standby's store; their bytes are golden tests.

use coldspare_core::control::Applied;
use coldspare_core::git::FIRST_WAVE;
use coldspare_core::{Entry, RelPath};
use serde::{Deserialize, Serialize};

/// One path of the manifest: what the standby's tree holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestRow {
    /// As the active sent it.
    pub entry: Entry,
    /// The inode that holds it here; another one is drift.
    pub ino: u64,
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
}

#[cfg(test)]
mod tests {
    use coldspare_core::{Body, Digest, Meta, Seq, SessionId, Time, codec};

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
        check(PendingRow { wave: 3, ..PendingRow::new(Some(entry), place, 7) }, &format!("01{file}010003662f310703"));
        check(PendingRow::new(None, Action::Remove, 0), "00040001");
        check(PendingRow::new(None, Action::Rename { from: RelPath::new(*b"a").unwrap() }, 0), "000501610001");
        let applied = Applied { session: SessionId([1; 16]), seq: Seq(2), as_of_ms: 3 };
        let ones = "01".repeat(16);
        check(Standing { applied: Some(applied), committed: None, generation: 9 }, &format!("01{ones}02030009"));
        check(Standing::default(), "000000");
    }
}

//! Changesets: the atomic step from one tree to the next, as a list of operations in any order.
//!
//! What the operations mean is said here; the order in which the standby performs them is `git::ApplyRank`.

use serde::{Deserialize, Serialize};

use crate::codec;
use crate::entry::{Digest, Entry, EntryError};
use crate::id::{RootId, Seq};
use crate::path::RelPath;

/// What a changeset starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Baseline {
    /// The standby's tree as of this changeset; operations name only what differs.
    Delta(Seq),
    /// Nothing is assumed: the changeset names every entry, and what it doesn't name is no longer there.
    Full,
}

/// Where the content of a put file comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContentRef {
    /// The entry has no content of its own: directories, symlinks, hard links.
    None,
    /// The next `size` bytes of the batch's payload.
    Inline,
    /// The segments of this file number, of which there are so many.
    Segments {
        /// Number of the file within its changeset.
        file: u32,
        /// How many segments belong to it.
        segments: u32,
    },
    /// The standby's tree has the content at this path already.
    Unchanged,
    /// The standby has the content staged from an earlier try: it said so.
    Staged,
    /// The standby makes it when all else is staged, by a [`Recipe`]: the next bytes of the batch's payload.
    Rebuilt {
        /// Bytes of the recipe, at most [`RECIPE_BYTES_MAX`].
        recipe_bytes: u32,
    },
}

/// How the standby makes a file from others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Recipe {
    /// A pack's index, from the pack beside it and from indexes of the tree that the changeset starts from.
    PackIndex {
        /// Those indexes, by the numbers that `entries` gives them. At most [`SOURCES_MAX`].
        #[serde(deserialize_with = "codec::capped::<_, _, SOURCES_MAX>")]
        sources: Vec<(RootId, RelPath)>,
        /// Which names are where, as `coldspare-delta` codes it.
        #[serde(with = "codec::bytes")]
        entries: Vec<u8>,
    },
    /// A pack's reverse index, from the index beside it.
    ReverseIndex,
}

/// LIMIT: bytes of one recipe.
pub const RECIPE_BYTES_MAX: u32 = 2 << 20;

/// LIMIT: bytes of all recipes of a changeset, each with [`RECIPE_COST_BYTES`] beside it: what the standby holds in memory.
pub const RECIPES_BYTES_MAX: usize = 16 << 20;

/// What a recipe counts for, beside its bytes: the path and the entry.
pub const RECIPE_COST_BYTES: usize = 512;

/// One operation of a changeset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// The path holds `entry` afterwards, whatever was there before.
    Put {
        /// The root that holds `path`.
        root: RootId,
        /// The empty path is the root itself.
        path: RelPath,
        /// All of its state.
        entry: Entry,
        /// Where its content comes from.
        content: ContentRef,
    },
    /// The path and all below it are gone afterwards.
    Delete {
        /// The root that holds `path`.
        root: RootId,
        /// Never the root itself.
        path: RelPath,
    },
    /// The path and all below it stay as the standby has them, whatever else the changeset holds for them: what is held
    /// back, or changed while it was read.
    Keep {
        /// The root that holds `path`.
        root: RootId,
        /// The empty path is the root itself.
        path: RelPath,
    },
    /// The folder at `from`, with all below it, is at `to` afterwards.
    ///
    /// A changeset with such operations has no others but new folders, into which they go; no path of one operation is
    /// within a path of another.
    Rename {
        /// The root that holds both.
        root: RootId,
        /// A folder that the baseline has.
        from: RelPath,
        /// A path that the baseline doesn't have; its folder is there, or comes with the changeset.
        to: RelPath,
    },
}

/// A part of a large file, without the literal bytes that it brings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePart {
    /// The file's number in the changeset.
    pub file: u32,
    /// The root that holds `path`.
    pub root: RootId,
    /// The file.
    pub path: RelPath,
    /// Where in the file it starts, in bytes.
    pub offset: u64,
    /// The files that copies are taken from, by the numbers that `pieces` give them; none when they are taken from what the
    /// standby has at `path`. At most [`SOURCES_MAX`].
    #[serde(deserialize_with = "codec::capped::<_, _, SOURCES_MAX>")]
    pub sources: Vec<(RootId, RelPath)>,
    /// What it consists of, as `coldspare-delta` codes pieces, and with sources as it codes those of a pack.
    #[serde(with = "codec::bytes")]
    pub pieces: Vec<u8>,
}

/// LIMIT: files that copies of one part are taken from.
pub const SOURCES_MAX: usize = 4_096;

/// What a changeset amounted to; both ends count for themselves and compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Operations.
    pub ops: u64,
    /// Files whose content was read.
    pub files_read: u64,
    /// Bytes of content that were read on the active.
    pub bytes_read: u64,
}

/// Why an operation from a peer is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// The root's number is not configured.
    #[error("root {0} isn't configured")]
    Root(u8),
    /// The root itself is to be deleted.
    #[error("the root itself can't be deleted")]
    DeleteRoot,
    /// A folder is to be renamed into itself, or to what is above it.
    #[error("a folder can't be renamed into itself, nor to what it is in")]
    RenameWithin,
    /// The content's source doesn't fit the kind of entry.
    #[error("content where there can be none, or none where there must be")]
    Content,
    /// A recipe over the limit.
    #[error("a recipe of {0} bytes")]
    Recipe(u32),
    /// The entry is impossible.
    #[error(transparent)]
    Entry(#[from] EntryError),
}

impl Op {
    /// Checks what the types don't say; called where an operation comes from a peer.
    ///
    /// # Errors
    /// [`OpError`]: the first rule that is broken.
    pub fn check(&self, roots: u8) -> Result<(), OpError> {
        if self.root().0 >= roots {
            return Err(OpError::Root(self.root().0));
        }
        match self {
            Op::Put { path, entry, content, .. } => {
                entry.check(path)?;
                let is_file = entry.digest().is_some();
                if is_file == matches!(content, ContentRef::None) {
                    return Err(OpError::Content);
                }
                match content {
                    ContentRef::Rebuilt { recipe_bytes } if *recipe_bytes > RECIPE_BYTES_MAX => Err(OpError::Recipe(*recipe_bytes)),
                    _ => Ok(()),
                }
            }
            Op::Delete { path, .. } if path.is_root() => Err(OpError::DeleteRoot),
            Op::Rename { from, to, .. } if from.is_within(to) || to.is_within(from) => Err(OpError::RenameWithin),
            Op::Delete { .. } | Op::Keep { .. } | Op::Rename { .. } => Ok(()),
        }
    }

    /// Bytes of the batch's payload that belong to it: the content of a small file, or a recipe.
    pub fn payload_bytes(&self) -> u64 {
        match self {
            Op::Put { entry, content: ContentRef::Inline, .. } => entry.size(),
            Op::Put { content: ContentRef::Rebuilt { recipe_bytes }, .. } => u64::from(*recipe_bytes),
            _ => 0,
        }
    }

    /// The root that holds the path.
    pub fn root(&self) -> RootId {
        match self {
            Op::Put { root, .. } | Op::Delete { root, .. } | Op::Keep { root, .. } | Op::Rename { root, .. } => *root,
        }
    }

    /// The path, for a folder that is renamed the old one.
    pub fn path(&self) -> &RelPath {
        match self {
            Op::Put { path, .. } | Op::Delete { path, .. } | Op::Keep { path, .. } | Op::Rename { from: path, .. } => path,
        }
    }
}

/// The end of a file that was sent as bulk: beside the changesets, before one names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BulkEnd {
    /// The file's number among those of the connection.
    pub file: u32,
    /// The root that holds `path`.
    pub root: RootId,
    /// The file.
    pub path: RelPath,
    /// BLAKE3 of the content.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// How many segments belong to it.
    pub segments: u32,
}

/// A question to the standby: does it have this content already?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The root that holds `path`.
    pub root: RootId,
    /// Where the file is to be.
    pub path: RelPath,
    /// BLAKE3 of the content.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
}

/// The standby's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Have {
    /// It must be sent.
    Missing,
    /// The tree has it at this path.
    AtPath,
    /// It is staged, durably.
    Staged,
    /// An interrupted try left a part of it, of which these are the digests of the blocks.
    Part(Vec<[u8; 16]>),
    /// It must be sent, and there is no room for it beside a changeset.
    NoRoom,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Body, Meta, Time};

    fn check(op: Op, expected: Result<(), OpError>) {
        assert_eq!(op.check(2), expected, "{op:?}");
    }

    #[test]
    fn recipes_keep_their_bytes() {
        let path = RelPath::new(*b"a/b").unwrap();
        let recipe = Recipe::PackIndex { sources: vec![(RootId(1), path)], entries: vec![0xab, 0xcd] };
        for (recipe, golden) in [(recipe, &[0, 1, 1, 3, b'a', b'/', b'b', 2, 0xab, 0xcd][..]), (Recipe::ReverseIndex, &[1])] {
            assert_eq!(codec::encode(&recipe), golden);
            assert_eq!(codec::decode::<Recipe>(golden).unwrap(), recipe);
        }
    }

    #[test]
    fn operations_that_make_no_sense_are_refused() {
        let meta = Meta { mode: 0o755, uid: 0, gid: 0, mtime: Time::default(), xattrs: Vec::new() };
        let file = Body::File { size: 1, digest: Digest([0; 32]), sparse: false };
        let put = |root, body: &Body, content| Op::Put {
            root: RootId(root),
            path: RelPath::new(*b"a").unwrap(),
            entry: Entry { meta: meta.clone(), body: body.clone() },
            content,
        };
        check(put(1, &file, ContentRef::Inline), Ok(()));
        check(put(2, &file, ContentRef::Inline), Err(OpError::Root(2)));
        check(put(0, &file, ContentRef::None), Err(OpError::Content));
        check(put(0, &Body::Dir, ContentRef::None), Ok(()));
        check(put(0, &Body::Dir, ContentRef::Inline), Err(OpError::Content));
        let rebuilt = |recipe_bytes| ContentRef::Rebuilt { recipe_bytes };
        check(put(0, &file, rebuilt(RECIPE_BYTES_MAX)), Ok(()));
        check(put(0, &file, rebuilt(RECIPE_BYTES_MAX + 1)), Err(OpError::Recipe(RECIPE_BYTES_MAX + 1)));
        check(put(0, &Body::Dir, rebuilt(1)), Err(OpError::Content));
        check(Op::Delete { root: RootId(0), path: RelPath::root() }, Err(OpError::DeleteRoot));
        let rename = |from: &str, to: &str| {
            let path = |s: &str| RelPath::new(s.as_bytes()).unwrap();
            Op::Rename { root: RootId(0), from: path(from), to: path(to) }
        };
        check(rename("a", "b"), Ok(()));
        check(rename("a", "ab"), Ok(()));
        check(rename("a", "a/b"), Err(OpError::RenameWithin));
        check(rename("a/b", "a"), Err(OpError::RenameWithin));
        check(rename("a", "a"), Err(OpError::RenameWithin));
        check(rename("", "a"), Err(OpError::RenameWithin));
    }
}

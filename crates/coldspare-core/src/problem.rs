//! Trouble with one path, as data: what a capture holds back, what a verification finds.

use serde::{Deserialize, Serialize};

use crate::id::RootId;
use crate::path::RelPath;

/// What is wrong with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemKind {
    /// It can't be read on the active.
    Unreadable,
    /// It kept changing while it was read.
    Unstable,
    /// Its content is not what its name, or git, promises: damaged on the active.
    Damaged,
    /// A repository of which something that its references need can't be had.
    Incomplete,
    /// Its name, depth or attributes are beyond what coldspare carries.
    Unsupported,
    /// In the manifest, not on disk.
    Missing,
    /// On disk, not in the manifest.
    Extra,
    /// Another kind of entry.
    Kind,
    /// Another size or content.
    Content,
    /// Another mode.
    Mode,
    /// Another owner or group.
    Owner,
    /// Another time of modification.
    Time,
    /// Other extended attributes or ACLs.
    Attributes,
    /// Another symlink target.
    Target,
    /// Not the same file as the other name it should share.
    Hardlink,
    /// The store itself is damaged.
    Store,
    /// A reference that can't be read, or that names an object that isn't there.
    Reference,
    /// A repository in which objects are missing or damaged that its references need.
    Objects,
    /// A repository that borrows objects from where nothing is replicated.
    Alternate,
    /// A lock or a temporary file of git's.
    Leftover,
    /// The manifest has another entry there than the active says it sent, or none, or one that the active doesn't know of.
    Unequal,
}

impl ProblemKind {
    /// The word in messages and JSON.
    pub fn word(self) -> &'static str {
        match self {
            ProblemKind::Unreadable => "unreadable",
            ProblemKind::Unstable => "unstable",
            ProblemKind::Damaged => "damaged",
            ProblemKind::Incomplete => "incomplete",
            ProblemKind::Unsupported => "unsupported",
            ProblemKind::Missing => "missing",
            ProblemKind::Extra => "extra",
            ProblemKind::Kind => "kind",
            ProblemKind::Content => "content",
            ProblemKind::Mode => "mode",
            ProblemKind::Owner => "owner",
            ProblemKind::Time => "time",
            ProblemKind::Attributes => "attributes",
            ProblemKind::Target => "target",
            ProblemKind::Hardlink => "hardlink",
            ProblemKind::Store => "store",
            ProblemKind::Reference => "reference",
            ProblemKind::Objects => "objects",
            ProblemKind::Alternate => "alternate",
            ProblemKind::Leftover => "leftover",
            ProblemKind::Unequal => "unequal",
        }
    }
}

/// Trouble with one path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// The root that holds it.
    pub root: RootId,
    /// The path.
    pub path: RelPath,
    /// What is wrong.
    pub kind: ProblemKind,
    /// In words: what was expected, what was found, what to do.
    pub detail: String,
}

//! What can go wrong on the standby.

use std::path::PathBuf;

use coldspare_core::{RelPath, RootId, Seq};

use crate::points::PointNo;

/// A changeset that could not be staged or applied. Unless it says otherwise nothing of it is visible.
#[derive(Debug, thiserror::Error)]
pub enum StandbyError {
    /// No room, or no quota; what is staged stays for the next try.
    #[error("no space left: {detail}; free some or enlarge the filesystem, replication goes on by itself")]
    OutOfSpace {
        /// Where, and how much is free.
        detail: String,
    },
    /// A file operation failed.
    #[error("{operation} {path}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which path below the root.
        path: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A sync failed, so that nobody knows what of the content staged since the last one is on the disk. It is never
    /// tried again: the changeset is lost and the standby has to be opened anew.
    #[error("a sync failed before: what was staged can't be relied on; the standby has to be opened anew")]
    SyncFailed,
    /// The store failed.
    #[error("the standby's store {path}: {source}")]
    Store {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<redb::Error>,
    },
    /// The store holds what this version never writes.
    #[error(
        "the standby's store {path} is damaged: {detail}; where `coldspare verify --repair` can't mend it, `coldspare adopt` makes it anew of what the tree holds"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// A copy names a base that isn't what the active believes, or is damaged: the file has to come whole.
    #[error("{path}: the copy on the standby is not the one that the change refers to")]
    BaseDiffers {
        /// The root.
        root: RootId,
        /// The file.
        path: RelPath,
    },
    /// Content that doesn't have its digest.
    #[error("{path}: the content that arrived doesn't have its digest")]
    ContentDiffers {
        /// The root.
        root: RootId,
        /// The file.
        path: RelPath,
    },
    /// An operation refers to what isn't there.
    #[error("{path}: refers to something that the standby doesn't have")]
    UnknownTarget {
        /// The root.
        root: RootId,
        /// The path.
        path: RelPath,
    },
    /// The changeset doesn't follow the last one.
    #[error("changeset out of order: the standby is at {applied}")]
    Sequence {
        /// The last applied changeset.
        applied: Seq,
    },
    /// The changeset was captured before the active knew that an earlier one left repositories as they were: what it has of
    /// them may need what was left out.
    #[error("changeset {seq} left repositories out; they have to be asked for again first")]
    LeftOut {
        /// That changeset.
        seq: Seq,
    },
    /// The changeset takes more than goes without a question.
    #[error("{reason}: {}", if *.is_rejected { REJECTED } else { ASKED })]
    Held {
        /// What it would take, by root.
        reason: String,
        /// Whether a person said no.
        is_rejected: bool,
    },
    /// A person went back to a point: the active's changesets are not taken until a person says so.
    #[error("the standby was brought back to point {to} and stays there; `coldspare resume` on the standby lets replication go on")]
    Rewound {
        /// That point.
        to: PointNo,
    },
    /// There is no such point.
    #[error("there is no point {0}; `coldspare points` lists them")]
    UnknownPoint(PointNo),
    /// What a point needs is not in the history: it was damaged, or somebody removed it.
    #[error("{path} is not in the history as point {point} had it; the standby stays as it is")]
    NotKept {
        /// The point.
        point: PointNo,
        /// The path.
        path: RelPath,
    },
    /// The active broke the rules of the protocol.
    #[error("the active sent nonsense: {0}")]
    Protocol(String),
}

const ASKED: &str = "nothing is taken until somebody decides; `coldspare accept` or `coldspare reject` on the standby";
const REJECTED: &str = "rejected; the standby stays as it is until the active has it again, or `coldspare accept`";

/// The standby can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has the store open.
    #[error("{path} is in use by another coldspare; stop that one first")]
    InUse {
        /// The store's file.
        path: PathBuf,
    },
    /// The store was written by another version.
    #[error("{path} has format {found}, this coldspare needs another; use the version that wrote it, or seed the standby anew")]
    Format {
        /// The store's file.
        path: PathBuf,
        /// What it says.
        found: u64,
    },
    /// A root can't be used.
    #[error("{path}: {detail}")]
    Root {
        /// The root.
        path: PathBuf,
        /// What is wrong and what to do.
        detail: String,
    },
    /// A changeset that was committed can't be finished.
    #[error("a committed changeset could not be finished: {0}")]
    Recovery(#[from] StandbyError),
}

pub(crate) fn io(operation: &'static str, path: &[u8]) -> impl FnOnce(std::io::Error) -> StandbyError {
    move |source| {
        let path = coldspare_core::path::escape(path);
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                StandbyError::OutOfSpace { detail: format!("{operation} {path}: {source}") }
            }
            _ => StandbyError::Io { operation, path, source },
        }
    }
}

//! Messages: what the hosts say, as types, and what of it may be believed.
//!
//! Decides which messages exist, how they are encoded (`coldspare_core::codec`) and which are refused before anyone
//! acts on them. When which message may come is decided by the sessions, not here.
//!
//! Invariants: a decoded message passed its `check`; lists are cut off at their limit while they are decoded; `Open`,
//! `Welcome` and `Refused` never change under one ALPN name, the rest only with a new protocol version (golden bytes in
//! the tests).

use std::collections::BTreeSet;
use std::fmt;

use coldspare_core::changeset::{Ask, BulkEnd, FilePart, Have, OpError, Totals};
use coldspare_core::codec::{self, DecodeError};
use coldspare_core::compare::{Cut, LEFT_OUT_MAX, LeftOut, PARTS_MAX, SPANS_MAX, Span};
use coldspare_core::control::{Applied, Handover, Refusal, Session, Taking};
use coldspare_core::path::escape;
use coldspare_core::{Baseline, ClusterId, Digest, Epoch, NodeId, Op, Problem, RelPath, RootId, Seq};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::PROTOCOL_VERSION;
use crate::frame::Kind;
use crate::invite::{Secret, check_address};

/// LIMIT: roots of a pair of hosts.
pub const ROOTS_MAX: usize = 64;

/// LIMIT: bytes of a root's name.
pub const ROOT_NAME_BYTES_MAX: usize = 64;

/// LIMIT: questions in one `Ask`, answers in one `Answer`.
pub const ASK_ITEMS_MAX: usize = 1024;

/// LIMIT: problems in one `HeldBack`: with the longest paths and texts they fit into one message.
pub const HELD_ITEMS_MAX: usize = 100;

/// LIMIT: bytes of a problem's text.
pub const DETAIL_BYTES_MAX: usize = 4096;

/// LIMIT: repositories in one `Incomplete`.
pub const REPOSITORIES_MAX: usize = 200;

/// LIMIT: operations of one batch; the limit of a body usually comes first.
pub const BATCH_OPS_MAX: usize = 65_536;

/// LIMIT: bytes of a text for people, such as a reason.
pub const TEXT_BYTES_MAX: usize = 64 << 10;

/// What the active says on the control stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToStandby {
    /// First message of a connection.
    Open(Open),
    /// A changeset begins; its content follows on data streams.
    Begin {
        /// Its number.
        seq: Seq,
        /// What it starts from.
        baseline: Baseline,
        /// Whether the active knows what the standby has; if not it asks before it sends content.
        sure: bool,
        /// The last changeset of which the active knew, when it captured this one, what became of it.
        acked: Seq,
    },
    /// Which of these contents does the standby have?
    Ask {
        /// Counts the questions of a connection; the answer repeats it.
        no: u32,
        /// At most [`ASK_ITEMS_MAX`].
        #[serde(deserialize_with = "codec::capped::<_, _, ASK_ITEMS_MAX>")]
        items: Vec<Ask>,
    },
    /// All of a changeset was sent.
    End {
        /// Its number.
        seq: Seq,
        /// Milliseconds since 1970 on the active's clock: the tree is the active's as of then.
        as_of_ms: u64,
        /// Batches that were sent.
        batches: u64,
        /// Segments that were sent.
        segments: u64,
        /// What it amounted to.
        totals: Totals,
    },
    /// A changeset won't be finished; what was staged may be kept.
    Abandon {
        /// Its number.
        seq: Seq,
    },
    /// The active has nothing newer than the standby as of this time.
    Idle {
        /// Milliseconds since 1970 on the active's clock.
        as_of_ms: u64,
    },
    /// What the active holds back at present; what was said before is over with the first part.
    HeldBack {
        /// Whether this is the first part of the list.
        is_first: bool,
        /// At most [`HELD_ITEMS_MAX`].
        #[serde(deserialize_with = "codec::capped::<_, _, HELD_ITEMS_MAX>")]
        problems: Vec<Problem>,
    },
    /// Where this host listens when it is the standby.
    Reachable {
        /// `host:port`, as in an invitation.
        address: String,
    },
    /// What is the standby's tree, and is it sound? Asked before a handover.
    Compare,
    /// The active hands over (R7): it stored that, and captures no more. The only message behind `Welcome`.
    Handover {
        /// The tree that it hands over.
        handover: Handover,
        /// When it is taken.
        taking: Taking,
    },
    /// What does the standby have of this content, which is about to be sent as bulk? Asked at any time; of its digest, which
    /// isn't known yet, only what is the same in part can be answered.
    AskBulk {
        /// As that of `Ask`, and of the same count.
        no: u32,
        /// The file.
        item: Ask,
    },
    /// No bulk is under way or awaited: what of it no changeset took may go.
    BulkOver,
    /// Answers `AskPoint`, between two changesets: the standby's tree is to be that of this one, and is compared as it is now.
    Point {
        /// The question's number.
        no: u32,
        /// The changeset.
        seq: Seq,
    },
    /// Nothing is compared, or no further.
    NotCompared {
        /// The question's number.
        no: u32,
        /// In words.
        why: String,
    },
    /// Follows `Point`: what isn't compared.
    LeftOut {
        /// The question's number.
        no: u32,
        /// At most [`LEFT_OUT_MAX`].
        #[serde(deserialize_with = "codec::capped::<_, _, LEFT_OUT_MAX>")]
        left_out: Vec<LeftOut>,
    },
    /// Answers `AskCuts`: all spans, or the first of them, in parts.
    Cuts {
        /// That of `AskPoint`.
        no: u32,
        /// At most [`SPANS_MAX`].
        #[serde(deserialize_with = "codec::capped::<_, _, SPANS_MAX>")]
        cuts: Vec<Cut>,
    },
}

/// Versions of the protocol, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionRange {
    /// Lowest, at least 1.
    pub min: u16,
    /// Highest.
    pub max: u16,
}

/// Who the active is and what it wants to send; read before a version is agreed on, so it never changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// What it speaks.
    pub versions: VersionRange,
    /// Its release, for logs.
    pub build: String,
    /// The pair of hosts that it belongs to.
    pub cluster: ClusterId,
    /// The node itself.
    pub node: NodeId,
    /// The session that its changesets belong to (R1).
    pub session: Session,
    /// The invitation's secret, at first contact only.
    pub secret: Option<Secret>,
    /// Its roots, in the order that [`RootId`] counts; at most [`ROOTS_MAX`].
    #[serde(deserialize_with = "codec::capped::<_, _, ROOTS_MAX>")]
    pub roots: Vec<RootInfo>,
    /// Version of the chunk boundaries by which files are cut into pieces.
    pub chunking: u16,
}

/// One root of the active.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootInfo {
    /// Its name in the configuration: 1 to [`ROOT_NAME_BYTES_MAX`] bytes without control characters.
    pub name: String,
    /// Its absolute path on the active.
    #[serde(with = "codec::bytes")]
    pub path: Vec<u8>,
}

/// What the standby says on the control stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToActive {
    /// The session is served.
    Welcome(Welcome),
    /// The session isn't served; the connection ends.
    Refused(Refusal),
    /// What the standby has.
    Answer {
        /// The question's number.
        no: u32,
        /// One for each item of the question, in its order.
        #[serde(deserialize_with = "codec::capped::<_, _, ASK_ITEMS_MAX>")]
        have: Vec<Have>,
    },
    /// The changeset is staged, committed, applied and durable (G3).
    Acked {
        /// Its number.
        seq: Seq,
        /// As of which time on the active's clock the standby is.
        as_of_ms: u64,
    },
    /// The changeset wasn't applied; the standby's tree is as before it (G1).
    Failed {
        /// Its number.
        seq: Seq,
        /// Why.
        failure: Failure,
    },
    /// Repositories that a changeset left as they were, since a reference named an object that was neither sent nor
    /// there; said before its `Acked`, and again at each connection until they are taken.
    Incomplete {
        /// The changeset.
        seq: Seq,
        /// At most [`REPOSITORIES_MAX`].
        #[serde(deserialize_with = "codec::capped::<_, _, REPOSITORIES_MAX>")]
        repositories: Vec<(RootId, RelPath)>,
    },
    /// The answer to `Compare`.
    Tree {
        /// What is applied; `None` for a new standby.
        applied: Option<Applied>,
        /// Digest of all its entries.
        digest: Digest,
        /// Paths that aren't what the manifest says.
        problems: u64,
    },
    /// The handover is taken: the standby is the active now, of this session.
    Taken {
        /// The session.
        session: Session,
    },
    /// The handover is noted, until somebody promotes the standby.
    Noted,
    /// The handover is not taken; nothing changed.
    NotTaken(Refusal),
    /// Somebody wants both trees compared at one changeset; one comparison at a time.
    AskPoint {
        /// Counts those of a standby's life.
        no: u32,
    },
    /// What did the active send within these spans, up to the changeset of `Point`?
    AskCuts {
        /// That of `AskPoint`.
        no: u32,
        /// In order, disjoint; at most [`SPANS_MAX`].
        #[serde(deserialize_with = "codec::capped::<_, _, SPANS_MAX>")]
        spans: Vec<Span>,
    },
    /// Paths of which the two sides say different things: they are to be read and sent again, or taken away, as they are.
    SendAgain {
        /// At most [`REPOSITORIES_MAX`].
        #[serde(deserialize_with = "codec::capped::<_, _, REPOSITORIES_MAX>")]
        paths: Vec<(RootId, RelPath)>,
    },
}

/// Where the standby stands; the active reads it to learn the version, so it never changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version that both speak from now on.
    pub version: u16,
    /// Its release, for logs.
    pub build: String,
    /// The node itself.
    pub node: NodeId,
    /// The highest epoch that it ever saw (R3).
    pub promised: Epoch,
    /// What it has applied last; `None` for a new standby.
    pub applied: Option<Applied>,
    /// Files that are staged from earlier tries: worth asking for.
    pub staged_files: u64,
}

/// Why a changeset wasn't applied, in words for an administrator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Failure {
    /// The standby's tree isn't what the changeset starts from.
    #[error("{path} in root {} is not on the standby what the changeset starts from; the active compares everything and sends it anew", .root.0)]
    BaseDiffers {
        /// The root that holds `path`.
        root: RootId,
        /// What differs.
        path: RelPath,
    },
    /// The content that came isn't the content that was announced.
    #[error("{path} in root {} arrived with other content than announced, probably because it changed while it was read; it is sent again", .root.0)]
    ContentDiffers {
        /// The root that holds `path`.
        root: RootId,
        /// What differs.
        path: RelPath,
    },
    /// A hard link to what isn't there, or content "unchanged" of what isn't there.
    #[error("{path} in root {} refers to a file that the standby doesn't have; the active compares everything and sends it anew", .root.0)]
    UnknownTarget {
        /// The root that holds `path`.
        root: RootId,
        /// What refers to it.
        path: RelPath,
    },
    /// The two hosts counted differently.
    #[error("the hosts counted the changeset differently: something was lost on the way; it is sent again")]
    Totals,
    /// The standby's disk is full.
    #[error("the standby has no space left ({}); free or add space there, it goes on by itself", escape(.0.as_bytes()))]
    OutOfSpace(String),
    /// The standby's disk failed.
    #[error("the standby can't write: {}", escape(.0.as_bytes()))]
    Io(String),
    /// The active broke the protocol.
    #[error("the standby doesn't understand the active: {}; install the same coldspare on both hosts, and where it is the same restart `send`", escape(.0.as_bytes()))]
    Protocol(String),
    /// The changeset's number isn't the next one (R5).
    #[error("the changeset is out of order: the standby has applied {applied}")]
    Sequence {
        /// What the standby has applied last.
        applied: Seq,
    },
    /// It takes more than goes without a question.
    #[error("the standby waits for a decision: {}", escape(.0.as_bytes()))]
    Held(String),
}

/// What the active sends on data streams, with content beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Data {
    /// Operations; the payload is what belongs to each of them ([`Op::payload_bytes`]), in their order.
    Batch {
        /// The changeset that they belong to.
        seq: Seq,
        /// At most [`BATCH_OPS_MAX`].
        #[serde(deserialize_with = "codec::capped::<_, _, BATCH_OPS_MAX>")]
        ops: Vec<Op>,
    },
    /// A part of a large file; the payload is what the pieces take from it.
    Segment {
        /// The changeset that it belongs to.
        seq: Seq,
        /// What it is of, and how it comes about.
        part: FilePart,
    },
    /// A part of a large file that no changeset names yet; the payload as that of `Segment`. Belongs to the connection.
    Bulk {
        /// What it is of, and how it comes about; `file` counts those of the connection.
        part: FilePart,
    },
    /// All of such a file was sent.
    BulkEnd {
        /// Answered with this number, as a question: staged, durably, or missing.
        no: u32,
        /// The file.
        end: BulkEnd,
    },
}

/// Why a message is refused; on what is sent as on what is received.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The bytes are not a message.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A range of versions that is none.
    #[error("protocol versions {min} to {max}")]
    Versions {
        /// Lowest.
        min: u16,
        /// Highest.
        max: u16,
    },
    /// A list is over its limit.
    #[error("{count} {what}, of at most {max}")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many there may be.
        max: usize,
    },
    /// A root without a usable name, or with a name or path that is taken or too long.
    #[error("root '{0}' has no usable name or path, or one that is taken")]
    Root(String),
    /// A text is over its limit.
    #[error("a text of {0} bytes")]
    Text(usize),
    /// Spans that overlap, or are out of order.
    #[error("spans of keys that overlap, or are out of order")]
    Spans,
    /// An operation is impossible.
    #[error("{path}: {source}")]
    Op {
        /// Of what.
        path: RelPath,
        /// Why.
        source: OpError,
    },
    /// The payload isn't the content of the batch's operations.
    #[error("a batch whose files have {expected} bytes, with {found} bytes of content")]
    Inline {
        /// By its operations.
        expected: u64,
        /// By its payload.
        found: u64,
    },
}

/// A message of the control stream.
pub trait Control: Serialize + DeserializeOwned + fmt::Debug + Send + sealed::Sealed {
    /// The kind of its frames.
    const KIND: Kind;

    /// Checks what the types don't say.
    ///
    /// # Errors
    /// [`MessageError`]: the first rule that is broken.
    fn check(&self) -> Result<(), MessageError>;
}

impl Control for ToStandby {
    const KIND: Kind = Kind::ToStandby;

    fn check(&self) -> Result<(), MessageError> {
        match self {
            ToStandby::Open(open) => open.check(),
            ToStandby::Ask { items, .. } => check_count("questions", items.len(), ASK_ITEMS_MAX),
            ToStandby::HeldBack { problems, .. } => {
                check_count("problems", problems.len(), HELD_ITEMS_MAX)?;
                let too_long = problems.iter().map(|p| p.detail.len()).find(|&len| len > DETAIL_BYTES_MAX);
                too_long.map_or(Ok(()), |len| Err(MessageError::Text(len)))
            }
            ToStandby::Reachable { address } => check_address(address).map_err(|_| MessageError::Text(address.len())),
            ToStandby::Begin { .. }
            | ToStandby::End { .. }
            | ToStandby::Abandon { .. }
            | ToStandby::Idle { .. }
            | ToStandby::Compare
            | ToStandby::Handover { .. }
            | ToStandby::AskBulk { .. }
            | ToStandby::BulkOver
            | ToStandby::Point { .. } => Ok(()),
            ToStandby::NotCompared { why, .. } => check_text(why),
            ToStandby::LeftOut { left_out, .. } => check_count("paths", left_out.len(), LEFT_OUT_MAX),
            ToStandby::Cuts { cuts, .. } => {
                check_count("spans", cuts.len(), SPANS_MAX)?;
                cuts.iter().try_for_each(|cut| check_count("parts", cut.parts.len(), PARTS_MAX))
            }
        }
    }
}

impl Control for ToActive {
    const KIND: Kind = Kind::ToActive;

    fn check(&self) -> Result<(), MessageError> {
        match self {
            ToActive::Welcome(welcome) => check_text(&welcome.build),
            ToActive::Refused(refusal) | ToActive::NotTaken(refusal) => check_refusal(refusal),
            ToActive::Answer { have, .. } => check_count("answers", have.len(), ASK_ITEMS_MAX),
            ToActive::Failed {
                failure: Failure::OutOfSpace(text) | Failure::Io(text) | Failure::Protocol(text) | Failure::Held(text),
                ..
            } => check_text(text),
            ToActive::Incomplete { repositories, .. } => check_count("repositories", repositories.len(), REPOSITORIES_MAX),
            ToActive::AskCuts { spans, .. } => {
                check_count("spans", spans.len(), SPANS_MAX)?;
                if Span::are_disjoint(spans) { Ok(()) } else { Err(MessageError::Spans) }
            }
            ToActive::SendAgain { paths } => check_count("paths", paths.len(), REPOSITORIES_MAX),
            ToActive::Acked { .. }
            | ToActive::Failed { .. }
            | ToActive::Tree { .. }
            | ToActive::Taken { .. }
            | ToActive::Noted
            | ToActive::AskPoint { .. } => Ok(()),
        }
    }
}

impl Open {
    /// Checks versions, names and counts.
    ///
    /// # Errors
    /// [`MessageError`]: the first rule that is broken.
    pub fn check(&self) -> Result<(), MessageError> {
        let VersionRange { min, max } = self.versions;
        if min == 0 || min > max {
            return Err(MessageError::Versions { min, max });
        }
        check_text(&self.build)?;
        check_count("roots", self.roots.len(), ROOTS_MAX)?;
        let mut names = BTreeSet::new();
        let mut paths = BTreeSet::new();
        for RootInfo { name, path } in &self.roots {
            let name_fits = !name.is_empty() && name.len() <= ROOT_NAME_BYTES_MAX && !name.chars().any(char::is_control);
            let path_fits = path.starts_with(b"/") && path.len() <= ROOT_PATH_BYTES_MAX && !path.contains(&0);
            if !name_fits || !path_fits || !names.insert(name) || !paths.insert(path) {
                return Err(MessageError::Root(escape(name.as_bytes())));
            }
        }
        Ok(())
    }
}

impl VersionRange {
    /// What this build speaks.
    pub const OURS: VersionRange = VersionRange { min: PROTOCOL_VERSION, max: PROTOCOL_VERSION };

    /// The version to speak with a peer: the highest that both know; `None` when there is none.
    pub fn highest_common(self, other: VersionRange) -> Option<u16> {
        let highest = self.max.min(other.max);
        (highest >= self.min.max(other.min)).then_some(highest)
    }
}

impl Data {
    /// Checks what the types don't say, against the bytes of the unpacked payload.
    ///
    /// How many roots there are isn't known here: whoever applies an operation checks it against its own roots too.
    ///
    /// # Errors
    /// [`MessageError`]: the first rule that is broken.
    pub fn check(&self, payload_bytes: u64) -> Result<(), MessageError> {
        let Data::Batch { ops, .. } = self else { return Ok(()) };
        check_count("operations", ops.len(), BATCH_OPS_MAX)?;
        let mut expected = 0u64;
        for op in ops {
            op.check(ROOTS_MAX as u8).map_err(|source| MessageError::Op { path: op.path().clone(), source })?;
            expected = expected.saturating_add(op.payload_bytes());
        }
        if expected != payload_bytes {
            return Err(MessageError::Inline { expected, found: payload_bytes });
        }
        Ok(())
    }

    /// The changeset that this belongs to; none for bulk.
    pub fn seq(&self) -> Option<Seq> {
        match self {
            Data::Batch { seq, .. } | Data::Segment { seq, .. } => Some(*seq),
            Data::Bulk { .. } | Data::BulkEnd { .. } => None,
        }
    }
}

/// Decodes and checks a message of the control stream.
///
/// # Errors
/// [`MessageError`].
pub fn decode_control<M: Control>(body: &[u8]) -> Result<M, MessageError> {
    let message: M = codec::decode(body)?;
    message.check()?;
    Ok(message)
}

/// Decodes and checks what came with a payload of so many unpacked bytes.
///
/// # Errors
/// [`MessageError`].
pub fn decode_data(body: &[u8], payload_bytes: u64) -> Result<Data, MessageError> {
    let data: Data = codec::decode(body)?;
    data.check(payload_bytes)?;
    Ok(data)
}

fn check_count(what: &'static str, count: usize, max: usize) -> Result<(), MessageError> {
    if count > max { Err(MessageError::Count { what, count, max }) } else { Ok(()) }
}

fn check_refusal(refusal: &Refusal) -> Result<(), MessageError> {
    match refusal {
        Refusal::Role(text) | Refusal::Roots(text) | Refusal::Unable(text) | Refusal::Handover(text) => check_text(text),
        _ => Ok(()),
    }
}

fn check_text(text: &str) -> Result<(), MessageError> {
    if text.len() > TEXT_BYTES_MAX { Err(MessageError::Text(text.len())) } else { Ok(()) }
}

mod sealed {
    pub trait Sealed {}

    impl Sealed for super::ToStandby {}
    impl Sealed for super::ToActive {}
}

/// LIMIT: bytes of a root's path on the active.
const ROOT_PATH_BYTES_MAX: usize = 4095;

#[cfg(test)]
mod tests;

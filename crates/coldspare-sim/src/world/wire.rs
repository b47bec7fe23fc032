//! The network between both ends: what is said, when it arrives, and what is lost.
//!
//! As QUIC promises: a stream is in order, streams overtake each other, nothing arrives twice, and what was under way
//! when the link went is gone.

use std::collections::{BTreeMap, VecDeque};

use coldspare_core::changeset::{Ask, FilePart, Have};
use coldspare_core::control::{Applied, Session};
use coldspare_core::git::family::Repository;
use coldspare_core::intake::End;
use coldspare_core::{Baseline, Op, Problem, RelPath, RootId, Seq};

/// Control messages of the active.
#[derive(Debug, Clone)]
pub(super) enum ToStandby {
    /// First of a link.
    Open(Session),
    /// A changeset begins.
    Begin(Seq, Baseline, Seq),
    /// Which of these contents are there?
    Ask(u32, Vec<Ask>),
    /// All was sent.
    End(End),
    /// It won't be finished.
    Abandon(Seq),
    /// Nothing is newer.
    Idle,
    /// All that is held back.
    HeldBack(Vec<Problem>),
}

/// Control messages of the standby.
#[derive(Debug, Clone)]
pub(super) enum ToActive {
    /// The session is served.
    Welcome(Option<Applied>, u64),
    /// It isn't, for now.
    Refused(String),
    /// What is there.
    Answer(u32, Vec<Have>),
    /// Durable.
    Acked(Seq),
    /// These repositories were left as they were, and have to be sent again.
    Incomplete(Seq, Vec<Repository>),
    /// Not applied; the file that has to come whole, if that is the reason.
    Failed(Seq, Option<(RootId, RelPath)>, String),
}

/// One data frame.
#[derive(Debug, Clone)]
pub(super) enum Frame {
    /// Operations with the content of small files.
    Batch(Seq, Vec<Op>, Vec<u8>),
    /// A stretch of a large file, with its literal bytes.
    Segment(Seq, FilePart, Vec<u8>),
}

impl Frame {
    /// The changeset that it belongs to.
    pub(super) fn seq(&self) -> Seq {
        match self {
            Frame::Batch(seq, ..) | Frame::Segment(seq, ..) => *seq,
        }
    }
}

/// One connection.
#[derive(Debug, Default)]
pub(super) struct Link {
    /// Whether what is sent arrives.
    pub(super) is_up: bool,
    /// Whether the standby closed it, after its last message was sent.
    pub(super) has_last_word: bool,
    /// When the last message in each direction arrives.
    pub(super) to_standby_us: u64,
    /// Likewise.
    pub(super) to_active_us: u64,
    /// The data streams.
    pub(super) streams: Vec<Stream>,
}

/// One data stream.
#[derive(Debug, Default)]
pub(super) struct Stream {
    /// Frames under way, and when each arrives.
    pub(super) frames: VecDeque<(u64, Frame)>,
    /// Whether the standby holds a frame of it.
    pub(super) is_held: bool,
}

/// All connections, by number.
#[derive(Debug, Default)]
pub(super) struct Wire {
    /// By number.
    pub(super) links: BTreeMap<u64, Link>,
    /// Nobody reaches anybody.
    pub(super) is_parted: bool,
    /// The number of the last one.
    pub(super) last: u64,
}

/// LIMIT: frames under way on one link, as windows limit them.
pub(super) const FRAMES_MAX: usize = 8;

impl Wire {
    /// How many frames are under way on a link.
    pub(super) fn frames(&self, link: u64) -> usize {
        self.links.get(&link).map_or(0, |l| l.streams.iter().map(|s| s.frames.len()).sum())
    }
}

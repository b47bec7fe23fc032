//! What the active sent for one changeset, so that it can be sent once more, to a standby in another state.

use coldspare_core::changeset::Totals;
use coldspare_core::control::Applied;
use coldspare_core::{Baseline, Op, Seq, SessionId};
use coldspare_os::Disk;
use coldspare_scan::capture::FilePart;
use coldspare_standby::{Standby, StandbyError};

/// One changeset as it was handed over.
#[derive(Debug, Clone)]
pub struct Sent {
    pub(crate) session: SessionId,
    /// Its number.
    pub seq: Seq,
    pub(crate) baseline: Baseline,
    pub(crate) parts: Vec<Part>,
    pub(crate) as_of_ms: u64,
    pub(crate) totals: Totals,
}

/// One call of the outlet.
#[derive(Debug, Clone)]
pub(crate) enum Part {
    Batch { ops: Vec<Op>, payload: Vec<u8> },
    Segment { part: FilePart, literal: Vec<u8> },
}

impl Sent {
    /// Stages and finishes the changeset on `standby`, whose tree is the one that it starts from.
    ///
    /// # Errors
    /// As [`Standby::begin`], [`Standby::stage_batch`] and [`Standby::finish`].
    pub fn send_to<D: Disk>(&self, standby: &Standby<D>) -> Result<Applied, StandbyError> {
        standby.begin(self.session, self.seq, self.baseline, self.seq)?;
        for part in &self.parts {
            part.stage(standby, self.seq)?;
        }
        standby.finish(self.seq, self.as_of_ms, self.totals).map(|finished| finished.applied)
    }
}

impl Part {
    pub(crate) fn stage<D: Disk>(&self, standby: &Standby<D>, seq: Seq) -> Result<(), StandbyError> {
        match self {
            Part::Batch { ops, payload } => standby.stage_batch(seq, ops.clone(), payload),
            Part::Segment { part, literal } => standby.stage_segment(seq, part, literal),
        }
    }
}

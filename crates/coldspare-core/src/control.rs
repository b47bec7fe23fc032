//! The node's control record: which cluster, which role, which epoch, whom it follows.
//!
//! How it changes is decided by [`step`]. It knows nothing of connections or of where the record is kept.
//!
//! Invariants: `promised` never falls; the last session of the lineage is of no higher epoch.

mod step;

use serde::{Deserialize, Serialize};

use crate::codec;
use crate::entry::Digest;
use crate::id::{ClusterId, Epoch, NodeId, Seq, SessionId};

pub use step::{Effect, Event, Fresh, Proof, Taking, step};

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Role {
    /// Holds the copy; obeys the active it follows.
    Standby,
    /// Owns the home; sends.
    Active,
    /// Was active and is handing over (R7).
    Handover,
    /// Was active and has seen a higher epoch (R4).
    Fenced,
}

impl Role {
    /// The word for status output and messages.
    pub fn word(self) -> &'static str {
        match self {
            Role::Standby => "standby",
            Role::Active => "active",
            Role::Handover => "handover",
            Role::Fenced => "fenced",
        }
    }
}

/// One opening of an epoch (R1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Session {
    /// The epoch that it opens or continues.
    pub epoch: Epoch,
    /// Its identity.
    pub id: SessionId,
    /// The node that opened it.
    pub opened_by: NodeId,
}

/// What a standby has applied last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Applied {
    /// The session that the changeset belongs to.
    pub session: SessionId,
    /// The changeset.
    pub seq: Seq,
    /// Milliseconds since 1970 on the active's clock: the tree is the active's as of then.
    pub as_of_ms: u64,
}

/// A tree in the order of all trees of a pair: the changeset of a session that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The session that the changeset belongs to.
    pub session: SessionId,
    /// The changeset.
    pub seq: Seq,
}

impl From<Applied> for Place {
    fn from(applied: Applied) -> Place {
        Place { session: applied.session, seq: applied.seq }
    }
}

/// Why a session was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Reason {
    /// By the first active of a pair, or one that was invited later.
    Invited,
    /// The active's host went down and may have lost durable state (R1).
    Restarted,
    /// The active before handed over (R7).
    HandedOver,
    /// A person, or who acts for one, promoted the node without a handover (R8).
    Forced,
    /// By the other node; this one follows it and wasn't told why.
    Followed,
}

impl Reason {
    /// The word for status output.
    pub fn word(self) -> &'static str {
        match self {
            Reason::Invited => "invited",
            Reason::Restarted => "restarted",
            Reason::HandedOver => "handed-over",
            Reason::Forced => "forced",
            Reason::Followed => "followed",
        }
    }
}

/// A session in a node's lineage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Opening {
    /// The session.
    pub session: Session,
    /// The tree that it began with, as far as it is known here.
    pub parent: Option<Place>,
    /// Why it was opened.
    pub reason: Reason,
}

/// The tree that an active gives over, once it has written its last changeset (R7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Handover {
    /// The last changeset.
    pub place: Place,
    /// Digest of all its entries.
    pub digest: Digest,
}

/// All that a node must not forget.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ControlRecord {
    /// The pair that it belongs to.
    pub cluster: ClusterId,
    /// Its own identity.
    pub node: NodeId,
    /// What it is.
    pub role: Role,
    /// The highest epoch that it ever saw.
    pub promised: Epoch,
    /// The sessions that its tree came about in, the one that it is in last; at most [`LINEAGE_MAX`].
    #[serde(deserialize_with = "codec::capped::<_, _, LINEAGE_MAX>")]
    pub lineage: Vec<Opening>,
    /// On a standby: what its active offers. On one that was active: what it gave over.
    pub handover: Option<Handover>,
    /// The run of the host's kernel in which the session was opened or last continued; an active that finds another
    /// one after an unclean stop may have lost what was not synced (R1).
    pub boot: [u8; 16],
    /// Whether the daemon stopped in good order.
    pub clean: bool,
}

/// Why a session is not served.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The key is not the pinned one.
    #[error("this host's key isn't the one the standby is paired with; pair anew with `coldspare init standby` if that is meant")]
    UnknownKey,
    /// The invitation was used before, or is for another standby.
    #[error("the invitation is not valid: it was used already, or another has replaced it; `coldspare init standby` makes a new one")]
    Invitation,
    /// Another cluster.
    #[error("unrelated data: the standby belongs to cluster {standby}, this host to cluster {active}")]
    Cluster {
        /// The standby's.
        standby: ClusterId,
        /// The active's.
        active: ClusterId,
    },
    /// The peer is no standby.
    #[error("the peer is {0}, not a standby")]
    Role(String),
    /// A lower epoch (R3).
    #[error("fenced: the standby has promised epoch {promised}, this host is at epoch {offered}")]
    Epoch {
        /// The standby's promise.
        promised: Epoch,
        /// The active's epoch.
        offered: Epoch,
    },
    /// The same epoch opened by two nodes (R3).
    #[error("conflict: epoch {0} was opened by another host too; nothing is taken until a person decides")]
    Conflict(Epoch),
    /// No protocol version in common.
    #[error("the standby speaks protocol versions {min} to {max}; install the same coldspare on both hosts")]
    Version {
        /// Lowest that the standby speaks.
        min: u16,
        /// Highest that the standby speaks.
        max: u16,
    },
    /// The roots differ in number, name or place.
    #[error("the hosts disagree on the roots: {0}")]
    Roots(String),
    /// Another connection of the same active is being served.
    #[error("the standby serves another connection of this host; it ends within seconds")]
    Busy,
    /// The standby can't serve now.
    #[error("the standby can't take changes: {0}")]
    Unable(String),
    /// A session that the standby has left for a later one.
    #[error("session {0} is over: the standby follows a later one of the same host; was its state folder restored from a copy?")]
    Superseded(SessionId),
    /// The tree isn't the one that is handed over.
    #[error("the standby isn't at the last changeset of the handover: {0}")]
    Handover(String),
}

impl ControlRecord {
    /// The record of a node that is set up as standby of `cluster`.
    pub fn standby(cluster: ClusterId, node: NodeId) -> ControlRecord {
        let role = Role::Standby;
        ControlRecord { cluster, node, role, promised: Epoch(0), lineage: Vec::new(), handover: None, boot: [0; 16], clean: true }
    }

    /// The record of a node that is set up as active of `cluster`, and opens `epoch` in kernel run `boot`.
    pub fn active(cluster: ClusterId, node: NodeId, epoch: Epoch, id: SessionId, boot: [u8; 16]) -> ControlRecord {
        let session = Session { epoch, id, opened_by: node };
        let lineage = vec![Opening { session, parent: None, reason: Reason::Invited }];
        ControlRecord { cluster, node, role: Role::Active, promised: epoch, lineage, handover: None, boot, clean: true }
    }

    /// The session that the node is in; `None` for a standby that never met its active.
    pub fn session(&self) -> Option<Session> {
        self.lineage.last().map(|opening| opening.session)
    }

    /// Whether a changeset of `session` may be applied (R5).
    pub fn obeys(&self, session: SessionId) -> bool {
        let is_current = self.session().is_some_and(|mine| mine.id == session && mine.epoch >= self.promised);
        self.role == Role::Standby && is_current
    }

    /// The record as a slot of the control file: magic, sequence, value, BLAKE3 of all before it.
    pub fn encode_slot(&self, slot_seq: u64) -> Vec<u8> {
        let value = codec::encode(self);
        let mut out = Vec::with_capacity(SLOT_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&slot_seq.to_le_bytes());
        out.extend_from_slice(&u32::try_from(value.len()).expect("a control record is small").to_le_bytes());
        out.extend_from_slice(&value);
        let digest = blake3::hash(&out);
        out.extend_from_slice(digest.as_bytes());
        assert!(out.len() <= SLOT_BYTES, "a control record outgrew its slot");
        out.resize(SLOT_BYTES, 0);
        out
    }

    /// Reads one slot; `None` when it is torn, empty or foreign.
    pub fn decode_slot(bytes: &[u8]) -> Option<(u64, ControlRecord)> {
        let head = bytes.get(..20)?;
        if head[..8] != MAGIC {
            return None;
        }
        let slot_seq = u64::from_le_bytes(head[8..16].try_into().ok()?);
        let len = u32::from_le_bytes(head[16..20].try_into().ok()?) as usize;
        let value = bytes.get(20..20usize.checked_add(len)?)?;
        let digest = bytes.get(20 + len..20 + len + 32)?;
        if blake3::hash(&bytes[..20 + len]).as_bytes()[..] != *digest {
            return None;
        }
        Some((slot_seq, codec::decode(value).ok()?))
    }
}

/// Bytes of one slot of the control file; the file is two of them.
pub const SLOT_BYTES: usize = 4096;

/// LIMIT: sessions of a lineage; the oldest is forgotten.
pub const LINEAGE_MAX: usize = 32;

const MAGIC: [u8; 8] = *b"csctrl\0\x02";

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ControlRecord {
        let mut record = ControlRecord::active(ClusterId([1; 16]), NodeId([2; 16]), Epoch(3), SessionId([4; 16]), [5; 16]);
        record.handover = Some(Handover { place: Place { session: SessionId([4; 16]), seq: Seq(6) }, digest: Digest([7; 32]) });
        record
    }

    #[test]
    fn a_slot_keeps_its_bytes() {
        let slot = record().encode_slot(11);
        let hex = data_encoding::HEXLOWER.encode(&slot[8..157]);
        assert_eq!(hex, SLOT);
        assert_eq!(ControlRecord::decode_slot(&slot), Some((11, record())));
    }

    #[test]
    fn the_longest_lineage_fits_its_slot() {
        let mut record = record();
        let place = Place { session: SessionId([9; 16]), seq: Seq(u64::MAX) };
        let session = Session { epoch: Epoch(u64::MAX), id: SessionId([8; 16]), opened_by: NodeId([7; 16]) };
        record.lineage = vec![Opening { session, parent: Some(place), reason: Reason::Forced }; LINEAGE_MAX];
        record.promised = Epoch(u64::MAX);
        assert_eq!(ControlRecord::decode_slot(&record.encode_slot(u64::MAX)), Some((u64::MAX, record)));
    }

    #[test]
    fn any_flipped_bit_in_a_slot_is_noticed() {
        let slot = record().encode_slot(11);
        let used = 20 + u32::from_le_bytes(slot[16..20].try_into().unwrap()) as usize + 32;
        for at in 0..used {
            for bit in 0..8 {
                let mut torn = slot.clone();
                torn[at] ^= 1 << bit;
                assert_eq!(ControlRecord::decode_slot(&torn), None, "byte {at} bit {bit}");
            }
        }
        assert_eq!(ControlRecord::decode_slot(&slot[..40]), None);
    }

    const SLOT: &str = concat!(
        "0b000000000000008900000001010101010101010101010101010101020202020202020202020202020202020103010304040404040404",
        "04040404040404040402020202020202020202020202020202000001040404040404040404040404040404040607070707070707070707",
        "070707070707070707070707070707070707070707070505050505050505050505050505050501",
    );
}

//! The node's control record: which cluster, which role, which epoch, whom it follows.
//!
//! Decides whether a session may be served (R2, R3). It knows nothing of connections or of where the record is kept.
//!
//! Invariants: `promised` never falls.

use serde::{Deserialize, Serialize};

use crate::codec;
use crate::id::{ClusterId, Epoch, NodeId, Seq, SessionId};

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// The epoch that it opens or continues.
    pub epoch: Epoch,
    /// Its identity.
    pub id: SessionId,
    /// The node that opened it.
    pub opened_by: NodeId,
}

/// What a standby has applied last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// The session that the changeset belongs to.
    pub session: SessionId,
    /// The changeset.
    pub seq: Seq,
    /// Milliseconds since 1970 on the active's clock: the tree is the active's as of then.
    pub as_of_ms: u64,
}

/// All that a node must not forget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlRecord {
    /// The pair that it belongs to.
    pub cluster: ClusterId,
    /// Its own identity.
    pub node: NodeId,
    /// What it is.
    pub role: Role,
    /// The highest epoch that it ever saw.
    pub promised: Epoch,
    /// The session that it is in; for a standby that never met its active, `None`.
    pub session: Option<Session>,
    /// The run of the host's kernel in which the session was opened or last continued; an active that finds another
    /// one after an unclean stop may have lost what was not synced (R1).
    pub boot: [u8; 16],
    /// Whether the daemon stopped in good order.
    pub clean: bool,
}

/// Why a session is not served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
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
}

/// What a standby does with a session that it accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It is the session that the standby follows already.
    Known,
    /// The standby follows this session from now on; the record has to be stored before the answer.
    Adopt,
}

impl ControlRecord {
    /// Decides whether a standby serves `session` of `cluster` (R2, R3, R5).
    ///
    /// # Errors
    /// [`Refusal`]: another cluster, wrong role, lower epoch, conflict.
    pub fn admit(&self, cluster: ClusterId, session: &Session) -> Result<Admission, Refusal> {
        if cluster != self.cluster {
            return Err(Refusal::Cluster { standby: self.cluster, active: cluster });
        }
        if session.epoch < self.promised && !crate::seeded_bug!(LowerEpochsAreServed) {
            return Err(Refusal::Epoch { promised: self.promised, offered: session.epoch });
        }
        if self.role != Role::Standby {
            return Err(Refusal::Role(self.role.word().into()));
        }
        match &self.session {
            Some(mine) if mine.id == session.id => Ok(Admission::Known),
            Some(mine) if mine.epoch == session.epoch && mine.opened_by != session.opened_by => Err(Refusal::Conflict(session.epoch)),
            _ => Ok(Admission::Adopt),
        }
    }

    /// The record after `session` was adopted.
    pub fn adopt(mut self, session: Session) -> ControlRecord {
        self.promised = self.promised.max(session.epoch);
        self.session = Some(session);
        self
    }

    /// Whether an active that starts in kernel run `boot` continues its session; if not it opens a new one (R1).
    ///
    /// A daemon that was killed loses nothing that the home holds; a host that went down may, whether or not the daemon
    /// had stopped well before.
    pub fn continues(&self, boot: [u8; 16]) -> bool {
        self.session.is_some() && (self.boot == boot || crate::seeded_bug!(SessionsSurviveThePowerLoss))
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

const MAGIC: [u8; 8] = *b"csctrl\0\x01";

#[cfg(test)]
mod tests {
    use super::*;

    const MINE: ClusterId = ClusterId([1; 16]);

    fn session(epoch: u64, id: u8, by: u8) -> Session {
        Session { epoch: Epoch(epoch), id: SessionId([id; 16]), opened_by: NodeId([by; 16]) }
    }

    fn standby(promised: u64, follows: Option<Session>) -> ControlRecord {
        ControlRecord {
            cluster: MINE,
            node: NodeId([9; 16]),
            role: Role::Standby,
            promised: Epoch(promised),
            session: follows,
            boot: [0; 16],
            clean: false,
        }
    }

    fn check(record: ControlRecord, offered: Session, expected: Result<Admission, Refusal>) {
        assert_eq!(record.admit(MINE, &offered), expected);
    }

    #[test]
    fn a_standby_obeys_the_highest_epoch_it_promised() {
        check(standby(0, None), session(1, 1, 1), Ok(Admission::Adopt));
        check(standby(1, Some(session(1, 1, 1))), session(1, 1, 1), Ok(Admission::Known));
        check(standby(1, Some(session(1, 1, 1))), session(1, 2, 1), Ok(Admission::Adopt));
        check(standby(1, Some(session(1, 1, 1))), session(2, 2, 2), Ok(Admission::Adopt));
        check(standby(1, Some(session(1, 1, 1))), session(1, 2, 2), Err(Refusal::Conflict(Epoch(1))));
        let lower = Refusal::Epoch { promised: Epoch(3), offered: Epoch(2) };
        check(standby(3, Some(session(2, 1, 1))), session(2, 1, 1), Err(lower));
        let active = ControlRecord { role: Role::Active, ..standby(1, None) };
        check(active, session(1, 1, 1), Err(Refusal::Role("active".into())));
        let other = ClusterId([2; 16]);
        assert_eq!(standby(1, None).admit(other, &session(1, 1, 1)), Err(Refusal::Cluster { standby: MINE, active: other }));
    }

    #[test]
    fn adopting_keeps_the_highest_promise() {
        assert_eq!(standby(1, None).adopt(session(4, 1, 1)).promised, Epoch(4));
        assert_eq!(standby(7, None).adopt(session(7, 1, 1)).promised, Epoch(7));
    }

    #[test]
    fn a_session_survives_a_killed_daemon_but_not_a_power_cut() {
        let mut record = ControlRecord { role: Role::Active, boot: [5; 16], ..standby(1, Some(session(1, 1, 1))) };
        assert!(record.continues([5; 16]));
        assert!(!record.continues([6; 16]));
        record.clean = true;
        assert!(!record.continues([6; 16]));
        record.session = None;
        assert!(!record.continues([5; 16]));
    }

    #[test]
    fn any_flipped_bit_in_a_slot_is_noticed() {
        let record = standby(2, Some(session(2, 3, 4)));
        let slot = record.encode_slot(11);
        assert_eq!(ControlRecord::decode_slot(&slot), Some((11, record)));
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
}

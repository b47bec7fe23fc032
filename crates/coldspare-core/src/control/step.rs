//! How a node's control record changes: one function, run by the daemons and by the model checker (R1 to R9).
//!
//! [`step`] takes the record and what happened, and returns the record as it is then with what is to be done, or says why
//! nothing changes. Effects are done in their order, each once the one before is done; a crash between two leaves the
//! rest undone, and the event comes again or doesn't.
//!
//! It must not know sockets, files, trees or time.
//!
//! Invariants:
//! - `promised` never falls, and grows with each session that this node opens but one after a restart (R1, R7, R8);
//! - what the other node may rely on is stored before it is answered ([`Effect::Store`] comes first) (R4, R7);
//! - a refusal ([`Err`]) changes nothing.

use serde::{Deserialize, Serialize};

use crate::entry::Digest;
use crate::id::{ClusterId, Epoch, Seq, SessionId};
use crate::seeded_bug;

use super::{Applied, ControlRecord, Handover, LINEAGE_MAX, Opening, Place, Reason, Refusal, Role, Session};

/// What a session that this node opens is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fresh {
    /// An id that was never used.
    pub id: SessionId,
    /// The run of this host's kernel.
    pub boot: [u8; 16],
}

/// When a handover is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Taking {
    /// At once: a switchover.
    Now,
    /// When the standby is promoted: only noted until then.
    WhenPromoted,
}

/// Why there is no other active.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Proof {
    /// It handed over; `digest` is that of this node's tree.
    Handover {
        /// Digest of all entries.
        digest: Digest,
    },
    /// It was fenced: a command says so.
    Fenced,
    /// A person accepts what is lost, and that there may be two.
    LossAccepted,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// The daemon of a node that is active, or was, starts (R1).
    Started(Fresh),
    /// It stopped in good order.
    Stopped,
    /// A node that wants to send opens a session (R2, R3).
    Hello {
        /// Its pair.
        cluster: ClusterId,
        /// Its session.
        session: Session,
    },
    /// The other node, to which this one wanted to send, has promised a higher epoch (R4).
    Outranked {
        /// What it promised.
        promised: Epoch,
    },
    /// The other node, to which this one wanted to send, knows another opener of this epoch (R3).
    Contested {
        /// The epoch of both.
        epoch: Epoch,
    },
    /// The last changeset of this active is on the standby, and nothing writes any more (R7).
    HandOver {
        /// That changeset.
        seq: Seq,
        /// Digest of all entries.
        digest: Digest,
    },
    /// The active hands over (R7); no changeset is committed here and not yet applied.
    HandedOver {
        /// What it hands over.
        handover: Handover,
        /// When it is taken.
        taking: Taking,
        /// What this node's tree is.
        applied: Option<Applied>,
        /// Digest of all its entries.
        digest: Digest,
        /// Of the session that begins.
        fresh: Fresh,
    },
    /// The standby took the handover, with this session.
    Taken {
        /// The new active's.
        session: Session,
    },
    /// This node is to be the active (R8); no changeset is committed here and not yet applied.
    Promote {
        /// Why there is no other.
        proof: Proof,
        /// What its tree is, where it was a standby.
        applied: Option<Applied>,
        /// Of the session that begins.
        fresh: Fresh,
    },
    /// This node, which was active and is fenced, follows the other from now on (R6): its store knows, durably, all of its
    /// tree, so that nothing of it is replaced unseen.
    Demote,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Run the fence-self hook: nothing may write the home from now on (R4).
    FenceSelf,
    /// Distrust, durably, what the index knows of recent changes (R1).
    DistrustIndex,
    /// Store the record, durably.
    Store,
    /// Serve the session that was opened.
    Serve,
    /// Answer why the session isn't served.
    Refuse(Refusal),
    /// Hand over to the standby; again at each connection until it is taken.
    Offer(Handover),
    /// Answer that the handover is noted.
    AnswerNoted,
    /// Answer that the handover is taken, by this session.
    AnswerTaken(Session),
    /// Say that a person has to decide.
    Alarm,
}

type Stepped = Result<(ControlRecord, Vec<Effect>), Refusal>;

/// Takes one event: the record as it is then, and what is to be done, in this order.
///
/// # Errors
/// [`Refusal`]: nothing changes, nothing is to be done but to say so.
pub fn step(record: &ControlRecord, event: Event) -> Stepped {
    match event {
        Event::Started(fresh) => started(record, fresh),
        Event::Stopped => Ok((ControlRecord { clean: true, ..record.clone() }, vec![Effect::Store])),
        Event::Hello { cluster, session } => hello(record, cluster, session),
        Event::Outranked { promised } => Ok(outranked(record, promised)),
        Event::Contested { epoch } => Ok(contested(record, epoch)),
        Event::HandOver { seq, digest } => hand_over(record, seq, digest),
        Event::HandedOver { handover, taking, applied, digest, fresh } => handed_over(record, handover, taking, (applied, digest), fresh),
        Event::Taken { session } => taken(record, session),
        Event::Promote { proof, applied, fresh } => promote(record, proof, applied, fresh),
        Event::Demote => demote(record),
    }
}

/// A daemon that was killed loses nothing that the home holds; a host that went down may, whether or not the daemon had
/// stopped well before (R1).
fn started(record: &ControlRecord, fresh: Fresh) -> Stepped {
    let mut next = ControlRecord { clean: false, ..record.clone() };
    match (record.role, record.handover) {
        (Role::Active, _) => {}
        (Role::Handover, Some(handover)) => return Ok((next, vec![Effect::Store, Effect::Offer(handover)])),
        _ => return Err(wrong_role(record)),
    }
    if record.session().is_some() && (record.boot == fresh.boot || seeded_bug!(SessionsSurviveThePowerLoss)) {
        next.boot = fresh.boot;
        return Ok((next, vec![Effect::Store]));
    }
    let session = Session { epoch: record.promised, id: fresh.id, opened_by: record.node };
    next.open(Opening { session, parent: None, reason: Reason::Restarted }, fresh.boot);
    next.clean = false;
    Ok((next, vec![Effect::DistrustIndex, Effect::Store]))
}

fn hello(record: &ControlRecord, cluster: ClusterId, session: Session) -> Stepped {
    if cluster != record.cluster {
        return Err(Refusal::Cluster { standby: record.cluster, active: cluster });
    }
    if session.epoch < record.promised && !seeded_bug!(LowerEpochsAreServed) {
        return Err(Refusal::Epoch { promised: record.promised, offered: session.epoch });
    }
    let mine = record.session();
    let is_conflict =
        mine.is_some_and(|mine| mine.epoch == session.epoch && mine.opened_by != session.opened_by) && !seeded_bug!(ConflictsAreServed);
    if record.role != Role::Standby {
        return hello_of_a_rival(record, session, is_conflict);
    }
    if mine.is_some_and(|mine| mine.id == session.id) {
        return Ok((record.clone(), vec![Effect::Serve]));
    }
    if record.lineage.iter().any(|opening| opening.session.id == session.id) && !seeded_bug!(EarlierSessionsAreServed) {
        return Err(Refusal::Superseded(session.id));
    }
    if is_conflict {
        return Err(Refusal::Conflict(session.epoch));
    }
    let mut next = record.clone();
    next.promised = record.promised.max(session.epoch);
    next.handover = None;
    next.enter(Opening { session, parent: None, reason: Reason::Followed });
    Ok((next, stored(vec![Effect::Serve], seeded_bug!(AnswersComeBeforeTheyAreStored))))
}

/// A node that was, or is, active meets one that is.
fn hello_of_a_rival(record: &ControlRecord, session: Session, is_conflict: bool) -> Stepped {
    if session.epoch > record.promised {
        let (next, mut effects) = outranked(record, session.epoch);
        let role = next.role.word().into();
        effects.push(Effect::Refuse(Refusal::Role(role)));
        return Ok((next, effects));
    }
    if !is_conflict {
        return Err(wrong_role(record));
    }
    if record.role == Role::Fenced {
        return Err(Refusal::Conflict(session.epoch));
    }
    let next = ControlRecord { role: Role::Fenced, ..record.clone() };
    let effects = vec![Effect::FenceSelf, Effect::Store, Effect::Refuse(Refusal::Conflict(session.epoch)), Effect::Alarm];
    Ok((next, effects))
}

fn outranked(record: &ControlRecord, promised: Epoch) -> (ControlRecord, Vec<Effect>) {
    if promised <= record.promised {
        return (record.clone(), Vec::new());
    }
    let mut next = ControlRecord { promised, ..record.clone() };
    let mut effects = vec![Effect::Store];
    if matches!(record.role, Role::Active | Role::Handover) {
        next.role = Role::Fenced;
        effects.insert(0, Effect::FenceSelf);
        if record.role == Role::Active {
            effects.push(Effect::Alarm);
        }
    }
    (next, effects)
}

/// Both stop: were this one active still, whoever decides for it could open no higher epoch, which the other obeys.
fn contested(record: &ControlRecord, epoch: Epoch) -> (ControlRecord, Vec<Effect>) {
    let leads = matches!(record.role, Role::Active | Role::Handover);
    if !leads || epoch != record.promised || seeded_bug!(ConflictsPass) {
        return (record.clone(), Vec::new());
    }
    let next = ControlRecord { role: Role::Fenced, ..record.clone() };
    (next, vec![Effect::FenceSelf, Effect::Store, Effect::Alarm])
}

fn hand_over(record: &ControlRecord, seq: Seq, digest: Digest) -> Stepped {
    match (record.role, record.handover, record.session()) {
        (Role::Handover, Some(handover), _) => Ok((record.clone(), vec![Effect::Offer(handover)])),
        (Role::Active, _, Some(session)) => {
            let handover = Handover { place: Place { session: session.id, seq }, digest };
            let next = ControlRecord { role: Role::Handover, handover: Some(handover), ..record.clone() };
            Ok((next, stored(vec![Effect::Offer(handover)], seeded_bug!(HandoversAreSentBeforeTheyAreStored))))
        }
        _ => Err(wrong_role(record)),
    }
}

fn handed_over(
    record: &ControlRecord,
    handover: Handover,
    taking: Taking,
    (applied, digest): (Option<Applied>, Digest),
    fresh: Fresh,
) -> Stepped {
    if record.role == Role::Active
        && let Some(Opening { session, parent: Some(parent), reason: Reason::HandedOver }) = record.lineage.last()
        && *parent == handover.place
    {
        return Ok((record.clone(), vec![Effect::AnswerTaken(*session)])); // the answer was lost
    }
    if !record.obeys(handover.place.session) {
        return Err(match record.role {
            Role::Standby => Refusal::Superseded(handover.place.session),
            _ => wrong_role(record),
        });
    }
    check_handover(handover, applied, digest)?;
    let mut next = record.clone();
    if taking == Taking::WhenPromoted {
        next.handover = Some(handover);
        return Ok((next, vec![Effect::Store, Effect::AnswerNoted]));
    }
    let session = next.lead(Some(handover.place), Reason::HandedOver, fresh);
    Ok((next, stored(vec![Effect::AnswerTaken(session)], seeded_bug!(AnswersComeBeforeTheyAreStored))))
}

fn check_handover(handover: Handover, applied: Option<Applied>, digest: Digest) -> Result<(), Refusal> {
    if seeded_bug!(HandoversAreTakenAnywhere) {
        return Ok(());
    }
    match applied {
        Some(a) if Place::from(a) == handover.place && digest == handover.digest => Ok(()),
        Some(a) if Place::from(a) == handover.place => Err(Refusal::Handover("its tree has another digest".into())),
        Some(a) => Err(Refusal::Handover(format!("it has {} of session {}, not {}", a.seq, a.session, handover.place.seq))),
        None => Err(Refusal::Handover("it has none".into())),
    }
}

fn taken(record: &ControlRecord, session: Session) -> Stepped {
    let Some(handover) = record.handover.filter(|_| matches!(record.role, Role::Handover | Role::Fenced)) else {
        return Err(wrong_role(record));
    };
    let mut next = ControlRecord { role: Role::Fenced, ..record.clone() };
    if session.epoch >= record.promised && record.session() != Some(session) {
        next.promised = session.epoch;
        next.enter(Opening { session, parent: Some(handover.place), reason: Reason::HandedOver });
    }
    Ok((next, vec![Effect::Store]))
}

fn promote(record: &ControlRecord, proof: Proof, applied: Option<Applied>, fresh: Fresh) -> Stepped {
    let mut next = record.clone();
    match (record.role, proof) {
        (Role::Active, _) => return Ok((next, Vec::new())),
        (Role::Standby, Proof::Handover { digest }) => {
            let Some(handover) = record.handover else { return Err(Refusal::Handover("there is none".into())) };
            if !record.obeys(handover.place.session) {
                return Err(Refusal::Superseded(handover.place.session));
            }
            check_handover(handover, applied, digest)?;
            next.lead(Some(handover.place), Reason::HandedOver, fresh);
        }
        (_, Proof::Handover { .. }) => return Err(wrong_role(record)),
        (Role::Standby, _) => drop(next.lead(applied.map(Place::from), Reason::Forced, fresh)),
        // Its tree is not that of a changeset.
        (Role::Fenced | Role::Handover, _) => drop(next.lead(None, Reason::Forced, fresh)),
    }
    Ok((next, vec![Effect::Store]))
}

fn demote(record: &ControlRecord) -> Stepped {
    match record.role {
        Role::Standby => Ok((record.clone(), Vec::new())),
        Role::Fenced => {
            let next = ControlRecord { role: Role::Standby, handover: None, ..record.clone() };
            Ok((next, vec![Effect::Store]))
        }
        Role::Active | Role::Handover => Err(wrong_role(record)),
    }
}

impl ControlRecord {
    /// What the tree of a fenced node is of, which becomes a standby; `digest` is that of its entries, and `seq` numbers
    /// what it has beyond.
    ///
    /// The tree that was handed over, and taken, is the one that the new session began with; any other may hold what that
    /// session lacks, and is of the last session that this node opened.
    pub fn place_after_demotion(&self, digest: Digest, seq: Seq) -> Option<Place> {
        let given = self.handover.filter(|handover| handover.digest == digest || seeded_bug!(AnyTreeWasHandedOver));
        match (self.lineage.last(), given) {
            (Some(Opening { session, parent, .. }), Some(given)) if *parent == Some(given.place) => {
                Some(Place { session: session.id, seq: given.place.seq })
            }
            _ => {
                let own = self.lineage.iter().rev().find(|opening| opening.session.opened_by == self.node)?;
                Some(Place { session: own.session.id, seq })
            }
        }
    }

    /// Opens a session of the next epoch, as its active.
    fn lead(&mut self, parent: Option<Place>, reason: Reason, fresh: Fresh) -> Session {
        if !seeded_bug!(PromotionsKeepTheEpoch) {
            self.promised = Epoch(self.promised.0 + 1);
        }
        let session = Session { epoch: self.promised, id: fresh.id, opened_by: self.node };
        self.role = Role::Active;
        self.handover = None;
        self.open(Opening { session, parent, reason }, fresh.boot);
        session
    }

    fn open(&mut self, opening: Opening, boot: [u8; 16]) {
        self.boot = boot;
        self.enter(opening);
    }

    fn enter(&mut self, opening: Opening) {
        if self.lineage.len() >= LINEAGE_MAX {
            self.lineage.remove(0);
        }
        self.lineage.push(opening);
    }
}

/// What is done after the record is stored; `is_first`, for a bug, before.
fn stored(mut effects: Vec<Effect>, is_first: bool) -> Vec<Effect> {
    effects.insert(if is_first { effects.len() } else { 0 }, Effect::Store);
    effects
}

fn wrong_role(record: &ControlRecord) -> Refusal {
    Refusal::Role(record.role.word().into())
}

#[cfg(test)]
mod tests;

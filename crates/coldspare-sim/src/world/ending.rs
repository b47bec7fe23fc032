//! How a world ends: by a handover, or by a failover, in the midst of which either end dies or can't be reached.
//!
//! Roles are changed as the daemons change them, by `coldspare_core::control::step`; what is lost is what
//! `coldspare_standby::Standby::missing` and the time of the last changeset say, against what git did on the active.

use coldspare_core::control::{ControlRecord, Effect, Event as RoleEvent, Fresh, Handover, Proof, Role, Session, Taking, step};
use coldspare_core::{NodeId, SessionId};
use coldspare_os::FileKind;
use coldspare_standby::Standby;

use super::fuse::Death;
use super::oracle::{self, is_within};
use super::repository::{Files, is_transient};
use super::standby::CLUSTER;
use super::writer::HOME;
use super::{Event, World};
use crate::model::ModelDisk;

/// LIMIT: how often a handover is tried.
const TRIES_MAX: u64 = 60;
const ACTIVE: NodeId = NodeId([2; 16]);
const FRESH: Fresh = Fresh { id: SessionId([200; 16]), boot: [3; 16] };

impl World {
    /// Notes that paths, and what is below them, change now; the root for all.
    pub(super) fn note_changes(&mut self, paths: &[String]) {
        let now_ms = self.active_now_ms();
        self.changed.extend(paths.iter().map(|path| (path.clone().into_bytes(), now_ms)));
    }

    /// Nobody reaches the active any more; it may be dead, too. Git goes on for a while.
    pub(super) fn cut_off(&mut self) {
        self.is_cut_off = true;
        self.faults_left = 0;
        self.tell(|| "the active is cut off".into());
        self.lose_links();
        if self.ending.happens(1, 2) {
            self.active.death = Death::Killed;
            self.active.fuse.burn();
            if !self.active.is_capturing() {
                self.active_died();
            }
        }
        let after = self.ending.below(3_000_000);
        self.at(after, Event::FailOver);
    }

    /// The standby is promoted, whatever it is doing.
    pub(super) fn fail_over(&mut self) {
        self.is_settled = true;
        self.tell(|| "the standby is promoted".into());
        // Its daemon dies at any step of it, and who asked asks again.
        while self.ending.happens(2, 3) {
            self.disturb_standby();
        }
        let Some((missing, applied)) = self.settled_standby(|copy| {
            copy.abandon()?;
            Ok((copy.missing()?, copy.applied()))
        }) else {
            return;
        };
        let Some(applied) = applied else { return }; // there is no tree to be promoted
        let before = self.host.record.clone();
        let event = RoleEvent::Promote { proof: Proof::LossAccepted, applied: Some(applied), fresh: FRESH };
        let Ok((promoted, _)) = step(&before, event.clone()) else { return self.check(Err("R8: no promotion".into())) };
        if self.ending.happens(1, 2) {
            self.disturb_standby(); // before the role is durable
        }
        if self.settled_standby(|copy| copy.fingerprint()).is_none() {
            return;
        }
        self.host.record = promoted;
        let again = step(&self.host.record, event).map(|(record, _)| record);
        self.check(if again.as_ref() == Ok(&self.host.record) { Ok(()) } else { Err("a promotion that is repeated".into()) });
        self.refuses_the_old_active(before.session());
        let said = |path: &[u8]| missing.keys().any(|(_, unit)| is_within(path, unit.as_bytes()));
        let (active, standby) = (self.active.disk.tree(HOME).expect("a home"), self.host.files());
        for path in lost(&active, &standby) {
            let changed_ms = self.changed.iter().filter(|(at, _)| is_within(&path, at)).map(|(_, ms)| *ms).max();
            if said(&path) {
                self.trace.lost_listed += 1;
            } else if applied.as_of_ms == 0 || changed_ms.is_some_and(|ms| ms >= applied.as_of_ms) {
                self.trace.lost_in_time += 1;
            } else {
                let (name, as_of_ms) = (path.escape_ascii().to_string(), applied.as_of_ms);
                self.check(Err(format!("R8: {name} is lost, changed at {changed_ms:?}, and neither listed nor after {as_of_ms}")));
            }
        }
    }

    /// Both trees are equal: the active hands over, and either end dies anywhere in it.
    pub(super) fn hand_over(&mut self) {
        if !self.active.held().is_empty() {
            return; // refused before anything is done
        }
        let Some((seq, digest)) = self.active.tree() else { return self.check(Err("R7: the active has no digest".into())) };
        let session = self.active.opened();
        let mut giver = ControlRecord::active(CLUSTER, ACTIVE, session.epoch, session.id, [1; 16]);
        self.check(oracle::are_equal(&self.active.disk.tree(HOME).expect("a home"), &self.host.files()));
        for _ in 0..TRIES_MAX {
            if let Err(e) = self.give(&mut giver, RoleEvent::HandOver { seq, digest }) {
                return self.check(Err(e));
            }
            if giver.role == Role::Standby {
                break;
            }
        }
        let roles = (giver.role, self.host.record.role);
        self.check(if roles == (Role::Standby, Role::Active) { Ok(()) } else { Err(format!("R7: it ends as {roles:?}")) });
        let there = self.settled_standby(|copy| copy.fingerprint()).map(|(_, there)| there);
        self.check(if there == Some(digest) { Ok(()) } else { Err("R7: the tree is another than was handed over".into()) });
        let nothing_is_lost = oracle::are_equal(&self.active.disk.tree(HOME).expect("a home"), &self.host.files());
        self.check(nothing_is_lost);
        self.trace.handed_over = true;
        self.refuses_the_old_active(Some(session));
    }

    /// One try: each step may be the last one that its host takes.
    fn give(&mut self, giver: &mut ControlRecord, event: RoleEvent) -> Result<(), String> {
        let never_two = |giver: &ControlRecord, taker: &ControlRecord| match (giver.role, taker.role) {
            (Role::Active, Role::Active) => Err("two actives".to_string()),
            _ => Ok(()),
        };
        if matches!(giver.role, Role::Active | Role::Handover) {
            let (next, effects) = step(giver, event).map_err(|e| format!("R7: {e}"))?;
            if self.dies_here("the active, before it stored that it hands over") {
                return Ok(());
            }
            *giver = next;
            never_two(giver, &self.host.record)?;
            let offer = effects.into_iter().find_map(|effect| if let Effect::Offer(handover) = effect { Some(handover) } else { None });
            let Some(handover) = offer.filter(|_| !self.dies_here("the handover is lost")) else { return Ok(()) };
            let Some(session) = self.take_over(handover)? else { return Ok(()) };
            never_two(giver, &self.host.record)?;
            if self.dies_here("the answer is lost") {
                return Ok(());
            }
            let (next, _) = step(giver, RoleEvent::Taken { session }).map_err(|e| format!("R7: {e}"))?;
            if self.dies_here("the active, before it stored that it was taken") {
                return Ok(());
            }
            *giver = next;
        }
        if giver.role == Role::Fenced && !self.dies_here("the active, before it is a standby") {
            *giver = step(giver, RoleEvent::Demote).map_err(|e| format!("R7: {e}"))?.0;
        }
        never_two(giver, &self.host.record)
    }

    /// The standby takes what is handed over, unless it dies; the session that it opened.
    fn take_over(&mut self, handover: Handover) -> Result<Option<Session>, String> {
        while self.ending.happens(1, 4) {
            self.disturb_standby();
        }
        let Some((applied, digest)) = self.settled_standby(|copy| copy.fingerprint()) else { return Ok(None) };
        let event = RoleEvent::HandedOver { handover, taking: Taking::Now, applied, digest, fresh: FRESH };
        let (next, effects) = step(&self.host.record, event).map_err(|e| format!("R7: what was handed over is not taken: {e}"))?;
        if self.dies_here("the standby, before it stored that it takes over") {
            self.disturb_standby();
            return Ok(None);
        }
        self.host.record = next;
        if self.dies_here("the standby, before it answers") {
            self.disturb_standby();
            return Ok(None);
        }
        Ok(effects.into_iter().find_map(|effect| if let Effect::AnswerTaken(session) = effect { Some(session) } else { None }))
    }

    fn dies_here(&mut self, what: &str) -> bool {
        let dies = self.ending.happens(1, 4);
        if dies {
            self.trace.deaths += 1;
            self.tell(|| format!("dies here: {what}"));
        }
        dies
    }

    fn refuses_the_old_active(&mut self, session: Option<Session>) {
        let Some(session) = session else { return };
        let refused = step(&self.host.record, RoleEvent::Hello { cluster: CLUSTER, session }).is_err();
        self.check(if refused { Ok(()) } else { Err("G4: the old active is served".into()) });
    }

    /// The standby's daemon is killed, or its host loses power, and it starts again.
    fn disturb_standby(&mut self) {
        self.host.death = *self.ending.pick(&[Death::Killed, Death::PowerLost]);
        self.host.fuse.burn();
        self.host_died();
        self.start_standby();
    }

    /// Does something with the standby's copy, while nobody is served.
    fn settled_standby<T>(&mut self, work: impl FnOnce(&Standby<ModelDisk>) -> Result<T, coldspare_standby::StandbyError>) -> Option<T> {
        self.host.disk.heal();
        if self.host.fuse.is_dead() {
            self.host_died();
        }
        self.host.fuse.renew();
        self.host.serving = None;
        self.start_standby();
        let done = self
            .host
            .copy
            .as_ref()
            .ok_or_else(|| "the standby can't be opened".to_string())
            .and_then(|copy| work(copy).map_err(|e| format!("the standby fails: {e}")));
        match done {
            Ok(done) => Some(done),
            Err(e) => {
                self.check(Err(e));
                None
            }
        }
    }

    fn active_now_ms(&self) -> u64 {
        coldspare_os::Disk::now_ms(&self.active.disk)
    }
}

/// The files and links that are otherwise in the one tree than in the other, as far as they travel.
fn lost(active: &Files, standby: &Files) -> Vec<Vec<u8>> {
    let is_carried = |path: &[u8]| !is_within(path, b".coldspare") && !is_transient(path);
    let is_other = |path: &Vec<u8>| match (active.get(path), standby.get(path)) {
        (Some(a), Some(b)) => (a.stat.kind, &a.content) != (b.stat.kind, &b.content),
        _ => true,
    };
    let is_dir = |path: &Vec<u8>| [active, standby].iter().all(|files| files.get(path).is_none_or(|seen| seen.stat.kind == FileKind::Dir));
    let all: std::collections::BTreeSet<&Vec<u8>> = active.keys().chain(standby.keys()).collect();
    all.into_iter().filter(|path| is_carried(path) && !is_dir(path) && is_other(path)).cloned().collect()
}

//! What may happen to two nodes, within bounds.

use std::collections::BTreeSet;

use coldspare_core::control::{ControlRecord, Effect, Event, Handover, Place, Proof, Refusal, Role, Session, Taking, step};
use coldspare_core::{Digest, Epoch, NodeId, Seq, SessionId};

use super::node::{CLUSTER, Node, Todo, Writes, digest, id_of};

/// How much may happen.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Writes of the application.
    pub writes: u8,
    /// Promotions without a handover.
    pub forced: u8,
    /// Power cuts.
    pub power_cuts: u8,
    /// Daemons killed.
    pub kills: u8,
    /// Switchovers that are begun.
    pub planned: u8,
    /// Messages in the network.
    pub messages: usize,
    /// Whether handovers that wait for a promotion are tried beside those that are taken at once.
    pub offers: bool,
}

/// What the driver does wrong, on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defect {
    /// Nothing.
    None,
    /// What a new session takes away is not kept.
    QuarantineIsSkipped,
    /// It is kept after it left the tree.
    QuarantineComesLate,
    /// It is kept in memory only.
    QuarantineIsNotSynced,
    /// Records are not durable.
    RecordsAreNotStored,
    /// Effects are performed last first.
    AnswersComeFirst,
    /// A node is promoted before its committed changeset is applied.
    HalfAppliedIsPromoted,
    /// A host that lost its power takes itself for one whose daemon was killed.
    PowerCutsAreNotNoticed,
    /// Changesets are applied whatever session they are of.
    AnySessionIsApplied,
    /// A handover names the tree before the last write.
    HandoversForgetTheLastWrite,
}

/// What travels; it stays in the network for ever, and may arrive at any time, often or never.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Message {
    /// A session is opened.
    Hello(u8, Epoch, SessionId, NodeId),
    /// The other node has promised this.
    Outranked(u8, Epoch),
    /// The other node knows another opener of this epoch.
    Contested(u8, Epoch),
    /// The first changeset of a session.
    Whole(u8, Epoch, SessionId, Vec<u8>),
    /// A later one: its number, its write.
    Append(u8, Epoch, SessionId, u8, u8),
    /// The tree that is handed over.
    Handover(u8, SessionId, Seq, Digest, Taking),
    /// It was taken.
    Taken(u8, Epoch, SessionId),
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    /// The two hosts.
    pub nodes: [Node; 2],
    /// What was sent so far.
    pub net: BTreeSet<Message>,
    /// Writes so far.
    pub writes: u8,
    /// Forced promotions so far.
    pub forced: u8,
    /// Power cuts so far.
    pub power_cuts: u8,
    /// Kills so far.
    pub kills: u8,
    /// Switchovers begun so far.
    pub planned: u8,
    /// The last id of a session.
    pub ids: u8,
    /// What was ever durable anywhere.
    pub durable: Writes,
    /// The highest epoch that each node answered with.
    pub answered: [Epoch; 2],
    /// The session that each node serves, or opened.
    pub served: [Session; 2],
    /// The sessions that each node ever served, one bit each.
    pub known: [u32; 2],
    /// Two openers of one epoch met.
    pub conflict: bool,
    /// A changeset was applied of an epoch below an answered one or of another session than is served, or a session is
    /// served again that was left.
    pub disobeyed: bool,
}

/// What happens next.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// The application writes: into memory.
    Write(u8),
    /// The kernel writes back.
    Sync(u8),
    /// The node does the next thing that it has to do.
    Perform(u8),
    /// The active says who it is.
    Greet(u8),
    /// The active sends what it has.
    Ship(u8),
    /// A message arrives.
    Deliver(Message),
    /// The active begins a switchover, or only gives its role up.
    HandOver(u8, Taking),
    /// The standby is promoted on the offer that it noted.
    PromoteOffered(u8),
    /// It is promoted without one.
    Force(u8),
    /// The fenced node becomes a standby.
    Demote(u8),
    /// The daemon is killed and starts again.
    Kill(u8),
    /// The host loses its power and starts again.
    PowerCut(u8),
}

/// The model.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// How much may happen.
    pub bounds: Bounds,
    /// What is done wrong.
    pub defect: Defect,
}

impl stateright::Model for Model {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let active = ControlRecord::active(CLUSTER, id_of(0), Epoch(1), SessionId([1; 16]), [0; 16]);
        let nodes = [Node::new(0, &active), Node::new(1, &active)];
        let first = active.session().expect("an active has one");
        let (net, answered, served) = (BTreeSet::new(), [Epoch(1); 2], [first; 2]);
        let (writes, forced, power_cuts, kills, planned) = (0, 0, 0, 0, 0);
        let (durable, conflict, disobeyed) = (0, false, false);
        vec![State {
            nodes,
            net,
            writes,
            forced,
            power_cuts,
            kills,
            planned,
            ids: 1,
            durable,
            answered,
            served,
            known: [2; 2],
            conflict,
            disobeyed,
        }]
    }

    fn actions(&self, state: &State, out: &mut Vec<Action>) {
        for i in 0..2u8 {
            self.actions_of(state, i, out);
        }
        out.extend(state.net.iter().filter(|m| state.nodes[usize::from(m.to())].todo.is_empty()).cloned().map(Action::Deliver));
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Write(i) => {
                state.nodes[usize::from(i)].memory.tree.push(state.writes);
                state.writes += 1;
            }
            Action::Sync(i) => state.sync(i),
            Action::Perform(i) => self.perform(&mut state, i),
            Action::Greet(i) => {
                let session = state.session(i)?;
                state.net.insert(Message::Hello(1 - i, session.epoch, session.id, session.opened_by));
            }
            Action::Ship(i) => state.ship(i)?,
            Action::Deliver(message) => self.deliver(&mut state, message),
            Action::HandOver(i, taking) => {
                state.planned += 1;
                let node = &mut state.nodes[usize::from(i)];
                node.giving = taking;
                let forgotten = usize::from(self.defect == Defect::HandoversForgetTheLastWrite);
                let given = &node.memory.tree[..node.memory.tree.len().saturating_sub(forgotten)];
                let event = Event::HandOver { seq: Seq(given.len() as u64), digest: digest(given) };
                state.happens(i, event, self.defect)?;
            }
            Action::PromoteOffered(i) => {
                let node = &state.nodes[usize::from(i)];
                let proof = Proof::Handover { digest: digest(&node.memory.tree) };
                state.promote(i, proof, self.defect)?;
            }
            Action::Force(i) => {
                state.forced += 1;
                if self.defect == Defect::HalfAppliedIsPromoted {
                    state.nodes[usize::from(i)].todo.clear();
                }
                state.promote(i, Proof::LossAccepted, self.defect)?;
            }
            Action::Demote(i) => {
                // Its store knows all of its tree, durably, before it is a standby.
                state.sync(i);
                let node = &mut state.nodes[usize::from(i)];
                let place = node.memory.record.place_after_demotion(digest(&node.memory.tree), Seq(0));
                let of = place.expect("a node that was active opened a session").session;
                (node.memory.of, node.disk.of) = (of, of);
                state.happens(i, Event::Demote, self.defect)?;
            }
            Action::Kill(i) => {
                state.kills += 1;
                let node = &mut state.nodes[usize::from(i)];
                node.memory.record.clone_from(&node.disk.record);
                node.memory.quarantine |= node.disk.quarantine;
                self.start(&mut state, i);
            }
            Action::PowerCut(i) => {
                state.power_cuts += 1;
                let node = &mut state.nodes[usize::from(i)];
                node.memory = node.disk.clone();
                node.boot += u8::from(self.defect != Defect::PowerCutsAreNotNoticed);
                self.start(&mut state, i);
            }
        }
        state.durable |= state.nodes[0].disk.writes() | state.nodes[1].disk.writes();
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<stateright::Property<Model>> {
        super::property::properties()
    }

    fn within_boundary(&self, state: &State) -> bool {
        state.net.len() <= self.bounds.messages
    }
}

impl Model {
    fn actions_of(&self, state: &State, i: u8, out: &mut Vec<Action>) {
        let (node, bounds) = (&state.nodes[usize::from(i)], &self.bounds);
        let role = node.memory.record.role;
        if state.kills < bounds.kills && !node.todo.is_empty() {
            out.push(Action::Kill(i)); // one that has nothing to do loses nothing
        }
        if state.power_cuts < bounds.power_cuts {
            out.push(Action::PowerCut(i));
        }
        // The application of a promoted node starts once the promotion is stored.
        if role == Role::Active && node.disk.record.role == Role::Active && state.writes < bounds.writes {
            out.push(Action::Write(i));
        }
        if node.memory.tree != node.disk.tree {
            out.push(Action::Sync(i));
        }
        let may_force = state.forced < bounds.forced && role != Role::Active;
        if !node.todo.is_empty() {
            out.push(Action::Perform(i));
            if may_force && self.defect == Defect::HalfAppliedIsPromoted {
                out.push(Action::Force(i));
            }
            return;
        }
        match role {
            Role::Active => {
                out.extend([Action::Greet(i), Action::Ship(i)]);
                if state.planned < bounds.planned {
                    out.push(Action::HandOver(i, Taking::Now));
                    if bounds.offers {
                        out.push(Action::HandOver(i, Taking::WhenPromoted));
                    }
                }
            }
            Role::Standby if node.memory.record.handover.is_some() => out.push(Action::PromoteOffered(i)),
            Role::Fenced => out.push(Action::Demote(i)),
            _ => {}
        }
        if may_force {
            out.push(Action::Force(i));
        }
    }

    /// The daemon starts: what was committed is finished, an active opens its session.
    fn start(&self, state: &mut State, i: u8) {
        let node = &mut state.nodes[usize::from(i)];
        node.todo.clear();
        node.finish();
        let fresh = node.fresh(state.ids + 1);
        if let Ok((record, effects)) = step(&node.memory.record, Event::Started(fresh)) {
            state.ids += u8::from(record.session() != node.memory.record.session());
            node.memory.record = record;
            node.todo.extend(effects.into_iter().map(Todo::Effect));
        }
    }

    fn perform(&self, state: &mut State, i: u8) {
        let node = &mut state.nodes[usize::from(i)];
        let todo = node.todo.remove(0);
        match todo {
            Todo::Effect(Effect::Store) if self.defect == Defect::RecordsAreNotStored => {}
            Todo::Effect(Effect::Store) => {
                node.disk.record.clone_from(&node.memory.record);
                let (at, now) = (usize::from(i), state.session(i).expect("each has one"));
                let bit = 1 << now.id.0[0];
                state.disobeyed |= state.served[at] != now && state.known[at] & bit != 0;
                state.served[at] = now;
                state.known[at] |= bit;
            }
            Todo::Effect(Effect::Serve) => state.answer(i),
            Todo::Effect(Effect::Refuse(refusal)) => state.refuse(i, &refusal),
            Todo::Effect(Effect::AnswerTaken(session)) => {
                state.answer(i);
                state.net.insert(Message::Taken(1 - i, session.epoch, session.id));
            }
            Todo::Effect(Effect::Offer(Handover { place, digest })) => {
                let taking = node.giving;
                state.net.insert(Message::Handover(1 - i, place.session, place.seq, digest, taking));
            }
            Todo::Effect(Effect::FenceSelf | Effect::DistrustIndex | Effect::AnswerNoted | Effect::Alarm) => {}
            Todo::Keep(lost) => {
                node.memory.quarantine |= lost;
                if self.defect != Defect::QuarantineIsNotSynced {
                    node.disk.quarantine |= lost;
                }
            }
            Todo::Replace => {
                for held in [&mut node.memory, &mut node.disk] {
                    if let Some((of, tree)) = held.committed.take() {
                        (held.of, held.tree) = (of, tree);
                    }
                }
            }
        }
    }

    fn deliver(&self, state: &mut State, message: Message) {
        let i = message.to();
        let at = usize::from(i);
        match message {
            Message::Hello(_, epoch, id, opened_by) => {
                let session = Session { epoch, id, opened_by };
                match step(&state.nodes[at].memory.record, Event::Hello { cluster: CLUSTER, session }) {
                    Ok((record, effects)) => state.take(i, record, effects, self.defect),
                    Err(refusal) => state.refuse(i, &refusal),
                }
            }
            Message::Outranked(_, promised) => drop(state.happens(i, Event::Outranked { promised }, self.defect)),
            Message::Contested(_, epoch) => drop(state.happens(i, Event::Contested { epoch }, self.defect)),
            Message::Taken(_, epoch, id) => {
                let session = Session { epoch, id, opened_by: id_of(1 - i) };
                state.happens(i, Event::Taken { session }, self.defect);
            }
            Message::Handover(_, session, seq, given, taking) => {
                let node = &state.nodes[at];
                let event = Event::HandedOver {
                    handover: Handover { place: Place { session, seq }, digest: given },
                    taking,
                    applied: Some(node.applied()),
                    digest: digest(&node.memory.tree),
                    fresh: node.fresh(state.ids + 1),
                };
                if state.happens(i, event, self.defect).is_some() {
                    state.count_session(i);
                }
            }
            Message::Whole(_, epoch, session, tree) => {
                if self.obeys(&state.nodes[at], session) && state.nodes[at].memory.of != session {
                    state.disobeyed |= epoch < state.answered[at] || session != state.served[at].id;
                    let node = &mut state.nodes[at];
                    for held in [&mut node.memory, &mut node.disk] {
                        held.committed = Some((session, tree.clone()));
                    }
                    node.finish();
                    match self.defect {
                        Defect::QuarantineIsSkipped => node.todo.retain(|todo| !matches!(todo, Todo::Keep(_))),
                        Defect::QuarantineComesLate => node.todo.reverse(),
                        _ => {}
                    }
                }
            }
            Message::Append(_, epoch, session, number, write) => {
                let obeys = self.obeys(&state.nodes[at], session);
                let node = &mut state.nodes[at];
                if obeys && node.memory.of == session && usize::from(number) == node.memory.tree.len() {
                    state.disobeyed |= epoch < state.answered[at] || session != state.served[at].id;
                    // Applied and durable, or neither (G1, G3).
                    node.memory.tree.push(write);
                    node.disk.tree.clone_from(&node.memory.tree);
                }
            }
        }
    }

    fn obeys(&self, node: &Node, session: SessionId) -> bool {
        let record = &node.memory.record;
        record.obeys(session) || self.defect == Defect::AnySessionIsApplied && record.role == Role::Standby
    }
}

impl State {
    fn session(&self, i: u8) -> Option<Session> {
        self.nodes[usize::from(i)].memory.record.session()
    }

    fn sync(&mut self, i: u8) {
        let node = &mut self.nodes[usize::from(i)];
        node.disk.tree.clone_from(&node.memory.tree);
    }

    fn ship(&mut self, i: u8) -> Option<()> {
        let session = self.session(i)?;
        let tree = self.nodes[usize::from(i)].memory.tree.clone();
        for (number, write) in tree.iter().enumerate() {
            self.net.insert(Message::Append(1 - i, session.epoch, session.id, u8::try_from(number).ok()?, *write));
        }
        if session.id != SessionId([1; 16]) {
            self.net.insert(Message::Whole(1 - i, session.epoch, session.id, tree));
        }
        Some(())
    }

    /// Takes an event that isn't answered when it is refused; `None` when nothing changed.
    fn happens(&mut self, i: u8, event: Event, defect: Defect) -> Option<()> {
        let (record, effects) = step(&self.nodes[usize::from(i)].memory.record, event).ok()?;
        self.take(i, record, effects, defect);
        Some(())
    }

    fn take(&mut self, i: u8, record: ControlRecord, mut effects: Vec<Effect>, defect: Defect) {
        if defect == Defect::AnswersComeFirst {
            effects.reverse();
        }
        let node = &mut self.nodes[usize::from(i)];
        node.memory.record = record;
        node.todo.extend(effects.into_iter().map(Todo::Effect));
    }

    fn count_session(&mut self, i: u8) {
        let is_new = self.session(i).is_some_and(|session| session.id.0[0] == self.ids + 1);
        self.ids += u8::from(is_new);
    }

    fn promote(&mut self, i: u8, proof: Proof, defect: Defect) -> Option<()> {
        let node = &self.nodes[usize::from(i)];
        let event = Event::Promote { proof, applied: Some(node.applied()), fresh: node.fresh(self.ids + 1) };
        self.happens(i, event, defect)?;
        self.count_session(i);
        Some(())
    }

    /// The other node may rely on what this one promised.
    fn answer(&mut self, i: u8) {
        let at = usize::from(i);
        self.answered[at] = self.answered[at].max(self.nodes[at].memory.record.promised);
    }

    fn refuse(&mut self, i: u8, refusal: &Refusal) {
        match refusal {
            Refusal::Epoch { promised, .. } => {
                self.answer(i);
                self.net.insert(Message::Outranked(1 - i, *promised));
            }
            Refusal::Conflict(epoch) => {
                self.conflict = true;
                self.net.insert(Message::Contested(1 - i, *epoch));
            }
            _ => {}
        }
    }
}

impl Message {
    fn to(&self) -> u8 {
        match self {
            Message::Hello(to, ..)
            | Message::Outranked(to, ..)
            | Message::Contested(to, ..)
            | Message::Whole(to, ..)
            | Message::Append(to, ..)
            | Message::Handover(to, ..)
            | Message::Taken(to, ..) => *to,
        }
    }
}

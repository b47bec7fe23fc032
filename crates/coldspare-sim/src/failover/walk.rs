//! One way through the model, by a seed: roles change, hosts die and the network parts at any step of it, then nothing
//! disturbs any more and the pair has to come to its end.
//!
//! The checker ([`super::explore`]) sees every order, of few things; this sees long runs, of many.

use std::collections::{BTreeMap, BTreeSet};

use coldspare_core::control::{Role, Taking};
use stateright::{Expectation, Model as _, Property};

use super::model::{Action, Bounds, Defect, Message, Model, State};
use super::node::{Writes, bits};
use crate::Chance;

/// How roles change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The active hands over.
    Planned,
    /// It is cut off, and the standby is promoted.
    Forced,
}

/// What a way came to.
#[derive(Debug, Clone, Default)]
pub struct Walked {
    /// Transitions.
    pub steps: usize,
    /// Where something went wrong: what it was, and what both nodes were and had to do.
    pub disturbed: BTreeMap<String, u64>,
    /// Writes of the old active that the new one lacks: they are in the quarantine.
    pub lost: u32,
}

/// A way that broke something.
#[derive(Debug, Clone)]
pub struct Failed {
    /// By which seed.
    pub seed: u64,
    /// What.
    pub what: String,
    /// The way.
    pub actions: Vec<String>,
}

const BOUNDS: Bounds = Bounds { writes: 12, forced: 4, power_cuts: 5, kills: 5, planned: 8, messages: usize::MAX, offers: true };
/// Steps within which something goes wrong.
const DISTURBED_STEPS: u64 = 60;
/// LIMIT: rounds until the pair has to be at its end, once nothing disturbs.
const CALM_ROUNDS_MAX: usize = 40;

#[derive(Debug, Clone, Copy)]
enum Disturbance {
    Kill(u8),
    PowerCut(u8),
    Part,
}

struct Walker {
    model: Model,
    change: Change,
    chance: Chance,
    properties: Vec<Property<Model>>,
    state: State,
    actions: Vec<Action>,
    /// Until which step nobody reaches anybody.
    parted_until: u64,
    /// What the standby had when it was promoted last.
    had: Writes,
    /// How often something goes wrong in the calm, still.
    late: u64,
    walked: Walked,
}

/// Goes one way.
///
/// # Errors
/// The first invariant that is broken, with the way to it; or an end that is not reached, or not right.
pub fn walk(seed: u64, change: Change, defect: Defect) -> Result<Walked, Box<Failed>> {
    let model = Model { bounds: BOUNDS, defect };
    let state = model.init_states().swap_remove(0);
    let properties = model.properties().into_iter().filter(|p| p.expectation == Expectation::Always).collect();
    let (chance, walked) = (Chance::new(seed), Walked::default());
    let mut walker = Walker { model, change, chance, properties, state, actions: Vec::new(), parted_until: 0, had: 0, late: 2, walked };
    let went = walker.go();
    walker.walked.steps = walker.actions.len();
    let actions = walker.actions.iter().map(|action| format!("{action:?}")).collect();
    went.map(|()| walker.walked).map_err(|what| Box::new(Failed { seed, what, actions }))
}

impl Walker {
    fn go(&mut self) -> Result<(), String> {
        for _ in 0..self.chance.below(30) {
            self.take_a_step(false)?;
        }
        if self.change == Change::Forced {
            self.parted_until = 10 + self.chance.below(20);
        }
        let count = 1 + self.chance.below(3);
        let mut disturbances: Vec<(u64, Disturbance)> =
            (0..count).map(|_| (self.chance.below(DISTURBED_STEPS), self.disturbance())).collect();
        for step in 0..DISTURBED_STEPS {
            while let Some(at) = disturbances.iter().position(|(at, _)| *at == step) {
                let (_, what) = disturbances.swap_remove(at);
                self.disturb(step, what)?;
            }
            let is_parted = step < self.parted_until;
            self.take_a_step(is_parted)?;
            if self.change == Change::Forced && self.chance.happens(1, 6) {
                self.force()?;
            }
        }
        for _ in 0..CALM_ROUNDS_MAX {
            if self.is_at_its_end() {
                return self.judge();
            }
            self.calm_round()?;
        }
        let roles = [0, 1].map(|i| self.role(i));
        Err(format!("no end: {roles:?}"))
    }

    fn disturbance(&mut self) -> Disturbance {
        let node = self.chance.below(2) as u8;
        match self.chance.below(3) {
            0 => Disturbance::Kill(node),
            1 => Disturbance::PowerCut(node),
            _ => Disturbance::Part,
        }
    }

    fn disturb(&mut self, step: u64, what: Disturbance) -> Result<(), String> {
        let doing = |i: usize| {
            let next = self.state.nodes[i].todo.first().map(|todo| format!(" {todo:?}").replace("Effect(", ""));
            let next = next.unwrap_or_default();
            format!("{}{}", self.role(i).word(), next.split(['(', '{', ')']).next().unwrap_or_default())
        };
        *self.walked.disturbed.entry(format!("{what:?}: {}, {}", doing(0), doing(1))).or_default() += 1;
        // With the connection goes all that is under way on it.
        self.state.net.clear();
        match what {
            // One that has nothing to do loses nothing by it, and starts again.
            Disturbance::Kill(node) if self.state.kills < BOUNDS.kills => self.act(Action::Kill(node)),
            Disturbance::PowerCut(node) if self.state.power_cuts < BOUNDS.power_cuts => self.act(Action::PowerCut(node)),
            Disturbance::Kill(_) | Disturbance::PowerCut(_) => Ok(()),
            Disturbance::Part => {
                self.parted_until = self.parted_until.max(step + 1 + self.chance.below(15));
                Ok(())
            }
        }
    }

    fn role(&self, i: usize) -> Role {
        self.state.nodes[i].memory.record.role
    }

    /// Takes an action, and looks whether all holds.
    fn act(&mut self, action: Action) -> Result<(), String> {
        let Some(next) = self.model.next_state(&self.state, action.clone()) else { return Ok(()) };
        self.actions.push(action);
        self.state = next;
        match self.properties.iter().find(|property| !(property.condition)(&self.model, &self.state)) {
            Some(property) => Err(property.name.to_string()),
            None => Ok(()),
        }
    }

    /// What may happen now, without what goes wrong.
    fn possible(&self) -> Vec<Action> {
        let mut all = Vec::new();
        self.model.actions(&self.state, &mut all);
        all.retain(|action| match action {
            Action::Kill(_) | Action::PowerCut(_) | Action::Force(_) => false,
            Action::HandOver(i, _) => self.may_hand_over(*i),
            _ => true,
        });
        all.extend((0..2).filter_map(|i| self.offer_again(i)));
        all
    }

    /// What was handed over is offered at each connection, until it is taken.
    fn offer_again(&self, i: u8) -> Option<Action> {
        let node = &self.state.nodes[usize::from(i)];
        let is_waiting = node.memory.record.role == Role::Handover && node.todo.is_empty();
        is_waiting.then_some(Action::HandOver(i, node.giving))
    }

    /// The driver hands over once the standby has all: here only the first active does, and as long as it hasn't.
    fn may_hand_over(&self, i: u8) -> bool {
        let [here, there] = &self.state.nodes;
        // What it acknowledged is of the session that hands over.
        let session = here.memory.record.session();
        let follows = there.memory.record.session() == session && session.is_some_and(|session| session.id == there.memory.of);
        self.change == Change::Planned && i == 0 && there.todo.is_empty() && follows && here.memory.tree == there.memory.tree
    }

    fn take_a_step(&mut self, is_parted: bool) -> Result<(), String> {
        let mut possible = self.possible();
        if is_parted {
            possible.retain(|action| !matches!(action, Action::Deliver(_)));
        }
        // What was sent long ago comes as often as what is new; let the rest have its turn.
        let few: Vec<Action> = possible.iter().filter(|action| !matches!(action, Action::Deliver(_))).cloned().collect();
        let from = if !few.is_empty() && self.chance.happens(1, 2) { &few } else { &possible };
        if from.is_empty() {
            return Ok(());
        }
        let action = self.chance.pick(from).clone();
        self.act(action)
    }

    /// A person promotes the standby, or asks again.
    fn force(&mut self) -> Result<(), String> {
        let node = &self.state.nodes[1];
        if self.role(1) != Role::Standby || !node.todo.is_empty() || self.state.forced >= BOUNDS.forced {
            return Ok(());
        }
        self.had = bits(&node.memory.tree);
        self.act(Action::Force(1))
    }

    /// Everything that is to be done is done, and everything that was sent arrives.
    fn calm_round(&mut self) -> Result<(), String> {
        self.perform_all()?;
        if self.change == Change::Forced && self.role(1) == Role::Standby && self.role(0) != Role::Standby {
            self.force()?;
            self.perform_all()?;
        }
        for i in 0..2u8 {
            match self.role(usize::from(i)) {
                Role::Active => {
                    self.act(Action::Sync(i))?;
                    self.act(Action::Greet(i))?;
                    self.act(Action::Ship(i))?;
                }
                Role::Handover => self.offer_again(i).map_or(Ok(()), |offer| self.act(offer))?,
                Role::Fenced => self.act(Action::Demote(i))?,
                Role::Standby if self.state.nodes[usize::from(i)].memory.record.handover.is_some() => {
                    self.act(Action::PromoteOffered(i))?
                }
                _ => {}
            }
            self.perform_all()?;
        }
        let mut messages: Vec<Message> = self.state.net.iter().cloned().collect();
        while !messages.is_empty() {
            let at = self.chance.below(messages.len() as u64) as usize;
            let message = messages.swap_remove(at);
            self.act(Action::Deliver(message))?;
            self.perform_all()?;
        }
        if self.role(0) == Role::Active && self.may_hand_over(0) && self.state.planned < BOUNDS.planned {
            self.act(Action::HandOver(0, Taking::Now))?;
            self.perform_all()?;
        }
        Ok(())
    }

    /// What comes late, such as the return of the old active, may be disturbed as well.
    fn perform_all(&mut self) -> Result<(), String> {
        while let Some(i) = (0..2u8).find(|i| !self.state.nodes[usize::from(*i)].todo.is_empty()) {
            if self.late > 0 && self.chance.happens(1, 12) {
                self.late -= 1;
                let what = *self.chance.pick(&[Disturbance::Kill(i), Disturbance::PowerCut(i)]);
                self.disturb(DISTURBED_STEPS, what)?;
                continue;
            }
            self.act(Action::Perform(i))?;
        }
        Ok(())
    }

    /// The second host leads, the first follows with all that it has.
    fn is_at_its_end(&self) -> bool {
        let [old, new] = &self.state.nodes;
        let is_quiet = old.todo.is_empty() && new.todo.is_empty();
        let session = new.memory.record.session().map(|session| session.id);
        is_quiet
            && (self.role(0), self.role(1)) == (Role::Standby, Role::Active)
            && Some(old.memory.of) == session
            && old.memory.tree == new.memory.tree
    }

    fn judge(&mut self) -> Result<(), String> {
        let [old, new] = &self.state.nodes;
        let (there, kept) = (bits(&new.memory.tree), old.disk.quarantine);
        if self.change == Change::Planned && self.state.power_cuts == 0 && there.count_ones() != u32::from(self.state.writes) {
            return Err("a planned change lost a write".into());
        }
        let lost = self.state.durable & !there;
        if lost & self.had != 0 {
            return Err("a failover lost what the standby had".into());
        }
        if lost & !(kept | new.disk.quarantine) != 0 {
            return Err("what is lost is in no quarantine".into());
        }
        self.walked.lost = lost.count_ones();
        Ok(())
    }
}

/// The kinds of places in which something went wrong, of many ways.
pub fn places<'a>(all: impl Iterator<Item = &'a Walked>) -> BTreeSet<&'a str> {
    all.flat_map(|walked| walked.disturbed.keys().map(String::as_str)).collect()
}

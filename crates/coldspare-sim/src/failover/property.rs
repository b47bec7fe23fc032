//! What has to hold in every state (I1 to I8), what has to be possible (S1 to S7), and a run of the checker.

use coldspare_core::control::{Reason, Role};
use stateright::{Checker, Expectation, Model as _, Property};

use super::model::{Bounds, Defect, Model, State};
use super::node::{Node, bits};

/// A property that doesn't hold, and the actions that show it.
#[derive(Debug)]
pub struct Broken {
    /// Its name.
    pub name: &'static str,
    /// The actions, one a line.
    pub path: String,
}

/// What a run of the checker found.
#[derive(Debug)]
pub struct Explored {
    /// Different states.
    pub states: usize,
    /// Whether all of them were looked at, within the bounds.
    pub is_all: bool,
    /// What doesn't hold.
    pub broken: Vec<Broken>,
    /// What has to be possible and was not met.
    pub unreached: Vec<&'static str>,
}

/// Looks at every state within the bounds, at `states_max` of them at most, on two threads.
pub fn explore(bounds: Bounds, defect: Defect, states_max: usize) -> Explored {
    let model = Model { bounds, defect };
    let checker = model.checker().threads(2).target_state_count(states_max).spawn_bfs().join();
    let discoveries = checker.discoveries();
    let (mut broken, mut unreached) = (Vec::new(), Vec::new());
    for property in model.properties() {
        match (&property.expectation, discoveries.get(property.name)) {
            (Expectation::Always, Some(path)) => {
                let path = path.clone().into_actions().iter().map(|a| format!("{a:?}\n")).collect();
                broken.push(Broken { name: property.name, path });
            }
            (Expectation::Sometimes, None) => unreached.push(property.name),
            _ => {}
        }
    }
    let is_all = checker.state_count() < states_max;
    Explored { states: checker.unique_state_count(), is_all, broken, unreached }
}

pub(super) fn properties() -> Vec<Property<Model>> {
    vec![
        Property::always("I1 one active a session", |_, s: &State| !(both_active(s) && s.nodes[0].session_id() == s.nodes[1].session_id())),
        Property::always("I2 nothing durable is lost", |_, s: &State| {
            s.durable & !(s.nodes[0].disk.writes() | s.nodes[1].disk.writes()) == 0
        }),
        Property::always("I3 two actives only after force", |_, s: &State| s.forced > 0 || !both_active(s)),
        Property::always("I4 a follower has a part of what its active has", |_, s: &State| follows(s, 0, 1) && follows(s, 1, 0)),
        Property::always("I5 nothing planned loses anything", |_, s: &State| {
            let is_whole = |n: &Node| n.memory.record.role != Role::Active || bits(&n.memory.tree) == (1 << s.writes) - 1;
            s.forced + s.power_cuts > 0 || (!s.conflict && s.nodes.iter().all(is_whole))
        }),
        Property::always("I6 a standby obeys the highest epoch that it promised", |_, s: &State| !s.disobeyed),
        Property::always("I7 an active has no changeset half applied", |_, s: &State| {
            s.nodes.iter().all(|n| n.memory.record.role != Role::Active || n.memory.committed.is_none())
        }),
        Property::always("I8 no promise is forgotten", |_, s: &State| {
            s.nodes
                .iter()
                .zip(s.answered)
                .all(|(n, answered)| n.memory.record.promised >= answered && n.memory.epoch() <= n.memory.record.promised)
        }),
        Property::always("I9 without force an epoch has one opener", |_, s: &State| s.forced > 0 || openers_agree(s)),
        Property::sometimes("S1 a switchover", |_, s: &State| s.forced == 0 && is_switched(s, 1)),
        Property::sometimes("S2 two actives after force", |_, s: &State| both_active(s)),
        Property::sometimes("S3 a fail-back with something in quarantine", |_, s: &State| {
            s.nodes[0].is(Role::Standby) && s.nodes[0].disk.quarantine != 0 && s.nodes[1].is(Role::Active) && s.forced > 0
        }),
        Property::sometimes("S4 a standby that had more than its active", |_, s: &State| s.forced == 0 && s.nodes[1].disk.quarantine != 0),
        Property::sometimes("S5 a conflict", |_, s: &State| s.conflict),
        Property::sometimes("S6 a switchover and back", |_, s: &State| s.forced == 0 && s.planned > 1 && is_switched(s, 0)),
        Property::sometimes("S7 an old active that is fenced", |_, s: &State| {
            s.nodes[0].is(Role::Fenced) && s.nodes[1].is(Role::Active) && s.forced > 0
        }),
    ]
}

fn both_active(state: &State) -> bool {
    state.nodes.iter().all(|node| node.is(Role::Active))
}

/// Whether this node leads by a handover, and the other one follows it with all that it has.
fn is_switched(state: &State, leader: usize) -> bool {
    let (leads, follower) = (&state.nodes[leader], &state.nodes[1 - leader]);
    let is_handed_over = leads.memory.record.lineage.last().is_some_and(|opening| opening.reason == Reason::HandedOver);
    leads.is(Role::Active)
        && is_handed_over
        && follower.is(Role::Standby)
        && Some(follower.memory.of) == leads.session_id()
        && follower.memory.tree == leads.memory.tree
}

fn follows(state: &State, standby: usize, active: usize) -> bool {
    let (standby, active) = (&state.nodes[standby], &state.nodes[active]);
    let is_pair = standby.is(Role::Standby) && active.is(Role::Active) && Some(standby.memory.of) == active.session_id();
    !is_pair || active.memory.tree.starts_with(&standby.memory.tree)
}

fn openers_agree(state: &State) -> bool {
    let all = || state.nodes.iter().flat_map(|node| &node.memory.record.lineage).map(|opening| opening.session);
    all().all(|a| all().all(|b| a.epoch != b.epoch || a.opened_by == b.opened_by))
}

impl Node {
    fn is(&self, role: Role) -> bool {
        self.memory.record.role == role
    }

    fn session_id(&self) -> Option<coldspare_core::SessionId> {
        self.memory.record.session().map(|session| session.id)
    }
}

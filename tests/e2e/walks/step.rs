//! The steps of a change of roles, as calls by which either host changes something that lasts.

use std::ffi::OsStr;
use std::fmt;
use std::sync::{Arc, Mutex};

use coldspare_sim::supervise::Call;

/// Which host does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    /// The one that is the active before.
    Old,
    /// The one that is it afterwards.
    New,
}

/// One of a walk: it is about to be done.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Step {
    pub(super) side: Side,
    what: String,
    /// How often the same was done before in this walk.
    nth: usize,
}

impl Step {
    /// The first of its kind.
    pub(super) fn first(side: Side, what: &str) -> Step {
        Step { side, what: what.into(), nth: 0 }
    }
}

/// Sees all steps of both hosts, whatever process does them.
#[derive(Clone, Default)]
pub(super) struct Probe(Arc<Mutex<Seen>>);

#[derive(Default)]
struct Seen {
    steps: Vec<Step>,
    wanted: Option<Step>,
    /// The number of the host that is [`Side::Old`].
    old: usize,
}

impl Probe {
    /// A walk begins in which host `old` is the active, and `wanted` is held.
    pub(super) fn begin(&self, old: usize, wanted: Option<Step>) {
        *self.0.lock().unwrap() = Seen { steps: Vec::new(), wanted, old };
    }

    /// Nothing is held from now on; whether something was to be that has not come.
    pub(super) fn want_nothing(&self) -> bool {
        self.0.lock().unwrap().wanted.take().is_some()
    }

    /// The steps since then.
    pub(super) fn steps(&self) -> Vec<Step> {
        self.0.lock().unwrap().steps.clone()
    }

    /// What says of calls of a host's process whether they are held.
    pub(super) fn of(&self, host: usize) -> impl FnMut(&Call) -> bool + Send + use<> {
        let seen = self.0.clone();
        move |call| {
            let Some(what) = what(call) else { return false };
            let mut seen = seen.lock().unwrap();
            let side = if host == seen.old { Side::Old } else { Side::New };
            let nth = seen.steps.iter().filter(|step| step.side == side && step.what == what).count();
            seen.steps.push(Step { side, what, nth });
            let is_wanted = seen.wanted.is_some() && seen.wanted.as_ref() == seen.steps.last();
            if is_wanted {
                seen.wanted = None;
            }
            is_wanted
        }
    }
}

/// What a call is about to do, if that is a step.
fn what(call: &Call) -> Option<String> {
    let name = call.path.file_name().and_then(OsStr::to_str)?;
    let (is_made, is_removed) = (call.name.starts_with("rename"), call.name.starts_with("unlink"));
    let done = match name {
        "control" if call.name.starts_with("pwrite") => "written",
        "control" if call.name == "fsync" => "synced",
        "applications" if call.name.starts_with("open") => "told by a hook",
        "LIST" if call.name.starts_with("open") || is_made => "made",
        "taking" | "promoted" | "promote-hook" | "index.redb" | "manifest.redb" if is_made => "in place",
        "promote-hook" | "index.redb" | "manifest.redb" if is_removed => "removed",
        name if name.starts_with("promotion-") && is_made => return Some("promotion: in place".into()),
        _ => return None,
    };
    Some(format!("{name}: {done}"))
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Old => "old",
            Side::New => "new",
        };
        write!(f, "{side}, {}, {}", self.what, self.nth + 1)
    }
}

//! The daemons by role: what the control record says is served, and when it changes, what it says then.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use coldspare_core::control::{ControlRecord, Role};

use crate::active::Mode;
use crate::config::Config;
use crate::exit::{Code, Failure, Outcome};
use crate::state::State;
use crate::{active, demotion, handover, standby};

/// Which roles a command serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Serves {
    /// `send`: as long as this host is active, or gives that over.
    Active,
    /// `receive`: as long as it is a standby.
    Standby,
    /// `run`: whatever it is.
    Both,
}

/// Somebody wants the program to end.
static STOPPING: AtomicBool = AtomicBool::new(false);

/// Takes note that the program is to end, whatever the role is by then.
pub(crate) fn stop() {
    STOPPING.store(true, Ordering::Relaxed);
}

/// Serves the role of this host until the program is stopped, or the role is not the command's any more.
///
/// # Errors
/// `Fenced`: the role isn't the command's, or another host is the active; those of the daemons.
pub(crate) fn run(config_path: &Path, serves: Serves) -> Outcome {
    let mut is_first = true;
    loop {
        let config = Config::load(config_path)?;
        let state = State::at(&config.state);
        let record = state.control()?;
        let is_served = match record.role {
            Role::Active | Role::Handover => serves != Serves::Standby,
            Role::Standby => serves != Serves::Active,
            Role::Fenced => serves != Serves::Standby && record.handover.is_some(),
        };
        if !is_served {
            let failure = wrong_role(&record, serves);
            if is_first || record.role == Role::Fenced {
                return Err(failure);
            }
            tracing::warn!(role = record.role.word(), "this host has another role now: {failure}");
            return Ok(Code::Done);
        }
        match record.role {
            Role::Active => drop(active::run(config_path, Mode::Daemon)?),
            Role::Handover => handover::give(&config, &state)?,
            Role::Fenced => demotion::demote(&config, &state)?,
            Role::Standby => drop(standby::run(config_path)?),
        }
        if STOPPING.load(Ordering::Relaxed) {
            return Ok(Code::Done);
        }
        is_first = false;
    }
}

/// What a person does with a host that is fenced.
pub(crate) const AFTER_FENCED: &str = "another host is, or was, the active: `coldspare demote` makes this one its standby; \
    if both were at one time, decide first which one counts (the runbook's page on a conflict)";

/// What to say to somebody whose command is for another role.
pub(crate) fn wrong_role(record: &ControlRecord, serves: Serves) -> Failure {
    let role = record.role.word();
    let wanted = match serves {
        Serves::Active => "not the active; only the active sends",
        Serves::Standby => "not a standby; only a standby receives",
        Serves::Both => "and serves nobody",
    };
    let next = match record.role {
        Role::Standby => "`coldspare receive` or `run` serves it; `coldspare promote` makes it the active",
        Role::Active => "`coldspare send` or `run` serves it; `coldspare switchover` changes the roles",
        Role::Handover => "`coldspare send` or `run` goes on with handing over",
        Role::Fenced => AFTER_FENCED,
    };
    Failure::fenced(format!("this host is {role}, {wanted}; epoch {}: {next}", record.promised))
}

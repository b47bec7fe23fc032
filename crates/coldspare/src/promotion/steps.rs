//! What comes after a promotion is stored: the promote hook, and on request the application's start and the route to it.
//!
//! A hook that failed is a state of its own (R9): noted, told by `status`, and run again by nobody but a person.

use std::path::Path;

use coldspare_core::control::Role;

use crate::application::{self, Verb};
use crate::config::{Config, HookName};
use crate::exit::{Code, Failure};
use crate::state::State;

/// The note that says what became of the promote hook.
const NOTE: &str = "promote-hook";
const PENDING: &str = "pending";
const DONE: &str = "done";

/// Notes, before the promotion is stored, that the hook is due.
///
/// # Errors
/// `Damage`.
pub(crate) fn announce(config: &Config, state: &State) -> Result<(), Failure> {
    if config.hooks.has(HookName::Promote) { state.replace(NOTE, PENDING.as_bytes()) } else { state.remove_note(NOTE).map(drop) }
}

/// Runs the promote hook, if it is due and this host is the active; once.
///
/// # Errors
/// `Damage`: it failed, or what became of it can't be noted. The role stays.
pub(crate) fn run_hook(config: &Config, state: &State) -> Result<(), Failure> {
    if state.control()?.role != Role::Active || state.note(NOTE).as_deref() != Some(PENDING) {
        return Ok(());
    }
    state.replace(NOTE, b"running")?;
    match application::run_hook_of(config, HookName::Promote, &[]) {
        Ok(_) => state.replace(NOTE, DONE.as_bytes()),
        Err(why) => {
            tracing::error!("this host is the active, and {why}");
            state.replace(NOTE, format!("failed: {why}").as_bytes())?;
            Err(Failure::damage(format!("this host is the active, and {why}; `coldspare hook promote` runs it again")))
        }
    }
}

/// Notes that somebody ran the hook by hand, and that it succeeded.
///
/// # Errors
/// `Damage`.
pub(crate) fn note_done(state: &State) -> Result<(), Failure> {
    if state.note(NOTE).is_some() { state.replace(NOTE, DONE.as_bytes()) } else { Ok(()) }
}

/// What became of the hook, for `status`; `None` when there is nothing to say.
pub(crate) fn hook_state(state: &State) -> Option<String> {
    state.note(NOTE)
}

/// Starts the application of this host, waits until it serves, and routes requests here.
///
/// # Errors
/// Those of `application start` and of the hook.
pub(crate) fn start(config_path: &Path, config: &Config) -> Result<(), Failure> {
    match application::run(config_path, Verb::Start, false)? {
        Code::Done => {}
        code => return Err(Failure { code, message: "the application did not start; requests are not routed here".into(), passes: false }),
    }
    match application::run_hook_of(config, HookName::Route, &[]).map_err(Failure::damage)? {
        Some(()) => tracing::info!("requests are routed here"),
        None => tracing::info!("no hooks.route: requests are routed here by something else"),
    }
    Ok(())
}

//! What the guard says of itself, and the commands that ask it or hold it.

use std::path::Path;
use std::time::Duration;

use coldspare_failover::observation::Health;
use serde_json::{Value, json};

use super::{GuardDaemon, MEMORY_NOTE, PAUSED_NOTE};
use crate::config::Config;
use crate::exit::{Code, Failure, Outcome};
use crate::socket::{self, Request};
use crate::state::{Removed, State};

/// How long the guard may take to answer.
const LIMIT: Duration = Duration::from_secs(2);

impl GuardDaemon {
    pub(super) fn report(&self) -> Value {
        let memory = self.ladder.memory();
        let look = self.last_look.as_ref().map(|(at, health)| {
            let (state, why) = match health {
                Health::Failed(why) => ("failed", why.as_str()),
                Health::Unknown(state) => (state.as_str(), ""),
                Health::Running => ("RUNNING", ""),
                Health::Starting => ("STARTING", ""),
                Health::Maintenance => ("MAINTENANCE", ""),
                Health::FirstRun => ("FIRST_RUN", ""),
            };
            json!({"state": state, "why": why, "age_ms": u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX)})
        });
        let acting = self.acting.map(|(action, since)| json!({"action": format!("{action:?}"), "seconds": since.elapsed().as_secs()}));
        let last =
            self.last_action.as_ref().map(|(action, outcome)| json!({"action": format!("{action:?}"), "outcome": format!("{outcome:?}")}));
        json!({
            "state": self.ladder.word(),
            "attempts": memory.attempts,
            "attempts_max": self.application.guard().attempts,
            "escalated": memory.escalated,
            "looks": self.looks,
            "last_look": look,
            "acting": acting,
            "last_action": last,
            "news": self.herald.shown(),
            "trouble": self.herald.trouble(),
            "build": crate::BUILD,
        })
    }
}

/// Asks the guard of the node in `state`; `None` when none runs, or it doesn't answer.
pub(crate) fn ask(state: &State) -> Option<Value> {
    socket::ask(&state.guard_socket_path(), &Request::Status, Some(LIMIT), |_| ()).ok().flatten()
}

/// Runs `guard --status`.
///
/// # Errors
/// `Usage`; `Unreachable` when no guard runs.
pub(crate) fn status(config_path: &Path, json: bool) -> Outcome {
    let state = State::at(&Config::load(config_path)?.state);
    let asked = socket::ask(&state.guard_socket_path(), &Request::Status, Some(LIMIT), |_| ())?;
    let Some(value) = asked else {
        return Err(Failure::unreachable("no guard runs here; start `coldspare guard`"));
    };
    if json {
        println!("{value}");
    } else {
        print!("{}", page(&value));
    }
    Ok(Code::Done)
}

/// Runs `guard --pause`: nothing new is done to the application until [`resume`], whether or not a guard runs.
///
/// # Errors
/// `Damage`: it could not be noted.
pub(crate) fn pause(config_path: &Path) -> Outcome {
    let state = initialised(config_path)?;
    state.replace(PAUSED_NOTE, b"")?;
    notice(&state);
    Ok(Code::Done)
}

/// Runs `guard --resume`; what was tried before is forgotten.
///
/// # Errors
/// `Damage`: it could not be noted.
pub(crate) fn resume(config_path: &Path) -> Outcome {
    let state = initialised(config_path)?;
    if state.remove_note(PAUSED_NOTE)? == Removed::WasThere || ask(&state).is_none() {
        state.remove_note(MEMORY_NOTE)?;
        notice(&state);
        return Ok(Code::Done);
    }
    Err(Failure::usage("the guard isn't paused; to have it forget what it did, pause it first"))
}

/// Has the guard, if one runs, read the notes now: one that was paused and resumed between two looks would know of neither.
fn notice(state: &State) {
    let _ = ask(state);
}

/// Refuses what a guard that runs, and may act, would undo.
///
/// # Errors
/// `Usage`.
pub(crate) fn refuse_beside_guard(state: &State, what: &str) -> Result<(), Failure> {
    let report = ask(state);
    match report.as_ref().and_then(|report| report["state"].as_str()) {
        Some("paused") if report.as_ref().is_some_and(|report| report["acting"].is_object()) => Err(Failure::usage(
            "the guard is paused, but still at what it had begun; try again when `coldspare guard --status` shows nothing of it",
        )),
        None | Some("inactive" | "paused" | "escalated") => Ok(()),
        Some(_) => Err(Failure::usage(format!("the guard {what}; run `coldspare guard --pause` first, and `--resume` afterwards"))),
    }
}

fn initialised(config_path: &Path) -> Result<State, Failure> {
    let state = State::at(&Config::load(config_path)?.state);
    state.control()?;
    Ok(state)
}

fn page(value: &Value) -> String {
    let text = |value: &Value| match value {
        Value::Null => "-".to_string(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    };
    let mut out = format!("{:<14}{}\n", "application", text(&value["state"]));
    let look = &value["last_look"];
    if look.is_object() {
        out.push_str(&format!("{:<14}{} {}\n", "says", text(&look["state"]), text(&look["why"])));
    }
    out.push_str(&format!("{:<14}{} of {}\n", "attempts", value["attempts"], value["attempts_max"]));
    if value["acting"].is_object() {
        out.push_str(&format!("{:<14}{}, for {} s\n", "at work", text(&value["acting"]["action"]), value["acting"]["seconds"]));
    }
    if value["trouble"].is_string() {
        out.push_str(&format!("{:<14}{}\n", "trouble", text(&value["trouble"])));
    }
    for news in value["news"].as_array().into_iter().flatten() {
        out.push_str(&format!("{} {}\n", text(&news["time"]), text(&news["message"])));
    }
    out
}

//! From a standby to the active (R7, R8).
//!
//! A changeset that was committed is finished when the standby is opened; what is staged of another is left aside. The
//! tree is verified, and it is said what may be lost. The index of an earlier time is removed before the role is stored,
//! which happens last: every step may be taken again.

mod aim;
pub(crate) mod loss;
pub(crate) mod steps;

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use coldspare_core::control::{ControlRecord, Event, Proof, Role};
use coldspare_core::{Digest, Epoch};
use coldspare_standby::{Depth, Progress};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::application;
use crate::config::{Config, HookName};
use crate::exit::{Code, Failure, Outcome};
use crate::role::{self, NotTaken};
use crate::socket::{self, Request};
use crate::standby::{Copy, open_copy_alone};
use crate::state::State;
use aim::Aim;
use loss::Loss;

/// What a person says of a promotion.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Terms {
    /// A command that fences the old active, and succeeds only if that can write no more.
    pub(crate) fenced_by: Vec<String>,
    /// The configuration's fence command does it.
    pub(crate) fence: bool,
    /// What is lost is accepted, and that the old active may still be one.
    pub(crate) accept_possible_loss: bool,
    /// Damage that a quick verification finds is accepted.
    pub(crate) accept_damage: bool,
    /// The age of the tree is accepted, whatever it is.
    pub(crate) accept_lag: bool,
    /// That the active is connected is accepted.
    pub(crate) accept_connection: bool,
    /// The point to be promoted, as `rewind` takes it; without it, and without a position, the tree as it is.
    pub(crate) to: Option<String>,
    /// Where the database stands that the point has to fit.
    pub(crate) database_position: Option<String>,
}

impl Terms {
    /// What of the past is to be promoted, as the person said it.
    fn aim(&self) -> Option<String> {
        let position = || self.database_position.as_ref().map(|at| format!("--database-position {at}"));
        self.to.as_ref().map(|to| format!("--to {to}")).or_else(position)
    }

    fn has_proof(&self) -> bool {
        !self.fenced_by.is_empty() || self.fence || self.accept_possible_loss
    }
}

/// What follows on a promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// What somebody else does.
    Nothing,
    /// The application is started, and requests are routed here.
    Start,
}

const NO_FENCE: &str = "no fence command: set hooks.fence, or give --fenced-by COMMAND or --accept-possible-loss";

/// Runs `promote`; `failover` is the same with the fence command of the configuration.
///
/// # Errors
/// `Differs`: a safety rule refuses; `Fenced`, `Damage`, `Usage`. The role is what it was.
pub(crate) fn run(config_path: &Path, terms: &Terms, then: Then, json: bool) -> Outcome {
    let config = Config::load(config_path)?;
    if then == Then::Start {
        application::Application::load(config_path)?; // what is missing is said before anything is done
    }
    let state = State::at(&config.state);
    let started = Instant::now();
    let record = state.control()?;
    let mut done = match record.role {
        Role::Active => already(&state, &record, terms)?,
        Role::Standby => match socket::ask(&state.socket_path(), &Request::Promote(terms.clone()), None, |_| ())? {
            Some(done) => done,
            None => {
                let _lock = state.lock()?;
                let record = state.control()?;
                let copy = open_copy_alone(&config, &state, &record)?;
                let found = promote(&config, &state, &record, &copy, terms, &|| crate::seal::take_off(&config));
                found.map(|(_, done)| done)?
            }
        },
        Role::Fenced | Role::Handover if terms.aim().is_some() => {
            return Err(Failure::usage(format!("this host is {}; points are those of the standby", record.role.word())));
        }
        Role::Fenced | Role::Handover => {
            let _lock = state.lock()?;
            resume(&config, &state, &state.control()?, terms)?
        }
    };
    done["seconds"] = json!((started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0);
    let followed = steps::run_hook(&config, &state);
    done["promote_hook"] = json!(steps::hook_state(&state));
    // Who asked may be gone by now, such as a guard on the host that was fenced: what is left to do is done all the same.
    let _ = writeln!(std::io::stdout(), "{}", if json { done.to_string() } else { described(&done, then) });
    followed?;
    if then == Then::Start {
        steps::start(config_path, &config)?;
    }
    Ok(Code::Done)
}

/// Runs `failover`: [`run`], with the fence command of the configuration unless the terms name another proof.
///
/// # Errors
/// As [`run`]; `Usage` when there is no proof.
pub(crate) fn fail_over(config_path: &Path, mut terms: Terms, then: Then, json: bool) -> Outcome {
    if terms.fenced_by.is_empty() && !terms.accept_possible_loss {
        if !Config::load(config_path)?.hooks.has(HookName::Fence) {
            return Err(Failure::usage(NO_FENCE));
        }
        terms.fence = true;
    }
    run(config_path, &terms, then, json)
}

/// That this host is the active already, if it is that as the terms have it.
fn already(state: &State, record: &ControlRecord, terms: &Terms) -> Result<Value, Failure> {
    let epoch = record.promised;
    let asked = noted(state, epoch).and_then(|said| said["asked"].as_str().map(String::from));
    if let Some(aim) = terms.aim().filter(|aim| asked.as_ref() != Some(aim)) {
        let how = asked.map(|asked| format!(" by {asked}")).unwrap_or_default();
        return Err(refused(format!(
            "this host is the active already, of epoch {epoch}{how}: {aim} comes too late, points are those of the standby"
        )));
    }
    Ok(json!({"role": "active", "epoch": epoch.0, "already": true}))
}

/// Promotes the standby; returns its record as it is then, and what there is to say of it.
///
/// Nobody changes the tree meanwhile. `unseal` takes a seal off, right before the role is stored.
///
/// # Errors
/// As [`run`].
pub(crate) fn promote(
    config: &Config,
    state: &State,
    record: &ControlRecord,
    copy: &Copy,
    terms: &Terms,
    unseal: &dyn Fn() -> Result<(), Failure>,
) -> Result<(ControlRecord, Value), Failure> {
    copy.abandon().map_err(Failure::damage)?;
    let aim = Aim::of(copy, terms)?;
    // Who names a point knows that it is old, and that it is not what was handed over.
    let handed_over = if aim.is_none() { handed_over(record, copy)? } else { None };
    let is_handed_over = handed_over.is_some();
    let mut loss = Loss::now(state, copy, copy.applied())?;
    if let Some(aim) = &aim {
        loss.as_of_ms = aim.as_of_ms();
    }
    let lag_ms = loss.bound_ms();
    let lag_max = Duration::from_secs(config.failover.max_lag_seconds);
    if !is_handed_over && terms.aim().is_none() && !terms.accept_lag && lag_ms.is_none_or(|ms| Duration::from_millis(ms) > lag_max) {
        let age = lag_ms.map_or("nobody knows how old the tree is, if there is one".to_string(), |ms| {
            format!("the tree is {} s old, above failover.max_lag_seconds = {}", ms / 1000, lag_max.as_secs())
        });
        return Err(refused(format!("{age}; give --accept-lag if it is to be promoted so")));
    }
    let verified = copy.verify(Depth::Quick, &Progress::default()).map_err(Failure::damage)?;
    if let Some(first) = verified.problems.first().filter(|_| !terms.accept_damage) {
        let count = verified.problems.len();
        let what = format!("{count} paths differ from the manifest, the first is {}: {} ({})", first.path, first.kind.word(), first.detail);
        return Err(refused(format!("{what}; `coldspare verify --repair` puts right what it can, or give --accept-damage")));
    }
    let proof = match (&aim, handed_over) {
        (None, Some(digest)) => Proof::Handover { digest },
        (None, None) => prove(config, terms, &loss)?,
        (Some(_), _) if !terms.has_proof() => return Err(unproven(&loss)),
        (Some(aim), _) => {
            aim.go(copy)?;
            prove(config, terms, &loss).map_err(|failure| aim.come_back(copy, failure))?
        }
    };
    let applied = copy.applied();
    let given_up = aim.as_ref().map(|aim| aim.give_up(copy)).transpose()?;
    // The old active may have taken pushes until it was fenced.
    let loss_bound_ms = if is_handed_over { Some(0) } else { loss.bound_ms() };
    let event = Event::Promote { proof, applied, fresh: role::fresh()? };
    prepare(config, state, unseal)?;
    let point =
        applied.map(|a| json!({"session": a.session.to_string(), "seq": a.seq.0, "as_of": loss.as_of_ms.map(crate::active::rfc3339)}));
    let lost = if is_handed_over { Value::Null } else { loss.to_json() };
    if !is_handed_over {
        let at = crate::active::rfc3339(coldspare_scan::watch::now_ms());
        let said =
            json!({"at": at, "point": point, "loss_bound_ms": loss_bound_ms, "loss": lost, "asked": terms.aim(), "given_up": given_up});
        note(state, Epoch(record.promised.0 + 1), &said)?;
    }
    let (next, _) = role::take(config, state, record, event).map_err(NotTaken::into_failure)?;
    let place = |p: &(coldspare_core::RootId, coldspare_core::RelPath)| json!({"root": p.0.0, "path": p.1.to_string()});
    let done = json!({
        "role": next.role.word(),
        "epoch": next.promised.0,
        "session": next.session().map(|s| s.id.to_string()),
        "handed_over": is_handed_over,
        "point": point,
        "loss_bound_ms": loss_bound_ms,
        "loss": lost,
        "given_up": given_up,
        "checked_entries": verified.entries,
        "problems": verified.problems.len(),
        "incomplete": copy.incomplete().map_err(Failure::damage)?.iter().map(place).collect::<Vec<_>>(),
        "held_back": copy.held_back().map_err(Failure::damage)?.iter().map(crate::active::problem).collect::<Vec<_>>(),
        "staged_files": copy.staged_files().map_err(Failure::damage)?,
    });
    Ok((next, done))
}

/// Keeps what is said of a promotion to an epoch, for whoever asks later.
fn note(state: &State, epoch: Epoch, said: &Value) -> Result<(), Failure> {
    tracing::warn!(epoch = epoch.0, said = %said, "what this promotion may lose");
    state.replace(&format!("promotion-{}", epoch.0), said.to_string().as_bytes())
}

/// What was said of the promotion to an epoch, if this host was promoted to it without a handover.
pub(crate) fn noted(state: &State, epoch: Epoch) -> Option<Value> {
    state.note(&format!("promotion-{}", epoch.0)).and_then(|text| serde_json::from_str(&text).ok())
}

/// Before this host's role is stored as active: the index of an earlier time, when it was that, is no use, and what changes
/// from now on isn't what the manifest says. The application can write: `unseal` sees to it.
///
/// # Errors
/// `Damage`; those of `unseal`.
pub(crate) fn prepare(config: &Config, state: &State, unseal: &dyn Fn() -> Result<(), Failure>) -> Result<(), Failure> {
    unseal()?;
    steps::announce(config, state)?;
    state.replace("promoted", coldspare_scan::watch::now_ms().to_string().as_bytes())?;
    state.remove_store(&state.index_path())
}

/// Makes a host that was active, and is not any more, active again: its home is what it is.
fn resume(config: &Config, state: &State, record: &ControlRecord, terms: &Terms) -> Result<Value, Failure> {
    // Fencing proves nothing here: the other host's tree is the one that counts.
    if !terms.accept_possible_loss {
        let epoch = record.promised;
        return Err(Failure::fenced(match record.role {
            Role::Handover => format!(
                "this host gave the active's role over: the standby takes it as soon as `coldspare run` here reaches it (epoch {epoch}). If the \
                 standby is lost for good, make sure that it is off; then --accept-possible-loss makes this host the active again"
            ),
            _ => format!(
                "this host is fenced: another is, or was, the active of epoch {epoch}, and `coldspare demote` makes this one its standby. If \
                 the other is lost for good, make sure that it is off; then --accept-possible-loss makes this host the active again"
            ),
        }));
    }
    let event = Event::Promote { proof: Proof::LossAccepted, applied: None, fresh: role::fresh()? };
    let (next, _) = role::take(config, state, record, event).map_err(NotTaken::into_failure)?;
    Ok(
        json!({"role": next.role.word(), "epoch": next.promised.0, "session": next.session().map(|s| s.id.to_string()), "handed_over": false}),
    )
}

/// The digest of the tree, if it is what the active offers.
///
/// Cost: where something is offered, a pass over the manifest.
fn handed_over(record: &ControlRecord, copy: &Copy) -> Result<Option<Digest>, Failure> {
    if record.handover.is_none() {
        return Ok(None);
    }
    let (applied, digest) = copy.fingerprint().map_err(Failure::damage)?;
    let event = Event::Promote { proof: Proof::Handover { digest }, applied, fresh: role::fresh()? };
    Ok(coldspare_core::control::step(record, event).is_ok().then_some(digest))
}

fn prove(config: &Config, terms: &Terms, loss: &Loss) -> Result<Proof, Failure> {
    let not_fenced = |why| refused(format!("the old active is not fenced: {why}"));
    if !terms.fenced_by.is_empty() {
        application::run_fence(config, &terms.fenced_by).map_err(not_fenced)?;
        return Ok(Proof::Fenced);
    }
    if terms.fence {
        return match application::run_hook_of(config, HookName::Fence, &[]).map_err(not_fenced)? {
            Some(()) => Ok(Proof::Fenced),
            None => Err(Failure::usage(NO_FENCE)),
        };
    }
    if terms.accept_possible_loss {
        return Ok(Proof::LossAccepted);
    }
    Err(unproven(loss))
}

fn unproven(loss: &Loss) -> Failure {
    refused(format!(
        "nothing was handed over, and nothing proves that the old active is gone: give --fenced-by COMMAND, or --accept-possible-loss \
         if you know that it can't come back and accept what is lost\n{}",
        loss::lines(&loss.to_json()).join("\n")
    ))
}

fn refused(message: impl std::fmt::Display) -> Failure {
    Failure { code: Code::Differs, message: message.to_string(), passes: false }
}

fn described(done: &Value, then: Then) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("unknown").to_string();
    if done["already"] == true {
        return format!("this host is the active already, of epoch {}", done["epoch"]);
    }
    let mut lines = vec![format!("this host is the active now, of epoch {}", done["epoch"])];
    if done["point"].is_object() {
        lines.push(format!("its tree: changeset {} as of {}", done["point"]["seq"], text(&done["point"]["as_of"])));
    }
    match (done["handed_over"] == true, done["loss_bound_ms"].as_u64()) {
        (true, _) => lines.push("handed over: nothing is lost".into()),
        (false, Some(ms)) => {
            lines.push(format!("what was written in the last {:.1} s before the promotion may be lost", ms as f64 / 1000.0))
        }
        (false, None) => {}
    }
    if done["given_up"].is_object() {
        lines.extend(aim::lines(&done["given_up"]));
    }
    if done["loss"].is_object() {
        lines.extend(loss::lines(&done["loss"]));
    }
    for p in done["held_back"].as_array().into_iter().flatten() {
        lines.push(format!("held back on the old active: {}: {}", text(&p["path"]), text(&p["kind"])));
    }
    if done["staged_files"].as_u64().is_some_and(|files| files > 0) {
        lines.push(format!("{} files of a changeset that did not come to its end were left aside", done["staged_files"]));
    }
    if let Some(hook) = done["promote_hook"].as_str() {
        lines.push(format!("promote hook: {hook}"));
    }
    lines.push(match then {
        Then::Nothing => "next: start the application here, and `coldspare send` (`coldspare run` goes on by itself)".into(),
        Then::Start => "the application is being started here; then: `coldspare send` (`coldspare run` goes on by itself)".into(),
    });
    lines.join("\n")
}

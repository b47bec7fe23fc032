//! Performs what `coldspare_core::control::step` decides for this host.

use coldspare_core::SessionId;
use coldspare_core::control::{ControlRecord, Effect, Event, Fresh, Refusal, Role, step};
use coldspare_scan::index::Index;

use crate::application;
use crate::config::{Config, HookName};
use crate::exit::Failure;
use crate::state::State;

/// Why an event was not taken.
#[derive(Debug)]
pub(crate) enum NotTaken {
    /// The rules refuse it.
    Refused(Refusal),
    /// Something that had to be durable is not.
    Failed(Failure),
}

/// Takes an event: stores the record and does what is to be done here; returns the record as it is then, and what is to be
/// said to the other host.
///
/// # Errors
/// `Refused`: nothing changed. `Failed`: the event may be taken again; nothing may be said.
pub(crate) fn take(config: &Config, state: &State, record: &ControlRecord, event: Event) -> Result<(ControlRecord, Vec<Effect>), NotTaken> {
    let (next, effects) = step(record, event).map_err(NotTaken::Refused)?;
    if next.role != record.role {
        tracing::info!(from = record.role.word(), to = next.role.word(), epoch = next.promised.0, "the role changes");
    }
    let mut answers = Vec::new();
    for effect in effects {
        match effect {
            Effect::Store => state.set_control(&next).map_err(NotTaken::Failed)?,
            Effect::DistrustIndex => distrust_index(state).map_err(NotTaken::Failed)?,
            Effect::FenceSelf => fence_self(config, record.role),
            Effect::Alarm => tracing::error!("a person has to decide which host counts: see \"Conflict\" and \"Fail-back\" in the runbook"),
            Effect::Serve | Effect::Refuse(_) | Effect::Offer(_) | Effect::AnswerNoted | Effect::AnswerTaken(_) => answers.push(effect),
        }
    }
    Ok((next, answers))
}

/// Runs the command that keeps this host from writing its home. That it is fenced is stored whatever comes of that.
///
/// Where the role was handed over, the application was stopped before that.
fn fence_self(config: &Config, was: Role) {
    match was {
        Role::Handover => tracing::info!("what this host handed over is taken"),
        _ => tracing::error!("this host is active no more: nothing that the application writes here is replicated"),
    }
    match application::run_hook_of(config, HookName::FenceSelf, &[]) {
        Ok(Some(())) => tracing::warn!("hooks.fence_self has run"),
        Ok(None) if was == Role::Handover => {}
        Ok(None) => tracing::error!("there is no hooks.fence_self: stop the application here by hand"),
        Err(why) => tracing::error!("{why}: stop the application here by hand"),
    }
}

/// What a session that begins on this host now is made of.
///
/// # Errors
/// `Usage`: the kernel gives no random numbers, or no boot id.
pub(crate) fn fresh() -> Result<Fresh, Failure> {
    Ok(Fresh { id: SessionId(crate::init::random()?), boot: boot_id()? })
}

/// The id of the kernel's run; `COLDSPARE_BOOT_ID`, for tests, stands for a restart of the host.
fn boot_id() -> Result<[u8; 16], Failure> {
    match std::env::var("COLDSPARE_BOOT_ID") {
        Ok(text) => {
            let id = SessionId::parse(&text);
            id.map(|id| id.0).ok_or_else(|| Failure::usage("COLDSPARE_BOOT_ID isn't 32 hexadecimal digits; unset it"))
        }
        Err(_) => coldspare_os::boot_id().map_err(|e| Failure::usage(format!("the boot id can't be read: {e}"))),
    }
}

fn distrust_index(state: &State) -> Result<(), Failure> {
    tracing::warn!("the host was restarted: a new session begins, everything is compared");
    if !state.index_path().exists() {
        return Ok(());
    }
    let distrusted = Index::open(&state.index_path()).and_then(|index| index.distrust_recent(coldspare_scan::watch::now_ms()));
    distrusted.map_err(crate::active::index_failure)
}

impl NotTaken {
    /// As the end of a command.
    pub(crate) fn into_failure(self) -> Failure {
        match self {
            NotTaken::Refused(refusal) => Failure::fenced(refusal),
            NotTaken::Failed(failure) => failure,
        }
    }

    /// As the answer to the other host.
    pub(crate) fn into_refusal(self) -> Refusal {
        match self {
            NotTaken::Refused(refusal) => refusal,
            NotTaken::Failed(failure) => Refusal::Unable(failure.message),
        }
    }
}

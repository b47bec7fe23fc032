//! From a running standby to the active: what its active hands over (R7), and what a person asks for (R8).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use coldspare_core::control::{ControlRecord, Effect, Event, Handover, Refusal, Taking, step};
use coldspare_standby::{Depth, Progress};
use coldspare_transport::{LinkError, ToActive};
use serde_json::Value;

use super::{Copy, Shared, lock};
use crate::exit::Failure;
use crate::promotion::{self, Terms};
use crate::role;
use crate::socket::Reply;

/// Says what the tree is, and how sound.
pub(super) fn compare(_: &Shared, copy: &Copy) -> Result<ToActive, LinkError> {
    let failed = |e: coldspare_standby::StandbyError| LinkError::Closed { reason: format!("the standby can't compare its tree: {e}") };
    let verified = copy.verify(Depth::Quick, &Progress::default()).map_err(failed)?;
    let (applied, digest) = copy.fingerprint().map_err(failed)?;
    Ok(ToActive::Tree { applied, digest, problems: verified.problems.len() as u64 })
}

/// Takes what the active hands over, or notes it.
pub(super) fn take(shared: &Shared, copy: &Copy, handover: Handover, taking: Taking) -> Result<ToActive, LinkError> {
    let refusal = match try_to_take(shared, copy, handover, taking) {
        Ok(answer) => {
            if matches!(answer, ToActive::Taken { .. }) {
                run_promote_hook(shared);
            }
            return Ok(answer);
        }
        Err(refusal) => refusal,
    };
    tracing::warn!(reason = %refusal, "the handover is not taken");
    Ok(ToActive::NotTaken(refusal))
}

/// Beside the daemon's work: it may take minutes.
fn run_promote_hook(shared: &Shared) {
    let (config, state) = (shared.config.clone(), shared.state.clone());
    // A failure is logged, noted, and told by `status`.
    std::thread::spawn(move || drop(promotion::steps::run_hook(&config, &state)));
}

fn try_to_take(shared: &Shared, copy: &Copy, handover: Handover, taking: Taking) -> Result<ToActive, Refusal> {
    let unable = |f: Failure| Refusal::Unable(f.message);
    copy.abandon().map_err(|e| Refusal::Unable(e.to_string()))?;
    let (applied, digest) = copy.fingerprint().map_err(|e| Refusal::Unable(e.to_string()))?;
    let event = Event::HandedOver { handover, taking, applied, digest, fresh: role::fresh().map_err(unable)? };
    // Nothing is put right any more once the application may write.
    let _nothing_is_healed = lock(&shared.healing);
    let mut record = lock(&shared.record);
    step(&record, event.clone())?;
    if taking == Taking::Now {
        promotion::prepare(&shared.config, &shared.state, &|| shared.seal.take_off()).map_err(unable)?;
    }
    let (next, answers) = role::take(&shared.config, &shared.state, &record, event).map_err(role::NotTaken::into_refusal)?;
    *record = next;
    let answer = answers.into_iter().find_map(|answer| match answer {
        Effect::AnswerTaken(session) => Some(ToActive::Taken { session }),
        Effect::AnswerNoted => Some(ToActive::Noted),
        _ => None,
    });
    answer.ok_or_else(|| Refusal::Unable("nothing is to be answered".into()))
}

impl Shared {
    /// Promotes this host, whose active doesn't hand over now.
    pub(super) async fn promote(self: &Arc<Self>, terms: Terms) -> Reply {
        let is_connected = self.conversation.link().is_some();
        if is_connected && !terms.accept_connection && lock(&self.record).handover.is_none() {
            let message = "the active is connected: hand over with `coldspare switchover` there, or give --accept-connection";
            return Reply::failed(&Failure { code: crate::exit::Code::Differs, ..Failure::usage(message) });
        }
        let record = {
            let record = lock(&self.record);
            self.is_promoting.store(true, Ordering::Relaxed);
            record.clone()
        };
        // What is being put right comes first; from now on nothing is begun.
        let shared = self.clone();
        let _ = tokio::task::spawn_blocking(move || drop(lock(&shared.healing))).await;
        let promoted = self.promote_alone(record, terms).await;
        self.is_promoting.store(false, Ordering::Relaxed);
        match promoted {
            Ok(done) => {
                if done["given_up"].is_object() {
                    self.make_bundles(None);
                }
                self.promoted.notify_one();
                Reply::Done(done)
            }
            Err(failure) => Reply::failed(&failure),
        }
    }

    /// Nobody is let in meanwhile.
    async fn promote_alone(self: &Arc<Self>, record: ControlRecord, terms: Terms) -> Result<Value, Failure> {
        let _nobody_is_served = self.alone("the standby is being promoted").await;
        let Some(copy) = lock(&self.copy).clone() else {
            return Err(Failure::damage("the standby isn't open: see `coldspare status`"));
        };
        let shared = self.clone();
        let work = tokio::task::spawn_blocking(move || {
            let (next, done) = promotion::promote(&shared.config, &shared.state, &record, &copy, &terms, &|| shared.seal.take_off())?;
            *lock(&shared.record) = next;
            Ok(done)
        });
        work.await.unwrap_or_else(|e| Err(Failure::damage(e)))
    }
}

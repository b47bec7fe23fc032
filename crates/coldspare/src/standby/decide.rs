//! What waits for a person, and what the person says.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coldspare_core::Seq;
use coldspare_core::control::Role;
use coldspare_standby::{Answer, Question};
use serde_json::{Value, json};

use super::{Shared, lock, open_copy_alone};
use crate::config::{Config, HookName};
use crate::exit::{Code, Failure, Outcome};
use crate::socket::{self, Reply, Request};
use crate::state::State;

/// Runs `accept` and `reject`: asks the daemon, or opens the standby when none runs.
///
/// # Errors
/// `Usage` on an active; `Differs` when nothing waits; `Damage`.
pub(crate) fn run(config_path: &Path, accept: bool, is_json: bool) -> Outcome {
    let config = Config::load(config_path)?;
    let state = State::at(&config.state);
    let record = state.control()?;
    if record.role != Role::Standby {
        return Err(Failure::usage(format!("this host is {}; decisions are taken on the standby", record.role.word())));
    }
    let answered = match socket::ask(&state.socket_path(), &Request::Decide { accept }, Some(Duration::from_secs(60)), |_| {})? {
        Some(answered) => answered,
        None => {
            let _lock = state.lock()?;
            let copy = open_copy_alone(&config, &state, &record)?;
            to_json(&copy.answer(answer_of(accept)).map_err(Failure::damage)?.ok_or_else(nothing_waits)?)
        }
    };
    if is_json {
        println!("{answered}");
    } else {
        let what = answered["reason"].as_str().unwrap_or_default();
        println!("{}: {what}", if accept { "accepted" } else { "rejected" });
    }
    Ok(Code::Done)
}

/// A question as `status` shows it.
pub(crate) fn to_json(question: &Question) -> Value {
    let answer = match question.answer {
        Answer::None => Value::Null,
        Answer::Accepted => json!("accepted"),
        Answer::Rejected => json!("rejected"),
    };
    json!({
        "reason": question.reason,
        "seq": question.seq.0,
        "since": crate::active::rfc3339(question.since_ms),
        "since_ms": question.since_ms,
        "answer": answer,
    })
}

fn answer_of(accept: bool) -> Answer {
    if accept { Answer::Accepted } else { Answer::Rejected }
}

fn nothing_waits() -> Failure {
    Failure::refused("nothing waits for a decision; `coldspare status` shows what does")
}

impl Shared {
    /// Takes a person's answer. The active hears of it by connecting anew, and sends at once what it has.
    pub(super) async fn decide(self: &Arc<Self>, accept: bool) -> Reply {
        let Some(copy) = self.opened().await else {
            let why = lock(&self.trouble).clone().unwrap_or_default();
            return Reply::failed(&Failure::damage(format!("the standby isn't open: {why}")));
        };
        let answered = tokio::task::spawn_blocking(move || copy.answer(answer_of(accept))).await;
        let question = match answered {
            Ok(Ok(Some(question))) => question,
            Ok(Ok(None)) => return Reply::failed(&nothing_waits()),
            Ok(Err(e)) => return Reply::failed(&Failure::damage(e)),
            Err(e) => return Reply::failed(&Failure::damage(e)),
        };
        tracing::warn!(reason = question.reason, accept, "a person decided");
        self.end_conversation("a person decided about what waited");
        Reply::Done(to_json(&question))
    }

    /// A changeset waits: the log says so once.
    pub(super) fn note_question(&self, seq: Seq, reason: &str, is_rejected: bool) {
        let since = lock(&self.copy).as_ref().and_then(|copy| copy.question().ok().flatten()).map(|question| question.since_ms);
        let is_told = std::mem::replace(&mut *lock(&self.told_question), since) == since;
        if is_told || is_rejected {
            return tracing::debug!(seq = seq.0, reason, "still waits for a decision");
        }
        tracing::warn!(seq = seq.0, reason, "a changeset waits for a decision: `coldspare accept` or `coldspare reject`");
        let config = self.config.clone();
        let variables = [("COLDSPARE_EVENT".to_string(), "decision".to_string()), ("COLDSPARE_MESSAGE".into(), reason.into())];
        tokio::task::spawn_blocking(move || {
            if let Err(why) = crate::application::run_hook_of(&config, HookName::Notify, &variables) {
                tracing::error!("people could not be told: {why}");
            }
        });
    }
}

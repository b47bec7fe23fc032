//! What a promotion without a handover may lose (R8): a bound by time, and what is known, by repository.
//!
//! Of the active nothing is known but what it said. Whatever changed there after the time as of which the tree is may be
//! lost, in any repository; those are named of which it said that there is more.

use coldspare_core::control::Applied;
use coldspare_scan::watch::now_ms;
use serde_json::{Value, json};

use crate::active::rfc3339;
use crate::exit::Failure;
use crate::heard::Heard;
use crate::standby::Copy;
use crate::state::State;

/// LIMIT: repositories and files that a person is shown; the object has all.
const SHOWN_MAX: usize = 20;

/// What may be lost.
#[derive(Debug, Clone)]
pub(crate) struct Loss {
    /// On the active's clock: nothing that is older is lost but what is `known`.
    pub(crate) as_of_ms: Option<u64>,
    /// On this host's clock: when the active last said anything.
    heard_ms: Option<u64>,
    /// Repositories, and files outside of them, of which the active has more.
    known: Vec<Value>,
}

impl Loss {
    /// What would be lost if this host were promoted with its tree as it is.
    ///
    /// # Errors
    /// `Damage`: the store can't be read.
    pub(crate) fn now(state: &State, copy: &Copy, applied: Option<Applied>) -> Result<Loss, Failure> {
        let missing = copy.missing().map_err(Failure::damage)?;
        let known = missing.into_iter().map(|((root, path), why)| {
            let why: Vec<&str> = why.into_iter().map(coldspare_standby::Why::word).collect();
            json!({"root": root.0, "path": path.to_string(), "why": why})
        });
        let heard = applied.map(|applied| Heard::of(state, applied)).unwrap_or_default();
        let [as_of_ms, heard_ms] = [heard.as_of_ms, heard.at_ms].map(|ms| Some(ms).filter(|ms| *ms > 0));
        Ok(Loss { as_of_ms, heard_ms, known: known.collect() })
    }

    /// Milliseconds within which all was written that may be lost, but for what is known; until now.
    pub(crate) fn bound_ms(&self) -> Option<u64> {
        self.as_of_ms.map(|ms| now_ms().saturating_sub(ms))
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "as_of": self.as_of_ms.map(rfc3339),
            "as_of_ms": self.as_of_ms,
            "heard": self.heard_ms.map(rfc3339),
            "heard_ms": self.heard_ms,
            "known": self.known,
            "any_repository": true,
        })
    }
}

/// What [`Loss::to_json`] says, for people.
pub(crate) fn lines(loss: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or("a time that nobody knows").to_string();
    let heard = loss["heard"].as_str().map(|at| format!(" (the active was last heard of at {at})")).unwrap_or_default();
    let mut out = vec![format!(
        "what any repository got on the old active after {} may be lost{heard}: nothing here tells which did",
        text(&loss["as_of"])
    )];
    let known = loss["known"].as_array().map_or(&[][..], Vec::as_slice);
    if !known.is_empty() {
        out.push(format!("known to have more on the old active than here: {}", known.len()));
    }
    for one in known.iter().take(SHOWN_MAX) {
        let why: Vec<String> = one["why"].as_array().into_iter().flatten().map(text).collect();
        let root = if one["root"] == 0 { String::new() } else { format!(" in root {}", one["root"]) };
        out.push(format!("  {}{root}: {}", text(&one["path"]), why.join(", ")));
    }
    if known.len() > SHOWN_MAX {
        out.push(format!("  and {} more: --json lists all of them", known.len() - SHOWN_MAX));
    }
    out
}

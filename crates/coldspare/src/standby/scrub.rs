//! The scrub: a deep verification beside the receiver, at an even pace and at idle priority.
//!
//! Where it stands is a note in the state folder: a restart goes on there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coldspare_scan::watch::now_ms;
use coldspare_standby::Pace;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Copy, lock};
use crate::state::State;

/// The note's name in the state folder.
const NOTE: &str = "scrub";
/// LIMIT: entries that are compared between two looks at the clock.
const STEP_ENTRIES: u64 = 50;
/// LIMIT: problems of a pass that are kept; more are counted.
const PROBLEMS_MAX: usize = 100;
/// Entries a second at least: a million in six hours, for a tenth of a percent of a core.
const PACE_MIN: u64 = 50;
/// How long the thread sleeps when there is nothing to do.
const NAP: Duration = Duration::from_millis(500);
/// Between two notes of the position.
const NOTE_EVERY: Duration = Duration::from_secs(30);
const DAY_MS: u64 = 86_400_000;

/// One time through all of the manifest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pass {
    began_ms: u64,
    ended_ms: Option<u64>,
    /// The key of the last entry that was compared.
    position: Option<Vec<u8>>,
    entries: u64,
    bytes: u64,
    problems: Vec<String>,
    problems_unlisted: u64,
}

/// Where the scrub stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Scrub {
    now: Option<Pass>,
    last: Option<Pass>,
}

/// What `status` shows of it.
pub(super) fn to_json(scrub: &Scrub, days: u32) -> Value {
    let pass = |pass: &Pass| {
        json!({
            "began": crate::active::rfc3339(pass.began_ms),
            "ended": pass.ended_ms.map(crate::active::rfc3339),
            "age_seconds": pass.ended_ms.map(|ms| now_ms().saturating_sub(ms) / 1000),
            "entries": pass.entries,
            "bytes": pass.bytes,
            "problems": pass.problems,
            "problems_unlisted": pass.problems_unlisted,
        })
    };
    json!({"days": days, "now": scrub.now.as_ref().map(pass), "last": scrub.last.as_ref().map(pass)})
}

/// Goes over the manifest every `days` until the standby is closed.
pub(super) struct Scrubber {
    pub(super) state: State,
    pub(super) days: u32,
    pub(super) bytes_per_second: u64,
    pub(super) scrub: Arc<Mutex<Scrub>>,
    /// The standby is closed for good.
    pub(super) is_over: Arc<AtomicBool>,
    /// Gives the standby, while it is open.
    pub(super) copy: Box<dyn Fn() -> Option<Arc<Copy>> + Send>,
}

impl Scrubber {
    /// Reads where it stood, and starts the thread; without days there is none.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn start(self) -> std::io::Result<()> {
        if self.days == 0 {
            return Ok(());
        }
        // A note that can't be read costs a pass from the start.
        let noted = std::fs::read(self.state.note_path(NOTE)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        *lock(&self.scrub) = noted.unwrap_or_default();
        std::thread::Builder::new().name("scrub".into()).spawn(move || self.run()).map(drop)
    }

    fn run(&self) {
        if let Err(e) = coldspare_os::set_idle_io_priority() {
            tracing::info!(error = %e, "the scrub has the usual I/O priority");
        }
        let pace = Pace::new(self.bytes_per_second);
        let mut noted = None::<Instant>;
        // How fast this run of the program goes: what was done before it counts for the position alone.
        let mut clock = None;
        while !self.is_over.load(Ordering::Relaxed) {
            // Held for one step only: a standby in trouble has to be opened anew.
            let copy = (self.copy)().filter(|copy| copy.applied().is_some());
            let Some(mut pass) = copy.as_ref().and_then(|_| self.next_pass()) else {
                clock = None;
                std::thread::sleep(NAP);
                continue;
            };
            let Some(copy) = copy else { continue };
            let total = copy.entries().unwrap_or_default();
            let step = copy.scrub_step(pass.position.as_deref(), STEP_ENTRIES, &pace);
            drop(copy);
            let step = step.unwrap_or_else(|e| {
                tracing::error!(error = %e, "the scrub can't read the manifest and ends here; `coldspare verify --repair` mends it");
                pass.note(format!("what comes behind {} entries was not looked at: {e}", pass.entries));
                coldspare_standby::Step::default()
            });
            pass.entries += step.entries;
            pass.bytes += step.bytes;
            for problem in step.problems {
                let (path, kind, detail) = (problem.path.to_string(), problem.kind.word(), problem.detail);
                tracing::error!(path, kind, detail, "the scrub found damage; `coldspare verify --deep --repair` mends it");
                pass.note(format!("{path}: {kind} ({detail})"));
            }
            let is_over = step.next.is_none();
            pass.position = step.next;
            let mut scrub = lock(&self.scrub);
            if is_over {
                pass.ended_ms = Some(now_ms());
                tracing::info!(entries = pass.entries, bytes = pass.bytes, problems = pass.problems.len(), "the scrub is over");
                *scrub = Scrub { now: None, last: Some(pass) };
            } else {
                scrub.now = Some(pass);
            }
            let is_to_be_noted = is_over || noted.is_none_or(|at| at.elapsed() > NOTE_EVERY);
            let text = is_to_be_noted.then(|| serde_json::to_vec(&*scrub).unwrap_or_default());
            drop(scrub);
            if let Some(text) = text {
                noted = Some(Instant::now());
                if let Err(e) = self.state.replace(NOTE, &text) {
                    tracing::warn!(error = %e, "where the scrub stands can't be noted");
                }
            }
            let per_second = (total / (u64::from(self.days) * DAY_MS / 1000)).max(PACE_MIN);
            let (since, done) = clock.get_or_insert_with(|| (Instant::now(), 0_u64));
            *done += step.entries;
            std::thread::sleep(Duration::from_millis(*done * 1000 / per_second).saturating_sub(since.elapsed()));
        }
    }

    /// The pass to go on with; `None` until the next one is due.
    fn next_pass(&self) -> Option<Pass> {
        let scrub = lock(&self.scrub);
        let last_began_ms = scrub.last.as_ref().map_or(0, |last| last.began_ms);
        // A clock that was set back must not put it off.
        let is_due = now_ms().checked_sub(last_began_ms).is_none_or(|age_ms| age_ms >= u64::from(self.days) * DAY_MS);
        scrub.now.clone().or_else(|| is_due.then(|| Pass { began_ms: now_ms(), ..Pass::default() }))
    }
}

impl Pass {
    fn note(&mut self, problem: String) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        } else {
            self.problems_unlisted += 1;
        }
    }
}

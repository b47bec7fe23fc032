//! What was found to be written by somebody else, as `status` and people are told of it.

use std::collections::{BTreeMap, VecDeque};

use coldspare_core::{Problem, RelPath, RootId};
use coldspare_scan::watch::{Coverage, Process};
use serde_json::{Value, json};

/// LIMIT: findings that are shown; older ones are counted.
const SHOWN_MAX: usize = 100;
/// LIMIT: findings of one look that are logged.
const LOGGED_MAX: usize = 20;

/// What became of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// It is as it was found.
    Found,
    /// It is put right as soon as its content came from the active.
    Asked,
    /// The path is as the manifest says, since then.
    Right { since_ms: u64 },
}

/// One path that somebody else changed.
#[derive(Debug, Clone)]
pub(super) struct Finding {
    problem: Problem,
    found_ms: u64,
    by: Option<Process>,
    times: u32,
    state: State,
}

/// All of them, the watch's standing, and how often.
#[derive(Debug, Default)]
pub(super) struct Findings {
    shown: VecDeque<Finding>,
    total: u64,
    backend: Option<&'static str>,
    why: Option<String>,
    coverage: Option<Coverage>,
}

impl Findings {
    /// Takes note of how well is watched.
    pub(super) fn watched(&mut self, backend: Option<&'static str>, why: Option<String>, coverage: Option<Coverage>) {
        (self.backend, self.why, self.coverage) = (backend, why, coverage);
    }

    /// Takes note of a path that differs, `times` counted.
    pub(super) fn add(&mut self, problem: &Problem, by: Option<Process>, times: u32, found_ms: u64) {
        self.total += 1;
        self.shown.retain(|f| (f.problem.root, &f.problem.path) != (problem.root, &problem.path));
        self.shown.push_back(Finding { problem: problem.clone(), found_ms, by, times, state: State::Found });
        if self.shown.len() > SHOWN_MAX {
            self.shown.pop_front();
        }
    }

    /// Takes note of what became of a path.
    pub(super) fn set(&mut self, root: RootId, path: &RelPath, state: State) {
        if let Some(finding) = self.shown.iter_mut().rev().find(|f| f.problem.root == root && f.problem.path == *path) {
            finding.state = state;
        }
    }

    /// What `status` shows as `watch`.
    pub(super) fn watch_json(&self) -> Value {
        json!({
            "backend": self.backend.unwrap_or("none"),
            "why": self.why,
            "coverage": self.coverage.map_or(0.0, |c| c.share()),
            "watched": self.coverage.map_or(0, |c| c.watched),
            "unwatched": self.coverage.map_or(0, |c| c.unwatched),
            "overflows": self.coverage.map_or(0, |c| c.overflows),
        })
    }

    /// What `status` shows of the findings, the last one first.
    pub(super) fn to_json(&self, roots: &[String]) -> Value {
        let finding = |f: &Finding| {
            let (state, right_since) = match f.state {
                State::Found => ("found", None),
                State::Asked => ("asked", None),
                State::Right { since_ms } => ("right", Some(since_ms)),
            };
            json!({
                "root": roots.get(usize::from(f.problem.root.0)),
                "path": f.problem.path.to_string(),
                "kind": f.problem.kind.word(),
                "detail": f.problem.detail,
                "found": crate::active::rfc3339(f.found_ms),
                "found_ms": f.found_ms,
                "by": f.by.as_ref().map(|by| json!({"pid": by.pid, "command": by.command, "program": by.program})),
                "times": f.times,
                "state": state,
                "right_since": right_since.map(crate::active::rfc3339),
            })
        };
        json!({"total": self.total, "last": self.shown.iter().rev().map(finding).collect::<Vec<_>>()})
    }
}

/// What `status` shows while nothing is watched.
pub(super) fn no_watch_json() -> Value {
    Findings::default().watch_json()
}

/// Logs what one look found; returns what people are told.
pub(super) fn tell(found: &[(Problem, Option<Process>, u32)]) -> String {
    for (problem, by, times) in found.iter().take(LOGGED_MAX) {
        let (path, kind, detail) = (problem.path.to_string(), problem.kind.word(), &problem.detail);
        tracing::error!(path, kind, detail, by = described(by.as_ref()), times, "somebody else wrote on the standby");
    }
    if found.len() > LOGGED_MAX {
        tracing::error!(
            more = found.len() - LOGGED_MAX,
            "somebody else wrote more on the standby; `coldspare verify` lists all that differs"
        );
    }
    let Some((first, by, _)) = found.first() else { return String::new() };
    format!(
        "somebody else wrote on the standby: {} paths, the first is {}: {} ({}), by {}",
        found.len(),
        first.path,
        first.kind.word(),
        first.detail,
        described(by.as_ref())
    )
}

/// Who did it, in one line.
fn described(by: Option<&Process>) -> String {
    match by {
        None => "nobody knows whom".into(),
        Some(by) if by.command.is_empty() => format!("process {}, which is gone", by.pid),
        Some(by) => {
            let escaped = |text: &str| coldspare_core::path::escape(text.as_bytes());
            format!("process {}, {} ({})", by.pid, escaped(&by.command), escaped(&by.program))
        }
    }
}

/// The process that is nearest to a path: its own, or one of something in it or above it.
pub(super) fn nearest<'p>(processes: &'p BTreeMap<(RootId, RelPath), Process>, root: RootId, path: &RelPath) -> Option<&'p Process> {
    let own = processes.get(&(root, path.clone()));
    let inside = || processes.range((root, path.clone())..).next().filter(|((r, p), _)| *r == root && p.is_within(path)).map(|(_, by)| by);
    let above = || path.ancestors().filter_map(|above| processes.get(&(root, above))).last();
    own.or_else(inside).or_else(above)
}

//! What the active did, as numbers and as words.

use std::time::Duration;

use coldspare_core::{Problem, RelPath, Seq};
use coldspare_scan::capture::{Report, Work};
use indicatif::HumanBytes;
use serde_json::{Value, json};

/// Sums since the daemon's start.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tally {
    pub(crate) files_read: u64,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_sent: u64,
    pub(crate) special: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, work: Work, report: &Report) {
        self.files_read += report.totals.files_read;
        self.bytes_read += report.totals.bytes_read;
        if work == Work::Everything {
            self.special = report.special; // a look at some folders says nothing of the others
        }
    }
}

/// What a checkpoint amounted to.
pub(crate) struct Done {
    seq: Seq,
    files: u64,
    bytes_read: u64,
    bytes_sent: u64,
    took: Duration,
}

impl Done {
    pub(crate) fn new(seq: Seq, now: &Tally, since: &Tally, took: Duration) -> Done {
        Done {
            seq,
            files: now.files_read - since.files_read,
            bytes_read: now.bytes_read - since.bytes_read,
            bytes_sent: now.bytes_sent - since.bytes_sent,
            took,
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "seq": self.seq.0,
            "files": self.files,
            "bytes_read": self.bytes_read,
            "bytes_sent": self.bytes_sent,
            "seconds": (self.took.as_secs_f64() * 1000.0).round() / 1000.0,
        })
    }
}

/// The object of `send --once` and `checkpoint` as a line.
pub(crate) fn summary_line(done: &Value) -> String {
    let number = |key: &str| done[key].as_u64().unwrap_or_default();
    format!(
        "seq {}, {} files read, {} bytes read, {} bytes sent, {} seconds",
        number("seq"),
        number("files"),
        number("bytes_read"),
        number("bytes_sent"),
        done["seconds"]
    )
}

/// Which content waits since the standby has no room for it; `None` when none does.
pub(super) fn no_room(files: &[(RelPath, u64)]) -> Option<String> {
    let (first, others) = files.split_first()?;
    let bytes = HumanBytes(files.iter().map(|(_, bytes)| bytes).sum());
    let others = if others.is_empty() { String::new() } else { format!(" and {} more", others.len()) };
    Some(format!("there is no space on the standby for {}{others} ({bytes}): what they belong to waits until there is", first.0))
}

/// Says what is held back, on standard error: some of it, and how much more there is.
pub(crate) fn print_held_back(held: &[Value], unlisted: u64) {
    for p in held.iter().take(HELD_SHOWN_MAX) {
        let text = |key: &str| p[key].as_str().unwrap_or_default();
        eprintln!("held back: {}: {} ({})", text("path"), text("kind"), text("detail"));
    }
    let more = held.len().saturating_sub(HELD_SHOWN_MAX) as u64 + unlisted;
    if more > 0 {
        eprintln!("held back: {more} more; --json lists them");
    }
}

/// How many problems a person is shown.
const HELD_SHOWN_MAX: usize = 20;

/// A problem as JSON.
pub(crate) fn problem(problem: &Problem) -> Value {
    json!({"root": problem.root.0, "path": problem.path.to_string(), "kind": problem.kind.word(), "detail": problem.detail})
}

/// Milliseconds since 1970 as text, UTC.
pub(crate) fn rfc3339(ms: u64) -> String {
    let ms = i64::try_from(ms).unwrap_or(i64::MAX);
    jiff::Timestamp::from_millisecond(ms).map_or_else(|_| ms.to_string(), |t| format!("{t:.3}"))
}

//! Looks at repositories on a standby whose receiver is stopped at any moment: nothing moves, so that git's check has
//! one answer, and no look is repeated.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::git::{git, references};
use crate::pair::{Host, Ran};
use crate::recorder::{At, History, Recorder};

/// Lines of git's that are told.
const LINES_MAX: usize = 8;

/// A repository on the standby under the name that it is recorded by.
#[derive(Clone)]
pub(crate) struct Watched {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

/// What was seen of one repository, to be judged when the log of the active is complete.
pub(crate) struct Sample {
    repository: String,
    references: BTreeMap<String, String>,
    /// All that was recorded before was acknowledged, and all that is recorded later hadn't happened yet.
    acknowledged: At,
    frozen: At,
    is_between: bool,
    /// What git said against it.
    red: Option<String>,
}

/// What all samples amount to.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) samples: usize,
    pub(crate) between: usize,
    pub(crate) longest: Duration,
}

/// Stops the receiver, looks at `of`, lets it go on.
pub(crate) fn sample(standby: &Host, recorder: &Recorder, acknowledged: At, pause: Duration, of: &[Watched]) -> (Vec<Sample>, Duration) {
    let before = standby.status();
    std::thread::sleep(pause); // any moment is to be hit, not the one after an answer
    let began = Instant::now();
    let frozen = standby.freeze();
    let now = recorder.now();
    let look = |watched: &Watched| {
        let is_there = watched.path.join("HEAD").exists();
        let fsck = is_there.then(|| git(&watched.path, &["fsck", "--full"]));
        Sample {
            repository: watched.name.clone(),
            references: references(&watched.path),
            acknowledged,
            frozen: now,
            is_between: false,
            red: fsck.filter(|ran| ran.code != 0).map(|ran| told(&ran, &watched.path)),
        }
    };
    let mut samples: Vec<Sample> = of.iter().map(look).collect();
    drop(frozen);
    let took = began.elapsed();
    let after = standby.status();
    let is_between = before["seq"] == after["seq"] && before["applying"] == false && after["applying"] == false;
    samples.iter_mut().for_each(|s| s.is_between = is_between);
    (samples, took)
}

/// What git said, and which packs and derived files there are.
fn told(ran: &Ran, bare: &Path) -> String {
    let parts = ["objects/pack", "objects/info"].map(|part| walkdir::WalkDir::new(bare.join(part)).sort_by_file_name());
    let files = parts.into_iter().flatten().filter_map(Result::ok).filter(|e| e.file_type().is_file());
    let names: Vec<String> = files.map(|e| e.file_name().to_string_lossy().replace(|c: char| c.is_whitespace(), "?")).collect();
    let said: Vec<&str> = ran.err.lines().take(LINES_MAX).collect();
    format!("exit code {}: {}\n  beside loose objects: {}", ran.code, said.join("\n  "), names.join(" "))
}

impl Sample {
    /// Whether it was taken between changesets.
    pub(crate) fn is_between(&self) -> bool {
        self.is_between
    }
}

impl Tally {
    /// Judges what was seen.
    #[must_use]
    pub(crate) fn judge(samples: &[Sample], history: &History) -> (Tally, Vec<String>) {
        let mut wrong = Vec::new();
        for (no, s) in samples.iter().enumerate() {
            let state = if s.is_between { "between changesets" } else { "within a changeset" };
            let checked = if s.is_between {
                history.check_together(&s.repository, &s.references, s.acknowledged, s.frozen)
            } else {
                history.check_each(&s.repository, &s.references, s.acknowledged, s.frozen)
            };
            wrong.extend(checked.err().map(|e| format!("sample {no}, {state}: {e}")));
            wrong.extend(s.red.as_ref().map(|red| format!("sample {no}, {state}: {}: fsck: {red}", s.repository)));
        }
        let between = samples.iter().filter(|s| s.is_between).count();
        (Tally { samples: samples.len(), between, longest: Duration::ZERO }, wrong)
    }
}

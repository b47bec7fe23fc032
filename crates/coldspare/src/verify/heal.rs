//! Looks at a standby as closely as it was asked for, and puts right what differs as often as it takes.

use std::time::{Duration, Instant};

use coldspare_core::Problem;
use coldspare_scan::watch::now_ms;
use coldspare_standby::{Bookmark, Depth, Git, GitFindings, Progress, Verdict, Verification};

use crate::exit::Failure;
use crate::socket::Asked;
use crate::standby::Copy;
use crate::state::State;

/// What was found at one look.
pub(crate) struct Found {
    /// The tree against the manifest, with what git's look found among its problems.
    pub(crate) verification: Verification,
    /// What git's look counted, and which git it was.
    pub(crate) git: Option<(GitFindings, String)>,
}

/// What was found at the last look, and what came of the repair, if one was asked for.
pub(crate) struct Healed {
    pub(crate) found: Found,
    pub(crate) repair: Option<Repaired>,
}

/// What a repair did.
pub(crate) struct Repaired {
    /// What was found at first and is no more.
    pub(crate) repaired: Vec<Problem>,
    pub(crate) fetch: Fetch,
}

/// What became of the content that the active was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fetch {
    /// None was needed.
    Nothing,
    /// All came.
    Done,
    /// The active is there, and not all came.
    Late,
    /// The active isn't there.
    Unreachable,
}

/// The note of how far a verification is that can be broken off.
const NOTE: &str = "verify";
/// Between two notes.
const NOTE_EVERY: Duration = Duration::from_secs(1);
/// Rounds of repair: what came may be needed to put the rest right.
const ROUNDS: usize = 4;

impl Fetch {
    /// The word in JSON, for what the active did.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Fetch::Nothing => "not needed",
            Fetch::Done => "sent",
            Fetch::Late => "late",
            Fetch::Unreachable => "unreachable",
        }
    }
}

/// Verifies `copy` and, when that is asked for, repairs it; `fetch` waits until the content that the standby wants came.
/// `make_equal` has the manifest put right first, by which the tree is.
///
/// # Errors
/// `Usage` when git is to look and there is none; `Damage`.
pub(crate) fn heal(
    copy: &Copy,
    state: &State,
    asked: Asked,
    progress: &Progress,
    fetch: impl Fn(&Copy) -> Fetch,
    make_equal: impl FnOnce(),
) -> Result<Healed, Failure> {
    let mut fetched = Fetch::Nothing;
    if asked.repair {
        if copy.drop_damaged_rows().map_err(Failure::damage)? > 0 {
            fetched = fetch(copy);
        }
        make_equal();
    }
    let mut found = examine(copy, state, asked, progress)?;
    if !asked.repair || found.verification.verdict == Verdict::Empty {
        return Ok(Healed { found, repair: None });
    }
    let first = found.verification.problems.clone();
    for _ in 0..ROUNDS {
        if found.verification.problems.is_empty() {
            break;
        }
        if copy.is_distrusted().map_err(Failure::damage)? {
            fetched = fetch(copy);
            if fetched != Fetch::Done {
                break; // what the manifest doesn't know may be what it lost: it stays where it is
            }
            found = examine(copy, state, asked, progress)?;
        }
        let done = copy.repair(&found.verification.problems).map_err(Failure::damage)?;
        let wants = !copy.wanted().map_err(Failure::damage)?.is_empty();
        if wants {
            fetched = fetch(copy);
        }
        if !wants && done.healed == 0 {
            break; // the active has it like this too
        }
        found = examine(copy, state, asked, progress)?;
        if matches!(fetched, Fetch::Unreachable | Fetch::Late) && done.healed == 0 {
            break;
        }
    }
    let left = &found.verification.problems;
    let is_left = |p: &Problem| left.iter().any(|l| l.root == p.root && l.path == p.path);
    let repaired = first.into_iter().filter(|p| !is_left(p)).collect();
    Ok(Healed { found, repair: Some(Repaired { repaired, fetch: fetched }) })
}

/// One look. git comes first: should it ever write, the comparison after it names what it wrote (G6).
fn examine(copy: &Copy, state: &State, asked: Asked, progress: &Progress) -> Result<Found, Failure> {
    let git = match asked.git.then(Git::find) {
        None => None,
        Some(None) => {
            return Err(Failure::usage(
                "git isn't installed here, or not on the search path: install it, or leave out --git; nothing was verified",
            ));
        }
        Some(Some(git)) => Some((copy.verify_git(&git, progress).map_err(Failure::damage)?, git.version().to_string())),
    };
    let depth = if asked.deep { Depth::Deep } else { Depth::Quick };
    let mut verification =
        if asked.resume { go_on(copy, state, progress)? } else { copy.verify(depth, progress).map_err(Failure::damage)? };
    if let Some((git, _)) = &git {
        for problem in &git.problems {
            if !verification.problems.iter().any(|p| (p.root, &p.path, p.kind) == (problem.root, &problem.path, problem.kind)) {
                verification.problems.push(problem.clone());
            }
        }
        verification.problems.sort();
        if verification.verdict == Verdict::Consistent && !verification.problems.is_empty() {
            verification.verdict = Verdict::Differs;
        }
    }
    Ok(Found { verification, git })
}

/// Reads every byte behind the note of an earlier run, and notes how far it is.
fn go_on(copy: &Copy, state: &State, progress: &Progress) -> Result<Verification, Failure> {
    let noted = std::fs::read(state.note_path(NOTE)).ok().and_then(|bytes| Bookmark::from_bytes(&bytes));
    let (mut noted_at, mut failed) = (None::<Instant>, Ok(()));
    let verified = copy.verify_from(noted.unwrap_or_else(|| Bookmark::new(now_ms())), progress, |mark| {
        if failed.is_ok() && noted_at.is_none_or(|at| at.elapsed() > NOTE_EVERY) {
            noted_at = Some(Instant::now());
            failed = state.replace(NOTE, &mark.to_bytes());
        }
    });
    let verified = verified.map_err(Failure::damage)?;
    failed?;
    state.remove_note(NOTE)?;
    Ok(verified)
}

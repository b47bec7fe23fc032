//! What has to hold after a power cut.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use coldspare_os::RealDisk;
use coldspare_sim::Tree;
use coldspare_sim::blocklog::{CrashState, Cut};
use coldspare_sim::pair::{open_standby_at, standby_root};
use coldspare_standby::{Depth, Progress, Standby};

use crate::workload::{self, Recorded, Step};

/// Every so many states git looks too, and the standby goes on. Neither is a multiple of the number of cuts, which take
/// turns.
const GIT_EVERY: usize = 5;
const GO_ON_EVERY: usize = 2;

/// What came of a state.
pub(crate) enum Verdict {
    /// One sentence for each thing that is wrong; none when all is right.
    Looked(Vec<String>),
    /// The filesystem doesn't take it: a block of its own, such as btrfs's superblock, is torn inside, where no log has it
    /// whole. It relies on the disk there, and nothing above it can do better.
    Refused,
}

/// Mounts what the power cut left and looks at it.
pub(crate) fn judge(recorded: &Recorded, state: &CrashState, number: usize) -> Verdict {
    let mounted = match recorded.disk.mount() {
        Ok(mounted) => mounted,
        Err(_) if state.cut == Cut::Torn => return Verdict::Refused,
        Err(e) => return Verdict::Looked(vec![format!("it can't be mounted: {e}")]),
    };
    let mut found = Vec::new();
    let looked = catch_unwind(AssertUnwindSafe(|| look(recorded, state, number, &mut found)));
    if let Err(panic) = looked {
        let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|t| t.to_string()));
        found.push(format!("a panic: {}", text.unwrap_or_default()));
    }
    mounted.unmount().unwrap();
    Verdict::Looked(found)
}

fn look(recorded: &Recorded, state: &CrashState, number: usize, found: &mut Vec<String>) {
    let at = recorded.disk.mount_point();
    let with_git = number.is_multiple_of(GIT_EVERY);
    let acknowledged = state.acknowledged(&recorded.ops);
    look_at_control(at, acknowledged, found);
    if with_git {
        look_with_git(at, "before it is opened", found);
    }
    let Some((applied, standby)) = open(recorded, at, acknowledged, found) else { return };
    let expected = applied.map_or(&recorded.empty, |step| &recorded.steps[step].tree);
    compare(expected, at, "opened", found);
    let verified = standby.verify(Depth::Deep, &Progress::default()).unwrap();
    found.extend(verified.problems.iter().map(|p| format!("verify: {p:?}")));
    let work = look_at_work_folders(at, found);
    drop(standby);
    // Opened once more nothing changes.
    let Some((again, standby)) = open(recorded, at, acknowledged, found) else { return };
    if again != applied {
        found.push(format!("opened again it has step {again:?}, not {applied:?}"));
    }
    compare(expected, at, "opened again", found);
    let work_again = look_at_work_folders(at, found);
    if work_again != work {
        found.push(format!("opened again the work folders have {work_again:?}, not {work:?}"));
    }
    if with_git {
        look_with_git(at, "after it was opened", found);
    }
    if number.is_multiple_of(GO_ON_EVERY)
        && let Some(next) = recorded.steps.get(applied.map_or(0, |step| step + 1))
    {
        go_on(&standby, next, at, found);
    }
}

fn open(
    recorded: &Recorded,
    at: &Path,
    acknowledged: Option<usize>,
    found: &mut Vec<String>,
) -> Option<(Option<usize>, Standby<RealDisk>)> {
    let standby = match open_standby_at(at, RealDisk::staying()) {
        Ok(standby) => standby,
        Err(e) => {
            found.push(format!("the standby can't be opened: {e}"));
            return None;
        }
    };
    let seq = standby.applied().map(|applied| applied.seq);
    let step = seq.and_then(|seq| recorded.steps.iter().position(|step| step.sent.seq == seq));
    let next = acknowledged.map_or(0, |step| step + 1);
    if step != acknowledged && step != Some(next) {
        found.push(format!("it has step {step:?} ({seq:?}); {acknowledged:?} was acknowledged"));
    }
    Some((step, standby))
}

fn compare(expected: &Tree, at: &Path, when: &str, found: &mut Vec<String>) {
    let differences = expected.differences(&Tree::read(&standby_root(at)));
    found.extend(differences.into_iter().map(|difference| format!("{when}: {difference}")));
}

fn go_on(standby: &Standby<RealDisk>, next: &Step, at: &Path, found: &mut Vec<String>) {
    if let Err(e) = next.sent.send_to(standby) {
        return found.push(format!("the next changeset fails: {e}"));
    }
    compare(&next.tree, at, "with the next changeset", found);
    let left = look_at_work_folders(at, found);
    if !left.is_empty() {
        found.push(format!("after the next changeset there is left {left:?}"));
    }
}

/// What is in the folders that the standby works in; complains of names that they don't hold (`docs/formats.md`).
fn look_at_work_folders(at: &Path, found: &mut Vec<String>) -> Vec<String> {
    let control = standby_root(at).join(".coldspare");
    let names = |dir: &str| -> Vec<String> {
        let Ok(listed) = std::fs::read_dir(control.join(dir)) else { return Vec::new() };
        let mut names: Vec<_> = listed.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let is_hex = |text: &str, len| text.len() == len && text.bytes().all(|b| b.is_ascii_hexdigit());
    let is_staged = |name: &str, tail: Option<usize>| {
        let fields: Vec<_> = name.split('-').collect();
        let numbers = fields.len() >= 2 && is_number(fields[0]) && is_number(fields[1]);
        numbers && tail.map_or(fields.len() == 2, |len| fields.len() == 3 && is_hex(fields[2], len))
    };
    let mut all = Vec::new();
    for name in names("stage/f") {
        if !is_staged(&name, None) {
            found.push(format!("stage/f has {name}"));
        }
        all.push(format!("stage/f/{name}"));
    }
    for name in names("stage/t") {
        if !is_staged(&name, Some(24)) {
            found.push(format!("stage/t has {name}"));
        }
        all.push(format!("stage/t/{name}"));
    }
    for name in names("trash") {
        if !is_hex(&name, 32) {
            found.push(format!("trash has {name}"));
        }
        all.push(format!("trash/{name}"));
    }
    let is_left = |name: &str| name.strip_prefix("old-").is_some_and(|rest| is_hex(rest, 32));
    for name in names("history").iter().filter(|name| !is_number(name) && !is_left(name)) {
        found.push(format!("history has {name}"));
    }
    let is_ours = |name: &String| ["stage", "trash", "history"].contains(&name.as_str());
    let beside: Vec<_> = names("").into_iter().filter(|name| !is_ours(name)).collect();
    if !beside.is_empty() {
        found.push(format!("nobody but the standby writes here, and yet there is {beside:?}"));
    }
    all
}

fn look_with_git(at: &Path, when: &str, found: &mut Vec<String>) {
    for repository in workload::REPOSITORIES {
        let path = standby_root(at).join(repository);
        if path.join("HEAD").exists()
            && let Err(said) = workload::git(&path, &["fsck", "--full", "--no-progress"])
        {
            found.push(format!("{when}: git fsck of {repository}: {said}"));
        }
    }
}

/// What was acknowledged was promised before, and a promise is durable before it is given.
fn look_at_control(at: &Path, acknowledged: Option<usize>, found: &mut Vec<String>) {
    let promised = workload::promised(&workload::control_path(at));
    if let Some(step) = acknowledged
        && promised.is_none_or(|promised| promised < step as u64)
    {
        found.push(format!("the control record promises {promised:?}; step {step} was acknowledged"));
    }
}

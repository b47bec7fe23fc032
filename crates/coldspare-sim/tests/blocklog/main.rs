//! Power cuts of the standby on real filesystems: after each, opening it gives the tree of an acknowledged changeset,
//! or of the one that was about to be.
//!
//! `COLDSPARE_BLOCKLOG_STATES=10000` tries so many states a filesystem, `COLDSPARE_BLOCKLOG=ext4` those of one filesystem,
//! `COLDSPARE_BLOCKLOG=ext4:torn:7:1234` one state. What the kernel writes, and when, is decided by no seed: the same
//! operation of another run may be another write. So the image of a bad state is kept.

#![allow(clippy::unwrap_used)] // also in what several tests share

mod oracle;
mod workload;

use std::path::PathBuf;
use std::time::Instant;

use coldspare_sim::blocklog::{CrashState, Filesystem, Op, Replay};

use crate::oracle::Verdict;
use crate::workload::Recorded;

const STATES: usize = 306;
/// LIMIT: one state in so many may be one that the filesystem itself refuses.
const REFUSED_ONE_IN: usize = 50;
/// LIMIT: violations that are printed in full, and whose images are kept.
const SHOWN: usize = 10;

#[test]
fn a_power_cut_leaves_an_acknowledged_tree() {
    let all = [Filesystem::Ext4, Filesystem::Xfs, Filesystem::Btrfs];
    let (name, state) = asked_for();
    // Mounting is mostly waiting: they go side by side.
    let bad: usize = std::thread::scope(|scope| {
        let is_asked = |filesystem: &Filesystem| name.as_ref().is_none_or(|name| name == filesystem.name());
        let asked = all.into_iter().filter(is_asked);
        let running: Vec<_> = asked.map(|filesystem| scope.spawn(move || bad_states(filesystem, state))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(bad, 0, "states with violations; see above");
}

/// What `COLDSPARE_BLOCKLOG` names: a filesystem, or one state of it.
fn asked_for() -> (Option<String>, Option<CrashState>) {
    let Ok(text) = std::env::var("COLDSPARE_BLOCKLOG") else { return (None, None) };
    match CrashState::parse(&text) {
        Some((name, state)) => (Some(name), Some(state)),
        None => (Some(text), None),
    }
}

/// Records the workload on a filesystem, tries states of it, and tells how many were bad.
fn bad_states(filesystem: Filesystem, only: Option<CrashState>) -> usize {
    let name = filesystem.name();
    if let Some(missing) = filesystem.missing() {
        eprintln!("{name}: skipped: {missing}");
        return 0;
    }
    let begun = Instant::now();
    let recorded = workload::record(filesystem);
    let flushes = recorded.ops.iter().filter(|op| **op == Op::Flush).count();
    let bytes: usize = recorded.ops.iter().map(|op| if let Op::Write { bytes, .. } = op { bytes.len() } else { 0 }).sum();
    let (ops, steps) = (recorded.ops.len(), recorded.steps.len());
    eprintln!("{name}: {steps} changesets, {ops} operations, {flushes} flushes, {} KiB in {:.1?}", bytes >> 10, begun.elapsed());
    let count = std::env::var("COLDSPARE_BLOCKLOG_STATES").map_or(STATES, |text| text.parse().unwrap());
    let states = match only {
        Some(state) => vec![CrashState { op: state.op.min(ops), ..state }],
        None => CrashState::spread(&recorded.ops, count, 1),
    };
    try_all(&recorded, &states)
}

/// Tries the states and tells how many were bad.
fn try_all(recorded: &Recorded, states: &[CrashState]) -> usize {
    let filesystem = recorded.disk.filesystem;
    let mut replay = Replay::new(&recorded.disk.device, &recorded.ops);
    let begun = Instant::now();
    let (mut bad, mut refused) = (0, 0);
    for (n, state) in states.iter().enumerate() {
        replay.make(state);
        let found = match oracle::judge(recorded, state, n) {
            Verdict::Looked(found) if found.is_empty() => continue,
            Verdict::Looked(found) => found,
            Verdict::Refused => {
                refused += 1;
                continue;
            }
        };
        bad += 1;
        if bad <= SHOWN {
            let image = image_path(&state.on(filesystem));
            replay.make(state);
            recorded.disk.device.save(&image).unwrap();
            let after = state.acknowledged(&recorded.ops);
            eprintln!("COLDSPARE_BLOCKLOG={}: state {} of {}, after step {after:?}", state.on(filesystem), n + 1, states.len());
            eprintln!("    its image: {}", image.display());
            found.iter().take(SHOWN).for_each(|violation| eprintln!("    {violation}"));
        }
    }
    let rate = states.len() as f64 / begun.elapsed().as_secs_f64();
    let (name, count) = (filesystem.name(), states.len());
    eprintln!("{name}: {count} states, {bad} violations, {refused} refused by the filesystem, {rate:.0}/s");
    assert!(refused <= 1 + count / REFUSED_ONE_IN, "{name} refuses too many states");
    bad
}

fn image_path(state: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("blocklog");
    std::fs::create_dir_all(&dir).unwrap();
    dir.join(state.replace(':', "-"))
}

//! Power cuts of the standby on real filesystems: after each, opening it gives the tree of an acknowledged changeset,
//! or of the one that was about to be.
//!
//! `COLDSPARE_BLOCKLOG_STATES=10000` tries so many states a filesystem; `COLDSPARE_BLOCKLOG=ext4:torn:7:1234` that one.

#![allow(clippy::unwrap_used)] // also in what several tests share

mod oracle;
mod workload;

use std::path::PathBuf;
use std::time::Instant;

use coldspare_sim::blocklog::{CrashState, Filesystem, Op, Replay};

use crate::workload::Recorded;

const STATES: usize = 330;
/// LIMIT: violations that are printed in full, and whose images are kept.
const SHOWN: usize = 10;

#[test]
fn a_power_cut_on_ext4_leaves_an_acknowledged_tree() {
    check(Filesystem::Ext4);
}

#[test]
fn a_power_cut_on_xfs_leaves_an_acknowledged_tree() {
    check(Filesystem::Xfs);
}

#[test]
fn a_power_cut_on_btrfs_leaves_an_acknowledged_tree() {
    check(Filesystem::Btrfs);
}

fn check(filesystem: Filesystem) {
    let name = filesystem.name();
    if let Some(missing) = filesystem.missing() {
        return eprintln!("{name}: skipped: {missing}");
    }
    let only = std::env::var("COLDSPARE_BLOCKLOG").ok().map(|text| CrashState::parse(&text).expect("filesystem:cut:seed:operation"));
    if only.as_ref().is_some_and(|(other, _)| other != name) {
        return eprintln!("{name}: skipped: another one is asked for");
    }
    let begun = Instant::now();
    let recorded = workload::record(filesystem);
    let flushes = recorded.ops.iter().filter(|op| **op == Op::Flush).count();
    let bytes: usize = recorded.ops.iter().map(|op| if let Op::Write { bytes, .. } = op { bytes.len() } else { 0 }).sum();
    let (ops, steps) = (recorded.ops.len(), recorded.steps.len());
    eprintln!("{name}: {steps} changesets, {ops} operations, {flushes} flushes, {} KiB in {:.1?}", bytes >> 10, begun.elapsed());
    let count = std::env::var("COLDSPARE_BLOCKLOG_STATES").map_or(STATES, |text| text.parse().unwrap());
    let states = match only {
        Some((_, state)) => vec![CrashState { op: state.op.min(ops), ..state }],
        None => CrashState::spread(&recorded.ops, count, 1),
    };
    let violations = try_all(&recorded, &states);
    assert_eq!(violations, 0, "{name}: states with violations; see above");
}

/// Tries the states and tells how many were bad.
fn try_all(recorded: &Recorded, states: &[CrashState]) -> usize {
    let name = recorded.disk.filesystem.name();
    let mut replay = Replay::new(&recorded.disk.device, &recorded.ops);
    let begun = Instant::now();
    let mut bad = 0;
    for (n, state) in states.iter().enumerate() {
        replay.make(state);
        let found = oracle::violations(recorded, state, n);
        if found.is_empty() {
            continue;
        }
        bad += 1;
        if bad <= SHOWN {
            let image = image_path(&state.on(recorded.disk.filesystem));
            replay.make(state);
            recorded.disk.device.save(&image).unwrap();
            let (state, after) = (state.on(recorded.disk.filesystem), state.acknowledged(&recorded.ops));
            eprintln!("COLDSPARE_BLOCKLOG={state}: the {}. state, after step {after:?}; its image: {}", n + 1, image.display());
            found.iter().take(SHOWN).for_each(|violation| eprintln!("    {violation}"));
        }
    }
    let rate = states.len() as f64 / begun.elapsed().as_secs_f64();
    eprintln!("{name}: {} states, {bad} violations, {rate:.0}/s", states.len());
    bad
}

fn image_path(state: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("blocklog");
    std::fs::create_dir_all(&dir).unwrap();
    dir.join(state.replace(':', "-"))
}

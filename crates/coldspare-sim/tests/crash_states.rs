//! The standby on the model of a disk: whatever a crash leaves, it recovers to one committed changeset.
//!
//! `COLDSPARE_CRASH_STATES=all` looks at more states. A violation names its state: `COLDSPARE_CRASH_STATE='small 17:J:0:+-+'`
//! examines that one.

mod workloads;

use std::time::Instant;

use coldspare_sim::model::{Defect, Explored, Kind, Limits, Rehearsal, explore, replay};
use workloads::{WORKLOADS, Workload, push, resume, seed};

fn look(limits: Limits, (name, workload): Workload) -> Explored {
    let start = Instant::now();
    let found = explore(limits, None, workload);
    let Explored { points, states, recovered, violations, .. } = &found;
    println!("{name}: {points} points, {states} crash states ({recovered} recovered), {:.1} s", start.elapsed().as_secs_f64());
    for v in violations {
        println!("  COLDSPARE_CRASH_STATE='{name} {}': {}", v.key, v.detail);
    }
    found
}

#[test]
fn every_crash_state_recovers_to_one_changeset() {
    if let Ok(key) = std::env::var("COLDSPARE_CRASH_STATE") {
        let (name, key) = key.rsplit_once(' ').expect("a workload and a key");
        let (_, workload) = WORKLOADS.iter().find(|(n, _)| *n == name).expect("a workload");
        replay(key, workload).expect("a state that keeps the promises");
        return;
    }
    let is_all = std::env::var("COLDSPARE_CRASH_STATES").is_ok_and(|v| v == "all");
    let mut found = Explored::default();
    for workload in WORKLOADS {
        // A state of the large one costs as much as ten of the others.
        let states_max = match (is_all, workload.0) {
            (false, "many") => 60,
            (false, _) => 800,
            (true, "many") => 200,
            (true, _) => 4000,
        };
        found.add(look(Limits { states_max, stops_at_first: false }, workload));
    }
    println!("{} crash states ({} recovered), {} violations", found.states, found.recovered, found.violations.len());
    assert!(found.violations.is_empty());
}

#[test]
fn a_folder_that_takes_the_place_of_a_file_has_its_own_time() {
    let limits = Limits { states_max: 200, stops_at_first: true };
    let found = explore(limits, None, |r| {
        seed(r);
        r.disk().settle();
        r.changeset(Kind::Delta, |c| {
            c.dir("config");
            c.file("config/inner", b"1");
        });
    });
    let first = found.violations.first().map(|v| format!("{}: {}", v.key, v.detail));
    assert_eq!(first, None);
}

#[track_caller]
fn check_noticed(name: &str, defect: Defect, workload: fn(&mut Rehearsal)) {
    let found = explore(Limits { states_max: 100, stops_at_first: true }, Some(defect), workload);
    let first = found.violations.first().unwrap_or_else(|| panic!("{name}: {} states and nothing wrong", found.states));
    println!("{name}: noticed after {} states: {}", found.first_after.unwrap_or_default(), first.detail);
}

#[test]
fn a_forgotten_sync_is_noticed() {
    check_noticed("files", Defect::Syncs(|s| s.name == "sync_file"), push);
    check_noticed("folders", Defect::Syncs(|s| s.name == "sync_dir"), push);
    check_noticed("the filesystem", Defect::Syncs(|s| s.name == "sync_fs"), resume);
    check_noticed("the store", Defect::StoreSyncs, push);
}

//! The standby on the model of a disk: whatever a crash leaves, it recovers to one committed changeset.
//!
//! `COLDSPARE_CRASH_STATES=all` looks at more states. A violation names its state: `COLDSPARE_CRASH_STATE='small 17:J:0:+-+'`
//! examines that one.

use std::time::Instant;

use coldspare_sim::model::{Defect, Explored, Kind, Limits, Part, Rehearsal, explore, replay};

type Workload = (&'static str, fn(&mut Rehearsal));

const WORKLOADS: [Workload; 13] = [
    ("seed", seed),
    ("push", push),
    ("new folders", new_folders),
    ("replace and delete", replace_and_delete),
    ("file and folder change places", file_and_folder),
    ("hard links", hard_links),
    ("attributes", attributes),
    ("many", many),
    ("segments", segments),
    ("resume", resume),
    ("unnamed", unnamed),
    ("recovery", recovery),
    ("one after another", one_after_another),
];

/// A small home with a repository.
fn seed(r: &mut Rehearsal) {
    r.changeset(Kind::Full, |c| {
        c.dir("repo");
        c.file("repo/HEAD", b"ref: refs/heads/main\n");
        c.dir("repo/objects");
        c.dir("repo/objects/ab");
        c.file("repo/objects/ab/cdef", b"an object");
        c.dir("repo/refs");
        c.dir("repo/refs/heads");
        c.file("repo/refs/heads/main", b"0123\n");
        c.file("config", b"a = 1\n");
        c.symlink("current", "repo");
    });
}

fn push(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    for n in 0..2 {
        r.changeset(Kind::Delta, |c| {
            c.file(&format!("repo/objects/ab/new{n}"), format!("object {n}").as_bytes());
            c.file("repo/refs/heads/main", format!("{n}\n").as_bytes());
        });
    }
}

/// Once with each folder and file synced by itself, once with a symlink, for which the filesystem is.
fn new_folders(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        c.dir("other");
        c.dir("other/objects");
        c.file("other/objects/x", b"x");
        c.dir("other/empty");
        c.dir("repo/objects/cd");
        c.file("repo/refs/heads/main", b"4567\n");
    });
    r.changeset(Kind::Delta, |c| {
        c.dir("third");
        c.symlink("third/link", "objects/x");
        c.file("third/f", b"in a new folder");
    });
}

fn replace_and_delete(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        c.file("config", b"a = 2\n");
        c.delete("repo/objects");
        c.delete("current");
        c.file("HEAD", b"new\n");
    });
    r.changeset(Kind::Delta, |c| {
        c.delete("repo");
        c.file("config", b"a = 3\n");
    });
}

fn file_and_folder(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        c.file("repo", b"a file now");
        c.dir("config");
        c.file("config/inner", b"1");
    });
    r.changeset(Kind::Delta, |c| {
        c.dir("repo");
        c.file("repo/HEAD", b"again\n");
        c.symlink("config", "repo/HEAD");
    });
}

fn hard_links(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        c.hardlink("linked", "config");
        c.file("one", b"one");
        c.hardlink("two", "one");
        c.dir("folder");
        c.hardlink("folder/three", "one");
    });
    r.changeset(Kind::Delta, |c| {
        c.file("one", b"other");
        c.hardlink("two", "one");
        c.hardlink("folder/three", "one");
        c.delete("linked");
    });
    r.changeset(Kind::Delta, |c| c.hardlink("only", "config"));
}

fn attributes(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        c.attributes("config", 0o600);
        c.attributes("repo/refs/heads", 0o700);
        c.attributes("repo/HEAD", 0o444);
    });
}

/// More than is synced one by one, staged and applied.
fn many(r: &mut Rehearsal) {
    r.changeset(Kind::Full, |c| {
        for n in 0..70 {
            c.dir(&format!("d{n}"));
        }
        c.file("first", b"1");
    });
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        for n in 0..69 {
            c.file(&format!("d{n}/f"), format!("{n}").as_bytes());
        }
        c.file("first", b"2");
        c.delete("d69");
    });
}

fn segments(r: &mut Rehearsal) {
    let old: Vec<u8> = (0..20_000u32).map(|n| (n % 251) as u8).collect();
    r.changeset(Kind::Full, |c| {
        c.file("pack", &old);
        c.sparse("holes", &[&[1; 10][..], &[0; 9000], &[2; 10]].concat());
    });
    r.disk().settle();
    r.changeset(Kind::Delta, |c| {
        c.segments("pack", &[Part::Copy { from: 4096, len: 8000 }, Part::Bytes(b"new bytes"), Part::Zeros { len: 5000 }]);
        c.segments("fresh", &[Part::Bytes(&[7; 5000]), Part::Bytes(&[8; 100])]);
    });
}

/// An interrupted changeset leaves content; the next one takes it.
fn resume(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    let make = |c: &mut coldspare_sim::model::Draft| {
        c.asked("a", b"content of a");
        c.asked("b", b"content of b");
        c.asked("again", b"content of a");
        c.dir("deep");
        c.asked("deep/c", b"content of c");
        c.asked("config", b"a = 1\n");
        c.file("last", b"last");
    };
    r.cut_off(Kind::Delta, 6, make);
    r.restart();
    r.cut_off(Kind::Delta, 3, make);
    r.changeset(Kind::Delta, make);
}

fn unnamed(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    r.changeset(Kind::Full, |c| {
        c.keep("repo/refs");
        c.dir("repo");
        c.asked("repo/HEAD", b"ref: refs/heads/main\n");
        c.file("config", b"a = 9\n");
    });
    r.changeset(Kind::Full, |c| c.asked("config", b"a = 9\n"));
}

/// The power goes a second time while a changeset that was committed before is applied.
fn recovery(r: &mut Rehearsal) {
    seed(r);
    r.disk().settle();
    let make = |c: &mut coldspare_sim::model::Draft| {
        c.file("config", b"a = 2\n");
        c.delete("repo/objects");
        c.dir("new");
        c.file("new/f", b"f");
        c.hardlink("new/g", "new/f");
        c.attributes("repo/HEAD", 0o400);
    };
    for back in [1, 4, 8, 12] {
        r.changeset(Kind::Delta, make);
        r.recover_from(back);
        r.changeset(Kind::Full, |c| {
            c.dir("repo");
            c.asked("repo/HEAD", b"ref: refs/heads/main\n");
            c.dir("repo/objects");
            c.file("repo/objects/x", b"x");
            c.asked("config", b"a = 1\n");
        });
        r.disk().settle();
    }
}

/// Without anybody else who syncs in between.
fn one_after_another(r: &mut Rehearsal) {
    seed(r);
    for n in 0..3 {
        r.changeset(Kind::Delta, |c| {
            c.file("repo/refs/heads/main", format!("{n}\n").as_bytes());
            c.dir(&format!("repo/objects/{n}"));
            c.file(&format!("repo/objects/{n}/o"), b"object");
            c.symlink("current", &format!("repo{n}"));
            if n > 0 {
                c.delete(&format!("repo/objects/{}", n - 1));
            }
        });
    }
}

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

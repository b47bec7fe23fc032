//! Points: the standby goes back to one exactly, is not carried forward unasked, and keeps no more than it may.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::git::{self, commit, git_ok, push};
use crate::image::Mount;
use crate::pair::{Pair, run, until};
use crate::seed::{Seed, number_from_env};

const REPOSITORY: &str = "shared/data/repositories/1";
/// Unless `COLDSPARE_POINTS` says more.
const POINTS: u64 = 30;

/// A pair whose home has a repository with one branch, the clone to push from, and some plain files.
fn pair_with_repository(history: &str) -> (Pair, PathBuf) {
    let mut pair = Pair::new();
    pair.standby.configure(history);
    pair.standby.start();
    pair.active.start();
    let clone = with_repository(&pair);
    (pair, clone)
}

fn with_repository(pair: &Pair) -> PathBuf {
    let (bare, clone) = (pair.active.home.join(REPOSITORY), pair.dir.path().join("clone"));
    git::init_bare(&bare);
    git::clone(&bare, &clone);
    commit(&clone, "file", "first");
    push(&clone, &["HEAD:main"]);
    for number in 0..50 {
        pair.active.write(&format!("shared/data/attachments/{}/{number}", number % 5), format!("attachment {number}"));
    }
    pair.checkpoint();
    clone
}

/// A copy of the standby's home as it is, with all that is to be had again.
fn snapshot(pair: &Pair, name: &str) -> PathBuf {
    let to = pair.dir.path().join("snapshots").join(name);
    fs::create_dir_all(&to).unwrap();
    run(Command::new("rsync").args(["-aHAX", "--exclude=/.coldspare"]).arg(slash(&pair.standby.home)).arg(slash(&to))).expect_code(0);
    to
}

fn slash(path: &Path) -> String {
    format!("{}/", path.display())
}

#[track_caller]
fn assert_is(pair: &Pair, snapshot: &Path, when: &str) {
    let args = ["-aHAXnc", "--delete", "--itemize-changes", "--exclude=/.coldspare"];
    let differences = run(Command::new("rsync").args(args).arg(slash(snapshot)).arg(slash(&pair.standby.home))).expect_code(0).out;
    assert_eq!(differences, "", "{when}");
    git::assert_clean(&pair.standby.home.join(REPOSITORY));
}

fn points(pair: &Pair) -> Vec<Value> {
    pair.standby.run(&["points", "--json"]).expect_code(0).json()["points"].as_array().unwrap().clone()
}

fn last_point(pair: &Pair) -> u64 {
    points(pair).last().unwrap()["point"].as_u64().unwrap()
}

/// One of the things that happen to a home, all of them in turn.
fn change(pair: &Pair, clone: &Path, round: u64) {
    let bare = pair.active.home.join(REPOSITORY);
    commit(clone, &format!("file{}", round % 4), &format!("round {round}"));
    push(clone, &["HEAD:main", &format!("+HEAD:refs/heads/b{}", round % 3)]);
    let at = |name: &str| pair.active.home.join("shared/data").join(name);
    let folder = if at("attachments").exists() { "attachments" } else { "uploads" };
    pair.active.write(&format!("shared/data/{folder}/{}/{}", round % 5, round % 50), format!("changed in {round}"));
    match round % 6 {
        1 => drop(git_ok(&bare, &["repack", "-q", "-adb"])),
        2 | 3 => fs::rename(at(folder), at(if folder == "uploads" { "attachments" } else { "uploads" })).unwrap(),
        4 => fs::remove_dir_all(at(folder).join((round % 5).to_string())).unwrap(),
        5 => drop(git_ok(&bare, &["pack-refs", "--all"])),
        _ => {}
    }
}

#[test]
fn the_standby_goes_back_to_any_point_exactly_and_follows_again_when_told() {
    let (mut pair, clone) = pair_with_repository("[brakes]\nenabled = false\n[database]\nposition = [\"/bin/echo\", \"log 0/16B3748\"]\n");
    until("the point says where the database stands", || points(&pair).last().unwrap()["position"] == "log 0/16B3748");
    let mut recorded: BTreeMap<u64, PathBuf> = BTreeMap::new();
    for round in 0..number_from_env("COLDSPARE_POINTS").unwrap_or(POINTS) {
        change(&pair, &clone, round);
        pair.checkpoint();
        let no = last_point(&pair);
        recorded.insert(no, snapshot(&pair, &no.to_string()));
    }
    let (mut seed, mut at) = (Seed::from_env(), None);
    for turn in 0..number_from_env("COLDSPARE_REWINDS").unwrap_or(5) {
        let (no, tree) = recorded.iter().nth(seed.below(recorded.len() as u64) as usize).unwrap();
        if turn == 2 {
            // Killed anywhere on its way.
            let mut rewind =
                pair.standby.program().args(["rewind", "--to", &no.to_string(), "--config"]).arg(pair.standby.config()).spawn().unwrap();
            until("it begins", || {
                pair.standby.log().contains(&format!("back to a point point={no}")) || rewind.try_wait().unwrap().is_some()
            });
            pair.standby.kill();
            rewind.wait().unwrap();
            pair.standby.start();
            if pair.standby.status()["rewound"] != *no {
                // It had not begun: all is as it was before.
                let (before, tree): &(u64, PathBuf) = at.as_ref().unwrap();
                assert_eq!(pair.standby.status()["rewound"], *before);
                assert_is(&pair, tree, "not gone back");
                continue;
            }
        } else {
            let done = pair.standby.run(&["rewind", "--to", &no.to_string(), "--json"]).expect_code(0).json();
            assert_eq!(done["point"], *no);
        }
        assert_is(&pair, tree, &format!("back at {no}"));
        at = Some((*no, tree.clone()));
    }

    // It is not carried forward: the active waits, and says for what.
    let (first, tree) = recorded.first_key_value().unwrap();
    pair.standby.run(&["rewind", "--to", &first.to_string()]).expect_code(0);
    pair.active.write("shared/data/later", "later");
    pair.active.run(&["checkpoint", "--timeout", "3s"]).expect_code(3);
    until("the active knows", || {
        pair.active.status()["waiting_for_decision"]["reason"].as_str().is_some_and(|r| r.contains("coldspare resume"))
    });
    let status = pair.standby.status();
    let listed = points(&pair).into_iter().find(|point| point["point"] == *first).unwrap();
    assert_eq!((&status["rewound"], &status["as_of_ms"]), (&(*first).into(), &listed["as_of_ms"]), "{status}");
    pair.standby.kill();
    pair.standby.start();
    assert_is(&pair, tree, "after a restart");

    // Forward again by itself, or by the active.
    pair.standby.run(&["rewind", "--to", "latest"]).expect_code(0);
    assert!(pair.standby.status()["rewound"].is_null());
    pair.checkpoint();
    pair.assert_equal();
    pair.standby.run(&["resume"]).expect(1, "nothing to resume");
    pair.standby.run(&["rewind", "--to", &first.to_string()]).expect_code(0);
    pair.standby.run(&["resume"]).expect_code(0);
    pair.checkpoint();
    pair.assert_equal();
    assert!(pair.active.status()["waiting_for_decision"].is_null());
    // What came meanwhile is no reason to lose the points before.
    let (no, tree) = recorded.last_key_value().unwrap();
    pair.standby.run(&["rewind", "--to", &no.to_string()]).expect_code(0);
    assert_is(&pair, tree, "the last one, again");
    pair.standby.run(&["rewind", "--to", "123456"]).expect(1, "no point 123456");
    pair.standby.run(&["rewind", "--to", "yesterday"]).expect(2, "is no point");
}

#[test]
fn what_others_wrote_never_comes_back_with_a_point() {
    let (pair, _) = pair_with_repository("[history]\nage_minutes = 1440\n");
    let path = "shared/data/attachments/1/1";
    let there = pair.standby.home.join(path);
    pair.active.write(path, "good");
    pair.checkpoint();
    let (point, before) = (last_point(&pair), snapshot(&pair, "good"));
    // In the tree: put right, and the point has the good one still.
    fs::write(&there, "evil").unwrap();
    until("it is put right", || fs::read_to_string(&there).is_ok_and(|content| content == "good"));
    pair.active.write("shared/data/later", "later");
    pair.checkpoint();
    let point = point.to_string();
    pair.standby.run(&["rewind", "--to", &point]).expect_code(0);
    assert_is(&pair, &before, "after a write that was put right");
    pair.standby.run(&["rewind", "--to", "latest"]).expect_code(0);
    // In the history: nothing has the good one any more, which is said.
    pair.active.write(path, "better");
    pair.checkpoint();
    let after = snapshot(&pair, "better");
    let history = walkdir::WalkDir::new(pair.standby.home.join(".coldspare/history")).into_iter().filter_map(Result::ok);
    let kept: Vec<PathBuf> =
        history.map(walkdir::DirEntry::into_path).filter(|p| fs::read(p).is_ok_and(|content| content == b"good")).collect();
    assert!(!kept.is_empty());
    kept.iter().for_each(|path| fs::write(path, "evil").unwrap());
    let ran = pair.standby.run(&["rewind", "--to", &point]);
    assert!(ran.code != 0 && ran.err.contains(path), "{ran:#?}");
    assert_is(&pair, &after, "after a point that could not be had");
    let copy = pair.dir.path().join("copy");
    let ran = pair.standby.run(&["export", "--point", &point, &copy.to_string_lossy()]);
    assert!(ran.code != 0 && ran.err.contains(path), "{ran:#?}");
    pair.checkpoint();
    pair.assert_equal();
}

/// Bytes below a folder, each inode once.
fn used(dir: &Path) -> u64 {
    let mut inodes = BTreeMap::new();
    for entry in walkdir::WalkDir::new(dir).into_iter().flatten() {
        if let Ok(meta) = entry.metadata() {
            inodes.insert(meta.ino(), meta.blocks() * 512);
        }
    }
    inodes.values().sum()
}

#[test]
fn the_history_stays_within_its_space_and_the_oldest_points_go_first() {
    const SPACE: u64 = 2 << 20;
    let (pair, _) = pair_with_repository(&format!("[history]\nspace_bytes = {SPACE}\nfree_bytes = 0\n"));
    let mut seed = Seed::from_env();
    let first = points(&pair)[0]["point"].as_u64().unwrap();
    for _ in 0..20 {
        pair.active.write("shared/data/blob", seed.noise(400_000));
        pair.checkpoint();
    }
    let kept = pair.standby.home.join(".coldspare/history");
    let said = || pair.standby.status()["history"]["bytes"].as_u64();
    until("it is within its space, and says so", || used(&kept) <= SPACE && said().is_some_and(|bytes| bytes <= SPACE));
    let left = points(&pair);
    assert!(left.len() >= 4 && left[0]["point"].as_u64().unwrap() > first, "{left:#?}");
    let oldest = left[0]["point"].to_string();
    pair.standby.run(&["rewind", "--to", &first.to_string()]).expect(1, "no point");
    pair.standby.run(&["rewind", "--to", &oldest]).expect_code(0);
    pair.standby.run(&["verify", "--deep"]).expect_code(0);
}

/// Exports while pushes go on, and writes into the copy.
fn drill(pair: &Pair, clone: &Path, expected: fn(&Value) -> bool) {
    change(pair, clone, 1);
    pair.checkpoint();
    let (no, tree) = (last_point(pair), snapshot(pair, "before"));
    let (then, now) = (pair.dir.path().join("standby/then"), pair.dir.path().join("standby/now"));
    // Where the home is, so that blocks can be shared.
    let beside = |dir: &Path| pair.standby.home.parent().unwrap().join(dir.file_name().unwrap());
    let (then, now) = (beside(&then), beside(&now));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut round = 100;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) || round < 106 {
                change(pair, clone, round);
                round += 1;
            }
        });
        let exported = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            until("there is more to go back over", || points(pair).len() as u64 > no + 2);
            let export = |point: &str, dir: &Path| pair.standby.run(&["export", "--point", point, "--json", &dir.to_string_lossy()]);
            let done = export(&no.to_string(), &then).expect_code(0).json();
            assert!(done["files"].as_u64().unwrap() > 50 && expected(&done), "{done}");
            export("latest", &now).expect_code(0);
            export("latest", &now).expect(2, "is not empty");
            export("latest", &pair.standby.home.join("copy")).expect(2, "is in the root");
        }));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        writer.join().unwrap();
        exported.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    let args = ["-aHAXnc", "--delete", "--itemize-changes"];
    let differences = run(Command::new("rsync").args(args).arg(slash(&tree)).arg(slash(&then.join("home")))).expect_code(0).out;
    assert_eq!(differences, "");
    for copy in [&then, &now] {
        let repository = copy.join("home").join(REPOSITORY);
        git::assert_clean(&repository);
        let other = copy.join("clone");
        git::clone(&repository, &other);
        commit(&other, "drill", "a drill");
        push(&other, &["HEAD:main"]);
        git_ok(&repository, &["gc", "-q", "--prune=now"]);
        fs::write(copy.join("home/shared/data/attachments-of-the-drill"), "drill").unwrap();
        git::assert_clean(&repository);
    }
    pair.checkpoint();
    pair.assert_equal();
    pair.standby.run(&["verify", "--deep", "--git"]).expect_code(0);
}

#[test]
fn a_copy_for_a_drill_is_the_point_and_writing_into_it_harms_nobody() {
    // Folders are renamed and go, by chance.
    let (pair, clone) = pair_with_repository("[brakes]\nenabled = false\n");
    drill(&pair, &clone, |done| done["cloned"] != 0 || done["linked"] != 0 && done["copied"] != 0);
}

#[test]
fn a_copy_for_a_drill_shares_blocks_where_the_filesystem_can() {
    let mut pair = Pair::new();
    let at = pair.dir.path().join("disk");
    let image = pair.dir.path().join("disk.image");
    fs::create_dir(&at).unwrap();
    let Some(_mount) = Mount::xfs(&image, 512 << 20, &at) else { return };
    for (name, here) in [("home", pair.standby.home.clone()), ("store", pair.standby.store.clone())] {
        let there = at.join(name);
        run(Command::new("cp").arg("-a").arg(&here).arg(&there)).expect_code(0);
        let config = fs::read_to_string(pair.standby.config()).unwrap();
        fs::write(pair.standby.config(), config.replace(&here.display().to_string(), &there.display().to_string())).unwrap();
    }
    (pair.standby.home, pair.standby.store) = (at.join("home"), at.join("store"));
    pair.standby.configure("[history]\nfree_bytes = 0\n[brakes]\nenabled = false\n");
    pair.standby.start();
    pair.active.start();
    let clone = with_repository(&pair);
    drill(&pair, &clone, |done| done["linked"] == 0 && done["copied"] == 0 && done["cloned"] != 0);
    pair.standby.kill();
}

#[test]
fn a_database_that_does_not_answer_at_once_is_asked_again() {
    let mut pair = Pair::new();
    let asked = pair.dir.path().join("asked").display().to_string();
    let command = format!("test -e {asked} || {{ touch {asked}; exit 1; }}; echo log 7");
    pair.standby.configure(&format!("[database]\nposition = [\"/bin/sh\", \"-c\", {command:?}]\n"));
    pair.active.write("shared/file", "content");
    pair.standby.start();
    pair.active.start();
    pair.checkpoint();
    until("the point says where the database stands", || points(&pair).last().unwrap()["position"] == "log 7");
}

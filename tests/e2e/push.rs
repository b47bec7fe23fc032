//! Real git on the active, git's own check on the standby.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::pair::{Pair, Ran, run};

pub(crate) fn git(dir: &Path, args: &[&str]) -> Ran {
    let mut command = Command::new("git");
    command.arg("-C").arg(dir).args(args).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").env("LC_ALL", "C");
    for who in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{who}_NAME"), "Test").env(format!("GIT_{who}_EMAIL"), "test@example.com");
    }
    run(&mut command)
}

pub(crate) fn git_ok(dir: &Path, args: &[&str]) -> String {
    git(dir, args).expect_code(0).out
}

#[test]
fn the_standby_is_clean_to_fsck_at_every_moment_and_its_refs_are_equal_at_the_end() {
    let pair = Pair::following();
    let (here, there) = (pair.active.home.join("shared/data/repositories/1"), pair.standby.home.join("shared/data/repositories/1"));
    let clone = pair.dir.path().join("clone");
    git_ok(pair.dir.path(), &["init", "-q", "--bare", "-b", "main", &here.to_string_lossy()]);
    git_ok(&here, &["config", "gc.auto", "0"]);
    git_ok(&here, &["config", "receive.autogc", "false"]);
    git_ok(pair.dir.path(), &["clone", "-q", &here.to_string_lossy(), &clone.to_string_lossy()]);
    push(&clone, 0);
    pair.checkpoint();

    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let written = std::panic::catch_unwind(|| pushes_and_maintenance(&clone, &here));
            done.store(true, Ordering::Relaxed);
            written
        });
        let mut samples = 0;
        while !done.load(Ordering::Relaxed) {
            sample(&there, samples);
            samples += 1;
        }
        assert!(writer.join().unwrap().is_ok() && samples > 5, "{samples} samples");
    });
    pair.checkpoint();
    assert_eq!(git_ok(&there, &["for-each-ref"]), git_ok(&here, &["for-each-ref"]));
    git_ok(&there, &["fsck", "--full"]);
    pair.assert_equal();
}

/// What the refs name is complete in git's own eyes, now; and so is everything else.
fn sample(repository: &Path, no: u32) {
    // Refs first, then what they need: no moment at which that may fail.
    let walked = git(repository, &["rev-list", "--objects", "--all"]);
    assert!(walked.code == 0, "sample {no}: {walked:#?}");
    // RACE: fsck lists loose objects before it reads refs, so an object and its ref that arrive in between look like a
    // ref without its object, on any repository in use. A standby that is really broken is so at the next look too.
    let mut looks = 0;
    loop {
        let checked = git(repository, &["fsck", "--full"]);
        if checked.code == 0 {
            return;
        }
        looks += 1;
        assert!(looks < 5, "sample {no}: {checked:#?}");
    }
}

fn pushes_and_maintenance(clone: &Path, bare: &Path) {
    for n in 1..=40 {
        push(clone, n);
        match n % 10 {
            3 => drop(git_ok(bare, &["pack-refs", "--all"])),
            6 => drop(git_ok(bare, &["repack", "-q", "-adb"])),
            8 => drop(git_ok(clone, &["push", "-q", "origin", &format!(":refs/heads/b{}", n - 1)])),
            9 => drop(git_ok(bare, &["prune", "--expire=now"])),
            _ => {}
        }
    }
}

fn push(clone: &Path, n: u32) {
    fs::write(clone.join(format!("file{}", n % 4)), format!("{n}\n").repeat(500)).unwrap();
    git_ok(clone, &["add", "-A"]);
    git_ok(clone, &["commit", "-q", "-m", &n.to_string()]);
    git_ok(clone, &["push", "-q", "origin", "HEAD:main", &format!("HEAD:refs/heads/b{n}")]);
}

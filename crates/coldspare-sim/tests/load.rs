//! The load generator: it makes what it says, and nothing else.

#![allow(clippy::unwrap_used)] // a test that can't go on has failed

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use coldspare_sim::load::{Pusher, Shape};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn load(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_coldspare-load")).args(args).output().unwrap()
}

fn git(at: &Path, args: &[&str]) -> String {
    let output = Command::new("git").arg("-C").arg(at).args(args).output().unwrap();
    assert!(output.status.success(), "git {args:?} in {}: {}", at.display(), String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The names in a folder, in order.
fn names(at: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(at).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Commits that the branch of a repository has, once git found nothing wrong with it.
fn commits(bare: &Path) -> u64 {
    assert_eq!(git(bare, &["fsck", "--full", "--strict", "--no-dangling"]), "");
    if git(bare, &["for-each-ref"]).is_empty() { 0 } else { git(bare, &["rev-list", "--count", "main"]).trim().parse().unwrap() }
}

#[test]
fn a_load_makes_what_it_says_and_git_finds_nothing_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let (home, scratch) = (dir.path().join("home"), dir.path().join("scratch"));
    fs::create_dir(&scratch).unwrap();
    let rates = ["--pushes-per-second", "4", "--forks-per-hour", "3600", "--gcs-per-hour", "2400", "--lfs-per-hour", "3600"];
    let sizes = ["--repositories", "3", "--commits", "2", "--lfs-bytes", "100000", "--seconds", "3", "--json"];
    let args = [&["--home", home.to_str().unwrap(), "--scratch", scratch.to_str().unwrap()], &rates[..], &sizes[..]].concat();
    let ran = load(&args);
    assert!(ran.status.success(), "{ran:?}");
    let told: Value = serde_json::from_slice(&ran.stdout).unwrap();
    let told = |what: &str, of: &str| told[what][of].as_u64().unwrap_or_else(|| panic!("no {of} of {what} in {told}"));
    let mut done = [0; 4];
    for (no, (what, due)) in [("pushes", 12), ("forks", 3), ("gcs", 2), ("lfs", 3)].into_iter().enumerate() {
        // A busy host may miss some; each is told.
        assert_eq!(told(what, "done") + told(what, "missed"), due, "{what}");
        done[no] = told(what, "done");
    }
    let [pushes, forks, _, lfs] = done;
    assert!(pushes > 0 && told("pushes", "bytes") == pushes * 2 * 160);

    let repositories = home.join("shared/data/repositories");
    let all: Vec<PathBuf> = names(&repositories).iter().map(|name| repositories.join(name)).collect();
    let (forked, pushed): (Vec<_>, Vec<_>) = all.iter().partition(|at| at.to_string_lossy().contains("load-fork-"));
    assert_eq!((pushed.len(), forked.len() as u64), (3, forks));
    assert_eq!(pushed.iter().map(|at| commits(at)).sum::<u64>(), pushes * 2);
    for fork in forked {
        assert!(commits(fork) >= 2 && fork.join("objects/info/alternates").exists(), "{}", fork.display());
    }
    let store = home.join("shared/data/git-lfs/storage/load");
    let mut objects = 0;
    for folder in if lfs > 0 { names(&store) } else { Vec::new() } {
        for name in names(&store.join(&folder)) {
            let digest = Sha256::digest(fs::read(store.join(&folder).join(&name)).unwrap());
            let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(digest, format!("{folder}{name}"));
            objects += 1;
        }
    }
    assert_eq!((objects, told("lfs", "bytes")), (lfs, lfs * 100_000));
    assert_eq!(names(&scratch), Vec::<String>::new(), "clones stayed");
}

#[test]
fn a_load_touches_nothing_that_it_did_not_make() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let mine = home.join("shared/data/repositories/load-2");
    fs::create_dir_all(&mine).unwrap();
    fs::write(mine.join("HEAD"), "mine").unwrap();
    let at = home.to_str().unwrap();
    for (args, why) in [
        (&["--home", at][..], "exists"),
        (&["--into", at], "load-2 is there already"),
        (&["--into", at, "--name", "../load"], "one component"),
        (&["--into", at, "--name", "other", "--scratch", at], "outside of it"),
    ] {
        let ran = load(&[args, &["--seconds", "1"]].concat());
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(!ran.status.success() && said.contains(why), "{args:?}: {said}");
    }
    let ran = load(&["--into", at, "--name", "other", "--repositories", "1", "--seconds", "1"]);
    assert!(ran.status.success(), "{ran:?}");
    assert_eq!(fs::read_to_string(mine.join("HEAD")).unwrap(), "mine");
    assert_eq!(names(&mine), ["HEAD"]);
    assert!(!mine.with_file_name("load-1").exists(), "made before it was looked whether all names are free");
    assert!(names(&home.join("shared/data/repositories")).contains(&"other-1".into()));
}

#[test]
fn the_same_seed_makes_the_same_commits() {
    let made = |seed| {
        let dir = tempfile::tempdir().unwrap();
        let shape = Shape { seed, ..Shape::named("load") };
        let mut pusher = Pusher::new(&dir.path().join("clone"), &dir.path().join("bare"), &shape, 0).unwrap();
        [pusher.push().unwrap().to_string(), pusher.push().unwrap().to_string()]
    };
    let first = made(7);
    assert_eq!(made(7), first);
    assert_ne!(made(8)[0], first[0]);
}

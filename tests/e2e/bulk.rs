//! Large content travels beside the changesets: a push overtakes it, and nothing is confirmed before it is there.

use std::fs;
use std::path::{Path, PathBuf};

use crate::git::{clone, commit, git, git_ok, init_bare, push, tip};
use crate::pair::{Host, Pair, until};
use crate::seed::Seed;

/// What the imported repository brings.
const IMPORT_BYTES: usize = 24 << 20;
/// What travels besides content.
const SLACK_BYTES: u64 = 3 << 20;

/// Both daemons, and a link on which the import takes half a minute: longer than all that is to overtake it.
fn slow_pair() -> Pair {
    pair_at("1 MB/s")
}

fn pair_at(bandwidth: &str) -> Pair {
    let mut pair = Pair::new();
    pair.active.configure(&format!("[link]\nbandwidth = \"{bandwidth}\"\n"));
    pair.standby.start();
    pair.active.start();
    pair
}

fn repository(host: &Host, number: u32) -> PathBuf {
    host.home.join(format!("shared/data/repositories/{number}"))
}

/// A bare repository of the active with one commit, and a clone of it.
fn with_clone(pair: &Pair, number: u32) -> PathBuf {
    let bare = repository(&pair.active, number);
    init_bare(&bare);
    let work = pair.dir.path().join(format!("work-{number}"));
    clone(&bare, &work);
    commit(&work, "first", "1");
    push(&work, &["HEAD:refs/heads/main"]);
    work
}

/// What `main` is on the standby; empty where it isn't there.
fn main_there(pair: &Pair, number: u32) -> String {
    let ran = git(&repository(&pair.standby, number), &["rev-parse", "--verify", "-q", "refs/heads/main"]);
    ran.out.trim().into()
}

/// Pushes much that doesn't shrink; its commit.
fn import(work: &Path) -> String {
    fs::write(work.join("large"), Seed::new(3).noise(IMPORT_BYTES)).unwrap();
    git_ok(work, &["-c", "core.compression=0", "add", "large"]);
    let tip = commit(work, "small", "beside it");
    git_ok(work, &["-c", "pack.compression=0", "push", "-q", "origin", "HEAD:refs/heads/main"]);
    tip
}

fn is_bulk_under_way(pair: &Pair) -> bool {
    let listed = fs::read_dir(pair.standby.home.join(".coldspare/stage/b")).unwrap();
    listed.map(|entry| entry.unwrap()).any(|entry| entry.file_name().to_string_lossy().starts_with("u-"))
}

fn sent(pair: &Pair) -> u64 {
    pair.active.status()["bytes_sent"].as_u64().unwrap()
}

#[test]
fn a_push_overtakes_an_import() {
    let pair = slow_pair();
    let (large, small) = (with_clone(&pair, 1), with_clone(&pair, 2));
    pair.checkpoint();
    let before = sent(&pair);
    let imported = import(&large);
    until("the import is on its way", || is_bulk_under_way(&pair));
    for n in 0..5 {
        let pushed = commit(&small, "file", &n.to_string());
        push(&small, &["HEAD:refs/heads/main"]);
        until("the push is on the standby", || main_there(&pair, 2) == pushed);
        assert_ne!(main_there(&pair, 1), imported, "the import was there before push {n}");
    }
    let status = pair.active.status();
    assert!(status["lag_ms"].as_u64().unwrap() > 0, "{status}");
    pair.checkpoint();
    assert_eq!(main_there(&pair, 1), imported);
    git_ok(&repository(&pair.standby, 1), &["fsck", "--full", "--strict"]);
    pair.assert_equal();
    let sent = sent(&pair) - before;
    assert!(sent <= IMPORT_BYTES as u64 * 21 / 20 + SLACK_BYTES, "{sent} bytes were sent for {IMPORT_BYTES}");
}

#[test]
fn a_checkpoint_waits_for_what_is_put_off() {
    let pair = slow_pair();
    pair.active.write("shared/small", "first");
    pair.checkpoint();
    pair.active.write("shared/large", Seed::new(5).noise(IMPORT_BYTES));
    until("it is on its way", || is_bulk_under_way(&pair));
    pair.active.run(&["checkpoint", "--timeout", "1s"]).expect(3, "not durable on the standby in time");
    pair.checkpoint();
    pair.assert_equal();
    // The standby is told that it is over after the checkpoint.
    until("nothing is left", || fs::read_dir(pair.standby.home.join(".coldspare/stage/b")).unwrap().next().is_none());
}

#[test]
fn what_changes_while_it_is_sent_comes_as_it_is_in_the_end() {
    let pair = pair_at("4 MB/s"); // it is sent more than once
    pair.active.write("shared/small", "first");
    pair.checkpoint();
    let path = pair.active.write("shared/large", Seed::new(5).noise(IMPORT_BYTES));
    until("it is on its way", || is_bulk_under_way(&pair));
    // In its midst, and to its end.
    let mut content = fs::read(&path).unwrap();
    content.truncate(IMPORT_BYTES - 1);
    content[10 << 20..11 << 20].fill(7);
    fs::write(&path, &content).unwrap();
    pair.checkpoint();
    pair.assert_equal();
}

#[test]
fn a_fork_waits_for_what_it_borrows() {
    let pair = slow_pair();
    let large = with_clone(&pair, 1);
    let fork = repository(&pair.active, 2);
    init_bare(&fork);
    fs::write(fork.join("objects/info/alternates"), format!("{}\n", repository(&pair.active, 1).join("objects").display())).unwrap();
    pair.checkpoint();
    let imported = import(&large);
    until("the import is on its way", || is_bulk_under_way(&pair));
    // It needs what only the import has.
    git_ok(&fork, &["update-ref", "refs/heads/main", &imported]);
    let other = with_clone(&pair, 3);
    until("another is on the standby", || main_there(&pair, 3) == tip(&other, "HEAD"));
    assert_eq!(main_there(&pair, 2), "", "the fork has to wait");
    assert!(!pair.standby.log().contains("incomplete"), "it is the active that lets it wait");
    pair.checkpoint();
    pair.assert_equal();
    let incomplete = pair.standby.status()["incomplete"].clone();
    assert!(incomplete.as_array().is_none_or(Vec::is_empty), "{incomplete}");
}

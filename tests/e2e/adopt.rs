//! A standby whose manifest is lost, or that never had one, though its tree is there.

use std::fs;
use std::process::Command;

use crate::git::{clone, commit, git_ok, init_bare, push};
use crate::pair::{Pair, until};
use crate::runbook::Page;
use crate::seed::Seed;

/// Content of the home that doesn't shrink.
const BYTES: usize = 8 << 20;
/// What naming everything may take.
const LITTLE: u64 = 600_000;

/// Fills the active's home: a repository with loose objects and a pack, files, a link of each kind.
fn fill(pair: &Pair) {
    let bare = pair.active.home.join("shared/data/repositories/1");
    init_bare(&bare);
    let work = pair.dir.path().join("work");
    clone(&bare, &work);
    for n in 0..12 {
        commit(&work, "file", &format!("content {n}"));
        push(&work, &["HEAD:refs/heads/main"]);
        if n == 6 {
            git_ok(&bare, &["repack", "-q", "-ad"]);
        }
    }
    pair.active.write("shared/large", Seed::new(3).noise(BYTES));
    pair.active.write("shared/data/attachments/1", "attached");
    std::os::unix::fs::symlink("1", pair.active.home.join("shared/data/attachments/latest")).unwrap();
    fs::hard_link(pair.active.home.join("shared/data/attachments/1"), pair.active.home.join("shared/also-attached")).unwrap();
}

/// A standby that has all of a home.
fn followed() -> Pair {
    let mut pair = Pair::new();
    pair.standby.start();
    pair.active.start();
    fill(&pair);
    pair.checkpoint();
    pair
}

/// By the runbook's page.
#[test]
fn a_standby_whose_store_is_damaged_is_rebuilt_from_its_tree() {
    let mut pair = followed();
    pair.standby.kill();
    let manifest = pair.standby.state().join("manifest.redb");
    fs::write(&manifest, Seed::new(1).noise(fs::metadata(&manifest).unwrap().len() as usize)).unwrap();
    pair.standby.run(&["verify"]).expect(5, "coldspare adopt");
    // Meanwhile the active goes on, and something of the standby's tree is lost.
    pair.active.write("shared/data/attachments/2", "attached later");
    fs::remove_file(pair.standby.home.join("shared/data/attachments/1")).unwrap();
    fs::write(pair.standby.home.join("shared/foreign"), "nobody's").unwrap();

    let mut page = Page::of("Rebuild of a standby");
    page.skip("run"); // it is stopped
    page.give("adopt", &pair.standby).expect_code(0);
    let adopted = pair.standby.run(&["adopt", "--json"]).expect_code(0).json(); // given again
    assert!(adopted["entries"].as_u64().unwrap() > 20 && adopted["left_out"] == 0, "{adopted}");
    let sent = || pair.active.status()["bytes_sent"].as_u64().unwrap();
    let before = sent();
    page.start(&mut pair.standby);
    until("it is connected", || pair.active.status()["connected"] == true);
    page.give("checkpoint", &pair.active).expect_code(0);
    let sent = sent() - before;
    assert!(sent < LITTLE, "{sent} bytes were sent");
    pair.assert_equal();
    page.give("verify", &pair.standby).expect_code(0);
    page.end();
    let kept = Command::new("find").arg(pair.standby.home.join(".coldspare/quarantine")).args(["-name", "*foreign*"]).output().unwrap();
    assert!(!kept.stdout.is_empty(), "what only the standby had is kept");
}

#[test]
fn a_standby_that_was_filled_by_other_means_is_sent_what_differs() {
    let mut pair = Pair::new();
    fill(&pair);
    let from = format!("{}/.", pair.active.home.join("shared").display());
    let there = pair.standby.home.join("shared");
    fs::create_dir_all(&there).unwrap();
    assert!(Command::new("cp").args(["-a", &from]).arg(&there).status().unwrap().success());
    pair.active.write("shared/data/attachments/1", "changed after the copy");
    let said = pair.standby.run(&["adopt"]).expect_code(0).out;
    assert!(said.contains("the active names everything"), "{said}");
    pair.standby.start();
    pair.active.start();
    pair.checkpoint();
    let sent = pair.active.status()["bytes_sent"].as_u64().unwrap();
    assert!(sent < LITTLE, "{sent} bytes were sent");
    pair.assert_equal();
    pair.standby.run(&["verify", "--deep"]).expect_code(0);
}

#[test]
fn a_standby_that_adopts_again_and_again_keeps_what_is_in_quarantine() {
    let mut pair = followed();
    for n in 0..3 {
        pair.active.write("shared/data/attachments/1", format!("replaced {n}"));
        pair.checkpoint(); // the history has what was there
        pair.standby.kill();
        pair.standby.run(&["adopt"]).expect_code(0);
        fs::write(pair.standby.home.join("shared/foreign"), format!("nobody's {n}")).unwrap();
        pair.standby.run(&["verify"]).expect_code(1);
        pair.standby.start();
        until("the active named everything", || pair.standby.run(&["verify", "--json"]).json()["verdict"] == "consistent");
    }
    let kept = Command::new("grep").arg("-rl").arg("nobody's").arg(pair.standby.home.join(".coldspare/quarantine")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&kept.stdout).lines().count(), 3, "{kept:?}");
    pair.standby.kill();
    // Without a manifest the tree is nobody's, which is said.
    fs::remove_file(pair.standby.state().join("manifest.redb")).unwrap();
    pair.standby.start();
    until("it is said", || pair.standby.log().contains("coldspare adopt"));
}

#[test]
fn only_a_standby_without_a_daemon_adopts() {
    let mut pair = Pair::new();
    pair.active.run(&["adopt"]).expect(2, "only a standby adopts");
    pair.standby.start();
    pair.standby.run(&["adopt"]).expect(2, "");
    pair.active.start();
    fill(&pair);
    pair.checkpoint();
    until("both follow", || pair.standby.status()["connected"] == true);
}

#[test]
fn what_is_damaged_in_an_adopted_tree_comes_again() {
    let mut pair = followed();
    pair.standby.kill();
    fs::remove_file(pair.standby.state().join("manifest.redb")).unwrap();
    let large = pair.standby.home.join("shared/large");
    let modified = fs::metadata(&large).unwrap().modified().unwrap();
    let mut content = fs::read(&large).unwrap();
    content[100_000] ^= 1;
    fs::write(&large, content).unwrap();
    fs::File::options().write(true).open(&large).unwrap().set_modified(modified).unwrap();
    let pack = fs::read_dir(pair.standby.home.join("shared/data/repositories/1/objects/pack")).unwrap();
    let pack = pack.map(|entry| entry.unwrap().path()).find(|path| path.extension().is_some_and(|e| e == "idx")).unwrap();
    let mut content = fs::read(&pack).unwrap();
    content[1_060] ^= 1;
    fs::remove_file(&pack).unwrap();
    fs::write(&pack, content).unwrap();
    pair.standby.run(&["adopt"]).expect_code(0);
    pair.standby.start();
    // Until it connects the active doesn't know that there is anything to do.
    until("the active named everything", || pair.standby.run(&["verify", "--deep", "--json"]).json()["verdict"] == "consistent");
    pair.assert_equal();
    pair.standby.run(&["verify", "--deep", "--git"]).expect_code(0);
}

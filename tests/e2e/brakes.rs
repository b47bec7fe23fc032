//! What takes too much from the standby waits for a person: deletions, what looks encrypted, a root that is empty.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::git::{self, commit, git_ok};
use crate::pair::{Pair, until};

/// Files of a home; a fifth of it may go at once without a question.
const FILES: usize = 1_500;

fn attachment(number: usize) -> String {
    format!("shared/data/attachments/{}/{number}", number % 30)
}

/// A pair that follows a home of many attachments and some repositories.
fn pair_with(repositories: usize) -> Pair {
    let pair = Pair::following();
    for number in 0..FILES {
        pair.active.write(&attachment(number), format!("attachment {number}\n").repeat(40));
    }
    let clone = pair.dir.path().join("clone");
    for number in 0..repositories {
        let bare = pair.active.home.join(format!("shared/data/repositories/{number}"));
        git::init_bare(&bare);
        if number == 0 {
            git::clone(&bare, &clone);
            commit(&clone, "file", "content");
        }
        git_ok(&clone, &["push", "-q", bare.to_str().unwrap(), "HEAD:main"]);
    }
    pair.checkpoint();
    pair.assert_equal();
    pair
}

fn count(dir: &Path) -> usize {
    walkdir::WalkDir::new(dir).into_iter().filter(|entry| entry.as_ref().is_ok_and(|e| e.file_type().is_file())).count()
}

fn waiting(pair: &Pair) -> Value {
    pair.standby.status()["waiting_for_decision"].clone()
}

fn until_it_waits(pair: &Pair) -> String {
    until("the standby waits for a decision", || !waiting(pair).is_null());
    until("the active knows", || pair.active.status()["waiting_for_decision"]["reason"].is_string());
    waiting(pair)["reason"].as_str().unwrap().to_string()
}

/// Accepts what waits, and what is asked when more went since, until all is there.
fn accept_all(pair: &Pair) {
    until("all is accepted and applied", || {
        let waits = waiting(pair);
        if !waits.is_null() && waits["answer"] != "accepted" {
            pair.standby.run(&["accept"]);
        }
        pair.active.run(&["checkpoint", "--timeout", "5s"]).code == 0
    });
}

#[test]
fn a_mass_deletion_waits_and_is_rejected_or_accepted() {
    let pair = pair_with(1);
    let (here, there) = (pair.active.home.join("shared/data/attachments"), pair.standby.home.join("shared/data/attachments"));
    let before = count(&there);
    fs::remove_dir_all(&here).unwrap();
    let reason = until_it_waits(&pair);
    assert!(reason.contains("files would go"), "{reason}");
    // At most what goes without a question went before the brakes took hold.
    let kept = count(&there);
    assert!(kept >= before - 160, "{kept} of {before}");

    let rejected = pair.standby.run(&["reject", "--json"]).expect_code(0).json();
    assert_eq!(rejected["answer"], "rejected");
    // Other changes wait behind it, and nothing is taken.
    pair.active.write("shared/data/later", "later");
    pair.active.run(&["checkpoint", "--timeout", "3s"]).expect_code(3);
    assert_eq!((count(&there), pair.standby.home.join("shared/data/later").exists()), (kept, false));
    assert_eq!(waiting(&pair)["answer"], "rejected");
    pair.standby.run(&["verify", "--deep", "--git"]).expect_code(0);

    accept_all(&pair);
    pair.assert_equal();
    assert_eq!(count(&there), 0);
    assert!(waiting(&pair).is_null() && pair.active.status()["waiting_for_decision"].is_null());
    pair.standby.run(&["accept"]).expect(1, "nothing waits");
    // What was accepted counts no more: as few as ever go without a question.
    (0..50).for_each(|number| drop(pair.active.write(&attachment(number), "new")));
    pair.checkpoint();
    fs::remove_dir_all(&here).unwrap();
    pair.checkpoint();
    pair.assert_equal();
}

#[test]
fn what_comes_back_goes_through_by_itself() {
    let mut pair = pair_with(1);
    let (here, aside) = (pair.active.home.join("shared"), pair.dir.path().join("aside"));
    fs::rename(&here, &aside).unwrap();
    let reason = until_it_waits(&pair);
    assert!(reason.contains("nothing would be left of it") || reason.contains("files would go"), "{reason}");
    // The question survives both daemons.
    pair.standby.kill();
    pair.active.kill();
    pair.standby.start();
    assert!(!waiting(&pair).is_null());
    fs::rename(&aside, &here).unwrap();
    pair.active.start();
    pair.checkpoint();
    pair.assert_equal();
    assert!(waiting(&pair).is_null());
}

#[test]
fn repositories_that_go_in_great_number_wait() {
    let pair = pair_with(14);
    let home = |number: usize| pair.active.home.join(format!("shared/data/repositories/{number}"));
    (0..10).for_each(|number| {
        fs::remove_dir_all(home(number)).unwrap();
        pair.checkpoint();
    });
    pair.assert_equal();
    fs::remove_dir_all(home(10)).unwrap();
    let reason = until_it_waits(&pair);
    assert!(reason.contains("1 repository would go, after 10 in the last 60 minutes (limit 10)"), "{reason}");
    assert!(pair.standby.home.join("shared/data/repositories/10/HEAD").exists());
    // What git itself removes is no loss, however much it is.
    accept_all(&pair);
    pair.assert_equal();
}

#[test]
fn housekeeping_of_git_is_no_loss() {
    let pair = pair_with(2);
    let (bare, clone) = (pair.active.home.join("shared/data/repositories/1"), pair.dir.path().join("clone"));
    for number in 0..40 {
        let files: Vec<String> = (0..30).map(|file| format!("{number}/{file}")).collect();
        for file in &files {
            fs::create_dir_all(clone.join(file).parent().unwrap()).unwrap();
            fs::write(clone.join(file), file).unwrap();
        }
        git_ok(&clone, &["add", "."]);
        commit(&clone, "file", &number.to_string());
        git_ok(&clone, &["push", "-q", bare.to_str().unwrap(), &format!("HEAD:branch-{number}")]);
    }
    pair.checkpoint();
    assert!(count(&bare.join("objects")) > 1_000);
    git_ok(&bare, &["pack-refs", "--all"]);
    git_ok(&bare, &["repack", "-q", "-ad"]);
    git_ok(&bare, &["prune-packed"]);
    pair.checkpoint();
    assert!(waiting(&pair).is_null());
    pair.assert_equal();
}

#[test]
fn files_that_become_noise_wait() {
    let pair = pair_with(1);
    let there = pair.standby.home.join(attachment(FILES - 1));
    let good = fs::read(&there).unwrap();
    let mut state = 7u64;
    let new = pair.dir.path().join("new");
    for number in 0..FILES {
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .take(900)
        .collect();
        // Renamed into place: one that is met while it is written is neither what it was nor noise.
        fs::write(&new, noise).unwrap();
        fs::rename(&new, pair.active.home.join(attachment(number))).unwrap();
    }
    let reason = until_it_waits(&pair);
    assert!(reason.contains("content that looks encrypted"), "{reason}");
    let scrambled = (0..FILES).filter(|n| fs::read(pair.standby.home.join(attachment(*n))).unwrap().starts_with(b"attachment")).count();
    assert!(scrambled >= FILES - 100, "{scrambled} are as they were");
    assert_eq!(fs::read(&there).unwrap(), good);
    accept_all(&pair);
    pair.assert_equal();
}

#[test]
fn what_moves_is_no_loss() {
    let pair = pair_with(13);
    let at = |path: &str| pair.active.home.join(path);
    // Sent anew, since what is in them changed: attachments, and repositories always. At once: what goes is not seen before what comes.
    let frozen = pair.active.freeze();
    pair.active.write("shared/data/attachments/0/0", "changed");
    fs::rename(at("shared/data/attachments"), at("shared/data/uploads")).unwrap();
    pair.active.write("shared/data/uploads/0/0", "changed again");
    drop(frozen);
    pair.checkpoint();
    fs::rename(at("shared/data/repositories"), at("shared/data/moved")).unwrap();
    pair.checkpoint();
    pair.assert_equal();
    assert!(!pair.standby.log().contains("waits for a decision"), "{}", pair.standby.log());
}

#[test]
fn an_acceptance_covers_what_was_asked_about() {
    let mut pair = pair_with(1);
    let (here, there) = (pair.active.home.join("shared/data"), pair.standby.home.join("shared/data"));
    (0..15).for_each(|folder| fs::remove_dir_all(here.join(format!("attachments/{folder}"))).unwrap());
    until_it_waits(&pair);
    let reason = waiting(&pair)["reason"].clone();
    let (since, kept) = (waiting(&pair)["since_ms"].clone(), count(&there));
    // More goes before the person answers, unseen by anyone: no changeset is under way, and the next one has all of it.
    pair.active.kill();
    pair.standby.kill();
    (15..30).for_each(|folder| fs::remove_dir_all(here.join(format!("attachments/{folder}"))).unwrap());
    fs::remove_dir_all(here.join("repositories")).unwrap();
    pair.standby.start();
    pair.standby.run(&["accept"]).expect_code(0);
    pair.active.start();
    until("the person is asked again", || waiting(&pair)["answer"].is_null() && waiting(&pair)["since_ms"] != since);
    assert_ne!(waiting(&pair)["reason"], reason);
    assert_eq!(count(&there), kept, "something was applied");
    accept_all(&pair);
    pair.assert_equal();
}

#[test]
fn without_brakes_nobody_is_asked() {
    let mut pair = pair_with(1);
    pair.standby.kill();
    pair.standby.configure("[brakes]\nenabled = false\n");
    pair.standby.start();
    fs::remove_dir_all(pair.active.home.join("shared")).unwrap();
    pair.checkpoint();
    pair.assert_equal();
    assert!(waiting(&pair).is_null());
}

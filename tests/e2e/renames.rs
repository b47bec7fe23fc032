//! Folders that are renamed: the standby renames them, and nothing of what is in them is sent again.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::git;
use crate::pair::Pair;
use crate::seed::number_from_env;
use crate::watches::following_by;

/// Files of the renamed folder, unless `COLDSPARE_RENAMED_FILES` says more.
const FILES: u64 = 3_000;

#[test]
fn a_renamed_folder_is_renamed_by_fanotify() {
    check("fanotify");
}

#[test]
fn a_renamed_folder_is_renamed_by_inotify() {
    check("inotify");
}

fn check(backend: &str) {
    let files = number_from_env("COLDSPARE_RENAMED_FILES").unwrap_or(FILES);
    let Some((pair, ())) = following_by(backend, "full_scan_seconds = 2\n", |_| ()) else { return };
    for n in 0..files {
        pair.active.write(&format!("shared/data/big/{}/{}/f{n}", n % 10, n % 100), format!("file {n}\n"));
    }
    pair.checkpoint();
    let inodes = |host: &Path, dir: &str| -> Vec<u64> {
        (0..files).step_by(97).map(|n| fs::metadata(host.join(format!("{dir}/{}/{}/f{n}", n % 10, n % 100))).unwrap().ino()).collect()
    };
    let there = inodes(&pair.standby.home, "shared/data/big");
    let rename = |from: &str, to: &str| fs::rename(pair.active.home.join(from), pair.active.home.join(to)).unwrap();
    let costs_little = |rename: &dyn Fn()| {
        let sent = pair.sent_by(rename);
        assert!(sent < 20_000, "{sent} bytes were sent");
        pair.assert_equal();
    };
    costs_little(&|| rename("shared/data/big", "shared/data/moved"));
    assert_eq!(inodes(&pair.standby.home, "shared/data/moved"), there, "the standby has the files that it had");
    // Into a folder that is as new.
    costs_little(&|| {
        let _frozen = pair.active.freeze();
        fs::create_dir_all(pair.active.home.join("shared/archive/2026")).unwrap();
        rename("shared/data/moved", "shared/archive/2026/moved");
    });
    assert_eq!(inodes(&pair.standby.home, "shared/archive/2026/moved"), there);
    // And what changes under the new name is followed.
    pair.active.write("shared/archive/2026/moved/3/3/f3", "changed under its new name");
    pair.active.write("shared/archive/2026/moved/new/file", "new under it");
    fs::remove_file(pair.active.home.join("shared/archive/2026/moved/4/4/f4")).unwrap();
    pair.checkpoint();
    pair.assert_equal();
    // Another folder takes the old name at once.
    pair.active.write("shared/data/other/1/1/f1", "another");
    pair.checkpoint();
    rename("shared/archive/2026/moved", "shared/data/big");
    rename("shared/data/other", "shared/archive/2026/moved");
    pair.checkpoint();
    pair.assert_equal();
    pair.standby.run(&["verify", "--deep"]).expect_code(0);
    assert_eq!(pair.active.status()["watch"]["missed"], 0, "{}", pair.active.log());
    assert!(!pair.standby.log().contains("was not applied"), "{}", pair.standby.log());
}

#[test]
fn a_folder_that_changes_while_it_is_renamed_is_what_it_is() {
    let pair = Pair::following();
    let at = |path: &str| pair.active.home.join(path);
    for n in 0..50 {
        pair.active.write(&format!("shared/data/a/{n}"), format!("{n}"));
        pair.active.write(&format!("shared/data/gone/{n}"), format!("{n}"));
    }
    pair.active.write("shared/data/excluded.d/x", "x");
    pair.checkpoint();
    // Written in, before and behind; and something else at the old path.
    pair.active.write("shared/data/a/1", "before");
    fs::rename(at("shared/data/a"), at("shared/data/b")).unwrap();
    pair.active.write("shared/data/b/2", "behind");
    pair.active.write("shared/data/a/3", "where it was");
    pair.checkpoint();
    pair.assert_equal();
    // To and fro, over an empty folder, and into what is renamed itself.
    fs::rename(at("shared/data/b"), at("shared/data/c")).unwrap();
    fs::rename(at("shared/data/c"), at("shared/data/b")).unwrap();
    fs::create_dir(at("shared/data/empty")).unwrap();
    pair.checkpoint();
    fs::rename(at("shared/data/b"), at("shared/data/empty")).unwrap();
    pair.checkpoint();
    pair.assert_equal();
    fs::rename(at("shared/data/gone"), at("shared/data/empty/in")).unwrap();
    fs::rename(at("shared/data/empty"), at("shared/data/all")).unwrap();
    pair.checkpoint();
    pair.assert_equal();
    // Modes and times of the folders, old and new.
    fs::set_permissions(at("shared/data/all"), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    fs::rename(at("shared/data/all"), at("shared/all")).unwrap();
    fs::remove_dir_all(at("shared/data")).unwrap();
    pair.checkpoint();
    pair.assert_equal();
    pair.standby.run(&["verify", "--deep"]).expect_code(0);
}

#[test]
fn a_renamed_folder_with_repositories_or_hard_links_is_whole() {
    let pair = Pair::following();
    let at = |path: &str| pair.active.home.join(path);
    let work = pair.dir.path().join("work");
    git::init_bare(&at("shared/projects/1"));
    git::clone(&at("shared/projects/1"), &work);
    let tip = git::commit(&work, "file", "one");
    git::push(&work, &["HEAD:refs/heads/main"]);
    pair.active.write("shared/links/a", "one file");
    fs::hard_link(at("shared/links/a"), at("shared/links/b")).unwrap();
    pair.active.write("shared/links/c", "alone");
    pair.checkpoint();
    fs::rename(at("shared/projects"), at("shared/archived")).unwrap();
    fs::rename(at("shared/links"), at("shared/tied")).unwrap();
    pair.checkpoint();
    pair.assert_equal();
    let archived = pair.standby.home.join("shared/archived/1");
    git::assert_clean(&archived);
    assert_eq!(git::tip(&archived, "refs/heads/main"), tip);
    let ino = |path: &str| fs::metadata(pair.standby.home.join(path)).unwrap().ino();
    assert_eq!(ino("shared/tied/a"), ino("shared/tied/b"));
}

#[test]
fn a_receiver_that_is_killed_while_it_renames_has_all_in_the_end() {
    let mut pair = Pair::following();
    for n in 0..500 {
        pair.active.write(&format!("shared/data/at0/{}/{n}", n % 5), format!("{n}"));
    }
    pair.checkpoint();
    for round in 0..6 {
        let (from, to) = (format!("shared/data/at{round}"), format!("shared/data/at{}", round + 1));
        fs::rename(pair.active.home.join(from), pair.active.home.join(to)).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2 * round));
        pair.standby.kill();
        pair.standby.start();
        pair.checkpoint();
        pair.assert_equal();
    }
    pair.standby.run(&["verify", "--deep"]).expect_code(0);
}

#[test]
fn renames_without_end_delay_nothing_else() {
    let pair = Pair::following_unasked();
    for n in 0..20 {
        pair.active.write(&format!("shared/data/spin0/{n}"), format!("{n}"));
    }
    pair.checkpoint();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let at = |no: u64| pair.active.home.join(format!("shared/data/spin{no}"));
    std::thread::scope(|scope| {
        let spinner = scope.spawn(|| {
            let mut no = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                fs::rename(at(no), at(no + 1)).unwrap();
                no += 1;
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            no
        });
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for n in 0..20 {
                pair.active.write("shared/data/beside", format!("{n}"));
                pair.checkpoint();
                assert_eq!(fs::read_to_string(pair.standby.home.join("shared/data/beside")).unwrap(), n.to_string());
            }
        }));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(spinner.join().unwrap() > 20);
        checked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    pair.checkpoint();
    pair.assert_equal();
}

//! What is written while both daemons run.

use std::fs;

use crate::pair::{Pair, until};

#[test]
fn a_write_reaches_the_standby_without_a_command() {
    let pair = Pair::following();
    pair.active.write("shared/config/a", "written");
    let there = pair.standby.home.join("shared/config/a");
    until("the file is on the standby", || fs::read(&there).is_ok_and(|c| c == b"written"));
    pair.active.write("shared/config/a", "written again");
    until("the change is on the standby", || fs::read(&there).is_ok_and(|c| c == b"written again"));
    fs::remove_file(pair.active.home.join("shared/config/a")).unwrap();
    until("the deletion is on the standby", || !there.exists());
}

#[test]
fn all_written_before_a_checkpoint_is_on_the_standby_when_it_returns() {
    let pair = Pair::following();
    for n in 0..20 {
        pair.active.write(&format!("shared/data/dir{}/file{n}", n % 4), format!("content {n}").repeat(n));
        pair.checkpoint();
        pair.assert_equal();
    }
}

#[test]
fn files_and_folders_exchange_move_and_vanish() {
    let pair = Pair::following();
    let at = |path: &str| pair.active.home.join(path);
    pair.active.write("shared/data/file", "a file");
    pair.active.write("shared/data/folder/inside/deep", "in a folder");
    pair.active.write("shared/data/moved/one", "moves");
    pair.active.write("shared/data/gone/one", "goes");
    pair.checkpoint();
    pair.assert_equal();

    fs::remove_file(at("shared/data/file")).unwrap();
    pair.active.write("shared/data/file/now/a/folder", "inside");
    fs::remove_dir_all(at("shared/data/folder")).unwrap();
    pair.active.write("shared/data/folder", "now a file");
    fs::rename(at("shared/data/moved"), at("shared/moved")).unwrap();
    fs::remove_dir_all(at("shared/data/gone")).unwrap();
    pair.checkpoint();
    pair.assert_equal();

    fs::remove_dir_all(at("shared/data/file")).unwrap();
    std::os::unix::fs::symlink("folder", at("shared/data/file")).unwrap();
    fs::remove_file(at("shared/data/folder")).unwrap();
    fs::rename(at("shared/moved"), at("shared/data/folder")).unwrap();
    fs::hard_link(at("shared/data/folder/one"), at("shared/data/two")).unwrap();
    pair.checkpoint();
    pair.assert_equal();
    pair.standby.run(&["verify", "--deep"]).expect_code(0);
}

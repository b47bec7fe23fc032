//! The active's power fails while somebody pushes: the standby loses nothing that it had.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

use crate::git::{self, commit, git_ok, push};
use crate::image::Mount;
use crate::pair::{Pair, until};
use crate::seed::{Seed, number_from_env};

const REPOSITORY: &str = "shared/data/repositories/1";
/// What is being pushed, unless `COLDSPARE_PUSH_MIB` says more (2048 as an administrator would try it).
const PUSH_MIB: u64 = 48;

#[test]
fn after_a_power_cut_of_the_active_during_a_push_the_standby_does_not_go_back() {
    let mib = number_from_env("COLDSPARE_PUSH_MIB").unwrap_or(PUSH_MIB);
    let mut pair = Pair::new();
    let Some(mount) = Mount::instead_of(&pair.active.home, (4 * mib + 64) << 20) else { return };
    boots_as(&mut pair, '1');
    pair.standby.start();
    pair.active.start();
    let (here, there) = (pair.active.home.join(REPOSITORY), pair.standby.home.join(REPOSITORY));
    let clone = pair.dir.path().join("clone");
    git::init_bare(&here);
    git::clone(&here, &clone);
    git_ok(&clone, &["config", "core.compression", "0"]);
    commit(&clone, "file", "durable");
    push(&clone, &["HEAD:main"]);
    pair.active.write("shared/config/durable", "durable");
    pair.checkpoint();
    git_ok(&here, &["config", "receive.unpackLimit", "1"]);
    assert!(crate::pair::succeeds("sync", &["-f", &here.to_string_lossy()]));

    // On the standby at once; on the active in memory only, as git doesn't wait for references to be durable.
    commit(&clone, "file", "not durable");
    push(&clone, &["HEAD:main", "HEAD:refs/heads/kept"]);
    git_ok(&here, &["config", "receive.unpackLimit", "100"]);
    commit(&clone, "loose", "not durable, in loose objects");
    push(&clone, &["HEAD:refs/heads/loose"]);
    git_ok(&here, &["config", "receive.unpackLimit", "1"]);
    pair.active.write("shared/config/fresh", "not durable");
    pair.checkpoint();
    let before = contents(&pair.standby.home);

    let mut noise = Seed::new(7);
    for n in 0..mib / 16 {
        fs::write(clone.join(format!("large{n}")), noise.noise(16 << 20)).unwrap();
    }
    commit(&clone, "file", "with large files");
    // However quick the push is, it isn't through before the power fails.
    let (hooks, cut) = (pair.dir.path().join("hooks"), pair.dir.path().join("cut"));
    fs::create_dir(&hooks).unwrap();
    let script = format!("#!/bin/sh\nfor n in $(seq 2000); do [ -e '{}' ] && break; sleep 0.1; done\n", cut.display());
    fs::write(hooks.join("pre-receive"), script).unwrap();
    fs::set_permissions(hooks.join("pre-receive"), fs::Permissions::from_mode(0o755)).unwrap();
    let receive_pack = format!("--receive-pack=git -c core.hooksPath='{}' receive-pack", hooks.display());
    let mut command = git::command(&clone, &["push", "-q", &receive_pack, "origin", "HEAD:main"]);
    let mut pushing = command.process_group(0).stderr(Stdio::null()).spawn().unwrap();
    until("half of the push is there", || incoming_bytes(&here) > mib << 19 || pushing.try_wait().unwrap().is_some());
    // However long the cut takes: the push gets no further meanwhile.
    let group = Pid::from_child(&pushing);
    let _ = kill_process_group(group, Signal::STOP);
    let is_cut = mount.power_fails();
    fs::write(cut, "").unwrap();
    let _ = kill_process_group(group, Signal::CONT);
    let pushed = pushing.wait().unwrap();
    if !is_cut {
        return println!("skipped: no python3, or no ioctl that cuts the power of a filesystem");
    }
    assert!(!pushed.success(), "the push was through before the power failed");
    // A disk that is gone is not a home that is empty.
    let seen = contents(&pair.standby.home);
    let lost: Vec<&PathBuf> = before.iter().filter(|(path, content)| seen.get(*path) != Some(content)).map(|(path, _)| path).collect();
    assert!(lost.is_empty(), "the standby followed a dying disk: {lost:?}");
    pair.active.kill();
    mount.comes_back();

    boots_as(&mut pair, '2');
    pair.active.start();
    let held = pair.active.run(&["checkpoint", "--timeout", "60s"]);
    assert!(held.code <= 1, "{held:#?}");
    git::assert_clean(&there);
    assert_nothing_lost(&before, &pair);
    let status = pair.active.status();
    for path in empty_files(&here) {
        let name = path.strip_prefix(&pair.active.home).unwrap().to_string_lossy().into_owned();
        let listed = status["held_back"].as_array().unwrap().iter().any(|p| p["path"] == name.as_str() && p["kind"] == "damaged");
        assert!(listed, "{name} is empty, and not held back: {status}");
        let copy = pair.standby.home.join(&name);
        assert!(!copy.exists() || fs::metadata(&copy).unwrap().len() > 0, "{name} is empty on the standby too");
    }
    pair.standby.run(&["verify", "--deep"]).expect_code(0);

    // A person repairs the active and pushes again.
    empty_files(&here).iter().for_each(|path| fs::remove_file(path).unwrap());
    for path in git::leftovers(&pair.active.home) {
        let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
    }
    push(&clone, &["+HEAD:main", "+HEAD~2:refs/heads/kept", "+HEAD~1:refs/heads/loose"]);
    git::assert_clean(&here);
    pair.checkpoint();
    assert_eq!(git::references(&there), git::references(&here));
    git::assert_clean(&there);
    pair.assert_equal();
    pair.active.kill();
    drop(mount);
}

/// Each start of the host has its own number.
fn boots_as(pair: &mut Pair, digit: char) {
    pair.active.wrapper = vec!["env".into(), format!("COLDSPARE_BOOT_ID={}", digit.to_string().repeat(32))];
}

/// Every file, without coldspare's own.
fn contents(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let walk = walkdir::WalkDir::new(root).into_iter().filter_entry(|e| e.file_name() != ".coldspare");
    let files = walk.map(Result::unwrap).filter(|e| e.file_type().is_file());
    files.map(|e| (e.path().strip_prefix(root).unwrap().into(), fs::read(e.path()).unwrap())).collect()
}

/// Each file that the standby had is still there, or in a quarantine whose list names it.
fn assert_nothing_lost(before: &BTreeMap<PathBuf, Vec<u8>>, pair: &Pair) {
    let after = contents(&pair.standby.home);
    let (lists, kept) = quarantine(&pair.standby.home);
    for (path, content) in before {
        if after.get(path) == Some(content) {
            continue;
        }
        let name = path.to_string_lossy();
        assert!(kept.values().any(|k| k == content), "{name} is neither in the tree nor in the quarantine");
        let listed = lists.iter().find(|l| l["path"] == *name).unwrap_or_else(|| panic!("{name} is in no LIST: {lists:#?}"));
        assert!(listed["kind"].is_string() && listed["why"].is_string(), "{listed}");
    }
}

/// All lines of all lists, and all files.
fn quarantine(root: &Path) -> (Vec<Value>, BTreeMap<PathBuf, Vec<u8>>) {
    let dir = root.join(".coldspare/quarantine");
    if !dir.exists() {
        return Default::default();
    }
    let mut kept = contents(&dir);
    let mut lists = Vec::new();
    for entry in fs::read_dir(&dir).unwrap() {
        let list = entry.unwrap().file_name();
        if let Some(text) = kept.remove(&Path::new(&list).join("LIST")) {
            lists.extend(String::from_utf8(text).unwrap().lines().map(|l| serde_json::from_str::<Value>(l).unwrap()));
        }
    }
    (lists, kept)
}

/// How much of a push has arrived in git's own quarantine.
fn incoming_bytes(bare: &Path) -> u64 {
    let walk = walkdir::WalkDir::new(bare.join("objects")).into_iter().filter_map(Result::ok);
    let incoming = walk.filter(|e| e.path().to_string_lossy().contains("incoming"));
    incoming.filter_map(|e| e.metadata().ok()).filter(fs::Metadata::is_file).map(|m| m.len()).sum()
}

/// References and objects without content.
fn empty_files(bare: &Path) -> Vec<PathBuf> {
    let parts = ["refs", "objects", "packed-refs"].map(|part| walkdir::WalkDir::new(bare.join(part)));
    let files = parts.into_iter().flatten().filter_map(Result::ok).filter(|e| e.file_type().is_file());
    let is_transient = |path: &Path| path.to_string_lossy().contains("incoming") || path.extension().is_some_and(|e| e == "lock");
    files.filter(|e| e.metadata().unwrap().len() == 0).map(walkdir::DirEntry::into_path).filter(|p| !is_transient(p)).collect()
}

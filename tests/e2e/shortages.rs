//! No permission, no space, a work folder that is elsewhere.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::image::Mount;
use crate::pair::{Host, Pair, free_port, succeeds, until};
use crate::seed::Seed;

#[test]
fn an_unreadable_file_is_held_back_and_the_rest_goes_on() {
    const NOBODY: u32 = 65_534;
    let setpriv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"].map(String::from);
    if !rustix::process::geteuid().is_root() || !succeeds("setpriv", &["--reuid=65534", "--regid=65534", "--clear-groups", "true"]) {
        return println!("skipped: setpriv can't change the user here");
    }
    let mut pair = Pair::new();
    fs::set_permissions(pair.dir.path(), Permissions::from_mode(0o755)).unwrap();
    pair.standby.start();
    pair.active.write("shared/readable", "readable");
    let secret = pair.active.write("shared/secret", "secret");
    own(pair.active.home.parent().unwrap(), NOBODY);
    chown(&secret, Some(0), Some(0)).unwrap();
    fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
    pair.active.wrapper = setpriv.to_vec();
    if pair.active.run(&["check"]).code == 126 {
        return println!("skipped: another user can't run the program where it was built");
    }
    let ran = pair.active.run(&["send", "--once"]).expect(1, "held back: shared/secret");
    assert!(ran.err.contains("unreadable"), "{ran:?}");
    assert_eq!(fs::read(pair.standby.home.join("shared/readable")).unwrap(), b"readable");
    assert!(!pair.standby.home.join("shared/secret").exists());
    pair.standby.run(&["verify", "--deep"]).expect_code(0);

    fs::set_permissions(&secret, Permissions::from_mode(0o644)).unwrap();
    pair.active.run(&["send", "--once"]).expect_code(0);
    pair.assert_equal();
}

/// A pair whose standby's home is on a small filesystem.
fn with_a_small_standby() -> Option<(Pair, Mount)> {
    with_a_standby_of(24 << 20)
}

fn with_a_standby_of(bytes: u64) -> Option<(Pair, Mount)> {
    let mut pair = Pair::new();
    let mut standby = Host::new(pair.dir.path(), "small", "receive");
    let mount = Mount::ext4(&pair.dir.path().join("image"), bytes, &standby.home)?;
    let mut active = Host::new(pair.dir.path(), "large", "send");
    active.init_active(&standby.init_standby(free_port())).expect_code(0);
    std::mem::swap(&mut pair.standby, &mut standby);
    std::mem::swap(&mut pair.active, &mut active);
    pair.standby.start();
    Some((pair, mount))
}

/// Writes noise at once: what is seen while it is written is sent in part.
fn written(pair: &Pair, name: &str, seed: u64, bytes: usize) -> PathBuf {
    let noise = Seed::new(seed).noise(bytes);
    let _frozen = pair.active.freeze();
    pair.active.write(name, noise)
}

#[test]
fn a_full_standby_keeps_its_last_point_and_goes_on_once_there_is_room() {
    let Some((mut pair, mount)) = with_a_small_standby() else { return };
    pair.active.write("shared/small", "small");
    pair.send_once();

    let large = pair.active.write("shared/large", Seed::new(1).noise(32 << 20));
    pair.active.run(&["send", "--once"]).expect(5, "space");
    pair.standby.run(&["verify", "--deep"]).expect_code(0);
    fs::remove_file(large).unwrap();
    pair.send_once();
    pair.assert_equal();
    pair.standby.run(&["verify", "--deep"]).expect_code(0);
    pair.standby.kill();
    drop(mount);
}

#[test]
fn the_active_says_at_every_look_that_the_standby_is_full() {
    let Some((mut pair, mount)) = with_a_small_standby() else { return };
    pair.active.start();
    pair.checkpoint();
    let large = written(&pair, "shared/large", 1, 32 << 20);
    let trouble = |pair: &Pair| pair.active.status()["trouble"].as_str().map(String::from);
    // What ended the connection may be heard of first.
    until("it is said", || trouble(&pair).is_some_and(|text| text.contains("space")));
    for _ in 0..40 {
        assert!(trouble(&pair).is_some_and(|text| text.contains("space")), "{:?}", trouble(&pair));
        std::thread::sleep(std::time::Duration::from_millis(100)); // looks at any moment of its tries
    }
    fs::remove_file(large).unwrap();
    pair.checkpoint();
    assert_eq!(trouble(&pair), None);
    pair.assert_equal();
    pair.standby.kill();
    drop(mount);
}

#[test]
fn what_the_standby_has_no_room_for_waits_and_the_rest_goes_on() {
    const LARGE: usize = 48 << 20;
    let Some((mut pair, mount)) = with_a_standby_of(130 << 20) else { return };
    pair.active.start();
    let first = written(&pair, "shared/first", 1, LARGE);
    pair.checkpoint();
    // What the first took, with what was lost on the way, doesn't matter.
    let sent = || pair.active.status()["bytes_sent"].as_u64().unwrap();
    let before = sent();
    let second = written(&pair, "shared/second", 2, LARGE);
    let trouble = |pair: &Pair| pair.active.status()["trouble"].as_str().map(String::from);
    until("it is said", || trouble(&pair).is_some_and(|text| text.contains("no space on the standby for shared/second (48.00 MiB)")));
    for n in 0..3 {
        pair.active.write("shared/small", format!("{n}"));
        until("the rest goes on", || fs::read(pair.standby.home.join("shared/small")).is_ok_and(|there| there == n.to_string().as_bytes()));
        std::thread::sleep(std::time::Duration::from_secs(3)); // the standby is asked again meanwhile
    }
    assert!(!pair.standby.home.join("shared/second").exists());
    pair.active.run(&["checkpoint", "--timeout", "1s"]).expect(3, "not durable on the standby in time");
    let sent = sent() - before;
    assert!(sent < LARGE as u64 / 4, "{sent} bytes were sent");
    // The first is in the history then, which gives way.
    fs::remove_file(first).unwrap();
    pair.checkpoint();
    assert_eq!(trouble(&pair), None);
    pair.assert_equal();
    // What goes before there was room for it is forgotten.
    written(&pair, "shared/third", 3, LARGE);
    until("it is said", || trouble(&pair).is_some());
    fs::remove_file(pair.active.home.join("shared/third")).unwrap();
    pair.checkpoint();
    assert_eq!(trouble(&pair), None);
    fs::remove_file(second).unwrap();
    pair.checkpoint();
    pair.assert_equal();
    pair.standby.kill();
    drop(mount);
}

/// The active's part `of` a host is on a small filesystem that somebody else fills up.
fn goes_on_after_a_full(of: impl Fn(&Host) -> PathBuf) {
    let mut pair = Pair::new();
    let full = of(&pair.active);
    let Some(mount) = Mount::instead_of(&full, 24 << 20) else { return };
    pair.standby.start();
    pair.active.start();
    pair.active.write("shared/before", "before");
    pair.checkpoint();

    fill(&full);
    // Enough to need room in the index, in folders that were there, were there room.
    for n in 0..3000 {
        let _ = fs::write(pair.active.home.join(format!("shared/{n:-<200}")), "");
    }
    let had_room = pair.active.run(&["checkpoint", "--timeout", "5s"]).code == 0;
    assert!(pair.active.is_running(), "the daemon didn't survive a full disk");
    // Unless there was room enough. The daemon begins anew where that may help: who asks just then gets no answer.
    until("it says so", || {
        let answer = pair.active.run(&["status", "--json"]);
        let says = |status: &Value| had_room || status["trouble"].is_string() || pair.active.log().contains("space");
        answer.code == 0 && says(&answer.json())
    });

    fs::remove_file(full.join("filler")).unwrap();
    pair.active.write("shared/after", "after");
    until("replication goes on by itself", || pair.active.run(&["checkpoint", "--timeout", "60s"]).code == 0);
    pair.assert_equal();
    assert!(pair.active.is_running(), "it went on by itself");
    pair.active.kill();
    drop(mount);
}

/// Takes all room.
fn fill(dir: &Path) {
    let mut filler = fs::File::create(dir.join("filler")).unwrap();
    let mut block = vec![1_u8; 1 << 20];
    while !block.is_empty() {
        if std::io::Write::write_all(&mut filler, &block).is_err() {
            block.truncate(block.len() / 2);
        }
    }
    filler.sync_all().unwrap();
}

#[test]
fn a_full_state_folder_of_the_active_is_said_and_replication_goes_on_once_there_is_room() {
    goes_on_after_a_full(Host::state);
}

#[test]
fn a_full_home_of_the_active_is_no_reason_to_stop() {
    goes_on_after_a_full(|host| host.home.clone());
}

#[test]
fn a_work_folder_on_another_filesystem_is_refused() {
    let pair = Pair::new();
    let work = pair.standby.home.join(".coldspare");
    let marker = fs::read(work.join("root")).unwrap();
    let Some(mount) = Mount::new(&["-t", "tmpfs", "tmpfs"], &work) else {
        return println!("skipped: nothing can be mounted here");
    };
    fs::write(work.join("root"), marker).unwrap();
    let ran = pair.standby.run(&["receive"]);
    drop(mount);
    ran.expect(2, ".coldspare");
}

fn own(path: &Path, user: u32) {
    for entry in walkdir::WalkDir::new(path) {
        std::os::unix::fs::lchown(entry.unwrap().path(), Some(user), Some(user)).unwrap();
    }
}

//! No permission, no space, a work folder that is elsewhere.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use crate::pair::{Host, Pair, free_port, run, succeeds};

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

#[test]
fn a_full_standby_keeps_its_last_point_and_goes_on_once_there_is_room() {
    let mut pair = Pair::new();
    // The standby's home is on a small filesystem; it is initialised again there.
    let image = pair.dir.path().join("image");
    fs::File::create(&image).unwrap().set_len(24 << 20).unwrap();
    if !succeeds("mkfs.ext4", &["-q", &image.to_string_lossy()]) {
        return println!("skipped: mkfs.ext4 is missing");
    }
    let mut standby = Host::new(pair.dir.path(), "small", "receive");
    let Some(mount) = Mount::new(&["-o", "loop", &image.to_string_lossy()], &standby.home) else {
        return println!("skipped: a loop image can't be mounted here");
    };
    let _ = fs::remove_dir(standby.home.join("lost+found"));
    let mut active = Host::new(pair.dir.path(), "large", "send");
    active.init_active(&standby.init_standby(free_port())).expect_code(0);
    std::mem::swap(&mut pair.standby, &mut standby);
    std::mem::swap(&mut pair.active, &mut active);
    pair.standby.start();
    pair.active.write("shared/small", "small");
    pair.send_once();

    let large = pair.active.write("shared/large", noise(32 << 20));
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

/// A mount that ends with the test.
struct Mount(PathBuf);

impl Mount {
    fn new(args: &[&str], at: &Path) -> Option<Mount> {
        let mut all = args.to_vec();
        let path = at.to_string_lossy();
        all.push(&path);
        succeeds("mount", &all).then(|| Mount(at.into()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        run(std::process::Command::new("umount").arg("-l").arg(&self.0));
    }
}

fn own(path: &Path, user: u32) {
    for entry in walkdir::WalkDir::new(path) {
        std::os::unix::fs::lchown(entry.unwrap().path(), Some(user), Some(user)).unwrap();
    }
}

/// Bytes that don't shrink.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

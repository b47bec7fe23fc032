//! Nobody else writes on the standby: what does is noticed at once, told, and put right, or can't be done at all.

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::everything::flip_byte;
use crate::git::{self, commit, git_ok, push};
use crate::pair::{Pair, Ran, run, until};

const REPOSITORY: &str = "shared/data/repositories/1";
/// Within so long a write is noticed, unless the host stands still at that moment.
const NOTICED_WITHIN_MS: u64 = 2000;

/// A pair that follows, with some files and a repository; the standby watches by this backend. `None`, said, where that is
/// not to be had.
fn following(backend: &str, settings: &str) -> Option<(Pair, PathBuf)> {
    let mut pair = Pair::new();
    pair.standby.configure(&format!("[hands_off]\nwatch = \"{}\"\n{settings}", if backend == "fanotify" { "auto" } else { backend }));
    pair.standby.start();
    let watch = &pair.standby.status()["watch"];
    if backend == "fanotify" && watch["backend"] != backend {
        println!("skipped: {watch}");
        return None;
    }
    pair.active.start();
    let (bare, clone) = (pair.active.home.join(REPOSITORY), pair.dir.path().join("clone"));
    git::init_bare(&bare);
    git::clone(&bare, &clone);
    commit(&clone, "file", "content");
    push(&clone, &["HEAD:main"]);
    pair.active.write("shared/file", "content\n".repeat(99));
    pair.active.write("shared/folder/a/b", "deep");
    symlink("file", pair.active.home.join("shared/link")).unwrap();
    let linked = pair.active.write("shared/linked", "several names");
    fs::hard_link(linked, pair.active.home.join("shared/second name")).unwrap();
    pair.checkpoint();
    pair.assert_equal();
    Some((pair, clone))
}

fn foreign(pair: &Pair) -> Value {
    pair.standby.status()["foreign_writes"].clone()
}

/// The finding of a path, by its newest.
fn finding(pair: &Pair, path: &str) -> Option<Value> {
    foreign(pair)["last"].as_array().unwrap().iter().find(|f| f["path"] == path).cloned()
}

/// Writes on the standby; that is noticed at `path` as `kind`, by whom, and put right. What is found says how soon, as
/// `noticed_after_ms`.
#[track_caller]
fn check(pair: &Pair, path: &str, kind: &str, write: impl FnOnce(&Path)) -> Value {
    let before = foreign(pair)["total"].as_u64().unwrap();
    // At once: what takes several calls is not to be found, and put right, in the midst of them.
    let frozen = pair.standby.freeze();
    write(&pair.standby.home.join(path));
    let written_ms = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64;
    drop(frozen);
    until(path, || foreign(pair)["total"].as_u64().unwrap() > before);
    until(path, || finding(pair, path).is_some_and(|f| f["state"] == "right"));
    let mut found = finding(pair, path).unwrap();
    assert_eq!(found["kind"], kind, "{found:#}");
    // What else it led to may be put right a moment later.
    until("the trees are equal", || pair.differences().is_empty());
    found["noticed_after_ms"] = found["found_ms"].as_u64().unwrap().saturating_sub(written_ms).into();
    found
}

fn check_all(backend: &str) {
    let Some((pair, _)) = following(backend, "") else { return };
    until("the standby watches all of it", || pair.standby.status()["watch"]["coverage"] == 1.0);
    assert_eq!(pair.standby.status()["watch"]["backend"], backend);
    let mut noticed = Vec::new();
    let mut note = |found: Value| noticed.push(found["noticed_after_ms"].as_u64().unwrap());
    let found = check(&pair, "shared/foreign", "extra", |path| fs::write(path, "not from the active").unwrap());
    if backend == "fanotify" {
        assert_eq!(found["by"]["pid"], std::process::id(), "{found:#}");
        assert_eq!(found["by"]["program"], std::env::current_exe().unwrap().to_str().unwrap());
        assert!(pair.standby.log().contains(&format!("process {}", std::process::id())), "who did it is not in the log");
    }
    assert!(!pair.active.home.join("shared/foreign").exists(), "it was shipped back");
    note(found);
    note(check(&pair, "shared/file", "content", |path| fs::write(path, "short").unwrap()));
    note(check(&pair, "shared/folder", "missing", |path| fs::remove_dir_all(path).unwrap()));
    note(check(&pair, "shared/link", "target", |path| {
        fs::remove_file(path).unwrap();
        symlink("elsewhere", path).unwrap();
    }));
    note(check(&pair, "shared/linked", "mode", |path| fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap()));
    note(check(&pair, REPOSITORY, "missing", |path| fs::rename(path, path.with_extension("moved")).unwrap()));
    note(check(&pair, "shared/folder/a", "kind", |path| {
        fs::remove_dir_all(path).unwrap();
        fs::write(path, "a file in the place of a folder").unwrap();
    }));
    if backend == "fanotify" {
        // Neither size nor time tell of this one.
        note(check(&pair, "shared/linked", "content", |path| {
            let other_name = path.with_file_name("second name");
            let modified = fs::metadata(path).unwrap().modified().unwrap();
            flip_byte(&other_name, 3);
            File::options().write(true).open(other_name).unwrap().set_modified(modified).unwrap();
        }));
    }
    // All but one, which may meet a host that stands still.
    noticed.sort_unstable();
    assert!(noticed[noticed.len() - 2] < NOTICED_WITHIN_MS, "noticed after {noticed:?} ms");
    git::assert_clean(&pair.standby.home.join(REPOSITORY));
    // What was foreign is still to be had.
    let kept = walkdir::WalkDir::new(pair.standby.home.join(".coldspare/quarantine")).into_iter().filter_map(Result::ok);
    let kept: Vec<Vec<u8>> = kept.filter(|e| e.file_type().is_file()).map(|e| fs::read(e.path()).unwrap()).collect();
    assert!(kept.iter().any(|content| content == b"not from the active"), "what was foreign is gone");
    pair.standby.run(&["verify", "--deep"]).expect_code(0);
}

#[test]
fn by_fanotify_a_foreign_write_is_noticed_within_two_seconds_told_and_put_right() {
    check_all("fanotify");
}

#[test]
fn by_inotify_a_foreign_write_is_noticed_within_two_seconds_told_and_put_right() {
    check_all("inotify");
}

#[test]
fn what_the_receiver_writes_is_no_foreign_write() {
    for backend in ["fanotify", "inotify"] {
        let Some((pair, clone)) = following(backend, "") else { continue };
        let bare = pair.active.home.join(REPOSITORY);
        for n in 0..30 {
            commit(&clone, "file", &format!("content {n}"));
            push(&clone, &["+HEAD:main", &format!("+HEAD:refs/heads/b{}", n % 5)]);
            pair.active.write(&format!("shared/new{n}/file{}", n % 7), format!("{n}\n").repeat(n % 100));
            match n % 10 {
                3 => drop(git_ok(&bare, &["pack-refs", "--all"])),
                6 => drop(git_ok(&bare, &["repack", "-q", "-ad"])),
                9 => fs::remove_dir_all(pair.active.home.join(format!("shared/new{}", n - 1))).unwrap(),
                _ => {}
            }
        }
        pair.checkpoint();
        pair.assert_equal();
        // A write of somebody else's is noticed after all that, and is the only one.
        check(&pair, "shared/foreign", "extra", |path| fs::write(path, "").unwrap());
        let found = foreign(&pair);
        let only = found["last"].as_array().unwrap().iter().all(|f| f["path"] == "shared/foreign" || f["path"] == "shared");
        assert!(only, "{backend}: {found:#}");
    }
}

#[test]
fn a_path_that_is_written_again_and_again_is_put_right_ever_later() {
    let Some((pair, _)) = following("fanotify", "") else { return };
    let mut took = Vec::new();
    for _ in 0..4 {
        let began = Instant::now();
        check(&pair, "shared/file", "content", |path| fs::write(path, "again").unwrap());
        took.push(began.elapsed());
    }
    assert_eq!(finding(&pair, "shared/file").unwrap()["times"], 4);
    let pauses = [0, 1, 2, 4].map(Duration::from_secs);
    assert!(took.iter().zip(pauses).all(|(took, pause)| *took >= pause), "{took:?}");
}

#[test]
fn without_healing_it_is_told_and_left_until_a_person_repairs_it() {
    let dir = tempfile::tempdir().unwrap();
    let told = dir.path().join("told");
    let script = dir.path().join("tell");
    fs::write(&script, format!("#!/bin/sh\necho \"$COLDSPARE_EVENT: $COLDSPARE_MESSAGE\" >>'{}'\n", told.display())).unwrap();
    fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
    let hook = format!("heal = false\n[hooks]\nnotify = {{ command = [\"{}\"] }}\n", script.display());
    let Some((pair, _)) = following("fanotify", &hook) else { return };
    let path = pair.standby.home.join("shared/file");
    fs::write(&path, "foreign").unwrap();
    until("it is told", || finding(&pair, "shared/file").is_some());
    until("people are told", || fs::read_to_string(&told).is_ok_and(|text| text.contains("foreign-write") && text.contains("shared/file")));
    pair.active.write("shared/other", "another change");
    pair.checkpoint();
    assert_eq!(fs::read(&path).unwrap(), b"foreign", "it was put right");
    assert_eq!(finding(&pair, "shared/file").unwrap()["state"], "found");
    pair.standby.run(&["verify", "--repair"]).expect_code(0);
    pair.assert_equal();
}

#[test]
fn what_was_written_while_nobody_watched_is_found_at_the_start() {
    let Some((mut pair, _)) = following("fanotify", "") else { return };
    pair.standby.kill();
    fs::write(pair.standby.home.join("shared/foreign"), "meanwhile").unwrap();
    fs::remove_file(pair.standby.home.join("shared/linked")).unwrap();
    pair.standby.start();
    for path in ["shared/foreign", "shared/linked"] {
        until(path, || finding(&pair, path).is_some_and(|f| f["state"] == "right" && f["by"].is_null()));
    }
    pair.assert_equal();
    let names = fs::metadata(pair.standby.home.join("shared/linked")).unwrap().nlink();
    assert_eq!(names, 2, "its other name is another file");
}

/// Mounts of their own, for commands that are run by the wrapper; gone when dropped.
struct Mounts(Child);

impl Mounts {
    /// `None`, said, where nothing can be mounted.
    fn own() -> Option<Mounts> {
        let script = "mount --bind /tmp /tmp && umount /tmp && echo ready && exec sleep 100000";
        let mut command = Command::new("unshare");
        let child = command.args(["--mount", "--propagation", "private", "sh", "-c", script]).stdout(Stdio::piped()).spawn();
        let mut own = Mounts(child.ok()?);
        let mut line = String::new();
        BufReader::new(own.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if line != "ready\n" {
            println!("skipped: nothing can be mounted here");
            return None;
        }
        Some(own)
    }

    fn wrapper(&self) -> Vec<String> {
        ["nsenter", "--target", &self.0.id().to_string(), "--mount", "--"].map(String::from).to_vec()
    }

    /// Runs a shell command there, in a folder.
    fn sh(&self, folder: &Path, script: &str) -> Ran {
        let wrapper = self.wrapper();
        let script = format!("cd '{}' && {script}", folder.display());
        run(Command::new(&wrapper[0]).args(&wrapper[1..]).args(["sh", "-c", &script]))
    }

    /// Nobody can write in a home, in any way.
    #[track_caller]
    fn assert_sealed(&self, home: &Path) {
        let home_text = home.display();
        for script in [
            format!("touch {home_text}/new"),
            format!("touch {home_text}/shared/file"),
            format!("echo more >>{home_text}/shared/file"),
            format!("rm {home_text}/shared/file"),
            format!("chmod 777 {home_text}/shared/file"),
            format!("mv {home_text}/shared/file {home_text}/shared/moved"),
            format!("rm -r {home_text}/.coldspare/quarantine {home_text}/.coldspare/stage"),
        ] {
            let ran = self.sh(Path::new("/"), &script);
            assert!(ran.code != 0 && ran.err.contains("Read-only file system"), "{script}: {ran:?}");
        }
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_sealed_standby_is_written_by_its_receiver_only_until_it_is_promoted() {
    let Some(mounts) = Mounts::own() else { return };
    let mut pair = Pair::new();
    pair.standby.configure("[hands_off]\nseal = true\n");
    pair.standby.wrapper = mounts.wrapper();
    pair.active.write("shared/file", "content");
    pair.standby.start();
    pair.active.start();
    pair.checkpoint();
    let seal = pair.standby.status()["seal"].clone();
    assert_eq!(seal["state"], "sealed", "{seal}");
    if !seal["seen_by_all"].is_null() {
        assert_eq!(seal["seen_by_all"], false, "these mounts are not the host's");
    }
    mounts.assert_sealed(&pair.standby.home);
    mounts.assert_sealed(&pair.standby.home.canonicalize().unwrap());

    pair.active.write("shared/new/file", "replication goes on");
    fs::remove_file(pair.active.write("shared/gone", "gone")).unwrap();
    pair.checkpoint();
    pair.assert_equal();
    // The test itself sees the folder as it is: that is noticed all the same.
    fs::write(pair.standby.home.join("shared/foreign"), "by another way").unwrap();
    // With the folder that it was in: a kill may come before that.
    until("it is put right", || finding(&pair, "shared/foreign").is_some_and(|f| f["state"] == "right"));
    assert!(!pair.standby.home.join("shared/foreign").exists());

    pair.standby.kill();
    mounts.assert_sealed(&pair.standby.home);
    pair.standby.run(&["verify", "--deep"]).expect_code(0);
    pair.active.write("shared/meanwhile", "written while the receiver was dead");
    pair.standby.start();
    pair.checkpoint();
    pair.assert_equal();
    mounts.assert_sealed(&pair.standby.home);
    assert_eq!(mounts.sh(Path::new("/"), &format!("grep -c ' {} ' /proc/self/mountinfo", pair.standby.home.display())).out, "1\n");

    pair.active.kill();
    until("the standby knows", || pair.standby.status()["connected"] == false);
    pair.standby.run(&["promote", "--accept-possible-loss"]).expect_code(0);
    let script = format!("touch {0}/by-the-application && rm {0}/shared/file", pair.standby.home.display());
    let written = mounts.sh(Path::new("/"), &script);
    assert_eq!(written.code, 0, "{written:?}");
    assert!(pair.standby.home.join("by-the-application").exists() && !pair.standby.home.join("shared/file").exists());
}

#[test]
fn the_seal_follows_the_roles() {
    let Some(mounts) = Mounts::own() else { return };
    let mut pair = Pair::running();
    pair.active.write("shared/file", "content");
    pair.checkpoint();
    for host in [&mut pair.standby, &mut pair.active] {
        host.kill();
        host.configure("[hands_off]\nseal = true\n");
        host.wrapper = mounts.wrapper();
        host.start();
    }
    pair.checkpoint();
    mounts.assert_sealed(&pair.standby.home);
    assert_eq!(mounts.sh(&pair.active.home, "touch shared/by-the-application").code, 0);
    pair.active.run(&["switchover"]).expect_code(0);
    until("the new active is up", || pair.standby.run(&["checkpoint"]).code == 0);
    assert_eq!(mounts.sh(&pair.standby.home, "touch shared/by-the-new-active").code, 0);
    until("the new active is up", || pair.standby.run(&["checkpoint"]).code == 0);
    assert!(pair.active.home.join("shared/by-the-new-active").exists());
    mounts.assert_sealed(&pair.active.home);
    // By hand, while no daemon runs.
    pair.active.kill();
    mounts.assert_sealed(&pair.active.home);
    pair.active.run(&["unseal"]).expect_code(0);
    assert_eq!(mounts.sh(&pair.active.home, "touch shared/file").code, 0);
    pair.active.run(&["seal"]).expect_code(0);
    mounts.assert_sealed(&pair.active.home);
    pair.standby.run(&["seal"]).expect(2, "only a standby is sealed");
    // Without the setting the next start takes it off.
    let config = fs::read_to_string(pair.active.config()).unwrap();
    fs::write(pair.active.config(), config.replace("seal = true", "seal = false")).unwrap();
    pair.active.start();
    assert_eq!(pair.active.status()["seal"]["state"], "open");
    assert_eq!(mounts.sh(&pair.active.home, "touch shared").code, 0);
}

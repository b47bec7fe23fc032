//! A standby that can be trusted: whatever differs there is found, named, and put right; nothing else is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::everything::flip_byte;
use crate::git::{self, Stash, commit, git_ok, loose_object, packs, push, tip};
use crate::pair::{Pair, until};
use crate::seed::number_from_env;

const REPOSITORY: &str = "shared/data/repositories/1";
const FROM: &str = "stash-refs/pull-requests/1/from";
/// More than so many changesets are to be met by the looks beside a writer.
const SEQS_MIN: usize = 3;

/// A pair that follows, with a repository and files of every kind.
struct Setting {
    pair: Pair,
    clone: PathBuf,
}

impl Setting {
    fn new() -> Setting {
        let mut pair = Pair::new();
        // What is damaged here stays so until a test asks.
        pair.standby.configure("[hands_off]\nwatch = \"scan\"\n");
        pair.standby.start();
        pair.active.start();
        let (bare, clone) = (pair.active.home.join(REPOSITORY), pair.dir.path().join("clone"));
        git::init_bare(&bare);
        git::clone(&bare, &clone);
        let first = commit(&clone, "file", &"packed\n".repeat(999));
        push(&clone, &["HEAD:main", "HEAD:refs/heads/old"]);
        Stash::of(&bare).write(FROM, &first);
        git_ok(&bare, &["repack", "-q", "-ad"]);
        commit(&clone, "file", "packed reference");
        push(&clone, &["HEAD:main"]);
        git_ok(&bare, &["pack-refs", "--all"]);
        commit(&clone, "other", "loose");
        push(&clone, &["HEAD:refs/heads/topic"]);
        pair.active.write("shared/data/file", "content\n".repeat(99));
        pair.active.write("shared/data/folder/a/b", "deep");
        pair.active.write("shared/data/folder/c", "");
        symlink("file", pair.active.home.join("shared/data/link")).unwrap();
        let linked = pair.active.write("shared/data/linked", "several names");
        fs::hard_link(linked, pair.active.home.join("shared/data/second name")).unwrap();
        let attributed = pair.active.write("shared/data/attributed", "attributes");
        rustix::fs::setxattr(&attributed, "user.note", b"note", rustix::fs::XattrFlags::empty()).unwrap();
        pair.checkpoint();
        pair.assert_equal();
        Setting { pair, clone }
    }

    fn there(&self, name: &str) -> PathBuf {
        self.pair.standby.home.join(name)
    }

    fn verify(&self, more: &[&str], code: i32) -> Value {
        let args = [&["verify", "--deep", "--git", "--json"], more].concat();
        self.pair.standby.run(&args).expect_code(code).json()
    }

    /// Damages the standby; that is found at `path` as `kind`, and repaired.
    #[track_caller]
    fn check(&self, path: &str, kind: &str, damage: impl FnOnce(&Path)) {
        damage(&self.there(path));
        let found = self.verify(&[], 1);
        assert!(names(&found, path, kind), "{path} as {kind}: {found:#}");
        let repaired = self.verify(&["--repair"], 0);
        assert_eq!(repaired["verdict"], "consistent", "{repaired:#}");
        assert!(repaired["repair"]["repaired"].as_array().unwrap().iter().any(|p| p["path"] == path), "{repaired:#}");
        self.pair.checkpoint();
        self.pair.assert_equal();
        git::assert_clean(&self.there(REPOSITORY));
    }
}

fn names(found: &Value, path: &str, kind: &str) -> bool {
    found["problems"].as_array().unwrap().iter().any(|p| p["path"] == path && p["kind"] == kind)
}

fn relative(home: &Path, path: &Path) -> String {
    path.strip_prefix(home).unwrap().to_string_lossy().into_owned()
}

fn in_repository(name: &str) -> String {
    format!("{REPOSITORY}/{name}")
}

#[test]
fn a_damaged_file_is_named_and_comes_again() {
    let s = Setting::new();
    assert_eq!(s.verify(&[], 0)["git"]["repositories"], 1);
    s.check("shared/data/file", "content", |path| flip_byte(path, 100));
    s.check("shared/data/file", "missing", |path| fs::remove_file(path).unwrap());
    s.check("shared/data/file", "kind", |path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
    });
    s.check("shared/data/folder", "missing", |path| fs::remove_dir_all(path).unwrap());
    s.check("shared/data/linked", "content", |path| flip_byte(path, 3));
    s.check("shared/data/second name", "hardlink", |path| {
        fs::remove_file(path).unwrap();
        fs::write(path, "several names").unwrap();
    });
    // What was damaged, or in the place of something, is still to be had.
    let quarantine = fs::read_dir(s.there(".coldspare/quarantine")).unwrap().count();
    assert!(quarantine >= 3, "{quarantine} in quarantine");
}

#[test]
fn damage_of_a_repository_is_named_and_comes_again() {
    let s = Setting::new();
    let home = s.pair.standby.home.clone();
    let pack = relative(&home, &packs(&s.there(REPOSITORY))[0]);
    s.check(&pack, "content", |path| flip_byte(path, 60));
    s.check(&pack.replace(".pack", ".idx"), "content", |path| flip_byte(path, 1100));
    s.check(&pack, "missing", |path| fs::remove_file(path).unwrap());
    let object = relative(&home, &loose_object(&s.there(REPOSITORY), &tip(&s.clone, "HEAD")));
    s.check(&object, "content", |path| flip_byte(path, 10));
    s.check(&object, "missing", |path| fs::remove_file(path).unwrap());
    for name in ["refs/heads/topic", "packed-refs", FROM] {
        s.check(&in_repository(name), "content", |path| flip_byte(path, 30));
    }
    // git's own check finds nothing wrong with this one.
    let old = tip(&s.there(REPOSITORY), "refs/heads/old");
    s.check(&in_repository("refs/heads/main"), "extra", |path| {
        fs::write(path, format!("{old}\n")).unwrap();
        git::assert_clean(&s.there(REPOSITORY));
    });
    s.check(&in_repository("refs/heads/topic.lock"), "leftover", |path| drop(File::create(path).unwrap()));
    s.check(&in_repository("objects/tmp_obj_x"), "leftover", |path| drop(File::create(path).unwrap()));
    // Without reading every byte git says which repository it is, and the repair finds the file.
    flip_byte(&s.there(&pack), 60);
    s.pair.standby.run(&["verify", "--git", "--repair"]).expect_code(0);
    s.pair.assert_equal();
}

#[test]
fn what_the_manifest_says_is_put_right_without_the_active() {
    let s = Setting::new();
    s.check("shared/data/file", "mode", |path| fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap());
    s.check("shared/data/folder", "mode", |path| fs::set_permissions(path, Permissions::from_mode(0o700)).unwrap());
    if rustix::process::geteuid().is_root() {
        s.check("shared/data/file", "owner", |path| std::os::unix::fs::chown(path, Some(12_345), None).unwrap());
    }
    s.check("shared/data/attributed", "attributes", |path| {
        rustix::fs::setxattr(path, "user.note", b"other", rustix::fs::XattrFlags::empty()).unwrap();
    });
    s.check("shared/data/file", "time", |path| {
        File::options().write(true).open(path).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
    });
    s.check("shared/data/link", "target", |path| {
        fs::remove_file(path).unwrap();
        symlink("elsewhere", path).unwrap();
    });
    s.check("shared/data/foreign", "extra", |path| drop(File::create(path).unwrap()));
    s.check("shared/data/foreign", "extra", |path| {
        fs::create_dir(path).unwrap();
        fs::write(path.join("inside"), "kept").unwrap();
    });
    let kept = walkdir::WalkDir::new(s.there(".coldspare/quarantine")).into_iter().filter_map(Result::ok);
    assert!(kept.into_iter().any(|e| e.file_name() == "inside"), "what was foreign is gone");
}

#[test]
fn without_the_active_a_repair_does_what_it_can_and_says_what_is_left() {
    let mut s = Setting::new();
    s.pair.active.kill();
    until("the standby knows", || s.pair.standby.status()["connected"] == false);
    fs::remove_file(s.there("shared/data/file")).unwrap();
    fs::set_permissions(s.there("shared/data/attributed"), Permissions::from_mode(0o777)).unwrap();
    let left = s.verify(&["--repair"], 3);
    assert_eq!((&left["verdict"], &left["repair"]["active"]), (&"differs".into(), &"unreachable".into()), "{left:#}");
    assert!(names(&left, "shared/data/file", "missing") && left["problems"].as_array().unwrap().len() == 1, "{left:#}");
    // Nor does a restart forget it, or a damaged file count as good because a quick look can't tell.
    flip_byte(&s.there("shared/data/folder/a/b"), 1);
    s.verify(&["--repair"], 3);
    s.pair.standby.kill();
    let quick = s.pair.standby.run(&["verify", "--json"]).expect_code(1).json();
    assert!(names(&quick, "shared/data/folder/a/b", "content"), "{quick:#}");
    s.pair.standby.run(&["verify", "--repair"]).expect_code(3);
    s.pair.standby.start();
    s.pair.active.start();
    until("the content came", || s.pair.standby.run(&["verify", "--deep"]).code == 0);
    s.pair.checkpoint();
    s.pair.assert_equal();
}

#[test]
fn what_is_missing_behind_a_reference_is_found_by_git() {
    let mut pair = Pair::new();
    let (bare, clone) = (pair.active.home.join(REPOSITORY), pair.dir.path().join("clone"));
    git::init_bare(&bare);
    git::clone(&bare, &clone);
    commit(&clone, "file", "content");
    push(&clone, &["HEAD:main"]);
    pair.standby.start();
    pair.send_once();
    // What the daemon puts away once the active is gone is no work of a verification.
    until("the standby knows", || pair.standby.status()["connected"] == false);
    let before = state_of(&pair.standby.home);
    pair.standby.run(&["verify", "--git"]).expect_code(0);
    assert_eq!(state_of(&pair.standby.home), before, "verify changed something");

    // Only a pull request names this one, which git knows nothing of.
    let id = commit(&clone, "pulled", "lost");
    push(&clone, &["HEAD:refs/heads/x"]);
    Stash::of(&bare).write(FROM, &id);
    push(&clone, &[":refs/heads/x"]);
    let blob = tip(&clone, "HEAD:pulled");
    fs::remove_file(loose_object(&bare, &blob)).unwrap();
    pair.send_once();
    pair.standby.run(&["verify", "--deep"]).expect_code(0);
    let found = pair.standby.run(&["verify", "--git", "--json"]).expect_code(1).json();
    assert!(names(&found, REPOSITORY, "objects"), "{found:#}");
    assert!(found["problems"][0]["detail"].as_str().unwrap().contains(&blob), "{found:#}");
    assert_eq!(git::git(&pair.standby.home.join(REPOSITORY), &["fsck", "--full"]).code, 0, "git sees it by itself");
    // The active has it like this too: nothing to be had there.
    pair.standby.run(&["verify", "--git", "--repair"]).expect_code(1);
    fs::write(bare.join("objects/info/alternates"), "/nowhere/objects\n").unwrap();
    pair.send_once();
    let found = pair.standby.run(&["verify", "--git", "--json"]).expect_code(1).json();
    assert!(names(&found, &in_repository("objects/info/alternates"), "alternate"), "{found:#}");
}

#[test]
fn without_git_nothing_is_said_of_repositories() {
    let mut pair = Pair::new();
    pair.active.write("file", "content");
    pair.standby.start();
    pair.send_once();
    pair.standby.kill();
    pair.standby.wrapper = vec!["env".into(), "PATH=/nowhere".into()];
    pair.standby.run(&["verify", "--git"]).expect(2, "git isn't installed");
    pair.standby.run(&["verify"]).expect_code(0);
}

#[test]
fn a_damaged_control_record_is_told_and_written_anew_while_the_active_vouches() {
    let s = Setting::new();
    let control = s.pair.standby.state().join("control");
    for slot in [0, 4096] {
        flip_byte(&control, slot + 30);
        let found = s.verify(&[], 5);
        assert_eq!((&found["verdict"], &found["problems"][0]["kind"]), (&"damaged".into(), &"control".into()), "{found:#}");
        s.verify(&["--repair"], 0);
        s.verify(&[], 0);
    }
    let mut s = s;
    s.pair.active.kill();
    until("the standby knows", || s.pair.standby.status()["connected"] == false);
    flip_byte(&control, 30);
    s.verify(&["--repair"], 5);
    flip_byte(&control, 4096 + 30);
    s.pair.standby.run(&["verify"]).expect(5, "compare with the other host");
}

#[test]
fn beside_a_writing_active_there_is_no_false_alarm() {
    let s = Setting::new();
    let bare = s.pair.active.home.join(REPOSITORY);
    let is_over = AtomicBool::new(false);
    let looks = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 0;
            while !is_over.load(Ordering::Relaxed) {
                n += 1;
                let id = commit(&s.clone, "file", &format!("content {n}"));
                push(&s.clone, &["+HEAD:main", &format!("+HEAD:refs/heads/b{}", n % 5)]);
                Stash::of(&bare).write(&format!("stash-refs/pull-requests/{}/from", n % 3), &id);
                s.pair.active.write(&format!("shared/data/file{}", n % 7), format!("{n}\n").repeat(n % 100));
                match n % 10 {
                    3 => git_ok(&bare, &["pack-refs", "--all"]),
                    6 => git_ok(&bare, &["repack", "-q", "-ad"]),
                    9 => git_ok(&bare, &["commit-graph", "write", "--reachable"]),
                    _ => String::new(),
                };
            }
        });
        let (wanted, mut looks) = (number_from_env("COLDSPARE_VERIFIES").unwrap_or(15) as usize, Vec::<Value>::new());
        // Beside a slow writer it takes more of them.
        while looks.len() < wanted || seqs(&looks).len() <= SEQS_MIN && looks.len() < 10 * wanted {
            looks.push(s.pair.standby.run(&["verify", "--deep", "--git", "--json"]).json());
        }
        is_over.store(true, Ordering::Relaxed);
        looks
    });
    let alarms: Vec<&Value> = looks.iter().filter(|found| found["verdict"] != "consistent").collect();
    assert!(alarms.is_empty(), "{alarms:#?}");
    assert!(seqs(&looks).len() > SEQS_MIN, "nothing was written meanwhile: {:?}", seqs(&looks));
}

/// The changesets at which was looked.
fn seqs(looks: &[Value]) -> BTreeSet<u64> {
    looks.iter().filter_map(|found| found["seq"].as_u64()).collect()
}

/// What tells whether anything below a folder changed.
fn state_of(home: &Path) -> BTreeMap<PathBuf, (u64, i64, i64, i64, i64)> {
    let entries = walkdir::WalkDir::new(home).into_iter().map(Result::unwrap);
    let state = |e: walkdir::DirEntry| {
        let m = e.metadata().unwrap();
        (e.into_path(), (m.ino(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()))
    };
    entries.map(state).collect()
}

#[test]
fn a_damaged_manifest_is_told_and_made_good_without_sending_everything() {
    let mut s = Setting::new();
    s.pair.active.write("shared/data/large", crate::seed::Seed::new(7).noise(3_000_000));
    s.pair.checkpoint();
    s.pair.standby.kill();
    s.pair.standby.run(&["verify"]).expect_code(0); // closes the store in good order
    let manifest = s.pair.standby.state().join("manifest.redb");
    let (content, wanted) = (fs::read(&manifest).unwrap(), b"\0shared/data\0file");
    let places: Vec<usize> = content.windows(wanted.len()).enumerate().filter(|(_, w)| w == wanted).map(|(at, _)| at).collect();
    assert!(!places.is_empty(), "the manifest names no such file");
    places.iter().for_each(|at| flip_byte(&manifest, (at + wanted.len() - 1) as u64));
    s.pair.standby.run(&["verify"]).expect(5, "is damaged");
    s.pair.standby.start();
    s.pair.standby.run(&["verify"]).expect(5, "shared/data/fild");
    until("the active is back", || s.pair.standby.status()["connected"] == true);
    let sent = || s.pair.active.status()["bytes_sent"].as_u64().unwrap();
    let before = sent();
    s.verify(&["--repair"], 0);
    s.pair.checkpoint();
    s.pair.assert_equal();
    let took = sent() - before;
    assert!(took < 500_000, "{took} bytes were sent");
    // Without the active it stays said.
    s.pair.active.kill();
    s.pair.standby.kill();
    s.pair.standby.run(&["verify"]).expect_code(0);
    let content = fs::read(&manifest).unwrap();
    let places = content.windows(wanted.len()).enumerate().filter(|(_, w)| w == wanted).map(|(at, _)| at);
    places.for_each(|at| flip_byte(&manifest, (at + wanted.len() - 1) as u64));
    s.pair.standby.run(&["verify", "--repair"]).expect_code(3);
    let left = s.pair.standby.run(&["verify", "--json"]).expect_code(1).json();
    assert!(names(&left, ".", "store"), "{left:#}");
    assert!(s.there("shared/data/file").exists(), "what the manifest may have lost was moved");
}

#[test]
fn the_scrub_goes_over_everything_and_says_what_it_found() {
    let mut s = Setting::new();
    let last = |s: &Setting| s.pair.standby.status()["scrub"]["last"].clone();
    // As it is noted, which is after the daemon says so: a kill may come before.
    let note = s.pair.standby.state().join("scrub");
    let noted = || fs::read(&note).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok()).unwrap_or_default()["last"].clone();
    until("the scrub went over all", || noted().is_object());
    let (first, began_ms) = (last(&s), noted()["began_ms"].clone());
    assert!(first.is_object(), "what is noted is not said");
    assert_eq!(s.pair.standby.status()["scrub"]["days"], 7);
    s.pair.standby.kill();
    flip_byte(&s.there("shared/data/file"), 100);
    // One that is not due is not repeated.
    s.pair.standby.start();
    assert_eq!((&last(&s)["began"], &noted()["began_ms"]), (&first["began"], &began_ms), "the last result is forgotten");
    s.pair.standby.kill();
    fs::remove_file(&note).unwrap();
    s.pair.standby.start();
    until("the scrub went over all", || last(&s).is_object() && noted().is_object());
    let problems = last(&s)["problems"].clone();
    let problems = problems.as_array().unwrap();
    assert!(problems.len() == 1 && problems[0].as_str().unwrap().starts_with("shared/data/file: content"), "{problems:?}");
    until("people see it", || s.pair.standby.run(&["status"]).out.contains("scrub         1 problems"));
    let (age, ended_ms) = (last(&s)["age_seconds"].as_u64().unwrap(), noted()["ended_ms"].as_u64().unwrap());
    let now_ms = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64;
    assert!(age <= now_ms.saturating_sub(ended_ms) / 1000, "{age}");
}

#[test]
fn a_deep_verification_that_was_killed_goes_on_and_reads_again_what_changed_meanwhile() {
    let mut s = Setting::new();
    for n in 0..1200 {
        s.pair.active.write(&format!("shared/data/attachments/{n:04}"), format!("{n:04}").repeat(500));
    }
    s.pair.checkpoint();
    s.pair.standby.kill();
    let verify = |more: &[&str], code: i32| s.pair.standby.run(&[&["verify", "--deep", "--json"], more].concat()).expect_code(code).json();
    let all = verify(&[], 0)["checked_bytes"].as_u64().unwrap();
    let mut command = s.pair.standby.program();
    // Long after the first note it isn't at its end, where the note goes.
    command.args(["verify", "--deep", "--resume", "--bytes-per-second", "200000", "--config"]).arg(s.pair.standby.config());
    let mut child = command.spawn().unwrap();
    let note = s.pair.standby.state().join("verify");
    until("it notes how far it is", || note.exists());
    child.kill().unwrap();
    child.wait().unwrap();
    // Neither size nor time tells of these: one was read before, one wasn't.
    for name in ["0001", "1199"] {
        let path = s.there(&format!("shared/data/attachments/{name}"));
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        flip_byte(&path, 3);
        File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
    }
    let found = verify(&["--resume"], 1);
    for name in ["0001", "1199"] {
        assert!(names(&found, &format!("shared/data/attachments/{name}"), "content"), "{found:#}");
    }
    assert_eq!(found["problems"].as_array().unwrap().len(), 2, "{found:#}");
    let read = found["checked_bytes"].as_u64().unwrap();
    assert!(read > 0 && read < all - 500_000, "{read} of {all} bytes were read again");
    assert!(!note.exists(), "it is over, and would go on from there");
    let again = verify(&["--resume"], 1);
    assert!(again["checked_bytes"].as_u64().unwrap() > all - 10_000, "the next one begins anew");
    s.pair.standby.run(&["verify", "--resume"]).expect_code(2);
}

#[test]
fn a_deep_verification_reads_no_faster_than_it_may() {
    let mut s = Setting::new();
    s.pair.active.write("shared/data/large", crate::seed::Seed::new(7).noise(2_000_000));
    s.pair.checkpoint();
    s.pair.standby.kill();
    let config = s.pair.standby.config();
    let text = fs::read_to_string(&config).unwrap();
    let (without, _) = text.split_once("[verify]").unwrap_or((&text, ""));
    fs::write(&config, format!("{without}[verify]\nbytes_per_second = 250000\n")).unwrap();
    let found = s.pair.standby.run(&["verify", "--deep", "--json"]).expect_code(0).json();
    let slow = found["seconds"].as_f64().unwrap();
    assert!(slow >= 7.6, "{found:#}");
    let faster = s.pair.standby.run(&["verify", "--deep", "--json", "--bytes-per-second", "0"]).expect_code(0).json();
    assert!(faster["seconds"].as_f64().unwrap() < slow / 2.0, "{faster:#}");
}

#[test]
fn what_comes_does_not_wait_for_a_slow_verification() {
    let s = Setting::new();
    for n in 0..1200 {
        s.pair.active.write(&format!("shared/data/attachments/{}/{n:04}", n % 8), format!("{n:04}").repeat(500));
    }
    s.pair.checkpoint();
    let mut command = s.pair.standby.program();
    // Hours of it, for every thread that verifications have.
    command.args(["verify", "--deep", "--bytes-per-second", "1000", "--config"]).arg(s.pair.standby.config());
    let mut verify = command.spawn().unwrap();
    let fds = format!("/proc/{}/fd", s.pair.standby.pid());
    let is_read = |fd: &fs::DirEntry| fs::read_link(fd.path()).is_ok_and(|path| path.to_string_lossy().contains("/attachments/"));
    let reading = || fs::read_dir(&fds).unwrap().filter_map(Result::ok).filter(is_read).count();
    until("all of its threads read", || reading() >= std::thread::available_parallelism().unwrap().get());
    // Large enough to be read and hashed at a time.
    let large = s.pair.active.write("shared/data/large", crate::seed::Seed::new(9).noise(24 << 20));
    s.pair.checkpoint();
    assert_eq!(fs::read(s.there("shared/data/large")).unwrap(), fs::read(large).unwrap());
    assert!(verify.try_wait().unwrap().is_none(), "the verification was over before");
    verify.kill().unwrap();
    verify.wait().unwrap();
}

//! Changes that no event tells of: lost events, folders without a watch, a daemon that wasn't there.

use std::fs;
use std::path::{Path, PathBuf};

use crate::pair::{Pair, succeeds, until};

/// A pair that follows by this backend, with more lines of `[send]`, and with what `before` does before it starts; `None`,
/// said, where it is not to be had.
pub(crate) fn following_by<T>(backend: &str, settings: &str, before: impl FnOnce(&Pair) -> T) -> Option<(Pair, T)> {
    let mut pair = Pair::new();
    let wanted = if backend == "fanotify" { "auto" } else { backend };
    pair.active.configure(&format!("[send]\nwatch = \"{wanted}\"\n{settings}"));
    // Much goes here, by chance.
    pair.standby.configure("[brakes]\nenabled = false\n");
    let done = before(&pair);
    pair.standby.start();
    pair.active.start();
    let watch = &pair.active.status()["watch"];
    if wanted == "auto" && watch["backend"] != "fanotify" {
        println!("skipped: {}", watch["why"]);
        return None;
    }
    assert_eq!(watch["backend"], backend);
    Some((pair, done))
}

#[test]
fn a_burst_beyond_inotifys_queue_costs_a_look_at_everything_and_no_change() {
    check_burst("inotify");
}

#[test]
fn a_burst_beyond_fanotifys_queue_costs_a_look_at_everything_and_no_change() {
    check_burst("fanotify");
}

fn check_burst(backend: &str) {
    let Some((pair, ())) = following_by(backend, "", |_| ()) else { return };
    for n in 0..50 {
        pair.active.write(&format!("shared/data/dir{n}/old"), "old");
    }
    pair.checkpoint();
    let queued_max: usize = fs::read_to_string(format!("/proc/sys/fs/{backend}/max_queued_events")).unwrap().trim().parse().unwrap();
    let before = pair.active.status();
    assert_eq!(before["watch"]["overflows"], 0);

    let frozen = pair.active.freeze();
    let storm = pair.active.home.join("shared/data/dir0");
    // As many names as the queue holds events, and those that wait on the way to the daemon.
    for n in 0..queued_max + 20_000 {
        let path = storm.join(format!("{n}"));
        fs::write(&path, "gone at once").unwrap();
        fs::remove_file(&path).unwrap();
    }
    // These events are lost.
    pair.active.write("shared/data/dir1/old", "changed, and nobody was told");
    pair.active.write("shared/data/unseen/deep/new", "made, and nobody was told");
    fs::remove_file(pair.active.home.join("shared/data/dir2/old")).unwrap();
    fs::rename(pair.active.home.join("shared/data/dir3"), pair.active.home.join("shared/data/renamed")).unwrap();
    drop(frozen);
    until("the overflow is seen", || pair.active.status()["watch"]["overflows"].as_u64() > Some(0));
    let new = pair.standby.home.join("shared/data/unseen/deep/new");
    until("all has arrived by itself", || new.exists() && pair.active.status()["lag_ms"] == 0);
    pair.assert_equal();
    // The folder that was made meanwhile is watched.
    pair.active.write("shared/data/unseen/deep/new", "changed, and told");
    until("it is told", || fs::read(&new).is_ok_and(|c| c == b"changed, and told"));
    let status = pair.active.status();
    assert_eq!(status["watch"]["coverage"], 1.0, "{status}");
}

/// A change of a file with two names, through the one that is outside of the home, has no event below the home.
#[test]
fn what_no_event_tells_of_is_found_by_the_proof_and_counted() {
    for backend in ["inotify", "fanotify"] {
        let made = |pair: &Pair| {
            let outside = pair.dir.path().join("outside");
            fs::hard_link(pair.active.write("shared/file", "before"), &outside).unwrap();
            outside
        };
        let Some((pair, outside)) = following_by(backend, "full_scan_seconds = 2\n", made) else { continue };
        for n in 0..300 {
            pair.active.write(&format!("shared/data/{}/{n}", n % 20), n.to_string());
        }
        pair.checkpoint();
        let watch = |name: &str| pair.active.status()["watch"][name].as_u64().unwrap();
        let proofs = watch("proofs");
        until("all was gone over twice", || watch("proofs") >= proofs + 2);
        assert_eq!(watch("missed"), 0, "{backend}: {}", pair.active.log());

        fs::write(&outside, "changed from outside").unwrap();
        let there = pair.standby.home.join("shared/file");
        until("it arrives", || fs::read(&there).is_ok_and(|content| content == b"changed from outside"));
        assert_eq!(watch("missed"), 1, "{backend}: {}", pair.active.log());
        assert!(pair.active.log().contains("the watch missed a change; it is sent now"));
        until("all was gone over once more", || watch("proofs") >= proofs + 4);
        assert_eq!(watch("missed"), 1, "{backend}: {}", pair.active.log());
    }
}

/// Something mounted, until it is dropped.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    pub(crate) fn at(at: &Path, args: &[&str]) -> Option<Mounted> {
        fs::create_dir_all(at).unwrap();
        let at_text = at.to_str().unwrap();
        succeeds("mount", &[args, &[at_text]].concat()).then(|| Mounted(at.into()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        succeeds("umount", &["--lazy", self.0.to_str().unwrap()]);
    }
}

#[test]
fn filesystems_that_are_mounted_below_a_root_are_watched_too() {
    let mut pair = Pair::new();
    let elsewhere = pair.dir.path().join("elsewhere");
    fs::create_dir_all(elsewhere.join("deep")).unwrap();
    let (bound, other) = (pair.active.home.join("shared/bound"), pair.active.home.join("shared/other"));
    let Some(_bound) = Mounted::at(&bound, &["--bind", elsewhere.to_str().unwrap()]) else {
        return println!("skipped: nothing can be mounted here");
    };
    let _other = Mounted::at(&other, &["-t", "tmpfs", "none"]).unwrap();
    pair.standby.start();
    pair.active.start();
    let status = pair.active.status();
    if status["watch"]["backend"] != "fanotify" {
        return println!("skipped: {}", status["watch"]["why"]);
    }
    assert_eq!(status["watch"]["watched"], 2, "{status}");
    pair.checkpoint();
    let arrives = |path: &str, content: &str| {
        let there = pair.standby.home.join(path);
        until(path, || fs::read(&there).is_ok_and(|c| c == content.as_bytes()));
    };
    fs::write(elsewhere.join("deep/behind"), "written where it is bound from").unwrap();
    arrives("shared/bound/deep/behind", "written where it is bound from");
    fs::write(bound.join("deep/in-front"), "written where it is bound to").unwrap();
    arrives("shared/bound/deep/in-front", "written where it is bound to");
    fs::create_dir(other.join("new")).unwrap();
    fs::write(other.join("new/file"), "of another filesystem").unwrap();
    arrives("shared/other/new/file", "of another filesystem");

    let late = pair.active.home.join("shared/late");
    fs::create_dir_all(&late).unwrap();
    let staged = pair.dir.path().join("late");
    fs::create_dir_all(&staged).unwrap();
    fs::write(staged.join("before"), "there before it was mounted").unwrap();
    let _late = Mounted::at(&late, &["--bind", staged.to_str().unwrap()]).unwrap();
    arrives("shared/late/before", "there before it was mounted");
    fs::write(staged.join("after"), "told").unwrap();
    arrives("shared/late/after", "told");
    assert_eq!(pair.active.status()["watch"]["coverage"], 1.0);
}

/// The process that watches for the active; one that ended has no command line.
fn helper_of(pair: &Pair) -> Option<u32> {
    let home = pair.active.home.to_str().unwrap();
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<u32>().ok());
    processes.into_iter().find(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|&b| b == 0).skip(1);
        words.next() == Some(b"watch-helper") && words.next() == Some(home.as_bytes())
    })
}

#[test]
fn a_helper_that_dies_is_replaced_and_nothing_is_missed() {
    let Some((pair, ())) = following_by("fanotify", "", |_| ()) else { return };
    pair.active.write("shared/before", "before");
    pair.checkpoint();
    let first = helper_of(&pair).unwrap();
    assert!(succeeds("kill", &["-9", &first.to_string()]));
    pair.active.write("shared/meanwhile", "meanwhile");
    let there = pair.standby.home.join("shared/meanwhile");
    until("it arrives", || there.exists());
    until("a new helper watches", || helper_of(&pair).is_some_and(|helper| helper != first));
    until("it is used", || pair.active.status()["watch"]["backend"] == "fanotify");
    pair.active.write("shared/after", "after");
    pair.checkpoint();
    pair.assert_equal();
}

#[test]
fn the_helper_has_two_privileges_and_the_daemon_lacks_the_strong_one() {
    let Some((pair, ())) = following_by("fanotify", "", |_| ()) else { return };
    let helper = helper_of(&pair).unwrap();
    let privileges = |pid: u32, set: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(set)).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    const DAC_READ_SEARCH: u64 = 1 << 2;
    const SYS_ADMIN: u64 = 1 << 21;
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(privileges(helper, set), DAC_READ_SEARCH | SYS_ADMIN, "{set}");
    }
    assert_eq!(privileges(pair.active.pid(), "CapPrm:") & SYS_ADMIN, 0);
}

#[test]
fn folders_beyond_the_limit_of_watches_are_counted_and_found_by_scans() {
    // A user namespace has a limit of its own.
    let script = "echo 40 >/proc/sys/user/max_inotify_watches && exec \"$0\" \"$@\"";
    let wrapper = ["unshare", "--user", "--map-root-user", "sh", "-c", script];
    if !succeeds(wrapper[0], &[&wrapper[1..], &["true"]].concat()) {
        return println!("skipped: no user namespace with a limit of watches can be made here");
    }
    let mut pair = Pair::new();
    pair.active.wrapper = wrapper.map(String::from).to_vec();
    let text = fs::read_to_string(pair.active.config()).unwrap();
    fs::write(pair.active.config(), format!("{text}\n[send]\nuncovered_scan_seconds = 2\n")).unwrap();
    for n in 0..100 {
        pair.active.write(&format!("shared/data/dir{n}/file"), format!("{n}"));
    }
    pair.standby.start();
    pair.active.start();
    pair.checkpoint();
    let status = pair.active.status();
    let watch = &status["watch"];
    assert_eq!(watch["backend"], "inotify");
    assert!(watch["why"].as_str().is_some_and(|why| why.contains("CAP_SYS_ADMIN")), "{status}");
    assert!(watch["unwatched"].as_u64() > Some(0) && watch["coverage"].as_f64() < Some(1.0), "{status}");

    let change = |content: &str| {
        for n in 0..100 {
            pair.active.write(&format!("shared/data/dir{n}/file"), content);
        }
    };
    change("before a checkpoint");
    pair.checkpoint();
    pair.assert_equal();
    change("found by a scan");
    let arrived = |n| fs::read(pair.standby.home.join(format!("shared/data/dir{n}/file"))).is_ok_and(|c| c == b"found by a scan");
    until("every change is found", || (0..100).all(arrived));
    // However often all is looked at, each folder counts once.
    let count = |name: &str| pair.active.status()["watch"][name].as_u64().unwrap();
    let folders = walkdir::WalkDir::new(&pair.active.home).into_iter().filter(|e| e.as_ref().unwrap().file_type().is_dir()).count() as u64;
    assert!(count("unwatched") > 0 && count("unwatched") <= folders, "{} of {folders}", count("unwatched"));
    for n in 10..100 {
        fs::remove_dir_all(pair.active.home.join(format!("shared/data/dir{n}"))).unwrap();
    }
    until("all that is left is watched", || pair.active.status()["watch"]["coverage"] == 1.0);
    pair.checkpoint();
    pair.assert_equal();
}

#[test]
fn what_changed_while_the_daemon_was_stopped_arrives_when_it_is_back() {
    let mut pair = Pair::following();
    let at = |pair: &Pair, path: &str| pair.active.home.join(path);
    for n in 0..200 {
        pair.active.write(&format!("shared/data/still/{}/{n}", n % 7), format!("unchanged {n}\n").repeat(500));
    }
    pair.active.write("shared/data/changes", "old");
    pair.active.write("shared/data/of-the-same-length", "old");
    pair.active.write("shared/data/goes/deep", "goes");
    pair.active.write("shared/data/moves/one", "moves");
    pair.active.write("shared/data/becomes-a-folder", "a file");
    pair.checkpoint();
    pair.active.kill();
    // What was written within the clock's grain of its capture is looked at once more.
    until("a restarted sender reads nothing", || pair.send_once()["bytes_read"] == 0);

    pair.active.write("shared/data/changes", "new content");
    keep_times(&at(&pair, "shared/data/of-the-same-length"), "new");
    fs::remove_dir_all(at(&pair, "shared/data/goes")).unwrap();
    fs::rename(at(&pair, "shared/data/moves"), at(&pair, "shared/moved")).unwrap();
    fs::remove_file(at(&pair, "shared/data/becomes-a-folder")).unwrap();
    pair.active.write("shared/data/becomes-a-folder/new", "in a folder");
    pair.active.start();
    let there = pair.standby.home.join("shared/data/becomes-a-folder/new");
    until("all has arrived by itself", || there.exists() && pair.active.status()["lag_ms"] == 0);
    pair.assert_equal();
    let read = pair.active.status()["bytes_read"].as_u64().unwrap();
    assert!(read < 1000, "{read} bytes were read for a few short changes");
}

/// Changes a file so that neither its length nor its time of modification tells.
fn keep_times(path: &Path, content: &str) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    fs::write(path, content).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
}

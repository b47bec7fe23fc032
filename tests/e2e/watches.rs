//! Changes that no event tells of: lost events, folders without a watch, a daemon that wasn't there.

use std::fs;
use std::path::Path;

use crate::pair::{Pair, succeeds, until};

#[test]
fn a_burst_beyond_the_kernels_queue_costs_a_look_at_everything_and_no_change() {
    let pair = Pair::following();
    for n in 0..50 {
        pair.active.write(&format!("shared/data/dir{n}/old"), "old");
    }
    pair.checkpoint();
    let queued_max: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
    let before = pair.active.status();
    assert_eq!(before["watch"]["overflows"], 0);

    let frozen = pair.active.freeze();
    let storm = pair.active.home.join("shared/data/dir0");
    for n in 0..queued_max {
        // No two events in a row are the same, so that none is merged.
        let path = storm.join(format!("{}", n % 2));
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

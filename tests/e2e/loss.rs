//! What a failover may lose is said before it is done, by time and by repository, and the old host has nothing beyond that.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::git::{self, commit, git_ok, push};
use crate::pair::{Host, Pair, until};
use crate::relay::Relay;
use crate::roles::{quarantine, until_active};
use crate::seed::Seed;

const REPOSITORIES: std::ops::RangeInclusive<u32> = 1..=6;

fn repository(number: u32) -> String {
    format!("shared/data/repositories/{number}")
}

fn clone_of(pair: &Pair, number: u32) -> PathBuf {
    pair.dir.path().join(format!("clone-{number}"))
}

fn push_to(pair: &Pair, number: u32, text: &str) {
    commit(&clone_of(pair, number), "file", text);
    push(&clone_of(pair, number), &["HEAD:main"]);
}

/// A pair behind a relay, on which content takes some seconds, with repositories that both hosts have.
fn slow_pair() -> (Pair, Relay) {
    let mut pair = Pair::running();
    for number in REPOSITORIES {
        let bare = pair.active.home.join(repository(number));
        git::init_bare(&bare);
        git_ok(&bare, &["config", "receive.unpackLimit", "10000"]);
        git::clone(&bare, &clone_of(&pair, number));
        push_to(&pair, number, "first");
    }
    pair.active.run(&["checkpoint", "--timeout", "80s"]).expect_code(0);
    pair.active.kill();
    let relay = Relay::new(pair.port, &mut Seed::from_env());
    relay.lead(&pair.active, pair.port);
    pair.active.configure("[link]\nbandwidth = \"1 MB/s\"\n");
    pair.active.start();
    pair.active.run(&["checkpoint", "--timeout", "80s"]).expect_code(0);
    (pair, relay)
}

/// Whether the standby has something of the changeset under way.
fn is_staged(host: &Host, folder: &str) -> bool {
    fs::read_dir(host.home.join(".coldspare/stage").join(folder)).is_ok_and(|listed| listed.count() > 0)
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

/// The repositories, and why, of what was said.
fn known(loss: &Value) -> BTreeMap<String, String> {
    let all = loss["known"].as_array().unwrap().iter();
    all.map(|one| (one["path"].as_str().unwrap().to_string(), one["why"].to_string())).collect()
}

#[test]
fn what_the_old_active_had_more_is_within_what_was_said() {
    let (mut pair, relay) = slow_pair();
    pair.active.write(&format!("{}/refs/heads/broken", repository(6)), "");
    pair.active.run(&["checkpoint", "--timeout", "80s"]).expect(1, "held back");
    // Large content that travels beside the changesets, and a changeset that takes long.
    let large = clone_of(&pair, 1);
    fs::write(large.join("large"), Seed::new(3).noise(24 << 20)).unwrap();
    git_ok(&large, &["-c", "core.compression=0", "add", "large"]);
    push_to(&pair, 1, "with something large");
    until("it is on its way", || is_staged(&pair.standby, "b"));
    let many = clone_of(&pair, 2);
    for number in 0..60 {
        fs::write(many.join(format!("noise{number}")), Seed::new(number).noise(100_000)).unwrap();
    }
    git_ok(&many, &["-c", "core.compression=0", "add", "."]);
    push_to(&pair, 2, "with many files");
    until("they are on their way", || is_staged(&pair.standby, "f"));
    relay.cut(true);
    let cut_ms = now_ms();
    for number in 3..=5 {
        push_to(&pair, number, "nobody hears of it");
    }
    pair.active.write("shared/config/lost", "nobody hears of it");
    until("the link is gone", || pair.standby.status()["connected"] == false);
    let gone_ms = now_ms();
    pair.active.kill();

    // It is said before anything is decided.
    let asked = pair.standby.run(&["promote"]).expect(1, "--accept-possible-loss");
    for number in [1, 2] {
        assert!(asked.err.contains(&format!("{}: unfinished", repository(number))), "{}", asked.err);
    }
    assert!(asked.err.contains("may be lost"), "{}", asked.err);
    pair.standby.kill();
    pair.standby.start();
    let done = pair.standby.run(&["promote", "--accept-possible-loss", "--json"]).expect_code(0).json();
    let loss = &done["loss"];
    let (as_of_ms, heard_ms) = (loss["as_of_ms"].as_u64().unwrap(), loss["heard_ms"].as_u64().unwrap());
    let said = known(loss);
    println!("as of {}, heard of {} ms after the cut, {said:?}", loss["as_of"], heard_ms as i64 - cut_ms as i64);
    // A link is gone when nothing was heard for 10 seconds: it is said when something was.
    assert!(as_of_ms < cut_ms && heard_ms >= as_of_ms && heard_ms + 5_000 < gone_ms, "{loss}");
    let unfinished: BTreeSet<&str> = said.keys().map(String::as_str).collect();
    assert_eq!(unfinished, BTreeSet::from([1, 2, 6].map(repository).each_ref().map(String::as_str)), "{loss}");
    assert!(said[&repository(6)].contains("held-back"), "{loss}");
    until_active(&pair.standby);
    let status = pair.standby.status();
    assert_eq!(known(&status["promotion"]["loss"]), said, "{status}");
    let page = pair.standby.run(&["status"]).expect_code(0).out;
    assert!(page.contains("may be lost"), "{page}");

    // The old host comes back: all that only it had is in its quarantine.
    relay.cut(false);
    pair.active.run(&["run"]).expect(4, "fenced");
    pair.active.run(&["demote"]).expect_code(0);
    pair.active.start();
    pair.standby.run(&["checkpoint", "--timeout", "80s"]).expect_code(0);
    let kept = quarantine(&pair.active.home);
    let list = fs::read_to_string(kept.join("LIST")).unwrap();
    let mut diverged = BTreeSet::new();
    let mut unlisted = Vec::new();
    for line in list.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        let path = line["path"].as_str().unwrap();
        let unit = REPOSITORIES.map(repository).find(|unit| path.starts_with(unit)).unwrap_or(path.to_string());
        let written_ms = fs::symlink_metadata(kept.join("tree").join(path)).map_or(0, |meta| meta.mtime() as u64 * 1000 + 999);
        if line["kind"] == "dir" {
            continue; // what is in it is listed as well
        }
        if !said.contains_key(&unit) && written_ms < as_of_ms {
            unlisted.push(path.to_string());
        }
        diverged.insert(unit);
    }
    assert_eq!(unlisted, Vec::<String>::new(), "neither listed nor within the time");
    let expected: BTreeSet<String> = (1..=5).map(repository).chain(["shared/config/lost".to_string()]).collect();
    assert_eq!(diverged, expected, "repository 6 has nothing more");
}

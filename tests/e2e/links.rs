//! Links that lose, delay, cut short and end.

use std::fs;
use std::sync::atomic::Ordering;

use crate::git::{self, commit, git_ok, push};
use crate::pair::{Pair, until};
use crate::relay::Relay;
use crate::seed::{Seed, number_from_env};

/// What is sent through the worst link, unless `COLDSPARE_WAN_KIB` says more.
const WAN_KIB: u64 = 96;
/// How long nothing passes, unless `COLDSPARE_PARTITION_SECONDS` says more.
const PARTITION_SECONDS: u64 = 25;
/// An MTU of 1,280 without the headers of IPv4 and UDP.
const SMALL_PAYLOAD: u64 = 1280 - 28;

/// Both hosts, with the relay between them; no daemon yet.
fn through_a_relay() -> (Pair, Relay) {
    let pair = Pair::new();
    let relay = Relay::new(pair.port, &mut Seed::from_env());
    relay.lead(&pair.active, pair.port);
    (pair, relay)
}

#[test]
fn five_percent_loss_300_ms_and_a_small_mtu_cost_time_only() {
    let (mut pair, relay) = through_a_relay();
    relay.weather.loss_percent.store(5, Ordering::Relaxed);
    relay.weather.delay_ms.store(150, Ordering::Relaxed);
    relay.weather.payload_max.store(SMALL_PAYLOAD, Ordering::Relaxed);
    pair.standby.start();
    pair.active.start();
    let kib = number_from_env("COLDSPARE_WAN_KIB").unwrap_or(WAN_KIB) as usize;
    pair.active.write("shared/noise", Seed::new(3).noise(kib << 10));
    let (here, clone) = (pair.active.home.join("shared/data/repositories/1"), pair.dir.path().join("clone"));
    git::init_bare(&here);
    fs::remove_dir_all(here.join("hooks")).unwrap();
    git::clone(&here, &clone);
    commit(&clone, "file", "pushed");
    push(&clone, &["HEAD:main"]);
    pair.checkpoint();
    pair.assert_equal();
    let rtt = pair.active.status()["peer"]["rtt_ms"].as_u64().unwrap();
    assert!(rtt >= 250, "a round trip of {rtt} ms");
    assert!(relay.weather.dropped.load(Ordering::Relaxed) > 0, "nothing was lost");

    commit(&clone, "file", "pushed again");
    push(&clone, &["HEAD:main"]);
    println!("a small push took {}", pair.checkpoint());
    pair.assert_equal();
    git::assert_clean(&pair.standby.home.join("shared/data/repositories/1"));
}

#[test]
fn a_partition_is_seen_in_the_lag_and_catching_up_reads_no_unchanged_content() {
    let (mut pair, relay) = through_a_relay();
    pair.standby.start();
    pair.active.start();
    for n in 0..300 {
        pair.active.write(&format!("shared/data/still/{}/{n}", n % 7), format!("unchanged {n}\n").repeat(500));
    }
    pair.checkpoint();
    pair.active.kill();
    // What was written within the clock's grain of its capture is looked at once more.
    until("a restarted sender reads nothing", || pair.send_once()["bytes_read"] == 0);
    pair.active.start();
    pair.checkpoint();

    relay.cut(true);
    let mut changed = 0;
    for n in 0..20 {
        let content = format!("written while nothing passes {n}\n").repeat(30);
        changed += content.len() as u64;
        pair.active.write(&format!("shared/data/new/{n}"), content);
    }
    fs::rename(pair.active.home.join("shared/data/still/3"), pair.active.home.join("shared/data/moved")).unwrap();
    fs::remove_file(pair.active.home.join("shared/data/still/1/1")).unwrap();
    until("the link is seen to be cut", || pair.active.status()["connected"] == false);
    until("the standby sees it too", || pair.standby.status()["connected"] == false);
    // A cycle that began before that is read again.
    let before = pair.active.status();
    pair.active.run(&["checkpoint", "--timeout", "1s"]).expect_code(3);
    let limit_ms = 1000 * number_from_env("COLDSPARE_PARTITION_SECONDS").unwrap_or(PARTITION_SECONDS);
    let mut last = 0;
    until("the lag has grown", || {
        let lag = pair.active.status()["lag_ms"].as_u64().unwrap();
        assert!(lag >= last, "the lag fell from {last} to {lag} ms while nothing passes");
        last = lag;
        lag > limit_ms
    });
    assert!(!pair.standby.home.join("shared/data/new").exists());

    relay.cut(false);
    pair.checkpoint();
    pair.assert_equal();
    until("the lag is gone", || pair.active.status()["lag_ms"] == 0);
    let read = pair.active.status()["bytes_read"].as_u64().unwrap() - before["bytes_read"].as_u64().unwrap();
    // The renamed files' content is a seventh of all; the rest of it has to stay unread.
    let moved: u64 = walkdir::WalkDir::new(pair.active.home.join("shared/data/moved"))
        .into_iter()
        .map(|e| e.unwrap().metadata().unwrap())
        .filter(|m| m.is_file())
        .map(|m| m.len())
        .sum();
    assert!(read <= 2 * changed + moved, "{read} bytes were read for {changed} that changed and {moved} that moved");
}

#[test]
fn a_repository_that_waits_is_named_with_its_own_lag() {
    let pair = Pair::following();
    let (first, second, clone) = ("shared/data/repositories/1", "shared/data/repositories/2", pair.dir.path().join("clone"));
    for name in [first, second] {
        git::init_bare(&pair.active.home.join(name));
    }
    git::clone(&pair.active.home.join(first), &clone);
    commit(&clone, "file", "one");
    pair.checkpoint();
    let waiting = || -> Vec<(String, u64)> {
        let status = pair.active.status();
        let listed = status["lag_by_repository"].as_array().unwrap();
        assert_eq!(status["lagging_repositories"], listed.len());
        listed.iter().map(|one| (one["path"].as_str().unwrap().into(), one["lag_ms"].as_u64().unwrap())).collect()
    };
    until("nothing waits", || waiting().is_empty());

    let frozen = pair.standby.freeze();
    push(&clone, &["HEAD:main"]);
    until("the first waits", || waiting().first().is_some_and(|(path, _)| path == first));
    std::thread::sleep(std::time::Duration::from_millis(300));
    git_ok(&clone, &["push", "-q", pair.active.home.join(second).to_str().unwrap(), "HEAD:refs/heads/main"]);
    let mut both = Vec::new();
    until("both wait", || {
        both = waiting();
        both.len() == 2
    });
    assert!(both[0].0 == first && both[1].0 == second && both[0].1 >= both[1].1 + 300, "{both:?}");
    until("a person is shown both", || {
        let shown = pair.active.run(&["status"]).expect_code(0).out;
        shown.contains(first) && shown.contains(second)
    });
    drop(frozen);
    pair.checkpoint();
    until("nothing waits any more", || waiting().is_empty());
}

#[test]
fn blocked_udp_is_said_with_the_address_and_replication_begins_once_it_passes() {
    let (mut pair, relay) = through_a_relay();
    relay.cut(true);
    pair.standby.start();
    pair.active.start();
    pair.active.write("shared/file", "waits");
    let address = format!("127.0.0.1:{}", relay.port());
    until("the trouble is said", || pair.active.status()["trouble"].as_str().is_some_and(|t| t.contains(&address)));
    let status = pair.active.status();
    assert!(status["connected"] == false && status["lag_ms"] != 0, "{status}");
    pair.active.run(&["checkpoint", "--timeout", "1s"]).expect_code(3);

    relay.cut(false);
    pair.checkpoint();
    pair.assert_equal();
    until("the trouble is over", || pair.active.status()["trouble"].is_null());
}

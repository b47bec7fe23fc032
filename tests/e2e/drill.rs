//! The whole drill, with everything that a site has around coldspare: two hosts in network namespaces, HAProxy, clients
//! that push through it, a server that hangs and then dies for good, a fence, a failover, and the way back.

mod client;
mod site;

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::process::{Signal, kill_process};

use crate::git::{self, git_ok};
use crate::network::Network;
use crate::pair::{succeeds, until};
use crate::roles::{quarantine, role, stopped_role};
use client::Client;
use site::{A, B, Site};

/// Repositories, each with a client of its own.
const REPOSITORIES: usize = 3;

/// `cargo test --test e2e drill:: -- --nocapture`
#[test]
fn what_was_confirmed_survives_a_death_and_the_way_back() {
    if !Network::is_possible() || !succeeds("haproxy", &["-v"]) {
        return println!("skipped: needs root, iproute2 and haproxy");
    }
    let mut site = Site::new(REPOSITORIES);
    let clients: Vec<Client> = (1..=REPOSITORIES).map(|n| Client::start(&site, n)).collect();
    clients.iter().for_each(|client| _ = client.until_accepted(SystemTime::now()));
    println!("clients push through the router");

    // The server hangs: it is corrected here.
    let hung_at = SystemTime::now();
    let first = site.pid(A).unwrap();
    kill_process(first, Signal::STOP).unwrap();
    let corrected_at = site.until_event("a corrected", hung_at);
    assert_ne!(site.pid(A), Some(first));
    let served_at = clients.iter().map(|client| client.until_accepted(corrected_at)).max().unwrap();
    println!("hung, and corrected without a failover: all clients push again after {:.1} s", since(hung_at, served_at));
    assert_eq!((role(&site.pair.active), role(&site.pair.standby)), ("active".into(), "standby".into()));
    assert!(!site.happened("failover"));

    // What is confirmed, and a push that isn't.
    until("some pushes are accepted", || clients.iter().all(|client| client.accepted().len() >= 10));
    let confirmed: Vec<Vec<String>> = clients.iter().map(Client::accepted).collect();
    site.pair.active.run(&["checkpoint", "--timeout", "60s"]).expect_code(0);
    let pushes: usize = confirmed.iter().map(Vec::len).sum();
    let frozen = site.pair.active.freeze();
    let lost = site.push_branch(1, "lost");
    let lost_at = SystemTime::now();

    // The server dies for good.
    site.set(A, "broken");
    let died_at = SystemTime::now();
    kill_process(site.pid(A).unwrap(), Signal::KILL).unwrap();
    let fenced_at = site.until_event("fenced", died_at);
    drop(frozen);
    assert_eq!(site.network.hosts[A].processes(), Vec::new(), "the fenced host still runs something");
    let back_at = clients.iter().map(|client| client.until_accepted(fenced_at)).min().unwrap();
    clients.iter().for_each(|client| _ = client.until_accepted(back_at));
    let done = site.failover_result();
    site.until_event("b route", fenced_at);
    let fence_s = since(site.event("fence"), fenced_at);
    let own_s = done["seconds"].as_f64().unwrap() - fence_s;
    println!("from death to the first push accepted through the router: {:.1} s; of these:", since(died_at, back_at));
    println!("  {:.1} s the guard: finds it dead, two attempts, proof of death", since(died_at, site.event("failover")));
    println!("  {fence_s:.2} s the fence command");
    println!("  {own_s:.2} s coldspare's own part: the promotion, {} entries verified", done["checked_entries"]);
    println!("  {:.1} s the start, the router's next check, the push", since(site.event("b start"), back_at));
    let bound = Duration::from_millis(done["loss_bound_ms"].as_u64().unwrap());
    assert!(bound >= fenced_at.duration_since(lost_at).unwrap(), "{bound:?} doesn't cover the lost push: {done}");

    // Everything that was confirmed is there.
    clients.iter().for_each(Client::pause);
    for (n, ids) in confirmed.iter().enumerate() {
        let promoted = site.promoted().join((n + 1).to_string());
        assert_has(&promoted, ids);
        git::assert_clean(&promoted);
        git::assert_clean(&site.repository(B, n + 1));
    }
    assert!(git::git(&site.promoted().join("1"), &["cat-file", "-e", &lost]).code != 0, "the lost push was replicated");
    println!("{pushes} confirmed pushes are all there, {REPOSITORIES} repositories are clean; nothing lost but what the bound covers");

    site_comes_back(&mut site, &clients, &lost);
    switched_back(&mut site, &clients);
}

/// The old host returns: refused, then a standby; what only it had is kept.
fn site_comes_back(site: &mut Site, clients: &[Client], lost: &str) {
    site.pair.active.kill();
    let before = git::references(&site.repository(A, 1));
    site.start_around(A);
    site.pair.active.run(&["run"]).expect(4, "fenced");
    assert_eq!(git::references(&site.repository(A, 1)), before);
    assert!(site.pair.active.run(&["application", "start"]).code != 0, "the application starts on a fenced host");
    site.pair.active.run(&["demote"]).expect_code(0);
    site.pair.active.start();
    site.pair.standby.run(&["checkpoint", "--timeout", "60s"]).expect_code(0);
    site.assert_equal();
    site.pair.active.run(&["verify", "--deep", "--git"]).expect_code(0);
    let kept = quarantine(&site.pair.active.home);
    let list = fs::read_to_string(kept.join("LIST")).unwrap();
    let path = format!("{}/refs/heads/lost", site::repository_path(1));
    assert!(list.contains(&format!("\"path\":\"{path}\"")), "{path} is not in {list}");
    until("the bundle is made", || kept.join("bundles/LIST").exists());
    let bundle = kept.join("bundles").join(format!("{}.bundle", site::repository_path(1).replace('/', "%")));
    let heads = git_ok(Path::new("/"), &["bundle", "list-heads", &bundle.to_string_lossy()]);
    assert!(heads.contains(&format!("{lost} refs/heads/lost")), "{heads}");
    println!("the old host returned: refused (4), then a standby; its push that was not replicated is in {}", kept.display());
    // Routed by the same router meanwhile.
    clients.iter().for_each(Client::resume);
    clients.iter().for_each(|client| _ = client.until_accepted(SystemTime::now()));
    assert_eq!((stopped_role(&site.pair.active), stopped_role(&site.pair.standby)), ("standby".into(), "active".into()));
}

/// A planned switchover back, as the runbook has it, under clients that go on trying.
fn switched_back(site: &mut Site, clients: &[Client]) {
    site.clear(A, "broken");
    let began = SystemTime::now();
    site.pair.standby.run(&["guard", "--pause"]).expect_code(0);
    site.pair.standby.run(&["application", "stop"]).expect_code(0);
    let accepted: Vec<Vec<String>> = clients.iter().map(Client::accepted).collect();
    // First: the guard there would find nothing that runs as soon as its host is the active.
    site.pair.active.run(&["guard", "--pause"]).expect_code(0);
    site.pair.standby.run(&["switchover"]).expect_code(0);
    site.pair.active.run(&["application", "start"]).expect_code(0);
    for host in [&site.pair.active, &site.pair.standby] {
        host.run(&["guard", "--resume"]).expect_code(0);
    }
    let started = site.event("a start");
    let back_at = clients.iter().map(|client| client.until_accepted(started)).max().unwrap();
    println!("switched back: all clients push again {:.1} s after the application was stopped", since(began, back_at));
    clients.iter().for_each(Client::pause);
    accepted.iter().enumerate().for_each(|(n, ids)| assert_has(&site.repository(A, n + 1), ids));
    site.pair.active.run(&["checkpoint", "--timeout", "60s"]).expect_code(0);
    site.assert_equal();
    site.pair.standby.run(&["verify", "--deep", "--git"]).expect_code(0);
    assert_eq!((role(&site.pair.active), role(&site.pair.standby)), ("active".into(), "standby".into()));
    println!("both trees are equal");
}

/// All these commits are in the repository's `main`.
#[track_caller]
fn assert_has(repository: &Path, ids: &[String]) {
    for id in ids {
        git_ok(repository, &["merge-base", "--is-ancestor", id, "main"]);
    }
}

fn since(from: SystemTime, to: SystemTime) -> f64 {
    to.duration_since(from).unwrap_or_default().as_secs_f64()
}

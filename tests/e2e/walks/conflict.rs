//! Two hosts that were promoted by force on both sides of a partition: both stop, and the runbook's page leads out of it.

use std::fs;
use std::time::{Duration, Instant};

use coldspare_core::control::Role;

use super::LOOK_EVERY;
use super::site::{REPOSITORY, Site};
use super::step::{Side, Step};
use crate::git;
use crate::pair::until;
use crate::roles::{contents, quarantine, record, until_active};
use crate::runbook::Page;

/// How long a step may take.
const STEP_LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_conflict_stops_both_and_is_decided_for_either() {
    if super::cannot_hold() {
        return;
    }
    for counts in [0, 1] {
        decide(counts);
    }
}

/// Both hosts open the same epoch, and the one that counts goes on.
fn decide(counts: usize) {
    let mut site = Site::new();
    site.confirmed_push(0);
    // The switchover is stored, and never reaches the other host: each side takes the other one for lost.
    site.probe.begin(0, Some(Step::first(Side::Old, "control: synced")));
    let mut command = site.ask(0, &["switchover"]);
    let since = Instant::now();
    while site.host_mut(0).supervised().unwrap().held(LOOK_EVERY).is_none() {
        assert!(since.elapsed() < STEP_LIMIT, "nothing is handed over");
        // A link that was gone for a moment gives it up.
        if command.has_ended() {
            command = site.ask(0, &["switchover"]);
        }
    }
    site.cut(true);
    site.host_mut(0).kill();
    drop(command);
    site.host(0).run(&["promote", "--accept-possible-loss"]).expect_code(0);
    site.host(1).run(&["promote", "--accept-possible-loss", "--accept-lag", "--accept-connection"]).expect_code(0);
    site.start(0, "run");
    for host in [0, 1] {
        until_active(site.host(host));
        site.push(host, &format!("of-{host}"));
        site.forget_last_push();
        site.host(host).write(&format!("shared/config/of-{host}"), "the other one never sees it");
    }
    let had = [0, 1].map(|host| contents(&site.host(host).home));

    // They meet: both stop, and say so, also when they are started again.
    site.cut(false);
    for host in [0, 1] {
        until("it stops", || !site.host_mut(host).is_running());
        assert!(site.host(host).log().contains("conflict: epoch 2 was opened by another host too"), "{}", site.host(host).log());
        assert_eq!((record(site.host(host)).role, record(site.host(host)).promised.0), (Role::Fenced, 2));
        site.host(host).run(&["run"]).expect(4, "fenced");
        assert_eq!(contents(&site.host(host).home), had[host], "nothing is taken");
    }

    let other = 1 - counts;
    let mut page = Page::of("Conflict");
    page.give("promote", site.host(counts)).expect_code(0);
    page.start(site.host_mut(counts));
    until_active(site.host(counts));
    page.give("run", site.host(other)).expect(4, "fenced");
    page.end();
    let mut page = Page::of("Fail-back");
    page.skip("run");
    page.give("demote", site.host(other)).expect_code(0);
    page.start(site.host_mut(other));
    page.give("checkpoint", site.host(counts)).expect_code(0);
    site.assert_sound(&[]);
    assert_eq!(contents(&site.host(counts).home), had[counts], "the one that counts has what it had");
    let kept = quarantine(&site.host(other).home);
    assert!(kept.join(format!("tree/shared/config/of-{other}")).exists());
    until("the bundle is made", || kept.join("bundles/LIST").exists());
    let bundle = kept.join("bundles").join(format!("{}.bundle", REPOSITORY.replace('/', "%")));
    let heads = git::git_ok(&kept, &["bundle", "list-heads", &bundle.to_string_lossy()]);
    assert!(heads.contains(&format!("refs/heads/of-{other}")), "{heads}");
    assert!(fs::read_to_string(kept.join("LIST")).unwrap().contains(&format!("of-{other}")));
}

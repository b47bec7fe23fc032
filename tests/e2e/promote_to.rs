//! Promotion to an earlier point: the one that fits the database, with what is later listed and kept, through kills.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::git::{self, commit, push};
use crate::pair::{Pair, until};
use crate::roles::{contents, quarantine, stopped_role, until_active};

const REPOSITORIES: u64 = 3;

fn repository(number: u64) -> String {
    format!("shared/data/repositories/{number}")
}

fn clone_of(pair: &Pair, number: u64) -> PathBuf {
    pair.dir.path().join(format!("clone-{number}"))
}

fn points(pair: &Pair) -> Vec<Value> {
    pair.standby.run(&["points", "--json"]).expect_code(0).json()["points"].as_array().unwrap().clone()
}

/// A point: its number, and the tree that it is.
struct Was {
    no: u64,
    tree: BTreeMap<PathBuf, Vec<u8>>,
}

/// A pair whose database stands where the file `position` says, and a point for each of some pushes, each to a repository in turn.
fn pair_with_points(positions: &[&str]) -> (Pair, Vec<Was>) {
    let mut pair = Pair::running();
    let at = pair.dir.path().join("position");
    fs::write(&at, "before").unwrap();
    pair.standby.kill();
    pair.standby.configure(&format!("[database]\nposition = [\"/bin/cat\", {:?}]\n", at.to_str().unwrap()));
    pair.standby.start();
    for number in 0..REPOSITORIES {
        git::init_bare(&pair.active.home.join(repository(number)));
        git::clone(&pair.active.home.join(repository(number)), &clone_of(&pair, number));
        commit(&clone_of(&pair, number), "file", "first");
        push(&clone_of(&pair, number), &["HEAD:main"]);
    }
    pair.active.run(&["checkpoint", "--timeout", "80s"]).expect_code(0);
    until("the first ones say where it stands", || points(&pair).last().unwrap()["position"] == "before");
    let mut made = Vec::new();
    for (round, position) in (0..).zip(positions) {
        // As one changeset: a part of the push would be a point of its own, which may say the same position.
        let frozen = pair.active.freeze();
        fs::write(&at, position).unwrap();
        commit(&clone_of(&pair, round % REPOSITORIES), "file", position);
        push(&clone_of(&pair, round % REPOSITORIES), &["HEAD:main"]);
        pair.active.write("shared/config/round", format!("round {round}"));
        drop(frozen);
        pair.active.run(&["checkpoint", "--timeout", "80s"]).expect_code(0);
        until("the point says where the database stands", || points(&pair).last().unwrap()["position"] == *position);
        let no = points(&pair).last().unwrap()["point"].as_u64().unwrap();
        made.push(Was { no, tree: contents(&pair.standby.home) });
    }
    pair.active.kill();
    until("the link is gone", || pair.standby.status()["connected"] == false);
    (pair, made)
}

#[test]
fn the_point_that_fits_the_database_is_promoted_and_nothing_that_is_later_is_lost() {
    let (mut pair, made) = pair_with_points(&["0/10", "0/20", "0/30", "0/40"]);
    let last = &made[3];
    let unchanged = |pair: &Pair| {
        assert_eq!(contents(&pair.standby.home), last.tree);
        assert_eq!((stopped_role(&pair.standby).as_str(), &pair.standby.status()["rewound"]), ("standby", &Value::Null));
    };
    // What can't be is said before anything is done.
    let promote = |pair: &Pair, args: &[&str]| pair.standby.run(&[&["promote"], args].concat());
    promote(&pair, &["--to", "987654", "--fenced-by", "true"]).expect(1, "no point 987654");
    let beyond = promote(&pair, &["--database-position", "0/41", "--fenced-by", "true"]).expect(1, "no point fits");
    assert!(beyond.err.contains("position 0/30") && beyond.err.contains("position 0/40"), "{}", beyond.err);
    promote(&pair, &["--database-position", "0/F", "--fenced-by", "true"]).expect(1, "position 0/10");
    promote(&pair, &["--database-position", "0/25", "--to", "1"]).expect_code(2);
    promote(&pair, &["--database-position", "0/25"]).expect(1, "--accept-possible-loss");
    unchanged(&pair);
    promote(&pair, &["--database-position", "0/25", "--fenced-by", "false"]).expect(1, "not fenced");
    unchanged(&pair);
    pair.active.run(&["switchover", "--to", "1"]).expect_code(2);

    // Killed while it goes back, and again while the old active is being fenced: who asks again gets it done.
    let (fence, goes_on) = (pair.dir.path().join("fence"), pair.dir.path().join("goes-on"));
    fs::write(&fence, format!("touch \"$1\"; test -e {} || sleep 60", goes_on.display())).unwrap();
    // Each time another mark: a fence that outlives its daemon may leave its own late.
    let marks = ["first", "second", "last"].map(|name| pair.dir.path().join(name));
    let [first, second, terms] = marks.each_ref().map(|mark| {
        let command = ["/bin/sh", fence.to_str().unwrap(), mark.to_str().unwrap()];
        [&["promote", "--json", "--database-position", "0/25", "--fenced-by"], &command[..]].concat()
    });
    let going = |pair: &Pair| pair.standby.log().matches("goes back to the point").count();
    for (reached, terms) in [("the way back", &first), ("the fence", &second)] {
        let before = going(&pair);
        let mut asked = pair.standby.program().args(terms).arg("--config").arg(pair.standby.config()).spawn().unwrap();
        until(reached, || if reached == "the fence" { marks[1].exists() } else { going(&pair) > before });
        pair.standby.kill();
        assert_ne!(asked.wait().unwrap().code(), Some(0));
        assert_eq!(stopped_role(&pair.standby), "standby", "killed at {reached}");
        pair.standby.start();
    }
    assert_eq!(pair.standby.status()["rewound"], made[2].no);
    fs::write(&goes_on, "").unwrap();
    let done = pair.standby.run(&terms).expect_code(0).json();
    until_active(&pair.standby);
    assert_eq!(contents(&pair.standby.home), made[2].tree);
    for number in 0..REPOSITORIES {
        git::assert_clean(&pair.standby.home.join(repository(number)));
    }

    // What is given up is listed, and kept.
    let given_up = &done["given_up"];
    assert_eq!((&given_up["to"], &given_up["position"]), (&made[2].no.into(), &"0/30".into()), "{done}");
    let numbers: Vec<u64> = given_up["points"].as_array().unwrap().iter().map(|point| point["point"].as_u64().unwrap()).collect();
    assert!(numbers.contains(&last.no) && numbers.iter().all(|no| *no > made[2].no && *no <= last.no), "{done}");
    let units: BTreeSet<&str> = given_up["repositories"].as_array().unwrap().iter().map(|one| one["path"].as_str().unwrap()).collect();
    assert_eq!(units, [repository(0).as_str(), "shared/config/round"].into(), "{done}");
    let kept = quarantine(&pair.standby.home);
    assert_eq!(given_up["quarantine"], serde_json::json!([kept.to_str().unwrap()]));
    assert_eq!(fs::read_to_string(kept.join("tree/shared/config/round")).unwrap(), "round 3");
    let list = fs::read_to_string(kept.join("LIST")).unwrap();
    let lost = git::tip(&clone_of(&pair, 0), "HEAD");
    let named = list.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).find(|line| line["was"] == lost);
    assert_eq!(named.unwrap()["path"], format!("{}/refs/heads/main", repository(0)), "{list}");
    for (path, content) in last.tree.iter().filter(|(path, content)| made[2].tree.get(*path) != Some(content)) {
        assert_eq!(&fs::read(kept.join("tree").join(path)).unwrap(), content, "{} is kept", path.display());
    }
    until("the bundle is made", || kept.join("bundles/LIST").exists());

    // Once is enough, and another point comes too late.
    pair.standby.run(&terms).expect_code(0);
    pair.standby.run(&["promote", "--to", &made[0].no.to_string(), "--fenced-by", "true"]).expect(1, "too late");

    // The old active follows, with what only it has in its own quarantine.
    pair.active.run(&["run"]).expect(4, "fenced");
    pair.active.run(&["demote"]).expect_code(0);
    pair.active.start();
    pair.standby.write("shared/config/after", "the promotion");
    pair.standby.run(&["checkpoint", "--timeout", "80s"]).expect_code(0);
    pair.assert_equal();
    pair.active.run(&["verify", "--deep", "--git"]).expect_code(0);
    assert_eq!(fs::read_to_string(quarantine(&pair.active.home).join("tree/shared/config/round")).unwrap(), "round 3");
    assert!(fs::read_to_string(kept.join("LIST")).unwrap() == list, "the quarantine is a person's");
}

#[test]
fn a_point_is_promoted_without_a_daemon_and_after_a_rewind_by_hand() {
    promoted_after_a_rewind_by_hand(|no| vec!["--to".into(), no.into()]);
}

#[test]
fn a_standby_that_is_held_at_a_point_is_promoted_as_that_point() {
    promoted_after_a_rewind_by_hand(|_| vec!["--accept-lag".into()]);
}

fn promoted_after_a_rewind_by_hand(terms: impl Fn(&str) -> Vec<String>) {
    let (mut pair, made) = pair_with_points(&["a", "b", "b"]);
    let no = made[0].no.to_string();
    pair.standby.run(&["rewind", "--to", &no]).expect_code(0);
    pair.standby.kill();
    let terms = terms(&no);
    let words: Vec<&str> = ["failover", "--accept-possible-loss"].into_iter().chain(terms.iter().map(String::as_str)).collect();
    let done = pair.standby.run(&words).expect_code(0);
    for said in ["promoted to point", "later points that are given up", &repository(1), &repository(2), "what they had is in"] {
        assert!(done.out.contains(said), "no {said:?} in {}", done.out);
    }
    assert_eq!(contents(&pair.standby.home), made[0].tree);
    let kept = quarantine(&pair.standby.home);
    assert_eq!(fs::read_to_string(kept.join("tree/shared/config/round")).unwrap(), "round 2");
    pair.standby.start();
    until_active(&pair.standby);
    assert_eq!(pair.standby.status()["promotion"]["given_up"]["to"], made[0].no);
    // No daemon of the standby was there to make them.
    until("there are bundles of what was given up", || kept.join("bundles/LIST").exists());
    let listed = fs::read_to_string(kept.join("bundles/LIST")).unwrap();
    assert!(listed.lines().count() > 0 && !listed.contains("\"bundle\":null"), "{listed}");
}

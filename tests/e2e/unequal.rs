//! `verify` compares the standby with its active: what was sent is what is there, and what isn't is named and made good.

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use coldspare_sim::tamper::{Edit, Of, tamper};
use serde_json::{Value, json};

use crate::everything::flip_byte;
use crate::git::{self, commit, git_ok, loose_object, push};
use crate::pair::{Pair, let_times_age, until};

const REPOSITORY: &str = "shared/data/repositories/1";
/// Comparisons beside a writer, and more than so many changesets that they are to meet.
const LOOKS: usize = 20;
const SEQS_MIN: usize = 5;

/// A pair that follows, with some files and nobody who puts them right by himself.
fn pair() -> Pair {
    let mut pair = Pair::new();
    for n in 0..150 {
        pair.active.write(&format!("shared/data/many/{n:03}"), format!("{n}"));
    }
    pair.active.write("shared/data/folder/file", "content");
    pair.active.write("shared/data/large", crate::seed::Seed::new(7).noise(400_000));
    let_times_age();
    // Some files come and go, by chance.
    pair.standby.configure("[hands_off]\nwatch = \"scan\"\n[brakes]\nenabled = false\n");
    pair.standby.start();
    pair.active.start();
    // What was acknowledged is durable on the active with what follows: a restart needn't name everything.
    for n in 0..3 {
        pair.checkpoint();
        pair.active.write("shared/data/counter", format!("{n}"));
    }
    pair.checkpoint();
    pair.assert_equal();
    pair
}

fn verify(pair: &Pair, more: &[&str], code: i32) -> Value {
    pair.standby.run(&[&["verify", "--json"], more].concat()).expect_code(code).json()
}

fn differences(found: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_string();
    found["active"]["differences"].as_array().unwrap().iter().map(|d| (text(&d["path"]), text(&d["how"]))).collect()
}

/// Stops both, changes rows, and lets them go on.
fn with_wrong_rows(pair: &mut Pair, edits: &[(Of, &str, Edit<'_>)]) {
    pair.active.kill();
    pair.standby.kill();
    for (of, name, edit) in edits {
        let store = if *of == Of::Index { pair.active.state().join("index.redb") } else { pair.standby.state().join("manifest.redb") };
        tamper(&store, *of, name, *edit);
    }
    pair.standby.start();
    pair.active.start();
    until("they follow", || pair.active.run(&["checkpoint"]).code == 0);
}

#[test]
fn equal_trees_are_compared_and_nothing_is_found() {
    let mut pair = pair();
    let found = verify(&pair, &[], 0);
    let active = &found["active"];
    assert_eq!((&active["compared"], &active["differences"], &active["left_out"]), (&json!(true), &json!([]), &json!([])), "{found:#}");
    assert_eq!((&active["seq"], &active["entries"]), (&found["seq"], &pair.standby.status()["entries"]), "{found:#}");
    let told = pair.standby.run(&["verify"]).expect_code(0).out;
    assert!(told.contains(&format!("active: compared at changeset {}", found["seq"])), "{told}");
    pair.active.kill();
    until("the standby knows", || pair.standby.status()["connected"] == false);
    let alone = verify(&pair, &[], 0);
    assert_eq!(alone["active"], json!({"compared": false, "why": "the active isn't connected"}));
    let told = |pair: &Pair| pair.standby.run(&["verify"]).expect_code(0).out;
    assert!(told(&pair).contains("active: not compared: the active isn't connected"));
    pair.standby.kill();
    assert!(told(&pair).contains("active: not compared: `coldspare receive` doesn't run here"));
}

#[test]
fn a_wrong_row_of_the_manifest_is_named_and_made_good() {
    let mut pair = pair();
    let edits = [
        (Of::Manifest, "shared/data/folder/file", Edit::Mode(0o600)),
        (Of::Manifest, "shared/data/many", Edit::Mode(0o711)),
        (Of::Manifest, "shared/data/many/007", Edit::Remove),
        (Of::Manifest, "shared/data/many/new", Edit::As("shared/data/many/001")),
        (Of::Manifest, "shared/data/large", Edit::As("shared/data/many/002")),
    ];
    with_wrong_rows(&mut pair, &edits);
    let found = verify(&pair, &[], 1);
    let expected = [
        ("shared/data/folder/file", "differs"),
        ("shared/data/large", "differs"),
        ("shared/data/many", "differs"),
        ("shared/data/many/007", "only on the active"),
        ("shared/data/many/new", "only on the standby"),
    ];
    let mut named = differences(&found);
    named.sort();
    assert_eq!(named, expected.map(|(path, how)| (path.to_string(), how.to_string())), "{found:#}");
    for (path, _) in expected {
        let is_problem = |p: &Value| p["path"] == path && p["kind"] == "unequal";
        assert!(found["problems"].as_array().unwrap().iter().any(is_problem), "{path}: {found:#}");
    }
    let repaired = verify(&pair, &["--repair"], 0);
    let is_repaired =
        |path: &str| repaired["repair"]["repaired"].as_array().unwrap().iter().any(|p| p["path"] == path && p["kind"] == "unequal");
    assert!(expected.iter().all(|(path, _)| is_repaired(path)), "{repaired:#}");
    pair.checkpoint();
    pair.assert_equal();
    assert_eq!(differences(&verify(&pair, &["--deep"], 0)), []);
}

#[test]
fn a_wrong_row_of_the_index_is_named_and_what_is_on_the_active_is_right() {
    let mut pair = pair();
    let edits = [(Of::Index, "shared/data/folder/file", Edit::Mode(0o600)), (Of::Index, "shared/data/folder", Edit::Mode(0o700))];
    with_wrong_rows(&mut pair, &edits);
    let found = verify(&pair, &[], 1);
    assert_eq!(differences(&found).len(), 2, "{found:#}");
    verify(&pair, &["--repair"], 0);
    pair.checkpoint();
    pair.assert_equal();
    assert_eq!(differences(&verify(&pair, &[], 0)), []);
}

#[test]
fn of_many_differences_some_are_named_and_all_made_good() {
    let mut pair = pair();
    let names: Vec<String> = (0..150).map(|n| format!("shared/data/many/{n:03}")).collect();
    let edits: Vec<_> = names.iter().map(|name| (Of::Manifest, name.as_str(), Edit::Mode(0o600))).collect();
    with_wrong_rows(&mut pair, &edits);
    let found = verify(&pair, &[], 1);
    assert_eq!((differences(&found).len(), &found["active"]["more"]), (100, &json!(true)), "{found:#}");
    assert!(pair.standby.run(&["verify"]).expect_code(1).out.contains("more than 100 differences"));
    verify(&pair, &["--repair"], 0);
    pair.checkpoint();
    pair.assert_equal();
    assert_eq!(differences(&verify(&pair, &[], 0)), []);
}

#[test]
fn what_is_held_back_or_incomplete_gives_no_alarm_and_what_cannot_be_compared_is_said() {
    let pair = pair();
    let (bare, clone) = (pair.active.home.join(REPOSITORY), pair.dir.path().join("clone"));
    git::init_bare(&bare);
    git::clone(&bare, &clone);
    commit(&clone, "file", "first");
    push(&clone, &["HEAD:main"]);
    pair.checkpoint();
    // The standby is not to get the object while it is good.
    let frozen = pair.active.freeze();
    let id = commit(&clone, "file", "second");
    push(&clone, &["HEAD:main"]);
    flip_byte(&loose_object(&bare, &id), 20);
    drop(frozen);
    pair.active.write("shared/data/folder/file", "newer content");
    pair.active.run(&["checkpoint"]).expect_code(1);
    let compared = |found: &Value| {
        assert_eq!((&found["active"]["compared"], &found["active"]["differences"]), (&json!(true), &json!([])), "{found:#}");
        found["active"]["left_out"].as_array().unwrap().clone()
    };
    until("the standby is told", || pair.standby.status()["held_back"].as_array().is_some_and(|held| !held.is_empty()));
    let held = verify(&pair, &[], 0);
    assert!(!held["held_back"].as_array().unwrap().is_empty(), "{held:#}");
    // It is left out, unless the index has nothing of it yet.
    assert!(compared(&held).iter().all(|at| at["path"] == REPOSITORY), "{held:#}");

    flip_byte(&loose_object(&bare, &id), 20);
    pair.checkpoint();
    fs::write(bare.join("refs/heads/nothing"), format!("{}\n", "1234".repeat(10))).unwrap();
    pair.active.run(&["checkpoint"]).expect_code(1);
    let found = verify(&pair, &[], 0);
    assert_eq!(compared(&found), [json!({"root": "home", "path": REPOSITORY})], "{found:#}");
    assert!(pair.standby.run(&["verify"]).expect_code(0).out.contains(", without 1 paths that are held back"));
    fs::remove_file(bare.join("refs/heads/nothing")).unwrap();
    pair.checkpoint();
    assert_eq!(compared(&verify(&pair, &[], 0)), [] as [Value; 0]);
}

#[test]
fn beside_a_writing_active_the_trees_are_compared_without_a_false_alarm() {
    let pair = pair();
    let (bare, clone) = (pair.active.home.join(REPOSITORY), pair.dir.path().join("clone"));
    git::init_bare(&bare);
    git::clone(&bare, &clone);
    let is_over = AtomicBool::new(false);
    let looks: Vec<Value> = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 0;
            while !is_over.load(Ordering::Relaxed) {
                n += 1;
                commit(&clone, "file", &format!("content {n}"));
                push(&clone, &["+HEAD:main", &format!("+HEAD:refs/heads/b{}", n % 5)]);
                pair.active.write(&format!("shared/data/file{}", n % 7), format!("{n}\n").repeat(n % 100));
                let _ = fs::remove_dir_all(pair.active.home.join(format!("shared/data/gone/{}", (n + 2) % 4)));
                pair.active.write(&format!("shared/data/gone/{}/file", n % 4), "comes and goes");
                match n % 10 {
                    3 => git_ok(&bare, &["pack-refs", "--all"]),
                    6 => git_ok(&bare, &["repack", "-q", "-ad"]),
                    _ => String::new(),
                };
            }
        });
        let mut looks: Vec<Value> = Vec::new();
        // Beside a slow writer it takes more of them.
        while looks.len() < LOOKS || seqs(&looks).len() <= SEQS_MIN && looks.len() < 10 * LOOKS {
            looks.push(pair.standby.run(&["verify", "--json"]).json());
        }
        is_over.store(true, Ordering::Relaxed);
        looks
    });
    for found in &looks {
        assert_eq!(found["verdict"], "consistent", "{found:#}");
    }
    let compared: Vec<&Value> = looks.iter().map(|found| &found["active"]).filter(|active| active["compared"] == true).collect();
    let whys: Vec<&Value> = looks.iter().map(|found| &found["active"]["why"]).filter(|why| !why.is_null()).collect();
    assert!(4 * compared.len() >= 3 * looks.len(), "{whys:?}");
    assert!(whys.iter().all(|why| why.as_str().unwrap().contains("under way")), "{whys:?}");
    assert!(seqs(&looks).len() > SEQS_MIN, "nothing was written meanwhile: {:?}", seqs(&looks));
}

/// The changesets at which the trees were compared.
fn seqs(looks: &[Value]) -> BTreeSet<u64> {
    looks.iter().filter_map(|found| found["active"]["seq"].as_u64()).collect()
}

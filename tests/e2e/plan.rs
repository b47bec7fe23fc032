//! `plan` on a real home: what it counts, what it predicts, and that it leaves the home alone.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use crate::git::{self, commit};
use crate::pair::{Pair, Ran};

/// A home with a repository of several packs, small files and one large one; nothing of coldspare's runs there.
pub(crate) fn pair_with_home() -> Pair {
    let pair = Pair::new();
    let (bare, clone) = (pair.active.home.join("shared/data/repositories/1"), pair.dir.path().join("clone"));
    git::init_bare(&bare);
    git::git_ok(&bare, &["config", "receive.unpackLimit", "1"]);
    git::clone(&bare, &clone);
    for push in 0..4 {
        let lines: Vec<String> = (0..20_000).map(|line| format!("{} {line}\n", (line * 7_919 + push) % 10_007)).collect();
        commit(&clone, &format!("file{push}"), &lines.concat());
        git::push(&clone, &["HEAD:refs/heads/main"]);
    }
    (0..300)
        .for_each(|n| drop(pair.active.write(&format!("shared/data/attachments/{}/{n}", n % 10), format!("{n} attachment\n").repeat(60))));
    pair.active.write("shared/data/large", vec![7u8; 3 << 20]);
    pair.active.write("shared/data/export/left-out", vec![0; 1 << 20]);
    pair
}

fn plan(pair: &Pair, more: &[&str]) -> Ran {
    let (home, scratch) = (pair.active.home.to_string_lossy().into_owned(), pair.dir.path().join("scratch"));
    let mut command = pair.active.program();
    command.args(["plan", "--home", &home, "--scratch", &scratch.to_string_lossy()]).args(more);
    crate::pair::run(&mut command)
}

pub(crate) fn figure(plan: &Value, what: &str) -> f64 {
    let figures = plan["figures"].as_array().unwrap();
    figures.iter().find(|f| f["what"].as_str().unwrap().starts_with(what)).unwrap_or_else(|| panic!("no {what}"))["value"].as_f64().unwrap()
}

/// Names, inodes and times of change of all that is in the home.
fn state(pair: &Pair) -> Vec<(std::path::PathBuf, u64, i64, i64)> {
    let all = walkdir::WalkDir::new(&pair.active.home).sort_by_file_name();
    all.into_iter()
        .map(|e| e.unwrap())
        .map(|e| (e.path().into(), e.metadata().unwrap()))
        .map(|(p, m)| (p, m.ino(), m.ctime(), m.ctime_nsec()))
        .collect()
}

#[test]
fn a_plan_counts_the_home_rehearses_and_leaves_it_alone() {
    let pair = pair_with_home();
    let before = state(&pair);
    let picture = pair.dir.path().join("lag.svg");
    let first = plan(&pair, &["--json", "--links", "10M,1G", "--plot", &picture.to_string_lossy()]).expect_code(0).json();
    assert_eq!(state(&pair), before, "the home was touched");
    assert!(!pair.dir.path().join("scratch").exists(), "the rehearsal stayed");

    let survey = &first["survey"];
    assert_eq!((survey["repositories"].as_u64(), survey["forks"].as_u64()), (Some(1), Some(0)));
    assert!(survey["packs"]["files"].as_u64().unwrap() >= 8, "{survey}");
    assert!(survey["other"]["bytes"].as_u64().unwrap() >= 3 << 20 && survey["other"]["bytes"].as_u64().unwrap() < 5 << 20, "{survey}");
    let seed = figure(&first, "seed, both hosts");
    assert!(seed > 0.0 && figure(&first, "lag of a lone change") > 0.0);
    let host = first["host"].as_object().unwrap();
    let of = |what: &str| host[what].as_f64().unwrap_or_else(|| panic!("no {what} in {host:?}"));
    for what in ["scan_entries_per_second", "create_files_per_second", "fsync_seconds"] {
        assert!(of(what) > 0.0, "{host:?}");
    }
    // Slower, and something else is measured.
    assert!(of("read_bytes_per_second") > 1e6 && of("hash_bytes_per_second") > 1e7, "{host:?}");
    assert!(first["limits_to_raise"].is_array(), "{first}");
    // Written just now: the day has all of it.
    assert!(figure(&first, "written in the last day") >= f64::from(3 << 20));
    let share = first["rehearsal"]["sent_per_repacked_byte"].as_f64().unwrap();
    assert!((0.0..1.0).contains(&share), "a repack was to travel as {share} of itself");
    let links = first["links"].as_array().unwrap();
    assert_eq!(links.len(), 2);
    assert!(links[0]["seed_seconds"].as_f64() >= links[1]["seed_seconds"].as_f64());
    for link in links {
        let (median, highest) = (link["lag_median_seconds"].as_f64().unwrap(), link["lag_highest_seconds"].as_f64().unwrap());
        assert!(0.0 < median && median <= highest && link["lag_highest_bytes"].as_f64().unwrap() > 0.0, "{link}");
    }
    assert!(fs::read_to_string(&picture).unwrap().contains("10.0 Mbit/s"));

    // Ten times as large: ten times the bytes, whatever the rehearsal measured this time.
    let entries = survey["entries"].as_u64().unwrap();
    let scaled = plan(&pair, &["--json", "--scale", &format!("entries={}", entries * 10)]).expect_code(0).json();
    assert_eq!(scaled["survey"]["entries"].as_u64().unwrap(), entries * 10);
    assert!(first["error"]["share"].as_f64().unwrap() > 0.0 && first["error"]["scaled_by"] == 1.0, "{}", first["error"]);
    assert!(scaled["error"]["rests_on"].as_str().unwrap().contains("same kind") && scaled["error"]["scaled_by"] == 10.0);
    let grown = figure(&scaled, "written in the last day") / figure(&first, "written in the last day");
    assert!((9.9..10.1).contains(&grown), "{grown}");
}

#[test]
fn a_watched_home_tells_what_is_written_again_and_removed() {
    let pair = pair_with_home();
    let (home, scratch) = (pair.active.home.to_string_lossy().into_owned(), pair.dir.path().join("scratch"));
    let cookies = || fs::metadata(pair.active.home.join(".coldspare/cookies")).unwrap().modified().unwrap();
    let before = cookies();
    let mut command = pair.active.program();
    command.args(["plan", "--home", &home, "--scratch", &scratch.to_string_lossy(), "--json", "--watch", "6s"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("watching by ") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "it never watched");
    }
    let drain = |mut from: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut all = Vec::new();
            from.read_to_end(&mut all).map(|_| all).unwrap()
        })
    };
    let (said, told) = (drain(Box::new(said)), drain(Box::new(child.stdout.take().unwrap())));
    (0..50).for_each(|n| fs::remove_file(pair.active.home.join(format!("shared/data/attachments/{}/{n}", n % 10))).unwrap());
    // Until long after the watch: times of files would tell of one of them.
    while child.try_wait().unwrap().is_none() {
        pair.active.write("shared/data/again", vec![9u8; 1_000_000]);
        std::thread::sleep(Duration::from_millis(300));
    }
    let said = String::from_utf8(said.join().unwrap()).unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    let plan: Value = serde_json::from_slice(&told.join().unwrap()).unwrap();
    let watched = &plan["survey"]["watched"];
    assert_eq!((watched["removed"].as_u64(), watched["overflows"].as_u64()), (Some(50), Some(0)), "{watched}");
    let written = watched["written"]["bytes"].as_f64().unwrap();
    assert!(watched["rewritten"].as_u64().unwrap() >= 3 && written >= 4e6, "{watched}");
    // All of a day at that rate, and no less.
    let day = figure(&plan, "written in a day");
    let expected = written * 86_400.0 / watched["seconds"].as_f64().unwrap();
    assert!((0.99..1.01).contains(&(day / expected)), "{day} for {expected}");
    assert_eq!(cookies(), before, "the watch wrote into the home");
}

#[test]
fn a_plan_that_cannot_be_made_says_why_and_leaves_nothing() {
    let pair = pair_with_home();
    let scratch = pair.dir.path().join("scratch");
    for (args, why) in [
        (&["--scale", "forks=3"][..], "none of repositories=N"),
        (&["--links", "fast"], "no link"),
        (&["--watch", "100ms"], "less than a second"),
        (&["--home", "/nonexistent/home"], "/nonexistent/home"),
    ] {
        let ran = plan(&pair, args).expect_code(2);
        assert!(ran.err.contains(why), "{ran:#?}");
        assert!(!scratch.exists());
    }
    let inside = pair.active.home.join("scratch");
    let mut command = pair.active.program();
    command.args(["plan", "--home"]).arg(&pair.active.home).arg("--scratch").arg(&inside);
    let ran = crate::pair::run(&mut command).expect_code(2);
    assert!(ran.err.contains("only read") && !inside.exists(), "{ran:#?}");
    fs::create_dir(&scratch).unwrap();
    fs::write(scratch.join("mine"), "mine").unwrap();
    let ran = plan(&pair, &[]).expect_code(2);
    assert!(ran.err.contains("--scratch names a folder that is made anew"), "{ran:#?}");
    assert_eq!(fs::read_to_string(scratch.join("mine")).unwrap(), "mine");
}

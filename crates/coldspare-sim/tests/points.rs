//! Points of a standby, on homes made by seeds: each can be had again exactly, and what an interruption leaves is one of them.
//!
//! `COLDSPARE_SEED=n` runs one seed; `COLDSPARE_SEEDS=n` runs so many.

#![allow(clippy::unwrap_used)] // also in what several tests share

use coldspare_core::{Baseline, Digest};
use coldspare_scan::capture::{Certainty, Work};
use coldspare_sim::home::Home;
use coldspare_sim::pair::place;
use coldspare_sim::{Chance, Pair, Setup, Stopped, Tree};
use coldspare_standby::{Depth, PointNo, StandbyError};

const CHANGESETS: u64 = 10;

struct Recorded {
    no: PointNo,
    tree: Tree,
    fingerprint: Digest,
}

fn for_seeds(count: u64, body: impl Fn(u64, &mut Chance) + std::panic::RefUnwindSafe) {
    let number = |name: &str| std::env::var(name).ok().map(|v| v.parse::<u64>().unwrap());
    let seeds = match number("COLDSPARE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("COLDSPARE_SEEDS").unwrap_or(count),
    };
    for seed in seeds {
        let run = std::panic::catch_unwind(|| body(seed, &mut Chance::new(seed)));
        if let Err(panic) = run {
            eprintln!("failed with COLDSPARE_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

/// A pair, and its trees as they were recorded at each point.
fn recorded(seed: u64, chance: &mut Chance) -> (Pair, Vec<Recorded>) {
    let mut pair = Pair::new(Setup::Watched, &place(seed));
    Home::new(&pair.active_root(), chance).fill(30 + seed % 40);
    let mut recorded = Vec::new();
    for round in 0..CHANGESETS {
        pair.follow(if round == 0 { Work::Everything } else { Work::Hinted }).unwrap();
        recorded.push(now(&pair));
        let count = 1 + chance.below(25);
        Home::new(&pair.active_root(), chance).change(count);
        match chance.below(12) {
            0 => pair.restart_standby(),
            1 => {
                pair.lose_index(); // a new session
                everything(&mut pair);
            }
            _ => {}
        }
    }
    (pair, recorded)
}

/// The active names everything.
fn everything(pair: &mut Pair) {
    pair.cycle(Work::Everything, Baseline::Full, Certainty::Ask).unwrap();
    // What it left to the next changeset.
    pair.follow(Work::Hinted).unwrap();
}

fn now(pair: &Pair) -> Recorded {
    let no = pair.standby().points().unwrap().last().unwrap().no;
    Recorded { no, tree: pair.standby_tree(), fingerprint: pair.standby().fingerprint().unwrap().1 }
}

#[track_caller]
fn assert_is(pair: &Pair, expected: &Recorded, when: &str) {
    let differences = expected.tree.differences(&pair.standby_tree());
    assert!(differences.is_empty(), "{when}: {} differences:\n{}", differences.len(), differences.join("\n"));
    assert_eq!(pair.standby().fingerprint().unwrap().1, expected.fingerprint, "{when}: the manifest");
    let verified = pair.verify(Depth::Deep);
    assert!(verified.problems.is_empty(), "{when}: {:#?}", verified.problems);
}

#[test]
fn every_point_can_be_had_again_exactly_and_replication_goes_on_from_it() {
    for_seeds(10, |seed, chance| {
        let (mut pair, recorded) = recorded(seed, chance);
        for _ in 0..4 {
            let to = chance.pick(&recorded);
            let applied = pair.standby().rewind(to.no).unwrap();
            assert_eq!(pair.standby().applied(), Some(applied));
            assert_is(&pair, to, &format!("back at {}", to.no));
        }
        let last = recorded.last().unwrap();
        pair.standby().rewind(recorded[0].no).unwrap();
        assert_is(&pair, &recorded[0], "back at the first");
        let refused = pair.cycle(Work::Everything, Baseline::Full, Certainty::Ask);
        assert!(matches!(refused, Err(Stopped::Standby(StandbyError::Rewound { .. }))), "{refused:?}");
        assert!(pair.standby().needs_everything().unwrap() && pair.standby().rewound().is_some());
        if chance.happens(1, 2) {
            pair.kill_standby();
            assert_is(&pair, &recorded[0], "after a restart");
            assert!(pair.standby().resume().unwrap() && !pair.standby().resume().unwrap());
            assert!(pair.standby().needs_everything().unwrap());
            everything(&mut pair);
        } else {
            // What the active brought last is no reason to wait.
            let latest = pair.standby().points().unwrap().into_iter().rfind(|point| !point.is_rewind).unwrap().no;
            pair.standby().rewind(latest).unwrap();
            if latest == last.no {
                assert_is(&pair, last, "forward again");
            }
            pair.follow(Work::Everything).unwrap();
        }
        assert!(!pair.standby().needs_everything().unwrap() && pair.standby().rewound().is_none());
        let differences = pair.active_tree().differences(&pair.standby_tree());
        assert!(differences.is_empty(), "replication goes on:\n{}", differences.join("\n"));
        // That can be undone too.
        pair.standby().rewind(last.no).unwrap();
        assert_is(&pair, last, "back from what came after it");
    });
}

#[test]
fn a_rewind_that_fails_leaves_the_tree_or_the_point() {
    for_seeds(10, |seed, chance| {
        let (mut pair, recorded) = recorded(seed, chance);
        let mut expected = Some(recorded.len() - 1).filter(|last| now(&pair).no == recorded[*last].no);
        for _ in 0..5 {
            let to = chance.below(recorded.len() as u64) as usize;
            pair.disk().fail_after(chance.below(200) as i64);
            let gone = pair.standby().rewind(recorded[to].no);
            let is_back = gone.is_ok() || pair.standby().is_applying();
            pair.kill_standby();
            if is_back {
                expected = Some(to);
            }
            if let Some(expected) = expected {
                assert_is(&pair, &recorded[expected], &format!("after {gone:?}"));
            }
        }
    });
}

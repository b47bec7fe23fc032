//! Both ends together, on homes made by seeds.
//!
//! `COLDSPARE_SEED=n cargo test -p coldspare-sim` runs one seed; `COLDSPARE_SEEDS=n` runs so many.

#![allow(clippy::unwrap_used)] // also in what several tests share

use coldspare_core::Baseline;
use coldspare_scan::capture::{Certainty, Work};
use coldspare_sim::home::Home;
use coldspare_sim::pair::place;
use coldspare_sim::{Chance, Ending, Pair, Setup, Stopped, Tree};
use coldspare_standby::Depth;

/// Runs `body` for one seed after the other; a failing one names itself.
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

#[track_caller]
fn assert_same(expected: &Tree, found: &Tree, when: &str) {
    let differences = expected.differences(found);
    assert!(differences.is_empty(), "{when}: {} differences:\n{}", differences.len(), differences.join("\n"));
}

#[track_caller]
fn assert_in_sync(pair: &Pair, when: &str) {
    assert_same(&pair.active_tree(), &pair.standby_tree(), when);
    let verified = pair.verify(Depth::Deep);
    assert!(verified.problems.is_empty(), "{when}: {:#?}", verified.problems);
    assert_eq!(pair.standby().entries().unwrap(), pair.active_tree().len() as u64, "{when}: the manifest has what the tree has");
    let (held, _) = pair.capture().held.list();
    assert!(held.is_empty(), "{when}: {held:#?}");
}

fn seeded_pair(setup: Setup, seed: u64, chance: &mut Chance) -> Pair {
    let pair = Pair::new(setup, &place(seed));
    Home::new(&pair.active_root(), chance).fill(30 + seed % 40);
    pair
}

fn change(pair: &Pair, chance: &mut Chance) {
    let count = 1 + chance.below(25);
    Home::new(&pair.active_root(), chance).change(count);
}

#[test]
fn looking_at_everything_makes_the_trees_equal() {
    for_seeds(70, |seed, chance| {
        let mut pair = seeded_pair(Setup::Unwatched, seed, chance);
        pair.follow(Work::Everything).unwrap();
        assert_in_sync(&pair, "after the seed");
        for round in 0..5 {
            change(&pair, chance);
            pair.follow(Work::Everything).unwrap();
            assert_in_sync(&pair, &format!("round {round}"));
        }
    });
}

#[test]
fn looking_at_hints_makes_the_trees_equal() {
    for_seeds(70, |seed, chance| {
        let mut pair = seeded_pair(Setup::Watched, seed, chance);
        pair.follow(Work::Everything).unwrap();
        assert_in_sync(&pair, "after the seed");
        for round in 0..6 {
            change(&pair, chance);
            pair.follow(Work::Hinted).unwrap();
            assert_in_sync(&pair, &format!("round {round}"));
        }
    });
}

#[test]
fn more_may_differ_than_is_looked_at_by_name() {
    let mut pair = Pair::new(Setup::Unwatched, &place(0));
    let root = pair.active_root();
    let folders: Vec<_> = (0..15).map(|no| root.join(format!("folder/{no}"))).collect();
    let write =
        |name: &str| folders.iter().for_each(|folder| (0..300).for_each(|no| std::fs::write(folder.join(no.to_string()), name).unwrap()));
    folders.iter().for_each(|folder| std::fs::create_dir_all(folder).unwrap());
    write("old");
    pair.follow(Work::Everything).unwrap();
    write("newer");
    std::fs::remove_dir_all(&folders[0]).unwrap();
    let report = pair.follow(Work::Everything).unwrap();
    assert_eq!(report.totals.files_read, 14 * 300);
    assert_in_sync(&pair, "after 4,200 files changed");
    std::fs::write(folders[1].join("0"), "newest").unwrap();
    assert_eq!(pair.follow(Work::Everything).unwrap().totals.files_read, 1);
    assert_in_sync(&pair, "after one file changed");
}

/// One try that may end at any point; afterwards the standby has the old tree or, acknowledged, the new one.
fn try_once(pair: &mut Pair, chance: &mut Chance, committed: &mut Tree, baseline: Baseline, certainty: Certainty, work: Work) -> bool {
    match chance.below(4) {
        0 => pair.interrupt_after(chance.below(12), Ending::Abandoned),
        1 => pair.interrupt_after(chance.below(12), Ending::Killed),
        2 => {
            let calls = chance.below(400);
            pair.disk().fail_after(calls as i64);
        }
        _ => {}
    }
    let mut before = pair.standby().applied();
    let new = pair.active_tree();
    let mut ended = pair.cycle(work, baseline, certainty);
    while ended.as_ref().is_ok_and(|report| report.is_left) {
        // A changeset of renamed folders: the rest comes with the next one.
        (*committed, before) = (pair.standby_tree(), pair.standby().applied());
        ended = pair.follow(Work::Hinted);
    }
    let done = ended.is_ok();
    if let Err(Stopped::Standby(_)) = &ended {
        pair.kill_standby();
    }
    pair.disk().fail_after(i64::MAX);
    let is_new = pair.standby().applied() != before;
    assert!(is_new || !done, "acknowledged and not applied");
    if is_new {
        *committed = new;
    }
    assert_same(committed, &pair.standby_tree(), &format!("after {ended:?}"));
    let verified = pair.verify(Depth::Quick);
    assert!(verified.problems.is_empty(), "after {ended:?}: {:#?}", verified.problems);
    done
}

#[test]
fn interruptions_leave_the_old_tree_or_the_new_one() {
    for_seeds(70, |seed, chance| {
        let setup = if seed % 2 == 0 { Setup::Unwatched } else { Setup::Watched };
        let mut pair = seeded_pair(setup, seed, chance);
        let mut committed = pair.standby_tree();
        // Whether the active knows what the standby has, and whether the hints are complete.
        let (mut knows, mut certainty, mut hints_do) = (false, Certainty::Ask, false);
        for _ in 0..8 {
            let baseline = match pair.standby().applied() {
                Some(applied) if knows => Baseline::Delta(applied.seq),
                _ => Baseline::Full,
            };
            let watch = pair.capture().watch.as_ref();
            let hints_do_now =
                hints_do && chance.happens(2, 3) && baseline != Baseline::Full && watch.is_some_and(|w| !w.dirty().is_everything());
            let work = if hints_do_now { Work::Hinted } else { Work::Everything };
            if try_once(&mut pair, chance, &mut committed, baseline, certainty, work) {
                (knows, certainty, hints_do) = (true, Certainty::Sure, true);
            } else {
                certainty = Certainty::Ask;
            }
            if chance.happens(2, 3) {
                change(&pair, chance);
            }
            match chance.below(10) {
                0 => pair.restart_standby(),
                1 => pair.kill_standby(),
                2 => {
                    pair.restart_active();
                    hints_do = false;
                }
                3 => {
                    pair.lose_index();
                    (knows, certainty, hints_do) = (false, Certainty::Ask, false);
                }
                _ => {}
            }
        }
        let baseline = match pair.standby().applied() {
            Some(applied) if knows => Baseline::Delta(applied.seq),
            _ => Baseline::Full,
        };
        pair.cycle(Work::Everything, baseline, Certainty::Ask).unwrap();
        assert_in_sync(&pair, "at the end");
    });
}

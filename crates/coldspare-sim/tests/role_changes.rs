//! Changes of roles by seeds: a crash, a power cut or a partition at any step of a switchover and of a failover.
//!
//! `COLDSPARE_SEEDS=10000 cargo test --release -p coldspare-sim --test role_changes -- --nocapture` runs so many of each kind;
//! `COLDSPARE_SEED=n` that one, with the way that it takes.

#![allow(clippy::unwrap_used)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use coldspare_sim::failover::walk::places;
use coldspare_sim::failover::{Change, Defect, Failed, Walked, walk};
use coldspare_sim::world::{Ending, Options, Trace, Violation, run};

const THREADS: u64 = 2;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|v| v.parse().unwrap())
}

/// The seeds that are asked for, else as many as `default`.
fn seeds(default: u64) -> std::ops::Range<u64> {
    number("COLDSPARE_SEED").map_or(0..number("COLDSPARE_SEEDS").unwrap_or(default), |seed| seed..seed + 1)
}

/// Runs seeds on a few threads.
fn each<T: Send>(seeds: std::ops::Range<u64>, work: impl Fn(u64) -> T + Sync) -> Vec<T> {
    let (next, out) = (AtomicU64::new(seeds.start), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let done = work(seed);
                    out.lock().unwrap().push(done);
                }
            });
        }
    });
    out.into_inner().unwrap()
}

#[track_caller]
fn check_ways(change: Change) -> Vec<Walked> {
    let (went, failed): (Vec<_>, Vec<_>) = each(seeds(1_000), |seed| walk(seed, change, Defect::None)).into_iter().partition(Result::is_ok);
    let failed: Vec<Failed> = failed.into_iter().map(|failed| *failed.unwrap_err()).collect();
    if let Some(first) = failed.first() {
        let seeds: Vec<u64> = failed.iter().map(|failed| failed.seed).collect();
        panic!("{change:?}, COLDSPARE_SEED={}: {}\n{}\nof {seeds:?}", first.seed, first.what, first.actions.join("\n"));
    }
    let went: Vec<Walked> = went.into_iter().map(Result::unwrap).collect();
    let places = places(went.iter());
    let (steps, lost) = (went.iter().map(|w| w.steps).sum::<usize>(), went.iter().map(|w| u64::from(w.lost)).sum::<u64>());
    let disturbed: u64 = went.iter().flat_map(|w| w.disturbed.values()).sum();
    println!(
        "{change:?}: {} ways, {steps} steps, disturbed {disturbed} times at {} places, {lost} writes in quarantine",
        went.len(),
        places.len()
    );
    if number("COLDSPARE_SEED").is_none() {
        // In each role, and before each thing that is to be done in it.
        let wanted: &[&str] = match change {
            Change::Planned => &["handover Store", "handover Offer", "active AnswerTaken", "AnswerNoted", "fenced Store", "standby Serve"],
            Change::Forced => &["active Store", "active, active", "fenced FenceSelf", "fenced Store", "standby Keep", "standby Replace"],
        };
        let missed: Vec<_> = wanted.iter().filter(|part| !places.iter().any(|place| place.contains(**part))).collect();
        assert!(missed.is_empty(), "{missed:?} was never disturbed: {places:#?}");
    }
    went
}

#[test]
fn a_switchover_that_is_disturbed_anywhere_ends_with_one_active_that_has_every_write() {
    check_ways(Change::Planned);
}

#[test]
fn a_failover_that_is_disturbed_anywhere_keeps_what_it_loses() {
    let went = check_ways(Change::Forced);
    assert!(went.len() == 1 || went.iter().any(|w| w.lost > 0), "nothing was ever lost");
}

/// Whether one of some ways finds it.
#[track_caller]
fn check_caught(defect: Defect, change: Change) {
    let caught = (0..2_000).any(|seed| walk(seed, change, defect).is_err());
    assert!(caught, "{defect:?} goes unnoticed");
}

#[test]
fn each_defect_of_a_driver_is_met() {
    check_caught(Defect::QuarantineIsSkipped, Change::Forced);
    check_caught(Defect::QuarantineIsNotSynced, Change::Forced);
    check_caught(Defect::RecordsAreNotStored, Change::Planned);
    check_caught(Defect::AnswersComeFirst, Change::Planned);
    check_caught(Defect::PowerCutsAreNotNoticed, Change::Planned);
    check_caught(Defect::AnySessionIsApplied, Change::Planned);
    check_caught(Defect::HandoversForgetTheLastWrite, Change::Planned);
}

#[track_caller]
fn check_worlds(ending: Ending) -> Vec<Trace> {
    let options = Options { ending, is_loud: number("COLDSPARE_SEED").is_some(), ..Options::default() };
    let (traces, violations): (Vec<_>, Vec<_>) = each(seeds(300), |seed| run(seed, options)).into_iter().partition(Result::is_ok);
    let violations: Vec<Violation> = violations.into_iter().map(|violation| *violation.unwrap_err()).collect();
    let lines: Vec<String> = violations.iter().map(Violation::to_string).collect();
    assert!(lines.is_empty(), "{ending:?}: {} violations:\n{}", lines.len(), lines.join("\n"));
    traces.into_iter().map(Result::unwrap).collect()
}

#[test]
fn a_handover_of_a_real_tree_loses_nothing_wherever_either_end_dies() {
    let traces = check_worlds(Ending::Handover);
    let handed_over = traces.iter().filter(|trace| trace.handed_over).count();
    let died: u64 = traces.iter().map(|trace| trace.deaths).sum();
    println!("{} worlds, {handed_over} handed over, {died} deaths", traces.len());
    assert!(traces.len() < 100 || handed_over > traces.len() / 2, "too little happens");
}

#[test]
fn what_a_failover_of_a_real_tree_loses_is_listed_or_within_the_time() {
    let traces = check_worlds(Ending::Failover);
    let (listed, in_time): (u64, u64) = traces.iter().fold((0, 0), |sum, t| (sum.0 + t.lost_listed, sum.1 + t.lost_in_time));
    println!("{} worlds, {listed} files lost that were listed, {in_time} within the time, none else", traces.len());
    assert!(traces.len() < 100 || (listed > 0 && in_time > 0), "too little happens");
}

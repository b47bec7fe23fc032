//! Both ends in a deterministic world, by seeds.
//!
//! `COLDSPARE_SEED=n cargo test -p coldspare-sim --test world -- --nocapture` runs one seed and prints what happens;
//! `COLDSPARE_SEEDS=n` runs so many.

#![allow(clippy::unwrap_used)] // also in what several tests share

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use coldspare_sim::world::{Options, Trace, Violation, run};

const SEEDS: u64 = 1_000;
const THREADS: usize = 2;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|v| v.parse().unwrap())
}

/// What seeds came to.
#[derive(Default)]
struct Sum {
    violations: Vec<Violation>,
    judged: u64,
    written: u64,
    deaths: u64,
    compared: u64,
    compared_entries: u64,
    left_out: u64,
}

/// Runs seeds on a few threads, each world on one.
fn run_seeds(seeds: std::ops::Range<u64>, options: Options, violations_max: usize) -> Sum {
    let next = AtomicU64::new(seeds.start);
    let sum = Mutex::new(Sum::default());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || sum.lock().unwrap().violations.len() >= violations_max {
                        return;
                    }
                    let ended = run(seed, options);
                    let mut sum = sum.lock().unwrap();
                    let trace = ended.as_ref().unwrap_or_else(|v| &v.trace);
                    let Trace { judged, written, deaths, compared, compared_entries, left_out, .. } = *trace;
                    sum.judged += judged;
                    sum.written += written;
                    sum.deaths += deaths;
                    sum.compared += compared;
                    sum.compared_entries += compared_entries;
                    sum.left_out += left_out;
                    if let Err(violation) = ended {
                        sum.violations.push(*violation);
                    }
                }
            });
        }
    });
    sum.into_inner().unwrap()
}

#[test]
fn no_seed_breaks_a_promise() {
    if let Some(seed) = number("COLDSPARE_SEED") {
        let filter = tracing_subscriber::EnvFilter::from_env("COLDSPARE_LOG");
        tracing_subscriber::fmt().with_env_filter(filter).without_time().with_writer(std::io::stderr).init();
        let ended = run(seed, Options { is_loud: true, compares: number("COLDSPARE_COMPARES").is_some(), ..Options::default() });
        return drop(ended.unwrap_or_else(|v| panic!("{v}")));
    }
    let seeds = number("COLDSPARE_SEEDS").unwrap_or(SEEDS);
    let sum = run_seeds(0..seeds, Options::default(), number("COLDSPARE_VIOLATIONS").unwrap_or(20) as usize);
    println!("{} changesets judged, {} steps written, {} deaths", sum.judged, sum.written, sum.deaths);
    let lines: Vec<String> = sum.violations.iter().map(Violation::to_string).collect();
    assert!(lines.is_empty(), "{} violations:\n{}", lines.len(), lines.join("\n"));
    assert!(seeds < 100 || (sum.judged > seeds && sum.deaths > seeds / 10), "too little happens");
}

/// What the active's index says was sent is what the standby's manifest has, at any changeset: with files that are held
/// back, repositories that are incomplete, cycles that failed, either end killed.
#[test]
fn at_no_point_is_there_a_false_alarm() {
    let seeds = number("COLDSPARE_SEEDS").unwrap_or(SEEDS / 2);
    let options = Options { compares: true, ..Options::default() };
    let sum = run_seeds(0..seeds, options, 10);
    println!("{} comparisons of {} entries, {} without some", sum.compared, sum.compared_entries, sum.left_out);
    let lines: Vec<String> = sum.violations.iter().map(Violation::to_string).collect();
    assert!(lines.is_empty(), "{} violations:\n{}", lines.len(), lines.join("\n"));
    assert!(
        seeds < 100 || (sum.compared > seeds && sum.compared_entries > 20 * sum.compared && sum.left_out > seeds / 50),
        "too little happens"
    );
}

/// Seeds that found something.
#[test]
fn what_seeds_found_stays_mended() {
    for (found, seeds) in [
        ("a repository is renamed before the folder above it is watched", &[434, 440, 453, 530, 834][..]),
        ("a repository is renamed while its objects are read", &[4573, 3677, 3679]),
        ("what a changeset keeps outlives the changeset", &[88, 447, 455, 920]),
        ("a folder becomes a repository while its hints are told apart", &[4587, 7287, 20610, 32361]),
        ("a folder of references goes between two readings", &[11511]),
        ("a reference is held back at the first reading and read at the second", &[16848]),
        ("a repository without a folder of packs is left again and again", &[22683, 39298]),
        ("a pack comes and goes within a cycle", &[16126, 34194, 43836]),
        ("a folder of objects goes unseen, or with what was known of it", &[40657, 75262, 91257, 98737]),
        ("a pack takes an object of a folder that was not looked at yet", &[14044]),
        ("a changeset asks, and has nothing to say in the end", &[73428]),
        ("a power cut leaves a file's times without its bytes", &[63191]),
        ("a file is renamed and rewritten within a tick of the clock", &[74578]),
    ] {
        for seed in seeds {
            run(*seed, Options::default()).unwrap_or_else(|v| panic!("{found}: {v}"));
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in [1, 2, 3, 5, 8, 13] {
        let once = |seed| run(seed, Options::default()).unwrap_or_else(|v| v.trace);
        let (first, second) = (once(seed), once(seed));
        for (number, (a, b)) in first.lines.iter().zip(&second.lines).enumerate() {
            assert_eq!(a, b, "seed {seed}, line {number}");
        }
        assert_eq!(first, second, "seed {seed}");
    }
}

//! Every seeded bug, switched on alone, is noticed by the harness that the table names; without a bug the same runs find
//! nothing.
//!
//! `COLDSPARE_BUG=name` runs one of them, `COLDSPARE_SEEDS=n` so many seeds of the world.

#![allow(clippy::unwrap_used)] // also in what several tests share

mod bugs;
mod points;
mod readers;
mod scenarios;
#[path = "../workloads/mod.rs"]
#[allow(dead_code)] // shared with the test of crash states
mod workloads;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bugs::{BUGS, Bug, Harness, Switch};
use coldspare_core::seeded_bugs::{SeededBug, reached, switch};
use coldspare_sim::failover;
use coldspare_sim::model::{Limits, explore};
use coldspare_sim::world::{self, Options, run};

/// LIMIT: seeds of the world that are run for one bug.
const SEEDS: u64 = 1_000;
const THREADS: usize = 2;
/// States of the files at each crash point: a bug shows in many of them.
const STATES_MAX: usize = 100;

/// States that the model checker looks at.
const MODEL_STATES_MAX: usize = 400_000;

/// Whether the bug is on in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Is {
    On,
    Off,
}

impl Bug {
    /// Runs `body` with the bug on or off; a panic is a finding too.
    fn with(&self, is: Is, body: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        let code = match self.switch {
            Switch::Code(bug) if is == Is::On => Some(bug),
            _ => None,
        };
        let _held = switch(code);
        catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
            Err(format!("panic: {}", text.unwrap_or_default()))
        })
    }

    /// What the harness found that it doesn't find without the bug.
    fn notice(&self) -> Option<String> {
        match self.harness {
            Harness::World => self.notice_by_seeds(),
            Harness::CrashStates(workloads) => workloads.iter().find_map(|name| self.notice_once(|is| self.explore(name, is))),
            Harness::Readers => self.notice_once(|_| readers::meet_whole_repositories()),
            Harness::Scenario(scenario) => self.notice_once(|_| scenario()),
            Harness::Model(bounds) => self.notice_once(|_| check_model(bounds)),
        }
    }

    fn notice_once(&self, body: impl Fn(Is) -> Result<(), String>) -> Option<String> {
        let noticed = self.with(Is::On, || body(Is::On)).err();
        // The control: what is found without the bug is no notice of it.
        self.with(Is::Off, || body(Is::Off)).unwrap_or_else(|e| panic!("{}: without the bug: {e}", self.name));
        noticed
    }

    fn explore(&self, name: &'static str, is: Is) -> Result<(), String> {
        static CLEAN: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
        if is == Is::Off && !CLEAN.lock().unwrap().insert(name) {
            return Ok(()); // was looked at for another bug
        }
        let defect = match self.switch {
            Switch::Disk(defect) if is == Is::On => Some(defect),
            _ => None,
        };
        let (_, workload) = workloads::WORKLOADS.iter().find(|(n, _)| *n == name).unwrap();
        // A state of the large one costs as much as ten of the others.
        let states_max = if name == "many" { STATES_MAX / 10 } else { STATES_MAX };
        let found = explore(Limits { states_max, stops_at_first: true }, defect, workload);
        found.violations.first().map_or(Ok(()), |v| Err(format!("{name} {}: {}", v.key, v.detail)))
    }

    /// Looks for a seed that breaks a promise with the bug and keeps them all without it.
    fn notice_by_seeds(&self) -> Option<String> {
        let seeds = std::env::var("COLDSPARE_SEEDS").map_or(SEEDS, |v| v.parse().unwrap());
        let compares = matches!(self.switch, Switch::Code(SeededBug::LeftOutIsCompared));
        let options = Options { compares, ..Options::default() };
        let mut from = 0;
        while from < seeds {
            let (next, found) = (AtomicU64::new(from), Mutex::new(None));
            let _ = self.with(Is::On, || {
                let defect = if let Switch::World(defect) = self.switch { defect } else { world::Defect::None };
                std::thread::scope(|scope| {
                    for _ in 0..THREADS {
                        scope.spawn(|| {
                            while found.lock().unwrap().is_none() {
                                let seed = next.fetch_add(1, Ordering::Relaxed);
                                match run(seed, Options { defect, ..options }) {
                                    _ if seed >= seeds => return,
                                    Ok(_) => {}
                                    Err(violation) => drop(found.lock().unwrap().get_or_insert((seed, violation.to_string()))),
                                }
                            }
                        });
                    }
                });
                Ok(())
            });
            let (seed, what) = found.into_inner().unwrap()?;
            if self.with(Is::Off, || run(seed, options).map(drop).map_err(|v| v.to_string())).is_ok() {
                return Some(what);
            }
            from = seed + 1;
        }
        None
    }
}

fn check_model(bounds: failover::Bounds) -> Result<(), String> {
    let found = failover::explore(bounds, failover::Defect::None, MODEL_STATES_MAX);
    found.broken.first().map_or(Ok(()), |broken| Err(format!("{} ({} states)", broken.name, found.states)))
}

#[test]
fn every_seeded_bug_is_noticed_and_nothing_without_it() {
    let only = std::env::var("COLDSPARE_BUG").ok();
    let mut missed = Vec::new();
    let start = Instant::now();
    for bug in BUGS.iter().filter(|bug| only.as_ref().is_none_or(|only| only == bug.name)) {
        let began = Instant::now();
        let noticed = bug.notice();
        let seconds = began.elapsed().as_secs_f64();
        match noticed {
            Some(what) => println!("{} ({}): {seconds:.1} s, {} notices: {what}", bug.name, bug.breaks, bug.harness.name()),
            None => {
                println!("{} ({}): {seconds:.1} s, {} NOTICES NOTHING", bug.name, bug.breaks, bug.harness.name());
                missed.push(bug.name);
            }
        }
    }
    println!("{} bugs, {:.0} s", BUGS.len(), start.elapsed().as_secs_f64());
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}

#[test]
fn every_seeded_bug_is_in_the_table_and_in_the_documentation() {
    let mut codes: Vec<u32> = BUGS.iter().filter_map(|b| if let Switch::Code(bug) = b.switch { Some(bug as u32) } else { None }).collect();
    codes.sort_unstable();
    assert_eq!(codes, (1..=SeededBug::COUNT).collect::<Vec<_>>());
    let documented = include_str!("../../../../docs/testing.md");
    let missing: Vec<String> = BUGS.iter().map(Bug::row).filter(|row| !documented.contains(row)).collect();
    assert!(missing.is_empty(), "not in docs/testing.md:\n{}", missing.join("\n"));
}

#[test]
fn a_bug_that_is_off_changes_nothing() {
    let held = switch(None);
    scenarios::a_lower_epoch_is_refused().unwrap();
    assert_eq!(reached(), 0);
    drop(held);
    let _held = switch(Some(SeededBug::LowerEpochsAreServed));
    scenarios::a_lower_epoch_is_refused().unwrap_err();
    assert_ne!(reached(), 0);
}

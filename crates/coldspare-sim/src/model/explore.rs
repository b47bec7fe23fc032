//! Examines every crash state of a rehearsal by one oracle.
//!
//! What has to hold after any crash (G1, G3): the standby opens; it is not below the last acknowledged changeset; its tree
//! is exactly that of one committed changeset; nothing was put in quarantine; opening it again changes nothing; and the
//! next changeset, which names everything and uses what the standby says it has, succeeds and leaves nothing staged.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use coldspare_core::changeset::Totals;
use coldspare_core::{Baseline, Body, Seq};

use super::crash::{Crashed, Order};
use super::disk::{ModelDisk, lock};
use super::draft::Draft;
use super::expected::Expected;
use super::hash;
use super::rehearsal::{Defect, Instant, ROOT, Record, Rehearsal, SESSION, open};
use super::store::{ModelStore, StoreImage};

/// What an exploration found.
#[derive(Debug, Clone, Default)]
pub struct Explored {
    /// Crash points.
    pub points: usize,
    /// Crash states, each a state of the files with one of the store.
    pub states: u64,
    /// Those that differ, which were recovered.
    pub recovered: u64,
    /// What broke a promise, at most [`VIOLATIONS_MAX`].
    pub violations: Vec<Violation>,
    /// How many states had been seen when the first violation was found.
    pub first_after: Option<u64>,
}

/// A crash state that broke a promise.
#[derive(Debug, Clone)]
pub struct Violation {
    /// What names the state: `point:order:store:choices`.
    pub key: String,
    /// What was found.
    pub detail: String,
}

/// How thoroughly to look.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// States of the files at each crash point and order.
    pub states_max: usize,
    /// Whether to stop at the first violation.
    pub stops_at_first: bool,
}

/// LIMIT: violations that are kept; more are only counted as states.
pub const VIOLATIONS_MAX: usize = 8;

const STAGE: [&str; 2] = ["/home/.coldspare/stage/f", "/home/.coldspare/stage/t"];

const ORDERS: [Order; 2] = [Order::Journal, Order::Any];

/// States of the files that each torn store is examined with.
const FILES_BY_TORN: usize = 6;

/// Runs `rehearse` once, then examines what a crash leaves at each of its instants.
pub fn explore(limits: Limits, defect: Option<Defect>, rehearse: impl FnOnce(&mut Rehearsal)) -> Explored {
    let mut rehearsal = Rehearsal::new(defect);
    rehearse(&mut rehearsal);
    let record = rehearsal.into_record();
    let judge = Judge::new(&record, limits);
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    match record.points.get(number) {
                        Some(instant) if !judge.is_done() => judge.examine(number, instant),
                        _ => return,
                    }
                }
            });
        }
    });
    judge.found(record.points.len())
}

/// Recovers one state, by the key of its violation.
///
/// # Errors
/// What is wrong with it.
pub fn replay(key: &str, rehearse: impl FnOnce(&mut Rehearsal)) -> Result<(), String> {
    let mut parts = key.split(':');
    let mut part = || parts.next().ok_or("a key has four parts");
    let (point, order, store, choice) = (part()?, part()?, part()?, part()?);
    let number = |text: &str| text.parse::<usize>().map_err(|e| e.to_string());
    let mut rehearsal = Rehearsal::new(None);
    rehearse(&mut rehearsal);
    let record = rehearsal.into_record();
    let judge = Judge::new(&record, Limits { states_max: 0, stops_at_first: true });
    let instant = record.points.get(number(point)?).ok_or("no such point")?;
    let order = if order == "J" { Order::Journal } else { Order::Any };
    let crashed = instant.files.chosen(order, choice).ok_or("no such state")?;
    let stores: Vec<_> = instant.stores.iter().chain(&instant.torn).collect();
    judge.judge(instant, crashed, stores.get(number(store)?).ok_or("no such store")?)
}

struct Judge<'a> {
    record: &'a Record,
    limits: Limits,
    seen: [Mutex<HashSet<u64>>; 64],
    states: AtomicU64,
    recovered: AtomicU64,
    violations: Mutex<Vec<Violation>>,
    first_after: Mutex<Option<u64>>,
}

impl<'a> Judge<'a> {
    fn new(record: &'a Record, limits: Limits) -> Judge<'a> {
        let seen = std::array::from_fn(|_| Mutex::default());
        let (states, recovered) = (AtomicU64::new(0), AtomicU64::new(0));
        Judge { record, limits, seen, states, recovered, violations: Mutex::default(), first_after: Mutex::default() }
    }

    fn examine(&self, number: usize, instant: &Instant) {
        let floor = hash::mix(instant.acked.map_or(0, |s| s.0 + 1), instant.trying.map_or(0, |s| s.0 + 1));
        for order in ORDERS {
            let take = &mut |crashed: Crashed, first: usize, stores: &[StoreImage]| {
                for (store, image) in stores.iter().enumerate() {
                    let state = self.states.fetch_add(1, Ordering::Relaxed);
                    if self.is_done() || !self.is_new(hash::mix(hash::mix(crashed.hash(), image.hash()), floor)) {
                        continue;
                    }
                    self.recovered.fetch_add(1, Ordering::Relaxed);
                    let choice = crashed.choice();
                    // A store that lost what it synced makes redb panic.
                    let judged = catch_unwind(AssertUnwindSafe(|| self.judge(instant, crashed.clone(), image)));
                    if let Err(detail) = judged.unwrap_or_else(|_| Err("a panic".into())) {
                        let sign = if order == Order::Journal { "J" } else { "A" };
                        lock(&self.first_after).get_or_insert(state + 1);
                        let mut violations = lock(&self.violations);
                        if violations.len() < VIOLATIONS_MAX {
                            violations.push(Violation { key: format!("{number}:{sign}:{}:{choice}", first + store), detail });
                        }
                    }
                }
            };
            let seed = number as u64;
            instant.files.for_each(order, self.limits.states_max, seed, &mut |crashed| take(crashed, 0, &instant.stores));
            if !instant.torn.is_empty() {
                let first = instant.stores.len();
                instant.files.for_each(order, FILES_BY_TORN, seed, &mut |crashed| take(crashed, first, &instant.torn));
            }
        }
    }

    fn judge(&self, instant: &Instant, crashed: Crashed, image: &StoreImage) -> Result<(), String> {
        let disk = crashed.durable_disk();
        let store = ModelStore::of(image.clone());
        let standby = open(&disk, &store).map_err(|e| format!("the standby can't be opened: {e}"))?;
        let applied = standby.applied().map(|a| a.seq);
        if applied != instant.acked && applied != instant.trying {
            return Err(format!("{applied:?} was found after {:?} was acknowledged and {:?} begun", instant.acked, instant.trying));
        }
        let tree = &self.record.trees[&applied.unwrap_or_default()];
        tree.difference(&disk, ROOT.as_bytes()).map_or(Ok(()), |d| Err(format!("after recovery to {applied:?}: {d}")))?;
        nothing_foreign(&disk)?;
        let (files, durable) = (disk.fingerprint(), store.durable());
        // What the store doesn't know of in the stage folder makes no difference from here on.
        let staged = standby.staged_files().map_err(|e| format!("what is staged can't be told: {e}"))?;
        let known = if staged > 0 { files } else { disk.fingerprint_without(&STAGE) };
        drop(standby);
        if !self.is_new(hash::mix(hash::mix(known, durable.hash()), 0xAF7E2)) {
            return Ok(());
        }
        // Once more, as after a kill.
        let store = ModelStore::of(durable);
        let standby = open(&disk, &store).map_err(|e| format!("the standby can't be opened twice: {e}"))?;
        if standby.applied().map(|a| a.seq) != applied || disk.fingerprint() != files {
            return Err("a second recovery changes something".into());
        }
        // What an exploration never numbers a changeset.
        let seq = Seq(1 << 40);
        let mut draft = following(tree, seq);
        if staged > 0 {
            // What an interrupted changeset left is there, whole, or not said to be there.
            let later = self.record.trees.range(applied.unwrap_or_default().next()..);
            let files = later.flat_map(|(_, tree)| tree.all()).filter(|(_, holds)| holds.entry.digest().is_some());
            for (number, (_, holds)) in files.enumerate() {
                draft.asked(&format!("left-{number}"), &holds.content);
            }
        }
        let fail = |e| format!("the following changeset fails: {e}");
        standby.begin(SESSION, seq, Baseline::Full, seq).map_err(fail)?;
        let ops = draft.stage(&standby, seq, draft.steps()).map_err(fail)?;
        standby.finish(seq, 1, Totals { ops, ..Totals::default() }).map_err(fail)?;
        draft.expected.difference(&disk, ROOT.as_bytes()).map_or(Ok(()), |d| Err(format!("after the following changeset: {d}")))?;
        nothing_foreign(&disk)?;
        for folder in ["stage/f", "stage/t", "trash"] {
            let names = disk.names(format!("{ROOT}/.coldspare/{folder}")).map_err(|e| format!("{folder}: {e}"))?;
            if let Some(name) = names.first() {
                return Err(format!("{} stays in {folder}", name.escape_ascii()));
            }
        }
        Ok(())
    }

    fn is_new(&self, state: u64) -> bool {
        lock(&self.seen[(state % 64) as usize]).insert(state)
    }

    fn is_done(&self) -> bool {
        let enough = if self.limits.stops_at_first { 1 } else { VIOLATIONS_MAX };
        lock(&self.violations).len() >= enough
    }

    fn found(self, points: usize) -> Explored {
        let inner = |n: AtomicU64| n.into_inner();
        let violations = std::mem::take(&mut *lock(&self.violations));
        let first_after = lock(&self.first_after).take();
        Explored { points, states: inner(self.states), recovered: inner(self.recovered), violations, first_after }
    }
}

impl Explored {
    /// Adds what another exploration found.
    pub fn add(&mut self, other: Explored) {
        self.points += other.points;
        self.states += other.states;
        self.recovered += other.recovered;
        self.violations.extend(other.violations);
        self.first_after = self.first_after.or(other.first_after);
    }
}

/// Nothing was taken for somebody else's.
fn nothing_foreign(disk: &ModelDisk) -> Result<(), String> {
    match disk.names(format!("{ROOT}/.coldspare/quarantine")) {
        Ok(names) if !names.is_empty() => Err(format!("{} is in quarantine", names[0].escape_ascii())),
        _ => Ok(()),
    }
}

/// A changeset that names everything: all of `tree`, asked for, and one file more.
fn following(tree: &Expected, seq: Seq) -> Draft {
    let mut draft = Draft::new(Baseline::Full, tree, seq.0);
    for (path, holds) in tree.all().filter(|(path, _)| !path.is_empty()) {
        let path = std::str::from_utf8(path).expect("names of a rehearsal are text");
        match &holds.entry.body {
            Body::Dir => draft.dir(path),
            Body::File { .. } => draft.asked(path, &holds.content),
            Body::Symlink { target } => draft.symlink(path, std::str::from_utf8(target).expect("text")),
            Body::Hardlink { to } => draft.hardlink(path, std::str::from_utf8(to.as_bytes()).expect("text")),
        }
    }
    draft.file("the-following", b"changeset");
    draft
}

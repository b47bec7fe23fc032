//! Which states a crash can leave of a disk.
//!
//! Two filesystems are modelled. One whose journal keeps names and attributes in order: a prefix of them, and any of the
//! writes of content. One that orders nothing: any subset, as long as each operation finds what it needs.

use crate::Chance;

use super::disk::ModelDisk;
use super::image::Image;
use super::log::{Durability, Left, Log, Op};
use super::state::State;

/// What a filesystem promises about the order of what it was not asked to make durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Names and attributes become durable in the order in which they were changed; content does not.
    Journal,
    /// Nothing.
    Any,
}

/// A disk at one instant, with all that a crash could do to it; cheap to clone.
#[derive(Debug, Clone)]
pub struct CrashPoint {
    log: Log,
    now_ns: u64,
}

/// What a crash left.
#[derive(Debug, Clone)]
pub struct Crashed {
    image: Image,
    now_ns: u64,
    choice: Vec<Choice>,
}

/// What becomes of one operation that is not durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Dropped,
    Kept(Left),
}

const KEPT: Choice = Choice::Kept(Left::Whole);

impl ModelDisk {
    /// Takes hold of the disk as it is now.
    pub fn crash_point(&self) -> CrashPoint {
        let state = self.state();
        CrashPoint { log: state.log.clone(), now_ns: state.now_ns }
    }

    /// Makes the disk that one crash, by chance, leaves of this one.
    pub fn crash(&self, chance: &mut Chance) -> ModelDisk {
        let point = self.crash_point();
        let order = *chance.pick(&[Order::Journal, Order::Any]);
        // All that was done is always one of the states.
        (0..64).find_map(|_| point.by_chance(order, chance)).unwrap_or_else(|| point.whole()).disk()
    }

    /// A number for the state that calls see, but for change times; equal states have equal numbers.
    pub fn fingerprint(&self) -> u64 {
        self.state().live.clone().without_orphans().hash()
    }

    /// As [`ModelDisk::fingerprint`], without what the folders `empty` hold.
    pub(super) fn fingerprint_without(&self, empty: &[&str]) -> u64 {
        let state = self.state();
        let mut image = state.live.clone();
        for path in empty {
            let Ok(dir) = state.walk(super::image::ROOT, path.as_bytes()) else { continue };
            for (name, _) in state.list(dir).unwrap_or_default() {
                image.unset_entry(dir, &name, (0, 0));
            }
        }
        image.without_orphans().hash()
    }
}

impl Crashed {
    /// The disk as it is found after the crash, all of it durable.
    pub fn disk(self) -> ModelDisk {
        ModelDisk::of(State::new(self.image.without_orphans(), self.now_ns, true))
    }

    /// As [`Crashed::disk`], for one that nobody will crash again.
    pub(super) fn durable_disk(self) -> ModelDisk {
        ModelDisk::of(State::new(self.image.without_orphans(), self.now_ns, false))
    }

    pub(super) fn hash(&self) -> u64 {
        self.image.hash()
    }

    /// What became of each operation that was not durable: `-` dropped, `+` kept, `0` length without bytes.
    pub fn choice(&self) -> String {
        let sign = |c: &Choice| match c {
            Choice::Dropped => '-',
            Choice::Kept(Left::Whole) => '+',
            Choice::Kept(Left::Zeros) => '0',
        };
        self.choice.iter().map(sign).collect()
    }
}

impl CrashPoint {
    /// Operations that a crash may leave out.
    pub fn pending(&self) -> usize {
        self.log.ops.iter().filter(|l| l.state == Durability::Pending).count()
    }

    /// Calls `each` with every state that a crash leaves, or, when they are more than about `max`, with those that differ
    /// from the whole or from the least by one operation and others by chance. A state may come several times.
    pub fn for_each(&self, order: Order, max: usize, seed: u64, each: &mut dyn FnMut(Crashed)) {
        let cuts = self.cuts(order);
        let log_max = (max as f64 / cuts.len() as f64).log2();
        let options = self.log.ops.iter().filter(|l| l.state == Durability::Pending && (order == Order::Any || l.op.is_content()));
        let all: f64 = options.map(|l| if matches!(l.op, Op::Write { .. }) { 3f64.log2() } else { 1.0 }).sum();
        if all <= log_max {
            for cut in cuts {
                self.exhaust(order, cut, 0, self.log.base.clone(), &mut Vec::new(), each);
            }
            return;
        }
        let mut left = max;
        let mut take = |crashed: Option<Crashed>| {
            left = left.saturating_sub(1);
            crashed.into_iter().for_each(&mut *each);
            left > 0
        };
        let count = self.log.ops.len();
        for (all, one) in [(KEPT, Choice::Dropped), (Choice::Dropped, KEPT), (KEPT, Choice::Kept(Left::Zeros))] {
            // The latest are what differs from the crash point before.
            for at in (0..=count.min(max / 6)).map(|back| count - back) {
                if !take(self.with(order, count, &mut |i| if i == at { one } else { all })) {
                    return;
                }
            }
        }
        let mut chance = Chance::new(seed);
        while take(self.by_chance(order, &mut chance)) {}
    }

    /// The state with these choices, as [`Crashed::choice`] wrote them.
    pub fn chosen(&self, order: Order, choice: &str) -> Option<Crashed> {
        let mut signs = choice.bytes();
        let mut pick = |_| match signs.next() {
            Some(b'+') => KEPT,
            Some(b'0') => Choice::Kept(Left::Zeros),
            _ => Choice::Dropped,
        };
        self.replay(order, &mut pick)
    }

    /// Everything that was done.
    pub fn whole(&self) -> Crashed {
        self.replay(Order::Any, &mut |_| KEPT).unwrap_or_else(|| Crashed {
            image: self.log.base.clone(),
            now_ns: self.now_ns,
            choice: Vec::new(),
        })
    }

    /// Where a journal may end.
    fn cuts(&self, order: Order) -> Vec<usize> {
        let ops = &self.log.ops;
        if order == Order::Any {
            return vec![ops.len()];
        }
        let least = ops.iter().rposition(|l| l.state == Durability::Durable && !l.op.is_content()).map_or(0, |at| at + 1);
        let ends = |&cut: &usize| cut == ops.len() || (!ops[cut].op.is_content() && ops[cut].state == Durability::Pending);
        (least..=ops.len()).filter(ends).collect()
    }

    fn exhaust(&self, order: Order, cut: usize, from: usize, mut image: Image, choice: &mut Vec<Choice>, each: &mut dyn FnMut(Crashed)) {
        let depth = choice.len();
        for (at, logged) in self.log.ops.iter().enumerate().skip(from) {
            let is_free = order == Order::Any || logged.op.is_content();
            match logged.state {
                Durability::Lost => continue,
                Durability::Durable => {
                    if logged.op.apply(&mut image, logged.at, Left::Whole).is_err() {
                        choice.truncate(depth);
                        return;
                    }
                }
                Durability::Pending if !is_free => {
                    choice.push(if at < cut { KEPT } else { Choice::Dropped });
                    if at < cut && logged.op.apply(&mut image, logged.at, Left::Whole).is_err() {
                        choice.truncate(depth);
                        return;
                    }
                }
                Durability::Pending => {
                    let zeros = matches!(logged.op, Op::Write { .. }).then_some(Left::Zeros);
                    for left in [Some(Left::Whole), zeros].into_iter().flatten() {
                        let mut with = image.clone();
                        if logged.op.changes(&image) && logged.op.apply(&mut with, logged.at, left).is_ok() {
                            choice.push(Choice::Kept(left));
                            self.exhaust(order, cut, at + 1, with, choice, each);
                            choice.pop();
                        }
                    }
                    choice.push(Choice::Dropped);
                }
            }
        }
        each(Crashed { image, now_ns: self.now_ns, choice: choice.clone() });
        choice.truncate(depth);
    }

    fn by_chance(&self, order: Order, chance: &mut Chance) -> Option<Crashed> {
        let cuts = self.cuts(order);
        let cut = *chance.pick(&cuts);
        // From nearly all to nearly none; half of the time whole files and folders share a fate.
        let (kept, of) = (1 + chance.below(15), 16);
        let together = chance.happens(1, 2);
        let fates = chance.bits();
        let ops = &self.log.ops;
        self.with(order, cut, &mut |at| {
            let inode = ops[at].op.inode().or(ops[at].op.dirs()[0]).map_or(0, |id| u64::from(id.0));
            let is_kept = if together { Chance::new(fates ^ inode).happens(kept, of) } else { chance.happens(kept, of) };
            match (is_kept, chance.happens(1, 4)) {
                (true, _) => KEPT,
                (false, true) => Choice::Kept(Left::Zeros),
                (false, false) => Choice::Dropped,
            }
        })
    }

    fn with(&self, order: Order, cut: usize, pick: &mut dyn FnMut(usize) -> Choice) -> Option<Crashed> {
        self.replay(order, &mut |at| {
            let op = &self.log.ops[at].op;
            match pick(at) {
                _ if order == Order::Journal && !op.is_content() => {
                    if at < cut {
                        KEPT
                    } else {
                        Choice::Dropped
                    }
                }
                Choice::Kept(Left::Zeros) if !matches!(op, Op::Write { .. }) => Choice::Dropped,
                choice => choice,
            }
        })
    }

    /// `None` when what is durable can't be without what is dropped.
    fn replay(&self, order: Order, pick: &mut dyn FnMut(usize) -> Choice) -> Option<Crashed> {
        let mut image = self.log.base.clone();
        let mut choice = Vec::with_capacity(self.log.ops.len());
        for (at, logged) in self.log.ops.iter().enumerate() {
            match logged.state {
                Durability::Lost => {}
                Durability::Durable => logged.op.apply(&mut image, logged.at, Left::Whole).ok()?,
                Durability::Pending => {
                    let picked = match pick(at) {
                        Choice::Kept(left) if logged.op.apply(&mut image, logged.at, left).is_ok() => Choice::Kept(left),
                        // A journal has no holes.
                        Choice::Kept(_) if order == Order::Journal => return None,
                        _ => Choice::Dropped,
                    };
                    choice.push(picked);
                }
            }
        }
        Some(Crashed { image, now_ns: self.now_ns, choice })
    }
}
